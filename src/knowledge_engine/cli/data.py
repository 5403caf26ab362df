"""`data generate|upload|check|list|show|preview|delete`."""

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
    console,
    is_animated,
    plain,
    print_facts,
    print_json,
    print_table,
    say,
    size,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from knowledge_engine.core import Dataset, DatasetPreview, LengthBin, PreviewedAnswer, PreviewedRow, PreviewedToken

app = typer.Typer(help="Catalogues, conversations, preferences and evaluations.", no_args_is_help=True)

_MAX_ISSUES_SHOWN = 20
_READ_BYTES = 2**20
_BAR_WIDTH = 40

FileArgument = Annotated[Path, typer.Argument(help="JSONL, CSV or JSON.", exists=True, dir_okay=False, readable=True)]
KindOption = Annotated[
    Literal["conversations", "catalogue", "preferences", "evaluation"], typer.Option(help="What the rows are.")
]
FormatOption = Annotated[
    Literal["jsonl", "csv", "sharegpt", "alpaca"] | None, typer.Option(help="Default: csv for a .csv file, else jsonl.")
]
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
    file: FileArgument,
    kind: KindOption = "conversations",
    format: FormatOption = None,  # noqa: A002 - the option's name
    json: JsonOption = False,
    server: ServerOption = None,
) -> None:
    """Store a file as a dataset."""
    from knowledge_engine.core import DatasetFormat, DatasetKind

    layout = format or _layout_of(file)
    with connect(server) as client, file.open("rb") as content:
        stored = client.upload_dataset(name, content, kind=DatasetKind(kind), format=DatasetFormat(layout))
    _print_dataset(stored, as_json=json)


@app.command()
def check(
    file: FileArgument,
    kind: KindOption = "conversations",
    format: FormatOption = None,  # noqa: A002 - the option's name
    limit: Annotated[int, typer.Option(min=1, help="Name at most so many broken rows.")] = 1000,
    json: JsonOption = False,
) -> None:
    """Check a file as an upload would, and name every broken row with its code. Exit status 1 where there is one."""
    from knowledge_engine.core import DatasetFormat, DatasetKind
    from knowledge_engine.rows import Rows

    with file.open("rb") as content:
        rows = Rows(
            DatasetKind(kind),
            DatasetFormat(format or _layout_of(file)),
            iter(lambda: content.read(_READ_BYTES), b""),
            max_violations=limit,
        )
        for _ in rows:
            pass
    if json:
        print_json({"num_rows": rows.num_rows, "violations": [item._asdict() for item in rows.violations]})
    elif rows.violations:
        print_table(
            ("WHERE", "CODE", "WHAT"), [(item.field, item.reason, item.description) for item in rows.violations]
        )
    else:
        say(f"{rows.num_rows} rows, all sound")
    if rows.violations:
        raise typer.Exit(1)


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
def preview(
    name: DatasetArgument,
    row: Annotated[int, typer.Option(min=1, help="The first row to show.")] = 1,
    rows: Annotated[int, typer.Option(min=1, max=100, help="How many rows to show.")] = 3,
    base: Annotated[str, typer.Option(help="Whose chat template and tokens.")] = "base",
    max_length: Annotated[int | None, typer.Option(help="Longest conversation in tokens.")] = None,
    truncation: Annotated[
        Literal["error", "drop", "keep_last_turns"], typer.Option(help="What becomes of longer ones.")
    ] = "error",
    json: JsonOption = False,
    server: ServerOption = None,
) -> None:
    """Show conversations or preferences as a training would see them: their tokens, and which of them are learned."""
    from knowledge_engine.core import Truncation

    with connect(server) as client:
        shown, whole = client.preview_dataset(
            name,
            first_row=row,
            num_rows=rows,
            base_model=base,
            max_length=max_length,
            truncation=Truncation(truncation),
        )
    if json:
        tokens = [_row_facts(item) for item in shown]
        lists = ("issues", "changes", "near_duplicates", "length_bins")
        nested: dict[str, object] = {field: [each._asdict() for each in getattr(whole, field)] for field in lists}
        nested |= {"lengths": whole.lengths._asdict()}
        print_json({"rows": tokens, "dataset": whole._asdict() | nested})
        return
    for item in shown:
        _print_row(item)
    lengths = whole.lengths
    print_facts(
        [
            ("rows", whole.num_rows),
            ("tokens", f"{whole.num_tokens}, {whole.num_trained_tokens} of them trained"),
            (
                "a row has",
                f"{lengths.min} to {lengths.max}, half of them up to {lengths.median}, 95 % up to {lengths.p95}",
            ),
            ("messages", ", ".join(f"{number} {role}" for role, number in sorted(whole.num_messages.items()))),
            ("learned", f"{whole.num_learned_messages} messages"),
            ("near-duplicates", _pairs(whole) if whole.num_near_duplicates else "none"),
            ("refused", f"{whole.num_issues} rows" if whole.num_issues else None),
            *((f"row {issue.row}", issue.problem) for issue in whole.issues[:_MAX_ISSUES_SHOWN]),
            ("truncated", f"{whole.num_changes} rows" if whole.num_changes else None),
            *((f"row {change.row}", change.problem) for change in whole.changes[:_MAX_ISSUES_SHOWN]),
        ]
    )
    if len(whole.length_bins) > 1:
        _print_lengths(whole.length_bins)


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


def _layout_of(file: Path) -> str:
    return "csv" if file.suffix.lower() == ".csv" else "jsonl"


def _pairs(whole: DatasetPreview) -> str:
    shown = ", ".join(f"{pair.row} of {pair.of_row}" for pair in whole.near_duplicates[:5])
    more = ", ..." if whole.num_near_duplicates > 5 else ""
    return f"{whole.num_near_duplicates} rows ({shown}{more})"


def _print_lengths(bins: Sequence[LengthBin]) -> None:
    """A bar for each range of lengths."""
    out = console()
    most = max(each.num_rows for each in bins)
    out.print("\ntokens  rows", style="bold")
    for each in bins:
        bar = "█" * round(_BAR_WIDTH * each.num_rows / most) or ("▏" if each.num_rows else "")
        out.print(f"{each.max_tokens:6}  {each.num_rows:6}  [green]{bar}[/]", highlight=False)


def _row_facts(row: PreviewedRow) -> dict[str, object]:
    rejected = row.rejected and row.rejected._asdict() | {"tokens": [token._asdict() for token in row.rejected.tokens]}
    return row._asdict() | {"tokens": [token._asdict() for token in row.tokens], "rejected": rejected}


def _print_row(row: PreviewedRow) -> None:
    """A row's text, of a preference the chosen one and then the rejected one."""
    out = console()
    sides: list[tuple[str, PreviewedRow | PreviewedAnswer]]
    sides = [("", row)] if row.rejected is None else [(", chosen", row), (", rejected", row.rejected)]
    for number, (name, side) in enumerate(sides):
        counts = f"{len(side.tokens)} tokens, {side.num_trained_tokens} trained"
        out.print(f"row {row.row}{name}: {counts}", style="bold")
        if number == 0 and row.problem:
            out.print(f"refused: {row.problem}", style="red")
        if number == 0 and row.change:
            out.print(row.change, style="yellow")
        _print_tokens(side.tokens)


def _print_tokens(tokens: Sequence[PreviewedToken]) -> None:
    """On a terminal trained tokens are green and control tokens underlined, and shades part the tokens; elsewhere «
    and » stand around what is trained."""
    from rich.text import Text

    out = console()
    is_plain = not is_animated(out)
    text, was_trained = Text(), False
    for position, token in enumerate(tokens):
        if token.is_trained is not was_trained and is_plain:
            text.append("«" if token.is_trained else "»")
        was_trained = token.is_trained
        shade = ("green", "bold green")[position % 2] if was_trained else ("dim", "default")[position % 2]
        text.append(token.text, f"{shade} underline" if token.is_control else shade)
    if was_trained and is_plain:
        text.append("»")
    out.print(text, end="\n\n")


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
