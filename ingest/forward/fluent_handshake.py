"""The shared-key and user handshake of Fluent forward, server side. Pure: nonce and salt come in as bytes.

1. The server sends HELO with a nonce (and a salt, where it wants a user).
2. The client answers PING: its host name, a salt, SHA-512 of (salt, host name, nonce, key), and the user's digest.
3. The server sends PONG: taken or not, and SHA-512 of (salt, its own name, nonce, key), which proves it to the client.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from typing import Any

import msgpack

from headrace.ingest.forward.protocol import Refused


class Handshake:
    """One connection's handshake. Keys and passwords never reach a message or a log."""

    def __init__(
        self,
        shared_key: str,
        server_name: str,
        nonce: bytes,
        *,
        users: Mapping[str, str] | None = None,
        salt: bytes = b"",
    ) -> None:
        self._key, self._server_name, self._nonce = shared_key.encode(), server_name, nonce
        self._users, self._salt = users, salt if users else b""

    def helo(self) -> bytes:
        """Return HELO, to be written in one piece."""
        option = {"nonce": self._nonce, "auth": self._salt, "keepalive": True}
        return bytes(msgpack.packb(["HELO", option], use_bin_type=True))

    def answer(self, ping: Any) -> tuple[bytes, str]:
        """Return PONG and "" where the client is taken, or PONG with the refusal and its reason.

        Raises `Refused` on what is no PING.
        """
        if not isinstance(ping, list) or len(ping) != 6 or ping[0] != "PING":
            raise Refused("no_ping", "a client must answer HELO with PING; does it know the shared key?")
        host, salt, digest, user, password = (_bytes(value) for value in ping[1:])
        if not hmac.compare_digest(_sha512(salt, host, self._nonce, self._key), digest):
            return self._pong(False, "shared_key mismatch", salt), "shared_key"
        if self._users is not None:
            known = self._users.get(user.decode("utf-8", "replace"))
            # Compared even for an unknown user, so that the time it takes does not show who exists.
            expected = _sha512(self._salt, user, (known or "").encode())
            if not hmac.compare_digest(expected, password) or known is None:
                return self._pong(False, "username/password mismatch", salt), "password"
        return self._pong(True, "", salt), ""

    def _pong(self, taken: bool, why: str, salt: bytes) -> bytes:
        proof = _sha512(salt, self._server_name.encode(), self._nonce, self._key).decode() if taken else ""
        return bytes(msgpack.packb(["PONG", taken, why, self._server_name if taken else "", proof]))


def _bytes(value: Any) -> bytes:
    # fluent-bit's salt is 16 raw bytes in a `str`.
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape")
    if isinstance(value, bytes):
        return value
    raise Refused("no_ping", f"PING holds strings, not {type(value).__name__}.")


def _sha512(*parts: bytes) -> bytes:
    return hashlib.sha512(b"".join(parts)).hexdigest().encode()
