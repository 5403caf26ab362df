"""Every option of `train` reaches the job."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from typer.testing import CliRunner

from knowledge_engine.cli import app
from knowledge_engine.client import Client
from knowledge_engine.core import DatasetKind, LoraConfig, TrainingSpec
from knowledge_engine.server.app import start_server
from knowledge_engine.settings import Settings

TALKS = "\n".join(
    json.dumps({"messages": [{"role": "user", "content": f"{word}?"}, {"role": "assistant", "content": f"{word}!"}]})
    for word in ("Kettle", "Lamp", "Tent", "Shoe")
).encode()
BETTER = "\n".join(
    json.dumps(
        {
            "prompt": [{"role": "user", "content": f"{word}?"}],
            "chosen": [{"role": "assistant", "content": f"Yes, a {word}."}],
            "rejected": [{"role": "assistant", "content": "No."}],
        }
    )
    for word in ("Kettle", "Lamp", "Tent", "Shoe")
).encode()
SFT: dict[str, tuple[list[str], Any]] = {
    "base_model": (["--base-model", "base"], "base"),
    "use_qlora": (["--no-qlora"], False),
    "learning_rate": (["--learning-rate", "0.001"], 0.001),
    "lr_scheduler_type": (["--scheduler", "cosine"], "cosine"),
    "warmup_ratio": (["--warmup-ratio", "0.2"], 0.2),
    "weight_decay": (["--weight-decay", "0.1"], 0.1),
    "max_grad_norm": (["--max-grad-norm", "0.5"], 0.5),
    "max_steps": (["--max-steps", "7"], 7),
    "per_device_train_batch_size": (["--batch-size", "3"], 3),
    "gradient_accumulation_steps": (["--accumulation", "2"], 2),
    "max_length": (["--max-length", "256"], 256),
    "truncation": (["--truncation", "keep_last_turns"], "keep_last_turns"),
    "method": (["--method", "sft"], "sft"),
    "eval_dataset": (["--eval-dataset", "exam"], "exam"),
    "eval_steps": (["--eval-steps", "2"], 2),
    "logging_steps": (["--logging-steps", "4"], 4),
    "save_steps": (["--save-steps", "5"], 5),
    "auto_find_batch_size": (["--auto-find-batch-size"], True),
    "neftune_noise_alpha": (["--neftune-noise-alpha", "5"], 5.0),
    "load_best_model_at_end": (["--best"], True),
    "early_stopping_patience": (["--patience", "3"], 3),
    "seed": (["--seed", "9"], 9),
}
LORA: dict[str, tuple[list[str], Any]] = {
    "rank": (["--lora-rank", "4"], 4),
    "alpha": (["--lora-alpha", "8"], 8),
    "dropout": (["--lora-dropout", "0.1"], 0.1),
    "target_modules": (["--target-module", "q_proj", "--target-module", "v_proj"], ("q_proj", "v_proj")),
    "use_rslora": (["--rslora"], True),
    "use_dora": (["--dora"], True),
}
DPO: dict[str, tuple[list[str], Any]] = {
    "method": (["--method", "dpo"], "dpo"),
    "beta": (["--beta", "0.5"], 0.5),
    "num_train_epochs": (["--epochs", "2"], 2.0),
    "eval_split": (["--eval-split", "0.25"], 0.25),
}
# Those that only some states allow have tests of their own: tests/test_methods.py.
ELSEWHERE = {"dataset", "model", "lora", "start_from", "split_by"}


async def test_every_option_reaches_the_job(make_settings: Callable[..., Settings]) -> None:
    assert SFT.keys() | DPO.keys() | ELSEWHERE == TrainingSpec.model_fields.keys()
    assert LORA.keys() == LoraConfig.model_fields.keys()
    async with await start_server(make_settings()) as server:

        def created(dataset: str, options: dict[str, tuple[list[str], Any]]) -> TrainingSpec:
            flags = [word for words, _ in options.values() for word in words]
            command = ["train", "--dataset", dataset, "--model", "shop", "--detach", "--json", *flags]
            result = CliRunner().invoke(app, [*command, "--server", server.address])
            assert result.exit_code == 0, result.output
            with Client(server.address) as client:
                job = client.get_job(json.loads(result.stdout)["id"])
                client.cancel_job(job.id)
            assert isinstance(job.spec, TrainingSpec)
            return job.spec

        with Client(server.address) as client:
            for name, content, kind in (
                ("talks", TALKS, DatasetKind.CONVERSATIONS),
                ("exam", TALKS, DatasetKind.EVALUATION),
                ("better", BETTER, DatasetKind.PREFERENCES),
            ):
                await asyncio.to_thread(client.upload_dataset, name, content, kind=kind)
        spec = await asyncio.to_thread(created, "talks", SFT | LORA)
        assert {field: getattr(spec, field) for field in SFT} == {field: value for field, (_, value) in SFT.items()}
        assert {field: getattr(spec.lora, field) for field in LORA} == {
            name: value for name, (_, value) in LORA.items()
        }
        spec = await asyncio.to_thread(created, "better", DPO)
        assert {field: getattr(spec, field) for field in DPO} == {field: value for field, (_, value) in DPO.items()}
