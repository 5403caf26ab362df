"""The inference route: one answer as JSON, or its pieces as server-sent events. A closed connection ends decoding."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from gateway import original, schemas, specs
from gateway.backend import Call, Calls
from gateway.openapi import JSON_BODY, AnyModel, errors, rpc
from gateway.sse import Event, EventStream, frames
from gateway.strict import StrictRoute
from knowledge_engine.v1 import inference_pb2

router = APIRouter(prefix="/api/v1", route_class=StrictRoute, tags=["inference"])

_EVENTS = {
    "description": "The answer; with `stream`, events `delta` {text, choice, logprobs}, then one `completion` with the "
    "facts, or `error` with a problem when the answer breaks off.",
    "content": {"text/event-stream": {"schema": {"type": "string"}}},
}


@router.post(
    "/models/{id}/inference",
    response_model=schemas.InferenceResponse,
    responses={200: _EVENTS, **errors(404, 429, *JSON_BODY)},
    openapi_extra=rpc("InferenceService.Generate", **{"x-rpc-stream": "InferenceService.StreamGenerate"}),
)
async def infer(model: AnyModel, body: schemas.InferenceRequest, request: Request, calls: Call) -> Any:
    """Answers a conversation."""
    question = specs.generation_input(model, body)
    if body.stream:
        return await _stream(question, calls, request.state.request_id)
    message = inference_pb2.GenerateRequest(input=question)
    answer = await calls.unary(calls.server.inference.Generate, message)
    choices = [
        schemas.Choice(
            text=choice.text,
            logprobs=list(map(original.token_logprob, choice.logprobs)) if body.logprobs else None,
        )
        for choice in answer.choices
    ]
    facts = original.completion_facts(answer.completion)
    return schemas.InferenceResponse(response=answer.text, choices=choices, **facts.model_dump())


async def _stream(question: inference_pb2.GenerationInput, calls: Calls, request_id: str) -> Response:
    message = inference_pb2.StreamGenerateRequest(input=question)
    call = calls.stream(calls.server.inference.StreamGenerate, message, deadline=True)
    # What fails before the first piece still gets its own HTTP status.
    async with calls.alive(call):
        first = await call.read()
    return EventStream(frames(call, _event, request_id, first=first))


def _event(message: inference_pb2.StreamGenerateResponse) -> Event:
    if message.WhichOneof("payload") == "completion":
        return Event("completion", original.completion_facts(message.completion).model_dump())
    delta: dict[str, Any] = {"text": message.text_delta}
    if message.choice:
        delta["choice"] = message.choice
    if message.logprobs:
        delta["logprobs"] = [original.token_logprob(told).model_dump() for told in message.logprobs]
    return Event("delta", delta)
