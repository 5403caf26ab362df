"""`serve`, `demo` and `health`."""

from __future__ import annotations

import asyncio
import importlib.util
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from knowledge_engine.cli.output import JsonOption, ServerOption, connect, print_json, print_table
from knowledge_engine.errors import Reason, UpstreamError

if TYPE_CHECKING:
    from knowledge_engine.settings import Settings

Part = Literal["server", "engine", "gateway"]

_SERVING, _NOT_SERVING = "SERVING", "NOT_SERVING"
_ENGINE_LOOKS = 60  # 50 ms apart; a ready engine says so within a few


def serve(
    only: Annotated[
        Part | None, typer.Option(help="Run this part alone, unsupervised.", envvar="KNOWLEDGE_ONLY")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the addresses as JSON on stdout, once ready.")] = False,
) -> None:
    """Run the service: gRPC server, REST gateway and engine, supervised. Ctrl-C stops it cleanly."""
    from knowledge_engine.settings import load_settings
    from knowledge_engine.supervisor import run_alone, run_service

    settings = load_settings()
    if only in (None, "engine") and importlib.util.find_spec("torch") is None:
        raise UpstreamError(
            "the engine needs torch, which is not installed here: run `serve --only server` or `serve --only gateway`",
            reason=Reason.ENGINE_UNAVAILABLE,
        )
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


def health(
    context: typer.Context,
    json: JsonOption = False,
    server: ServerOption = None,
    local: Annotated[
        bool, typer.Option("--local", help="Ask what `serve` runs here with these settings: for health checks.")
    ] = False,
    only: Annotated[
        Part | None, typer.Option(help="With --local: ask the part that runs here alone.", envvar="KNOWLEDGE_ONLY")
    ] = None,
) -> None:
    """Ask whether the service is healthy; exit code 0 only if it is."""
    if local and server is not None:
        raise typer.BadParameter("--local asks the addresses of the settings; leave --server out")
    source = context.get_parameter_source("only")  # KNOWLEDGE_ONLY may stand there for `serve` alone
    if not local and source is not None and source.name == "COMMANDLINE":
        raise typer.BadParameter("--only goes with --local")
    if local:
        from knowledge_engine.settings import load_settings

        statuses = _local_health(load_settings(), only)
    else:
        with connect(server) as client:
            statuses = client.health()
    services = {name: status for name, status in statuses.items() if name}
    if json:
        print_json({"status": statuses[""], "services": services})
    else:
        print_table(("SERVICE", "STATUS"), [("overall", statuses[""]), *services.items()])
    if statuses[""] != _SERVING:
        raise typer.Exit(1)


def _local_health(settings: Settings, only: Part | None) -> dict[str, str]:
    """As `Client.health`, with the gateway and the engine where they are asked themselves."""
    from knowledge_engine.supervisor import is_healthy, reachable

    if only == "engine":
        word = _SERVING if asyncio.run(_engine_is_ready(settings)) else _NOT_SERVING
        return {"": word, "Engine": word}
    statuses = {"": _SERVING}
    if only != "gateway":
        with connect(reachable(settings.grpc_address)) as client:
            statuses = client.health()
    if only != "server":
        statuses["Gateway"] = _SERVING if is_healthy(settings.http_address) else _NOT_SERVING
        if statuses["Gateway"] != _SERVING:
            statuses[""] = _NOT_SERVING
    return statuses


async def _engine_is_ready(settings: Settings) -> bool:
    from knowledge_engine.inference.client import EngineClient, socket_path

    engine = EngineClient(socket_path(settings))
    await engine.start()
    try:
        for _ in range(_ENGINE_LOOKS):
            if engine.status.state != "down":
                break
            await asyncio.sleep(0.05)
        return engine.status.state == "ready"
    finally:
        await engine.close()
