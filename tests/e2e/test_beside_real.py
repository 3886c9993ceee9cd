"""Goal: on the real stack a variant learns beside, is promoted under traffic without a failed request, is moved to the
project's own recipe, and both models are accounted for and replay. Method: the verbs, as a user gives them, while a
client asks all the time."""

from __future__ import annotations

import http.client
import json
import os
import threading
import time
from pathlib import Path

import pytest
from harness.stack import Stack

from headrace.cli.tools.init import make_project

pytestmark = [pytest.mark.real, pytest.mark.long, pytest.mark.timeout(900)]

OWN = "recipe=deepfm(dim=8, hidden=(64, 32)),"
DEEP = "deepfm(dim=12, hidden=(32,))"
QUESTION = {"context": {"user_id": 7}, "candidates": [{"item_id": item, "price": 1.0} for item in range(10)]}


class Asking:
    """Asks on a kept connection until it is told to stop, and once more on a new one, as docs/serving.md says."""

    def __init__(self, port: int) -> None:
        self.port, self.stop, self.failed, self.versions = port, threading.Event(), list[str](), list[str]()
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        connection: http.client.HTTPConnection | None = None
        while not self.stop.wait(0.01):
            for attempt in (1, 2):
                try:
                    connection = connection or http.client.HTTPConnection("127.0.0.1", self.port, timeout=15)
                    body = json.dumps({**QUESTION, "request_id": f"q-{len(self.versions)}"})
                    connection.request("POST", "/v1/rank", body, {"content-type": "application/json"})
                    answer = connection.getresponse()
                    said = answer.read()
                    if answer.status != 200:
                        self.failed.append(f"{answer.status} {said[:200]!r}")
                    else:
                        self.versions.append(json.loads(said)["version"])
                    if answer.getheader("connection") == "close":
                        connection = self._closed(connection)
                    break
                except (OSError, http.client.HTTPException) as error:
                    connection = self._closed(connection)
                    if attempt == 2:
                        self.failed.append(repr(error))

        self._closed(connection)

    @staticmethod
    def _closed(connection: http.client.HTTPConnection | None) -> None:
        if connection is not None:
            connection.close()

    def end(self) -> None:
        self.stop.set()
        self._thread.join(20)


def test_a_variant_learns_beside_is_promoted_and_moved(tmp_path: Path) -> None:
    folder = tmp_path / "store"  # `init` names the project after its folder.
    make_project(folder, "store")
    text = (folder / "project.py").read_text()
    assert OWN in text
    base = 24_100 + os.getpid() % 300 * 30
    with Stack.open(own=True, shop_rate=0, port_base=base, project=folder) as stack:
        folder = Path(stack.env["HEADRACE_PROJECT"])
        stack.headrace("traffic", "--rate", "40", "--seconds", "25", timeout_s=90)
        (folder / "project.py").write_text(text.replace(OWN, f'{OWN}\n    variants={{"deep": {DEEP}}},'))
        stack.headrace("start", "train@deep", timeout_s=300)
        assert "train@deep" in stack.pids()
        asking = Asking(stack.port("serving"))
        playing = threading.Thread(
            target=lambda: stack.headrace("traffic", "--rate", "40", "--seconds", "60", timeout_s=120), daemon=True
        )
        playing.start()
        deadline = time.monotonic() + 120
        while not stack.json("model", "show", "deep")["models"]["store.deep"]["version"]:
            assert time.monotonic() < deadline, "the variant published nothing"
            time.sleep(1.0)
        # Its rows are wider than all before: serving makes room while it answers, and no request fails.
        for variant, name in (("deep", "store.deep"), ("--main", "store"), ("deep", "store.deep")):
            told = stack.json("model", "promote", variant, "--yes")
            assert told["served"]["model"] == name, told
            time.sleep(2.0)
        playing.join(120)
        asking.end()
        assert not asking.failed, asking.failed[:3]
        assert {"-deep-" in version for version in asking.versions} == {True, False}
        ledger = stack.json("ledger")
        assert ledger["closes"] and (ledger["lost"], ledger["twice"]) == (0, 0), ledger
        assert {run["model"] for run in ledger["models"].values()} == {"store", "store.deep"}
        for words in ((), ("--variant", "deep")):
            assert stack.json("replay", *words, timeout_s=300)["equal"] is True
        (folder / "project.py").write_text(text.replace(OWN, f"recipe={DEEP},"))
        run = stack.json("model", "list")["models"]["store.deep"]["run"]
        stack.headrace("stop", "train@deep")
        stack.headrace("restart", "train", timeout_s=300)
        now = stack.json("model", "list")
        assert now["home"] == now["decided"] == "store.deep" and now["models"]["store.deep"]["run"] == run
        assert stack.json("ledger")["closes"]
