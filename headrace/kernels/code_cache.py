"""Where compiled code is kept between starts: a folder that is named by all sources it was compiled from.

Numba keeps compiled code beside a module and drops it when that module changes. It does not look at the modules whose
functions were compiled into it: after an upgrade in place it would run code of the old version, or fail at names that
moved. A folder a version of the sources has neither fault. It is set for processes of the `headrace` command alone, so
that a web service that imports `headrace.sender` keeps its own.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path

_ROOMS = ("headrace.contract", "headrace.kernels", "headrace.ingest", "headrace.stream", "headrace.trainer")
_VARIABLE = "NUMBA_CACHE_DIR"


def keep_compiled_code() -> None:
    """Tell Numba its folder, for this process and those it starts; call it before Numba is imported.

    A folder that the user has set stays. Where this one can't be written, Numba takes its usual places.
    """
    os.environ.setdefault(_VARIABLE, str(Path(__file__).with_name("__pycache__") / f"compiled-{sources_digest()}"))


def sources_digest() -> str:
    """Return 16 hex digits over the names and contents of all modules that hold compiled code or what it calls."""
    digest = hashlib.sha256()
    for room in _ROOMS:
        found = importlib.util.find_spec(room)
        for folder in (found.submodule_search_locations or []) if found else []:
            for path in sorted(Path(folder).rglob("*.py")):
                digest.update(f"{room}/{path.relative_to(folder)}\n".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
