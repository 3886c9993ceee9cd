"""Where a gateway listens for Fluent forward, what it is called, and the secrets that it asks for. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from headrace.contract.errors import ConfigRejected


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """One gateway's forward addresses, name and keys."""

    host: str = "127.0.0.1"
    port: int = 24224
    """TCP for Fluent forward, and UDP of the same number for fluentd's heartbeat."""
    name: str = "gateway"
    """Stable over restarts: a newer epoch of the same name replaces the older in the watermark."""
    shared_key: str = ""
    """With one, each connection begins with Fluent's handshake; a secret, so it comes from the environment."""
    users: Mapping[str, str] = {}
    """Passwords by name. With any, the handshake asks for both; needs the shared key."""
    share_port: bool = False
    """Several gateway processes on one port (SO_REUSEPORT); each needs a name of its own."""
    socket_path: str = ""
    """Also a Unix socket, as Docker's log driver uses. Plain, without handshake: the file's mode, 0660, is its key."""

    def __repr__(self) -> str:
        """Say everything but the secrets."""
        asks = [word for word, told in (("shared key", self.shared_key), ("users", self.users)) if told]
        unix = f", socket {self.socket_path}" if self.socket_path else ""
        return f"Endpoint({self.name} on {self.host}:{self.port}{unix}, asks for {' and '.join(asks) or 'nothing'})"

    def checked(self) -> Endpoint:
        """Return itself. Raises `ConfigRejected` where users are named that no handshake would ask for."""
        if self.users and not self.shared_key:
            raise ConfigRejected(
                f"{len(self.users)} users but no shared key: Fluent's handshake begins with the key. "
                "Set HEADRACE_SHARED_KEY beside HEADRACE_USERS."
            )
        return self


def read_users(text: str) -> dict[str, str]:
    """Return passwords by name from `name:password` entries, one a line or separated by commas.

    A text with line breaks is cut at those only, so passwords may hold commas there. Raises `ConfigRejected` with the
    entry's number, never with its content.

    >>> read_users("web:s3:cret,app:other")
    {'web': 's3:cret', 'app': 'other'}
    """
    users: dict[str, str] = {}
    entries = re.split(r"\r?\n" if "\n" in text else ",", text)
    for number, entry in enumerate(entries, 1):
        if not entry.strip():
            continue
        name, colon, password = entry.strip().partition(":")
        if not (name and colon and password):
            raise ConfigRejected(f"HEADRACE_USERS: entry {number} is no name:password.")
        if name in users:
            raise ConfigRejected(f"HEADRACE_USERS: entry {number} names a user a second time.")
        users[name] = password
    return users
