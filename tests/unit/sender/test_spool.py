"""Goal: a spool is read again whole, also one of an older tree, and what is damaged is kept. Method: files written by
hand, and segments of a sender without a gateway."""

from __future__ import annotations

import zlib
from pathlib import Path

import msgpack
import pytest
from acking_gateway import AckingGateway

from headrace.sender import Sender
from headrace.sender.segment import ACK, CHUNK, ENTRY, HEAD
from headrace.sender.spool import Spool


def _file(path: Path, *records: tuple[int, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(HEAD.pack(len(data), zlib.crc32(data), kind) + data for kind, data in records))


def _event(tag: str, name: str) -> tuple[int, bytes]:
    entry = b"\x92\xd7\x00" + bytes(8) + msgpack.packb({"event_id": name})
    return ENTRY, len(tag).to_bytes(2, "little") + tag.encode() + entry


def _chunk(tag: str, name: str) -> tuple[int, bytes]:
    return CHUNK, msgpack.packb([tag, name])


def test_a_spool_of_an_older_tree_is_read_with_its_acks_in_other_files(tmp_path: Path) -> None:
    slot = tmp_path / "slot-00"
    _file(
        slot / "000000000001.seg",
        *(_event("a", "a1"), _event("b", "b1"), _event("a", "a2"), _chunk("a", "A"), _chunk("b", "B")),
    )
    _file(slot / "000000000002.seg", (ACK, b"A"), _event("a", "a3"))
    for _ in range(2):
        sender = Sender("", port=1, spool_dir=tmp_path)
        assert sender.unacked == 2
        sender.close(timeout=0)
    # The second file is gone once what it holds is acked; the first one still knows that A is.
    (slot / "000000000002.seg").unlink()
    with AckingGateway() as gateway:
        with Sender("", port=gateway.port, spool_dir=tmp_path) as sender:
            assert sender.flush(20)
        assert gateway.got == {("b", "b1"): 1}


def test_what_follows_a_damaged_record_is_kept_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "slot-00" / "000000000001.seg"
    _file(path, *(_event("a", f"a{number}") for number in range(10)))
    data = bytearray(path.read_bytes())
    middle = 5 * len(data) // 10
    data[middle + 20] ^= 1
    path.write_bytes(data)
    with AckingGateway() as gateway:
        with Sender("", port=gateway.port, spool_dir=tmp_path) as sender:
            assert sender.flush(20)
        assert gateway.ids("a") == {f"a{number}" for number in range(5)}
    (kept,) = tmp_path.glob("*.damaged")
    assert kept.read_bytes() == bytes(data[middle:]) and "damaged" in caplog.text


def test_a_slot_of_somebody_else_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(_spool: Spool) -> list[object]:
        raise PermissionError(13, "somebody else's")

    monkeypatch.setattr(Spool, "adopt", denied)
    with AckingGateway() as gateway, Sender("", port=gateway.port, spool_dir=tmp_path) as sender:
        sender.emit("a", {"event_id": 1})
        assert sender.flush(20) and isinstance(sender.last_error, PermissionError)


def test_a_torn_tail_is_no_damage_and_nothing_is_appended_behind_it(tmp_path: Path) -> None:
    path = tmp_path / "slot-00" / "000000000001.seg"
    _file(path, _event("a", "a0"), _event("a", "a1"))
    path.write_bytes(path.read_bytes()[:-3])
    spool = Spool(tmp_path, bytes_max=1 << 20, fsync=False)
    (chunk,) = spool.recover()
    spool.note_ack(chunk)
    spool.close()
    spool = Spool(tmp_path, bytes_max=1 << 20, fsync=False)
    assert spool.recover() == [] and list(tmp_path.rglob("*.seg")) == [] and list(tmp_path.glob("*.damaged")) == []
    spool.close()
