"""Goal: the shared table is a dictionary. Method: random snapshots and deltas over keys that collide."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.contract.formats.snapshot import Manifest, Weights
from headrace.serving.model.shared_region import Meta, SharedModel

ROWS_MAX, PLACES = 40, 128
# Keys that ask for the same few places of the index, negative ones and the largest among them.
KEYS = [*range(1, 6), *(PLACES * i + 1 for i in range(1, 12)), *(PLACES * i + 126 for i in range(12)), -1, -2]
KEYS += [2**63 - 1, -(2**63), -(2**62), 2**29, 2**31]
CHANGES = st.tuples(
    st.sampled_from(["delta", "delta", "delta", "snapshot"]), *[st.lists(st.sampled_from(KEYS), max_size=12)] * 2
)


@settings(max_examples=100, deadline=None)
@given(st.lists(CHANGES, min_size=1, max_size=12))
def test_every_version_holds_what_a_dictionary_holds(changes: list[tuple[str, list[int], list[int]]]):
    with tempfile.TemporaryDirectory() as folder:
        writer = SharedModel(Path(folder) / "m", dim=1, rows_max=ROWS_MAX, create=True)
        reader = SharedModel(Path(folder) / "m", dim=1, rows_max=ROWS_MAX, reader=1)
        expected: dict[int, float] = {}
        for step, (kind, keys, leave) in enumerate([("snapshot", [], []), *changes]):
            some = np.array(list(dict.fromkeys(keys)), np.int64)
            weights = Weights(some, np.full((len(some), 2), step, np.float32), {"bias": np.array([step], np.float32)})
            manifest = Manifest(kind=kind, model="m", run="r", step=step, version=f"r-{step}")
            meta = Meta(manifest, "r-0", "{}", "{}", {"bias": [1]})
            gone = np.array(sorted(set(leave) - set(keys)), np.int64)
            writer.check_fits(weights, meta, gone, fresh=kind == "snapshot")
            if kind == "snapshot":
                expected = {}
                writer.load_snapshot(weights, meta)
            else:
                writer.apply_delta(weights, meta, gone)
                expected = {key: value for key, value in expected.items() if key not in gone}
            expected |= dict.fromkeys(some.tolist(), float(step))
            # A key that was never learnt gives its initial linear weight, 0.
            found, read = reader.read(
                lambda view: view.lookup(np.array(KEYS, np.int64), seed=1, scale=0.5)[:, 0].tolist()
            )
            assert read.manifest.version == f"r-{step}" and reader.known_by(f"r-{step}").positions == {}
            assert writer.rows == len(expected)
            assert found == [expected.get(key, 0.0) for key in KEYS]
