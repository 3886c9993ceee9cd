"""What serving gave one candidate, as a token: the client logs it in the impression's field `served`.

A token is URL-safe base64, without padding, of

| bytes | what |
|---|---|
| 1 | the format, 1 |
| 4 | which key seals it: `TokenKey.number`, the lowest byte first, as all numbers here |
| ... | sections: kind (1 byte), size of the content (varint), content |
| 8 | the seal: SipHash-2-4 of all bytes before it, under the key |

| kind | section | content |
|---|---|---|
| 1 | version | that of the model, UTF-8 |
| 2 | score of a task | id of the task (4 bytes), float32 |
| 3 | propensity | float32: with which probability it was shown here; absent where nothing was drawn by chance |
| 4 | arm | which model of several answered, UTF-8; absent of the only one |
| 5 | counter | id of the counter (4 bytes), then its values |
| 6 | crawled entity | id of the source (4 bytes), then its columns as a msgpack array |

A counter's value is a varint 2 * value + 2 where it is a whole number from 0 to 2**30, else a byte 1 and a float32. An
id is made of what a reader must agree on: a task's name; a counter's name and entries; a source's name, columns and
types. Growth: a reader skips kinds and ids that it does not know, and a counter without a section is not known; what
has another format byte it refuses. Varints are LEB128. `headrace/kernels/served_tokens.py` writes and opens tokens.

The key is derived from the project's secret where there is one; then nobody makes a token who has it not. Without a
secret the seal shows damage alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from headrace.contract.crawl import Crawl
from headrace.contract.hashing import hash_text
from headrace.contract.spec import Counter

SERVED = "served"
"""The field of an impression that holds the token, or an object with the open columns."""
FORMAT, FORMATS_MAX = 1, 32
"""Bytes from the second one on begin no token of any release."""
VERSION, SCORE, PROPENSITY, ARM, COUNTER, ENTITY = range(1, 7)
"""Kinds of sections."""
SEAL_BYTES, HEAD_BYTES = 8, 5
WHOLE_MAX = 2**30
"""Largest whole number that is written as such."""
UNREADABLE, WRONG_KEY, TOO_NEW = "served_unreadable", "served_key", "served_format"
REFUSALS = {
    UNREADABLE: "`served` is no token of ours, or it was damaged on its way: log it as /v1/rank returned it, whole.",
    WRONG_KEY: (
        "`served` was sealed under another key: give serving and gateways one HEADRACE_PRIVACY_KEY, then offer the "
        "letters again."
    ),
    TOO_NEW: "`served` is of a later release: update `ingest` before `serve`, then offer the letters again.",
}
"""Reasons for which an impression's token is refused, and the next step."""


class TokenKey(NamedTuple):
    """What seals tokens."""

    number: int
    """Tells keys apart, 32 bits."""
    low: int
    high: int
    """The halves of the key of SipHash."""


def token_key(secret: str) -> TokenKey:
    """Return the key of a project's secret; of "" the one that everybody knows.

    >>> token_key("").number == token_key("a secret of 16 bytes").number
    False
    """
    key = secret.encode()[:64]
    made = hashlib.blake2b(b"served", digest_size=20, key=key, person=b"headrace-served").digest()
    return TokenKey(*(int.from_bytes(made[a:b], "little") for a, b in ((16, 20), (0, 8), (8, 16))))


class TokenLayout(NamedTuple):
    """What the tokens of one specification hold, or what a reader takes out of them."""

    tasks: tuple[str, ...]
    counters: tuple[Counter, ...]
    crawls: tuple[Crawl, ...]
    task_ids_T: npt.NDArray[np.uint32]
    counter_ids_K: npt.NDArray[np.uint32]
    ends_K: npt.NDArray[np.int64]
    """Behind which column each counter ends; counters follow each other."""
    crawl_ids_X: npt.NDArray[np.uint32]

    def counter_columns(self) -> list[str]:
        """Return the columns of all counters, in order."""
        return [name for counter in self.counters for name in counter.columns()]


def token_layout(tasks: Sequence[str], counters: Sequence[Counter], crawls: Sequence[Crawl]) -> TokenLayout:
    """Return the layout of these tasks, counters and sources, in order."""
    return TokenLayout(
        tuple(tasks),
        tuple(counters),
        tuple(crawls),
        _ids([["task", name] for name in tasks]),
        _ids([["counter", counter.name, *counter.counts] for counter in counters]),
        np.cumsum([len(counter.counts) for counter in counters], dtype=np.int64),
        _ids([["source", crawl.name, *crawl.columns().items()] for crawl in crawls]),
    )


def _ids(named: Sequence[Sequence[object]]) -> npt.NDArray[np.uint32]:
    return np.array([hash_text(msgspec.json.encode(one)) & 0xFFFF_FFFF for one in named], np.uint32)


def token_head(key: TokenKey, version: str, *, propensity: float | None = None, arm: str = "") -> bytes:
    """Return what the tokens of one answer begin with. `propensity` is the same of all of them."""
    head = bytes([FORMAT]) + key.number.to_bytes(4, "little") + _section(VERSION, version.encode())
    if propensity is not None:
        head += _section(PROPENSITY, np.float32(propensity).tobytes())
    return head + (_section(ARM, arm.encode()) if arm else b"")


def _section(kind: int, content: bytes) -> bytes:
    size, varint = len(content), b""
    while size >= 128:
        varint += bytes([size & 127 | 128])
        size >>= 7
    return bytes([kind]) + varint + bytes([size]) + content
