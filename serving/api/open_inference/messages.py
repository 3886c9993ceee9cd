"""The messages of the Open Inference Protocol over gRPC (package `inference`), without generated code.

Generated code asks for a release of protobuf at least as new as its generator; what is built here from the table works
with every one since 4. The messages have a pool of their own, so that a client's generated ones may be in the same
process.

Source: the protocol's `open_inference_grpc.proto`; the numbers of the fields are its wire format.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE = "inference"
_PARAMETERS = "map InferParameter parameters = 4"
_TENSOR = "string name = 1; string datatype = 2; repeated int64 shape = 3"
SCHEMA: Mapping[str, str] = {
    "InferParameter": "oneof bool bool_param = 1; oneof int64 int64_param = 2; oneof string string_param = 3; "
    "oneof double double_param = 4; oneof uint64 uint64_param = 5",
    "InferTensorContents": "repeated bool bool_contents = 1; repeated int32 int_contents = 2; "
    "repeated int64 int64_contents = 3; repeated uint32 uint_contents = 4; repeated uint64 uint64_contents = 5; "
    "repeated float fp32_contents = 6; repeated double fp64_contents = 7; repeated bytes bytes_contents = 8",
    "ServerLiveRequest": "",
    "ServerLiveResponse": "bool live = 1",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "bool ready = 1",
    "ModelReadyRequest": "string name = 1; string version = 2",
    "ModelReadyResponse": "bool ready = 1",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": "string name = 1; string version = 2; repeated string extensions = 3",
    "ModelMetadataRequest": "string name = 1; string version = 2",
    "ModelMetadataResponse": "string name = 1; repeated string versions = 2; string platform = 3; "
    "repeated TensorMetadata inputs = 4; repeated TensorMetadata outputs = 5",
    "ModelMetadataResponse.TensorMetadata": _TENSOR,
    "ModelInferRequest": f"string model_name = 1; string model_version = 2; string id = 3; {_PARAMETERS}; "
    "repeated InferInputTensor inputs = 5; repeated InferRequestedOutputTensor outputs = 6; "
    "repeated bytes raw_input_contents = 7",
    "ModelInferRequest.InferInputTensor": f"{_TENSOR}; {_PARAMETERS}; InferTensorContents contents = 5",
    "ModelInferRequest.InferRequestedOutputTensor": "string name = 1; map InferParameter parameters = 2",
    "ModelInferResponse": f"string model_name = 1; string model_version = 2; string id = 3; {_PARAMETERS}; "
    "repeated InferOutputTensor outputs = 5; repeated bytes raw_output_contents = 6",
    "ModelInferResponse.InferOutputTensor": f"{_TENSOR}; {_PARAMETERS}; InferTensorContents contents = 5",
}
"""Message -> its fields, as the protocol's file declares them; `map` has texts as keys."""
CALLS = ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer")
"""Each takes <name>Request and returns <name>Response."""
SERVICE = f"{PACKAGE}.GRPCInferenceService"

_Field = descriptor_pb2.FieldDescriptorProto


def message_types() -> dict[str, Any]:
    """Return the class of each message of `SCHEMA`, by its name."""
    file = descriptor_pb2.FileDescriptorProto(name="open_inference.proto", package=PACKAGE, syntax="proto3")
    made: dict[str, Any] = {}
    for name, fields in SCHEMA.items():
        outer, _, own = name.rpartition(".")
        message = made[name] = (made[outer].nested_type if outer else file.message_type).add(name=own)
        for each in filter(None, fields.split("; ")):
            _add(message, name, each)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in SCHEMA}


def _add(message: Any, owner: str, declared: str) -> None:
    said, _, number = declared.partition(" = ")
    *words, kind, name = said.split(" ")
    field = message.field.add(name=name, number=int(number), label=_Field.LABEL_OPTIONAL)
    if words in (["repeated"], ["map"]):
        field.label = _Field.LABEL_REPEATED
    if words == ["oneof"]:
        if not message.oneof_decl:
            message.oneof_decl.add(name="parameter_choice")
        field.oneof_index = 0
    if words == ["map"]:
        entry = message.nested_type.add(name="ParametersEntry")
        entry.options.map_entry = True
        _add(entry, f"{owner}.ParametersEntry", "string key = 1")
        _add(entry, f"{owner}.ParametersEntry", f"{kind} value = 2")
        field.type, field.type_name = _Field.TYPE_MESSAGE, f".{PACKAGE}.{owner}.ParametersEntry"
    elif kind[0].isupper():
        inner = f"{owner}.{kind}"
        field.type = _Field.TYPE_MESSAGE
        field.type_name = f".{PACKAGE}.{inner if inner in SCHEMA else kind}"
    else:
        field.type = _Field.Type.Value(f"TYPE_{kind.upper()}")
