"""Goal: a dead OSD delays the lake and loses nothing. Method: kill it under a writer on a real CephFS, and start it."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lake_world import hours, samples
from local_world import free_base

from headrace.backends.lake.delta import DeltaLake
from headrace.backends.lake.upkeep import Done, Upkeep
from headrace.cli.stack.flags import new_layout, present_layout
from headrace.contract.config import LakeConfig
from headrace.contract.formats.positions import Position
from headrace.contract.formats.topics import Topics
from headrace.deploy.local import stack
from headrace.deploy.local.servers import cephfs as local_cephfs
from headrace.deploy.local.servers.cephfs import SUPERVISED, CephFs
from headrace.deploy.local.supervise import Supervisor

COMMITS = 60
PROGRAM = f"""
import sys
from lake_world import hours, samples
from headrace.backends.lake.delta import DeltaLake
from headrace.contract.formats.positions import Position
lake = DeltaLake(sys.argv[1], partitions=1)
for n in range({COMMITS}):
    lake.append([samples(0, n, hours(1, 2, 3))], {{0: n + 1}}, {{0: Position(n, 2)}})
    print(n, flush=True)
"""


@pytest.mark.real
def test_an_osd_that_dies_delays_the_lake_and_loses_nothing(cephfs: CephFs):
    uri = str(cephfs.mount / "killed" / "lake")
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "worlds" / "lake")}
    with subprocess.Popen([sys.executable, "-c", PROGRAM, uri], stdout=subprocess.PIPE, text=True, env=env) as writer:
        assert writer.stdout is not None
        for line in writer.stdout:
            if int(line) == 10:
                try:
                    cephfs.kill_osd()
                    assert cephfs.pid("osd") == 0
                    cephfs.start_daemon("osd")
                except BaseException:
                    writer.kill()  # it would wait for ever on a store without an OSD
                    raise
    assert writer.returncode == 0
    lake = DeltaLake(uri, partitions=1, config=LakeConfig(compact_files=2))
    state = lake.state()
    assert state is not None and state.next_offsets == {0: COMMITS}
    Upkeep(lake).compact(Done())
    rows = lake.read()
    assert sorted(zip(rows["offset"].to_pylist(), rows["rank"].to_pylist(), strict=True)) == [
        (offset, rank) for offset in range(COMMITS) for rank in range(3)
    ]


@pytest.mark.real
def test_a_cluster_that_was_stopped_goes_on(cephfs: CephFs):
    uri = str(cephfs.mount / "again" / "lake")
    DeltaLake(uri, partitions=1).append([samples(0, 0, hours(1))], {0: 1}, {0: Position(0, 0)})
    cephfs.stop()
    assert not cephfs.is_mounted() and not any(cephfs.pid(name) for name in ("mon", "mgr", "osd", "mds", "client"))
    cephfs.start()
    assert DeltaLake(uri, partitions=1).read().num_rows == 1


@pytest.mark.real
def test_in_a_stack_what_dies_comes_back(cephfs_allowed: None, tmp_path: Path):
    """Goal: a CephFS of `make up STORE=cephfs` outlives each of its processes. Method: kill each, the mount too."""
    layout = new_layout(argparse.Namespace(home=str(tmp_path / "home"), port_base=free_base(), store="cephfs"))
    cluster = stack.own_cephfs(layout)
    try:
        stack.start(layout, Topics().specs(1), print, stages=False)
        DeltaLake(uri := str(cluster.mount / "lake"), partitions=1).append(
            [samples(0, 0, hours(1))], {0: 1}, {0: Position(0, 0)}
        )
        os.sync()
        for number, name in enumerate(SUPERVISED):
            supervisor = Supervisor(layout)
            os.kill(killed := supervisor.pids()[name], signal.SIGKILL)
            while supervisor.pids().get(name, killed) == killed or not cluster.is_mounted():
                time.sleep(0.1)
            lake = DeltaLake(uri, partitions=1)
            lake.append([samples(0, number + 1, hours(1))], {0: number + 2}, {0: Position(number + 1, 0)})
            assert lake.read().num_rows == number + 2, name
            os.sync()
        stack.start(layout, Topics().specs(1), print, stages=False)  # `make up` again
    finally:
        stack.stop(layout, print)
    assert not cluster.is_mounted() and not any(cluster.pid(name) for name in ("mon", "mgr", "osd", "mds", "client"))


def test_a_cluster_that_is_there_is_never_made_anew(tmp_path: Path):
    """Of this build and of an earlier one, which left no mark of the preparation."""
    for mark in ("prepared", "made"):
        cluster = CephFs(tmp_path / mark)
        (cluster.folder / "osd0").mkdir(parents=True)
        (cluster.folder / "osd0" / "block").write_text("data")
        (cluster.folder / mark).touch()
        cluster.prepare()
        assert (cluster.folder / "osd0" / "block").read_text() == "data"


def test_what_a_machine_lacks_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(local_cephfs.shutil, "which", lambda name: None if name == "ceph-mds" else f"/usr/bin/{name}")
    assert "ceph-mds not found; Debian, Ubuntu: apt-get install" in local_cephfs.missing()


def test_up_with_store_cephfs_puts_the_store_on_its_mount(tmp_path: Path):
    """`make up STORE=cephfs`, and what `make down` finds of it later."""
    said = {"home": str(tmp_path), "port_base": 30_000, "store": "cephfs"}
    layout = new_layout(argparse.Namespace(**said))
    assert (layout.store, layout.own_cephfs, layout.own_hdfs) == (f"file:{tmp_path}/cephfs/mnt/headrace", True, False)
    assert layout.ceph_port == 29_998
    layout.prepare()
    layout.save()
    assert present_layout(argparse.Namespace(home=str(tmp_path), port_base=None)).own_cephfs
