"""Goal: rows of the matrix of options work on real Kafka and HDFS, with every stage a process.

Method: the events and the checks of tests/simulation/loop, at the pace of a real clock: a turn stands for what the
clock says at its beginning.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import option_levels
import pyarrow as pa
import pytest
from crawl_world import Site
from harness.stack import Stack
from loop_world import SECRET
from option_levels import FACTORS, drafted, is_possible
from option_world import Outcome, check, drive

from headrace.backends.lake.delta import DeltaLake
from headrace.cli.project_folder import load_project
from headrace.contract.formats.dead_letters import DeadLetter, decode_dead_letter
from headrace.contract.formats.events import PUNCTUATION, decode_batch
from headrace.contract.formats.steps import Step, decode_step
from headrace.contract.privacy import Privacy
from headrace.contract.project import Project
from headrace.kernels.sample_ids import id_hashes
from headrace.replay.ledger.ledger import Ledger

pytestmark = [pytest.mark.real, pytest.mark.long, pytest.mark.timeout(900)]

PACE = 4
"""Windows of 8 s: an event that a busy machine holds up for seconds is still in time."""
PARTITIONS, DRAIN_S, QUIET_S = 2, 180.0, 2.0
TOML = f"""
[log]
partitions = {PARTITIONS}

[ingest]
punctuate_ms = 200

[aggregate]
grid_ms = 500
"""
# The tests' folders come last on the path: a stage must find its own modules first.
DECLARED = """
import sys
sys.path += {paths!r}
import msgspec
import option_levels
draft = option_levels.drafted({{name: getattr(option_levels, level) for name, level in {row!r}.items()}}, {pace})
draft.crawls = [msgspec.structs.replace(crawl, start=({url!r},)) for crawl in draft.crawls]
PROJECT = draft.project()
PROJECT = msgspec.structs.replace(PROJECT, recipe=msgspec.structs.replace(PROJECT.recipe, seed={seed}))
"""
ROWS = {
    "late-corrections-of-a-hashed-key": {
        "key": "hashed_key",
        "private": "hashed_field",
        "unknown": "unknown_kept",
        "tasks": "mixed_tasks",
        "features": "list_features",
        "counters": "shared_pair_counter",
        "crawl": "json_crawl",
        "source": "nothing",
        "recipe": "layered",
    },
    "own-functions-and-an-access-log": {
        "key": "int_key",
        "private": "dropped_field",
        "unknown": "unknown_refused",
        "tasks": "corrected",
        "features": "own_features",
        "counters": "local_pair_counter",
        "crawl": "html_crawl",
        "source": "access_log",
        "recipe": "own_module",
    },
    "values-of-several-tasks": {
        "key": "nothing",
        "private": "hashed_field",
        "unknown": "unknown_dropped",
        "tasks": "two_tasks",
        "features": "number_features",
        "counters": "shared_counter",
        "crawl": "feed_crawl",
        "source": "nothing",
        "recipe": "valued",
    },
}


class TurnClock:
    """Tells when the turn began: what is asked, shown and logged in one turn has one time."""

    def __init__(self) -> None:
        self._ms = time.time_ns() // 1_000_000

    def now_ms(self) -> int:
        return self._ms

    def turn(self, milliseconds: int) -> None:
        """Wait until so much time has passed since the turn began, and begin the next."""
        time.sleep(max(0.0, (self._ms + milliseconds) / 1_000 - time.time()))
        self._ms = time.time_ns() // 1_000_000


class RealLoop:
    """A running stack with the face of `loop_world.Loop`."""

    pages = None
    """The site is there from the beginning; the stage `crawl` looks at it by itself."""

    def __init__(self, stack: Stack, project: Project, declare: Callable[[Path, int], None]) -> None:
        self.stack, self.project, self.clock, self._declare = stack, project, TurnClock(), declare
        self.privacy = Privacy(project, SECRET)
        self._sender = stack.sender("matrix")
        self._runs = 1

    # -- what a user does

    def send(self, tag: str, *records: Mapping[str, Any]) -> None:
        for record in records:
            self._sender.emit(tag, dict(record))
        assert self._sender.flush(30), "the gateway takes nothing"

    def ask(self, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        url = f"http://127.0.0.1:{self.stack.port('serving')}/v1/rank"
        request = urllib.request.Request(url, msgspec.json.encode(body), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def turn(self, milliseconds: int) -> None:
        self.clock.turn(milliseconds)

    def settle(self, milliseconds: int, turn_ms: int) -> None:
        self.clock.turn(milliseconds)

    def train_anew(self, seed: int) -> None:
        folder = Path(self.stack.env["HEADRACE_PROJECT"])
        self._declare(folder, seed)
        _, self.project = load_project(folder)
        self.stack.headrace("restart", "train", "serve")
        self._runs += 1

    # -- what there is then

    @property
    def trainer(self) -> Any:
        """The newest step, with the face of a trainer."""
        step = self._steps()[-1]
        return SimpleNamespace(run_id=step.run, learner=SimpleNamespace(step=step.step))

    def letters(self) -> list[DeadLetter]:
        return [decode_dead_letter(record.value or b"") for record in self.stack.read("dead_letters")]

    def samples(self) -> pa.Table:
        return DeltaLake(self.stack.lake_uri(), partitions=PARTITIONS, hash_ids=id_hashes).read()

    def stored_text(self) -> str:
        found = [str(letter) for letter in self.letters()]
        found += [f"{record.key!r} {record.value!r}" for record in self.stack.read("features")]
        for topic in ("events", "samples"):
            for record in self.stack.read(topic):
                if record.headers.get("kind") != PUNCTUATION:
                    found.append(str(decode_batch(record.value or b"").to_pydict()))
        return "\n".join([*found, str(self.samples().to_pydict())])

    def ledger(self, mode: str) -> Ledger:
        """Draw the ledger when nothing is on its way any more, and the newest model serves."""
        told, deadline = "", time.monotonic() + DRAIN_S
        while time.monotonic() < deadline:
            told = self.stack.headrace("ledger", "--json", *(["--full"] if mode == "full" else []), check=False)
            ledger = msgspec.json.decode(told, type=Ledger)
            is_idle = ledger.waiting == ledger.pending == ledger.in_flight == 0 and ledger.stored == ledger.samples
            if is_idle and len(ledger.models) == self._runs and self._serves_the_newest():
                return ledger
            time.sleep(QUIET_S)
        raise AssertionError(told)

    def check(self) -> Ledger:
        """Fail unless the ledger closes, nothing is lost or twice, and a replay is equal."""
        full = self.ledger("full")
        assert full.closes and (full.lost, full.twice) == (0, 0), full
        assert not full.seals_wrong and not full.overdue, full
        replayed = self.stack.json("replay", timeout_s=180)
        assert replayed["equal"] is True, replayed
        return full

    def _serves_the_newest(self) -> bool:
        served = json.loads(self.stack.get("serving", "/v1/model"))["version"]
        return bool(served == f"{self.trainer.run_id}-{self.trainer.learner.step}")

    def _steps(self) -> list[Step]:
        return [decode_step(record.value) for record in self.stack.read("steps") if record.value is not None]

    def close(self) -> None:
        self._sender.close()


@contextmanager
def opened(folder: Path, row: Mapping[str, str]) -> Iterator[Outcome]:
    """Yield a stack that runs the row's project, and the site that its crawler reads."""
    draft, site = drafted({name: getattr(option_levels, level) for name, level in row.items()}, PACE), Site()
    page, content_type = draft.page
    site.pages = {"/": (200, {"Content-Type": content_type}, page)}
    draft.crawls = [msgspec.structs.replace(crawl, start=(f"{site.url}/",)) for crawl in draft.crawls]
    words = {"paths": [str(Path(option_levels.__file__).parent)], "row": dict(row), "pace": PACE, "url": f"{site.url}/"}

    def declare(where: Path, seed: int) -> None:
        (where / "project.py").write_text(DECLARED.format(**words, seed=seed))

    (folder / "headrace.toml").write_text(TOML)
    declare(folder, draft.project().recipe.seed)
    _, project = load_project(folder)
    assert project == draft.project()
    base = 24_100 + os.getpid() % 300 * 30
    key = {"HEADRACE_PRIVACY_KEY": SECRET}
    try:
        with Stack.open(own=True, shop_rate=0, port_base=base, project=folder, secrets=key) as stack:
            loop = RealLoop(stack, project, declare)
            yield Outcome(draft, project, loop)  # type: ignore[arg-type]
            loop.close()
    finally:
        site.close()


@pytest.mark.parametrize("name", ROWS)
def test_a_row_works_on_the_real_stack(name: str, tmp_path: Path) -> None:
    row = {factor: ROWS[name][factor] for factor in FACTORS}
    assert is_possible({factor: getattr(option_levels, level) for factor, level in row.items()})
    with opened(tmp_path, row) as out:
        drive(out)
        check(out)
        for each in out.draft.checks:
            each(out)
