"""Goal: on a real Kafka and HDFS, `headrace rollback` brings trainer and serving back together, within the trainer's
start; nothing is lost or learnt twice, and the new run is replayed bit for bit.

Method: the shop's traffic on a stack of its own; back to a checkpoint while it flows, then back once more and past what
came since. The ledger joins the log, and replay learns the new run again.
"""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from harness.stack import Stack
from local_world import free_base

pytestmark = [pytest.mark.real, pytest.mark.long, pytest.mark.timeout(900)]

FLOW_S, BACK_S, HEAL_S = 30.0, 90.0, 300.0


def served(stack: Stack) -> str:
    return str(json.loads(stack.get("serving", "/v1/model"))["version"])


def places(stack: Stack) -> list[str]:
    """Return the versions that the run has been at, the newest first."""
    told = stack.headrace("rollback", "--list").splitlines()
    return [line[2:].partition(":")[0] for line in told[1:] if line.startswith("* ")]


def went_back(stack: Stack, *words: str) -> tuple[str, float]:
    """Go back, and return the run that is served then, and after how many seconds."""
    before, began = served(stack).partition("-")[0], time.monotonic()
    told = stack.headrace("rollback", *words, "--yes")
    run = next(line for line in told.splitlines() if "goes on from" in line).split()[1]
    while time.monotonic() - began < BACK_S:
        if served(stack).startswith(f"{run}-"):
            return run, time.monotonic() - began
        time.sleep(0.1)
    raise AssertionError(f"{served(stack)} is served, of run {before}, and {run} was asked for: {told}")


def closed(stack: Stack) -> dict[str, Any]:
    """Return the ledger once nothing is on its way."""
    found: dict[str, Any] = {}
    deadline = time.monotonic() + HEAL_S
    while time.monotonic() < deadline:
        told = stack.headrace("ledger", "--json", check=False, timeout_s=HEAL_S)
        found = json.loads(told) if told.lstrip().startswith("{") else {}
        if found.get("closes") and not found["in_flight"]:
            break
        time.sleep(5)
    return found


def test_trainer_and_serving_go_back_together() -> None:
    with Stack.open(own=True, shop_rate=200, port_base=free_base()) as stack:
        time.sleep(FLOW_S)
        first = served(stack).partition("-")[0]
        place = places(stack)[1]
        assert place.startswith(first)
        run, took_s = went_back(stack, "--to", place, "--reason", "a test")
        print(f"back within {took_s:.1f} s")
        assert "somebody asked for another run" in stack.headrace("logs", "train", "--no-follow", "-n", "400")
        time.sleep(FLOW_S / 3)
        again, took_s = went_back(stack, "--to", places(stack)[0], "--skip-until", "now")
        print(f"back within {took_s:.1f} s")
        assert "nothing is missing" in stack.headrace("train", "repair", "--dry-run")
        stack.headrace("stop", "shop")
        found = closed(stack)
        assert found["closes"], found
        found = stack.json("ledger", "--full", timeout_s=HEAL_S)
        assert found["closes"] and (found["lost"], found["twice"]) == (0, 0), found
        assert set(found["models"]) == {first, run, again} and found["skipped"] > 0
        replayed = stack.json("replay", timeout_s=300)
        assert replayed["equal"] is True and replayed["run"] == again
