"""The line that `headrace up` prints every few seconds, read from the stages' own metrics."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import msgspec

from headrace.contract.metrics import Name, Stage
from headrace.deploy.local.layout import HOST, Layout, trainer_of
from headrace.deploy.local.metrics_text import by_label, median, parse, risen
from headrace.deploy.local.readiness import http_get

Reading = Mapping[str, Mapping[str, float]]
Read = Callable[[str], tuple[int, bytes]]
"""From an address to the status and the body; status 0 where nobody answers."""

STAGES: tuple[Stage, ...] = ("ingest", "stream", "train", "serve", "shop")
HOPS: tuple[tuple[Stage, Name], ...] = (
    ("ingest", "hop_shipped_seconds"),
    ("ingest", "hop_logged_seconds"),
    ("stream", "hop_joined_seconds"),
    ("train", "hop_learnt_seconds"),
    ("train", "hop_published_seconds"),
    ("serve", "hop_served_seconds"),
)
"""The way of a click, and who times each part of it."""


class StatusLine:
    """Remembers the reading before, for rates and for the median of what came since; takes the first one when made.

    Args:
        main_task: `recipe.task` of the project; where it is not known, "", each of several tasks is told by its name.
    """

    def __init__(
        self,
        layout: Layout,
        main_task: str = "",
        *,
        read: Read = http_get,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._layout, self._main, self._read, self._monotonic = layout, main_task, read, monotonic
        self._before, self._at = self._reading(), monotonic()

    def line(self) -> str:
        """Return one line: events/s, lag, freshness, AUC beside its baselines, live version. `-` is not known yet."""
        texts, at = self._reading(), self._monotonic()
        now: dict[str, dict[str, float]] = {stage: parse(text) for stage, text in texts.items()}
        before: dict[str, dict[str, float]] = {stage: parse(text) for stage, text in self._before.items()}
        rate = _rate(now["ingest"], before["ingest"], at - self._at)
        line = (
            f"{time.strftime('%H:%M:%S')}  {_number(rate, 0)} events/s  "
            f"lag {_number(_value(now, 'stream', 'lag_records'), 0)}"
            f"+{_number(_value(now, 'train', 'lag_records'), 0)} records  {_freshness(now, before)}"
            f"{by_task(texts['train'], texts['ingest'], rate, self._main)}{self._beside(texts, rate)}"
            f"  version {self._version()}"
        )
        self._before, self._at = texts, at
        return line

    def _beside(self, texts: Mapping[str, str], rate: float) -> str:
        """Return what the trainers of variants say, each behind its name."""
        told = {name: by_task(texts[trainer_of(name)], texts["ingest"], rate) for name in self._layout.variants}
        return "".join(f"  | {name}: {said}" for name, said in told.items())

    def _reading(self) -> dict[str, str]:
        processes = (*STAGES, *map(trainer_of, self._layout.variants))
        with ThreadPoolExecutor(len(processes)) as pool:
            return dict(zip(processes, pool.map(self._text, processes), strict=True))

    def _text(self, process: str) -> str:
        status, body = self._read(f"http://{HOST}:{self._layout.metrics_port(process)}/metrics")
        return body.decode(errors="replace") if status == 200 else ""

    def _version(self) -> str:
        status, body = self._read(f"http://{HOST}:{self._layout.port('serving')}/v1/model")
        if status != 200:
            return "-"
        try:
            told = msgspec.json.decode(body, type=_Served)
        except msgspec.DecodeError:
            return "-"
        return f"{told.version}, {told.age_seconds:,.0f} s old" if told.version else "-"


class _Served(msgspec.Struct):
    """What /v1/model says of the version that is served."""

    version: str = ""
    age_seconds: float = 0.0


def figures(
    train: Mapping[str, float], ingest: Mapping[str, float], rate: float, calibration: float | None = None
) -> str:
    """Return what the trainer's metrics say of the main task: AUC beside its baselines, or what the first figure waits
    for. What is provisional says so, and when it is settled.

    Args:
        train, ingest: what the two stages tell.
        rate: events a second since the line before, NaN where it is not known. The time to a figure is event time,
            which stands without events.
        calibration: predicted by observed of the newest impressions; None where it is not known.
    """

    def of(name: Name) -> float:
        return train.get(f"headrace_train_{name}", math.nan)

    away_s = of("main_next_figure_seconds")
    when = _when(away_s, rate)
    if math.isnan(of("auc")):
        waits = _first(train, ingest)
        if not waits and away_s > 0:
            waits = f"first figure {when}"
        return f"AUC - ({waits})" if waits else "AUC -"
    marked = f" provisional, settled {when}" if away_s > 0 else ""
    said = "" if calibration is None else f" calibration {_number(calibration, 2)}"
    return (
        f"AUC {_number(of('auc'), 4)}{marked}"
        f" (constant {_number(of('auc_constant'), 4)}, item rate {_number(of('auc_item_rate'), 4)}){said}"
    )


def by_task(train: str, ingest: str, rate: float, main_task: str = "") -> str:
    """Return what the /metrics of trainer and gateway say of each task, the main one first; see `figures`.

    A task that learns a number has the mean absolute error in place of the AUC. One task alone needs no name.
    """
    tasks = list(by_label(train, "headrace_train_next_figure_seconds", "task"))
    main = main_task or (tasks[0] if len(tasks) == 1 else "")
    errors = by_label(train, "headrace_train_slice_mae", "task", slice="")
    calibration = by_label(train, "headrace_train_recent_calibration", "task")
    if main in errors:
        told = _of_task(train, main, calibration)
    else:
        told = figures(parse(train), parse(ingest), rate, calibration.get(main))
    rows = _number(parse(train).get("headrace_train_samples_learnt_total", math.nan), 0)
    lead = f"{main} " if main and len(tasks) > 1 else ""
    others = "".join(f"  {task} {_of_task(train, task, calibration)}" for task in tasks if task != main)
    return f"{lead}{told} over {rows} rows{others}"


def _of_task(train: str, task: str, calibration: Mapping[str, float]) -> str:
    """Return a task's figure without baselines, or when the first one comes."""
    away_s = by_label(train, "headrace_train_next_figure_seconds", "task").get(task, 0.0)
    for word, name in (("AUC", "slice_auc"), ("mean error", "slice_mae")):
        found = by_label(train, f"headrace_train_{name}", "task", slice="").get(task)
        if found is not None:
            marked = " provisional" if away_s > 0 else ""
            said = f" calibration {_number(calibration[task], 2)}" if task in calibration else ""
            return f"{word} {_number(found, 4)}{marked}{said}"
    return f"- (first figure after {_minutes(away_s)} of events)" if away_s > 0 else "-"


def _rate(now: Mapping[str, float], before: Mapping[str, float], seconds: float) -> float:
    """Return the events a second between two readings; NaN where the gateway did not answer at one of them."""
    name = "headrace_ingest_events_read_total"
    if name not in now or name not in before or seconds <= 0:
        return math.nan
    return risen(now[name], before[name]) / seconds


def _freshness(now: Reading, before: Reading) -> str:
    """Return the median since the line before. The demo's shop measures it, which sees clicks and answers; elsewhere
    the hops' medians are added, each the upper edge of its bucket, once all of them are known."""
    if not now["shop"]:
        hops = [median(f"headrace_{stage}_{name}", now[stage], before[stage]) for stage, name in HOPS]
        known = [hop for hop in hops if hop is not None]
        return f"freshness about {sum(known) * 1_000:,.0f} ms  " if len(known) == len(hops) else ""
    p50 = median("headrace_shop_freshness_seconds", now["shop"], before["shop"]) if before["shop"] else None
    return f"freshness {'-' if p50 is None else f'{p50 * 1_000:,.0f} ms'}  "


def _when(away_s: float, rate: float) -> str:
    minutes = _minutes(away_s)
    if rate > 0:
        return f"in {minutes}"
    return f"after {minutes} more of events" + (", and none comes" if rate == 0 else "")


def _minutes(seconds: float) -> str:
    return f"{math.ceil(seconds / 60)} min" if seconds >= 60 else f"{math.ceil(max(0.0, seconds or 0.0))} s"


def _first(train: Mapping[str, float], ingest: Mapping[str, float]) -> str:
    """Return what has not come yet since the stages began: an event, one that is taken, a sample; "" where all have."""
    if not train or not ingest or train.get("headrace_train_samples_learnt_total", 0.0):
        return ""
    refused = ingest.get("headrace_ingest_events_dead_lettered_total", 0.0)
    if not ingest.get("headrace_ingest_events_appended_total", 0.0) and refused:
        return f"waits for an event that is taken: {refused:,.0f} were refused, see `headrace dead-letters list`"
    if not ingest.get("headrace_ingest_events_read_total", 0.0):
        return "waits for the first event"
    return "waits for the first sample: it comes with feedback, or when a task's window is over"


def _value(now: Reading, stage: Stage, name: Name) -> float:
    return now[stage].get(f"headrace_{stage}_{name}", math.nan)


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:,.{digits}f}"
