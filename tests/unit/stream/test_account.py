"""The join's account, and the seals that it gives to samples.

Goal: a seal is a function of the log, whoever writes it and however often. Method: workers that crash, from a seed; the
samples that a reader takes, added up beside the headers.
"""

from __future__ import annotations

import asyncio

import msgspec
import pyarrow as pa
import pytest
from stream_world import World

from headrace.contract.formats.events import Punctuation, encode_batch, encode_punctuation
from headrace.contract.formats.positions import START, Position, order_of, orders
from headrace.contract.formats.sample import parse_position
from headrace.contract.formats.seals import HEADER, decode_seal
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.log import Record
from headrace.kernels.sample_ids import seal_of
from headrace.stream.join.state import read_manifest
from headrace.stream.shell.account import EPOCHS_MAX, fresh_account, load_account


@pytest.mark.parametrize("seed", range(2))
def test_a_seal_is_that_of_what_a_reader_takes_whoever_wrote_it(seed: int):
    """Workers are killed and declared dead, and write again from a state: records come twice, cut in other places."""
    world = World(seed)
    asyncio.run(world.run())
    taken = world.read()
    order_N = orders(taken["offset"].to_numpy(), taken["rank"].to_numpy())
    records = world.log.partitions(Topics().samples)[0]
    assert len(records) > 20
    for record in records:
        sealed = decode_seal(record.headers[HEADER])
        upto = order_of(parse_position(record.headers["last"]))
        assert sealed is not None and Position(*sealed.since) == START
        assert sealed.tasks == seal_of(taken.filter(pa.array(order_N <= upto)))
    names = [name for name in world.blobs.items if name.startswith("state/stream/g1/0/")]
    plain = read_manifest(world.blobs.items[max(names)])
    upto = order_of(Position(*plain["last"]))
    account = load_account(plain, START)
    assert account.whole and account.tasks == seal_of(taken.filter(pa.array(order_N <= upto)))


def test_a_state_of_before_begins_an_account_that_is_not_whole():
    account = load_account({}, Position(7, 3))
    assert not account.whole and account.since == (7, 3) and not account.tasks


def record(offset: int, value: bytes, kind: str) -> Record:
    return Record("events", 0, offset, None, value, {"kind": kind}, 0)


def test_what_no_sample_tells_is_counted_once():
    crawled = encode_batch(pa.RecordBatch.from_pydict({"key": ["a", "b"]}))
    promises = [Punctuation("g", 1, 5, counts={"appended": n}) for n in (3, 9, 7)]
    records = [record(n, encode_punctuation(promise), "punctuation") for n, promise in enumerate(promises)]
    records += [record(3, crawled, "external"), record(4, b"nonsense", "external"), record(5, b"no", "punctuation")]
    account = fresh_account()
    account.take_records(records, -1)
    account.take_records(records, 5)
    assert (account.external, account.said) == (2, {"g": {1: {"appended": 9}}})
    again = load_account({"account": msgspec.msgpack.decode(msgspec.msgpack.encode(account.to_plain()))}, START)
    assert again == account


def test_gateways_without_end_make_the_account_no_whole_one():
    account = fresh_account()
    for epoch in range(EPOCHS_MAX + 1):
        promise = Punctuation("g", epoch, 5, counts={"appended": 1})
        account.take_records([record(epoch, encode_punctuation(promise), "punctuation")], epoch - 1)
    assert not account.whole and not account.said
