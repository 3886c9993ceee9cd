"""Sustained events/s of each stage and of the whole loop.

Method: a stack of its own, the shop silent. Impressions, clicks and dwells go in through `headrace.sender` as fast as
the spool takes them, all stages sharing this machine; each stage's counter is read ten times a second. A stage's rate
is that of its own counter between 10 % and 90 % of its total, so that start and tail do not count. The whole loop's
rate is all impressions over the time from the first line sent to the last sample learnt; the label window (waited for
by every impression without a click) is taken off, since it is no work.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from harness.figures import Figure, show
from harness.stack import Stack

from headrace.contract.errors import Overloaded
from headrace.examples.shop.shop import PROJECT

COUNTERS = {
    "ingest": ("events_appended_total", "events/s"),
    "stream": ("samples_emitted_total", "samples/s"),
    "sink": ("rows_stored_total", "rows/s"),
    "train": ("samples_learnt_total", "samples/s"),
}
DRAIN_S = 180.0
PROBE_S = 0.1


class Probe(threading.Thread):
    """Reads every stage's counter until `stop`: (time, value) a stage."""

    def __init__(self, stack: Stack) -> None:
        super().__init__(daemon=True)
        self._stack = stack
        self.stop = threading.Event()
        self.seen: dict[str, list[tuple[float, float]]] = {stage: [] for stage in COUNTERS}

    def run(self) -> None:
        """Probe all stages, ten times a second at most."""
        while not self.stop.wait(PROBE_S):
            for stage, (name, _) in COUNTERS.items():
                self.seen[stage].append((time.monotonic(), self._stack.metric(stage, name)))

    def latest(self, stage: str) -> float:
        """Return the newest value since the probe began."""
        seen = self.seen[stage]
        return seen[-1][1] - seen[0][1] if seen else 0.0


def sustained(seen: list[tuple[float, float]]) -> float:
    """Return the rate between 10 % and 90 % of the rise of a counter.

    A counter that rises in one step (the sink's commit) shows no such span: then all of it over all the time from the
    first look to the step, a lower bound.

    >>> sustained([(float(t), 10.0 * t) for t in range(11)])
    10.0
    """
    at, value = np.array(seen).T
    value = value - value[0]
    if value[-1] <= 0:
        return 0.0
    low, high = (int(np.searchsorted(value, share * value[-1])) for share in (0.1, 0.9))
    if value[high] <= value[low]:
        return float(value[-1] / max(at[high] - at[0], PROBE_S))
    return float((value[high] - value[low]) / max(at[high] - at[low], PROBE_S))


def feed(stack: Stack, impressions: int) -> int:
    """Send the shop's visits without a pause; return how many events went in."""
    sender, sent = stack.sender("loop"), 0
    for n, visit in enumerate(stack.visits(impressions)):
        shown, _ = stack.events(visit, f"loop-{n}")
        for tag, record in (shown, *(stack.answer(visit, given, f"loop-{n}") for given in visit.feedback)):
            while True:
                try:
                    sender.emit(tag, record)
                    break
                except Overloaded:
                    time.sleep(0.01)
            sent += 1
    if not sender.flush(DRAIN_S):
        raise RuntimeError(f"{sender.unacked} events have no ack after {DRAIN_S:g} s")
    sender.close()
    return sent


def main() -> int:
    """Measure and print; 1 when the loop did not drain."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="20,000 impressions instead of 150,000")
    args = parser.parse_args()
    impressions = 20_000 if args.quick else 150_000
    with Stack.open(own=True, shop_rate=0) as stack:
        probe = Probe(stack)
        probe.start()
        time.sleep(1)
        begin = time.monotonic()
        feed(stack, impressions)
        while min(probe.latest("train"), probe.latest("sink")) < impressions:
            if time.monotonic() - begin > DRAIN_S + impressions / 1_000:
                print(f"not drained: {[(s, probe.latest(s)) for s in COUNTERS]}", file=sys.stderr)
                return 1
            time.sleep(PROBE_S)
        learnt_at = next(at for at, value in probe.seen["train"] if value - probe.seen["train"][0][1] >= impressions)
        probe.stop.set()
        probe.join()
    window_s = PROJECT.tasks[0].window_ms / 1_000
    figures = [Figure(f"{stage}", sustained(probe.seen[stage]), unit) for stage, (_, unit) in COUNTERS.items()]
    figures.append(Figure("whole loop", impressions / max(learnt_at - begin - window_s, PROBE_S), "impressions/s"))
    show(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
