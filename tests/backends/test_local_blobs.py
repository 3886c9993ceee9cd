"""One suite for every blob store: files and real HDFS behave alike."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from headrace.backends.blobs_file import UNFINISHED, FileBlobs
from headrace.backends.blobs_hdfs import HdfsBlobs
from headrace.contract.errors import InvariantBroken, Unavailable
from headrace.contract.interfaces.blobs import Blobs
from headrace.deploy.local.layout import Layout
from headrace.deploy.local.servers.cephfs import CephFs


@pytest.fixture(
    params=["file", pytest.param("hdfs", marks=pytest.mark.real), pytest.param("cephfs", marks=pytest.mark.real)]
)
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    """Each store in turn, empty."""
    if request.param == "file":
        return FileBlobs(tmp_path / "blobs")
    if request.param == "cephfs":
        cluster: CephFs = request.getfixturevalue("cephfs")
        return FileBlobs(cluster.mount / tmp_path.name / "blobs")
    layout: Layout = request.getfixturevalue("stack")
    assert layout.webhdfs
    return HdfsBlobs(layout.webhdfs, f"/test/{tmp_path.name}")


def test_what_is_put_comes_back(blobs: Blobs) -> None:
    data = bytes(range(256)) * 5_000
    blobs.put("state/stream/0/100.arrow", data)
    assert blobs.get("state/stream/0/100.arrow") == data
    blobs.put("empty", b"")
    assert blobs.get("empty") == b""


def test_a_put_replaces(blobs: Blobs) -> None:
    for text in (b"one", b"the second, longer", b"3"):
        blobs.put("folder/name", text)
        assert blobs.get("folder/name") == text
    assert blobs.list("folder") == ["folder/name"]


class Counted:
    """Pieces that are made when they are asked for, and count how often."""

    def __init__(self, pieces: int) -> None:
        self.pieces, self.rounds = pieces, 0

    def __iter__(self) -> Iterator[memoryview]:
        self.rounds += 1
        for number in range(self.pieces):
            yield memoryview(np.full(400_000 + number, number, np.int16))


def test_an_object_is_put_in_pieces(blobs: Blobs) -> None:
    pieces = Counted(9)
    blobs.put("in/pieces", pieces)
    assert pieces.rounds == 1
    assert blobs.get("in/pieces") == b"".join(Counted(9))
    blobs.put("in/pieces", [b"", b"one", memoryview(b" two"), b""])
    assert blobs.get("in/pieces") == b"one two"
    blobs.put("in/pieces", [])
    assert blobs.get("in/pieces") == b""
    assert blobs.list("in") == ["in/pieces"]


def test_pieces_that_end_early_leave_the_old_object(blobs: Blobs) -> None:
    class Broken:
        def __iter__(self) -> Iterator[bytes]:
            yield b"half of the new"
            raise MemoryError("the other half is not to be had")

    blobs.put("name", b"old")
    with pytest.raises(MemoryError):
        blobs.put("name", Broken())
    assert blobs.get("name") == b"old"
    assert blobs.list("") == ["name"]


def test_several_threads_put_and_get(blobs: Blobs) -> None:
    """A snapshot and a checkpoint are written side by side."""
    found: dict[int, list[bytes | None]] = {number: [] for number in range(4)}

    def work(number: int) -> None:
        for turn in range(4):
            blobs.put(f"side/{number}", [bytes([number]) * 50_000, bytes([turn])])
            found[number].append(blobs.get(f"side/{number}"))

    threads = [threading.Thread(target=work, args=(number,)) for number in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: [bytes([n]) * 50_000 + bytes([turn]) for turn in range(4)] for n in found}


def test_what_is_not_there_is_none(blobs: Blobs) -> None:
    assert blobs.get("nothing/here") is None
    blobs.delete("nothing/here")
    assert blobs.list("nothing") == []
    blobs.put("gone", b"x")
    blobs.delete("gone")
    assert blobs.get("gone") is None


def test_list_gives_full_names_of_objects_only(blobs: Blobs) -> None:
    for name in ("a/2", "a/1", "a/deeper/3", "b"):
        blobs.put(name, b"x")
    assert blobs.list("a") == ["a/1", "a/2"]
    assert blobs.list("a/") == ["a/1", "a/2"]
    assert blobs.list("") == ["b"]
    assert blobs.get("a/deeper") is None


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../up", "a//b", ".hidden", "a/.b", "a/"])
def test_names_that_could_leave_the_root_are_refused(blobs: Blobs, name: str) -> None:
    with pytest.raises(InvariantBroken):
        blobs.put(name, b"x")


def test_a_reader_sees_the_old_object_or_the_new_one(blobs: Blobs) -> None:
    versions = [bytes([n]) * 50_000 for n in range(12)]
    blobs.put("hot", versions[0])
    twin = HdfsBlobs(blobs._url, blobs.root) if isinstance(blobs, HdfsBlobs) else blobs
    stop, seen = threading.Event(), list[bytes | None]()

    def look() -> None:
        while not stop.is_set():
            seen.append(twin.get("hot"))

    thread = threading.Thread(target=look)
    thread.start()
    for data in versions[1:]:
        blobs.put("hot", data)
    stop.set()
    thread.join()
    assert seen and all(data in versions for data in seen)


def test_a_crash_while_writing_leaves_the_old_object(tmp_path: Path) -> None:
    blobs = FileBlobs(tmp_path)
    blobs.put("name", b"old")
    (tmp_path / UNFINISHED / "leftover").write_bytes(b"half of the ne")
    again = FileBlobs(tmp_path)
    assert again.get("name") == b"old"
    assert again.list("") == ["name"]


def test_a_store_that_stays_away_is_unavailable() -> None:
    blobs = HdfsBlobs("http://127.0.0.1:9", "/x", patience_s=0.3)
    with pytest.raises(Unavailable, match="headrace doctor"):
        blobs.get("name")
