"""A scorer as torch's exporters write it: a `torch.export` program, and an ONNX model from the same program.

Equal weights give equal bytes with equal versions of torch, onnx and onnxscript: stack traces, the only thing in
either that tells of the machine, are taken out, and the names within the ONNX model are made anew. No name in it is a
task's, whatever torch called its steps.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from headrace.contract.errors import ConfigRejected
from headrace.trainer.export.torch_scorer import TorchScorer, example_inputs

if TYPE_CHECKING:
    from torch.export import ExportedProgram

OPSET = 18
"""Of ONNX: the first with operations on the bits of integers."""
ROWS_AXIS = "rows"
ONNX_BYTES_MAX = 2**31 - 2**20
"""An ONNX file is one protobuf message, which ends at 2 GiB."""
_EXAMPLE_ROWS = 3
_NEEDED = "onnx, onnxscript and onnxruntime"


def torch_program(scorer: TorchScorer, keys_K: npt.NDArray[np.int64]) -> ExportedProgram:
    """Return the program that `torch.export.save` writes; any number of rows may be given to it.

    Raises `ConfigRejected` that names the layer of the user's module which cannot be exported.
    """
    if empty := [name for name, each in scorer.named_parameters() if not each.numel()]:
        raise ConfigRejected(
            f"module {scorer.recipe.module!r} cannot be exported: its parameter {empty[0].removeprefix('layers.')!r} "
            "has no numbers, which torch's file format does not take. Leave the layer out where it has nothing to read."
        )
    rows = torch.export.Dim(ROWS_AXIS, min=1)
    within: list[str] = []
    with _quiet(), _followed(scorer.layers, within), torch.no_grad():
        try:
            program = torch.export.export(
                scorer,
                tuple(example_inputs(scorer, _EXAMPLE_ROWS, keys_K)),
                dynamic_shapes=({0: rows}, {0: rows}),
                strict=False,
            )
        except Exception as error:  # What a user's module raises may be anything.
            raise _not_exported(scorer, within[-1] if within else "", "torch.export", error) from error
    for node in program.graph_module.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def torch_bytes(program: ExportedProgram, about: Mapping[str, str]) -> bytes:
    """Return the program as a .pt2 file, with `about` as JSON texts beside it (`extra_files`)."""
    out = io.BytesIO()
    with _quiet():
        torch.export.save(program, out, extra_files=dict(about))
    return out.getvalue()


def onnx_bytes(program: ExportedProgram, scorer: TorchScorer, about: Mapping[str, str]) -> bytes:
    """Return the program as an ONNX model, whose `metadata_props` are `about`.

    Raises `ConfigRejected`: ONNX lacks an operation of a layer, a task is called as an input, weights are too large.
    """
    import onnx

    heads = scorer.recipe.heads
    if both := sorted(set(heads) & set(scorer.inputs)):
        raise ConfigRejected(f"the task {both[0]!r} is called as an input of an exported model: give it another name.")
    size = sum(each.nbytes for each in (*scorer.parameters(), *scorer.buffers()))
    if size > ONNX_BYTES_MAX:
        raise ConfigRejected(
            f"the weights of the model are {size:,} bytes, and an ONNX file holds {ONNX_BYTES_MAX:,} at most: lower "
            "--inline-bytes, so that rows get a file of their own, or the recipe's widths."
        )
    with _quiet():
        try:
            found: Any = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, input_names=list(scorer.inputs), verbose=False
            )
        except Exception as error:
            raise _not_exported(scorer, _layer_in(error, program), "ONNX", error) from error
    model: onnx.ModelProto = found.model_proto
    _rename(model, scorer.inputs, heads)
    for name, text in sorted(about.items()):
        model.metadata_props.add(key=name, value=text)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def require_packages() -> None:
    """Raise `ConfigRejected` where what the export needs is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigRejected(
            f"exporting a model needs {_NEEDED}, and {error.name} is not installed: pip install 'headrace[export]'."
        ) from error


def _rename(model: Any, inputs: Sequence[str], heads: Sequence[str]) -> None:
    """Give everything within a model names of ours, its outputs the tasks', and leave out what tells of the machine."""
    import onnx

    graph, taken = model.graph, {*inputs, *heads}
    fresh = (name for name in (f"v{i}" for i in range(2**31)) if name not in taken)
    names: dict[str, str] = {"": ""} | {name: name for name in inputs}
    for part in _graphs(graph):
        made = [name for node in part.node for name in node.output]
        for name in (*(each.name for each in (*part.input, *part.initializer)), *made):
            if name not in names:
                names[name] = next(fresh)
    for number, part in enumerate(_graphs(graph)):
        part.name = "headrace" if not number else f"part{number}"
        del part.value_info[:], part.metadata_props[:]
        for initializer in part.initializer:
            initializer.name = names[initializer.name]
            initializer.doc_string = ""
        for at, node in enumerate(part.node):
            node.name, node.doc_string = f"n{number}.{at}", ""
            del node.metadata_props[:]
            node.input[:], node.output[:] = [names[n] for n in node.input], [names[n] for n in node.output]
        for each in (*part.input, *part.output):
            each.name, each.doc_string = names[each.name], ""
            del each.metadata_props[:]
    for head, output in zip(heads, graph.output, strict=True):
        graph.node.append(onnx.helper.make_node("Identity", [output.name], [head], name=f"task.{head}"))
        output.name = head
    for each in (*graph.input, *graph.output):
        each.type.tensor_type.shape.dim[0].dim_param = ROWS_AXIS
    model.doc_string = ""
    del model.metadata_props[:]


def _graphs(graph: Any) -> Iterator[Any]:
    """Yield a graph and those within its nodes (branches, loops), outer ones first."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)
            for inner in attribute.graphs:
                yield from _graphs(inner)


@contextmanager
def _followed(module: torch.nn.Module | None, within: list[str]) -> Iterator[None]:
    """Keep in `within` the names of the layers whose forward pass is under way, the innermost last."""
    hooks: list[Any] = []
    for name, layer in module.named_modules() if module is not None else ():

        def enter(_: Any, __: Any, name: str = name) -> None:
            within.append(name)

        def leave(*_: Any) -> None:
            within.pop()

        hooks += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _layer_in(error: BaseException, program: ExportedProgram) -> str:
    """Return the layer of the node that torch's ONNX exporter speaks of, as %node or by its operation, "" where of
    none."""
    said, next_one = "", error.__cause__
    while next_one is not None:
        said, next_one = f"{said}\n{next_one}", next_one.__cause__
    named, operations = set(re.findall(r"%(\w+)", said)), re.findall(r"op='\w+\.(\w+)'", said)
    for node in program.graph_module.graph.nodes:
        is_named = node.name in named or any(operation in node.name for operation in operations)
        if is_named and (stack := node.meta.get("nn_module_stack")):
            path = str(list(stack.values())[-1][0])
            if path.startswith("layers."):
                return path.removeprefix("layers.")
    return ""


def _not_exported(scorer: TorchScorer, layer: str, by: str, error: Exception) -> ConfigRejected:
    recipe = scorer.recipe
    if scorer.layers is None:
        return ConfigRejected(f"a model {recipe.model!r} is not taken by {by} of this version: {_first_line(error)}")
    kinds = {name: type(each).__name__ for name, each in scorer.layers.named_modules()}
    where = f"its layer {layer!r} ({kinds[layer]})" if kinds.get(layer) and layer else "its forward pass"
    return ConfigRejected(
        f"module {recipe.module!r} version {recipe.module_version} cannot be exported: {where} is not taken by {by}: "
        f"{_first_line(error)} Use operations that it knows, and no branch on values or on the number of rows."
    )


def _first_line(error: BaseException) -> str:
    """Return what went wrong first, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"{lines[0][:300].rstrip('.')}."


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what torch's exporters say of themselves."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
