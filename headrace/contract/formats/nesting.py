"""How deep an event's record may be nested: the same at every door, so that no reader's own limit decides. Pure.

The record itself is the first level, a list or map in one of its fields the second.
"""

from __future__ import annotations

from typing import Any

LEVELS_MAX = 100
"""Most levels of a record. Ruby's JSON gives up at 100, Python's and msgpack's at some 1,000."""
TOO_DEEP = "too_deep"
"""The reason of its dead letter."""
TOO_DEEP_TEXT = f"the record has more than {LEVELS_MAX} levels of lists and maps; what lies deeper was left out"


def is_deeper(value: Any, levels: int = LEVELS_MAX) -> bool:
    """Say whether more than `levels` lists and maps lie in each other, the value itself included.

    >>> is_deeper({"a": [{}]}, 3), is_deeper({"a": [{}]}, 2), is_deeper(7, 0)
    (False, True, False)
    """
    found = [value] if isinstance(value, dict | list | tuple) else []
    for _ in range(levels):
        if not found:
            return False
        found = [
            inner
            for each in found
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, dict | list | tuple)
        ]
    return bool(found)
