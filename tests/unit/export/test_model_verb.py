"""Goal: `headrace model export` takes the snapshot that is asked for, refuses what serving would refuse, and says what
it wrote. Method: a log in memory and a store of files hold snapshots as the trainer announces them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import msgspec
import pytest
from model_world import PROJECT, learnt, manifest_of

from headrace.backends.blobs_file import FileBlobs
from headrace.backends.log.memory import MemoryLog
from headrace.cli.main import main
from headrace.cli.runtime import Runtime
from headrace.cli.tools.models import model as verb
from headrace.contract.config import Config
from headrace.contract.formats.snapshot import Manifest, Weights, encode_manifest, encode_weights
from headrace.contract.formats.topics import Topics
from headrace.trainer import recipes

RECIPE = recipes.logistic()


class World:
    """Log, store and weights."""

    def __init__(self, folder: Path) -> None:
        self.log, self.blobs, self.weights = MemoryLog(), FileBlobs(folder), learnt(RECIPE).weights()
        self.log.admin().ensure_topics(Topics().specs(1))

    def announce(self, step: int, **changes: str) -> Manifest:
        """Store a snapshot of so many rows as steps, and announce it."""
        named = {"step": step, "version": f"r1-{step}", "blob": f"snapshots/taken/r1-{step:012d}", "model": "taken"}
        manifest = msgspec.structs.replace(manifest_of(RECIPE), **named)
        some = Weights(self.weights.keys_K[:step], self.weights.values_KV[:step], self.weights.dense)
        data = encode_weights(some, manifest)
        self.blobs.put(manifest.blob, data)
        manifest = msgspec.structs.replace(manifest, **{"sha256": hashlib.sha256(data).hexdigest()} | changes)
        self.log.append(Topics().model, 0, encode_manifest(manifest), b"taken/snapshot", {"kind": "snapshot"})
        return manifest


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    world = World(tmp_path / "blobs")
    runtime = Runtime(
        project=PROJECT, topics=Topics(), config=Config(), port_base=None, home=tmp_path, brokers="", store="",
        webhdfs=None, project_dir=tmp_path,
    )  # fmt: skip
    monkeypatch.setattr(Runtime, "require_kafka", lambda self: None)
    monkeypatch.setattr(Runtime, "reader", lambda self: world.log.reader())
    monkeypatch.setattr(Runtime, "blobs", lambda self: world.blobs)
    monkeypatch.setattr(verb, "open_runtime", lambda args: runtime)
    return world


def test_the_newest_or_the_one_that_is_named(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "export", "--to", str(tmp_path / "none")]) == 2
    assert "no snapshot of 'taken' is announced" in capsys.readouterr().err
    world.announce(7)
    world.announce(9)
    assert main(["model", "export", "--to", str(tmp_path / "new")]) == 0
    said = capsys.readouterr()
    assert "taken r1-9: chain r1-9, seq 0, digest " + "d" * 64 in said.out and "9 rows of 12 bytes" in said.out
    size = (tmp_path / "new" / "model.onnx").stat().st_size
    assert f"model.onnx       {size:>14,} bytes" in said.out and not said.err
    assert main(["model", "export", "--to", str(tmp_path / "old"), "--version", "r1-7", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 7
    assert main(["model", "export", "--to", str(tmp_path / "none"), "--version", "r1-8"]) == 2
    assert "no snapshot of it is announced; there are 'r1-7', 'r1-9'" in capsys.readouterr().err
    assert main(["model", "export", "--to", str(tmp_path / "old")]) == 2
    assert "is there already" in capsys.readouterr().err


def test_what_serving_refuses_and_what_is_gone_is_not_exported(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for changes, says in (
        ({"sha256": "0" * 64}, "has SHA-256"),
        ({"recipe_json": '{"model":"next"}'}, "a recipe that is not known here"),
        ({"blob": "snapshots/taken/gone"}, "is not in the store any more"),
    ):
        world.announce(5, **changes)
        assert main(["model", "export", "--to", str(out)]) == 1
        assert says in capsys.readouterr().err
    assert not out.exists()
