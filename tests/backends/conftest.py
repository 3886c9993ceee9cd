"""The real CephFS of `make test-cephfs`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from headrace.deploy.local.doctor import free_port
from headrace.deploy.local.servers.cephfs import CephFs


@pytest.fixture(scope="session")
def cephfs(cephfs_allowed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CephFs]:
    """A cluster of its own, mounted; ended with the session. Only `make test-cephfs` starts one."""
    cluster = CephFs(
        tmp_path_factory.mktemp("cephfs") / "cluster", next(p for p in range(6_790, 6_890) if free_port(p))
    )
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
