"""How every benchmark shows its figures: a table for people, then one JSON object as the last line."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

import msgspec


class Figure(msgspec.Struct, frozen=True, omit_defaults=True):
    """One number; the peer's fields are absent where there is none."""

    name: str
    value: float
    unit: str
    peer: str = ""
    peer_value: float = 0.0
    ratio: float = 0.0


def show(figures: list[Figure]) -> None:
    """Print the table and the last line."""
    width = max(len(f.name) for f in figures)
    for figure in figures:
        against = f"   {figure.peer}: {figure.peer_value:,.4g} ({figure.ratio:.2f}x)" if figure.peer else ""
        digits = 1 if abs(figure.value) >= 10 else 4
        print(f"{figure.name:<{width}}  {figure.value:>12,.{digits}f} {figure.unit}{against}")
    print(msgspec.json.encode({"figures": figures}).decode(), flush=True)


def beside(
    name: str, rates: Mapping[str, Sequence[tuple[float, float]]], usual_peer: str, what: str
) -> Iterator[Figure]:
    """Yield the medians of headrace's rates beside each peer's: events/s by the wall, and per second of CPU.

    Args:
        name: begins every figure's name; a peer other than the usual one ends it.
        rates: (by the wall, by the CPU) of each round, by side.
        usual_peer: the side that is always there.
        what: what a peer is.
    """
    for at, kind in enumerate(("", "cpu_")):
        median = {side: statistics.median(rate[at] for rate in found) for side, found in rates.items()}
        ours = median.pop("headrace")
        for peer, value in median.items():
            whole = f"{name}_per_{kind}second" + ("" if peer == usual_peer else f"_vs_{peer}")
            yield Figure(whole, round(ours), "events/s", f"{peer} {what}", round(value), round(ours / value, 2))
