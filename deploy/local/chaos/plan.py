"""Who is killed and when, drawn from a seed, and which stages run meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import msgspec

from headrace.contract.errors import ConfigRejected

NEEDS: dict[str, tuple[str, ...]] = {
    "kafka": ("ingest",),
    "ingest": ("ingest",),
    "stream": ("ingest", "stream", "aggregate", "sink"),
    "aggregate": ("ingest", "stream", "aggregate"),
    "sink": ("ingest", "stream", "sink"),
    "hdfs": ("ingest", "stream", "sink"),
    "crawl": ("ingest", "crawl"),
    "train": ("ingest", "stream", "aggregate", "sink", "train"),
    "serve": ("ingest", "stream", "aggregate", "sink", "train", "serve"),
    "all": ("ingest", "stream", "aggregate", "sink", "train", "serve", "crawl", "tensorboard"),
}
"""Which stages run when one is killed: those that it reads from."""
STORE = ("namenode", "datanode")
ALL = "all"
"""Everything runs, and `faults` draws what is done to it; so it stands alone."""
ON_HDFS = frozenset({"hdfs", "crawl", ALL})
"""Who names one of these gets a store on HDFS, and its processes are killed too; else the store is a folder."""

SECOND, SECOND_WORKER = "ingest-2", "stream-2"
STREAM = ("stream", SECOND_WORKER, "aggregate", "sink")
"""Who is killed when `stream` is named: two workers that share the partitions, and what stands around them."""
# Kafka takes 2 to 5 s to be back, a gateway 1 to 3: a kill in the middle of it now and then, else while it works.
EARLY_SHARE, EARLY_S, LATE_S = 0.2, 1.0, 4.0


class Kill(msgspec.Struct):
    """One kill -9: who, how long after the one before, and whether it waits until all is ready."""

    process: str
    after_s: float
    when_ready: bool
    pid: int = 0


def draw_kills(random: Random, victims: Sequence[str], kills: int) -> list[Kill]:
    """Return who is killed when; the same for the same seed."""
    made = []
    for _ in range(kills):
        early = random.random() < EARLY_SHARE
        made.append(Kill(random.choice(victims), random.uniform(0.0, EARLY_S if early else LATE_S), not early))
    return made


def victims_of(stages: Sequence[str], gateways: int) -> list[str]:
    """Return the processes that `stages` name. Raises `ConfigRejected` for a stage that nobody can kill here."""
    wrong = [stage for stage in stages if stage not in NEEDS]
    if wrong:
        raise ConfigRejected(f"--stage {','.join(wrong)}: one or more of {', '.join(NEEDS)} is wanted.")
    if ALL in stages and len(stages) > 1:
        raise ConfigRejected(f"--stage {','.join(stages)}: all has every stage in it; leave the others out.")
    if ALL in stages:
        return [ALL]
    named = [victim for stage in stages if stage != "hdfs" for victim in (STREAM if stage == "stream" else (stage,))]
    named += STORE if ON_HDFS & set(stages) else ()
    return list(dict.fromkeys([*named, *([SECOND] if gateways > 1 and "ingest" in stages else [])]))


def needed(stages: Sequence[str]) -> set[str]:
    """Return the stages that run when `stages` are named."""
    return {need for stage in stages for need in NEEDS[stage]}
