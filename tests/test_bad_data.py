"""Data that cannot be right is refused by line when it comes or when its job is created, before any model loads."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from knowledge_engine.bases import prepare_base
from knowledge_engine.server.app import RunningServer
from knowledge_engine.settings import Settings
from knowledge_engine.v1 import datasets_pb2, datasets_pb2_grpc, jobs_pb2, jobs_pb2_grpc, training_pb2
from tests.test_server import CONVERSATION, UPLOAD, details, refused, refused_stream, upload

GOOD = CONVERSATION.encode() + b"\n"
TALKS = datasets_pb2.DATASET_KIND_CONVERSATIONS
SHOP = datasets_pb2.DATASET_KIND_CATALOGUE
PRODUCT = b'{"id": "a", "title": "Kettle", "price": 49.90, "currency": "EUR", "category": "Kitchen"}\n'


def _talk(content: str) -> bytes:
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "Yes."}]
    return json.dumps({"messages": messages}).encode() + b"\n"


@pytest.mark.parametrize(
    ("kind", "content", "line", "sentence"),
    [
        (TALKS, b"", 1, "there are no rows"),
        (TALKS, b"\n", 1, "is empty"),
        (TALKS, GOOD + b'{"messages": [{"role": "user", "content": "Hm?"}]}\n', 2, "nothing to learn from"),
        (TALKS, GOOD + _talk("x" * 10_000_000), 2, "longer than"),
        (TALKS, GOOD + b'{"messages": "\0"}\n', 2, "NUL byte"),
        (TALKS, GOOD + _talk("a\0b"), 2, "NUL character"),
        (TALKS, GOOD + _talk("\ud800"), 2, "lone surrogate"),
        (TALKS, b"\xef\xbb\xbf" + GOOD, 1, "byte order mark"),
        (TALKS, GOOD + b'{"prompt": "A kettle?", "completion": "The blue one."}\n', 2, "unknown field 'prompt'"),
        (TALKS, GOOD + PRODUCT, 2, "unknown field 'id'"),
        (SHOP, PRODUCT + GOOD, 2, ""),
        (SHOP, PRODUCT * 2, 2, "is there already, on line 1"),
    ],
    ids=[
        "empty set", "empty line", "no trained token", "10 MB line", "NUL byte", "NUL", "surrogate", "BOM",
        "mixed schema", "product among talks", "talk among products", "duplicate ids",
    ],
)  # fmt: skip
async def test_a_bad_line_is_refused_by_its_number(
    channel: grpc.aio.Channel,
    server: RunningServer,
    kind: datasets_pb2.DatasetKind.ValueType,
    content: bytes,
    line: int,
    sentence: str,
) -> None:
    stub = datasets_pb2_grpc.DatasetServiceStub(channel)
    pieces = [content[at : at + 2**20] for at in range(0, len(content), 2**20)]
    error = await refused_stream(server, UPLOAD, upload("datasets/bad", *pieces, kind=kind))
    info, fields = details(error)
    assert (error.code(), info.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "DATASET_FORMAT_INVALID")
    assert fields[0] == f"line {line}"
    assert sentence in (error.details() or "")
    assert not (await stub.ListDatasets(datasets_pb2.ListDatasetsRequest())).datasets


@pytest.mark.parametrize(
    ("content", "fields", "reason"),
    [
        (GOOD, {"eval_split": 0.1}, "SPLIT_IMPOSSIBLE"),  # one row, and one to be held out
        (PRODUCT, {}, "DATASET_KIND_WRONG"),
    ],
    ids=["one row", "a catalogue"],
)
async def test_what_fits_no_training_is_refused_when_the_job_is_created(
    channel: grpc.aio.Channel,
    make_settings: Callable[..., Settings],
    content: bytes,
    fields: dict[str, Any],
    reason: str,
) -> None:
    datasets, jobs = datasets_pb2_grpc.DatasetServiceStub(channel), jobs_pb2_grpc.JobServiceStub(channel)
    kind = SHOP if content == PRODUCT else TALKS
    await datasets.UploadDataset(upload("datasets/few", content, kind=kind))
    spec = training_pb2.TrainingSpec(dataset="datasets/few", model="models/m", **fields)
    # Until a base is prepared nobody can count tokens here: its worker does, before it loads anything.
    await asyncio.to_thread(prepare_base, make_settings(), "base", lambda phase, fraction: None)
    call = jobs.CreateTrainingJob(jobs_pb2.CreateTrainingJobRequest(spec=spec))
    assert (await refused(call))[:2] == (grpc.StatusCode.INVALID_ARGUMENT, reason)
    assert not (await jobs.ListJobs(jobs_pb2.ListJobsRequest())).jobs
