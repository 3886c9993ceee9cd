"""How large a step's gradients were. Torch-free."""

from __future__ import annotations

import math
from typing import NamedTuple


class Norms(NamedTuple):
    """Euclidean norms of gradients summed over a batch; not finite where a gradient is not, or where they overflow."""

    rows: float
    dense: float

    @property
    def are_finite(self) -> bool:
        """Say whether the gradients may be applied."""
        return math.isfinite(self.rows) and math.isfinite(self.dense)
