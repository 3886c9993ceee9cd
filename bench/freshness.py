"""From a click's line being flushed by the web service to the first answer whose version contains it.

Method: on a stack that runs (`make up`), or on one of its own (`--own`), this program shows an impression and flushes
its click `--rate` times a second through `headrace.sender`, while a second thread asks `POST /v1/rank` without pause
and keeps (time, version). Afterwards the `samples` topic says at which position each click was resolved and the
`steps` topic which positions each version contains; a click's freshness ends with the first answer that covers it.
Nothing is estimated. The clock is this process's monotonic one; asking back to back bounds the error by one request.

Where the time goes is told hop by hop, by the times of the log's own records, on the one host that all of it runs on:
flush -> `events` (shipper and gateway) -> `samples` (join) -> `steps` (the trainer's batch and commit) -> `deltas` ->
answer.
"""

from __future__ import annotations

import argparse
import http.client
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from harness.figures import Figure, show
from harness.stack import Stack

from headrace.contract.formats.events import FEEDBACK, decode_batch
from headrace.contract.formats.positions import Position, order_of
from headrace.contract.formats.steps import Step, decode_step
from headrace.contract.interfaces.log import Record

# 5 ms between questions: 200 answers/s are enough to resolve tens of ms and leave the machine to the loop.
ASK_S = 0.005
QUIET_S = 5.0


class Asker(threading.Thread):
    """Asks serving until `stop`, and keeps when each answer came and which version gave it."""

    def __init__(self, host: str, port: int, body: bytes) -> None:
        super().__init__(daemon=True)
        self._host, self._port, self._body = host, port, body
        self.stop = threading.Event()
        self.answers: list[tuple[float, str]] = []

    def run(self) -> None:
        """Ask over one kept-alive connection; one that breaks is opened again."""
        connection = http.client.HTTPConnection(self._host, self._port, timeout=2)
        while not self.stop.wait(ASK_S):
            try:
                connection.request("POST", "/v1/rank", self._body, {"Content-Type": "application/json"})
                answer = msgspec.json.decode(connection.getresponse().read())
            except (OSError, http.client.HTTPException):
                connection.close()
                continue
            self.answers.append((time.monotonic(), str(answer.get("version", ""))))
        connection.close()


@dataclass
class Resolved:
    """Where clicks were resolved, and when their sample came into the log."""

    places: dict[str, tuple[int, Position]] = field(default_factory=dict)
    """Feedback id to (partition, position)."""
    sample_ms: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Iterable[Record]) -> Resolved:
        """Read every positive in these records of `samples`."""
        found = cls()
        for record in records:
            if record.value is None:
                continue
            batch = decode_batch(record.value)
            names = ("feedback_id", "partition", "offset", "rank")
            for feedback, partition, offset, rank in zip(*(batch[n].to_pylist() for n in names), strict=True):
                if feedback is not None:
                    found.places[feedback] = (partition, Position(offset, rank))
                    found.sample_ms[feedback] = record.timestamp_ms
        return found


def event_times(records: Iterable[Record]) -> dict[str, int]:
    """Return feedback id -> the broker's time of its record of `events`, ms."""
    found: dict[str, int] = {}
    for record in records:
        if record.value is not None and record.headers.get("kind") == FEEDBACK:
            found |= dict.fromkeys(decode_batch(record.value)["event_id"].to_pylist(), record.timestamp_ms)
    return found


HOPS = ("to events", "to samples", "to steps", "to deltas", "to the answer")


def hops_ms(
    flushed_ms: Mapping[str, float],
    event_ms: Mapping[str, int],
    resolved: Resolved,
    steps: Sequence[tuple[int, Step]],
    deltas: Sequence[tuple[int, Step]],
    answers: Sequence[tuple[float, Step | None]],
) -> dict[str, list[float]]:
    """Return, hop by hop, how long each click took that got through all of them; times in ms of one wall clock.

    Args:
        steps, deltas, answers: in order, with when they came; a delta and an answer with the step that they hold.
    """
    found: dict[str, list[float]] = {hop: [] for hop in HOPS}
    reached: dict[tuple[int, int], Reached] = {}
    for feedback, (partition, position) in resolved.places.items():
        if feedback not in flushed_ms or feedback not in event_ms:
            continue
        times = [flushed_ms[feedback], event_ms[feedback], resolved.sample_ms[feedback]]
        for number, each in enumerate((steps, deltas, answers)):
            if (number, partition) not in reached:
                reached[number, partition] = Reached(each, partition)
            times.append(reached[number, partition].first(position))
        if not np.isnan(times).any():
            for hop, begin, end in zip(HOPS, times, times[1:], strict=False):
                found[hop].append(max(0.0, end - begin))
    return found


class Reached:
    """When a partition was reached up to which position."""

    def __init__(self, each: Sequence[tuple[float, Step | None]], partition: int) -> None:
        self._at = [at for at, _ in each]
        order = [_order(step, partition) for _, step in each]
        self._order_N = np.maximum.accumulate(np.array(order, np.int64)) if order else np.empty(0, np.int64)

    def first(self, position: Position) -> float:
        """Return when the position was first contained; NaN where it never was."""
        first = int(np.searchsorted(self._order_N, order_of(position), "left"))
        return self._at[first] if first < len(self._at) else float("nan")


def freshness_ms(
    flushed: Mapping[str, float],
    places: Mapping[str, tuple[int, Position]],
    steps: Mapping[str, Step],
    answers: Sequence[tuple[float, str]],
) -> list[float]:
    """Return, for each click that an answer covered, milliseconds from its flush to the first such answer."""
    known = [(at, steps.get(version)) for at, version in answers]
    reached: dict[int, Reached] = {}
    waits = []
    for feedback, (partition, position) in places.items():
        if feedback not in flushed:
            continue
        if partition not in reached:
            reached[partition] = Reached(known, partition)
        at = reached[partition].first(position)
        if not np.isnan(at):
            waits.append((at - flushed[feedback]) * 1_000)
    return waits


def _order(step: Step | None, partition: int) -> int:
    offset, rank = (step.positions if step else {}).get(str(partition), [-1, -1])
    return order_of((offset, rank))


def measure(stack: Stack, *, seconds: float, rate: float) -> tuple[list[float], int, dict[str, list[float]]]:
    """Return the waits, how many clicks were flushed, and the waits hop by hop."""
    tails = {topic: stack.tail(topic) for topic in ("events", "samples", "deltas")}
    visits = stack.visits()
    asker = Asker("127.0.0.1", stack.port("serving"), stack.question(next(visits)))
    asker.start()
    run, flushed, sender = uuid.uuid4().hex[:8], dict[str, float](), stack.sender(f"freshness-{uuid.uuid4().hex[:8]}")
    begin = time.monotonic()
    for n, visit in enumerate(visits):
        due = begin + n / rate
        if due > begin + seconds:
            break
        time.sleep(max(0.0, due - time.monotonic()))
        impression, click = stack.events(visit, f"fresh-{run}-{n}")
        sender.emit(*impression)
        sender.emit(*click)
        flushed[str(click[1]["event_id"])] = time.monotonic()
    time.sleep(QUIET_S)
    asker.stop.set()
    asker.join()
    sender.close()
    read = [(r.timestamp_ms, decode_step(r.value)) for r in stack.read("steps") if r.value is not None]
    versions = {f"{step.run}-{step.step}": step for _, step in read}
    resolved, wall = Resolved.of(tails["samples"]()), time.time() - time.monotonic()
    hops = hops_ms(
        {feedback: (at + wall) * 1_000 for feedback, at in flushed.items()},
        event_times(tails["events"]()),
        resolved,
        read,
        [(r.timestamp_ms, s) for r in tails["deltas"]() if (s := versions.get(r.headers.get("version", "")))],
        [((at + wall) * 1_000, versions.get(version)) for at, version in asker.answers],
    )
    return freshness_ms(flushed, resolved.places, versions, asker.answers), len(flushed), hops


def main() -> int:
    """Measure and print; 1 when a click never reached an answer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="15 s of clicks instead of 60")
    parser.add_argument("--own", action="store_true", help="start a stack of its own, with the shop at 300/s")
    parser.add_argument("--rate", type=float, default=20.0, help="clicks a second")
    args = parser.parse_args()
    with Stack.open(own=args.own, shop_rate=300) as stack:
        waits, flushed, hops = measure(stack, seconds=15 if args.quick else 60, rate=args.rate)
    if not waits:
        print(f"none of {flushed} clicks reached an answer; see `headrace status`", file=sys.stderr)
        return 1
    figures = [Figure(f"freshness p{q}", float(np.percentile(waits, q)), "ms") for q in (50, 95, 99)]
    figures.append(Figure("clicks covered", 100 * len(waits) / flushed, "%"))
    for hop, each in hops.items():
        figures += [Figure(f"{hop} p{q}", float(np.percentile(each, q)), "ms") for q in (50, 99) if each]
    show(figures)
    return 0 if len(waits) == flushed else 1


if __name__ == "__main__":
    sys.exit(main())
