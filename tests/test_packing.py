"""Packed batches: the same losses and gradients as padded ones, for every architecture that takes them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from knowledge_engine import devices, modeling
from knowledge_engine.bases import Base
from knowledge_engine.core import LoraConfig, TrainingMethod, TrainingSpec
from knowledge_engine.inference import batched
from knowledge_engine.text import Example
from knowledge_engine.training import plan
from knowledge_engine.training.blocks import use_fused_layers
from knowledge_engine.training.data import collate
from knowledge_engine.training.lora import use_fused_lora
from knowledge_engine.training.loss import batch_loss, loss_of
from knowledge_engine.training.material import Item, Pair
from knowledge_engine.training.packing import use_packing
from knowledge_engine.training.plan import pack_window
from tests.tiny import CONTEXT, FAMILIES, build_tiny_base

VOCABULARY = 120
SPEC = TrainingSpec(dataset="d", model="m", use_qlora=False, per_device_train_batch_size=8)


def example(ids: list[int], num_untrained: int) -> Example:
    return Example(ids, [], [index >= num_untrained for index in range(len(ids))])


def examples(seed: int = 0) -> list[Example]:
    """Two of one prompt, two more of its beginning, one of nothing that others have, and one twice."""
    chance = random.Random(seed)

    def words(count: int) -> list[int]:
        return chance.choices(range(5, VOCABULARY), k=count)

    system, prompt = words(9), words(6)
    longer = example([*system, *prompt, *words(12)], 15)
    return [
        longer,
        example([*system, *prompt, *words(4)], 11),
        example([*system, *words(7)], 12),
        example([*system, *words(8)], 3),
        example(words(15), 6),
        longer,
    ]


def tiny_model(family: str, attention: str = "sdpa", **changes: Any) -> modeling.PeftModel:
    config = AutoConfig.for_model(
        family, vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, **({} if family in {"phi", "phi3", "bloom", "falcon"} else {"head_dim": 16}), **changes,
    )  # fmt: skip
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    base.requires_grad_(False)
    for parameter in base.parameters():
        if parameter.ndim == 2:
            parameter.normal_(0, 0.15)
    module: Any
    for module in base.modules():  # chance would make any two passes differ
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "residual_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return with_adapter(base)


def with_adapter(base: modeling.PreTrainedModel, **lora: Any) -> modeling.PeftModel:
    model = modeling.attach_lora(base, LoraConfig(**{"dropout": 0.0} | lora), 0)
    for weight in weights_of(model):
        torch.nn.init.normal_(weight, std=0.05)
    model.train()
    return model


def weights_of(model: modeling.PeftModel) -> list[torch.nn.Parameter]:
    return [weight for weight in model.parameters() if weight.requires_grad]


def assert_packed_is_padded(model: modeling.PeftModel, items: list[Item], spec: TrainingSpec = SPEC) -> None:
    results = []
    for is_packed in (False, True):
        batch = collate(items, "cpu", is_packed=is_packed)
        loss = loss_of(spec)(model, batch)
        results.append((loss.item(), torch.autograd.grad(loss, weights_of(model), allow_unused=True)))
    (padded, expected), (packed, gradients) = results
    assert packed == pytest.approx(padded, rel=1e-5)
    for ours, theirs in zip(gradients, expected, strict=True):
        if theirs is None:
            assert ours is None
        else:
            assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-6


@pytest.mark.parametrize("family", sorted(batched._ARCHITECTURES))
def test_an_architecture_learns_packed_what_it_learns_padded(family: str) -> None:
    model = tiny_model(family)
    assert use_packing(model, examples()[0])
    assert_packed_is_padded(model, [*examples()])
    use_fused_lora(model, 0)
    assert_packed_is_padded(model, [*examples(1)])


@pytest.mark.parametrize("use_qlora", [True, False], ids=["nf4", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_layers_learn_packed_what_they_learn_padded(tmp_path: Path, family: str, use_qlora: bool) -> None:
    folder = build_tiny_base(tmp_path / "base", family)
    base = Base("base", folder, "sha256:0", CONTEXT, family, "tiny", 1)
    precision = modeling.training_precision("cpu", use_qlora=use_qlora)
    model = with_adapter(modeling.load_base(base, precision, "cpu"))
    assert use_packing(model, examples()[0])
    use_fused_layers(model, use_fused_lora(model, 0))
    assert_packed_is_padded(model, [*examples()])
    assert_packed_is_padded(model, [examples()[2]])


def test_preferences_share_their_prompt() -> None:
    model = tiny_model("llama")
    use_packing(model, examples()[0])
    use_fused_layers(model, use_fused_lora(model, 0))
    spec = SPEC.model_copy(update={"method": TrainingMethod.DPO, "beta": 0.1})
    pairs: list[Item] = [Pair(*(examples(seed)[:2])) for seed in (1, 2, 3)]
    assert collate(pairs, "cpu", is_packed=True).input_ids.shape == (1, 3 * (15 + 11 + 3))
    assert_packed_is_padded(model, pairs, spec)


def test_what_examples_share_is_computed_once_and_nothing_is_padded() -> None:
    """Nor is an example's last token computed, which nothing is asked of."""
    some = examples()
    batch = collate(some, "cpu", is_packed=True)
    assert batch.packing is not None
    assert batch.input_ids.shape == (1, 9 + 6 + 11 + 3 + 6 + 7 + 14)
    assert batch.length == max(len(one.input_ids) for one in some)
    ids = batch.input_ids[0][batch.packing.index]
    places = batch.packing.places[0][batch.packing.index]
    for row, one in enumerate(some):
        length = len(one.input_ids) - 1
        assert ids[row, :length].tolist() == one.input_ids[:-1]
        assert places[row, :length].tolist() == [*range(length)]
    assert collate([some[4]], "cpu", is_packed=True).input_ids.tolist() == [some[4].input_ids[:-1]]


def test_what_comes_after_the_last_trained_token_is_not_computed() -> None:
    one = Example([*range(5, 15)], [], [False] * 4 + [True] * 2 + [False] * 4)
    for is_packed in (True, False):
        batch = collate([one], "cpu", is_packed=is_packed)
        assert batch.input_ids.tolist() == [one.input_ids[:5]]
        assert batch.targets.tolist() == one.input_ids[4:6]
        assert batch.length == 10


def test_no_example_sees_another(tmp_path: Path) -> None:
    """Another neighbour changes no loss of an example, and no hidden state reaches across."""
    model = tiny_model("llama")
    use_packing(model, examples()[0])
    use_fused_layers(model, use_fused_lora(model, 0))
    mine = examples()[:2]
    alone = batch_loss(model, collate([*mine], "cpu", is_packed=True)).item()
    for seed in (1, 2):
        others = examples(seed)[2:5]
        theirs = batch_loss(model, collate([*others], "cpu", is_packed=True)).item()
        both = batch_loss(model, collate([*mine, *others], "cpu", is_packed=True)).item()
        assert both == pytest.approx(alone + theirs, rel=1e-5)


@pytest.mark.parametrize("family", ["bloom", "falcon", "gemma2"])
def test_an_architecture_of_another_attention_takes_none(family: str) -> None:
    model = tiny_model(family, attention="sdpa" if family == "falcon" else "eager")
    plain = batch_loss(model, collate([*examples()], "cpu")).item()
    assert use_packing(model, examples()[0]) == 0
    assert batch_loss(model, collate([*examples()], "cpu")).item() == plain


def test_a_sliding_window_says_how_long_examples_may_be() -> None:
    assert use_packing(tiny_model("mistral", sliding_window=24), examples()[0]) == 24
    assert use_packing(tiny_model("mistral", sliding_window=None), examples()[0]) > 10**6


def test_a_sliding_window_of_a_text_part_counts() -> None:
    text = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "sliding_window": 20,
    }  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision | {"image_size": 28})
    model = with_adapter(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").requires_grad_(False))
    assert use_packing(model, examples()[0]) == 20


def test_a_window_is_packed_by_what_it_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    some = examples()
    monkeypatch.setitem(plan._TOKENS_AT_ONCE, devices.CPU, 70)
    items: list[Item] = [some[4], some[0], some[2], some[1], some[3], some[5]]
    parts = pack_window([[0, 1, 2], [3, 4, 5]], items, SPEC, devices.CPU, 8)
    assert sorted(index for part in parts for index in part) == [*range(6)]
    shared = next(part for part in parts if 1 in part)
    assert 5 in shared
    assert len(parts) == 2  # padded, 8 * 27 places would be at least three times 70
    for part in parts:
        assert collate([items[index] for index in part], devices.CPU, is_packed=True).input_ids.numel() <= 70
    assert pack_window([[0, 1, 2], [3, 4, 5]], items, SPEC, devices.CPU, 1) == [
        [index] for part in parts for index in part
    ]
    monkeypatch.setitem(plan._TOKENS_AT_ONCE, devices.CPU, 5)
    assert len(pack_window([[0, 1, 2]], items, SPEC, devices.CPU, 8)) == 3
