"""`models list|show|versions|export|delete`."""

from __future__ import annotations

from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knowledge_engine.cli.output import (
    JsonOption,
    ServerOption,
    YesOption,
    confirm,
    connect,
    plain,
    print_facts,
    print_json,
    print_table,
    say,
    size,
)

if TYPE_CHECKING:
    from knowledge_engine.core import ModelVersion

app = typer.Typer(help="Tuned models and their versions.", no_args_is_help=True)

ModelArgument = Annotated[str, typer.Argument(help="The model's name.", show_default=False)]
LimitOption = Annotated[int, typer.Option(min=1, help="At most so many.")]


@app.command("list")
def list_models(limit: LimitOption = 50, json: JsonOption = False, server: ServerOption = None) -> None:
    """List models by name."""
    with connect(server) as client:
        models = list(islice(client.list_models(), limit))
    if json:
        print_json({"models": [plain(model) for model in models]})
        return
    rows = []
    for model in models:
        latest = model.latest_version
        comparison = latest.comparison if latest else None
        rows.append(
            (
                model.name,
                model.num_versions,
                latest.version if latest else None,
                latest.base_model if latest else None,
                comparison.base_loss if comparison else None,
                comparison.tuned_loss if comparison else None,
                model.create_time,
            )
        )
    print_table(("MODEL", "VERSIONS", "LATEST", "BASE", "BASE LOSS", "TUNED LOSS", "CREATED"), rows)


@app.command()
def show(
    model: Annotated[str, typer.Argument(help="A model, or one version of it: NAME:N.", show_default=False)],
    json: JsonOption = False,
    server: ServerOption = None,
) -> None:
    """Show a model with its newest version, or one version."""
    name, number = _parse(model)
    with connect(server) as client:
        if number is not None:
            _print_version(client.get_model_version(name, number), as_json=json)
            return
        found = client.get_model(name)
    if json:
        print_json(plain(found))
        return
    print_facts([("model", found.name), ("versions", found.num_versions), ("created", found.create_time)])
    if found.latest_version is not None:
        typer.echo()
        _print_version(found.latest_version, as_json=False)


@app.command()
def versions(
    model: ModelArgument, limit: LimitOption = 50, json: JsonOption = False, server: ServerOption = None
) -> None:
    """List the versions of a model, newest first."""
    with connect(server) as client:
        found = list(islice(client.list_model_versions(model), limit))
    if json:
        print_json({"model_versions": [plain(version) for version in found]})
        return
    rows = [
        (
            f"{item.model}:{item.version}",
            item.base_model,
            item.comparison.base_loss if item.comparison else None,
            item.comparison.tuned_loss if item.comparison else None,
            size(item.size_bytes),
            item.create_time,
            item.digest[:19],
        )
        for item in found
    ]
    print_table(("VERSION", "BASE", "BASE LOSS", "TUNED LOSS", "SIZE", "CREATED", "DIGEST"), rows)


@app.command()
def export(
    version: Annotated[str, typer.Argument(metavar="NAME:N", help="The version to merge.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The folder to write; it must not be there.", show_default=False)],
    json: JsonOption = False,
) -> None:
    """Merge a version into its base and write one model folder, checked against the version.

    Works on this machine's KNOWLEDGE_DATA_DIR, without a server.
    """
    from knowledge_engine.export import export_version
    from knowledge_engine.settings import load_settings

    name, number = _parse(version)
    if number is None:
        raise typer.BadParameter(f"say which version, such as {name}:1")
    done = export_version(load_settings(), name, number, out.absolute(), lambda phase: say(f"{phase} ..."))
    if json:
        print_json(asdict(done) | {"folder": str(done.folder)})
        return
    print_facts(
        [
            ("folder", done.folder),
            ("precision", done.precision),
            ("size", size(done.size_bytes)),
            ("checked", f"{done.num_tokens} tokens, {done.num_same} with the same likeliest next one"),
            ("differs by", f"at most {done.max_difference:.1e} nats in a log-probability"),
        ]
    )


@app.command()
def delete(
    version: Annotated[str, typer.Argument(metavar="NAME:N", help="The version to delete.", show_default=False)],
    yes: YesOption = False,
    json: JsonOption = False,
    server: ServerOption = None,
) -> None:
    """Delete one version and its files; its number is never given again."""
    name, number = _parse(version)
    if number is None:
        raise typer.BadParameter(f"say which version, such as {name}:1")
    confirm(f"Delete {name}:{number}?", yes)
    with connect(server) as client:
        client.delete_model_version(name, number)
    if json:
        print_json({"deleted": f"{name}:{number}"})
    else:
        say(f"version {name}:{number} deleted")


def _parse(model: str) -> tuple[str, int | None]:
    name, separator, number = model.partition(":")
    if not separator:
        return name, None
    if not (number.isascii() and number.isdecimal()):
        raise typer.BadParameter(f"{model!r}: versions are numbers, such as {name}:1")
    return name, int(number)


def _print_version(version: ModelVersion, *, as_json: bool) -> None:
    if as_json:
        print_json(plain(version))
        return
    comparison = version.comparison
    facts: list[tuple[str, object]] = [
        ("version", f"{version.model}:{version.version}"),
        ("digest", version.digest),
        ("base", version.base_model),
        ("dataset", version.spec.dataset),
        ("trained in", version.training_precision),
        ("size", size(version.size_bytes)),
        ("created", version.create_time),
        ("job", version.job_id),
    ]
    if comparison is not None:
        held_out = f"{comparison.num_conversations} conversations, {comparison.precision}"
        facts += [
            ("base loss", comparison.base_loss),
            ("tuned loss", comparison.tuned_loss),
            ("held out", held_out),
        ]
    print_facts(facts)
