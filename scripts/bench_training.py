"""Our training loop beside TRL's SFTTrainer: `uv run --with trl==1.16.0 python scripts/bench_training.py`.

Same conversations, base, LoRA shape, precision, effective batch, learning rate, schedule and number of steps; each run
in a fresh process, the contestants one after the other, `--rounds` times over. TRL runs at its defaults (but for bf16,
which no CPU here computes in) and at the best settings that `--search` found for it. Told are tokens per second of the
training alone (padding left out), the process's largest resident memory until its end, the held-out loss of the written
adapter on the float32 base, and ratios. `--check` exits 1 when a target is missed. `--llamafactory` adds a row for
LLaMA-Factory at its defaults, in an environment of its own and with its own chat template; float32 only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run from anywhere

RANK, ALPHA, LEARNING_RATE, BATCH, SEED = 8, 16, 2e-4, 8, 7
_HELD_OUT = 16
TARGETS = {"speed_over_default": 3.5, "speed_over_best": 2.2, "memory_of_best": 0.6, "loss_off_best": 0.01}
DEFAULT: dict[str, Any] = {"per_device_train_batch_size": BATCH}
"""TRL's own: gradient checkpointing, batches in random order."""
_QUICK: dict[str, Any] = {"gradient_checkpointing": False}
_GROUPED = _QUICK | {"train_sampling_strategy": "group_by_length"}
_LLAMA_FACTORY = ["uv", "run", "--isolated", "--no-project", "--with", "llamafactory==0.9.5", "--with", "torch==2.13.0"]
BEST: dict[str, Any] = _GROUPED | {"per_device_train_batch_size": 4}
CANDIDATES: dict[str, dict[str, Any]] = {
    "batch 8": _QUICK | {"per_device_train_batch_size": 8},
    "batch 8, grouped": _GROUPED | {"per_device_train_batch_size": 8},
    "batch 4, grouped": _GROUPED | {"per_device_train_batch_size": 4},
    "batch 2, grouped": _GROUPED | {"per_device_train_batch_size": 2},
    "batch 1": _QUICK | {"per_device_train_batch_size": 1},
    "packed to 512": _QUICK | {"per_device_train_batch_size": 1, "packing": True, "max_length": 512},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object per run, then one per precision")
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contestant; the median counts (default 3)")
    parser.add_argument("--conversations", type=int, default=64, help="to train on, once (default 64)")
    parser.add_argument("--precision", choices=["float32", "nf4"], default=None, help="only this one")
    parser.add_argument("--search", action="store_true", help="how fast TRL is at several settings, and nothing else")
    parser.add_argument("--llamafactory", action="store_true", help="a row for LLaMA-Factory, too")
    parser.add_argument(
        "--only", choices=["ours", "default", "best", "llamafactory"], default=None, help="only this contestant"
    )
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(json.dumps(_run(json.loads(arguments.child))))
        return 0
    contestants: dict[str, dict[str, Any] | None] = {"default": DEFAULT, "best": BEST, "ours": None}
    if arguments.search:
        contestants = dict(CANDIDATES)
    if arguments.llamafactory:
        contestants["llamafactory"] = {"per_device_train_batch_size": BATCH}
    precisions = [arguments.precision] if arguments.precision else ["float32", "nf4"]
    missed = 0
    with tempfile.TemporaryDirectory(prefix="bench-training-") as folder:
        _prepare(Path(folder), arguments.conversations)
        for precision in precisions:
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
            for _ in range(arguments.rounds):
                for name, settings in contestants.items():
                    if name == "llamafactory" and precision != "float32":
                        continue
                    if arguments.only is None or name == arguments.only:
                        runs[name].append(_measure(Path(folder), precision, name, settings))
                        _tell(arguments.json, runs[name][-1])
            if not arguments.search and arguments.only is None:
                missed += _compare(arguments.json, precision, runs)
    return int(arguments.check and missed > 0)


def _measure(folder: Path, precision: str, name: str, settings: dict[str, Any] | None) -> dict[str, Any]:
    task = {"folder": str(folder), "precision": precision, "contestant": name, "settings": settings}
    return in_child(__file__, task)


def in_child(script: str, task: dict[str, Any]) -> dict[str, Any]:
    """What a fresh process of `script` makes of a task."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, script, "--child", json.dumps(task)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{task['contestant']} failed at {json.dumps(task)}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def _tell(as_json: bool, run: dict[str, Any]) -> None:
    print(
        json.dumps(run)
        if as_json
        else f"{run['precision']:7}  {run['contestant']:16} {run['tokens_per_second']:6.1f} tokens/s  "
        f"{run['peak_bytes'] / 2**30:5.2f} GiB  held-out loss {run['held_out_loss']:.4f}  ({run['seconds']:.0f} s)",
        flush=True,
    )


def _compare(as_json: bool, precision: str, runs: dict[str, list[dict[str, Any]]]) -> int:
    """Tells the ratios of the medians; how many targets are missed."""

    def middle(name: str, figure: str) -> float:
        return median(run[figure] for run in runs[name])

    contest = ("default", "best", "ours")
    speed = {name: middle(name, "tokens_per_second") for name in contest}
    memory = {name: middle(name, "peak_bytes") for name in contest}
    loss = {name: middle(name, "held_out_loss") for name in contest}
    ratios = {
        "speed_over_default": speed["ours"] / speed["default"],
        "speed_over_best": speed["ours"] / speed["best"],
        "memory_of_best": memory["ours"] / memory["best"],
        "loss_off_best": loss["ours"] / loss["best"] - 1,
    }
    met = {
        name: ratios[name] >= target if name.startswith("speed") else ratios[name] <= target
        for name, target in TARGETS.items()
    }
    if as_json:
        print(json.dumps({"precision": precision, "ratios": ratios, "targets": TARGETS, "met": met}), flush=True)
    else:
        print(
            f"{precision:7}  {ratios['speed_over_default']:.2f}x TRL's defaults ({TARGETS['speed_over_default']}), "
            f"{ratios['speed_over_best']:.2f}x TRL's best ({TARGETS['speed_over_best']}), "
            f"{ratios['memory_of_best']:.2f}x its memory (at most {TARGETS['memory_of_best']}), "
            f"held-out loss {ratios['loss_off_best']:+.2%} (at most +{TARGETS['loss_off_best']:.0%})"
            f"{'' if all(met.values()) else '  MISSED'}",
            flush=True,
        )
    return sum(not good for good in met.values())


# --- what everybody gets ------------------------------------------------------------------------------------------


def _prepare(folder: Path, num_conversations: int) -> None:
    """The base, and conversations about the demo's catalogue as tokens: `rows.json`."""
    from knowledge_engine.bases import prepare_base
    from knowledge_engine.core import BASE, GenerationSpec, Job, JobKind, JobState, utc_now
    from knowledge_engine.datasets import Datasets
    from knowledge_engine.generation.pipeline import run_generation
    from knowledge_engine.settings import Settings
    from knowledge_engine.state import State
    from knowledge_engine.text import ChatText

    settings = Settings(data_dir=folder / "data")
    (settings.data_dir / "bases").mkdir(parents=True)
    text = ChatText.load(prepare_base(settings, BASE, lambda phase, fraction: None))
    state = State.open(settings.state_url)
    datasets = Datasets(settings.data_dir / "datasets", state)
    spec = GenerationSpec(
        catalogue=datasets.default_catalogue().name, dataset="talks", num_conversations=num_conversations + _HELD_OUT
    )
    job = Job(id="job-1", kind=JobKind.GENERATION, state=JobState.RUNNING, spec=spec, create_time=utc_now())
    run_generation(_Alone(job, folder), settings, datasets)  # type: ignore[arg-type]
    talks = datasets.conversations("talks")
    examples = [text.encode_example(conversation.messages) for conversation in talks]
    state.close()
    (folder / "talks.json").write_text(json.dumps([talk.to_row() for talk in talks[_HELD_OUT:]]))
    rows = [{"input_ids": example.input_ids, "trained": example.trained} for example in examples]
    (folder / "rows.json").write_text(json.dumps({"train": rows[_HELD_OUT:], "held_out": rows[:_HELD_OUT]}))


# --- one run, in a process of its own -----------------------------------------------------------------------------


def _run(task: dict[str, Any]) -> dict[str, Any]:
    import torch

    from knowledge_engine import devices, modeling
    from knowledge_engine.bases import prepare_base
    from knowledge_engine.core import BASE, LoraConfig
    from knowledge_engine.settings import Settings
    from knowledge_engine.text import Example
    from knowledge_engine.training.loop import evaluation_batches
    from knowledge_engine.training.loss import mean_loss

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    folder = Path(task["folder"])
    base = prepare_base(Settings(data_dir=folder / "data"), BASE, lambda phase, fraction: None)
    rows = json.loads((folder / "rows.json").read_text())
    train, held_out = (
        [Example(row["input_ids"], [], row["trained"]) for row in rows[side]] for side in ("train", "held_out")
    )
    model = modeling.attach_lora(
        modeling.load_base(base, task["precision"], "cpu"), LoraConfig(rank=RANK, alpha=ALPHA, dropout=0), SEED
    )
    with tempfile.TemporaryDirectory() as adapter:
        if task["contestant"] == "llamafactory":
            seconds, peak = _llama_factory(base.folder, folder, Path(adapter), task["settings"])
        else:
            contest: Callable[..., float] = _ours if task["settings"] is None else _trl
            seconds = contest(model, train, held_out, task)
            peak = devices.peak_memory()
            modeling.save_adapter(model, Path(adapter), base)
        del model
        tuned = modeling.add_adapter(modeling.load_base(base, "float32", "cpu"), Path(adapter), "tuned")
    modeling.select_adapter(tuned, "tuned")
    loss, _ = mean_loss(tuned, evaluation_batches(held_out, "cpu"), lambda: None)
    tokens = sum(len(example.input_ids) for example in train)
    return {
        "precision": task["precision"],
        "contestant": task["contestant"],
        "tokens_per_second": tokens / seconds,
        "peak_bytes": peak,
        "held_out_loss": loss,
        "seconds": seconds,
        "settings": task["settings"],
    }


def _ours(model: Any, train: Sequence[Any], held_out: Sequence[Any], task: dict[str, Any]) -> float:
    from knowledge_engine.core import TrainingSpec

    spec = TrainingSpec(
        dataset="d", model="m", num_train_epochs=1, per_device_train_batch_size=BATCH, learning_rate=LEARNING_RATE,
        warmup_ratio=0, seed=SEED,
    )  # fmt: skip
    return train_alone(model, train, held_out, spec, "cpu").seconds


def train_alone(model: Any, train: Sequence[Any], held_out: Sequence[Any], spec: Any, device: str) -> Any:
    """Our loop, without a server; its summary."""
    from knowledge_engine.core import Job, JobKind, JobState, utc_now
    from knowledge_engine.settings import Settings
    from knowledge_engine.training.checkpoints import Checkpoints
    from knowledge_engine.training.loop import train as run

    with tempfile.TemporaryDirectory() as work:
        job = Job(id="job-1", kind=JobKind.TRAINING, state=JobState.RUNNING, spec=spec, create_time=utc_now())
        context = _Alone(job, Path(work))
        settings = Settings(data_dir=work, checkpoint_seconds=3600)
        checkpoints = Checkpoints(context, settings, {"spec": spec.model_dump(mode="json")}, 0)  # type: ignore[arg-type]
        return run(model, train, held_out, spec, context, lambda metrics, step: None, device, checkpoints)  # type: ignore[arg-type]


def _llama_factory(base: Path, folder: Path, out: Path, settings: dict[str, Any]) -> tuple[float, int]:
    """Seconds of the training, and the largest resident memory of its process."""
    import resource

    columns = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    dataset = {
        "file_name": "talks.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": columns | {"system_tag": "system"},
    }
    (folder / "dataset_info.json").write_text(json.dumps({"talks": dataset}))
    config = {
        "stage": "sft", "do_train": True, "model_name_or_path": str(base), "template": "smollm2",
        "finetuning_type": "lora", "lora_rank": RANK, "lora_alpha": ALPHA, "lora_dropout": 0, "lora_target": "all",
        "dataset": "talks", "dataset_dir": str(folder), "cutoff_len": 2048, "learning_rate": LEARNING_RATE,
        "num_train_epochs": 1, "lr_scheduler_type": "linear", "warmup_ratio": 0, "use_cpu": True, "bf16": False,
        "report_to": "none", "output_dir": str(out), "overwrite_output_dir": True, "save_strategy": "no", "seed": SEED,
    }  # fmt: skip
    file = folder / "llamafactory.yaml"
    file.write_text(json.dumps(config | settings))
    subprocess.run([*_LLAMA_FACTORY, "llamafactory-cli", "train", str(file)], check=True, capture_output=True)
    took = json.loads((out / "train_results.json").read_text())["train_runtime"]
    return float(took), 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


class _Alone:
    """The context of a job that nobody watches."""

    def __init__(self, job: Any, work_dir: Path) -> None:
        self.job = job
        self.work_dir = work_dir

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: None


def _trl(model: Any, train: Sequence[Any], held_out: Sequence[Any], task: dict[str, Any]) -> float:
    import transformers
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    transformers.utils.logging.set_verbosity_error()
    settings = dict(task["settings"])
    began: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *arguments: Any, **options: Any) -> None:
            began.append(time.perf_counter())

        def on_train_end(self, *arguments: Any, **options: Any) -> None:
            began.append(time.perf_counter())

    rows = [
        {
            "input_ids": example.input_ids,
            "labels": [
                token if trained else -100 for token, trained in zip(example.input_ids, example.trained, strict=True)
            ],
        }
        for example in train
    ]  # fmt: skip
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    with tempfile.TemporaryDirectory() as work:
        config = SFTConfig(
            output_dir=work,
            num_train_epochs=1,
            gradient_accumulation_steps=BATCH // settings["per_device_train_batch_size"],
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="linear",
            warmup_steps=0,
            weight_decay=0.0,
            max_grad_norm=1.0,
            seed=SEED,
            bf16=False,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            **({"max_length": None} | settings),
        )
        tokenizer = AutoTokenizer.from_pretrained(Path(task["folder"]) / "data" / "bases" / "base")
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        trainer.train()
    return began[1] - began[0]


if __name__ == "__main__":
    sys.exit(main())
