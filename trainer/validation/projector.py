"""Embeddings for TensorBoard's projector: the ids that were seen most, with their values as labels.

Three files beside the event file, replaced each time: `projector_config.pbtxt`, `embeddings.tsv` and
`embeddings_labels.tsv` (id, feature, times seen, label rate). The projector cannot read a table of millions: each
feature shows the `SHOWN` ids that were seen most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from headrace.contract.spec import Categorical, FeatureSpec
from headrace.trainer.model.batch import Batch
from headrace.trainer.model.scoring import Float32s
from headrace.trainer.model.tables.table import Int64s

SHOWN = 300
KEPT_MAX = 4_000
"""Most ids of a feature that are counted; beyond it the rarer half is forgotten."""
ROWS_A_STEP = 64


@dataclass
class Seen:
    """How often one id was seen in the rows that were counted."""

    feature: str
    label: str
    times: int = 0
    positives: float = 0.0


class Sampler:
    """Counts the ids of categorical features in some rows of each step. For display: nothing is learnt from it."""

    def __init__(self, features: FeatureSpec) -> None:
        self._slots: list[tuple[int, str]] = []
        at = 0
        for feature in features.features:
            if isinstance(feature, Categorical):
                self._slots.append((at, feature.field))
            at += feature.slots
        self._seen: dict[str, dict[int, Seen]] = {name: {} for _, name in self._slots}

    def note(self, batch: Batch, rows: pa.Table) -> None:
        """Count the first rows of a batch, whose samples `rows` are. Stored ones may have come without the fields."""
        some = rows.slice(0, ROWS_A_STEP)
        labels = batch.label_B[: some.num_rows].tolist()
        for slot, name in self._slots:
            if name not in some.column_names:
                continue
            seen = self._seen[name]
            keys = batch.slots_BF[: some.num_rows, slot].tolist()
            for key, value, label in zip(keys, some[name].to_pylist(), labels, strict=True):
                one = seen.get(key)
                if one is None and value is None:
                    continue
                if one is None:
                    one = seen[key] = Seen(name, str(value))
                one.times += 1
                one.positives += label
            if len(seen) > KEPT_MAX:
                ranked = sorted(seen, key=lambda key, of=seen: -of[key].times)  # type: ignore[misc]
                self._seen[name] = {key: seen[key] for key in ranked[: KEPT_MAX // 2]}

    def chosen(self) -> dict[int, Seen]:
        """Return, by key, each feature's ids that were seen most."""
        out: dict[int, Seen] = {}
        for seen in self._seen.values():
            ranked = sorted(seen, key=lambda key, of=seen: -of[key].times)  # type: ignore[misc]
            out |= {key: seen[key] for key in ranked[:SHOWN]}
        return out


def write_projector(folder: Path, chosen: dict[int, Seen], lookup: Callable[[Int64s], Float32s]) -> None:
    """Write the three files; a reader finds the old ones or the new ones of each."""
    if not chosen:
        return
    values_KV = lookup(np.array(list(chosen), np.int64))
    vectors = ["\t".join(f"{x:.5g}" for x in row) for row in values_KV]
    labels = ["id\tfeature\ttimes seen\tlabel rate"]
    for one in chosen.values():
        name = " ".join(f"{one.feature}={one.label}".split())
        labels.append(f"{name}\t{one.feature}\t{one.times}\t{one.positives / one.times:.3f}")
    config = (
        'embeddings {\n  tensor_name: "ids"\n  tensor_path: "embeddings.tsv"\n'
        '  metadata_path: "embeddings_labels.tsv"\n}\n'
    )
    _replace(folder / "embeddings.tsv", vectors)
    _replace(folder / "embeddings_labels.tsv", labels)
    _replace(folder / "projector_config.pbtxt", config.splitlines())


def _replace(path: Path, lines: Sequence[str]) -> None:
    draft = path.with_suffix(".draft")
    draft.write_text("\n".join(lines) + "\n")
    draft.replace(path)
