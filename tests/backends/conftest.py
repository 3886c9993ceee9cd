"""The real CephFS of `make test-cephfs`."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from headrace.deploy.local.cephfs import CephFs, missing
from headrace.deploy.local.doctor import free_port


@pytest.fixture(scope="session")
def cephfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CephFs]:
    """A cluster of its own, mounted; ended with the session. Only `make test-cephfs` starts one."""
    if os.environ.get("HEADRACE_TEST_CEPHFS") != "1":
        pytest.skip("make test-cephfs starts a CephFS; it needs root, /dev/fuse and Debian's ceph packages")
    if lacking := missing():
        pytest.skip(f"no CephFS can run here: {lacking}")
    cluster = CephFs(
        tmp_path_factory.mktemp("cephfs") / "cluster", next(p for p in range(6_790, 6_890) if free_port(p))
    )
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
