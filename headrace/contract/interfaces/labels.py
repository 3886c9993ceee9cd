"""The values of a metric's labels, checked against what `headrace.contract.metrics` declares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from headrace.contract.errors import InvariantBroken
from headrace.contract.metrics import METRICS, Kind, Name


def label_values(name: Name, kind: Kind, labels: Mapping[str, str]) -> tuple[str, ...]:
    """Return the values of the metric's declared labels, in their order, "" for one that is not given.

    >>> label_values("window_auc", "gauge", {"task": "click"})
    ('click', '')

    Raises `InvariantBroken` when the metric is of another kind or declares no such label.
    """
    doc = METRICS[name]
    if doc.kind != kind:
        raise InvariantBroken(
            f"metric {name} is a {doc.kind} and was used as a {kind}: see headrace/contract/metrics/."
        )
    if not labels.keys() <= set(doc.labels):
        raise InvariantBroken(
            f"metric {name} was given the labels {sorted(labels)} and declares {sorted(doc.labels)}: "
            "declare the label in headrace/contract/metrics/."
        )
    return tuple(labels.get(label, "") for label in doc.labels)


def joined(values: Iterable[str]) -> str:
    """Return the values of labels that are given, joined by a space: one text for all of them.

    >>> joined(("click", "tab=0")), joined(("click", ""))
    ('click tab=0', 'click')
    """
    return " ".join(filter(None, values))
