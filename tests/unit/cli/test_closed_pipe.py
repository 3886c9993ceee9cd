"""A verb whose reader has gone, as in `headrace dead-letters list --json | head -c 600`.

Goal: it ends without a word, as other programs do; a broken connection of the verb's own is still an error.
"""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys, types
from headrace.cli import main
def run(args):
    {body}
sys.modules["headrace.cli.many"] = types.SimpleNamespace(__doc__="", add_arguments=lambda parser: None, main=run)
main.VERBS["many"] = ("many", "prints")
sys.argv = ["headrace", "many"]
sys.exit(main.main())
"""


def run(body: str, *, is_read_on: bool = False) -> tuple[int, str]:
    """Return the exit status and what was said of a verb of whose output ten bytes are read, or all."""
    program = [sys.executable, "-c", PROGRAM.format(body=body)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stderr is not None
        child.stdout.read(10)
        if is_read_on:
            return child.wait(60), child.communicate()[1]
        child.stdout.close()
        return child.wait(60), child.stderr.read()


def test_it_ends_without_a_word():
    assert run("""print(*range(200_000), sep="\\n")""") == (141, "")


def test_a_pipe_of_another_kind_is_told():
    status, said = run("""print("0" * 20, flush=True); raise BrokenPipeError("of a socket")""", is_read_on=True)
    assert status == 1 and "of a socket" in said
