"""Goal: each mistake that a user makes in a project is answered by where it is and what to do, never by a traceback.

Method: a sound project, one change, and `headrace check` on it; the mistakes and what must be said are in
tests/unit/cli/mistakes.py.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from local_world import free_base
from mistakes import DECLARED, MORE, PROJECT, PYTHON, SETTINGS, SEVERAL, Mistake

from headrace.cli.main import main
from headrace.cli.project_folder import WRONG_MAX
from headrace.contract import functions
from headrace.contract.config import PORTS, port
from headrace.deploy.local.doctor import OUTSIDE_ONLY

ALL = (*PYTHON, *DECLARED, *SETTINGS, *SEVERAL, *MORE)
LIMIT_LINES = 12
NEVER = re.compile(r"Traceback|\[\]|See README|\b1 letters|\x1b|^wrong: *$|\bNone\b is", re.MULTILINE)
"""What no answer says."""


def planted(mistake: Mistake, folder: Path) -> Path:
    """Write the project with its mistake."""
    text = PROJECT
    for old, new in mistake.change.items():
        assert old in text, old
        text = text.replace(old, new, 1)
    files: dict[str, str | bytes] = {"project.py": text, "headrace.toml": mistake.toml, **mistake.files}
    for name, content in files.items():
        if name in mistake.without and name not in mistake.files:
            continue
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of this machine's own stack, of the environment, or of another test's functions and modules counts."""
    for name in ("PORT_BASE", "HEADRACE_PRIVACY_KEY", "HEADRACE_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(functions._FEATURES, "_known", {})
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("headrace.cli.tools.check.port_findings", lambda base: [])


def test_there_are_fifty() -> None:
    assert len(ALL) >= 50 and len({mistake.name for mistake in ALL}) == len(ALL)


@pytest.mark.parametrize("mistake", ALL, ids=lambda each: each.name.replace(" ", "-"))
def test_a_mistake_is_answered(
    mistake: Mistake, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = planted(mistake, tmp_path / "store")
    for name, value in mistake.env.items():
        monkeypatch.setenv(name, value)
    assert main(["check", str(folder), *mistake.flags]) == 1
    said = "".join(capsys.readouterr())
    wrong = said[said.index("wrong: ") :]
    missing = [words for words in mistake.words if not re.search(words, wrong)]
    assert not missing and not NEVER.search(said), wrong
    assert len(wrong.splitlines()) <= LIMIT_LINES


def test_a_sound_project_is_said_to_be_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = planted(Mistake("none", ()), tmp_path / "store")
    assert main(["check", str(folder), "--rate", "200"]) == 0
    said = capsys.readouterr().out
    for words in ("at 200 impressions/s", "click comes within 10 s", "store.impression", "settled within 1 min"):
        assert words in said, said
    assert main(["check", str(folder), "--json"]) == 0
    told = msgspec.json.decode(capsys.readouterr().out)
    assert told["wrong"] == [] and told["project"] == "store" and {"declares", "takes", "notes"} <= told.keys()


def test_a_recipe_that_keeps_no_live_model_calibrated_is_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for recipe, lacks in (
        ("Recipe()", "wait_for_negative=True, ordered_from_ms=1, provisional=True, stored_order='position'"),
        ("Recipe(standardize=True, model='fm')", "ordered_from_ms=1, provisional=True, stored_order='position'. Set"),
        ("multitask(('click',))", ""),
    ):
        text = PROJECT + "\nimport msgspec\nfrom headrace.contract.project import Recipe\n"
        text += "from headrace.trainer.recipes import multitask\n"
        text += f"PROJECT = msgspec.structs.replace(PROJECT, recipe={recipe})\n"
        folder = planted(Mistake("none", (), files={"project.py": text}), tmp_path / str(len(recipe)))
        assert main(["check", str(folder)]) == 0
        said = capsys.readouterr().out
        assert ("note: recipe: a live model" in said) == bool(lacks) and lacks in said and "delayed" not in said, said


@pytest.mark.parametrize(
    ("recipe", "policy", "said_of_it"),
    [
        (
            "deepfm()",
            "window",
            "task 'click' is learnt in the order of impressions: .* 5 min after it came. Until then it is felt",
        ),
        ("deepfm(provisional=False)", "window", "is learnt in the order of .* 5 min after it came. A shorter"),
        ("deepfm(ordered_from_ms=0)", "window", "task 'click': positives come at once"),
        ("deepfm()", "eager", ""),
    ],
)
def test_what_a_long_window_means_is_noted(
    recipe: str, policy: str, said_of_it: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = PROJECT + "\nimport msgspec\nfrom headrace.trainer.recipes import deepfm\n"
    text += f"task = msgspec.structs.replace(PROJECT.tasks[0], window_ms=300_000, policy={policy!r})\n"
    text += f"PROJECT = msgspec.structs.replace(PROJECT, recipe={recipe}, tasks=(task,))\n"
    folder = planted(Mistake("none", (), files={"project.py": text}), tmp_path / "own")
    assert main(["check", str(folder)]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ") and "port" not in line]
    told = [note for note in notes if said_of_it and re.search(said_of_it, note)]
    assert len(told) == 1 if said_of_it else not notes, notes


@pytest.mark.parametrize("ends", ["crlf", "bom", "tabs"])
def test_what_editors_do_to_a_file_is_no_mistake(ends: str, tmp_path: Path) -> None:
    text, toml = PROJECT.encode(), b"[ingest]\nbatch_ms = 5\n"
    if ends == "crlf":
        text, toml = text.replace(b"\n", b"\r\n"), toml.replace(b"\n", b"\r\n")
    elif ends == "bom":
        text, toml = b"\xef\xbb\xbf" + text, b"\xef\xbb\xbf" + toml
    else:
        text, toml = text.replace(b"    ", b"\t"), toml.replace(b"\nb", b"\n\tb")
    folder = planted(Mistake("none", (), files={"project.py": text}, toml=toml), tmp_path / "store")
    assert main(["check", str(folder)]) == 0


def test_what_a_project_prints_is_no_part_of_the_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = planted(Mistake("none", (), {"\nPROJECT =": "\nprint('hello')\nPROJECT ="}), tmp_path / "store")
    assert main(["check", str(folder), "--json"]) == 0
    said = capsys.readouterr()
    assert msgspec.json.decode(said.out)["wrong"] == [] and said.err == "hello\n"


def test_a_name_that_the_terminal_cannot_show_ends_nothing(tmp_path: Path) -> None:
    folder = planted(
        Mistake("none", (), {'"price"': '"preis_\u00fc"', 'field="price"': 'field="preis_\u00fc"'}), tmp_path / "s"
    )
    done = command(folder, PYTHONIOENCODING="ascii", PORT_BASE=str(free_base()))
    assert done.returncode == 0 and "preis_\\xfc float64" in done.stdout, done.stdout + done.stderr


def test_what_follows_from_a_wrong_type_is_not_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = planted(Mistake("none", (), {"dim=8": 'dim=8, tasks="click"'}), tmp_path / "store")
    assert main(["check", str(folder)]) == 1
    assert capsys.readouterr().out.count("wrong: ") == 1


def test_so_many_mistakes_are_told_and_no_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many = ", ".join(f'Categorical(field="none{number}")' for number in range(40))
    change = {'Categorical(field="item_id")': many}
    assert main(["check", str(planted(Mistake("none", (), change), tmp_path / "store"))]) == 1
    said = capsys.readouterr().out
    assert said.count("reads 'none") == WRONG_MAX and "and 20 more: correct these" in said


def test_a_file_in_a_folders_place_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = planted(Mistake("none", ()), tmp_path / "store")
    assert main(["check", str(folder / "project.py")]) == 1
    assert f"is a file; name the folder that holds it: {folder}" in capsys.readouterr().out


def test_doctor_says_what_check_would_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--project", str(planted(Mistake("none", ()), tmp_path / "store"))])
    assert re.search(r"ok +project: store in .*, 1 task\n", capsys.readouterr().out)
    change = {"window_ms=10_000": 'window_ms="10s"', 'Numeric(field="price")': 'Numeric(field="prise")'}
    folder = planted(Mistake("none", (), change), tmp_path / "other")
    assert main(["doctor", "--project", str(folder)]) == 1
    said = capsys.readouterr().out
    assert re.search(r"trouble +project: .*project\.py, line 14: .*'10s'", said) and "'prise'" in said
    assert said.count(f"`headrace check {folder}` looks again") == 2


@pytest.mark.parametrize(("verb", "flags"), [("up", []), ("doctor", [])])
def test_a_broker_without_a_port_is_refused(verb: str, flags: list[str], tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("HEADRACE_BROKERS", "kafka-1")
    folder = planted(Mistake("none", ()), tmp_path / "store")
    assert main([verb, "--project", str(folder), *flags]) == 2
    assert "'kafka-1' has no port" in capsys.readouterr().err


def test_lists_do_for_tuples(tmp_path: Path) -> None:
    change = {
        "features=(\n": "features=[\n",
        "),\n        ),\n    ),\n    recipe": "),\n        ],\n    ),\n    recipe",
    }
    assert main(["check", str(planted(Mistake("none", (), change), tmp_path / "store"))]) == 0


def test_a_folder_that_is_none_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tmp_path / "nowhere")]) == 1
    assert "nowhere is no folder; --project or HEADRACE_PROJECT" in capsys.readouterr().out


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_cannot_be_read_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = planted(Mistake("none", ()), tmp_path / "store")
    (folder / "project.py").chmod(0)
    assert main(["check", str(folder)]) == 1
    assert re.search(r"project\.py cannot be read: Permission denied.*chmod u\+r", capsys.readouterr().out)


def test_ports_among_those_of_outgoing_connections_are_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.deploy.local.doctor._ephemeral", lambda: (32_768, 60_999))
    folder = planted(Mistake("none", ()), tmp_path / "store")
    assert main(["check", str(folder), "--port-base", "43000"]) == 0
    assert re.search(r"note: ephemeral ports: .*43000.*PORT_BASE from 1025 to 327", capsys.readouterr().out)


def command(folder: Path, *more: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the verb as a process of its own, piped."""
    words = [sys.executable, "-m", "headrace.cli.main", *(more or ("check", str(folder)))]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, env={**os.environ, **env}, check=False)


def test_a_port_in_use_is_told_with_its_holder(tmp_path: Path) -> None:
    folder = planted(Mistake("none", ()), tmp_path / "store")
    names = [name for name in PORTS if name not in OUTSIDE_ONLY]
    for base in range(20_011, 24_000, 61):
        with socket.socket() as held:
            try:
                held.bind(("127.0.0.1", port(names[0], base)))
            except OSError:
                continue
            held.listen()
            done = command(folder, PORT_BASE=str(base))
            assert done.returncode == 1, done.stdout
            assert re.search(
                rf"wrong: port {base} \({names[0]}\): taken by .*pid {os.getpid()}.*PORT_BASE", done.stdout
            )
            return
    pytest.fail("no port could be held")


@pytest.mark.parametrize("mistake", [PYTHON[0], DECLARED[2], SETTINGS[0]], ids=lambda each: each.name.replace(" ", "-"))
@pytest.mark.parametrize("verb", ["check", "spec", "up"])
def test_every_verb_answers_alike(mistake: Mistake, verb: str, tmp_path: Path) -> None:
    folder = planted(mistake, tmp_path / "store")
    more = ("check", str(folder)) if verb == "check" else (verb, "--project", str(folder))
    done = command(folder, *more)
    said = done.stdout + done.stderr
    assert done.returncode == (1 if verb == "check" else 2)
    assert all(re.search(words, said) for words in mistake.words) and not NEVER.search(said), said


TRAFFIC = """from headrace.examples.visits import Visit


def visits(project, seed):
    while True:
        yield Visit(context={"user_id": seed}, candidates=[{FIELD: 1}])
"""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            None,
            r"^traffic +none: no traffic.py, so `headrace traffic` has nothing to play; `headrace init` writes one$",
        ),
        (TRAFFIC.replace("FIELD", '"item_id"'), r"^traffic +traffic.py: `headrace traffic` plays its visitors$"),
        (TRAFFIC, r"note: `headrace traffic`: \S+/traffic.py, line 6: NameError: name 'FIELD' is not defined"),
        (TRAFFIC + ")", r"note: `headrace traffic`: \S+/traffic.py, line 7: SyntaxError: unmatched '\)'"),
        (
            TRAFFIC.replace("FIELD", '"item_id"').replace("}])", "}], chances=[3])"),
            r"/traffic.py: its first visit is no headrace.examples.visits.Visit \(AttributeError: ",
        ),
        ("import nothing_of_this_name\nvisits = 3", r"traffic.py, line 1: ModuleNotFoundError"),
        ("raise SystemExit('an own program')", r"traffic.py has no function visits\(project, seed\)"),
        (TRAFFIC.replace("FIELD", '"itm_id"'), r"/traffic.py: its visits have 'itm_id', .* Did you mean 'item_id'\?"),
    ],
)
def test_the_visitors_of_a_try_are_looked_at(
    text: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = planted(Mistake("none", ()), tmp_path / "store")
    if text is not None:
        (folder / "traffic.py").write_text(text)
    assert main(["check", str(folder)]) == 0, "the stack runs without them"
    said = capsys.readouterr().out
    assert re.search(words, said, re.MULTILINE) and not NEVER.search(said), said
