"""One attempt of a training job: dataset and base in, published version out. Knows the order of things, no mathematics.

loading -> training -> evaluating -> publishing. Base and tuned model are compared as they will be served: the adapter's
written files on the base in the serving precision. On the same base the golden values of the self-test are recorded, by
the model that serves, and then on this machine's CPU those of the precisions that other machines serve in.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from knowledge_engine import devices, modeling
from knowledge_engine.bases import Base, describe_origin, prepare_base
from knowledge_engine.core import (
    BASE,
    HeldOutComparison,
    JobContext,
    ModelVersion,
    Progress,
    Service,
    TrainingMethod,
    TrainingResult,
    TrainingSpec,
    split_version,
)
from knowledge_engine.datasets import Datasets
from knowledge_engine.errors import CredentialsError, KnowledgeEngineError, Reason, UpstreamError
from knowledge_engine.failpoints import failpoint
from knowledge_engine.hub import PHASES as HUB_PHASES
from knowledge_engine.inference.golden import SelfTest
from knowledge_engine.inference.serving import serving_model
from knowledge_engine.registry import Registry
from knowledge_engine.settings import Settings
from knowledge_engine.text import ChatText, read_template
from knowledge_engine.tracking import Tracker, open_tracker
from knowledge_engine.training.checkpoints import Checkpoints
from knowledge_engine.training.data import Batch
from knowledge_engine.training.estimate import demand_room, read_shape
from knowledge_engine.training.loop import TrainedSummary, demand_finite, evaluation_batches, train
from knowledge_engine.training.loss import mean_loss, preference_loss, preference_margins
from knowledge_engine.training.material import (
    KINDS,
    Item,
    demand_continuable,
    divide,
    fit,
    num_trained,
    read_rows,
    width,
)
from knowledge_engine.training.plan import has_gradient_checkpointing, remember_gradient_checkpointing
from knowledge_engine.training.publishing import (
    Kept,
    Trained,
    drop_kept,
    find_kept,
    fingerprint,
    keep,
    publish_patiently,
    training_facts,
)
from knowledge_engine.training.ranks import Task, demand_devices, load_tuned, together
from knowledge_engine.training.shortages import Shortages

DORA_NOT_EVERYWHERE = "DORA_NOT_EVERYWHERE"
GOLDEN_VALUES_MISSING = "GOLDEN_VALUES_MISSING"
_RECORDING_BYTES = 2**28
"""Kernels, logits, and what else recording golden values takes beside the base."""
_ROWS_PER_LINE = 20
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class _Material:
    """What there is to learn from, encoded."""

    train: list[Item]
    held_out: list[Item]
    changes: list[str]
    dataset_digest: str
    chat_template_digest: str
    parents: dict[str, str]
    """Digests of what else goes into it, by the name of the version's field."""


def run_training(context: JobContext, settings: Settings, datasets: Datasets, registry: Registry) -> TrainingResult:
    """Trains, compares and publishes as the job's spec says.

    Raises:
        InvalidSpecError: what only the dataset or the base shows: rows too long, nothing to train, unknown targets.
        KnowledgeEngineError: NON_FINITE, OUT_OF_MEMORY, DISK_FULL, and whatever the parts raise.
        JobStopped: from `context.check`, or RETRY; nothing is published then.
    """
    spec = context.job.spec
    if not isinstance(spec, TrainingSpec):
        raise TypeError(f"{context.job.id} is no training job")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = modeling.default_device()
    shortages = Shortages(context, settings, spec, device)
    with shortages.told():
        return _run(context, settings, spec, datasets, registry, device, shortages)


def _run(
    context: JobContext,
    settings: Settings,
    spec: TrainingSpec,
    datasets: Datasets,
    registry: Registry,
    device: str,
    shortages: Shortages,
) -> TrainingResult:
    context.report(Progress(phase="loading"))
    base = _load_base_facts(context, settings, spec, device)
    material = _encode(spec, base, datasets, registry)
    if spec.lora.use_dora:
        context.warn(DORA_NOT_EVERYWHERE, "vLLM does not serve DoRA adapters; this service and PEFT do")
    for first in range(0, len(material.changes), _ROWS_PER_LINE):
        context.log("; ".join(material.changes[first : first + _ROWS_PER_LINE]))
    what = KINDS[spec.method]
    context.log(f"{len(material.train)} {what} to train on, {len(material.held_out)} held out")
    shortages.longest_row = max(map(width, (*material.train, *material.held_out)))
    tracker = open_tracker(settings, context.job, context.work_dir, context.warn, context.observe)
    context.at_end(tracker.finish)
    if tracker.run is not None:
        context.track(tracker.run)
    kept: Kept | None = None
    try:
        kept = _obtain(context, settings, spec, base, material, registry, tracker, device, shortages)
        trained = kept.trained
        if (compared := trained.comparison) is not None:
            tracker.log({"eval/loss": compared.tuned_loss, "eval/base_loss": compared.base_loss}, trained.num_steps)
        return _publish(context, settings, spec, base, material, kept, registry, device)
    except KnowledgeEngineError as error:
        if error.reason is Reason.NON_FINITE:  # nobody shall come back for it
            drop_kept(settings, context.job.id)
        raise
    finally:
        if kept is not None:
            kept.release()


def _obtain(
    context: JobContext,
    settings: Settings,
    spec: TrainingSpec,
    base: Base,
    material: _Material,
    registry: Registry,
    tracker: Tracker,
    device: str,
    shortages: Shortages,
) -> Kept:
    """A trained and compared adapter, ready to be published: a kept one of the same training, or a new one."""
    precision = modeling.training_precision(device, use_qlora=spec.use_qlora)
    facts = training_facts(
        spec, material.dataset_digest, base.digest, material.chat_template_digest, precision, material.parents
    )
    mark = fingerprint(facts)
    if kept := find_kept(settings, mark, context.job.id):
        context.log(f"nothing to train: job {kept.trained.job_id} trained exactly this and could not publish it")
        return kept
    if context.job.checkpoint_step is None:  # a run that is under way is never refused, it is tried
        need = demand_room(settings, spec, base, material.train, material.held_out, shortages.micro_batch)
        if need is not None:  # better known than at its creation, where its base was not prepared, or less goes at once
            context.expect_memory(need.memory.expected_bytes)
            if need.gradient_checkpointing:
                remember_gradient_checkpointing(context.work_dir)
    folder = registry.stage(context.job.id, context.job.attempt)
    checkpoints = Checkpoints(context, settings, facts, spec.save_steps)
    start = _start_from(registry, spec)
    task = Task(
        context.job, spec, base, start, material.train, material.held_out, device, shortages.micro_batch,
        has_gradient_checkpointing(context.work_dir),
    )  # fmt: skip
    summary = _train(context, settings, task, folder, tracker, checkpoints, shortages)
    comparison = _try_out(context, settings, spec, base, material, folder, summary.num_steps, device)
    _record_elsewhere(context, settings, base, folder, device)
    for name in _TOKENIZER_FILES:
        if (base.folder / name).is_file():
            shutil.copyfile(base.folder / name, folder / name)
    (folder / "chat_template.jinja").write_text(read_template(base.folder), encoding="utf-8")
    context.check()
    peak = modeling.peak_device_memory(device)
    trained = Trained(job_id=context.job.id, comparison=comparison, peak_memory_bytes=peak, **asdict(summary))
    return keep(settings, mark, folder, trained)


def _load_base_facts(context: JobContext, settings: Settings, spec: TrainingSpec, device: str) -> Base:
    preparation = _Preparation(context)
    try:
        base = prepare_base(settings, spec.base_model, preparation.report)
    except (UpstreamError, CredentialsError) as error:  # other failures are ours
        if preparation.asked_the_hub:
            context.observe(Service.HUB, error.message)
        raise
    if preparation.asked_the_hub:
        context.observe(Service.HUB, None)
    modeling.serving_precision(base, device, settings.serving_precision)  # before a training that could not be served
    demand_devices(settings, device)
    revision = f" at {base.revision[:12]}" if base.revision else ""
    context.log(
        f"base model {base.name}: {base.source}{revision} ({base.architecture}, {base.digest[:19]}), "
        f"in {modeling.training_precision(device, use_qlora=spec.use_qlora)} on {device}"
    )
    if base.name == BASE and settings.base_model is None:
        context.log(f"base model {base.name} is {describe_origin(settings)}")
    return base


class _Preparation:
    """Turns what `prepare_base` reports into events of the job: percent of each phase, at most one a second."""

    def __init__(self, context: JobContext) -> None:
        self._context = context
        self._told = ("", -1)
        self._told_at = 0.0
        self.asked_the_hub = False

    def report(self, phase: str, fraction: float) -> None:
        self._context.check()
        self.asked_the_hub |= phase in HUB_PHASES
        now = (phase, round(100 * fraction))
        is_due = phase != self._told[0] or now[1] == 100 or time.monotonic() - self._told_at >= 1
        if phase != "ready" and now != self._told and is_due:
            self._told, self._told_at = now, time.monotonic()
            self._context.report(Progress(phase=phase, step=now[1], total_steps=100))


def _start_from(registry: Registry, spec: TrainingSpec) -> Path | None:
    """The folder of the version to go on from, whole and sound."""
    if spec.start_from is None:
        return None
    version = split_version(spec.start_from)
    registry.verify(*version)
    return registry.folder(*version)


def _encode(spec: TrainingSpec, base: Base, datasets: Datasets, registry: Registry) -> _Material:
    text = ChatText.load(base)
    parents: dict[str, str] = {}
    if spec.start_from is not None:
        before = registry.get(*split_version(spec.start_from))
        demand_continuable(spec, before, base.digest, text.template_digest)
        parents["start_from_digest"] = before.digest
    if spec.eval_dataset is not None:
        parents["eval_dataset_digest"] = datasets.get(spec.eval_dataset).digest
    rows, evaluation = read_rows(datasets, spec)
    how = (text, base.max_length(spec.max_length), spec.truncation, lambda item: item)
    # Fitted before the split, so that errors name rows of the dataset.
    fitted = fit(rows, *how)
    measured = fit(evaluation, *how) if evaluation else None
    train, held_out = divide(spec, rows, fitted.items, measured.items if measured else ())
    return _Material(
        train=train,
        held_out=held_out,
        changes=[*fitted.changes, *(f"evaluation: {change}" for change in (measured.changes if measured else ()))],
        dataset_digest=datasets.get(spec.dataset).digest,
        chat_template_digest=text.template_digest,
        parents=parents,
    )


def _train(
    context: JobContext,
    settings: Settings,
    task: Task,
    folder: Path,
    tracker: Tracker,
    checkpoints: Checkpoints,
    shortages: Shortages,
) -> TrainedSummary:
    """Trains and writes the adapter into `folder`; the training model is gone when it returns."""
    failpoint("training.load")
    with together(context, settings, task) as ranks:
        tuned = load_tuned(task, ranks, context.check)
        if task.start is not None:
            context.log(f"goes on from {task.spec.start_from}")
        try:
            with shortages.training():
                summary = train(
                    tuned, task.train, task.held_out, task.spec, context, tracker.log, task.device, checkpoints,
                    task.micro_batch, ranks, gradient_checkpointing=task.gradient_checkpointing,
                )  # fmt: skip
        except KnowledgeEngineError as error:
            raise (checkpoints.with_whereabouts(error) if error.reason is Reason.NON_FINITE else error) from None
        modeling.save_adapter(tuned, folder, task.base)
        del tuned
    _free_memory()
    return summary


def _try_out(
    context: JobContext,
    settings: Settings,
    spec: TrainingSpec,
    base: Base,
    material: _Material,
    folder: Path,
    num_steps: int,
    device: str,
) -> HeldOutComparison | None:
    """The written adapter on the base as it is served: what `_compare` finds, None without held-out rows; and its
    golden values, written beside it."""
    context.report(Progress(phase="evaluating" if material.held_out else "publishing"))
    failpoint("training.evaluation")
    precision = modeling.serving_precision(base, device, settings.serving_precision)
    served = modeling.load_base(base, precision, device)
    comparison = None
    if material.held_out:
        comparison = _compare(context, spec, served, material, folder, num_steps, device, precision)
    _record(context, settings, base, served, precision, folder)
    return comparison


def _record(
    context: JobContext,
    settings: Settings,
    base: Base,
    loaded: modeling.PreTrainedModel,
    precision: str,
    folder: Path,
) -> None:
    """Golden values by the model that serves, which needs no room beside the self-test's own."""
    settings = settings.model_copy(update={"kv_cache_bytes": 1})
    model = serving_model(loaded, base, precision, settings, lambda detail: None)
    SelfTest(model, base, ChatText.load(base), precision).record(folder, context.check)


def _record_elsewhere(context: JobContext, settings: Settings, base: Base, folder: Path, device: str) -> None:
    """Golden values in the precisions that serve on other machines, one after the other. One that cannot be had is left
    out, with a warning: machines that serve in it will refuse the version."""
    asked = settings.serving_precision
    own = modeling.serving_precision(base, device, asked)
    precisions = [precision for precision in modeling.serving_precisions(base, asked) if precision != own]
    problems: list[str] = []
    for done, precision in enumerate(precisions):
        context.report(Progress(phase="publishing", step=done, total_steps=len(precisions)))
        context.check()
        began = time.monotonic()
        problem = _record_on_cpu(context, settings, base, folder, precision)
        if problem:
            problems.append(f"{precision} ({problem})")
        else:
            context.log(f"golden values in {precision}, too ({time.monotonic() - began:.1f} s)")
    if problems:
        context.warn(
            GOLDEN_VALUES_MISSING,
            f"no golden values in {', '.join(problems)}: machines that serve so will refuse this version",
        )


def _record_on_cpu(context: JobContext, settings: Settings, base: Base, folder: Path, precision: str) -> str:
    """Why there are no golden values in this precision; empty where there are."""
    _free_memory()  # of the precision before
    shape = read_shape(base.folder)
    # Files in 16 bits lie beside what is made of them.
    copied = 0 if shape.is_float32 else shape.file_bytes
    needed = copied + modeling.SERVED_BYTES[precision] * shape.num_weights + _RECORDING_BYTES
    free = devices.free_host_memory(settings)
    if needed > free:
        return f"it takes {needed / 1e9:.2f} GB of memory, and {max(0, free) / 1e9:.2f} GB are free"
    try:
        _record(context, settings, base, modeling.load_base(base, precision, devices.CPU), precision, folder)
    except KnowledgeEngineError as error:
        if error.reason is not Reason.NON_FINITE:
            raise
        return "its answers are not finite"
    except Exception as error:
        # Torch says so, too, where it has no kernel for a CPU.
        if not (modeling.is_out_of_memory(error) or isinstance(error, RuntimeError)):
            raise
        return f"{type(error).__name__}: {error}"[:200]
    return ""


def _compare(
    context: JobContext,
    spec: TrainingSpec,
    served: modeling.PreTrainedModel,
    material: _Material,
    folder: Path,
    num_steps: int,
    device: str,
    precision: str,
) -> HeldOutComparison:
    """Base against tuned model on the held-out rows; leaves the base as it was."""
    model = modeling.add_adapter(served, folder, "tuned")
    losses: list[float] = []
    for done, adapter in enumerate((None, "tuned"), 1):
        modeling.select_adapter(model, adapter)
        batches = evaluation_batches(material.held_out, device)
        if spec.method is TrainingMethod.SFT:
            loss, _ = mean_loss(model, batches, context.check)
        elif adapter is None:
            loss = math.log(2)  # the base is what it is compared with
        else:
            loss = _mean_preference_loss(model, batches, spec, context)
        demand_finite("the held-out loss", loss, num_steps)
        losses.append(loss)
        context.report(Progress(phase="evaluating", step=done, total_steps=2))
    modeling.unwrap(model)
    return HeldOutComparison(
        base_loss=losses[0],
        tuned_loss=losses[1],
        num_conversations=len(material.held_out),
        num_tokens=sum(map(num_trained, material.held_out)),
        precision=precision,
    )


@torch.no_grad()
def _mean_preference_loss(
    model: modeling.PeftModel, batches: Iterable[Batch], spec: TrainingSpec, context: JobContext
) -> float:
    """The loss per preference; tells in how many the chosen answer has gained on the rejected one."""
    margins: list[torch.Tensor] = []
    for batch in batches:
        context.check()
        margins.append(preference_margins(model, batch))
    all_margins = torch.cat(margins)
    won = int((all_margins > 0).sum())
    context.log(f"{won} of {len(all_margins)} held-out preferences: the chosen answer has gained on the other")
    return preference_loss(all_margins, spec).item() / len(all_margins)


def _publish(
    context: JobContext,
    settings: Settings,
    spec: TrainingSpec,
    base: Base,
    material: _Material,
    kept: Kept,
    registry: Registry,
    device: str,
) -> TrainingResult:
    context.report(Progress(phase="publishing"))
    trained = kept.trained

    def publish() -> ModelVersion:
        failpoint("publish.begin")
        folder = registry.stage(context.job.id, context.job.attempt)
        # Links, not copies: publishing moves its folder away, and what is kept must outlive a kill in the middle.
        shutil.copytree(kept.folder, folder, copy_function=os.link, dirs_exist_ok=True)
        return registry.publish(
            spec=spec,
            job_id=context.job.id,
            folder=folder,
            base=base,
            dataset_digest=material.dataset_digest,
            chat_template_digest=material.chat_template_digest,
            comparison=trained.comparison,
            parents=material.parents,
            training_precision=modeling.training_precision(device, use_qlora=spec.use_qlora),
            check=context.check,
        )

    version = publish_patiently(context, settings, registry, spec.model, publish)
    failpoint("publish.done")
    return TrainingResult(
        model=version.model,
        version=version.version,
        digest=version.digest,
        train_loss=trained.loss,
        comparison=trained.comparison,
        num_steps=trained.num_steps,
        num_tokens=trained.num_tokens,
        tokens_per_second=trained.num_tokens / trained.seconds,
        training_seconds=trained.seconds,
        peak_memory_bytes=trained.peak_memory_bytes,
        published_step=trained.published_step,
    )


def _free_memory() -> None:
    gc.collect()
    with contextlib.suppress(AttributeError):  # of glibc alone, which keeps what was freed in small pieces
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
