"""One batch of samples as the learner takes it. A module of its own, so that a reader of batches imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.trainer.model.scoring import Float32s
from headrace.trainer.model.tables.table import Int64s

Int8s = npt.NDArray[np.int8]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Batch:
    """Samples as the learner takes them: B rows, F slots, D numbers."""

    slots_BF: Int64s
    numeric_BD: Float32s
    label_B: Float32s
    """1 for a positive and 0 for a negative; of a task that learns a value that value, NaN where it is missing."""
    weight_B: Float32s
    event_time_ms_B: Int64s
    task_B: Int8s = field(default_factory=lambda: np.empty(0, np.int8))
    """Which of the recipe's `heads` a sample is of; left out, the first."""
    id_B: Int64s = field(default_factory=lambda: np.empty(0, np.int64))
    """Hash of the sample's id, by which negatives are left out; zeros where all are learnt."""
    correction_B: Bools = field(default_factory=lambda: np.empty(0, np.bool_))
    """True on a positive that comes beside a negative of the same impression and task."""

    def __post_init__(self) -> None:
        """Fill what was left out with zeros."""
        if len(self.task_B) != len(self.label_B):
            object.__setattr__(self, "task_B", np.zeros(len(self.label_B), np.int8))
        if len(self.id_B) != len(self.label_B):
            object.__setattr__(self, "id_B", np.zeros(len(self.label_B), np.int64))
        if len(self.correction_B) != len(self.label_B):
            object.__setattr__(self, "correction_B", np.zeros(len(self.label_B), np.bool_))

    def __len__(self) -> int:
        return len(self.label_B)

    def where(self, keep_B: Bools) -> Batch:
        """Return the samples that `keep_B` marks, in their order."""
        return Batch(*(array[keep_B] for array in self._arrays()))

    def rows(self, at_M: Int64s) -> Batch:
        """Return the samples at these places, in this order."""
        return Batch(*(array[at_M] for array in self._arrays()))

    def _arrays(self) -> tuple[npt.NDArray[Any], ...]:
        return tuple(getattr(self, name) for name in self.__dataclass_fields__)


def joined(batches: Sequence[Batch]) -> Batch:
    """Return all samples of some batches, one batch after the other."""
    return Batch(*(np.concatenate(arrays) for arrays in zip(*(each._arrays() for each in batches), strict=True)))
