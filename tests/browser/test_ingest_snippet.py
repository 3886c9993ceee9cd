"""Goal: an event that a page tracked is appended once, whatever happens to page, browser or network. Method: a real
Chromium runs the snippet against a real collector; pages come from a server of another origin; Kafka is a log in
memory that can be held back."""

from __future__ import annotations

import http.server
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from collector_world import Site, free_port, site

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: make install of the dev extra"
)

CHROMIUM = shutil.which("chromium")
SNIPPET = Path(__file__).resolve().parents[2] / "ingest" / "http" / "headrace.js"
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH; Debian, Ubuntu: apt-get install -y chromium"),
    # The snippet waits seconds by design, and a busy machine starts Chromium in a minute.
    pytest.mark.timeout(240),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=120_000)
        yield chromium
        chromium.close()


@pytest.fixture
def context(browser: Any) -> Iterator[Any]:
    """A browser profile of its own."""
    made = browser.new_context()
    made.set_default_timeout(60_000)
    yield made
    made.close()


class Pages:
    """A web server of its own origin: every path is a page with the snippet, or the snippet itself."""

    def __init__(self) -> None:
        self.html = b""
        pages = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                is_script = self.path.endswith(".js")
                body = SNIPPET.read_bytes() if is_script else pages.html
                self.send_response(200)
                self.send_header("Content-Type", "text/javascript" if is_script else "text/html")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def show(self, script: str, before: str = "", **options: Any) -> None:
        """Serve a page that loads the snippet from `script`."""
        data = " ".join(f'data-{name.replace("_", "-")}="{value}"' for name, value in options.items())
        self.html = f'<script>{before}</script><script src="{script}" {data}></script><p>page</p>'.encode()

    def end(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def pages() -> Iterator[Pages]:
    made = Pages()
    yield made
    made.end()


def snippet_of(made: Site) -> str:
    return f"{made.url}/v1/headrace.js"


def track(page: Any, count: int, first: int = 0) -> list[str]:
    """Track impressions in the page; return their ids."""
    return list(
        page.evaluate(
            """([count, first]) => Array.from({length: count}, (_, n) => headrace.track("shop.impression",
                {request_id: "r" + (first + n), user_id: n % 7, item_id: first + n}))""",
            [count, first],
        )
    )


def stats(page: Any) -> dict[str, int]:
    return dict(page.evaluate("headrace.stats()"))


def stored(page: Any) -> int:
    return int(page.evaluate("Object.keys(localStorage).filter(key => key.startsWith('headrace:http')).length"))


def until(true: Callable[[], bool]) -> None:
    """Wait for what browser and collector will do; the test's time limit is the only one."""
    while not true():
        time.sleep(0.02)


def each_once(made: Site, ids: list[str]) -> None:
    until(lambda: set(made.ids()) >= set(ids))
    assert sorted(made.ids()) == sorted(ids)


def test_a_page_of_another_origin_sends_batches_in_order(context: Any, pages: Pages) -> None:
    with site(("a-token-of-pages",)) as made:
        early = (
            "window.headrace = window.headrace || []; headrace.push(['shop.click', {request_id: 'r0', user_id: 1}]);"
        )
        pages.show(snippet_of(made), early, token="a-token-of-pages")
        page = context.new_page()
        page.goto(pages.url)
        ids = track(page, 250)
        until(lambda: stats(page)["appended"] == 251)
        assert [row["item_id"] for row in made.log.rows("impression") if row["user_id"] == 3] == list(range(3, 250, 7))
        assert made.ids("click")
        assert sorted(made.ids("impression")) == sorted(ids)
        assert 3 <= made.metrics.counters["requests_total", "200"] <= 6, "100 events or 16,000 characters a batch"
        assert (stats(page)["waiting"], stored(page)) == (0, 0)


def test_a_page_that_goes_away_hands_over_by_beacon_and_its_next_visit_repeats_nothing(
    context: Any, pages: Pages
) -> None:
    with site() as made:
        pages.show(snippet_of(made), flush_ms=10_000_000)
        page = context.new_page()
        page.goto(pages.url)
        # Fewer than a full batch: that is sent at once, and gone from the store where its answer comes in time.
        ids = track(page, 90)
        page.goto("about:blank")
        each_once(made, ids)
        pages.show(snippet_of(made), flush_ms=10)
        page.goto(pages.url)
        # Nobody told the page that the beacon arrived: it sends again, and the gateway knows the ids.
        until(lambda: stats(page)["repeated"] == 90)
        assert stored(page) == 0
        each_once(made, ids)


def test_a_tab_that_is_hidden_hands_over_by_beacon(context: Any, pages: Pages) -> None:
    with site() as made:
        pages.show(snippet_of(made), flush_ms=10_000_000)
        page = context.new_page()
        page.goto(pages.url)
        ids = track(page, 3)
        page.evaluate(
            """() => { Object.defineProperty(document, "visibilityState", {value: "hidden"});
                       document.dispatchEvent(new Event("visibilitychange")); }"""
        )
        each_once(made, ids)


def test_offline_then_online(context: Any, pages: Pages) -> None:
    with site() as made:
        pages.show(snippet_of(made), flush_ms=10, backoff_ms=10)
        page = context.new_page()
        page.goto(pages.url)
        context.set_offline(True)
        ids = track(page, 5)
        until(lambda: stored(page) == 5)
        page.wait_for_timeout(300)
        assert made.ids() == []
        context.set_offline(False)
        each_once(made, ids)
        until(lambda: stored(page) == 0)


def test_a_full_gateway_is_asked_again_until_it_takes_the_events(context: Any, pages: Pages) -> None:
    with site(buffer_bytes_max=2_000) as made:
        made.log.away = True
        pages.show(snippet_of(made), flush_ms=0, backoff_ms=10)
        first, second = context.new_page(), context.new_page()
        first.goto(pages.url)
        second.goto(pages.url)
        ids = list(
            first.evaluate("""() => [headrace.track("shop.impression",
                {request_id: "big", user_id: 1, item_id: 1, title: "x".repeat(5000)})]""")
        )
        until(lambda: made.paused)
        ids += track(second, 3)
        until(lambda: stats(second)["retries"] >= 2)
        assert made.metrics.counters["requests_total", "503"] >= 2
        made.log.away = False
        each_once(made, ids)
        until(lambda: stats(second)["waiting"] == 0)


def test_a_reload_takes_up_the_queue_and_an_answer_that_got_lost_counts_nothing_twice(
    context: Any, pages: Pages
) -> None:
    with site() as made:
        made.log.away = True
        pages.show(snippet_of(made), flush_ms=0, backoff_ms=10)
        page = context.new_page()
        page.goto(pages.url)
        ids = track(page, 5)
        until(lambda: made.metrics.gauges.get(("requests_open", ""), 0) >= 1)
        page.reload()
        ids += track(page, 5, first=5)
        made.log.away = False
        each_once(made, ids)
        until(lambda: stored(page) == 0)
        each_once(made, ids)


def test_a_collector_that_is_away_loses_nothing_over_reloads(context: Any, pages: Pages) -> None:
    port = free_port()
    options = {"endpoint": f"http://127.0.0.1:{port}/v1/events", "flush_ms": 0, "backoff_ms": 10}
    pages.show("/headrace.js", **options)
    page = context.new_page()
    page.goto(pages.url)
    ids = track(page, 3)
    until(lambda: stats(page)["retries"] > 1)
    page.reload()
    ids += track(page, 3, first=3)
    until(lambda: stats(page)["retries"] > 1)
    with site(port=port) as made:
        each_once(made, ids)
        until(lambda: stored(page) == 0)


def test_what_a_closed_tab_left_is_sent_by_another(context: Any, pages: Pages) -> None:
    port = free_port()
    options = {"endpoint": f"http://127.0.0.1:{port}/v1/events", "flush_ms": 0, "backoff_ms": 10, "adopt_ms": 200}
    pages.show("/headrace.js", **options)
    first, second = context.new_page(), context.new_page()
    first.goto(pages.url)
    ids = track(first, 3)
    until(lambda: stats(first)["retries"] > 1)
    second.goto(pages.url)
    ids += track(second, 3, first=3)
    first.close()
    with site(port=port) as made:
        each_once(made, ids)
        until(lambda: stored(second) == 0)
        assert stats(second)["dropped"] == 0


def test_one_event_that_is_refused_does_not_hold_the_others(context: Any, pages: Pages) -> None:
    with site(collector_bytes_max=3_000) as made:
        pages.show(snippet_of(made), flush_ms=200, backoff_ms=10)
        page = context.new_page()
        page.goto(pages.url)
        ids = track(page, 5)
        page.evaluate("""() => { headrace.track("shop.impression", {request_id: "r", title: "x".repeat(4000)}) }""")
        ids += track(page, 5, first=5)
        each_once(made, ids)
        until(lambda: stats(page)["refused"] == 1)
        until(lambda: stats(page)["waiting"] == 0)


def test_the_queue_has_a_bound_and_ids_do_not_need_a_secure_page(context: Any, pages: Pages) -> None:
    with site() as made:
        pages.show(snippet_of(made), "delete Crypto.prototype.randomUUID;", flush_ms=10_000_000, queue_max=3)
        page = context.new_page()
        page.goto(pages.url)
        ids = track(page, 4)
        assert ids[3] is None
        assert stats(page)["dropped"] == 1
        page.evaluate("headrace.flush()")
        each_once(made, ids[:3])
        assert all(len(one) == 36 and one[14] == "4" for one in ids[:3])


def test_a_page_that_may_not_send_keeps_its_events(context: Any, pages: Pages) -> None:
    with site(cors_origins=("https://www.shop.example",)) as made:
        pages.show(snippet_of(made), flush_ms=0, backoff_ms=10)
        page = context.new_page()
        page.goto(pages.url)
        track(page, 3)
        until(lambda: made.metrics.counters["requests_total", "403"] > 1)
        assert (made.ids(), stored(page)) == ([], 3)


@pytest.mark.parametrize(
    "how", ["localStorage.clear()", "Object.keys(localStorage).forEach(k => delete localStorage[k])"]
)
def test_a_page_that_clears_its_storage_takes_no_event_away(context: Any, pages: Pages, how: str) -> None:
    with site() as made:
        pages.show(snippet_of(made), flush_ms=10_000_000)
        page = context.new_page()
        page.goto(pages.url)
        ids = track(page, 3)
        page.evaluate(how)
        ids += track(page, 2, first=3)
        page.evaluate("headrace.flush()")
        each_once(made, ids)
        until(lambda: stats(page)["waiting"] == 0)
        assert stored(page) == 0
        assert (stats(page)["sent"], stats(page)["restored"]) == (5, 3)


def test_a_page_that_clears_its_storage_and_goes_hands_over_and_stores_again(context: Any, pages: Pages) -> None:
    with site() as made:
        pages.show(snippet_of(made), flush_ms=10_000_000)
        page = context.new_page()
        page.goto(pages.url)
        ids = track(page, 3)
        page.evaluate("localStorage.clear()")
        page.goto("about:blank")
        each_once(made, ids)
        pages.show(snippet_of(made), flush_ms=10)
        page.goto(pages.url)
        # The beacon told nobody that it arrived, so the events were stored again: they are sent, and known.
        until(lambda: stats(page)["repeated"] == 3)
        each_once(made, ids)


def test_what_another_tab_clears_is_stored_again_and_what_it_sent_is_not_sent_again(context: Any, pages: Pages) -> None:
    port = free_port()
    options = {"endpoint": f"http://127.0.0.1:{port}/v1/events", "flush_ms": 10_000_000, "adopt_ms": 200}
    pages.show("/headrace.js", **options)
    first, second = context.new_page(), context.new_page()
    first.goto(pages.url)
    second.goto(pages.url)
    ids = track(first, 3)
    second.evaluate("localStorage.clear()")
    until(lambda: stored(first) == 3)
    until(lambda: stats(second)["waiting"] == 3)  # adopted
    with site(port=port) as made:
        second.evaluate("headrace.flush()")
        each_once(made, ids)
        until(lambda: stored(second) == 0)
        first.evaluate("headrace.flush()")
        until(lambda: stats(first)["waiting"] == 0)
        assert stats(first)["sent"] == 0
        each_once(made, ids)


def test_a_full_or_blocked_storage_keeps_events_in_memory(context: Any, pages: Pages) -> None:
    with site() as made:
        pages.show(snippet_of(made), flush_ms=10)
        page = context.new_page()
        page.goto(pages.url)
        page.evaluate(
            """() => { for (let size = 4 << 20; size >= 1; size >>= 1)
                         for (let n = 0; n < 3; n++)
                           try { localStorage.setItem("f" + size + n, "x".repeat(size)) } catch { break } }"""
        )
        ids = track(page, 3)
        each_once(made, ids)
        page.evaluate(
            "() => { for (const n of ['getItem', 'setItem', 'removeItem', 'key']) "
            "Storage.prototype[n] = () => { throw new Error('blocked') } }"
        )
        ids += track(page, 3, first=3)
        each_once(made, ids)
        until(lambda: stats(page)["waiting"] == 0)
        assert (stats(page)["unstored"], stats(page)["dropped"]) == (6, 0)


def test_a_browser_without_storage_sends_from_memory(context: Any, pages: Pages) -> None:
    with site() as made:
        blocked = "Object.defineProperty(window, 'localStorage', {get() { throw new Error('denied') }});"
        pages.show(snippet_of(made), blocked, flush_ms=10)
        page = context.new_page()
        page.goto(pages.url)
        each_once(made, track(page, 3))
        until(lambda: stats(page)["waiting"] == 0)


def test_fields_that_are_no_json_are_counted_and_end_no_page(context: Any, pages: Pages) -> None:
    with site() as made:
        pages.show(snippet_of(made), flush_ms=10)
        page = context.new_page()
        page.goto(pages.url)
        circular = "(() => { const o = {}; o.o = o; return headrace.track('shop.impression', o) })()"
        assert page.evaluate(circular) is None
        assert stats(page)["dropped"] == 1
        big = "headrace.track('shop.impression', {request_id: 'r', user_id: 7n, item_id: 1n})"
        each_once(made, [page.evaluate(big)])


def test_a_browser_that_wrongly_says_offline_sends(context: Any, pages: Pages) -> None:
    with site() as made:
        wrong = "Object.defineProperty(Navigator.prototype, 'onLine', {get: () => false});"
        pages.show(snippet_of(made), wrong, flush_ms=10)
        page = context.new_page()
        page.goto(pages.url)
        each_once(made, track(page, 3))
