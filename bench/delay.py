"""What late labels cost, and how much of it each label policy wins back, on KuaiRand.

Method: test-then-train at the data's own times. Before the rows of a grid step are scored, the model learns whatever
samples were emitted by then, in the order of emission, and nothing else; a step is 2 minutes of `own`, 5 of `hours`,
so nothing is scored with labels that came in the same step. Features are ids and the video's length,
without counters, so that freshness comes through labels alone. The clicks are real; when they come is SYNTHETIC, since
the log does not tell, in two ways:

  own    min(play time, 7 s) after the impression, as the data's README proposes; window 10 s
  hours  log-normal, median 30 minutes, sigma 1.5 (82 % within 2 hours), seeded; window 12 hours

  late      every label 24 hours after its impression: what others are held against
  window    policy `window`: a positive when the click comes, a negative at the window's end
  short     the same with a window of 2 hours and `correct_ms` for the rest of the 12 (`hours` alone)
  held      no policy of Headrace: every label 6 hours after its impression, clicks that come later correct (`hours`
            alone). Of 1, 2, 4, 6, 9 and 12 hours 6 was best, chosen by looking at the outcome: what waiting can reach
  known_1h, known_2h  no policy at all: each label, right, after so long, though 32 % and 18 % of the clicks come later
            (`hours` alone): what nobody can have, and what it would win
  eager     policy `eager`: a negative at once, a positive when the click comes, learnt as they are
  weighted  the same with the fake-negative weighted loss (Ktena et al. 2019)
  calibrated  the same with fake-negative calibration (the same paper)
  oracle    knows each label at once

A gain is (late - policy) in log loss, or (policy - late) in AUC, by the oracle's. A click after its window is never
learnt, but counts where a score is judged. The first 30 hours are learnt and not judged.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import torch

sys.path.insert(0, str(Path(__file__).parent))

from harness.figures import Figure, show

from headrace.contract.project import Recipe
from headrace.contract.spec import Bucket, Categorical, FeatureSpec, Numeric
from headrace.examples.shop.traffic import SPEED, find_data, kuairand
from headrace.stream.features.featurize import featurize
from headrace.trainer.model.batch import Batch
from headrace.trainer.model.learner import make_learner
from headrace.trainer.validation.figures import Figures, Scored, Tally

CHECKOUT = Path(__file__).resolve().parents[1]
IDS = ("user_id", "video_id", "author_id", "tab", "tag", "upload_type", "user_active_degree")
FIELDS = {
    **dict.fromkeys(("user_id", "video_id", "author_id", "tab", "duration_ms", "time_ms"), "int64"),
    **dict.fromkeys(("tag", "upload_type", "user_active_degree"), "string"),
}
FEATURES = FeatureSpec(
    features=(
        *(Categorical(field=name) for name in IDS),
        Bucket(field="duration_ms", edges=(5e3, 7e3, 1e4, 1.5e4, 2e4, 3e4, 4.5e4, 6e4, 9e4, 1.2e5, 1.8e5, 3e5)),
        Numeric(field="duration_ms", scale=0.1),
    )
)
RECIPE = Recipe(dim=8, hidden=(64, 32), lr_table=0.02, lr_dense=0.001)
POLICIES = ("late", "window", "short", "held", "known_1h", "known_2h", "eager", "weighted", "calibrated", "oracle")
LOSSES = {"weighted": "fake_negative_weighted", "calibrated": "fake_negative_calibrated"}
HOUR_MS = 3_600_000
HELD_MS, JUDGED_AFTER_MS = 6 * HOUR_MS, 30 * HOUR_MS
KNOWN_AFTER_MS = {"oracle": 0, "known_1h": HOUR_MS, "known_2h": 2 * HOUR_MS, "late": 24 * HOUR_MS}
OF_HOURS = ("short", "held", "known_1h", "known_2h")
NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class World:
    """Impressions in time order, and when each one's click comes; `NEVER` without one."""

    slots_NF: np.ndarray
    numeric_ND: np.ndarray
    clicked_N: np.ndarray
    time_N: np.ndarray
    click_N: np.ndarray
    window_ms: int
    short_ms: int
    grid_ms: int

    @property
    def policies(self) -> tuple[str, ...]:
        """Return what can be compared here."""
        return tuple(p for p in POLICIES if p not in OF_HOURS or self.short_ms < self.window_ms)

    def emitted(self, policy: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the samples in order of emission: when, of which impression, with which label."""
        every, in_time_N = np.arange(len(self.time_N)), self.click_N <= self.time_N + self.window_ms
        if policy in KNOWN_AFTER_MS:
            parts = [(self.time_N + KNOWN_AFTER_MS[policy], every, self.clicked_N)]
        else:
            wait_ms = {"window": self.window_ms, "short": self.short_ms, "held": HELD_MS}.get(policy, 0)
            end_N = self.time_N + wait_ms
            soon_N = self.click_N <= end_N if wait_ms else np.zeros(len(every), bool)
            corrected = every[in_time_N & ~soon_N]
            parts = [
                (np.where(soon_N & (policy != "held"), self.click_N, end_N), every, soon_N),
                (self.click_N[corrected], corrected, np.ones(len(corrected), bool)),
            ]
        at, which, label = (np.concatenate([part[i] for part in parts]) for i in range(3))
        order = np.argsort(at, kind="stable")
        return at[order], which[order], label[order]

    def batch(self, which: np.ndarray, label: np.ndarray) -> Batch:
        """Return impressions with these labels."""
        label_B, weight_B = label.astype(np.float32), np.ones(len(which), np.float32)
        return Batch(self.slots_NF[which], self.numeric_ND[which], label_B, weight_B, self.time_N[which])


def worlds(folder: Path | None, rows_max: int | None, seed: int) -> dict[str, World]:
    """Return the two worlds."""
    if folder is None:
        raise SystemExit("KuaiRand was not found: give its folder as --data DIR.")
    traffic = kuairand(folder, FIELDS, rows_max)
    rows = traffic.features.combine_chunks().to_batches()[0]
    slots_NF, numeric_ND = featurize(rows, FEATURES)
    clicked_N, time_N = traffic.clicked_N, rows["time_ms"].to_numpy()
    normal_N = np.random.default_rng(seed).standard_normal(len(traffic))
    hours_N = (0.5 * HOUR_MS * np.exp(1.5 * normal_N)).astype(np.int64)
    out = {}
    for name, delay_N, window_ms, short_ms, grid_ms in (
        ("own", traffic.delay_ms_N * SPEED, 10_000, 10_000, 120_000),
        ("hours", hours_N, 12 * HOUR_MS, 2 * HOUR_MS, 300_000),
    ):
        click_N = np.where(clicked_N, time_N + delay_N, NEVER)
        out[name] = World(slots_NF, numeric_ND, clicked_N, time_N, click_N, window_ms, short_ms, grid_ms)
    return out


def run(world: World, policy: str) -> tuple[Figures, float]:
    """Learn under one policy; return the figures of the judged rows and the CPU seconds."""
    began = time.process_time()
    learner = make_learner(msgspec.structs.replace(RECIPE, delayed=LOSSES.get(policy, "none")), FEATURES)
    at, which, label = world.emitted(policy)
    tally, taken = Tally(), 0
    first, last = int(world.time_N[0]), int(world.time_N[-1])
    judged_from = first + JUDGED_AFTER_MS
    for begin in range(first, last + 1, world.grid_ms):
        known = int(np.searchsorted(at, begin, side="left"))
        while taken < known:
            upto = min(known, taken + RECIPE.batch_rows)
            learner.learn(world.batch(which[taken:upto], label[taken:upto]))
            taken = upto
        low, high = np.searchsorted(world.time_N, [begin, begin + world.grid_ms], side="left")
        if high == low:
            continue
        score_B = learner.predict(world.batch(np.arange(low, high), world.clicked_N[low:high]))
        if begin >= judged_from:
            nothing = np.zeros(high - low, bool)
            tally.add(Scored(score_B, score_B, world.clicked_N[low:high], nothing, np.zeros((high - low, 0), np.int64)))
    return tally.figures(), time.process_time() - began


def table(name: str, world: World, found: dict[str, Figures]) -> list[Figure]:
    """Print one world's rows and return its figures."""
    late, oracle = found["late"], found["oracle"]
    in_time = float((world.click_N <= world.time_N + world.window_ms).sum() / max(world.clicked_N.sum(), 1))
    print(f"\n{name}: {oracle.samples:,} rows judged, {in_time:.1%} of the clicks come within the window")
    print(f"{'policy':<12}{'log loss':>10}{'NE':>9}{'AUC':>9}{'calibration':>13}{'gain log loss':>15}{'gain AUC':>10}")
    figures = []
    for policy in world.policies:
        one = found[policy]
        by_loss = float((late.log_loss - one.log_loss) / (late.log_loss - oracle.log_loss))
        by_auc = float((one.auc - late.auc) / (oracle.auc - late.auc))
        print(
            f"{policy:<12}{one.log_loss:>10.4f}{one.normalized_entropy:>9.4f}{one.auc:>9.4f}{one.calibration:>13.3f}"
            f"{by_loss:>14.0%} {by_auc:>9.0%}"
        )
        figures.append(Figure(f"{name}_{policy}_log_loss", round(float(one.log_loss), 5), "nats"))
        figures.append(Figure(f"{name}_{policy}_auc", round(one.auc, 5), "AUC"))
        if policy not in ("late", "oracle"):
            figures.append(Figure(f"{name}_{policy}_gain_log_loss", round(100 * by_loss, 1), "% of the oracle's"))
            figures.append(Figure(f"{name}_{policy}_gain_auc", round(100 * by_auc, 1), "% of the oracle's"))
    return figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first 40,000 rows, all in steps of 5 minutes")
    parser.add_argument("--data", metavar="DIR", help="KuaiRand's folder; ../shared/data/kuairand by default")
    parser.add_argument("--world", choices=("own", "hours"), help="one of the two; both by default")
    parser.add_argument("--seed", type=int, default=1, help="of the synthetic delays")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    folder = find_data(CHECKOUT / "examples" / "shop", args.data)
    figures = []
    for name, world in worlds(folder, 40_000 if args.quick else None, args.seed).items():
        if args.world not in (None, name):
            continue
        if args.quick:
            world = replace(world, grid_ms=300_000)
        found = {}
        for policy in world.policies:
            found[policy], seconds = run(world, policy)
            print(f"{name} {policy}: {seconds:.0f} s", file=sys.stderr, flush=True)
        figures += table(name, world, found)
    print()
    show(figures)


if __name__ == "__main__":
    main()
