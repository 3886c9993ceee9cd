"""From a document's bytes to its entities and links, as its `Crawl` declares. Pure; the same bytes, the same rows.

Nothing here fetches, so stored bodies are extracted again by the same code. Whatever the bytes are, the result is rows,
links, and the reasons for which something was left out.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any
from urllib.parse import urldefrag, urljoin

import jmespath
import msgspec
from lxml import etree
from parsel import Selector
from w3lib.encoding import html_to_unicode

from headrace.contract.crawl import Crawl, Extract, is_within
from headrace.ingest.crawl.markup import TooDeep, base_of, flat_parts, selector_of
from headrace.ingest.decode.numbers import INTEGER, NUMBER

ROWS_MAX = 100_000
"""Most entities of one document."""
LINKS_MAX = 50_000
"""Most links of one document: what a sitemap may hold by its protocol."""
URL_CHARS_MAX, TEXT_CHARS_MAX, LIST_MAX = 2_048, 65_536, 256

JSON_DEPTH_MAX = 200
"""Where a document is nested more deeply than can be read (some 1,000), what lies below this is no value."""
_JSON_TOKEN = re.compile(r'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|[][{}]', re.DOTALL)

_NO_CHARSETS = frozenset({"hex", "idna", "punycode", "raw_unicode_escape", "unicode_escape"})

Value = int | float | str | bool | list[str] | None

_TYPES = {
    "html": re.compile(r"text/html|application/xhtml\+xml|text/plain"),
    "feed": re.compile(r"(text|application)/([\w.-]+\+)?xml|text/plain|text/html"),
    "json": re.compile(r"(text|application)/([\w.-]+\+)?json|text/(plain|javascript)"),
    "sitemap": re.compile(
        r"(text|application)/([\w.-]+\+)?xml|text/plain|application/(x-)?gzip|application/octet-stream"
    ),
}


class Document(msgspec.Struct, frozen=True):
    """A body and what is needed to read it."""

    url: str
    """Where it came from, after redirects."""
    body: bytes
    content_type: str = ""
    sitemap: bool = False


class Row(msgspec.Struct, frozen=True):
    """One entity as a document has it."""

    key: str
    values: str
    """Its fields as JSON, in declared order."""

    @property
    def version(self) -> str:
        """Return 16 hex digits of SHA-256 over the values: the same values, the same version."""
        return hashlib.sha256(self.values.encode()).hexdigest()[:16]


class Link(msgspec.Struct, frozen=True):
    """An address that the document leads to; `last_modified` as a sitemap says it."""

    url: str
    sitemap: bool = False
    last_modified: str = ""


class Extracted(msgspec.Struct):
    """What a document holds. `left_out` counts reasons: wrong_type, broken, too_deep, no_key, bad_value, too_many."""

    rows: list[Row] = []
    links: list[Link] = []
    left_out: Counter[str] = msgspec.field(default_factory=Counter)


def extract(document: Document, crawl: Crawl) -> Extracted:
    """Return the entities and links of a document; of one key the first row counts."""
    found = Extracted()
    kind = "sitemap" if document.sitemap else crawl.kind
    media = document.content_type.partition(";")[0].strip().lower()
    if media and not _TYPES[kind].fullmatch(media):
        found.left_out["wrong_type"] += 1
        return found
    try:
        if kind == "sitemap":
            _read_sitemap(document, crawl, found)
        elif kind == "json":
            _read_json(document, crawl, found)
        else:
            _read_markup(document, crawl, found)
    except TooDeep:
        return Extracted(left_out=Counter(too_deep=1))
    except (ValueError, TypeError, RecursionError, zlib.error, etree.LxmlError, jmespath.exceptions.JMESPathError):
        # Bytes that cannot be read: the document gives nothing, and `left_out` counts it.
        return Extracted(left_out=Counter(broken=1))
    return found


def _read_markup(document: Document, crawl: Crawl, found: Extracted) -> None:
    selector = selector_of(_text(document), "html" if crawl.kind == "html" else "xml")
    base = base_of(selector, document.url) if crawl.kind == "html" else document.url
    chosen = crawl.rows or ("item, entry" if crawl.kind == "feed" else "")
    parts, nested = flat_parts(selector.css(chosen)) if chosen else ([selector], 0)
    if nested:
        found.left_out["too_many"] += nested
    _add_rows(found, crawl, document, ((part, _find_markup) for part in parts))
    for follow in crawl.follow:
        addresses = (str(a) for a in selector.css(follow.at or "a::attr(href)").getall())
        _add_links(found, crawl, base, addresses, follow.url)


def _read_json(document: Document, crawl: Crawl, found: Extracted) -> None:
    plain = _json_of(_text(document))
    parts = jmespath.search(crawl.rows, plain) if crawl.rows else [plain]
    if isinstance(parts, list):
        _add_rows(found, crawl, document, ((part, _find_json) for part in parts))
    for follow in crawl.follow:
        addresses = jmespath.search(follow.at, plain) if follow.at else None
        several = addresses if isinstance(addresses, list) else [addresses]
        _add_links(found, crawl, document.url, (a for a in several if isinstance(a, str)), follow.url)


def _json_of(text: str) -> Any:
    """Return what JSON says. NaN and infinities, which it has not and some programs write, spoil their value alone, and
    so do a number of more digits than Python reads, which is beyond all bounds, and a value nested too deeply.
    """
    try:
        return msgspec.json.decode(text.encode("utf-8", "replace"))
    except (msgspec.DecodeError, RecursionError):
        try:
            return _lenient_json_of(text)
        except RecursionError:
            return _lenient_json_of(_shallow(text))


def _lenient_json_of(text: str) -> Any:
    return json.loads(text, parse_int=lambda digits: int(digits) if INTEGER.fullmatch(digits) else float(digits))


def _shallow(text: str) -> str:
    """Return JSON in which NaN stands for each value below `JSON_DEPTH_MAX` objects and lists. Linear in the length."""
    kept: list[str] = []
    depth, start = 0, 0
    for token in _JSON_TOKEN.finditer(text):
        if token[0] in ("[", "{"):
            depth += 1
            if depth == JSON_DEPTH_MAX + 1:
                kept += [text[start : token.start()], "NaN"]
        elif token[0] in ("]", "}"):
            if depth == JSON_DEPTH_MAX + 1:
                start = token.end()
            depth -= 1
    # What never ends is no JSON, and stays none.
    return "".join(kept) + (text[start:] if depth <= JSON_DEPTH_MAX else "")


def _read_sitemap(document: Document, crawl: Crawl, found: Extracted) -> None:
    if document.body[:2] == b"\x1f\x8b":
        body = _unpacked(document.body, crawl.bytes_max)
        if body is None:
            found.left_out["too_large"] += 1
            return
        document = msgspec.structs.replace(document, body=body)
    text = _text(document)
    parts = _sitemap_parts(text, found) if "<" in text else ((line, False, "") for line in text.split())
    wanted, places = [re.compile(follow.url) for follow in crawl.follow], crawl.places()
    for told, nested, changed in parts:
        address = _absolute(document.url, told, places) if told else None
        if address is None or not (nested or not wanted or any(w.search(address) for w in wanted)):
            continue
        if len(address) > URL_CHARS_MAX:
            found.left_out["link_too_long"] += 1
            continue
        if len(found.links) >= LINKS_MAX:
            found.left_out["too_many"] += 1 + sum(1 for _ in parts)
            return
        found.links.append(Link(address, nested, changed))


def _sitemap_parts(text: str, found: Extracted) -> Iterator[tuple[str, bool, str]]:
    """Yield address, whether it is a sitemap, and when it changed last. A plain text has an address a line, no more."""
    parts, nested = flat_parts(selector_of(text, "xml").css("url, sitemap"))
    if nested:
        found.left_out["too_many"] += nested
    for part in parts:
        changed = str(part.css("lastmod::text").get(default="")).strip()[:64]
        yield str(part.css("loc::text").get(default="")).strip(), part.root.tag == "sitemap", changed


def _unpacked(packed: bytes, bytes_max: int) -> bytes | None:
    """Return what every gzip member holds, None where that is too much. Raises `ValueError` where one is torn."""
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as reader:
            body = reader.read(bytes_max + 1)
    except (EOFError, OSError) as error:
        raise ValueError(f"no whole gzip: {error}") from error
    return body if len(body) <= bytes_max else None


def _text(document: Document) -> str:
    """Return the body as text by its byte order mark, header, declaration, else UTF-8, else Latin-1's superset."""
    try:
        name, text = html_to_unicode(document.content_type, document.body, auto_detect_fun=_utf8_or_western)
    except (LookupError, UnicodeError):
        name, text = "hex", ""
    # A codec of Python that is no character set: as where none is named.
    return document.body.decode(_utf8_or_western(document.body), "replace") if name in _NO_CHARSETS else text


def _utf8_or_western(body: bytes) -> str:
    try:
        body.decode()
    except UnicodeDecodeError:
        return "cp1252"
    return "utf-8"


def _add_rows(found: Extracted, crawl: Crawl, document: Document, parts: Iterator[tuple[Any, Any]]) -> None:
    seen: set[str] = set()
    for part, find in parts:
        if len(found.rows) >= ROWS_MAX:
            found.left_out["too_many"] += 1 + sum(1 for _ in parts)
            return
        key = _key(part, find, crawl.key, document)
        if not isinstance(key, str) or not key or len(key) > URL_CHARS_MAX:
            found.left_out["no_key"] += 1
            continue
        if key in seen:
            found.left_out["key_again"] += 1
            continue
        seen.add(key)
        values: dict[str, Value] = {}
        for name, one in crawl.fields.items():
            try:
                values[name] = _value(part, find, one, document)
            except ValueError:
                values[name] = None
                found.left_out["bad_value"] += 1
        found.rows.append(Row(key, msgspec.json.encode(values).decode()))


def _key(part: Any, find: Any, one: Extract, document: Document) -> Value:
    try:
        key = _value(part, find, one, document)
    except ValueError:
        return None  # One row's key that is no key: the others are read.
    return str(key) if isinstance(key, int) else key


def _value(part: Any, find: Any, one: Extract, document: Document) -> Value:
    """Return the declared value or None. Raises `ValueError` where what is found is not of its type."""
    several = [document.url] if one.at == "url" else find(part, one.at)
    if one.pattern:
        matches = (re.search(one.pattern, v) if isinstance(v, str) else None for v in several)
        several = [m[1] if m.re.groups else m[0] for m in matches if m is not None and (not m.re.groups or m[1])]
    if one.type == "list[string]":
        texts = (_typed(v, "string") for v in several[:LIST_MAX])
        return [text for text in texts if isinstance(text, str) and text]
    for value in several:
        typed = _typed(value, one.type)
        if typed is not None and typed != "":
            return typed
    return None


def _find_markup(part: Selector, at: str) -> list[Any]:
    return list(part.css(at).getall())


def _find_json(part: Any, at: str) -> list[Any]:
    value = jmespath.search(at, part)
    return value if isinstance(value, list) else [value]


def _typed(value: Any, kind: str) -> Value:
    if value is None or isinstance(value, dict | list):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("not a finite number")
    if kind in {"string", "list[string]"}:
        text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
        return " ".join(_whole(text).split())[:TEXT_CHARS_MAX]
    if isinstance(value, str) and not (value := value.strip()):
        return None
    if kind == "bool":
        return _truth(value)
    if isinstance(value, bool):
        raise ValueError("a truth value is no number")
    if isinstance(value, str) and not NUMBER.fullmatch(value):
        raise ValueError("no number as JSON or a price tag writes it")
    try:
        number = float(value)
    except OverflowError as error:
        raise ValueError("a number beyond all bounds") from error
    if kind == "float64":
        if not math.isfinite(number):
            raise ValueError("not a finite number")
        return number
    whole = int(value) if isinstance(value, int | str) else int(number)
    if (whole != number and not isinstance(value, str | int)) or not -(2**63) <= whole < 2**63:
        raise ValueError("no 64-bit integer")
    return whole


def _whole(text: str) -> str:
    """Return the text without halves of surrogate pairs, which no UTF-8 can hold."""
    return text.encode("utf-8", "replace").decode()


def _truth(value: Any) -> bool:
    text = str(value).lower()
    if text in {"true", "1", "yes", "1.0"}:
        return True
    if text in {"false", "0", "no", "0.0"}:
        return False
    raise ValueError("no truth value")


def _add_links(found: Extracted, crawl: Crawl, base: str, addresses: Iterator[str], pattern: str) -> None:
    wanted, places = re.compile(pattern), crawl.places()
    for address in addresses:
        absolute = _absolute(base, address, places)
        if absolute is None or not wanted.search(absolute):
            continue
        if len(absolute) > URL_CHARS_MAX:
            found.left_out["link_too_long"] += 1
            continue
        if len(found.links) >= LINKS_MAX:
            found.left_out["too_many"] += 1 + sum(1 for _ in addresses)
            return
        found.links.append(Link(absolute))


def _absolute(base: str, address: str, places: Collection[tuple[str, int]]) -> str | None:
    """Return the address in full, without its fragment; None where it leaves the source's places."""
    try:
        absolute = urldefrag(urljoin(base, address.strip()))[0]
    except ValueError:
        return None
    return absolute if is_within(absolute, places) else None
