"""The trainer's reports: metrics for Prometheus, pages for TensorBoard, a log line for a sudden change.

Called with each step and once a second. It reads the learner and the evaluation and changes neither. Tags begin with a
number, so that TensorBoard, which sorts by name, shows the most important ones first.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from headrace.contract.config import TrainConfig
from headrace.contract.interfaces.clock import Clock
from headrace.contract.interfaces.labels import joined
from headrace.contract.metrics import Metrics, Name
from headrace.contract.project import Project
from headrace.trainer.model.batch import Batch
from headrace.trainer.model.learner import StepReport, TableLearner
from headrace.trainer.source.source import Source
from headrace.trainer.validation.board import Board
from headrace.trainer.validation.drift import RateChange
from headrace.trainer.validation.evaluate import ClosedWindow, Evaluation
from headrace.trainer.validation.figures import Figures
from headrace.trainer.validation.projector import Sampler, write_projector

logger = logging.getLogger("headrace.train")

REPORT_S = 1.0
BOARD_S = 5.0
HISTOGRAMS_S = 60.0
_TOTALS: tuple[Name, ...] = ("auc", "log_loss", "normalized_entropy", "calibration")
_WINDOWS: dict[str, Name] = {
    "auc": "window_auc",
    "log_loss": "window_log_loss",
    "normalized_entropy": "window_normalized_entropy",
    "calibration": "window_calibration",
    "mae": "window_mae",
    "rmse": "window_rmse",
    "concordance": "window_concordance",
}
_SLICES: dict[str, Name] = {
    "auc": "slice_auc",
    "log_loss": "slice_log_loss",
    "normalized_entropy": "slice_normalized_entropy",
    "calibration": "slice_calibration",
    "mae": "slice_mae",
    "rmse": "slice_rmse",
    "concordance": "slice_concordance",
}


def figures_of(evaluation: Evaluation, task: str) -> dict[str, float]:
    """Return what is known of a task's quality, by name, for people: no figure that is not finite.

    `samples` of them are of closed windows; where `provisional` is 1, of what is resolved so far.
    """
    standing = evaluation.standing(task)
    figures = standing.figures
    found = {"samples": float(figures.samples), "provisional": float(standing.is_provisional)}
    found |= {"recent_calibration": standing.recent_calibration}
    if figures.samples:
        found |= {**figures.shown(), **figures.beside()}
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}


class Report:
    """Reports what one trainer does. For its thread alone."""

    def __init__(
        self, project: Project, config: TrainConfig, metrics: Metrics, board: Board | None, clock: Clock
    ) -> None:
        self._project, self._metrics, self._board, self._clock = project, metrics, board, clock
        self._projector_s = config.projector_ms / 1000
        self._sampler = Sampler(project.features)
        self._main = project.recipe.task
        self.samples_learnt = self._told_learnt = 0
        self._told_at = self._boarded_at = self._drawn_at = self._projected_at = float("-inf")
        self._newest: StepReport | None = None
        self._learnt_until_ms = -1
        self._taken_ms = 0
        """The broker's time of the newest record of samples that was learnt."""
        self._unpublished_s = -1.0
        """When the first step was learnt that no delta holds; negative where there is none."""

    def learnt(self, report: StepReport, batch: Batch, rows: pa.Table) -> None:
        """Count a step."""
        metrics = self._metrics
        metrics.add("steps_total")
        metrics.add("samples_learnt_total", report.learnt)
        metrics.add("samples_refused_total", report.refused)
        metrics.add("samples_left_out_total", report.sampled_out)
        self.samples_learnt += report.learnt
        self._newest = report
        self._learnt_until_ms = max(self._learnt_until_ms, int(batch.event_time_ms_B.max(initial=-1)))
        if self._board is not None and self._projector_s:
            self._sampler.note(batch, rows)

    def took(self, newest_ms: int, *, is_redone: bool) -> None:
        """Tell how long ago, by the broker, the samples came that were just learnt; of steps that are redone nothing is
        told."""
        before_ms, self._taken_ms = self._taken_ms, max(self._taken_ms, newest_ms)
        if is_redone:
            return
        if newest_ms > before_ms:
            self._metrics.observe("hop_learnt_seconds", max(0, self._clock.now_ms() - newest_ms) / 1_000)
        if self._unpublished_s < 0:
            self._unpublished_s = self._clock.monotonic()

    def published(self) -> None:
        """Tell how long the first step waited that the delta holds which was just sent."""
        if self._unpublished_s >= 0:
            self._metrics.observe("hop_published_seconds", self._clock.monotonic() - self._unpublished_s)
        self._unpublished_s = -1.0

    def closed(self, windows: Sequence[ClosedWindow], *, step: int) -> None:
        """Report the figures of closed windows by task and slice, and log where a label rate jumped."""
        for window in windows:
            if window.change is not None:
                self._tell_change(window.task, window.change)
            by_slice = {"": window.figures, **window.slices}
            for name, figures in by_slice.items():
                for kind, value in figures.shown().items():
                    if math.isfinite(value):
                        self._metrics.set(_WINDOWS[kind], value, task=window.task, slice=name)
                self._metrics.set("window_samples", figures.samples, task=window.task, slice=name)
            if self._board is not None:
                values = {
                    f"2_windows/{kind}/{joined((window.task, name))}": value
                    for name, figures in by_slice.items()
                    for kind, value in figures.shown().items()
                }
                values |= {
                    **{f"2_windows/{kind}/{window.task}": value for kind, value in window.figures.beside().items()},
                    f"2_windows/label_rate/{window.task}": window.figures.label_rate,
                    f"2_windows/predicted_rate/{window.task}": window.figures.predicted_rate,
                    f"2_windows/samples/{window.task}": window.figures.samples,
                }
                self._board.scalars(values, step=step, now_ms=window.end_ms)

    def tell(self, learner: TableLearner, evaluation: Evaluation, source: Source, lag_records: int) -> None:
        """Report where the trainer stands. The caller asks `is_due` first."""
        now = self._clock.monotonic()
        rate = (
            (self.samples_learnt - self._told_learnt) / (now - self._told_at)
            if math.isfinite(self._told_at)
            else math.nan
        )
        self._told_at, self._told_learnt = now, self.samples_learnt
        metrics = self._metrics
        metrics.set("model_step", learner.step)
        metrics.set("table_rows", learner.rows)
        metrics.set("samples_held", learner.held)
        metrics.set("lag_records", lag_records)
        metrics.set("lag_samples", source.waiting_rows())
        values = {"4_table/rows": float(learner.rows), "5_lag/records": float(lag_records)}
        values["5_lag/samples"] = float(source.waiting_rows())
        values["3_learning/samples_learnt"] = float(self.samples_learnt)
        if self._learnt_until_ms >= 0:
            behind = max(0.0, (self._clock.now_ms() - self._learnt_until_ms) / 1000)
            metrics.set("lag_seconds", behind)
            values["5_lag/seconds"] = behind
        if math.isfinite(rate):
            metrics.set("samples_per_second", rate)
            values["3_learning/samples_per_second"] = rate
        values |= self._tell_totals(evaluation)
        if self._board is not None and now - self._boarded_at >= BOARD_S:
            self._boarded_at = now
            values |= self._norms(learner)
            self._board.scalars(values, step=learner.step, now_ms=self._clock.now_ms())
            self._draw(learner, now)

    def is_due(self) -> bool:
        """Say whether a report is due: ask before what costs a round trip."""
        return self._clock.monotonic() - self._told_at >= REPORT_S

    def _tell_change(self, task: str, change: RateChange) -> None:
        self._metrics.set("label_rate", change.rate, task=task)
        if math.isnan(change.usual):
            return
        self._metrics.set("label_rate_usual", change.usual, task=task)
        self._metrics.set("label_rate_score", change.score, task=task)
        self._metrics.add("label_rate_jumps_total", float(change.is_sudden), task=task)
        if change.is_sudden:
            logger.warning(
                "label rate of %s jumped from %.4f to %.4f (%+.0f %%) over %d samples, %.1f standard deviations; "
                "look for a deploy that changed what is shown or what is logged (`headrace dead-letters list`)",
                *(task, change.usual, change.rate, 100 * (change.rate / change.usual - 1) if change.usual else 100.0),
                *(change.samples, change.score),
            )

    def _tell_totals(self, evaluation: Evaluation) -> dict[str, float]:
        values: dict[str, float] = {}
        metrics = self._metrics
        for task in evaluation.tasks:
            standing = evaluation.standing(task)
            metrics.set("figures_provisional", float(standing.is_provisional), task=task)
            metrics.set("next_figure_seconds", standing.next_in_ms / 1000, task=task)
            if task == self._main:
                metrics.set("main_next_figure_seconds", standing.next_in_ms / 1000)
            if math.isfinite(standing.recent_calibration):
                metrics.set("recent_calibration", standing.recent_calibration, task=task)
                metrics.set("recent_samples", standing.recent_samples, task=task)
            figures = standing.figures
            if not figures.samples:
                continue
            if task == self._main and isinstance(figures, Figures):
                self._tell_main(figures)
            is_alone = len(evaluation.tasks) == 1 and isinstance(figures, Figures)
            by_slice = standing.slices if is_alone else {"": figures, **standing.slices}
            for name, of_slice in by_slice.items():
                for kind, value in of_slice.shown().items():
                    if math.isfinite(value):
                        metrics.set(_SLICES[kind], value, task=task, slice=name)
            group = "1_figures_provisional" if standing.is_provisional else "1_figures"
            values |= {
                f"{group}/{kind}/{task}": value for kind, value in {**figures.shown(), **figures.beside()}.items()
            }
        return values

    def _tell_main(self, figures: Figures) -> None:
        shown = figures.shown()
        for name in _TOTALS:
            if math.isfinite(shown[name]):
                self._metrics.set(name, shown[name])
        self._metrics.set("auc_constant", figures.auc_constant)
        self._metrics.set("auc_item_rate", figures.auc_item_rate)

    def _norms(self, learner: TableLearner) -> dict[str, float]:
        recipe = self._project.recipe
        values = {"3_learning/rate_table": recipe.lr_table, "3_learning/rate_dense": recipe.lr_dense}
        if self._newest is not None:
            values |= {
                "3_learning/norm_gradient_dense": self._newest.gradient_norm,
                "3_learning/norm_gradient_table": self._newest.table_gradient_norm,
            }
            if len(self._newest.touched_K):
                rows_KV = learner.lookup(self._newest.touched_K)
                values["3_learning/norm_weights_table"] = float(
                    np.sqrt(np.square(rows_KV, dtype=np.float64).sum(axis=1).mean())
                )
        squares = sum(float(np.square(w, dtype=np.float64).sum()) for w in learner.dense().values())
        values["3_learning/norm_weights_dense"] = math.sqrt(squares)
        return values

    def _draw(self, learner: TableLearner, now: float) -> None:
        """Draw histograms, and the projector's embeddings, now and then."""
        board, now_ms = self._board, self._clock.now_ms()
        if board is None or self._newest is None:
            return
        if now - self._drawn_at >= HISTOGRAMS_S:
            self._drawn_at = now
            board.histogram("6_histograms/score", self._newest.prediction_B, step=learner.step, now_ms=now_ms)
            rows_KV = learner.lookup(self._newest.touched_K)
            board.histogram("6_histograms/linear_weights", rows_KV[:, 0], step=learner.step, now_ms=now_ms)
            board.histogram("6_histograms/embeddings", rows_KV[:, 1:], step=learner.step, now_ms=now_ms)
            for name, weight in learner.dense().items():
                board.histogram(f"6_histograms/dense/{name}", weight, step=learner.step, now_ms=now_ms)
        if self._projector_s and now - self._projected_at >= self._projector_s:
            self._projected_at = now
            chosen = self._sampler.chosen()
            board.attempt(lambda: write_projector(board.folder, chosen, learner.lookup), now_ms=now_ms)
