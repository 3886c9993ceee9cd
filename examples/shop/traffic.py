"""The shop's visitors: KuaiRand's real rows in event-time order or, without them, a seeded generator.

Features and outcomes are told apart here, once: `Traffic.features` holds only fields that the project's impression
declares, and what is known afterwards survives only as `Visit.feedback`: a click, and when the visitor leaves a video
the dwell, which says how long it was watched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from headrace.contract.errors import ConfigRejected
from headrace.contract.formats.events import ARROW_TYPES
from headrace.contract.project import FieldType
from headrace.examples.shop.shop import WATCHED_MS

OUTCOMES = frozenset(
    (
        *("is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view"),
        *("play_time_ms", "profile_stay_time", "comment_stay_time", "is_profile_enter"),
    )
)
"""Columns that are known only after the impression; never a feature."""

IMPRESSIONS, USERS, VIDEOS = "impressions_*.csv.gz", "users.csv.gz", "videos.csv.gz"

# KuaiRand's own rule for a valid play in single-column pages is 7 s; sped up 10 times, so that the demo's window can
# be 2 s. There is no time of the click in the data: the delay is synthetic.
VALID_PLAY_MS, SPEED = 7_000, 10
# A player reports when the visitor leaves, and after a minute at the latest: nine of ten have left by then.
DWELL_MAX_MS = 60_000
# KuaiRand's own rule for a long view: to the end of a short video, or 18 s of another.
LONG_VIEW_MS = 18_000

SYNTHETIC_VIDEOS = 2_000
"""Videos 0 ... without KuaiRand's rows."""

Fields = Mapping[str, FieldType]


class Given(NamedTuple):
    """One feedback that a visitor will give."""

    name: str
    delay_ms: int
    facts: dict[str, Any]
    """What it tells beside the impression's own fields."""


@dataclass(frozen=True)
class Visit:
    """One impression to come: its fields, and what the visitor will do."""

    row: int
    fields: dict[str, Any]
    clicked: bool
    delay_ms: int
    dwell: dict[str, Any] | None = None
    """What is known when the visitor leaves; None of a video that was not played."""

    @property
    def feedback(self) -> tuple[Given, ...]:
        """What the visitor will say, in order of time."""
        given = [Given("click", self.delay_ms, {})] if self.clicked else []
        if self.dwell is not None:
            # Never before the click: that comes when a valid play is over, or the visitor has left.
            given.append(Given("dwell", round(self.dwell["value"] * 1_000) // SPEED, self.dwell))
        return tuple(given)


@dataclass(frozen=True)
class Traffic:
    """Visits in event-time order. `label` says where they come from."""

    label: str
    features: pa.Table
    clicked_N: npt.NDArray[np.bool_]
    delay_ms_N: npt.NDArray[np.int64]
    dwells: pa.Table
    """What a dwell of each row tells, by field."""

    def __len__(self) -> int:
        return len(self.clicked_N)

    def visits(self, start: int = 0, *, chunk: int = 1_024) -> Iterator[Visit]:
        """Yield the visits from row `start` on; absent values are left out of `fields`."""
        for at in range(start, len(self), chunk):
            rows = zip(*(table.slice(at, chunk).to_pylist() for table in (self.features, self.dwells)), strict=True)
            for i, (fields, dwell) in enumerate(rows, at):
                known = {name: value for name, value in fields.items() if value is not None}
                told = dwell if dwell["value"] else None
                yield Visit(i, known, bool(self.clicked_N[i]), int(self.delay_ms_N[i]), told)


def load_traffic(folder: Path | None, fields: Fields, *, rows_max: int | None = None) -> Traffic:
    """Return KuaiRand's rows from `folder`, or the synthetic ones when there is no folder."""
    return synthetic(fields, rows=rows_max or 200_000) if folder is None else kuairand(folder, fields, rows_max)


def find_data(project_dir: Path, chosen: str | None) -> Path | None:
    """Return the folder with KuaiRand: `chosen` (DATA=), else shared/data/kuairand beside the checkout, else None.

    Raises `ConfigRejected` when `chosen` has no such files: a wrong DATA= must not end in synthetic rows.
    """
    if chosen:
        folder = Path(chosen).expanduser()
        if not list(folder.glob(IMPRESSIONS)):
            raise ConfigRejected(f"DATA={chosen} has no {IMPRESSIONS}. Give KuaiRand's folder, or leave DATA unset.")
        return folder
    checkout = project_dir.resolve().parent.parent
    beside = checkout.parent / "shared" / "data" / "kuairand"
    return beside if list(beside.glob(IMPRESSIONS)) else None


def kuairand(folder: Path, fields: Fields, rows_max: int | None = None) -> Traffic:
    """Return the rows of KuaiRand in `folder`, joined with its user and video tables, in time order."""
    rows = pa.concat_tables([pyarrow.csv.read_csv(path) for path in sorted(folder.glob(IMPRESSIONS))])
    rows = rows.take(pc.sort_indices(rows, sort_keys=[("time_ms", "ascending")])) if not _sorted(rows) else rows
    rows = rows.slice(0, rows_max)
    columns = dict(zip(rows.column_names, rows.columns, strict=True))
    for name, key in ((USERS, "user_id"), (VIDEOS, "video_id")):
        table = pyarrow.csv.read_csv(folder / name)
        at = pc.index_in(rows[key], value_set=table[key].combine_chunks())
        columns |= {c: table[c].take(at) for c in table.column_names if c != key}
    play_N = rows["play_time_ms"].to_numpy()
    return Traffic(
        f"KuaiRand, {rows.num_rows:,} real rows",
        _declared(columns, fields),
        rows["is_click"].to_numpy() == 1,
        np.clip(play_N, 0, VALID_PLAY_MS) // SPEED,
        watched(play_N, columns["duration_ms"].to_numpy()),
    )


def watched(play_ms_N: npt.NDArray[np.int64], duration_ms_N: npt.NDArray[np.int64]) -> pa.Table:
    """Return what the player reports of each row: `value` is seconds; sums of the others are counts and shares."""
    play_ms_N = np.clip(play_ms_N, 0, DWELL_MAX_MS)
    known_N = duration_ms_N > 0
    columns = {f"over_{ms}": pa.array((play_ms_N > ms).astype(np.int64)) for ms in WATCHED_MS}
    columns["long_view"] = pa.array(((play_ms_N >= np.minimum(duration_ms_N, LONG_VIEW_MS)) & known_N).astype(np.int64))
    # Watched twice is the most that counts: 1.
    columns["share"] = pa.array(np.minimum(play_ms_N / np.maximum(duration_ms_N, 1), 2.0) / 2)
    return pa.table({"value": pa.array(play_ms_N / 1_000), **columns})


def synthetic(fields: Fields, *, rows: int = 200_000, seed: int = 7) -> Traffic:
    """Return seeded rows of users and videos with hidden tastes; `label` states the AUC of the true probabilities.

    click ~ Bernoulli(sigmoid(user bias + video bias + taste . style + page)), popularity ~ Zipf. A clicked video is
    watched for a valid play and more, the more the likelier the click was; another for less than a valid play, or not
    at all.
    """
    random = np.random.default_rng(seed)
    users, videos, authors, dim = 5_000, SYNTHETIC_VIDEOS, 400, 4
    user_N = random.integers(users, size=rows)
    video_N = np.minimum(random.zipf(1.3, size=rows) - 1, videos - 1)
    tab_N = random.choice(3, size=rows, p=(0.2, 0.7, 0.1))
    taste, style = random.normal(size=(users, dim)), random.normal(size=(videos, dim))
    logit_N = 0.8 * random.normal(size=users)[user_N] + 0.9 * random.normal(size=videos)[video_N]
    logit_N += 0.35 * np.einsum("nd,nd->n", taste[user_N], style[video_N]) + np.array((-1.5, 0.1, 0.4))[tab_N]
    chance_N = 1 / (1 + np.exp(-logit_N))
    clicked_N = random.random(rows) < chance_N
    columns = {
        "user_id": user_N,
        "video_id": video_N,
        "author_id": random.integers(authors, size=videos)[video_N],
        "tab": tab_N,
        "duration_ms": (5_000 + 1_000 * random.integers(120, size=videos))[video_N],
        "time_ms": 1_650_816_000_000 + 3_000 * np.arange(rows),
    }
    known = {name: pa.chunked_array([values]) for name, values in columns.items()}
    delay_ms_N = random.integers(50, VALID_PLAY_MS // SPEED, size=rows)
    more_ms_N = 20_000 * random.exponential(1 / 3 + chance_N)
    less_ms_N = np.clip(2 * VALID_PLAY_MS * chance_N * random.random(rows) - 500, 0, VALID_PLAY_MS)
    play_ms_N = np.where(clicked_N, VALID_PLAY_MS + 1 + more_ms_N, less_ms_N).astype(np.int64)
    label = f"SYNTHETIC, {rows:,} seeded rows (seed {seed}); the oracle's AUC is {_auc(chance_N, clicked_N):.4f}"
    return Traffic(label, _declared(known, fields), clicked_N, delay_ms_N, watched(play_ms_N, columns["duration_ms"]))


def _declared(columns: Mapping[str, pa.ChunkedArray], fields: Fields) -> pa.Table:
    forbidden = OUTCOMES & set(fields)
    if forbidden:
        raise ConfigRejected(f"impression fields {sorted(forbidden)} are known only afterwards: remove them.")
    rows = len(next(iter(columns.values())))
    arrays = {
        name: columns[name].cast(ARROW_TYPES[kind]) if name in columns else pa.nulls(rows, ARROW_TYPES[kind])
        for name, kind in fields.items()
    }
    return pa.table(arrays)


def _sorted(rows: pa.Table) -> bool:
    return bool(np.all(np.diff(rows["time_ms"].to_numpy()) >= 0))


def _auc(score_N: npt.NDArray[np.float64], positive_N: npt.NDArray[np.bool_]) -> float:
    """Return the area under the ROC curve by ranks (Mann-Whitney); scores are taken to have no ties."""
    rank_N = np.empty(len(score_N))
    rank_N[np.argsort(score_N)] = np.arange(1, len(score_N) + 1)
    positives = int(positive_N.sum())
    negatives = len(positive_N) - positives
    return float((rank_N[positive_N].sum() - positives * (positives + 1) / 2) / (positives * negatives))
