"""How every benchmark shows its figures: a table for people, then one JSON object as the last line."""

from __future__ import annotations

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
        against = f"   {figure.peer}: {figure.peer_value:,.3g} ({figure.ratio:.2f}x)" if figure.peer else ""
        print(f"{figure.name:<{width}}  {figure.value:>12,.1f} {figure.unit}{against}")
    print(msgspec.json.encode({"figures": figures}).decode(), flush=True)
