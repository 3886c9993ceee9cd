"""Goal: what waits is bounded, spilled and given back. Method: small bounds, real files, the plain join beside it."""

from __future__ import annotations

from random import Random

import pyarrow as pa
import pytest
from join_oracle import PlainJoin
from join_world import CONFIG, PROJECT, records, traffic
from msgspec import structs

from headrace.backends.spill_file import FileSpill
from headrace.contract.errors import InvariantBroken, Overloaded
from headrace.contract.formats.events import Punctuation, decode_batch, encode_batch
from headrace.contract.rules import rules_of
from headrace.stream.join.join import JoinState
from headrace.stream.join.state import encode_state, load_state


def row(kind: str, n: int, time_ms: int) -> tuple[str, dict]:
    fields = {"event_id": f"{kind}{n}", "request_id": f"r{n}", "place": 0, "key": "1", "event_time_ms": time_ms}
    return kind, fields | {"user": 1, "item": 1} | ({"price": 1.0, "version": "v"} if kind == "impression" else {})


def test_too_many_waiting_impressions_are_refused_with_numbers():
    join = JoinState(PROJECT, structs.replace(CONFIG, pending_max=2), silent_ms=300, partition=3)
    with pytest.raises(Overloaded, match=r"partition 3: 3 impressions wait .* allows 2"):
        join.take_all(records([row("impression", n, 10_000) for n in range(3)], None))


def test_a_record_that_resolves_more_than_a_position_counts_is_refused(monkeypatch):
    monkeypatch.setattr("headrace.stream.join.join.RANKS_MAX", 3)
    join = JoinState(PROJECT, CONFIG, silent_ms=300, partition=3)
    end = [("time", Punctuation(gateway, 1, 10**6)) for gateway in "ab"]
    with pytest.raises(Overloaded, match=r"partition 3: one record resolved \d+ samples; .*join\.pending_max"):
        join.take_all(records([row("impression", n, 10_000) for n in range(8)] + end, None))


def test_beyond_the_bound_the_oldest_early_feedback_becomes_an_orphan():
    few = structs.replace(CONFIG, pending_max=2)
    log = records([row("click", n, 10_000) for n in range(4)] + [row("impression", n, 10_000) for n in (0, 2)], None)
    plain, join = (kind(PROJECT, few, silent_ms=300, partition=0) for kind in (PlainJoin, JoinState))
    for record in log:
        expected, found = plain.take(record), join.take(record)
        assert (found is None) == (expected is None)
        assert found is None or found.batch.equals(expected.batch)
    assert join.totals == plain.totals
    click = join.totals.tasks[0]
    assert (click.orphans, click.pending, click.matched) == (2, 1, 1)


@pytest.mark.parametrize("seed", range(4))
def test_spilled_pieces_come_back_and_leave_no_file(seed, tmp_path, monkeypatch):
    monkeypatch.setattr("headrace.stream.join.payload.PIECE_ROWS", 16)
    end = [("time", Punctuation(gateway, 1, 10**6)) for gateway in "ab"]
    log = records([*traffic(seed), *end], Random(seed))
    tight = structs.replace(CONFIG, payload_bytes=1)
    spilling = JoinState(PROJECT, tight, silent_ms=300, partition=0, spill=FileSpill(tmp_path / "spill"))
    plain = JoinState(PROJECT, CONFIG, silent_ms=300, partition=0)
    files = 0
    for record in log:
        found, expected = spilling.take(record), plain.take(record)
        assert (found is None) == (expected is None)
        assert found is None or found.batch.equals(expected.batch)
        files = max(files, len(list((tmp_path / "spill").glob("*"))))
    assert files > 1
    assert not len(spilling.payload)
    assert not list((tmp_path / "spill").glob("*"))


def test_a_state_keeps_its_rules_and_is_refused_under_another_key():
    join = JoinState(PROJECT, CONFIG, silent_ms=300, partition=0)
    join.take_all(records(traffic(1, 50), None))
    other = structs.replace(PROJECT, tasks=(structs.replace(PROJECT.tasks[0], window_ms=77), *PROJECT.tasks[1:]))
    again = JoinState(other, CONFIG, silent_ms=300, partition=0)
    load_state(again, encode_state(join))
    assert again.rules.declared == join.rules.declared != rules_of(other)
    keyed = structs.replace(PROJECT, impression=structs.replace(PROJECT.impression, key="item"))
    with pytest.raises(InvariantBroken, match=r"partition key 'user'.*log\.generation"):
        load_state(JoinState(keyed, CONFIG, silent_ms=300, partition=0), encode_state(join))


def test_records_without_rows_change_nothing():
    join = JoinState(PROJECT, CONFIG, silent_ms=300, partition=0)
    log = records([row("impression", 1, 10_000), row("click", 1, 10_010)], None)
    for offset, record in enumerate(log):
        empty = decode_batch(record.value or b"").slice(0, 0)
        assert join.take(structs.replace(record, offset=offset, value=encode_batch(empty))) is None
    assert (join.offset, join.totals.impressions, join.totals.feedback, join.totals.bad_records) == (1, 0, 0, 0)


def test_a_batch_with_nulls_in_its_envelope_is_a_bad_record():
    join = JoinState(PROJECT, CONFIG, silent_ms=300, partition=0)
    (good,) = records([row("impression", 1, 10_000)], None)
    batch = decode_batch(good.value or b"")
    nullable = pa.schema([field.with_nullable(True) for field in batch.schema])
    broken = pa.RecordBatch.from_arrays([pa.nulls(1, pa.string()), *batch.columns[1:]], schema=nullable)
    assert join.take(structs.replace(good, value=encode_batch(broken))) is None
    assert join.take(structs.replace(good, offset=1, value=b"no arrow")) is None
    assert join.totals.bad_records == 2
    assert join.totals.impressions == 0
