"""Goal: with a variant beside the project's own recipe every sample is accounted for, of both models, and both replay.

Method: an example's events go through the whole loop in memory. A variant then learns the lake and what is live beside.
The ledger is drawn from the log and from seals, again after more events, and with planted losses of the variant alone.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
from loop_world import Loop, opened, quiet
from trainer_world import PROJECT

from headrace.backends.lake.delta import DeltaLake
from headrace.backends.log.fenced_memory import FencedMemory, WriterEpochs
from headrace.contract.config import Config
from headrace.contract.formats.steps import decode_step, encode_step
from headrace.contract.project import Project
from headrace.replay.as_trained import as_trained
from headrace.replay.ledger.ledger import Ledger, table
from headrace.replay.ledger.take_stock import Mode, take_stock
from headrace.trainer.run import Trainer

TURN_MS = 500
BOTH = msgspec.structs.replace(
    PROJECT, variants={"deep": msgspec.structs.replace(PROJECT.recipe, hidden=(12,), dim=6, negative_share=0.5)}
).checked()
DEEP = BOTH.of_variant("deep")


def shown(loop: Loop, first: int, count: int) -> None:
    """Let so many impressions be shown, every third of them clicked."""
    for n in range(first, first + count):
        common = {"request_id": f"r{n}", "user": n % 7}
        loop.send("t.impression", {**common, "event_id": f"i{n}", "item": n % 5, "price": float(n % 11)})
        if n % 3 == 0:
            loop.send("t.click", {**common, "event_id": f"c{n}"})
        loop.turn(TURN_MS)


def beside(loop: Loop, *, learns_lake: bool = True) -> Trainer:
    topics = loop.topics.of(DEEP.model)
    loop.log.admin().ensure_topics(topics.specs(loop.config.log.partitions))
    deps = loop._training()
    deps.project, deps.topics, deps.lake = DEEP, topics, deps.lake if learns_lake else None
    deps.steps_writer = FencedMemory(loop.log, topics.steps, "steps-deep", WriterEpochs())
    trainer = Trainer(deps)
    trainer.recover()
    return trainer


def ledger(loop: Loop, mode: Mode, project: Project = BOTH, models: tuple[str, ...] = ("small.deep",)) -> Ledger:
    lake: DeltaLake = loop.lake
    return take_stock(
        project, loop.config, loop.topics, loop.log.reader(), lake, blobs=loop.blobs, mode=mode, beside=models
    )


def learn(loop: Loop, trainer: Trainer) -> None:
    quiet_turns = 0
    while quiet_turns < 3:
        loop.clock.advance(1.0)
        quiet_turns = 0 if trainer.turn() else quiet_turns + 1
    trainer.close()


def test_both_models_are_accounted_for_and_replay(tmp_path: Path) -> None:
    with opened(BOTH, quiet(Config(), TURN_MS), tmp_path) as loop:
        shown(loop, 0, 40)
        loop.settle(4_000, TURN_MS)
        deep = beside(loop)
        assert deep.source.is_stored
        learn(loop, deep)
        for mode in ("full", "seals"):
            drawn = ledger(loop, mode)
            assert drawn.closes and (drawn.lost, drawn.twice) == (0, 0), msgspec.json.encode(drawn)
            assert [(m.model, m.learnt > 0, m.in_flight) for m in drawn.models.values()] == [
                ("small.deep", True, 0),
                ("small", True, 0),
            ]
            own, other = drawn.models[loop.trainer.run_id], drawn.models[deep.run_id]
            assert own.learnt == drawn.learnt and other.sampled_out > 0 == own.sampled_out
            assert f"run {deep.run_id} of small.deep" in table(drawn) and not drawn.not_sealed
        for view in (BOTH, DEEP):
            found = as_trained(view, loop.topics.of(view.model), loop.log.reader(), loop.lake, train=loop.config.train)
            assert found.equal is True and found.model == view.model


def test_what_a_variant_alone_lost_is_found(tmp_path: Path) -> None:
    with opened(BOTH, quiet(Config(), TURN_MS), tmp_path) as loop:
        shown(loop, 0, 20)
        loop.settle(4_000, TURN_MS)
        deep = beside(loop, learns_lake=False)
        learn(loop, deep)
        assert ledger(loop, "full").closes
        # The record says another sum than that of the rows that lie in its range.
        steps = loop.log.partitions(loop.topics.of(DEEP.model).steps)[0]
        step = decode_step(steps[-1].value or b"")
        swapped = msgspec.structs.replace(step.ranges[0], sum=(step.ranges[0].sum or 0) + 1)
        told = encode_step(msgspec.structs.replace(step, ranges=(swapped, *step.ranges[1:])))
        steps[-1] = msgspec.structs.replace(steps[-1], value=told)
        for mode in ("full", "seals"):
            wrong = ledger(loop, mode)
            assert wrong.models[deep.run_id].lost and not wrong.models[loop.trainer.run_id].lost and not wrong.closes
            assert not ledger(loop, mode, models=()).lost, "the ledger of one model says nothing of another"


def test_promoted_and_moved_it_has_the_totals(tmp_path: Path) -> None:
    """The kept account of before, which the other model had, is gone on with."""
    with opened(BOTH, quiet(Config(), TURN_MS), tmp_path) as loop:
        shown(loop, 0, 20)
        loop.settle(4_000, TURN_MS)
        learn(loop, beside(loop))
        assert ledger(loop, "seals").closes
        moved = msgspec.structs.replace(DEEP, variants={})
        for mode in ("seals", "full"):
            drawn = ledger(loop, mode, moved, ("small",))
            assert drawn.closes and list(drawn.models.values())[-1].model == "small.deep"
            assert drawn.sampled_out > 0
