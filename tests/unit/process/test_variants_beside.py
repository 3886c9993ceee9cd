"""Goal: the trainers of variants are processes of the stack, each with a metrics port that it keeps. Method: a
supervisor that notes what it is asked, and /metrics as text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headrace.contract.errors import ConfigRejected
from headrace.deploy.local.layout import Layout
from headrace.deploy.local.readiness import stage_probes
from headrace.deploy.local.stack import programs, with_variants
from headrace.deploy.local.status_line import StatusLine
from headrace.deploy.local.supervise import Program, configuration, port_of


class Supervisor:
    """Notes what it is asked."""

    def __init__(self, *names: str) -> None:
        self.names, self.asked = list(names), list[Any]()

    def processes(self) -> list[Any]:
        return [SimpleNamespace(name=name) for name in self.names]

    def add(self, added: list[Program]) -> None:
        self.names += [each.name for each in added]
        self.asked.append([each.name for each in added])

    def end(self, names: tuple[str, ...]) -> None:
        self.asked.append(("end", *names))

    def begin(self, names: tuple[str, ...]) -> None:
        self.asked.append(("begin", *names))


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(
        home=tmp_path, port_base=30_000, brokers="127.0.0.1:1", store="file:/x", webhdfs=None, project=tmp_path,
        own_kafka=False, own_hdfs=False, variants=("deep", "wide"),
    )  # fmt: skip


def test_up_starts_one_for_each_variant(layout: Layout) -> None:
    found = {p.name: p.command for p in programs(layout, lambda text: None, stages=("train", "serve"))}
    assert found["train@wide"][-3:] == ["train", "--variant", "wide"] and "train@deep" in found
    assert "[program:train@deep]" in configuration(layout, [Program("train@deep", ["x"])], "s")
    assert [port_of(layout, f"train@{name}") for name in layout.variants] == [
        layout.port("metrics_train_1"),
        layout.port("metrics_train_2"),
    ]
    assert {"train", "train@deep", "train@wide"} <= stage_probes(layout).keys()
    assert not any("@" in p.name for p in programs(layout, lambda text: None, stages=("sink",)))


def test_one_that_is_declared_later_is_added_and_the_others_keep_their_ports(layout: Layout) -> None:
    layout.save()
    supervisor = Supervisor("train", "watch", "train@deep", "train@wide")
    grown = with_variants(replace(layout, variants=("more", "deep", "wide")), supervisor)  # type: ignore[arg-type]
    assert grown.variants == ("deep", "wide", "more")
    assert supervisor.asked == [["train@more"], ("end", "watch"), ("begin", "watch")]
    saved = Layout.saved(layout.home)
    assert saved is not None and saved.variants == grown.variants
    again = Supervisor(*supervisor.names)
    assert with_variants(grown, again) == grown and not again.asked  # type: ignore[arg-type]
    with pytest.raises(ConfigRejected, match="4 have metrics ports"):
        with_variants(replace(grown, variants=(*grown.variants, "a", "b")), again)  # type: ignore[arg-type]


def test_the_line_of_follow_names_each_variant(layout: Layout) -> None:
    told = {
        f":{layout.metrics_port('train@deep')}/": b"headrace_train_auc 0.75\nheadrace_train_samples_learnt_total 9\n"
    }

    def read(url: str) -> tuple[int, bytes]:
        return next(((200, text) for place, text in told.items() if place in url), (0, b""))

    line = StatusLine(layout, "click", read=read).line()
    assert "| deep: AUC 0.7500" in line and "over 9 rows" in line and "| wide: AUC -" in line
