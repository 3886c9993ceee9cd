"""From a click's line being flushed by the web service to the first answer whose version contains it.

Method: on a stack that runs (`make up`), or on one of its own (`--own`), this program shows an impression and flushes
its click `--rate` times a second through `headrace.sender`, while a second thread asks `POST /v1/rank` without pause
and keeps (time, version). Afterwards the `samples` topic says at which position each click was resolved and the
`steps` topic which positions each version contains; a click's freshness ends with the first answer that covers it.
Nothing is estimated. The clock is this process's monotonic one; asking back to back bounds the error by one request.
"""

from __future__ import annotations

import argparse
import http.client
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).parent))

from harness.figures import Figure, show
from harness.stack import Stack

from headrace.contract.formats.events import decode_batch
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


def resolved_clicks(records: Iterable[Record]) -> dict[str, tuple[int, Position]]:
    """Return feedback id -> (partition, position) of every positive in these records of `samples`."""
    places: dict[str, tuple[int, Position]] = {}
    for record in records:
        if record.value is None:
            continue
        batch = decode_batch(record.value)
        names = ("feedback_id", "partition", "offset", "rank")
        for feedback, partition, offset, rank in zip(*(batch[n].to_pylist() for n in names), strict=True):
            if feedback is not None:
                places[feedback] = (partition, Position(offset, rank))
    return places


def freshness_ms(
    flushed: Mapping[str, float],
    places: Mapping[str, tuple[int, Position]],
    steps: Mapping[str, Step],
    answers: Sequence[tuple[float, str]],
) -> list[float]:
    """Return, for each click that an answer covered, milliseconds from its flush to the first such answer."""
    at_A = np.array([at for at, _ in answers])
    reached: dict[int, npt.NDArray[np.int64]] = {}
    for partition in {partition for partition, _ in places.values()}:
        order = [_order(steps.get(version), partition) for _, version in answers]
        reached[partition] = np.maximum.accumulate(np.array(order, np.int64))
    waits = []
    for feedback, (partition, position) in places.items():
        if feedback not in flushed:
            continue
        order_A = reached[partition]
        first = int(np.searchsorted(order_A, order_of(position), "left"))
        if first < len(at_A):
            waits.append((at_A[first] - flushed[feedback]) * 1_000)
    return waits


def _order(step: Step | None, partition: int) -> int:
    offset, rank = (step.positions if step else {}).get(str(partition), [-1, -1])
    return order_of((offset, rank))


def measure(stack: Stack, *, seconds: float, rate: float) -> tuple[list[float], int]:
    """Return the waits and how many clicks were flushed."""
    tail = stack.tail("samples")
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
    steps = [decode_step(record.value) for record in stack.read("steps") if record.value is not None]
    versions = {f"{step.run}-{step.step}": step for step in steps}
    return freshness_ms(flushed, resolved_clicks(tail()), versions, asker.answers), len(flushed)


def main() -> int:
    """Measure and print; 1 when a click never reached an answer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="15 s of clicks instead of 60")
    parser.add_argument("--own", action="store_true", help="start a stack of its own, with the shop at 300/s")
    parser.add_argument("--rate", type=float, default=20.0, help="clicks a second")
    args = parser.parse_args()
    with Stack.open(own=args.own, shop_rate=300) as stack:
        waits, flushed = measure(stack, seconds=15 if args.quick else 60, rate=args.rate)
    if not waits:
        print(f"none of {flushed} clicks reached an answer; see `headrace status`", file=sys.stderr)
        return 1
    figures = [Figure(f"freshness p{q}", float(np.percentile(waits, q)), "ms") for q in (50, 95, 99)]
    figures.append(Figure("clicks covered", 100 * len(waits) / flushed, "%"))
    show(figures)
    return 0 if len(waits) == flushed else 1


if __name__ == "__main__":
    sys.exit(main())
