"""Goal: an import into every store that a lake can lie on has each row once, whatever kills it, beside a sink that
commits. Method: the history of history_world, killed at its steps, on a real HDFS and, with `make test-cephfs`, a real
CephFS; what a lake in a folder holds is the oracle."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from history_world import History, Killed, traffic, whole, write_files

from headrace.backends.lake.upkeep import Done, Upkeep
from headrace.contract.errors import ConfigRejected, Unavailable
from headrace.contract.formats.positions import Position
from headrace.deploy.local.layout import Layout
from headrace.deploy.local.servers.cephfs import CephFs

pytestmark = pytest.mark.real


@pytest.fixture(params=["hdfs", "cephfs"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a lake of this test lies."""
    if request.param == "cephfs":
        cluster: CephFs = request.getfixturevalue("cephfs")
        return f"{cluster.mount}/{tmp_path.name}/lake/samples"
    layout: Layout = request.getfixturevalue("stack")
    return f"{layout.store}/{tmp_path.name}/lake/samples"


def test_each_row_is_there_once_beside_a_sink(uri: str, tmp_path: Path) -> None:
    events = traffic(21, 30)
    calm = History(tmp_path / "calm")
    write_files(events, calm.folder)
    calm.run()
    wanted = whole(calm.lake)
    history = History(tmp_path / "here", uri=uri, fails={2})
    write_files(events, history.folder)
    live, deaths = 0, 0
    for step in range(20):
        try:
            history.run(commit_rows=60, kill_at=3 + step % 2)
            break
        except (Killed, Unavailable):
            deaths += 1
        except ConfigRejected as error:
            assert "is done" in str(error)
            break
        # A live sample, as a sink stores it meanwhile.
        row = {**wanted[0], "partition": 0, "offset": live, "rank": 0, "event_id": f"live-{live}"}
        batch = pa.RecordBatch.from_pylist([row], schema=calm.lake.read().schema)
        plain = batch.drop_columns([name for name in ("event_date", "event_hour") if name in batch.schema.names])
        history.lake.append([plain], {0: live + 1}, {0: Position(live, 0)})
        live += 1
    Upkeep(history.lake).compact(Done(), files_min=2)
    rows = whole(history.lake)
    assert deaths >= 2 and [row for row in rows if row["offset"] < 0] == wanted
    assert [row["event_id"] for row in rows if row["offset"] >= 0] == [f"live-{n}" for n in range(live)]
    state = history.lake.state()
    assert state is not None and state.positions.at(0) == Position(live - 1, 0) and state.next_offsets[0] == live
    assert history.lake.imported(["click", "conversion"])[1] == len(wanted)
