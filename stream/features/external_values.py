"""The fields of a crawled entity, read from its JSON for the join and for serving alike. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from headrace.contract.crawl import Crawl
from headrace.contract.formats.json_record import decode_json

_KINDS: dict[str, tuple[type, ...]] = {
    "int64": (int,),
    "float64": (float, int),
    "string": (str,),
    "bool": (bool,),
    "list[string]": (list,),
}


def values_of(text: str | bytes | None, crawl: Crawl) -> dict[str, Any]:
    """Return an entity's declared fields; null where there is none, or it is not of the type that is declared now."""
    if text is None:
        return dict.fromkeys(crawl.fields)
    try:
        plain: Any = decode_json(text, Any)
    except msgspec.DecodeError:
        plain = None
    plain = plain if isinstance(plain, dict) else {}
    return {name: _fitted(plain.get(name), one.type) for name, one in crawl.fields.items()}


def _fitted(value: Any, kind: str) -> Any:
    if type(value) not in _KINDS[kind]:
        return None
    if kind == "float64":
        return float(value)
    if kind == "int64" and not -(2**63) <= value < 2**63:
        return None
    if kind == "list[string]" and not all(type(one) is str for one in value):
        return None
    return value
