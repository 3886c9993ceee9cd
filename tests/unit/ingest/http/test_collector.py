"""Goal: 200 means that Kafka has every event, each once; everything else is refused with the next step. Method: a
real gateway and collector on loopback sockets, driven by httpx and by raw bytes; Kafka is a log in memory."""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgpack
import pytest
from collector_world import Site, site
from gateway_world import Authority

from headrace.contract.errors import ConfigRejected
from headrace.ingest.gateway.late_events import LateEvents
from headrace.ingest.http import collector
from headrace.ingest.http.access import Origins, Tokens, read_tokens
from headrace.process import http_bounds

JSON, LINES, PACKED = "application/json", "application/x-ndjson", "application/msgpack"


@pytest.fixture(scope="module")
def open_site() -> Iterator[Site]:
    """One collector for the tests that do not hold its Kafka back."""
    with site(collector_bytes_max=200_000) as made:
        yield made


_NUMBERS = iter(range(1_000_000))


def event(**more: Any) -> dict[str, Any]:
    """Return a good impression with an id of its own."""
    n = next(_NUMBERS)
    return {
        "tag": "shop.impression",
        "event_id": f"e{n}",
        "request_id": f"r{n}",
        "user_id": n % 7,
        "item_id": n,
        **more,
    }


def send(made: Site, body: bytes | str, kind: str = JSON, query: str = "", **headers: str) -> httpx.Response:
    named = {"Content-Type": kind, **{name.replace("_", "-"): value for name, value in headers.items()}}
    return httpx.post(f"{made.url}/v1/events{query}", content=body, headers=named, timeout=60)


def until(true: Callable[[], bool]) -> None:
    """Wait for what a running thread will do; the test's own time limit is the only one."""
    while not true():
        time.sleep(0.005)


def outcome(appended: int = 0, dead_lettered: int = 0, repeated: int = 0) -> dict[str, int]:
    return {"appended": appended, "dead_lettered": dead_lettered, "repeated": repeated}


FORMS: list[tuple[str, Callable[[list[Any]], bytes]]] = [
    (JSON, lambda events: json.dumps(events).encode()),
    (JSON + "; charset=UTF-8", lambda events: b"\xef\xbb\xbf" + json.dumps(events, ensure_ascii=False).encode()),
    (LINES, lambda events: b"\r\n".join(json.dumps(one).encode() for one in events) + b"\n\n"),
    (PACKED, msgpack.packb),
    ("application/x-msgpack", msgpack.packb),
    ("text/plain;charset=UTF-8", lambda events: json.dumps(events).encode()),
    ("text/plain", lambda events: b"\n".join(json.dumps(one).encode() for one in events)),
    ("", lambda events: json.dumps(events).encode()),
]


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize(("kind", "form"), FORMS, ids=[f"{n}-{kind}" for n, (kind, _) in enumerate(FORMS)])
def test_every_form_of_a_body_is_appended(
    open_site: Site, kind: str, form: Callable[[list[Any]], bytes], packed: bool
) -> None:
    events = [event(title="naïve \U0001f600"), event(price=1.5, new=True), event(tag="shop.click")]
    body = form(events)
    answer = (
        send(open_site, gzip.compress(body), kind, Content_Encoding="gzip") if packed else send(open_site, body, kind)
    )
    assert (answer.status_code, answer.json()) == (200, outcome(appended=3))
    rows = {row["event_id"]: row for row in open_site.log.rows()}
    first, second, third = (rows[one["event_id"]] for one in events)
    assert first["title"] == "naïve \U0001f600"
    assert (second["price"], second["new"], second["_kind"]) == (1.5, True, "impression")
    assert (third["_type"], third["item_id"]) == ("click", events[2]["item_id"])


def test_one_event_alone_and_none_at_all(open_site: Site) -> None:
    assert send(open_site, json.dumps(event())).json() == outcome(appended=1)
    assert send(open_site, msgpack.packb(event()), PACKED).json() == outcome(appended=1)
    assert send(open_site, "[]").json() == send(open_site, "", LINES).json() == outcome()


@pytest.mark.parametrize(
    ("time_value", "expected_ms"),
    [
        (1_700_000_000, 1_700_000_000_000),
        (1_700_000_000.25, 1_700_000_000_250),
        (1_700_000_000_123, 1_700_000_000_123),
        (1_700_000_000_123_456, 1_700_000_000_123),
        (1_700_000_000_123_456_789, 1_700_000_000_123),
        ("2023-11-14T22:13:20.5Z", 1_700_000_000_500),
        ("2023-11-14T23:13:20.123456789+01:00", 1_700_000_000_123),
    ],
)
def test_time_comes_in_the_forms_that_apps_have(open_site: Site, time_value: Any, expected_ms: int) -> None:
    one = event(time=time_value)
    assert send(open_site, json.dumps(one)).json() == outcome(appended=1)
    (row,) = (row for row in open_site.log.rows() if row["event_id"] == one["event_id"])
    assert row["event_time_ms"] == expected_ms


@pytest.mark.parametrize("off_ms", [300_000, -300_000, -86_400_000, 1_000])
@pytest.mark.parametrize("where", ["query", "event", "time"])
def test_a_wrong_clock_is_corrected_by_sent_at(open_site: Site, off_ms: int, where: str) -> None:
    true_ms = time.time_ns() // 10**6
    happened = {"event_time_ms": true_ms - 700 + off_ms}
    sent_at = true_ms + off_ms
    if where == "time":
        happened = {"time": happened["event_time_ms"] / 1000}
    beside = {} if where == "query" else {"sent_at": sent_at}
    one = event(**happened, **beside)
    query = f"?sent_at={sent_at}" if where == "query" else ""
    assert send(open_site, json.dumps(one), query=query).json() == outcome(appended=1)
    (row,) = [row for row in open_site.log.rows() if row["event_id"] == one["event_id"]]
    late_ms = row["event_time_ms"] - (true_ms - 700)
    # Up to 2 s may be the request's way: nothing is corrected then.
    assert abs(late_ms - off_ms) <= 1 if abs(off_ms) < 1_500 else -1 <= late_ms < 20_000


def test_a_sent_at_that_cannot_be_read_is_told(open_site: Site) -> None:
    for query, more in (("?sent_at=noon", {}), ("", {"sent_at": True}), ("", {"sent_at": -1})):
        answer = send(open_site, json.dumps(event(**more)), query=query)
        assert answer.status_code == 400
        assert "sent_at" in answer.json()["error"]


def test_fields_called_tag_or_time_go_under_record(open_site: Site) -> None:
    sent = {"tag": "shop.cart", "time": 1_700_000_000.5, "record": {"tag": "red", "time": "noon", "record": {"a": 1}}}
    assert send(open_site, json.dumps(sent)).json() == outcome(dead_lettered=1)
    letter = open_site.log.letters()[-1]
    assert (letter.reason, letter.tag, letter.time_ns) == ("undeclared", "shop.cart", 1_700_000_000_500_000_000)
    assert msgpack.unpackb(letter.raw) == sent["record"]


def test_a_bad_event_is_a_dead_letter_and_its_neighbours_are_appended(open_site: Site) -> None:
    bad = event(item_id="seven")
    assert send(open_site, json.dumps([event(), bad, event()])).json() == outcome(appended=2, dead_lettered=1)
    letter = open_site.log.letters()[-1]
    assert (letter.reason, letter.origin, letter.event_id) == ("bad_type", "127.0.0.1", bad["event_id"])


@pytest.mark.parametrize(
    ("text", "appended"),
    [
        ('"price": NaN', 0),
        ('"price": Infinity', 0),
        ('"price": 1e999', 0),
        ('"place": 123456789012345678901234567890', 0),
        ('"price": 18446744073709551616', 0),
        ('"title": "half \\ud83d of it"', 1),
        ('"title": "a", "title": "b"', 1),
        (f'"unknown": {"[" * 99}{"]" * 99}', 1),
        (f'"unknown": {"[" * 300}{"]" * 300}', 0),
        (f'"title": {"[" * 800}{"]" * 800}', 0),
    ],
)
def test_what_some_clients_write_costs_at_most_their_own_event(open_site: Site, text: str, appended: int) -> None:
    bad = json.dumps(event())[:-1] + f", {text}}}"
    answer = send(open_site, f"[{json.dumps(event())}, {bad}]")
    assert (answer.status_code, answer.json()) == (200, outcome(appended=1 + appended, dead_lettered=1 - appended))


def bomb(size: int) -> bytes:
    return gzip.compress(b" " * size)


REFUSED: list[tuple[str, bytes, str, dict[str, str], int]] = [
    ("no JSON", b"{", JSON, {}, 400),
    ("nothing", b"", JSON, {}, 400),
    ("two values", b"{} {}", JSON, {}, 400),
    ("not UTF-8", b'{"tag": "\xff"}', JSON, {}, 400),
    ("too deep", b"[" * 100_000, JSON, {}, 400),
    ("a number of 9,000 digits", b'{"tag": "a", "b": ' + b"9" * 9_000 + b"}", JSON, {}, 400),
    ("one line is no JSON", b'{"tag": "a"}\n{"tag":\n', LINES, {}, 400),
    ("no msgpack", b"\xc1", PACKED, {}, 400),
    ("msgpack cut off", b"\xdd\xff\xff\xff\xff\x01", PACKED, {}, 400),
    ("msgpack of 1 GB", b"\xc6\x40\x00\x00\x00abc", PACKED, {}, 400),
    ("msgpack too deep", b"\x91" * 100_000, PACKED, {}, 400),
    ("msgpack with a map as a key", b"\x81\x81\x01\x01\x01", PACKED, {}, 400),
    ("msgpack and more", b"\x80\x80", PACKED, {}, 400),
    ("text, not a map", b'["a"]', JSON, {}, 400),
    ("no tag", b'[{"event_id": "1"}]', JSON, {}, 400),
    ("an empty tag", b'[{"tag": ""}]', JSON, {}, 400),
    ("a tag that is a number", b'[{"tag": 5}]', JSON, {}, 400),
    ("a long tag", b'[{"tag": "' + b"a" * 600 + b'"}]', JSON, {}, 400),
    ("a time without zone", b'[{"tag": "a", "time": "2023-11-14T22:13:20"}]', JSON, {}, 400),
    ("a time that never was", b'[{"tag": "a", "time": "2023-02-30T22:13:20Z"}]', JSON, {}, 400),
    ("a time before time", b'[{"tag": "a", "time": -1}]', JSON, {}, 400),
    ("no gzip", b"plain", JSON, {"Content-Encoding": "gzip"}, 400),
    ("gzip cut off", gzip.compress(b"{}")[:-9], JSON, {"Content-Encoding": "gzip"}, 400),
    ("a bomb", bomb(50_000_000), JSON, {"Content-Encoding": "gzip"}, 413),
    ("too large", b" " * 200_001, JSON, {}, 413),
    ("too many", b"[" + b"{}," * 10_000 + b"{}]", JSON, {}, 413),
    ("brotli", b"{}", JSON, {"Content-Encoding": "br"}, 415),
    ("a form", b"a=b", "application/x-www-form-urlencoded", {}, 415),
    ("Latin", b"{}", JSON + "; charset=latin-1", {}, 415),
    ("a key with a tab", b"[]", JSON, {"Idempotency-Key": "a\tb"}, 400),
    ("a long key", b"[]", JSON, {"Idempotency-Key": "k" * 256}, 400),
]


@pytest.mark.parametrize(
    ("body", "kind", "headers", "status"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
def test_what_cannot_be_read_is_refused_whole_with_the_next_step(
    open_site: Site, body: bytes, kind: str, headers: dict[str, str], status: int
) -> None:
    before = dict(open_site.metrics.counters)
    answer = httpx.post(f"{open_site.url}/v1/events", content=body, headers={"Content-Type": kind, **headers})
    told = answer.json()
    assert answer.status_code == status, told
    assert set(told) == {"error", "next"}
    assert all(told.values())
    key = ("requests_total", str(status))
    assert open_site.metrics.counters[key] == before.get(key, 0) + 1
    assert open_site.metrics.total("events_read_total") == sum(
        value for (name, _), value in before.items() if name == "events_read_total"
    )
    assert send(open_site, json.dumps(event())).json() == outcome(appended=1), "the collector goes on"


def test_the_events_ids_and_the_key_count_once_however_often_they_come(open_site: Site) -> None:
    one = json.dumps(event())
    assert send(open_site, one).json() == outcome(appended=1)
    assert send(open_site, one).json() == outcome(repeated=1)
    nameless = json.dumps([{name: value for name, value in event().items() if name != "event_id"} for _ in range(3)])
    assert send(open_site, nameless, Idempotency_Key="key-1").json() == outcome(appended=3)
    assert send(open_site, nameless, Idempotency_Key="key-1").json() == outcome(repeated=3)
    assert send(open_site, nameless, Idempotency_Key="key-2").json() == outcome(appended=3)
    assert send(open_site, nameless).json() == send(open_site, nameless).json() == outcome(appended=3)
    both = json.dumps([event(), event(tag="shop.click"), event(tag="shop.cart")])
    assert send(open_site, both, Idempotency_Key="key-3").json() == outcome(appended=2, dead_lettered=1)
    assert send(open_site, both, Idempotency_Key="key-3").json() == outcome(repeated=3)


def test_a_key_gives_its_events_ids_that_other_gateways_know() -> None:
    nameless = json.dumps([{"tag": "shop.impression", "request_id": "r", "user_id": 1, "item_id": n} for n in range(2)])
    found = []
    for _ in range(2):
        with site() as made:
            assert send(made, nameless, Idempotency_Key="0b2f").json() == outcome(appended=2)
            found.append(made.ids())
    assert found[0] == found[1] == ["http/0b2f/0", "http/0b2f/1"]


def test_no_answer_before_kafka_has_it_and_a_client_that_leaves_loses_nothing() -> None:
    with site() as made:
        made.log.away = True
        one, two = event(), event()
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{made.url}/v1/events", json=one, timeout=0.5)
        answers: list[httpx.Response] = []
        again = threading.Thread(target=lambda: answers.append(send(made, json.dumps([one, two]))))
        again.start()
        until(lambda: made.metrics.gauges.get(("requests_open", ""), 0) >= 2)
        assert not answers
        assert made.log.rows() == []
        made.log.away = False
        again.join()
        assert answers[0].json() == outcome(appended=1, repeated=1)
        assert sorted(made.ids()) == sorted([one["event_id"], two["event_id"]])


def test_a_full_gateway_takes_nothing_until_it_holds_less() -> None:
    with site(buffer_bytes_max=2_000, collector_bytes_max=100_000) as made:
        made.log.away = True
        held = threading.Thread(target=lambda: send(made, json.dumps([event(title="x" * 5_000)])))
        held.start()
        until(lambda: made.paused)
        refused = send(made, json.dumps(event()))
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        made.log.away = False
        held.join()
        one = json.dumps(event())
        until(lambda: send(made, one).status_code == 200)
        assert len(made.ids()) == 2


def test_beyond_the_ceiling_of_dead_letters_the_client_keeps_its_events() -> None:
    with site(dead_letter_events_min=20, dead_letter_probe_ms=60_000) as made:
        bad = [event(item_id="seven") for _ in range(30)]
        assert send(made, json.dumps(bad)).json() == outcome(dead_lettered=30)
        refused = send(made, json.dumps([event(), event(tag="shop.click")]))
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "60")
        assert "shop.impression" in refused.json()["error"]
        assert made.ids() == [], "all of a request or nothing: it is sent again, perhaps without ids"
        assert send(made, json.dumps(event(tag="shop.click"))).json() == outcome(appended=1), "another tag goes on"
        assert made.ids("impression") == []


def test_late_events_stay_with_the_client_while_as_many_wait_as_may() -> None:
    full = LateEvents(3_600_000, waiting_max=1)
    full.wait(1, 0)
    with site(late=full, dead_letter_probe_ms=60_000) as made:
        late = event(event_time_ms=time.time_ns() // 10**6 - 7_200_000)
        refused = send(made, json.dumps([event(tag="shop.click"), late]))
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "60")
        assert "late events wait" in refused.json()["error"] and "shop.impression" in refused.json()["error"]
        assert made.ids() == [] and made.log.letters() == [], "all of a request or nothing"
        assert send(made, json.dumps(event())).json() == outcome(appended=1), "what is in time is taken"
        full.wait(0, 0)
        assert send(made, json.dumps(late)).json() == outcome(dead_lettered=1), "and the late one once there is room"


def test_it_speaks_tls_where_the_gateway_does(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("gateway")
    with site(tls_cert=str(cert), tls_key=str(key)) as made:
        url = f"https://localhost:{made.port}/v1/events"
        assert httpx.post(url, json=event(), verify=authority.client()).json() == outcome(appended=1)
        page = {"Origin": f"https://localhost:{made.port}"}
        assert httpx.post(url, json=event(), verify=authority.client(), headers=page).status_code == 200
        first = ssl.get_server_certificate(("127.0.0.1", made.port))
        authority.issue("gateway")
        made.renew()
        assert ssl.get_server_certificate(("127.0.0.1", made.port)) != first
        assert httpx.post(url, json=event(), verify=authority.client()).json() == outcome(appended=1)
        assert len(made.ids()) == 3


def test_requests_have_a_bound_and_none_is_dropped() -> None:
    with site(collector_requests_max=2) as made:
        made.log.away = True
        answers: list[httpx.Response] = []
        threads = [
            threading.Thread(target=lambda: answers.append(send(made, json.dumps(event()), Connection="close")))
            for _ in range(5)
        ]
        for thread in threads:
            thread.start()
        until(lambda: len(answers) == 3)
        assert {answer.status_code for answer in answers} == {503}
        made.log.away = False
        for thread in threads:
            thread.join()
        assert sorted(answer.status_code for answer in answers) == [200, 200, 503, 503, 503]
        assert len(made.ids()) == 2


def test_at_the_end_what_has_begun_is_answered_and_nothing_new_is_taken() -> None:
    made = Site()
    made.log.away = True
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(send(made, json.dumps(event()))))
    thread.start()
    until(lambda: made.metrics.gauges.get(("buffer_bytes", ""), 0) > 0)
    made.stop.set()
    until(lambda: refuses(made))
    made.log.away = False
    thread.join()
    made.end()
    assert answers[0].json() == outcome(appended=1)
    assert all(promise.bye for _, _, promise in made.log.promises()[-4:])


def test_at_the_end_what_kafka_does_not_confirm_is_to_be_sent_again() -> None:
    made = Site()
    made.log.away = True
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(send(made, json.dumps(event()))))
    thread.start()
    until(lambda: made.metrics.gauges.get(("buffer_bytes", ""), 0) > 0)
    made.end()
    thread.join()
    assert (answers[0].status_code, answers[0].headers["Retry-After"]) == (503, "1")


def refuses(made: Site) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", made.port)) != 0


def test_a_token_is_asked_for_and_never_told(caplog: pytest.LogCaptureFixture) -> None:
    secret, other = "s3cret-token-of-ours", "another-secret-token"
    with caplog.at_level(logging.DEBUG), site((secret, other)) as made:
        body = json.dumps(event())
        assert send(made, body, Authorization=f"Bearer {secret}").status_code == 200
        assert send(made, body, Authorization=f"bearer  {other}").status_code == 200
        assert send(made, body, query=f"?token={secret}").status_code == 200
        for headers, query in [
            ({}, ""),
            ({"Authorization": "Bearer wrong-but-secret"}, ""),
            ({"Authorization": "Basic " + secret}, ""),
            ({}, "?token=wrong-but-secret"),
            ({}, f"?token={secret[:-1]}"),
            ({"Authorization": "Bearer wrong-but-secret"}, f"?token={secret}"),
        ]:
            answer = send(made, body, query=query, **headers)
            assert (answer.status_code, "WWW-Authenticate" in answer.headers) == (401, True)
            assert "secret" not in answer.text
        with socket.create_connection(("127.0.0.1", made.port)) as raw:
            raw.sendall(f"GET /v1/events?token={secret} HTTP/9\r\nbroken\r\n\r\n".encode())
            assert b"400" in raw.recv(1_000)
        assert made.metrics.counters["requests_total", "401"] == 6
        assert made.metrics.counters["connections_refused_total", "http_401"] == 6
        assert made.metrics.counters["connections_refused_total", "no_http"] == 1
    ours = [r.getMessage() for r in caplog.records if not r.name.startswith(("httpx", "httpcore", "asyncio"))]
    assert any("no known token" in line for line in ours)
    assert not any("secret" in line for line in ours)


def test_tokens_are_read_and_a_short_one_is_refused_unsaid() -> None:
    assert read_tokens("") == ()
    assert read_tokens(" first-token,\nsecond-token ") == ("first-token", "second-token")
    with pytest.raises(ConfigRejected, match="entry 2 has 5 characters") as refusal:
        read_tokens("first-token,short")
    assert "short" not in str(refusal.value).replace("HEADRACE", "")
    assert not Tokens(())
    assert not Tokens(("first-token",)).accepts("Bearer", "")


def test_without_a_token_it_is_open_on_loopback_only(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "headrace.ingest"):
        made = Site(host="0.0.0.0")
        made.end()
    assert "listens on 127.0.0.1, not 0.0.0.0" in caplog.text
    assert "no HEADRACE_TOKENS" in caplog.text


def test_pages_of_named_origins_may_send_and_others_may_not() -> None:
    shop, evil = "https://www.shop.example", "https://evil.example"
    with site(cors_origins=("https://*.shop.example",)) as made:
        url = f"{made.url}/v1/events"
        asked = {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "content-type, authorization",
        }
        allowed = httpx.options(
            url, headers={"Origin": shop, **asked, "Access-Control-Request-Private-Network": "true"}
        )
        assert allowed.status_code == 204
        assert allowed.headers["Access-Control-Allow-Origin"] == shop
        assert "POST" in allowed.headers["Access-Control-Allow-Methods"]
        assert "authorization" in allowed.headers["Access-Control-Allow-Headers"]
        assert allowed.headers["Access-Control-Allow-Private-Network"] == "true"
        assert httpx.options(url, headers={"Origin": evil, **asked}).status_code == 403
        taken = send(made, json.dumps(event()), "text/plain", Origin=shop)
        assert (taken.status_code, taken.headers["Access-Control-Allow-Origin"]) == (200, shop)
        assert taken.headers["Access-Control-Allow-Credentials"] == "true"
        assert taken.headers["Vary"] == "Origin"
        unread = send(made, "{", "text/plain", Origin=shop)
        assert (unread.status_code, unread.headers["Access-Control-Allow-Origin"]) == (400, shop)
        for origin in (evil, "null", "https://shop.example.evil.example", "http://www.shop.example"):
            refused = send(made, json.dumps(event()), "text/plain", Origin=origin)
            assert (refused.status_code, "Access-Control-Allow-Origin" in refused.headers) == (403, False)
        assert send(made, json.dumps(event()), "text/plain", Origin=made.url).status_code == 200, "its own page"
        assert len(made.ids()) == 2


def test_origins_are_patterns() -> None:
    assert Origins(("*",)).accepts("null", "http", "h")
    assert Origins(("https://a.example/",)).accepts("https://A.example", "http", "h")
    local = Origins(("http://localhost:*",))
    assert local.accepts("http://localhost:3000", "http", "h")
    assert not local.accepts("http://localhost.evil.example", "http", "h")
    assert not Origins(()).accepts("http://x", "http", "h")


def test_a_connection_is_kept_and_answers_come_in_order(open_site: Site) -> None:
    bodies = [json.dumps(event()), "{", json.dumps([event(), event()])]
    requests = b"".join(
        b"POST /v1/events HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
        % (len(body), body.encode())
        for body in bodies
    )
    with socket.create_connection(("127.0.0.1", open_site.port)) as raw:
        raw.sendall(requests)
        seen = b""
        while seen.count(b"HTTP/1.1 ") < 3 or b'"appended":2' not in seen:
            seen += raw.recv(4_096)
    assert re.findall(rb"HTTP/1.1 (\d+)", seen) == [b"200", b"400", b"200"]


def test_connections_have_a_bound_and_an_idle_one_gives_way() -> None:
    with site(collector_connections_max=3) as made:
        idle = [socket.create_connection(("127.0.0.1", made.port)) for _ in range(3)]
        until(lambda: send(made, json.dumps(event())).status_code == 200)
        assert made.metrics.counters["connections_refused_total", "idle"] >= 1
        for one in idle:
            one.close()


def test_headers_and_bodies_that_come_drop_by_drop_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_bounds, "HEADERS_S", 0.2)
    monkeypatch.setattr(collector, "_BODY_S", 0.2)
    with site() as made:
        with socket.create_connection(("127.0.0.1", made.port)) as slow:
            slow.sendall(b"POST /v1/events HTTP/1.1\r\nHost:")
            with contextlib.suppress(ConnectionResetError):
                assert slow.recv(100) == b""
        with socket.create_connection(("127.0.0.1", made.port)) as slow:
            slow.sendall(b"POST /v1/events HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\n[")
            assert b" 408 " in slow.recv(1_000)
        assert made.metrics.counters["connections_refused_total", "headers_timeout"] >= 1


def test_where_every_connection_waits_for_kafka_a_new_one_is_refused() -> None:
    with site(collector_connections_max=1) as made:
        made.log.away = True
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: answers.append(send(made, json.dumps(event()))))
        thread.start()
        until(lambda: made.metrics.gauges.get(("buffer_bytes", ""), 0) > 0)
        with pytest.raises(httpx.TransportError):
            send(made, json.dumps(event()))
        assert made.metrics.counters["connections_refused_total", "connections_max"] == 1
        made.log.away = False
        thread.join()
        assert answers[0].json() == outcome(appended=1)


def test_a_body_that_never_ends_is_refused_and_a_wrong_place_is_told(open_site: Site) -> None:
    with socket.create_connection(("127.0.0.1", open_site.port)) as raw:
        raw.sendall(b"POST /v1/events HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n")
        raw.sendall(b"Content-Length: 99999999999\r\n\r\n[")
        seen = b""
        while piece := raw.recv(4_096):
            seen += piece
    assert b" 413 " in seen
    assert b"Connection: close" in seen or b"connection: close" in seen
    wrong = httpx.get(f"{open_site.url}/v1/events")
    assert (wrong.status_code, set(wrong.json())) == (405, {"error", "next"})
    assert httpx.get(f"{open_site.url}/nowhere").status_code == 404


def test_it_documents_itself(open_site: Site) -> None:
    page = httpx.get(f"{open_site.url}/")
    assert page.headers["Content-Type"].startswith("text/html")
    assert not re.search(r"<[^>]+(src|href)=\"(https?:)?//", page.text), "nothing is fetched from elsewhere"
    assert httpx.get(f"{open_site.url}/docs").text == page.text
    document = httpx.get(f"{open_site.url}/openapi.json").json()
    assert set(document["paths"]) == {"/v1/events", "/v1/headrace.js", "/openapi.json"}
    snippet = httpx.get(f"{open_site.url}/v1/headrace.js")
    assert snippet.headers["Content-Type"].startswith("text/javascript")
    again = httpx.get(f"{open_site.url}/v1/headrace.js", headers={"If-None-Match": snippet.headers["ETag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_a_port_that_is_taken_is_told_with_the_remedy(open_site: Site) -> None:
    with pytest.raises(ConfigRejected, match="PORT_BASE"):
        Site(port=open_site.port).join()
