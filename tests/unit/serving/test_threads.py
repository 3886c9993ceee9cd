"""Goal: no request waits for what belongs to the start: BLAS has one thread under any supervisor, and what ranks is
compiled. Method: the command's own main; the compiled functions' signatures before and after a request."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from random import Random

import msgspec
import pytest
from serving_world import Trainer, World

from headrace.kernels import hashes, served_tokens
from headrace.serving import counter_table
from headrace.serving.api.rank import Ranker
from headrace.serving.compile_ranking import compile_ranking
from headrace.stream.features import featurize
from headrace.trainer.model import scoring

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


COMPILED = (
    (hashes, "_murmur_all"), (hashes, "_murmur_decimals"), (served_tokens, "_seal_all"), (counter_table, "_values"),
    (featurize, "_salted"), (scoring, "_sigmoid"),
)  # fmt: skip


def test_a_request_finds_compiled_what_ranks(tmp_path: Path):
    world = World(tmp_path)
    trainer = Trainer(world)
    trainer.learn(Random(1))
    trainer.snapshot()
    world.follow()
    compile_ranking()
    before = {name: set(getattr(module, name).signatures) for module, name in COMPILED}
    for context in ({"user": 3, "item": 1}, {"user": None}):
        body = {"request_id": "r", "context": context, "candidates": [{"price": 1.0}, {"price": None}]}
        assert Ranker(world.deps).respond(msgspec.json.encode(body)).status_code == 200
    assert {name: set(getattr(module, name).signatures) for module, name in COMPILED} == before
    assert all(before.values())
