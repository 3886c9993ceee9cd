"""A small world for serving's tests: a project, a trainer that publishes into a memory log, a shared model."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import httpx
import msgspec
import numpy as np
import pyarrow as pa
from starlette.applications import Starlette

from headrace.backends.clock import VirtualClock
from headrace.backends.log.memory import MemoryLog
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.config import ServeConfig
from headrace.contract.errors import Unavailable
from headrace.contract.formats.dense_change import bits_of, change_of, sha256_of
from headrace.contract.formats.snapshot import (
    FORMAT,
    Manifest,
    Weights,
    encode_manifest,
    encode_weights,
    served_digest,
)
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.blobs import Pieces, whole
from headrace.contract.project import FeedbackType, ImpressionType, Project, Recipe, Task
from headrace.contract.spec import Categorical, Counter, FeatureSpec, Numeric, Rate
from headrace.kernels.row_sums import row_sum
from headrace.serving.api.app import ServingApp
from headrace.serving.api.dependencies import ServingDependencies
from headrace.serving.features import FeatureMemory
from headrace.serving.model.shared_region import SharedModel
from headrace.serving.model.updater import Updater
from headrace.stream.features.featurize import featurize

TOPICS = Topics()
PROJECT = Project(
    name="small",
    impression=ImpressionType(
        tag="t.impression", key="user", fields={"user": "int64", "item": "int64", "price": "float64"}
    ),
    feedback=(FeedbackType(name="click", tag="t.click", fields={"item": "int64"}),),
    tasks=(Task(name="click", feedback="click", window_ms=1_000),),
    features=FeatureSpec(
        counters=(Counter(name="item", key="item", window_ms=4_000, buckets=4),),
        features=(
            Categorical(field="user"),
            Categorical(field="item"),
            Numeric(field="price", scale=0.1),
            Rate(of="counter.item.click", over="counter.item.impression"),
            Numeric(field="event_time_ms", scale=0.01),
        ),
    ),
    recipe=Recipe(dim=4, hidden=(8,)),
).checked()
SPEC, RECIPE = PROJECT.features, PROJECT.recipe


class Blobs:
    """A dictionary; `is_away` makes every call fail."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.is_away = False

    def put(self, name: str, data: bytes | Pieces) -> None:
        self.objects[name] = whole(data)

    def get(self, name: str) -> bytes | None:
        if self.is_away:
            raise Unavailable("the store is away")
        return self.objects.get(name)

    def list(self, prefix: str) -> list[str]:
        return sorted(n for n in self.objects if n.rpartition("/")[0] == prefix)

    def delete(self, name: str) -> None:
        self.objects.pop(name, None)


def slots_of(users: list[int], items: list[int]) -> np.ndarray:
    """Return the slot ids of (user, item) pairs: int64 [N, 2]."""
    zero = pa.array([0.0] * len(users), pa.float32())
    columns = {
        "user": pa.array(users, pa.int64()),
        "item": pa.array(items, pa.int64()),
        "price": pa.array([0.0] * len(users), pa.float64()),
        "event_time_ms": pa.array([0] * len(users), pa.int64()),
        **dict.fromkeys(SPEC.counter_columns(), zero),
    }
    return featurize(columns, SPEC)[0]


KEYS = np.unique(slots_of(list(range(20)), list(range(20))))


def weights_of(run: str, step: int, keys: np.ndarray = KEYS) -> Weights:
    """Return weights that are a function of run and step alone."""
    rng = np.random.default_rng([step, *run.encode()])
    widths = [SPEC.slots * RECIPE.dim + SPEC.numerics, *RECIPE.hidden, 1]
    dense = {"bias": rng.normal(size=1), "numeric": rng.normal(size=(SPEC.numerics, 1))}
    for i in range(len(widths) - 1):
        dense[f"w{i}"], dense[f"b{i}"] = rng.normal(size=(widths[i], widths[i + 1])), rng.normal(size=widths[i + 1])
    values = rng.normal(size=(len(keys), 1 + RECIPE.dim)).astype(np.float32)
    return Weights(keys, values, {n: a.astype(np.float32) for n, a in dense.items()})


@dataclass
class Trainer:
    """Publishes as `headrace.trainer.commit.publish` does; what it published is kept in `models`, by version."""

    world: World
    run: str = "a"
    step: int = 0
    base: str = ""
    chain: str = ""
    seq: int = 0
    rows: dict[int, np.ndarray] = field(default_factory=dict)

    @property
    def version(self) -> str:
        return f"{self.run}-{self.step}"

    def learn(self, rng: Random) -> Weights:
        """Take one step: some keys and all dense weights change."""
        self.step += 1
        some = np.array(sorted(rng.sample(KEYS.tolist(), rng.randint(1, 8))), np.int64)
        weights = weights_of(self.run, self.step, some)
        self.rows.update(zip(some.tolist(), weights.values_KV, strict=True))
        self.world.models[self.version] = dict(self.rows), weights.dense
        return weights

    def delta(self, weights: Weights, **changes: Any) -> None:
        """Append the delta to this version; `format=1` as releases before wrote it."""
        manifest = Manifest(
            kind="delta", model="small", run=self.run, step=self.step, version=self.version, base=self.base,
            chain=self.chain, seq=self.seq + 1, spec=SPEC.digest(), dim=RECIPE.dim,
            positions={"0": [self.step, 0]}, created_ms=1_000, format=FORMAT, served=self.served(),
        )  # fmt: skip
        manifest = msgspec.structs.replace(manifest, **changes)
        if manifest.format == 1 and "served" not in changes:
            manifest = msgspec.structs.replace(manifest, served="")
        headers = {"version": manifest.version, "base": manifest.base, "chain": manifest.chain, "rows": manifest.rows}
        base = self.world.models.get(manifest.base)
        dense, _ = change_of(weights.dense, None if base is None else bits_of(base[1]))
        is_old = manifest.format == 1
        data = encode_format_1(weights, manifest) if is_old else encode_weights(weights, manifest, dense)
        self.world.log.append(TOPICS.deltas, 0, data, b"small", headers)
        self.base, self.seq = self.version, self.seq + 1

    def served(self) -> str:
        """Return the digest of what is served of this version, from all that was learnt; "" where that is not known."""
        if self.version not in self.world.models:
            return ""
        rows, dense = self.world.models[self.version]
        values = np.array(list(rows.values()), np.float32).reshape(len(rows), -1)
        return served_digest(row_sum(np.array(list(rows), np.int64), values).text, sha256_of(bits_of(dense)))

    def snapshot(self, *, blob: bytes | None = None, **changes: Any) -> Manifest:
        """Store the whole model and announce it."""
        rows, dense = self.world.models[self.version]
        keys = np.array(list(rows), np.int64)
        values = np.array(list(rows.values()), np.float32).reshape(len(keys), -1)
        end = self.world.log.reader().end_offsets(TOPICS.deltas)[0]
        manifest = Manifest(
            kind="snapshot", model="small", run=self.run, step=self.step, version=self.version, dim=RECIPE.dim,
            positions={"0": [self.step, 0]}, spec=SPEC.digest(), spec_json=msgspec.json.encode(SPEC).decode(),
            recipe_json=msgspec.json.encode(RECIPE).decode(), blob=f"snapshots/small/{self.version}",
            deltas_offset=end, created_ms=1_000, digest="d" * 8, format=FORMAT, served=self.served(),
        )  # fmt: skip
        if changes.get("format") == 1:
            manifest = msgspec.structs.replace(manifest, format=1, served="")
            data = encode_format_1(Weights(keys, values, dense), manifest)
        else:
            manifest = msgspec.structs.replace(manifest, rows=changes.get("rows", "float32"))
            data = encode_weights(Weights(keys, values, dense), manifest)
        manifest = msgspec.structs.replace(manifest, sha256=hashlib.sha256(data).hexdigest())
        manifest = msgspec.structs.replace(manifest, **changes)
        self.world.blobs.put(manifest.blob, data if blob is None else blob)
        self.chain, self.base, self.seq = self.version, self.version, 0
        self.announce(manifest)
        return manifest

    def announce(self, manifest: Manifest) -> None:
        self.world.log.append(TOPICS.model, 0, encode_manifest(manifest), b"small/snapshot", {"kind": "snapshot"})


NEWER = {"format", "rows", "served", "digest_kind", "digest_parts"}
"""Fields of a manifest that format 1 did not have."""


def encode_format_1(weights: Weights, manifest: Manifest) -> bytes:
    """Return weights and manifest as the releases before format 2 wrote them."""
    said = {n: v for n, v in msgspec.to_builtins(manifest).items() if n not in NEWER}
    shapes = {name: list(array.shape) for name, array in weights.dense.items()}
    dense = b"".join(np.ascontiguousarray(a, dtype="<f4").tobytes() for a in weights.dense.values())
    width = weights.values_KV.shape[1]
    metadata = {
        b"manifest": msgspec.json.encode(said),
        b"shapes": msgspec.json.encode(shapes),
        b"dense": dense,
        b"dense_sha256": hashlib.sha256(dense).hexdigest().encode(),
    }
    if manifest.kind == "delta":
        found = hashlib.sha256()
        for part in (metadata[b"manifest"], metadata[b"shapes"], metadata[b"dense_sha256"]):
            found.update(len(part).to_bytes(8, "little") + part)
        found.update(np.ascontiguousarray(weights.keys_K, dtype="<i8").data)
        found.update(np.ascontiguousarray(weights.values_KV, dtype="<f4").data)
        metadata[b"content_sha256"] = found.hexdigest().encode()
    fields = [pa.field("key", pa.int64()), pa.field("values", pa.list_(pa.float32(), width))]
    schema = pa.schema(fields, metadata=metadata)
    values = pa.FixedSizeListArray.from_arrays(pa.array(weights.values_KV.reshape(-1), pa.float32()), width)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([pa.array(weights.keys_K, pa.int64()), values], schema=schema))
    return bytes(sink.getvalue())


class Logged:
    """Keeps the impressions that serving was asked to log."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def log(self, **call: Any) -> None:
        self.calls.append(call)


class World:
    """Log, store, shared model, updater and application of one serving process."""

    def __init__(self, folder: Path) -> None:
        self.log = MemoryLog()
        self.log.admin().ensure_topics(TOPICS.specs(2))
        self.blobs, self.metrics, self.clock = Blobs(), MemoryMetrics(), VirtualClock(5_000)
        self.models: dict[str, tuple[dict[int, np.ndarray], dict[str, np.ndarray]]] = {}
        self.stop = threading.Event()
        self.shared = SharedModel(folder / "model", dim=RECIPE.dim, rows_max=1_000, create=True)
        self.updater = self.new_updater()
        self.features, self.logged = FeatureMemory(), Logged()
        self.features.is_caught_up = True
        self.deps = ServingDependencies(
            project=PROJECT,
            config=ServeConfig(candidates_max=50),
            shared=self.shared,
            features=self.features,
            metrics=self.metrics,
            metrics_text=lambda: b"headrace_serve_swaps_total 1\n",
            clock=self.clock,
            impressions=self.logged,
        )
        self.app = ServingApp(self.deps)

    def new_updater(self) -> Updater:
        return Updater(
            project=PROJECT,
            topics=TOPICS,
            shared=self.shared,
            reader=self.log.reader(),
            blobs=self.blobs,
            metrics=self.metrics,
            clock=self.clock,
            stop=self.stop,
        )

    def follow(self, turns: int = 4) -> None:
        """Let the updater take what has come, until nothing comes."""
        for _ in range(turns):
            self.updater.step(0.0)

    @property
    def version(self) -> str:
        return self.shared.meta().manifest.version

    def served_rows(self) -> np.ndarray:
        return self.shared.read(lambda view: view.lookup(KEYS, seed=RECIPE.seed, scale=0.0))[0]

    def expected_rows(self, version: str) -> np.ndarray:
        rows = self.models[version][0]
        nothing = np.zeros(1 + RECIPE.dim, np.float32)
        return np.array([rows.get(key, nothing) for key in KEYS.tolist()])


class Client:
    """Asks an ASGI application without a socket."""

    def __init__(self, app: Starlette) -> None:
        self.app = app

    def get(self, path: str, **rest: Any) -> httpx.Response:
        return self._ask("GET", path, **rest)

    def post(self, path: str, **rest: Any) -> httpx.Response:
        return self._ask("POST", path, **rest)

    def _ask(self, method: str, path: str, **rest: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://serving") as client:
                return await client.request(method, path, **rest)

        return asyncio.run(ask())
