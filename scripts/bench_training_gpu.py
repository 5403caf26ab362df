"""Our training loop beside transformers' Trainer on a GPU: `python scripts/bench_training_gpu.py [--json] [--check]`.

A random base in the shape of a 7B Llama, the same conversations (random tokens, half of each trained), LoRA shape,
effective batch, learning rate and number of steps; bfloat16 LoRA and NF4 QLoRA; each run in a fresh process, one after
the other. Trainer has batches of similar lengths, the fused optimizer and no gradient checkpointing, which are its
quickest settings where memory allows. Told are tokens per second of the training alone (padding left out), their share
of what a large bfloat16 product reaches on this device, the largest memory that torch reserved, and the ratio.
`--check` exits 1 when the target is missed. `--shape tiny` runs on any machine and says nothing of speed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run from anywhere

TARGET = 1.5
RANK, ALPHA, LEARNING_RATE, BATCH, SEED = 16, 32, 2e-4, 16, 7
SHAPES: dict[str, dict[str, int]] = {
    "7b": {"width": 4096, "inner": 11_008, "layers": 32, "heads": 32, "key_value_heads": 32, "vocabulary": 32_000},
    "tiny": {"width": 64, "inner": 128, "layers": 2, "heads": 4, "key_value_heads": 2, "vocabulary": 512},
}
_PRODUCT = 8192


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object per run, then one per precision")
    parser.add_argument("--check", action="store_true", help="exit 1 when the target is missed")
    parser.add_argument("--shape", choices=SHAPES, default="7b", help="of the base (default 7b)")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each contestant; the median counts (default 1)")
    parser.add_argument("--conversations", type=int, default=128, help="to train on, once (default 128)")
    parser.add_argument(
        "--tokens", type=int, default=768, help="of the longest; the shortest has a third (default 768)"
    )
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(json.dumps(_run(json.loads(arguments.child))))
        return 0
    missed = 0
    with tempfile.TemporaryDirectory(prefix="bench-training-gpu-") as folder:
        from scripts.bench_training import in_child
        from tests.tiny import build_random_llama

        build_random_llama(Path(folder) / "base", **SHAPES[arguments.shape])
        for use_qlora in (False, True):
            runs: dict[str, list[dict[str, Any]]] = {"trainer": [], "ours": []}
            for _ in range(arguments.rounds):
                for name, done in runs.items():
                    task = {"folder": folder, "contestant": name, "use_qlora": use_qlora}
                    done.append(
                        in_child(__file__, task | {"rows": arguments.conversations, "tokens": arguments.tokens})
                    )
                    _tell(arguments.json, done[-1])
            rates = {name: median(run["tokens_per_second"] for run in done) for name, done in runs.items()}
            ratio = rates["ours"] / rates["trainer"]
            missed += ratio < TARGET
            if arguments.json:
                print(json.dumps({"use_qlora": use_qlora, "speed_over_trainer": ratio, "target": TARGET}), flush=True)
            else:
                print(f"{'nf4' if use_qlora else 'lora'}  {ratio:.2f}x transformers' Trainer ({TARGET})", flush=True)
    return int(arguments.check and missed > 0)


def _tell(as_json: bool, run: dict[str, Any]) -> None:
    share = "" if run["share_of_peak"] is None else f"  {run['share_of_peak']:.0%} of {run['peak_tflops']:.0f} TFLOP/s"
    print(
        json.dumps(run)
        if as_json
        else f"{run['precision']:8}  {run['contestant']:8} {run['tokens_per_second']:9.1f} tokens/s{share}  "
        f"{run['peak_bytes'] / 2**30:6.2f} GiB  last loss {run['loss']:.4f}",
        flush=True,
    )


# --- one run, in a process of its own -----------------------------------------------------------------------------


def _run(task: dict[str, Any]) -> dict[str, Any]:
    import torch

    from knowledge_engine import devices, modeling
    from knowledge_engine.bases import prepare_base
    from knowledge_engine.core import BASE, LoraConfig
    from knowledge_engine.settings import Settings

    device = modeling.default_device()
    folder = Path(task["folder"])
    settings = Settings(data_dir=folder / "data", base_model=str(folder / "base"))
    (settings.data_dir / "bases").mkdir(parents=True, exist_ok=True)
    base = prepare_base(settings, BASE, lambda phase, fraction: None)
    precision = modeling.training_precision(device, use_qlora=task["use_qlora"])
    reachable = _product_rate() if device == devices.CUDA else None
    model = modeling.attach_lora(
        modeling.load_base(base, precision, device), LoraConfig(rank=RANK, alpha=ALPHA, dropout=0), SEED
    )
    rows = _rows(task["rows"], task["tokens"])
    train = _ours if task["contestant"] == "ours" else _trainer
    seconds, loss = train(model, rows, device)
    rate = sum(len(row.input_ids) for row in rows) / seconds
    # A frozen weight costs two operations forward and two for the gradient of its input; the head counts for trained
    # positions, attention and the adapters do not count.
    linear = sum(layer.module.base_layer.in_features * layer.module.base_layer.out_features
                 for layer in modeling.adapted_linears(model))  # fmt: skip
    share_trained = sum(sum(row.trained) for row in rows) / sum(len(row.input_ids) for row in rows)
    head = modeling.body_and_head(model)[1].weight.numel() * share_trained
    return {
        "contestant": task["contestant"],
        "precision": precision,
        "tokens_per_second": rate,
        "share_of_peak": None if reachable is None else 4 * (linear + head) * rate / reachable,
        "peak_tflops": None if reachable is None else reachable / 1e12,
        "peak_bytes": modeling.peak_device_memory(device),
        "loss": loss,
        "seconds": seconds,
        "torch": torch.__version__,
    }


def _product_rate() -> float:
    """Operations per second of a product of two large bfloat16 matrices."""
    import torch

    left, right = (torch.randn(_PRODUCT, _PRODUCT, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    for _ in range(5):
        left @ right
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(20):
        left @ right
    torch.cuda.synchronize()
    rate = 20 * 2 * _PRODUCT**3 / (time.perf_counter() - began)
    del left, right
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return rate


def _rows(count: int, longest: int) -> list[Any]:
    """The same for everybody: random tokens of the tiny tokenizer, lengths from a third of `longest` to all of it."""
    import random

    from knowledge_engine.text import Example

    chance = random.Random(SEED)
    lengths = [chance.randint(longest // 3, longest) for _ in range(count)]
    return [
        Example(
            [chance.randrange(3, 200) for _ in range(length)], [], [index >= length // 2 for index in range(length)]
        )
        for length in lengths
    ]


def _ours(model: Any, rows: Sequence[Any], device: str) -> tuple[float, float]:
    from knowledge_engine.core import TrainingSpec
    from scripts.bench_training import train_alone

    spec = TrainingSpec(
        dataset="d", model="m", num_train_epochs=1, per_device_train_batch_size=BATCH, learning_rate=LEARNING_RATE,
        warmup_ratio=0, seed=SEED,
    )  # fmt: skip
    summary = train_alone(model, rows, [], spec, device)
    return summary.seconds, summary.loss


def _trainer(model: Any, rows: Sequence[Any], device: str) -> tuple[float, float]:
    import torch
    import transformers
    from transformers import Trainer, TrainerCallback, TrainingArguments

    transformers.utils.logging.set_verbosity_error()
    moments: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *arguments: Any, **options: Any) -> None:
            moments.append(time.perf_counter())

        def on_train_end(self, *arguments: Any, **options: Any) -> None:
            if device != "cpu":
                torch.cuda.synchronize()
            moments.append(time.perf_counter())

    def pad(some: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in some)

        def filled(name: str, filler: int) -> torch.Tensor:
            return torch.tensor([row[name] + [filler] * (longest - len(row[name])) for row in some])

        ids, labels = filled("input_ids", 0), filled("labels", -100)
        return {"input_ids": ids, "labels": labels, "attention_mask": filled("mask", 0)}

    data = [
        {
            "input_ids": row.input_ids,
            "labels": [token if trained else -100 for token, trained in zip(row.input_ids, row.trained, strict=True)],
            "mask": [1] * len(row.input_ids),
        }
        for row in rows
    ]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    with tempfile.TemporaryDirectory() as work:
        arguments = TrainingArguments(
            output_dir=work,
            num_train_epochs=1,
            per_device_train_batch_size=BATCH,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="linear",
            weight_decay=0.0,
            max_grad_norm=1.0,
            train_sampling_strategy="group_by_length",
            optim="adamw_torch_fused",
            bf16=device != "cpu",
            use_cpu=device == "cpu",
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            remove_unused_columns=False,
            disable_tqdm=True,
            seed=SEED,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=pad, callbacks=[Clock()])
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return moments[1] - moments[0], float(losses[-1])


if __name__ == "__main__":
    sys.exit(main())
