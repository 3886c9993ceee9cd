"""Goal: a new project begins in a folder of its own, with nothing of the demo in it, and nobody sends it anything.
Method: `headrace init` as a user calls it, then what the stack would run for it."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.cli.main import main
from headrace.cli.project_folder import is_demo, load_project
from headrace.cli.stack.up import stages_of
from headrace.cli.tools.traffic import load_visits
from headrace.contract.errors import ConfigRejected

OWN = ("store", "ads", "fraud")


def init(folder: Path, like: str) -> int:
    return main(["init", str(folder), *(["--like", like] if like != "store" else [])])


@pytest.mark.parametrize("like", OWN)
def test_a_new_project_has_its_own_names_and_nothing_of_the_shop(
    tmp_path: Path, like: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init(tmp_path / "my-own_2", like) == 0
    said = capsys.readouterr()
    assert said.out.split() == [str(tmp_path / "my-own_2" / n) for n in ("headrace.toml", "project.py", "traffic.py")]
    assert "headrace traffic" in said.err and ("HEADRACE_PRIVACY_KEY" in said.err) == (like == "ads")
    _, project = load_project(tmp_path / "my-own_2")
    tags = [project.impression.tag, *(feedback.tag for feedback in project.feedback)]
    assert project.name == "my-own_2" and all(tag.startswith("my-own_2.") for tag in tags)
    text = "".join(file.read_text() for file in (tmp_path / "my-own_2").iterdir()).lower()
    assert "shop" not in text and f'"{like}.' not in text and f'"{like}"' not in text
    assert not is_demo(tmp_path / "my-own_2") and "shop" not in stages_of(tmp_path / "my-own_2")


@pytest.mark.parametrize("like", OWN)
def test_its_visitors_are_the_same_ones_again_and_say_what_is_declared(tmp_path: Path, like: str) -> None:
    init(tmp_path / "mine", like)
    _, project = load_project(tmp_path / "mine")
    visits = load_visits(tmp_path / "mine")
    some, again, others = (list(itertools.islice(visits(project, seed), 50)) for seed in (1, 1, 2))
    assert some == again != others
    tasks = {task.name for task in project.tasks}
    for visit in some:
        said = set(visit.context).union(*visit.candidates)
        assert said == set(project.impression.fields) and set(visit.chances) == tasks
        assert all(len(chances) == len(visit.candidates) for chances in visit.chances.values())


def test_like_the_shop_is_the_shop_and_its_traffic_is_the_stacks(tmp_path: Path) -> None:
    init(tmp_path / "mine", "shop")
    assert is_demo(tmp_path / "mine") and "shop" in stages_of(tmp_path / "mine")
    with pytest.raises(ConfigRejected, match="demo shop has a stage"):
        load_visits(tmp_path / "mine")


def test_what_is_there_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "project.py").write_text("my work\n")
    assert init(tmp_path / "mine", "ads") == 2
    assert "nothing was changed" in capsys.readouterr().err
    assert [file.read_text() for file in (tmp_path / "mine").iterdir()] == ["my work\n"]
    (tmp_path / "file").write_text("")
    assert init(tmp_path / "file", "ads") == 2


@pytest.mark.parametrize("name", ["Mine", "my shop", "-x-", "ü"])
def test_a_name_that_no_project_may_have_is_refused(tmp_path: Path, name: str) -> None:
    assert init(tmp_path / name, "store") == 2
    assert not (tmp_path / name).exists()


def test_the_shops_visitors_do_not_come_to_another_project(tmp_path: Path) -> None:
    init(tmp_path / "mine", "store")
    words = ["shop", "--project", str(tmp_path / "mine"), "--home", str(tmp_path / "home")]
    done = subprocess.run(
        [sys.executable, "-m", "headrace.cli.main", *words], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2 and "is not the demo shop" in done.stderr and "headrace traffic" in done.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "does not exist. `headrace init`"),
        ("visits = 3\n", r"has no function visits\(project, seed\)"),
        ("import nothing_of_this_name\n", "ModuleNotFoundError"),
    ],
)
def test_a_traffic_file_that_is_none_is_named(tmp_path: Path, text: str | None, words: str) -> None:
    init(tmp_path / "mine", "store")
    (tmp_path / "mine" / "traffic.py").unlink()
    if text is not None:
        (tmp_path / "mine" / "traffic.py").write_text(text)
    with pytest.raises(ConfigRejected, match=words):
        load_visits(tmp_path / "mine")
