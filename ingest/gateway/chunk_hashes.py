"""Chunk ids that are hashes of their content, as fluent-bit's are: told by computing them. Pure.

fluent-bit's id is the base64 of the first 16 bytes of SHA-512 over the entries. Two genuine chunks of equal content
have the same one, so it does not name a chunk.

| kind | id | who | what names the chunk |
|---|---|---|---|
| `hash` | the hash of its entries | fluent-bit | the sender's address, the id, how often it came on the connection |
| `unknown` | base64 of 16 other bytes | `headrace.sender`, Node | the id, how often it came on the connection |
| `unique` | any other | fluentd (it ends in a newline), a Kafka source | the id |

Where fluent-bit writes entries otherwise than it hashed them (times as integers, one message a record) its ids are of
the second kind.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from typing import Literal

_CHARS, _BYTES = 24, 16


def kind_of(chunk: str | bytes, body: bytes) -> Literal["hash", "unknown", "unique"]:
    """Say what a chunk's id is, by itself and the chunk's entries.

    >>> [kind_of(chunk, b"entries") for chunk in ("PfKBU1CChpDMZxT6CKFOug==", "AAAAAAAAAAAAAAAAAAAAAA==", "chunk-A")]
    ['hash', 'unknown', 'unique']
    """
    if len(chunk) != _CHARS:
        return "unique"
    try:
        told = base64.b64decode(chunk, validate=True)
    except (binascii.Error, ValueError):
        return "unique"
    if len(told) != _BYTES:
        return "unique"
    return "hash" if told == hashlib.sha512(body).digest()[:_BYTES] else "unknown"
