"""Where feedback meets its impression: one record's rows drop repeats, match keys and find labels. Pure, compiled.

Rows are taken one by one, in order, so that how they are cut into records changes nothing.

Legend: N rows of a record, L labels, T tasks.
"""

from __future__ import annotations

from typing import NamedTuple

import numba

from headrace.kernels.arrays import I32s, I64s, Int, U8s, U64s
from headrace.kernels.ring_table import Ring, find, row_of, seq_of
from headrace.stream.join.early_feedback import TIME_MS, EarlyArrays, take_all_of, wait
from headrace.stream.join.pending import (
    DUPLICATE,
    EVENT_MS,
    LATE,
    MATCHED,
    OPEN,
    ORPHANS,
    POSITIVE,
    PendingArrays,
    admit,
    resolve,
)
from headrace.stream.join.recent_keys import RecentArrays, recall, remember

SEQ, TASK, CODE, ID, TIME = range(5)
"""Columns of labels: the impression's sequence number, the task, what it is, where the feedback's id is, its time.

`ID` is a row of the record, or -2 - s for the early feedback with sequence number s, or -1 for none."""
NEGATIVE, POSITIVE_LABEL, CORRECTION, SETTLED = range(4)
"""What a label is: `CODE`. A correction is a positive after a negative: an eager one, or one that late feedback proved
wrong. `SETTLED` is a positive that ends a wait for late feedback too."""


class Tables(NamedTuple):
    """The tables that a record can change, and what its rules say of each task."""

    seen: RecentArrays
    resolved: RecentArrays
    waiting: PendingArrays
    early: EarlyArrays
    windows_T: I64s
    eager_T: U8s
    """1 where a task emits a negative when the impression comes."""
    late_T: I64s
    """The lane of a task in which it waits for late feedback, or -1."""


@numba.njit(cache=True)
def _answer(tables: Tables, row: Int, kind: Int, feedback_id: Int, time_ms: Int, labels_L5: I64s, count: Int) -> Int:
    """Answer an impression that waits, or did when this record's row began; return the count of labels."""
    w = tables.waiting
    seq, after_ms = seq_of(w.ring, row), time_ms - w.times_C2[row, EVENT_MS]
    for task in range(w.counts_T9.shape[0]):
        if not (tables.early.tasks_K[kind] >> task) & 1:
            continue
        late = tables.late_T[task]
        code = -1
        if not (w.opens >> task) & 1:
            # The impression was read under rules without this task.
            w.counts_T9[task, ORPHANS] += 1
        elif (w.bits_C3[row, POSITIVE] >> task) & 1:
            w.counts_T9[task, DUPLICATE] += 1
        elif (w.bits_C3[row, OPEN] >> task) & 1 and after_ms <= tables.windows_T[task]:
            w.counts_T9[task, MATCHED] += 1
            resolve(w, row, task, True, tables.resolved)
            code = CORRECTION if tables.eager_T[task] else POSITIVE_LABEL
            if late >= 0 and (w.bits_C3[row, OPEN] >> late) & 1:
                resolve(w, row, late, False, tables.resolved)
                code = SETTLED
        elif late >= 0 and (w.bits_C3[row, POSITIVE] >> late) & 1:
            w.counts_T9[task, DUPLICATE] += 1
        else:
            w.counts_T9[task, LATE] += 1
            if late >= 0 and (w.bits_C3[row, OPEN] >> late) & 1 and after_ms <= tables.windows_T[late]:
                resolve(w, row, late, True, tables.resolved)
                code = CORRECTION
        if code >= 0:
            labels_L5[count, SEQ] = seq
            labels_L5[count, TASK] = task
            labels_L5[count, CODE] = code
            labels_L5[count, ID] = feedback_id
            labels_L5[count, TIME] = time_ms
            count += 1
    return count


@numba.njit(cache=True)
def take_impressions(
    tables: Tables,
    seen_N2: U64s,
    keys_N2: U64s,
    times_N: I64s,
    elsewhere_N: U8s,
    watermark_ms: Int,
    from_ms: Int,
    fresh_N: I32s,
    labels_L5: I64s,
) -> tuple[Int, Int, Int]:
    """Let what is new wait, answered by what came before; return how many rows are new, how many labels there are, and
    how many rows are unknown and before `from_ms`.

    Args:
        elsewhere_N: 0 where the key does not wait under older rules.
        fresh_N: receives the rows that are new.
        labels_L5: receives the labels; 2 * N * T fit.
    """
    count = fresh = late = 0
    w = tables.waiting
    for i in range(times_N.shape[0]):
        low, high = keys_N2[i, 0], keys_N2[i, 1]
        if (
            recall(tables.seen, seen_N2[i, 0], seen_N2[i, 1]) >= 0
            or elsewhere_N[i]
            or find(w.ring, low, high) >= 0
            or recall(tables.resolved, low, high) >= 0
        ):
            continue
        if times_N[i] < from_ms:
            late += 1
            continue
        remember(tables.seen, seen_N2[i, 0], seen_N2[i, 1], 0)
        fresh_N[fresh] = i
        fresh += 1
        row = admit(w, low, high, times_N[i], max(times_N[i], watermark_ms))
        for task in range(tables.eager_T.shape[0]):
            if tables.eager_T[task] and (w.opens >> task) & 1:
                labels_L5[count, :] = -1
                labels_L5[count, SEQ] = seq_of(w.ring, row)
                labels_L5[count, TASK] = task
                labels_L5[count, CODE] = NEGATIVE
                count += 1
        found = take_all_of(tables.early, low, high, w.counts_T9)
        for j in range(found.shape[0]):
            time_ms = tables.early.facts_C3[row_of(tables.early.ring, found[j, 0]), TIME_MS]
            count = _answer(tables, row, found[j, 1], -2 - found[j, 0], time_ms, labels_L5, count)
    return fresh, count, late


@numba.njit(cache=True)
def take_feedback(
    tables: Tables,
    kind: Int,
    seen_N2: U64s,
    keys_N2: U64s,
    times_N: I64s,
    watermark_ms: Int,
    from_ms: Int,
    early_max: Int,
    fresh_N: I32s,
    labels_L5: I64s,
    early_N: I64s,
) -> tuple[Int, Int, Int]:
    """Match feedback of one kind; return how many rows are new, how many labels there are, and how many rows are
    unknown and before `from_ms`.

    Args:
        fresh_N: receives the rows that are new.
        labels_L5: receives the labels; N * T fit.
        early_N: receives, a row, the sequence number under which it waits for its impression, or -1.
    """
    count = fresh = late = 0
    w = tables.waiting
    for i in range(times_N.shape[0]):
        early_N[i] = -1
        if recall(tables.seen, seen_N2[i, 0], seen_N2[i, 1]) >= 0:
            continue
        if times_N[i] < from_ms:
            late += 1
            continue
        remember(tables.seen, seen_N2[i, 0], seen_N2[i, 1], 0)
        fresh_N[fresh] = i
        fresh += 1
        low, high = keys_N2[i, 0], keys_N2[i, 1]
        row = find(w.ring, low, high)
        if row >= 0:
            count = _answer(tables, row, kind, i, times_N[i], labels_L5, count)
            continue
        remembered = recall(tables.resolved, low, high)
        if remembered < 0:
            early_N[i] = wait(tables.early, low, high, kind, times_N[i], watermark_ms, early_max, w.counts_T9)
            continue
        for task in range(w.counts_T9.shape[0]):
            if (tables.early.tasks_K[kind] >> task) & 1:
                answered = (remembered >> task) & 1
                if tables.late_T[task] >= 0:
                    answered |= (remembered >> tables.late_T[task]) & 1
                w.counts_T9[task, DUPLICATE if answered else LATE] += 1
    return fresh, count, late


@numba.njit(cache=True)
def mark_waiting(ring: Ring, keys_N2: U64s, mark: Int, marks_N: U8s) -> None:
    """Set `marks_N` to `mark` where a key waits."""
    for i in range(keys_N2.shape[0]):
        if find(ring, keys_N2[i, 0], keys_N2[i, 1]) >= 0:
            marks_N[i] = mark
