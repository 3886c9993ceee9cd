"""Markup as sites write it, made readable: entities of HTML in XML, `&` that begins none, and namespaces. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html.entities import html5
from urllib.parse import urljoin
from xml.sax.saxutils import escape

from lxml import etree
from parsel import Selector

_OWN_NAMES = re.compile(
    r"author|category|channel|comments|content|contributor|copyright|description|enclosure|entry|feed|generator|guid|id|"
    r"image|item|language|lastmod|link|loc|name|published|pubDate|rating|rights|sitemap|source|subtitle|summary|title|"
    r"updated|uri|url|urlset"
)
"""Names of RSS, Atom and sitemaps. With a prefix they are something else: `media:title`, `image:loc`, `atom:link`."""
_RSS_1 = "http://purl.org/rss/1.0/"
_REFERENCE = re.compile(
    r"<!\[CDATA\[.*?(?:\]\]>|\Z)|<!--.*?(?:-->|\Z)|&(?:#(?:[0-9]{1,7}|x[0-9a-fA-F]{1,6});|([a-zA-Z][a-zA-Z0-9]{0,31};))?",
    re.DOTALL,
)
_XML_NAMES = frozenset({"amp;", "lt;", "gt;", "quot;", "apos;"})


ATTRIBUTES_MAX = 10_000
"""libxml2 compares each attribute with all before it: these take 0.2 s, those of a tag of 4 MB many minutes, in which
the stage would be ended, and its next start would ask for the same page."""
SEARCH_STEPS_MAX = 10**11
"""A selector such as `.a .b` may compare, for each element, each element below it with all: the sum of all elements'
depths times their number, some 3e8 steps a second. 100,000 elements at a mean depth of 10, a page of 4 MB, pass."""
NESTED_MAX = 16
"""Most rows around a row: each row is searched with all below it, so rows in rows cost the square of their number."""
DEPTH_MAX = 2_040
"""Most elements around an element. libxml2 leaves what lies below 2,048, and all that follows, out without a word."""
_TAG = re.compile(r"""<[a-zA-Z](?:"[^"]*+"|'[^']*+'|[^>])*+""")
_QUOTED = re.compile(r"""=\s*(?:"[^"]*"|'[^']*')""")


class TooDeep(ValueError):
    """The document is nested more deeply than is read: nobody knows what lies behind."""


def selector_of(text: str, kind: str) -> Selector:
    """Return a document, `html` or `xml`; names of XML as `_plain_names` says.

    Raises `TooDeep`, and `ValueError` for an empty document and one that would take too long.
    """
    if not text.strip():
        raise ValueError("an empty document")
    if _swarms(text):
        raise ValueError(f"a tag of more than {ATTRIBUTES_MAX} attributes")
    selector = Selector(text=text if kind != "xml" else with_references(text), type=kind)
    if _search_steps(selector.root) > SEARCH_STEPS_MAX:
        raise ValueError("nested too deeply for its size")
    if kind == "xml":
        _plain_names(selector)
    return selector


def _search_steps(root: etree._Element) -> int:
    """Return the sum of the elements' depths times their number. Raises `TooDeep`."""
    elements = depths = depth = 0
    for event, _ in etree.iterwalk(root, events=("start", "end")):
        if event == "start":
            elements, depth = elements + 1, depth + 1
            depths += depth
            if depth > DEPTH_MAX:
                raise TooDeep(f"nested more than {DEPTH_MAX} levels deep")
        else:
            depth -= 1
    return elements * depths


def flat_parts(parts: Iterable[Selector]) -> tuple[list[Selector], int]:
    """Return the parts, which are in the document's order, and how many were left out beyond `NESTED_MAX`."""
    flat: list[Selector] = []
    around: dict[etree._Element, int] = {}
    left_out = 0
    for part in parts:
        element = part.root
        if isinstance(element, etree._Element):
            outer = next((above for above in element.iterancestors() if above in around), None)
            around[element] = 0 if outer is None else around[outer] + 1
            if around[element] > NESTED_MAX:
                left_out += 1
                continue
        flat.append(part)
    return flat, left_out


def _swarms(text: str) -> bool:
    """Say whether a tag has more attributes than are read."""
    tags = (tag[0] for tag in _TAG.finditer(text) if len(tag[0]) > 2 * ATTRIBUTES_MAX)
    return any(len(_QUOTED.sub("", tag).split()) > ATTRIBUTES_MAX for tag in tags)


def with_references(text: str) -> str:
    """Return XML whose references XML knows: those of HTML are their characters, a `&` that begins none is itself.

    A name that the document itself declares stays: the parser opens and expands none of these.

    >>> with_references("<t>Caf&eacute; D&D &amp; &#233; <![CDATA[&eacute;]]></t>")
    '<t>Café D&amp;D &amp; &#233; <![CDATA[&eacute;]]></t>'
    >>> with_references("/item?id=7&lang=en")
    '/item?id=7&amp;lang=en'
    """
    declares = "<!ENTITY" in text

    def known(match: re.Match[str]) -> str:
        name = match[1]
        if name is None:
            return "&amp;" if match[0] == "&" else match[0]
        if name in _XML_NAMES:
            return match[0]
        if name in html5:
            return escape(html5[name])
        return match[0] if declares else f"&amp;{name}"

    return _REFERENCE.sub(known, text)


def base_of(selector: Selector, url: str) -> str:
    """Return what relative addresses of an HTML document begin from: its first `<base href>`, else its own address."""
    told = selector.css("base[href]::attr(href)").get()
    try:
        base = urljoin(url, str(told or "").strip())
    except ValueError:
        return url
    return base if base.startswith(("http://", "https://")) else url


def _plain_names(selector: Selector) -> None:
    """Take namespaces off names, so that `creator` selects `<dc:creator>`.

    A name of RSS, Atom or sitemaps under another's prefix is not that: `media:title` becomes `media-title`. An
    attribute with a prefix never takes the place of one without.
    """
    own = {_split(selector.root.tag)[0], "", _RSS_1}
    for element in selector.root.iter("*"):
        namespace, name = _split(element.tag)
        prefix, _, local = name.rpartition(":")
        prefix = element.prefix or prefix
        is_foreign = bool(prefix) and _OWN_NAMES.fullmatch(local) is not None and (":" in name or namespace not in own)
        element.tag = f"{prefix}-{local}" if is_foreign else local
        for attribute in list(element.attrib):
            local = _split(attribute)[1].rpartition(":")[2]
            if local != attribute:
                value = element.attrib.pop(attribute)
                element.attrib[local] = element.attrib.get(local, value)


def _split(name: str) -> tuple[str, str]:
    namespace, _, local = name.rpartition("}")
    return namespace.lstrip("{"), local
