"""Goal: each hop of a click's way is timed by the stage that ends it. Method: the whole loop under virtual time, where
a hop takes what the clock was moved by between the two stages."""

from __future__ import annotations

from pathlib import Path

from history_world import LONGEST_MS, MINUTE_MS, PROJECT, TURN_MS, prompt, sent_live, traffic
from loop_world import opened


def test_every_hop_is_timed(tmp_path: Path) -> None:
    with opened(PROJECT, prompt(TURN_MS), tmp_path) as loop:
        sent_live(loop, traffic(21, 20))
        loop.settle(LONGEST_MS, 5 * MINUTE_MS)
        gateway, stream = loop.gateway._metrics, loop.stages[0].deps.metrics
        train, serve = loop.trainer.deps.metrics, loop.metrics
        hops = {
            "hop_shipped_seconds": gateway,
            "hop_logged_seconds": gateway,
            "hop_joined_seconds": stream,
            "hop_learnt_seconds": train,
            "hop_published_seconds": train,
            "hop_served_seconds": serve,
        }
        found = {name: metrics.observations[name] for name, metrics in hops.items()}
        assert all(found.values()), found
        # A turn moves the clock before the stages run; no hop waits for more than two.
        assert all(0 <= each <= 2 * TURN_MS / 1_000 for times in found.values() for each in times), found
        # One observation a record or a step, not one an event.
        assert len(found["hop_learnt_seconds"]) <= loop.trainer.learner.step
