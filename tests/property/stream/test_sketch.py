"""Goal: quantiles within the promised error, equal in any split and order. Method: random values, cut anywhere."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.cli.main import main
from headrace.contract.errors import ConfigRejected
from headrace.stream.features import sketch as module
from headrace.stream.features.sketch import Sketch


@pytest.fixture(params=[module.DISTINCT_MAX, 8], ids=["exact", "coarse"])
def exact_max(request, monkeypatch):
    monkeypatch.setattr(module, "DISTINCT_MAX", request.param)
    return request.param


VALUES = st.lists(st.none() | st.floats() | st.integers(-5, 5).map(float) | st.floats(1e300, 1.7e308), max_size=60)


def state(sketch: Sketch) -> tuple:
    return sketch.count, sketch.least, sketch.most, sketch._exact, sketch._coarse


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(VALUES, st.integers(0, 60), st.randoms())
def test_splits_orders_and_merges_give_the_same(exact_max, values, cut, random):
    whole, parts, merged = Sketch(), Sketch(), Sketch()
    whole.add(pa.array(values, pa.float64()))
    shuffled = list(values)
    random.shuffle(shuffled)
    for part in (shuffled[:cut], shuffled[cut:]):
        parts.add(pa.array(part, pa.float64()))
        one = Sketch()
        one.add(pa.chunked_array([part], pa.float64()))
        merged.merge(one)
    assert state(whole) == state(parts) == state(merged)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=200), st.floats(0, 1))
def test_quantiles_are_true_to_the_error(exact_max, values, share):
    sketch = Sketch()
    sketch.add(pa.array(values))
    true = float(np.quantile(np.array(values), share, method="inverted_cdf"))
    found = sketch.quantile(share)
    assert min(values) <= found <= max(values)
    if share in (0, 1) or len(set(values)) <= exact_max:
        assert found == true
    elif abs(true) >= np.finfo(np.float64).tiny:
        assert abs(found - true) <= 0.002001 * abs(true)


def test_edges_are_pinned_in_order():
    sketch = Sketch()
    sketch.add(pa.array(np.random.default_rng(1).lognormal(3, 2, 200_000)))
    edges = sketch.edges(64)
    assert len(edges) == 65 and list(edges) == sorted(set(edges))
    few = Sketch()
    few.add(pa.array([1] * 90 + [2] * 10))
    assert few.edges(4) == (1.0, 2.0)


def test_nothing_to_learn_from_is_said():
    with pytest.raises(ConfigRejected, match="no value"):
        Sketch().quantile(0.5)
    same = Sketch()
    same.add(pa.array([3.0, 3.0]))
    with pytest.raises(ConfigRejected, match="nothing to tell them apart"):
        same.edges(4)
    with pytest.raises(ConfigRejected, match="can't be merged"):
        same.merge(Sketch(error=0.1))


def test_the_verb_refuses_what_is_no_number(tmp_path, capsys):
    flags = ["--store", f"file:{tmp_path}", "--home", str(tmp_path)]
    assert main(["quantiles", "--field", "tag", *flags]) == 2
    assert "quantiles are of numbers" in capsys.readouterr().err
    assert main(["quantiles", "--field", "duration_ms", *flags]) == 1
    assert "no lake" in capsys.readouterr().err
