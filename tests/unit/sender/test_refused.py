"""Goal: what cannot pass is refused by `emit`, and what the gateway refuses for good is in the file of rejects; neither
blocks the rest. Method: the real gateway on sockets, its bounds small."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import msgpack
import pytest
from gateway_world import Running, eventually
from ingest_world import impression

from headrace.contract.errors import ConfigRejected, EventRejected, Overloaded
from headrace.sender import Sender
from headrace.sender.rejects import Rejects


def _big(number: int, size: int) -> dict[str, Any]:
    """Return an impression of this many bytes."""
    record = impression(number, title="")
    return {**record, "title": "x" * (size - len(msgpack.packb(record)) - 4)}


def test_emit_refuses_what_the_gateway_could_not_take_and_goes_on(tmp_path: Path) -> None:
    with Running() as gateway, Sender("shop", port=gateway.port, spool_dir=tmp_path) as sender:
        for wrong, reason in (
            (_big(1, 786_500), "too_large"),
            (impression(1, price=1 << 70), "bad_type"),
            (impression(1, title="\ud800"), "bad_type"),
        ):
            with pytest.raises(EventRejected) as caught:
                sender.emit("impression", wrong)
            assert caught.value.reason == reason
        with pytest.raises(TypeError):
            sender.emit("impression", impression(1, title=object()))
        for at_s in (-1, 1 << 33, float("nan")):
            with pytest.raises(EventRejected, match="no time"):
                sender.emit_with_time("impression", at_s, impression(1))
        assert sender.unacked == 0 and sender.spool_bytes == 0
        sender.emit("impression", _big(2, 786_000))
        sender.emit("impression", impression(3))
        assert sender.flush(20)
        assert gateway.ids() == ["e2", "e3"] and gateway.log.letters() == [], (
            "the largest that is taken is no dead letter"
        )


def test_an_event_that_no_empty_spool_takes_is_not_told_to_come_again(tmp_path: Path) -> None:
    sender = Sender("shop", port=1, spool_dir=tmp_path, spool_bytes_max=20_000)
    with pytest.raises(EventRejected, match="takes 16000 bytes"):
        sender.emit("impression", _big(1, 15_991))
    sender.close(timeout=0)
    with pytest.raises(ConfigRejected, match="event_bytes_max"):
        Sender("shop", spool_dir=tmp_path, event_bytes_max=1 << 24)


def test_a_gateway_with_a_smaller_bound_gets_smaller_chunks_and_no_event_that_is_larger(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Running(chunk_bytes_max=100_000) as gateway, caplog.at_level(logging.ERROR, "headrace.sender"):
        sender = Sender("shop", port=gateway.port, spool_dir=tmp_path, flush_ms=300)
        for number in range(6):
            sender.emit("impression", _big(number, 40_000))
        sender.emit("impression", _big(6, 120_000))
        sender.emit("click", {"request_id": "r1", "user_id": 1, "event_id": "c"})
        assert sender.flush(20)
        assert gateway.ids() == ["c", "e0", "e1", "e2", "e3", "e4", "e5"]
        (line,) = (tmp_path / "rejects.ndjson").read_text().splitlines()
        told = json.loads(line)
        assert told["tag"] == "shop.impression" and told["record"] == _big(6, 120_000) and told["time_ns"] > 0
        assert sender.rejected == 1 and "1 events of tag shop.impression" in caplog.text
        assert "e6" not in caplog.text, "no content in a log"
        with pytest.raises(EventRejected, match="99"):
            sender.emit("impression", _big(7, 120_000))
        sender.close()
        with Sender("shop", port=gateway.port, spool_dir=tmp_path) as again:
            assert again.unacked == 0, "what was rejected is not sent again"


def test_a_rejected_event_that_json_cannot_say_is_kept_as_it_was(tmp_path: Path) -> None:
    rejects = Rejects(tmp_path / "rejects.ndjson", bytes_max=300)
    entry = b"\x92\xd7\x00" + bytes(8) + msgpack.packb({"a": b"\xff", "b": float("nan")})
    rejects.add("t", [entry], "why")
    assert "raw" in json.loads(rejects.path.read_text())
    with pytest.raises(Overloaded, match="move it away"):
        rejects.add("t", [entry] * 3, "why")
    assert rejects.count == 1


def test_one_that_cannot_be_rejected_waits_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rejects.__init__, "__defaults__", (10,))
    with Running(chunk_bytes_max=100_000) as gateway:
        sender = Sender("shop", port=gateway.port, spool_dir=tmp_path)
        sender.emit("impression", _big(1, 120_000))
        sender.emit("click", {"request_id": "r1", "user_id": 1, "event_id": "c"})
        eventually(lambda: gateway.ids() == ["c"], "the other tag goes on")
        eventually(lambda: sender.unacked == 1, "and is acked")
        eventually(lambda: isinstance(sender.last_error, Overloaded | OSError), "why the first one waits is known")
        sender.close(timeout=0)
