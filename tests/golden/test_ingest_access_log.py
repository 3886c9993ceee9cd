"""Access logs that real nginx 1.22 and Apache 2.4 wrote, read back.

Goal: each line says what its visitor sent, whatever that was. Method: the same 33 requests (quotes, UTF-8 and Latin-1,
IPv6, 20 KB lines, TLS on the plain port, a user name with brackets) went to both servers, each writing four formats at
once; what was sent is written down here, and the formats of one server must agree with each other.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.contract.errors import ConfigRejected
from headrace.contract.formats.nesting import LEVELS_MAX
from headrace.ingest.sources.access_log import (
    TooDeep,
    Variables,
    compile_format,
    cookie_value,
    plain_text,
    query_value,
    request_of,
    time_of,
)

DATA = Path(__file__).parent / "data"
FORMATS = {
    "nginx-combined": "combined",
    "nginx-custom": '$remote_addr $msec $request_id "$request" $status $body_bytes_sent $request_time "$http_referer" '
    '"$http_user_agent" "$http_cookie" "$arg_uid"',
    "nginx-json": "json",
    "nginx-none": "$remote_addr|$msec|$status|$request|$http_user_agent",
    "apache-combined": r"%h %l %u %t \"%r\" %>s %O \"%{Referer}i\" \"%{User-Agent}i\"",
    "apache-common": "common",
    "apache-vhost": "vhost_combined",
    "apache-custom": '%a %{usec}t %{UNIQUE_ID}e "%r" %>s %D "%{User-Agent}i" "%{Cookie}i" %{uid}C',
}
FIREFOX = "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0"

# What was sent, in order: method, path's segments, query, user agent (None: "-" in every log).
SENT: list[tuple[str, tuple[str, ...], str, str | None]] = [
    ("GET", ("item", "7"), "uid=3&rid=r1", FIREFOX),
    ("POST", ("click",), "uid=3&rid=r1&item=7", FIREFOX),
    ("GET", ("item", "café"), "uid=4&rid=r2&q=caf%C3%A9+noir", FIREFOX),
    ("GET", ("item", "café"), "uid=4&rid=r3&q=caf%E9", "latin1 percent"),
    ("GET", ("item", "日本"), "uid=5&rid=r4&q=zażółć", "raw utf8 ünï"),
    ("GET", ("item", "café"), "uid=6&rid=r5", "raw latin1 café"),
    ("GET", ("item", "8"), "uid=7&rid=r6", 'a "quoted" \\ back\\x41slash \\" agent'),
    ("GET", ("item", "9"), "uid=8&rid=r7", "tab\tin agent"),
    ("GET", ("item", 'a/b"?'), "uid=9&rid=r8&empty=&=x&&flag", None),
    ("GET", ("item", "10"), "uid=%2B1%2C2&rid=r9", "x"),
    ("GET", ("item", "11"), "uid=11&rid=r10", "ipv6"),
    ("GET", ("item", "12"), "uid=12&rid=r11", "v" * 9_000),
    ("GET", ("item", "13"), "uid=13&rid=r12&pad=" + "p" * 20_000, "long line"),
    ("GET", ("item", "14"), "uid=14&rid=r13", None),
    ("GET", ("item", "15"), "uid=15&rid=r14", "absolute form"),
    ("HEAD", ("item", "16"), "uid=16&rid=r15", "head"),
    ("GET", ("item", "17"), "uid=17&rid=r16", "basic"),
    ("GET", ("go",), "", "redirect"),
    ("GET", ("nothing",), "", "404"),
    ("GET", ("item", "..", "etc", "passwd"), "", "dots"),
    ("GET", ("", "item", "", "18"), "uid=1&rid=r", "slashes"),
]
NO_REQUEST = (21, 22, 23, 24, 27, 30)
"""OPTIONS *, CONNECT, a TLS hello, a bare GET, binary noise, HTTP/2's preface: nothing that a route could match."""


def read(name: str) -> list[Variables]:
    """Return the variables of every line of a log; each of them must be readable."""
    line_format = compile_format(FORMATS[name], escaped=name != "nginx-none")
    found = []
    for line in (DATA / f"{name}.log").read_bytes().split(b"\n")[:-1]:
        variables = line_format.read(line.decode("utf-8", "surrogateescape"))
        assert variables is not None, line[:200]
        found.append(variables)
    assert len(found) == 33
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_every_line_says_what_was_sent(name: str) -> None:
    found = read(name)
    for variables, (method, segments, query, agent) in zip(found, SENT, strict=False):
        request = request_of(variables)
        assert request == (method, segments, query)
        if name != "apache-common" and not (agent is None or (name.startswith("apache") and "10" in segments)):
            assert variables["http_user_agent"] == agent
    assert [at for at, variables in enumerate(found) if request_of(variables) is None] == list(NO_REQUEST)
    last = request_of(found[-1])
    assert last is not None and query_value(last.query, "rid") == "r19"


@pytest.mark.parametrize("name", ["nginx-custom", "nginx-json", "nginx-none"])
def test_formats_of_nginx_agree_with_each_other(name: str) -> None:
    for one, other in zip(read("nginx-combined"), read(name), strict=True):
        assert request_of(one) == request_of(other) and one["status"] == other["status"]
        for variable in ("remote_addr", "http_referer", "http_user_agent", "body_bytes_sent", "remote_user"):
            if variable in other:
                assert (one[variable] or "-") == (other[variable] or "-")
        whole, exact = time_of(one), time_of(other)
        assert whole is not None and exact is not None and abs(exact - whole) < 2_000_000_000


@pytest.mark.parametrize("name", ["apache-common", "apache-vhost", "apache-custom"])
def test_formats_of_apache_agree_with_each_other(name: str) -> None:
    for one, other in zip(read("apache-combined"), read(name), strict=True):
        assert request_of(one) == request_of(other) and one["status"] == other["status"]
        whole, exact = time_of(one), time_of(other)
        assert whole is not None and exact is not None and abs(exact - whole) < 2_000_000_000


def test_cookies_quotes_addresses_and_names() -> None:
    nginx, custom, apache = read("nginx-combined"), read("nginx-custom"), read("apache-custom")
    assert [cookie_value(line, "uid") for line in custom[:2]] == ["3", "3"]
    assert [cookie_value(line, "uid") for line in apache[:3]] == ["3", "3", None]
    assert cookie_value(custom[7], "uid") == cookie_value(apache[7], "uid") == "8"
    assert custom[0]["arg_uid"] == "3" and custom[0]["request_id"] == "573187b250f49696b82492a290c37f10"
    assert nginx[10]["remote_addr"] == apache[10]["remote_addr"] == "::1"
    assert nginx[16]["remote_user"] == 'us "er [x] name'
    assert nginx[6]["http_referer"] == '"\\'
    assert time_of(custom[0]) == 1_795_566_695_875_000_000
    assert time_of(apache[0]) == 1_795_566_699_893_393_000
    # Apache ran at +0530.
    assert time_of(read("apache-common")[0]) == 1_795_566_699_000_000_000
    assert read("apache-vhost")[0]["server_name"] == "shop.example"


def test_a_user_name_cannot_pass_for_the_time() -> None:
    line_format = compile_format("combined")
    forged = r"x [01/Jan/2030:00:00:00 +0000] \x22GET /item/1 HTTP/1.1\x22 200 1"
    line = f'::1 - {forged} [25/Nov/2026:00:31:35 +0000] "GET /item/2 HTTP/1.1" 200 5 "-" "-"'
    variables = line_format.read(line)
    assert variables is not None
    assert variables["time_local"] == "25/Nov/2026:00:31:35 +0000" and variables["request"] == "GET /item/2 HTTP/1.1"


@pytest.mark.parametrize("part", [" [", '"', "\\", '\\"', " [25/Nov/2026:00:31:35 +0000] ", "\x00", " "])
def test_a_hostile_megabyte_takes_no_longer_than_its_length(part: str) -> None:
    hostile = part * (1_000_000 // len(part))
    for name in ("combined", FORMATS["nginx-custom"], FORMATS["apache-custom"]):
        line_format = compile_format(name)
        assert line_format.read(hostile) is None
        assert line_format.read(f'::1 - {hostile} [25/Nov/2026:00:31:35 +0000] "GET') is None
        assert line_format.read(f'::1 - - [25/Nov/2026:00:31:35 +0000] "GET {hostile} HTTP/1.1') is None
    assert request_of({"request": f"GET /{hostile}"}) is not None or part in ("\x00",)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "-",
        '::1 - - [25/Nov/2026:00:31:35 +0000] "GET / HTTP/1.1" 200 5 "-"',
        '::1 - - [25/Nov/2026:00:31:35 +0000] "GET / HTTP/1.1" 200 5 "-" "-" more',
        '::1 - - [yesterday] "GET / HTTP/1.1" 200 5 "-" "-"',
        '::1 - - [25/Nov/2026:00:31:35 +0000] GET / HTTP/1.1 200 5 "-" "-"',
    ],
)
def test_what_is_no_line_of_the_format_is_told(line: str) -> None:
    assert compile_format("combined").read(line) is None


def test_a_json_line_that_is_no_object_is_told() -> None:
    line_format = compile_format("json")
    assert [line_format.read(text) for text in ("[]", "5", "{", '{"a": 1} x')] == [None] * 4
    assert line_format.read('{"status": 200, "ok": true, "request": null, "extra": {"a": [1]}}') == {
        "status": "200",
        "ok": "true",
        "request": None,
        "extra": '{"a": [1]}',
    }


def test_escapes_and_queries() -> None:
    assert plain_text(r"\x22\x5C\xC3\xA9\xE9") != plain_text(r"\xE9") == "é"
    assert plain_text(r"\n\t\"\\") == '\n\t"\\'
    assert plain_text(r"\x22", escaped=False) == r"\x22"
    assert query_value("a=1&a=2&b", "a") == "1" and query_value("a=1&a=2&b", "b") == ""
    assert query_value("a=1", "c") is None and query_value("%61=%E9", "a") == "é"


CUSTOM = (
    '$remote_addr - $remote_user [$time_local] "$request" $status $body_bytes_sent $request_time '
    "$upstream_addr $upstream_status $upstream_response_time $pipe $request_id $host"
)


@pytest.mark.parametrize(
    ("addr", "status", "time"),
    [
        ("10.0.0.5:80", "200", "0.001"),
        ("10.0.0.5:80, 10.0.0.6:80", "502, 200", "0.001, 0.002"),
        ("10.0.0.5:80, [2001:db8::1]:80, unix:/run/a.sock", "502, 504, 200", "0.000, 0.004, 1.250"),
        ("10.0.0.5:80 : 10.0.1.5:80", "200 : 200", "0.1 : 0.2"),
        ("10.0.0.5:80, 10.0.0.6:80 : 10.0.1.5:80", "502, 200 : 200", "0.001, 0.002 : 0.003"),
        # An internal redirect to a file behind the upstream leaves the separator alone (ngx_http_upstream.c).
        ("10.0.0.5:80 : ", "200 : ", "0.001 : "),
        ("backend", "502, -", "-, 0.001"),
        ("-", "-", "-"),
    ],
)
def test_one_value_for_each_upstream_shifts_no_column(addr: str, status: str, time: str) -> None:
    head = '10.0.0.1 - - [21/Jan/2019:08:59:55 +0100] "POST /jmx HTTP/1.1" 200 242 0.024'
    found = compile_format(CUSTOM).read(f"{head} {addr} {status} {time} . aaaabbbb shop.example")
    assert found is not None
    none = {"-": None}
    names = ("upstream_addr", "upstream_status", "upstream_response_time")
    assert [found[name] for name in names] == [none.get(value, value) for value in (addr, status, time)]
    assert (found["request_time"], found["pipe"], found["request_id"]) == ("0.024", ".", "aaaabbbb")
    assert found["host"] == "shop.example"


def test_a_list_before_a_quote_shifts_no_column() -> None:
    # A public bug report's line: two upstreams, then the referer.
    text = (
        '$remote_addr - $remote_user [$time_local] "$request" $status $body_bytes_sent $request_length $request_time '
        '$upstream_response_time "$http_referer" "$http_user_agent"'
    )
    line = (
        "2a01:abc:abc:abcd:abcd:abcd:abc:abc - - [26/May/2019:03:50:04 +0200] "
        '"GET /:/websockets/notifications?X-Plex-Token=redacted HTTP/1.1" 502 166 261 0.002 '
        '0.000, 0.004 "-" "okhttp/2.6.0"'
    )
    found = compile_format(text).read(line)
    assert found is not None
    assert (found["request_time"], found["upstream_response_time"]) == ("0.002", "0.000, 0.004")
    assert (found["http_referer"], found["http_user_agent"]) == (None, "okhttp/2.6.0")


@pytest.mark.parametrize("text", ["$upstream_status, $x", "$upstream_addr : $x", "$upstream_addr:$x"])
def test_a_list_that_could_not_be_told_from_what_follows_it_is_refused(text: str) -> None:
    with pytest.raises(ConfigRejected, match="put it in quotes"):
        compile_format(text)
    assert compile_format("$upstream_status,$x").read("502, 200,y") == {"upstream_status": "502, 200", "x": "y"}


def test_a_column_that_a_visitor_shifted_is_no_line_of_the_format() -> None:
    line_format = compile_format('$remote_addr $http_user_agent $status $request_time "$request"')
    assert line_format.read('::1 curl/7 200 0.001 "GET / HTTP/1.1"') is not None
    assert line_format.read('::1 Mozilla/5.0 (X11) 200 0.001 "GET / HTTP/1.1"') is None


@pytest.mark.parametrize("depth", [98, 99, 100, 900, 1_000, 2_000, 100_000])
@pytest.mark.parametrize(("opens", "closes"), [("[", "]"), ('{"a":', "}"), ("[", ""), ('{"a":', "")])
def test_a_nested_json_line_is_read_or_told(depth: int, opens: str, closes: str) -> None:
    line = '{"status": 200, "a": ' + opens * depth + "1" + closes * depth + "}"
    # With the line's own object around it: the same with each version of Python.
    if depth + 1 > LEVELS_MAX:
        with pytest.raises(TooDeep):
            compile_format("json").read(line)
    else:
        found = compile_format("json").read(line)
        assert (found is not None) == (closes != "") and (found is None or found["status"] == "200")


def test_brackets_in_texts_and_values_beside_each_other_are_no_depth() -> None:
    beside = "[" + ",".join(["[[1]]", '{"b": "\\"[["}'] * 400) + "]"
    found = compile_format("json").read('{"a": ' + beside + ', "c": "' + "[" * 1_000 + '"}')
    assert found is not None and found["c"] == "[" * 1_000


def test_numbers_of_any_length_and_text_of_any_bytes_in_a_json_line() -> None:
    line_format = compile_format("json")
    assert line_format.read('{"a": ' + "9" * 5_000 + "}") is None
    assert line_format.read('{"a": 1e999, "b": NaN}') == {"a": "inf", "b": "nan"}
    assert line_format.read('{"a": "' + "x" * 1_000_000 + '"}') == {"a": "x" * 1_000_000}
    assert line_format.read('{"a": "\\ud800", "b": "\udce9"}') == {"a": "?", "b": "é"}
