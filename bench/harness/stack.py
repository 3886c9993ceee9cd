"""A stack as benchmarks and end-to-end tests see it: through the `headrace` command, HTTP, Kafka and the sender.

Either the one that runs on this machine, by the same environment as `make up`, or one of its own with its own ports and
home, which is ended with everything it holds.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import msgspec

from headrace.backends.log.kafka import KafkaReader
from headrace.contract import config as settings
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.log import Record, read_range
from headrace.deploy.local.metrics_text import parse
from headrace.examples.shop.shop import PROJECT
from headrace.examples.shop.traffic import Given, Traffic, Visit, find_data, load_traffic
from headrace.examples.shop.web_service import CANDIDATE, feedback_record
from headrace.sender import Sender
from headrace.serving.model.region_file import forget_region

CHECKOUT = Path(__file__).resolve().parents[2]
SHOP = CHECKOUT / "examples" / "shop"

Event = tuple[str, dict[str, Any]]


@dataclass
class Stack:
    """Addresses and handles of one stack."""

    env: dict[str, str]
    port_base: int | None
    scratch: Path
    store: str = ""
    """Where it stores, as `headrace up` wrote it; "" for what the environment says."""
    topics: Topics = field(default_factory=Topics)

    @classmethod
    @contextmanager
    def open(
        cls,
        *,
        own: bool,
        shop_rate: float,
        port_base: int = 23_500,
        toml: str = "",
        store: str = "",
        project: Path | None = None,
        secrets: Mapping[str, str] = MappingProxyType({}),
    ) -> Iterator[Self]:
        """Yield the running stack, or one of its own that is ended afterwards.

        `toml` takes the place of the shop's; `store` is that of `headrace up --store`, an HDFS of its own where empty.
        `project` is a folder that is run in place of the shop, `secrets` what its environment has besides.
        """
        env, scratch = dict(os.environ), Path(tempfile.mkdtemp(prefix="headrace-"))
        base = int(env["PORT_BASE"]) if env.get("PORT_BASE") else None
        if own:
            copy = scratch / "project"
            shutil.copytree(project or SHOP, copy, ignore=shutil.ignore_patterns("__pycache__"))
            if toml:
                (copy / "headrace.toml").write_text(toml)
            base = port_base
            env |= {"PORT_BASE": str(base), "HEADRACE_HOME": str(scratch / "home"), "RATE": f"{shop_rate:g}"}
            env |= {"HEADRACE_PROJECT": str(copy), **secrets}
            env["DATA"] = env.get("DATA") or str(find_data(SHOP, None) or "")
        stack = cls(env, base, scratch)
        try:
            if own:
                stack.headrace("up", "--detach", *(["--store", store] if store else []), timeout_s=420)
                stack.store = json.loads((scratch / "home" / "stack.json").read_bytes())["store"]
            yield stack
        finally:
            if own:
                stack.headrace("down", timeout_s=60, check=False)
                forget_region(scratch / "home")
            shutil.rmtree(scratch, ignore_errors=True)

    def headrace(self, *words: str, timeout_s: float = 120, check: bool = True) -> str:
        """Run the command and return what it printed; raises with its words where it failed."""
        command = [str(Path(sys.executable).with_name("headrace")), *words]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=timeout_s, check=False)
        if check and done.returncode:
            raise RuntimeError(f"headrace {' '.join(words)}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def json(self, *words: str, timeout_s: float = 120) -> Any:
        """Return what the command prints with --json."""
        return json.loads(self.headrace(*words, "--json", timeout_s=timeout_s, check=False))

    def port(self, name: str) -> int:
        """Return where `name` listens."""
        return settings.port(name, self.port_base)

    def reader(self) -> KafkaReader:
        """Return a reader of the stack's log."""
        return KafkaReader(self.env.get("HEADRACE_BROKERS") or f"127.0.0.1:{self.port('kafka')}")

    def read(self, topic: str) -> list[Record]:
        """Return every record of `topic` up to now."""
        reader = self.reader()
        records = list(read_range(reader, getattr(self.topics, topic)))
        reader.close()
        return records

    def tail(self, topic: str) -> Callable[[], list[Record]]:
        """Return a function that gives the records appended since now."""
        reader = self.reader()
        name = getattr(self.topics, topic)
        begins = reader.end_offsets(name)
        reader.close()
        return lambda: [r for r in self.read(topic) if r.offset >= begins.get(r.partition, 0)]

    def get(self, name: str, path: str, timeout_s: float = 2.0) -> bytes:
        """Return the body of GET `path` on the port of `name`."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port(name)}{path}", timeout=timeout_s) as answer:
            return bytes(answer.read())

    def metric(self, stage: str, name: str) -> float:
        """Return a stage's counter or gauge, summed over its labels; 0 while the stage is away."""
        try:
            text = self.get(f"metrics_{stage}", "/metrics").decode()
        except (OSError, urllib.error.URLError):
            return 0.0
        return parse(text).get(f"headrace_{stage}_{name}", 0.0)

    def rank(self, body: bytes, timeout_s: float = 2.0) -> dict[str, Any]:
        """Return serving's answer to a question."""
        url = f"http://127.0.0.1:{self.port('serving')}/v1/rank"
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return dict(json.loads(answer.read()))

    def lake_uri(self) -> str:
        """Return where the Delta table of samples lies."""
        told = self.store or self.env.get("HEADRACE_STORE")
        store = told or f"hdfs://127.0.0.1:{self.port('namenode')}/headrace"
        return f"{store.removeprefix('file:')}/lake/samples"

    def pids(self) -> dict[str, int]:
        """Return the process id of everything that runs, by stage name."""
        rows = self.json("status")["processes"]
        return {row["name"]: int(row["pid"]) for row in rows if row.get("pid")}

    def sender(self, name: str) -> Sender:
        """Return a sender with a spool of its own."""
        return Sender("", port=self.port("forward"), spool_dir=self.scratch / "spool" / name)

    def traffic(self, rows_max: int | None = None) -> Traffic:
        """Return the shop's rows: real ones where there is data."""
        folder = find_data(SHOP, self.env.get("DATA") or None)
        return load_traffic(folder, PROJECT.impression.fields, rows_max=rows_max)

    def visits(self, rows_max: int | None = None) -> Iterator[Visit]:
        """Yield the shop's visits."""
        return self.traffic(rows_max).visits()

    @staticmethod
    def events(visit: Visit, request_id: str) -> tuple[Event, Event]:
        """Return the impression and the click of a visit, to be stamped by the sender."""
        shown = {"request_id": request_id, "place": 0, **visit.fields, "event_id": request_id}
        return (PROJECT.impression.tag, shown), Stack.answer(visit, Given("click", 0, {}), request_id)

    @staticmethod
    def answer(visit: Visit, given: Given, request_id: str) -> Event:
        """Return one feedback of a visit, to be stamped by the sender."""
        tag = next(feedback.tag for feedback in PROJECT.feedback if feedback.name == given.name)
        return tag, feedback_record(PROJECT, visit, given, request_id)

    @staticmethod
    def question(*visits: Visit, request_id: str = "question") -> bytes:
        """Return the body that asks to rank what these visits would show, to the first one's user."""
        context = {name: value for name, value in visits[0].fields.items() if name not in CANDIDATE}
        candidates = [{n: v.fields[n] for n in CANDIDATE if n in v.fields} for v in visits]
        return msgspec.json.encode({"request_id": request_id, "context": context, "candidates": candidates})
