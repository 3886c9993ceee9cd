"""Goal: every kind of feature depends on its row alone, and means what it says. Method: random batches, cut anywhere;
each kind again by a plain loop over rows."""

from __future__ import annotations

import itertools
import math
from datetime import UTC, datetime, timedelta

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from headrace.contract.errors import ConfigRejected, InvariantBroken
from headrace.contract.functions import feature_function
from headrace.contract.spec import (
    PAD,
    Bucket,
    Categorical,
    Counter,
    Cross,
    Custom,
    FeatureSpec,
    Mean,
    MultiValued,
    Numeric,
    Pairs,
    Product,
    Quantile,
    Rate,
    Recency,
    Text,
    TimePart,
)
from headrace.stream.features.featurize import featurize, split_check
from headrace.stream.features.few_rows import Numbers, Same, arrow_of, few_of
from headrace.stream.features.transforms import char_ngrams, word_ngrams

COUNTER = Counter(name="u", key="user", counts=("impression", "click", "sum:buy.value", "last:click"))


@feature_function("test.length", version=1)
def length(title):
    return pc.utf8_length(title)


@feature_function("test.both", version=1)
def both(tags, user):
    counts = pc.fill_null(pc.list_value_length(tags), 0).cast(pa.float64()).to_numpy()
    return np.stack([counts, pc.fill_null(user, 0).cast(pa.float64(), safe=False).to_numpy()], axis=1)


@feature_function("test.tags_again", version=1)
def tags_again(tags):
    return tags


@feature_function("test.row_number", version=1)
def row_number(user):
    return np.arange(len(user))


SPEC = FeatureSpec(
    counters=(COUNTER,),
    features=(
        Categorical(field="user"),
        MultiValued(field="tags", values_max=4),
        MultiValued(field="topics", values_max=3),
        MultiValued(field="joined", separator="|", values_max=3),
        Text(field="title", values_max=4),
        Text(field="title", ngram_min=2, ngram_max=3, values_max=5),
        Text(field="title", unit="char", ngram_min=3, ngram_max=3, values_max=8),
        TimePart(part="hour", utc_offset_minutes=-210),
        TimePart(part="day_of_week"),
        TimePart(part="hour_of_week", utc_offset_minutes=60),
        TimePart(part="minute_of_day"),
        Bucket(field="price", edges=(0.0, 1.0, 10.0)),
        Cross(fields=("user", "title")),
        Product(parts=(Bucket(field="price", edges=(0.0,)), MultiValued(field="tags", values_max=4)), values_max=3),
        Product(parts=(TimePart(part="hour"), Categorical(field="user"), MultiValued(field="topics", values_max=2))),
        Pairs(fields=("user", "title", "price")),
        Pairs(fields=("user", "title"), space=100),
        Quantile(field="price", edges=(-5.0, 0.0, 1.0, 1e6)),
        Numeric(field="price"),
        Rate(of="counter.u.click", over="counter.u.impression"),
        Rate(of="counter.u.click", over="counter.u.impression", log_odds=True),
        Mean(of="counter.u.sum:buy.value", over="counter.u.click"),
        Recency(of="counter.u.last:click", half_life_ms=60_000),
        Custom(function="test.length", version=1, fields=("title",), gives="numbers"),
        Custom(function="test.both", version=1, fields=("tags", "user"), gives="numbers", width=2),
        Custom(function="test.tags_again", version=1, fields=("tags",), gives="slots", width=2),
        Custom(function="test.length", version=1, fields=("title",), gives="slots"),
    ),
)
SCHEMA = pa.schema(
    [
        ("user", pa.int64()),
        ("tags", pa.list_(pa.string())),
        ("topics", pa.list_(pa.int64())),
        ("joined", pa.string()),
        ("title", pa.string()),
        ("price", pa.float64()),
        ("event_time_ms", pa.int64()),
        *((name, pa.float32()) for name in COUNTER.columns()),
    ]
)
INT64 = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(max_size=30) | st.sampled_from(
    ["a b c", "\uff21b \u2167 \ufb01", "日本語 テスト", "İ ß ẞ", "e\u0301 é", "\u200d🚲"]
)
ROW = st.fixed_dictionaries(
    {
        "user": st.none() | INT64,
        "tags": st.none() | st.lists(st.none() | st.sampled_from("abcdef") | st.text(max_size=3), max_size=9),
        "topics": st.none() | st.lists(st.none() | st.integers(0, 5) | INT64, max_size=9),
        "joined": st.none() | st.text(alphabet="ab |é", max_size=12),
        "title": st.none() | TEXT,
        "price": st.none() | st.floats(),
        "event_time_ms": st.none() | INT64 | st.integers(0, 4_102_444_800_000),
        **dict.fromkeys(COUNTER.columns(), st.none() | st.floats(0, 1e9, width=32)),
    }
)
ROWS = st.lists(ROW, max_size=25)


def batch_of(rows: list[dict]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist(rows, schema=SCHEMA)


@settings(deadline=None)
@given(ROWS, st.lists(st.integers(0, 25), max_size=4))
def test_any_cut_gives_the_same_bits(rows, cuts):
    batch = batch_of(rows)
    slots_NF, numeric_ND = featurize(batch, SPEC)
    assert slots_NF.shape == (len(rows), SPEC.slots) and numeric_ND.shape == (len(rows), SPEC.numerics)
    assert not (slots_NF == 0).any() and not np.isnan(numeric_ND).any()
    edges = sorted({0, len(rows), *(c for c in cuts if c < len(rows))})
    parts = [featurize(batch.slice(a, b - a), SPEC) for a, b in itertools.pairwise(edges)]
    if parts:
        assert np.concatenate([s for s, _ in parts]).tobytes() == slots_NF.tobytes()
        assert np.concatenate([n for _, n in parts]).tobytes() == numeric_ND.tobytes()
    split_check(batch, SPEC)


@settings(deadline=None, max_examples=30)
@given(ROWS)
def test_forms_of_the_same_columns_give_the_same_bits(rows):
    """A record batch, arrays by name, one chunked table and lists as a lake returns them are the same rows."""
    batch = batch_of(rows)
    wanted = featurize(batch, SPEC)
    renamed = pa.list_(pa.field("element", pa.string()))
    table = pa.Table.from_batches([batch.slice(0, len(rows) // 2), batch.slice(len(rows) // 2)], schema=SCHEMA)
    columns = {name: table.column(name) for name in SCHEMA.names}
    columns["tags"] = columns["tags"].cast(renamed)
    for found in (
        featurize(columns, SPEC),
        featurize(table.combine_chunks().to_batches()[0], SPEC) if rows else wanted,
    ):
        assert found[0].tobytes() == wanted[0].tobytes() and found[1].tobytes() == wanted[1].tobytes()


@settings(deadline=None, max_examples=60)
@given(st.lists(ROW, min_size=1, max_size=25), st.sets(st.sampled_from(SCHEMA.names)), st.booleans())
def test_columns_of_few_rows_give_the_bits_of_arrows(rows, same, is_arrow):
    """Serving's columns: NumPy's, Python's, and those where all rows have one value, as training has them in Arrow."""
    rows = [row | {name: rows[0][name] for name in same} for row in rows]
    wanted, columns = featurize(batch_of(rows), SPEC), {}
    for name, kind in zip(SCHEMA.names, SCHEMA.types, strict=True):
        values = [row[name] for row in rows][: 1 if name in same else None]
        if kind == pa.float32():
            missing_N = np.array([value is None for value in values])
            numbers_N = np.array([value or 0 for value in values], np.float32)
            column = Numbers(numbers_N, missing_N if missing_N.any() else None)
        else:
            column = few_of(values, KINDS.get(kind, "list[int64]" if name == "topics" else "list[string]"))
        column = Same(column, len(rows)) if name in same else column
        columns[name] = arrow_of(column) if is_arrow else column
    found = featurize(columns, SPEC)
    assert found[0].tobytes() == wanted[0].tobytes() and found[1].tobytes() == wanted[1].tobytes()


KINDS = {pa.int64(): "int64", pa.float64(): "float64", pa.string(): "string"}


def slots_of(feature, rows: list[dict]) -> list[list[int]]:
    return featurize(batch_of(rows), FeatureSpec(features=(feature,)))[0].tolist()


def first_distinct(values: list, width: int) -> list:
    return list(dict.fromkeys(values))[:width]


@settings(deadline=None, max_examples=60)
@given(ROWS)
def test_lists_and_texts_hold_what_a_loop_holds(rows):
    """One id a distinct value, first come first; a missing list or text has one, too, an empty one none."""
    cases = [
        (MultiValued(field="tags", values_max=4), lambda r: r["tags"], lambda v: [x for x in v if x is not None]),
        (MultiValued(field="topics", values_max=3), lambda r: r["topics"], lambda v: [x for x in v if x is not None]),
        (
            MultiValued(field="joined", separator="|", values_max=3),
            lambda r: r["joined"],
            lambda v: [x.strip() for x in v.split("|") if x.strip()],
        ),
        (
            Text(field="title", ngram_min=1, ngram_max=2, values_max=5),
            lambda r: r["title"],
            lambda v: list(word_ngrams(v, shortest=1, longest=2)),
        ),
        (
            Text(field="title", unit="char", ngram_min=2, ngram_max=2, values_max=5),
            lambda r: r["title"],
            lambda v: list(char_ngrams(v, shortest=2, longest=2)),
        ),
    ]
    for feature, read, values in cases:
        id_of: dict = {}
        for row, found in zip(rows, slots_of(feature, rows), strict=True):
            raw = read(row)
            expected = ["<missing>"] if raw is None else first_distinct(values(raw), feature.values_max)
            assert found[len(expected) :] == [PAD] * (feature.values_max - len(expected))
            for value, slot in zip(expected, found, strict=False):
                assert slot != PAD and id_of.setdefault(value, slot) == slot
        assert len(set(id_of.values())) == len(id_of)


@settings(deadline=None, max_examples=60)
@given(ROWS)
def test_a_product_holds_every_combination_of_its_parts(rows):
    parts = (TimePart(part="hour"), MultiValued(field="tags", values_max=3), MultiValued(field="topics", values_max=2))
    feature = Product(parts=parts, values_max=4)
    singles = [slots_of(part, rows) for part in parts]
    id_of: dict = {}
    for n, found in enumerate(slots_of(feature, rows)):
        present = [[slot for slot in single[n] if slot != PAD] for single in singles]
        expected = list(itertools.product(*present))[:4]
        assert [slot for slot in found if slot != PAD] == found[: len(expected)]
        for combination, slot in zip(expected, found, strict=False):
            assert id_of.setdefault(combination, slot) == slot
    assert len(set(id_of.values())) == len(id_of)


@settings(deadline=None)
@given(st.lists(st.integers(-62_135_596_800_000, 253_402_300_799_999), min_size=1), st.integers(-840, 840))
def test_time_parts_agree_with_the_calendar(times, offset):
    epoch = datetime(1970, 1, 1, tzinfo=UTC).replace(tzinfo=None)
    rows = [dict.fromkeys(SCHEMA.names) | {"event_time_ms": t} for t in times]
    read = {
        "hour": lambda d: d.hour,
        "day_of_week": lambda d: d.weekday(),
        "hour_of_week": lambda d: d.weekday() * 24 + d.hour,
        "minute_of_day": lambda d: d.hour * 60 + d.minute,
    }
    for part, value in read.items():
        found = slots_of(TimePart(part=part, utc_offset_minutes=offset), rows)
        id_of: dict = {}
        for time_ms, (slot,) in zip(times, found, strict=True):
            try:
                at = epoch + timedelta(milliseconds=time_ms, minutes=offset)
            except OverflowError:
                continue
            assert id_of.setdefault(value(at), slot) == slot
        assert len(set(id_of.values())) == len(id_of)


@settings(deadline=None)
@example([0.0, 5e-324], [0.0, 5e-324])
@given(st.lists(st.floats(), min_size=1), st.lists(st.floats(-1e300, 1e300), min_size=2, max_size=9, unique=True))
def test_quantiles_rise_from_0_to_1(values, edges):
    feature = Quantile(field="price", edges=tuple(sorted(edges)))
    rows = [dict.fromkeys(SCHEMA.names) | {"price": v} for v in values]
    found = featurize(batch_of(rows), FeatureSpec(features=(feature,)))[1][:, 0].tolist()
    known = sorted((v, f) for v, f in zip(values, found, strict=True) if not math.isnan(v))
    assert all(0 <= f <= 1 for f in found)
    assert all(one[1] <= two[1] for one, two in itertools.pairwise(known))
    assert all(f == 0 for v, f in known if v <= feature.edges[0]) and all(f == 1 for v, f in known if v >= max(edges))
    assert all(f == 0 for v, f in zip(values, found, strict=True) if math.isnan(v))


def test_a_space_bounds_the_ids_of_a_pair():
    rows = [dict.fromkeys(SCHEMA.names) | {"user": n, "price": float(n)} for n in range(5_000)]
    found = {slot for (slot,) in slots_of(Pairs(fields=("user", "price"), space=50), rows)}
    assert len(found) == 50
    assert len({slot for (slot,) in slots_of(Pairs(fields=("user", "price")), rows)}) == 5_000


def test_a_larger_bound_keeps_the_ids():
    """What was learnt of a value stays with it when values_max grows; another offset is another feature."""
    rows = [dict.fromkeys(SCHEMA.names) | {"tags": ["a", "b"], "joined": "a|b", "event_time_ms": 0}]
    assert (
        slots_of(MultiValued(field="tags", values_max=2), rows)[0]
        == (slots_of(MultiValued(field="tags", values_max=9), rows)[0][:2])
    )
    one, two = (slots_of(TimePart(part="hour", utc_offset_minutes=m), rows) for m in (0, 1))
    assert one != two


def test_a_number_beyond_float32_is_infinite_and_raises_no_warning():
    rows = [dict.fromkeys(SCHEMA.names) | {"price": 1e300}]
    spec = FeatureSpec(features=(Numeric(field="price", transform="identity"),))
    assert featurize(batch_of(rows), spec)[1].tolist() == [[math.inf]]


@pytest.mark.parametrize("feature", SPEC.features, ids=lambda f: type(f).__name__)
def test_json_gives_back_each_feature_and_every_field_is_in_the_digest(feature):
    spec = FeatureSpec(features=(feature,))
    assert msgspec.json.decode(msgspec.json.encode(spec), type=FeatureSpec) == spec
    assert len(spec.digest()) == 16
    for field in msgspec.structs.fields(feature):
        value = getattr(feature, field.name)
        other = {"int": 7, "str": "zzz", "float": 0.125, "tuple": (), "UnsetType": True, "bool": False}
        changed = msgspec.structs.replace(feature, **{field.name: other[type(value).__name__]})
        assert FeatureSpec(features=(changed,)).digest() != spec.digest()


def test_a_function_that_looks_at_its_neighbours_is_found():
    spec = FeatureSpec(features=(Custom(function="test.row_number", version=1, fields=("user",), gives="numbers"),))
    with pytest.raises(InvariantBroken, match="looks at more than its row"):
        split_check(batch_of([dict.fromkeys(SCHEMA.names)] * 3), spec)


def test_functions_are_known_by_name_and_version():
    with pytest.raises(ConfigRejected, match="versions of that name: 1\\."):
        featurize(
            batch_of([]),
            FeatureSpec(features=(Custom(function="test.length", version=2, fields=("title",), gives="slots"),)),
        )

    def other(title):
        return title

    with pytest.raises(ConfigRejected, match="new version"):
        feature_function("test.length", version=1)(other)
    feature_function("test.length", version=1)(length)


@pytest.mark.parametrize(
    ("returned", "match"),
    [
        (lambda user: user.slice(1), "of 2 for 3 rows"),
        (lambda user: 5, "returned int"),
        (lambda user: np.zeros((3, 2)), "gives 2 values a row"),
        (lambda user: 1 / 0, "raised ZeroDivisionError"),
    ],
)
def test_what_a_function_may_not_return(returned, match):
    feature_function(f"test.bad.{match}", version=1)(returned)
    feature = Custom(function=f"test.bad.{match}", version=1, fields=("user",), gives="numbers")
    with pytest.raises(ConfigRejected, match=match):
        featurize(batch_of([dict.fromkeys(SCHEMA.names)] * 3), FeatureSpec(features=(feature,)))
