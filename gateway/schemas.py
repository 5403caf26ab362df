"""What REST clients send, and the shapes of the first release that they read; pydantic, for checking and for OpenAPI.

Requests are strict: a wrong JSON type, an unknown key, NaN or an infinity is refused. Only fields that the caller gave
are passed on, so that every default has one home, the server's specs; the ones here are the same and are documentation.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, WithJsonSchema, field_validator

from knowledge_engine.core import ServiceState

State = Literal["QUEUED", "RUNNING", "CANCELLING", "SUCCEEDED", "FAILED", "CANCELLED", "PAUSED"]
JobStatus = Literal["starting", "preparing_data", "training", "completed", "failed", "cancelled"]
FinishReason = Literal["stop", "length"]
Time = Annotated[str, WithJsonSchema({"type": "string", "format": "date-time"})]
"""RFC 3339, UTC."""

ResourceId = Annotated[str, Field(min_length=1, max_length=1024)]
"""A name; the server says which are valid."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


# --- requests -----------------------------------------------------------------------------------------------------


class LoraSettings(Strict):
    """The shape of the LoRA adapter (arXiv 2106.09685)."""

    rank: int = Field(16, ge=1, le=256, description="Rank r of the update matrices.")
    alpha: int = Field(32, ge=1, le=1024, description="Scale: the update is multiplied by alpha / rank.")
    dropout: float = Field(0.05, ge=0, lt=1, description="Dropout before the first matrix.")
    target_modules: list[Annotated[str, Field(min_length=1, max_length=128)]] = Field(
        [], max_length=64, description="Linear modules to adapt; all but the head when empty."
    )
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) instead (arXiv 2312.03732).")
    use_dora: bool = Field(False, description="Learn lengths apart from directions (arXiv 2402.09353).")


class TrainingConfig(Strict):
    """How to train."""

    epochs: int = Field(3, ge=1, le=50, description="Passes over the training set; refused beside `max_steps`.")
    learning_rate: float = Field(2e-4, gt=0, le=1, description="Peak learning rate of AdamW.")
    batch_size: int = Field(1, ge=1, le=32, description="Conversations in one forward pass at most.")
    max_length: int = Field(
        2048,
        ge=512,
        le=4096,
        description="Longest conversation in tokens; when absent, the base's context where that is smaller.",
    )
    use_qlora: bool = Field(True, description="Load the base in 4-bit NF4 with double quantisation.")
    lora: LoraSettings | None = Field(None, description="The adapter's shape.")
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = Field("linear", description="Shape after warm-up.")
    warmup_ratio: float = Field(0.03, ge=0, le=0.5, description="Share of the steps over which the rate rises.")
    weight_decay: float = Field(0.0, ge=0, le=1, description="AdamW's decoupled weight decay.")
    max_grad_norm: float = Field(1.0, ge=0, description="The gradient norm is clipped to this; 0 turns it off.")
    max_steps: int | None = Field(None, ge=1, le=1_000_000, description="Optimizer steps, instead of `epochs`.")
    gradient_accumulation_steps: int = Field(1, ge=1, le=256, description="Forward passes in one optimizer step.")
    method: Literal["sft", "dpo"] = Field("sft", description="Supervised, or on preferences (arXiv 2305.18290).")
    beta: float | None = Field(None, gt=0, le=10, description="DPO: how closely it stays to the base; 0.1 when absent.")
    start_from: str | None = Field(
        None, min_length=1, max_length=128, description="The version to go on from, `name:version`."
    )
    truncation: Literal["error", "drop", "keep_last_turns"] = Field(
        "error", description="What becomes of longer conversations."
    )
    eval_dataset: ResourceId | None = Field(None, description="An evaluation to evaluate on, instead of `eval_split`.")
    eval_split: float = Field(
        0.1, ge=0, le=0.5, description="Share of the conversations held out; 0 holds out none, as does `eval_dataset`."
    )
    split_by: Literal["conversation", "product"] = Field(
        "conversation", description="What must not be on both sides: near-duplicates, or products as well."
    )
    load_best_model_at_end: bool = Field(False, description="Publish the step with the lowest evaluation loss.")
    early_stopping_patience: int = Field(
        0, ge=0, le=1000, description="Stop after so many evaluations without a new lowest loss; 0 never."
    )
    eval_steps: int = Field(0, ge=0, le=1_000_000, description="Evaluate every so many steps; 0 only at the end.")
    logging_steps: int = Field(1, ge=1, le=10_000, description="Report progress every so many steps.")
    seed: int = Field(42, ge=0, le=2**32 - 1, description="Seed of split, order, initialisation and dropout.")
    save_steps: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="Checkpoint every so many steps; 0 every few minutes, as the deployment says.",
    )
    auto_find_batch_size: bool = Field(
        False,
        description="When memory runs out go on once with half of `batch_size` and twice the accumulation, or of 1 "
        "with gradient checkpointing.",
    )
    neftune_noise_alpha: float = Field(
        0.0, ge=0, le=100, description="Noise on the embeddings while training (arXiv 2310.05914); 0 adds none."
    )


class TrainRequest(Strict):
    """A fine-tuning run."""

    dataset_name: ResourceId = Field(description="The conversations to learn from.")
    base_model: ResourceId | None = Field(None, description="`base` (the default) or one of the operator's bases.")
    training_config: TrainingConfig | None = Field(None, description="How to train.")
    model_name: ResourceId | None = Field(
        None, description="The model to publish a new version of; the name of the dataset when absent."
    )


class GenerateDataRequest(Strict):
    """Training conversations to generate from a catalogue."""

    number_of_conversations: int = Field(ge=10, le=100_000, description="Conversations to produce.")
    topics: list[Annotated[str, Field(min_length=1, max_length=100)]] | None = Field(
        None, max_length=32, description="Only products that a topic matches are talked about; all when absent."
    )
    difficulty_level: Literal["simple", "medium", "complex"] = Field("medium", description="How demanding they are.")
    include_product_data: bool = Field(True, description="Show the candidate products to the assistant.")
    dataset_name: ResourceId | None = Field(None, description="The dataset to create; a name is chosen when absent.")
    catalogue: ResourceId | None = Field(
        None, description="The catalogue; when absent the newest uploaded one, else the shipped demo catalogue."
    )
    seed: int = Field(42, ge=0, le=2**32 - 1, description="The same seed and catalogue give the same plans.")
    provider: Literal["offline", "openai"] | None = Field(
        None, description="Who puts them into words; when absent OpenAI if the service has a key for it, else offline."
    )


class ToolFunction(Strict):
    """What a tool is, and takes."""

    name: ResourceId = Field(description="1 to 64 letters, digits, underscores or hyphens; no two alike.")
    description: str | None = Field(None, description="What it does.")
    parameters: dict[str, Any] | None = Field(
        None, description="The JSON schema of its arguments; null where it takes none."
    )


class Tool(Strict):
    """A function that the assistant may call, as OpenAI has it."""

    type: Literal["function"]
    function: ToolFunction


class CalledFunction(Strict):
    """The function that is called, and with what."""

    name: ResourceId = Field(description="One of the tools.")
    arguments: str | dict[str, Any] = Field(description="An object, or its JSON text.")


class ToolCall(Strict):
    """A call of a tool."""

    id: str | None = Field(None, max_length=256, description="By which its result names it.")
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(Strict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"] = Field(
        description="Who speaks; `system` only first, `tool` for what a call gave."
    )
    tool_calls: list[ToolCall] | None = Field(None, max_length=128, description="What the assistant called.")
    tool_call_id: str | None = Field(
        None, max_length=256, description="The call that a `tool` message answers; absent where calls have no id."
    )
    content: str | None = Field(
        None, description="The text; only beside `tool_calls` null or empty.", validate_default=True
    )

    @field_validator("content")
    @classmethod
    def _check_content(cls, content: str | None, info: ValidationInfo) -> str | None:
        if not content and not info.data.get("tool_calls"):
            raise ValueError("must not be empty")
        return content


class InferenceRequest(Strict):
    """A conversation to go on with."""

    messages: list[ChatMessage] = Field(
        min_length=1, max_length=200, description="The last one is the user's, or a tool's result."
    )
    tools: list[Tool] = Field(
        [],
        max_length=128,
        description="What the assistant may call. A call comes as text, the way the base's chat template writes it; "
        "to go on, send it back as `tool_calls`. A base whose template does not take tools refuses them.",
    )
    max_tokens: int = Field(
        500, ge=1, le=2000, description="Most tokens to produce; when absent, what is left of the context if less."
    )
    temperature: float = Field(0.7, ge=0, le=2, description="Randomness; 0 always takes the likeliest token.")
    top_p: float = Field(0.9, ge=0, le=1, description="Only the likeliest tokens that together reach this are used.")
    context: dict[str, Any] | None = Field(
        None,
        description="What the assistant may know beside the conversation; every key is rendered into the prompt, "
        "`products` as a product list. An open object, nested at most 28 deep.",
    )
    top_k: int = Field(0, ge=0, le=1_000_000, description="Only so many of the likeliest tokens; 0 considers all.")
    stop: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field(
        [], max_length=8, description="The answer ends before the first of these."
    )
    seed: int | None = Field(None, ge=0, le=2**63 - 1, description="The same seed gives the same answer.")
    min_p: float = Field(0, ge=0, le=1, description="Only tokens at least this share as likely as the likeliest.")
    repetition_penalty: float = Field(
        1, gt=0, le=2, description="Above 1 makes tokens of the prompt and of the answer so far less likely."
    )
    presence_penalty: float = Field(0, ge=-2, le=2, description="Taken from the logits of tokens that the answer has.")
    frequency_penalty: float = Field(0, ge=-2, le=2, description="The same, for each time that the answer has them.")
    json_schema: dict[str, Any] | None = Field(
        None,
        description="The answer is JSON that this schema accepts, its properties in this order, unless max_tokens or a "
        "stop string cuts it off. A keyword that cannot be kept is refused, as is `regex` beside it.",
    )
    regex: str | None = Field(
        None, min_length=1, max_length=4_096, description="The answer is text that this expression matches as a whole."
    )
    n: int = Field(1, ge=1, le=8, description="How many answers; needs a temperature above 0.")
    logprobs: bool = Field(False, description="Tell how likely each token was.")
    top_logprobs: int = Field(0, ge=0, le=20, description="And the likeliest in its place; needs `logprobs`.")
    stream: bool = Field(
        False,
        description="Answer as server-sent events: `delta` {text; choice where n is not 1; logprobs where asked for}, "
        "then `completion`.",
    )


# --- the first release's answers ----------------------------------------------------------------------------------


class TrainResponse(BaseModel):
    """A stored fine-tuning run."""

    job_id: str
    status: JobStatus
    estimated_duration: str | None = Field(description="Null; `/train/estimate` tells it, once a run was measured.")
    wandb_url: str | None = Field(description="The run's page at the tracker; null for an offline run.")
    model_name: str = Field(description="The model that will get a new version.")


class TrainingMetrics(BaseModel):
    """The newest figures; null where they do not apply or are not known yet."""

    current_loss: float | None = Field(
        description="Mean loss per trained token, with DPO per preference, in nats: of the last step, or of the last "
        "epoch at the end."
    )
    learning_rate: float | None
    throughput: float | None = Field(description="Samples per second.")
    samples_processed: int | None
    epoch: float | None


class TrainingStatusResponse(BaseModel):
    """How far a job is."""

    job_id: str
    status: JobStatus = Field(description="A paused job keeps the word it had; `state` tells it.")
    progress: float = Field(ge=0, le=100, description="Percent of its steps.")
    started_at: Time | None
    elapsed_time: str = Field(description="Such as `2 minutes 5 seconds`.")
    estimated_remaining: str | None
    metrics: TrainingMetrics
    error: str | None
    state: State | None = Field(description="The state as `GET /jobs/{id}` tells it, such as `PAUSED`.")


class MemoryRange(BaseModel):
    """Bytes of memory."""

    low_bytes: int = Field(description="Less would surprise us.")
    expected_bytes: int
    high_bytes: int = Field(description="More would surprise us.")


class FittingConfig(BaseModel):
    """A `training_config` to send; what is absent stays at its default."""

    epochs: int | None = None
    learning_rate: float | None = None
    batch_size: int | None = None
    max_length: int | None = None
    use_qlora: bool | None = None
    lora: dict[str, Any] | None = None
    lr_scheduler_type: Literal["linear", "cosine", "constant"] | None = None
    warmup_ratio: float | None = None
    weight_decay: float | None = None
    max_grad_norm: float | None = None
    max_steps: int | None = None
    gradient_accumulation_steps: int | None = None
    method: Literal["sft", "dpo"] | None = None
    beta: float | None = None
    start_from: str | None = None
    truncation: Literal["error", "drop", "keep_last_turns"] | None = None
    eval_dataset: str | None = None
    eval_split: float | None = None
    split_by: Literal["conversation", "product"] | None = None
    load_best_model_at_end: bool | None = None
    early_stopping_patience: int | None = None
    eval_steps: int | None = None
    logging_steps: int | None = None
    seed: int | None = None
    save_steps: int | None = None
    auto_find_batch_size: bool | None = None
    neftune_noise_alpha: float | None = None


class TrainEstimateResponse(BaseModel):
    """What a fine-tuning run would take, found out without loading anything."""

    memory: MemoryRange | None = Field(description="Largest resident memory of the worker on its device.")
    device: str = Field(description="`cpu` or `cuda`.")
    total_memory_bytes: int = Field(description="Memory of the device that the service may use.")
    held_memory_bytes: dict[str, int] = Field(description="What others hold of it now: `engine`, or a job's id.")
    disk_bytes: int = Field(description="What the run writes to the disk at most.")
    free_disk_bytes: int
    num_steps: int = Field(description="Optimizer steps.")
    num_tokens: int = Field(description="Tokens that go through the model, padding left out.")
    training_time_seconds: float | None = Field(description="At the newest run's rate; null while there was none.")
    fits: bool = Field(description="Whether the run would be accepted.")
    refusal: str = Field(description="Why it would not, in a sentence; empty when it would.")
    nearest_config: FittingConfig | None = Field(
        description="The nearest settings that would fit; null when these do, or when none would."
    )
    gradient_checkpointing: bool = Field(
        description="Whether layers are computed twice instead of kept, because it would not fit otherwise."
    )


class GenerateDataResponse(BaseModel):
    """A stored generation run."""

    job_id: str
    status: JobStatus
    estimated_conversations: int = Field(description="Conversations that will be produced.")
    estimated_cost: float | None = Field(description="Null while nothing is known of it.")
    estimated_duration: str | None = Field(description="Null: nothing is known of it.")
    dataset_name: str = Field(description="The dataset that will be created.")
    catalogue: str = Field(description="The catalogue that is used.")
    provider: Literal["offline", "openai"] | None = Field(description="Who puts the conversations into words.")


class Performance(BaseModel):
    """Base and tuned model on the same held-out rows, in one precision; losses in nats per assistant token, or with DPO
    per preference."""

    base_loss: float
    tuned_loss: float
    perplexity: float | None = Field(description="exp(tuned_loss); null with DPO.")
    num_conversations: int
    precision: str


class ModelSummary(BaseModel):
    """A model, by its newest ready version."""

    id: str
    base_model: str | None
    created_at: Time | None
    performance: Performance | None = Field(description="Measured values; null when nothing was held out.")
    status: Literal["ready", "deleted"] = Field(description="`deleted` when no version is left.")
    size_mb: float | None = Field(description="Size of its files in 10^6 bytes.")


class CompletionFacts(BaseModel):
    """The facts of an answer."""

    model_used: str = Field(description="`base` or `name:version`.")
    tokens_used: int = Field(description="Prompt and answer.")
    processing_time_ms: float
    finish_reason: FinishReason = Field(description="Of several answers, the first one's.")
    finish_reasons: list[FinishReason] = Field(description="Of every answer.")
    prompt_tokens: int
    completion_tokens: int
    time_to_first_token_ms: float
    digest: str = Field(description="Digest of the version, or of the base.")


class LikelyToken(BaseModel):
    """A token and how likely it was."""

    token_id: int
    token: str = Field(description="Its text; U+FFFD where it is a part of a character.")
    bytes: list[int] = Field(description="Its bytes.")
    logprob: float = Field(description="Natural logarithm of the probability that the model itself gave it.")


class TokenLogprob(LikelyToken):
    """A token of an answer, and the likeliest in its place."""

    top: list[LikelyToken]


class Choice(BaseModel):
    """One of the answers."""

    text: str
    logprobs: list[TokenLogprob] | None = Field(description="Of every token; null where they were not asked for.")


class InferenceResponse(CompletionFacts):
    """An answer."""

    response: str = Field(description="Of several answers, the first.")
    choices: list[Choice] = Field(description="Every answer, `n` of them.")


class HealthResponse(BaseModel):
    """How the service is."""

    service: Literal["healthy", "unhealthy"] = Field(description="Whether the server answers and serves.")
    services: dict[str, str] = Field(description="What the server says of each of its services, such as `SERVING`.")
    components: dict[str, ServiceState] = Field(description="The server's own parts, as it last saw them.")
    external_apis: dict[str, ServiceState] = Field(
        description="Outside services, as the server last saw them: `down` does not answer or refuses our credentials, "
        "`degraded` answers but the last work with it failed. Nobody is called to find out."
    )
    overall: Literal["healthy", "degraded", "unhealthy"] = Field(
        description="`degraded` while a part does not serve, such as inference while its model is loading, or while "
        "something that is set up is not `ok`."
    )
    timestamp: Time
