"""Play the made-up visitors of the project's traffic.py to a running stack, until Ctrl-C.

For each visit it asks serving to rank, logs what was shown through `headrace.sender`, and logs what the visitor does
when its time has come. As the visitors' true probabilities are known, it tells how good the served scores are beside
the best that there could be. Events of a try are events like any other: they are learnt, and stay in log and lake.
"""

from __future__ import annotations

import argparse
import http.client
import importlib.util
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from headrace.cli.addresses import HOST
from headrace.cli.project_folder import is_demo
from headrace.cli.project_lines import failed
from headrace.cli.runtime import Runtime, add_common, open_runtime, stop_event
from headrace.contract.errors import ConfigRejected, Overloaded
from headrace.examples.service import Service
from headrace.examples.visits import Visits
from headrace.process.kept_connection import KeptConnection
from headrace.sender import Sender

FILE = "traffic.py"
RATE, RATE_MAX = 20.0, 1_000.0
TELL_S, TURN_S, ANSWER_S, AWAY_S = 10.0, 0.005, 0.5, 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's flags."""
    add_common(parser)
    parser.add_argument("--rate", type=float, default=RATE, help="visits a second (%(default)g)")
    parser.add_argument("--seed", type=int, default=1, help="whose visitors come (%(default)d)")
    parser.add_argument("--seconds", type=float, default=0.0, help="show for so long; 0 until Ctrl-C (%(default)g)")
    parser.add_argument("--json", action="store_true", help="tell the last figures as JSON")


def main(args: argparse.Namespace) -> int:
    """Play until SIGTERM or SIGINT."""
    if not 0 < args.rate <= RATE_MAX:
        raise ConfigRejected(f"--rate {args.rate:g}: above 0 and at most {RATE_MAX:g} visits a second are played.")
    runtime, stop = open_runtime(args), stop_event()
    visits = load_visits(runtime.project_dir)
    ranker = Ranker(runtime.port("serving"))
    sender = Sender("", HOST, _forward_port(runtime), spool_dir=runtime.home / "spool" / "traffic")
    service = Service(
        runtime.project, visits(runtime.project, args.seed), log=sender.emit, run=uuid.uuid4().hex[:12], rank=ranker.ask
    )
    begun = told = due = time.monotonic()
    try:
        while not stop.is_set() and not (args.seconds and time.monotonic() - begun > args.seconds):
            now = time.monotonic()
            if now >= due and not service.show(runtime.clock.now_ms()):
                break
            due = max(due + 1 / args.rate, now - 1.0) if now >= due else due
            service.answer(runtime.clock.now_ms())
            if now - told >= TELL_S:
                told = now
                print("\n".join(figures(service, runtime.clock.now_ms(), ranker.share)), flush=True)
            stop.wait(min(TURN_S, max(0.0, due - time.monotonic())))
    except Overloaded as error:
        raise ConfigRejected(f"{error} Is the gateway up? `headrace status` tells.") from error
    finally:
        ranker.close()
        sender.close(timeout=5.0)
    _tell_last(service, runtime.clock.now_ms(), as_json=args.json)
    return 0


class Ranker:
    """Asks serving over one kept-alive connection; one that is away is not asked for a moment."""

    def __init__(self, port: int) -> None:
        self._asked, self._answered, self._away_until = 0, 0, 0.0
        self._connection = KeptConnection(HOST, port, ANSWER_S)

    @property
    def share(self) -> float:
        """Return the share of visits that got an answer."""
        return self._answered / max(1, self._asked)

    def ask(self, body: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the answer of POST /v1/rank; None where serving is away, has no model yet, or refuses."""
        self._asked += 1
        if time.monotonic() < self._away_until:
            return None
        try:
            headers = {"Content-Type": "application/json"}
            status, data = self._connection.post("/v1/rank", msgspec.json.encode(body), headers)
            if status != 200:
                raise http.client.HTTPException(f"status {status}")
            answer: dict[str, Any] = msgspec.json.decode(data)
        except (OSError, http.client.HTTPException, msgspec.DecodeError):
            self.close()
            self._away_until = time.monotonic() + AWAY_S
            return None
        self._answered += 1
        return answer

    def close(self) -> None:
        """Let the connection go."""
        self._connection.close()


def load_visits(folder: Path) -> Visits:
    """Return the function `visits` of the folder's traffic.py. Raises `ConfigRejected`, naming what is missing."""
    file = folder / FILE
    if is_demo(folder):
        raise ConfigRejected("the demo shop has a stage that makes its traffic: `headrace up` starts it.")
    if not file.is_file():
        raise ConfigRejected(
            f"{file} does not exist. `headrace init` writes one with each new project; it defines "
            "visits(project, seed) and yields headrace.examples.visits.Visit."
        )
    spec = importlib.util.spec_from_file_location("headrace_traffic", file)
    if spec is None or spec.loader is None:
        raise ConfigRejected(f"{file} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ConfigRejected(failed(error, file, vars(module))) from error
    found = getattr(module, "visits", None)
    if not callable(found):
        raise ConfigRejected(f"{file} has no function visits(project, seed).")
    visits: Visits = found
    return visits


def figures(service: Service, now_ms: int, answered: float) -> list[str]:
    """Return what has come of the try, a line a task. A figure waits for its task's window, corrections included."""
    lines = [
        f"{time.strftime('%H:%M:%S')}  {service.shown:,} impressions shown, {answered:.0%} of visits answered, "
        f"{service.waits:,} feedback to come"
    ]
    for task in service.project.tasks:
        quality = service.quality(task, upto_ms=now_ms)
        minutes = (task.window_ms + task.correct_ms) / 60_000
        waits = f"first figure {minutes:.1f} min after the first answer"
        lines.append(f"  {task.name}: {quality.line() if quality.impressions else waits}")
    return lines


def _tell_last(service: Service, now_ms: int, *, as_json: bool) -> None:
    if as_json:
        told = {task.name: service.quality(task, upto_ms=now_ms) for task in service.project.tasks}
        print(msgspec.json.encode({"shown": service.shown, "tasks": told}).decode(), flush=True)


def _forward_port(runtime: Runtime) -> int:
    """Return where the shipper listens: SHIPPER_PORT when one stands between, else the gateway."""
    told = os.environ.get("SHIPPER_PORT")
    return int(told) if told else runtime.port("forward")
