"""Blobs on HDFS over WebHDFS, by the `hdfs` library.

HDFS's rename never replaces. So an object is written aside, and renamed to its name; where that name is taken, the old
object is first renamed to `<name>.old`, which a reader takes when the name itself is missing. A crash between the two
renames therefore leaves the old object readable, and the next `put` clears it.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from typing import TypeVar

import requests
from hdfs import HdfsError, InsecureClient

from headrace.contract.errors import Unavailable

logger = logging.getLogger(__name__)

_UNFINISHED = ".unfinished-"
_OLD = ".old"
T = TypeVar("T")


class HdfsBlobs:
    """Blobs below `root` of the file system whose NameNode's HTTP address is `webhdfs`."""

    def __init__(self, webhdfs: str, root: str, *, user: str = "headrace", attempts: int = 4) -> None:
        session = requests.Session()
        session.trust_env = False  # A proxy for the internet is none for the cluster.
        self._client = InsecureClient(webhdfs, user=user, session=session, timeout=20)
        self._root = root.rstrip("/")
        self._attempts = attempts
        self._where = webhdfs

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _retry(self, what: str, call: Callable[[], T]) -> T:
        """Run `call`, up to `attempts` times with 0.2, 0.4, 0.8 s between."""
        for attempt in range(self._attempts):
            try:
                return call()
            except (HdfsError, requests.RequestException) as error:
                if attempt + 1 == self._attempts:
                    raise Unavailable(f"HDFS at {self._where}: {what} failed {attempt + 1} times: {error}.") from error
                time.sleep(0.2 * 2**attempt)
        raise Unavailable(f"HDFS at {self._where}: {what} was never tried.")

    def put(self, name: str, data: bytes) -> None:
        """Store atomically; see the module."""
        self._retry(f"writing {name}", lambda: self._put(name, data))

    def _put(self, name: str, data: bytes) -> None:
        path = self._path(name)
        folder = path.rsplit("/", 1)[0]
        aside = f"{folder}/{_UNFINISHED}{uuid.uuid4().hex}"
        self._client.write(aside, data=data, overwrite=True)
        if self._client.status(path, strict=False) is not None:
            self._client.delete(path + _OLD)
            self._client.rename(path, path + _OLD)
        self._client.rename(aside, path)
        self._client.delete(path + _OLD)

    def get(self, name: str) -> bytes | None:
        """Return the object, or None."""
        return self._retry(f"reading {name}", lambda: self._get(name))

    def _get(self, name: str) -> bytes | None:
        for path in (self._path(name), self._path(name) + _OLD, self._path(name)):
            if self._client.status(path, strict=False) is not None:
                with self._client.read(path) as reader:
                    return bytes(reader.read())
        return None

    def list(self, prefix: str) -> list[str]:
        """Return the names directly in folder `prefix`, sorted."""
        return self._retry(f"listing {prefix}", lambda: self._list(prefix))

    def _list(self, prefix: str) -> list[str]:
        folder = self._path(prefix.rstrip("/"))
        if self._client.status(folder, strict=False) is None:
            return []
        names = {
            entry.removesuffix(_OLD)
            for entry, status in self._client.list(folder, status=True)
            if status["type"] == "FILE" and not entry.startswith(_UNFINISHED)
        }
        return sorted(f"{prefix.rstrip('/')}/{entry}" for entry in names)

    def delete(self, name: str) -> None:
        """Remove the object, if it is there."""
        self._retry(f"deleting {name}", lambda: self._client.delete(self._path(name)))
