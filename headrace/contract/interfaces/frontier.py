"""What the crawler needs of its memory: addresses and when they are due, newest versions, and what Kafka lacks.

How nothing is fetched again and no version is lost, in the words that the tests use:

1. *fetch*: an address that is due is asked for, with the validators of its last answer.
2. *settle*: in one transaction its next time, its validators, its new links and its changed versions are noted, these
   in the outbox. A crash before it means that the address is asked for once more, as does a power cut before 3.
3. *send*: the outbox, made safe against power cuts, goes to every partition in the order of its numbers.
4. *receipt*: what every partition has leaves the outbox. A crash between 3 and 4 means that versions are sent again,
   the same ones with the same crawl times, which readers ignore.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import msgspec

GONE = "gone"
"""Version of an entity that its page no longer has."""


class Page(msgspec.Struct, frozen=True):
    """An address of a source, as it was when it was asked for."""

    source: str
    url: str
    host: str
    sitemap: bool
    depth: int
    """Links from a start to it."""
    etag: str
    last_modified: str
    failures: int
    """How often in a row it could not be fetched."""
    refused: str = ""
    """Reason, and digest of body and extraction, of a body whose extraction came to no end; empty: its last one did."""
    gone: int = 0
    """How often in a row it was no more."""


class Version(msgspec.Struct, frozen=True):
    """One changed entity on its way to Kafka; `values` None: it is gone."""

    number: int
    source: str
    key: str
    crawl_time_ms: int
    version: str
    values: str | None
    url: str


class Found(msgspec.Struct, frozen=True):
    """A link: its address, whether it is a sitemap, and what a sitemap said of its last change."""

    url: str
    sitemap: bool = False
    said_modified: str = ""


class Body(msgspec.Struct, frozen=True):
    """A stored body: its digest names it, `base` is where it came from after redirects."""

    digest: str
    base: str
    content_type: str
    source: str = ""
    url: str = ""
    sitemap: bool = False
    refused: str = ""
    """As `Page.refused`."""


class Settled(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer brought: rows are (key, version, values)."""

    at_ms: int
    due_ms: int
    etag: str = ""
    last_modified: str = ""
    rows: Sequence[tuple[str, str, str]] = ()
    links: Sequence[Found] = ()
    body: Body | None = None
    moved_to: str = ""
    """Where the document lies from now on, by a redirect that is permanent; empty: where it was."""
    refused: str = ""
    """As `Page.refused`, for the next answer."""


class Noted(msgspec.Struct):
    """What became of an answer's rows and links, beside what was noted."""

    written: int = 0
    """Versions that changed."""
    unneeded: list[str] = msgspec.field(default_factory=list)
    """Digests of bodies that nothing needs any more."""
    keys_over: int = 0
    """Entities that are not known, and that the bound on them kept out."""
    links_over: int = 0
    """Links that are not known, and that the bound on addresses kept out."""


class Frontier(Protocol):
    """The memory of one crawler, which outlives it. For one thread but `make_safe`; each call is one transaction."""

    def is_new(self) -> bool:
        """Say whether no crawler has begun with this memory yet: none has taken an epoch."""

    def take_over(self, entities: Iterable[tuple[str, str, int]]) -> None:
        """Note entities of a memory that is lost, as (source, key, crawl time): what comes is newer than these."""

    def next_epoch(self, now_ms: int, above: int = 0) -> int:
        """Return a number above that of every crawler before, of this memory and, by the clock, of others.

        Args:
            above: the highest that is known of others.
        """

    def set_starts(self, source: str, starts: Iterable[Found]) -> None:
        """Add the addresses that a source begins with, and forget those that it no longer begins with."""

    def due(self, now_ms: int, sources: Sequence[str], busy: Sequence[str], limit: int) -> list[Page]:
        """Return up to `limit` addresses that are due, the longest due first, none of a host that is busy or waits."""

    def next_due_ms(self, sources: Sequence[str]) -> int | None:
        """Return when the next address is due, hosts' waits included; None where there is none."""

    def settle(self, page: Page, settled: Settled, *, pages_max: int, keys_max: int, depth_max: int) -> Noted:
        """Note what an answer brought; return what came of it.

        Where a bound kept something out the validators are not kept: with them the next answer would be 304, and what
        was kept out would stay so when there is room.
        What a page that has moved brought is the new address's. The old one is forgotten, unless it is a start, or an
        entity of it is not on the new one: that ends when the old one is gone.
        """

    def not_modified(self, page: Page, due_ms: int) -> None:
        """Note that the document is as it was."""

    def failed(self, page: Page, due_ms: int) -> None:
        """Note that the document could not be fetched."""

    def gone(self, page: Page, at_ms: int, due_ms: int) -> list[str]:
        """Note that a document is no more: its entities end, and its bodies are forgotten.

        The address stays known, so that it is read again when it is back, unless another one needs its room. Return the
        digests of bodies that nothing needs any more.
        """

    def wait_for(self, host: str, not_before_ms: int) -> None:
        """Ask nothing of the host before then, or before what was noted already, if that is later."""

    def pages(self, source: str) -> int:
        """Return how many addresses of a source are known."""

    def outbox(self, after: int, limit: int) -> list[Version]:
        """Return what waits for Kafka behind number `after`, in order."""

    def make_safe(self) -> None:
        """Make all that was noted outlive a power cut; a crash of the process alone takes nothing anyway.

        It may take a busy disk a while, and may be called in another thread than the other methods.
        """

    def sent(self, number: int) -> None:
        """Take out of the outbox what every partition has: all up to `number`."""

    def waiting(self) -> int:
        """Return how many versions wait for Kafka."""

    def has_body(self, digest: str) -> bool:
        """Say whether a body of this digest is stored."""

    def may_be_stored(self, digest: str) -> None:
        """Note that a body is about to be stored: where no page comes to need it, `unneeded` names it."""

    def unneeded(self) -> list[str]:
        """Return the digests of bodies that may be in the store and that no page needs."""

    def deleted(self, digest: str, *, may_return: bool = False) -> None:
        """Note that a body is no longer in the store.

        Args:
            may_return: a process before this one may still be storing it: `unneeded` names it once more, at the next
                start.
        """

    def newest_bodies(self, source: str) -> list[Body]:
        """Return the newest body of every address of a source."""

    def extracted_again(self, body: Body, rows: Sequence[tuple[str, str, str]], at_ms: int, keys_max: int) -> Noted:
        """Write the versions that another extraction of a stored body changed; return what came of it."""
