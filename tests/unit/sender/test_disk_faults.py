"""Goal: a disk that fails in the middle costs no event that `emit` took, is never believed after a failed sync, and is
named with its path and the remedy. Method: the real files, with the kernel's calls failing as a bad disk's do."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
from acking_gateway import AckingGateway

from headrace.contract.errors import Overloaded, Unavailable
from headrace.sender import Sender
from headrace.sender.outbox import Outbox
from headrace.sender.segment import Segment

EVENT = b"\x92\xd7\x00" + bytes(8) + msgpack.packb({"a": 1})


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def _failing(call: Callable[..., Any], number: int, when: Callable[..., bool]) -> Callable[..., Any]:
    def failing(*args: Any, **more: Any) -> Any:
        if when(*args):
            raise _error(number)
        return call(*args, **more)

    return failing


def _open(folder: Path, *, fsync: bool = True) -> Outbox:
    return Outbox(folder, window=3, bytes_max=1 << 20, chunk_bytes=1 << 19, message_max=1 << 20, fsync=fsync)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_what_a_sync_failed_to_write_is_written_anew_before_it_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """After a failed sync Linux calls the pages clean: the next sync of the same file succeeds, and proves nothing."""
    failed: list[int] = []
    synced: set[int] = set()
    real = os.fdatasync

    def fdatasync(fd: int) -> None:
        inode = os.fstat(fd).st_ino
        if not failed and os.readlink(f"/proc/self/fd/{fd}").endswith(".seg"):
            failed.append(inode)
            raise _error(number)
        real(fd)
        synced.add(inode)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    with (
        AckingGateway() as gateway,
        Sender("", port=gateway.port, spool_dir=tmp_path, fsync=True) as sender,
    ):
        for at in range(10):
            sender.emit("a", {"event_id": str(at)})
        assert sender.flush(30)
        assert gateway.got == {("a", str(at)): 1 for at in range(10)}
    assert failed and synced and failed[0] not in synced


def test_an_unsound_file_stays_until_all_of_it_lies_elsewhere_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = _open(tmp_path)
    outbox.add("a", EVENT, 0.0)
    outbox.close_chunks(10.0, 0.0, away=False)
    outbox.add("a", EVENT, 10.0)
    (old,) = tmp_path.rglob("*.seg")
    real = os.fdatasync
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", _failing(real, errno.EIO, lambda _fd: True))
        with pytest.raises(OSError, match="Input/output"):
            outbox.spool.sync(outbox.spool.duplicates({lane.segment for lane in outbox.lanes if lane.segment}))
        assert not outbox.spool.is_sound
        with pytest.raises(Overloaded, match="have another one"):
            outbox.keep_on_disk()
    assert old.exists(), "what takes its place is not on the disk"
    outbox.keep_on_disk()
    assert outbox.spool.is_sound and not old.exists() and outbox.unacked == 2
    outbox.add("a", EVENT, 11.0)
    outbox.spool.forsake()
    again = _open(tmp_path)
    assert again.unacked == 3


def test_a_read_only_disk_ends_no_connection_and_what_is_done_with_goes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    outbox = _open(tmp_path, fsync=False)
    for tag in "abc":
        outbox.add(tag, EVENT, 0.0)
    outbox.close_chunks(10.0, 0.0, away=False)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", _failing(os.write, errno.EROFS, lambda *_: True))
        patch.setattr(Path, "unlink", _failing(Path.unlink, errno.EROFS, lambda *_: True))
        with pytest.raises(Overloaded, match="mount it for writing"):
            outbox.add("a", EVENT, 11.0)
        while (chunk := outbox.lanes.take(12.0)) is not None:
            outbox.lanes.of(chunk.tag).segment = None  # As after a restart: nothing is appended to it any more.
            outbox.acked(chunk.id)
        assert outbox.unacked == 0 and len(list(tmp_path.rglob("*.seg"))) == 3
        outbox.keep_on_disk()
    assert caplog.text.count("cannot be deleted") == 3 and "read-only" in caplog.text
    outbox.keep_on_disk()
    assert not list(tmp_path.rglob("*.seg"))


def test_nothing_is_appended_behind_a_torn_record_that_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outbox = _open(tmp_path, fsync=False)
    outbox.add("a", EVENT, 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", _failing(os.ftruncate, errno.EIO, lambda *_: True))
        real = os.write
        patch.setattr(os, "write", lambda fd, data: real(fd, data[:5]))
        with pytest.raises(Overloaded, match="short write"):
            outbox.add("a", EVENT, 1.0)
    with pytest.raises(Overloaded, match="an earlier write to it failed"):
        outbox.add("a", EVENT, 2.0)
    outbox.keep_on_disk()
    outbox.add("a", EVENT, 3.0)
    outbox.spool.forsake()
    assert _open(tmp_path).unacked == 2


def test_a_file_whose_close_fails_refuses_no_event_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segment = Segment(tmp_path / "1.seg")
    segment.append(1, b"x")

    def close(fd: int) -> None:
        real(fd)
        raise _error(errno.EIO)

    real = os.close
    with monkeypatch.context() as patch:
        patch.setattr(os, "close", close)
        segment.close(sync=True)
    assert not segment.is_sound


def test_a_sender_on_a_read_only_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", _failing(os.open, errno.EROFS, lambda path, *_: str(path).endswith("lock")))
    with pytest.raises(Unavailable, match="mounted read-only") as caught:
        Sender("", spool_dir=tmp_path / "spool")
    assert str(tmp_path / "spool") in str(caught.value)
