"""How results and errors reach people and programs: tables, JSON, one-line errors, exit codes.

Stdout carries results alone; whatever else there is to say goes to stderr.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from knowledge_engine import errors
from knowledge_engine.errors import KnowledgeEngineError

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console

    from knowledge_engine.client import Client

_Spec = TypeVar("_Spec", bound="BaseModel")

EXIT_CODES: dict[type[KnowledgeEngineError], tuple[int, str]] = {
    errors.InvalidSpecError: (3, "invalid request or setting"),
    errors.NotFoundError: (4, "not found"),
    errors.AlreadyExistsError: (5, "already exists"),
    errors.StateError: (6, "not possible now"),
    errors.ConflictError: (7, "changed meanwhile"),
    errors.AuthenticationError: (8, "API key missing or unknown"),
    errors.AccessError: (9, "not allowed"),
    errors.CapacityError: (10, "full, try later"),
    errors.UpstreamError: (11, "no answer, try later"),
    errors.IntegrityError: (12, "stored data is damaged"),
    errors.CredentialsError: (13, "our own credentials were refused"),
}

ServerOption = Annotated[
    str | None, typer.Option("--server", metavar="HOST:PORT", help="The server. Default KNOWLEDGE_SERVER or local.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for programs.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]

_UNKNOWN_WIDTH = 240  # of output that is no terminal: rows stay whole for grep and logs


def exit_code(error: KnowledgeEngineError) -> int:
    """The exit code of the error's class; 1 for an unexpected one."""
    return EXIT_CODES.get(type(error), (1, ""))[0]


def complain(error: KnowledgeEngineError) -> None:
    """One line on stderr: the reason, the message, the violations it does not name already, when to try again."""
    text = error.message
    rest = [f"{item.field}: {item.description}" for item in error.violations if item.description not in text]
    if rest:
        text += f" ({'; '.join(rest)})"
    if error.retry_after_seconds is not None:
        text += f"; try again in {max(1, round(error.retry_after_seconds))} s"
    if "request_id" in error.metadata and error.metadata["request_id"] not in text:
        text += f" (request {error.metadata['request_id']})"
    say(f"error: {' '.join(text.split())} [{error.reason.value}]")


def say(text: str) -> None:
    """A line for people, on stderr."""
    typer.echo(text, err=True)


def connect(server: str | None) -> Client:
    """A client of `--server`, KNOWLEDGE_SERVER or the local one."""
    from knowledge_engine.client import Client

    return Client(server)


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given; the server knows the defaults of the others."""
    return {name: value for name, value in values.items() if value is not None}


def checked(spec: type[_Spec], values: Mapping[str, Any]) -> _Spec:
    """The spec of the given values.

    Raises:
        InvalidSpecError: as the server would, paths beginning with `spec`.
    """
    from pydantic import ValidationError

    from knowledge_engine.core import invalid_spec

    try:
        return spec.model_validate(given(values))
    except ValidationError as error:
        raise invalid_spec(error, "spec") from None


def console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    made = Console(stderr=stderr, highlight=False, soft_wrap=False)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, width=_UNKNOWN_WIDTH)


def is_animated(console: Console) -> bool:
    """Whether bars may be drawn: on a terminal, unless NO_COLOR asks for plain text."""
    return console.is_terminal and not console.is_dumb_terminal and not console.no_color


def print_json(value: Any) -> None:
    """One JSON object on one line of stdout."""
    typer.echo(json.dumps(value, ensure_ascii=False))


def plain(item: BaseModel) -> dict[str, Any]:
    """A resource as JSON data: snake_case, plain numbers, RFC 3339 times."""
    return item.model_dump(mode="json")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(cell(value)) for value in row))
    console().print(table)


def print_facts(facts: Iterable[tuple[str, object]]) -> None:
    """One thing's fields, a line each; None ones left out."""
    shown = [(name, cell(value)) for name, value in facts if value is not None]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        typer.echo(f"{name:<{width}}  {value}")


def cell(value: object) -> str:
    match value:
        case None | "":
            return "-"
        case datetime():
            return value.astimezone().strftime("%Y-%m-%d %H:%M:%S")
        case float():
            return f"{value:.4g}"
        case _:
            return str(value)


def size(num_bytes: int) -> str:
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def span(seconds: float) -> str:
    """Its two largest units: `2 h 5 min`, `40 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def confirm(question: str, yes: bool) -> None:
    """Asks before something is destroyed; off a terminal only `--yes` will do."""
    if yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise typer.BadParameter("this cannot be undone: repeat it with --yes")
    if not typer.confirm(question, err=True):
        say("left as it was")
        raise typer.Exit(1)
