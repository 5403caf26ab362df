"""A version leaves the house: merged into its base, or as the PEFT folder that it is."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from gateway.app import create_app
from knowledge_engine import modeling
from knowledge_engine.bases import Base, prepare_base
from knowledge_engine.cli import app
from knowledge_engine.client import Client
from knowledge_engine.core import BASE
from knowledge_engine.errors import AlreadyExistsError, IntegrityError, NotFoundError, Reason
from knowledge_engine.export import export_version
from knowledge_engine.manifest import EXPORT_FACTS
from knowledge_engine.server.app import start_server
from knowledge_engine.server.exports import Exports
from tests.running import wait_until
from tests.test_training import Workshop, bases, workshop  # noqa: F401 - fixtures

IDS = torch.arange(1, 40)[None]


@pytest.fixture(params=["lora", "dora", "rslora"])
def published(request: pytest.FixtureRequest, workshop: Workshop) -> Workshop:  # noqa: F811
    extra = {} if request.param == "lora" else {f"use_{request.param}": True}
    workshop.run(lora={"rank": 4, "alpha": 8} | extra, max_steps=4, learning_rate=0.02)
    return workshop


def served(workshop: Workshop) -> torch.Tensor:  # noqa: F811
    """Logits of base and adapter, as the service has them."""
    base = prepare_base(workshop.settings, BASE, lambda phase, fraction: None)
    model = modeling.add_adapter(modeling.load_base(base, "float32", "cpu"), workshop.registry.folder("shop", 1), "x")
    modeling.select_adapter(model, "x")
    with torch.no_grad():
        logits: torch.Tensor = model(IDS).logits
    return logits


def test_a_merged_version_answers_as_the_version_does(published: Workshop, tmp_path: Path) -> None:
    done = export_version(published.settings, "shop", 1, tmp_path / "merged")
    assert done.folder == tmp_path / "merged"
    assert done.max_difference < 1e-3
    assert (done.num_same, done.precision) == (done.num_tokens, "float32")
    merged = AutoModelForCausalLM.from_pretrained(done.folder)
    with torch.no_grad():
        assert torch.allclose(merged(IDS).logits, served(published), atol=1e-3)
    tokenizer = AutoTokenizer.from_pretrained(done.folder)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    facts = json.loads((done.folder / EXPORT_FACTS).read_text())
    assert facts["version_digest"] == published.registry.get("shop", 1).digest
    assert facts["max_difference"] == done.max_difference
    assert not list(tmp_path.glob(".merged*"))
    assert not list(done.folder.glob("*.bin"))
    with pytest.raises(AlreadyExistsError) as caught:
        export_version(published.settings, "shop", 1, done.folder)
    assert caught.value.reason is Reason.EXPORT_EXISTS


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own
def test_stock_peft_loads_a_version_as_it_is(published: Workshop, bases: dict[str, Base]) -> None:  # noqa: F811
    stock = AutoModelForCausalLM.from_pretrained(bases["llama"].folder, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(stock, str(published.registry.folder("shop", 1)))
    with torch.no_grad():
        assert torch.allclose(tuned(IDS).logits, served(published), atol=1e-4)


def test_what_differs_is_refused_and_gone(
    workshop: Workshop,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workshop.run(max_steps=4, learning_rate=0.02)

    def forget(model: modeling.PeftModel) -> Any:
        """What a merge into quantised or tied weights can do: nothing at all."""
        return modeling._tuner(model).unload()

    monkeypatch.setattr(modeling, "merge_adapter", forget)
    with pytest.raises(IntegrityError) as caught:
        export_version(workshop.settings, "shop", 1, tmp_path / "merged")
    assert caught.value.reason is Reason.EXPORT_DIFFERS
    assert not list(tmp_path.glob("*merged*"))


def test_what_cannot_be_exported_says_so(workshop: Workshop, tmp_path: Path) -> None:  # noqa: F811
    workshop.run(max_steps=1)
    with pytest.raises(NotFoundError):
        export_version(workshop.settings, "shop", 2, tmp_path / "merged")
    weights = workshop.registry.folder("shop", 1) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(IntegrityError) as caught:
        export_version(workshop.settings, "shop", 1, tmp_path / "merged")
    assert caught.value.reason is Reason.MODEL_VERSION_CORRUPT
    assert not list(tmp_path.glob("*merged*"))


def test_the_command_line_exports(
    workshop: Workshop,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workshop.run(max_steps=1)
    monkeypatch.setenv("KNOWLEDGE_DATA_DIR", str(workshop.settings.data_dir))
    monkeypatch.setenv("KNOWLEDGE_BASE_MODEL", str(workshop.settings.base_model))
    runner = CliRunner()
    done = runner.invoke(app, ["models", "export", "shop:1", "--out", str(tmp_path / "merged"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["folder"] == str(tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    again = runner.invoke(app, ["models", "export", "shop:1", "--out", str(tmp_path / "merged")])
    assert "EXPORT_EXISTS" in again.stderr
    assert runner.invoke(app, ["models", "export", "shop", "--out", str(tmp_path / "x")]).exit_code == 2


async def test_a_server_exports_in_a_child_of_its_own(workshop: Workshop) -> None:  # noqa: F811
    await asyncio.to_thread(lambda: workshop.run(max_steps=2))
    workshop.work_dir = workshop.settings.data_dir / "second"
    workshop.work_dir.mkdir()
    await asyncio.to_thread(lambda: workshop.run(max_steps=2, job_id="job-2", model="other"))
    exports = workshop.settings.data_dir / "exports"
    async with await start_server(workshop.settings) as server:
        with Client(server.address) as client:
            first, again = await asyncio.gather(
                *(asyncio.to_thread(client.export_model_version, "shop", 1) for _ in range(2))
            )
            assert first == again
            assert (first.folder, first.num_same) == ("exports/shop-1", first.num_tokens)
            assert first.version_digest == workshop.registry.get("shop", 1).digest
            merged = AutoModelForCausalLM.from_pretrained(workshop.settings.data_dir / first.folder)
            with torch.no_grad():
                assert torch.allclose(merged(IDS).logits, served(workshop), atol=1e-3)

            application = create_app(workshop.settings.model_copy(update={"grpc_address": server.address}))
            async with application.router.lifespan_context(application):
                transport = httpx2.ASGITransport(application)
                async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1:8001") as http:
                    answer = await http.post("/api/v1/models/shop/versions/1/export")
                    missing = await http.post("/api/v1/models/shop/versions/9/export")
            assert (answer.status_code, answer.json()) == (200, first.model_dump())
            assert (missing.status_code, missing.json()["reason"]) == (404, "MODEL_VERSION_NOT_FOUND")

            await asyncio.to_thread(client.delete_model_version, "shop", 1)
            assert not (exports / "shop-1").exists()
            weights = workshop.registry.folder("other", 1) / "adapter_model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-1] + b"x")
            with pytest.raises(IntegrityError) as caught:
                await asyncio.to_thread(client.export_model_version, "other", 1)
    assert caught.value.reason is Reason.MODEL_VERSION_CORRUPT
    assert list(exports.iterdir()) == []


async def test_an_export_that_nobody_waits_for_ends(workshop: Workshop) -> None:  # noqa: F811
    await asyncio.to_thread(lambda: workshop.run(max_steps=1))
    exports = Exports(workshop.settings)
    waiting = asyncio.create_task(exports.export(workshop.registry.get("shop", 1)))

    def children() -> list[psutil.Process]:
        return [child for child in psutil.Process().children() if "knowledge_engine.export" in child.cmdline()]

    await asyncio.to_thread(wait_until, children)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert children() == []
    assert not list(workshop.settings.data_dir.glob("exports/[!.]*"))


def test_an_export_ends_with_its_server_and_leaves_nothing(workshop: Workshop) -> None:  # noqa: F811
    workshop.run(max_steps=1)
    code = """
import asyncio
from knowledge_engine.registry import Registry
from knowledge_engine.server.exports import Exports
from knowledge_engine.settings import Settings

settings = Settings()
asyncio.run(Exports(settings).export(Registry.open(settings).get("shop", 1)))
"""
    exports = workshop.settings.data_dir / "exports"
    with subprocess.Popen([sys.executable, "-c", code], env=workshop.settings.child_environment()) as server:
        wait_until(lambda: list(exports.glob(".*")), 180)
        (child,) = psutil.Process(server.pid).children()
        server.kill()
    child.wait(60)
    Exports(workshop.settings)
    assert list(exports.iterdir()) == []
