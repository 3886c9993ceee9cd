"""Each kind of feature as a pure function of columns: value hashes for slots, float64 for dense numbers.

Legend: N rows, W slots of a feature, C combinations of a product.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headrace.contract.errors import ConfigRejected
from headrace.contract.functions import function_of
from headrace.contract.hashing import combine64, mix64
from headrace.contract.spec import (
    Bucket,
    Categorical,
    Cross,
    Custom,
    Feature,
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
from headrace.stream.features.few_rows import Numbers, Same, Texts, arrow_of
from headrace.stream.features.values import (
    NULL_HASH,
    Columns,
    F64s,
    U64s,
    Values,
    column_of,
    first_present,
    hash_values,
    list_values,
    text_values,
    to_numbers,
)

TEXT_CHARS_MAX = 4_096
"""Most characters of a text that are looked at."""
FEW_ROWS = 1_024
"""Up to so many rows, as in a request, columns are worth copying together to save calls."""
_WORD = re.compile(r"\w+")
_MINUTE_MS, _HOUR_MS, _DAY_MS = 60_000, 3_600_000, 86_400_000


class Inputs:
    """The columns of one batch, each hashed and turned into numbers once, whatever number of features reads it."""

    def __init__(self, columns: Columns, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self._hashes: dict[str, U64s] = {}
        self._numbers: dict[str, F64s] = {}
        self._buckets: dict[Bucket, U64s] = {}

    def column(self, name: str) -> pa.Array:
        """Return a column as Arrow's array."""
        return arrow_of(column_of(self.columns, name))

    def hash_together(self, names: Iterable[str]) -> None:
        """Hash several columns ahead: integers without nulls in one call and, of a few rows, texts in one call."""
        whole: dict[str, U64s] = {}
        same: dict[str, int] = {}
        texts: dict[str, pa.Array] = {}
        for name in names:
            column = column_of(self.columns, name)
            if isinstance(column, Same):
                if isinstance(column.one, Numbers) and column.one.values_N.dtype == np.int64 and column.one[1] is None:
                    same[name] = column.one.values_N[0]
            elif isinstance(column, Numbers):
                if column.values_N.dtype == np.int64 and column.missing_N is None:
                    whole[name] = column.values_N.view(np.uint64)
            elif isinstance(column, Texts):
                continue
            elif pa.types.is_int64(column.type) and not column.null_count:
                whole[name] = column.to_numpy().view(np.uint64)
            elif pa.types.is_string(column.type) and self.rows <= FEW_ROWS:
                texts[name] = column
        if whole:
            self._hashes.update(zip(whole, mix64(np.stack(list(whole.values()))), strict=True))
        if same:
            hashed_C = mix64(np.array(list(same.values()), np.int64).view(np.uint64))
            for name, hashed_N in zip(same, np.repeat(hashed_C[:, None], self.rows, axis=1), strict=True):
                self._hashes[name] = hashed_N
        if texts:
            hashed_N = hash_values(pa.concat_arrays(list(texts.values())))
            self._hashes.update(zip(texts, hashed_N.reshape(len(texts), self.rows), strict=True))

    def rate_together(self, rates: tuple[Rate, ...]) -> tuple[F64s, F64s]:
        """Return the two numbers of each rate, float64 [R, N] each, in one call a step: for the rows of a request calls
        are what costs."""
        self._numbers_together({name for rate in rates for name in rate.inputs()})
        of_RN, over_RN = (np.stack([self.numbers(getattr(r, side)) for r in rates]) for side in ("of", "over"))
        begun_R1, strength_R1, odds_R = _constants(rates)
        rate_RN = (of_RN + begun_R1) / (over_RN + strength_R1)
        weight_RN = np.log1p(np.maximum(over_RN, 0.0))
        if odds_R.any():
            clipped_RN = np.clip(rate_RN[odds_R], 0.001, 0.999)
            rate_RN[odds_R], weight_RN[odds_R] = np.log(clipped_RN / (1.0 - clipped_RN)), weight_RN[odds_R] / 2
        return rate_RN, weight_RN

    def _numbers_together(self, names: Iterable[str]) -> None:
        """Turn counter columns without nulls into numbers in one call."""
        whole = {}
        for name in names:
            column = column_of(self.columns, name)
            if name in self._numbers or isinstance(column, Same | Texts):
                continue
            if isinstance(column, Numbers):
                if column.values_N.dtype == np.float32 and column.missing_N is None:
                    whole[name] = column.values_N
            elif pa.types.is_float32(column.type) and not column.null_count:
                whole[name] = column.to_numpy()
        if whole:
            values_CN = np.stack(list(whole.values())).astype(np.float64)
            self._numbers.update(zip(whole, np.where(np.isnan(values_CN), 0.0, values_CN), strict=True))

    def bucket(self, feature: Bucket) -> U64s:
        """Return the hash of each row's interval, once for all features that are made of it."""
        if feature not in self._buckets:
            self._buckets[feature] = _bucket(feature, self)
        return self._buckets[feature]

    def hashes(self, name: str) -> U64s:
        """Return `hash_values` of a column."""
        if name not in self._hashes:
            self._hashes[name] = hash_values(column_of(self.columns, name))
        return self._hashes[name]

    def numbers(self, name: str) -> F64s:
        """Return `to_numbers` of a column: missing is 0."""
        if name not in self._numbers:
            self._numbers[name] = to_numbers(column_of(self.columns, name))
        return self._numbers[name]


@lru_cache(maxsize=64)
def _constants(rates: tuple[Rate, ...]) -> tuple[F64s, F64s, npt.NDArray[np.bool_]]:
    """Return prior * strength [R, 1], strength [R, 1], and which rates are log-odds [R]."""
    begun_R1 = np.array([[rate.prior * rate.strength] for rate in rates])
    strength_R1 = np.array([[rate.strength] for rate in rates])
    return begun_R1, strength_R1, np.array([rate.log_odds is True for rate in rates])


def slot_values(feature: Feature, inputs: Inputs) -> Values:
    """Return the value hashes of a feature's slots, as many as it declares."""
    match feature:
        case Categorical():
            return Values(inputs.hashes(feature.field)[None], None)
        case Cross():
            value_N = inputs.hashes(feature.fields[0])
            for name in feature.fields[1:]:
                value_N = combine64(value_N, inputs.hashes(name))
            return Values(value_N[None], None)
        case Bucket():
            return Values(inputs.bucket(feature)[None], None)
        case MultiValued(separator=""):
            return list_values(inputs.column(feature.field), feature.values_max)
        case MultiValued():
            cut = partial(split_values, separator=feature.separator)
            return text_values(inputs.column(feature.field), feature.values_max, cut)
        case Text():
            return text_values(inputs.column(feature.field), feature.values_max, _cutter(feature))
        case TimePart():
            return Values(_time_part(feature, inputs)[None], None)
        case Product():
            return _product(feature, inputs)
        case Pairs():
            return Values(_pairs(feature, inputs), None)
        case Custom():
            return _custom_slots(feature, inputs)
    raise TypeError(f"{type(feature).__name__} has no slots")


def dense_numbers(feature: Feature, inputs: Inputs) -> tuple[F64s, ...]:
    """Return the columns of a feature's dense numbers, as many as it declares: float64 [N] each."""
    number = inputs.numbers
    match feature:
        case Numeric():
            value_N = number(feature.field)
            if feature.transform == "log1p":
                value_N = np.log1p(np.maximum(value_N, 0.0))
            return (value_N * feature.scale,)
        case Rate():
            rate_RN, weight_RN = inputs.rate_together((feature,))
            return rate_RN[0], weight_RN[0]
        case Mean():
            total_N = number(feature.of) + feature.prior * feature.strength
            return (total_N / (np.maximum(number(feature.over), 0.0) + feature.strength) * feature.scale,)
        case Recency():
            past_N = number(feature.of)
            return (np.where(past_N > 0, np.exp2((1.0 - past_N) / feature.half_life_ms), 0.0),)
        case Quantile():
            return (_quantile(feature, inputs),)
        case Custom():
            return _custom_numbers(feature, inputs)
    raise TypeError(f"{type(feature).__name__} has no dense numbers")


def split_values(text: str, *, separator: str) -> Iterator[str]:
    """Give the values between separators, without spaces around them and without empty ones.

    >>> list(split_values("rock| jazz||rock", separator="|"))
    ['rock', 'jazz', 'rock']
    """
    return (value for piece in text.split(separator) if (value := piece.strip()))


def words(text: str) -> list[str]:
    """Return the words of a text, normalized and lower-cased; of long ones the first 4,096 characters count.

    >>> words("Red Bicycle, ＲＥＤ!")
    ['red', 'bicycle', 'red']
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text[:TEXT_CHARS_MAX]).lower())


def word_ngrams(text: str, *, shortest: int, longest: int) -> Iterator[str]:
    """Give the n-grams of words, all of the shortest first, joined by one space.

    >>> list(word_ngrams("a red bicycle", shortest=1, longest=2))
    ['a', 'red', 'bicycle', 'a red', 'red bicycle']
    """
    found = words(text)
    for n in range(shortest, longest + 1):
        for start in range(len(found) - n + 1):
            yield " ".join(found[start : start + n])


def char_ngrams(text: str, *, shortest: int, longest: int) -> Iterator[str]:
    """Give the n-grams of characters within each word; a word shorter than n gives itself, once.

    >>> list(char_ngrams("red c", shortest=2, longest=2))
    ['re', 'ed', 'c']
    """
    found = words(text)
    for n in range(shortest, longest + 1):
        for word in found:
            if len(word) >= n:
                yield from (word[start : start + n] for start in range(len(word) - n + 1))
            elif n == shortest:
                yield word


def _cutter(feature: Text) -> Callable[[str], Iterator[str]]:
    cut = word_ngrams if feature.unit == "word" else char_ngrams
    return partial(cut, shortest=feature.ngram_min, longest=feature.ngram_max)


def _bucket(feature: Bucket, inputs: Inputs) -> U64s:
    edges = np.asarray(feature.edges, dtype=np.float64)
    index_N = np.searchsorted(edges, inputs.numbers(feature.field), side="right")
    # The value's own hash says whether it is missing: `numbers` gives 0 for that.
    missing_N = inputs.hashes(feature.field) == NULL_HASH
    return np.where(missing_N, NULL_HASH, mix64(index_N.astype(np.uint64)))


def _time_part(feature: TimePart, inputs: Inputs) -> U64s:
    column = inputs.column(feature.field)
    time_N = pc.fill_null(column, 0).to_numpy(zero_copy_only=False) + feature.utc_offset_minutes * _MINUTE_MS
    hours_N = time_N // _HOUR_MS
    # 1970-01-01 was a Thursday, three days after a Monday.
    part_N = {
        "hour": lambda: hours_N % 24,
        "day_of_week": lambda: (time_N // _DAY_MS + 3) % 7,
        "hour_of_week": lambda: (hours_N + 3 * 24) % (7 * 24),
        "minute_of_day": lambda: time_N // _MINUTE_MS % 1_440,
    }[feature.part]()
    hashed_N = mix64(part_N.astype(np.uint64))
    if not column.null_count:
        return hashed_N
    return np.where(column.is_null().to_numpy(zero_copy_only=False), NULL_HASH, hashed_N)


def _product(feature: Product, inputs: Inputs) -> Values:
    hashes_CN, present_CN = slot_values(feature.parts[0], inputs)
    for part in feature.parts[1:]:
        other_WN, there_WN = slot_values(part, inputs)
        left, right = len(hashes_CN), len(other_WN)
        pair_CN = combine64(np.repeat(hashes_CN, right, axis=0), np.tile(other_WN, (left, 1)))
        if present_CN is not None or there_WN is not None:
            one = np.ones(hashes_CN.shape, np.bool_) if present_CN is None else present_CN
            two = np.ones(other_WN.shape, np.bool_) if there_WN is None else there_WN
            present_CN = np.repeat(one, right, axis=0) & np.tile(two, (left, 1))
        hashes_CN = pair_CN
    return first_present(Values(hashes_CN, present_CN), feature.slots)


def _pairs(feature: Pairs, inputs: Inputs) -> U64s:
    values_PN = np.empty((feature.slots, inputs.rows), np.uint64)
    for p, (one, two) in enumerate(pairs_of(feature)):
        values_PN[p] = combine64(inputs.hashes(one), inputs.hashes(two))
    return values_PN % np.uint64(feature.space) if feature.space else values_PN


def pairs_of(feature: Pairs) -> list[tuple[str, str]]:
    """Return the pairs in the order of their slots.

    >>> pairs_of(Pairs(fields=("a", "b", "c")))
    [('a', 'b'), ('a', 'c'), ('b', 'c')]
    """
    names = feature.fields
    return [(one, two) for i, one in enumerate(names) for two in names[i + 1 :]]


def _quantile(feature: Quantile, inputs: Inputs) -> F64s:
    """Return the place among the edges; plain arithmetic, since `np.interp` takes other ways for other lengths."""
    edges_K = np.asarray(feature.edges, np.float64)
    last = len(edges_K) - 2
    value_N = np.clip(inputs.numbers(feature.field), edges_K[0], edges_K[-1])
    index_N = np.clip(np.searchsorted(edges_K, value_N, side="right") - 1, 0, last)
    low_N, high_N = edges_K[index_N], edges_K[index_N + 1]
    # Halves, because the width of an interval of large numbers may be more than the largest float. Between the two
    # smallest floats halves are equal: there nothing lies between, and the whole is taken.
    half_N = np.where(high_N / 2 > low_N / 2, 0.5, 1.0)
    share_N = (value_N * half_N - low_N * half_N) / (high_N * half_N - low_N * half_N)
    place_N = (index_N + share_N) / (last + 1)
    column = inputs.column(feature.field)
    missing_N = column.is_null(nan_is_null=True).to_numpy(zero_copy_only=False)
    out_N: F64s = np.where(missing_N, 0.0, place_N)
    return out_N


def _custom_slots(feature: Custom, inputs: Inputs) -> Values:
    given = _called(feature, inputs)
    if isinstance(given, np.ndarray) and given.ndim == 2:
        rows, width = given.shape
        flat_N = hash_values(pa.array(np.ascontiguousarray(given).reshape(-1)))
        values = Values(np.ascontiguousarray(flat_N.reshape(rows, width).T), None)
        _refuse_width(feature, width)
        return values
    column = given if isinstance(given, pa.Array) else pa.array(given)
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return list_values(column, feature.width)
    _refuse_width(feature, 1)
    return Values(hash_values(column)[None], None)


def _custom_numbers(feature: Custom, inputs: Inputs) -> tuple[F64s, ...]:
    given = _called(feature, inputs)
    if isinstance(given, np.ndarray) and given.ndim == 2:
        _refuse_width(feature, given.shape[1])
        columns_DN: F64s = np.nan_to_num(given.astype(np.float64), nan=0.0, posinf=np.inf, neginf=-np.inf).T
        return tuple(columns_DN)
    _refuse_width(feature, 1)
    return (to_numbers(given if isinstance(given, pa.Array) else pa.array(given)),)


def _called(feature: Custom, inputs: Inputs) -> pa.Array | npt.NDArray[np.generic]:
    function = function_of(feature.function, feature.version)
    try:
        given = function(*(inputs.column(name) for name in feature.fields))
    except Exception as error:
        raise ConfigRejected(
            f"feature function {feature.function!r} version {feature.version} raised {type(error).__name__}: {error}. "
            "Every input is legal: nulls, empty batches, extreme values."
        ) from error
    given = given.combine_chunks() if isinstance(given, pa.ChunkedArray) else given
    if not isinstance(given, pa.Array | np.ndarray) or len(given) != inputs.rows:
        size = len(given) if hasattr(given, "__len__") else "no length"
        raise ConfigRejected(
            f"feature function {feature.function!r} version {feature.version} returned {type(given).__name__} of "
            f"{size} for {inputs.rows} rows; it must return an Arrow or NumPy array with one value a row."
        )
    return given


def _refuse_width(feature: Custom, width: int) -> None:
    if width != feature.width:
        raise ConfigRejected(
            f"feature function {feature.function!r} version {feature.version} gives {width} values a row; the feature "
            f"declares width={feature.width}."
        )
