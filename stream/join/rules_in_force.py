"""The rules in force, and the impressions that wait under them. Pure.

A lane is what an impression waits for: a task's feedback within its window, or behind that its late feedback. Lanes
are numbered in the order in which rules first declared them, and a number is never given to another one, so that bits
mean the same under all rules.

Legend: T lanes, K kinds of feedback.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from headrace.contract.formats.events import impression_schema
from headrace.contract.formats.sample import sample_schema
from headrace.contract.project import Project
from headrace.contract.rules import Rules
from headrace.kernels.arrays import I64s
from headrace.stream.join.pending import Pending

# Columns of a sample that the label decides; all others are the impression's and kept while it waits.
LABEL_COLUMNS = (
    *("partition", "offset", "rank", "task", "label", "weight", "feedback_id", "feedback_time_ms"),
    *("correction", "value"),
)

Lane = tuple[str, str]
"""A task and the feedback that answers it; of a lane for late feedback the task and ""."""
AsRead = Callable[[Project], Project]


class RulesInForce:
    """Change `number` of the rules, as declared, and what waits of the impressions that were read under it.

    Those are the impressions with sequence numbers from `first` on, up to the `first` of the next change.
    """

    def __init__(
        self, number: int, declared: Rules, project: Project, lanes: Sequence[Lane], counts_T9: I64s, *, first: int
    ) -> None:
        self.number, self.declared, self.project, self.first = number, declared, project, first
        self.spec = project.features
        self.digest = self.spec.digest()
        self.schema = sample_schema(project)
        self.source_schema = pa.schema([f for f in self.schema if f.name not in LABEL_COLUMNS])
        self.impression_schema = impression_schema(project)
        tasks = {task.name: task for task in project.tasks}
        self.windows_T = np.zeros(len(lanes), np.int64)
        self.eager_T = np.zeros(len(lanes), np.uint8)
        self.weights_T = np.ones(len(lanes), np.float32)
        opens = lates = 0
        for lane, (name, feedback) in enumerate(lanes):
            task = tasks.get(name)
            if task is None or not (feedback or task.correct_ms):
                continue
            opens |= 1 << lane
            lates |= 0 if feedback else 1 << lane
            self.windows_T[lane] = task.window_ms + (0 if feedback else task.correct_ms)
            self.eager_T[lane] = task.policy == "eager"
            self.weights_T[lane] = task.correction_weight
        self.silent_T = self.eager_T | np.array([lates >> lane & 1 for lane in range(len(lanes))], np.uint8)
        """1 where the end of a window makes no sample."""
        self.lanes_open = opens.bit_count()
        self.pending = Pending(self.windows_T.tolist(), opens=opens, lates=lates, counts_T9=counts_T9, first=first)

    @property
    def takes(self) -> int:
        """How often the columns of one impression are read or dropped."""
        return self.lanes_open + int(self.eager_T.sum())


def joined_schema(several: Sequence[RulesInForce]) -> pa.Schema:
    """Return the columns of samples under several rules: those of the newest, then those that only older ones have."""
    fields: dict[str, pa.Field] = {}
    for rules in reversed(several):
        for field in rules.schema:
            fields.setdefault(field.name, field)
    return pa.schema(list(fields.values()))


def late_lanes(lanes: Sequence[Lane]) -> I64s:
    """Return, a lane, the lane in which the same task waits for late feedback, or -1: int64 [T]."""
    places = {name: lane for lane, (name, feedback) in enumerate(lanes) if not feedback}
    return np.array([places.get(name, -1) if feedback else -1 for name, feedback in lanes], np.int64)
