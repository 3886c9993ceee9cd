"""Triton's client in a process of its own: its HTTP half runs on gevent, which is to stay out of the tests' process.

    python triton_process.py http|grpc PORT

A line in is a JSON list: the name of a call, then what it takes. A line out is what came of it, or {"error": text}.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Triton:
    """The other end of such a process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def __call__(self, *call: Any, **rest: Any) -> Any:
        """Return what came of a call. Raises `ValueError` with the client's words where it raised."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([*call, rest]) + "\n")
        self._process.stdin.flush()
        found = json.loads(self._process.stdout.readline())
        if isinstance(found, dict) and "error" in found:
            raise ValueError(found["error"])
        return found


@contextmanager
def triton_client(kind: str, port: int) -> Iterator[Triton]:
    """Run a client of `kind` for the server at `port`."""
    command = [sys.executable, __file__, kind, str(port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Triton(process)
        assert process.stdin is not None
        process.stdin.close()
        process.wait(10.0)


def main() -> None:
    """Make the calls that come."""
    import importlib

    import numpy as np

    kind = importlib.import_module(f"tritonclient.{sys.argv[1]}")
    client = kind.InferenceServerClient(f"127.0.0.1:{sys.argv[2]}")
    is_grpc = sys.argv[1] == "grpc"

    def infer(inputs: list[Any], model: str = "small", outputs: list[str] | None = None, **rest: Any) -> Any:
        tensors = []
        for name, datatype, dtype, values in inputs:
            array = np.array([np.nan if value is None else value for value in values], dtype)
            tensors.append(kind.InferInput(name, list(array.shape), datatype))
            tensors[-1].set_data_from_numpy(array)
        wanted = [kind.InferRequestedOutput(name) for name in outputs] if outputs else None
        found = client.infer(model, tensors, outputs=wanted, **rest)
        said = found.get_response(**({"as_json": True} if is_grpc else {}))
        arrays = {each["name"]: found.as_numpy(each["name"]) for each in said["outputs"]}
        said["arrays"] = {
            name: [v.decode() if isinstance(v, bytes) else v for v in array.tolist()] for name, array in arrays.items()
        }
        return {name: said.get(name) for name in ("id", "model_version", "parameters", "arrays")}

    for line in sys.stdin:
        name, *positional, rest = json.loads(line)
        if is_grpc and name in ("get_server_metadata", "get_model_metadata"):
            rest["as_json"] = True
        try:
            found = infer(*positional, **rest) if name == "infer" else getattr(client, name)(*positional, **rest)
        except kind.InferenceServerException as error:
            found = {"error": str(error)}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
