"""The whole path on real input, in minutes: catalogue, conversations, fine-tuning, comparison, a streamed answer.

Drives the supervised service through the client, as any other caller would. A second run finds what the first one left
in the data directory and goes on from there, also after an interruption.
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, Self, TypeVar

import psutil
import typer

from knowledge_engine.bases import get_base
from knowledge_engine.catalogue import DEMO_CATALOGUE, load_demo_catalogue
from knowledge_engine.cli.output import print_json, say
from knowledge_engine.cli.progress import JobView
from knowledge_engine.client import Client
from knowledge_engine.core import (
    Dataset,
    DatasetKind,
    DifficultyLevel,
    GenerationProvider,
    GenerationResult,
    GenerationSpec,
    Job,
    JobState,
    LoraConfig,
    Message,
    ModelVersion,
    Progress,
    TrainingResult,
    TrainingSpec,
)
from knowledge_engine.errors import (
    AlreadyExistsError,
    IntegrityError,
    InvalidSpecError,
    KnowledgeEngineError,
    NotFoundError,
    Reason,
    StateError,
    UpstreamError,
    from_dict,
)
from knowledge_engine.settings import Settings
from knowledge_engine.supervisor import (
    Stopped,
    Supervisor,
    end_child,
    reachable,
    start_child,
    stop_signals,
    with_ports,
)

CATALOGUE = "demo-catalogue"
CONVERSATIONS = "demo-conversations"
MODEL = "demo-assistant"

# Chosen for 6 minutes and 6 GiB on 2 cores without a GPU: about 26,000 tokens to train on at 120 to 170 tokens/s, and
# two conversations at once, as four take the worker alone past 7 GiB.
GENERATION = GenerationSpec(
    catalogue=CATALOGUE, dataset=CONVERSATIONS, num_conversations=150, difficulty_level=DifficultyLevel.SIMPLE
)
TRAINING = TrainingSpec(
    dataset=CONVERSATIONS,
    model=MODEL,
    lora=LoraConfig(rank=8, alpha=16),
    num_train_epochs=1,
    per_device_train_batch_size=2,
    learning_rate=1e-3,
    eval_split=0.1,
)

SHOPPING_QUESTION = "Hi! Which headphones would you recommend for my commute? I can spend up to 100 EUR."
SHOPPING_WORD = "Headphones"
ANSWER_TOKENS = 80

ENGINE_SECONDS = 300.0  # for the engine to load the base, while nothing else runs
SAMPLE_SECONDS = 0.5

Talk = Callable[[str], None]
_Found = TypeVar("_Found")


class _Learned(NamedTuple):
    conversations: Dataset
    generated: Job | None  # the job that made them; None where someone uploaded them under the demo's name
    version: ModelVersion
    trained: Job


@dataclass(frozen=True)
class Summary:
    """What `--json` prints. Losses in nats per assistant token; None where a first run did not record it."""

    base_loss: float | None
    tuned_loss: float | None
    train_tokens_per_second: float | None
    conversations_generated: int
    conversations_rejected: int | None
    model: str
    version: int
    digest: str
    seconds: float
    peak_memory_bytes: int


def run_demo(settings: Settings, *, serve: bool, online: bool, as_json: bool) -> int:
    """Tells the story on stdout, or on stderr when stdout takes the JSON object; returns the exit code.

    Raises:
        InvalidSpecError: SETTINGS_INVALID, `online` without a key.
        KnowledgeEngineError: whatever else stopped it; nothing is left running.
    """
    started = time.monotonic()
    talk: Talk = say if as_json else typer.echo
    is_told = False
    real = _private(settings, online, talk)
    try:
        with stop_signals(), PeakMemory() as memory, _service_log(real) as log:
            _prepare_base(real, log, talk)
            with _service(real, log, talk) as service, _client(service.settings) as client:
                learned = _learn(client, real, talk)
                _compare(client, real, learned.version, talk)
                _answer(client, talk)
                summary = _summary(learned, time.monotonic() - started, memory.peak_bytes)
                is_told = True
                _show_summary(summary, as_json, talk)
                _show_next(service.settings if serve else settings, serve, talk)
                if serve:
                    service.wait()
                    return 1
    except Stopped as stop:
        return 0 if is_told else 128 + stop.number
    return 0


# --- the service --------------------------------------------------------------------------------------------------


def _private(settings: Settings, online: bool, talk: Talk) -> Settings:
    """The settings of the demo's service: keys only when asked for, paths that hold from any folder."""
    update: dict[str, Any] = {
        "data_dir": settings.data_dir.absolute(),
        "base_model": settings.base_model and _absolute(settings.base_model),
        "base_models": {name: _absolute(source) for name, source in settings.base_models.items()},
    }
    if not online:
        update |= {"openai_api_key": None, "wandb_api_key": None}
    elif settings.openai_api_key is None and settings.wandb_api_key is None:
        message = "--online needs a key: set KNOWLEDGE_WANDB_API_KEY (the tracker) or KNOWLEDGE_OPENAI_API_KEY"
        raise InvalidSpecError(message, reason=Reason.SETTINGS_INVALID)
    else:
        tracker = "goes to W&B" if settings.wandb_api_key else "stays offline (KNOWLEDGE_WANDB_API_KEY is not set)"
        author = f"written by {settings.openai_model}"
        if settings.openai_api_key is None:
            author = "generated offline (KNOWLEDGE_OPENAI_API_KEY is not set)"
        talk(f"--online: the tracking of a training {tracker}; new conversations are {author}")
    return settings.model_copy(update=update)


def _absolute(source: str) -> str:
    path = Path(source).expanduser()
    return str(path.absolute()) if path.exists() else source


@contextlib.contextmanager
def _service_log(settings: Settings) -> Iterator[IO[bytes]]:
    """Where the parts' own words go, beside the bars instead of through them."""
    settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = settings.data_dir / "demo.log"
    path.touch(mode=0o600)
    with path.open("wb") as log:
        yield log


def _last_line(log: IO[bytes]) -> str:
    lines = Path(log.name).read_text(errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.strip()), "it said nothing")


def _prepare_base(settings: Settings, log: IO[bytes], talk: Talk) -> None:
    """Unpacks the base model in a child process, once; `bases` says how far it is."""
    try:
        base = get_base(settings)
    except (UpstreamError, IntegrityError):  # not prepared yet, or to be prepared anew
        talk("Preparing the base model, once ...")
    else:
        talk(f"Base model: {base.source} ({base.architecture}), ready")
        return
    process = start_child(["knowledge_engine.bases", "base"], settings, subprocess.PIPE, log, settings.data_dir)
    assert process.stdout is not None
    try:
        with JobView("base model") as view, process.stdout as lines:
            for line in lines:
                step = json.loads(line)
                view.show_progress(Progress(phase=step["phase"], step=round(100 * step["fraction"]), total_steps=100))
        process.wait()
    finally:
        end_child(process, bound_seconds=5)
    if process.returncode:
        raise KnowledgeEngineError(f"the base model could not be prepared: {_last_line(log)}")
    talk(f"Base model: {get_base(settings).source}, ready")


@contextlib.contextmanager
def _service(settings: Settings, log: IO[bytes], talk: Talk) -> Iterator[Supervisor]:
    free = with_ports(settings, avoid_taken=True)
    service = Supervisor(free, log=log, folder=settings.data_dir)
    try:
        service.start()
    except UpstreamError as error:
        raise UpstreamError(f"{error.message}: {_last_line(log)}", reason=error.reason) from None
    try:
        addresses = service.settings
        talk(f"The service is up: gRPC on {addresses.grpc_address}, REST on http://{addresses.http_address}")
        yield service
    finally:
        service.stop()


def _client(settings: Settings) -> Client:
    key = next(iter(settings.keys.values()), None)
    return Client(reachable(settings.grpc_address), key)


# --- the story ----------------------------------------------------------------------------------------------------


def _learn(client: Client, settings: Settings, talk: Talk) -> _Learned:
    """Catalogue, conversations, model: each made unless it is there."""
    catalogue = _upload_catalogue(client, talk)
    conversations = _find(lambda: client.get_dataset(CONVERSATIONS))
    if conversations is None:
        _see_through(client, _unfinished(client, CONVERSATIONS) or _generate(client, settings, talk))
        conversations = client.get_dataset(CONVERSATIONS)
    generated = client.get_job(conversations.job_id) if conversations.job_id else None
    _tell_conversations(conversations, generated, catalogue, talk)
    model = _find(lambda: client.get_model(MODEL))
    version = model.latest_version if model else None
    if version is None:
        talk("Fine-tuning with QLoRA (NF4 base, LoRA on every linear layer) ...")
        job = _see_through(client, _unfinished(client, MODEL) or client.create_training_job(TRAINING))
        assert isinstance(job.result, TrainingResult)
        version = client.get_model_version(MODEL, job.result.version)
        talk(f"Published {MODEL}:{version.version} ({version.digest[:19]})")
    else:
        talk(f"Using {MODEL}:{version.version}, trained {version.create_time:%Y-%m-%d %H:%M} UTC")
    return _Learned(conversations, generated, version, client.get_job(version.job_id))


def _generate(client: Client, settings: Settings, talk: Talk) -> Job:
    provider = GenerationProvider.OPENAI if settings.openai_api_key else GenerationProvider.OFFLINE
    talk(f"Generating {GENERATION.num_conversations} training conversations about its products ...")
    if provider is GenerationProvider.OPENAI:
        talk(f"They come from {settings.openai_model} at {settings.openai_base_url}, which costs money")
    return client.create_generation_job(GENERATION.model_copy(update={"provider": provider}))


def _upload_catalogue(client: Client, talk: Talk) -> Dataset:
    try:
        with DEMO_CATALOGUE.open("rb") as content:
            stored = client.upload_dataset(CATALOGUE, content, kind=DatasetKind.CATALOGUE)
    except AlreadyExistsError:
        stored = client.get_dataset(CATALOGUE)
        talk(f"{CATALOGUE} holds another catalogue than the one shipped; using it as it is")
    talk(f"Catalogue: {stored.num_rows} products")
    return stored


def _tell_conversations(conversations: Dataset, job: Job | None, catalogue: Dataset, talk: Talk) -> None:
    rejected = ""
    if job is not None and isinstance(job.result, GenerationResult):
        words = "generated offline" if not job.result.language_model else f"written by {job.result.language_model}"
        rejected = f", {words}, {job.result.num_rejected} rejected by the checks"
    if catalogue.digest not in conversations.parents:
        rejected += ", from another catalogue"
    talk(f"Conversations: {conversations.num_rows}{rejected}")


def _unfinished(client: Client, target: str) -> Job | None:
    """The job that an interrupted run left, which the service has taken up again."""
    for job in client.list_jobs():
        made = job.spec.model if isinstance(job.spec, TrainingSpec) else job.spec.dataset
        if made == target and not job.state.is_terminal:
            return job
    return None


def _see_through(client: Client, job: Job) -> Job:
    """Shows the job to its end.

    Raises:
        KnowledgeEngineError: why it did not succeed.
    """
    with JobView(job.kind.value) as view:
        view.show_all(client.watch_job(job.id))
    ended = client.get_job(job.id)
    if ended.error is not None:
        raise from_dict(ended.error)
    if ended.state is not JobState.SUCCEEDED:
        raise StateError(f"{job.id} was cancelled", reason=Reason.JOB_ENDED, job=job.id)
    return ended


def _find(get: Callable[[], _Found]) -> _Found | None:
    try:
        return get()
    except NotFoundError:
        return None


def _compare(client: Client, settings: Settings, version: ModelVersion, talk: Talk) -> None:
    """Base against tuned model: the losses of all held-out conversations, and both answers to the first of them."""
    _await_engine(client)
    if (measured := version.comparison) is None:
        return  # trained by someone else, with nothing held out
    talk(
        f"\nOn {measured.num_conversations} held-out conversations ({measured.precision}, "
        f"{measured.num_tokens} assistant tokens, nats per token):"
    )
    talk(f"  base   {measured.base_loss:.3f}\n  tuned  {measured.tuned_loss:.3f}")
    *asked, meant = _held_out_turns(settings, version)
    answers = [
        client.generate(model, asked, temperature=0, max_tokens=ANSWER_TOKENS, timeout_seconds=ENGINE_SECONDS).text
        for model in ("base", f"{MODEL}:{version.version}")
    ]
    talk(f"\nThe first of them, answered by both:\n{_indented(asked)}")
    talk(_side_by_side(("base", "tuned", "what the conversation says"), (*answers, meant.content)))


def _held_out_turns(settings: Settings, version: ModelVersion) -> list[Message]:
    """The first held-out conversation up to its first answer, split off as the training job did."""
    from knowledge_engine.datasets import Datasets
    from knowledge_engine.splits import split_rows
    from knowledge_engine.state import State

    state = State.open(settings.state_url, migrate=False)
    try:
        rows = Datasets(settings.data_dir / "datasets", state).conversations(version.spec.dataset)
    finally:
        state.close()
    messages = rows[split_rows(rows, version.spec.eval_split, version.spec.seed).held_out[0]].messages
    end = next(index for index, message in enumerate(messages) if message.role == "assistant")
    return list(messages[: end + 1])


def _indented(messages: Sequence[Message]) -> str:
    return "\n".join(f"  {line}" for message in messages for line in message.content.splitlines())


def _side_by_side(titles: Sequence[str], texts: Sequence[str]) -> str:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*titles, pad_edge=False)
    table.add_row(*(Text(text.strip()) for text in texts))
    drawn = Console(width=100, file=io.StringIO(), color_system=None)
    with drawn.capture() as capture:
        drawn.print(table)
    return capture.get().rstrip()


def _answer(client: Client, talk: Talk) -> None:
    """One answer as a customer would see it come."""
    talk(f"\nyou: {SHOPPING_QUESTION}")
    output = sys.stdout if talk is typer.echo else sys.stderr
    output.write(f"{MODEL}: ")
    with client.stream_generate(
        MODEL,
        SHOPPING_QUESTION,
        context={"products": _products(SHOPPING_WORD)},
        temperature=0,
        max_tokens=ANSWER_TOKENS,
        timeout_seconds=ENGINE_SECONDS,
    ) as stream:
        for piece in stream:
            output.write(piece)
            output.flush()
    output.write("\n")
    if (facts := stream.completion) is not None:
        speed = facts.completion_tokens / facts.total_seconds if facts.total_seconds else 0
        talk(
            f"({facts.completion_tokens} tokens, first after {facts.time_to_first_token_seconds:.2f} s, "
            f"{speed:.0f} tokens/s, answered by {facts.digest[:19]})"
        )


def _await_engine(client: Client) -> None:
    """Until the engine serves: it began to load the base when the service started."""
    deadline = time.monotonic() + ENGINE_SECONDS
    while client.health().get("InferenceService") != "SERVING":
        if time.monotonic() > deadline:
            message = f"the engine was not ready within {ENGINE_SECONDS:.0f} s; demo.log in the data directory says why"
            raise UpstreamError(message, reason=Reason.ENGINE_UNAVAILABLE)
        time.sleep(0.25)


def _products(word: str) -> list[dict[str, Any]]:
    """The shipped products that have `word` in their title, as training showed them."""
    return [product.to_context() for product in load_demo_catalogue() if word in product.title]


# --- the end ------------------------------------------------------------------------------------------------------


def _summary(learned: _Learned, seconds: float, peak_bytes: int) -> Summary:
    version, training = learned.version, learned.trained.result
    generation = learned.generated.result if learned.generated else None
    held_out = version.comparison
    return Summary(
        base_loss=held_out.base_loss if held_out else None,
        tuned_loss=held_out.tuned_loss if held_out else None,
        train_tokens_per_second=training.tokens_per_second if isinstance(training, TrainingResult) else None,
        conversations_generated=learned.conversations.num_rows,
        conversations_rejected=generation.num_rejected if isinstance(generation, GenerationResult) else None,
        model=version.model,
        version=version.version,
        digest=version.digest,
        seconds=round(seconds, 1),
        peak_memory_bytes=peak_bytes,
    )


def _show_summary(summary: Summary, as_json: bool, talk: Talk) -> None:
    if as_json:
        print_json(asdict(summary))
    talk(f"\nDone in {summary.seconds:.0f} s, at most {summary.peak_memory_bytes / 2**30:.1f} GiB of memory.")


def _show_next(settings: Settings, is_up: bool, talk: Talk) -> None:
    grpc_address, http_address = reachable(settings.grpc_address), reachable(settings.http_address)
    body = json.dumps({"messages": [{"role": "user", "content": "Do you have a kettle?"}], "stream": True})
    call = json.dumps({"input": {"model": f"models/{MODEL}", "messages": [{"role": "user", "content": "A kettle?"}]}})
    method = "knowledge_engine.v1.InferenceService/StreamGenerate"
    key = ' -H "authorization: Bearer $KNOWLEDGE_API_KEY"' if settings.keys else ""
    lead = "Try next" if is_up else "`uv run knowledge-engine serve` starts the service again; then try"
    talk(
        f"""
{lead}:
  uv run knowledge-engine chat {MODEL}
  curl -N{key} http://{http_address}/api/v1/models/{MODEL}/inference \\
    -H 'content-type: application/json' -d '{body}'
  uv run buf curl{key} --protocol grpc --http2-prior-knowledge http://{grpc_address}/{method} \\
    -d '{call}'
  grpcurl{key} -plaintext -d '{call}' {grpc_address} {method}

  from knowledge_engine.client import Client
  with Client("{grpc_address}") as client:
      for piece in client.stream_generate("{MODEL}", "Do you have a kettle?"):
          print(piece, end="", flush=True)"""
    )
    if is_up:
        talk("\nThe service stays up; Ctrl-C stops it.")


# --- memory -------------------------------------------------------------------------------------------------------


class PeakMemory:
    """Samples the memory of this process and everything below it, summed; shared pages are counted once (PSS)."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        me = psutil.Process()
        while True:
            began = time.monotonic()
            self.peak_bytes = max(self.peak_bytes, sum(map(_memory, [me, *me.children(recursive=True)])))
            # The kernel walks every page for this: at most a twentieth of one core goes into it.
            if self._done.wait(max(SAMPLE_SECONDS, 19 * (time.monotonic() - began))):
                return


def _memory(process: psutil.Process) -> int:
    """PSS where the system tells it, else RSS; 0 for a process that has just ended."""
    try:
        info = process.memory_full_info()
    except psutil.AccessDenied:
        info = None
    except psutil.Error:
        return 0
    try:
        return int(getattr(info, "pss", 0) or process.memory_info().rss)
    except psutil.Error:
        return 0
