"""Goal: chunks of equal events without ids (whole-second times) are not taken for one, and a chunk keeps its id through
crashes. Method: outboxes without a thread, on a clock in the hand."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

import msgpack
import pytest

from headrace.contract.errors import Overloaded
from headrace.sender.lanes import Chunk
from headrace.sender.outbox import Outbox
from headrace.sender.rejects import Rejects
from headrace.sender.segment import ACK, CHUNK, ENTRY, HEAD, Segment
from headrace.sender.spool import Spool

_MOST = 4_000


def _outbox(folder: Path) -> Outbox:
    return Outbox(folder, window=64, bytes_max=1 << 26, chunk_bytes=1 << 19, message_max=1 << 24, fsync=False)


def _entry(size: int) -> bytes:
    return b"\x92\xd7\x00" + bytes(8) + bytes(msgpack.packb({"request_id": "r", "text": "x" * size}))


def _large(folder: Path, sizes: tuple[int, ...]) -> Outbox:
    """Return an outbox with one closed chunk, which the gateway has just refused as too large."""
    outbox = _outbox(folder)
    for size in sizes:
        outbox.add("t", _entry(size), 0.0)
    outbox.close_chunks(1.0, 0.0, away=False)
    outbox.message_max = _MOST
    return outbox


def _taken(outbox: Outbox, now_s: float = 1.0) -> list[Chunk]:
    chunks = []
    while (chunk := outbox.lanes.take(now_s)) is not None:
        chunks.append(chunk)
    return chunks


def _ids(chunks: list[Chunk]) -> list[str]:
    return [chunk.id for chunk in chunks]


def _killed(outbox: Outbox) -> None:
    """End it as a kill -9 does: the kernel frees its slot."""
    outbox.spool.forsake()


def test_equal_parts_of_a_chunk_have_ids_of_their_own_and_keep_them(tmp_path: Path) -> None:
    outbox = _large(tmp_path, (3_000,) * 4)
    outbox.cut_large()
    sent = _taken(outbox)
    assert len(set(_ids(sent))) == 4 and len(outbox.lanes.of("t").sent) == outbox.unacked == 4
    outbox.lanes.ended(2.0)
    assert _ids(list(outbox.lanes.of("t").ready)) == _ids(sent), "all are sent again, under the same ids"
    assert _taken(outbox, 9.0)
    outbox.acked(sent[0].id)
    _killed(outbox)
    again = _outbox(tmp_path)
    assert again.unacked == 3 and _ids(_taken(again)) == _ids(sent[1:]), "an ack covers one of them"
    for chunk in sent[1:]:
        again.acked(chunk.id)
    assert again.unacked == 0 and list(tmp_path.rglob("*.seg")) == []
    _killed(again)


def test_a_cut_that_a_crash_ended_is_made_again_with_the_same_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = _large(tmp_path, (3_000,) * 4)
    with monkeypatch.context() as patch:
        # Killed with the parts written, and the whole not yet noted as done.
        patch.setattr(Outbox, "_settle", lambda *_: None)
        outbox.cut_large()
    written = _ids(_taken(outbox))
    _killed(outbox)
    again = _outbox(tmp_path)
    assert again.unacked == 8, "the whole, and its parts"
    again.message_max = _MOST
    again.cut_large()
    sent = _ids(_taken(again))
    assert again.unacked == 4 and sent == written
    for name in sent:
        again.acked(name)
    assert again.unacked == 0 and again.spool.bytes == 0
    _killed(again)


def test_two_killed_processes_that_leave_the_same_bytes_leave_two_chunks(tmp_path: Path) -> None:
    dead = [_outbox(tmp_path) for _ in range(2)]
    for outbox in dead:
        outbox.add("t", _entry(10), 0.0)
    alive = _outbox(tmp_path)
    for outbox in dead:
        _killed(outbox)
    alive.requeue(alive.spool.read(alive.spool.adopt()[0]))
    names = _ids(_taken(alive))
    assert len(set(names)) == alive.unacked == len(alive.lanes.of("t").sent) == 2
    _killed(alive)
    again = _outbox(tmp_path)
    again.requeue(again.spool.read(again.spool.adopt()[0]))
    assert _ids(_taken(again)) == names, "the same after the next crash"
    for name in names:
        again.acked(name)
    assert again.unacked == 0
    _killed(again)


def test_a_chunk_whose_new_id_cannot_be_noted_gets_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_spool: Spool, _chunk: Chunk) -> None:
        raise Overloaded("the disk is full")

    outbox = _outbox(tmp_path)
    outbox.add("t", _entry(10), 0.0)
    _killed(outbox)
    with monkeypatch.context() as patch:
        patch.setattr(Spool, "note_chunk", full)
        outbox = _outbox(tmp_path)
    (first,) = _taken(outbox)
    _killed(outbox)
    mover = Spool(tmp_path / "other", bytes_max=1 << 20, fsync=False)
    mover.folder = tmp_path
    (second,) = mover.read(mover.adopt()[0])
    assert second.id == first.id, "also once it lies in another slot"
    mover.close()


def test_equal_parts_that_an_older_tree_gave_one_id_are_all_sent(tmp_path: Path) -> None:
    entry, part = (ENTRY, b"\x01\x00t" + _entry(10)), (CHUNK, msgpack.packb(["t", "same"]))
    slot = tmp_path / "slot-00"
    slot.mkdir()
    data = b"".join(
        HEAD.pack(len(payload), zlib.crc32(payload), kind) + payload
        for kind, payload in (*(entry, part) * 4, (ACK, b"same"))
    )
    (slot / "000000000001.seg").write_bytes(data)
    outbox = _outbox(tmp_path)
    names = _ids(_taken(outbox))
    assert len(set(names)) == 3 and "same" not in names, "the ack is one of them"
    for name in names:
        outbox.acked(name)
    assert outbox.unacked == 0
    _killed(outbox)


def test_copies_under_one_id_go_one_after_the_other(tmp_path: Path) -> None:
    outbox = _outbox(tmp_path)
    copies = [Chunk("t", Segment(tmp_path / f"{number}.seg"), 0.0) for number in range(2)]
    for copy in copies:
        copy.id = "same"
        copy.add(_entry(10))
        copy.segment.open_chunks += 1
    outbox.requeue(copies)
    for left in (1, 0):
        assert _ids(_taken(outbox)) == ["same"]
        outbox.acked("same")
        assert outbox.unacked == left
    _killed(outbox)


@pytest.mark.parametrize("fails", ["begin", "append_entry", "note_chunk"])
def test_a_cut_that_a_full_disk_ends_rejects_nothing_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def full(*_: object) -> None:
        raise Overloaded("the disk is full")

    outbox = _large(tmp_path, (9_000, 100, 3_800))
    before = outbox.spool.bytes
    with monkeypatch.context() as patch:
        patch.setattr(outbox.spool, fails, full)
        for _ in range(5):
            outbox.cut_large()
    assert isinstance(outbox.failure, Overloaded) and outbox.rejects.count == 0 and not outbox.rejects.path.exists()
    assert outbox.spool.bytes == before and len(list(tmp_path.rglob("*.seg"))) == 1
    outbox.cut_large()
    (line,) = outbox.rejects.path.read_text().splitlines()
    assert len(json.loads(line)["record"]["text"]) == 9_000 and outbox.rejects.count == 1
    for chunk in _taken(outbox):
        outbox.acked(chunk.id)
    assert outbox.unacked == 0
    _killed(outbox)


def test_a_file_of_rejects_at_its_bound_leaves_no_parts(tmp_path: Path) -> None:
    outbox = _large(tmp_path, (9_000, 100))
    outbox.rejects = Rejects(tmp_path / "rejects.ndjson", bytes_max=10)
    before = outbox.spool.bytes
    for _ in range(3):
        outbox.cut_large()
    assert outbox.spool.bytes == before and outbox.unacked == 2 and len(list(tmp_path.rglob("*.seg"))) == 1
    _killed(outbox)


def test_a_short_write_of_rejects_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rejects, write = Rejects(tmp_path / "rejects.ndjson"), os.write
    rejects.add("t", [_entry(1)], "why")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: write(fd, data[: len(data) - 5]))
        for _ in range(3):
            with pytest.raises(Overloaded, match="short write"):
                rejects.add("t", [_entry(2), _entry(3)], "why")
    rejects.add("t", [_entry(2), _entry(3)], "why")
    sizes = [len(json.loads(line)["record"]["text"]) for line in rejects.path.read_text().splitlines()]
    assert sizes == [1, 2, 3] and rejects.count == 3
