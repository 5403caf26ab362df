"""Whether tuning helps, and what 4-bit training costs: `uv run python scripts/bench_quality.py --out docs/results.md`.

For every seed the real service generates conversations about the demo's catalogue, tunes twice on them (QLoRA, and LoRA
in float32) with a split that keeps products on one side, and answers the held-out questions with the base and both, and
with the QLoRA on the base as it was trained on (KNOWLEDGE_SERVING_PRECISION=nf4-int8). The same is asked about a
catalogue that no training has seen, of another kind of goods. Told are

- the held-out loss in the serving precision, mean over the seeds with its 95 % interval (Student's t),
- exact prices: answers that state a price and none that is wrong for the product they name, of all answers,
- inventions: answers that name a product or brand that nobody showed them, of all answers,

the last two with Wilson's 95 % interval over all answers. `--check` exits 1 unless the tuned model is better in all
three on the demo's catalogue.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev

from knowledge_engine import modeling
from knowledge_engine.bases import Base, prepare_base
from knowledge_engine.catalogue import DEMO_CATALOGUE, Product, load_demo_catalogue, parse_json
from knowledge_engine.client import Client
from knowledge_engine.core import (
    BASE,
    DatasetKind,
    DifficultyLevel,
    GenerationSpec,
    Job,
    JobState,
    LoraConfig,
    SplitBy,
    TrainingResult,
    TrainingSpec,
)
from knowledge_engine.datasets import Datasets
from knowledge_engine.errors import UpstreamError
from knowledge_engine.mentions import CatalogueNames, FactChecker, find_prices
from knowledge_engine.registry import Registry
from knowledge_engine.rows import Conversation
from knowledge_engine.settings import Settings
from knowledge_engine.splits import split_rows
from knowledge_engine.state import State
from knowledge_engine.text import ChatText
from knowledge_engine.training.loop import evaluation_batches
from knowledge_engine.training.loss import mean_loss

UNSEEN = Path(__file__).resolve().parent.parent / "tests" / "garden_catalogue.jsonl"
EVAL_SPLIT = 0.12
ANSWER_TOKENS = 80
_T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # two-sided, by the number of seeds
_METHODS = {"QLoRA": True, "LoRA": False}
_AS_TRAINED = "QLoRA in nf4-int8"
_ANSWERING = {
    BASE: (BASE, None), "QLoRA": ("QLoRA", None), "LoRA": ("LoRA", None), _AS_TRAINED: ("QLoRA", modeling.NF4_INT8)
}  # fmt: skip
"""Who answers: a model, and the precision that is asked for."""


@dataclass(frozen=True)
class Outcome:
    """What one model did on one set of questions."""

    seed: int
    catalogue: str
    model: str
    loss: float
    num_answers: int
    num_exact: int
    num_inventions: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, choices=sorted(_T_95), default=3, help="how many (default 3)")
    parser.add_argument("--conversations", type=int, default=220, help="about the demo's catalogue (default 220)")
    parser.add_argument("--unseen", type=int, default=26, help="questions about the other catalogue (default 26)")
    parser.add_argument("--epochs", type=float, default=1, help="(default 1)")
    parser.add_argument("--json", action="store_true", help="one object per model, seed and catalogue")
    parser.add_argument("--out", type=Path, default=None, help="write the tables as Markdown")
    parser.add_argument("--check", action="store_true", help="exit 1 unless tuning helps")
    arguments = parser.parse_args()
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="bench-quality-") as folder:
        for seed in range(1, arguments.seeds + 1):
            for outcome in _one_seed(Path(folder), seed, arguments):
                outcomes.append(outcome)
                print(json.dumps(asdict(outcome)) if arguments.json else _line(outcome), flush=True)
    table = "\n".join(_table(outcomes, arguments))
    print(table)
    if arguments.out is not None:
        arguments.out.write_text(_page(table), encoding="utf-8")
    return int(arguments.check and not _helps(outcomes))


def _one_seed(root: Path, seed: int, arguments: argparse.Namespace) -> Iterator[Outcome]:
    folder = root / f"seed-{seed}"
    folder.mkdir()
    products = {"demo": load_demo_catalogue(), "unseen": _read(UNSEEN)}
    # What is trained under a precision that is asked for can be served in it, and in the usual ones.
    with _service(folder, modeling.NF4_INT8) as address, Client(address) as client:
        client.upload_dataset("demo-shop", DEMO_CATALOGUE.read_bytes(), kind=DatasetKind.CATALOGUE)
        client.upload_dataset("unseen-shop", UNSEEN.read_bytes(), kind=DatasetKind.CATALOGUE)
        for name, catalogue, number in (
            ("talks", "demo-shop", arguments.conversations),
            ("unseen-talks", "unseen-shop", arguments.unseen),
        ):
            spec = GenerationSpec(
                catalogue=catalogue, dataset=name, num_conversations=number, seed=seed,
                difficulty_level=DifficultyLevel.SIMPLE,
            )  # fmt: skip
            _ended(client, client.create_generation_job(spec))
        for name, use_qlora in _METHODS.items():
            training = TrainingSpec(
                dataset="talks", model=name, use_qlora=use_qlora, lora=LoraConfig(rank=8, alpha=16), seed=seed,
                num_train_epochs=arguments.epochs, per_device_train_batch_size=2, learning_rate=1e-3,
                eval_split=EVAL_SPLIT, split_by=SplitBy.PRODUCT,
            )  # fmt: skip
            _ended(client, client.create_training_job(training))
    talks = _talks(folder, seed)
    answers: dict[tuple[str, str], list[str]] = {}
    for precision in (None, modeling.NF4_INT8):
        with _service(folder, precision) as address, Client(address) as client:
            _wait_until_ready(client)
            for who, (model, asked) in _ANSWERING.items():
                if asked == precision:
                    answers |= {(catalogue, who): _answers(client, model, rows) for catalogue, rows in talks.items()}
    for (catalogue, who), texts in answers.items():
        rows = talks[catalogue]
        exact, invented = _judge(products[catalogue], rows, texts)
        loss = _loss(folder, *_ANSWERING[who], rows)
        yield Outcome(seed, catalogue, who, loss, len(texts), exact, invented)


@contextmanager
def _service(folder: Path, precision: str | None) -> Iterator[str]:
    environment = os.environ | ({} if precision is None else {"KNOWLEDGE_SERVING_PRECISION": precision})
    environment |= {
        "KNOWLEDGE_DATA_DIR": str(folder),
        "KNOWLEDGE_GRPC_ADDRESS": "127.0.0.1:0",
        "KNOWLEDGE_HTTP_ADDRESS": "127.0.0.1:0",
    }
    command = [sys.executable, "-m", "knowledge_engine.cli", "serve", "--json"]
    with (folder / "service.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment)
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())["grpc_address"]
        finally:
            process.terminate()
            process.wait(60)


def _wait_until_ready(client: Client) -> None:
    deadline = time.monotonic() + 300
    while True:
        try:
            client.generate(BASE, "Hello", max_tokens=1)
            return
        except UpstreamError:  # the engine still loads
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def _ended(client: Client, job: Job) -> Job:
    for _ in client.watch_job(job.id):
        pass
    job = client.get_job(job.id)
    if job.state is not JobState.SUCCEEDED:
        raise SystemExit(f"{job.id} ended as {job.state}: {job.error}")
    if isinstance(job.result, TrainingResult):
        print(f"  trained {job.result.model}: {job.result.tokens_per_second:.0f} tokens/s", file=sys.stderr, flush=True)
    return job


def _read(path: Path) -> list[Product]:
    return [Product.from_row(parse_json(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def _talks(folder: Path, seed: int) -> dict[str, list[Conversation]]:
    """What no training has seen: the held-out conversations, and those about the other catalogue."""
    state = State.open(f"sqlite:///{folder / 'state.db'}", migrate=False)
    try:
        datasets = Datasets(folder / "datasets", state)
        rows = datasets.conversations("talks")
        held_out = split_rows(rows, EVAL_SPLIT, seed, SplitBy.PRODUCT).held_out
        return {"demo": [rows[at] for at in held_out], "unseen": datasets.conversations("unseen-talks")}
    finally:
        state.close()


def _answers(client: Client, model: str, rows: Sequence[Conversation]) -> list[str]:
    """Greedy answers to the first question of every conversation."""

    def ask(row: Conversation) -> str:
        first = next(at for at, message in enumerate(row.messages) if message.role == "assistant")
        messages = list(row.messages[:first])
        return client.generate(model, messages, temperature=0, max_tokens=ANSWER_TOKENS, timeout_seconds=600).text

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(ask, rows))


def _judge(products: Sequence[Product], rows: Sequence[Conversation], texts: Sequence[str]) -> tuple[int, int]:
    """How many answers state exact prices only, and how many invent."""
    names = CatalogueNames(products)
    exact = invented = 0
    for row, text in zip(rows, texts, strict=True):
        question = next(message.content for message in row.messages if message.role == "user")
        budgets = {
            minor
            for price in find_prices(question)
            for product in row.products
            if (minor := price.minor(product.currency)) is not None
        }
        claims = FactChecker(names, row.products).check(text, budgets=budgets)
        exact += bool(find_prices(text)) and not claims.wrong_prices
        invented += bool(claims.unknown_names)
    return exact, invented


def _loss(folder: Path, model: str, asked: str | None, rows: Sequence[Conversation]) -> float:
    settings = Settings(data_dir=folder)
    base: Base = prepare_base(settings, BASE, lambda phase, fraction: None)
    text = ChatText.load(base)
    loaded = modeling.load_base(base, modeling.serving_precision(base, "cpu", asked), "cpu")
    if model != BASE:
        registry = Registry.open(settings)
        version = registry.resolve(model, None)
        loaded = modeling.add_adapter(loaded, registry.folder(version.model, version.version), "tuned")
        modeling.select_adapter(loaded, "tuned")
    examples = [text.encode_example(row.messages) for row in rows]
    return mean_loss(loaded, evaluation_batches(examples, "cpu"), lambda: None)[0]


# --- telling ------------------------------------------------------------------------------------------------------


def _line(outcome: Outcome) -> str:
    return (
        f"seed {outcome.seed}  {outcome.catalogue:6}  {outcome.model:17}  loss {outcome.loss:.4f}  exact prices "
        f"{outcome.num_exact}/{outcome.num_answers}  inventions {outcome.num_inventions}/{outcome.num_answers}"
    )


def _table(outcomes: Sequence[Outcome], arguments: argparse.Namespace) -> Iterator[str]:
    yield "| Catalogue | Model | Held-out loss, nats per token | Exact prices | Inventions |"
    yield "| --- | --- | --- | --- | --- |"
    for catalogue in ("demo", "unseen"):
        for model in _ANSWERING:
            some = [one for one in outcomes if (one.catalogue, one.model) == (catalogue, model)]
            loss = _interval([one.loss for one in some])
            answers = sum(one.num_answers for one in some)
            exact = _rate(sum(one.num_exact for one in some), answers)
            invented = _rate(sum(one.num_inventions for one in some), answers)
            yield f"| {catalogue} | {model} | {loss} | {exact} | {invented} |"
    for catalogue in ("demo", "unseen"):
        losses = {
            model: [one.loss for one in outcomes if (one.catalogue, one.model) == (catalogue, model)]
            for model in _ANSWERING
        }
        yield ""
        for who in ("QLoRA", _AS_TRAINED):
            gaps = [quantised / full - 1 for quantised, full in zip(losses[who], losses["LoRA"], strict=True)]
            yield (
                f"{who}, {catalogue}: the held-out loss is {100 * fmean(gaps):+.1f} % off LoRA's "
                f"({', '.join(f'{gap:+.1%}' for gap in gaps)} by seed)."
            )


def _interval(values: Sequence[float]) -> str:
    spread = _T_95[len(values)] * stdev(values) / math.sqrt(len(values))
    return f"{fmean(values):.3f} ± {spread:.3f}"


def _rate(hits: int, number: int) -> str:
    """A share with Wilson's interval."""
    z, share = 1.96, hits / number
    middle = (share + z * z / (2 * number)) / (1 + z * z / number)
    half = z * math.sqrt(share * (1 - share) / number + z * z / (4 * number * number)) / (1 + z * z / number)
    return f"{share:.0%} ({middle - half:.0%} to {middle + half:.0%} of {number})"


def _helps(outcomes: Sequence[Outcome]) -> bool:
    def mean(model: str, figure: str) -> float:
        some = [one for one in outcomes if (one.catalogue, one.model) == ("demo", model)]
        return fmean(getattr(one, figure) / (one.num_answers if figure.startswith("num_") else 1) for one in some)

    return (
        mean("QLoRA", "loss") < mean(BASE, "loss")
        and mean("QLoRA", "num_exact") > mean(BASE, "num_exact")
        and mean("QLoRA", "num_inventions") < mean(BASE, "num_inventions")
    )


def _page(table: str) -> str:
    command = " ".join(["uv run python scripts/bench_quality.py", *sys.argv[1:]])
    return f"""# Does tuning help?

Made by `{command}` on a CPU with two cores; the
script says what is measured and how. `base` is the bundled SmolLM2-135M-Instruct. Held out are products, not only
conversations; the unseen catalogue is a plant nursery (`tests/garden_catalogue.jsonl`), of which no training has seen a
word. Everything is answered in the serving precision (int8 where nothing else is said), greedily, with at most
{ANSWER_TOKENS} tokens. 95 % intervals: Student's t over the seeds, Wilson's over the answers.

{table}
"""


if __name__ == "__main__":
    sys.exit(main())
