"""One batch of samples as the learner takes it. Apart from the learner, so that who only reads needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headrace.trainer.model.scoring import Float32s
from headrace.trainer.model.tables import Int64s


@dataclass(frozen=True)
class Batch:
    """Samples as the learner takes them: B rows, F slots, D numbers."""

    slots_BF: Int64s
    numeric_BD: Float32s
    label_B: Float32s
    weight_B: Float32s
    event_time_ms_B: Int64s

    def __len__(self) -> int:
        return len(self.label_B)

    def where(self, keep_B: npt.NDArray[np.bool_]) -> Batch:
        """Return the samples that `keep_B` marks, in their order."""
        return Batch(
            self.slots_BF[keep_B],
            self.numeric_BD[keep_B],
            self.label_B[keep_B],
            self.weight_B[keep_B],
            self.event_time_ms_B[keep_B],
        )
