"""Goal: a crawled value is the same in serving's answer, in the sample, and after a restart; the ledger closes with
external rows. Method: one outbox through a log in memory, the join and serving's memory read what it wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from headrace.backends.clock import VirtualClock
from headrace.backends.frontier_sqlite import SqliteFrontier
from headrace.backends.log.memory import MemoryLog
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.config import JoinConfig
from headrace.contract.crawl import Crawl, Extract, external_columns
from headrace.contract.errors import ConfigRejected
from headrace.contract.formats.events import (
    IMPRESSION,
    PUNCTUATION,
    Punctuation,
    batch_from_rows,
    encode_batch,
    encode_punctuation,
    impression_schema,
)
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.frontier import Found, Settled
from headrace.contract.interfaces.log import Record
from headrace.contract.project import FeedbackType, ImpressionType, Project, Task
from headrace.contract.spec import Categorical, FeatureSpec, MultiValued, Numeric
from headrace.ingest.crawl.outbox_sender import OutboxSender
from headrace.replay.ledger.draw import draw_gateways
from headrace.replay.ledger.ledger import Ledger
from headrace.serving.features import FeatureMemory
from headrace.stream.features.featurize import featurize
from headrace.stream.join.join import Emitted, JoinState
from headrace.stream.join.state import encode_state, load_state

CRAWL = Crawl(
    name="catalogue",
    kind="html",
    joins="item",
    start=("https://shop.example/",),
    key=Extract(at=".id::text"),
    fields={
        "price": Extract(at=".p::text", type="float64"),
        "brand": Extract(at=".b::text"),
        "tags": Extract(at=".t::text", type="list[string]"),
    },
)
PROJECT = Project(
    impression=ImpressionType(tag="i", key="user", fields={"user": "int64", "item": "int64"}),
    feedback=(FeedbackType(name="click", tag="c"),),
    tasks=(Task(name="click", feedback="click", window_ms=500),),
    crawls=(CRAWL,),
    features=FeatureSpec(
        features=(
            Categorical(field="external.catalogue.brand"),
            Numeric(field="external.catalogue.price"),
            MultiValued(field="external.catalogue.tags", values_max=2),
        )
    ),
).checked()
NAMES = list(CRAWL.columns())


class World:
    """A crawler's outbox on a log in memory, one partition."""

    def __init__(self, folder: Path) -> None:
        self.log = MemoryLog()
        self.log.admin().ensure_topics(Topics().specs(1))
        self.frontier = SqliteFrontier(folder / "f.sqlite")
        self.frontier.set_starts("catalogue", [Found("https://shop.example/")])
        self.outbox = OutboxSender(self.frontier, self.log.producer(), Topics(), 1, MemoryMetrics(), 5, VirtualClock())

    def crawled(self, key: str, values: str, at_ms: int) -> None:
        page = self.frontier.due(2**60, ["catalogue"], [], 1)[0]
        settled = Settled(at_ms=at_ms, due_ms=0, rows=[(key, values, values)])
        self.frontier.settle(page, settled, pages_max=10, keys_max=10, depth_max=1)
        self.outbox.turn()
        self.outbox.turn()

    def shown(self, *rows: dict[str, Any]) -> None:
        lead = {"request_id": "r", "place": 0, "key": "1", "user": 1}
        whole = [{**lead, "event_id": f"e{row['event_time_ms']}.{n}", **row} for n, row in enumerate(rows)]
        whole = [{**row, "request_id": row["event_id"]} for row in whole]
        value = encode_batch(batch_from_rows(whole, impression_schema(PROJECT)))
        self.log.append("events", 0, value, None, {"kind": IMPRESSION})

    def time(self, time_ms: int) -> None:
        value = encode_punctuation(Punctuation("g", 1, time_ms))
        self.log.append("events", 0, value, None, {"kind": PUNCTUATION})

    def records(self, topic: str) -> list[Record]:
        return list(self.log.partitions(topic)[0])


@pytest.fixture
def world(tmp_path: Path) -> Any:
    one = World(tmp_path)
    yield one
    one.frontier.close()


def fresh() -> JoinState:
    return JoinState(PROJECT, JoinConfig(), silent_ms=1_000, partition=0)


def joined(records: list[Record], restart_at: int = -1) -> list[Emitted]:
    state, emitted = fresh(), []
    for n, record in enumerate(records):
        if n == restart_at:
            stored, state = encode_state(state), fresh()
            load_state(state, stored)
        found = state.take(record)
        emitted += [found] if found is not None else []
    return emitted


def test_the_sample_holds_what_was_known_and_serving_says_the_same(world: World) -> None:
    memory = FeatureMemory(PROJECT.crawls)
    world.crawled("7", '{"price":1.5,"brand":"a","tags":["x","y"]}', 1_000)
    world.shown(
        {"item": 7, "event_time_ms": 999}, {"item": 7, "event_time_ms": 1_000}, {"item": 8, "event_time_ms": 1_000}
    )
    world.crawled("7", '{"price":2.0,"brand":null,"tags":[]}', 2_000)
    world.shown({"item": 7, "event_time_ms": 1_999}, {"item": 7, "event_time_ms": 2_000})
    world.time(10_000)
    rows = pa.Table.from_batches([e.batch for e in joined(world.records("events"))]).to_pylist()
    found = {row["event_id"]: [row[name] for name in NAMES] for row in rows}
    nothing, first, second = [None, None, None, 0], [1.5, "a", ["x", "y"], 1_000], [2.0, None, [], 2_000]
    assert list(found.values()) == [nothing, first, nothing, first, second]
    for record in world.records("features"):
        memory.take(record)
    raw = {"user": pa.array([1, 1, 1]), "item": pa.array([7, 8, None], pa.int64())}
    served = memory.look_up(PROJECT.features, raw, 3).open()
    assert [[row[name] for name in NAMES] for row in served] == [second, nothing, nothing]
    # What serving gets of them is what the sample holds, bit for bit.
    kinds = impression_schema(PROJECT)
    columns = {name: pa.array([served[0][name]], kinds.field(name).type) for name in NAMES}
    slots, numbers = featurize(columns, PROJECT.features)
    assert slots[0].tolist() == rows[-1]["slots"]
    assert numbers[0].tolist() == pytest.approx(np.array(rows[-1]["numeric"], np.float32).tolist(), abs=0)


def test_what_was_served_is_learnt_though_the_join_knows_better(world: World) -> None:
    world.crawled("7", '{"price":1.5,"brand":"a","tags":[]}', 1_000)
    as_served = {"external.catalogue.price": 0.5, "external.catalogue.crawl_time_ms": 900}
    unknown = {"external.catalogue.crawl_time_ms": 0}
    world.shown({"item": 7, "event_time_ms": 1_500, **as_served}, {"item": 7, "event_time_ms": 1_500, **unknown})
    world.time(10_000)
    rows = joined(world.records("events"))[0].batch.to_pylist()
    assert [[row[name] for name in NAMES] for row in rows] == [[0.5, None, None, 900], [None, None, None, 0]]


def test_a_restart_anywhere_changes_nothing(world: World) -> None:
    for n in range(12):
        world.crawled(str(n % 3), f'{{"price":{n},"brand":"b{n}","tags":[]}}', 1_000 + 100 * n)
        world.shown(*({"item": n % 3, "event_time_ms": 1_000 + 100 * n - back} for back in (0, 150, 350)))
        world.time(1_000 + 100 * n)
    world.time(20_000)
    records = world.records("events")
    whole = pa.Table.from_batches([e.batch for e in joined(records)])
    for at in range(len(records)):
        assert pa.Table.from_batches([e.batch for e in joined(records, at)]).equals(whole)


def test_a_feature_of_a_column_that_no_source_gives_is_refused() -> None:
    wrong = FeatureSpec(features=(Categorical(field="external.catalogue.colour"),))
    with pytest.raises(ConfigRejected, match="colour"):
        Project(**{**{f: getattr(PROJECT, f) for f in PROJECT.__struct_fields__}, "features": wrong}).checked()
    assert external_columns(PROJECT.crawls)["external.catalogue.tags"] == "list[string]"


def test_external_rows_close_the_ledger_and_hide_no_loss() -> None:
    ledger = Ledger(external=30)
    said = [Punctuation("g", 1, 5, counts={"read": 10, "appended": 10})]
    draw_gateways(ledger, 40, 0, said)
    assert (ledger.read, ledger.appended, ledger.lost_where["log"]) == (40, 40, 0)
    draw_gateways(ledger, 38, 0, said)
    assert ledger.lost_where["log"] == 2
