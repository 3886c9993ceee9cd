"""The shop's rows.

Goal: nothing known only afterwards can reach a feature, and the rows are what they are said to be. Method: the
declared names against the outcome columns; the real rows loaded twice, the second time with every outcome changed.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest

from headrace.contract.errors import ConfigRejected
from headrace.contract.formats.events import impression_schema
from headrace.contract.formats.sample import sample_schema
from headrace.examples.service import Service
from headrace.examples.shop import traffic
from headrace.examples.shop.shop import PROJECT, WATCHED_MS
from headrace.examples.visits import Visit

FIELDS = PROJECT.impression.fields


def test_no_outcome_is_declared_anywhere():
    assert not traffic.OUTCOMES & set(FIELDS)
    assert not traffic.OUTCOMES & set(impression_schema(PROJECT).names)
    assert not traffic.OUTCOMES & set(sample_schema(PROJECT).names)
    # What is known afterwards stands in feedback; its counters' columns are of earlier events.
    assert traffic.OUTCOMES & {name for feedback in PROJECT.feedback for name in feedback.fields} == {"long_view"}


def test_a_dwell_says_what_was_watched_and_a_video_not_played_has_none(shared: Path):
    source = shared / "data/kuairand"
    rows = traffic.kuairand(source, FIELDS, rows_max=20_000)
    raw = pyarrow.csv.read_csv(next(source.glob(traffic.IMPRESSIONS))).slice(0, 20_000)
    long_views = raw["long_view"].to_numpy()
    # The data's own flag knows lengths to the frame; ours differs from it in one row of 200 at most.
    assert (rows.dwells["long_view"].to_numpy() == long_views).mean() > 0.995
    played = (raw[name].to_pylist() for name in ("play_time_ms", "duration_ms"))
    for visit, play_ms, length_ms in zip(rows.visits(), *played, strict=True):
        assert (visit.dwell is None) == (play_ms == 0)
        if visit.dwell is not None:
            watched_ms = min(play_ms, traffic.DWELL_MAX_MS)
            over = {ms: visit.dwell[f"over_{ms}"] for ms in WATCHED_MS}
            assert over == {ms: watched_ms > ms for ms in WATCHED_MS}
            assert visit.dwell["value"] == watched_ms / 1_000
            assert visit.dwell["share"] == min(1.0, watched_ms / max(length_ms, 1) / 2)
        delays = [given.delay_ms for given in visit.feedback]
        assert delays == sorted(delays) and all(delay <= 6_000 for delay in delays)


def test_synthetic_visitors_watch_what_they_click():
    visits = list(traffic.synthetic(FIELDS, rows=2_000).visits())
    assert all(v.dwell is not None and v.dwell["over_7000"] == 1 for v in visits if v.clicked)
    others = [v for v in visits if not v.clicked]
    assert not any(v.dwell and v.dwell["over_7000"] for v in others)
    assert 0.02 < sum(v.dwell is None for v in others) / len(others) < 0.5
    # Whoever clicks less often also leaves earlier: what was watched tells of tastes.
    assert len({given.delay_ms for v in visits for given in v.feedback}) > 500


def test_a_declared_outcome_is_refused():
    with pytest.raises(ConfigRejected, match="long_view"):
        traffic.synthetic({**FIELDS, "long_view": "int64"}, rows=10)


def test_every_column_of_the_log_is_a_feature_or_an_outcome_or_unused(shared: Path):
    with gzip.open(next((shared / "data/kuairand").glob(traffic.IMPRESSIONS)), "rt") as file:
        header = file.readline().strip().split(",")
    assert set(header) >= traffic.OUTCOMES
    assert set(header) - traffic.OUTCOMES - set(FIELDS) == {"date", "is_rand"}


def test_changed_outcomes_change_no_feature(shared: Path, tmp_path: Path):
    source = shared / "data/kuairand"
    for name in (traffic.USERS, traffic.VIDEOS):
        (tmp_path / name).symlink_to(source / name)
    rows = pyarrow.csv.read_csv(next(source.glob(traffic.IMPRESSIONS))).slice(0, 5_000)
    for name in traffic.OUTCOMES:
        at = rows.column_names.index(name)
        rows = rows.set_column(at, name, pa.array(np.random.default_rng(1).integers(2, size=rows.num_rows)))
    with gzip.open(tmp_path / "impressions_changed.csv.gz", "wb") as file:
        pyarrow.csv.write_csv(rows, file)
    real = traffic.kuairand(source, FIELDS, rows_max=5_000)
    changed = traffic.kuairand(tmp_path, FIELDS)
    assert changed.features.equals(real.features)
    assert (changed.clicked_N != real.clicked_N).any()


def test_real_rows_are_whole_and_in_order(shared: Path):
    rows = traffic.kuairand(shared / "data/kuairand", FIELDS)
    assert len(rows) == 167_281
    assert 0.45 < rows.clicked_N.mean() < 0.452
    assert (np.diff(rows.features["time_ms"].to_numpy()) >= 0).all()
    assert (rows.delay_ms_N >= 0).all() and (rows.delay_ms_N <= 700).all()
    assert [v.row for v in rows.visits(167_270)] == list(range(167_270, 167_281))


def test_synthetic_rows_are_labelled_and_repeat():
    one, two = traffic.synthetic(FIELDS, rows=2_000), traffic.synthetic(FIELDS, rows=2_000)
    assert "SYNTHETIC" in one.label and "oracle" in one.label
    assert one.features.equals(two.features) and (one.clicked_N == two.clicked_N).all()


def test_a_wrong_data_folder_is_refused_and_not_replaced(shop_dir: Path, tmp_path: Path):
    with pytest.raises(ConfigRejected, match="DATA="):
        traffic.find_data(shop_dir, str(tmp_path))


def test_a_project_near_the_root_has_no_data_beside_it():
    assert traffic.find_data(Path("/a-project"), None) is None


def test_traffic_of_another_project_is_refused_before_anything_of_it_is_sent() -> None:
    def show(visit: Visit) -> list[Any]:
        sent: list[Any] = []
        Service(PROJECT, iter([visit]), log=lambda *told: sent.append(told), run="r", rank=None).show(0)
        return sent

    key = PROJECT.impression.key
    candidates: list[dict[str, Any]] = [{"page": 1}]
    assert show(Visit(context={key: 1}, candidates=candidates))
    for visit, says in (
        (Visit(context={key: 1}, candidates=candidates, chances={"rent": [0.5]}), r"\['rent'\], which it does not"),
        (Visit(context={}, candidates=candidates), f"no field '{key}', its partition key"),
    ):
        with pytest.raises(ConfigRejected, match=rf"another project than '{PROJECT.name}'.* {says}.*traffic.py"):
            show(visit)
