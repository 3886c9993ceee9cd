"""Goal: behind trusted proxies each client is an origin of its own, and nobody names another one's address.

Method: the table of headers that proxies and attackers write; then a running collector, with one client that floods it.
"""

from __future__ import annotations

import httpx
import pytest
from collector_world import site

from headrace.contract.config import decode_config
from headrace.contract.errors import ConfigRejected
from headrace.ingest.http.forwarded import Proxies

NETWORKS = ("10.0.0.0/8", "2001:db8:ffff::/48")
CASES = [
    # A peer that is not trusted says what it likes.
    ("198.51.100.7", ["203.0.113.9"], "198.51.100.7"),
    ("2001:db8::7", ["203.0.113.9"], "2001:db8::7"),
    ("local", ["203.0.113.9"], "local"),
    # A trusted one that says nothing is the origin.
    ("10.0.0.1", [], "10.0.0.1"),
    ("10.0.0.1", [""], "10.0.0.1"),
    # The last address that is no proxy's; what stands before it anybody wrote.
    ("10.0.0.1", ["203.0.113.9"], "203.0.113.9"),
    ("10.0.0.1", ["6.6.6.6, 203.0.113.9"], "203.0.113.9"),
    ("10.0.0.1", ["6.6.6.6", "203.0.113.9"], "203.0.113.9"),
    ("10.0.0.1", ["6.6.6.6, 203.0.113.9 , 10.2.2.2"], "203.0.113.9"),
    ("10.0.0.1", ["6.6.6.6, 203.0.113.9, 10.2.2.2, 2001:db8:ffff::5"], "203.0.113.9"),
    ("10.0.0.1", ["10.3.3.3, 10.2.2.2"], "10.3.3.3"),
    # What is no address ends the chain with the proxy that said so.
    ("10.0.0.1", ["203.0.113.9, unknown"], "10.0.0.1"),
    ("10.0.0.1", ["203.0.113.9, junk, 10.2.2.2"], "10.2.2.2"),
    ("10.0.0.1", ["203.0.113.9, 999.1.1.1"], "10.0.0.1"),
    ("10.0.0.1", ["203.0.113.9,"], "10.0.0.1"),
    # IPv6, ports, zones, IPv4 inside IPv6.
    ("2001:db8:ffff::1", ["2001:db8::9"], "2001:db8::9"),
    ("10.0.0.1", ["[2001:db8::9]:4711"], "2001:db8::9"),
    ("10.0.0.1", ["[2001:db8::9]"], "2001:db8::9"),
    ("10.0.0.1", ["203.0.113.9:4711"], "203.0.113.9"),
    ("::ffff:10.0.0.1", ["::ffff:203.0.113.9"], "203.0.113.9"),
    ("::ffff:10.0.0.1", [], "10.0.0.1"),
    ("10.0.0.1", ["fe80::1%eth0"], "fe80::1"),
]


@pytest.mark.parametrize(("peer", "told", "origin"), CASES)
def test_the_origin_is_the_last_address_that_is_no_proxys(peer: str, told: list[str], origin: str) -> None:
    assert Proxies(NETWORKS, "x-forwarded-for").client(peer, told) == origin


@pytest.mark.parametrize(
    ("told", "origin"),
    [
        (["for=203.0.113.9"], "203.0.113.9"),
        (['For="203.0.113.9:4711";proto=https;by=10.0.0.1'], "203.0.113.9"),
        (['proto=https; for="[2001:db8::9]:4711"'], "2001:db8::9"),
        (["for=6.6.6.6, for=203.0.113.9, for=10.2.2.2"], "203.0.113.9"),
        (['for="6.6.6.6', "for=203.0.113.9"], "203.0.113.9"),
        (["for=203.0.113.9, for=_hidden"], "10.0.0.1"),
        (["for=203.0.113.9, for=unknown"], "10.0.0.1"),
        (["by=203.0.113.9"], "10.0.0.1"),
        (["x-for=203.0.113.9"], "10.0.0.1"),
        (["203.0.113.9"], "10.0.0.1"),
    ],
)
def test_forwarded_is_read_as_its_rfc_writes_it(told: list[str], origin: str) -> None:
    assert Proxies(NETWORKS, "forwarded").client("10.0.0.1", told) == origin


@pytest.mark.parametrize("networks", [(), ("10.0.0.0/8",)])
def test_without_proxies_that_are_named_the_header_is_ignored(networks: tuple[str, ...]) -> None:
    assert Proxies(networks, "x-forwarded-for").client("192.0.2.1", ["203.0.113.9"]) == "192.0.2.1"


@pytest.mark.parametrize("network", ["10.0.0.1/8", "proxy.example", "0.0.0.0/0", "::/0", ""])
def test_what_is_no_network_or_all_of_them_is_refused(network: str) -> None:
    with pytest.raises(ConfigRejected, match=r"ingest"):
        decode_config(f'[ingest]\ntrusted_proxies = ["{network}"]'.encode())


@pytest.mark.parametrize(
    ("trusted", "header", "forwarded", "answers"),
    [
        (("127.0.0.1",), "X-Forwarded-For", "x-forwarded-for", [503, 200]),
        (("127.0.0.1",), "Forwarded", "forwarded", [503, 200]),
        # Not trusted, or not the header that its proxies write: all are one origin, and share its fate.
        ((), "X-Forwarded-For", "x-forwarded-for", [503, 503]),
        (("10.0.0.0/8",), "X-Forwarded-For", "x-forwarded-for", [503, 503]),
        (("127.0.0.1",), "Forwarded", "x-forwarded-for", [503, 503]),
    ],
)
def test_behind_a_proxy_one_bad_client_does_not_shut_the_others(
    trusted: tuple[str, ...], header: str, forwarded: str, answers: list[int]
) -> None:
    def send(client: str, item: object, first: int, count: int) -> int:
        told = f"for={client}" if header == "Forwarded" else client
        events = [
            {"tag": "shop.click", "event_id": f"{client}-{n}", "request_id": f"{client}-{n}", "item_id": item}
            for n in range(first, first + count)
        ]
        return httpx.post(f"{open_site.url}/v1/events", json=events, headers={header: told}).status_code

    bounds = {"dead_letter_events_min": 50, "dead_letter_probe_ms": 3_600_000}
    with site(trusted_proxies=trusted, forwarded_header=forwarded, **bounds) as open_site:
        assert send("203.0.113.9", "no number", 0, 200) == 200
        # A probe is let through first.
        send("203.0.113.9", "no number", 200, 1)
        found = [send("203.0.113.9", "no number", 201, 1), send("198.51.100.7", 5, 0, 1)]
        assert found == answers
