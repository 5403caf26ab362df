"""Everything that can go wrong, as one tree. The class says what kind of failure it is, `reason` which one.

KnowledgeEngineError
 +-- InvalidSpecError       what was asked for cannot be right (with field violations)
 +-- NotFoundError          no such thing
 +-- AlreadyExistsError     the name is taken by something else
 +-- StateError             right request, wrong moment
 +-- ConflictError          someone else changed it meanwhile
 +-- AuthenticationError    who are you?
 +-- AccessError            you may not
 +-- CapacityError          full; try again later
 +-- UpstreamError          another part or service does not answer; try again later
 +-- IntegrityError         stored bytes are not what was stored
 +-- CredentialsError       our own credentials were refused elsewhere

Errors know no transport: `server/status.py` maps the classes to gRPC codes, and those decide the HTTP numbers. They
cross process borders, so they pickle and turn into plain data (`to_dict`, `from_dict`).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any, NamedTuple


class Reason(StrEnum):
    """Stable, documented codes; the closed list of what clients may rely on."""

    # InvalidSpecError
    SPEC_INVALID = "SPEC_INVALID"
    NAME_INVALID = "NAME_INVALID"
    PAGE_TOKEN_INVALID = "PAGE_TOKEN_INVALID"
    DATASET_FORMAT_INVALID = "DATASET_FORMAT_INVALID"
    DATASET_TOO_LARGE = "DATASET_TOO_LARGE"
    DATASET_KIND_WRONG = "DATASET_KIND_WRONG"
    NOTHING_TO_TRAIN = "NOTHING_TO_TRAIN"
    EXAMPLE_TOO_LONG = "EXAMPLE_TOO_LONG"
    SPLIT_IMPOSSIBLE = "SPLIT_IMPOSSIBLE"
    PROMPT_TOO_LONG = "PROMPT_TOO_LONG"
    BASE_MODEL_UNKNOWN = "BASE_MODEL_UNKNOWN"
    BASE_MODEL_UNSUPPORTED = "BASE_MODEL_UNSUPPORTED"
    TARGET_MODULES_UNKNOWN = "TARGET_MODULES_UNKNOWN"
    TOPIC_UNKNOWN = "TOPIC_UNKNOWN"
    CHAT_TEMPLATE_REFUSED = "CHAT_TEMPLATE_REFUSED"
    TOOLS_UNSUPPORTED = "TOOLS_UNSUPPORTED"
    SETTINGS_INVALID = "SETTINGS_INVALID"
    # NotFoundError
    JOB_NOT_FOUND = "JOB_NOT_FOUND"
    DATASET_NOT_FOUND = "DATASET_NOT_FOUND"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    MODEL_VERSION_NOT_FOUND = "MODEL_VERSION_NOT_FOUND"
    EVALUATION_NOT_FOUND = "EVALUATION_NOT_FOUND"
    # AlreadyExistsError
    DATASET_EXISTS = "DATASET_EXISTS"
    EXPORT_EXISTS = "EXPORT_EXISTS"
    REQUEST_ID_REUSED = "REQUEST_ID_REUSED"
    # StateError
    JOB_ENDED = "JOB_ENDED"
    SERVER_RUNNING = "SERVER_RUNNING"
    DATASET_IN_USE = "DATASET_IN_USE"
    BASE_MODEL_NOT_SERVED = "BASE_MODEL_NOT_SERVED"
    CHAT_TEMPLATE_CHANGED = "CHAT_TEMPLATE_CHANGED"
    EXPORT_DIFFERS = "EXPORT_DIFFERS"
    CATALOGUE_TOO_SMALL = "CATALOGUE_TOO_SMALL"
    PROVIDER_NOT_CONFIGURED = "PROVIDER_NOT_CONFIGURED"
    OPENAI_QUOTA_EXHAUSTED = "OPENAI_QUOTA_EXHAUSTED"
    OPENAI_REQUEST_REFUSED = "OPENAI_REQUEST_REFUSED"
    GENERATION_UNUSABLE = "GENERATION_UNUSABLE"
    TRAINING_UNAVAILABLE = "TRAINING_UNAVAILABLE"
    MEMORY_INSUFFICIENT = "MEMORY_INSUFFICIENT"
    BASE_MODEL_NOT_FOUND = "BASE_MODEL_NOT_FOUND"
    # ConflictError
    ATTEMPT_SUPERSEDED = "ATTEMPT_SUPERSEDED"
    # AuthenticationError
    API_KEY_MISSING = "API_KEY_MISSING"
    API_KEY_INVALID = "API_KEY_INVALID"
    # AccessError
    HOST_REFUSED = "HOST_REFUSED"
    # CapacityError
    QUEUE_FULL = "QUEUE_FULL"
    ENGINE_BUSY = "ENGINE_BUSY"
    CALLER_BUSY = "CALLER_BUSY"
    READER_STALLED = "READER_STALLED"
    DISK_FULL = "DISK_FULL"
    # UpstreamError
    ENGINE_UNAVAILABLE = "ENGINE_UNAVAILABLE"
    BASE_MODEL_LOADING = "BASE_MODEL_LOADING"
    SERVER_UNAVAILABLE = "SERVER_UNAVAILABLE"
    STATE_UNAVAILABLE = "STATE_UNAVAILABLE"
    OPENAI_UNAVAILABLE = "OPENAI_UNAVAILABLE"
    OPENAI_RATE_LIMITED = "OPENAI_RATE_LIMITED"
    STORAGE_UNREACHABLE = "STORAGE_UNREACHABLE"
    HUB_UNREACHABLE = "HUB_UNREACHABLE"
    TRACKER_UNREACHABLE = "TRACKER_UNREACHABLE"
    # IntegrityError
    DATASET_CORRUPT = "DATASET_CORRUPT"
    MODEL_VERSION_CORRUPT = "MODEL_VERSION_CORRUPT"
    SELF_TEST_FAILED = "SELF_TEST_FAILED"
    BASE_MODEL_CORRUPT = "BASE_MODEL_CORRUPT"
    STATE_NEWER = "STATE_NEWER"
    CHECKPOINT_UNUSABLE = "CHECKPOINT_UNUSABLE"
    # CredentialsError
    UPSTREAM_CREDENTIALS = "UPSTREAM_CREDENTIALS"
    BASE_MODEL_GATED = "BASE_MODEL_GATED"
    # Only the gateway's own answers, the first three for statuses that a transport made
    DEADLINE = "DEADLINE"
    CANCELLED_BY_CLIENT = "CANCELLED_BY_CLIENT"
    METHOD_UNKNOWN = "METHOD_UNKNOWN"
    ORIGIN_REFUSED = "ORIGIN_REFUSED"
    ROUTE_NOT_FOUND = "ROUTE_NOT_FOUND"
    METHOD_NOT_ALLOWED = "METHOD_NOT_ALLOWED"
    MEDIA_TYPE_UNSUPPORTED = "MEDIA_TYPE_UNSUPPORTED"
    BODY_TOO_LARGE = "BODY_TOO_LARGE"
    # Anything unexpected
    WORKER_CRASHED = "WORKER_CRASHED"
    NON_FINITE = "NON_FINITE"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    INTERNAL = "INTERNAL"


class RowCode(StrEnum):
    """What is wrong with a row; stable, travels as `reason` of a field violation."""

    LINE_TOO_LONG = "LINE_TOO_LONG"
    LINE_EMPTY = "LINE_EMPTY"
    NOT_UTF8 = "NOT_UTF8"
    BYTE_ORDER_MARK = "BYTE_ORDER_MARK"
    NUL_BYTE = "NUL_BYTE"
    JSON_INVALID = "JSON_INVALID"
    NOT_AN_OBJECT = "NOT_AN_OBJECT"
    CSV_INVALID = "CSV_INVALID"
    NO_ROWS = "NO_ROWS"
    FIELD_UNKNOWN = "FIELD_UNKNOWN"
    FIELD_MISSING = "FIELD_MISSING"
    FIELD_INVALID = "FIELD_INVALID"
    TOO_MANY_MESSAGES = "TOO_MANY_MESSAGES"
    ROLE_UNKNOWN = "ROLE_UNKNOWN"
    SYSTEM_NOT_FIRST = "SYSTEM_NOT_FIRST"
    CONTENT_EMPTY = "CONTENT_EMPTY"
    CHARACTER_REFUSED = "CHARACTER_REFUSED"
    WEIGHT_INVALID = "WEIGHT_INVALID"
    TOOLS_UNSUPPORTED = "TOOLS_UNSUPPORTED"
    TOOLS_MISSING = "TOOLS_MISSING"
    TOOLS_TOO_LARGE = "TOOLS_TOO_LARGE"
    TOOL_INVALID = "TOOL_INVALID"
    TOOL_DUPLICATE = "TOOL_DUPLICATE"
    TOOL_UNKNOWN = "TOOL_UNKNOWN"
    CALL_INVALID = "CALL_INVALID"
    CALL_UNKNOWN = "CALL_UNKNOWN"
    CALL_UNANSWERED = "CALL_UNANSWERED"
    ARGUMENTS_INVALID = "ARGUMENTS_INVALID"
    NOTHING_TO_LEARN = "NOTHING_TO_LEARN"
    ANSWER_MISSING = "ANSWER_MISSING"
    PROMPT_INVALID = "PROMPT_INVALID"
    ANSWERS_EQUAL = "ANSWERS_EQUAL"
    PRODUCT_INVALID = "PRODUCT_INVALID"
    ID_DUPLICATE = "ID_DUPLICATE"


class RowError(ValueError):
    """Why a row is refused, in one sentence that says where in the row."""

    def __init__(self, code: RowCode, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


class Violation(NamedTuple):
    """One field that is wrong; `field` is its path in the contract, such as `spec.lora.rank`. `reason` is a stable code
    where there is one, such as those of `RowCode`."""

    field: str
    description: str
    reason: str = ""


class KnowledgeEngineError(Exception):
    """A failure with a stable reason; `metadata` holds every changing value of the message, as text."""

    default_reason = Reason.INTERNAL

    def __init__(
        self,
        message: str,
        *,
        reason: Reason | None = None,
        violations: Sequence[Violation] = (),
        retry_after_seconds: float | None = None,
        **metadata: object,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.violations = tuple(violations)
        self.retry_after_seconds = retry_after_seconds
        self.metadata = {key: str(value) for key, value in metadata.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return from_dict, (self.to_dict(),)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the state store and the engine socket."""
        return {
            "kind": type(self).__name__,
            "message": self.message,
            "reason": self.reason.value,
            "violations": [list(violation) for violation in self.violations],
            "retry_after_seconds": self.retry_after_seconds,
            "metadata": self.metadata,
        }


class InvalidSpecError(KnowledgeEngineError):
    """What was asked for cannot be right."""

    default_reason = Reason.SPEC_INVALID


class NotFoundError(KnowledgeEngineError):
    """No such thing."""


class AlreadyExistsError(KnowledgeEngineError):
    """The name is taken by something else."""


class StateError(KnowledgeEngineError):
    """The request is right, the moment is not."""


class ConflictError(KnowledgeEngineError):
    """Someone else changed it meanwhile."""


class AuthenticationError(KnowledgeEngineError):
    """The caller did not say who it is, or could not prove it."""


class AccessError(KnowledgeEngineError):
    """The caller may not do this."""


class CapacityError(KnowledgeEngineError):
    """Full; `retry_after_seconds` says when to try again."""


class UpstreamError(KnowledgeEngineError):
    """Another part or service does not answer; trying again later may help."""


class IntegrityError(KnowledgeEngineError):
    """Stored bytes are not what was stored."""


class CredentialsError(KnowledgeEngineError):
    """Our own credentials were refused elsewhere."""


KINDS: dict[str, type[KnowledgeEngineError]] = {
    kind.__name__: kind
    for kind in (
        KnowledgeEngineError,
        InvalidSpecError,
        NotFoundError,
        AlreadyExistsError,
        StateError,
        ConflictError,
        AuthenticationError,
        AccessError,
        CapacityError,
        UpstreamError,
        IntegrityError,
        CredentialsError,
    )
}


def from_dict(data: dict[str, Any]) -> KnowledgeEngineError:
    """The inverse of `KnowledgeEngineError.to_dict`."""
    return KINDS[data["kind"]](
        data["message"],
        reason=Reason(data["reason"]),
        violations=[Violation(*violation) for violation in data["violations"]],
        retry_after_seconds=data["retry_after_seconds"],
        **data["metadata"],
    )
