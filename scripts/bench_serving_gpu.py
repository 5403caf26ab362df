"""Answers on a GPU beside transformers: `python scripts/bench_serving_gpu.py [--json] [--check]`.

A random base in the shape of a 7B Llama with eight random adapters, in bfloat16 and in four bits; 1, 16 and 64 requests
at once, greedy, of equally many tokens; each contestant in a fresh process, one after the other:

- ours: the scheduler with the model that serves, the adapters in turn;
- transformers' `generate` on PEFT's model, the same adapters in one batch;
- transformers' continuous batching (`generate_batch`), without adapters.

Told are tokens per second, prompts included in the time; the largest memory that torch reserved; and, for one request,
the share of what memory allows: the rate at which a large tensor is read here over the bytes of the weights. `--check`
exits 1 unless ours reaches 60 % of that with one request in bfloat16. `--shape tiny` runs on any machine and says
nothing of speed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run from anywhere

TARGET = 0.6
LEVELS = (1, 16, 64)
NUM_ADAPTERS, RANK = 8, 16
CONTESTANTS = ("ours", "generate", "continuous batching")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one object per line")
    parser.add_argument("--check", action="store_true", help="exit 1 when the target is missed")
    parser.add_argument("--shape", choices=("7b", "tiny"), default="7b", help="of the base (default 7b)")
    parser.add_argument("--rounds", type=int, default=1, help="of each, of which the median is told (default 1)")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="of each request (default 256)")
    parser.add_argument("--tokens", type=int, default=128, help="of each answer (default 128)")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(json.dumps(_run(json.loads(arguments.child))))
        return 0
    share = None
    with tempfile.TemporaryDirectory(prefix="bench-serving-gpu-") as folder:
        from scripts.bench_training import in_child
        from scripts.bench_training_gpu import SHAPES
        from tests.tiny import build_random_llama, build_tiny_adapter

        base = build_random_llama(Path(folder) / "base", **SHAPES[arguments.shape])
        for number in range(NUM_ADAPTERS):
            build_tiny_adapter(base, Path(folder) / str(number), number, rank=RANK)
        for precision in ("bfloat16", "nf4"):
            for contestant in CONTESTANTS:
                task = {"folder": folder, "contestant": contestant, "precision": precision} | {
                    name: getattr(arguments, name) for name in ("rounds", "prompt_tokens", "tokens")
                }
                told = in_child(__file__, task)
                if contestant == "ours" and precision == "bfloat16":
                    share = told["share_of_bandwidth"]
                print(json.dumps(told) if arguments.json else _line(told), flush=True)
    is_met = share is not None and share >= TARGET
    if not arguments.json:
        said = "not known here" if share is None else f"{share:.0%}"
        print(f"one request in bfloat16: {said} of what memory allows ({TARGET:.0%})")
    return int(arguments.check and not is_met)


def _line(told: dict[str, Any]) -> str:
    rates = "  ".join(f"{at_once:>2}: {rate:8.1f}" for at_once, rate in told["tokens_per_second"].items())
    share = "" if told["share_of_bandwidth"] is None else f"  {told['share_of_bandwidth']:.0%} of the bandwidth"
    memory = f"{told['peak_bytes'] / 2**30:6.2f} GiB"
    return f"{told['precision']:8} {told['contestant']:20} tokens/s at {rates}  {memory}{share}"


# --- one contestant, in a process of its own ----------------------------------------------------------------------


def _run(task: dict[str, Any]) -> dict[str, Any]:
    from knowledge_engine import devices, modeling
    from knowledge_engine.bases import prepare_base
    from knowledge_engine.core import BASE
    from knowledge_engine.settings import Settings

    device = modeling.default_device()
    folder = Path(task["folder"])
    settings = Settings(data_dir=folder / "data", base_model=str(folder / "base"), max_active_streams=max(LEVELS))
    (settings.data_dir / "bases").mkdir(parents=True, exist_ok=True)
    base = prepare_base(settings, BASE, lambda phase, fraction: None)
    limit = _read_rate() if device == devices.CUDA else None
    model = modeling.load_base(base, task["precision"], device)
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    build = {"ours": _ours, "generate": _generate, "continuous batching": _continuous}[task["contestant"]]
    answer = build(model, base, folder, settings, task)
    chance = random.Random(0)
    rates = {}
    for at_once in LEVELS:
        seconds = []
        for _ in range(task["rounds"] + 1):  # the first one warms up
            prompts = [[chance.randrange(3, 300) for _ in range(task["prompt_tokens"])] for _ in range(at_once)]
            began = time.perf_counter()
            num_tokens = answer(prompts)
            seconds.append(time.perf_counter() - began)
            assert num_tokens == at_once * task["tokens"], num_tokens
        rates[at_once] = at_once * task["tokens"] / median(seconds[1:])
    return {
        "contestant": task["contestant"],
        "precision": task["precision"],
        "tokens_per_second": rates,
        "share_of_bandwidth": None if limit is None else rates[1] * num_bytes / limit,
        "peak_bytes": modeling.peak_device_memory(device),
    }


def _read_rate() -> float:
    """Bytes per second at which a large tensor is read."""
    import torch

    tensor = torch.ones(2**30, dtype=torch.float32, device="cuda")
    for _ in range(3):
        tensor.sum()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(20):
        tensor.sum()
    torch.cuda.synchronize()
    rate = 20 * tensor.nbytes / (time.perf_counter() - began)
    del tensor
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return rate


def _ours(model: Any, base: Any, folder: Path, settings: Any, task: dict[str, Any]) -> Any:
    import itertools

    from knowledge_engine.core import SamplingParams
    from knowledge_engine.inference.grammar import Grammars
    from knowledge_engine.inference.scheduler import Scheduler
    from knowledge_engine.inference.serving import serving_model
    from knowledge_engine.inference.wire import Adapter, EngineRequest
    from knowledge_engine.metrics import EngineMetrics
    from knowledge_engine.text import ChatText

    room = (task["prompt_tokens"] + task["tokens"] + 512) * max(LEVELS)
    text, config = ChatText.load(base), model.config
    depth = config.hidden_size // config.num_attention_heads
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * depth * model.dtype.itemsize
    settings = settings.model_copy(update={"kv_cache_bytes": room * token_bytes})
    served = serving_model(model, base, task["precision"], settings, lambda detail: None)
    grammars = Grammars(text.tokenizer, served.vocabulary_size, text.stop_token_ids)
    scheduler = Scheduler(
        served, text.decoder, grammars, base.context_length, max(LEVELS), EngineMetrics()
    )  # fmt: skip
    adapters = [Adapter(f"sha256:{number}", folder / str(number)) for number in range(NUM_ADAPTERS)]
    numbers = itertools.count()

    def answer(prompts: Sequence[list[int]]) -> int:
        for index, prompt in enumerate(prompts):
            sampling = SamplingParams(max_tokens=task["tokens"], temperature=0)
            request = EngineRequest(prompt, sampling, [], adapters[index % NUM_ADAPTERS])
            scheduler.submit((0, next(numbers)), request, time.monotonic())
        num_tokens = 0
        while scheduler.num_active or scheduler.num_waiting:
            for output in scheduler.step():
                if output.error is not None:
                    raise output.error
                if output.finished is not None:
                    num_tokens += output.finished.completion_tokens
        return num_tokens

    return answer


def _generate(model: Any, base: Any, folder: Path, settings: Any, task: dict[str, Any]) -> Any:
    import torch

    from knowledge_engine import modeling

    tuned: Any = model
    for number in range(NUM_ADAPTERS):
        tuned = modeling.add_adapter(tuned, folder / str(number), f"adapter{number}")
    modeling.select_adapter(tuned, "adapter0")

    def answer(prompts: Sequence[list[int]]) -> int:
        ids = torch.tensor(prompts, device=model.device)
        with torch.inference_mode():
            whole = tuned.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=task["tokens"],
                min_new_tokens=task["tokens"], pad_token_id=0,
                adapter_names=[f"adapter{index % NUM_ADAPTERS}" for index in range(len(prompts))],
            )  # fmt: skip
        return int(whole[:, ids.shape[1] :].numel())

    return answer


def _continuous(model: Any, base: Any, folder: Path, settings: Any, task: dict[str, Any]) -> Any:
    from transformers import GenerationConfig

    config = GenerationConfig(do_sample=False, max_new_tokens=task["tokens"], eos_token_id=-1, pad_token_id=0)

    def answer(prompts: Sequence[list[int]]) -> int:
        results = model.generate_batch(list(prompts), generation_config=config)
        return sum(len(result.generated_tokens) for result in results.values())

    return answer


if __name__ == "__main__":
    sys.exit(main())
