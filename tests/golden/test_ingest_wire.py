"""Goal: what real shippers sent is understood to the byte. Method: captures of them, whole, byte by byte and cut.

Every capture without a handshake is decoded and compared with what its recorder wrote down.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import msgpack
import pytest

from headrace.ingest.decode.message import Message
from headrace.ingest.forward.fluent_handshake import Handshake
from headrace.ingest.forward.protocol import Decoder, Ping, encode_ack

BOUND = 1 << 20


def _plain(value: Any) -> Any:
    """Return `value` as the recorder writes it: bytes that are not UTF-8 become {"$bin": base64}."""
    if isinstance(value, dict):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, bytes | str):
        data = value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")
        try:
            return data.decode()
        except UnicodeDecodeError:
            return {"$bin": base64.b64encode(data).decode()}
    return value


def _decode(data: bytes, step: int) -> list[Message]:
    decoder = Decoder(BOUND)
    messages = [m for at in range(0, len(data), step) for m, _ in decoder.feed(data[at : at + step])]
    assert all(isinstance(m, Message) for m in messages)
    assert decoder.pending_bytes == 0
    return [m for m in messages if isinstance(m, Message)]


def _connections(shared: Path) -> list[tuple[str, bytes, dict[str, Any]]]:
    found = []
    for path in sorted((shared / "wire").glob("*.json")):
        capture = json.loads(path.read_text())
        for connection in capture.get("connections", []) if isinstance(capture, dict) else []:
            data = (path.parent / connection["file"]).read_bytes()
            found.append((connection["file"], data, connection))
    return found


def _logs(connection: dict[str, Any]) -> list[dict[str, Any]]:
    return [m for m in connection["messages"] if m["mode"] != "PING"]


@pytest.mark.parametrize("step", [1, 7, BOUND])
def test_real_clients_are_understood(shared: Path, step: int) -> None:
    seen = 0
    for name, data, connection in _connections(shared):
        wanted = _logs(connection)
        start = 0 if len(wanted) == len(connection["messages"]) else connection["msg_end_offsets"][0]
        messages = _decode(data[start:], step)
        assert [m.tag for m in messages] == [w["tag"] for w in wanted], name
        for message, want in zip(messages, wanted, strict=True):
            option = want["option"] or {}
            assert message.chunk == option.get("chunk"), name
            assert message.signal == option.get("fluent_signal", 0), name
            events = [e for e in want["events"] if "group_marker" not in e] if message.signal == 0 else []
            got = [(e.time_ns, _plain(e.record)) for e in message.entries]
            assert got == [(e["sec"] * 10**9 + e["nsec"], e["record"]) for e in events], name
            assert message.problem == "", name
            seen += len(events)
    assert seen > 450


def test_acks_equal_those_of_real_servers(shared: Path) -> None:
    for name, data, connection in _connections(shared):
        wanted = _logs(connection)
        if len(wanted) == len(connection["messages"]) and any(m.get("ack_sent") for m in wanted):
            acks = b"".join(encode_ack(m) for m in _decode(data, BOUND) if m.chunk is not None)
            assert acks.hex() == connection["server_to_client_hex"], name
    for server in ("flb", "fluentd"):
        good = json.loads((shared / "wire" / f"server-handshake-{server}.json").read_text())["good"]
        assert encode_ack(Message("t", b"", "abc")).hex() == good["ack_hex"]


def test_headers_need_not_be_minimal() -> None:
    body = (
        b"\xdd\x00\x00\x00\x02" + msgpack.packb("t") + b"\xdd\x00\x00\x00\x01" + b"\xdd\x00\x00\x00\x02" + b"\x05\x80"
    )
    assert [(m.tag, m.entries[0].time_ns, m.entries[0].record) for m in _decode(body, 3)] == [("t", 5 * 10**9, {})]


def test_handshakes_of_real_clients_are_answered_to_the_byte(shared: Path) -> None:
    seen = 0
    for path in sorted((shared / "wire").glob("*.json")):
        capture = json.loads(path.read_text())
        config = capture.get("server_config") if isinstance(capture, dict) else None
        for connection in capture["connections"] if config and "shared_key" in config else ():
            helo = connection.get("helo")
            if helo is None:
                continue
            users = {config["username"]: config["password"]} if config.get("username") else None
            nonce, salt = bytes.fromhex(helo["nonce"]), bytes.fromhex(helo["auth"])
            for key, refusal in ((config["shared_key"], ""), ("another", "shared_key")):
                server = Handshake(key, config["self_hostname"], nonce, users=users, salt=salt)
                decoder = Decoder(BOUND, greets=True)
                (ping, _), *_rest = decoder.feed((path.parent / connection["file"]).read_bytes())
                assert isinstance(ping, Ping)
                pong, why = server.answer(ping.value)
                assert why == refusal
                if not refusal:
                    assert connection["server_to_client_hex"].startswith((server.helo() + pong).hex()), path.name
            if users:
                wrong = Handshake(config["shared_key"], "x", nonce, users={"alice": "other"}, salt=salt)
                assert wrong.answer(ping.value)[1] == "password"
            seen += 1
    assert seen >= 6
    capture = json.loads((shared / "wire" / "server-handshake-fluentd.json").read_text())
    refused, _ = Handshake("k", "server.test", b"n").answer(["PING", "h", "salt", "no digest", "", ""])
    assert refused.hex() == capture["bad_key"]["pong_hex"]
