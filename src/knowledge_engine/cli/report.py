"""A job as one page for people: what it was asked, how it went, what came of it and of what.

`collect` asks a server for all of it, `render` makes the page. The page refers to nothing outside itself and runs no
script; the template escapes every text, since names, rows and log lines may hold anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel

from knowledge_engine import __version__
from knowledge_engine.cli import figures
from knowledge_engine.cli.course import Course
from knowledge_engine.cli.figures import Figure, Mark, Series, figure
from knowledge_engine.cli.output import size, span
from knowledge_engine.client import Client
from knowledge_engine.core import (
    Dataset,
    GenerationResult,
    HeldOutComparison,
    Job,
    JobEvent,
    JobKind,
    JobState,
    ModelVersion,
    TrainingMethod,
    TrainingResult,
    TrainingSpec,
)
from knowledge_engine.errors import NotFoundError

MAX_LOG_LINES = 2000  # the newest; a page of more is no reading

_MAX_NOTCHES = 200


@dataclass(frozen=True)
class JobReport:
    """What is known of a job. None and empty where it does not apply, is not there yet, or was deleted since."""

    job: Job
    course: Course
    version: ModelVersion | None = None
    source: Dataset | None = None
    """The conversations that were learned, or the catalogue that was talked about."""
    made: Dataset | None = None
    """The conversations that were generated."""
    parents: dict[str, str] = field(default_factory=dict)
    """Of the datasets that `source` was made of, their names by digest; an empty name where it was deleted since."""


class Setting(NamedTuple):
    name: str
    value: str
    default: str
    """Empty where there is none."""
    is_changed: bool


class Origin(NamedTuple):
    """One link of where something comes from."""

    what: str
    name: str
    digest: str
    facts: str


def collect(client: Client, job_id: str) -> JobReport:
    """Asks for the job as it stands now, and for what it was made of; waits for nothing.

    Raises:
        NotFoundError: JOB_NOT_FOUND.
    """
    job = client.get_job(job_id)
    course = Course.of(job, _events_so_far(client, job))
    if isinstance(job.spec, TrainingSpec):
        source = _dataset(client, job.spec.dataset)
        version = _version(client, job.result) if isinstance(job.result, TrainingResult) else None
        return JobReport(job, course, version=version, source=source, parents=_parents(client, source))
    source = _dataset(client, job.spec.catalogue) if job.spec.catalogue else None
    made = _dataset(client, job.result.dataset) if isinstance(job.result, GenerationResult) else None
    return JobReport(job, course, source=source, made=made, parents=_parents(client, source))


def render(report: JobReport, now: datetime) -> str:
    """The page, as of `now`."""
    job, course = report.job, report.course
    environment = Environment(
        loader=PackageLoader("knowledge_engine.cli", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"moment": _moment, "size": size, "span": span}
    return environment.get_template("report.html.j2").render(
        job=job,
        course=course,
        title=_title(report),
        now=now,
        engine_version=__version__,
        worked_seconds=_worked_seconds(course),
        key_figures=list(_key_figures(report)),
        comparison=list(_comparison(job)),
        measured=_measured(job),
        has_preferences=_has_preferences(job),
        rejections=_rejections(job),
        figures=list(_figures(course)),
        field=figures,
        settings=list(_settings(job)),
        origins=list(_origins(report)),
        entries=course.entries[-MAX_LOG_LINES:],
        num_left_out=max(0, len(course.entries) - MAX_LOG_LINES),
    )


# --- what is asked ------------------------------------------------------------------------------------------------


def _events_so_far(client: Client, job: Job) -> Iterator[JobEvent]:
    if not job.last_sequence:
        return
    with closing(client.watch_job(job.id)) as events:
        for event in events:
            yield event
            if event.sequence >= job.last_sequence:
                return


def _dataset(client: Client, name: str) -> Dataset | None:
    try:
        return client.get_dataset(name)
    except NotFoundError:
        return None


def _version(client: Client, result: TrainingResult) -> ModelVersion | None:
    """The published version; None also when another one bears its number by now."""
    try:
        version = client.get_model_version(result.model, result.version)
    except NotFoundError:
        return None
    return version if version.digest == result.digest else None


def _parents(client: Client, source: Dataset | None) -> dict[str, str]:
    if source is None or not source.parents:
        return {}
    names = {dataset.digest: dataset.name for dataset in client.list_datasets()}
    return {digest: names.get(digest, "") for digest in source.parents}


# --- what is told -------------------------------------------------------------------------------------------------


def _title(report: JobReport) -> str:
    spec, result = report.job.spec, report.job.result
    if isinstance(spec, TrainingSpec):
        return f"Training of {spec.model}{f':{result.version}' if isinstance(result, TrainingResult) else ''}"
    return f"Conversations for {result.dataset if isinstance(result, GenerationResult) else spec.dataset or '?'}"


def _key_figures(report: JobReport) -> Iterator[tuple[str, str]]:
    job, course = report.job, report.course
    match job.result:
        case TrainingResult() as result:
            if (compared := result.comparison) is not None:
                yield "Held-out loss", f"{compared.base_loss:.3f} → {compared.tuned_loss:.3f}"
                if not _has_preferences(job):
                    yield "Perplexity", f"{_perplexity(compared.base_loss)} → {_perplexity(compared.tuned_loss)}"
            yield "Training loss", f"{result.train_loss:.3f}"
            yield "Steps", f"{result.num_steps:,}"
            yield "Tokens", f"{result.num_tokens:,}"
            yield "Tokens per second", f"{result.tokens_per_second:,.0f}"
            yield "Training time", span(result.training_seconds)
            yield "Peak memory", size(result.peak_memory_bytes)
        case GenerationResult() as result:
            tried = result.num_conversations + result.num_rejected
            yield "Conversations", f"{result.num_conversations:,}"
            yield "Rejected", f"{result.num_rejected:,} of {tried:,}"
            yield "Words by", f"{result.provider} {result.language_model}".rstrip()
            if (usage := result.usage) is not None:
                yield "Requests", f"{usage.num_requests:,} ({usage.num_retries:,} repeated)"
                yield "Tokens read", f"{usage.prompt_tokens:,}"
                yield "Tokens written", f"{usage.completion_tokens:,}"
                yield "Cost", "not known" if usage.cost_usd is None else f"{usage.cost_usd:.4f} USD"
        case None:
            yield from _so_far(course)


def _so_far(course: Course) -> Iterator[tuple[str, str]]:
    progress = course.progress
    if progress is None:
        return
    yield "Phase", progress.phase
    if progress.step is not None and progress.total_steps:
        yield "Step", f"{progress.step:,} of {progress.total_steps:,}"
    for name, metric in (("Training loss", "loss"), ("Held-out loss", "eval_loss")):
        if curve := course.curves[metric]:
            yield name, f"{curve[-1].y:.3f}"
    if progress.eta_seconds is not None and course.state is JobState.RUNNING:
        yield "Time left", span(progress.eta_seconds)
    if curve := course.curves["memory_bytes"]:
        yield "Memory", size(round(max(point.y for point in curve)))


class Compared(NamedTuple):
    name: str
    loss: str
    perplexity: str


def _comparison(job: Job) -> Iterator[Compared]:
    if (measured := _measured(job)) is None:
        return
    base, tuned = measured.base_loss, measured.tuned_loss
    yield Compared("base", f"{base:.4f}", _perplexity(base))
    yield Compared("tuned", f"{tuned:.4f}", _perplexity(tuned))
    yield Compared("difference", f"{tuned - base:+.4f}".replace("-", "−"), _change(tuned - base))


def _has_preferences(job: Job) -> bool:
    return isinstance(job.spec, TrainingSpec) and job.spec.method is TrainingMethod.DPO


def _measured(job: Job) -> HeldOutComparison | None:
    return job.result.comparison if isinstance(job.result, TrainingResult) else None


def _perplexity(loss: float) -> str:
    """exp(loss), the perplexity of a loss in nats per token."""
    try:
        return f"{math.exp(loss):,.2f}"
    except OverflowError:
        return "beyond 1e308"


def _change(difference: float) -> str:
    """How a difference of losses changes the perplexity: their ratio."""
    try:
        return f"× {math.exp(difference):,.3f}"
    except OverflowError:
        return "beyond × 1e308"


def _rejections(job: Job) -> list[tuple[str, int]]:
    """Why conversations were not kept, the commonest reason first."""
    if not isinstance(job.result, GenerationResult):
        return []
    return sorted(job.result.rejections.items(), key=lambda item: (-item[1], item[0]))


def _worked_seconds(course: Course) -> float:
    """Over all attempts; one that goes on counts up to its newest event."""
    ends = [(attempt, attempt.end_time or course.last_time or attempt.start_time) for attempt in course.attempts]
    return sum((end - attempt.start_time).total_seconds() for attempt, end in ends)


def _loss_unit(job: Job) -> str:
    return job.spec.method.loss_unit if isinstance(job.spec, TrainingSpec) else ""


def _figures(course: Course) -> Iterator[Figure]:
    before = {attempt.number: f": {attempt.message}" if attempt.message else "" for attempt in course.attempts}
    marks = [
        Mark(
            attempt.first_step,
            f"attempt {attempt.number}",
            f"attempt {attempt.number} goes on here, {_moment(attempt.start_time)}{before.get(attempt.number - 1, '')}",
        )
        for attempt in course.attempts[1:]
        if attempt.first_step is not None
    ]
    notches = [
        Mark(entry.checkpoint.step, "checkpoint", f"checkpoint at step {entry.checkpoint.step:,}")
        for entry in course.checkpoints[-_MAX_NOTCHES:]
    ]
    curves = course.curves
    gibibytes = [point._replace(y=point.y / 2**30) for point in curves["memory_bytes"]]
    is_training = course.job.kind is JobKind.TRAINING
    draw = partial(figure, marks=marks, x_name="step" if is_training else "kept")
    losses = [Series("train", curves["loss"]), Series("held out", curves["eval_loss"], has_dots=True)]
    speed = "tokens_per_second" if is_training else "examples_per_second"
    of_what = "tokens" if is_training else "conversations"
    drawn = [
        draw("Loss", _loss_unit(course.job), losses, notches=notches),
        draw("Learning rate", "", [Series("learning rate", curves["learning_rate"])], from_zero=True),
        draw("Gradient norm", "before clipping", [Series("gradient norm", curves["grad_norm"])]),
        draw("Speed", f"{of_what} per second", [Series(of_what, curves[speed])], from_zero=True),
        draw("Memory", "GiB", [Series("memory", gibibytes)], from_zero=True),
    ]
    return (some for some in drawn if some is not None)


def _settings(job: Job) -> Iterator[Setting]:
    """Every field of the spec; those of a field that has fields by their path."""
    spec = job.spec
    for name, info in type(spec).model_fields.items():
        value = getattr(spec, name)
        if info.is_required():
            yield Setting(name, _value(value), "", is_changed=False)
        elif isinstance(value, BaseModel):
            for inner in type(value).model_fields:
                ours, default = getattr(value, inner), getattr(info.default, inner)
                yield Setting(f"{name}.{inner}", _value(ours), _value(default), is_changed=ours != default)
        else:
            yield Setting(name, _value(value), _value(info.default), is_changed=value != info.default)


def _value(value: Any) -> str:
    match value:
        case None | () | "":
            return "not set"
        case bool():
            return "yes" if value else "no"
        case tuple():
            return ", ".join(map(str, value))
        case _:
            return str(value)


def _origins(report: JobReport) -> Iterator[Origin]:
    job, source, version = report.job, report.source, report.version
    spec = job.spec
    for digest, name in report.parents.items():
        yield Origin("catalogue" if isinstance(spec, TrainingSpec) else "parent", name or "deleted since", digest, "")
    is_training = isinstance(spec, TrainingSpec)
    asked = spec.dataset if isinstance(spec, TrainingSpec) else spec.catalogue
    what = "catalogue" if not is_training else "preferences" if _has_preferences(job) else "conversations"
    if source is not None:
        yield _dataset_origin(what, source)
    elif asked:
        digest = version.dataset_digest if version is not None else ""
        yield Origin(what, asked, digest, "deleted since")
    if isinstance(spec, TrainingSpec):
        if version is not None:
            revision = f"revision {version.base_revision}" if version.base_revision else ""
            facts = ", ".join(filter(None, (version.base_source, revision)))
            yield Origin("base model", version.base_model, version.base_digest, facts)
            yield Origin("chat template", "", version.chat_template_digest, "")
        else:
            yield Origin("base model", spec.base_model, "", "its digest is told by the version that is published")
    tracked = f"tracker run {job.tracker_run.url or job.tracker_run.id}" if job.tracker_run is not None else ""
    yield Origin("job", job.id, "", tracked)
    if isinstance(job.result, TrainingResult):
        name = f"{job.result.model}:{job.result.version}"
        known = f"trained in {version.training_precision}, {size(version.size_bytes)}" if version else "deleted since"
        yield Origin("model version", name, job.result.digest, known)
    elif isinstance(job.result, GenerationResult):
        if report.made is not None:
            yield _dataset_origin("conversations", report.made)
        else:
            yield Origin("conversations", job.result.dataset, job.result.digest, "deleted since")


def _dataset_origin(what: str, dataset: Dataset) -> Origin:
    made_by = f", made by job {dataset.job_id}" if dataset.job_id else ", uploaded"
    facts = f"{dataset.num_rows:,} rows, {size(dataset.size_bytes)}{made_by}, {_moment(dataset.create_time)}"
    return Origin(what, dataset.name, dataset.digest, facts)


def _moment(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M:%S} UTC"
