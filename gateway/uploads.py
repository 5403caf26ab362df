"""Uploads: the raw body of a request, forwarded chunk by chunk to the server's client stream, never held whole."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from fastapi import Request
from starlette.requests import ClientDisconnect

from gateway import specs
from gateway.backend import Calls, client_gone
from gateway.problems import status_of, too_large, unprocessable
from gateway.strict import declared_length, media_type, unsupported_media_type
from knowledge_engine.errors import Reason
from knowledge_engine.v1 import datasets_pb2

MAX_UPLOAD_BYTES = 2 * 2**30
_CHUNK_BYTES = 2**20
_REFUSAL_SECONDS = 5.0
# The status of this call, too, can be lost.
_REFUSAL_ATTEMPTS = 5
_LAYOUTS = {
    "application/x-ndjson": ("jsonl", "sharegpt", "alpaca"),
    "application/json": ("sharegpt", "alpaca"),
    "text/csv": ("csv",),
}
"""What may come as which Content-Type."""
_IMPLIED = {"application/x-ndjson": "jsonl", "text/csv": "csv"}
"""What a Content-Type means where no format is named; JSON alone says too little."""

UPLOAD_BODY: dict[str, Any] = {
    "required": True,
    "description": "The rows: one JSON object a line, CSV with a header line, or one JSON array of ShareGPT or Alpaca.",
    "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in _LAYOUTS},
}

_UploadCall = grpc.aio.StreamUnaryCall[datasets_pb2.UploadDatasetRequest, datasets_pb2.UploadDatasetResponse]


async def upload(request: Request, calls: Calls, name: str, kind: str, layout: str | None) -> datasets_pb2.Dataset:
    """Stores the body under `name`.

    Raises:
        ProblemError: 413 beyond 2 GiB, 415 and 422 for a Content-Type that is unknown or contradicts `layout`.
    """
    content_type = media_type(request.headers.get("content-type", ""))
    known = _LAYOUTS.get(content_type)
    if known is None:
        raise unsupported_media_type(*_LAYOUTS)
    declared = layout or _IMPLIED.get(content_type)
    if declared is None:
        raise unprocessable([("format", f"say which it is: {' or '.join(known)}")])
    if declared not in known:
        raise unprocessable([("format", f"the Content-Type says {' or '.join(known)}")])
    if declared_length(request) > MAX_UPLOAD_BYTES:
        raise too_large("the upload", MAX_UPLOAD_BYTES, Reason.DATASET_TOO_LARGE)
    metadata = datasets_pb2.UploadDatasetRequest(metadata=specs.upload_metadata(name, kind, declared))
    call: _UploadCall = calls.server.datasets.UploadDataset(metadata=calls.metadata)
    try:
        await call.write(metadata)
        await _forward(request, call)
        await call.done_writing()
    except asyncio.InvalidStateError:
        pass  # the server has answered before the end; what it said is read below
    except ClientDisconnect:
        call.cancel()
        raise client_gone() from None
    except grpc.aio.AioRpcError as error:
        raise (await _early_refusal(calls, metadata) if _is_lost(error) else None) or error from None
    except BaseException:
        call.cancel()
        raise
    async with calls.alive(call):
        return (await call).dataset


async def _forward(request: Request, call: _UploadCall) -> None:
    size = 0
    async for piece in request.stream():
        size += len(piece)
        if size > MAX_UPLOAD_BYTES:
            raise too_large("the upload", MAX_UPLOAD_BYTES, Reason.DATASET_TOO_LARGE)
        for start in range(0, len(piece), _CHUNK_BYTES):
            await call.write(datasets_pb2.UploadDatasetRequest(chunk=piece[start : start + _CHUNK_BYTES]))


def _is_lost(error: grpc.aio.AioRpcError) -> bool:
    """Whether gRPC replaced the server's status by one of its own, as it does when a write fails on an ended call."""
    return error.code() is grpc.StatusCode.INTERNAL and not status_of(error).details


async def _early_refusal(calls: Calls, metadata: datasets_pb2.UploadDatasetRequest) -> grpc.aio.AioRpcError | None:
    """What the server refuses before it has read a byte, asked for once more; nothing can be stored by asking."""
    for _ in range(_REFUSAL_ATTEMPTS):
        call: _UploadCall = calls.server.datasets.UploadDataset(metadata=calls.metadata, timeout=_REFUSAL_SECONDS)
        try:
            await call.write(metadata)
            await call
        except grpc.aio.AioRpcError as error:
            if not _is_lost(error):
                return None if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED else error
        except asyncio.InvalidStateError:
            pass
    return None
