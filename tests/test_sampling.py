"""Which token is next: as transformers would draw it, in forms that a validator accepts, and through an engine."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from knowledge_engine.core import FinishReason, SamplingParams, TokenLogprob
from knowledge_engine.errors import InvalidSpecError, KnowledgeEngineError, Reason
from knowledge_engine.inference.client import EngineClient, EngineRequest, Finished, TextDelta
from knowledge_engine.inference.grammar import Grammars, check_form
from knowledge_engine.inference.sampling import Sampler
from tests.test_engine import EngineProcess, answer, ask, connected, prompt
from tests.tiny import VOCABULARY, build_tiny_base

PROMPT = [3, 4, 5, 5]
NUM_DRAWS = 4000


def logits_of(seed: int, spread: float = 3.0) -> Any:
    return (np.random.default_rng(seed).standard_normal(VOCABULARY) * spread).astype(np.float32)


def sampler(tokens: list[int] = PROMPT, matcher: Any = None, **sampling: Any) -> Sampler:
    params = SamplingParams(max_tokens=10, **{"seed": 0} | sampling)
    return Sampler(params, tokens, VOCABULARY, matcher, lambda token: f"<{token}>".encode())


def theirs(logits: Any, **sampling: Any) -> Any:
    """The probabilities that transformers would draw from."""
    steps = LogitsProcessorList([TemperatureLogitsWarper(sampling["temperature"])])
    if sampling.get("top_k"):
        steps.append(TopKLogitsWarper(sampling["top_k"]))
    if sampling.get("top_p", 1) < 1:
        steps.append(TopPLogitsWarper(sampling["top_p"]))
    if sampling.get("min_p"):
        steps.append(MinPLogitsWarper(sampling["min_p"]))
    return steps(torch.tensor([PROMPT]), torch.tensor(logits)[None])[0].double().softmax(0).numpy()


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0, "top_p": 1.0},
        {"temperature": 0.3, "top_p": 1.0},
        {"temperature": 1.0, "top_p": 0.5},
        {"temperature": 2.0, "top_p": 0.99},
        {"temperature": 2.0, "top_p": 1.0, "top_k": 7},
        {"temperature": 2.0, "top_p": 0.6, "top_k": 40},
        {"temperature": 1.0, "top_p": 1.0, "min_p": 0.05},
        {"temperature": 1.0, "top_p": 1.0, "min_p": 1e-3},
        {"temperature": 1.5, "top_p": 0.9, "top_k": 50, "min_p": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_tokens_are_drawn_as_transformers_draws_them(sampling: dict[str, Any], spread: float) -> None:
    logits = logits_of(1, spread)
    expected = theirs(logits, **sampling)
    ours = sampler(**sampling)
    counts = Counter(ours.choose(logits)[0] for _ in range(NUM_DRAWS))
    drawn = np.array([counts[token] for token in range(VOCABULARY)])
    assert not drawn[expected == 0].any()
    assert (drawn[expected > 20 / NUM_DRAWS] > 0).all()
    # Pearson's statistic over classes of at least five draws; its standard deviation is sqrt(2 classes).
    kept = expected * NUM_DRAWS >= 5
    statistic = ((drawn - expected * NUM_DRAWS)[kept] ** 2 / (expected * NUM_DRAWS)[kept]).sum()
    assert statistic < kept.sum() + 6 * math.sqrt(2 * kept.sum()) + 10


def test_repetition_is_penalised_as_transformers_does() -> None:
    logits = logits_of(2)
    ours = sampler(temperature=0, repetition_penalty=1.7)
    tokens = list(PROMPT)
    for _ in range(30):
        penalised = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([tokens]), torch.tensor(logits)[None].clone())
        token, _ = ours.choose(logits)
        assert token == int(penalised.argmax())
        tokens.append(token)
    assert len(set(tokens)) > 10


def test_presence_and_frequency_count_the_answer_only() -> None:
    logits = np.zeros(VOCABULARY, np.float32)
    logits[[3, 7, 9]] = 1.0, 0.9, 0.2
    once = sampler(temperature=0, presence_penalty=0.5)
    assert [once.choose(logits)[0] for _ in range(5)] == [3, 7, 3, 3, 3], "3 of the prompt is not counted"
    more = sampler(temperature=0, frequency_penalty=0.3)
    assert [more.choose(logits)[0] for _ in range(6)] == [3, 7, 3, 7, 3, 7]
    liked = sampler(temperature=0, frequency_penalty=-2)
    assert [liked.choose(logits)[0] for _ in range(3)] == [3, 3, 3]


def test_logprobs_are_the_models_own() -> None:
    logits = logits_of(3)
    expected = torch.tensor(logits).double().log_softmax(0)
    ours = sampler(temperature=2, top_k=5, repetition_penalty=2, presence_penalty=1, logprobs=True, top_logprobs=4)
    for _ in range(5):
        token, told = ours.choose(logits)
        assert told is not None
        assert (told.token_id, told.text_bytes) == (token, f"<{token}>".encode())
        assert told.logprob == pytest.approx(float(expected[token]), abs=1e-5)
        assert [other.token_id for other in told.top] == expected.topk(4).indices.tolist()
        assert [other.logprob for other in told.top] == pytest.approx(expected.topk(4).values.tolist(), abs=1e-5)
    assert sampler().choose(logits)[1] is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_an_error(value: float) -> None:
    logits = logits_of(4)
    logits[5] = value
    with pytest.raises(KnowledgeEngineError) as caught:
        sampler().choose(logits)
    assert caught.value.reason is Reason.NON_FINITE


# --- forms --------------------------------------------------------------------------------------------------------

OFFER = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 12},
        "price": {"type": "integer", "minimum": 0, "maximum": 500},
        "in_stock": {"type": "boolean"},
        "kinds": {"type": "array", "items": {"enum": ["café", 'tea "x"', None]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["title", "price", "in_stock", "kinds"],
    "additionalProperties": False,
}
SCHEMAS = [
    OFFER,
    {
        "anyOf": [{"const": 1.5}, {"$ref": "#/$defs/leaf"}],
        "$defs": {"leaf": {"type": "string", "pattern": "^[a-f]{2}$"}},
    },
    {"type": "array", "prefixItems": [{"type": "null"}, {"enum": [1, 2]}], "items": False, "minItems": 2},
    {"type": "string", "format": "date"},
]
EXPRESSIONS = [r"[A-Z]{3}-[0-9]{4}", r"(yes|no|maybe)", r"€ ?[0-9]{1,3}(\.[0-9]{2})?", "é{2,5}"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Tokenizer:
    return Tokenizer.from_file(str(base / "tokenizer.json"))


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, VOCABULARY, [0, 2])


def written(grammars: Grammars, seed: int, **form: str) -> bytes:
    """What a model that knows nothing writes in this form."""
    sampling = SamplingParams(max_tokens=500, temperature=1.5, top_p=1, seed=seed, **form)
    check_form(sampling, "")
    ours = Sampler(sampling, PROMPT, VOCABULARY, grammars.compile(sampling), grammars.bytes_of)
    text = b""
    for step in range(500):
        token, _ = ours.choose(logits_of(1000 * seed + step))
        if token in (0, 2):
            return text
        text += grammars.bytes_of(token)
        if ours.is_complete:
            return text
    raise AssertionError(text)


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
def test_json_is_what_its_schema_accepts(schema: dict[str, Any], grammars: Grammars) -> None:
    texts = [written(grammars, seed, json_schema=json.dumps(schema)) for seed in range(10)]
    for text in texts:
        value = json.loads(text)
        assert jsonschema_rs.is_valid(schema, value), text
        if isinstance(value, dict):
            assert list(value) == list(schema["properties"])
    assert len(set(texts)) > 1


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_text_matches_its_expression(expression: str, grammars: Grammars) -> None:
    texts = [written(grammars, seed, regex=expression).decode() for seed in range(10)]
    assert all(re.fullmatch(expression, text) for text in texts), texts
    assert len(set(texts)) > 1


def test_a_form_is_kept_and_shared_by_nobody(grammars: Grammars) -> None:
    sampling = SamplingParams(max_tokens=9, regex="ab|ac")
    first, second = grammars.compile(sampling), grammars.compile(sampling)
    assert first is not None
    assert second is not None
    a, b = (next(i for i in range(VOCABULARY) if grammars.bytes_of(i) == byte) for byte in (b"a", b"b"))
    first.take(a)
    assert first.mask()[b]
    assert not second.mask()[b]
    assert second.mask()[a]


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"json_schema": "{"}, "not JSON"),
        ({"json_schema": "[1]"}, "not a JSON object"),
        ({"json_schema": "[" * 60_000}, "not JSON"),
        ({"json_schema": '{"type": "objekt"}'}, "objekt"),
        ({"json_schema": '{"if": {}, "then": {}}'}, "if"),
        ({"json_schema": '{"$ref": "http://example.com/schema"}'}, "example.com"),
        ({"json_schema": json.dumps({"enum": ["x" * 8] * 5000, "type": "strin"})}, "strin"),
        ({"regex": "["}, "regex"),
        ({"regex": "(?=a)b"}, "regex"),
        ({"regex": r"(a)\1"}, "regex"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_form_that_cannot_be_kept_is_refused(form: dict[str, str], words: str, grammars: Grammars) -> None:
    sampling = SamplingParams(max_tokens=9, **form)
    with pytest.raises(InvalidSpecError, match=re.escape(words)) as caught:
        check_form(sampling, "input.")
    (violation,) = caught.value.violations
    assert violation.field == f"input.{next(iter(form))}"
    assert len(violation.description) <= 200
    with pytest.raises(InvalidSpecError):
        grammars.compile(sampling)


def test_nothing_that_has_a_form_is_an_error_of_that_answer(grammars: Grammars) -> None:
    sampling = SamplingParams(max_tokens=9, json_schema='{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}')
    matcher = grammars.compile(sampling)
    with pytest.raises(InvalidSpecError) as caught:
        sampler(matcher=matcher).choose(logits_of(1))
    assert [violation.field for violation in caught.value.violations] == ["json_schema"]


@pytest.mark.parametrize(
    "form",
    [
        {"regex": "(a{1,1000}){1,1000}b"},
        {"regex": "(.*)*x(.*)*y[^a]{900}"},
        {"regex": "(a|b|ab)*c" * 200},
        {"json_schema": json.dumps({"enum": [f"item {i} {i * 7919}" for i in range(2500)]})},
        {"json_schema": json.dumps({"type": "array", "items": {"type": "string", "pattern": "(a{1,500}){1,500}"}})},
    ],
    ids=lambda form: str(form)[:40],
)
def test_a_greedy_form_is_bounded(form: dict[str, str], grammars: Grammars) -> None:
    """Taken or refused; the time-out of the test is what an unbounded one would meet."""
    sampling = SamplingParams(max_tokens=40, temperature=1, seed=1, **form)
    try:
        ours = sampler(matcher=grammars.compile(sampling))
        for step in range(40):
            if ours.is_complete or ours.choose(logits_of(step))[0] in (0, 2):
                break
    except InvalidSpecError:
        pass


# --- through an engine --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    process = EngineProcess(tmp_path_factory.mktemp("engine"), base)
    yield process
    assert process.stop() == 0, process.log.read_text()


@pytest.fixture
async def client(engine: EngineProcess) -> AsyncIterator[EngineClient]:
    async with connected(engine) as client:
        yield client


async def choices(client: EngineClient, request: EngineRequest, n: int = 1) -> list[tuple[str, list[TokenLogprob]]]:
    texts = [""] * n
    logprobs: list[list[TokenLogprob]] = [[] for _ in range(n)]
    finished: set[int] = set()
    async with aclosing(client.generate(request, n)) as pieces:
        async for piece in pieces:
            assert piece.choice not in finished
            if isinstance(piece, TextDelta):
                texts[piece.choice] += piece.text
                logprobs[piece.choice] += piece.logprobs
            elif isinstance(piece, Finished):
                finished.add(piece.choice)
                assert piece.completion_tokens >= len(logprobs[piece.choice])
    assert finished == set(range(n))
    return list(zip(texts, logprobs, strict=True))


def sampled(engine: EngineProcess, **sampling: Any) -> EngineRequest:
    params = SamplingParams(**{"max_tokens": 40, "temperature": 1.0, "top_p": 1.0} | sampling)
    return EngineRequest(prompt(engine), params, [0, 2])


async def test_forms_hold_in_a_batch_and_change_nobody_elses_answer(
    engine: EngineProcess, client: EngineClient
) -> None:
    plain = [ask(prompt(engine, f"Number {i}?"), max_tokens=30) for i in range(4)]
    formed = [sampled(engine, max_tokens=200, seed=i, json_schema=json.dumps(OFFER)) for i in range(4)]
    alone = [(await answer(client, request)).text for request in [*plain, *formed]]
    together = await asyncio.gather(*(answer(client, request) for request in [*plain, *formed]))
    assert [got.text for got in together] == alone
    for got in together[4:]:
        assert jsonschema_rs.is_valid(OFFER, json.loads(got.text))
        assert got.finished.finish_reason is FinishReason.STOP


async def test_several_answers_have_their_own_chances(engine: EngineProcess, client: EngineClient) -> None:
    three = await choices(client, sampled(engine, seed=5), 3)
    assert len({text for text, _ in three}) == 3
    assert three == await choices(client, sampled(engine, seed=5), 3)
    assert three[0] == (await choices(client, sampled(engine, seed=5)))[0]
    status = await client.refresh()
    assert (status.active, status.waiting) == (0, 0)


async def test_more_answers_than_there_is_room_for_leave_nothing_behind(
    engine: EngineProcess, client: EngineClient
) -> None:
    taken = [asyncio.create_task(choices(client, sampled(engine, max_tokens=200), 8)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(KnowledgeEngineError) as caught:
        await choices(client, sampled(engine, max_tokens=200), 8)
    assert caught.value.reason is Reason.ENGINE_BUSY
    assert [len(got) for got in await asyncio.gather(*taken)] == [8, 8]
    status = await client.refresh()
    assert (status.active, status.waiting) == (0, 0)


async def test_every_token_is_told(engine: EngineProcess, client: EngineClient) -> None:
    request = sampled(engine, seed=3, temperature=2, logprobs=True, top_logprobs=2)
    got: list[TokenLogprob] = []
    text, num_tokens = "", 0
    async with aclosing(client.generate(request)) as pieces:
        async for piece in pieces:
            if isinstance(piece, TextDelta):
                got += piece.logprobs
                text += piece.text
            else:
                num_tokens = piece.completion_tokens
    assert len(got) == num_tokens
    assert b"".join(told.text_bytes for told in got if told.token_id > 2).decode(errors="replace") == text
    assert all(len(told.top) == 2 and told.top[0].logprob >= told.logprob for told in got)
    again = await choices(client, request)
    assert again[0][1] == got


async def test_a_form_that_nothing_has_fails_alone(engine: EngineProcess, client: EngineClient) -> None:
    other = asyncio.create_task(answer(client, ask(prompt(engine), max_tokens=100)))
    never = sampled(engine, json_schema='{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}')
    broken = [sampled(engine, regex="["), sampled(engine, json_schema="{"), sampled(engine, json_schema="[" * 60_000)]
    for request in (never, *broken):
        with pytest.raises(InvalidSpecError):
            await answer(client, request)
    assert (await other).finished.completion_tokens == 100
