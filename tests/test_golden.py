"""A version that does not answer as it did when it was published never answers."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from knowledge_engine import modeling
from knowledge_engine.bases import Base, get_base, prepare_base
from knowledge_engine.core import BASE, TrainingSpec
from knowledge_engine.errors import IntegrityError, KnowledgeEngineError, Reason
from knowledge_engine.files import sha256_of
from knowledge_engine.inference.adapters import Adapters, at_once
from knowledge_engine.inference.golden import GOLDEN, TOLERANCES, Golden, SelfTest
from knowledge_engine.inference.int8 import Int8Model
from knowledge_engine.inference.scheduler import Model
from knowledge_engine.inference.serving import serving_model
from knowledge_engine.inference.wire import Adapter
from knowledge_engine.manifest import MANIFEST
from knowledge_engine.registry import Registry
from knowledge_engine.settings import Settings
from knowledge_engine.text import ChatText
from tests.test_engine import EngineProcess, answer, ask, connected, failure, prompt
from tests.test_int8 import TOKENS, opened, request, run
from tests.tiny import CONTEXT, HEAD_WIDTH, KEY_VALUE_HEADS, LAYERS, build_tiny_adapter, build_tiny_base

PRECISIONS = {"llama": "int8", "gpt2": "float32"}


def base_in(folder: Path, family: str = "llama") -> Base:
    return Base("base", folder, "sha256:base", CONTEXT, family, "tiny", 1)


def model_of(base: Base, precision: str, loaded_in: str | None = None) -> Model:
    settings = Settings(data_dir=base.folder / "data", max_active_streams=4, kv_cache_bytes=4 * CONTEXT * TOKEN_BYTES)
    return serving_model(modeling.load_base(base, loaded_in or precision, "cpu"), base, precision, settings, print)


TOKEN_BYTES = 2 * (2 * HEAD_WIDTH + 4) * LAYERS * KEY_VALUE_HEADS
"""Of the keys and values of a token in int8.py."""


def serve(base: Base, precision: str, loaded_in: str | None = None) -> Model:
    """As the engine has it."""
    model = model_of(base, precision, loaded_in)
    model.adapters.prove = SelfTest(model, base, ChatText.load(base), precision).demand
    return model


def publish(root: Path, base: Base, precision: str, job_id: str = "job-1", seed: int = 1) -> Adapter:
    registry = Registry(root / "models")
    folder = build_tiny_adapter(base.folder, registry.stage(job_id), seed)
    SelfTest(model_of(base, precision), base, ChatText.load(base), precision).record(folder, lambda: None)
    version = registry.publish(
        spec=TrainingSpec(dataset="d", model="shop"),
        job_id=job_id,
        folder=folder,
        base=base,
        dataset_digest="sha256:data",
        chat_template_digest="sha256:template",
        comparison=None,
        training_precision="nf4",
    )
    return Adapter(version.digest, registry.folder("shop", version.version))


def republish(adapter: Adapter) -> Adapter:
    """Whoever changes a file may change its digest, too."""
    path = adapter.folder / MANIFEST
    manifest = json.loads(path.read_text())
    for name, entry in manifest["files"].items():
        file = adapter.folder / name
        entry |= {"sha256": sha256_of(file), "size_bytes": file.stat().st_size}
    path.write_text(json.dumps(manifest))
    return Adapter(f"sha256:{sha256_of(path)}", adapter.folder)


@pytest.fixture(scope="module", params=PRECISIONS)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, str, Adapter]:
    root = tmp_path_factory.mktemp(request.param)
    base, precision = base_in(build_tiny_base(root / "base", request.param), request.param), PRECISIONS[request.param]
    return base, precision, publish(root, base, precision)


def copied(adapter: Adapter, folder: Path) -> Adapter:
    return Adapter(adapter.digest, shutil.copytree(adapter.folder, folder / "copy"))


def refused(model: Model, adapter: Adapter, reason: Reason = Reason.SELF_TEST_FAILED) -> str:
    """What is said; nothing of the adapter stays."""
    with pytest.raises(IntegrityError) as caught:
        at_once(model.adapters.acquire(adapter))
    assert caught.value.reason is reason
    assert adapter.digest not in model.adapters.digests
    return caught.value.message


def test_a_version_answers_as_when_it_was_published(
    published: tuple[Base, str, Adapter], caplog: pytest.LogCaptureFixture
) -> None:
    base, precision, adapter = published
    golden = Golden.model_validate_json((adapter.folder / GOLDEN).read_bytes())
    assert list(golden.answers) == [precision]
    assert len(golden.prompts) >= 3
    assert [one.token_ids for one in golden.prompts] == [
        ChatText.load(base).encode_prompt(one.messages) for one in golden.prompts
    ]
    assert GOLDEN in json.loads((adapter.folder / MANIFEST).read_text())["files"]
    caplog.set_level(logging.INFO)
    model = serve(base, precision)
    at_once(model.adapters.acquire(adapter))
    assert model.adapters.digests == (adapter.digest,)
    assert f"{adapter.digest} answers {len(golden.prompts)} golden prompts as published" in caplog.text


def test_there_is_a_tolerance_for_every_precision_that_serves(published: tuple[Base, str, Adapter]) -> None:
    base, precision, _ = published
    askable = get_args(get_args(Settings.model_fields["serving_precision"].annotation)[0])
    assert set(askable) == set(TOLERANCES) == set(modeling.SERVED_BYTES)
    precisions = modeling.serving_precisions(base, "nf4")
    assert precisions[0] == precision
    assert set(precisions) == {precision, "float32", "bfloat16", "nf4"}


@pytest.mark.parametrize("published", ["llama"], indirect=True)
@pytest.mark.parametrize("added", ["bfloat16", "nf4"])
def test_every_precision_has_its_own_values_for_the_same_prompts(
    published: tuple[Base, str, Adapter], added: str, tmp_path: Path
) -> None:
    base, precision, adapter = published
    both = copied(adapter, tmp_path)
    other = SelfTest(model_of(base, added), base, ChatText.load(base), added)
    checks: list[None] = []
    other.record(both.folder, lambda: checks.append(None))
    before, after = (Golden.model_validate_json((one.folder / GOLDEN).read_bytes()) for one in (adapter, both))
    assert after.prompts == before.prompts
    assert list(after.answers) == [precision, added]
    assert after.answers[precision] == before.answers[precision] != after.answers[added]
    assert len(checks) == len(after.prompts)

    both = republish(both)
    for each in after.answers:
        at_once(serve(base, each).adapters.acquire(both))
    weights = load_file(both.folder / "adapter_model.safetensors")
    weight = weights[max(name for name in weights if "lora_B" in name)].view(np.uint32)
    weight.flat[np.abs(weight.view(np.float32)).argmax()] ^= np.uint32(1 << 30)
    save_file(weights, both.folder / "adapter_model.safetensors", metadata={"format": "pt"})
    both = republish(both)
    for each in after.answers:
        assert "expected" in refused(serve(base, each), both)


def test_the_first_tokens_are_the_likeliest_ones(published: tuple[Base, str, Adapter]) -> None:
    """By transformers and PEFT themselves."""
    base, precision, adapter = published
    tuned: Any = modeling.add_adapter(modeling.load_base(base, precision, "cpu"), adapter.folder, "tuned")
    modeling.select_adapter(tuned, "tuned")
    golden = Golden.model_validate_json((adapter.folder / GOLDEN).read_bytes())
    for asked, told in zip(golden.prompts, golden.answers[precision], strict=True):
        tokens = [*asked.token_ids, *told.token_ids]
        with torch.no_grad():
            rows = tuned(torch.tensor([tokens[:-1]])).logits[0].log_softmax(-1)
        assert rows.argmax(-1)[-len(told.token_ids) :].tolist() == told.token_ids
        found = rows[range(len(rows)), tokens[1:]][-len(told.logprobs) :]
        assert found.tolist() == pytest.approx(told.logprobs, abs=0.02)


def test_a_first_token_that_is_not_the_likeliest_is_refused(
    published: tuple[Base, str, Adapter], tmp_path: Path
) -> None:
    """However right its log-probability is."""
    base, precision, adapter = published
    bad = copied(adapter, tmp_path)
    golden = Golden.model_validate_json((bad.folder / GOLDEN).read_bytes())
    asked, told = golden.prompts[0], golden.answers[precision][0]
    tuned: Any = modeling.add_adapter(modeling.load_base(base, precision, "cpu"), adapter.folder, "tuned")
    modeling.select_adapter(tuned, "tuned")
    with torch.no_grad():
        ids = torch.tensor([[*asked.token_ids, *told.token_ids[:-1]]])
        second = tuned(ids).logits[0, -1].log_softmax(-1).topk(2)
    told.token_ids[-1], told.logprobs[-1] = int(second.indices[1]), float(second.values[1])
    (bad.folder / GOLDEN).write_text(golden.model_dump_json())
    assert "prompt 1 ('Hi!'): token" in refused(_served(base, precision), bad)


def test_a_changed_template_is_refused(published: tuple[Base, str, Adapter], tmp_path: Path) -> None:
    base, precision, adapter = published
    changed = base_in(shutil.copytree(base.folder, tmp_path / "base"))
    path = changed.folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("a helpful assistant", "an assistant"))
    said = refused(serve(changed, precision), adapter)
    assert "prompt 1 ('Hi!')" in said
    assert "chat template or tokenizer have changed" in said


def test_a_changed_weight_of_the_base_is_refused(published: tuple[Base, str, Adapter], tmp_path: Path) -> None:
    """Of another revision there would be many."""
    base, precision, adapter = published
    changed = base_in(shutil.copytree(base.folder, tmp_path / "base"))
    weights = load_file(changed.folder / "model.safetensors")
    name = max((name for name in weights if weights[name].ndim == 2), key=lambda name: ("down" in name, "mlp" in name))
    weights[name][0] *= -1
    save_file(weights, changed.folder / "model.safetensors", metadata={"format": "pt"})
    assert "expected" in refused(serve(changed, precision), adapter)


@pytest.mark.parametrize("bit", [31, 28, 24], ids=["sign", "high exponent", "low exponent"])
def test_a_flipped_bit_is_refused(published: tuple[Base, str, Adapter], tmp_path: Path, bit: int) -> None:
    base, precision, adapter = published
    bad = copied(adapter, tmp_path)
    weights = load_file(bad.folder / "adapter_model.safetensors")
    weight = weights[max(name for name in weights if "lora_B" in name)].view(np.uint32)
    weight.flat[np.abs(weight.view(np.float32)).argmax()] ^= np.uint32(1 << bit)
    assert all(np.isfinite(each).all() for each in weights.values())
    save_file(weights, bad.folder / "adapter_model.safetensors", metadata={"format": "pt"})
    bad = republish(bad)
    model = serve(base, precision)
    said = refused(model, bad)
    assert bad.digest[:19] in said
    assert "prompt " in said
    assert "expected" in said
    at_once(model.adapters.acquire(adapter))


def test_a_precision_that_nobody_declared_is_refused(published: tuple[Base, str, Adapter]) -> None:
    base, precision, adapter = published
    said = refused(serve(base, "bfloat16"), adapter)
    assert f"it has golden values for {precision}, and bfloat16 serves here" in said
    assert "expected" in refused(serve(base, "float32", loaded_in="nf4"), declared(adapter, "float32"))


def declared(adapter: Adapter, precision: str) -> Adapter:
    """The same values under another name."""
    path = adapter.folder.with_name("declared")
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(adapter.folder, path)
    golden = json.loads((path / GOLDEN).read_text())
    golden["answers"] = {precision: next(iter(golden["answers"].values()))}
    (path / GOLDEN).write_text(json.dumps(golden))
    return Adapter("sha256:declared", path)


def _change(change: Callable[[Any], object]) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        golden = json.loads(path.read_text())
        change(next(iter(golden["answers"].values())))
        path.write_text(json.dumps(golden))

    return write


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_text(""),
        lambda path: path.write_text("{}"),
        lambda path: path.write_bytes(path.read_bytes()[:-20]),
        lambda path: path.write_bytes(path.read_bytes() + b" " * 2**20),
        _change(lambda answers: answers.pop()),
        _change(lambda answers: answers[0].update(logprobs=[float("nan")] * 20)),
        _change(lambda answers: answers[0].update(token_ids=[1] * 300)),
        _change(lambda answers: answers[0].update(logprobs=[-1.0] * 250)),
        _change(lambda answers: answers[0].update(more=1)),
    ],
    ids=[
        "missing",
        "empty",
        "nothing",
        "cut",
        "huge",
        "one answer less",
        "nan",
        "too long",
        "more numbers than tokens",
        "more",
    ],
)
def test_golden_values_that_cannot_be_read_are_refused_by_file(
    published: tuple[Base, str, Adapter], tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    base, precision, adapter = published
    bad = copied(adapter, tmp_path)
    damage(bad.folder / GOLDEN)
    said = refused(_served(base, precision), bad, Reason.MODEL_VERSION_CORRUPT)
    assert GOLDEN in said


_models: dict[Path, Model] = {}


def _served(base: Base, precision: str) -> Model:
    """The same for many tests; a refused adapter leaves nothing."""
    if base.folder not in _models:
        _models[base.folder] = serve(base, precision)
    return _models[base.folder]


def test_a_token_that_the_base_does_not_have_is_refused(published: tuple[Base, str, Adapter], tmp_path: Path) -> None:
    base, precision, adapter = published
    bad = copied(adapter, tmp_path)
    _change(lambda answers: answers[1]["token_ids"].__setitem__(0, 2**30))(bad.folder / GOLDEN)
    assert "prompt 2 ('Which of these kettles" in refused(_served(base, precision), bad)


def test_what_was_published_without_golden_values_serves_with_one_warning(
    published: tuple[Base, str, Adapter], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, precision, adapter = published
    old = copied(adapter, tmp_path)
    (old.folder / GOLDEN).unlink()
    manifest = json.loads((old.folder / MANIFEST).read_text())
    del manifest["files"][GOLDEN]
    (old.folder / MANIFEST).write_text(json.dumps(manifest))
    model = serve(base, precision)
    for _ in range(2):
        at_once(model.adapters.acquire(old))
        model.adapters.release(old.digest)
        model.adapters.unload(old.digest)
    assert caplog.text.count("it serves untested") == 1


@pytest.mark.parametrize("published", ["llama"], indirect=True)  # the other has no room that could be full
def test_a_full_room_is_left_alone(published: tuple[Base, str, Adapter]) -> None:
    base, precision, adapter = published
    model = serve(base, precision)
    assert isinstance(model, Int8Model)
    tokens = (TOKENS * 7)[: CONTEXT - 1]
    assert model.max_tokens == 4 * CONTEXT
    places = [opened(model, request(tokens, caller=caller, max_tokens=1)) for caller in "abcd"]
    assert at_once(model.open(request(TOKENS, adapter))) is None
    for first in range(0, len(tokens), 64):
        run(model, *((place, first, tokens[first : first + 64], 0) for place in places))
    last = [(place, len(tokens) - 1, tokens[-1:], 1) for place in places]
    before = run(model, *last)
    at_once(model.adapters.acquire(adapter))
    model.warm_up()
    assert torch.equal(torch.cat(before), torch.cat(run(model, *last)))


def test_what_failed_is_tested_again_when_its_files_have_changed_or_it_was_unloaded(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"bad")
    tried: list[str] = []
    removed: list[str] = []

    def prove(adapter: Adapter, content: str) -> Iterator[None]:
        yield
        tried.append(content)
        if content == "bad":
            raise IntegrityError("prompt 1", reason=Reason.SELF_TEST_FAILED)
        if content == "odd":
            raise IntegrityError("golden.json", reason=Reason.MODEL_VERSION_CORRUPT)

    adapters: Adapters[str] = Adapters(
        lambda adapter: ((adapter.folder / "weights").read_text(), 1), removed.append, 100
    )
    adapters.prove = prove
    adapter = Adapter("sha256:1", tmp_path)

    def fail() -> None:
        with pytest.raises(KnowledgeEngineError):
            at_once(adapters.acquire(adapter))
        assert adapters.digests == ()

    for _ in range(3):
        fail()
    assert (tried, removed) == (["bad"], ["bad"])
    adapters.unload(adapter.digest)
    fail()
    assert tried == ["bad"] * 2
    (tmp_path / "weights").write_bytes(b"odd")
    for _ in range(2):  # the server may bring such a file again
        fail()
    assert tried == ["bad", "bad", "odd", "odd"]
    (tmp_path / "weights").write_bytes(b"good")
    assert at_once(adapters.acquire(adapter)) == "good"
    assert (tried[4:], removed[4:]) == (["good"], [])


def test_values_that_are_not_finite_are_not_recorded(tmp_path: Path) -> None:
    base = base_in(build_tiny_base(tmp_path / "base"))
    folder = build_tiny_adapter(base.folder, tmp_path / "adapter", 1, scale=1e30)
    with pytest.raises(KnowledgeEngineError) as caught:
        SelfTest(model_of(base, "int8"), base, ChatText.load(base), "int8").record(folder, lambda: None)
    assert caught.value.reason is Reason.NON_FINITE
    assert not (folder / GOLDEN).exists()


async def test_an_engine_refuses_a_version_and_goes_on_answering_by_others(tmp_path: Path) -> None:
    engine = EngineProcess(tmp_path, build_tiny_base(tmp_path / "base"))
    base = await asyncio.to_thread(prepare_base, engine.settings, BASE, lambda phase, share: None)
    assert base == get_base(engine.settings)
    good, bad = (publish(tmp_path, base, "int8", f"job-{seed}", seed) for seed in (1, 2))
    untested = Adapter("sha256:untested", build_tiny_adapter(base.folder, tmp_path / "untested", 3))
    shutil.copyfile(good.folder / "adapter_model.safetensors", bad.folder / "adapter_model.safetensors")
    bad = republish(bad)
    try:
        async with connected(engine) as client:
            asked = ask(prompt(engine), adapter=good, max_tokens=200)
            other = dataclasses.replace(asked, adapter=untested)
            expected = [(await answer(client, each)).text for each in (asked, other)]
            await client.unload(good.digest)
            first, second, *errors = await asyncio.gather(
                answer(client, asked),
                answer(client, other),
                *(failure(client, dataclasses.replace(asked, adapter=bad)) for _ in range(3)),
            )
            assert [first.text, second.text] == expected
            for error in errors:
                assert isinstance(error, IntegrityError)
                assert error.reason is Reason.SELF_TEST_FAILED
                assert f"version {bad.digest[:19]} does not answer as it did when it was published" in error.message
                assert "prompt 1 ('Hi!')" in error.message
            assert set((await client.refresh()).adapters) == {good.digest, untested.digest}
    finally:
        assert engine.stop() == 0
    log = engine.log.read_text()
    assert log.count("sha256:untested was published without golden values") == 1
    assert f"{good.digest} answers" in log


def test_what_is_unloaded_while_it_is_loaded_goes_after_its_use(tmp_path: Path) -> None:
    removed: list[str] = []

    def prove(adapter: Adapter, content: str) -> Iterator[None]:
        yield

    adapters: Adapters[str] = Adapters(lambda adapter: ("content", 1), removed.append, 100)
    adapters.prove = prove
    steps = adapters.acquire(Adapter("sha256:1", tmp_path))
    next(steps)
    adapters.unload("sha256:1")
    assert at_once(steps) == "content"
    assert removed == []
    adapters.release("sha256:1")
    assert (adapters.digests, removed) == ((), ["content"])

    steps = adapters.acquire(Adapter("sha256:1", tmp_path))
    next(steps)
    steps.close()
    assert (adapters.digests, removed) == ((), ["content"] * 2)
    adapters.unload("sha256:1")
