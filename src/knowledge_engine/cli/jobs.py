"""`train` and `jobs list|show|watch|report|pause|resume|cancel`."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from knowledge_engine.cli.output import (
    JsonOption,
    ServerOption,
    YesOption,
    checked,
    confirm,
    connect,
    console,
    given,
    is_animated,
    plain,
    print_facts,
    print_json,
    print_table,
    say,
    size,
    span,
)

if TYPE_CHECKING:
    from knowledge_engine.client import Client
    from knowledge_engine.client_convert import TrainingEstimate
    from knowledge_engine.core import GenerationUsage, Job, TrainingSpec

app = typer.Typer(help="Look at jobs, pause, resume and cancel them.", no_args_is_help=True)

JobArgument = Annotated[str, typer.Argument(help="The job's id.", show_default=False)]
RECONNECTING = "the server does not answer; reconnecting ..."
DetachOption = Annotated[bool, typer.Option("--detach", help="Only queue the job; do not wait for its end.")]


def train(
    dataset: Annotated[str, typer.Option(help="The conversations, or preferences, to learn from.", show_default=False)],
    model: Annotated[str, typer.Option(help="The model to publish a new version of.", show_default=False)],
    base_model: Annotated[str | None, typer.Option(help="The base to adapt.")] = None,
    qlora: Annotated[bool | None, typer.Option(help="Load the base in 4-bit NF4.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of --epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Conversations in one forward pass at most.")] = None,
    accumulation: Annotated[int | None, typer.Option(help="Forward passes in one step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    scheduler: Annotated[
        Literal["linear", "cosine", "constant"] | None, typer.Option(help="Learning rate after warm-up.")
    ] = None,
    warmup_ratio: Annotated[float | None, typer.Option(help="Share of the steps to warm up over.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="AdamW's weight decay.")] = None,
    max_grad_norm: Annotated[float | None, typer.Option(help="Gradient clipping; 0 turns it off.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest conversation in tokens.")] = None,
    truncation: Annotated[
        Literal["error", "drop", "keep_last_turns"] | None, typer.Option(help="What becomes of longer ones.")
    ] = None,
    method: Annotated[Literal["sft", "dpo"] | None, typer.Option(help="On conversations, or on preferences.")] = None,
    beta: Annotated[float | None, typer.Option(help="DPO: how closely it stays to the base.")] = None,
    start_from: Annotated[str | None, typer.Option(help="A version to go on from, such as demo:3.")] = None,
    eval_split: Annotated[float | None, typer.Option(help="Share held out for evaluation.")] = None,
    split_by: Annotated[
        Literal["conversation", "product"] | None, typer.Option(help="What must not be on both sides.")
    ] = None,
    eval_dataset: Annotated[str | None, typer.Option(help="An evaluation, instead of --eval-split.")] = None,
    eval_steps: Annotated[int | None, typer.Option(help="Evaluate every so many steps.")] = None,
    logging_steps: Annotated[int | None, typer.Option(help="Report every so many steps.")] = None,
    best: Annotated[bool, typer.Option("--best", help="Publish the step with the lowest evaluation loss.")] = False,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many evaluations without a new lowest loss.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every choice.")] = None,
    lora_rank: Annotated[int | None, typer.Option(help="Rank of the adapter.")] = None,
    lora_alpha: Annotated[int | None, typer.Option(help="Scale of the adapter.")] = None,
    lora_dropout: Annotated[float | None, typer.Option(help="Dropout before the adapter.")] = None,
    target_module: Annotated[list[str] | None, typer.Option(help="A linear module to adapt; repeatable.")] = None,
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale the adapter by alpha / sqrt(rank).")] = False,
    dora: Annotated[bool, typer.Option("--dora", help="Learn lengths apart from directions.")] = False,
    neftune_noise_alpha: Annotated[float | None, typer.Option(help="Noise on the embeddings; 0 adds none.")] = None,
    save_steps: Annotated[int | None, typer.Option(help="Checkpoint every so many steps.")] = None,
    auto_find_batch_size: Annotated[
        bool, typer.Option("--auto-find-batch-size", help="Go on once, taking less, when memory runs out.")
    ] = False,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Only say what it would take and whether it fits.")
    ] = False,
    detach: DetachOption = False,
    json: JsonOption = False,
    server: ServerOption = None,
) -> None:
    """Fine-tune a model on a dataset and publish it as a new version.

    What is not given is left to the server's defaults.
    """
    lora = {
        "rank": lora_rank,
        "alpha": lora_alpha,
        "dropout": lora_dropout,
        "target_modules": target_module,
        "use_rslora": rslora or None,
        "use_dora": dora or None,
    }
    values = {
        "dataset": dataset,
        "model": model,
        "base_model": base_model,
        "use_qlora": qlora,
        "lora": given(lora) or None,
        "learning_rate": learning_rate,
        "lr_scheduler_type": scheduler,
        "warmup_ratio": warmup_ratio,
        "weight_decay": weight_decay,
        "max_grad_norm": max_grad_norm,
        "num_train_epochs": epochs,
        "max_steps": max_steps,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "max_length": max_length,
        "truncation": truncation,
        "method": method,
        "beta": beta,
        "start_from": start_from,
        "eval_split": eval_split,
        "split_by": split_by,
        "eval_dataset": eval_dataset,
        "load_best_model_at_end": best or None,
        "early_stopping_patience": patience,
        "eval_steps": eval_steps,
        "logging_steps": logging_steps,
        "seed": seed,
        "save_steps": save_steps,
        "auto_find_batch_size": auto_find_batch_size or None,
        "neftune_noise_alpha": neftune_noise_alpha,
    }
    from knowledge_engine.core import TrainingSpec

    spec = checked(TrainingSpec, values)
    with connect(server) as client:
        if estimate:
            _show_estimate(client.estimate_training(spec), spec, as_json=json)
        else:
            follow(client, client.create_training_job(spec), detach=detach, as_json=json)


@app.command("list")
def list_jobs(
    limit: Annotated[int, typer.Option(min=1, help="At most so many, newest first.")] = 50,
    json: JsonOption = False,
    server: ServerOption = None,
) -> None:
    """List jobs, newest first."""
    with connect(server) as client:
        jobs = list(islice(client.list_jobs(), limit))
    if json:
        print_json({"jobs": [plain(job) for job in jobs]})
        return
    rows = [(job.id, job.kind.value, _state(job), _progress(job), job.create_time, _target(job)) for job in jobs]
    print_table(("JOB", "KIND", "STATE", "PROGRESS", "CREATED", "MAKES"), rows)


@app.command()
def show(job: JobArgument, json: JsonOption = False, server: ServerOption = None) -> None:
    """Show one job."""
    with connect(server) as client:
        print_job(client.get_job(job), as_json=json)


@app.command()
def watch(
    job: JobArgument,
    after: Annotated[int, typer.Option(min=0, help="Only events after this sequence number.")] = 0,
    only_lines: Annotated[bool, typer.Option("--plain", help="Lines instead of curves, on a terminal too.")] = False,
    json: JsonOption = False,
    server: ServerOption = None,
) -> None:
    """Follow a job to its end: curves on a terminal, else its events line by line; with --json one event a line.

    Ctrl-C leaves the job running. It waits for a server that restarts, and for a paused job.
    """
    with connect(server) as client:
        try:
            if json:
                for event in client.watch_job(job, after, on_reconnect=lambda: say(RECONNECTING)):
                    print_json(plain(event))
            elif is_animated(console(stderr=True)) and not only_lines:
                _show_curves(client, job, after)
            else:
                _show_events(client, job, after, only_lines=only_lines)
        except KeyboardInterrupt:
            _say_how_to_return(job)
            raise
        ended = client.get_job(job)
        if not json:
            print_job(ended)
    if ended.state.value != "SUCCEEDED":
        raise typer.Exit(1)


@app.command()
def report(
    job: JobArgument,
    out: Annotated[
        Path | None, typer.Option(help="Where to write it. Default JOB.html here.", dir_okay=False, writable=True)
    ] = None,
    json: JsonOption = False,
    server: ServerOption = None,
) -> None:
    """Write one page about a job: curves, comparison, settings, where it comes from, log. It needs no network."""
    from knowledge_engine.cli.report import collect, render
    from knowledge_engine.core import utc_now

    with connect(server) as client:
        found = collect(client, job)
    path = out or Path(f"{found.job.id}.html")
    try:
        path.write_text(render(found, utc_now()), encoding="utf-8")
    except OSError as error:
        raise typer.BadParameter(f"--out {path} cannot be written: {error.strerror}") from None
    if json:
        print_json({"report": str(path)})
    else:
        typer.echo(path)


@app.command()
def pause(job: JobArgument, json: JsonOption = False, server: ServerOption = None) -> None:
    """Put a job aside; a running one as soon as its work is safe."""
    with connect(server) as client:
        print_job(client.pause_job(job), as_json=json)


@app.command()
def resume(job: JobArgument, json: JsonOption = False, server: ServerOption = None) -> None:
    """Queue a paused job again; it goes on where it was."""
    with connect(server) as client:
        print_job(client.resume_job(job), as_json=json)


@app.command()
def cancel(job: JobArgument, yes: YesOption = False, json: JsonOption = False, server: ServerOption = None) -> None:
    """Cancel a job; its work is lost."""
    confirm(f"Cancel job {job}?", yes)
    with connect(server) as client:
        print_job(client.cancel_job(job), as_json=json)


def follow(client: Client, job: Job, *, detach: bool, as_json: bool) -> None:
    """Waits for a new job's end with progress on stderr, then prints it; exit code 1 unless it SUCCEEDED."""
    if not detach:
        try:
            _show_events(client, job.id)
        except KeyboardInterrupt:
            _say_how_to_return(job.id)
            raise
        job = client.get_job(job.id)
    print_job(job, as_json=as_json)
    if not detach and job.state.value != "SUCCEEDED":
        raise typer.Exit(1)


def _show_events(client: Client, job: str, after: int = 0, *, only_lines: bool = False) -> None:
    from knowledge_engine.cli.progress import JobView

    with JobView(job, only_lines=only_lines) as view:
        view.show_all(client.watch_job(job, after, on_reconnect=lambda: view.say(RECONNECTING)))


def _show_curves(client: Client, job: str, after: int) -> None:
    from knowledge_engine.cli.live import LiveView

    with LiveView(client.get_job(job)) as view:
        view.show_all(client.watch_job(job, after, on_reconnect=lambda: view.say(RECONNECTING)))


def _say_how_to_return(job: str) -> None:
    say(f"job {job} goes on; knowledge-engine jobs watch {job} shows it again")


def print_job(job: Job, *, as_json: bool = False) -> None:
    if as_json:
        print_json(plain(job))
        return
    facts: list[tuple[str, object]] = [
        ("job", job.id),
        ("kind", job.kind.value),
        ("state", _state(job)),
        ("progress", _progress(job) or None),
        ("created", job.create_time),
        ("checkpoint", f"step {job.checkpoint_step}" if job.checkpoint_step is not None else None),
        ("started", job.start_time),
        ("ended", job.end_time),
        ("creator", job.creator or None),
        ("tracker run", (job.tracker_run.url or job.tracker_run.id) if job.tracker_run else None),
    ]
    if job.error is not None:
        facts.append(("error", f"{job.error['message']} [{job.error['reason']}]"))
    print_facts([*facts, *_result_facts(job)])


def _result_facts(job: Job) -> list[tuple[str, object]]:
    result = job.result
    if result is None:
        return []
    if result.type == "generation":
        return [
            ("dataset", result.dataset),
            ("digest", result.digest),
            ("conversations", result.num_conversations),
            ("rejected", result.num_rejected),
            ("rejected for", ", ".join(f"{reason} {count}" for reason, count in result.rejections.items()) or None),
            ("provider", f"{result.provider} {result.language_model}".rstrip()),
            *(_usage_facts(result.usage) if result.usage else ()),
        ]
    facts: list[tuple[str, object]] = [
        ("model version", f"{result.model}:{result.version}"),
        ("digest", result.digest),
        ("steps", result.num_steps),
        ("tokens/s", result.tokens_per_second),
        ("peak memory", size(result.peak_memory_bytes)),
        ("train loss", result.train_loss),
    ]
    if result.comparison is not None:
        facts += [("base loss", result.comparison.base_loss), ("tuned loss", result.comparison.tuned_loss)]
    return facts


def _usage_facts(usage: GenerationUsage) -> list[tuple[str, object]]:
    return [
        ("requests", f"{usage.num_requests}, {usage.num_retries} of them repeated"),
        ("tokens", f"{usage.prompt_tokens} read, {usage.completion_tokens} written"),
        ("cost", None if usage.cost_usd is None else f"{usage.cost_usd:.4f} USD"),
    ]


def _state(job: Job) -> str:
    """The state, with the place in the queue, and whether it is about to change."""
    if job.pause_requested:
        return f"{job.state.value}, pausing"
    return job.state.value if job.queue_position is None else f"{job.state.value}, place {job.queue_position}"


def _show_estimate(estimate: TrainingEstimate, asked: TrainingSpec, *, as_json: bool) -> None:
    """What a run would take; exit code 1 when it would be refused, with the settings that would not be."""
    if as_json:
        print_json(plain(estimate))
    else:
        print_facts(_estimate_facts(estimate, asked))
    if not estimate.fits:
        raise typer.Exit(1)


def _estimate_facts(estimate: TrainingEstimate, asked: TrainingSpec) -> list[tuple[str, object]]:
    memory = estimate.memory
    held = ", ".join(f"{holder} {size(held)}" for holder, held in estimate.held_memory_bytes.items())
    time = None if estimate.training_seconds is None else f"about {span(estimate.training_seconds)}"
    facts: list[tuple[str, object]] = [
        ("fits", "yes" if estimate.fits else f"no: {estimate.refusal}"),
        ("memory", f"{size(memory.expected_bytes)} ({size(memory.low_bytes)} to {size(memory.high_bytes)})"),
        ("layers", "computed twice (gradient checkpointing)" if estimate.gradient_checkpointing else None),
        ("there is", f"{size(estimate.total_memory_bytes)} on {estimate.device}"),
        ("held now", held or None),
        ("disk", f"{size(estimate.disk_bytes)} of {size(estimate.free_disk_bytes)} free"),
        ("steps", f"{estimate.num_steps:,}"),
        ("tokens", f"{estimate.num_tokens:,}"),
        ("time", time or "not known before the first run on this base"),
    ]
    if estimate.nearest_spec is not None:
        facts.append(("would fit", _differences(asked, estimate.nearest_spec) or None))
    return facts


def _differences(asked: TrainingSpec, fitting: TrainingSpec) -> str:
    """The fitting settings that are not those asked for, as options of `train`."""
    before, after = asked.model_dump(mode="json"), fitting.model_dump(mode="json")
    changed = {name: after[name] for name in after if after[name] != before[name] and after[name] is not None}
    lora = changed.pop("lora", {})
    changed |= {f"lora_{name}": value for name, value in lora.items() if value != before["lora"][name]}
    return " ".join(_option(name, value) for name, value in changed.items())


_OPTION_NAMES = {
    "use_qlora": "qlora",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch-size",
    "gradient_accumulation_steps": "accumulation",
    "lr_scheduler_type": "scheduler",
    "lora_target_modules": "target-module",
}


def _option(name: str, value: object) -> str:
    word = _OPTION_NAMES.get(name, name.replace("_", "-"))
    if isinstance(value, bool):
        return f"--{word}" if value else f"--no-{word}"
    values = value if isinstance(value, list) else [value]
    return " ".join(f"--{word} {item}" for item in values)


def _progress(job: Job) -> str:
    if job.progress is None or job.state.is_terminal:
        return ""
    steps = f" {job.progress.step}/{job.progress.total_steps}" if job.progress.total_steps else ""
    return f"{job.progress.phase}{steps}"


def _target(job: Job) -> str | None:
    from knowledge_engine.core import TrainingSpec

    if isinstance(job.spec, TrainingSpec):
        return job.spec.model
    return job.spec.dataset
