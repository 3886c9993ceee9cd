"""Seals. Goal: equal samples have equal seals, unlike ones do not. Method: small sets of ids, plain arithmetic."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st
from trainer_world import samples

from headrace.backends.lake.delta import DeltaLake
from headrace.contract.formats.positions import START, Position
from headrace.contract.formats.seals import (
    RecordSeal,
    Seal,
    decode_seal,
    encode_seal,
    whole,
    with_rows,
    without_rows,
)
from headrace.contract.hashing import hash_text, mix64
from headrace.kernels.sample_ids import id_hashes, seal_of, sum_of

IDS = st.lists(
    st.tuples(st.text(max_size=9), st.sampled_from(["click", "order"]), st.sampled_from([True, False, None]))
)


def rows_of(ids: list[tuple[str, str, bool | None]]) -> pa.RecordBatch:
    events, tasks, corrections = (list(column) for column in zip(*ids, strict=True)) if ids else ([], [], [])
    columns = [pa.array(events, pa.string()), pa.array(tasks, pa.string()), pa.array(corrections, pa.bool_())]
    return pa.RecordBatch.from_arrays(columns, names=["event_id", "task", "correction"])


@given(IDS, st.integers(0, 3))
def test_a_seal_is_that_of_plain_arithmetic(ids: list[tuple[str, str, bool | None]], start: int):
    rows, ids = rows_of(ids).slice(min(start, len(ids))), ids[start:]
    with np.errstate(over="ignore"):
        wanted = [
            int(mix64(np.array([hash_text(event) ^ hash_text(task, salt=int(bool(corrects)))], np.uint64))[0])
            for event, task, corrects in ids
        ]
    assert id_hashes(rows).tolist() == wanted and sum_of(id_hashes(rows)) == sum(wanted) % 2**64
    assert whole(seal_of(rows)) == Seal(len(ids), sum(wanted) % 2**64)
    assert all(seal.count == sum(task == name for _, name, _ in ids) for task, seal in seal_of(rows).items())


@given(IDS, IDS)
def test_seals_of_parts_make_that_of_the_whole(left: list, right: list):
    one, other, both = (seal_of(rows_of(ids)) for ids in (left, right, left + right))
    assert with_rows(one, other) == both
    assert whole(without_rows(both, other)) == whole(one)


def test_a_negative_its_correction_and_another_task_have_seals_of_their_own():
    ids = [("i", "click", False), ("i", "click", True), ("i", "order", False), ("j", "click", False)]
    assert len(set(id_hashes(rows_of(ids)).tolist())) == 4
    assert id_hashes(rows_of([("i", "click", None)])) == id_hashes(rows_of([("i", "click", False)]))


def test_a_header_comes_back_and_what_is_not_ours_is_none():
    seal = RecordSeal(since=(-1, -1), watermark_ms=7, tasks={"click": Seal(2, 2**64 - 1)})
    assert decode_seal(encode_seal(seal)) == seal
    assert decode_seal(None) is decode_seal("") is decode_seal("{}") is decode_seal("nonsense") is None


def test_a_commit_of_the_lake_seals_its_rows(tmp_path):
    """Two partitions, three commits; the second of another writer, the third of a release without seals between."""
    lake = DeltaLake(str(tmp_path / "lake"), partitions=2, hash_ids=id_hashes)
    rows = {p: samples(1, p, 30) for p in range(2)}
    at = {p: [Position(b["offset"][i].as_py(), b["rank"][i].as_py()) for i in (9, 19, 29)] for p, b in rows.items()}
    lake.append([rows[0].slice(0, 10), rows[1].slice(0, 10)], {0: 1, 1: 1}, {0: at[0][0], 1: at[1][0]})
    other = DeltaLake(lake.uri, partitions=2, hash_ids=id_hashes)
    other.append([rows[0].slice(10, 10)], {0: 2}, {0: at[0][1]})
    found, count = lake.seals()
    assert count == 30 and (found[0].since, found[0].upto, found[1].upto) == (START, at[0][1], at[1][0])
    assert found[0].seal == whole(seal_of(rows[0].slice(0, 20)))
    lake.append(
        [rows[0].slice(20, 5)], {0: 3}, {0: Position(rows[0]["offset"][24].as_py(), rows[0]["rank"][24].as_py())}
    )
    assert lake.seals()[0][0].seal == whole(seal_of(rows[0].slice(0, 25)))
    DeltaLake(lake.uri, partitions=2).append([rows[1].slice(10, 10)], {1: 2}, {1: at[1][1]})
    lake.append([rows[1].slice(20, 10)], {1: 3}, {1: at[1][2]})
    found, count = lake.seals()
    assert (found[1].since, found[1].upto, count) == (at[1][1], at[1][2], 55)
    assert found[1].seal == whole(seal_of(rows[1].slice(20, 10)))


def test_a_lake_of_before_has_no_seal(tmp_path):
    lake = DeltaLake(str(tmp_path / "lake"), partitions=2)
    assert lake.seals() == ({}, 0)
    rows = samples(1, 0, 3)
    lake.append([rows], {0: 1}, {0: Position(rows["offset"][2].as_py(), rows["rank"][2].as_py())})
    assert lake.seals() == ({}, 3)
