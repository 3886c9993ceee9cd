"""Whose request a proxy hands on: the client's address as trusted proxies tell it. Pure.

Each proxy appends the address that it saw to `X-Forwarded-For` or `Forwarded`, behind whatever came with the request.
So the list is read from its end, and only as long as who wrote the entry is trusted: the origin is the last address
that is no trusted proxy's. What stands before it anybody can have written.

| who connects | what it says | origin |
|---|---|---|
| nobody that is trusted | anything | its own address |
| a trusted proxy | nothing, or what is no address | the proxy's address |
| a trusted proxy | `6.6.6.6, 203.0.113.9` | 203.0.113.9 |
| a trusted proxy | `203.0.113.9, ADDRESS OF ANOTHER TRUSTED PROXY` | 203.0.113.9 |
| a trusted proxy | trusted proxies only | the first of them |

One header is read, the one that the proxies write: the other one passes them untouched, from whoever sends it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

_FOR = re.compile(r'(?:^|;)\s*for\s*=\s*("[^"]*"|[^;"\s]+)', re.IGNORECASE)
"""The node of a `Forwarded` element. Source: RFC 7239, section 4."""
_PORT = re.compile(r"(?:\[([^]]*)\]|([^:]*))(?::\d{1,5})?")
"""An address with a port: `[2001:db8::1]:80`, `10.0.0.1:80`; a bare IPv6 address is none of these."""

Address = IPv4Address | IPv6Address


class Proxies:
    """`ingest.trusted_proxies`: whose word about a client's address counts, and the header in which they give it."""

    def __init__(self, networks: Iterable[str], header: str) -> None:
        self._networks = [ip_network(network) for network in networks]
        self.header = header

    def client(self, peer: str, told: Sequence[str]) -> str:
        """Return the origin of a request that `peer` sent with these values of the header, in their order.

        >>> Proxies(["10.0.0.0/8"], "x-forwarded-for").client("10.0.0.1", ["6.6.6.6, 203.0.113.9"])
        '203.0.113.9'
        """
        at = address_of(peer)
        if at is None or not self._trusts(at):
            return peer
        for element in reversed(",".join(told).split(",")):
            before = address_of(self._node(element))
            if before is None:
                # `unknown`, a hidden name, or nonsense: whoever said so is the last that is known.
                break
            at = before
            if not self._trusts(at):
                break
        return str(at)

    def _node(self, element: str) -> str:
        if self.header != "forwarded":
            return element
        found = _FOR.search(element)
        return found[1].strip('"') if found else ""

    def _trusts(self, address: Address) -> bool:
        return any(address in network for network in self._networks)


def address_of(text: str) -> Address | None:
    """Return an address as peers and proxies write it, None where it is none.

    An IPv4 address inside an IPv6 one is itself, a port and a zone are left out.

    >>> [str(address_of(text)) for text in ("[2001:db8::1]:80", "10.0.0.1:80", "::ffff:10.0.0.1", "fe80::1%eth0", "_x")]
    ['2001:db8::1', '10.0.0.1', '10.0.0.1', 'fe80::1', 'None']
    """
    text = text.strip()
    if found := _PORT.fullmatch(text):
        text = found[1] or found[2] or ""
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return address if mapped is None else mapped
