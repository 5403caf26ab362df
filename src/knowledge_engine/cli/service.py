"""`serve`, `demo` and `health`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from knowledge_engine.cli.output import JsonOption, ServerOption, connect, print_json, print_table


def serve(
    only: Annotated[
        Literal["server", "engine", "gateway"] | None, typer.Option(help="Run this part alone, unsupervised.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the addresses as JSON on stdout, once ready.")] = False,
) -> None:
    """Run the service: gRPC server, REST gateway and engine, supervised. Ctrl-C stops it cleanly."""
    from knowledge_engine.settings import load_settings
    from knowledge_engine.supervisor import run_alone, run_service

    settings = load_settings()
    if only is not None:
        run_alone(settings, only)
    raise typer.Exit(run_service(settings, print_json if json else None))


def demo(
    serve: Annotated[bool, typer.Option("--serve", help="Leave the service up afterwards, until Ctrl-C.")] = False,
    online: Annotated[bool, typer.Option("--online", help="Use the outside services whose keys are set.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """From a catalogue to a fine-tuned, served shopping assistant, in minutes, on this machine."""
    from knowledge_engine.cli.demo import run_demo
    from knowledge_engine.settings import load_settings

    raise typer.Exit(run_demo(load_settings(), serve=serve, online=online, as_json=json))


def health(json: JsonOption = False, server: ServerOption = None) -> None:
    """Ask whether the service is healthy; exit code 0 only if it is."""
    with connect(server) as client:
        statuses = client.health()
    is_healthy = statuses[""] == "SERVING"
    services = {name: status for name, status in statuses.items() if name}
    if json:
        print_json({"status": statuses[""], "services": services})
    else:
        print_table(("SERVICE", "STATUS"), [("overall", statuses[""]), *services.items()])
    if not is_healthy:
        raise typer.Exit(1)
