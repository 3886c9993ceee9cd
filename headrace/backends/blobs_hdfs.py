"""Blobs on HDFS over WebHDFS, through the `hdfs` library: no Java and no libhdfs in the stages.

A write is: 1. a new file below `.unfinished/`, closed, 2. one rename with OVERWRITE, which the NameNode does in one
transaction. Plain WebHDFS rename never replaces, and delete + rename would leave a moment without the object.
A reply that is lost makes the whole write repeat with a new temporary name, which changes nothing.
"""

from __future__ import annotations

import contextlib
import getpass
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from posixpath import dirname
from typing import TypeVar
from urllib.parse import quote

import requests
from hdfs import HdfsError, InsecureClient
from urllib3.exceptions import HTTPError

from headrace.backends.blobs_file import UNFINISHED, checked_name, cut_pieces, read_in_pieces
from headrace.contract.errors import Unavailable
from headrace.contract.interfaces.blobs import Pieces
from headrace.process.awake import awake_s
from headrace.process.moved import moved

log = logging.getLogger("headrace.hdfs")

T = TypeVar("T")
Names = list[str]

_ABSENT = ("FileNotFoundException", "NoSuchFileException")
_REFUSED = ("AccessControlException", "QuotaExceededException", "SecurityException")


PATIENCE_S = 45.0
"""How long a NameNode that is away or in safe mode is asked again."""


SENT_BYTES = 1024 * 1024
"""What is sent at once: 0.1 s at 10 MB/s, so that a slow store is told from one that hangs."""


def _sent(data: bytes | Pieces) -> Iterator[bytes]:
    """Yield what is sent, piece after piece."""
    for piece in cut_pieces(data, SENT_BYTES):
        yield bytes(piece)
        moved()


class HdfsBlobs:
    """Named byte strings below `root` (an absolute HDFS path). Each thread has a connection of its own.

    Every call tries again with 0.1 to 2 s between for at most `patience_s`, then raises `Unavailable`: a NameNode
    that was killed is back in 5 to 20 s, so the default of 45 s is twice that.
    """

    def __init__(
        self,
        webhdfs: str,
        root: str,
        *,
        user: str | None = None,
        patience_s: float = PATIENCE_S,
        timeout_s: float = 10.0,
    ) -> None:
        self.root = "/" + root.strip("/")
        self._url = webhdfs.rstrip("/")
        self._user = user or os.environ.get("HADOOP_USER_NAME") or getpass.getuser()
        self._here = threading.local()
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        self._folders: set[str] = set()
        self._away = False
        self._swept = False

    @property
    def _client(self) -> InsecureClient:
        if not hasattr(self._here, "client"):
            session = requests.Session()
            # Loopback and cluster addresses are never behind the proxy that the user's package index needs.
            session.trust_env = False
            self._here.session = session
            self._here.client = InsecureClient(self._url, user=self._user, session=session, timeout=self._timeout_s)
        client: InsecureClient = self._here.client
        return client

    def put(self, name: str, data: bytes | Pieces) -> None:
        """Store `data` under `name`, atomically: a reader sees the old object or the new one."""
        target = f"{self.root}/{checked_name(name)}"
        self._retried(f"write to {target}", lambda: self._put(target, data))

    def get(self, name: str) -> bytes | None:
        """Return the object, or None where there is none."""
        target = f"{self.root}/{checked_name(name)}"
        return self._retried(f"read of {target}", lambda: self._get(target))

    def list(self, prefix: str) -> list[str]:
        """Return the full names of the objects directly in folder `prefix` ("" is the root), sorted."""
        folder = f"{self.root}/{checked_name(prefix.rstrip('/'))}" if prefix else self.root
        lead = f"{prefix.rstrip('/')}/" if prefix else ""
        return self._retried(f"list of {folder}", lambda: self._list(folder, lead))

    def delete(self, name: str) -> None:
        """Remove the object; nothing happens where there is none."""
        target = f"{self.root}/{checked_name(name)}"
        self._retried(f"delete of {target}", lambda: self._client.delete(target))

    def _put(self, target: str, data: bytes | Pieces) -> None:
        part, client = f"{self.root}/{UNFINISHED}/{uuid.uuid4().hex}", self._client
        self._sweep()
        folder = dirname(target)
        if folder not in self._folders:
            self._client.makedirs(folder)
            self._folders.add(folder)
        try:
            client.write(part, data=_sent(data), overwrite=True)
            self._rename_over(part, target)
        except HdfsError:
            # The folder may have been removed by somebody else since; make it again on the next try.
            self._folders.discard(folder)
            with contextlib.suppress(HdfsError, requests.RequestException):
                self._client.delete(part)
            raise

    def _rename_over(self, source: str, target: str) -> None:
        session: requests.Session = self._here.session
        reply = session.put(
            f"{self._url}/webhdfs/v1{quote(source)}",
            params={"op": "RENAME", "destination": target, "renameoptions": "OVERWRITE", "user.name": self._user},
            timeout=self._timeout_s,
        )
        if reply.status_code != 200 or b"false" in reply.content:
            raise HdfsError(f"rename to {target} answered {reply.status_code}: {reply.text[:500]}")

    def _get(self, target: str) -> bytes | None:
        status = self._client.status(target, strict=False)
        if status is None or status["type"] != "FILE":
            return None
        with self._client.read(target) as stream:
            data = read_in_pieces(stream.read)
        after = self._client.status(target, strict=False)
        if after is not None and after["length"] != len(data):
            # Cut short by a DataNode that died, or replaced while it was read: read it again.
            raise HdfsError(f"{target}: {len(data)} bytes were read and HDFS says {after['length']}.")
        return data

    def _list(self, folder: str, lead: str) -> Names:
        status = self._client.status(folder, strict=False)
        if status is None or status["type"] != "DIRECTORY":
            return []
        entries = self._client.list(folder, status=True)
        return sorted(lead + n for n, s in entries if s["type"] == "FILE" and not n.startswith("."))

    def _sweep(self) -> None:
        """Remove leftovers of crashed writes, an hour old, once a process."""
        if self._swept:
            return
        folder = f"{self.root}/{UNFINISHED}"
        if self._client.status(folder, strict=False) is not None:
            for name, status in self._client.list(folder, status=True):
                if status["modificationTime"] < (time.time() - 3_600) * 1_000:
                    self._client.delete(f"{folder}/{name}")
        self._swept = True

    def _retried(self, what: str, call: Callable[[], T]) -> T:
        deadline, pause = awake_s() + self._patience_s, 0.1
        while True:
            try:
                result = call()
            except (HdfsError, requests.RequestException, HTTPError, OSError) as error:
                kind = getattr(error, "exception", None) or ""
                if kind in _ABSENT:
                    # The object went between two of our own requests: the next try sees it gone.
                    pause = min(pause, 0.1)
                first = str(error).strip().splitlines()[:1]
                if kind in _REFUSED:
                    raise Unavailable(f"HDFS refuses the {what}: {first}") from error
                if awake_s() + pause > deadline:
                    raise Unavailable(
                        f"HDFS at {self._url} did not do the {what} in {self._patience_s} s: {first}. "
                        "`headrace doctor` says whether it is down or in safe mode."
                    ) from error
                if not self._away:
                    log.warning("HDFS does not answer (%s: %s); trying again", what, first)
                    self._away = True
                time.sleep(pause)
                pause = min(2.0, pause * 1.7)
            else:
                if self._away:
                    log.info("HDFS answers again")
                    self._away = False
                return result
