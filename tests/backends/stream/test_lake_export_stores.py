"""Goal: `headrace lake export` gives the same rows from every store that a lake can lie on. Method: the lake and the
oracle of export_world, column by column, on a real HDFS and, with `make test-cephfs`, a real CephFS."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from random import Random

import msgspec
import pyarrow.parquet as pq
import pytest
from export_world import DAY_MS, HOUR_MS, PROJECT, filled_lake, oracle, stored_rows

from headrace.backends.lake.upkeep import Done, Upkeep
from headrace.deploy.local.layout import Layout
from headrace.deploy.local.servers.cephfs import CephFs

pytestmark = pytest.mark.real
TASKS = tuple(task.name for task in PROJECT.tasks)
DECLARED = """
import sys
sys.path.append({worlds!r})
import export_world
import msgspec
from headrace.contract.project import Project
PROJECT = msgspec.json.decode({declared!r}, type=Project)
"""


@pytest.fixture(params=["hdfs", "cephfs"])
def env(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """The environment of a command, with a store that nothing is in."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "headrace.toml").write_text("")
    declared = msgspec.json.encode(PROJECT).decode()
    worlds = str(Path(sys.modules["export_world"].__file__ or "").parent)
    (project / "project.py").write_text(DECLARED.format(worlds=worlds, declared=declared))
    found = {**os.environ, "HEADRACE_PROJECT": str(project), "HEADRACE_HOME": str(tmp_path / "home")}
    if request.param == "cephfs":
        cluster: CephFs = request.getfixturevalue("cephfs")
        return found | {"HEADRACE_STORE": f"file:{cluster.mount}/{tmp_path.name}"}
    layout: Layout = request.getfixturevalue("stack")
    return found | {"HEADRACE_STORE": f"{layout.store}/{tmp_path.name}", "HEADRACE_WEBHDFS": str(layout.webhdfs)}


def exported(env: dict[str, str], out: Path) -> list[dict[str, object]]:
    headrace = str(Path(sys.executable).with_name("headrace"))
    words = ["--from", "2026-11-25T00:00:00Z", "--to", "2026-11-25T03:00:00Z", "--to-parquet", str(out)]
    done = subprocess.run([headrace, "lake", "export", *words], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    rows: list[dict[str, object]] = pq.read_table(out).to_pylist()
    return rows


def test_an_export_is_what_the_lake_was_given(env: dict[str, str], tmp_path: Path) -> None:
    lake = filled_lake(f"{env['HEADRACE_STORE'].removeprefix('file:')}/lake/samples", Random(3), older=10, newer=30)
    wanted = oracle(stored_rows(lake), PROJECT, DAY_MS, DAY_MS + 3 * HOUR_MS, TASKS)
    assert exported(env, tmp_path / "small files") == wanted
    Upkeep(lake).compact(Done(), files_min=2)
    assert exported(env, tmp_path / "compacted") == wanted
