"""Publication: bytes of a delta over bytes of a snapshot, and what a delta costs the trainer and a server.

Method: a deepfm of 26 slots and 13 numbers learns clicks of a hidden rule, with ids of a Zipf law, in steps of
`--samples`, after it was filled to `--rows` rows. After each step its publisher sends a delta through a log in memory,
and an updater of serving takes it into a region of shared memory; every 50 steps a snapshot is published. Each batch is
scored by what is served before it is learnt. Rows travel as float32 and as float16; the model is the same, since what
travels does not change what is learnt. Dense weights as they travel are compared with sending all of them. The peer is
the format before (release 0.1): float32 rows and all dense weights in each delta.

CPU times are of the thread; `digest` is the share of what a server does that the digest of what is served takes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from harness.figures import Figure, show

from headrace.backends.blobs_file import FileBlobs
from headrace.backends.clock import VirtualClock
from headrace.backends.log.memory import MemoryLog, MemoryReader
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.formats.positions import Positions
from headrace.contract.formats.snapshot import RowsAs, decode_update
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.log import Record
from headrace.contract.project import FeedbackType, ImpressionType, Project, Task
from headrace.contract.spec import Categorical, FeatureSpec, Numeric
from headrace.serving.model.served_sum import dense_bits, sum_after, sum_held
from headrace.serving.model.shared_region import SharedModel
from headrace.serving.model.updater import Updater
from headrace.trainer.commit.publish import Publisher
from headrace.trainer.model.batch import Batch
from headrace.trainer.model.digest import SHA256, SUM, digest
from headrace.trainer.model.learner import TableLearner, make_learner
from headrace.trainer.recipes import deepfm

SLOTS, NUMBERS, TOPICS = 26, 13, Topics()
FIELDS = [f"c{i}" for i in range(SLOTS)]
PROJECT = Project(
    name="bench",
    impression=ImpressionType(
        tag="b.i",
        key="c0",
        fields=dict.fromkeys(FIELDS, "int64") | {f"n{i}": "float64" for i in range(NUMBERS)},
    ),
    feedback=(FeedbackType(name="click", tag="b.c", fields={}),),
    tasks=(Task(name="click", feedback="click", window_ms=1_000),),
    features=FeatureSpec(
        features=(*(Categorical(field=f) for f in FIELDS), *(Numeric(field=f"n{i}") for i in range(NUMBERS)))
    ),
    recipe=deepfm(dim=8, hidden=(128, 32)),
).checked()
RECIPE = PROJECT.recipe
SNAPSHOT_EVERY = 50
IDS = 10_000_000


class Rule:
    """Clicks that follow from ids and numbers, by a rule that the model does not see."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.rule = np.random.default_rng(99).normal(size=NUMBERS)

    def batch(self, rows: int) -> Batch:
        """Return samples whose ids are of a Zipf law."""
        ids_BF = np.minimum(self.rng.zipf(1.2, (rows, SLOTS)), IDS)
        keys_BF = (ids_BF * SLOTS + np.arange(SLOTS) + 1).astype(np.int64) * 0x9E3779B1
        numeric_BD = self.rng.normal(size=(rows, NUMBERS)).astype(np.float32)
        taste_BF = np.sin(keys_BF % 1_000_003) * (np.arange(SLOTS) < 8)
        logit_B = 0.7 * taste_BF.sum(axis=1) + 0.3 * numeric_BD @ self.rule - 1.0
        label_B = (self.rng.random(rows) < 1 / (1 + np.exp(-logit_B))).astype(np.float32)
        return Batch(keys_BF, numeric_BD, label_B, np.ones(rows, np.float32), np.full(rows, 10_000, np.int64))


@dataclass
class Side:
    """One way in which rows travel: its publisher, its server, and what was measured."""

    rows: RowsAs
    learner: TableLearner
    folder: Path
    rows_max: int
    deltas: list[int] = field(default_factory=list)
    parts: list[tuple[int, int]] = field(default_factory=list)
    trainer_ms: list[float] = field(default_factory=list)
    server_ms: list[float] = field(default_factory=list)
    digest_ms: list[float] = field(default_factory=list)
    said: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.log, self.metrics, clock = MemoryLog(lambda: 0), MemoryMetrics(), VirtualClock(1_000)
        self.log.admin().ensure_topics(TOPICS.specs(1))
        self.blobs = FileBlobs(self.folder / "blobs")
        reader = self.log.reader()
        self.publisher = Publisher(
            *(PROJECT, "r", TOPICS, self.log.producer(), self.blobs, MemoryMetrics(), clock),
            lambda: reader.end_offsets(TOPICS.deltas)[0],
            background=False,
            rows=self.rows,
        )
        self.shared = SharedModel(self.folder / "region", dim=RECIPE.row_dim, rows_max=self.rows_max, create=True)
        self.updater = Updater(
            project=PROJECT,
            topics=TOPICS,
            shared=self.shared,
            reader=_AtOnce(self.log),
            blobs=self.blobs,
            metrics=self.metrics,
            clock=clock,
            stop=threading.Event(),
        )

    def snapshot(self) -> int:
        """Publish a snapshot, let the server take it, and return its bytes."""
        assert self.publisher.snapshot(self.learner, Positions(1))
        self.updater.step(0.0)
        return max(path.stat().st_size for path in (self.folder / "blobs" / "snapshots").rglob("*-*"))

    def score(self, batch: Batch) -> None:
        """Keep what is served of a batch."""

        def lookup(view: object) -> np.ndarray:
            found: np.ndarray = self.learner.score(
                batch,
                lookup=lambda keys: view.lookup(keys, seed=RECIPE.seed, scale=RECIPE.row_scale),  # type: ignore[attr-defined]
                dense=view.dense(),  # type: ignore[attr-defined]
            )
            return found

        self.said.append(self.shared.read(lookup)[0])

    def delta(self, touched_K: np.ndarray) -> None:
        """Publish a delta and let the server take it; keep bytes and times."""
        self.publisher.note(touched_K)
        begin = time.thread_time()
        assert self.publisher.delta(self.learner, Positions(1))
        self.trainer_ms.append(1e3 * (time.thread_time() - begin))
        data = self.log.partitions(TOPICS.deltas)[0][-1].value or b""
        update, _ = decode_update(data)
        self.deltas.append(len(data))
        self.parts.append((len(update.dense.data), len(update.keys_K)))
        held = self.shared.held()
        weights = update.weights(dense_bits(held, update.dense.shapes))
        begin = time.thread_time()
        sum_after(self.updater._meta.held, held, weights)  # type: ignore[union-attr,arg-type]
        self.digest_ms.append(1e3 * (time.thread_time() - begin))
        begin = time.thread_time()
        self.updater.step(0.0)
        self.server_ms.append(1e3 * (time.thread_time() - begin))


class _AtOnce(MemoryReader):
    """Never waits."""

    def poll(self, records_max: int, timeout_s: float) -> Sequence[Record]:
        return super().poll(records_max, 0.0)


def auc(label_B: np.ndarray, score_B: np.ndarray) -> float:
    """Return the area under the ROC curve."""
    order_B = np.argsort(score_B, kind="stable")
    sorted_B, ranks_B = score_B[order_B], np.arange(1, len(score_B) + 1, dtype=np.float64)
    _, first, counts = np.unique(sorted_B, return_index=True, return_counts=True)
    ranks_B = np.repeat(first + (counts + 1) / 2, counts)
    positive_B = label_B[order_B] == 1
    n = positive_B.sum()
    return float((ranks_B[positive_B].sum() - n * (n + 1) / 2) / (n * (len(label_B) - n)))


def run(rows: int, samples: int, updates: int, warm: int) -> list[Figure]:
    """Measure one size of table."""
    rule, learner = Rule(1), make_learner(RECIPE, PROJECT.features)
    for _ in range(warm):
        learner.learn(rule.batch(2_048))
    fill = np.random.default_rng(5).integers(2**40, 2**62, max(0, rows - learner.rows))
    learner.table.tables[0].rows_for(fill.reshape(-1, 1))  # type: ignore[union-attr]
    table = learner.table.tables[0]  # type: ignore[union-attr]
    table.values_RV[table.index.find(fill), 0] += np.float32(0.01)
    labels: list[np.ndarray] = []
    with tempfile.TemporaryDirectory() as folder:
        sides = []
        for how in ("float32", "float16"):
            (Path(folder) / how).mkdir()
            sides.append(Side(how, learner, Path(folder) / how, rows_max=2 * rows + 500_000))  # type: ignore[arg-type]
        sizes = [side.snapshot() for side in sides]
        for number in range(updates):
            batch = rule.batch(samples)
            labels.append(batch.label_B)
            for side in sides:
                side.score(batch)
            touched_K = learner.learn(batch).touched_K
            for side in sides:
                side.delta(touched_K)
            if number % SNAPSHOT_EVERY == SNAPSHOT_EVERY - 1:
                sizes = [side.snapshot() for side in sides]
        wrong = sum(side.metrics.counters.get(("replica_digest_wrong_total", ""), 0) for side in sides)
        assert not wrong and all(side.updater._meta.manifest.step == learner.step for side in sides)  # type: ignore[union-attr]
        label_B = np.concatenate(labels)
        by = {side.rows: auc(label_B, np.concatenate(side.said)) for side in sides}
        begin = time.thread_time()
        sum_held(sides[0].shared.held(), width=1 + RECIPE.row_dim)
        whole_ms = 1e3 * (time.thread_time() - begin)
        served_mb = sides[0].publisher._served.nbytes / 2**20
    dense = 4 * sum(a.size for a in learner.dense().values())
    name = f"{rows // 1_000}k_rows"
    found = []
    for side, size in zip(sides, sizes, strict=True):
        before = median(44 * keys + dense for _, keys in side.parts)
        delta, sent = median(side.deltas), median(data for data, _ in side.parts)
        at = f"{name}.{side.rows}"
        found += [
            Figure(f"{at}.delta", delta, "bytes", "format 1", before, delta / before),
            Figure(f"{at}.delta_over_snapshot", delta / size, "ratio", "aim", 1 / 50, 50 * delta / size),
            Figure(f"{at}.dense_sent", sent, "bytes", "all of it", dense, sent / dense),
            Figure(f"{at}.trainer", median(side.trainer_ms), "ms CPU"),
            Figure(f"{at}.server", median(side.server_ms), "ms CPU"),
            Figure(f"{at}.server_digest", median(side.digest_ms), "ms CPU"),
        ]
    found += [
        Figure(f"{name}.snapshot", sizes[1], "bytes float16", "float32", sizes[0], sizes[1] / sizes[0]),
        Figure(f"{name}.auc_float32", by["float32"], "AUC"),
        Figure(f"{name}.auc_float16", by["float16"], "AUC", "float32", by["float32"], by["float16"] / by["float32"]),
        Figure(f"{name}.auc_lost", 100 * (by["float32"] - by["float16"]), "points"),
        Figure(f"{name}.region_summed", whole_ms, "ms CPU"),
        Figure(f"{name}.trainer_memory", served_mb, "MiB"),
    ]
    return [*found, *_digests(learner, name)]


def _digests(learner: TableLearner, name: str) -> list[Figure]:
    state, took = learner.state(), {}
    for kind in (SUM, SHA256):
        digest(state, kind)
        begin = time.thread_time()
        digest(state, kind)
        took[kind] = 1e3 * (time.thread_time() - begin)
    ours, before = took[SUM], took[SHA256]
    return [Figure(f"{name}.model_digest", ours, "ms CPU", "sort and SHA-256", before, ours / before)]


def main() -> None:
    """Run all sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="200,000 rows, 100 updates")
    parser.add_argument("--samples", type=int, default=64, help="samples of an update; 64: 320 a second")
    args = parser.parse_args()
    figures: list[Figure] = []
    for rows in (200_000,) if args.quick else (200_000, 1_000_000):
        figures += run(rows, args.samples, 100 if args.quick else 400, 20 if args.quick else 60)
    show(figures)


if __name__ == "__main__":
    main()
