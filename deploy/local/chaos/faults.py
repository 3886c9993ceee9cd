"""What is done to a whole stack and when, drawn from a seed: kills, freezes, servers taken away, a full disk.

Times count from the beginning of the load. The timeline is as long as the kills need; each spell of an absent server
and the full disk have a slice of it to themselves, so that one is over before the next begins. Kills and freezes go on
meanwhile, but for those of a server that is away.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import Literal

import msgspec

from headrace.deploy.local.chaos.plan import SECOND, SECOND_WORKER, STORE

SERVE_WORKER = "serve worker"
"""A process that the first process of `serve` forked; that one is the updater."""
STAGES = (
    *("ingest", SECOND, "stream", SECOND_WORKER, "aggregate", "sink", "crawl", "train", "serve", SERVE_WORKER),
    "tensorboard",
)
VICTIMS = (*STAGES, "kafka", *STORE)
SERVERS: dict[str, tuple[str, ...]] = {"broker": ("kafka",), "store": STORE}

GAP_S = (1.0, 11.0)
"""Between two kills. A stage takes 3 to 15 s to be back on two busy cores: some are killed as they start."""
SHORT_S, LONG_S, LONG_SHARE = (2.0, 8.0), (12.0, 25.0), 0.4
"""A freeze. Kafka's groups wait 6 to 10 s for a member: the long ones wake up as strangers."""
AWAY_S = (5.0, 45.0)
FULL_S = 28.0
KILLS_A_FREEZE, KILLS_A_SPELL = 6, 30
SLICE_USED = 0.7

Kind = Literal["kill", "freeze", "stop", "fill"]


class Fault(msgspec.Struct):
    """One fault. `for_s` is 0 for a kill; `pids` and `done` tell what became of it."""

    at_s: float
    kind: Kind
    target: str
    """A process; for a server that is frozen or stopped, `broker` or `store`; `disk`."""
    for_s: float = 0.0
    pids: list[int] = []
    done: bool = False

    def processes(self) -> tuple[str, ...]:
        """Return the processes that it strikes."""
        return SERVERS.get(self.target, () if self.kind == "fill" else (self.target,))


def draw_faults(random: Random, kills: int, *, fills: bool, but: Sequence[str] = ()) -> list[Fault]:
    """Return all faults in order of time; the same for the same arguments and seed.

    Each victim is killed once before any is killed again. `fills` says whether there is a disk to be filled, `but`
    names processes that do not run.
    """
    times = list(_times(random, kills))
    spells = _spells(random, times[-1], max(1, kills // KILLS_A_SPELL), fills)
    found = list(spells)
    order = _rounds(random, [name for name in VICTIMS if name not in but])
    waiting: list[str] = []
    for at_s in times:
        # Who is away has its turn when it is back.
        victim = next((name for name in waiting if not _struck(spells, name, at_s)), None)
        while victim is None:
            name = next(order)
            if _struck(spells, name, at_s):
                waiting.append(name)
            else:
                victim = name
        waiting = [name for name in waiting if name != victim]
        found.append(Fault(at_s, "kill", victim))
    for _ in range(max(2, kills // KILLS_A_FREEZE)):
        at_s = random.uniform(0.0, times[-1])
        for_s = random.uniform(*(LONG_S if random.random() < LONG_SHARE else SHORT_S))
        found.append(Fault(at_s, "freeze", random.choice([name for name in STAGES if name not in but]), for_s))
    return sorted(found, key=lambda fault: (fault.at_s, fault.kind, fault.target))


def _times(random: Random, kills: int) -> Iterator[float]:
    at_s = 0.0
    for _ in range(kills):
        at_s += random.uniform(*GAP_S)
        yield at_s


def _spells(random: Random, length_s: float, each: int, fills: bool) -> list[Fault]:
    """Return absences and the full disk: broker and store, stopped and frozen, `each` times two."""
    kinds: list[tuple[Kind, str]] = [("freeze", "broker"), ("stop", "broker"), ("freeze", "store"), ("stop", "store")]
    drawn: list[tuple[Kind, str]] = kinds * max(1, each // 2)
    drawn += [("fill", "disk")] if fills else []
    random.shuffle(drawn)
    slice_s = length_s / len(drawn)
    found = []
    for number, (kind, target) in enumerate(drawn):
        for_s = FULL_S if kind == "fill" else random.uniform(*AWAY_S)
        for_s = min(for_s, SLICE_USED * slice_s)
        at_s = number * slice_s + random.uniform(0.0, slice_s - for_s)
        found.append(Fault(at_s, kind, target, for_s))
    return found


def _rounds(random: Random, names: Sequence[str]) -> Iterator[str]:
    """Yield all names in a new order again and again, for ever."""
    while True:
        yield from random.sample(names, len(names))


def _struck(spells: Sequence[Fault], name: str, at_s: float) -> bool:
    """Say whether `name` is away at `at_s`: then there is nobody to kill."""
    return any(name in s.processes() and s.at_s - 1.0 <= at_s <= s.at_s + s.for_s + 1.0 for s in spells)
