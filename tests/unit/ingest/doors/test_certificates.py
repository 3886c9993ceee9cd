"""Goal: a certificate that cannot be used costs no event: client and gateway name the cause, and once the file is
renewed all goes on without a restart. Method: real TLS sockets at both doors, certificates made on the spot."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from collector_world import site
from gateway_world import Authority, Running, ended, eventually, frame, read_value
from ingest_world import impression

from headrace.contract.config import IngestConfig
from headrace.contract.errors import ConfigRejected
from headrace.ingest import tls_identity
from headrace.ingest.tls_identity import TlsIdentity
from headrace.sender import Sender

Send = Callable[[ssl.SSLContext], bool]
"""Sends event 1 and says whether the gateway took it. Raises what the client's TLS does."""

EXPIRED, EARLY, FOREIGN = {"hours": (-48, -24)}, {"hours": (24, 48)}, {"host": "elsewhere.example"}


class Door:
    """One way in: how to send through it, what it has refused, which events it has taken, and how it renews."""

    def __init__(self, send: Send, refused: Callable[[], float], ids: Callable[[], list[str]], renew: Any) -> None:
        self.send, self.refused, self.ids, self.renew = send, refused, ids, renew


@contextmanager
def _forward(**config: Any) -> Iterator[Door]:
    with Running(**config) as gateway:

        def send(context: ssl.SSLContext) -> bool:
            with gateway.connect(context) as sock:
                sock.sendall(frame([impression(1)], "c"))
                return bool(read_value(sock) == {"ack": "c"})

        assert gateway.identity is not None
        yield Door(send, lambda: gateway.refused("tls"), gateway.ids, gateway.identity.renew)


@contextmanager
def _http(**config: Any) -> Iterator[Door]:
    with site(**config) as made:

        def send(context: ssl.SSLContext) -> bool:
            event = impression(1) | {"tag": "shop.impression"}
            try:
                return httpx.post(f"https://localhost:{made.port}/v1/events", json=event, verify=context).is_success
            except httpx.ConnectError as error:
                raise ssl.SSLError(str(error)) from error

        yield Door(send, lambda: made.metrics.counters["connections_refused_total", "tls"], made.ids, made.renew)


@pytest.mark.parametrize("door", [_forward, _http])
@pytest.mark.parametrize(
    "wrong, client, server",
    [
        (EXPIRED, "certificate has expired", "ingest.tls_cert has ended: renew"),
        (EARLY, "not yet valid", "not valid yet"),
        (FOREIGN, "Hostname mismatch", "subjectAltName"),
    ],
)
def test_a_certificate_that_clients_refuse_is_named_on_both_sides_and_mended_by_its_renewal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, door: Any, wrong: Any, client: str, server: str
) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("gateway", **wrong)
    with door(tls_cert=str(cert), tls_key=str(key)) as opened:
        with pytest.raises(ssl.SSLError, match=client):
            opened.send(authority.client())
        eventually(lambda: opened.refused() == 1, "counted")
        # It is counted before it is named.
        eventually(lambda: "refused (tls)" in caplog.text, "named")
        assert server in caplog.text.split("refused (tls)")[1]
        authority.issue("gateway")
        opened.renew()
        assert opened.send(authority.client()) and opened.ids() == ["e1"]


@pytest.mark.parametrize("door", [_forward, _http])
def test_a_clients_certificate_that_has_ended_is_named_and_a_renewed_authority_counts_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, door: Any
) -> None:
    authority, other = Authority(tmp_path / "ours"), Authority(tmp_path / "other", "other authority")
    cert, key = authority.issue("gateway")
    known = tmp_path / "clients.pem"
    known.write_bytes(authority.file.read_bytes())
    with door(tls_cert=str(cert), tls_key=str(key), tls_client_ca=str(known)) as opened:
        assert not _is_taken(opened, authority.client(authority.issue("shipper", **EXPIRED)))
        eventually(lambda: opened.refused() == 1, "counted")
        assert "certificate has expired" in caplog.text
        shipper = authority.client(authority.issue("shipper"))
        assert _is_taken(opened, shipper)
        known.write_bytes(other.file.read_bytes())
        opened.renew()
        assert not _is_taken(opened, shipper)
        eventually(lambda: opened.refused() == 2 and opened.ids() == ["e1"], "refused")
        assert _is_taken(opened, authority.client(other.issue("shipper"))), "who signed it now"


def _is_taken(opened: Door, context: ssl.SSLContext) -> bool:
    try:
        return opened.send(context)
    except (OSError, httpx.TransportError):
        return False


def test_tls_handshakes_of_the_collector_have_a_bound_and_an_end(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("gateway")
    with (
        site(tls_cert=str(cert), tls_key=str(key), collector_connections_max=3, handshake_ms=1_000) as made,
        ExitStack() as stack,
    ):
        refused = lambda reason: made.metrics.counters["connections_refused_total", reason]  # noqa: E731
        stuck = [stack.enter_context(socket.create_connection(("127.0.0.1", made.port))) for _ in range(4)]
        eventually(lambda: refused("connections_max") == 1, "one more than may be open")
        assert all(ended(sock) for sock in stuck)
        eventually(lambda: refused("handshake_timeout") == 3, "the others")
        url = f"https://localhost:{made.port}/v1/events"
        assert httpx.post(url, json={}, verify=authority.client()).status_code == 400


def test_a_file_that_could_not_be_read_is_read_once_it_can_whatever_its_times_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("gateway", hours=(-1, 24))
    identity = TlsIdentity(IngestConfig(tls_cert=str(cert), tls_key=str(key)))
    first = identity.context
    authority.issue("gateway", hours=(-1, 240))
    good = key.read_bytes()
    key.write_text("torn")
    for file in (cert, key):
        os.utime(file, (1, 1))
    identity.renew()
    identity.renew()
    assert identity.context is first and caplog.text.count("the old certificate stays") == 1
    now_s = tls_identity.time.monotonic()
    monkeypatch.setattr(tls_identity.time, "monotonic", lambda: now_s + 86_401)
    identity.renew()
    assert caplog.text.count("the old certificate stays") == 2, "told again each day"
    left = identity.days_left(tls_identity.time.time_ns() // 10**6)
    assert 0.9 < left < 1, "of the one that is served, not of the file"
    key.write_bytes(good)
    os.utime(key, (1, 1))
    identity.renew()
    assert identity.context is not first


def test_a_read_that_failed_is_tried_again_though_nothing_about_the_files_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("gateway")
    identity = TlsIdentity(IngestConfig(tls_cert=str(cert), tls_key=str(key)))
    first = identity.context
    authority.issue("gateway")

    def fails(_identity: TlsIdentity) -> Any:
        raise ConfigRejected("an NFS server that is away for a moment")

    with monkeypatch.context() as patch:
        patch.setattr(TlsIdentity, "_read", fails)
        identity.renew()
    assert identity.context is first
    identity.renew()
    assert identity.context is not first


def test_the_sender_that_meets_tls_says_what_to_do_and_keeps_all(tmp_path: Path) -> None:
    cert, key = Authority(tmp_path / "keys").issue("gateway")
    with Running(tls_cert=str(cert), tls_key=str(key)) as gateway:
        sender = Sender("shop", port=gateway.port, spool_dir=tmp_path / "spool")
        sender.emit("impression", impression(1))
        eventually(lambda: "ingest.tls_cert" in str(sender.last_error), "cause and remedy")
        assert "tls.conf" in str(sender.last_error) and sender.unacked == 1
        sender.close(0.0)
    with Running() as gateway:
        sender = Sender("shop", port=gateway.port, spool_dir=tmp_path / "spool")
        assert sender.flush(30.0) and gateway.ids() == ["e1"]
        sender.close()
