"""Ways to train beside the plain one: preferences, DoRA, going on from a version, stopping early, the best step."""

from __future__ import annotations

import asyncio
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from knowledge_engine import modeling
from knowledge_engine.bases import Base, prepare_base
from knowledge_engine.catalogue import load_demo_catalogue
from knowledge_engine.client import Client
from knowledge_engine.core import (
    DatasetFormat,
    DatasetKind,
    JobStopped,
    LoraConfig,
    StopReason,
    TrainingResult,
    TrainingSpec,
    Truncation,
)
from knowledge_engine.errors import InvalidSpecError, KnowledgeEngineError, Reason, StateError
from knowledge_engine.rows import Preference
from knowledge_engine.server.app import start_server
from knowledge_engine.server.services import InferenceServicer
from knowledge_engine.text import ChatText, Example
from knowledge_engine.training.data import collate
from knowledge_engine.training.loop import train
from knowledge_engine.training.loss import preference_loss, preference_margins
from knowledge_engine.training.material import Item, Pair, fit, num_tokens, num_trained, width
from tests.test_training import (  # noqa: F401 - fixtures, too
    SPEC,
    FakeContext,
    Workshop,
    bases,
    checkpoints_of,
    examples,
    no_log,
    tuned,
    workshop,
)

KINDS = DatasetKind


def preference(asked: str, chosen: str, rejected: str) -> dict[str, Any]:
    told = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
    return {"prompt": [{"role": "user", "content": asked}], "chosen": told[0], "rejected": told[1]}


ROWS = [
    preference(f"Is the {thing} in stock?", f"Yes, the {thing} is in stock.", f"I do not know the {thing}, go away.")
    for thing in (
        "kettle",
        "lamp",
        "trail shoe",
        "tent",
        "mug",
        "chair",
        "desk",
        "scarf",
        "torch",
        "hat",
        "rug",
        "vase",
    )
]


@pytest.fixture(scope="module")
def pairs(bases: dict[str, Base]) -> list[Pair]:  # noqa: F811
    text = ChatText.load(bases["llama"])
    fitted = fit([Preference.from_row(row) for row in ROWS], text, 200, Truncation.ERROR, lambda item: item)
    return [item for item in fitted.items if isinstance(item, Pair)]


def log_probability(model: Any, example: Example) -> torch.Tensor:
    """Of the trained tokens, the long way."""
    ids = torch.tensor([example.input_ids])
    logs = functional.log_softmax(model(input_ids=ids).logits[0].float(), -1)
    return sum(logs[at - 1, example.input_ids[at]] for at in range(1, len(example.input_ids)) if example.trained[at])


def trained(
    base: Base, items: Sequence[Item], held_out: Sequence[Item], work_dir: Path, **changes: Any
) -> tuple[dict[str, torch.Tensor], FakeContext, Any]:
    spec = TrainingSpec.model_validate(SPEC.model_dump() | changes)
    model, context = tuned(base, spec), FakeContext(work_dir, spec)
    summary = train(model, items, held_out, spec, context, no_log, "cpu", checkpoints_of(context))
    return {name: w.detach().clone() for name, w in model.named_parameters() if w.requires_grad}, context, summary


def run(workshop: Workshop, **changes: Any) -> tuple[TrainingResult, FakeContext]:  # noqa: F811
    """As another job than the ones before it, without their checkpoints."""
    workshop.work_dir = Path(tempfile.mkdtemp(dir=workshop.settings.data_dir))
    return workshop.run(job_id=f"job-{workshop.work_dir.name}", **changes)


# --- preferences --------------------------------------------------------------------------------------------------


def test_of_a_preference_only_the_answers_are_learned(bases: dict[str, Base], pairs: list[Pair]) -> None:  # noqa: F811
    text = ChatText.load(bases["llama"])
    assert len(pairs) == 12
    for pair, row in zip(pairs, ROWS, strict=True):
        for example, answer in ((pair.chosen, row["chosen"]), (pair.rejected, row["rejected"])):
            ids = [token for token, learned in zip(example.input_ids, example.trained, strict=True) if learned]
            assert text.tokenizer.decode(ids).strip() == answer[0]["content"]
        lengths = [len(pair.chosen.input_ids), len(pair.rejected.input_ids)]
        assert (num_tokens(pair), width(pair)) == (sum(lengths), 2 * max(lengths))
        assert num_trained(pair) == sum(pair.chosen.trained) + sum(pair.rejected.trained)
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    long = ROWS[0] | {"prompt": talk}
    (item,) = fit([Preference.from_row(long)], text, 200, Truncation.ERROR, lambda item: item).items
    assert isinstance(item, Pair)
    first = [token for token, learned in zip(item.chosen.input_ids, item.chosen.trained, strict=True) if learned]
    assert text.tokenizer.decode(first).strip() == "Yes, the kettle is in stock."


def test_a_preference_that_is_too_long_is_named_or_dropped(bases: dict[str, Base]) -> None:  # noqa: F811
    text = ChatText.load(bases["llama"])
    rows = [Preference.from_row(row) for row in (ROWS[0], preference("a", "b " * 100, "c " * 100))]
    with pytest.raises(InvalidSpecError) as caught:
        fit(rows, text, 64, Truncation.ERROR, lambda item: item)
    assert [violation.field for violation in caught.value.violations] == ["rows[2]"]
    fitted = fit(rows, text, 64, Truncation.DROP, lambda item: item)
    assert [item is None for item in fitted.items] == [False, True]
    assert fitted.changes[0].startswith("row 2 has ")


def test_the_short_way_equals_the_formula_and_its_gradients(
    bases: dict[str, Base],  # noqa: F811
    pairs: list[Pair],
) -> None:
    beta, some = 0.3, pairs[:4]
    spec = SPEC.model_copy(update={"lora": LoraConfig(dropout=0.0), "beta": beta})
    model = tuned(bases["llama"], spec)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.05)
    model.train()
    loss = preference_loss(preference_margins(model, collate(some, "cpu")), spec)
    loss.backward()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    short = [weight.grad.clone() for weight in weights if weight.grad is not None]
    model.zero_grad()
    plain = torch.zeros(())
    margins = []
    for pair in some:
        policy = log_probability(model, pair.chosen) - log_probability(model, pair.rejected)
        with torch.no_grad(), model.disable_adapter():
            reference = log_probability(model, pair.chosen) - log_probability(model, pair.rejected)
        margins.append((policy - reference).item())
        plain = plain - functional.logsigmoid(beta * (policy - reference))
    plain.backward()
    assert loss.item() == pytest.approx(plain.item(), abs=1e-4)
    assert any(abs(margin) > 0.1 for margin in margins)
    assert preference_margins(model, collate(some, "cpu")).tolist() == pytest.approx(margins, abs=1e-3)
    for one, weight in zip(short, weights, strict=True):
        assert weight.grad is not None
        assert torch.allclose(one, weight.grad, atol=1e-4)


@pytest.mark.parametrize("use_qlora", [True, False], ids=["nf4", "float32"])
def test_the_chosen_answers_gain(
    bases: dict[str, Base],  # noqa: F811
    pairs: list[Pair],
    tmp_path: Path,
    use_qlora: bool,
) -> None:
    changes = {"method": "dpo", "use_qlora": use_qlora, "max_steps": 12, "per_device_train_batch_size": 4}
    _, context, _ = trained(bases["llama"], pairs[2:], pairs[:2], tmp_path, eval_steps=12, **changes)
    losses = [step.loss for step in context.steps if step.loss is not None]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-3)  # nothing is learned yet
    assert losses[-1] < 0.3
    assert context.steps[-1].eval_loss is not None
    assert context.steps[-1].eval_loss < 0.5


def test_pairs_at_once_are_the_same_step_as_one_by_one(
    bases: dict[str, Base],  # noqa: F811
    pairs: list[Pair],
    tmp_path: Path,
) -> None:
    plain = {"method": "dpo", "lora": {"dropout": 0.0}}
    some = pairs[:4]  # the same four in every step
    one, told, _ = trained(bases["llama"], some, [], tmp_path / "1", per_device_train_batch_size=4, **plain)
    other, said, _ = trained(bases["llama"], some, [], tmp_path / "2", gradient_accumulation_steps=4, **plain)
    assert [step.loss for step in told.steps] == pytest.approx([step.loss for step in said.steps], abs=1e-4)
    # As a whole: AdamW makes a whole step of a single gradient that is nothing but rounding.
    assert max(_apart(one[name], other[name]) for name in one) < 0.01
    stiff, _, _ = trained(bases["llama"], some, [], tmp_path / "3", per_device_train_batch_size=4, beta=2, **plain)
    assert max(_apart(one[name], stiff[name]) for name in one) > 0.03


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The length of the difference over that of the first."""
    return ((one - other).norm() / one.norm()).item()


def test_a_job_learns_preferences_and_says_who_won(workshop: Workshop) -> None:  # noqa: F811
    content = "\n".join(map(json.dumps, ROWS)).encode()
    workshop.datasets.store("better", KINDS.PREFERENCES, DatasetFormat.JSONL, [content])
    result, context = run(workshop, dataset="better", method="dpo", max_steps=8, per_device_train_batch_size=4)
    assert result.comparison is not None
    assert result.comparison.base_loss == pytest.approx(math.log(2))
    assert result.comparison.tuned_loss < math.log(2)
    assert result.comparison.num_conversations == 2
    assert any("of 2 held-out preferences" in line for line in context.lines)
    for wrong in ({"dataset": "talks", "method": "dpo"}, {"dataset": "better"}):
        with pytest.raises(KnowledgeEngineError) as caught:
            run(workshop, **wrong)
        assert caught.value.reason is Reason.DATASET_KIND_WRONG


# --- DoRA ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("use_qlora", [True, False], ids=["nf4", "float32"])
def test_a_dora_adapter_serves_what_it_learned(
    bases: dict[str, Base],  # noqa: F811
    examples: list[Example],  # noqa: F811
    tmp_path: Path,
    family: str,
    use_qlora: bool,
) -> None:
    spec = TrainingSpec.model_validate(
        SPEC.model_dump() | {"lora": {"use_dora": True}, "use_qlora": use_qlora, "max_steps": 8}
    )
    model, context = tuned(bases[family], spec), FakeContext(tmp_path / "work", spec)
    train(model, examples, [], spec, context, no_log, "cpu", checkpoints_of(context))
    losses = [step.loss for step in context.steps if step.loss is not None]
    assert losses[-1] < losses[0]
    model.eval()
    ids = torch.tensor([examples[0].input_ids])
    with torch.no_grad():
        before = model(ids).logits
    modeling.save_adapter(model, tmp_path / "adapter", bases[family])
    precision = modeling.training_precision("cpu", use_qlora=use_qlora)
    served = modeling.add_adapter(modeling.load_base(bases[family], precision, "cpu"), tmp_path / "adapter", "x")
    modeling.select_adapter(served, "x")
    with torch.no_grad():
        assert torch.allclose(served(ids).logits, before, atol=1e-4)


def test_a_dora_job_warns_of_vllm(workshop: Workshop) -> None:  # noqa: F811
    _, context = run(workshop, lora={"use_dora": True}, max_steps=1)
    assert [reason for reason, _ in context.warnings] == ["DORA_NOT_EVERYWHERE"]
    _, context = run(workshop, max_steps=1)
    assert context.warnings == []


# --- going on from a version --------------------------------------------------------------------------------------


def test_a_training_goes_on_from_a_version(workshop: Workshop) -> None:  # noqa: F811
    shape = {"rank": 4, "alpha": 8}
    first, _ = run(workshop, lora=shape)
    more, context = run(workshop, lora=shape | {"dropout": 0.0}, start_from="shop:1", max_steps=1, learning_rate=1e-6)
    assert "goes on from shop:1" in context.lines
    assert first.comparison is not None
    assert more.comparison is not None
    assert more.comparison.tuned_loss == pytest.approx(first.comparison.tuned_loss, abs=1e-3)
    versions = [workshop.registry.get("shop", number) for number in (1, 2)]
    assert (versions[0].start_from_digest, versions[1].start_from_digest) == ("", versions[0].digest)
    fresh, _ = run(workshop, lora=shape, max_steps=1, learning_rate=1e-6)
    assert fresh.comparison is not None
    assert fresh.comparison.tuned_loss > more.comparison.tuned_loss + 0.1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora": {"rank": 8}}, "set rank as it has it"),
        ({"lora": {"use_rslora": True}}, "set use_rslora as it has it"),
        ({"start_from": "shop:2"}, "shop"),
        ({"start_from": "other:1"}, "other"),
    ],
    ids=["rank", "rslora", "version", "model"],
)
def test_what_cannot_be_gone_on_from_is_refused(
    workshop: Workshop,  # noqa: F811
    changes: dict[str, Any],
    said: str,
) -> None:
    run(workshop, max_steps=1)
    with pytest.raises(KnowledgeEngineError, match=said):
        run(workshop, **{"start_from": "shop:1", "max_steps": 1} | changes)
    assert workshop.registry.resolve("shop", None).version == 1


def test_an_adapter_of_another_base_is_not_gone_on_from(
    workshop: Workshop,  # noqa: F811
    bases: dict[str, Base],  # noqa: F811
) -> None:
    run(workshop, max_steps=1)
    workshop.settings = workshop.settings.model_copy(update={"base_model": str(bases["qwen2"].folder)})
    with pytest.raises(KnowledgeEngineError, match="an adapter of another base"):
        run(workshop, start_from="shop:1", max_steps=1)


async def test_what_is_not_said_of_the_adapter_is_as_the_version_has_it(workshop: Workshop) -> None:  # noqa: F811
    await asyncio.to_thread(lambda: workshop.run(lora={"rank": 4, "alpha": 8}, max_steps=1))
    async with await start_server(workshop.settings) as server:
        with Client(server.address) as client:
            spec = TrainingSpec(dataset="talks", model="shop", start_from="shop:1", max_steps=1)
            job = await asyncio.to_thread(client.create_training_job, spec)
            await asyncio.to_thread(client.cancel_job, job.id)
            wrong = spec.model_copy(update={"lora": LoraConfig(rank=8)})
            with pytest.raises(KnowledgeEngineError, match="set rank, alpha as it has it") as caught:
                await asyncio.to_thread(client.create_training_job, TrainingSpec(**wrong.model_dump(exclude_none=True)))
    assert isinstance(job.spec, TrainingSpec)
    assert (job.spec.start_from, job.spec.lora.rank, job.spec.lora.alpha) == ("shop:1", 4, 8)
    assert caught.value.violations[0].field == "spec.start_from"


def test_a_version_is_served_with_no_other_chat_template(workshop: Workshop, bases: dict[str, Base]) -> None:  # noqa: F811
    workshop.run(max_steps=1)
    base = prepare_base(workshop.settings, "base", lambda phase, fraction: None)
    servicer = InferenceServicer(workshop.registry, None, None)  # type: ignore[arg-type]
    version, text = workshop.registry.get("shop", 1), ChatText.load(base)
    servicer._check_servable(version, base, text)
    changed = version.model_copy(update={"chat_template_digest": "sha256:0"})
    with pytest.raises(StateError) as caught:
        servicer._check_servable(changed, base, text)
    assert caught.value.reason is Reason.CHAT_TEMPLATE_CHANGED
    other = version.model_copy(update={"base_digest": "sha256:0"})
    with pytest.raises(StateError) as caught:
        servicer._check_servable(other, base, text)
    assert caught.value.reason is Reason.BASE_MODEL_NOT_SERVED


# --- evaluation, the best step, an early end ----------------------------------------------------------------------


def test_an_evaluation_of_its_own_takes_nothing_from_the_training(workshop: Workshop) -> None:  # noqa: F811
    rows = [{"messages": [message.model_dump() for message in talk.messages]} for talk in
            workshop.datasets.conversations("talks")[:3]]  # fmt: skip
    content = "\n".join(map(json.dumps, rows)).encode()
    exam = workshop.datasets.store("exam", KINDS.EVALUATION, DatasetFormat.JSONL, [content])
    result, context = run(workshop, eval_dataset="exam", eval_split=None, max_steps=1)
    assert "20 conversations to train on, 3 held out" in context.lines
    assert result.comparison is not None
    assert result.comparison.num_conversations == 3
    assert workshop.registry.get("shop", 1).eval_dataset_digest == exam.digest
    with pytest.raises(KnowledgeEngineError) as caught:
        run(workshop, dataset="exam", max_steps=1)
    assert caught.value.reason is Reason.DATASET_KIND_WRONG


def test_what_truncation_does_is_told_row_by_row(workshop: Workshop) -> None:  # noqa: F811
    _, context = run(workshop, max_length=62, truncation="drop", max_steps=1)
    told = "; ".join(line for line in context.lines if "more than max_length (62): dropped" in line)
    num_dropped = told.count("dropped")
    assert num_dropped > 3
    (counts,) = (line for line in context.lines if "to train on" in line)
    assert sum(int(word) for word in counts.split() if word.isdecimal()) == 20 - num_dropped


def test_a_split_by_product_needs_products(workshop: Workshop) -> None:  # noqa: F811
    with pytest.raises(KnowledgeEngineError) as caught:
        run(workshop, split_by="product")
    assert caught.value.reason is Reason.SPLIT_IMPOSSIBLE
    rows = [
        {"messages": [{"role": "user", "content": f"Is the {product.title} here?"},
                      {"role": "assistant", "content": f"Yes, for {product.price_text}."}],
         "products": [product.to_row()]}
        for product in load_demo_catalogue()[:10]
    ]  # fmt: skip
    content = "\n".join(map(json.dumps, rows)).encode()
    workshop.datasets.store("shown", KINDS.CONVERSATIONS, DatasetFormat.JSONL, [content])
    _, context = run(workshop, dataset="shown", split_by="product", max_steps=1)
    assert "8 conversations to train on, 2 held out" in context.lines


def overfitting(base: Base, examples: list[Example], work_dir: Path, **changes: Any) -> Any:  # noqa: F811
    """Eight rows learned by heart, two others to be measured on: their loss falls first and rises then."""
    values = {"max_steps": 20, "eval_steps": 2, "learning_rate": 0.03, "lr_scheduler_type": "constant"}
    values |= {"warmup_ratio": 0.0}
    return trained(base, examples[2:6], examples[:2], work_dir, **values | changes)


def test_the_best_step_is_published(bases: dict[str, Base], examples: list[Example], tmp_path: Path) -> None:  # noqa: F811
    _, context, last = overfitting(bases["llama"], examples, tmp_path / "1", eval_steps=1, max_steps=12)
    losses = {step.step: step.eval_loss for step in context.steps if step.eval_loss is not None}
    best = min(losses, key=lambda step: losses[step])
    assert best < 12  # else nothing would be shown here
    assert (last.published_step, last.num_steps) == (12, 12)
    kept, context, summary = overfitting(
        bases["llama"], examples, tmp_path / "2", eval_steps=1, max_steps=12, load_best_model_at_end=True
    )
    assert (summary.published_step, summary.num_steps) == (best, 12)
    assert any(line.startswith(f"step {best} of 12 is published") for line in context.lines)
    until, _, _ = overfitting(bases["llama"], examples, tmp_path / "3", max_steps=best, eval_steps=1)
    assert all(torch.equal(kept[name], until[name]) for name in kept)


def test_it_stops_once_nothing_gets_better(
    bases: dict[str, Base],  # noqa: F811
    examples: list[Example],  # noqa: F811
    tmp_path: Path,
) -> None:
    changes = {"load_best_model_at_end": True, "early_stopping_patience": 2}
    _, context, summary = overfitting(bases["llama"], examples, tmp_path, **changes)
    losses = [step.eval_loss for step in context.steps if step.eval_loss is not None]
    assert summary.num_steps == 2 * len(losses) < 20
    assert losses.index(min(losses)) == len(losses) - 3
    assert summary.published_step == 2 * (len(losses) - 2)
    assert any("stops early" in line for line in context.lines)


@pytest.mark.parametrize("stop_after", [1, 5, 9, 13])
def test_the_best_step_outlives_an_interruption(
    bases: dict[str, Base],  # noqa: F811
    examples: list[Example],  # noqa: F811
    tmp_path: Path,
    stop_after: int,
) -> None:
    changes = {"load_best_model_at_end": True, "early_stopping_patience": 3, "eval_steps": 1, "max_steps": 14}
    twin, seen, whole = overfitting(bases["llama"], examples, tmp_path / "twin", **changes)
    spec = seen.job.spec
    model, context = tuned(bases["llama"], spec), FakeContext(tmp_path / "cut", spec, stop_after)
    context.stop_reason = StopReason.PAUSED
    try:
        train(model, examples[2:6], examples[:2], spec, context, no_log, "cpu", checkpoints_of(context))
    except JobStopped:
        model, context = tuned(bases["llama"], spec), FakeContext(tmp_path / "cut", spec)
        summary = train(model, examples[2:6], examples[:2], spec, context, no_log, "cpu", checkpoints_of(context))
        assert any("goes on from" in line for line in context.lines)
        assert (summary.published_step, summary.num_steps, summary.loss) == (
            whole.published_step, whole.num_steps, whole.loss,
        )  # fmt: skip
        left = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        assert all(torch.equal(twin[name], left[name]) for name in twin)
    else:
        assert stop_after > whole.num_steps
