"""Goal: whatever changed since the checkpoint before, and whatever failed, a checkpoint gives back the bits, and the
store holds no part that no checkpoint names.

Method: keys are learnt and expire at random, checkpoints of small pages are written through a store that refuses at
random, trainers begin anew from what is stored. The oracle is the learner's state at the moment of each checkpoint.
"""

from __future__ import annotations

from random import Random

import msgspec
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from learner_world import CHANGING as RECIPES
from learner_world import CHANGING_SPEC as SPEC
from learner_world import learn
from trainer_world import PROJECT, FaultyBlobs

from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.errors import Unavailable
from headrace.contract.formats.positions import Cursor, Positions
from headrace.contract.interfaces.blobs import Pieces, whole
from headrace.trainer.commit.checkpoint import (
    Meta,
    Page,
    TableParts,
    newest_checkpoint,
    parts_of,
    read_manifest,
    stored_checkpoints,
)
from headrace.trainer.commit.checkpoint_plan import SWEEP, planned
from headrace.trainer.commit.checkpointer import Checkpointer, Moment, made_here
from headrace.trainer.commit.parts import Part, decode_part, encode_part, grouped
from headrace.trainer.commit.retention import Retention
from headrace.trainer.model.learner import TableLearner, make_learner
from headrace.trainer.model.tables import changes

MODEL = PROJECT.name


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "PAGE_BYTES", 300)


class Refusing(FaultyBlobs):
    """Refuses some puts, of which some took effect."""

    def __init__(self, seed: int, rate: float) -> None:
        super().__init__()
        self.random, self.rate = Random(seed), rate

    def put(self, name: str, data: bytes | Pieces) -> None:
        if self.random.random() < self.rate:
            if self.random.random() < 0.5:
                super().put(name, data)
            raise Unavailable("no DataNode")
        super().put(name, data)


def checkpointer_of(learner: TableLearner, blobs: FaultyBlobs, before: object = None) -> Checkpointer:
    project = msgspec.structs.replace(PROJECT, features=SPEC, recipe=learner.recipe)
    metrics = MemoryMetrics()
    return Checkpointer(project, learner, blobs, metrics, made_here(1), before, background=False)  # type: ignore[arg-type]


def moment(step: int, recipe: str = "x") -> Moment:
    meta = Meta(run="r1", step=step, steps_offset=step, recipe=recipe, cursor=Cursor({"0": [step, 2]}, {"0": 3}))
    evaluation = {"names": np.array(["a", "böse", ""]), "counts": np.array([step], np.int64)}
    return Moment(meta, Positions(1), evaluation, {"auc": 0.5})


def named(blobs: FaultyBlobs) -> set[str]:
    manifests = [read_manifest(blobs, MODEL, each) for each in stored_checkpoints(blobs, MODEL)]
    return {f"{parts_of(MODEL)}/{part.name}" for manifest in manifests for part in manifest.parts()}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_checkpoint_gives_back_the_bits(recipe, seed):
    rng, clock, blobs = np.random.default_rng(seed), [0], Refusing(seed, 0.15)
    learner = make_learner(recipe, SPEC)
    checkpointer, said = checkpointer_of(learner, blobs), dict[int, str]()
    for _ in range(14):
        learn(learner, rng, clock, int(rng.integers(0, 4)))
        said[learner.step] = learner.digest()
        checkpointer.begin(moment(learner.step))
        found = newest_checkpoint(blobs, MODEL, recipe="x")
        if found is None:
            continue
        other = make_learner(recipe, SPEC)
        other.load(found.learner, found.rows)
        # Not always of this step: the store may have refused it. One whose receipt was lost is a checkpoint too.
        assert other.digest() == said[found.meta.step]
        assert checkpointer.unstored or found.meta.step == learner.step
        assert found.evaluation["names"].tolist() == ["a", "böse", ""]
        if rng.random() < 0.3:
            learner = other
            checkpointer = checkpointer_of(learner, blobs, found.manifest)
    blobs.rate = 0
    learn(learner, rng, clock, 1)
    checkpointer.begin(moment(learner.step))
    assert {name for name in blobs.objects if "/parts/" in name} == named(blobs)


def test_an_unchanged_page_is_not_stored_again():
    rng, clock, blobs = np.random.default_rng(5), [0], FaultyBlobs()
    learner = make_learner(RECIPES["in order"], SPEC)
    learn(learner, rng, clock, 12)
    checkpointer = checkpointer_of(learner, blobs)
    checkpointer.begin(moment(1))
    before = set(blobs.objects)
    learner.step += 1
    checkpointer.begin(moment(2))
    new = set(blobs.objects) - before
    assert len([name for name in new if "/parts/" in name]) == 2  # the step, and the figures
    one, two = (each for each in stored_checkpoints(blobs, MODEL))
    assert read_manifest(blobs, MODEL, one).tables == read_manifest(blobs, MODEL, two).tables


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), page_rows=st.sampled_from([4, 16, 64]))
def test_what_lies_by_itself_is_bounded(seed, page_rows):
    """A plan's pages and rows hold all that changed; rows of old numbers are needed no more after a sweep."""
    rng, high = np.random.default_rng(seed), 1 + seed % 200
    before, sizes = None, []
    held_R = np.zeros(high + 9 * SWEEP, np.int64)
    for seq in range(1, 3 * SWEEP):
        high += int(rng.integers(0, 3))
        changed_K = np.unique(rng.integers(0, high, int(rng.integers(1, 2 + high // 8))))
        grown_K = np.arange(before.high, high) if before else np.arange(0)
        changed_K = np.union1d(changed_K, grown_K).astype(np.int64)
        plan = planned(before, changed_K, high=high, page_rows=page_rows)
        whole_K = np.flatnonzero(np.isin(np.arange(high) // page_rows, plan.pages))
        assert set(changed_K.tolist()) <= set(whole_K.tolist()) | set(plan.rows_K.tolist())
        assert not set(plan.rows_K.tolist()) & set(whole_K.tolist())
        held_R[changed_K] = seq
        old = before.pages if before else ()
        pages = tuple(
            Page(Part("", "", 0), seq, int(size))
            if number in plan.pages
            else msgspec.structs.replace(old[number], changed=number in plan.stale)
            for number, size in enumerate(plan.sizes_P)
        )
        oldest = min((page.seq for page in pages if page.changed), default=seq)
        sizes = [(n, rows) for n, rows in sizes if n > oldest] + [(seq, len(plan.rows_K))]
        before = TableParts(high, page_rows, pages, (), plan.credit)
        assert seq - oldest <= 3 * SWEEP // 2
        # Every row that changed since its page was stored lies by itself in what is kept.
        for number, page in enumerate(pages):
            rows_R = held_R[number * page_rows : number * page_rows + page.rows]
            assert page.changed or (rows_R <= page.seq).all()
    assert sum(rows for _, rows in sizes) <= 2 * high + SWEEP


def test_a_part_is_a_safetensors_file():
    arrays = {
        "b": np.arange(3, dtype=np.uint8),
        "x": np.arange(6, dtype=np.float32).reshape(2, 3),
        "none": np.empty((0, 4), np.float64),
        "one": np.array(7, np.int64),
        "is": np.array([True, False]),
        "back": np.arange(8, dtype=np.int64)[::-2],
        "text": np.array(["a", "bc"]),
    }
    encoded = encode_part("r", arrays)
    data = whole(encoded.pieces)
    assert len(data) == encoded.part.bytes
    read = safetensors.numpy.load(data)
    assert read.keys() | {"text"} == arrays.keys()
    for name, array in decode_part(data).items():
        assert array.dtype == arrays[name].dtype and array.shape == arrays[name].shape
        np.testing.assert_array_equal(array, arrays[name])
    with pytest.raises(ValueError, match=r"(?i)header"):
        decode_part(data[:40])


def test_arrays_are_grouped_by_size():
    big = {f"a{n}": np.zeros(9_000_000, np.uint8) for n in range(3)}
    assert [sorted(group) for group in grouped(big)] == [["a0"], ["a1"], ["a2"]]
    assert list(grouped({})) == [{}]


def test_of_each_hour_one_checkpoint_stays():
    blobs = FaultyBlobs()
    learner = make_learner(RECIPES["in order"], SPEC)
    checkpointer, rng = checkpointer_of(learner, blobs), np.random.default_rng(0)
    for quarter in range(30 * 4):
        learn(learner, rng, [quarter * 900_000], 1)
        checkpointer.begin(moment(learner.step))
    steps = [each.step for each in stored_checkpoints(blobs, MODEL)]
    assert steps[-3:] == [118, 119, 120]
    assert steps[:-3] == list(range(25, 118, 4))
    assert {name for name in blobs.objects if "/parts/" in name} == named(blobs)


def test_what_a_crashed_write_left_is_swept_and_what_is_unknown_stays():
    blobs = FaultyBlobs()
    learner = make_learner(RECIPES["in order"], SPEC)
    learn(learner, np.random.default_rng(0), [0], 3)
    checkpointer_of(learner, blobs).begin(moment(1))
    blobs.put(f"{parts_of(MODEL)}/r1-0123.safetensors", b"half a checkpoint")
    blobs.put(f"checkpoints/{MODEL}/r2-000000000009.x.9.v-1.of-tomorrow", b"{}")
    Retention(blobs, MODEL).sweep()
    assert f"{parts_of(MODEL)}/r1-0123.safetensors" in blobs.objects
    blobs.delete(f"checkpoints/{MODEL}/r2-000000000009.x.9.v-1.of-tomorrow")
    Retention(blobs, MODEL).sweep()
    assert {name for name in blobs.objects if "/parts/" in name} == named(blobs)


@pytest.mark.parametrize("damage", ["torn", "tampered", "missing", "manifest"])
def test_a_damaged_part_is_named_and_the_checkpoint_before_is_taken(damage, caplog):
    blobs, rng, clock = FaultyBlobs(), np.random.default_rng(4), [0]
    learner = make_learner(RECIPES["two kinds"], SPEC)
    checkpointer = checkpointer_of(learner, blobs)
    for step in (1, 2):
        learn(learner, rng, clock, 3)
        checkpointer.begin(moment(step))
    one, two = (read_manifest(blobs, MODEL, each) for each in stored_checkpoints(blobs, MODEL))
    for part in sorted(two.parts() - one.parts(), key=lambda part: part.name)[: 1 if damage == "manifest" else None]:
        objects = dict(blobs.objects)
        name = f"{parts_of(MODEL)}/{part.name}"
        if damage == "manifest":
            name = blobs.list(f"checkpoints/{MODEL}")[-1]
        data = bytearray(objects.pop(name))
        data[len(data) // 2] ^= 1
        if damage != "missing":
            objects[name] = bytes(data[: len(data) // 2]) if damage == "torn" else bytes(data)
        damaged = FaultyBlobs()
        damaged.objects = objects
        found = newest_checkpoint(damaged, MODEL, recipe="x")
        assert found is not None and found.meta.step == 1
        assert ("manifest" if damage == "manifest" else part.name) in caplog.text
