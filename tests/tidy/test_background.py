"""Goal: nothing runs in the background that could die without a word.

Method: every place where a thread, a task, a process or a call in another thread is started is found in the code. It is
`headrace.process.background`, whose stage is told, or it is listed here with what happens when it dies.
"""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
ROOMS = ("headrace", "ingest", "stream", "trainer", "serving", "replay", "examples", "deploy")
STARTS = {
    "Thread",
    "Timer",
    "ThreadPoolExecutor",
    "ProcessPoolExecutor",
    "Popen",
    "TaskGroup",
    "create_task",
    "ensure_future",
    "run_in_executor",
    "run_coroutine_threadsafe",
    "to_thread",
    "create_subprocess_exec",
    "create_subprocess_shell",
    "add_done_callback",
}
QUALIFIED = {"gather": "asyncio", "Process": "multiprocessing", "fork": "os"}
"""Names that others have too."""
WHAT_HAPPENS = {
    "deploy/local/stack.py": ("ThreadPoolExecutor ThreadPoolExecutor", "every result is taken, and raises what it was"),
    "deploy/local/watch.py": ("ThreadPoolExecutor", "every result is taken; the watch ends and is started again"),
    "deploy/local/status_line.py": ("ThreadPoolExecutor", "every result is taken"),
    "examples/shop/catalogue.py": ("Thread", "the site answers no more, as the crawler counts and tells"),
    "headrace/backends/archive/delta.py": ("ThreadPoolExecutor", "every result is taken: the commit fails"),
    "headrace/backends/lake/hour_files.py": ("ThreadPoolExecutor", "every result is taken: the commit fails"),
    "headrace/backends/lake/upkeep_schedule.py": (
        "Thread Popen",
        "what an upkeep raises is counted; the next comes",
    ),
    "headrace/backends/log/group_kafka.py": ("Thread", "`take` raises it, and the gateway ends"),
    "headrace/backends/metrics_prometheus.py": ("Thread", "/metrics answers no more: Prometheus' `up` is 0"),
    "headrace/backends/reachable.py": ("Thread", "/readyz and /healthz are red, and say so"),
    "headrace/process/awake.py": ("Thread", "it has nothing to raise; whoever asks the time looks as well"),
    "headrace/process/background.py": ("Thread create_task", "the stage's `check` raises it"),
    "headrace/process/call_watch.py": ("Thread", "it logs what a look raises and looks again; a hang ends the process"),
    "headrace/process/waits.py": ("Thread", "who waits for the call gets it"),
    "headrace/process/woken.py": ("ensure_future ensure_future", "an event and a pause, which have nothing to raise"),
    "headrace/process/watchdog.py": ("Thread", "it has nothing to raise; what it finds ends the process"),
    "headrace/sender/sender.py": ("Thread", "it goes on after every exception; without it `emit` raises"),
    "ingest/crawl/crawl_stage.py": ("ensure_future", "Scrapy's end, which is waited for a second and then left"),
    "ingest/crawl/extraction_pool.py": ("Popen", "its page is refused, with the reason; the next page gets a new one"),
    "ingest/crawl/scrapy_run.py": ("ensure_future", "the work that Twisted's reactor runs: what it raises is raised"),
    "ingest/dead_letters/settler.py": ("Thread", "`run`, several times a second, raises it"),
    "trainer/source/stored.py": ("ThreadPoolExecutor", "every result is taken: the trainer reads the piece again"),
    "ingest/forward/listeners.py": ("to_thread", "awaited at once"),
    "ingest/tls_handshake.py": ("create_task", "one connection, which is closed; a client comes again"),
    "ingest/gateway/loop.py": (
        "create_task gather",
        "every turn looks at them; the end logs what they raised",
    ),
    "ingest/http/collector.py": ("ensure_future", "waits for an event and is cancelled"),
    "ingest/http/uvicorn_server.py": ("create_task", "awaited: the companion ends with it, and the gateway too"),
    "ingest/sources/kafka_source.py": ("to_thread", "awaited at once"),
    "serving/processes.py": (
        "fork Thread",
        "it ends the stage with status 1, as does a worker that ends",
    ),
    "stream/shell/durable_state.py": (
        "ensure_future ensure_future",
        "awaited; what is being stored fails its stage",
    ),
    "stream/shell/engine.py": ("ensure_future ensure_future", "both are looked at every tick"),
    "stream/shell/log_ends.py": ("Thread", "`look`, once a second, raises it"),
    "stream/sink/archive.py": ("ensure_future", "the round notes what it raises, and the next tick raises it"),
    "stream/sink/stage.py": ("ensure_future", "the commit notes what it raises, and the next tick raises it"),
}
"""By module: what it starts, in the order of the code, and what happens when that dies."""


def started(path: Path) -> list[str]:
    """Return what a module starts in the background, by its last name, in the order of the code."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.func] if isinstance(node, ast.Call) else node.bases if isinstance(node, ast.ClassDef) else []
        for each in names:
            name = each.attr if isinstance(each, ast.Attribute) else each.id if isinstance(each, ast.Name) else ""
            of = each.value.id if isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name) else ""
            if name in STARTS or (name in QUALIFIED and QUALIFIED[name] == of):
                found.append((each.lineno, name))
    return [name for _, name in sorted(found)]


def test_whatever_runs_in_the_background_tells_its_stage_when_it_dies() -> None:
    paths = sorted(p for room in ROOMS for p in (CHECKOUT / room).rglob("*.py") if "__pycache__" not in p.parts)
    found = {str(path.relative_to(CHECKOUT)): " ".join(started(path)) for path in paths}
    found = {path: starts for path, starts in found.items() if starts}
    told = {path: starts for path, (starts, _) in WHAT_HAPPENS.items()}
    differs = {path: (found.get(path), told.get(path)) for path in {*found, *told} if found.get(path) != told.get(path)}
    assert not differs, (
        "(in the code, listed): start it with headrace.process.background, whose stage is told what it dies of; or say "
        "in WHAT_HAPPENS what happens then, and see that it does"
    )


def test_a_start_is_found_however_it_is_written(tmp_path: Path) -> None:
    code = "import threading\nclass A(threading.Thread): ...\nThread(target=f).start()\nloop.create_task(f())\nf(g)\n"
    (tmp_path / "a.py").write_text(code)
    assert Counter(started(tmp_path / "a.py")) == {"Thread": 2, "create_task": 1}
