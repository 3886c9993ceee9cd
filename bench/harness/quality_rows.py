"""KuaiRand as bench/quality.py learns it: fields, counters as of each impression, slots and numbers, by groups.

Counters hold what was known strictly before an impression's time: rows of the same millisecond, as of one page, do not
know each other's outcomes. Labels are known at once after that; there is no delay here (bench/delay.py has it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from headrace.contract.spec import Bucket, Categorical, Counter, Cross, Feature, FeatureSpec, Numeric, Rate
from headrace.stream.features.counters import UNIT, CounterState, key_strings
from headrace.stream.features.featurize import featurize

DAY_MS = 86_400_000
DURATIONS = (5e3, 7e3, 1e4, 1.5e4, 2e4, 3e4, 4.5e4, 6e4, 9e4, 1.2e5, 1.8e5, 3e5)
PLAYED_MS = (1_000, 3_000, 7_000, 15_000, 30_000)
PAIRED = {
    "user_tab": ("user_id", "tab"),
    "video_tab": ("video_id", "tab"),
    "user_tag": ("user_id", "tag"),
    "user_duration": ("user_id", "duration"),
    "tab_duration": ("tab", "duration"),
    "tab_hour": ("tab", "hour"),
    "user_video": ("user_id", "video_id"),
    "user_author": ("user_id", "author_id"),
    "user_music": ("user_id", "music_id"),
    "tag_tab": ("tag", "tab"),
    "upload_tab": ("upload_type", "tab"),
    "profile_tab": ("onehot_feat1", "tab"),
}
"""Keys of counters over two fields. `duration` is the bucket of its length, which a web service would log beside it."""

Plays = tuple(f"sum:dwell.over_{ms}" for ms in PLAYED_MS)


def _counter(name: str, key: str | tuple[str, str], *, plays: bool = False) -> Counter:
    counts = ("impression", "click", *((*Plays, "sum:dwell.long_view", "sum:dwell.share") if plays else ()))
    return Counter(name=name, key=key, counts=counts, window_ms=40 * DAY_MS, buckets=40)


def _rate(name: str, strength: float, of: str = "click", prior: float = 0.45) -> Rate:
    over = f"counter.{name}.impression"
    return Rate(of=f"counter.{name}.{of}", over=over, prior=prior, strength=strength, log_odds=True)


def _plays(name: str) -> tuple[Rate, ...]:
    by_time = (_rate(name, 3, of) for of in Plays)
    return (*by_time, _rate(name, 10, "sum:dwell.long_view", 0.3), _rate(name, 10, "sum:dwell.share", 0.3))


@dataclass(frozen=True)
class Group:
    """Features that come and go together in the ablation."""

    counters: tuple[Counter, ...] = ()
    features: tuple[Feature, ...] = ()


IDS = ("user_id", "video_id", "author_id", "tab", "tag", "upload_type", "user_active_degree")
PROFILE = tuple(f"onehot_feat{i}" for i in (0, 1, 2, 3, 4, 7, 8, 9))
SINGLE = ("user", "video", "author", "tag", "music")
PAIRS = {"user_tab": 3.0, "video_tab": 10.0, "user_tag": 3.0, "user_duration": 3.0}
SEEN = {"user_video": 1.0, "user_author": 1.0, "user_music": 1.0}
PAGES = {"tab_duration": 10.0, "tab_hour": 10.0, "tag_tab": 10.0, "upload_tab": 10.0, "profile_tab": 10.0}

GROUPS: dict[str, Group] = {
    "ids": Group(
        features=(
            *(Categorical(field=name) for name in IDS),
            Bucket(field="duration_ms", edges=DURATIONS),
            Cross(fields=("tab", "duration")),
            Numeric(field="duration_ms", scale=0.1),
        )
    ),
    "profile": Group(features=tuple(Categorical(field=name) for name in PROFILE)),
    "rates": Group(
        counters=tuple(_counter(n, f"{n}_id" if n != "tag" else n, plays=n in ("user", "video")) for n in SINGLE),
        features=tuple(_rate(n, 10) for n in SINGLE),
    ),
    "lately": Group(
        counters=(
            Counter(name="user_1h", key="user_id", window_ms=DAY_MS, buckets=48, half_life_ms=3_600_000),
            Counter(name="user_5m", key="user_id", window_ms=3_600_000, buckets=60, half_life_ms=300_000),
            Counter(name="tab_3h", key="tab", window_ms=DAY_MS, buckets=48, half_life_ms=3 * 3_600_000),
            Counter(name="video_1d", key="video_id", window_ms=10 * DAY_MS, buckets=60, half_life_ms=DAY_MS),
        ),
        features=(_rate("user_1h", 2), _rate("user_5m", 1), _rate("tab_3h", 10), _rate("video_1d", 10)),
    ),
    "pairs": Group(
        counters=tuple(_counter(n, PAIRED[n]) for n in PAIRS), features=tuple(_rate(n, s) for n, s in PAIRS.items())
    ),
    "seen": Group(
        counters=tuple(_counter(n, PAIRED[n]) for n in SEEN), features=tuple(_rate(n, s) for n, s in SEEN.items())
    ),
    "pages": Group(
        counters=tuple(_counter(n, PAIRED[n]) for n in PAGES), features=tuple(_rate(n, s) for n, s in PAGES.items())
    ),
    "plays": Group(features=(*_plays("user"), *_plays("video"))),
}
"""By name; `plays` (how long earlier videos were watched) reads counters of `rates`."""


def spec_of(groups: tuple[str, ...]) -> FeatureSpec:
    """Return the specification of some groups."""
    chosen = [GROUPS[name] for name in groups]
    return FeatureSpec(
        counters=tuple(c for group in chosen for c in group.counters),
        features=tuple(f for group in chosen for f in group.features),
    )


@dataclass(frozen=True)
class Rows:
    """What every run reads: raw columns with counters, labels, times, and the number of each row's day."""

    columns: dict[str, pa.Array]
    label_N: npt.NDArray[np.float32]
    time_ms_N: npt.NDArray[np.int64]
    day_N: npt.NDArray[np.int64]

    def featurized(self, spec: FeatureSpec) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Return slots [N, F] and numbers [N, D]."""
        return featurize(self.columns, spec)


def load(folder: Path, days: int = 0) -> Rows:
    """Return all rows of the folder in time order (those of the first `days` days, where it is not 0)."""
    rows = pa.concat_tables([pa.csv.read_csv(path) for path in sorted(folder.glob("impressions_*.csv.gz"))])
    rows = rows.take(pc.sort_indices(rows, sort_keys=[("time_ms", "ascending")]))
    dates = sorted(set(rows["date"].to_pylist()))
    if days:
        rows = rows.filter(pc.is_in(rows["date"], pa.array(dates[:days])))
    columns = dict(zip(rows.column_names, rows.columns, strict=True))
    for name, key in (("users.csv.gz", "user_id"), ("videos.csv.gz", "video_id")):
        table = pa.csv.read_csv(folder / name)
        at = pc.index_in(rows[key], value_set=table[key].combine_chunks())
        columns |= {c: table[c].take(at) for c in table.column_names if c != key}
    known = {name: column.combine_chunks() for name, column in columns.items()}
    duration_N = known["duration_ms"].to_numpy()
    known["duration"] = pa.array(np.searchsorted(np.array(DURATIONS), duration_N, side="right"))
    known["hour"] = pa.array(known["hourmin"].to_numpy() // 100)
    time_ms_N = known["time_ms"].to_numpy()
    clicked_N = known["is_click"].to_numpy()
    outcomes = _outcomes(known)
    fields = {f for group in GROUPS.values() for feature in group.features for f in feature.inputs()}
    raw = {name: known[name] for name in fields if name in known}
    for group in GROUPS.values():
        for counter in group.counters:
            raw |= counted(counter, [known[field] for field in counter.key_fields], time_ms_N, outcomes)
    day_N = np.searchsorted(np.array(dates), known["date"].to_numpy())
    return Rows(raw, clicked_N.astype(np.float32), time_ms_N, day_N)


def _outcomes(known: dict[str, pa.Array]) -> dict[str, npt.NDArray[np.int64]]:
    """Return what each row adds to an entry of a counter once its outcome is known; sums in millionths."""
    played_N, duration_N = known["play_time_ms"].to_numpy(), known["duration_ms"].to_numpy()
    share_N = np.minimum(played_N / np.maximum(duration_N, 1), 2.0) / 2
    out = {
        "impression": np.ones(len(played_N), np.int64),
        "click": known["is_click"].to_numpy().astype(np.int64),
        "sum:dwell.long_view": known["long_view"].to_numpy().astype(np.int64) * UNIT,
        "sum:dwell.share": np.rint(share_N * UNIT).astype(np.int64),
    }
    return out | {name: (played_N > ms).astype(np.int64) * UNIT for name, ms in zip(Plays, PLAYED_MS, strict=True)}


def counted(
    counter: Counter,
    keys: Sequence[pa.Array],
    time_ms_N: npt.NDArray[np.int64],
    outcomes: dict[str, npt.NDArray[np.int64]],
) -> dict[str, pa.Array]:
    """Return a counter's columns as of each row, of what was before its time: float32; `keys` are its key's fields."""
    state, texts = CounterState(counter), key_strings(keys)
    times = time_ms_N.tolist()
    amounts = [outcomes[entry].tolist() for entry in counter.counts]
    found_NC = np.zeros((len(times), len(counter.counts)), np.float32)
    done = 0
    for row, (key, now) in enumerate(zip(texts, times, strict=True)):
        while times[done] < now:
            earlier = texts[done]
            if earlier is not None:
                for entry, amount in enumerate(amounts):
                    if amount[done]:
                        state.add(earlier, entry, times[done], amount[done])
            done += 1
        if key is not None:
            found_NC[row] = state.value(key, now)
    return {name: pa.array(found_NC[:, i]) for i, name in enumerate(counter.columns())}
