from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from knowledge_engine import devices, modeling
from knowledge_engine.bases import Base, prepare_base
from knowledge_engine.core import SamplingParams
from knowledge_engine.errors import IntegrityError, InvalidSpecError, Reason
from knowledge_engine.inference import int8, kernels, paged
from knowledge_engine.inference.adapters import at_once
from knowledge_engine.inference.blocks import BlockPool, Table
from knowledge_engine.inference.drafts import Drafts
from knowledge_engine.inference.int8 import Int8Model
from knowledge_engine.inference.kernels import BLOCK_TOKENS
from knowledge_engine.inference.paged import Place
from knowledge_engine.inference.wire import Adapter, EngineRequest
from knowledge_engine.settings import Settings
from tests.tiny import CONTEXT, VOCABULARY, build_tiny_adapter, build_tiny_base

CACHE_BYTES = 2**22
TOKENS = random.Random(0).choices(range(VOCABULARY), k=150)


def load(folder: Path, **config: Any) -> tuple[Base, modeling.PreTrainedModel]:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    base = prepare_base(Settings(data_dir=folder / "data", base_model=str(folder)), "base", lambda phase, share: None)
    assert modeling.serving_precision(base, "cpu") == modeling.INT8
    return base, modeling.load_base(base, modeling.INT8, "cpu")


def serve(model: modeling.PreTrainedModel, cache_bytes: int = CACHE_BYTES) -> Int8Model:
    return Int8Model(model, CONTEXT, 16, cache_bytes, 2**30)


def request(tokens: list[int], adapter: Adapter | None = None, caller: str = "", max_tokens: int = 50) -> EngineRequest:
    return EngineRequest(tokens, SamplingParams(max_tokens=max_tokens), [], adapter, caller)


def opened(model: Int8Model, asked: EngineRequest) -> Place[Any]:
    place = at_once(model.open(asked))
    assert place is not None
    return place


def run(model: Int8Model, *pieces: tuple[Place[Any], int, list[int], int]) -> list[torch.Tensor]:
    results = dict(model.forward(list(pieces)))
    logits: list[torch.Tensor] = []
    for index in range(len(pieces)):
        result = results[index]
        assert isinstance(result, torch.Tensor)
        logits.append(result)
    return logits


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, modeling.PreTrainedModel]:
    folder = build_tiny_base(tmp_path_factory.mktemp("int8") / "base")
    return folder, load(folder)[1]


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        (
            "llama",
            {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
        ),
        ("mistral", {}),
        ("mistral", {"sliding_window": 40}),
        ("qwen2", {}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}),
    ],
    ids=["llama", "llama linear rope", "mistral", "mistral window", "qwen2", "qwen2 one layer with a window"],
)
@pytest.mark.parametrize("kind", ["base", "lora", "rslora", "dora"])
def test_logits_are_those_of_transformers_and_peft(
    family: str, config: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    folder = build_tiny_base(tmp_path / "base", family)
    base, model = load(folder, **config)
    ours = serve(model)
    adapter = None
    theirs: Any = model
    if kind != "base":
        adapter = Adapter("sha256:1", build_tiny_adapter(folder, tmp_path / "adapter", 1))
        change_adapter(adapter.folder, kind)
        theirs = modeling.add_adapter(modeling.load_base(base, modeling.INT8, "cpu"), adapter.folder, "theirs")
        modeling.select_adapter(theirs, "theirs")
    (got,) = run(ours, (opened(ours, request(TOKENS, adapter)), 0, TOKENS, len(TOKENS)))
    with torch.inference_mode():
        expected = theirs(torch.tensor([TOKENS])).logits[0]
        plain = modeling.load_base(base, modeling.INT8, "cpu")(torch.tensor([TOKENS])).logits[0]
    spread = expected.std()
    assert (got - expected).abs().max() < 0.005 * spread
    if kind != "base":
        assert (plain - expected).abs().max() > 0.5 * spread


def change_adapter(folder: Path, kind: str) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["use_rslora"], config["use_dora"] = kind == "rslora", kind == "dora"
    config["lora_alpha"] = 3 if kind == "rslora" else config["lora_alpha"]
    path.write_text(json.dumps(config))
    if kind == "dora":
        weights = load_file(folder / "adapter_model.safetensors")
        random = np.random.default_rng(0)
        for name in [name for name in weights if name.endswith("lora_B.weight")]:
            magnitude = random.uniform(0.5, 2, len(weights[name])).astype(np.float32)
            weights[name.replace("lora_B.weight", "lora_magnitude_vector")] = magnitude
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def test_a_row_is_the_same_alone_among_others_in_pieces_and_shared(
    tiny: tuple[Path, modeling.PreTrainedModel], tmp_path: Path
) -> None:
    folder, loaded = tiny
    adapters = [Adapter(f"sha256:{n}", build_tiny_adapter(folder, tmp_path / str(n), n, rank=n)) for n in (3, 4, 8)]
    model = serve(loaded)
    whole: list[torch.Tensor] = []
    for adapter in (None, *adapters):
        place = opened(model, request(TOKENS, adapter, "alone"))
        whole += run(model, (place, 0, TOKENS, len(TOKENS)))
        model.close(place)
    assert len({float(logits.sum()) for logits in whole}) == 4

    for caller, cuts in (("one by one", range(1, 150)), ("in three", (37, 99)), ("beside blocks", (32, 64, 96))):
        places = [opened(model, request(TOKENS, adapter, caller)) for adapter in (None, *adapters)]
        got: list[list[torch.Tensor]] = [[] for _ in places]
        ends = [*cuts, len(TOKENS)]
        for first, last in zip([0, *cuts], ends, strict=True):
            piece = TOKENS[first:last]
            order = random.Random(first).sample(range(4), 4)
            for index, logits in zip(
                order, run(model, *((places[i], first, piece, len(piece)) for i in order)), strict=True
            ):
                got[index].append(logits)
        for index, place in enumerate(places):
            assert torch.equal(torch.cat(got[index]), whole[index]), (caller, index)
            model.close(place)

    for adapter, expected in zip((None, *adapters), whole, strict=True):
        place = opened(model, request(TOKENS, adapter, "alone"))  # whose blocks still lie there
        known = model.find_read(place, 0)
        assert known == len(TOKENS) // BLOCK_TOKENS * BLOCK_TOKENS
        (logits,) = run(model, (place, known, TOKENS[known:], len(TOKENS) - known))
        assert torch.equal(logits, expected[known:])
        model.close(place)
        other = opened(model, request(TOKENS, adapter, "someone else"))
        assert model.find_read(other, 0) == 0
        model.close(other)


def test_guesses_that_were_wrong_leave_no_trace(tiny: tuple[Path, modeling.PreTrainedModel]) -> None:
    model = serve(tiny[1])
    place, twin = (opened(model, request(TOKENS, caller=caller)) for caller in "ab")
    run(model, (place, 0, TOKENS[:100], 0), (twin, 0, TOKENS[:100], 0))
    run(model, (place, 100, [5, 6, 7, 8, 9], 5))
    for at in range(100, 120):
        mine, other = run(model, (place, at, [TOKENS[at]], 1), (twin, at, [TOKENS[at]], 1))
        assert torch.equal(mine, other)


def test_numbers_that_are_not_finite_stay_seen(tmp_path: Path) -> None:
    folder = build_tiny_base(tmp_path / "base")
    _, loaded = load(folder)
    with torch.no_grad():
        loaded.get_decoder().layers[0].input_layernorm.weight[3] = torch.inf  # type: ignore[no-untyped-call, union-attr]
    model = serve(loaded)
    (logits,) = run(model, (opened(model, request(TOKENS)), 0, TOKENS, 1))
    assert not torch.isfinite(logits).any()


@pytest.mark.parametrize(
    ("flags", "has_vnni"),
    [("fpu avx2 fma", False), ("fpu avx2 avx512f", False), ("avx2 avx_vnni", True), ("avx512f avx512_vnni sse", True)],
)
def test_torch_multiplies_whole_numbers_with_vnni_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, has_vnni: bool
) -> None:
    """Without, it took seconds for a piece of a prompt that our kernel reads in a tenth of one."""
    facts = tmp_path / "cpuinfo"
    facts.write_text(f"processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: {flags}\n\n")
    monkeypatch.setattr(devices, "_CPU_FACTS", facts)
    monkeypatch.setattr(int8, "_has_exact_products", lambda: True)
    devices._cpu_facts.cache_clear()
    int8._has_fast_products.cache_clear()
    try:
        assert int8._has_fast_products() == has_vnni
    finally:
        devices._cpu_facts.cache_clear()
        int8._has_fast_products.cache_clear()


def test_both_ways_to_multiply_are_one(
    tiny: tuple[Path, modeling.PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch multiplies many rows where it is fast and exact, our kernel the others: the same whole numbers."""
    results = []
    for is_exact in (int8._has_exact_products(), False):
        monkeypatch.setattr(int8, "_has_fast_products", lambda is_exact=is_exact: is_exact)
        model = serve(tiny[1])
        results += run(model, (opened(model, request(TOKENS)), 0, TOKENS, len(TOKENS)))
    assert torch.equal(*results)


@pytest.mark.parametrize(("num_inputs", "num_outputs"), [(64, 384), (4096, 8), (100, 37), (30, 5), (2080, 12)])
def test_products_are_exact_whatever_the_shape(num_inputs: int, num_outputs: int) -> None:
    random_ = np.random.default_rng(0)
    for num_rows in (1, 2, 4, 7, 30):
        weight = random_.integers(-127, 128, (num_outputs, num_inputs), dtype=np.int8)
        whole = random_.integers(-kernels.LEVELS, kernels.LEVELS + 1, (num_rows, num_inputs), dtype=np.int16)
        weight[0], whole[0] = 127, kernels.LEVELS  # the largest sum there is
        bias = random_.standard_normal(num_outputs if num_rows % 2 else 0).astype(np.float32)
        units, scales = np.linspace(0.5, 2, num_rows), np.linspace(1, 3, num_outputs)
        linear = kernels.Linear(weight, scales.astype(np.float32), bias)
        sums = whole.astype(np.int64) @ weight.T.astype(np.int64)
        expected = sums.astype(np.float32) * units.astype(np.float32)[:, None] * linear.scales
        expected += bias if len(bias) else 0
        y = np.full((num_rows, num_outputs), np.nan, np.float32)
        kernels.multiply_rows(whole, linear, units.astype(np.float32), y)
        assert np.allclose(y, expected, rtol=1e-6, atol=0 if not len(bias) else 1e-2)
        joined = np.full_like(y, np.nan)
        halves = np.empty((2 * num_rows, num_inputs), np.int8)
        kernels.halve_rows(whole, halves)
        kernels.join_rows(
            (halves.astype(np.int64) @ weight.T.astype(np.int64)).astype(np.int32),
            linear,
            units.astype(np.float32),
            joined,
        )
        assert np.array_equal(y, joined)


def test_rounding_twice_is_rounding_once() -> None:
    torch.manual_seed(0)
    weight = torch.randn(300, 200) * torch.rand(300, 1)
    weight[7] = 0
    rounded, scales = modeling.round_to_int8(weight)
    once = rounded * scales[:, None]
    again, same = modeling.round_to_int8(once)
    assert torch.equal(again, rounded)
    assert torch.allclose(same, scales, rtol=1e-6)
    assert (weight - once).abs().max() <= 0.13 * weight.abs().max()
    step = weight.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
    largest_only = (weight / step).round() * step
    assert (weight - once).square().sum() < (weight - largest_only).square().sum()


def test_weights_of_qlora_are_kept_in_eight_bits(tiny: tuple[Path, modeling.PreTrainedModel]) -> None:
    """Rounded to NF4 as training has them and then once more, nearer to those than eight bits of the base are; the head
    and norms are as in int8."""
    base, eight = load(tiny[0])
    trained_on, plain = modeling.load_base(base, modeling.NF4, "cpu"), modeling.load_base(base, modeling.FLOAT32, "cpu")
    served = dict(modeling.load_base(base, modeling.NF4_INT8, "cpu").named_modules())
    linears = modeling.linear_modules(trained_on)
    assert linears
    for name, module in trained_on.named_modules():
        if name in linears:
            weight = modeling.dense_weight(module, torch.float32)
            rounded, scales = modeling.round_to_int8(weight)
            assert torch.equal(served[name].weight, rounded * scales[:, None])
            off = (served[name].weight - weight).norm()
            assert off < 0.1 * (dict(plain.named_modules())[name].weight - weight).norm()
        elif getattr(module, "weight", None) is not None and name != "lm_head":
            assert torch.equal(served[name].weight, dict(eight.named_modules())[name].weight)


def test_an_adapter_of_another_base_is_refused_and_gives_its_room_back(
    tiny: tuple[Path, modeling.PreTrainedModel], tmp_path: Path
) -> None:
    model = serve(tiny[1])
    other = build_tiny_base(tmp_path / "other", "gpt2")
    for folder in (build_tiny_adapter(other, tmp_path / "strange", 1), tmp_path / "missing"):
        with pytest.raises(IntegrityError):
            at_once(model.open(request(TOKENS, Adapter("sha256:x", folder))))
    assert model.pool.num_used == 0
    assert not model.adapters.digests


# --- blocks ------------------------------------------------------------------------------------------------------


def test_a_beginning_is_shared_within_an_owner_once_it_was_read() -> None:
    pool = BlockPool(9, 4)
    prompt = list(range(10))
    first = lent(pool.open("a", prompt, 2))
    assert pool.find_read(first, 0) == 0
    pool.name_read(first, 7)  # one whole block of it

    second = lent(pool.open("a", prompt, 2))
    assert pool.find_read(second, 0) == 4
    assert second.blocks[0] == first.blocks[0]
    assert len({*first.blocks, *second.blocks}) == pool.num_used == 5
    assert pool.find_read(second, 6) == 6  # in the middle of a block there is nothing to find
    pool.name_read(first, 10)
    assert pool.find_read(second, 4) == 8
    assert len({*first.blocks, *second.blocks}) == pool.num_used == 4

    other = lent(pool.open("b", prompt, 2))
    assert pool.find_read(other, 0) == 0
    pool.close(first)
    assert pool.num_used == 3 + 3  # the second still holds what it shares
    pool.close(second)
    pool.close(other)
    assert pool.num_used == 0

    late = lent(pool.open("a", [*prompt[:8], 99], 3))
    assert pool.find_read(late, 0) == 8


def test_the_last_prompt_token_is_always_read() -> None:
    pool = BlockPool(9, 4)
    prompt = list(range(8))
    first = lent(pool.open("a", prompt, 1))
    pool.name_read(first, 8)
    assert pool.find_read(lent(pool.open("a", prompt, 1)), 0) == 4


def test_kept_beginnings_give_way_the_oldest_first() -> None:
    pool = BlockPool(4, 4)
    for start in (0, 100, 200):
        table = lent(pool.open("a", [*range(start, start + 4), 9], 0))
        pool.name_read(table, 5)
        pool.close(table)

    def known(start: int) -> int:
        table = lent(pool.open("a", [*range(start, start + 4), 9], 0))
        found = pool.find_read(table, 0)
        pool.close(table)
        return found

    assert [known(start) for start in (0, 100)] == [4, 4]
    whole = lent(pool.open("a", [1], 7))  # two blocks: the one that was never named, and the oldest
    assert pool.open("a", [1] * 20, 0) is None
    pool.close(whole)
    assert [known(start) for start in (100, 0, 200)] == [4, 4, 0]


def test_no_block_is_ever_lent_twice_or_lost() -> None:
    chance = random.Random(3)
    pool = BlockPool(12, 2)
    tables: list[tuple[Table, list[int], int]] = []
    content: dict[int, tuple[int, ...]] = {}
    for _ in range(3000):
        if tables and chance.random() < 0.4:
            pool.close(tables.pop(chance.randrange(len(tables)))[0])
        prompt = [chance.randrange(2) for _ in range(chance.randint(1, 9))]
        if (table := pool.open("a", prompt, chance.randint(0, 3))) is not None:
            tables.append((table, prompt, 0))
        for index, (table, prompt, read) in enumerate(tables):
            found = pool.find_read(table, read)
            for at in range(read // 2, found // 2):  # what is shared holds what this prompt begins with
                assert content[table.blocks[at]] == tuple(prompt[: 2 * at + 2])
            read = min(len(prompt), found + chance.randint(0, 3))
            for at in range(found // 2, read // 2):
                content[table.blocks[at]] = tuple(prompt[: 2 * at + 2])
            pool.name_read(table, read)
            tables[index] = (table, prompt, read)
        used = [block for table, _, _ in tables for block in set(table.blocks)]
        assert len(set(used)) == pool.num_used
        shared = {block for block in used if used.count(block) > 1}
        assert shared <= set(pool._names)
    for table, _, _ in tables:
        pool.close(table)
    assert pool.num_used == 0
    assert pool.open("a", [5] * 24, 0) is not None


def lent(table: Table | None) -> Table:
    assert table is not None
    return table


# --- guesses -----------------------------------------------------------------------------------------------------


def test_what_followed_last_time_is_guessed() -> None:
    drafts = Drafts()
    tokens = [1, 2, 3, 4, 5, 6, 1, 2, 3]
    assert drafts.guess(tokens, 4) == [4, 5, 6, 1]
    assert drafts.guess(tokens, 0) == []
    tokens += [9]
    assert drafts.guess(tokens, 4) == []
    tokens += [1, 2, 3]
    assert drafts.guess(tokens, 2) == [9, 1]  # the newer one
    assert Drafts().guess([1, 2], 4) == []


def test_guesses_save_steps_and_change_nothing(tiny: tuple[Path, modeling.PreTrainedModel]) -> None:
    for temperature in (0.0, 0.8):
        texts: list[str] = []
        steps: list[int] = []
        for num_drafts in (0, 6):
            scheduler, model = schedule(tiny)
            model.num_drafts = num_drafts
            sampling = SamplingParams(max_tokens=200, temperature=temperature, top_k=3, seed=5)
            scheduler.submit((1, 1), EngineRequest(TOKENS * 2, sampling, []), 0.0)
            texts.append("".join(output.text for output in until_done(scheduler)))
            steps.append(scheduler.num_steps)
        assert texts[0] == texts[1]
        assert steps[1] < steps[0]


def test_what_a_form_leaves_no_choice_of_is_guessed(tiny: tuple[Path, modeling.PreTrainedModel]) -> None:
    schema = {"type": "object", "properties": {"availability": {"type": "boolean"}}, "required": ["availability"]}
    texts, steps = [], []
    for num_drafts in (0, 6):
        scheduler, model = schedule(tiny)
        model.num_drafts = num_drafts
        sampling = SamplingParams(
            max_tokens=60, temperature=0, json_schema=json.dumps(schema | {"additionalProperties": False})
        )
        scheduler.submit((1, 1), EngineRequest(TOKENS, sampling, []), 0.0, scheduler.grammars.compile(sampling))
        texts.append("".join(output.text for output in until_done(scheduler)))
        steps.append(scheduler.num_steps)
    assert texts[0] == texts[1]
    assert list(json.loads(texts[0])) == ["availability"]
    assert steps[1] < steps[0] / 2


def test_what_many_begin_alike_is_read_once(tiny: tuple[Path, modeling.PreTrainedModel]) -> None:
    texts = []
    for together in (False, True):
        scheduler, model = schedule(tiny)
        read: list[int] = []
        forward = model.forward
        model.forward = lambda pieces, read=read, forward=forward: (  # type: ignore[method-assign]
            read.append(sum(len(ids) for _, _, ids, _ in pieces if len(ids) > 1)) or forward(pieces)
        )
        greedy = SamplingParams(max_tokens=3, temperature=0)
        asked = [EngineRequest([*TOKENS, *TOKENS[: 20 + n]], greedy, []) for n in range(4)]
        outputs: list[Any] = []
        for number, one in enumerate(asked):
            scheduler.submit((1, number), one, 0.0)
            if not together:
                outputs += until_done(scheduler)
        outputs += until_done(scheduler)
        texts.append({n: "".join(output.text for output in outputs if output.key == (1, n)) for n in range(4)})
        shared = len(TOKENS) // BLOCK_TOKENS * BLOCK_TOKENS
        assert sum(read) == shared + sum(len(one.prompt_token_ids) - shared for one in asked)
    assert texts[0] == texts[1]


def test_what_is_aborted_while_a_step_is_told_leaves_its_room(tiny: tuple[Path, modeling.PreTrainedModel]) -> None:
    scheduler, model = schedule(tiny)
    for number in range(4):
        scheduler.submit((1, number), request(TOKENS, max_tokens=40), 0.0)
    for _ in range(2):
        step = scheduler.step()
        first = next(step)
        for number in range(4):
            if (1, number) != first.key:
                scheduler.abort((1, number), 0)
        assert [output.key for output in step] == []
        assert model.pool.num_used == (len(TOKENS) + 40 + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    assert len([output for output in until_done(scheduler) if output.finished is not None]) == 1
    assert model.pool.num_used == 0


def test_others_are_answered_while_an_adapter_is_loaded(
    tiny: tuple[Path, modeling.PreTrainedModel], tmp_path: Path
) -> None:
    scheduler, model = schedule(tiny)
    adapters = [Adapter(f"sha256:{n}", build_tiny_adapter(tiny[0], tmp_path / str(n), n)) for n in range(3)]

    def prove(adapter: Adapter, content: Any) -> Iterator[None]:
        for _ in range(5):
            yield
        if adapter is adapters[1]:
            raise IntegrityError("prompt 1", reason=Reason.SELF_TEST_FAILED)

    model.adapters.prove = prove
    scheduler.submit((1, 0), request(TOKENS, max_tokens=30), 0.0)
    for number, adapter in enumerate([*adapters, adapters[0]], 1):
        scheduler.submit((1, number), request(TOKENS, adapter, max_tokens=2), 0.0)
    scheduler.submit((1, 5), request(TOKENS, max_tokens=2), 0.0)
    seen = []
    for number_of_step in range(100):
        for output in scheduler.step():
            assert scheduler.num_active <= 16
            if output.finished is not None or output.error is not None:
                seen.append((output.key[1], number_of_step, output.error.reason if output.error else None))
        if number_of_step == 13:  # the third adapter is half tested
            scheduler.abort((1, 3), 0)
            assert model.adapters.digests == (adapters[0].digest,)
            assert model.pool.num_used == -(-(len(TOKENS) + 30) // BLOCK_TOKENS)
    order = [key for key, _, _ in seen]
    assert sorted(order) == [0, 1, 2, 4, 5]
    assert order[0] == 5  # asked last, and waited for nobody's adapter
    assert order[-1] == 0  # had a token in every step of the others'
    assert {key: reason for key, _, reason in seen if reason} == {2: Reason.SELF_TEST_FAILED}
    assert scheduler.num_waiting == scheduler.num_active == model.pool.num_used == 0


def test_what_never_fits_is_refused_and_the_rest_waits_its_turn(tiny: tuple[Path, modeling.PreTrainedModel]) -> None:
    scheduler, model = schedule(tiny, cache_bytes=2 * (2 * 16 + 4) * 2 * 2 * 4 * BLOCK_TOKENS)
    assert model.max_tokens == 4 * BLOCK_TOKENS
    with pytest.raises(InvalidSpecError, match=r"KNOWLEDGE_KV_CACHE_BYTES has room for, of 256\.") as refused:
        scheduler.check(request(TOKENS, max_tokens=107))
    assert refused.value.reason is Reason.PROMPT_TOO_LONG
    for number in range(3):
        asked = request([number, *TOKENS], max_tokens=105)
        scheduler.check(asked)
        scheduler.submit((1, number), asked, 0.0)
    done = [output.key[1] for output in until_done(scheduler) if output.finished is not None]
    assert done == [0, 1, 2]


def test_without_a_setting_a_whole_context_fits(
    tiny: tuple[Path, modeling.PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Int8Model(tiny[1], CONTEXT, 16, None, 0).max_tokens > CONTEXT  # 1 GiB of such a small base
    monkeypatch.setattr(paged, "DEFAULT_CACHE_BYTES", 2**16)
    assert Int8Model(tiny[1], CONTEXT, 16, None, 0).max_tokens == CONTEXT


def schedule(tiny: tuple[Path, modeling.PreTrainedModel], cache_bytes: int = CACHE_BYTES) -> tuple[Any, Int8Model]:
    from tokenizers import Tokenizer

    from knowledge_engine.inference.grammar import Grammars
    from knowledge_engine.inference.scheduler import Scheduler
    from knowledge_engine.metrics import EngineMetrics

    model = serve(tiny[1], cache_bytes)
    tokenizer = Tokenizer.from_file(str(tiny[0] / "tokenizer.json"))
    return Scheduler(model, tokenizer, Grammars(tokenizer, VOCABULARY, [0, 2]), CONTEXT, 4, EngineMetrics()), model


def until_done(scheduler: Any) -> Iterator[Any]:
    while scheduler.num_active or scheduler.num_waiting:
        yield from scheduler.step()
