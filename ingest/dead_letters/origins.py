"""Who sends the events of one tag: a bounded table of origins, and of networks for those that are not in it. Pure.

An origin is *known* once the outcome of `trial` of its events is, within the window; it has a gate of its own then.
Unknown ones share the gate of their network, which counts the first `trial` events of each, so that whoever changes
its address is counted all the same; and whoever finds the table full is counted there for good. Networks beyond
`NETWORKS_MAX` share one gate. What neither sends nor is heard of for a window is forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address

from headrace.ingest.dead_letters.gate import Gate

ORIGINS_MAX = 1_024
"""Most known origins of a tag: 3 kB each at most, 3 MB."""
NETWORKS_MAX = 64
OTHERS = "others"
_NAME_CHARS = 80


@lru_cache(maxsize=4_096)
def keys_of(origin: str) -> tuple[str, str]:
    """Return an origin's key and its network's. One customer has a whole /64 of IPv6; a provider has a /16, or a /32.

    >>> keys_of("10.1.2.3"), keys_of("2001:db8:1:2:3::4"), keys_of("kafka:weblogs/0")
    (('10.1.2.3', '10.1.0.0/16'), ('2001:0db8:0001:0002::/64', '2001:0db8::/32'), ('kafka:weblogs/0', 'kafka:weblogs'))
    """
    try:
        address: IPv4Address | IPv6Address = ip_address(origin.partition("%")[0])
    except ValueError:
        return origin[:_NAME_CHARS], origin.partition("/")[0][:_NAME_CHARS]
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is None:
            text = address.packed.hex(":", 2)
            return f"{text[:19]}::/64", f"{text[:9]}::/32"
        address = address.ipv4_mapped
    first, second, *_ = address.packed
    return str(address), f"{first}.{second}.0.0/16"


class Origins:
    """The gates of one tag."""

    def __init__(self, make: Callable[[bool], Gate], *, trial: int, window_ms: int) -> None:
        """Begin with nobody; `make` makes a gate, True says for a network."""
        self._make, self._trial, self._window_ms = make, trial, window_ms
        self._known: dict[str, Gate] = {}
        self._networks: dict[str, Gate] = {}
        self._tidy_at_ms = 0

    def gate(self, origin: str, now_ms: int) -> Gate | None:
        """Return the gate that decides about a chunk; None where nothing is known of its origin or its network."""
        self.tidy(now_ms)
        key, network = keys_of(origin)
        own = self._known.get(key)
        if own is not None:
            own.counts.forget(now_ms)
            own.seen_ms = now_ms
            if own.state != "open" or own.counts.total >= self._trial:
                return own
        return self._networks.get(network) or self._networks.get(OTHERS)

    def note(self, origin: str, now_ms: int, *, good: int, bad: int) -> Iterator[Gate]:
        """Count what became of an origin's events; yield every gate that counted them."""
        self.tidy(now_ms)
        key, network = keys_of(origin)
        own = self._known.get(key)
        if own is None and len(self._known) < ORIGINS_MAX:
            own = self._known[key] = self._make(False)
        if own is not None:
            own.counts.forget(now_ms)
            fresh = max(0, self._trial - own.counts.total)
            own.note(now_ms, good=good, bad=bad)
            yield own
            good, bad = min(good, fresh), min(bad, fresh)
        if good or bad:
            shared = self._network(network)
            shared.note(now_ms, good=good, bad=bad)
            yield shared

    def shut(self) -> dict[str, Gate]:
        """Return the gates that are not open."""
        named = {f"new ones of {name}": gate for name, gate in self._networks.items()} | self._known
        return {name: gate for name, gate in named.items() if gate.state != "open"}

    def has_good(self) -> bool:
        """Say whether somebody sends good events and is not held back."""
        return any(gate.is_good() for gate in self._known.values())

    @property
    def size(self) -> int:
        """Gates that are held in memory."""
        return len(self._known) + len(self._networks)

    def tidy(self, now_ms: int) -> None:
        """Forget the silent ones, twelve times a window."""
        if now_ms < self._tidy_at_ms:
            return
        self._tidy_at_ms = now_ms + self._window_ms // 12
        for gates in (self._known, self._networks):
            for name in [name for name, gate in gates.items() if gate.seen_ms < now_ms - self._window_ms]:
                del gates[name]

    def _network(self, name: str) -> Gate:
        if name not in self._networks and len(self._networks) >= NETWORKS_MAX:
            name = OTHERS
        if name not in self._networks:
            self._networks[name] = self._make(True)
        return self._networks[name]
