"""Goal: whatever is repeated or comes out of turn, a reader of samples takes each once, in order, and misses none.
Method: a partition cut into records, cut otherwise again, shuffled; a reader's rule written down plainly judges."""

from __future__ import annotations

from itertools import pairwise

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from headrace.contract.formats.positions import START, Position
from headrace.contract.formats.sample import format_position
from headrace.contract.formats.samples_topic.sample_order import SampleOrder
from headrace.contract.interfaces.log import Record

SAMPLES = [Position(offset, rank) for offset in range(2, 12) for rank in range(1 + offset % 3)]


def record(at: int, first: int, end: int) -> Record:
    """Return a record of SAMPLES[first:end], its rows' numbers as its value."""
    after = START if first == 0 else SAMPLES[first - 1]
    headers = {"after": format_position(after), "last": format_position(SAMPLES[end - 1])}
    return Record("samples", 0, at, None, bytes(range(first, end)), headers, 0)


def rows_of(each: Record) -> pa.RecordBatch:
    samples = [SAMPLES[n] for n in each.value or b""]
    return pa.RecordBatch.from_pydict(
        {"offset": pa.array([s.offset for s in samples]), "rank": pa.array([s.rank for s in samples], pa.int32())}
    )


@st.composite
def records(draw: st.DrawFn) -> list[Record]:
    """Several passes over the partition, each cut in another way, some records lost and out of turn; the last whole."""
    sent: list[Record] = []
    for is_last in [*[False] * draw(st.integers(0, 3)), True]:
        cuts = sorted({0, len(SAMPLES), *draw(st.lists(st.integers(1, len(SAMPLES) - 1), max_size=6))})
        spans = list(pairwise(cuts))
        if not is_last:
            spans = draw(st.permutations(spans))[: draw(st.integers(0, len(spans)))]
        sent += [record(len(sent) + n, first, end) for n, (first, end) in enumerate(spans)]
    return sent


@given(sent=records(), hold=st.booleans())
def test_each_sample_is_taken_once_and_in_order(sent: list[Record], hold: bool):
    order, taken, plain = SampleOrder(hold=hold), [], START
    for each in sent:
        following = order.offer(each)
        rows = rows_of(each)
        first = SAMPLES[each.value[0] - 1] if each.value[0] else START
        assert (following is None) == (first > plain), "out of turn is what begins beyond the reader's position"
        for one in following or ():
            new = one.new_rows(rows_of(one.record))
            taken += [Position(*row.values()) for row in new.to_pylist()]
            assert one.last == taken[-1]
        assert following != () or not rows.num_rows or taken[-1] >= SAMPLES[each.value[-1]], "only repeats are dropped"
        plain = order.position
        assert taken == SAMPLES[: len(taken)] and plain == (taken[-1] if taken else START)
        assert all(held.after > plain for held in order.held) and (hold or not order.held)
    assert taken == SAMPLES


def test_a_held_record_comes_behind_the_one_before_it():
    order = SampleOrder()
    first, second, third = record(0, 0, 3), record(1, 3, 5), record(2, 5, 9)
    assert order.offer(third) is None and order.offer(third) is None
    assert order.offer(second) is None
    assert [h.record for h in order.held] == [third, third, second]
    assert [one.record for one in order.offer(first)] == [first, second, third]
    assert order.held == [] and order.offer(third) == ()


def test_a_reader_may_leave_out_what_is_out_of_turn():
    order = SampleOrder(hold=False)
    assert order.offer(record(0, 3, 5)) is None
    assert len(order.offer(record(1, 0, 3))) == 1 and order.held == []
    assert len(order.offer(record(2, 3, 5))) == 1
