"""Goal: a request reads exactly one version. Method: values that encode their version, many readers, one writer."""

from __future__ import annotations

import multiprocessing
import os
import time
from contextlib import suppress
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path

import numpy as np
import pytest

from headrace.contract.errors import Overloaded, Unavailable
from headrace.contract.formats.snapshot import Manifest, Weights
from headrace.serving.model.known import decode_known, encode_known
from headrace.serving.model.process_times import began_at
from headrace.serving.model.region_layout import _BEGAN, _READERS
from headrace.serving.model.shared_region import Meta, SharedModel, View

KEYS = np.arange(1, 401, dtype=np.int64) * 7919
DIM = 3
LAST = 3_000
NO_KEYS = np.empty(0, np.int64)
SPAWN = multiprocessing.get_context("spawn")


def weights(step: int, keys: np.ndarray = KEYS) -> Weights:
    dense = {"w": np.full((50, 40), step, np.float32)}
    return Weights(keys, np.full((len(keys), 1 + DIM), step, np.float32), dense)


def meta(step: int) -> Meta:
    manifest = Manifest(
        kind="delta", model="m", run="r", step=step, version=f"r-{step}", dim=DIM, positions={"0": [step, 0]}
    )
    return Meta(manifest, "r-0", "{}", "{}", {"w": [50, 40]})


def opened(path: Path, *, create: bool = False, reader: int = 0) -> SharedModel:
    return SharedModel(path, dim=DIM, rows_max=1_000, create=create, reader=reader)


def steps_seen(view: View) -> set[float]:
    rows = view.lookup(KEYS, seed=1, scale=0.0)
    return {view.meta.manifest.step, *rows.reshape(-1).tolist(), *view.dense()["w"].reshape(-1).tolist()}


def hammer(kind: type[SharedModel], path: Path, reader: int, start: Barrier, found: multiprocessing.Queue) -> None:
    model, mixed, versions = kind(path, dim=DIM, rows_max=1_000, reader=reader), 0, set()
    model.read(steps_seen)
    start.wait(60)
    until = time.monotonic() + 60
    while time.monotonic() < until and LAST not in versions and not mixed:
        with suppress(Unavailable):
            seen, read = model.read(steps_seen)
            mixed += seen != {float(read.manifest.step)}
            versions.add(read.manifest.step)
    found.put((mixed, len(versions)))


class NeverWaits(SharedModel):
    """The wait for readers misses all of them: the sequence alone must do."""

    def apply_delta(self, weights: Weights, meta: Meta, gone_K: np.ndarray = NO_KEYS, *, wait_s: float = 1.0) -> None:
        super().apply_delta(weights, meta, gone_K, wait_s=0.0)
        time.sleep(0.0005)  # else a reader is overtaken every time, and gives up as it should


class WritesTheActiveCopy(SharedModel):
    """The planted bug: no turns and no sequence."""

    def apply_delta(self, weights: Weights, meta: Meta, gone_K: np.ndarray = NO_KEYS, *, wait_s: float = 1.0) -> None:
        self._put(int(self._region.head[0]), weights, meta)


class NeverAsksAgain(NeverWaits):
    """Another planted bug: the reader does not look at the sequence afterwards, and nobody waits for it."""

    def read(self, use):
        copy = int(self._region.head[0])
        meta = self._meta_of(copy, int(self._region.head[1 + copy]))
        return use(View(self._region, copy, meta)), meta


@pytest.mark.parametrize(
    ("kind", "mixes"),
    [(SharedModel, False), (NeverWaits, False), (WritesTheActiveCopy, True), (NeverAsksAgain, True)],
)
def test_no_answer_mixes_versions_while_thousands_are_swapped(tmp_path: Path, kind: type[SharedModel], mixes: bool):
    path = tmp_path / "model"
    writer = kind(path, dim=DIM, rows_max=1_000, create=True)
    writer.load_snapshot(weights(0), meta(0))
    found, start = SPAWN.Queue(), SPAWN.Barrier(3)
    readers = [SPAWN.Process(target=hammer, args=(kind, path, 1 + i, start, found)) for i in range(2)]
    for reader in readers:
        reader.start()
    start.wait(60)
    for step in range(1, LAST + 1):
        writer.apply_delta(weights(step), meta(step))
    results = [found.get(timeout=100) for _ in readers]
    for reader in readers:
        reader.join(20)
    assert mixes or sum(versions for _, versions in results) > 20
    assert (sum(mixed for mixed, _ in results) > 0) == mixes


def dies_within_read(path: Path) -> None:
    opened(path, reader=1).read(lambda view: os._exit(9))


def reads_until_told(path: Path, inside: Event, leave: Event) -> None:
    def use(view: View) -> None:
        inside.set()
        leave.wait(20)

    opened(path, reader=2).read(use)


def test_a_reader_that_died_costs_the_writer_nothing_and_a_living_one_is_waited_for(tmp_path: Path):
    model = opened(tmp_path / "model", create=True)
    model.load_snapshot(weights(0), meta(0))
    model.apply_delta(weights(1), meta(1))
    dead = SPAWN.Process(target=dies_within_read, args=(model.path,))
    dead.start()
    dead.join(30)
    assert dead.exitcode == 9
    assert model._region.head[_READERS + 1] != 0, "its word is still there"
    began = time.monotonic()
    model.apply_delta(weights(2), meta(2), wait_s=20.0)
    assert time.monotonic() - began < 5.0 and model._region.head[_READERS + 1] == 0
    inside, leave = SPAWN.Event(), SPAWN.Event()
    slow = SPAWN.Process(target=reads_until_told, args=(model.path, inside, leave))
    slow.start()
    assert inside.wait(30)
    began = time.monotonic()
    model.apply_delta(weights(3), meta(3), wait_s=0.3)
    assert time.monotonic() - began >= 0.3 and model._region.head[_READERS + 2] != 0
    leave.set()
    slow.join(30)


def test_the_word_of_a_process_whose_id_is_used_again_is_freed(tmp_path: Path):
    model = opened(tmp_path / "model", create=True)
    model.load_snapshot(weights(0), meta(0))
    model.meta()
    reader = opened(tmp_path / "model", reader=5)
    reader.meta()
    model._region.head[_READERS + 5] = 1 + int(model._region.head[0])
    model._region.head[_BEGAN + 5] -= 1  # Another process had this id, and began earlier.
    began = time.monotonic()
    model.apply_delta(weights(1), meta(1), wait_s=20.0)
    assert time.monotonic() - began < 5.0
    assert began_at(os.getpid()) >= 0 and began_at(2**22 + 1) == -1


def test_both_copies_take_every_delta(tmp_path: Path):
    model = opened(tmp_path / "model", create=True)
    model.load_snapshot(weights(0), meta(0))
    for step in range(1, 6):
        model.apply_delta(weights(step, KEYS[step : step + 1]), meta(step))
        rows, read = model.read(lambda view: view.lookup(KEYS[1:6], seed=1, scale=0.0)[:, 0].tolist())
        assert read.manifest.version == f"r-{step}"
        assert rows == [float(k) if k <= step else 0.0 for k in range(1, 6)]


def test_recent_versions_tell_their_positions(tmp_path: Path):
    model = opened(tmp_path / "model", create=True)
    model.load_snapshot(weights(0), meta(0))
    model.apply_delta(weights(1), meta(1))
    reader = opened(tmp_path / "model", reader=1)
    assert reader.known_by("r-0").positions == {"0": [0, 0]} and reader.known_by("r-1").positions == {"0": [1, 0]}
    assert reader.known_by("r-2") is None


def test_without_a_model_it_says_so(tmp_path: Path):
    with pytest.raises(Unavailable, match="no model is loaded"):
        opened(tmp_path / "model", create=True).meta()


def test_what_does_not_fit_is_refused_before_it_is_written(tmp_path: Path):
    model = opened(tmp_path / "model", create=True)
    model.load_snapshot(weights(0), meta(0))
    more = weights(1, np.arange(1, 1_002, dtype=np.int64))
    with pytest.raises(Overloaded, match=r"serve\.rows_max is 1000"):
        model.check_fits(more, meta(1), fresh=False)
    model.check_fits(weights(1), meta(1), fresh=False)
    assert model.meta().manifest.version == "r-0"


def test_a_new_snapshot_forgets_the_old_rows(tmp_path: Path):
    model = opened(tmp_path / "model", create=True)
    model.load_snapshot(weights(4), meta(4))
    model.load_snapshot(weights(5, KEYS[:1]), meta(5))
    rows, _ = model.read(lambda view: view.lookup(KEYS[:2], seed=1, scale=0.0)[:, 0].tolist())
    assert rows == [5.0, 0.0]


def test_a_version_in_the_midst_of_a_lake_says_what_it_has_of_it():
    manifest = Manifest(kind="delta", model="m", run="r", step=3, version="r-3", stored_left=70, live={"1": [9, 0]})
    known = decode_known(encode_known(manifest))
    assert (known.version, known.positions, known.stored_left, known.live) == ("r-3", {}, 70, {"1": [9, 0]})
    assert decode_known(b'["r-2",{"0":[1,0]}]').stored_left == 0, "as earlier releases wrote it"
