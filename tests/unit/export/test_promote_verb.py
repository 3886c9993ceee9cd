"""Goal: `headrace model list`, `show` and `promote` say how the models stand, and promote only what serving can serve.

Method: two models learnt in memory, with the runtime of the verb over them; `serve` is what a test says that it says.
"""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from beside_world import BESIDE, DEEP, begun, learn_beside, new_world
from trainer_world import PROJECT, TOPICS, World

from headrace.cli.main import main
from headrace.cli.runtime import Runtime
from headrace.cli.tools.models import promote as verb
from headrace.contract.config import Config
from headrace.contract.project import Project
from headrace.trainer.commit.decisions import promoted, read_decisions


class Verb:
    """The verb over a world: `served` is the answer of GET /v1/model, or None."""

    def __init__(self, world: World, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.world, self.served = world, None
        self.runtime = Runtime(
            project=BESIDE, topics=TOPICS, config=Config(), port_base=None, home=folder, brokers="", store="",
            webhdfs=None, project_dir=folder,
        )  # fmt: skip
        object.__setattr__(self.runtime, "clock", world.clock)
        monkeypatch.setattr(Runtime, "require_kafka", lambda runtime: None)
        monkeypatch.setattr(Runtime, "reader", lambda runtime: world.log.reader())
        monkeypatch.setattr(Runtime, "producer", lambda runtime: world.log.producer())
        monkeypatch.setattr(Runtime, "blobs", lambda runtime: world.blobs)
        monkeypatch.setattr(verb, "open_runtime", lambda args: self.runtime)
        monkeypatch.setattr(verb, "served_by", lambda runtime: self.served)

    def declare(self, project: Project) -> None:
        object.__setattr__(self.runtime, "project", project)

    def serves(self, model: str) -> None:
        self.served = verb.Served(model=model, version=f"{model}-1")

    @property
    def decided(self) -> list[str]:
        return [each.variant for each in read_decisions(self.world.log.reader(), TOPICS, PROJECT.name)]


@pytest.fixture
def both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Verb:
    world = new_world(2)
    learn_beside(world, 2, {})
    return Verb(world, tmp_path, monkeypatch)


def promote(*words: str) -> int:
    return main(["model", "promote", *words])


def test_a_variant_is_promoted_shown_and_taken_back(both: Verb, capsys: pytest.CaptureFixture[str]) -> None:
    both.serves("small")
    assert main(["model", "show", "deep"]) == 0
    said = capsys.readouterr().out
    assert "small.deep" in said and "log_loss" in said and "0 records of events" in said and "yes, small-1" in said
    assert promote("deep") == 1 and "--yes promotes without a question" in capsys.readouterr().out and not both.decided
    assert promote("deep", "--yes", "--reason", "better") == 0
    assert both.decided == ["deep"] and "is decided for" in capsys.readouterr().out
    assert promote("deep", "--yes") == 0 and "is served already" in capsys.readouterr().out and len(both.decided) == 1
    both.serves("small.deep")
    assert main(["model", "list"]) == 0
    said = capsys.readouterr().out
    assert "small.deep: variant deep" in said and "served: yes" in said and ": better" in said and "promote" in said
    assert promote("--main", "--yes", "--json") == 0
    assert json.loads(capsys.readouterr().out)["decision"]["variant"] == "" and both.decided == ["deep", ""]
    assert main(["model", "list", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["decided"] == told["home"] == "small" and set(told["models"]) == {"small", "small.deep"}
    assert promote("wide", "--yes") == 2 and "not declared; there are: 'deep'" in capsys.readouterr().err


def test_what_serving_cannot_serve_is_refused_with_the_next_step(
    both: Verb, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = msgspec.structs.replace(DEEP, lr_dense=0.5)
    for project, says in (
        (msgspec.structs.replace(BESIDE, variants={"deep": changed}), "is of another recipe or spec"),
        (msgspec.structs.replace(BESIDE, variants={"more": changed}), "no snapshot: `headrace start train@more`"),
    ):
        both.declare(project)
        both.serves("small")
        assert promote(next(iter(project.variants)), "--yes", "--force") == 2
        assert says in capsys.readouterr().err
    assert not both.decided


def test_one_without_a_trainer_is_promoted_by_force_alone(both: Verb, capsys: pytest.CaptureFixture[str]) -> None:
    both.serves("small")
    both.world.clock.advance(3_600.0)
    assert promote("deep", "--yes") == 2
    assert "`headrace start train@deep` starts it. --force promotes it all the same" in capsys.readouterr().err
    assert promote("deep", "--yes", "--force") == 0 and both.decided == ["deep"]


def test_one_that_learns_the_lake_is_not_promoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world = new_world(5)
    trainer = begun(world, "deep")
    for _ in range(6):
        trainer.turn()
        world.clock.advance(0.2)
    own = Verb(world, tmp_path, monkeypatch)
    assert promote("deep", "--yes") == 2 and "it learns the lake still" in capsys.readouterr().err and not own.decided


def test_moved_it_is_the_projects_own_and_the_way_back_leads_there(
    both: Verb, capsys: pytest.CaptureFixture[str]
) -> None:
    both.serves("small")
    assert promote("deep", "--yes") == 0
    both.declare(msgspec.structs.replace(PROJECT, recipe=DEEP))
    assert both.runtime.of_variant(None).project.model == "small.deep"
    assert both.runtime.of_variant(None).topics.steps == "steps-small.deep"
    assert promote("deep", "--yes") == 2 and "headrace model promote --main" in capsys.readouterr().err
    assert main(["model", "export", "--to", "/nowhere", "--variant", "deep"]) in (1, 2)
    wide = msgspec.structs.replace(DEEP, hidden=(4,))
    both.declare(msgspec.structs.replace(PROJECT, recipe=DEEP, variants={"wide": wide}))
    # As if wide had been promoted: the way back is to the project's own recipe, which the first one is now.
    both.world.log.append(
        TOPICS.model,
        0,
        b'{"model":"small","what":"promote","variant":"wide","created_ms":9}',
        b"k",
        {"kind": "decision"},
    )
    assert promote("--main", "--yes", "--force") == 0
    assert promoted(read_decisions(both.world.log.reader(), TOPICS, "small")) == "deep"
