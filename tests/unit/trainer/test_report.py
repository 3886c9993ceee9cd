"""Goal: what the trainer knows of itself reaches Prometheus and TensorBoard.

Method: a trainer over stored, then live samples in memory; its event file and the projector's files are read back.
"""

from __future__ import annotations

import errno
import logging
import re

import numpy as np
import pyarrow as pa
import pytest
import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from trainer_world import PARTITIONS, Lake, World, samples, send

from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.config import TrainConfig
from headrace.contract.formats.positions import Position, Positions
from headrace.trainer.run import Trainer
from headrace.trainer.validation.board import AGAIN_MS, Board

torch.set_num_threads(1)
ROWS = 3_600


class Shown:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []

    def begin(self, what: str, total: int) -> None:
        self.told.append((what, total))

    def done(self, count: int) -> None:
        self.told.append(("done", count))

    def end(self) -> None:
        self.told.append(("end", 0))


def trained(folder, *, stored: int = ROWS, jump: bool = False) -> tuple[World, MemoryMetrics, Shown, Trainer]:
    """Train on a lake, then on a topic; with `jump` nobody clicks any more in the topic."""
    rows = pa.concat_tables([pa.Table.from_batches([samples(1, p, stored)]) for p in range(PARTITIONS)])
    last = {p: Position((stored - 1) // 3, (stored - 1) % 3) for p in range(PARTITIONS)}
    world = World(lake=Lake(rows, Positions(1, dict(last)), dict.fromkeys(range(PARTITIONS), 0)))
    metrics, shown = MemoryMetrics(), Shown()
    config = TrainConfig(snapshot_ms=30_000, slices=("item",), slice_values_max=3, projector_ms=1_000)
    deps = world.deps(config=config, metrics=metrics, board=Board(folder), progress=shown)
    trainer = Trainer(deps)
    trainer.recover()
    for part in range(5):
        for p in range(PARTITIONS):
            batch = samples(1, p, 600, offset=stored + 600 * part)
            if jump:
                at = batch.schema.get_field_index("label")
                batch = batch.set_column(at, batch.schema.field(at), pa.array(np.zeros(600, np.float32)))
                at = batch.schema.get_field_index("feedback_time_ms")
                batch = batch.set_column(at, batch.schema.field(at), pa.nulls(600, pa.int64()))
            send(world.log, batch, after=tuple(last[p]))
            last[p] = Position(batch["offset"][-1].as_py(), batch["rank"][-1].as_py())
    idle = 0
    while idle < 4:
        trainer.lake_progress.show()
        idle = 0 if trainer.turn() else idle + 1
        trainer._tell()
        world.clock.advance(0.03)
    world.clock.advance(2)
    trainer._tell()
    trainer.close()
    return world, metrics, shown, trainer


@pytest.fixture(scope="module")
def steady(tmp_path_factory):
    """Return a run whose label rate is steady, and its folder."""
    folder = tmp_path_factory.mktemp("board") / "train"
    return folder, *trained(folder)


def test_everything_is_told(steady):
    folder, _, metrics, shown, trainer = steady
    gauges = metrics.gauges
    assert {gauges["auc_constant", ""], metrics.counters["label_rate_jumps_total", "click"]} == {0.5, 0}
    assert 0.75 < gauges["auc", ""] < 0.95 and 0.5 < gauges["normalized_entropy", ""] < 0.9
    assert abs(gauges["calibration", ""] - 1) < 0.1
    slices = {of for name, of in gauges if name == "slice_auc"}
    assert len(slices) == 4 and "click item=(other)" in slices
    assert {of for name, of in gauges if name == "window_calibration"} == slices | {"click"}
    assert gauges["lag_records", ""] == gauges["lag_samples", ""] == 0
    assert ("samples_per_second", "") in gauges and gauges["table_rows", ""] == trainer.learner.rows

    began = ("learning the lake", PARTITIONS * ROWS)
    assert began in shown.told
    assert shown.told[-2:] == [("done", began[1]), ("end", 0)]

    path = next(folder.glob("events.out*"))
    tags: dict[str, str] = {}
    for event in EventFileLoader(str(path)).Load():
        for value in event.summary.value:
            tags[value.tag] = value.metadata.plugin_data.plugin_name
    wanted = [f"1_figures/{k}/click" for k in ("auc", "log_loss", "normalized_entropy", "calibration", "auc_item_rate")]
    wanted += [f"2_windows/{k}/click" for k in ("auc", "calibration", "label_rate", "samples")]
    wanted += ["2_windows/log_loss/click item=(other)", "4_table/rows", "5_lag/seconds", "5_lag/records"]
    wanted += [f"3_learning/{k}" for k in ("rate_table", "samples_per_second", "norm_weights_table")]
    wanted += [f"3_learning/norm_{k}" for k in ("gradient_dense", "gradient_table", "weights_dense")]
    assert [tag for tag in wanted if tags.get(tag) != "scalars"] == []
    drawn = ("score", "linear_weights", "embeddings", "dense/w0")
    assert [d for d in drawn if tags.get(f"6_histograms/{d}") != "histograms"] == []


def test_the_projector_shows_ids_with_their_labels(steady):
    folder, _, _, _, trainer = steady
    vectors = (folder / "embeddings.tsv").read_text().splitlines()
    labels = [line.split("\t") for line in (folder / "embeddings_labels.tsv").read_text().splitlines()]
    assert labels[0] == ["id", "feature", "times seen", "label rate"]
    assert len(vectors) == len(labels) - 1 == trainer.learner.rows == 55  # 40 users, 15 items
    assert {len(line.split("\t")) for line in vectors} == {5}
    rates = {line[0]: float(line[3]) for line in labels[1:]}
    assert rates["user=4"] > rates["user=0"] + 0.2  # what the world's labels are made of
    assert "embeddings.tsv" in (folder / "projector_config.pbtxt").read_text()


def test_a_jump_of_the_label_rate_is_logged_and_counted_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "headrace.train"):
        _, metrics, _, _ = trained(tmp_path / "train", stored=6_500, jump=True)
    lines = [message for message in caplog.messages if message.startswith("label rate of click jumped")]
    assert len(lines) == 1 and metrics.counters["label_rate_jumps_total", "click"] == 1
    said = re.search(r"from (0\.\d+) to (0\.\d+) \((-\d+) %\) over ([\d]+) samples, (-[\d.]+) standard", lines[0])
    assert said, lines[0]
    usual, rate, moved, over, score = (float(x) for x in said.groups())
    assert abs(usual - 0.5) < 0.05 and rate < usual * 0.8 and moved < -20 and over >= 1_000 and score < -6


def test_a_disk_that_takes_no_figures_stops_none_of_the_learning(tmp_path, monkeypatch, caplog):
    """Figures are left out and said to be, and come again in a file of their own when the disk takes them."""
    (tmp_path / "file").write_text("in the way")
    board = Board(tmp_path / "file" / "train")
    with caplog.at_level(logging.WARNING):
        for now_ms in (0, 1, AGAIN_MS - 1):
            board.scalars({"a": 1.0}, step=1, now_ms=now_ms)
    assert len(caplog.messages) == 1 and "no figures for TensorBoard for 30 s" in caplog.messages[0]
    (tmp_path / "file").unlink()
    board.scalars({"a": 2.0}, step=2, now_ms=AGAIN_MS)
    board.close()
    (file,) = (tmp_path / "file" / "train").iterdir()
    assert [event.step for event in EventFileLoader(str(file)).Load() if event.summary.value] == [2]


def test_a_writer_whose_disk_is_full_is_replaced(tmp_path, monkeypatch):
    board, written = Board(tmp_path), []

    class Full:
        def add_event(self, event) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    class Working:
        def add_event(self, event) -> None:
            written.append(event.step)

    monkeypatch.setattr(board, "_writer", Full())
    board.scalars({"a": 1.0}, step=1, now_ms=0)
    assert board._writer is None
    monkeypatch.setattr(board, "_writer", Working())
    board.scalars({"a": 1.0}, step=2, now_ms=AGAIN_MS)
    assert written == [2]
