"""Goal: each failure that the chaos runs produce raises its alert, and a stack at work, or a single kill, raises none.

Method: Prometheus' own promtool evaluates the rules over written series, a scrape a minute.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable

import pytest

STAGES = ("ingest", "stream", "sink", "aggregate", "crawl", "train", "serve")
Series = dict[str, str]
Promtool = Callable[[str], subprocess.CompletedProcess[str]]


def at(metric: str, **labels: str) -> str:
    """Return a series of the instance that its stage's name says."""
    stage = metric.split("_")[1]
    told = {"instance": stage, "job": "headrace", **labels}
    return metric + "{" + ",".join(f"{name}={json.dumps(value)}" for name, value in told.items()) + "}"


def healthy() -> Series:
    """Two hours of a stack at work: everything answers, lags are small, clocks go on."""
    found: Series = {f'up{{job="headrace",instance="{stage}"}}': "1x120" for stage in STAGES}
    found |= {at(f"headrace_{stage}_ready"): "1x120" for stage in STAGES}
    for stage in STAGES:
        found[at(f"headrace_{stage}_no_sign_seconds", sign="loop")] = "0.1x120"
        found[at(f"headrace_{stage}_no_sign_seconds", sign="kafka")] = "2x120"
        found[at(f"headrace_{stage}_no_sign_seconds", sign="store")] = "8x120"
    found[at("headrace_ingest_no_sign_seconds", sign="reading")] = "0.4x120"
    found[at("headrace_ingest_no_sign_seconds", sign="receipts")] = "0x120"
    for stage in ("stream", "sink", "aggregate", "train"):
        found[at(f"headrace_{stage}_lag_records", topic="")] = "100 5 300 20 0 50 100 10x120"
    for stage in ("stream", "aggregate"):
        found[at(f"headrace_{stage}_watermark_ms")] = "0+60000x120"
    found[at("headrace_ingest_lag_records", topic="logs")] = "0x120"
    found[at("headrace_sink_behind_ms")] = "3000 4000 2000 3000x120"
    found[at("headrace_sink_archive_behind_ms")] = "60000 2000 50000x120"
    found[at("headrace_sink_archive_stopped")] = "0x120"
    found[at("headrace_train_lag_samples")] = "0 50 0 7 0x120"
    found[at("headrace_train_lag_seconds")] = "2x120"
    found[at("headrace_train_samples_learnt_total")] = "0+6000x120"
    found[at("headrace_serve_model_age_seconds")] = "2x120"
    found[at("headrace_serve_counters_behind_seconds", worker="0")] = "1x120"
    found[at("headrace_crawl_outbox_rows")] = "0 3 0 1 0x120"
    found[at("headrace_ingest_events_read_total")] = "0+6000x120"
    found[at("headrace_ingest_events_dead_lettered_total", reason="bad_type")] = "0+6x120"
    for process in (*STAGES, "kafka"):
        found[at("headrace_watch_process_up", process=process)] = "1x120"
        found[at("headrace_watch_process_crashes_in_row", process=process)] = "0x120"
        found[at("headrace_watch_next_start_seconds", process=process)] = "0x120"
        found[at("headrace_watch_unhealthy_restarts_total", process=process)] = "0x120"
    found[at("headrace_watch_disk_free_ratio")] = "0.4x120"
    return found


def alerts(promtool: Promtool, series: Series, minute: int) -> set[str]:
    """Return the alerts that fire at a minute, as `name of instance-or-process`."""
    # `ALERTS` is a series of its own: what fires is read from it, whatever its annotations are.
    case = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": 'sum by (alertname, instance, process) (ALERTS{alertstate="firing"})',
                "eval_time": f"{minute}m",
                "exp_samples": [{"labels": '{alertname="none"}', "value": 1}],
            }
        ],
    }
    done = promtool(json.dumps([case]))
    return fired(done.stdout + done.stderr)


def fired(said: str) -> set[str]:
    """Return the alerts that promtool says it got."""
    assert "got:" in said, said
    got = said.partition("got:")[2]
    found = set()
    for inside in re.findall(r"\{([^}]*)\}", got):
        named = dict(re.findall(r'(\w+)="([^"]*)"', inside))
        found.add(f"{named['alertname']} of {named.get('process') or named.get('instance') or 'all'}")
    return found


def test_a_stack_at_work_is_silent(promtool: Promtool) -> None:
    assert alerts(promtool, healthy(), 100) == set()


def test_a_single_kill_is_silent(promtool: Promtool) -> None:
    one = {
        'up{job="headrace",instance="sink"}': "1x30 0 1x90",
        at("headrace_watch_process_crashes_in_row", process="sink"): "0x30 1x90",
        at("headrace_watch_process_up", process="sink"): "1x30 0 1x90",
        at("headrace_sink_ready"): "1x30 0 0 1x90",
    }
    for minute in (30, 31, 32, 33, 40):
        assert alerts(promtool, healthy() | one, minute) == set()


CASES: dict[str, tuple[Series, set[str]]] = {
    "a stage is killed and stays away": (
        {
            'up{job="headrace",instance="train"}': "1x30 0x90",
            at("headrace_watch_process_up", process="train"): "1x30 0x90",
        },
        {"HeadraceStageDown of train", "HeadraceProcessDown of train"},
    ),
    "a stage crashes again and again": (
        {
            at("headrace_watch_process_crashes_in_row", process="stream"): "0x30 1 3 5 6x90",
            at("headrace_watch_next_start_seconds", process="stream"): "0x30 30x90",
        },
        {"HeadraceCrashLoop of stream"},
    ),
    "a stage is stopped: SIGSTOP": (
        {'up{job="headrace",instance="sink"}': "1x30 0x90"},
        {"HeadraceStageDown of sink"},
    ),
    "a stage stands and answers": (
        {
            at("headrace_ingest_no_sign_seconds", sign="loop"): "0x30 0+60x90",
            at("headrace_ingest_ready"): "1x30 0x90",
        },
        {"HeadraceLoopStands of ingest", "HeadraceNotReady of ingest"},
    ),
    "a stage that stood was restarted": (
        {at("headrace_watch_unhealthy_restarts_total", process="sink"): "0x35 1x90"},
        {"HeadraceStageRestarted of sink"},
    ),
    "the broker is away": (
        {at(f"headrace_{s}_no_sign_seconds", sign="kafka"): "2x30 0+60x90" for s in STAGES[:-1]}
        | {at("headrace_ingest_no_sign_seconds", sign="receipts"): "0x30 0+60x90"}
        | {at("headrace_ingest_no_sign_seconds", sign="reading"): "0x30 0+60x90"}
        | {at(f"headrace_{s}_ready"): "1x30 0x90" for s in STAGES[:-1]},
        {
            *(f"HeadraceKafkaAway of {s}" for s in STAGES[:-1]),
            *(f"HeadraceNotReady of {s}" for s in STAGES[:-1]),
            "HeadraceReadingPaused of ingest",
        },
    ),
    "the broker answers and confirms nothing: its disk is full": (
        {at("headrace_ingest_no_sign_seconds", sign="receipts"): "0x30 0+60x90"},
        {"HeadraceKafkaAway of ingest"},
    ),
    "the store is away": (
        {at(f"headrace_{s}_no_sign_seconds", sign="store"): "8x30 0+60x90" for s in STAGES[1:-1]}
        | {at("headrace_sink_behind_ms"): "3000x30 0+60000x90"},
        {*(f"HeadraceStoreAway of {s}" for s in STAGES[1:-1]), "HeadraceSinkBehind of sink"},
    ),
    "the disk is full": (
        {at("headrace_watch_disk_free_ratio"): "0.4x30 0.01x90"},
        {"HeadraceDiskFull of watch"},
    ),
    "the archive takes nothing for an hour and more": (
        {at("headrace_sink_archive_behind_ms"): "60000x30 0+180000x90"},
        {"HeadraceArchiveBehind of sink"},
    ),
    "events has lost its end": (
        {at("headrace_sink_archive_stopped"): "0x30 1x90"},
        {"HeadraceArchiveStands of sink"},
    ),
    "the join is slower than what comes": (
        {at("headrace_stream_lag_records", topic=""): "100x10 0+6000x110"},
        {"HeadraceLagGrows of stream"},
    ),
    "a source is not read any more": (
        {at("headrace_ingest_lag_records", topic="logs"): "0x10 0+6000x110"},
        {"HeadraceLagGrows of ingest"},
    ),
    "a watermark stands while records wait": (
        {at("headrace_stream_watermark_ms"): "0+60000x20 1200000x100"},
        {"HeadraceWatermarkStands of stream"},
    ),
    "the trainer has samples and learns none": (
        {
            at("headrace_train_lag_samples"): "0x20 5000x100",
            at("headrace_train_samples_learnt_total"): "0+6000x20 120000x100",
        },
        {"HeadraceTrainStands of train"},
    ),
    "the served version stays": (
        {at("headrace_serve_model_age_seconds"): "2x20 0+60x100"},
        {"HeadraceModelOld of serve"},
    ),
    "the outbox is not emptied": (
        {at("headrace_crawl_outbox_rows"): "0x20 40x100"},
        {"HeadraceOutboxWaits of crawl"},
    ),
    "a source has more entities than it may": (
        {
            at("headrace_crawl_beyond_bound_total", source="shop", bound="keys_max"): "0x20 7x100",
            at("headrace_crawl_beyond_bound_total", source="shop", bound="pages_max"): "0x120",
        },
        {"HeadraceCrawlBoundReached of crawl"},
    ),
    "a page is too dear, the first of its series": (
        {
            at("headrace_crawl_pages_total", outcome="extraction_cpu"): "_x40 1x80",
            at("headrace_crawl_pages_total", outcome="taken"): "0+9x120",
        },
        {"HeadraceCrawlPagesRefused of crawl"},
    ),
    "many events are dead letters": (
        {at("headrace_ingest_events_dead_lettered_total", reason="bad_type"): "0+6x20 120+600x100"},
        {"HeadraceDeadLetters of ingest"},
    ),
    "Kafka refuses a record, the first of its series": (
        {at("headrace_stream_receipts_refused_total", topic="samples"): "_x40 1x80"},
        {"HeadraceReceiptsRefused of stream"},
    ),
    "the gate refuses a version, the first of its series": (
        {at("headrace_serve_versions_refused_total", reason="gap"): "_x45 1x80"},
        {"HeadraceVersionRefused of serve"},
    ),
    "a replica serves something else than the trainer says": (
        {at("headrace_serve_replica_digest_wrong_total"): "0x45 1x80"},
        {"HeadraceReplicaDigestWrong of serve"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_failure_raises_its_alert_and_no_other(promtool: Promtool, name: str) -> None:
    series, expected = CASES[name]
    assert alerts(promtool, healthy() | series, 50) == expected
    assert alerts(promtool, healthy() | series, 9) == set(), "before it happens"
