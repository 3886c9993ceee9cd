"""Goal: of stored samples a trainer reads the columns that a step looks at, and learns the same bits as from all of
them. Method: lakes with rows of this and of another specification, read piece by piece in both ways and learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pytest
from trainer_world import PROJECT, TOPICS, Lake, World, lake_of, samples

from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.config import TrainConfig
from headrace.contract.formats.sample import list_column, sample_schema
from headrace.contract.interfaces.lake import SpanMs
from headrace.trainer.model.learner import learner_for
from headrace.trainer.source.batch import to_batch
from headrace.trainer.source.columns import StoredColumns, stored_columns
from headrace.trainer.source.source import Source
from headrace.trainer.source.stored import StoredRows
from headrace.trainer.validation.projector import Sampler

SCHEMA, TASKS = sample_schema(PROJECT), PROJECT.recipe.heads
INPUTS = {"user", "item", "price"}
OTHER = "0123456789abcdef"


@dataclass
class Asked(Lake):
    """Remembers which columns are asked for."""

    asked: list[frozenset[str]] = field(default_factory=list)

    def read(
        self, version: int | None = None, columns: Sequence[str] | None = None, *, span_ms: SpanMs | None = None
    ) -> pa.Table:
        if columns is not None and "label" in columns:
            self.asked.append(frozenset(columns))
        return super().read(version, columns, span_ms=span_ms)


def mixed(seed: int, share: float) -> Asked:
    """Return a lake of which a share of the rows is of another specification, with slots that say nothing."""
    rows = pa.Table.from_batches([samples(seed, p, 400) for p in range(3)])
    other_N = np.random.default_rng(seed).random(rows.num_rows) < share
    slots_NF = np.array(rows["slots"].to_pylist(), np.int64)
    slots_NF[other_N] = 7
    spec = [OTHER if other else PROJECT.features.digest() for other in other_N]
    for name, column in (("slots", list_column(slots_NF, pa.int64())), ("spec", pa.array(spec))):
        rows = rows.set_column(rows.schema.get_field_index(name), SCHEMA.field(name), column)
    lake = lake_of(seed, 1)
    return Asked(rows, lake.positions, lake.next_offsets)


def learnt(lake: Lake, columns: StoredColumns, bytes_max: int) -> str:
    stored = StoredRows(lake, columns, TASKS, "test", bytes_max=bytes_max)
    stored.open(lake.version)
    learner = learner_for(PROJECT, TrainConfig())
    while not stored.is_done:
        stored.read_ahead(50)
        learner.learn(to_batch(stored.take(stored.propose(50)), PROJECT))
    return learner.digest()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
@pytest.mark.parametrize("bytes_max", [30_000, 1 << 20])
def test_the_bits_are_those_of_all_columns(share: float, bytes_max: int) -> None:
    lake = mixed(5, share)
    whole = learnt(lake, StoredColumns.whole(SCHEMA), bytes_max)
    assert learnt(lake, stored_columns(PROJECT), bytes_max) == whole
    assert learnt(lake, stored_columns(PROJECT, shown_every=2), bytes_max) == whole


def source_of(lake: Lake, **words: object) -> Source:
    source = Source(PROJECT, World().log.reader(), TOPICS.samples, generation=1, metrics=MemoryMetrics(), lake=lake,
                    lake_bytes=30_000, **words)  # type: ignore[arg-type]  # fmt: skip
    source.begin(None)
    while source.is_stored:
        source.poll(0.0)
        if source.ready_rows():
            source.take(source.propose(50))
    return source


def test_fields_are_not_read_where_features_are_stored() -> None:
    lake = mixed(5, 0.0)
    source_of(lake)
    # One row's bytes are measured with all that may be read, at both ends.
    assert len(lake.asked) > 8 and not any(INPUTS & names for names in lake.asked[2:])
    assert not any({"request_id", "key", "feedback_id"} & names for names in lake.asked)


def test_fields_that_figures_are_told_apart_by_are_read() -> None:
    lake = mixed(5, 0.0)
    source_of(lake, fields=("item",))
    assert all(INPUTS & names == {"item"} for names in lake.asked[2:])


def test_what_is_shown_comes_now_and_then() -> None:
    lake = mixed(5, 0.0)
    source_of(lake, shown_every=4)
    with_fields = [names >= INPUTS for names in lake.asked[2:]]
    assert with_fields[:8] == [True, False, False, False] * 2
    sampler = Sampler(PROJECT.features)
    rows = samples(5, 0, 40)
    batch = to_batch(pa.Table.from_batches([rows]), PROJECT)
    sampler.note(batch, pa.Table.from_batches([rows.select(["label"])]))
    assert not sampler.chosen()
    sampler.note(batch, pa.Table.from_batches([rows]))
    assert sampler.chosen()
