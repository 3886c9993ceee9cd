"""What a step's record says of its rows. Goal: it is what the step learns. Method: the real trainer, both sources."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
from trainer_world import PARTITIONS, PROJECT, TOPICS, Lake, World, cut, lake_of, send

from headrace.contract.formats.steps import StepRange, decode_step
from headrace.kernels.sample_ids import id_hashes, sum_of
from headrace.trainer.run import Trainer
from headrace.trainer.source.judged import judge_of


def test_steps_tell_the_sum_of_what_they_took():
    """Half of the samples in the lake, then the topic; a batch ends within a record."""
    project = msgspec.structs.replace(PROJECT, recipe=msgspec.structs.replace(PROJECT.recipe, negative_share=0.5))
    records = {p: cut(3, p, 200) for p in range(PARTITIONS)}
    lake: Lake = lake_of(3, 4)
    world = World(lake=lake)
    for partition in range(PARTITIONS):
        for rows, after in records[partition]:
            send(world.log, rows, after=after)
    trainer = Trainer(world.deps(project=project))
    trainer.recover()
    took: list[tuple[tuple[StepRange, ...], pa.Table, int, int]] = []
    take, learn = trainer.source.take, trainer.learner.learn

    def watch(ranges):
        rows = take(ranges)
        took.append((ranges, rows, 0, 0))
        return rows

    def count(batch):
        report = learn(batch)
        took[-1] = (*took[-1][:2], report.refused, report.sampled_out)
        return report

    trainer.source.take, trainer.learner.learn = watch, count  # type: ignore[method-assign]
    world.drain(trainer)
    kinds = {r.kind for ranges, *_ in took for r in ranges}
    assert kinds == {"live", "stored"} and sum(left for *_, left in took) > 50
    for ranges, rows, refused, sampled_out in took:
        assert sum(r.sum for r in ranges if r.sum is not None) % 2**64 == sum_of(id_hashes(rows))
        assert (sum(r.refused for r in ranges), sum(r.left_out for r in ranges)) == (refused, sampled_out)
    steps = [decode_step(r.value or b"") for r in world.log.partitions(TOPICS.steps)[0]]
    assert [step.ranges for step in steps] == [ranges for ranges, *_ in took]


def test_a_row_that_no_learner_takes_is_told_and_not_left_out_too():
    recipe = msgspec.structs.replace(PROJECT.recipe, negative_share=0.01)
    judge = judge_of(msgspec.structs.replace(PROJECT, recipe=recipe))
    rows = cut(1, 0, 40)[0][0]
    bad = rows.set_column(
        rows.schema.get_field_index("weight"), "weight", pa.array([-1.0] * rows.num_rows, pa.float32())
    )
    assert judge(bad)[-1].tolist()[1:] == [rows.num_rows, 0]
    negatives = int(pc.sum(pc.equal(rows["label"], 0)).as_py() or 0)
    assert judge(rows)[-1].tolist()[1] == 0 and judge(rows)[-1].tolist()[2] >= negatives - 2


def test_a_step_of_before_has_no_sum(tmp_path: Path):
    old = b'{"model":"m","run":"r","step":1,"ranges":[{"kind":"live","rows":3}],"positions":{}}'
    assert decode_step(old).ranges[0].sum is None
