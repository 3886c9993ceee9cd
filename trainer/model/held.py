"""Positives that wait until the negatives of their impression's time are there. NumPy, pure.

A task's positives come when feedback does, its negatives when the window has passed. With a window of minutes a model
would learn the positives of now beside the negatives of minutes ago, and whatever differs between the two would tell
them apart: counters that fill, traffic that grows, an id that is new. A task whose window is long is therefore learnt
in the order of its impressions:

1. The *front* of a task is the latest impression time of its negatives so far.
2. A positive whose impression is later than the front is held. A correction never is: its negative was learnt.
3. Behind a negative that moves the front come the positives that it has reached, in the order in which they came.
4. Where more than `HELD_MAX` are held, those that came first come behind the batch, whatever the front says.

So what is learnt, and in which order, follows from the samples and their order alone. How they are cut into batches
changes nothing but (4). What is held is part of a model's state.

Source: the waiting window of Chapelle, "Modeling delayed feedback in display advertising", KDD 2014, and Yang et al.,
"Capturing delayed feedback in conversion rate prediction via elapsed-time sampling", AAAI 2021, here for positives
alone, since negatives have waited in the join.

Axes: B samples of a batch, H held samples, M samples that are learnt, T tasks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from headrace.contract.project import Task
from headrace.contract.recipe import Recipe
from headrace.trainer.model.batch import Batch, Bools, joined
from headrace.trainer.model.tables.table import Int64s

HELD_MAX = 65_536
"""Samples. Each takes 8 bytes a slot, 4 a number and 26: with 26 slots 15 MB in all."""
_NEVER = np.iinfo(np.int64).min
_FIELDS = tuple(Batch.__dataclass_fields__)


def ordered_tasks(recipe: Recipe, tasks: Sequence[Task]) -> tuple[str, ...]:
    """Return the names of the recipe's tasks that are learnt in the order of impressions, in the order of its heads."""
    windows = {task.name: task.window_ms for task in tasks if task.policy == "window"}
    least_ms = recipe.ordered_from_ms
    return tuple(name for name in recipe.heads if least_ms and windows.get(name, 0) >= least_ms)


class Taken(NamedTuple):
    """What is learnt now, in this order, and what waits."""

    batch: Batch
    place_M: Int64s
    """Where in the batch that came a sample is, -1 where it was held before."""
    waits_B: Bools
    """Samples of the batch that came which are held now."""


class Held:
    """The positives of one model that wait."""

    def __init__(self, recipe: Recipe, ordered: Collection[str], *, slots: int, numerics: int) -> None:
        self._tasks = [number for number, name in enumerate(recipe.heads) if name in ordered]
        self.front_T: Int64s = np.full(len(recipe.heads), _NEVER)
        no_rows = np.empty(0, np.float32), np.empty(0, np.float32), np.empty(0, np.int64)
        self.batch = Batch(np.empty((0, slots), np.int64), np.empty((0, numerics), np.float32), *no_rows)
        """In the order in which they came."""

    def __len__(self) -> int:
        return len(self.batch)

    def take(self, batch: Batch) -> Taken:
        """Take in what comes and return what is learnt now."""
        count = len(batch)
        front_T, due_H, due_B = self._due(batch)
        self.front_T = front_T
        waits_B = due_B == count
        # Bounded: those that came first give way.
        waits_H = due_H == count
        over = int(waits_H.sum() + waits_B.sum()) - HELD_MAX
        if over > 0:
            waits_H &= np.cumsum(waits_H) > over
            waits_B &= np.cumsum(waits_B) > over - int((due_H == count).sum())
        if not len(self.batch) and not waits_B.any() and (due_B == np.arange(count)).all():
            return Taken(batch, np.arange(count), waits_B)
        everything = joined([self.batch, batch])
        due_N, waits_N = np.concatenate([due_H, due_B]), np.concatenate([waits_H, waits_B])
        place_N = np.concatenate([np.full(len(due_H), -1), np.arange(count)])
        is_freed_N = due_N != place_N
        order_N = np.lexsort((np.arange(len(due_N)), is_freed_N, due_N))
        now_M = order_N[~waits_N[order_N]]
        self.batch = everything.rows(np.flatnonzero(waits_N))
        return Taken(everything.rows(now_M), place_N[now_M], waits_B)

    def freed_slots(self, batch: Batch) -> Int64s:
        """Return the slots of the held samples that `take` of this batch would let go, int64 [H, F]; change nothing."""
        _, due_H, due_B = self._due(batch)
        over = int((due_H == len(batch)).sum() + (due_B == len(batch)).sum()) - HELD_MAX
        freed_H = (due_H < len(batch)) | (np.cumsum(due_H == len(batch)) <= over)
        slots_HF: Int64s = self.batch.slots_BF[freed_H]
        return slots_HF

    def _due(self, batch: Batch) -> tuple[Int64s, Int64s, Int64s]:
        """Return the fronts behind the batch, and the place of the sample behind which a held one and one of the batch
        is learnt: its own where it needs not wait, the batch's length where it waits on."""
        count, held = len(batch), self.batch
        front_T, due_H, due_B = self.front_T.copy(), np.full(len(held), count), np.arange(count)
        for task in self._tasks:
            here_B = (batch.task_B == task) & ~batch.correction_B
            negative_B = here_B & (batch.label_B == 0)
            front_B = np.maximum.accumulate(np.where(negative_B, batch.event_time_ms_B, _NEVER))
            front_B = np.maximum(front_B, front_T[task])
            held_H, positive_B = held.task_B == task, here_B & ~negative_B
            due_H[held_H] = np.searchsorted(front_B, held.event_time_ms_B[held_H])
            reached_B = np.searchsorted(front_B, batch.event_time_ms_B[positive_B])
            due_B[positive_B] = np.maximum(due_B[positive_B], reached_B)
            front_T[task] = front_B[-1] if count else front_T[task]
        return front_T, due_H, due_B

    def state(self) -> dict[str, npt.NDArray[np.generic]]:
        """Return copies of everything."""
        return {"front": self.front_T.copy()} | {name: getattr(self.batch, name).copy() for name in _FIELDS}

    def load(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Replace everything by what `state` returned."""
        self.front_T = np.array(state["front"], np.int64)
        self.batch = Batch(**{name: np.array(state[name], getattr(self.batch, name).dtype) for name in _FIELDS})
