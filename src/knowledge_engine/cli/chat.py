"""`chat`: one answer, or a conversation, streamed as it is written."""

from __future__ import annotations

import json as jsonlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from knowledge_engine.cli.output import JsonOption, ServerOption, connect, plain, print_json, say

if TYPE_CHECKING:
    from knowledge_engine.client import Client
    from knowledge_engine.core import TokenLogprob

_Json = TypeVar("_Json", dict[str, Any], list[Any])


def chat(
    model: Annotated[str, typer.Argument(help="base, a model, or one version: NAME:N.", show_default=False)],
    message: Annotated[str | None, typer.Argument(help="The question; without one, a conversation.")] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    context: Annotated[
        Path | None,
        typer.Option(help="A JSON file: what the assistant may know, such as products.", exists=True, dir_okay=False),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens to produce.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Randomness; 0 takes the likeliest token.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Only the likeliest tokens; 0 takes all.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; repeatable.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Only tokens this share as likely as the likeliest.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: fewer words said before.")] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="Above 0: fewer words of this answer.")] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="The same, for each time.")] = None,
    json_schema: Annotated[
        Path | None, typer.Option(help="A JSON file: the schema of the answer.", exists=True, dir_okay=False)
    ] = None,
    regex: Annotated[str | None, typer.Option(help="The expression that the answer matches.")] = None,
    top_logprobs: Annotated[
        int | None, typer.Option(help="With --json: how likely each token was, and others.")
    ] = None,
    tools: Annotated[
        Path | None,
        typer.Option(help="A JSON file: the tools it may call, a list as OpenAI has it.", exists=True, dir_okay=False),
    ] = None,
    json: JsonOption = False,
    server: ServerOption = None,
) -> None:
    """Talk to a model. Ctrl-C cancels the answer; with --json one piece a line, the facts last."""
    options = {
        "context": _read("--context", context, dict),
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "stop": stop or None,
        "seed": seed,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "json_schema": _read("--json-schema", json_schema, dict),
        "regex": regex,
        "logprobs": True if top_logprobs is not None else None,
        "top_logprobs": top_logprobs,
        "tools": _read("--tools", tools, list),
    }
    if top_logprobs is not None and not json:
        raise typer.BadParameter("--top-logprobs needs --json")
    if tools is not None and message is None:
        raise typer.BadParameter("--tools needs a question: in a conversation nobody answers the calls")
    turns = [{"role": "system", "content": system}] if system else []
    with connect(server) as client:
        if message is not None:
            _answer(client, model, [*turns, {"role": "user", "content": message}], options, as_json=json)
            return
        while (question := _read_question()) is not None:
            if question:
                turns.append({"role": "user", "content": question})
                text = _answer(client, model, turns, options, as_json=json)
                turns.append({"role": "assistant", "content": text})
                if not text:  # an empty turn cannot be sent back
                    del turns[-2:]


def _answer(
    client: Client, model: str, messages: list[dict[str, str]], options: dict[str, Any], *, as_json: bool
) -> str:
    pieces = []
    with client.stream_generate(model, messages, **options) as stream:
        for piece in stream:
            pieces.append(piece)
            if as_json:
                print_json({"text_delta": piece})
            else:
                typer.echo(piece, nl=False)
                sys.stdout.flush()
    if as_json and stream.logprobs:
        print_json({"logprobs": [_plain_logprob(told) for told in stream.logprobs]})
    if as_json and stream.completion is not None:
        print_json({"completion": plain(stream.completion)})
    elif not as_json:
        typer.echo()
    return "".join(pieces)


def _plain_logprob(told: TokenLogprob) -> dict[str, Any]:
    token = told.text_bytes.decode(errors="replace")
    plain_top = {"top": [_plain_logprob(other) for other in told.top]} if told.top else {}
    return {"token_id": told.token_id, "token": token, "logprob": told.logprob} | plain_top


def _read_question() -> str | None:
    """The next line of the conversation; None at its end."""
    if sys.stdin.isatty():
        typer.echo("you> ", nl=False, err=True)
    line = sys.stdin.readline()
    if not line:
        if sys.stdin.isatty():
            say("")
        return None
    return line.strip()


def _read(option: str, path: Path | None, kind: type[_Json]) -> _Json | None:
    if path is None:
        return None
    try:
        value = jsonlib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise typer.BadParameter(f"{option} {path} is not JSON: {error}") from None
    if not isinstance(value, kind):
        raise typer.BadParameter(f"{option} {path} must hold one JSON {'object' if kind is dict else 'list'}")
    return value
