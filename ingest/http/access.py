"""Who may send to the collector: tokens and browser origins. Pure; a token never reaches a message or a log."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Iterable

from headrace.contract.errors import ConfigRejected

TOKEN_CHARS_MIN = 8


def read_tokens(text: str) -> tuple[str, ...]:
    """Return the tokens of HEADRACE_TOKENS, separated by commas or blanks. Raises `ConfigRejected`, never with a token.

    >>> read_tokens("first-token, second-token")
    ('first-token', 'second-token')
    """
    tokens = tuple(token for token in re.split(r"[\s,]+", text) if token)
    for number, token in enumerate(tokens, 1):
        if len(token) < TOKEN_CHARS_MIN or not token.isascii() or not token.isprintable():
            raise ConfigRejected(
                f"HEADRACE_TOKENS: entry {number} has {len(token)} characters; a token has {TOKEN_CHARS_MIN} ASCII "
                "characters or more. Make one with: openssl rand -hex 16"
            )
    return tokens


class Tokens:
    """The tokens that are accepted; without any, no client is asked for one."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self._digests = [_digest(token) for token in tokens]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accepts(self, header: str, query: str) -> bool:
        """Say whether a request's `Authorization` header or `token` parameter brings one of them, in constant time."""
        scheme, _, told = header.strip().partition(" ")
        offered = _digest(told.strip() if scheme.lower() == "bearer" else query)
        # Every one is compared, so that the time it takes does not show which one fits.
        return sum(hmac.compare_digest(offered, known) for known in self._digests) > 0


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


class Origins:
    """`ingest.cors_origins`: exact origins, or patterns in which `*` stands for a part of the host or the port."""

    def __init__(self, patterns: Iterable[str]) -> None:
        patterns = tuple(patterns)
        self._any = "*" in patterns
        whole = "|".join(re.escape(pattern.rstrip("/").lower()).replace(r"\*", "[a-z0-9.-]*") for pattern in patterns)
        self._pattern = re.compile(whole or r"(?!)")

    def accepts(self, origin: str, scheme: str, host: str) -> bool:
        """Say whether a page of `origin` may send; one that this collector served itself always may."""
        origin = origin.lower()
        return self._any or origin == f"{scheme}://{host}".lower() or self._pattern.fullmatch(origin) is not None


def is_loopback(host: str) -> bool:
    """Say whether nobody outside this machine reaches `host`.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
