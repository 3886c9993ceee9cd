"""Goal: a part's name says what is in it, so that a worker which was declared dead and writes on damages no state.
Method: workers begin with states of each other at random, go on for a while and store states at random places. Whatever
name is written twice must hold the same both times; and each state, with the parts as they were written last, goes on
to the samples of one undisturbed pass."""

from __future__ import annotations

import zlib
from random import Random
from typing import Any

import msgspec
import numpy as np
import pytest
from join_world import records, state, traffic

from headrace.stream.join import state as states
from headrace.stream.join.state import StateWriter, _plain_of, _rows_of, load, read_manifest


def content(name: str, data: bytes) -> Any:
    """Return what a part holds; a counter's buckets come in no order."""
    if name.startswith("counter-"):
        rows = _rows_of(_plain_of(data))
        columns = [np.asarray(rows.keys_R2), rows.number_R[:, None], rows.counts_RE]
        return sorted(np.concatenate([c.astype(object) for c in columns], axis=1).tolist())
    return data


@pytest.mark.parametrize("seed", range(8))
def test_the_same_name_is_the_same_content(seed: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(states, "INLINE_ROWS", 8)
    monkeypatch.setattr("headrace.stream.join.payload.PIECE_ROWS", 16)
    rng, log = Random(seed), records(traffic(seed, 250), Random(seed))
    parts: dict[str, bytes] = {}
    manifests: dict[int, bytes] = {}
    for _ in range(16):
        join = state()
        writer, at = StateWriter(join), 0
        if manifests and rng.random() < 0.8:
            plain = read_manifest(manifests[rng.choice(sorted(manifests))])
            writer = load(join, plain, parts.get)
            at = join.offset + 1
        for record in log[at : at + rng.randrange(1, len(log))]:
            join.take(record)
            if rng.random() < 0.1:
                snapshot = writer.take()
                for name, encode in snapshot.fresh.items():
                    data = encode()
                    assert content(name, parts.get(name, data)) == content(name, data), name
                    parts[name] = data
                # A worker may die before its manifest is there.
                if rng.random() < 0.7:
                    manifests[join.offset] = snapshot.manifest()
    expected = [e for record in log if (e := whole.take(record)) is not None] if (whole := state()) else []
    for offset, manifest in manifests.items():
        join = state()
        load(join, read_manifest(manifest), parts.get)
        after = [e for record in log[offset + 1 :] if (e := join.take(record)) is not None]
        want = expected[len(expected) - len(after) :]
        assert [e.last for e in after] == [e.last for e in want]
        assert all(a.batch.equals(b.batch) for a, b in zip(after, want, strict=True))


def test_a_part_that_holds_other_rows_than_its_name_says_is_damaged(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(states, "INLINE_ROWS", 8)
    log, parts = records(traffic(3, 250), Random(3)), dict[str, bytes]()
    join = state()
    writer = StateWriter(join)
    for record in log:
        join.take(record)
    snapshot = writer.take()
    parts = {name: encode() for name, encode in snapshot.fresh.items()}
    name = next(n for n in parts if n.startswith("seen-"))
    start, keys, values = _plain_of(parts[name])
    parts[name] = zlib.compress(msgspec.msgpack.encode([start + 1, keys[16:], values[1:]]), 1)
    with pytest.raises(states.Damaged, match="seen-"):
        load(state(), read_manifest(snapshot.manifest()), parts.get)
