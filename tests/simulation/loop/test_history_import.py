"""Goal: history that is imported is what it would be had it been sent live, each row once however the import dies, and
a trainer learns it and then what is live. Method: events of the ads example from a seed, as files and through the whole
loop in memory; the importer is killed at each of its steps, and told that commits failed that happened."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from history_world import CONFIG, MINUTE_MS, TURN_MS, History, Killed, content, prompt, traffic, whole, write_files
from loop_world import START_MS, opened

from headrace.backends.lake.imports import Imports
from headrace.contract.errors import ConfigRejected, Unavailable
from headrace.contract.formats.sample import sample_schema
from headrace.examples.ads.project import PROJECT
from headrace.kernels.sample_ids import seal_of

LONGEST_MS = 31 * MINUTE_MS


def sent_live(loop, events) -> None:
    tags = {"impression": PROJECT.impression.tag, **{f.name: f.tag for f in PROJECT.feedback}}
    end_ms = events[-1][0]
    while loop.clock.now_ms() <= end_ms:
        begin_ms = loop.clock.now_ms()
        for kind in tags:
            ours = [
                {**r, "event_time_ms": at} for at, k, r in events if k == kind and begin_ms < at <= begin_ms + TURN_MS
            ]
            if ours:
                loop.send(tags[kind], *ours)
        loop.turn(TURN_MS)


@pytest.mark.parametrize("seed", [1, 2])
def test_an_import_makes_the_samples_that_the_same_events_make_live(tmp_path: Path, seed: int) -> None:
    events = traffic(seed, 90)
    history = History(tmp_path / "import")
    write_files(events, history.folder)
    found = history.run()
    with opened(PROJECT, prompt(TURN_MS), tmp_path) as loop:
        sent_live(loop, events)
        loop.settle(LONGEST_MS, 5 * MINUTE_MS)
        live = content(loop.samples())
    imported = content(history.lake.read())
    assert len(imported) == found.samples > 150
    for mine, theirs in zip(imported, live, strict=True):
        assert mine == theirs
    assert sum(row["correction"] for row in imported) > 0, "no late conversion corrected a negative"
    assert any(row["counter.campaign.click"] > 0 for row in imported)
    assert any(row["counter.cookie.click"] > 0 for row in imported)
    assert found.refused.get("repeat", 0) > 0


@pytest.mark.parametrize("seed", [3, 4, 5, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(100, 160))])
def test_killed_at_each_step_the_lake_has_every_row_once(tmp_path: Path, seed: int) -> None:
    calm = History(tmp_path / "calm")
    write_files(traffic(seed, 40), calm.folder)
    calm.run(commit_rows=20)
    wanted = whole(calm.lake)
    killed = History(tmp_path / "killed", fails={2, 5}, lost={1, 4})
    write_files(traffic(seed, 40), killed.folder)
    deaths = 0
    for step in range(100):
        try:
            killed.run(commit_rows=20 - step % 3, kill_at=1 + step % 3)
            break
        except (Killed, Unavailable):
            deaths += 1
        except ConfigRejected as error:
            assert "is done" in str(error)
            break
    assert deaths > 5
    assert whole(killed.lake) == wanted
    by_task, count = killed.lake.imported(["click", "conversion"])
    assert count == len(wanted) and by_task == seal_of(killed.lake.read())


def test_an_import_that_lost_its_sorted_rows_reads_them_again(tmp_path: Path) -> None:
    history = History(tmp_path)
    write_files(traffic(6, 30), history.folder)
    with pytest.raises(Killed):
        history.run(commit_rows=10, kill_at=4)
    for path in (tmp_path / "work").rglob("*"):
        if path.is_file():
            path.unlink()
    found = history.run(commit_rows=10)
    assert len(whole(history.lake)) == found.samples == len({(r["offset"], r["rank"]) for r in whole(history.lake)})


def test_what_is_done_is_not_done_again_and_the_same_rows_of_other_files_are_known(tmp_path: Path) -> None:
    history = History(tmp_path)
    events = traffic(7, 30)
    write_files(events, history.folder)
    first = history.run()
    with pytest.raises(ConfigRejected, match=f"import {first.id} is done: .* Nothing is to do"):
        history.run()
    # One more impression: another import, in which the others are known by their ids.
    at, _, record = next(each for each in events if each[1] == "impression")
    events.append((at + 5, "impression", {**record, "event_id": "i-new", "request_id": "r-new"}))
    write_files(events, history.folder)
    second = history.run()
    assert second.id != first.id
    assert second.refused["in_lake"] == first.events["impression"]
    assert second.samples == 2 and len(whole(history.lake)) == first.samples + 2
    ours = [row for row in whole(history.lake) if row["event_id"] == "i-new"]
    assert min(row["offset"] for row in ours) > max(r["offset"] for r in whole(history.lake) if r not in ours)


@pytest.mark.parametrize("at", [2, 3, 4])
def test_of_two_processes_on_two_hosts_the_second_is_refused(tmp_path: Path, at: int) -> None:
    calm = History(tmp_path / "calm")
    write_files(traffic(15, 30), calm.folder)
    calm.run()
    history = History(tmp_path / "here")
    write_files(traffic(15, 30), history.folder)

    def other() -> None:
        history.run(commit_rows=25, work=tmp_path / "elsewhere")

    with pytest.raises((Unavailable, ConfigRejected), match=r"another process|is over"):
        history.run(commit_rows=20, meanwhile=(at, other))
    assert whole(history.lake) == whole(calm.lake)


def test_an_end_that_is_told_late_ends_nothing(tmp_path: Path) -> None:
    history = History(tmp_path)
    write_files(traffic(17, 20), history.folder)
    with pytest.raises(Killed):
        history.run(commit_rows=20, kill_at=3)
    imports = Imports(history.lake, seal_of)
    begun = imports.open()
    assert begun is not None and begun.stored.count == 20
    history.run()
    with pytest.raises(Unavailable, match="it is over"):
        imports.end(begun, sample_schema(PROJECT))


def test_on_one_host_the_second_process_is_refused_at_once(tmp_path: Path) -> None:
    history = History(tmp_path)
    write_files(traffic(16, 10), history.folder)

    def other() -> None:
        with pytest.raises(ConfigRejected, match="another process is at work on this import"):
            history.run()

    history.run(meanwhile=(1, other))


def test_half_done_another_one_is_refused_until_it_is_let_go(tmp_path: Path) -> None:
    history = History(tmp_path)
    write_files(traffic(8, 30), history.folder)
    with pytest.raises(Killed):
        history.run(commit_rows=10, kill_at=3)
    with pytest.raises(ConfigRejected, match="is half done, and this one is"):
        history.run(until_ms=START_MS + 10_000)


def test_the_border_is_the_first_live_event(tmp_path: Path) -> None:
    events = traffic(9, 60)
    until_ms = START_MS + 30 * TURN_MS
    history = History(tmp_path, first_live_ms=until_ms)
    write_files(events, history.folder)
    found = history.run()
    assert found.until_ms == until_ms
    shown = [at for at, kind, _ in events if kind == "impression"]
    after = sum(at >= until_ms for at in shown)
    assert found.refused["after_until"] == after and found.events["impression"] == len(shown) - after
    refused = history.refused(found)
    assert {row["reason"] for row in refused} == {"after_until"} and len(refused) == after
    assert all(row["record"]["cookie"].startswith("hmac:") for row in refused), "a private field is shown"
    # Feedback after the border answers impressions before it.
    assert max(row["feedback_time_ms"] or 0 for row in whole(history.lake)) >= until_ms


def test_an_end_behind_the_first_live_event_is_told(tmp_path: Path) -> None:
    history = History(tmp_path, first_live_ms=START_MS + 5_000)
    write_files(traffic(9, 10), history.folder)
    assert history.run(dry_run=True, until_ms=START_MS + 10_000).live_ms == START_MS + 5_000
    assert history.run(dry_run=True, until_ms=START_MS + 5_000).live_ms is None
    assert history.run(dry_run=True).live_ms is None


def test_windows_that_are_open_and_rows_beyond_retention_are_not_imported(tmp_path: Path) -> None:
    write_files(traffic(10, 60), tmp_path)
    history = History(tmp_path, now_ms=START_MS + 60 * TURN_MS)
    found = history.run(dry_run=True)
    assert found.refused["window_open"] > 0
    assert found.last_ms is not None and found.last_ms + 5 * MINUTE_MS <= history.now_ms
    kept = msgspec.structs.replace(CONFIG, lake=msgspec.structs.replace(CONFIG.lake, retention_ms=60 * MINUTE_MS))
    old = History(tmp_path, config=kept)
    with pytest.raises(ConfigRejected, match=r"lake.retention_ms keeps 1.0 h: upkeep would drop .* --from \d+"):
        old.run()
    assert history.lake.state() is None, "a dry run wrote"


def test_a_trainer_learns_what_is_imported_and_then_what_is_live(tmp_path: Path) -> None:
    before, after = traffic(11, 40, begin_ms=START_MS - 40 * TURN_MS), traffic(12, 40)
    history = History(tmp_path, first_live_ms=START_MS)
    write_files(before, history.folder)
    found = history.run(commit_rows=50)
    with opened(PROJECT, prompt(TURN_MS), tmp_path) as loop:
        sent_live(loop, after)
        loop.settle(LONGEST_MS, 5 * MINUTE_MS)
        ledger = loop.check()
        assert ledger.imported == found.samples and ledger.imported_due == found.samples
        assert ledger.learnt + ledger.other_tasks + ledger.refused == ledger.samples + found.samples
        assert loop.ledger("seals").imported_due == found.samples
        # A sink beside it took no harm, and another import behind live rows is still before them.
        events = traffic(13, 10, begin_ms=START_MS - 60 * TURN_MS)
        write_files(events, tmp_path / "more")
        more = History(tmp_path / "more", uri=str(tmp_path / "lake"), first_live_ms=START_MS).run()
        # The run that began before does not know these rows, and loses none by it.
        ledger = loop.ledger("full")
        assert ledger.closes and (ledger.lost, ledger.twice) == (0, 0), msgspec.json.encode(ledger)
        assert ledger.imported == found.samples + more.samples and ledger.imported_due == found.samples
        sealed = loop.ledger("seals")
        assert sealed.closes and sealed.drawn_from == "seals" and not sealed.seals_wrong, sealed.not_sealed
        # A new run does.
        loop.train_anew(seed=2)
        ledger = loop.ledger("full")
        assert ledger.closes and (ledger.lost, ledger.twice, ledger.in_flight) == (0, 0, 0)
        assert ledger.imported_due == found.samples + more.samples
        assert loop.ledger("seals").closes
        assert loop.replay().equal


def test_an_older_version_is_read_without_what_was_imported_since(tmp_path: Path) -> None:
    from headrace.backends.lake.version_files import VersionFiles

    history = History(tmp_path)
    write_files(traffic(14, 30), history.folder)
    with pytest.raises(Killed):
        history.run(commit_rows=30, kill_at=4)
    state = history.lake.state()
    assert state is not None
    held = history.lake.read(state.version).num_rows
    history.run(commit_rows=30)
    newest = VersionFiles(history.lake.opened(), state.positions, state.imported_upto)
    assert 0 < newest.read().num_rows == held < history.lake.read().num_rows
