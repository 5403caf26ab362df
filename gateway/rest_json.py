"""Protos as REST JSON: snake_case, plain numbers, ids instead of resource names, enums without their prefix.

One walk over descriptors, so that a new field of the contract shows by itself. `rest_name` is the naming rule:
`name` is `id`, `job` is `job_id`, a Duration `eta` is `eta_seconds`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc.status_pb2 import Status

from gateway.problems import failure_of

_DURATION = Duration.DESCRIPTOR.full_name
_TIMESTAMP = Timestamp.DESCRIPTOR.full_name
_STATUS = Status.DESCRIPTOR.full_name
_RENAMED = {"name": "id", "job": "job_id"}
_COLLECTIONS = ("jobs/", "datasets/", "models/")
_RESOURCE_FIELDS = frozenset(
    {"name", "job", "dataset", "model", "catalogue", "model_version", "eval_dataset", "start_from"}
)
# The one enum that is upper case everywhere; the others are words that requests carry in lower case.
_UPPER_CASE = "knowledge_engine.v1.JobState"


def to_json(message: Message) -> dict[str, Any]:
    """Every field of a message. An unset one is null; of a oneof, only the member that is set appears."""
    values: dict[str, Any] = {}
    fields: Sequence[FieldDescriptor] = message.DESCRIPTOR.fields  # type: ignore[assignment]
    for field in fields:
        if _is_oneof_member(field) and not message.HasField(field.name):
            continue
        values[rest_name(field)] = _field(message, field)
    return values


def rest_name(field: FieldDescriptor) -> str:
    """What a field of the contract is called over REST."""
    if _message_name(field) == _DURATION:
        return f"{field.name}_seconds"
    return _RENAMED.get(field.name, field.name)


def plain_id(name: str) -> str:
    """`jobs/a` as `a`, `models/m/versions/3` as `m:3`; what the paths of the REST API take."""
    for collection in _COLLECTIONS:
        if name.startswith(collection):
            return name.removeprefix(collection).replace("/versions/", ":")
    return name


def timestamp(message: Message, field: str) -> str | None:
    """RFC 3339, or None when unset."""
    return getattr(message, field).ToJsonString() if message.HasField(field) else None


def seconds(duration: Duration) -> float:
    return duration.ToNanoseconds() / 1e9


def enum_word(descriptor: EnumDescriptor, number: int) -> str | None:
    """`JOB_STATE_RUNNING` as `RUNNING`, `DATASET_KIND_CATALOGUE` as `catalogue`, unspecified as None."""
    value = descriptor.values_by_number.get(number)
    if value is None or number == 0:
        return None
    word = value.name.removeprefix(descriptor.values_by_number[0].name.removesuffix("UNSPECIFIED"))
    return word if descriptor.full_name == _UPPER_CASE else word.lower()


def enum_number(descriptor: EnumDescriptor, word: str) -> int:
    """The inverse of `enum_word`, for a word that was checked."""
    prefix = descriptor.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return descriptor.values_by_name[f"{prefix}{word.upper()}"].number


def _field(message: Message, field: FieldDescriptor) -> Any:
    value = getattr(message, field.name)
    if isinstance(value, Mapping):
        return dict(value)
    if field.is_repeated:
        return [_value(field, item) for item in value]
    if field.has_presence and not message.HasField(field.name):
        return None
    return _value(field, value)


def _value(field: FieldDescriptor, value: Any) -> Any:
    name = _message_name(field)
    if name == _TIMESTAMP:
        return value.ToJsonString()
    if name == _DURATION:
        return seconds(value)
    if name == _STATUS:
        return failure_of(value).model_dump()
    if name:
        return to_json(value)
    if field.enum_type is not None:
        return enum_word(field.enum_type, value)
    if field.name in _RESOURCE_FIELDS:
        return plain_id(value) or None
    # JSON has no NaN and no infinity.
    return value if not isinstance(value, float) or math.isfinite(value) else None


def _is_oneof_member(field: FieldDescriptor) -> bool:
    """Whether it shares a oneof with others; an `optional` field sits alone in one of its own."""
    return field.containing_oneof is not None and len(field.containing_oneof.fields) > 1


def _message_name(field: FieldDescriptor) -> str:
    return field.message_type.full_name if field.message_type is not None else ""
