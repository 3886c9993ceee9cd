"""Goal: TLS and the shared-key handshake, broken at each step, cost their own connection, counted by its reason, and
nobody else. Method: real sockets on the real server, a good shipper beside them."""

from __future__ import annotations

import hashlib
import ssl
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgpack
import pytest
from cryptography import x509
from gateway_world import Authority, Running, ended, eventually, frame, read_value, read_values
from ingest_world import impression

from headrace.cli.stages import ingest as ingest_stage
from headrace.ingest.forward.endpoint import Endpoint
from headrace.ingest.tls_identity import faults_of

KEY = "s3cret"


def _sha512(*parts: bytes | str) -> str:
    return hashlib.sha512(b"".join(part if isinstance(part, bytes) else part.encode() for part in parts)).hexdigest()


def _ping(helo: dict[str, bytes], key: str = KEY, nonce: bytes = b"") -> bytes:
    digest = _sha512("salt", "host", nonce or helo["nonce"], key)
    return bytes(msgpack.packb(["PING", "host", "salt", digest, "web", _sha512(helo["auth"], "web", "pass")]))


def _is_served(gateway: Running, number: int, context: ssl.SSLContext | None = None) -> bool:
    with gateway.connect(context) as sock:
        sock.sendall(frame([impression(number)], f"c{number}"))
        return bool(read_value(sock) == {"ack": f"c{number}"})


def test_tls_handshakes_that_stop_in_the_midst_end_and_hold_back_no_other(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("gateway")
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = authority.client().wrap_bio(incoming, outgoing, server_hostname="localhost")
    with suppress(ssl.SSLWantReadError):
        client.do_handshake()
    hello = outgoing.read()
    with Running(tls_cert=str(cert), tls_key=str(key), handshake_ms=2_000) as gateway, ExitStack() as stack:
        stopped = [stack.enter_context(gateway.connect()) for _ in range(5)]
        for sock, size in zip(stopped, (0, 1, 5, 100, len(hello)), strict=True):
            sock.sendall(hello[:size])
        assert _is_served(gateway, 1, authority.client())
        assert all(ended(sock) for sock in stopped)
        eventually(lambda: gateway.refused("handshake_timeout") == 5, "each counted")
        assert gateway.ids() == ["e1"]


def test_a_shipper_that_does_not_know_our_authority_is_counted(tmp_path: Path) -> None:
    cert, key = Authority(tmp_path / "ours").issue("gateway")
    with Running(tls_cert=str(cert), tls_key=str(key)) as gateway:
        with pytest.raises(ssl.SSLCertVerificationError):
            gateway.connect(Authority(tmp_path / "other", "other").client())
        eventually(lambda: gateway.refused("tls") == 1, "told by its alert")


@pytest.mark.parametrize(
    "sent",
    [
        *(["PING"], ["PING", "h", "s", "d", "u"], ["PING", 1, 2, 3, 4, 5], ["PING", None, "s", "d", "u", "p"]),
        *("PING", {"PING": 1}, None, 5, ["PONG", True, "", "", ""], ["HELO", {}]),
        *(["PING", "é", "s", "é" * 128, "u", "p"], ["PING", "h", b"s", b"\xff" * 128, b"\xff", b"\xff"]),
    ],
    ids=repr,
)
def test_what_is_no_ping_is_refused(sent: Any) -> None:
    with Running(Endpoint(port=0, shared_key=KEY, users={"web": "pass"})) as gateway:
        with gateway.connect() as sock:
            read_value(sock)
            sock.sendall(msgpack.packb(sent) + frame([impression(1)], "c1"))
            assert ended(sock)
        eventually(lambda: gateway.refused("no_ping") + gateway.refused("shared_key") == 1, "counted")
        assert gateway.log.rows() == []


@pytest.mark.parametrize("key", ["", "k" * 10_000, KEY + "\n", "\ufeff" + KEY])
def test_a_key_that_differs_by_a_character_is_another_one(key: str) -> None:
    with Running(Endpoint(port=0, shared_key=KEY, users={"web": "pass"})) as gateway, gateway.connect() as sock:
        sock.sendall(_ping(read_value(sock)[1], key))
        assert read_value(sock)[:3] == ["PONG", False, "shared_key mismatch"] and ended(sock)
        assert gateway.refused("shared_key") == 1


def test_a_ping_for_another_connection_is_worth_nothing() -> None:
    endpoint = Endpoint(port=0, shared_key=KEY, users={"web": "pass"})
    with Running(endpoint) as gateway, gateway.connect() as heard, gateway.connect() as sock:
        told = read_value(heard)[1]
        helo = read_value(sock)[1]
        sock.sendall(_ping(helo, nonce=told["nonce"]))
        assert read_value(sock)[:2] == ["PONG", False] and ended(sock)


@pytest.mark.parametrize("key", [KEY, "k" * 10_000, "é\0 \n"])
def test_events_that_come_with_the_ping_are_taken_once_it_is_right(key: str) -> None:
    with Running(Endpoint(port=0, shared_key=key, users={"web": "pass"})) as gateway, gateway.connect() as sock:
        sock.sendall(_ping(read_value(sock)[1], key) + frame([impression(1)], "c1"))
        pong, ack = read_values(sock, 2)
        assert pong[:2] == ["PONG", True] and ack == {"ack": "c1"}
        assert gateway.ids() == ["e1"]


def test_half_a_ping_ends_by_its_deadline() -> None:
    with Running(Endpoint(port=0, shared_key=KEY), handshake_ms=200) as gateway, gateway.connect() as sock:
        sock.sendall(_ping(read_value(sock)[1])[:40])
        assert ended(sock) and gateway.refused("handshake_timeout") == 1


def test_the_certificates_end_is_a_metric(tmp_path: Path) -> None:
    cert, key = Authority(tmp_path).issue("gateway")
    with Running(tls_cert=str(cert), tls_key=str(key)) as gateway:
        assert "tls_days_left" in gateway.counts.totals and gateway.identity is not None
        end = x509.load_pem_x509_certificate(cert.read_bytes()).not_valid_after_utc
        assert gateway.identity.days_left(round((end - timedelta(days=3)).timestamp() * 1_000)) == pytest.approx(3)


def test_a_certificate_that_clients_refuse_is_told_of(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    good = x509.load_pem_x509_certificate(authority.issue("gateway")[0].read_bytes())
    bare = x509.load_pem_x509_certificate(authority.issue("bare", host="")[0].read_bytes())
    begin, end = good.not_valid_before_utc, good.not_valid_after_utc
    assert ["ends at" in fault for fault in faults_of(good, end - timedelta(minutes=1))] == [True]
    assert faults_of(good, end - timedelta(days=15))[0].startswith("is valid from")
    assert ["ended at" in fault for fault in faults_of(good, end + timedelta(seconds=1))] == [True]
    assert faults_of(good, begin + timedelta(seconds=1))[0].startswith("ends at"), "it lives two hours"
    assert any("subjectAltName" in fault for fault in faults_of(bare, datetime.now(UTC)))


def test_a_key_with_a_line_break_from_its_file_is_told_of_without_the_key(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HEADRACE_SHARED_KEY", KEY + "\n")
    assert ingest_stage._secret("HEADRACE_SHARED_KEY") == KEY + "\n", "as shippers have it that read the same file"
    assert "HEADRACE_SHARED_KEY" in caplog.text and KEY not in caplog.text
