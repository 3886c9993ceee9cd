"""Goal: what `emit` took is not lost where the spool's folder is shared with strangers, removed, or made anew. Method:
real folders, a slot that cannot be opened, and a gateway that counts."""

from __future__ import annotations

import shutil
import zlib
from pathlib import Path

import msgpack
import pytest
from acking_gateway import AckingGateway
from gateway_world import eventually

import headrace.sender.sender as sender_module
from headrace.sender import Sender
from headrace.sender.segment import ENTRY, HEAD


def _left(slot: Path, *names: str, tag: str = "a") -> Path:
    """Write what a dead process left; return the file."""
    slot.mkdir(parents=True)
    entries = [b"\x92\xd7\x00" + bytes(8) + msgpack.packb({"event_id": name}) for name in names]
    records = [len(tag).to_bytes(2, "little") + tag.encode() + entry for entry in entries]
    path = slot / "000000000001.seg"
    path.write_bytes(b"".join(HEAD.pack(len(data), zlib.crc32(data), ENTRY) + data for data in records))
    return path


def test_a_slot_that_cannot_be_opened_does_not_lose_the_one_before_it(tmp_path: Path) -> None:
    _left(tmp_path / "slot-01", "left")
    # As the lock of another user's process: to open it for writing fails.
    _left(tmp_path / "slot-02", "strange")
    (tmp_path / "slot-02" / "lock").mkdir()
    with AckingGateway() as gateway:
        with Sender("", port=gateway.port, spool_dir=tmp_path) as sender:
            eventually(lambda: gateway.ids("a") == {"left"}, "adopted")
            assert isinstance(sender.last_error, OSError), "the strange slot is told"
        assert gateway.got == {("a", "left"): 1}
    assert [path.parent.name for path in tmp_path.rglob("*.seg")] == ["slot-02"]


def test_a_file_that_cannot_be_read_is_not_deleted_and_stops_no_other(tmp_path: Path) -> None:
    for slot in ("slot-00", "slot-01"):
        _left(tmp_path / slot, f"good-{slot}")
        (tmp_path / slot / "000000000002.seg").mkdir()
        (tmp_path / slot / "notes.seg").write_bytes(b"")
    with AckingGateway() as gateway:
        with Sender("", port=gateway.port, spool_dir=tmp_path) as sender:
            eventually(lambda: gateway.ids("a") == {"good-slot-00", "good-slot-01"}, "both good ones")
            sender.emit("a", {"event_id": "own"})
            assert sender.flush(20)
        assert set(gateway.got.values()) == {1}
    assert {path.is_dir() for path in tmp_path.rglob("0*.seg")} == {True}


def test_a_spool_that_was_removed_is_made_anew_with_all_that_has_no_ack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender_module, "_ADOPT_S", 0.05)
    spool = tmp_path / "spool"
    with Sender("", port=1, spool_dir=spool) as sender:
        for number in range(100):
            sender.emit(f"t{number % 3}", {"event_id": number})
        shutil.rmtree(spool)
        eventually(lambda: len(list(spool.rglob("*.seg"))) >= 3, "written anew")
        sender.emit("t0", {"event_id": 100})
        # The process is killed: what lies on disk is all that is left.
        copy = tmp_path / "copy"
        shutil.copytree(spool, copy)
        sender.close(timeout=0)
    with AckingGateway() as gateway:
        with Sender("", port=gateway.port, spool_dir=copy) as heir:
            assert heir.flush(20)
        assert {name for _, name in gateway.got} == set(range(101)) and set(gateway.got.values()) == {1}


def test_who_lost_its_folder_deletes_nothing_of_who_made_it_anew(tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    first = Sender("", port=1, spool_dir=spool)
    shutil.rmtree(spool)
    second = Sender("", port=1, spool_dir=spool)
    second.emit("a", {"event_id": "second"})
    first.close(timeout=0)
    second.close(timeout=0)
    with AckingGateway() as gateway:
        with Sender("", port=gateway.port, spool_dir=spool) as heir:
            assert heir.flush(20)
        assert gateway.got == {("a", "second"): 1}


def test_a_length_that_was_damaged_is_no_torn_tail(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = _left(tmp_path / "slot-00", *(f"a{number}" for number in range(10)))
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle + 3] = 0xFF  # The length of the sixth record: far beyond the file's end.
    path.write_bytes(data)
    with AckingGateway() as gateway:
        with Sender("", port=gateway.port, spool_dir=tmp_path) as sender:
            assert sender.flush(20)
        assert gateway.ids("a") == {f"a{number}" for number in range(5)}
    (kept,) = tmp_path.glob("*.damaged")
    assert kept.read_bytes() == bytes(data[middle:]) and "damaged" in caplog.text
