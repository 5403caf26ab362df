"""Checked requests become the contract's messages. Only what the caller gave is set; the server fills in the rest."""

from __future__ import annotations

import json
import re
from typing import Any

from google.protobuf import struct_pb2

from gateway import schemas
from gateway.problems import unprocessable
from gateway.rest_json import enum_number
from gateway.strict import MAX_INTEGER
from knowledge_engine.v1 import datasets_pb2, generation_pb2, inference_pb2, training_pb2

BASE = "base"
# What the first release calls these; every other name is the contract's own.
CONTRACT_NAMES = {"epochs": "num_train_epochs", "batch_size": "per_device_train_batch_size"}
_VERSIONED = re.compile(r"([^:]*):([0-9]+)")


def training_spec(body: schemas.TrainRequest) -> training_pb2.TrainingSpec:
    """The model takes the dataset's name unless it is given one."""
    spec = training_pb2.TrainingSpec(
        base_model=body.base_model or "",
        dataset=f"datasets/{body.dataset_name}",
        model=f"models/{body.model_name or body.dataset_name}",
    )
    values = body.training_config.model_dump(exclude_unset=True, exclude_none=True) if body.training_config else {}
    lora = values.pop("lora", None)
    if lora is not None:
        spec.lora.CopyFrom(training_pb2.LoraConfig(**lora))
    for field in spec.DESCRIPTOR.fields:
        if field.enum_type is not None and field.name in values:
            values[field.name] = enum_number(field.enum_type, values[field.name])
    if "eval_dataset" in values:
        values["eval_dataset"] = f"datasets/{values['eval_dataset']}"
    if "start_from" in values:
        values["start_from"] = model_name(values["start_from"])
    for name, value in values.items():
        setattr(spec, CONTRACT_NAMES.get(name, name), value)
    return spec


def generation_spec(body: schemas.GenerateDataRequest) -> generation_pb2.GenerationSpec:
    values = body.model_dump(include={"difficulty_level", "include_product_data", "seed"}, exclude_unset=True)
    if level := values.pop("difficulty_level", None):
        values["difficulty_level"] = enum_number(generation_pb2.DifficultyLevel.DESCRIPTOR, level)
    if body.provider is not None:
        values["provider"] = enum_number(generation_pb2.GenerationProvider.DESCRIPTOR, body.provider)
    return generation_pb2.GenerationSpec(
        catalogue=f"datasets/{body.catalogue}" if body.catalogue is not None else "",
        dataset=f"datasets/{body.dataset_name}" if body.dataset_name is not None else "",
        num_conversations=body.number_of_conversations,
        topics=body.topics or (),
        **values,
    )


def generation_input(model_id: str, body: schemas.InferenceRequest) -> inference_pb2.GenerationInput:
    """Raises ProblemError: 422 for a context that a Struct cannot hold exactly."""
    values = body.model_dump(
        exclude={"messages", "tools", "context", "json_schema", "stream"}, exclude_unset=True, exclude_none=True
    )
    if body.json_schema is not None:
        values["json_schema"] = _text(body.json_schema)
    return inference_pb2.GenerationInput(
        model=model_name(model_id),
        messages=map(_message, body.messages),
        tools=[
            inference_pb2.Tool(
                name=tool.function.name,
                description=tool.function.description or "",
                parameters=_text(tool.function.parameters) if tool.function.parameters is not None else "",
            )
            for tool in body.tools
        ],
        context=_struct(body.context) if body.context is not None else None,
        **values,
    )


def _message(item: schemas.ChatMessage) -> inference_pb2.Message:
    calls = [
        inference_pb2.ToolCall(
            id=call.id or "",
            name=call.function.name,
            arguments=call.function.arguments
            if isinstance(call.function.arguments, str)
            else _text(call.function.arguments),
        )
        for call in item.tool_calls or ()
    ]
    return inference_pb2.Message(
        role=item.role, content=item.content or "", tool_calls=calls, tool_call_id=item.tool_call_id or ""
    )


def _text(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False)


def upload_metadata(name: str, kind: str, format_: str) -> datasets_pb2.UploadDatasetMetadata:
    return datasets_pb2.UploadDatasetMetadata(
        name=f"datasets/{name}",
        kind=enum_number(datasets_pb2.DatasetKind.DESCRIPTOR, kind),  # type: ignore[arg-type]
        format=enum_number(datasets_pb2.DatasetFormat.DESCRIPTOR, format_),  # type: ignore[arg-type]
    )


def model_name(model_id: str) -> str:
    """The resource name of `base`, `name` or `name:3`; the server refuses what is none of these."""
    if model_id == BASE:
        return BASE
    versioned = _VERSIONED.fullmatch(model_id)
    return f"models/{versioned[1]}/versions/{versioned[2]}" if versioned else f"models/{model_id}"


def _struct(context: dict[str, Any]) -> struct_pb2.Struct:
    pending: list[tuple[str, Any]] = [("context", context)]
    while pending:
        path, value = pending.pop()
        if isinstance(value, int) and abs(value) > MAX_INTEGER:
            raise unprocessable([(path[:200], "an integer beyond 2^53 would lose digits; send it as a string")])
        if isinstance(value, dict):
            pending.extend((f"{path}.{key}", item) for key, item in value.items())
        elif isinstance(value, list):
            pending.extend((f"{path}[{index}]", item) for index, item in enumerate(value))
    struct = struct_pb2.Struct()
    struct.update(context)
    return struct
