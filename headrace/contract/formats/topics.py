"""Names, partitions and retention of the topics. Names carry the generation from 2 on: `events.g2`."""

from __future__ import annotations

import msgspec

from headrace.contract.interfaces.log import DAY_MS, TopicSpec

LETTERS_KEPT_MS = 28 * DAY_MS
MARKS_KEPT_MS = 2 * LETTERS_KEPT_MS
"""A mark says what came of a letter: without it a letter that was taken would be offered again. A broker deletes whole
segments, so that a letter may stay for a week longer than it is kept; twice its time leaves room for that."""


class Topics(msgspec.Struct, frozen=True):
    """The topics of one generation."""

    generation: int = 1
    owner: str = ""
    """The model whose `steps` and `deltas` these are: a variant's model has topics of its own, see `of`."""

    def of(self, model: str) -> Topics:
        """Return the topics of a model: those of a variant, which has a dot in its name, are `steps-<model>` and
        `deltas-<model>`."""
        return Topics(self.generation, model if "." in model else "")

    def _name(self, base: str) -> str:
        return base if self.generation == 1 else f"{base}.g{self.generation}"

    def _of_model(self, base: str) -> str:
        return f"{base}-{self.owner}" if self.owner else base

    @property
    def events(self) -> str:
        """All that can change an output, in one order a partition."""
        return self._name("events")

    @property
    def samples(self) -> str:
        """Labelled batches with positions; partition i holds what events-partition i resolved."""
        return self._name("samples")

    @property
    def features(self) -> str:
        """Current counters for serving's memory; compacted."""
        return self._name("features")

    @property
    def steps(self) -> str:
        """The commit of training."""
        return self._name(self._of_model("steps"))

    @property
    def model(self) -> str:
        """Manifests of snapshots, and decisions about which model is served; compacted."""
        return self._name("model")

    @property
    def deltas(self) -> str:
        """Deltas of the model."""
        return self._name(self._of_model("deltas"))

    @property
    def dead_letters(self) -> str:
        """What was refused, why, from where."""
        return self._name("dead-letters")

    @property
    def retries(self) -> str:
        """Which dead letters were offered again, and what came of it."""
        return self._name("retries")

    @property
    def rules(self) -> str:
        """Changes of spec, windows and policies; see `headrace.contract.rules`."""
        return self._name("rules")

    def specs(self, partitions: int) -> tuple[TopicSpec, ...]:
        """Return every topic as it is created."""
        return (
            TopicSpec(self.events, partitions, retention_ms=7 * DAY_MS, append_time=True),
            TopicSpec(self.samples, partitions, retention_ms=7 * DAY_MS),
            TopicSpec(self.features, 1, compacted=True),
            TopicSpec(self.steps, 1),
            TopicSpec(self.model, 1, compacted=True),
            TopicSpec(self.deltas, 1, retention_ms=DAY_MS),
            TopicSpec(self.dead_letters, 1, retention_ms=LETTERS_KEPT_MS),
            TopicSpec(self.retries, 1, retention_ms=MARKS_KEPT_MS, outlasts=self.dead_letters),
            TopicSpec(self.rules, 1),
        )
