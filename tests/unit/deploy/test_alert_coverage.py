"""Goal: whatever must stay 0, and whatever is a lag or an age, has an alert in every stage that has it; and no rule
names a metric, a stage or a label that does not exist.

Method: the rules' expressions are read for selectors, and compared with the table of metrics.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest

from headrace.backends.metrics_prometheus import LABELLED_REASON
from headrace.contract.metrics import METRICS, Stage

FOLDER = Path(__file__).resolve().parents[3] / "deploy" / "prometheus"
FILES = sorted(FOLDER.glob("*.rules.yaml"))


@dataclass(frozen=True)
class Rule:
    """An alert. `templates` are its annotations."""

    alert: str
    expr: str
    severity: str
    templates: str


def read_rules(text: str) -> list[Rule]:
    """Return the rules of a file; these files have one order of keys, so that no reader of YAML is needed."""
    plain = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    found = []
    for block in plain.split("- alert:")[1:]:
        alert, expr, severity, templates = RULE.fullmatch(block).groups()  # type: ignore[union-attr]
        found.append(Rule(alert, " ".join(expr.split()).removeprefix(">- "), severity, templates))
    return found


RULE = re.compile(
    r" (\w+)\n +expr: (.*?)\n(?: +for: \w+\n)? +labels:\n +severity: (\w+)\n +annotations:\n(.*)", re.DOTALL
)
RULES = [rule for file in FILES for rule in read_rules(file.read_text())]
STAGES = "|".join(get_args(Stage))
OF_PROMETHEUS = {"instance", "job"}

SELECTOR = re.compile(
    rf"""(?:\{{__name__=~"headrace_\((?P<many>[a-z|]+)\)_(?P<of_many>\w+)"(?P<more>[^}}]*)\}}"""
    rf"""|headrace_(?P<one>{STAGES})_(?P<of_one>[a-z_]+)(?:\{{(?P<labels>[^}}]*)\}})?)"""
)
LABEL = re.compile(r"""(\w+)\s*(?:=~|!~|!=|=)\s*["']""")
LAG = re.compile(r"^lag_|^behind_|_behind_|_age_|^watermark_|^outbox_")


def selected(text: str) -> list[tuple[str, str, set[str]]]:
    """Return stage, metric and labels of each selector of an expression or a template."""
    found = []
    for match in SELECTOR.finditer(text):
        stages = (match["many"] or match["one"]).split("|")
        labels = set(LABEL.findall(match["more"] or match["labels"] or ""))
        found += [(stage, match["of_many"] or match["of_one"], labels) for stage in stages]
    return found


def has(stage: str, name: str) -> bool:
    """Say whether the stage has the metric; a histogram's series are its own with a suffix."""
    plain = re.sub(r"_(bucket|sum|count)$", "", name)
    doc = METRICS.get(name) or METRICS.get(plain)  # type: ignore[call-overload]
    return doc is not None and stage in doc.stages


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.alert)
def test_what_a_rule_names_exists_with_its_labels(rule: Rule) -> None:
    found = selected(rule.expr)
    assert found or "up{" in rule.expr
    labels_of_all = set(OF_PROMETHEUS)
    for stage, name, labels in [*found, *selected(rule.templates)]:
        assert has(stage, name), f"no stage {stage} has {name}"
        known = {*METRICS[name].labels, *OF_PROMETHEUS} if name in METRICS else OF_PROMETHEUS  # type: ignore[index]
        assert labels <= known, f"{name} has no label {labels - known}"
        labels_of_all |= known | ({"reason"} if name in LABELLED_REASON else set())
    used = set(re.findall(r"\$labels\.(\w+)", rule.templates))
    assert used <= labels_of_all, f"templates use {used - labels_of_all}"
    groups = re.findall(r"\b(?:by|on) ?\(([^)]*)\)", rule.expr)
    grouped = {label for group in groups for label in re.findall(r"\w+", group)}
    assert grouped <= labels_of_all


def test_every_rule_says_how_bad_it_is_and_every_file_is_loaded() -> None:
    assert len({rule.alert for rule in RULES}) == len(RULES)
    assert {rule.severity for rule in RULES} == {"warning", "critical"}
    loaded = re.findall(r"^  - (\S+\.rules\.yaml)$", (FOLDER / "prometheus.yaml").read_text(), re.MULTILINE)
    assert loaded == [file.name for file in FILES]


NEEDED = [
    (stage, name)
    for name, doc in METRICS.items()
    for stage in doc.stages
    if "must stay 0" in doc.meaning or (doc.kind == "gauge" and LAG.search(name))
]


def test_the_table_marks_what_needs_an_alert() -> None:
    assert {name for _, name in NEEDED} >= {"gap_total", "receipts_refused_total", "lag_records", "model_age_seconds"}


@pytest.mark.parametrize(("stage", "name"), NEEDED, ids=lambda each: str(each))
def test_what_must_stay_zero_and_every_lag_has_an_alert(stage: str, name: str) -> None:
    assert any((stage, name) == found[:2] for rule in RULES for found in selected(rule.expr)), (
        f"headrace_{stage}_{name} is in no rule of deploy/prometheus: whoever runs it is not told"
    )


def test_each_target_of_the_local_stack_is_scraped() -> None:
    found = re.findall(r"- (127\.0\.0\.1:\d+)", (FOLDER / "prometheus.yaml").read_text())
    assert found == [f"127.0.0.1:{9_101 + number}" for number in range(len(get_args(Stage)))]


def test_a_rule_on_a_counter_with_labels_sees_its_first_count() -> None:
    """A labelled series begins with its first count, and increase() of a series that begins is 0."""
    begun = {"label_rate_jumps_total", "unhealthy_restarts_total", "beyond_bound_total"}  # these begin at 0
    for rule in RULES:
        for name in re.findall(r"increase\(headrace_[a-z]+_(\w+_total)", rule.expr):
            doc = METRICS[name]
            assert not doc.labels or name in begun or "sum" in rule.expr, rule.alert
