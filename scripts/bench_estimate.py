"""What preflight expects beside what is measured: `python scripts/bench_estimate.py [--json] [--check]`.

Real trainings of three steps, with a checkpoint and a held-out comparison, each in its own worker process started by a
real server. On a CPU, measured is the worker's largest resident memory, and the bases are the bundled one and two
random ones of other sizes; on a GPU, what the device has handed out beyond what it had before, as NVML tells every few
milliseconds, and all bases are random. `--check` exits 1 when an expectation is more than 15 % off.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import pynvml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from anywhere

from knowledge_engine import devices
from knowledge_engine.bases import Base, prepare_base
from knowledge_engine.client import Client
from knowledge_engine.core import BASE, DatasetKind, Message, TrainingResult, TrainingSpec
from knowledge_engine.server.app import start_server
from knowledge_engine.settings import Settings
from knowledge_engine.text import ChatText
from tests.tiny import build_random_llama

TOLERANCE = 0.15
_NUM_ROWS = 24
_WORDS = "the trail shoe costs 89.95 EUR and is in stock but the kettle and the backpack are not "


class Run(NamedTuple):
    """A training; `tokens` is the length of its longest conversation, about."""

    base: str
    batch_size: int
    tokens: int
    use_qlora: bool


SIZES: dict[str, dict[str, int] | None] = {
    "llama-27M": {"width": 384, "inner": 1024, "layers": 12, "heads": 6, "key_value_heads": 2, "vocabulary": 16_384},
    "SmolLM2-135M": None,  # the bundled one
    "llama-135M": {"width": 576, "inner": 1536, "layers": 30, "heads": 9, "key_value_heads": 3, "vocabulary": 49_152},
    "llama-362M": {"width": 960, "inner": 2560, "layers": 32, "heads": 15, "key_value_heads": 5, "vocabulary": 49_152},
    "llama-1.2B": {
        "width": 2048,
        "inner": 8192,
        "layers": 16,
        "heads": 32,
        "key_value_heads": 8,
        "vocabulary": 128_256,
    },
}
_LOADS = {
    devices.CPU: {
        "llama-27M": ((1, 128), (8, 384)),
        "SmolLM2-135M": ((1, 128), (4, 256)),
        "llama-362M": ((1, 128), (2, 256)),
    },
    devices.CUDA: {
        "llama-135M": ((16, 768),),
        "llama-362M": ((1, 256),),
        "llama-1.2B": ((8, 768),),
    },
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object per run")
    parser.add_argument("--check", action="store_true", help="exit 1 when an expectation is more than 15 %% off")
    parser.add_argument("--only", default="", help="runs whose base's name holds this text")
    arguments = parser.parse_args()
    worst = 0.0
    with tempfile.TemporaryDirectory(prefix="estimate-") as folder:
        for name in (name for name in _LOADS[devices.default_device()] if arguments.only in name):
            for facts in asyncio.run(_measure(Path(folder) / name, name)):
                worst = max(worst, abs(facts["deviation"]))
                print(json.dumps(facts) if arguments.json else _line(facts), flush=True)
    if not arguments.json:
        print(f"largest deviation {worst:.1%}, allowed {TOLERANCE:.0%}")
    return int(arguments.check and worst > TOLERANCE)


async def _measure(folder: Path, name: str) -> list[dict[str, Any]]:
    size = SIZES[name]
    values: dict[str, Any] = {"data_dir": folder / "data", "grpc_address": "127.0.0.1:0"}
    if size is not None:
        values["base_model"] = str(build_random_llama(folder / "base", **size))
    settings = Settings(**values)
    (settings.data_dir / "bases").mkdir(parents=True)
    base = prepare_base(settings, BASE, lambda phase, fraction: None)
    async with await start_server(settings) as server:
        return [
            await asyncio.to_thread(_train, server.address, base, run, number) for number, run in enumerate(_runs(name))
        ]


def _runs(name: str) -> Iterator[Run]:
    for load in _LOADS[devices.default_device()][name]:
        for use_qlora in (False, True):
            yield Run(name, *load, use_qlora)


def _train(address: str, base: Base, run: Run, number: int) -> dict[str, Any]:
    with Client(address) as client:
        dataset = client.upload_dataset(
            f"rows-{number}", "\n".join(conversations(base, run.tokens)).encode(), kind=DatasetKind.CONVERSATIONS
        )
        spec = TrainingSpec(
            dataset=dataset.name,
            model=f"model-{number}",
            use_qlora=run.use_qlora,
            per_device_train_batch_size=run.batch_size,
            max_steps=3,
            save_steps=2,
            eval_split=0.2,
        )
        estimate = client.estimate_training(spec)
        began = time.monotonic()
        with DeviceMemory() as taken:
            job = client.create_training_job(spec)
            while not job.state.is_terminal:
                time.sleep(0.5)
                job = client.get_job(job.id)
    if not isinstance(job.result, TrainingResult):
        raise SystemExit(f"{run} ended as {job.state}: {job.error}")
    measured = taken.largest if estimate.device == devices.CUDA else job.result.peak_memory_bytes
    return {
        **run._asdict(),
        "low_bytes": estimate.memory.low_bytes,
        "expected_bytes": estimate.memory.expected_bytes,
        "high_bytes": estimate.memory.high_bytes,
        "measured_bytes": measured,
        "reserved_bytes": job.result.peak_memory_bytes,
        "deviation": round(estimate.memory.expected_bytes / measured - 1, 4),
        "steps_and_tokens_are_right": (estimate.num_steps, estimate.num_tokens)
        == (job.result.num_steps, job.result.num_tokens),
        "seconds": round(time.monotonic() - began, 1),
    }


class DeviceMemory:
    """How much more of the first CUDA device is in use than at the beginning, by whomever; nothing where there is
    none."""

    def __init__(self) -> None:
        self.before = self.largest = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Self:
        if devices.default_device() == devices.CUDA:
            self.before = device_memory_in_use()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.003):
            self.largest = max(self.largest, device_memory_in_use() - self.before)


def device_memory_in_use() -> int:
    """Bytes of the first CUDA device."""
    pynvml.nvmlInit()
    return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used)


def conversations(base: Base, tokens: int) -> Iterator[str]:
    """Conversations of 60 to 100 % of so many tokens."""
    text = ChatText.load(base)

    def messages(words: int, row: int = 0) -> list[Message]:
        # A number in every round, or all would say nearly the same and none could be held out.
        answer = " ".join((f"{_WORDS} {row} " * words).split()[:words])
        return [Message(role="user", content="Which one is it?"), Message(role="assistant", content=answer)]

    few, many = (len(text.encode_example(messages(words)).input_ids) for words in (10, 60))
    for row in range(_NUM_ROWS):
        wanted = tokens * (0.6 + 0.4 * row / (_NUM_ROWS - 1))
        words = max(1, round(10 + (wanted - few) * 50 / (many - few)))
        yield json.dumps({"messages": [message.model_dump() for message in messages(words, row)]})


def _line(facts: dict[str, Any]) -> str:
    low, expected, high, measured = (facts[f"{name}_bytes"] / 2**20 for name in ("low", "expected", "high", "measured"))
    precision = "nf4" if facts["use_qlora"] else "float32"
    return (
        f"{facts['base']:13} {precision:8} {facts['batch_size']} x {facts['tokens']:4}: expected {expected:6.0f} MiB "
        f"({low:.0f} to {high:.0f}), measured {measured:6.0f} MiB, {facts['deviation']:+.1%}"
        f"{'' if facts['steps_and_tokens_are_right'] else ', STEPS OR TOKENS WRONG'}"
    )


if __name__ == "__main__":
    sys.exit(main())
