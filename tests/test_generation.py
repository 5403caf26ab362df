"""Plans over real rows, words for them, and a judge that believes neither."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from knowledge_engine.catalogue import Product, load_demo_catalogue, parse_json
from knowledge_engine.core import (
    DatasetFormat,
    DatasetKind,
    DifficultyLevel,
    GenerationResult,
    GenerationSpec,
    Job,
    JobKind,
    JobState,
    JobStopped,
    Message,
    Progress,
    Service,
    StopReason,
    TrackerRun,
    utc_now,
)
from knowledge_engine.datasets import Datasets
from knowledge_engine.errors import InvalidSpecError, Reason, StateError
from knowledge_engine.generation.offline import OfflineVerbaliser
from knowledge_engine.generation.pipeline import Verbaliser, run_generation
from knowledge_engine.generation.planner import Act, Plan, Planner, need_of
from knowledge_engine.generation.verifier import Rejection, Verifier
from knowledge_engine.rows import Conversation
from knowledge_engine.settings import Settings
from knowledge_engine.state import State

LEVELS = list(DifficultyLevel)


class RecordingContext:
    """A job's context that remembers what was reported and can be told to stop."""

    def __init__(self, spec: GenerationSpec, work_dir: Path, stop_after: int | None = None) -> None:
        self.job = Job(
            id="job-1", kind=JobKind.GENERATION, state=JobState.RUNNING, spec=spec, create_time=utc_now(), attempt=1
        )
        self.work_dir = work_dir
        self.progress: list[Progress] = []
        self.lines: list[str] = []
        self._checks_left = stop_after

    def report(self, progress: Progress) -> None:
        self.progress.append(progress)

    def log(self, message: str) -> None:
        self.lines.append(message)

    def warn(self, reason: str, message: str) -> None:
        raise AssertionError(f"unexpected warning {reason}: {message}")

    def observe(self, service: Service, trouble: str | None) -> None:
        pass

    def expect_memory(self, memory_bytes: int) -> None: ...

    def track(self, run: TrackerRun) -> None:
        raise AssertionError("generation is not tracked")

    def at_end(self, call: Callable[[JobState | None], None]) -> None:
        raise AssertionError("generation waits for no end")

    def check(self) -> None:
        if self._checks_left is not None:
            self._checks_left -= 1
            if self._checks_left < 0:
                raise JobStopped(StopReason.CANCELLED)


class Liar(OfflineVerbaliser):
    """Speaks like the offline verbaliser, but what it says of every third plan is turned into something else."""

    name = "liar"

    def __init__(self, lie: Callable[[Plan, str], str]) -> None:
        self._lie = lie
        self._calls = 0

    def verbalise(self, plan: Plan) -> list[Message]:
        self._calls += 1
        messages = super().verbalise(plan)
        if self._calls % 3:
            return messages
        return [*messages[:-1], Message(role="assistant", content=self._lie(plan, messages[-1].content))]


@pytest.fixture
def datasets(tmp_path: Path) -> Iterator[Datasets]:
    state = State.open(f"sqlite:///{tmp_path / 'state.db'}")
    yield Datasets(tmp_path / "datasets", state)
    state.close()


Generate = Callable[..., tuple[GenerationResult, list[Conversation]]]


@pytest.fixture
def generate(datasets: Datasets, tmp_path: Path) -> Generate:
    """Runs a generation job; returns its result and the stored conversations."""

    def run(verbaliser: Verbaliser | None = None, **spec: Any) -> tuple[GenerationResult, list[Conversation]]:
        context = RecordingContext(GenerationSpec(**{"num_conversations": 30, **spec}), tmp_path)
        result = run_generation(context, Settings(), datasets, verbaliser)
        return result, datasets.conversations(result.dataset)

    return run


def _dialogue(conversation: Conversation) -> list[Message]:
    return [message for message in conversation.messages if message.role != "system"]


def test_a_run_stores_what_it_was_asked_for(datasets: Datasets, tmp_path: Path) -> None:
    context = RecordingContext(GenerationSpec(num_conversations=60, dataset="talks"), tmp_path)
    result = run_generation(context, Settings(), datasets)
    stored = datasets.get("talks")
    assert (result.dataset, result.num_conversations, result.provider) == ("talks", 60, "offline")
    assert (stored.num_rows, stored.digest, stored.job_id) == (60, result.digest, "job-1")
    assert stored.parents == (datasets.get("demo-catalogue").digest,)
    assert result.num_rejected == sum(result.rejections.values())
    assert {progress.phase for progress in context.progress} == {"generating"}
    assert [progress.step for progress in context.progress] == sorted(p.step or 0 for p in context.progress)
    assert (context.progress[0].step, context.progress[-1].step, context.progress[-1].total_steps) == (0, 60, 60)
    assert "demo-catalogue" in context.lines[0]


def test_the_system_message_shows_the_rows_and_answers_copy_from_it(generate: Generate) -> None:
    _, conversations = generate(num_conversations=100)
    for conversation in conversations:
        system, question, answer, *_ = conversation.messages
        assert [message.role for message in conversation.messages[:3]] == ["system", "user", "assistant"]
        assert 2 <= len(conversation.products) <= 4
        for product in conversation.products:
            assert f"- {product.title} by {product.brand}, {product.price_text}, " in system.content
        named = [product for product in conversation.products if product.title in answer.content]
        assert named, answer.content
        assert any(product.price_text in answer.content for product in named)
        assert question.content != answer.content


def test_the_seed_decides_everything(generate: Generate) -> None:
    digests = [generate(seed=seed, dataset=name)[0].digest for seed, name in ((1, "a"), (1, "b"), (2, "c"))]
    assert digests[0] == digests[1] != digests[2]


def test_plans_do_not_depend_on_the_process() -> None:
    code = """
from knowledge_engine.catalogue import load_demo_catalogue
from knowledge_engine.core import GenerationSpec
from knowledge_engine.generation.offline import OfflineVerbaliser
from knowledge_engine.generation.planner import Planner
planner = Planner(load_demo_catalogue(), GenerationSpec(num_conversations=10))
print([message.content for number in range(20) for message in OfflineVerbaliser().verbalise(planner.plan(number))])
"""
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout for _ in range(2)]
    assert runs[0] == runs[1] != b""


def test_difficulty_adds_constraints_turns_and_trouble() -> None:
    products = load_demo_catalogue()
    turns: dict[DifficultyLevel, float] = {}
    acts: dict[DifficultyLevel, set[Act]] = {}
    constraints: dict[DifficultyLevel, float] = {}
    for level in LEVELS:
        planner = Planner(products, GenerationSpec(num_conversations=10, difficulty_level=level))
        plans = [planner.plan(number) for number in range(300)]
        turns[level] = sum(len(plan.exchanges) for plan in plans) / len(plans)
        acts[level] = {exchange.act for plan in plans for exchange in plan.exchanges}
        said = [plan.exchanges[0].said for plan in plans]
        counts = [len(s.attributes) + (s.brand is not None) + (s.max_price_minor is not None) for s in said]
        constraints[level] = sum(counts) / len(counts)
    assert turns[DifficultyLevel.SIMPLE] == 1
    assert turns[DifficultyLevel.MEDIUM] == 2
    assert turns[DifficultyLevel.COMPLEX] >= 3
    assert (
        constraints[DifficultyLevel.SIMPLE] < constraints[DifficultyLevel.MEDIUM] < constraints[DifficultyLevel.COMPLEX]
    )
    assert acts[DifficultyLevel.SIMPLE] == {Act.NEED, Act.NO_MATCH}
    assert Act.CHANGE not in acts[DifficultyLevel.MEDIUM]
    assert acts[DifficultyLevel.COMPLEX] == set(Act)


@pytest.mark.parametrize("level", LEVELS)
def test_plans_are_true_of_their_rows(level: DifficultyLevel) -> None:
    planner = Planner(load_demo_catalogue(), GenerationSpec(num_conversations=10, difficulty_level=level))
    for plan in map(planner.plan, range(300)):
        assert len({row.id for row in plan.rows}) == len(plan.rows)
        for exchange in plan.exchanges:
            assert all(product in plan.rows for product in exchange.products)
            if exchange.act in {Act.NEED, Act.CHANGE}:
                assert all(exchange.constraints.satisfied_by(product) for product in exchange.products)
            if exchange.act is Act.NO_MATCH:
                assert not any(exchange.constraints.satisfied_by(row) for row in plan.rows)
                assert exchange.unmet


def test_needs_are_what_shoppers_say() -> None:
    needs = {product.title: need_of(product) for product in load_demo_catalogue()}
    assert needs["Lotus Yoga Mat"] == "yoga mat"
    assert needs["Pulse Headphones"] == "headphones"
    assert needs["Salt Road Novel"] == "novel"
    bare = Product(id="x", title="MX-500", price_minor=1, currency="EUR", category="Cameras")
    assert need_of(bare) == "cameras"


def test_topics_restrict_the_products(generate: Generate) -> None:
    _, conversations = generate(topics=("yoga mat", "kitchen"))
    for conversation in conversations:
        for product in conversation.products:
            assert product.category == "Kitchen" or product.title.endswith("Yoga Mat")


def test_an_unknown_topic_is_refused_and_the_categories_are_named(generate: Generate) -> None:
    with pytest.raises(InvalidSpecError) as caught:
        generate(topics=("kitchen", "submarines"))
    assert caught.value.reason is Reason.TOPIC_UNKNOWN
    assert caught.value.violations[0].field == "spec.topics[1]"
    assert "Books" in caught.value.message
    assert "Toys" in caught.value.metadata["categories"]


def test_without_product_data_nothing_is_shown(generate: Generate) -> None:
    result, conversations = generate(include_product_data=False)
    assert result.num_conversations == 30
    titles = [product.title for product in load_demo_catalogue()]
    for conversation in conversations:
        assert {message.role for message in conversation.messages} == {"user", "assistant"}
        assert conversation.products == ()
        assert any(title in conversation.messages[1].content for title in titles)


def test_words_vary(generate: Generate) -> None:
    _, conversations = generate(num_conversations=300, difficulty_level="simple")
    texts = ["\n".join(message.content for message in _dialogue(conversation)) for conversation in conversations]
    openings = {" ".join(text.split()[:3]) for text in texts}
    assert len(set(texts)) == 300
    assert len(openings) >= 12


def garden() -> list[Product]:
    lines = (Path(__file__).parent / "garden_catalogue.jsonl").read_text(encoding="utf-8").splitlines()
    return [Product.from_row(parse_json(line)) for line in lines]


@pytest.mark.parametrize("catalogue", [load_demo_catalogue, garden])
@pytest.mark.parametrize("level", LEVELS)
def test_the_offline_verbaliser_rarely_errs(level: DifficultyLevel, catalogue: Callable[[], list[Product]]) -> None:
    products = catalogue()
    planner = Planner(products, GenerationSpec(num_conversations=10, difficulty_level=level, seed=3))
    verifier, verbaliser = Verifier(products), OfflineVerbaliser()
    plans = [planner.plan(number) for number in range(500)]
    verdicts = [verifier.verify(plan, verbaliser.verbalise(plan)) for plan in plans]
    assert sum(verdict not in (None, Rejection.DUPLICATE) for verdict in verdicts) <= 5


def _other(plan: Plan) -> Product:
    return next(product for product in load_demo_catalogue() if product not in plan.rows)


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        (lambda plan, text: f"{text} Or take the {_other(plan).title}.", "UNKNOWN_PRODUCT"),
        (lambda plan, text: f"{text} The ZetaPhone 9000 is even better.", "UNKNOWN_PRODUCT"),
        (lambda plan, text: f"{text} The {plan.rows[0].title} Deluxe is even better.", "UNKNOWN_PRODUCT"),
        (lambda plan, text: f"{text} The {plan.rows[0].title} costs 3.33 EUR.", "WRONG_PRICE"),
        (lambda plan, text: f"{text} The {plan.rows[0].title} is yours for €3,333.", "WRONG_PRICE"),
        (
            lambda plan, text: (
                f"{text} The {plan.rows[0].title} is {'out of' if plan.rows[0].in_stock else 'in'} stock."
            ),
            "WRONG_STOCK",
        ),
        (lambda plan, text: "I do not know.", "OFF_PLAN"),
    ],
    ids=["another product", "an invention", "a variant", "a price", "a price with a symbol", "stock", "no answer"],
)
def test_a_lying_verbaliser_is_caught_and_replaced(
    generate: Generate, lie: Callable[[Plan, str], str], reason: str
) -> None:
    result, conversations = generate(Liar(lie), num_conversations=40, difficulty_level="simple")
    assert result.provider == "liar"
    assert len(conversations) == result.num_conversations == 40
    assert 15 <= result.rejections[reason] <= 25
    assert set(result.rejections) <= {reason, "DUPLICATE"}
    assert result.num_rejected == sum(result.rejections.values())
    for conversation in conversations:
        assert "ZetaPhone" not in conversation.messages[-1].content
        assert "I do not know" not in conversation.messages[-1].content


def test_a_price_of_another_row_is_a_wrong_price() -> None:
    products = load_demo_catalogue()
    planner = Planner(products, GenerationSpec(num_conversations=10, difficulty_level=DifficultyLevel.SIMPLE))
    plans = [plan for plan in map(planner.plan, range(100)) if plan.exchanges[0].act is Act.NEED]
    for plan in plans:
        main = plan.exchanges[0].products[0]
        wrong = next(row for row in plan.rows if row.price_minor != main.price_minor)
        names = ", the ".join(product.title for product in plan.exchanges[0].products[::-1])
        messages = [
            Message(role="user", content="What do you have?"),
            Message(role="assistant", content=f"Take the {names} for {wrong.price_text}."),
        ]
        assert Verifier(products).verify(plan, messages) is Rejection.WRONG_PRICE


def test_shoppers_may_not_invent_either() -> None:
    products = load_demo_catalogue()
    planner = Planner(products, GenerationSpec(num_conversations=10, difficulty_level=DifficultyLevel.SIMPLE))
    plan = planner.plan(0)
    question, answer = OfflineVerbaliser().verbalise(plan)
    for text, verdict in (
        (f"Like the {_other(plan).title}?", Rejection.UNKNOWN_PRODUCT),
        ("I have 123456 EUR.", Rejection.WRONG_PRICE),
    ):
        asked = Message(role="user", content=f"{question.content} {text}")
        assert Verifier(products).verify(plan, [asked, answer]) is verdict
    assert Verifier(products).verify(plan, [answer, question]) is Rejection.OFF_PLAN
    verifier = Verifier(products)
    assert verifier.verify(plan, [question, answer]) is None
    assert verifier.verify(plan, [question, answer]) is Rejection.DUPLICATE


def test_a_catalogue_that_is_used_up_says_so(datasets: Datasets, generate: Generate) -> None:
    class Monotonous(OfflineVerbaliser):
        name = "monotonous"

        def verbalise(self, plan: Plan) -> list[Message]:
            names = " and the ".join(product.title for product in plan.exchanges[0].products)
            return [
                Message(role="user", content=f"I need: {plan.need}."),
                Message(role="assistant", content=f"There is the {names}."),
            ]

    result, _ = generate(Monotonous(), num_conversations=50, difficulty_level="simple", dataset="few")
    assert result.num_conversations == 50
    with pytest.raises(StateError) as caught:
        generate(Monotonous(), num_conversations=5_000, difficulty_level="simple", dataset="many")
    assert caught.value.reason is Reason.CATALOGUE_TOO_SMALL
    assert "DUPLICATE" in caught.value.message
    assert 50 < int(caught.value.metadata["num_conversations"]) < 1_000
    newest = datasets.newest(DatasetKind.CONVERSATIONS)
    assert newest is not None
    assert newest.name == "few"


def test_one_product_is_enough_for_a_small_run(datasets: Datasets, generate: Generate) -> None:
    row = '{"id": "a", "title": "Aurora Kettle", "price": 49.90, "currency": "EUR", "category": "Kitchen"}'
    datasets.store("one", DatasetKind.CATALOGUE, DatasetFormat.JSONL, [row.encode()])
    for level in LEVELS:
        assert generate(catalogue="one", difficulty_level=level, dataset=f"few-{level}")[0].num_conversations == 30


def test_a_verbaliser_that_only_lies_ends_the_run(generate: Generate) -> None:
    class OnlyLies(OfflineVerbaliser):
        name = "only lies"

        def verbalise(self, plan: Plan) -> list[Message]:
            return [Message(role="user", content="?"), Message(role="assistant", content="Take the ZetaPhone 9000.")]

    with pytest.raises(StateError) as caught:
        generate(OnlyLies(), difficulty_level="simple")
    assert caught.value.reason is Reason.GENERATION_UNUSABLE
    assert "500 UNKNOWN_PRODUCT" in caught.value.message


def test_a_stopped_run_stores_nothing(datasets: Datasets, tmp_path: Path) -> None:
    context = RecordingContext(GenerationSpec(num_conversations=100, dataset="talks"), tmp_path, stop_after=50)
    with pytest.raises(JobStopped):
        run_generation(context, Settings(), datasets)
    assert datasets.newest(DatasetKind.CONVERSATIONS) is None
    assert [path.name for path in (tmp_path / "datasets").glob("*talks*")] == []


def test_a_conversation_has_one_currency_and_a_title_may_have_brackets(generate: Generate, datasets: Datasets) -> None:
    rows = [
        {"id": f"{number}", "title": f"Rose (climbing) {number}", "price": 3.475 + number, "currency": currency,
         "category": "Roses", "description": "A rose."}
        for number, currency in enumerate(["KWD", "EUR"] * 6)
    ]  # fmt: skip
    for row in rows:
        row["price"] = round(row["price"], 3 if row["currency"] == "KWD" else 2)
    content = "\n".join(map(json.dumps, rows)).encode()
    datasets.store("roses", DatasetKind.CATALOGUE, DatasetFormat.JSONL, [content])
    result, conversations = generate(
        catalogue="roses", num_conversations=40, difficulty_level="complex", dataset="talks"
    )
    assert result.num_rejected <= 2
    for conversation in conversations:
        assert len({product.currency for product in conversation.products}) == 1


def test_other_catalogues_work_too(datasets: Datasets, generate: Generate) -> None:
    table = (
        "id,title,price,currency,category,brand,description,in_stock,price_class,brand_name\n"
        "1,Kamera {X} 100,49900,JPY,Cameras,Foto & Co,,yes,high,F\n"
        "2,Kamera Y-200,39900,JPY,Cameras,Foto & Co,,no,low,G\n"
        "3,Stativ,9900,JPY,Cameras,,,yes,,\n"
    )
    datasets.store("cameras", DatasetKind.CATALOGUE, DatasetFormat.CSV, [table.encode()])
    for level in LEVELS:
        result, conversations = generate(catalogue="cameras", difficulty_level=level, dataset=f"talks-{level}")
        assert result.num_conversations == 30
        assert all("EUR" not in message.content for talk in conversations for message in talk.messages)


def test_generation_needs_neither_torch_nor_wandb() -> None:
    code = (
        "import sys, knowledge_engine.generation.pipeline; "
        "sys.exit(bool({'wandb', 'torch', 'transformers', 'openai'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
