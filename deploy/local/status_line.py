"""The line that `headrace up` prints every few seconds, read from the stages' own metrics."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import msgspec

from headrace.contract.metrics import Name, Stage
from headrace.deploy.local.layout import HOST, Layout
from headrace.deploy.local.metrics_text import median, parse
from headrace.deploy.local.readiness import http_get

Reading = Mapping[str, Mapping[str, float]]

STAGES: tuple[Stage, ...] = ("ingest", "stream", "sink", "train", "serve", "shop")


class StatusLine:
    """Remembers the reading before, for rates and for the median of what came since."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._before: Reading = {}
        self._at = time.monotonic()

    def line(self) -> str:
        """Return one line: events/s, lag, freshness, AUC beside its baselines, live version. `-` is not known yet."""
        with ThreadPoolExecutor(len(STAGES)) as pool:
            texts = pool.map(self._read, STAGES)
        now: dict[str, dict[str, float]] = {s: parse(text) for s, text in zip(STAGES, texts, strict=True)}
        at = time.monotonic()
        rate = self._rise("ingest", "events_read_total", now) / max(1e-9, at - self._at)
        line = (
            f"{time.strftime('%H:%M:%S')}  {rate:,.0f} events/s  lag {_number(_value(now, 'stream', 'lag_records'), 0)}"
            f"+{_number(_value(now, 'train', 'lag_records'), 0)} records  freshness {self._freshness(now)}"
            f"  {figures(now['train'], now['ingest'], rate)}"
            f" over {_number(_value(now, 'train', 'samples_learnt_total'), 0)} rows  version {self._version()}"
        )
        self._before, self._at = now, at
        return line

    def _read(self, stage: Stage) -> str:
        status, body = http_get(f"http://{HOST}:{self._layout.port(f'metrics_{stage}')}/metrics")
        return body.decode(errors="replace") if status == 200 else ""

    def _rise(self, stage: Stage, name: Name, now: Reading) -> float:
        full = f"headrace_{stage}_{name}"
        return max(0.0, now[stage].get(full, 0.0) - self._before.get(stage, {}).get(full, 0.0))

    def _freshness(self, now: Reading) -> str:
        """Return the median since the last line, from whichever stage measures it."""
        for stage in ("shop", "serve", "train"):
            p50 = median(f"headrace_{stage}_freshness_seconds", now[stage], self._before.get(stage, {}))
            if p50 is not None:
                return f"{p50 * 1_000:,.0f} ms"
        return "-"

    def _version(self) -> str:
        status, body = http_get(f"http://{HOST}:{self._layout.port('serving')}/v1/model")
        if status != 200:
            return "-"
        try:
            return str(msgspec.json.decode(body).get("version") or "-")
        except (msgspec.DecodeError, AttributeError):
            return "-"


def figures(train: Mapping[str, float], ingest: Mapping[str, float], rate: float) -> str:
    """Return what the trainer's metrics say of the main task: AUC beside its baselines, or what the first figure waits
    for. What is provisional says so, and when it is settled.

    Args:
        train, ingest: what the two stages tell.
        rate: events a second since the line before. The time to a figure is event time, which stands without events.
    """

    def of(name: Name) -> float:
        return train.get(f"headrace_train_{name}", math.nan)

    away_s = of("main_next_figure_seconds")
    minutes = f"{math.ceil(away_s / 60)} min" if away_s >= 60 else f"{math.ceil(max(0.0, away_s))} s"
    when = f"in {minutes}" if rate > 0 else f"after {minutes} more of events, and none comes"
    if math.isnan(of("auc")):
        waits = _first(train, ingest)
        if not waits and away_s > 0:
            waits = f"first figure {when}"
        return f"AUC - ({waits})" if waits else "AUC -"
    marked = f" provisional, settled {when}" if away_s > 0 else ""
    return (
        f"AUC {_number(of('auc'), 4)}{marked}"
        f" (constant {_number(of('auc_constant'), 4)}, item rate {_number(of('auc_item_rate'), 4)})"
    )


def _first(train: Mapping[str, float], ingest: Mapping[str, float]) -> str:
    """Return what has not come yet since the stages began: an event, one that is taken, a sample; "" where all have."""
    if not train or not ingest or train.get("headrace_train_samples_learnt_total", 0.0):
        return ""
    if not ingest.get("headrace_ingest_events_read_total", 0.0):
        return "waits for the first event"
    refused = ingest.get("headrace_ingest_events_dead_lettered_total", 0.0)
    if not ingest.get("headrace_ingest_events_appended_total", 0.0) and refused:
        return f"waits for an event that is taken: {refused:,.0f} were refused, see `headrace dead-letters list`"
    return "waits for the first sample: it comes with feedback, or when a task's window is over"


def _value(now: Reading, stage: Stage, name: Name) -> float:
    return now[stage].get(f"headrace_{stage}_{name}", math.nan)


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:,.{digits}f}"
