"""A Kafka of a benchmark's own, with a project beside it, kept off the core that the measured side has for itself."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from headrace.contract.config import port
from headrace.contract.formats.topics import Topics
from headrace.deploy.local import stack as local_stack
from headrace.deploy.local.layout import HOST, Layout


@contextmanager
def broker(base: int, project_file: str, partitions: int) -> Iterator[Layout]:
    """Yield the broker's layout, its ports moved to `base`; everything is gone afterwards.

    The broker and the caller run on all cores but the first.
    """
    home = Path(tempfile.mkdtemp(prefix="headrace-bench-"))
    (home / "project").mkdir()
    (home / "project" / "project.py").write_text(project_file)
    (home / "project" / "headrace.toml").write_text(f"[log]\npartitions = {partitions}\n")
    layout = Layout(
        home=home,
        port_base=base,
        brokers=f"{HOST}:{port('kafka', base)}",
        store=f"file:{home}/store",
        webhdfs=None,
        project=home / "project",
        own_kafka=True,
        own_hdfs=False,
    )
    cores = psutil.Process().cpu_affinity() or []
    if len(cores) < 2:
        raise SystemExit("two cores are wanted: one for the side that is measured, one for the broker and the client")
    psutil.Process().cpu_affinity([c for c in cores if c != cores[0]])
    try:
        local_stack.start(layout, Topics().specs(partitions), print, stages=False)
        yield layout
    finally:
        local_stack.stop(layout, print)
        shutil.rmtree(home, ignore_errors=True)
