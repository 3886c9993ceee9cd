"""Goal: `chaos --stage all` breaks a whole stack as its seed says, and sees what is not whole or not exact afterwards.

Method: the plan drawn for many seeds; strikes on processes of the test's own; accounts with one planted fault each; the
small disk filled for real where the test runs as root.
"""

from __future__ import annotations

import errno
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import ClassVar, cast

import psutil
import pytest

from headrace.cli.main import main
from headrace.cli.tools import chaos as chaos_verb
from headrace.contract.errors import Unavailable
from headrace.deploy.local.chaos import load as load_module
from headrace.deploy.local.chaos import whole as whole_module
from headrace.deploy.local.chaos.account import Account, all_there, closes, wrong
from headrace.deploy.local.chaos.faults import FULL_S, SERVE_WORKER, VICTIMS, Fault, draw_faults
from headrace.deploy.local.chaos.load import Load
from headrace.deploy.local.chaos.plan import ALL, needed
from headrace.deploy.local.chaos.small_disk import SmallDisk, lacking
from headrace.deploy.local.chaos.strikes import Strikes
from headrace.deploy.local.chaos.whole import ModelAccount, await_steady
from headrace.deploy.local.layout import Layout
from headrace.deploy.local.supervise import Process, Supervisor
from headrace.replay.ledger.ledger import Ledger

MODEL = ModelAccount(
    run="r",
    step=9,
    newest_step=9,
    live_digest="d",
    replayed_digest="d",
    replayed_rows=1,
    published="r-9",
    served="r-9",
    published_digest="s",
    served_digest="s",
    replicas_wrong=0,
)


LAYOUT = {"port_base": 1, "brokers": "", "store": "", "webhdfs": None, "own_kafka": True, "own_hdfs": True}


def whole(**other: object) -> Account:
    """Return an account of a whole stack that closes, but for what is given."""
    ledger = Ledger(positives=1, samples=1, stored=1, learnt=1, closes=True)
    told = {"ledger": ledger, "model": MODEL, "faults": [Fault(0.0, "kill", "sink", done=True)], "closes": True}
    return Account(
        seed=1,
        stages=[ALL],
        kills=[],
        rate=1,
        seconds=1.0,
        rate_held=1.0,
        **{**told, **other},  # type: ignore[arg-type]
    )


# -- the plan


def test_the_same_seed_draws_the_same_faults() -> None:
    first, again, other = (draw_faults(Random(seed), 30, fills=True) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("seed", range(30))
def test_every_process_is_killed_and_both_servers_are_taken_away_and_the_disk_is_filled_once(seed: int) -> None:
    faults = draw_faults(Random(seed), 60, fills=True)
    kills = Counter(fault.target for fault in faults if fault.kind == "kill")
    assert set(kills) == set(VICTIMS) and kills.total() == 60 and min(kills.values()) >= 3
    spells = Counter((f.kind, f.target) for f in faults if f.target in ("broker", "store", "disk"))
    assert spells == {("freeze", "broker"): 1, ("stop", "broker"): 1, ("freeze", "store"): 1, ("stop", "store"): 1} | {
        ("fill", "disk"): 1
    }
    assert [f.for_s for f in faults if f.kind == "fill"] == [FULL_S]
    freezes = [f for f in faults if f.kind == "freeze" and f.target not in ("broker", "store")]
    assert len(freezes) == 10 and all(2 <= f.for_s <= 25 for f in freezes)
    assert faults == sorted(faults, key=lambda fault: fault.at_s)


@pytest.mark.parametrize("kills", [1, 8, 60])
@pytest.mark.parametrize("seed", range(10))
def test_absences_do_not_overlap_and_nobody_is_killed_who_is_away(seed: int, kills: int) -> None:
    faults = draw_faults(Random(seed), kills, fills=True)
    spells = [f for f in faults if f.target in ("broker", "store", "disk")]
    assert all(first.at_s + first.for_s <= then.at_s for first, then in pairwise(spells))
    for kill in (f for f in faults if f.kind == "kill"):
        away = [s for s in spells if s.at_s <= kill.at_s <= s.at_s + s.for_s]
        assert not any(kill.target in spell.processes() for spell in away)


def test_what_cannot_be_filled_or_does_not_run_is_left_out() -> None:
    faults = draw_faults(Random(1), 60, fills=False, but=("crawl", "ingest-2"))
    assert not [f for f in faults if f.kind == "fill" or f.target in ("crawl", "ingest-2")]


def test_all_runs_every_stage_and_stands_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both are of the whole process, which is the tests'.
    monkeypatch.setattr(chaos_verb, "quiet_clients", lambda: None)
    monkeypatch.setattr(chaos_verb.signal, "signal", lambda *_: None)
    assert needed([ALL]) == {"ingest", "stream", "aggregate", "sink", "train", "serve", "crawl", "tensorboard"}
    assert main(["chaos", "--stage", "all,ingest"]) == 2
    assert "leave the others out" in capsys.readouterr().err


# -- the account


def test_the_account_of_a_whole_stack_closes() -> None:
    assert closes(whole()) and wrong(whole()) == []


@pytest.mark.parametrize(
    ("planted", "said"),
    [
        ({"replayed_digest": "other"}, "replay reached other, live is d"),
        ({"live_digest": "", "replayed_digest": ""}, "live is none"),
        ({"step": 8}, "the newest snapshot is of step 8 and the newest step is 9"),
        ({"served": "r-8"}, "serving answers with r-8, published is r-9"),
        ({"served_digest": "other"}, "served is digest other, published s"),
        ({"served_digest": "", "published_digest": ""}, "served is digest none"),
        ({"replicas_wrong": 1}, "serving found its model wrong, times: 1"),
        ({"replicas_wrong": None}, "times: None"),
        ({"trouble": "replay ended with 1: a step is missing"}, "a step is missing"),
    ],
)
def test_a_model_that_differs_from_its_replay_or_is_not_served_is_told(planted: dict[str, object], said: str) -> None:
    fields = {name: getattr(MODEL, name) for name in MODEL.__struct_fields__}
    account = whole(model=ModelAccount(**fields | planted))
    assert not closes(account)
    assert said in "; ".join(wrong(account))


@pytest.mark.parametrize(
    "ledger",
    [
        Ledger(positives=1, samples=1, stored=0, learnt=1, closes=True),
        Ledger(positives=1, samples=1, stored=1, in_flight=1, closes=True),
        Ledger(positives=1, samples=1, stored=1, learnt=1, lost=1, closes=False),
        Ledger(positives=1, samples=1, stored=1, learnt=1, twice=1, closes=False),
        Ledger(positives=1, samples=1, stored=1, learnt=1, closes=True, overdue=["model"]),
    ],
    ids=["not stored", "not learnt", "lost", "twice", "overdue"],
)
def test_a_ledger_that_is_open_is_told(ledger: Ledger) -> None:
    account = whole(ledger=ledger)
    assert not closes(account) and "the ledger" in wrong(account)[0]


def test_samples_need_be_learnt_only_where_a_trainer_is_in_the_run() -> None:
    ledger = Ledger(positives=1, samples=1, stored=1, in_flight=1, closes=True)
    assert all_there(ledger, ["sink"]) and not all_there(ledger, [ALL])


def test_a_fault_that_was_not_carried_out_is_told() -> None:
    assert "not carried out: train" in wrong(whole(faults=[Fault(1.0, "kill", "train")]))[0]


@pytest.mark.parametrize(("state", "uptime_s"), [("backoff", 0), ("running", 3)], ids=["ended", "started again"])
def test_a_process_that_ends_again_and_again_is_named_though_it_is_ready_in_between(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state: str, uptime_s: int
) -> None:
    rows = [Process("sink", "running", 1, 1, 1, "", 60), Process("stream", state, 2, 1, 1, "", uptime_s)]
    monkeypatch.setattr(whole_module, "_processes", lambda layout: rows)
    monkeypatch.setattr(whole_module, "STALLED_S", -1.0)
    layout = Layout(**LAYOUT, home=tmp_path, project=tmp_path)  # type: ignore[arg-type]
    with pytest.raises(Unavailable, match=f"stream {state} for {uptime_s} s"):
        await_steady(layout, lambda _: None)
    rows.pop()
    await_steady(layout, lambda _: None)


# -- the strikes


class OwnProcesses:
    """A supervisor of the test's own processes."""

    def __init__(self) -> None:
        self.running = {name: subprocess.Popen(["sleep", "60"]) for name in ("sink", "train")}
        self.told: list[tuple[str, Sequence[str]]] = []

    def pids(self) -> dict[str, int]:
        return {name: process.pid for name, process in self.running.items()}

    def end(self, names: Sequence[str]) -> None:
        self.told.append(("end", names))

    def begin(self, names: Sequence[str]) -> None:
        self.told.append(("begin", names))


@pytest.fixture
def own() -> Iterator[OwnProcesses]:
    processes = OwnProcesses()
    yield processes
    for process in processes.running.values():
        process.kill()
        process.wait()


def test_faults_strike_overlap_and_end(own: OwnProcesses) -> None:
    faults = [
        Fault(0.0, "freeze", "train", 0.3),
        Fault(0.0, "stop", "store", 0.2),
        Fault(0.1, "kill", "sink"),
    ]
    seen: list[str] = []

    def told() -> str:
        seen.append(psutil.Process(own.running["train"].pid).status())
        return "load"

    said: list[str] = []
    Strikes(cast(Supervisor, own), None, said.append).run(faults, told)
    assert own.running["sink"].wait(5) == -9
    assert seen[-1] == psutil.STATUS_STOPPED, "train was frozen while sink was killed"
    assert psutil.Process(own.running["train"].pid).status() != psutil.STATUS_STOPPED
    assert own.told == [("end", ("namenode", "datanode")), ("begin", ("namenode", "datanode"))]
    assert all(fault.done for fault in faults)
    assert f"kill -9 sink (pid {own.running['sink'].pid})" in "\n".join(said)


def test_a_run_that_breaks_off_leaves_nothing_frozen_and_nothing_stopped(own: OwnProcesses) -> None:
    faults = [Fault(0.0, "freeze", "train", 60.0), Fault(0.0, "stop", "broker", 60.0), Fault(0.0, "kill", "nobody")]

    def told() -> str:
        if own.told:
            raise KeyboardInterrupt
        return ""

    with pytest.raises(KeyboardInterrupt):
        Strikes(cast(Supervisor, own), None, lambda _: None).run(faults, told)
    assert psutil.Process(own.running["train"].pid).status() != psutil.STATUS_STOPPED
    assert own.told == [("end", ("kafka",)), ("begin", ("kafka",))]
    assert [fault.done for fault in faults] == [True, True, False]


def test_a_worker_of_serving_is_a_child_of_the_first_process(own: OwnProcesses) -> None:
    parent = subprocess.Popen(["sh", "-c", "sleep 60 & wait"])
    own.running["serve"] = parent
    while not psutil.Process(parent.pid).children():
        time.sleep(0.01)
    child = psutil.Process(parent.pid).children()[0]
    fault = Fault(0.0, "kill", SERVE_WORKER)
    Strikes(cast(Supervisor, own), None, lambda _: None).run([fault], lambda: "")
    assert fault.pids == [child.pid]
    assert parent.wait(5) == 0, "the parent outlives it"


def test_the_last_byte_goes_when_no_broker_recovers_and_comes_back(own: OwnProcesses) -> None:
    class Disk:
        told: ClassVar[list[str]] = []

        def fill_but(self, left_bytes: int) -> None:
            self.told.append(f"but {left_bytes >> 20} MiB")

        def fill(self) -> None:
            self.told.append("full")

        def free(self) -> None:
            self.told.append("free")

    answers = iter([False, False, True, True])

    def is_settled() -> bool:
        Disk.told.append("asked")
        return next(answers)

    strikes = Strikes(cast(Supervisor, own), cast(SmallDisk, Disk()), lambda _: None, is_settled=is_settled)
    strikes.run([Fault(0.0, "fill", "disk", 0.1)], lambda: "")
    assert Disk.told == ["but 512 MiB", "asked", "asked", "asked", "full", "asked", "free"]


# -- the load and the disk


def test_the_load_pauses_while_it_is_told_to_and_owes_nothing_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ingest_world import PROJECT

    monkeypatch.setattr(load_module, "TURN_S", 0.001)
    load = Load(PROJECT, 1, tmp_path / "spool", 200, 1)
    load.wait.set()
    load.start()
    while load.held_s < 0.05:
        time.sleep(0.005)
    assert load.count == 0
    load.wait.clear()
    while not load.count:
        time.sleep(0.001)
    load.stop()
    assert load.unacked == load.count
    load.settled(0.0)


def test_what_ends_the_load_reaches_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ingest_world import PROJECT

    load = Load(PROJECT, 1, tmp_path / "spool", 1_000, 1)
    monkeypatch.setattr(load, "_emit", lambda: 1 / 0)
    load.start()
    load._thread.join()
    with pytest.raises(ZeroDivisionError):
        load.stop()
    load.settled(0.0)


def test_a_full_disk_takes_nothing_until_it_is_freed(tmp_path: Path) -> None:
    if reason := lacking(tmp_path, 64 << 20):
        pytest.skip(reason)
    disk = SmallDisk(tmp_path, 64 << 20)
    try:
        disk.fill()
        with pytest.raises(OSError) as full:
            (disk.mount / "more").write_bytes(bytes(8_192))
        assert full.value.errno == errno.ENOSPC and disk.free_bytes() == 0
        disk.free()
        (disk.mount / "more").write_bytes(bytes(8_192))
    finally:
        disk.unmount()
    assert not list(disk.mount.iterdir()) and not (tmp_path / "disk.img").exists()


def test_a_disk_without_room_below_it_is_not_made(tmp_path: Path) -> None:
    assert lacking(tmp_path, 1 << 60)
