"""What the routes of serving need of the process around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from headrace.contract.config import ServeConfig
from headrace.contract.formats.served_token import TokenKey, token_key
from headrace.contract.interfaces.clock import Clock
from headrace.contract.metrics import Metrics
from headrace.contract.privacy import Privacy
from headrace.contract.project import Project
from headrace.serving.features import FeatureMemory, State
from headrace.serving.model.shared_region import SharedModel


class Impressions(Protocol):
    """What `serving.impression_log.ImpressionLog` does."""

    def log(
        self,
        *,
        request_id: str,
        version: str,
        context: dict[str, Any],
        candidates: Sequence[dict[str, Any]],
        served: Sequence[str | dict[str, Any]],
        event_time_ms: int,
    ) -> None:
        """Log one impression for each candidate; `served` has its token, or open columns."""


@dataclass(frozen=True, kw_only=True)
class ServingDependencies:
    """What the application needs of the process around it."""

    project: Project
    config: ServeConfig
    shared: SharedModel
    features: FeatureMemory
    metrics: Metrics
    metrics_text: Callable[[], bytes]
    clock: Clock
    impressions: Impressions
    privacy: Privacy | None = None

    @property
    def token_key(self) -> TokenKey:
        """What seals the tokens of what was served."""
        return token_key("") if self.privacy is None else self.privacy.token_key

    def counters(self) -> State:
        """Return how far the counters are."""
        return self.features.state(self.clock.monotonic(), self.config.counters_behind_ms / 1_000)
