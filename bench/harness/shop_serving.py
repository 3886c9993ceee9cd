"""The demo shop's serving without its topics: its spec and recipe, made-up weights, counters and crawled values.

Weights are drawn from a seed and as many as the traffic's features have rows; counters have what an hour of traffic
leaves. What is measured does not depend on what was learnt.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from headrace.backends.clock import SystemClock
from headrace.backends.metrics_prometheus import PrometheusMetrics
from headrace.contract.config import ServeConfig
from headrace.contract.crawl import PREFIX
from headrace.contract.formats.snapshot import Manifest, Weights
from headrace.contract.interfaces.log import Record
from headrace.examples.shop.shop import CATALOGUE, FEATURES, PROJECT
from headrace.examples.shop.traffic import Visit, load_traffic
from headrace.examples.shop.web_service import CANDIDATE
from headrace.serving.api.dependencies import ServingDependencies
from headrace.serving.features import FeatureMemory
from headrace.serving.model.scorer import merge
from headrace.serving.model.shared_region import Meta, SharedModel
from headrace.stream.features.counters import bucket_ms, key_strings
from headrace.stream.features.featurize import featurize
from headrace.stream.features.few_rows import arrow_of
from headrace.trainer.model.scoring import shapes_of

VERSION = "0123456789ab-1234"
ROWS = 4_000


class _Nothing:
    def log(self, **_: Any) -> None:
        """Log nothing."""


def shop_visits(rows: int = ROWS) -> list[Visit]:
    """Return the generator's visits."""
    return list(load_traffic(None, PROJECT.impression.fields, rows_max=rows).visits())


def shop_dependencies(folder: Path, visits: list[Visit], *, seed: int = 1) -> ServingDependencies:
    """Return what the application needs, with a model, counters and crawled values loaded."""
    random, clock = np.random.default_rng(seed), SystemClock()
    features = shop_features(visits, random, clock.now_ms())
    shared = SharedModel(folder / "model", dim=PROJECT.recipe.row_dim, rows_max=1_000_000, create=True)
    load_weights(shared, features, visits, random)
    metrics = PrometheusMetrics("serve", 0)
    return ServingDependencies(
        project=PROJECT,
        config=ServeConfig(candidates_max=1_000),
        shared=shared,
        features=features,
        metrics=metrics,
        metrics_text=lambda: b"",
        clock=clock,
        impressions=_Nothing(),
    )


def shop_features(visits: list[Visit], random: np.random.Generator, now_ms: int) -> FeatureMemory:
    """Return counters of all keys of the visits, and a crawled entity for nine of ten videos."""
    memory = FeatureMemory(PROJECT.crawls)
    raw, offset = merge(PROJECT, {}, [visit.fields for visit in visits]), 0
    for counter in FEATURES.counters:
        newest = now_ms // bucket_ms(counter)
        for key in sorted({key for key in key_strings([arrow_of(raw[field]) for field in counter.key_fields]) if key}):
            # The first entry is that of the impressions: there are more of them than of anything else.
            buckets = {
                str(newest - int(age)): [int(n) for n in random.integers(0, 20, len(counter.counts))]
                for age in random.choice(counter.buckets, random.integers(1, counter.buckets + 1), replace=False)
            }
            text = msgspec.json.encode({"as_of_ms": now_ms, "epoch": 1, "buckets": buckets})
            memory.take(Record("features", 0, offset, f"{counter.name}/{key}".encode(), text, {}, 0))
            offset += 1
    for video in sorted({visit.fields["video_id"] for visit in visits}):
        if random.random() < 0.9:
            values = {"music": str(random.integers(9)), "price": round(float(random.random() * 10), 2)}
            text = msgspec.json.encode({"crawl_time_ms": now_ms, "epoch": 1, "values": values})
            key = f"{PREFIX}/{CATALOGUE.name}/{video}".encode()
            memory.take(Record("features", 0, offset, key, text, {}, 0))
            offset += 1
    memory.is_caught_up, memory.current_s = True, float("inf")
    return memory


def load_weights(
    shared: SharedModel, features: FeatureMemory, visits: list[Visit], random: np.random.Generator
) -> None:
    """Load a model with a row for each slot of the visits."""
    raw = merge(PROJECT, {}, [visit.fields for visit in visits])
    inputs = {name for feature in FEATURES.features for name in feature.inputs()}
    keys_K = np.unique(featurize({**raw, **features.look_up(FEATURES, raw, len(visits)).columns(inputs)}, FEATURES)[0])
    keys_K = keys_K[keys_K != -1]
    recipe = PROJECT.recipe
    shapes = shapes_of(recipe, FEATURES)
    dense = {name: random.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
    for name in ("numbers", "targets"):
        if name in dense:
            dense[name] = np.abs(dense[name]) + np.float32(1)
    values_KV = random.normal(0, 0.1, (len(keys_K), 1 + recipe.row_dim)).astype(np.float32)
    spec_json = msgspec.json.encode(FEATURES, order="deterministic").decode()
    recipe_json = msgspec.json.encode(recipe).decode()
    manifest = Manifest(kind="snapshot", model=PROJECT.name, version=VERSION, run="0123456789ab", step=1234)
    meta = Meta(manifest, VERSION, spec_json, recipe_json, shapes)
    weights = Weights(keys_K, values_KV, dense)
    shared.check_fits(weights, meta, fresh=True)
    shared.load_snapshot(weights, meta)


def bodies(visits: list[Visit], candidates: int, *, seed: int = 2) -> Iterator[bytes]:
    """Yield bodies of POST /v1/rank for ever: a user of one visit, videos of others."""
    random, number = np.random.default_rng(seed), 0
    while True:
        user = visits[int(random.integers(len(visits)))].fields
        context = {name: value for name, value in user.items() if name not in CANDIDATE}
        shown = [visits[int(i)].fields for i in random.integers(len(visits), size=candidates)]
        videos = [{name: fields[name] for name in CANDIDATE if name in fields} for fields in shown]
        number += 1
        yield msgspec.json.encode({"request_id": f"r-{number}", "context": context, "candidates": videos})
