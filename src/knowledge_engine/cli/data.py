"""`data generate|upload|list|show|delete`."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from knowledge_engine.cli.jobs import DetachOption, follow
from knowledge_engine.cli.output import (
    JsonOption,
    ServerOption,
    YesOption,
    checked,
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
    from knowledge_engine.core import Dataset

app = typer.Typer(help="Catalogues and conversations.", no_args_is_help=True)

DatasetArgument = Annotated[str, typer.Argument(help="The dataset's name.", show_default=False)]


@app.command()
def generate(
    conversations: Annotated[int, typer.Option("--conversations", "-n", help="How many.", show_default=False)],
    catalogue: Annotated[str | None, typer.Option(help="The catalogue. Default: the newest.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Name of the dataset to create.")] = None,
    topic: Annotated[list[str] | None, typer.Option(help="Talk only about matching products; repeatable.")] = None,
    difficulty: Annotated[
        Literal["simple", "medium", "complex"] | None, typer.Option(help="How demanding they are.")
    ] = None,
    product_data: Annotated[bool | None, typer.Option(help="Show the products to the assistant.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every choice.")] = None,
    provider: Annotated[
        Literal["offline", "openai"] | None,
        typer.Option(help="Who puts them into words. Default: openai where the service has a key, else offline."),
    ] = None,
    detach: DetachOption = False,
    json: JsonOption = False,
    server: ServerOption = None,
) -> None:
    """Generate training conversations grounded in a catalogue."""
    from knowledge_engine.core import GenerationSpec

    values = {
        "num_conversations": conversations,
        "catalogue": catalogue,
        "dataset": dataset,
        "topics": topic or None,
        "difficulty_level": difficulty,
        "include_product_data": product_data,
        "seed": seed,
        "provider": provider,
    }
    spec = checked(GenerationSpec, values)
    with connect(server) as client:
        follow(client, client.create_generation_job(spec), detach=detach, as_json=json)


@app.command()
def upload(
    name: DatasetArgument,
    file: Annotated[Path, typer.Argument(help="JSONL or CSV.", exists=True, dir_okay=False, readable=True)],
    kind: Annotated[Literal["conversations", "catalogue"], typer.Option(help="What the rows are.")] = "conversations",
    format: Annotated[  # noqa: A002 - the option's name
        Literal["jsonl", "csv"] | None, typer.Option(help="Default: csv for a .csv file, else jsonl.")
    ] = None,
    json: JsonOption = False,
    server: ServerOption = None,
) -> None:
    """Store a file as a dataset."""
    from knowledge_engine.core import DatasetFormat, DatasetKind

    layout = format or ("csv" if file.suffix.lower() == ".csv" else "jsonl")
    with connect(server) as client, file.open("rb") as content:
        stored = client.upload_dataset(name, content, kind=DatasetKind(kind), format=DatasetFormat(layout))
    _print_dataset(stored, as_json=json)


@app.command("list")
def list_datasets(
    limit: Annotated[int, typer.Option(min=1, help="At most so many, newest first.")] = 50,
    json: JsonOption = False,
    server: ServerOption = None,
) -> None:
    """List datasets, newest first."""
    with connect(server) as client:
        datasets = list(islice(client.list_datasets(), limit))
    if json:
        print_json({"datasets": [plain(dataset) for dataset in datasets]})
        return
    rows = [
        (item.name, item.kind.value, item.num_rows, size(item.size_bytes), item.create_time, item.digest[:19])
        for item in datasets
    ]
    print_table(("DATASET", "KIND", "ROWS", "SIZE", "CREATED", "DIGEST"), rows)


@app.command()
def show(name: DatasetArgument, json: JsonOption = False, server: ServerOption = None) -> None:
    """Show one dataset."""
    with connect(server) as client:
        _print_dataset(client.get_dataset(name), as_json=json)


@app.command()
def delete(
    name: DatasetArgument, yes: YesOption = False, json: JsonOption = False, server: ServerOption = None
) -> None:
    """Delete a dataset that no unfinished job uses."""
    confirm(f"Delete dataset {name}?", yes)
    with connect(server) as client:
        client.delete_dataset(name)
    if json:
        print_json({"deleted": name})
    else:
        say(f"dataset {name} deleted")


def _print_dataset(dataset: Dataset, *, as_json: bool) -> None:
    if as_json:
        print_json(plain(dataset))
        return
    print_facts(
        [
            ("dataset", dataset.name),
            ("kind", dataset.kind.value),
            ("rows", dataset.num_rows),
            ("size", size(dataset.size_bytes)),
            ("digest", dataset.digest),
            ("created", dataset.create_time),
            ("made from", ", ".join(dataset.parents) or None),
            ("job", dataset.job_id or None),
        ]
    )
