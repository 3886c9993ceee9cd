"""The declared ranking that answers where no model does: `serve.fallback`. Pure."""

from __future__ import annotations

from headrace.contract.config import ServeConfig


def fallback_scores(config: ServeConfig, count: int) -> list[float] | None:
    """Return the scores of `count` candidates where no model says any; None where such a request is refused.

    >>> fallback_scores(ServeConfig(fallback="order", fallback_score=0.8), 4)
    [0.8, 0.6, 0.4, 0.2]
    >>> fallback_scores(ServeConfig(fallback="constant"), 2), fallback_scores(ServeConfig(), 2)
    ([0.5, 0.5], None)
    """
    if config.fallback == "last_good":
        return None
    if config.fallback == "constant":
        return [config.fallback_score] * count
    return [round(config.fallback_score * (count - place) / count, 12) for place in range(count)]
