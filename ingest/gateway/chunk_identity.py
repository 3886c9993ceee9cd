"""What names a chunk: its id, its content, where it comes from. Pure.

Chunk ids that are hashes of their content, as fluent-bit's are, are told by computing them.

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
from typing import Any, Literal

import msgspec

from headrace.ingest.decode.message import Message, chunk_text
from headrace.ingest.gateway.repeats import Occurrences, digest

_CHARS, _BYTES = 24, 16


class Peer(msgspec.Struct, frozen=True):
    """One connection as the gateway sees it."""

    origin: str
    """The sender's address without its port, which changes with every connection."""
    occurrences: Occurrences = msgspec.field(default_factory=Occurrences)


def peer_of(address: Any) -> Peer:
    """Return the peer of a socket's remote address."""
    return Peer(str(address[0]) if isinstance(address, tuple) and address else "local")


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


def identify(message: Message, chunk: str | bytes, peer: Peer) -> tuple[bytes, str]:
    """Return the key in memory of a message with this id of a chunk, and the prefix of ids for events without one."""
    name = f"{chunk_text(message.tag)}/{chunk_text(chunk)}"
    # A hash is one of the payload without the tag, so the tag belongs to the identity.
    kind = "hash" if message.per_origin else kind_of(chunk, message.body)
    nth = 0 if kind == "unique" else peer.occurrences.next(digest(message.tag, chunk))
    if kind == "hash":
        return digest(peer.origin, message.tag, chunk, str(nth)), f"{peer.origin}/{name}/{nth}"
    # The id decides, wherever it comes from. The content is in it for clients that only count: 1, 2, 3.
    content = digest(message.body, message.raw)
    return digest(message.tag, chunk, content, str(nth)), f"{name}/{content.hex()}/{nth}"
