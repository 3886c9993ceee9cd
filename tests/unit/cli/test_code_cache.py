"""Goal: compiled code of other sources is never run. Method: the folder's name, and a process of the command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from headrace.kernels import code_cache


def test_the_folder_changes_with_any_source(tmp_path: Path, monkeypatch):
    (tmp_path / "room").mkdir()
    source = tmp_path / "room" / "__init__.py"
    source.write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(code_cache, "_ROOMS", ("room",))
    first = code_cache.sources_digest()
    assert first == code_cache.sources_digest()
    source.write_text("x = 2\n")
    second = code_cache.sources_digest()
    (tmp_path / "room" / "more.py").write_text("")
    assert len({first, second, code_cache.sources_digest()}) == 3


def test_the_command_sets_it_and_leaves_what_the_user_has_set():
    code = (
        "import sys; from headrace.cli.main import main; main(['status', '--home', '/nowhere']);"
        "import os; print(os.environ['NUMBA_CACHE_DIR'], 'numba' in sys.modules)"
    )
    told = [
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout.split()
        for env in (
            {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"},
            {**os.environ, "NUMBA_CACHE_DIR": "/somewhere"},
        )
    ]
    assert told[0][-2].endswith(f"compiled-{code_cache.sources_digest()}") and told[0][-1] == "False"
    assert told[1][-2] == "/somewhere"
