"""How a user says what the crawler brings: sources on the web, what of them is an entity, how often. Data only; no I/O.

Crawl(
    name="catalogue",
    kind="html",
    sitemaps=("https://shop.example/sitemap.xml",),
    follow=(Follow(url=r"/item/\\d+$"),),
    joins="item_id",                                   # the impression's field that names the entity
    key=Extract(at="link[rel=canonical]::attr(href)", pattern=r"/item/(\\d+)"),
    fields={
        "price": Extract(at=".price::text", type="float64", pattern=r"([\\d.]+)"),
        "brand": Extract(at=".brand::text"),
    },
)

Each field becomes a column of impressions and samples, `external.<name>.<field>`, null where nothing is known, and
`external.<name>.crawl_time_ms` says when the version was fetched, 0 where nothing is known.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Annotated, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from headrace.contract.errors import ConfigRejected, listed

PREFIX = "external"
CRAWL_TIME = "crawl_time_ms"
"""Column beside the declared ones: when the version was fetched; 0 where nothing is known."""

ExtractType = Literal["int64", "float64", "string", "bool", "list[string]"]
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_PORTS = {"http": 80, "https": 443}
_VARIABLE = re.compile(r"\$([A-Z][A-Z0-9_]*)")


class Extract(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where in a document, or in one row of it, a value is; the first that is found counts."""

    at: str
    """html, feed: a CSS selector with `::text` or `::attr(name)` (`:scope` is not needed; `creator` finds
    `<dc:creator>` of a feed, `media-title` its `<media:title>`). json: a JMESPath expression. `url` alone is the
    document's address."""
    type: ExtractType = "string"
    """`list[string]` takes all that are found."""
    pattern: str = ""
    """Regular expression that the text must hold; its first group, else the whole match, is the value."""


class Follow(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which links of a document are fetched too."""

    url: str = ""
    """Regular expression that the absolute address must hold. Empty: any."""
    at: str = ""
    """html, feed: CSS selector of the links, `a::attr(href)` by default; json: JMESPath of addresses. Sitemaps need
    none."""


class Crawl(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One source on the web. An entity is the document itself, or each of its `rows`."""

    name: str
    kind: Literal["html", "feed", "json"]
    """feed: RSS or Atom; `rows` is then `item, entry` where nothing else is said."""
    joins: str
    """The impression's raw field whose value, as text, is the entity's key."""
    key: Extract
    fields: dict[str, Extract]
    start: tuple[str, ...] = ()
    """Addresses to begin with. `$NAME` in one is the crawler's environment's, `$PORT_CATALOGUE` and the like a port of
    the stack."""
    sitemaps: tuple[str, ...] = ()
    """Sitemaps and their indexes, plain or gzip: their addresses are fetched as documents. `$NAME` as in `start`."""
    rows: str = ""
    """CSS selector or JMESPath of the parts of a document that are an entity each. Empty: the document is one."""
    follow: tuple[Follow, ...] = ()
    hosts: tuple[str, ...] = ()
    """Hosts beside those of `start` and `sitemaps` that links and redirects may lead to, at port 80 and 443, or at
    another one that is said too: `cdn.example:8080`."""
    every_ms: Annotated[int, Meta(ge=1_000)] = 3_600_000
    """Time between fetches of a document. One hour."""
    pages_max: Annotated[int, Meta(gt=0, le=10_000_000)] = 10_000
    """Most addresses of this source; links beyond are ignored."""
    keys_max: Annotated[int, Meta(gt=0, le=10_000_000)] = 1_000_000
    """Most entities that are not gone; every stream process and serving process holds them in memory."""
    depth_max: Annotated[int, Meta(ge=0, le=1_000)] = 3
    """Most links from a start to a document; one from a sitemap counts as one."""
    bytes_max: Annotated[int, Meta(gt=0, le=268_435_456)] = 4_194_304
    """Largest body, decompressed. 4 MiB."""
    timeout_ms: Annotated[int, Meta(gt=0, le=600_000)] = 20_000
    """Longest time from a request to the last byte of its answer."""
    delay_ms: Annotated[int, Meta(ge=0, le=3_600_000)] = 1_000
    """Least time between requests to one host; robots.txt's Crawl-delay and a slow host make it longer."""
    parallel: Annotated[int, Meta(gt=0, le=64)] = 1
    """Most requests to one host at once."""

    def all_hosts(self) -> frozenset[str]:
        """Return every host, lower case, that may be asked."""
        return frozenset(host for host, _ in self.places())

    def places(self) -> frozenset[tuple[str, int]]:
        """Return every host, lower case, and port that may be asked."""
        own = {_place(url) for url in (*self.start, *self.sitemaps)}
        told = {_place(f"http://{host}") for host in self.hosts}
        return frozenset(own | told | {(host, port) for host, _ in own | told for port in _PORTS.values()})

    def columns(self) -> dict[str, ExtractType]:
        """Return the columns of this source and their types, crawl time last."""
        named: dict[str, ExtractType] = {
            f"{PREFIX}.{self.name}.{field}": one.type for field, one in self.fields.items()
        }
        return {**named, f"{PREFIX}.{self.name}.{CRAWL_TIME}": "int64"}


def is_within(url: str, places: Collection[tuple[str, int]]) -> bool:
    """Say whether an address is HTTP or HTTPS of one of the places, and holds no user and no password.

    >>> [is_within(f"{url}/x", {("a.example", 80)}) for url in ("http://A.example", "http://a.example:81", "ftp://a.example")]
    [True, False, False]
    """
    try:
        parts = urlsplit(url)
        return parts.scheme in _PORTS and "@" not in parts.netloc and _place(url) in places
    except ValueError:
        return False


def _place(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or _PORTS.get(parts.scheme, 0)


def located(crawl: Crawl, names: Mapping[str, str]) -> Crawl:
    """Return the source with each `$NAME` of its addresses filled in. Raises `ConfigRejected` for one without a value.

    >>> shop = Crawl(name="shop", kind="json", joins="id", key=Extract(at="id"), fields={}, start=("http://$SHOP/",))
    >>> located(shop, {"SHOP": "127.0.0.1:8091"}).start
    ('http://127.0.0.1:8091/',)
    """

    def filled(url: str) -> str:
        lacking = [name for name in _VARIABLE.findall(url) if name not in names]
        if lacking:
            raise ConfigRejected(f"crawl {crawl.name!r}: {url!r} wants ${lacking[0]}, which the environment lacks.")
        return _VARIABLE.sub(lambda match: names[match[1]], url)

    found = msgspec.structs.replace(
        crawl, start=tuple(map(filled, crawl.start)), sitemaps=tuple(map(filled, crawl.sitemaps))
    )
    _check_addresses(found)
    return found


def external_columns(crawls: Sequence[Crawl]) -> dict[str, ExtractType]:
    """Return the columns that all sources give, and their types, in declared order."""
    return {name: kind for crawl in crawls for name, kind in crawl.columns().items()}


def crawl_faults(crawls: Sequence[Crawl], impression_fields: Mapping[str, str]) -> Iterator[ConfigRejected]:
    """Give the first fault of each declaration that cannot work."""
    names = [crawl.name for crawl in crawls]
    for number, crawl in enumerate(crawls):
        try:
            _check_crawl(crawl, names, impression_fields)
        except ConfigRejected as error:
            yield ConfigRejected(str(error), at=f"crawls[{number}]")


def _check_crawl(crawl: Crawl, names: Sequence[str], impression_fields: Mapping[str, str]) -> None:
    if names.count(crawl.name) > 1:
        raise ConfigRejected(f"crawl {crawl.name!r} is declared twice.")
    for name in (crawl.name, *crawl.fields):
        if not _NAME.fullmatch(name) or name == CRAWL_TIME:
            raise ConfigRejected(
                f"crawl {crawl.name!r}: {name!r} is no name: lower-case letters, digits and _, a letter first, "
                f"and not {CRAWL_TIME}."
            )
    joined = impression_fields.get(crawl.joins)
    if joined is None or joined.startswith("list"):
        raise ConfigRejected(
            f"crawl {crawl.name!r} joins {crawl.joins!r}, which is {joined or 'no field of the impression'}; one "
            f"value is wanted, of {listed(n for n, k in impression_fields.items() if not k.startswith('list'))}."
        )
    if not crawl.fields:
        raise ConfigRejected(f"crawl {crawl.name!r} declares no fields: it would bring nothing.")
    _check_addresses(crawl)
    _check_extraction(crawl)


def _check_addresses(crawl: Crawl) -> None:
    if not (crawl.start or crawl.sitemaps):
        raise ConfigRejected(f"crawl {crawl.name!r} needs start or sitemaps: it does not know where to begin.")
    for url in (*crawl.start, *crawl.sitemaps):
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ConfigRejected(f"crawl {crawl.name!r}: {url!r} is no http or https address.")
        if parts.username or parts.password:
            raise ConfigRejected(f"crawl {crawl.name!r}: an address holds a password; addresses are stored and logged.")
    for host in crawl.hosts:
        try:
            is_one = _place(f"http://{host}")[0] and not set(host) & set("/@?#")
        except ValueError:
            is_one = False
        if not is_one:
            raise ConfigRejected(
                f"crawl {crawl.name!r}: hosts has {host!r}; a host is wanted, `cdn.example` or with a port."
            )


def _check_extraction(crawl: Crawl) -> None:
    if crawl.key.type not in {"string", "int64"}:
        raise ConfigRejected(f"crawl {crawl.name!r}: the key is {crawl.key.type}; a key is a string or an int64.")
    extracts = {"key": crawl.key, **crawl.fields}
    wanted = {f"{name}.at": one.at for name, one in extracts.items() if one.at != "url"}
    wanted |= {f"follow {i}.at": one.at for i, one in enumerate(crawl.follow) if one.at}
    wanted |= {"rows": crawl.rows} if crawl.rows else {}
    # Only a project that crawls needs the libraries: every stage reads the project.
    import jmespath
    from cssselect import SelectorError
    from parsel.csstranslator import HTMLTranslator

    for where, text in wanted.items():
        try:
            if crawl.kind == "json":
                jmespath.compile(text)
            else:
                HTMLTranslator().css_to_xpath(text)
        except (SelectorError, jmespath.exceptions.JMESPathError, ValueError) as error:
            kind = "JMESPath expression" if crawl.kind == "json" else "CSS selector"
            raise ConfigRejected(f"crawl {crawl.name!r}: {where} {text!r} is no {kind}: {error}.") from error
    patterns = [one.pattern for one in extracts.values()] + [one.url for one in crawl.follow]
    for text in patterns:
        try:
            re.compile(text)
        except re.error as error:
            raise ConfigRejected(f"crawl {crawl.name!r}: {text!r} is no regular expression: {error}.") from error
