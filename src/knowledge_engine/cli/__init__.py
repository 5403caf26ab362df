"""The command line: `serve`, `demo`, and a thin client for every call of the contract. Parses, calls, prints.

Results go to stdout (tables for people, `--json` for programs), talk and progress to stderr. Heavy imports (grpc, the
service) wait inside the commands, so that `--help` is quick.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from knowledge_engine import __version__
from knowledge_engine.cli import chat, data, jobs, models, service
from knowledge_engine.cli.output import EXIT_CODES, complain, exit_code
from knowledge_engine.errors import KnowledgeEngineError

_EPILOG = (
    "Exit codes: 0 done; 1 unexpected, unhealthy, does not fit, or the job did not succeed; 2 usage; "
    + "; ".join(f"{code} {words}" for code, words in EXIT_CODES.values())
    + "; 130 interrupted. KNOWLEDGE_SERVER and KNOWLEDGE_API_KEY say which server to call, and with which key."
)


class _Commands(TyperGroup):
    """Turns our errors into one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KnowledgeEngineError as error:
            complain(error)
            raise typer.Exit(exit_code(error)) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    name="knowledge-engine",
    help="Turns a shop's product catalogue into a fine-tuned, served shopping assistant.",
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"knowledge-engine {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and leave.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    pass


app.command()(service.serve)
app.command()(service.demo)
app.command()(service.health)
app.command()(jobs.train)
app.add_typer(jobs.app, name="jobs")
app.add_typer(data.app, name="data")
app.add_typer(models.app, name="models")
app.command()(chat.chat)


def main() -> None:
    app()
