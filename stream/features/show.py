"""What each kind of feature makes of a few rows: for reading, and for trying a feature before it is declared. Pure.

Names are those of `headrace.contract.spec`; a letter is an id, `-` a pad.

>>> shown(Categorical(field="city"), city=["Rome", "Oslo", "Rome", None])
['a', 'b', 'a', 'c']
>>> shown(MultiValued(field="tags", values_max=3), tags=[["new", "red"], ["red"], [], None])
['a b -', 'b - -', '- - -', 'c - -']
>>> shown(MultiValued(field="tags", separator="|", values_max=2), tags=["new| red", "red|new|old"])
['a b', 'b a']
>>> shown(Text(field="title", values_max=3), title=["Red bicycle", "a RED, red one"])
['a b -', 'c a d']
>>> shown(Text(field="title", ngram_max=2, values_max=3), title=["red bicycle", "bicycle red"])
['a b c', 'b a d']
>>> shown(Text(field="q", unit="char", ngram_min=3, ngram_max=3, values_max=3), q=["bike", "bikes"])
['a b -', 'a b c']
>>> shown(Bucket(field="price", edges=(1.0, 10.0)), price=[0.5, 1.0, 9.9, 10.0, None])
['a', 'b', 'b', 'c', 'd']
>>> shown(TimePart(part="hour", utc_offset_minutes=60), event_time_ms=[0, 3_599_999, 3_600_000])
['a', 'a', 'b']
>>> shown(TimePart(part="day_of_week"), event_time_ms=[0, 604_800_000, 86_400_000])
['a', 'a', 'b']
>>> shown(Cross(fields=("city", "paid")), city=["Rome", "Rome", "Oslo"], paid=[True, False, True])
['a', 'b', 'c']
>>> night = TimePart(part="hour")
>>> product = Product(parts=(night, MultiValued(field="tags", values_max=2)), values_max=2)
>>> shown(product, event_time_ms=[0, 0, 3_600_000], tags=[["new", "red"], ["red"], ["red"]])
['a b', 'b -', 'c -']
>>> shown(Pairs(fields=("user", "city", "paid")), user=[7, 7], city=["Rome", "Oslo"], paid=[True, True])
['a b c', 'd b e']
>>> shown(Numeric(field="price", transform="identity", scale=0.5), price=[3.0, None])
[(1.5,), (0.0,)]
>>> shown(Quantile(field="price", edges=(0.0, 10.0, 30.0)), price=[5.0, 10.0, 20.0, 99.0])
[(0.25,), (0.5,), (0.75,), (1.0,)]
>>> shown(Rate(of="clicks", over="shown", prior=0.5, strength=2.0), clicks=[0.0, 2.0], shown=[0.0, 2.0])
[(0.5, 0.0), (0.75, 1.0986123)]
>>> odds = Rate(of="clicks", over="shown", prior=0.5, strength=2.0, log_odds=True)
>>> shown(odds, clicks=[0.0, 2.0], shown=[0.0, 2.0])
[(0.0, 0.0), (1.0986123, 0.54930615)]
>>> shown(Mean(of="spent", over="orders", prior=10.0, strength=1.0), spent=[0.0, 50.0], orders=[0.0, 1.0])
[(10.0,), (30.0,)]
>>> shown(Recency(of="last", half_life_ms=1_000), last=[1.0, 1_001.0, 0.0])
[(1.0,), (0.5,), (0.0,)]
>>> length = feature_function("shown.length", version=1)(lambda title: pc.utf8_length(title))
>>> shown(Custom(function="shown.length", version=1, fields=("title",), gives="numbers"), title=["red", None])
[(3.0,), (0.0,)]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from headrace.contract.spec import PAD, Feature, FeatureSpec
from headrace.stream.features.featurize import featurize


def shown(feature: Feature, **columns: Sequence[Any]) -> list[str] | list[tuple[float, ...]]:
    """Return what a feature gives for each row: its slots as letters in order of appearance, or its numbers.

    `-` is a pad. Equal letters are equal ids; after 26 the letters begin again, with a number.
    """
    slots_NF, numeric_ND = featurize(
        {name: pa.array(values) for name, values in columns.items()}, FeatureSpec(features=(feature,))
    )
    if not feature.slots:
        return [tuple(float(str(number)) for number in row) for row in numeric_ND]
    letters = {PAD: "-"}
    for slot in slots_NF.reshape(-1).tolist():
        number = len(letters) - 1
        letters.setdefault(slot, chr(ord("a") + number % 26) + (str(number // 26) if number >= 26 else ""))
    return [" ".join(letters[slot] for slot in row) for row in slots_NF.tolist()]
