"""Goal: a stored state holds what it was told, never what memory held before. Method: dirty memory under a restore."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pytest
from join_world import records, state, traffic

from headrace.stream.join.state import encode_state, load_state


def restored(data: bytes) -> bytes:
    """Return what a restored state stores."""
    join = state()
    load_state(join, data)
    return encode_state(join)


@pytest.mark.parametrize("seed", range(3))
def test_a_restored_state_stores_the_same_bytes_whatever_memory_held(seed: int, monkeypatch: Any) -> None:
    join = state()
    join.take_all(records(traffic(seed), Random(seed)))
    data = encode_state(join)
    clean, empty = restored(data), np.empty

    def dirty(*args: Any, **named: Any) -> Any:
        array = empty(*args, **named)
        array.view(np.uint8).fill(85)
        return array

    monkeypatch.setattr(np, "empty", dirty)
    found = restored(data)
    monkeypatch.undo()
    assert found == clean
