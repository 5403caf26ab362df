from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from knowledge_engine import modeling
from knowledge_engine.bases import Base, prepare_base
from knowledge_engine.core import SamplingParams
from knowledge_engine.errors import IntegrityError
from knowledge_engine.inference import batched
from knowledge_engine.inference.adapters import at_once
from knowledge_engine.inference.batched import BLOCK_TOKENS, SIZES, BatchedModel
from knowledge_engine.inference.paged import Place
from knowledge_engine.inference.plain import PlainModel
from knowledge_engine.inference.serving import serving_model
from knowledge_engine.inference.wire import Adapter, EngineRequest
from knowledge_engine.settings import Settings
from tests.test_int8 import change_adapter
from tests.tiny import CONTEXT, LAYERS, VOCABULARY, WIDTH, build_tiny_adapter, build_tiny_base

TOKENS = random.Random(0).choices(range(3, VOCABULARY), k=700)
PROMPT = 300
BLOCK_BYTES = 2 * 4 * BLOCK_TOKENS * LAYERS * WIDTH  # keys and values, float32, as many key heads as heads

Loaded = tuple[Base, modeling.PreTrainedModel]


def load(folder: Path, precision: str = modeling.FLOAT32) -> Loaded:
    base = prepare_base(Settings(data_dir=folder / "data", base_model=str(folder)), "base", lambda phase, share: None)
    return base, modeling.load_base(base, precision, "cpu")


def request(tokens: list[int], adapter: Adapter | None = None, caller: str = "", max_tokens: int = 50) -> EngineRequest:
    return EngineRequest(tokens, SamplingParams(max_tokens=max_tokens), [], adapter, caller)


def read(model: BatchedModel, asked: EngineRequest) -> tuple[Place[Any], list[torch.Tensor]]:
    """The request's place with its prompt read, and the logits of each piece."""
    place = at_once(model.open(asked))
    assert place is not None
    tokens, logits, at = asked.prompt_token_ids, [], model.find_read(place, 0)
    while at < len(tokens):
        piece = tokens[at : at + model.piece_tokens]
        ((_, result),) = model.forward([(place, at, piece, len(piece) - 1)])
        assert isinstance(result, torch.Tensor)
        logits.append(result)
        at += len(piece)
    return place, logits


def step(model: BatchedModel, *pieces: tuple[Place[Any], int, list[int]]) -> list[torch.Tensor]:
    results = dict(model.forward([(place, at, tokens, len(tokens)) for place, at, tokens in pieces]))
    logits = []
    for index in range(len(pieces)):
        result = results[index]
        assert isinstance(result, torch.Tensor)
        logits.append(result)
    return logits


def answer(model: BatchedModel, place: Place[Any], start: int, tokens: list[int]) -> torch.Tensor:
    """The logits of answering with these tokens, one by one, alone."""
    return torch.cat([step(model, (place, start + k, [token]))[0] for k, token in enumerate(tokens)])


@pytest.mark.parametrize("family", sorted(batched._ARCHITECTURES))
def test_every_known_architecture_answers_as_in_transformers_alone_and_among_others(family: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, sliding_window=40,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, **({} if family in {"phi", "phi3"} else {"head_dim": 16}),
    )  # fmt: skip
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager").requires_grad_(False)
    theirs.train(False)
    for parameter in theirs.parameters():
        if parameter.ndim == 2:
            parameter.normal_(0, 0.15)
    with torch.inference_mode():
        expected = theirs(torch.tensor([TOKENS[: PROMPT + 20]])).logits[0]
    model = BatchedModel(theirs, CONTEXT, None, 0)

    place, (first, second) = read(model, request(TOKENS[:PROMPT]))
    alone = answer(model, place, PROMPT, TOKENS[PROMPT : PROMPT + 20])
    got = torch.cat([first, second, alone])
    asked = [*range(1, BLOCK_TOKENS), *range(BLOCK_TOKENS + 1, PROMPT + 20)]
    assert (got - expected[asked]).abs().max() < 1e-4 * expected.std()

    others = [read(model, request(TOKENS[n : n + 40 * n + 5], caller="other"))[0] for n in range(1, 8)]
    again, _ = read(model, request(TOKENS[:PROMPT], caller="again"))
    for k in range(20):
        beside = random.Random(k).sample(others, 1 + k % 7)
        at = random.Random(k).randrange(len(beside) + 1)
        pieces = [(other, 40 * others.index(other) + 45 + k, [k + 3]) for other in beside]
        pieces.insert(at, (again, PROMPT + k, [TOKENS[PROMPT + k]]))
        assert torch.equal(step(model, *pieces)[at][0], alone[k])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_adapters_answer_as_in_peft_alone_and_among_others(family: str, kind: str, tmp_path: Path) -> None:
    folder = build_tiny_base(tmp_path / "base", family)
    _, loaded = load(folder)
    model = BatchedModel(loaded, CONTEXT, None, 2**30)
    plain = answer(model, read(model, request(TOKENS[:50]))[0], 50, TOKENS[50:60])
    adapters = [
        Adapter(f"sha256:{n}", build_tiny_adapter(folder, tmp_path / str(n), n, rank=rank))
        for n, rank in enumerate((8, 3, 8, 4, 8, 8, 8, 8))
    ]
    change_adapter(adapters[0].folder, kind)
    alone: list[torch.Tensor] = []
    for adapter in adapters:  # each loaded when those before are there already
        place, (whole,) = read(model, request(TOKENS[:50], adapter))
        alone.append(answer(model, place, 50, TOKENS[50:60]))
        model.close(place)
        if len(alone) > 1:
            continue
        theirs = modeling.add_adapter(load(folder)[1], adapter.folder, "theirs")
        modeling.select_adapter(theirs, "theirs")
        with torch.inference_mode():
            expected = theirs(torch.tensor([TOKENS[:60]])).logits[0, 1:]
        assert (torch.cat([whole, alone[0]]) - expected).abs().max() < 1e-4 * expected.std()
        assert (alone[0] - plain).abs().max() > 0.5 * expected.std()

    places = [read(model, request(TOKENS[:50], adapter, "again"))[0] for adapter in (None, *adapters)]
    for k in range(10):
        order = random.Random(k).sample(range(9), 9)
        results = step(model, *((places[index], 50 + k, [TOKENS[50 + k]]) for index in order))
        for index, logits in zip(order, results, strict=True):
            assert torch.equal(logits[0], [plain, *alone][index][k])


def test_an_adapter_that_left_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    folder = build_tiny_base(tmp_path / "base", "gpt2")
    whole, part = (Adapter(f"sha256:{n}", build_tiny_adapter(folder, tmp_path / str(n), n)) for n in (1, 2))
    change_adapter(whole.folder, "dora")
    keep_only(part.folder, "attn.c_attn")
    results = []
    for order in ((part,), (whole, part)):
        model = BatchedModel(load(folder)[1], CONTEXT, None, 0)
        for adapter in order:
            place, (logits,) = read(model, request(TOKENS[:50], adapter))
            model.close(place)
            assert model.adapters.digests == ()
        results.append(logits)
    assert torch.equal(*results)


def keep_only(folder: Path, module: str) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": [module]}))
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name: weight for name, weight in weights.items() if f".{module}." in name},
        folder / "adapter_model.safetensors",
    )


@pytest.mark.parametrize("precision", [modeling.FLOAT32, modeling.BFLOAT16, modeling.NF4])
def test_more_answers_than_a_pass_has_rows_are_read_in_several(precision: str, tmp_path: Path) -> None:
    folder = build_tiny_base(tmp_path / "base")
    model = BatchedModel(load(folder, precision)[1], CONTEXT, None, 0)
    num_rows = SIZES["cpu"][-1]
    prompts = [TOKENS[n : n + 20] for n in range(num_rows + 5)]
    alone = [answer(model, read(model, request(prompt))[0], 20, [5, 6]) for prompt in prompts]
    places = [read(model, request(prompt, caller="again"))[0] for prompt in prompts]
    together = step(model, *((place, 20, [5, 6]) for place in places))  # as guesses are read
    assert all(torch.equal(got, expected) for got, expected in zip(together, alone, strict=True))


def test_only_sizes_that_agree_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build_tiny_base(tmp_path / "base")
    adapter = Adapter("sha256:1", build_tiny_adapter(folder, tmp_path / "adapter", 1))
    linear, add = modeling.linear, batched._Stack.add

    def of_four(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        return linear(x, *rest) * (1 + 1e-6 * (len(x) == 4))

    def of_eight(self: Any, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        return add(self, x, *rest) * (1 + 1e-6 * (x.shape[1] == 8))

    monkeypatch.setattr(modeling, "linear", of_four)
    monkeypatch.setattr(batched._Stack, "add", of_eight)
    model = BatchedModel(load(folder)[1], CONTEXT, None, 0)
    before = set(model._exact_sizes)
    assert not before & {4}
    read(model, request(TOKENS[:9], adapter))
    assert set(model._exact_sizes) == before - {8}
    assert 16 in before


def test_recorded_passes_answer_as_those_that_are_run(tmp_path: Path) -> None:
    """With a recorder that runs what was recorded again, on its own memory: what it takes on a GPU but the graph."""
    folder = build_tiny_base(tmp_path / "base")
    adapters = [
        Adapter(f"sha256:{n}", build_tiny_adapter(folder, tmp_path / str(n), n, rank=rank))
        for n, rank in enumerate((8, 8, 8, 8, 8, 3))
    ]
    change_adapter(adapters[4].folder, "dora")
    _, loaded = load(folder)
    plain, played = BatchedModel(loaded, CONTEXT, None, 2**30), BatchedModel(load(folder)[1], CONTEXT, None, 2**30)
    played._has_fixed_shapes = True
    recorded: list[Any] = []

    def record(run: Any) -> Any:
        recorded.append(run)
        return run

    played._try_replays(record)
    assert played._replays is not None
    assert len(recorded) == 1
    lengths = (10, 250, 300, 600, 20, 30, 40)
    for round_ in range(2):
        places = [
            [
                read(model, request(TOKENS[:length], adapter, f"{round_}"))[0]
                for length, adapter in zip(lengths, (None, *adapters), strict=True)
            ]
            for model in (plain, played)
        ]
        for k in range(12):
            chosen = random.Random(k).sample(range(7), 1 + k % 7)
            results = [
                step(model, *((own[index], lengths[index] + k, [TOKENS[k]]) for index in chosen))
                for model, own in zip((plain, played), places, strict=True)
            ]
            for one, other in zip(*results, strict=True):
                assert (one - other).abs().max() < 1e-4 * one.std()
        if not round_:
            num_shapes = len(recorded)
    assert len(recorded) == num_shapes < 20


@pytest.mark.parametrize("problem", ["other numbers", "cannot"])
def test_what_cannot_be_recorded_rightly_is_run(problem: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = BatchedModel(load(build_tiny_base(tmp_path / "base"))[1], CONTEXT, None, 0)
    model._has_fixed_shapes = True

    def record(run: Any) -> Any:
        if problem == "cannot":
            raise RuntimeError("capture failed")
        return lambda: run() + 1e-6

    model._try_replays(record)
    assert model._replays is None
    assert "step by step" in caplog.text
    place, _ = read(model, request(TOKENS[:20]))
    assert step(model, (place, 20, [5]))[0].isfinite().all()


def test_numbers_that_are_not_finite_are_seen_and_stay_where_they_are(tmp_path: Path) -> None:
    _, loaded = load(build_tiny_base(tmp_path / "base"))
    model = BatchedModel(loaded, CONTEXT, BLOCK_BYTES, 0)
    place, (expected,) = read(model, request(TOKENS[:20]))
    model.close(place)
    embedding: Any = loaded.get_input_embeddings()  # type: ignore[no-untyped-call]
    before = embedding.weight[7].clone()
    with torch.no_grad():
        embedding.weight[7] = torch.inf
    place, (sick,) = read(model, request([7] * 200))
    assert not sick.isfinite().any()
    assert not step(model, (place, 200, [7]))[0].isfinite().any()
    model.close(place)
    with torch.no_grad():
        embedding.weight[7] = before
    place, (after,) = read(model, request(TOKENS[:20]))  # in the only block
    assert torch.equal(after, expected)
    assert torch.equal(answer(model, place, 20, [7]), answer(model, place, 20, [7]))
    assert answer(model, place, 20, [7]).isfinite().all()


def test_a_beginning_is_taken_over_and_changes_nothing(tmp_path: Path) -> None:
    model = BatchedModel(load(build_tiny_base(tmp_path / "base"))[1], CONTEXT, None, 0)
    first, (*_, last) = read(model, request(TOKENS))
    expected = answer(model, first, 700, [5, 6])
    model.close(first)
    place = at_once(model.open(request(TOKENS)))
    assert place is not None
    assert model.find_read(place, 0) == 2 * BLOCK_TOKENS
    model.close(place)
    second, (again,) = read(model, request(TOKENS))
    assert torch.equal(again, last)
    assert torch.equal(answer(model, second, 700, [5, 6]), expected)
    other = at_once(model.open(request(TOKENS, caller="someone else")))
    assert other is not None
    assert model.find_read(other, 0) == 0


def test_what_is_closed_or_fails_in_a_step_concerns_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = BatchedModel(load(build_tiny_base(tmp_path / "base"))[1], CONTEXT, None, 0)
    answering, _ = read(model, request(TOKENS[:20]))
    places = [at_once(model.open(request(TOKENS[:30], caller=str(n)))) for n in range(3)]
    assert all(places)
    read_prompt = model._read_prompt

    def fail(place: Place[Any], *rest: Any) -> torch.Tensor:
        if place is places[1]:
            raise RuntimeError("no")
        return read_prompt(place, *rest)

    monkeypatch.setattr(model, "_read_prompt", fail)
    pieces = [(place, 0, TOKENS[:30], 1) for place in places if place is not None]
    steps = model.forward([*pieces, (answering, 20, [7], 1)])
    assert next(steps)[0] == 3
    assert pieces[0][0] is not None
    model.close(pieces[0][0])
    results = dict(steps)
    assert set(results) == {1, 2}
    assert isinstance(results[1], RuntimeError)
    assert isinstance(results[2], torch.Tensor)


def test_room_is_bounded_and_an_adapter_of_another_base_gives_it_back(tmp_path: Path) -> None:
    folder = build_tiny_base(tmp_path / "base", "gpt2")
    model = BatchedModel(load(folder)[1], CONTEXT, 3 * BLOCK_BYTES, 0)
    assert model.max_tokens == 3 * BLOCK_TOKENS
    llama = build_tiny_base(tmp_path / "llama")
    with pytest.raises(IntegrityError):
        at_once(model.open(request(TOKENS, Adapter("sha256:1", build_tiny_adapter(llama, tmp_path / "adapter", 1)))))
    assert model.pool.num_used == 0
    held = at_once(model.open(request(TOKENS)))
    assert held is not None
    assert at_once(model.open(request(TOKENS, caller="b"))) is None
    model.close(held)
    assert at_once(model.open(request(TOKENS, caller="b"))) is not None


def test_what_is_not_known_goes_through_transformers_alone(tmp_path: Path) -> None:
    kinds = {}
    for name, family, changes in (
        ("known", "gpt2", {}),
        ("unknown", "gpt2", {}),
        ("static", "llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
        ("dynamic", "llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    ):
        folder = build_tiny_base(tmp_path / name, family)
        change_config(folder, changes)
        base, loaded = load(folder)
        with pytest.MonkeyPatch.context() as patch:
            if name == "unknown":
                patch.setattr(batched, "_ARCHITECTURES", frozenset({"llama"}))
            settings = Settings(data_dir=tmp_path)
            kinds[name] = type(serving_model(loaded, base, modeling.FLOAT32, settings, lambda detail: None))
    assert kinds == {"known": BatchedModel, "unknown": PlainModel, "static": BatchedModel, "dynamic": PlainModel}


def change_config(folder: Path, changes: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
