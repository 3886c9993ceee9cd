"""Goal: no document, however it is nested, holds the crawler up, and a bad part costs itself alone. Method: hostile
documents, and a bound on the CPU time that they take."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from protego import Protego

from headrace.contract.crawl import Crawl, Extract
from headrace.ingest.crawl.extract import Document, Extracted, extract
from headrace.ingest.crawl.markup import NESTED_MAX
from headrace.ingest.crawl.politeness import own_rules

CPU_S_MAX = 5.0
"""Each takes well below a second; before it was bounded, 9 s to many minutes."""


FEED = Crawl(
    name="shop", kind="feed", joins="item_id", start=("https://shop.example/",), key=Extract(at="::attr(id)"),
    fields={"p": Extract(at="::text")},
)  # fmt: skip


def crawl_of(kind: str, rows: str) -> Crawl:
    at = {"html": ("::attr(id)", ".p::text"), "json": ("id", "n")}[kind]
    return Crawl(
        name="shop", kind=kind, joins="item_id", start=("https://shop.example/",), rows=rows,
        key=Extract(at=at[0]), fields={"p": Extract(at=at[1])},
    )  # type: ignore[arg-type]  # fmt: skip


def quickly(body: bytes, crawl: Crawl, *, sitemap: bool = False) -> Extracted:
    began_s = time.process_time()
    found = extract(Document("https://shop.example/", body, sitemap=sitemap), crawl)
    assert time.process_time() - began_s < CPU_S_MAX
    return found


def test_rows_in_rows_are_read_to_a_bound_and_counted_beyond_it() -> None:
    nested = "".join(f"<div id={n}><i class=p>{n}</i>" for n in range(2_000)) + "</div>" * 2_000
    found = quickly(f"{nested}<div id=after></div>".encode(), crawl_of("html", "div"))
    assert [row.key for row in found.rows] == [*map(str, range(NESTED_MAX + 1)), "after"]
    assert found.left_out == {"too_many": 1_999 - NESTED_MAX}


def test_addresses_in_addresses_of_a_sitemap_are_read_to_the_same_bound() -> None:
    inner = "".join(f"<url><loc>https://shop.example/{n}</loc>" for n in range(2_000)) + "</url>" * 2_000
    found = quickly(f"<urlset>{inner}</urlset>".encode(), crawl_of("html", "div"), sitemap=True)
    assert len(found.links) == NESTED_MAX + 1
    assert found.left_out == {"too_many": 1_999 - NESTED_MAX}


def test_a_page_whose_search_could_take_minutes_is_broken() -> None:
    body = "<div class=a>" * 2_000 + "<b class=r id=x></b>" * 20_000
    assert quickly(body.encode(), crawl_of("html", ".a .r")).left_out == {"broken": 1}


def test_a_large_page_as_shops_write_them_is_read() -> None:
    item = "<div class=r id={}><div><div><a href=/x><span><i class=p>7</i></span></a></div></div></div>"
    page = "<main class=a><div><section><div>" + "".join(item.format(n) for n in range(15_000))
    assert len(extract(Document("https://shop.example/", page.encode()), crawl_of("html", ".a .r")).rows) == 15_000


@pytest.mark.parametrize("deep", [lambda n: "[" * n + "]" * n, lambda n: '{"a":' * n + "1" + "}" * n])
@pytest.mark.parametrize("before", ["", "NaN,"])
def test_a_json_row_that_is_nested_too_deeply_costs_itself_alone(deep: Callable[[int], str], before: str) -> None:
    rows = f'[{before}{{"id": "a", "n": "x"}}, {{"id": "b", "n": {deep(100_000)}}}, {{"id": "c", "n": "[{{"}}]'
    found = quickly(rows.encode(), crawl_of("json", "@"))
    values = {row.key: json.loads(row.values)["p"] for row in found.rows}
    assert values == {"a": "x", "b": None, "c": "[{"}


@pytest.mark.parametrize("torn", ["[" * 100_000, "[" * 2_000 + '"' + '\\"' * 300_000, "[" * 2_000 + "]" * 1_000])
def test_torn_json_stays_broken_and_takes_no_time(torn: str) -> None:
    assert quickly(torn.encode(), crawl_of("json", "@")).left_out == {"broken": 1}


AGENTS = ["headrace", "HeadRace", "head", "head*", "*", "race", "other", "me", "*x*", "bot"]
LINES = st.one_of(
    st.builds("User-agent{}{}".format, st.sampled_from([":", ": ", " "]), st.sampled_from(AGENTS)),
    st.builds("{}: /{}".format, st.sampled_from(["Allow", "Disallow"]), st.sampled_from("ab")),
    st.sampled_from(["", "# x", "Crawl-delay: 2", "Sitemap: /s", "user agent: headrace # me", "nonsense"]),
)


@example(["User-agent:head", "Disallow: /a", "User-agent:head*", "Disallow: /b"], "headrace")
@given(st.lists(LINES, max_size=12), st.sampled_from(["headrace", "headrace (+mailto:me@example.org)", "big-bot/2"]))
def test_rules_of_other_agents_change_nothing(lines: list[str], agent: str) -> None:
    whole, own = (
        Protego.parse(text) for text in ("\n".join(lines), own_rules("\n".join(lines).encode(), agent).decode())
    )
    for path in ("/", "/a", "/b"):
        assert own.can_fetch(path, agent) == whole.can_fetch(path, agent)
    assert own.crawl_delay(agent) == whole.crawl_delay(agent)


def test_what_is_nested_too_deeply_to_be_read_whole_is_refused_by_name() -> None:
    """libxml2 left what follows out, and after a hundred other errors it did not even say so to itself."""
    after, bad = "<i id=last></i>", "<b>&bad;</b>" * 300
    for kind, wrong in (("html", ""), ("html", bad), ("feed", ""), ("feed", bad)):
        crawl = Crawl(**{**{f: getattr(FEED, f) for f in FEED.__struct_fields__}, "kind": kind, "rows": "i"})
        for depth, left_out in ((1_900, {}), (2_100, {"too_deep": 1}), (50_000, {"too_deep": 1})):
            body = f"<r>{wrong}{'<u>' * depth}{'</u>' * depth}{after.replace('last', chr(34) + 'last' + chr(34))}</r>"
            found = quickly(body.encode(), crawl)
            assert (found.left_out, [row.key for row in found.rows]) == (left_out, [] if left_out else ["last"])
    deep = "<urlset>" + "<url>" * 3_000 + "<loc>https://shop.example/x</loc>"
    assert quickly(deep.encode(), FEED, sitemap=True).left_out == {"too_deep": 1}


@pytest.mark.parametrize(
    "charset", ["hex", "rot13", "zip", "undefined", "punycode", "idna", "nonsense", "\x00", "utf-7"]
)
@pytest.mark.parametrize("where", ["header", "meta"])
def test_a_character_set_that_is_none_costs_no_more_than_its_page(charset: str, where: str) -> None:
    meta = f'<meta charset="{charset}">' if where == "meta" else ""
    body = f"{meta}<i id=a class=p>x</i>".encode()
    header = f"text/html; charset={charset}" if where == "header" else ""
    found = extract(Document("https://shop.example/", body, header), crawl_of("html", "i"))
    assert [row.key for row in found.rows] == ["a"]
