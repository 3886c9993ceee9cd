"""Goal: no bound counts the time in which its process stood still, with its host or by itself.

Method: every file that reads the machine's own monotonic clock is found in the code. Bounds read `awake_s`, or an
`Awake` over their stage's clock; who reads the clock itself is listed here with what hangs on it.
"""

from __future__ import annotations

import ast
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
ROOMS = ("headrace", "ingest", "stream", "trainer", "serving", "replay", "examples", "deploy")
SHOWN = "prints how long something took"
SENDER = "in a web service's own process, where it starts no thread: what it sends twice has one id"
CLIENT = (
    "in a web service's own process: a request's time, and which connections idled; what is sent twice does no harm"
)
READS_THE_CLOCK = {
    "deploy/local/status_line.py": "a rate since the line before",
    "deploy/local/supervisord.py": "when to start a process again: later is fine",
    "deploy/local/watch.py": "is what its `Awake` follows",
    "examples/shop/web_service.py": "when visitors come next, and how often progress is saved",
    "headrace/backends/clock.py": "is the clock that stages give their `Awake`",
    "headrace/backends/log/group_kafka.py": "when positions are committed next; and prints how long a broker was away",
    "headrace/backends/log/kafka.py": SHOWN,
    "headrace/client/async_client.py": CLIENT,
    "headrace/client/client.py": CLIENT,
    "headrace/cli/progress_bar.py": SHOWN,
    "headrace/cli/stack/flags.py": SHOWN,
    "headrace/cli/stack/restart.py": SHOWN,
    "headrace/cli/stack/start.py": SHOWN,
    "headrace/cli/stack/up.py": SHOWN,
    "headrace/cli/tools/chaos.py": SHOWN,
    "headrace/cli/tools/traffic.py": "when made-up visitors come next",
    "headrace/process/awake.py": "is the helper",
    "headrace/process/call_watch.py": "is what its `Awake` follows",
    "headrace/process/watchdog.py": "is what its `Awake` follows",
    "headrace/sender/sender.py": SENDER,
    "ingest/crawl/politeness.py": "when a host may be asked next: later is polite",
    "headrace/process/set_clock.py": "whether the wall clock was set: time asleep counts in both clocks",
    "ingest/tls_identity.py": "when a certificate near its end is told of again: later is fine",
    "replay/as_trained.py": SHOWN,
    "serving/model/region_file.py": "is what its `Awake` follows: no thread may run before the workers are forked",
    "serving/model/shared_region.py": "a reader still in a copy reads again, by its sequence number",
}


def clock_readers() -> set[str]:
    found = set[str]()
    for path in (path for room in ROOMS for path in (CHECKOUT / room).rglob("*.py") if "__pycache__" not in path.parts):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and (ast.unparse(node) == "time.monotonic"):
                found.add(str(path.relative_to(CHECKOUT)))
    return found


def test_who_reads_the_clock_itself_says_what_hangs_on_it() -> None:
    assert clock_readers() == set(READS_THE_CLOCK)
