"""What `chaos --stage all` adds to the account of ids: the stack is whole again by itself, and its model is exact.

1. Every process says that it is ready, and goes on to run, without a hand.
2. Samples, lake and steps stand still: all that was acked is joined, stored and learnt. A wait ends when nothing has
   moved for `STALLED_S`, and says every few seconds what it waits for.
3. The newest snapshot holds the newest step, and serving answers with it: what lies in its memory has the snapshot's
   digest, and no replica ever found another.
4. Replay as trained reaches the digest of that snapshot.
"""

from __future__ import annotations

import contextlib
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Self

import msgspec
import psutil

from headrace.backends.log.kafka import KafkaReader
from headrace.contract.config import Config
from headrace.contract.errors import Unavailable
from headrace.contract.formats.topics import Topics
from headrace.contract.project import Project
from headrace.deploy.local.chaos.crawl_run import lake_of
from headrace.deploy.local.chaos.load import Load
from headrace.deploy.local.chaos.own_stack import Say
from headrace.deploy.local.layout import HOST, Layout
from headrace.deploy.local.metrics_text import parse
from headrace.deploy.local.readiness import http_get, kafka_trouble
from headrace.deploy.local.servers import room
from headrace.deploy.local.supervise import Process, Supervisor
from headrace.process.awake import awake_s
from headrace.process.background import Background
from headrace.replay.as_trained import Result
from headrace.replay.recorded import recorded_steps
from headrace.trainer.commit.publish import read_manifests

STALLED_S = 180.0
STEADY_S = 20
AT_MOST_S = 2_400.0
REPLAY_S = 1_800.0
LOOK_S = 3.0
TELL_S = 15.0
BEHIND_MAX = 10_000
"""Records. Two gateways write about 100 a second: this is what a minute or two leave."""
_FOLLOWERS = ("stream", "aggregate", "sink", "train")


class ModelAccount(msgspec.Struct, kw_only=True):
    """The live model beside its replay. `wrong` says what differs."""

    run: str = ""
    step: int = 0
    """Of the newest snapshot."""
    newest_step: int = 0
    """Of the run's `steps`."""
    live_digest: str = ""
    replayed_digest: str = ""
    replayed_rows: int = 0
    published: str = ""
    """Version of the newest snapshot."""
    served: str = ""
    """What `/v1/model` answers."""
    published_digest: str = ""
    """Of the values that the newest snapshot serves."""
    served_digest: str = ""
    """Of the values that lie in serving's memory."""
    replicas_wrong: int | None = None
    """How often a replica found another digest than the trainer's, since serving began; None where it does not tell."""
    trouble: str = ""
    """Why there was no replay."""

    def wrong(self) -> list[str]:
        """Return what is not as it must be, [] where all is."""
        found = [self.trouble] if self.trouble else []
        if self.step != self.newest_step:
            found.append(f"the newest snapshot is of step {self.step} and the newest step is {self.newest_step}")
        if not self.live_digest or self.replayed_digest != self.live_digest:
            found.append(f"replay reached {self.replayed_digest or 'no digest'}, live is {self.live_digest or 'none'}")
        if self.served != self.published:
            found.append(f"serving answers with {self.served or 'nothing'}, published is {self.published or 'nothing'}")
        elif not self.served_digest or self.served_digest != self.published_digest:
            found.append(
                f"served is digest {self.served_digest or 'none'}, published {self.published_digest or 'none'}"
            )
        if self.replicas_wrong != 0:
            found.append(f"serving found its model wrong, times: {self.replicas_wrong}")
        return found


class Backlog:
    """Looks on while a stack is broken: the load waits where a stage is too many records behind, and goes on after.

    What a stage does not tell, since it is dead or frozen, changes nothing. The lag is told from the log's ends.
    """

    def __init__(self, layout: Layout, load: Load, say: Say) -> None:
        self._urls = [f"http://{HOST}:{layout.port(f'metrics_{s}')}/metrics" for s in _FOLLOWERS]
        self._load, self._say = load, say
        self._lags: dict[str, int] = {}
        self._stop = threading.Event()
        self._background = Background()

    def __enter__(self) -> Self:
        self._thread = self._background.thread("backlog", self._look)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Look on no more. Raises what ended the looking before its time: the load may have waited for nothing."""
        self._stop.set()
        self._thread.join()
        if kind is None:
            self._background.check()

    def told(self) -> str:
        """Return a phrase on the load and on how far behind the stages are."""
        load, lags = self._load, " ".join(f"{stage} {lag:,}" for stage, lag in sorted(self._lags.items()))
        paused = f", paused for {load.held_s:.0f} s" if load.held_s else ""
        return f"{load.count:,} emitted, {load.unacked:,} without ack{paused}; records behind: {lags or '-'}"

    def _look(self) -> None:
        while not self._stop.wait(LOOK_S):
            found = {}
            for stage, url in zip(_FOLLOWERS, self._urls, strict=True):
                status, body = http_get(url)
                lag = parse(body.decode()).get(f"headrace_{stage}_lag_records") if status == 200 else None
                if lag is not None and math.isfinite(lag):
                    found[stage] = int(lag)
            self._lags = found
            if any(lag > BEHIND_MAX for lag in found.values()):
                self._load.wait.set()
            # A stage that does not tell may be behind: the load waits on.
            elif len(found) == len(_FOLLOWERS) and all(lag < BEHIND_MAX // 2 for lag in found.values()):
                self._load.wait.clear()


def await_steady(layout: Layout, say: Say) -> None:
    """Return when every process has run for `STEADY_S` without an end: what ends again and again is ready in between.

    Raises `Unavailable` with those that are not after `STALLED_S`.
    """
    begin = told_s = awake_s()
    while loose := [f"{p.name} {p.state} for {p.uptime_s} s" for p in _processes(layout) if not _is_steady(p)]:
        if awake_s() - begin > STALLED_S:
            raise Unavailable(f"not steady after {STALLED_S:.0f} s: {', '.join(loose)}; see {layout.logs}.")
        if awake_s() - told_s > TELL_S:
            say(f"not steady yet: {', '.join(loose)}")
            told_s = awake_s()
        time.sleep(1.0)


def broker_is_settled(layout: Layout) -> bool:
    """Say whether the broker answers, or waits for room before it begins: it is not in the middle of its recovery."""
    pid = Supervisor(layout).pids().get("kafka", 0)
    with contextlib.suppress(psutil.Error):
        if pid and room.__name__ in psutil.Process(pid).cmdline():
            return bool(room.lacking(str(layout.home)))
    return bool(pid) and not kafka_trouble(layout.brokers, 1.0)


def _processes(layout: Layout) -> Sequence[Process]:
    found = Supervisor(layout).processes()
    if not found:
        raise Unavailable(f"the supervisor of {layout.home} does not answer; see {layout.logs}.")
    return found


def _is_steady(process: Process) -> bool:
    return process.state == "running" and process.uptime_s >= STEADY_S


def await_still(layout: Layout, config: Config, say: Say) -> bool:
    """Return True when samples, lake and steps stood still for two commits of the sink, False after `AT_MOST_S`."""
    topics, reader = Topics(config.log.generation), KafkaReader(layout.brokers)
    # The sink commits every commit_ms and a commit to HDFS takes seconds; the trainer waits 50 ms.
    still_s, begin = 2 * config.sink.commit_ms / 1000 + 6.0, awake_s()
    before, since_s, told_s = "", begin, begin
    try:
        while awake_s() - begin < AT_MOST_S:
            state = lake_of(layout, config).state()
            samples, steps = sum(reader.end_offsets(topics.samples).values()), reader.end_offsets(topics.steps)
            now = f"{samples:,} records of samples, {sum(steps.values()):,} steps, lake version "
            now += str(state.version if state else -1)
            if now != before:
                before, since_s = now, awake_s()
            elif awake_s() - since_s > still_s:
                return True
            if awake_s() - told_s > TELL_S:
                say(f"waiting until these stand still: {now}")
                told_s = awake_s()
            time.sleep(LOOK_S)
    finally:
        reader.close()
    return False


def model_account(layout: Layout, project: Project, config: Config, say: Say) -> ModelAccount:
    """Wait for a snapshot of the newest step, and for serving to answer with it; then replay, and compare."""
    account = ModelAccount()

    def published() -> str:
        _read_published(layout, project, config, account)
        return "" if account.step == account.newest_step else f"a snapshot of step {account.newest_step}"

    def served() -> str:
        account.served, account.served_digest = served_version(layout)
        return "" if account.served == account.published else f"serving to answer with {account.published}"

    for ask in (published, served):
        _await(ask, say)
    account.replicas_wrong = _replicas_wrong(layout)
    say(f"replaying {account.newest_step:,} steps of run {account.run}")
    _replay(layout, account)
    return account


def _await(ask: Callable[[], str], say: Say) -> None:
    begin = told_s = awake_s()
    while (reason := ask()) and awake_s() - begin < STALLED_S:
        if awake_s() - told_s > TELL_S:
            say(f"waiting for {reason}")
            told_s = awake_s()
        time.sleep(1.0)


def _read_published(layout: Layout, project: Project, config: Config, account: ModelAccount) -> None:
    topics, reader = Topics(config.log.generation), KafkaReader(layout.brokers)
    manifests = read_manifests(reader, topics, project.model)
    if manifests:
        newest = manifests[-1]
        account.run, account.step, account.published = newest.run, newest.step, newest.version
        account.live_digest, account.published_digest = newest.digest, newest.served
    steps = [s.step for s in recorded_steps(reader, topics) if s.model == project.model and s.run == account.run]
    account.newest_step = max(steps, default=0)
    reader.close()


def served_version(layout: Layout) -> tuple[str, str]:
    """Return the version that serving answers with and the digest of what lies there, "" where it does not answer."""
    status, body = http_get(f"http://{HOST}:{layout.port('serving')}/v1/model")
    told = msgspec.json.decode(body) if status == 200 else {}
    return str(told.get("version") or ""), str(told.get("served_digest") or "")


def _replicas_wrong(layout: Layout) -> int | None:
    status, body = http_get(f"http://{HOST}:{layout.port('metrics_serve')}/metrics")
    found = parse(body.decode()).get("headrace_serve_replica_digest_wrong_total") if status == 200 else None
    return None if found is None else int(found)


def _replay(layout: Layout, account: ModelAccount) -> None:
    """Run `headrace replay` as its user does, in the environment of the stack."""
    command = [sys.executable, "-m", "headrace.cli.main", "replay", "--json"]
    try:
        ran = subprocess.run(
            command, env=layout.environment(), capture_output=True, text=True, timeout=REPLAY_S, check=False
        )
        found = msgspec.json.decode(ran.stdout.strip().rpartition("\n")[2], type=Result)
    except subprocess.TimeoutExpired:
        account.trouble = f"replay did not end within {REPLAY_S:.0f} s"
    except msgspec.DecodeError:
        account.trouble = f"replay ended with {ran.returncode}: {ran.stderr.strip()[-400:]}"
    else:
        account.replayed_digest, account.replayed_rows = found.digest, found.rows
        if (found.run, found.step) != (account.run, account.step):
            account.trouble = f"replay went to step {found.step} of run {found.run}, not to the snapshot above"
