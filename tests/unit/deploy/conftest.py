"""What the tests of alerts share: Prometheus' own promtool, run on written series."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Promtool = Callable[[str], subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def rules() -> list[Path]:
    """Every file of alert rules that is shipped."""
    return sorted((Path(__file__).resolve().parents[3] / "deploy" / "prometheus").glob("*.rules.yaml"))


@pytest.fixture
def promtool(tmp_path: Path, rules: list[Path]) -> Promtool:
    """Return a function that runs `tests:` of a unit test of rules, YAML or JSON; skipped where promtool is not."""
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool is not here: it comes with Debian's prometheus")

    def run(tests: str) -> subprocess.CompletedProcess[str]:
        case = tmp_path / "case.yaml"
        case.write_text(f"rule_files: [{', '.join(map(str, rules))}]\nevaluation_interval: 1m\ntests: {tests}")
        return subprocess.run([tool, "test", "rules", str(case)], capture_output=True, text=True, timeout=60)

    return run
