"""Goal: whatever the bytes, extraction gives rows of the declared types or reasons. Method: documents by example, and
arbitrary bytes."""

from __future__ import annotations

import gzip
import json
import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.contract.crawl import Crawl, Extract, Follow, crawl_faults
from headrace.ingest.crawl import extract as extraction
from headrace.ingest.crawl.extract import Document, extract

FIELDS = {
    "price": Extract(at=".p::text", type="float64", pattern=r"([\d.]+)"),
    "stock": Extract(at=".s::text", type="int64"),
    "sale": Extract(at=".b::text", type="bool"),
    "tags": Extract(at="i::text", type="list[string]"),
    "url": Extract(at="url"),
}
HTML = Crawl(
    name="shop", kind="html", joins="item_id", start=("https://shop.example/a/",), rows="div",
    key=Extract(at="::attr(id)"), fields=FIELDS, follow=(Follow(url="/item/"),),
)  # fmt: skip
JSON = Crawl(
    name="api", kind="json", joins="item_id", start=("https://shop.example/api",), rows="data.items[]",
    key=Extract(at="id"), fields={"n": Extract(at="n", type="int64"), "t": Extract(at="t")},
    follow=(Follow(at="links.*.href"),),
)  # fmt: skip
FEED = Crawl(
    name="news", kind="feed", joins="item_id", start=("https://shop.example/feed",),
    key=Extract(at="id::text, guid::text"),
    fields={"title": Extract(at="title::text"), "link": Extract(at="link::attr(href), link::text")},
)  # fmt: skip


def rows_of(crawl: Crawl, body: bytes, content_type: str = "") -> dict[str, dict[str, object]]:
    document = Document(crawl.start[0], body, content_type)
    return {row.key: json.loads(row.values) for row in extract(document, crawl).rows}


def test_values_have_their_types_and_what_is_none_is_null() -> None:
    body = b"""<div id=a><b class=p>EUR 1.50</b><b class=s> 7 </b><b class=b>Yes</b><i>x</i><i> y  z </i></div>
               <div id=b><b class=p>none</b><b class=s>7.5</b><b class=b>maybe</b></div><div>no key</div>"""
    found = extract(Document(HTML.start[0], body), HTML)
    values = {row.key: json.loads(row.values) for row in found.rows}
    url = HTML.start[0]
    assert values["a"] == {"price": 1.5, "stock": 7, "sale": True, "tags": ["x", "y z"], "url": url}
    assert values["b"] == {"price": None, "stock": None, "sale": None, "tags": [], "url": url}
    assert found.left_out == {"bad_value": 2, "no_key": 1}


def test_a_sitemap_may_be_plain_text_and_an_entry_without_an_address_is_none() -> None:
    document = Document(
        HTML.start[0], b"https://shop.example/item/1\r\n\nhttps://shop.example/item/2\n", "text/plain", True
    )
    assert [link.url for link in extract(document, HTML).links] == [f"https://shop.example/item/{n}" for n in (1, 2)]
    everything = msgspec.structs.replace(HTML, follow=())
    body = b"<urlset><url></url><url><loc> </loc></url><url><loc>/item/3</loc></url></urlset>"
    found = extract(Document(HTML.start[0], body, sitemap=True), everything)
    assert [link.url for link in found.links] == ["https://shop.example/item/3"], "not the sitemap itself"


@pytest.mark.parametrize("name", ["a{}=1", "a{}", 'a{}="1"', 'a{}"'])
def test_a_tag_of_very_many_attributes_is_broken_and_soon(name: str) -> None:
    """It took more than the bound of a call: the stage ended, and asked for the same page again at its next start."""
    swarm = " ".join(map(name.format, range(400_000)))
    began = time.process_time()
    found = extract(Document(HTML.start[0], f'<div id=1 x=">" {swarm}>x</div>'.encode()), HTML)
    assert found.left_out == {"broken": 1} and time.process_time() - began < 10
    picture = f'<div id=2><b class=p>1</b><img src="data:;base64,{"QUJD " * 50_000}"></div>'
    assert rows_of(HTML, picture.encode())["2"]["price"] == 1.0


def test_a_number_of_too_many_digits_costs_its_value_alone() -> None:
    body = b'{"data": {"items": [{"id": "1", "n": ' + b"9" * 5_000 + b'}, {"id": "2", "n": 5}]}}'
    assert rows_of(JSON, body) == {"1": {"n": None, "t": None}, "2": {"n": 5, "t": None}}


def test_what_one_document_has_too_many_is_counted_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extraction, "ROWS_MAX", 2)
    monkeypatch.setattr(extraction, "LINKS_MAX", 1)
    body = "".join(f"<div id={n}><a href=/item/{n}>x</a></div>" for n in range(7)).encode()
    assert extract(Document(HTML.start[0], body), HTML).left_out == {"too_many": 5 + 6}
    sitemap = "".join(f"<url><loc>https://shop.example/item/{n}</loc></url>" for n in range(7))
    found = extract(Document(HTML.start[0], f"<urlset>{sitemap}</urlset>".encode(), sitemap=True), HTML)
    assert found.left_out == {"too_many": 6} and len(found.links) == 1


@pytest.mark.parametrize(
    ("body", "content_type", "name"),
    [
        ("<div id=1><i>Caf\u00e9</i></div>".encode("latin-1"), "text/html; charset=iso-8859-1", "Caf\u00e9"),
        ("<div id=1><i>Caf\u00e9</i></div>".encode("latin-1"), "text/html", "Caf\u00e9"),
        ("<div id=1><i>\u20ac</i></div>".encode("cp1252"), "text/html", "\u20ac"),
        ("<div id=1><i>\u65e5\u672c</i></div>".encode("utf-8"), "text/html", "\u65e5\u672c"),
        ("<meta charset=shift_jis><div id=1><i>\u65e5\u672c</i></div>".encode("shift_jis"), "", "\u65e5\u672c"),
        ("<div id=1><i>\u65e5\u672c</i></div>".encode("utf-16"), "text/html", "\u65e5\u672c"),
        ("<div id=1><i>\u65e5\u672c</i></div>".encode("utf-8"), "text/html; charset=nonsense", "\u65e5\u672c"),
    ],
)
def test_text_is_read_in_its_encoding(body: bytes, content_type: str, name: str) -> None:
    assert rows_of(HTML, body, content_type)["1"]["tags"] == [name]


def test_links_stay_on_the_hosts_and_are_absolute() -> None:
    body = b"""<a href="../item/1#x"> <a href="/item/2"> <a href="/other"> <a href="https://evil.example/item/3">
               <a href="ftp://shop.example/item/4"> <a href="javascript:/item/5"> <a href="https://u:p@shop.example/item/6">
               <a href="https://SHOP.example/item/7"> <a href="http://[::1/item/8">"""
    found = extract(Document(HTML.start[0], body), HTML)
    assert [link.url for link in found.links] == [
        "https://shop.example/item/1",
        "https://shop.example/item/2",
        "https://SHOP.example/item/7",
    ]


def test_json_rows_and_links() -> None:
    body = b'{"data": {"items": [{"id": 1, "n": 3.0, "t": 5}, {"id": "x", "n": "4"}, {"id": true}, {"id": null}, 3]}, \
             "links": {"next": {"href": "?p=2"}, "bad": {"href": 4}}}'
    found = extract(Document(JSON.start[0], body), JSON)
    values = {row.key: json.loads(row.values) for row in found.rows}
    assert values["1"] == {"n": 3, "t": "5"} and values["x"] == {"n": 4, "t": None}
    assert [link.url for link in found.links] == ["https://shop.example/api?p=2"]


def test_atom_with_namespaces() -> None:
    body = b"""<?xml version="1.0" encoding="utf-8"?><feed xmlns="http://www.w3.org/2005/Atom">
      <entry><id>urn:1</id><title>A</title><link href="https://shop.example/1"/></entry></feed>"""
    assert rows_of(FEED, body) == {"urn:1": {"title": "A", "link": "https://shop.example/1"}}


def test_entities_of_xml_open_no_file_and_do_not_swell() -> None:
    body = b"""<!DOCTYPE r [<!ENTITY x SYSTEM "file:///etc/passwd"><!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]>
      <rss><item><guid>1</guid><title>&x;&b;t</title></item></rss>"""
    values = rows_of(FEED, body)
    assert "root" not in json.dumps(values) and "aaaa" not in json.dumps(values)


@pytest.mark.parametrize("text", ["12_5", "1_0.5", "inf", "-Infinity", "nan", "\u0661\u0662", "0x10", "1e", "."])
def test_text_that_only_python_reads_as_a_number_is_none(text: str) -> None:
    fields = {"f": Extract(at="f", type="float64"), "i": Extract(at="i", type="int64")}
    crawl = Crawl(name="c", kind="json", joins="i", start=JSON.start, rows="[]", key=Extract(at="k"), fields=fields)
    found = extract(Document(JSON.start[0], json.dumps([{"k": "a", "f": text, "i": text}]).encode()), crawl)
    assert (found.rows[0].values, found.left_out) == ('{"f":null,"i":null}', {"bad_value": 2})


@pytest.mark.parametrize(("text", "number"), [(" 12.50 ", 12.5), ("+.5e1", 5.0), ("7.", 7.0), ("-0", 0.0)])
def test_text_that_is_a_number(text: str, number: float) -> None:
    crawl = Crawl(
        name="c",
        kind="json",
        joins="i",
        start=JSON.start,
        key=Extract(at="k"),
        fields={"f": Extract(at="f", type="float64")},
    )
    assert rows_of(crawl, json.dumps({"k": "a", "f": text}).encode()) == {"a": {"f": number}}


def test_a_key_of_the_wrong_type_costs_its_row_alone() -> None:
    crawl = Crawl(
        name="c", kind="json", joins="i", start=JSON.start, rows="[]", key=Extract(at="k", type="int64"),
        fields={"t": Extract(at="t")},
    )  # fmt: skip
    found = extract(Document(JSON.start[0], b'[{"k": "12_5"}, {"k": "125", "t": "x"}, {"k": "a"}]'), crawl)
    assert [(row.key, row.values) for row in found.rows] == [("125", '{"t":"x"}')]
    assert found.left_out == {"no_key": 2}


def test_a_number_that_json_has_not_spoils_its_value_alone() -> None:
    body = b"""{"data": {"items": [
      {"id": "a", "n": NaN, "t": "x"}, {"id": "b", "n": -Infinity, "t": Infinity}, {"id": 3, "n": 4}]}}"""
    found = extract(Document(JSON.start[0], body), JSON)
    values = {row.key: json.loads(row.values) for row in found.rows}
    assert values == {"a": {"n": None, "t": "x"}, "b": {"n": None, "t": None}, "3": {"n": 4, "t": None}}
    assert found.left_out == {"bad_value": 3}


SITEMAP = [f"<url><loc>https://shop.example/item/{i}</loc></url>".encode() for i in range(500)]
HEAD, TAIL = b'<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">', b"</urlset>"
MEMBERS = [gzip.compress(HEAD + b"".join(SITEMAP[:300])), gzip.compress(b"".join(SITEMAP[300:]) + TAIL)]


@pytest.mark.parametrize("after", [b"", bytes(512)], ids=["nothing after", "zeros after"])
def test_every_member_of_a_gzip_is_read(after: bytes) -> None:
    found = extract(Document("https://shop.example/s.gz", b"".join(MEMBERS) + after, "", sitemap=True), HTML)
    assert [link.url[26:] for link in found.links] == [str(i) for i in range(500)] and not found.left_out


@pytest.mark.parametrize(
    "body",
    [MEMBERS[0][:-9], MEMBERS[0] + MEMBERS[1][:-1], MEMBERS[0] + b"garbage", MEMBERS[0][:-8] + bytes(8), b"\x1f\x8b"],
    ids=["cut", "cut in the second", "garbage after", "wrong checksum", "head alone"],
)
def test_a_torn_gzip_is_broken_and_gives_nothing(body: bytes) -> None:
    found = extract(Document("https://shop.example/s.gz", body, "", sitemap=True), HTML)
    assert (found.links, found.left_out) == ([], {"broken": 1})


def test_a_gzip_that_swells_is_too_large() -> None:
    body = gzip.compress(bytes(HTML.bytes_max + 1))
    assert extract(Document("https://shop.example/s.gz", body, "", sitemap=True), HTML).left_out == {"too_large": 1}


@pytest.mark.parametrize(
    ("base", "wanted"),
    [
        ("/shop/", "https://shop.example/shop/item/7"),
        ("https://shop.example/b/c", "https://shop.example/b/item/7"),
        ("../", "https://shop.example/item/7"),
        ("data:,x", "https://shop.example/a/item/7"),
        ("http://[::1", "https://shop.example/a/item/7"),
        ("https://evil.example/", None),
    ],
)
def test_relative_links_begin_from_the_declared_base(base: str, wanted: str | None) -> None:
    body = f'<base target=x><base href="{base}"><base href="/later/"><a href="item/7">'.encode()
    assert [link.url for link in extract(Document(HTML.start[0], body), HTML).links] == ([wanted] if wanted else [])


@pytest.mark.parametrize(
    ("title", "wanted"),
    [
        ("Caf&eacute; M&uuml;ller &ndash; 5&nbsp;&euro;", "Caf\u00e9 M\u00fcller \u2013 5 \u20ac"),
        ("D&D, but in a Discord server", "D&D, but in a Discord server"),
        ("AT&T; x & y &amp; &#233;&#xE9; &LT;b&gt; &#; &", "AT&T; x & y & \u00e9\u00e9 <b> &#; &"),
        ("<![CDATA[R&D &eacute;]]>", "R&D &eacute;"),
        ("<!-- a & b -->c", "c"),
    ],
)
def test_references_in_xml_are_what_was_meant(title: str, wanted: str) -> None:
    body = f"<rss><channel><item><guid>1</guid><title>{title}</title></item></channel></rss>".encode()
    assert rows_of(FEED, body)["1"]["title"] == wanted


def test_addresses_of_a_sitemap_keep_what_follows_a_bare_ampersand() -> None:
    body = HEAD + b"<url><loc>https://shop.example/item/?id=7&lang=en&copy=1</loc></url>" + TAIL
    (link,) = extract(Document("https://shop.example/s", body, sitemap=True), HTML).links
    assert link.url == "https://shop.example/item/?id=7&lang=en&copy=1"


@pytest.mark.parametrize(
    "declared", [" xmlns:media='m' xmlns:dc='d' xmlns:x='l'", ""], ids=["declared", "not declared"]
)
def test_names_with_a_prefix_are_not_the_feeds_own(declared: str) -> None:
    body = f"""<rss{declared}><channel><item><media:group><media:title>thumbnail</media:title></media:group>
      <dc:creator>Ann</dc:creator><guid>1</guid><title>Real</title><link href="a" x:href="b"/></item></channel></rss>"""
    fields = {"creator": Extract(at="creator::text"), "other": Extract(at="media-title::text"), **FEED.fields}
    crawl = Crawl(name="n", kind="feed", joins="i", start=FEED.start, key=FEED.key, fields=fields)
    wanted = {"creator": "Ann", "other": "thumbnail", "title": "Real", "link": "a"}
    assert rows_of(crawl, body.encode()) == {"1": wanted}


def test_a_feed_whose_every_name_has_a_prefix_is_read() -> None:
    body = b"""<a:feed xmlns:a="http://www.w3.org/2005/Atom"><a:entry><a:id>urn:1</a:id><a:title>A</a:title></a:entry>
      </a:feed>"""
    assert rows_of(FEED, body) == {"urn:1": {"title": "A", "link": None}}


def test_a_sitemap_takes_no_image_for_a_page() -> None:
    body = b"""<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9" xmlns:image="i"><url><image:image><image:loc>
      https://shop.example/item/x.png</image:loc></image:image><loc>https://shop.example/item/7</loc></url></urlset>"""
    (link,) = extract(Document("https://shop.example/s", body, sitemap=True), HTML).links
    assert link.url == "https://shop.example/item/7"


def test_the_same_values_are_the_same_version() -> None:
    one, two = (
        extract(Document(HTML.start[0], body), HTML).rows[0].version
        for body in (b"<div id=1><i>a</i></div>", b"<p>new</p><div id=1 class=x><i> a </i></div>")
    )
    assert one == two


@given(st.binary(max_size=400), st.sampled_from([HTML, JSON, FEED]), st.booleans(), st.sampled_from(["", "text/xml"]))
def test_any_bytes_give_rows_or_reasons(body: bytes, crawl: Crawl, sitemap: bool, content_type: str) -> None:
    found = extract(Document(crawl.start[0], body, content_type, sitemap), crawl)
    assert found.rows or found.left_out or not found.rows
    for row in found.rows:
        row.values.encode()
        assert json.loads(row.values).keys() == crawl.fields.keys()


PLAIN = st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5)
NESTED = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "n", "t"]), inner),
    max_leaves=8,
)


@given(NESTED | st.just(10**400))
def test_any_json_gives_rows_of_the_declared_types(plain: object) -> None:
    body = json.dumps({"data": {"items": [plain, {"id": "k", "n": plain, "t": plain}]}}).encode()
    for values in rows_of(JSON, body).values():
        assert values["n"] is None or (type(values["n"]) is int and -(2**63) <= values["n"] < 2**63)
        assert values["t"] is None or type(values["t"]) is str


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"joins": "nothing"}, "no field"),
        ({"name": "Upper Case"}, "no name"),
        ({"start": ()}, "where to begin"),
        ({"start": ("ftp://x.example/",)}, "no http"),
        ({"start": ("https://me:secret@x.example/",)}, "password"),
        ({"rows": "div["}, "CSS selector"),
        ({"fields": {}}, "no fields"),
        ({"fields": {"a": Extract(at="b", pattern="(")}}, "regular expression"),
        ({"kind": "json", "rows": "]["}, "JMESPath"),
        ({"key": Extract(at="b", type="bool")}, "a key is"),
    ],
)
def test_a_declaration_that_cannot_work_is_refused(change: dict[str, object], said: str) -> None:
    plain = {f: getattr(HTML, f) for f in HTML.__struct_fields__}
    assert not list(crawl_faults((HTML,), {"item_id": "int64"}))
    first, *_ = crawl_faults((Crawl(**{**plain, **change}),), {"item_id": "int64"})  # type: ignore[arg-type]
    assert said in str(first)
