"""Goal: what `headrace init` writes runs on the real stack as it is, and comes to served scores of a trained model that
know something. Method: `headrace up` on the new folder and `headrace traffic`, as a user does; hours are told as
seconds, since nobody waits for a chargeback here."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import deltalake
import pytest
from harness.stack import Stack

from headrace.cli.tools.init import make_project

pytestmark = [pytest.mark.real, pytest.mark.long, pytest.mark.timeout(900)]

SECONDS, RATE = 150, 40
FASTER = {
    "ads": (
        "SECOND_MS, MINUTE_MS, HOUR_MS = 1_000, 60_000, 3_600_000",
        "SECOND_MS, MINUTE_MS, HOUR_MS = 100, 500, 30_000",
    ),
    "fraud": ("HOUR_MS = 3_600_000", "HOUR_MS = 6_000"),
}
TASKS = {"store": {"click"}, "ads": {"click", "conversion"}, "fraud": {"chargeback"}}


@pytest.mark.parametrize("like", ["store", "ads", "fraud"])
def test_a_new_project_runs_on_the_real_stack(tmp_path: Path, like: str) -> None:
    folder = tmp_path / "mine"
    make_project(folder, like)
    if like in FASTER:
        text = (folder / "project.py").read_text()
        assert FASTER[like][0] in text
        (folder / "project.py").write_text(text.replace(*FASTER[like]))
    base, key = 24_100 + os.getpid() % 300 * 30, {"HEADRACE_PRIVACY_KEY": "a secret of 16 bytes and more"}
    with Stack.open(own=True, shop_rate=0, port_base=base, project=folder, secrets=key) as stack:
        assert "shop" not in stack.pids()
        said = stack.headrace(
            *("traffic", "--json", "--rate", str(RATE), "--seconds", str(SECONDS)), timeout_s=SECONDS + 60
        )
        told: dict[str, Any] = json.loads(said.splitlines()[-1])
        assert set(told["tasks"]) == TASKS[like]
        for name, quality in told["tasks"].items():
            gain = (quality["auc"] - 0.5) / (quality["auc_oracle"] - 0.5)
            assert quality["impressions"] > 1_000 and gain > 0.4, (name, quality)
        ledger = stack.json("ledger")
        assert ledger["closes"] and (ledger["lost"], ledger["twice"], ledger["dead_lettered"]) == (0, 0, 0), ledger
        assert ledger["impressions"] == told["shown"]
        assert stack.json("replay", timeout_s=180)["equal"] is True
        rows = deltalake.DeltaTable(stack.lake_uri()).to_pyarrow_table()
        assert rows.num_rows > 1_000
        # Those who log the answer name its version; a service with a log of its own does not.
        assert (rows["version"].null_count < rows.num_rows) == (like != "fraud")
        if like == "ads":
            assert all(text.startswith("hmac:") for text in rows["cookie"].to_pylist())
