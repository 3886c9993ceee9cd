"""Goal: `headrace serve` started by any supervisor computes with one BLAS thread. Method: the command's own main."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SAY = """
import os, sys
from headrace.cli.main import main
try:
    main([sys.argv[1], "--help"])
except SystemExit:
    print("threads", os.environ.get("OPENBLAS_NUM_THREADS"))
"""


@pytest.mark.parametrize(("verb", "told", "said"), [("serve", None, "1"), ("serve", "4", "4"), ("sink", None, "None")])
def test_serve_takes_one_blas_thread_unless_it_is_told_otherwise(verb: str, told: str | None, said: str):
    env = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    env |= {} if told is None else {"OPENBLAS_NUM_THREADS": told}
    done = subprocess.run([sys.executable, "-c", SAY, verb], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"threads {said}"
