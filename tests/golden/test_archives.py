"""Goal: what was archived is read for ever: events verbatim, and steps. Method: the files as they were written first,
`write_formats.py archives data/archives`."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import pytest
from write_formats import ARCHIVED, TOPICS

from headrace.backends.archive.delta import DeltaArchive
from headrace.backends.blobs_file import FileBlobs
from headrace.contract.errors import InvariantBroken
from headrace.contract.interfaces.archive import Offsets
from headrace.trainer.commit.steps_archive import StepsArchive

DATA = Path(__file__).parent / "data"


@pytest.fixture
def written(tmp_path: Path) -> Path:
    shutil.copytree(DATA / "archives", tmp_path / "copy")
    return tmp_path / "copy"


def test_archived_events_are_read_verbatim(written: Path) -> None:
    archive = DeltaArchive(str(written / "events"), TOPICS.events, partitions=1, events_id="golden")
    state = archive.state()
    assert state is not None and state.whole == {0: Offsets(4, 5)} and state.lost == {0: Offsets(3, 4)}
    assert list(archive.read(state.version, 0, Offsets(0, 5))) == [*ARCHIVED[:3], *ARCHIVED[4:]]
    with pytest.raises(InvariantBroken, match="deleted and made anew"):
        DeltaArchive(str(written / "events"), TOPICS.events, partitions=1, events_id="other").state()


def test_archived_steps_are_read_verbatim(written: Path) -> None:
    told = [json.loads(line) for line in (DATA / "formats-0.1" / "records.jsonl").read_text().splitlines()]
    records = [(t["offset"], base64.b64decode(t["value"])) for t in told if t["topic"] == TOPICS.steps]
    archive = StepsArchive(FileBlobs(written / "blobs"), TOPICS.steps, "golden")
    assert list(archive.read(0)) == records and archive.span(0) == (0, records[-1][0] + 1)
