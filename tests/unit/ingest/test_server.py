"""Goal: every door of the gateway takes whom it should and refuses, counted, whom it should not. Method: a real server
on loopback sockets, a log in memory, clients written out byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import socket
import ssl
import stat
import threading
import time
from pathlib import Path
from typing import Any

import msgpack
import pytest
from gateway_world import NEVER_S, Authority, Running, ended, eventually, frame, read_value, read_values
from ingest_world import impression, message

from headrace.contract.config import IngestConfig
from headrace.contract.errors import ConfigRejected, Unavailable
from headrace.ingest.forward.endpoint import Endpoint, read_users
from headrace.ingest.gateway.admission import Admission
from headrace.ingest.gateway.gateway import Peer
from headrace.ingest.gateway.loop import _raise_failed
from headrace.ingest.tls_identity import TlsIdentity

KEY, USER, PASSWORD = "correct-horse", "web", "battery-staple"


def test_a_message_is_acked_over_tcp() -> None:
    with Running() as gateway, gateway.connect() as sock:
        sock.sendall(frame([impression(1)], "c1"))
        assert read_value(sock) == {"ack": "c1"}
        assert gateway.ids() == ["e1"]


def test_bytes_that_come_one_by_one_make_the_same_messages() -> None:
    with Running() as gateway, gateway.connect() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in frame([impression(1)], "c1") + frame([impression(2)], "c2"):
            sock.sendall(bytes([byte]))
        assert read_values(sock, 2) == [{"ack": "c1"}, {"ack": "c2"}]
        assert gateway.ids() == ["e1", "e2"]


def test_a_json_array_is_acked_in_json_on_the_same_port() -> None:
    with Running() as gateway, gateway.connect() as sock:
        sock.sendall(b'["shop.impression",1700000000,{"request_id":"r","user_id":1,"item_id":2},{"chunk":"c"}]')
        assert sock.recv(4_096) == b'{"ack":"c"}'
        assert len(gateway.log.rows()) == 1


def test_a_client_that_ends_its_side_still_gets_its_acks() -> None:
    with Running() as gateway, gateway.connect() as sock:
        gateway.log.away = True
        sock.sendall(frame([impression(1)], "c1"))
        sock.shutdown(socket.SHUT_WR)
        time.sleep(0.1)
        gateway.log.away = False
        assert read_value(sock) == {"ack": "c1"}
        assert ended(sock)


# -- TLS


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "keys")


def _tls(authority: Authority, **more: str) -> dict[str, Any]:
    cert, key = authority.issue("gateway")
    return {"tls_cert": str(cert), "tls_key": str(key), **more}


def test_tls_carries_messages_and_acks(authority: Authority) -> None:
    with Running(**_tls(authority)) as gateway, gateway.connect(authority.client()) as sock:
        assert isinstance(sock, ssl.SSLSocket)
        assert sock.version() in ("TLSv1.2", "TLSv1.3")
        for number in range(50):
            sock.sendall(frame([impression(number, title="x" * 9_000)], f"c{number}"))
            assert read_value(sock) == {"ack": f"c{number}"}
        assert len(gateway.ids()) == 50


def test_tls_takes_a_client_that_sends_at_once_and_leaves(authority: Authority) -> None:
    with Running(**_tls(authority)) as gateway:
        for number in range(20):
            sock = gateway.connect(authority.client())
            sock.sendall(frame([impression(number)]))
            with contextlib.suppress(OSError):
                sock.unwrap()
            sock.close()
        eventually(lambda: len(gateway.ids()) == 20, "all events")
        eventually(lambda: not gateway.forward.open_connections, "no connection stays")


@pytest.mark.parametrize(
    "text",
    [frame([impression(1, title=PASSWORD)], "c"), f"GET /?{PASSWORD} HTTP/1.1\r\n\r\n"],
    ids=["forward", "http"],
)
def test_plain_text_on_the_tls_port_is_refused_without_a_word_of_it_in_the_log(
    authority: Authority, text: bytes | str, caplog: pytest.LogCaptureFixture
) -> None:
    with Running(**_tls(authority)) as gateway, gateway.connect() as sock:
        sock.sendall(text if isinstance(text, bytes) else text.encode())
        assert ended(sock)
        eventually(lambda: gateway.refused("tls") == 1, "counted")
        assert gateway.log.rows() == []
    assert "refused (tls)" in caplog.text
    assert PASSWORD not in caplog.text


def test_tls_on_the_plain_port_is_told_what_to_set(authority: Authority, caplog: pytest.LogCaptureFixture) -> None:
    with Running() as gateway:
        with pytest.raises((ssl.SSLError, OSError)):
            gateway.connect(authority.client())
        eventually(lambda: gateway.refused("tls") == 1, "counted")
    assert "ingest.tls_cert" in caplog.text


def test_tls_older_than_1_2_is_refused(authority: Authority) -> None:
    old = authority.client()
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with Running(**_tls(authority)) as gateway:
        with pytest.raises((ssl.SSLError, OSError)):
            gateway.connect(old)
        # Where the client's own OpenSSL knows no TLS 1.1 it says nothing, and there is nothing to count.
        eventually(lambda: gateway.refused("tls") <= 1 and not gateway.forward.open_connections, "over")


def test_with_a_client_authority_a_shipper_must_show_its_certificate(authority: Authority, tmp_path: Path) -> None:
    stranger = Authority(tmp_path / "other", "other authority")
    with Running(**_tls(authority, tls_client_ca=str(authority.file))) as gateway:
        for identity in (None, stranger.issue("stranger")):
            # In TLS 1.3 the client learns of the refusal with its first read.
            with contextlib.suppress(OSError), gateway.connect(authority.client(identity)) as sock:
                sock.sendall(frame([impression(1)], "c"))
                assert read_value(sock) is None
        eventually(lambda: gateway.refused("tls") == 2, "both counted")
        with gateway.connect(authority.client(authority.issue("shipper"))) as sock:
            sock.sendall(frame([impression(2)], "c"))
            assert read_value(sock) == {"ack": "c"}
        assert gateway.ids() == ["e2"]


def test_a_key_that_does_not_open_is_told_at_start_without_the_password(authority: Authority) -> None:
    cert, key = authority.issue("gateway", password=PASSWORD)
    config = IngestConfig(tls_cert=str(cert), tls_key=str(key))
    TlsIdentity(config, PASSWORD)
    for wrong in ("", "not-it"):
        with pytest.raises(ConfigRejected, match="HEADRACE_TLS_PASSWORD") as caught:
            TlsIdentity(config, wrong)
        assert PASSWORD not in str(caught.value)
    with pytest.raises(ConfigRejected, match="no-such-file"):
        TlsIdentity(IngestConfig(tls_cert="no-such-file"))


def test_a_renewed_certificate_is_served_and_a_broken_one_is_not(authority: Authority) -> None:
    def serial(gateway: Running) -> Any:
        with gateway.connect(authority.client()) as sock:
            assert isinstance(sock, ssl.SSLSocket)
            return (sock.getpeercert() or {})["serialNumber"]

    def touch(files: tuple[Path, Path], at_s: int) -> None:
        for file in files:
            os.utime(file, (at_s, at_s))

    with Running(**_tls(authority)) as gateway:
        identity = gateway.identity
        assert identity is not None
        first = serial(gateway)
        files = authority.issue("gateway")
        touch(files, 2_000_000_000)
        identity.renew()
        second = serial(gateway)
        assert second != first
        files[1].write_text("torn")
        touch(files, 2_000_000_001)
        identity.renew()
        assert serial(gateway) == second


# -- Unix socket, heartbeat


def test_a_unix_socket_asks_for_no_key_and_is_gone_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "forward.sock"
    with Running(Endpoint(port=0, socket_path=str(path), shared_key=KEY)) as gateway:
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(NEVER_S)
            sock.connect(str(path))
            sock.sendall(frame([impression(1)], "c"))
            assert read_value(sock) == {"ack": "c"}
        with pytest.raises(ConfigRejected, match="listens on"):
            Running(Endpoint(port=0, socket_path=str(path)))
        assert gateway.ids() == ["e1"]
    assert not path.exists()


def test_a_socket_that_a_killed_gateway_left_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "forward.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with Running(Endpoint(port=0, socket_path=str(path))), socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(NEVER_S)
        sock.connect(str(path))
        sock.sendall(frame([impression(1)], "c"))
        assert read_value(sock) == {"ack": "c"}


def test_a_file_that_is_no_socket_is_not_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(ConfigRejected, match=r"notes\.txt"):
        Running(Endpoint(port=0, socket_path=str(path)))
    assert path.read_text() == "mine"


def test_udp_answers_one_zero_byte_with_one_and_nothing_else() -> None:
    with Running() as gateway, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("127.0.0.1", gateway.port))
        sock.settimeout(NEVER_S)
        for other in (b"", b"\1", b"\0\0", b"x" * 60_000):
            sock.send(other)
        sock.send(b"\0")
        assert sock.recv(100) == b"\0"
        sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            sock.recv(100)


def test_a_port_that_is_taken_is_told_at_start() -> None:
    with Running() as gateway, pytest.raises(ConfigRejected, match=f"{gateway.port}.*--share-port"):
        Running(Endpoint(port=gateway.port))


# -- handshake


def greet(sock: socket.socket, key: str, user: str = "", password: str = "") -> list[Any]:
    """Do the client's part of the handshake; return the gateway's PONG."""
    helo = read_value(sock)
    nonce, auth = helo[1]["nonce"], helo[1]["auth"]

    def sha512(*parts: bytes | str) -> str:
        return hashlib.sha512(b"".join(p if isinstance(p, bytes) else p.encode() for p in parts)).hexdigest()

    salt, host = b"\x80salt", "client.test"
    proof = sha512(auth, user, password) if auth else ""
    sock.sendall(msgpack.packb(["PING", host, salt, sha512(salt, host, nonce, key), user, proof]))
    pong: list[Any] = read_value(sock)
    if pong is not None and pong[1]:
        assert pong[4] == sha512(salt, pong[3], nonce, key)
    return pong


def test_the_right_key_user_and_password_are_let_in() -> None:
    endpoint = Endpoint(port=0, shared_key=KEY, users={USER: PASSWORD})
    with Running(endpoint) as gateway, gateway.connect() as sock:
        assert greet(sock, KEY, USER, PASSWORD)[1] is True
        sock.sendall(frame([impression(1)], "c1"))
        assert read_value(sock) == {"ack": "c1"}


@pytest.mark.parametrize(
    ("key", "user", "password", "reason"),
    [
        ("wrong-horse", USER, PASSWORD, "shared_key"),
        (KEY, USER, "wrong-staple", "password"),
        (KEY, "nobody-known", PASSWORD, "password"),
        (KEY, "", "", "password"),
    ],
)
def test_a_wrong_one_is_refused_and_no_secret_is_logged(
    key: str, user: str, password: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    endpoint = Endpoint(port=0, shared_key=KEY, users={USER: PASSWORD})
    with Running(endpoint) as gateway, gateway.connect() as sock:
        pong = greet(sock, key, user, password)
        assert pong[:2] == ["PONG", False]
        with contextlib.suppress(OSError):
            sock.sendall(frame([impression(1)], "c1"))
        assert ended(sock)
        assert gateway.refused(reason) == 1
        assert gateway.log.rows() == []
    for secret in (KEY, PASSWORD, "wrong-horse", "wrong-staple", hashlib.sha512(KEY.encode()).hexdigest()):
        assert secret not in caplog.text


def test_who_answers_helo_with_events_or_with_much_is_refused() -> None:
    with Running(Endpoint(port=0, shared_key=KEY)) as gateway:
        with gateway.connect() as sock:
            sock.sendall(frame([impression(1)], "c1"))
            assert ended(sock)
        with gateway.connect() as sock, contextlib.suppress(OSError):
            sock.sendall(msgpack.packb(["PING", "h" * 200_000])[:-1])
            assert ended(sock)
        eventually(lambda: gateway.refused("too_large") == 1, "counted")
        assert gateway.refused("no_ping") == 1
        assert gateway.log.rows() == []


def test_helo_and_pong_come_in_one_piece_each() -> None:
    with Running(Endpoint(port=0, shared_key=KEY, users={USER: PASSWORD})) as gateway, gateway.connect() as sock:
        eventually(lambda: bool(gateway.forward.open_connections), "connected")
        time.sleep(0.05)
        helo = msgpack.unpackb(sock.recv(4_096), raw=False)
        assert helo[0] == "HELO"
        assert len(helo[1]["nonce"]) == len(helo[1]["auth"]) == 16


def test_users_are_read_and_their_faults_told_without_them() -> None:
    assert read_users("") == {}
    assert read_users("a:1, b:2:3 ,") == {"a": "1", "b": "2:3"}
    assert read_users("a:1,2\nb:x\n") == {"a": "1,2", "b": "x"}
    for wrong in ("web", "web:", ":secret-word", "a:secret-word,a:2"):
        with pytest.raises(ConfigRejected, match="entry") as caught:
            read_users(wrong)
        assert "secret-word" not in str(caught.value)
    with pytest.raises(ConfigRejected, match="HEADRACE_SHARED_KEY"):
        Endpoint(users={"a": "b"}).checked()
    shown = repr(Endpoint(shared_key=KEY, users={USER: PASSWORD})) + str(Endpoint(shared_key=KEY))
    assert KEY not in shown
    assert PASSWORD not in shown


# -- deadlines


def test_a_handshake_has_a_deadline(authority: Authority) -> None:
    with Running(Endpoint(port=0, shared_key=KEY), handshake_ms=200) as gateway, gateway.connect() as sock:
        assert ended(sock)
        assert gateway.refused("handshake_timeout") == 1
    with Running(handshake_ms=200, **_tls(authority)) as gateway, gateway.connect() as sock:
        assert ended(sock)
        eventually(lambda: gateway.refused("handshake_timeout") == 1, "counted")


def test_an_unfinished_message_has_a_deadline_and_an_idle_shipper_has_none() -> None:
    with Running(message_ms=400, handshake_ms=200) as gateway, gateway.connect() as idle, gateway.connect() as slow:
        idle.sendall(frame([impression(1)], "c1"))
        assert read_value(idle) == {"ack": "c1"}
        wire = frame([impression(2)], "c2")
        with contextlib.suppress(OSError):
            for byte in wire[:-1]:
                slow.sendall(bytes([byte]))
                time.sleep(0.02)
        assert ended(slow)
        assert gateway.refused("message_timeout") == 1
        assert gateway.forward.partial_bytes == 0
        idle.sendall(frame([impression(3)], "c3"))
        assert read_value(idle) == {"ack": "c3"}


def test_a_shipper_that_always_has_a_message_under_way_is_not_blamed() -> None:
    with Running(message_ms=600) as gateway, gateway.connect() as sock:
        wire = b"".join(frame([impression(number)], f"c{number}") for number in range(60))
        for at in range(0, len(wire), 97):
            sock.sendall(wire[at : at + 97])
            time.sleep(0.02)
        assert len(read_values(sock, 60)) == 60
        assert len(gateway.ids()) == 60
        assert gateway.refused("message_timeout") == 0


def test_the_time_in_which_the_gateway_does_not_read_is_not_the_shippers() -> None:
    with (
        Running(message_ms=1_500, buffer_bytes_max=20_000) as gateway,
        gateway.connect() as full,
        gateway.connect() as sock,
    ):
        gateway.log.away = True
        begun = frame([impression(2)], "c2")
        sock.sendall(begun[:10])
        eventually(lambda: bool(gateway.forward.partial_bytes), "begun")
        full.sendall(frame([impression(1, title="x" * 30_000)], "c1") + begun[:10])
        eventually(lambda: not gateway.loop.is_open(), "full")
        time.sleep(2.5)
        gateway.log.away = False
        assert read_value(full) == {"ack": "c1"}
        for one in (full, sock):
            one.sendall(begun[10:])
            assert read_value(one) == {"ack": "c2"}
        assert gateway.refused("message_timeout") == 0


# -- bounds


def test_beyond_the_bound_connections_are_refused_until_one_goes() -> None:
    with Running(connections_max=3) as gateway:
        held = [gateway.connect() for _ in range(3)]
        eventually(lambda: gateway.counts.totals["connections_open"] == 3, "three")
        with gateway.connect() as fourth:
            assert ended(fourth)
        assert gateway.refused("connections_max") == 1
        held.pop().close()
        eventually(lambda: gateway.counts.totals["connections_open"] == 2, "two")
        with gateway.connect() as sock:
            sock.sendall(frame([impression(1)], "c1"))
            assert read_value(sock) == {"ack": "c1"}
        for one in held:
            one.close()


def test_at_the_bound_a_silent_stranger_gives_way_and_a_shipper_never() -> None:
    with Running(connections_max=2, handshake_ms=100) as gateway, gateway.connect() as shipper:
        shipper.sendall(frame([impression(1)], "c1"))
        assert read_value(shipper) == {"ack": "c1"}
        with gateway.connect() as stranger:
            eventually(lambda: gateway.forward.open_connections == 2, "both")
            time.sleep(0.2)
            with gateway.connect() as second:
                second.sendall(frame([impression(2)], "c2"))
                assert read_value(second) == {"ack": "c2"}
                assert ended(stranger)
                assert gateway.refused("idle") == 1
                with gateway.connect() as third:
                    assert ended(third)
        shipper.sendall(frame([impression(3)], "c3"))
        assert read_value(shipper) == {"ack": "c3"}


def test_who_does_not_read_acks_is_cut_off() -> None:
    with Running() as gateway, gateway.connect() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        chunk, sent = "c" * 100_000, 0
        with contextlib.suppress(OSError):
            while sent < 1_000 and not gateway.refused("slow_reader"):
                sock.sendall(frame([impression(sent)], chunk + str(sent)))
                sent += 1
        eventually(lambda: gateway.refused("slow_reader") == 1, "cut")
        eventually(lambda: gateway.held_bytes() == 0, "nothing is held")


def test_companions_share_the_loop_and_are_told_before_the_drain() -> None:
    told: list[str] = []

    class Other:
        async def run(self, admission: Admission, stopping: asyncio.Event) -> None:
            told.append("begun")
            done = asyncio.Event()
            await stopping.wait()
            what = message("shop.impression", [impression(1)], "c", at_s=int(time.time()))
            admission.offer(what, 100, Peer("companion"), lambda outcome: (told.append(str(outcome)), done.set()))
            await done.wait()
            told.append("answered")

    class Stuck:
        async def run(self, admission: Admission, stopping: asyncio.Event) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                told.append("cancelled")

    with Running(companions=[Other()]) as gateway:
        assert told == ["begun"]
    assert told[-1] == "answered"
    assert gateway.ids() == ["e1"]
    assert gateway.log.promises()[-1][2].bye
    Running(companions=[Stuck()]).stop()
    assert told[-1] == "cancelled"


def test_a_companion_that_fails_ends_the_gateway() -> None:
    class Broken:
        async def run(self, admission: Admission, stopping: asyncio.Event) -> None:
            await asyncio.sleep(0.05)
            raise RuntimeError("the source is gone")

    running = Running(companions=[Broken()])
    eventually(lambda: running.failure is not None, "it ends")
    assert "the source is gone" in str(running.failure)


def test_a_companion_that_ends_by_itself_ends_the_gateway() -> None:
    async def serve() -> None:
        runs = asyncio.create_task(asyncio.Event().wait(), name="Runs")
        ends = asyncio.create_task(asyncio.sleep(0), name="Ends")
        _raise_failed([runs, ends])
        await ends
        _raise_failed([runs])
        with pytest.raises(Unavailable, match="Ends has ended by itself"):
            _raise_failed([runs, ends])
        runs.cancel()

    asyncio.run(serve())


def test_a_storm_of_refusals_is_counted_in_full_and_logged_in_part(caplog: pytest.LogCaptureFixture) -> None:
    with Running() as gateway:

        def storm() -> None:
            for _ in range(100):
                with contextlib.suppress(OSError), gateway.connect() as sock:
                    sock.sendall(b"\xc1" * 50)
                    ended(sock)

        threads = [threading.Thread(target=storm) for _ in range(4)]
        for thread in threads:
            thread.start()
        with gateway.connect() as sock:
            for number in range(20):
                sock.sendall(frame([impression(number)], f"c{number}"))
                assert read_value(sock) == {"ack": f"c{number}"}
        for thread in threads:
            thread.join()
        eventually(lambda: gateway.refused("bad_frame") == 400, "all counted")
        eventually(lambda: not gateway.forward.open_connections, "none stays")
    assert 1 <= caplog.text.count("refused (bad_frame)") < 100
