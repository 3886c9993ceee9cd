"""Goal: what is wrong with a user's folder is said in one line that names the file. Method: write it, load it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from headrace.cli import project_folder
from headrace.cli.main import main
from headrace.cli.project_folder import find_project, load_project
from headrace.contract.errors import ConfigRejected

PROJECT = """
from headrace.contract.project import FeedbackType, ImpressionType, Project, Task
from headrace.contract.spec import FeatureSpec

STORE = Project(
    impression=ImpressionType(tag="i", key="user", fields={"user": "int64"}),
    feedback=(FeedbackType(name="click", tag="c"),),
    tasks=(Task(name="click", feedback="click", window_ms=10),),
    features=FeatureSpec(),
)
"""


def write(folder: Path, *, toml: str = "", **files: str) -> Path:
    """Write the folder's settings and Python files."""
    (folder / "headrace.toml").write_text(toml)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def test_a_file_of_another_name_is_named_with_the_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigRejected, match=r'module = "store\.py"'):
        load_project(write(tmp_path, store=PROJECT))


def test_a_folder_without_python_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigRejected, match="no other is there"):
        load_project(write(tmp_path))


def test_a_project_of_another_name_is_named_with_the_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigRejected, match='object = "STORE"'):
        load_project(write(tmp_path, project=PROJECT))
    _, project = load_project(write(tmp_path, toml='object = "STORE"', project=PROJECT))
    assert project.impression.key == "user"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (PROJECT.replace("window_ms", "window"), r"project\.py, line 8: TypeError: .*window"),
        ("a = 1\nb = (\n", r"project\.py, line 2: SyntaxError"),
        ("\nimport nothing_of_this_name\n", r"project\.py, line 2: ModuleNotFoundError: .*nothing_of_this_name"),
        ("\nPROJECT = 3\n", "it declares none"),
    ],
)
def test_a_file_that_does_not_run_is_refused_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigRejected, match=words):
        load_project(write(tmp_path, project=text))


def test_without_a_checkout_the_demo_is_the_installed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert (find_project("") / "headrace.toml").exists()
    assert project_folder.is_demo(find_project("")) and not project_folder.is_demo(tmp_path)


def test_a_copy_of_the_demo_is_the_demo_until_its_declarations_change(shop_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(shop_dir, copy)
    (copy / "headrace.toml").write_text('module = "shop.py"\n[ingest]\nbatch_ms = 5\n')
    assert project_folder.is_demo(copy)
    with (copy / "shop.py").open("a") as file:
        file.write("# mine\n")
    assert not project_folder.is_demo(copy)


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("headrace 0.")
