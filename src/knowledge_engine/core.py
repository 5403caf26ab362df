"""The vocabulary: names, states, specs, events and results. No I/O; nothing here knows a transport or a store.

Ids inside are bare (`demo`, version 3); `server/convert.py` turns them into resource names (`models/demo/versions/3`).
Every spec carries its defaults and its bounds, so that what is stored with a job is the whole truth of it.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from knowledge_engine.errors import InvalidSpecError, Reason, Violation

BASE = "base"
"""The reserved name of the deployment's own base model."""

MAX_SEED = 2**32 - 1
MAX_MESSAGES = 200
MAX_TOOLS = 128
MAX_TOOLS_CHARACTERS = 131_072
"""Names, descriptions and parameters of all tools together, and the arguments of one call."""
MAX_CHOICES = 8
"""Answers to one question: each takes a place among those under way."""
MAX_SCHEMA_CHARACTERS = 65_536
MAX_REGEX_CHARACTERS = 4_096
MAX_UPLOAD_BYTES = 2 * 2**30
MAX_QUEUED_JOBS = 64

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")

Name = Annotated[str, StringConstraints(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,62}\z")]
"""A model, dataset, job or base-model name; safe as a path part."""


VersionName = Annotated[str, StringConstraints(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,62}:[1-9][0-9]{0,8}\z")]
"""A version of a model, `model:3`."""


def split_version(name: str) -> tuple[str, int]:
    """The model and the number of a `VersionName`."""
    model, _, version = name.partition(":")
    return model, int(version)


def is_name(text: str) -> bool:
    """Whether `text` may name a model, dataset, job or base model."""
    return _NAME.fullmatch(text) is not None


def utc_now() -> datetime:
    return datetime.now(UTC)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# --- jobs ---------------------------------------------------------------------------------------------------------


class JobState(StrEnum):
    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    PAUSED = "PAUSED"
    CANCELLING = "CANCELLING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def is_terminal(self) -> bool:
        return self in TERMINAL_STATES


TERMINAL_STATES = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})

LEGAL_TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.PAUSED, JobState.CANCELLED}),
    JobState.RUNNING: frozenset(
        {JobState.QUEUED, JobState.PAUSED, JobState.CANCELLING, JobState.SUCCEEDED, JobState.FAILED}
    ),
    JobState.PAUSED: frozenset({JobState.QUEUED, JobState.CANCELLED}),
    JobState.CANCELLING: frozenset({JobState.CANCELLED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
}


class LrSchedulerType(StrEnum):
    LINEAR = "linear"
    COSINE = "cosine"
    CONSTANT = "constant"


class DifficultyLevel(StrEnum):
    SIMPLE = "simple"
    MEDIUM = "medium"
    COMPLEX = "complex"


class SplitBy(StrEnum):
    """What must not be on both sides of a split: a conversation and its near-duplicates, or a product as well."""

    CONVERSATION = "conversation"
    PRODUCT = "product"


class Truncation(StrEnum):
    """What becomes of a conversation that is longer than `max_length`."""

    ERROR = "error"
    DROP = "drop"
    KEEP_LAST_TURNS = "keep_last_turns"


class TrainingMethod(StrEnum):
    """Supervised fine-tuning, or direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290)."""

    SFT = "sft"
    DPO = "dpo"

    @property
    def loss_unit(self) -> str:
        """What the loss is told in."""
        return "nats per preference" if self is TrainingMethod.DPO else "nats per token"


class GenerationProvider(StrEnum):
    """Who puts planned conversations into words."""

    OFFLINE = "offline"
    OPENAI = "openai"


class LoraConfig(_Frozen):
    """The shape of a LoRA adapter (Hu et al. 2021, arXiv 2106.09685), with `use_rslora` scaled by alpha / sqrt(rank)
    instead of alpha / rank (Kalajdzievski 2023, arXiv 2312.03732), with `use_dora` the length of every row of a weight
    learned apart from its direction (Liu et al. 2024, arXiv 2402.09353)."""

    rank: int = Field(default=16, ge=1, le=256)
    alpha: int = Field(default=32, ge=1, le=1024)
    dropout: float = Field(default=0.05, ge=0, lt=1)
    target_modules: tuple[Annotated[str, StringConstraints(min_length=1, max_length=128)], ...] = Field(
        default=(), max_length=64
    )
    use_rslora: bool = False
    use_dora: bool = False


DEFAULT_BETA = 0.1


class TrainingSpec(_Frozen):
    """A fine-tuning run; names and meanings follow TRL, PEFT and transformers.

    `num_train_epochs` and `max_steps` exclude each other; with neither, three epochs. `start_from` is a version to go
    on from, as `model:3`.
    """

    base_model: Name = BASE
    dataset: Name
    model: Name
    method: TrainingMethod = TrainingMethod.SFT
    beta: float | None = Field(default=None, gt=0, le=10)
    start_from: VersionName | None = None
    use_qlora: bool = True
    lora: LoraConfig = LoraConfig()
    learning_rate: float = Field(default=2e-4, gt=0, le=1)
    lr_scheduler_type: LrSchedulerType = LrSchedulerType.LINEAR
    warmup_ratio: float = Field(default=0.03, ge=0, le=0.5)
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    max_grad_norm: float = Field(default=1.0, ge=0)
    num_train_epochs: float | None = Field(default=None, gt=0, le=50)
    max_steps: int | None = Field(default=None, ge=1, le=1_000_000)
    per_device_train_batch_size: int = Field(default=1, ge=1, le=64)
    gradient_accumulation_steps: int = Field(default=1, ge=1, le=256)
    max_length: int | None = Field(default=None, ge=16, le=131_072)
    truncation: Truncation = Truncation.ERROR
    eval_dataset: Name | None = None
    eval_split: float = Field(default=0.1, ge=0, le=0.5)
    split_by: SplitBy = SplitBy.CONVERSATION
    eval_steps: int = Field(default=0, ge=0, le=1_000_000)
    logging_steps: int = Field(default=1, ge=1, le=10_000)
    save_steps: int = Field(default=0, ge=0, le=1_000_000)
    auto_find_batch_size: bool = False
    neftune_noise_alpha: float = Field(default=0.0, ge=0, le=100)
    load_best_model_at_end: bool = False
    early_stopping_patience: int = Field(default=0, ge=0, le=1000)
    seed: int = Field(default=42, ge=0, le=MAX_SEED)

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        """The defaults that depend on other fields."""
        if not isinstance(data, dict):
            return data
        filled = dict(data)
        if filled.get("eval_dataset") and filled.get("eval_split") is None:
            filled["eval_split"] = 0.0
        if filled.get("method") == TrainingMethod.DPO and filled.get("beta") is None:
            filled["beta"] = DEFAULT_BETA
        return filled

    @property
    def evaluates(self) -> bool:
        """Whether there is anything to evaluate on."""
        return bool(self.eval_split or self.eval_dataset)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.eval_dataset and self.eval_split:
            raise ValueError("set eval_dataset or eval_split, not both")
        if self.split_by is not SplitBy.CONVERSATION and not self.eval_split:
            raise ValueError("split_by says what to hold out, but eval_split is 0")
        if self.num_train_epochs is not None and self.max_steps is not None:
            raise ValueError("set num_train_epochs or max_steps, not both")
        if self.model == BASE:
            raise ValueError(f"the model name {BASE!r} is reserved")
        if self.beta is not None and self.method is not TrainingMethod.DPO:
            raise ValueError("beta is for method dpo")
        if self.method is TrainingMethod.DPO and (self.split_by is SplitBy.PRODUCT or self.eval_dataset):
            raise ValueError("preferences are held out with eval_split, near-duplicates on one side")
        if self.method is TrainingMethod.DPO and self.truncation is Truncation.KEEP_LAST_TURNS:
            raise ValueError("keep_last_turns is for conversations: both answers of a preference keep the same prompt")
        if not self.eval_steps and (self.load_best_model_at_end or self.early_stopping_patience):
            raise ValueError("load_best_model_at_end and early_stopping_patience need eval_steps above 0")
        if self.eval_steps and not self.evaluates:
            raise ValueError("eval_steps needs held-out conversations: an eval_split above 0, or an eval_dataset")
        return self


class PreviewSpec(_Frozen):
    """Which conversations to look at, as a training with the same fields would see them."""

    name: Name
    base_model: Name = BASE
    max_length: int | None = Field(default=None, ge=16, le=131_072)
    truncation: Truncation = Truncation.ERROR


class GenerationSpec(_Frozen):
    """Conversations to generate; `catalogue`, `dataset` and `provider` are filled in before the job is stored."""

    catalogue: Name | None = None
    dataset: Name | None = None
    num_conversations: int = Field(ge=10, le=100_000)
    topics: tuple[Annotated[str, StringConstraints(min_length=1, max_length=100, strip_whitespace=True)], ...] = Field(
        default=(), max_length=32
    )
    difficulty_level: DifficultyLevel = DifficultyLevel.MEDIUM
    include_product_data: bool = True
    seed: int = Field(default=42, ge=0, le=MAX_SEED)
    provider: GenerationProvider | None = None


class HeldOutComparison(_Frozen):
    """Base and tuned model on the same held-out rows, in one precision; losses in nats per assistant token, or with DPO
    per preference."""

    base_loss: float
    tuned_loss: float
    num_conversations: int
    num_tokens: int
    precision: str


class TrainingResult(_Frozen):
    type: Literal["training"] = "training"
    model: Name
    version: int
    digest: str
    train_loss: float
    comparison: HeldOutComparison | None
    num_steps: int
    num_tokens: int
    tokens_per_second: float
    training_seconds: float
    peak_memory_bytes: int
    published_step: int = 0


class GenerationUsage(_Frozen):
    """What a model's replies took, as they told it; `cost_usd` is None where no price is known."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    num_requests: int = 0
    num_retries: int = 0
    cost_usd: float | None = None


class GenerationResult(_Frozen):
    type: Literal["generation"] = "generation"
    dataset: Name
    digest: str
    num_conversations: int
    num_rejected: int
    rejections: dict[str, int]
    provider: str
    language_model: str = ""
    usage: GenerationUsage | None = None


JobSpec = TrainingSpec | GenerationSpec
JobResult = Annotated[TrainingResult | GenerationResult, Field(discriminator="type")]


class JobKind(StrEnum):
    TRAINING = "training"
    GENERATION = "generation"


class TrackerRun(_Frozen):
    """A run in an experiment tracker; `url` is empty for an offline run."""

    id: str
    url: str = ""


# --- outside services ---------------------------------------------------------------------------------------------


class Service(StrEnum):
    """What the service leans on."""

    ENGINE = "engine"
    STORE = "store"
    TRACKER = "tracker"
    OPENAI = "openai"
    S3 = "s3"
    HUB = "hub"


class ServiceState(StrEnum):
    """`degraded`: it answers, but the last work with it did not go well, or it is not known yet whether it answers."""

    OK = "ok"
    DEGRADED = "degraded"
    DOWN = "down"
    NOT_CONFIGURED = "not_configured"


HEALTH_WORDS = {"SERVING": ServiceState.OK, "UNKNOWN": ServiceState.DEGRADED, "NOT_SERVING": ServiceState.DOWN}
"""What the words of the gRPC health protocol mean for a `Service`; one that is not set up is not listed there."""


# --- events -------------------------------------------------------------------------------------------------------


class StateChange(_Frozen):
    type: Literal["state_change"] = "state_change"
    state: JobState
    attempt: int = 0
    message: str = ""
    error: dict[str, Any] | None = None


class Progress(_Frozen):
    """How far a job has come; a field is None where it does not apply. Losses in nats per trained token."""

    type: Literal["progress"] = "progress"
    phase: str
    step: int | None = None
    total_steps: int | None = None
    epoch: float | None = None
    num_examples: int | None = None
    examples_per_second: float | None = None
    loss: float | None = None
    eval_loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    memory_bytes: int | None = None

    def over(self, before: Self | None) -> Self:
        """This progress with what it does not say of the training itself taken from the one before: a job that is
        publishing still knows its loss."""
        if before is None:
            return self
        kept = {"epoch", "num_examples", "loss", "eval_loss", "learning_rate"}
        return self.model_copy(update={field: getattr(before, field) for field in kept if getattr(self, field) is None})


class Checkpoint(_Frozen):
    """From here the job goes on after an interruption; `step` optimizer steps are behind it."""

    type: Literal["checkpoint"] = "checkpoint"
    step: int
    size_bytes: int


class LogLine(_Frozen):
    type: Literal["log"] = "log"
    message: str


class JobWarning(_Frozen):
    type: Literal["warning"] = "warning"
    reason: str
    message: str


class ResultEvent(_Frozen):
    type: Literal["result"] = "result"
    result: JobResult


EventPayload = Annotated[
    StateChange | Progress | Checkpoint | LogLine | JobWarning | ResultEvent, Field(discriminator="type")
]


class JobEvent(_Frozen):
    """One entry of a job's log; `sequence` counts from 1 without a gap, the terminal state is always the last."""

    job_id: Name
    sequence: int
    create_time: datetime
    payload: EventPayload

    @property
    def is_last(self) -> bool:
        return isinstance(self.payload, StateChange) and self.payload.state.is_terminal


class Job(_Frozen):
    id: Name
    kind: JobKind
    state: JobState
    spec: JobSpec
    result: JobResult | None = None
    error: dict[str, Any] | None = None  # KnowledgeEngineError.to_dict()
    progress: Progress | None = None
    create_time: datetime
    start_time: datetime | None = None
    end_time: datetime | None = None
    attempt: int = 0
    creator: str = ""
    tracker_run: TrackerRun | None = None
    last_sequence: int = 0
    pause_requested: bool = False
    """It is still running and will be PAUSED as soon as what it has done is safe."""
    queue_position: int | None = None
    """From 1, while it is QUEUED: how many of its kind would start before it, and itself."""
    checkpoint_step: int | None = None
    """Optimizer steps behind its newest checkpoint."""


# --- datasets and models ------------------------------------------------------------------------------------------


class DatasetKind(StrEnum):
    CONVERSATIONS = "conversations"
    CATALOGUE = "catalogue"
    PREFERENCES = "preferences"
    EVALUATION = "evaluation"


class DatasetFormat(StrEnum):
    JSONL = "jsonl"
    CSV = "csv"
    SHAREGPT = "sharegpt"
    ALPACA = "alpaca"


class Dataset(_Frozen):
    """A named, immutable set of rows, stored as canonical JSONL; `digest` is over those bytes."""

    name: Name
    kind: DatasetKind
    digest: str
    num_rows: int
    size_bytes: int
    create_time: datetime
    parents: tuple[str, ...] = ()
    job_id: str = ""


class PreviewedToken(NamedTuple):
    """One token; the texts of a row's tokens, joined, are its rendered text. `text` is empty where a token only ends a
    character that the one before has begun."""

    id: int
    text: str
    is_trained: bool
    is_control: bool


class PreviewedAnswer(NamedTuple):
    """A preference's prompt with its rejected answer, as the chat template writes it."""

    text: str
    tokens: tuple[PreviewedToken, ...]

    @property
    def num_trained_tokens(self) -> int:
        return sum(token.is_trained for token in self.tokens)


class PreviewedRow(NamedTuple):
    """A row, counted from 1; a preference with its chosen answer, and beside it with the rejected one. `problem` says
    why it could not be trained on, `change` what truncation does to it; a row without tokens cannot be rendered, or is
    dropped."""

    row: int
    text: str
    tokens: tuple[PreviewedToken, ...]
    problem: str = ""
    change: str = ""
    rejected: PreviewedAnswer | None = None

    @property
    def num_trained_tokens(self) -> int:
        return sum(token.is_trained for token in self.tokens)


class PreviewIssue(NamedTuple):
    """What is wrong with a row, or done to it; counted from 1."""

    row: int
    problem: str


class TokenLengths(NamedTuple):
    """How long the rows are that can be rendered, in tokens; all 0 without any."""

    min: int
    median: int
    p95: int
    max: int
    mean: float


class LengthBin(NamedTuple):
    """How many rows have at most so many tokens, and more than the bin before."""

    max_tokens: int
    num_rows: int


class NearDuplicate(NamedTuple):
    """A row that says what an earlier one says, both counted from 1."""

    row: int
    of_row: int


class DatasetPreview(NamedTuple):
    """What becomes of all rows. `issues`, `changes` and `near_duplicates` are the first ones of their number."""

    num_rows: int
    num_tokens: int
    num_trained_tokens: int
    lengths: TokenLengths
    length_bins: tuple[LengthBin, ...]
    num_messages: Mapping[str, int]
    num_learned_messages: int
    num_issues: int
    issues: tuple[PreviewIssue, ...]
    num_changes: int
    changes: tuple[PreviewIssue, ...]
    num_near_duplicates: int
    near_duplicates: tuple[NearDuplicate, ...]


class ModelVersion(_Frozen):
    """One published adapter; `digest` is the sha256 of its manifest."""

    model: Name
    version: int
    digest: str
    base_model: Name
    base_digest: str
    base_source: str = ""
    base_revision: str = ""
    dataset_digest: str
    eval_dataset_digest: str = ""
    start_from_digest: str = ""
    chat_template_digest: str
    job_id: str
    spec: TrainingSpec
    comparison: HeldOutComparison | None
    training_precision: str
    size_bytes: int
    create_time: datetime


class Model(_Frozen):
    name: Name
    create_time: datetime
    latest_version: ModelVersion | None
    num_versions: int


# --- inference ----------------------------------------------------------------------------------------------------


ToolName = Annotated[str, StringConstraints(pattern=r"\A[A-Za-z0-9_-]{1,64}\z")]
"""As OpenAI has it."""


class Tool(_Frozen):
    """A function that the assistant may call. `parameters`, the schema of its arguments, is JSON text, as its
    properties have an order; empty where it takes none."""

    name: ToolName
    description: str = ""
    parameters: str = ""


class ToolCall(_Frozen):
    """A call that the assistant makes. `arguments` is the JSON text of an object. By its `id` a result names it;
    without one results come in the order of the calls."""

    id: str = Field(default="", max_length=256)
    name: ToolName
    arguments: str


class Message(_Frozen):
    """What is said: calls of tools as well, which may stand without words, and in the role `tool` what one of them
    gave. Which call that is, and which tools there are, `tools.check_calls` looks at."""

    role: Literal["system", "user", "assistant", "tool"]
    tool_calls: tuple[ToolCall, ...] = Field(default=(), max_length=MAX_TOOLS, exclude_if=operator.not_)
    tool_call_id: str = Field(default="", exclude_if=operator.not_)
    content: str = Field(default="", validate_default=True)

    @field_validator("content")
    @classmethod
    def _check_content(cls, content: str, info: ValidationInfo) -> str:
        if not content and not info.data.get("tool_calls"):
            raise ValueError("must not be empty")
        return content

    @property
    def is_learned(self) -> bool:
        """Whether a training learns to say it."""
        return self.role == "assistant"


class Turn(Message):
    """A message to learn from; `weight` 0, as OpenAI's fine-tuning has it, shows it and learns nothing from it."""

    weight: Literal[0, 1] = 1

    @property
    def is_learned(self) -> bool:
        return super().is_learned and self.weight == 1


class _Sampling(_Frozen):
    """How the next token is chosen (`inference/sampling.py` has the formulas), of what form the answer is, and what is
    told of it. `temperature` 0 is greedy, `top_k` 0 considers all tokens; `json_schema` is JSON text, as its properties
    have an order."""

    temperature: float = Field(default=0.7, ge=0, le=2)
    top_p: float = Field(default=0.9, ge=0, le=1)
    top_k: int = Field(default=0, ge=0, le=1_000_000)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0, le=2)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    stop: tuple[Annotated[str, StringConstraints(min_length=1, max_length=256)], ...] = Field(default=(), max_length=8)
    seed: int | None = Field(default=None, ge=0, le=2**63 - 1)
    json_schema: str | None = Field(default=None, min_length=1, max_length=MAX_SCHEMA_CHARACTERS)
    regex: str | None = Field(default=None, min_length=1, max_length=MAX_REGEX_CHARACTERS)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.json_schema is not None and self.regex is not None:
            raise ValueError("an answer takes the form of json_schema or of regex, not of both")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs")
        return self


class SamplingParams(_Sampling):
    """What the engine is told: everything of a request but the prompt."""

    max_tokens: int = Field(ge=1)


class GenerationInput(_Sampling):
    """A conversation to go on with. `model` and `version` say who answers; version None is the newest ready one.
    Whether `tools` and the calls in `messages` are sound `tools.check_calls` says."""

    model: Name
    version: int | None = None
    messages: tuple[Message, ...] = Field(min_length=1, max_length=MAX_MESSAGES)
    tools: tuple[Tool, ...] = Field(default=(), max_length=MAX_TOOLS)
    context: dict[str, Any] | None = None
    max_tokens: int | None = Field(default=None, ge=1, le=131_072)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.n > 1 and self.temperature == 0:
            raise ValueError("n answers at temperature 0 would all be the same")
        if any(message.role == "system" for message in self.messages[1:]):
            raise ValueError("only the first message may be a system message")
        if self.messages[-1].role not in {"user", "tool"}:
            raise ValueError("the last message must be the user's, or a tool's result")
        return self


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"


class TokenLogprob(NamedTuple):
    """A token and the natural logarithm of the probability that the model itself gave it: before temperature, penalties
    and form. `top` holds the likeliest in its place."""

    token_id: int
    text_bytes: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


class Completion(_Frozen):
    """The facts of an answer, or of several to one question. `finish_reasons` has one for each, `completion_tokens`
    counts those of all. Times in seconds from the server's receipt of the request."""

    finish_reasons: tuple[FinishReason, ...]
    prompt_tokens: int
    completion_tokens: int
    model: Name
    version: int | None
    digest: str
    time_to_first_token_seconds: float
    total_seconds: float


# --- names and checks ---------------------------------------------------------------------------------------------


class Page(NamedTuple):
    """Which slice of a list: `size` entries after the entry `after` (opaque to callers, None from the start)."""

    size: int
    after: str | None


def parse_name(text: str, *collections: str, field: str = "name") -> tuple[str, ...]:
    """Takes a resource name apart: `parse_name("models/x/versions/3", "models", "versions")` is `("x", "3")`.

    Raises:
        InvalidSpecError: NAME_INVALID when the text has another shape or an id that is no name.
    """
    parts = text.split("/")
    ids = tuple(parts[1::2])
    if tuple(parts[0::2]) != collections or len(ids) != len(collections) or not all(map(is_name, ids)):
        shape = "/".join(f"{collection}/{{{collection.rstrip('s')}}}" for collection in collections)
        description = f"must look like {shape}, each id matching {_NAME.pattern}"
        raise InvalidSpecError(
            f"{field} {description}", reason=Reason.NAME_INVALID, violations=[Violation(field, description)]
        )
    return ids


def invalid_spec(error: ValidationError, prefix: str = "") -> InvalidSpecError:
    """A pydantic failure as ours, each violation under its path in the contract.

    `prefix` is the path of the validated message, such as `spec`.
    """
    items = error.errors(include_url=False, include_input=False, include_context=False)
    # A list whose items are wrong is also reported as too short; the items say it better.
    deeper = {item["loc"][:depth] for item in items for depth in range(1, len(item["loc"]))}
    violations = [
        Violation(_path(prefix, item["loc"]), item["msg"].removeprefix("Value error, "))
        for item in items
        if item["loc"] not in deeper
    ]
    first = violations[0]
    return InvalidSpecError(
        f"{first.field}: {first.description}" if first.field else first.description, violations=violations
    )


def _path(prefix: str, location: Iterable[str | int]) -> str:
    path = prefix
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path


# --- running a job ------------------------------------------------------------------------------------------------


class StopReason(StrEnum):
    """Why an attempt must end before its work is done. What is worth keeping is kept for all but CANCELLED and
    SUPERSEDED."""

    CANCELLED = "cancelled"
    PAUSED = "paused"
    INTERRUPTED = "interrupted"
    SUPERSEDED = "superseded"
    RETRY = "retry"


class JobStopped(Exception):
    """The running attempt must end now. Raised by `JobContext.check`; also by work that wants a fresh process to go on
    in (`RETRY`, with a message for the job's log)."""

    def __init__(self, reason: StopReason, message: str = "") -> None:
        super().__init__(message or reason.value)
        self.reason = reason
        self.message = message


class JobContext(Protocol):
    """What one attempt of a job sees of the world: it reports, and asks whether it should go on."""

    @property
    def job(self) -> Job: ...

    @property
    def work_dir(self) -> Path:
        """A private folder of the job, kept over attempts."""

    def report(self, progress: Progress) -> None:
        """Records a progress event."""

    def log(self, message: str) -> None:
        """Records a line of the job's log."""

    def warn(self, reason: str, message: str) -> None:
        """Records a warning; `reason` is UPPER_SNAKE_CASE."""

    def track(self, run: TrackerRun) -> None:
        """Records where the run is tracked."""

    def expect_memory(self, memory_bytes: int) -> None:
        """Records what the job will take of its device, once that is known better than at its creation."""

    def checkpointed(self, step: int, size_bytes: int) -> None:
        """Records a durable checkpoint: the job's crashes before it count no more."""

    def observe(self, service: Service, trouble: str | None) -> None:
        """Records how the latest work with an outside service went: None for well, else one sentence without secrets.
        Health tells it on."""

    def at_end(self, call: Callable[[JobState | None], None]) -> None:
        """Has `call` run when it is decided how the attempt ended: with the state that the job is in then, QUEUED after
        an interruption, or None where this attempt has no say in it any more. It can report nothing then."""

    def check(self) -> None:
        """Returns while the attempt may go on; cheap, called at every step.

        Raises:
            JobStopped: it must end.
        """
