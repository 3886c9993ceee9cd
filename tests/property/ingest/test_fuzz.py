"""Goal: no bytes whatever crash the gateway, hold its memory, or leave without a counted reason. Method: a real server
on loopback; hypothesis draws bytes, and real captures are flipped, cut, doubled and spliced from a seed."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from random import Random

import msgpack
import pytest
from gateway_world import NEVER_S, Running, ended, eventually, frame, read_value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ingest_world import impression

from headrace.ingest.forward.endpoint import Endpoint

BUFFER_BYTES = 4 << 20
REASONS = {"bad_frame", "too_large", "no_ping", "shared_key", "password", "tls", "slow_reader", "partial_bound"}
SEEDS = range(int(os.environ.get("HEADRACE_FUZZ_SEEDS", "6")))
"""Each is some hundred mutated captures; raise it for a longer hunt."""


@pytest.fixture(scope="module")
def gateway() -> Iterator[Running]:
    with Running(chunk_bytes_max=1 << 20, buffer_bytes_max=BUFFER_BYTES, dead_letter_share_max=1.0) as running:
        yield running


@pytest.fixture(scope="module")
def keyed() -> Iterator[Running]:
    endpoint = Endpoint(port=0, shared_key="k", users={"u": "p"})
    with Running(endpoint, chunk_bytes_max=1 << 20, buffer_bytes_max=BUFFER_BYTES) as running:
        yield running


def throw(gateway: Running, wire: bytes) -> None:
    """Send it, end this side, read what comes; the gateway must end the connection."""
    with gateway.connect() as sock:
        with contextlib.suppress(OSError):
            sock.sendall(wire)
            sock.shutdown(socket.SHUT_WR)
        assert ended(sock)


def check(gateway: Running) -> None:
    """The gateway is whole: nothing held, every reason known, every event with one outcome, and it still serves."""
    eventually(lambda: gateway.held_bytes() == 0 and not gateway.forward.open_connections, "nothing is held")
    prefix = "connections_refused_total:"
    assert {k.removeprefix(prefix) for k in gateway.counts.totals if k.startswith(prefix)} <= REASONS
    counts = gateway.gateway.counts
    assert counts["read"] == counts["appended"] + counts["dead_lettered"] + counts["repeated"]
    assert gateway.faults == []
    assert gateway.failure is None
    if not gateway.endpoint.shared_key:
        with gateway.connect() as sock:
            sock.sendall(frame([impression(1)], "alive"))
            assert read_value(sock) == {"ack": "alive"}


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=12))
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4) | st.integers(0, 9), inner, max_size=4)
    ),
    max_leaves=12,
)
TAGS = st.sampled_from(["shop.impression", "shop.click", "shop.order", "other", ""])
OPTIONS = st.dictionaries(
    st.sampled_from(["chunk", "size", "compressed", "fluent_signal", "metadata", "x"]),
    st.sampled_from(["c", "gzip", "zstd", "text"]) | VALUES,
    max_size=4,
)
FRAMES = (
    st.tuples(TAGS, VALUES, VALUES, OPTIONS)
    | st.tuples(TAGS, st.lists(st.tuples(VALUES, VALUES), max_size=5), OPTIONS)
    | st.tuples(TAGS, st.binary(max_size=60), OPTIONS)
    | VALUES
).map(lambda value: bytes(msgpack.packb(value, unicode_errors="surrogatepass")))
SLOW = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]


@settings(max_examples=200, suppress_health_check=SLOW)
@given(st.lists(st.binary(max_size=400) | FRAMES, min_size=1, max_size=6).map(b"".join))
def test_any_bytes_end_in_an_outcome(gateway: Running, wire: bytes) -> None:
    throw(gateway, wire)


@settings(max_examples=100, suppress_health_check=SLOW)
@given(st.lists(FRAMES, min_size=1, max_size=4).map(b"".join), st.data())
def test_a_frame_with_one_bit_turned_ends_in_an_outcome(gateway: Running, wire: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(wire) * 8 - 1))
    turned = bytearray(wire)
    turned[at // 8] ^= 1 << (at % 8)
    throw(gateway, bytes(turned))


@settings(max_examples=60, suppress_health_check=SLOW)
@given(st.lists(st.binary(max_size=200) | FRAMES, min_size=1, max_size=3).map(b"".join))
def test_nothing_gets_past_a_handshake(keyed: Running, wire: bytes) -> None:
    throw(keyed, wire)
    assert keyed.gateway.counts["read"] == 0
    assert keyed.log.letters() == []


def _mutated(random: Random, corpus: list[bytes]) -> bytes:
    wire = bytearray(random.choice(corpus))
    for _ in range(random.choice((1, 1, 2, 5))):
        at = random.randrange(len(wire) + 1)
        to = min(len(wire), at + random.choice((1, 2, 4, 30, 300)))
        match random.randrange(6):
            case 0 if at < len(wire):
                wire[at] ^= 1 << random.randrange(8)
            case 1:
                del wire[at:to]
            case 2:
                wire[at:at] = wire[at:to]
            case 3:
                other = random.choice(corpus)
                begin = random.randrange(len(other))
                wire[at:to] = other[begin : begin + random.choice((1, 10, 100, 1_000))]
            case 4:
                # A length that lies.
                wire[at : at + 4] = random.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\0\1\0\0"))
            case _:
                wire[at:to] = random.randbytes(to - at)
    return bytes(wire)


@pytest.mark.parametrize("seed", SEEDS)
def test_mutated_captures_end_in_an_outcome(gateway: Running, shared: Path, seed: int) -> None:
    corpus = [path.read_bytes() for path in sorted((shared / "wire").glob("*.bin"))]
    assert len(corpus) > 40
    random = Random(seed)
    for _ in range(150):
        throw(gateway, _mutated(random, corpus))
    check(gateway)


def test_after_all_of_it_the_gateways_are_whole(gateway: Running, keyed: Running) -> None:
    check(gateway)
    check(keyed)
    with keyed.connect() as sock:
        sock.settimeout(NEVER_S)
        assert read_value(sock)[0] == "HELO"
