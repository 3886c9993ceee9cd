"""Fixtures that every kind of test shares."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from local_world import CHECKOUT, own_layout

from headrace.contract.formats.topics import Topics
from headrace.deploy.local import stack as local_stack
from headrace.deploy.local.layout import Layout
from headrace.deploy.local.servers import cephfs as local_cephfs
from headrace.serving.model.region_file import forget_region

# No example has a deadline: the first one of a compiled function waits for the compiler, and machines are busy.
hypothesis.settings.register_profile("headrace", deadline=None)
hypothesis.settings.load_profile("headrace")


@pytest.fixture(autouse=True)
def loggers_as_before() -> Iterator[None]:
    """What a verb makes its loggers leave out, for it ends its process, is told again in the next test."""
    before = {name: logging.getLogger(name).level for name in [*logging.root.manager.loggerDict]}
    handlers = [*logging.root.handlers]
    yield
    for name in [*logging.root.manager.loggerDict]:
        logging.getLogger(name).setLevel(before.get(name, logging.NOTSET))
    for handler in [*logging.root.handlers]:
        # A verb's own, which writes into the stream that this test has captured.
        if type(handler) is logging.StreamHandler and handler not in handlers:
            logging.root.removeHandler(handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of data beside the checkout; without it, the tests that need it are skipped by name."""
    folder = CHECKOUT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"no data: {folder} does not exist")
    return folder


@pytest.fixture(scope="session")
def shop_dir() -> Path:
    """The demo project's folder."""
    return CHECKOUT / "examples" / "shop"


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Layout]:
    """Real Kafka and real HDFS on free ports, without stages; ended with the session. Jars are the checkout's."""
    layout = own_layout(tmp_path_factory.mktemp("stack") / "home of it")
    try:
        local_stack.start(layout, Topics().specs(2), print, stages=False)
        yield layout
    finally:
        local_stack.stop(layout, print)
        forget_region(layout.home)


@pytest.fixture(scope="session")
def cephfs_allowed() -> None:
    """Skip unless this is `make test-cephfs` on a machine that can run a CephFS."""
    if os.environ.get("HEADRACE_TEST_CEPHFS") != "1":
        pytest.skip("make test-cephfs starts a CephFS; it needs root, /dev/fuse and Debian's ceph packages")
    if lacking := local_cephfs.missing():
        pytest.skip(f"no CephFS can run here: {lacking}")
