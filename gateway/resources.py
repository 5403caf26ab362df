"""Mirror of the contract's messages as `rest_json` writes them, for OpenAPI; a test holds both together.

`MIRRORS` names the message of each model. Of a oneof only the member that is set appears.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from google.protobuf.descriptor import Descriptor
from pydantic import BaseModel, Field

from gateway.problems import Failure
from gateway.schemas import MemoryRange, State, Time
from knowledge_engine.v1 import datasets_pb2, generation_pb2, jobs_pb2, models_pb2, training_pb2


class LoraConfig(BaseModel):
    """The shape of a LoRA adapter."""

    rank: int | None
    alpha: int | None
    dropout: float | None
    target_modules: list[str]
    use_rslora: bool | None
    use_dora: bool | None


class TrainingSpec(BaseModel):
    """What a fine-tuning run was asked to do, every default filled in; names as in the gRPC contract."""

    base_model: str
    dataset: str | None
    model: str | None
    use_qlora: bool | None
    lora: LoraConfig | None
    learning_rate: float | None
    lr_scheduler_type: Literal["linear", "cosine", "constant"] | None
    warmup_ratio: float | None
    weight_decay: float | None
    max_grad_norm: float | None
    num_train_epochs: float | None
    max_steps: int | None
    per_device_train_batch_size: int | None
    gradient_accumulation_steps: int | None
    max_length: int | None
    eval_split: float | None
    eval_steps: int | None
    logging_steps: int | None
    seed: int | None
    save_steps: int | None
    auto_find_batch_size: bool | None
    split_by: Literal["conversation", "product"] | None
    truncation: Literal["error", "drop", "keep_last_turns"] | None
    eval_dataset: str | None
    method: Literal["sft", "dpo"] | None
    beta: float | None
    start_from: str | None = Field(description="The version it went on from, `name:version`.")
    load_best_model_at_end: bool | None
    early_stopping_patience: int | None
    neftune_noise_alpha: float | None


class GenerationSpec(BaseModel):
    """What a generation run was asked to do."""

    catalogue: str | None
    dataset: str | None
    num_conversations: int
    topics: list[str]
    difficulty_level: Literal["simple", "medium", "complex"] | None
    include_product_data: bool | None
    seed: int | None
    provider: Literal["offline", "openai"] | None


class HeldOutComparison(BaseModel):
    """Base and tuned model on the same held-out rows; losses in nats per assistant token, with DPO per preference."""

    base_loss: float | None
    tuned_loss: float | None
    num_conversations: int
    num_tokens: int
    precision: str


class TrainingResult(BaseModel):
    """What a fine-tuning run achieved."""

    model_version: str | None = Field(description="The published version, `name:version`.")
    digest: str
    train_loss: float | None
    comparison: HeldOutComparison | None
    num_steps: int
    num_tokens: int
    tokens_per_second: float | None
    training_time_seconds: float | None
    peak_memory_bytes: int
    published_step: int = Field(description="The step whose weights were published.")


class GenerationUsage(BaseModel):
    """What a language model's replies took, as they told it."""

    prompt_tokens: int
    completion_tokens: int
    num_requests: int
    num_retries: int
    cost_usd: float | None = Field(description="Null where no price is known.")


class GenerationResult(BaseModel):
    """What a generation run produced."""

    dataset: str | None
    digest: str
    num_conversations: int
    num_rejected: int
    rejections: dict[str, int]
    provider: str
    language_model: str = Field(description="The model that the replies named; empty offline.")
    usage: GenerationUsage | None


class JobResult(BaseModel):
    """The result of the job's kind."""

    training: TrainingResult | None = None
    generation: GenerationResult | None = None


class TrackerRun(BaseModel):
    """A run in an experiment tracker."""

    id: str
    url: str


class Progress(BaseModel):
    """How far a job has come; null where a figure does not apply."""

    phase: str
    step: int | None
    total_steps: int | None
    epoch: float | None
    num_examples: int | None
    examples_per_second: float | None
    loss: float | None
    eval_loss: float | None
    learning_rate: float | None
    grad_norm: float | None
    tokens_per_second: float | None
    eta_seconds: float | None
    memory_bytes: int | None


class Job(BaseModel):
    """One run of long work."""

    id: str | None
    state: State | None
    training: TrainingSpec | None = None
    generation: GenerationSpec | None = None
    result: JobResult | None
    error: Failure | None
    progress: Progress | None
    create_time: Time | None
    start_time: Time | None
    end_time: Time | None
    attempt: int
    creator: str
    tracker_run: TrackerRun | None
    last_sequence: int
    pause_requested: bool = Field(description="It will be PAUSED as soon as its checkpoint is durable.")
    queue_position: int | None = Field(description="From 1, while it is QUEUED.")
    checkpoint_step: int | None = Field(description="Optimizer steps behind its newest checkpoint.")


class StateChange(BaseModel):
    """The job entered a state."""

    state: State | None
    attempt: int
    message: str
    error: Failure | None


class LogLine(BaseModel):
    """A line of the job's log."""

    message: str


class JobWarning(BaseModel):
    """Something a person should know."""

    reason: str
    message: str


class Checkpoint(BaseModel):
    """What is done so far is safe."""

    step: int
    size_bytes: int


class JobEvent(BaseModel):
    """One entry of a job's log; the data of a server-sent event."""

    job_id: str | None
    sequence: int
    create_time: Time | None
    state_change: StateChange | None = None
    progress: Progress | None = None
    log: LogLine | None = None
    warning: JobWarning | None = None
    result: JobResult | None = None
    checkpoint: Checkpoint | None = None


class Dataset(BaseModel):
    """A named, immutable set of rows."""

    id: str | None
    kind: Literal["conversations", "catalogue", "preferences", "evaluation"] | None
    digest: str
    num_rows: int
    size_bytes: int
    create_time: Time | None
    parents: list[str]
    job_id: str | None


class PreviewedToken(BaseModel):
    """One token of a row."""

    id: int
    text: str
    is_trained: bool
    is_control: bool


class PreviewedAnswer(BaseModel):
    """A preference's prompt with its rejected answer."""

    text: str
    tokens: list[PreviewedToken]
    num_trained_tokens: int


class PreviewedRow(BaseModel):
    """A row as a training would see it."""

    row: int = Field(description="Counted from 1.")
    text: str
    tokens: list[PreviewedToken]
    num_trained_tokens: int
    problem: str = Field(description="Why a training would refuse it; empty when it would not.")
    change: str = Field(description="What truncation does to it; empty for nothing.")
    rejected: PreviewedAnswer | None = Field(
        description="Of a preference, the prompt with the rejected answer; the row itself shows the chosen one."
    )


class TokenLengths(BaseModel):
    """Lengths in tokens."""

    min: int
    median: int
    p95: int
    max: int
    mean: float | None


class LengthBin(BaseModel):
    """Rows of one range of lengths."""

    max_tokens: int = Field(description="The longest of the range.")
    num_rows: int


class NearDuplicate(BaseModel):
    """A row that says what an earlier one says."""

    row: int
    of_row: int


class PreviewIssue(BaseModel):
    """A row and what is wrong with it, or done to it."""

    row: int = Field(description="Counted from 1.")
    problem: str


class DatasetPreview(BaseModel):
    """What becomes of all rows of a dataset."""

    num_rows: int
    num_tokens: int
    num_trained_tokens: int
    lengths: TokenLengths | None
    num_issues: int
    issues: list[PreviewIssue] = Field(description="The first 1000 of them.")
    num_changes: int = Field(description="Rows that truncation shortens or drops.")
    changes: list[PreviewIssue] = Field(description="The first 1000 of them.")
    num_messages: dict[str, int] = Field(description="Messages of all rows, by role.")
    num_learned_messages: int
    num_near_duplicates: int = Field(description="Rows that say the same as an earlier one, or nearly.")
    near_duplicates: list[NearDuplicate] = Field(description="The first 1000 of them.")
    length_bins: list[LengthBin] = Field(description="How many rows have how many tokens, shortest first.")


class PreviewPage(BaseModel):
    """Rows in the order of the dataset."""

    rows: list[PreviewedRow]
    next_page_token: str = Field(description="Empty on the last page.")
    dataset: DatasetPreview | None
    chat_template_digest: str


class ModelVersion(BaseModel):
    """One published adapter."""

    id: str | None = Field(description="`name:version`, as inference takes it.")
    digest: str
    base_model: str
    base_digest: str
    dataset_digest: str
    chat_template_digest: str
    job_id: str | None
    spec: TrainingSpec | None
    comparison: HeldOutComparison | None
    training_precision: str
    size_bytes: int
    create_time: Time | None
    base_source: str = Field(description="The name that base goes by everywhere.")
    base_revision: str = Field(description="The commit of a base from the model hub; empty for others.")
    eval_dataset_digest: str = Field(description="What it was measured on; empty where that was held out.")
    start_from_digest: str = Field(description="The version that it went on from; empty for the base.")


class Model(BaseModel):
    """A line of versions under one name."""

    id: str | None
    create_time: Time | None
    latest_version: ModelVersion | None
    num_versions: int


class Export(BaseModel):
    """A version merged into its base."""

    folder: str = Field(description="Where it lies in the service's data directory.")
    version_digest: str
    precision: str
    size_bytes: int
    num_tokens: int = Field(description="Tokens of the conversations on which it was compared.")
    num_same: int = Field(description="Those after which both find the same token likeliest.")
    max_difference: float | None = Field(description="Largest difference of a log-probability, in nats.")


class JobPage(BaseModel):
    """Jobs, newest first."""

    jobs: list[Job]
    next_page_token: str = Field(description="Empty on the last page.")


class DatasetPage(BaseModel):
    """Datasets, newest first."""

    datasets: list[Dataset]
    next_page_token: str = Field(description="Empty on the last page.")


class ModelVersionPage(BaseModel):
    """Versions of a model, newest first."""

    model_versions: list[ModelVersion]
    next_page_token: str = Field(description="Empty on the last page.")


MIRRORS: Mapping[type[BaseModel], Descriptor] = {
    LoraConfig: training_pb2.LoraConfig.DESCRIPTOR,
    TrainingSpec: training_pb2.TrainingSpec.DESCRIPTOR,
    TrainingResult: training_pb2.TrainingResult.DESCRIPTOR,
    MemoryRange: training_pb2.TrainingEstimate.MemoryRange.DESCRIPTOR,
    HeldOutComparison: training_pb2.HeldOutComparison.DESCRIPTOR,
    GenerationSpec: generation_pb2.GenerationSpec.DESCRIPTOR,
    GenerationResult: generation_pb2.GenerationResult.DESCRIPTOR,
    GenerationUsage: generation_pb2.GenerationUsage.DESCRIPTOR,
    JobResult: jobs_pb2.JobResult.DESCRIPTOR,
    TrackerRun: jobs_pb2.TrackerRun.DESCRIPTOR,
    Progress: jobs_pb2.Progress.DESCRIPTOR,
    Job: jobs_pb2.Job.DESCRIPTOR,
    StateChange: jobs_pb2.JobEvent.StateChange.DESCRIPTOR,
    LogLine: jobs_pb2.JobEvent.LogLine.DESCRIPTOR,
    JobWarning: jobs_pb2.JobEvent.Warning.DESCRIPTOR,
    Checkpoint: jobs_pb2.JobEvent.Checkpoint.DESCRIPTOR,
    JobEvent: jobs_pb2.JobEvent.DESCRIPTOR,
    Dataset: datasets_pb2.Dataset.DESCRIPTOR,
    PreviewedToken: datasets_pb2.PreviewedRow.Token.DESCRIPTOR,
    PreviewedAnswer: datasets_pb2.PreviewedRow.Answer.DESCRIPTOR,
    PreviewedRow: datasets_pb2.PreviewedRow.DESCRIPTOR,
    TokenLengths: datasets_pb2.DatasetPreview.TokenLengths.DESCRIPTOR,
    LengthBin: datasets_pb2.DatasetPreview.LengthBin.DESCRIPTOR,
    NearDuplicate: datasets_pb2.DatasetPreview.NearDuplicate.DESCRIPTOR,
    PreviewIssue: datasets_pb2.DatasetPreview.Issue.DESCRIPTOR,
    DatasetPreview: datasets_pb2.DatasetPreview.DESCRIPTOR,
    PreviewPage: datasets_pb2.PreviewDatasetResponse.DESCRIPTOR,
    ModelVersion: models_pb2.ModelVersion.DESCRIPTOR,
    Model: models_pb2.Model.DESCRIPTOR,
    Export: models_pb2.Export.DESCRIPTOR,
    JobPage: jobs_pb2.ListJobsResponse.DESCRIPTOR,
    DatasetPage: datasets_pb2.ListDatasetsResponse.DESCRIPTOR,
    ModelVersionPage: models_pb2.ListModelVersionsResponse.DESCRIPTOR,
}
