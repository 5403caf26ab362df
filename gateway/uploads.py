"""Uploads: the raw body of a request, forwarded chunk by chunk to the server's client stream, never held whole."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from fastapi import Request
from starlette.requests import ClientDisconnect

from gateway import specs
from gateway.backend import Calls, client_gone
from gateway.problems import too_large, unprocessable
from gateway.strict import declared_length, media_type, unsupported_media_type
from knowledge_engine.errors import Reason
from knowledge_engine.v1 import datasets_pb2

MAX_UPLOAD_BYTES = 2 * 2**30
_CHUNK_BYTES = 2**20
_LAYOUTS = {"application/x-ndjson": "jsonl", "text/csv": "csv"}

UPLOAD_BODY: dict[str, Any] = {
    "required": True,
    "description": "The rows: one JSON object a line, or CSV with a header line.",
    "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in _LAYOUTS},
}

_UploadCall = grpc.aio.StreamUnaryCall[datasets_pb2.UploadDatasetRequest, datasets_pb2.UploadDatasetResponse]


async def upload(request: Request, calls: Calls, name: str, kind: str, layout: str | None) -> datasets_pb2.Dataset:
    """Stores the body under `name`.

    Raises:
        ProblemError: 413 beyond 2 GiB, 415 and 422 for a Content-Type that is unknown or contradicts `layout`.
    """
    declared = _LAYOUTS.get(media_type(request.headers.get("content-type", "")))
    if declared is None:
        raise unsupported_media_type(*_LAYOUTS)
    if layout not in (None, declared):
        raise unprocessable([("format", f"the Content-Type says {declared}")])
    if declared_length(request) > MAX_UPLOAD_BYTES:
        raise too_large("the upload", MAX_UPLOAD_BYTES, Reason.DATASET_TOO_LARGE)
    call: _UploadCall = calls.server.datasets.UploadDataset(metadata=calls.metadata)
    metadata = specs.upload_metadata(name, kind, declared)
    try:
        await call.write(datasets_pb2.UploadDatasetRequest(metadata=metadata))
        await _forward(request, call)
        await call.done_writing()
    except (asyncio.InvalidStateError, grpc.aio.AioRpcError):
        # The server has answered before the end. A write that fails knows only that it failed; the answer is read below.
        pass
    except ClientDisconnect:
        call.cancel()
        raise client_gone() from None
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
