"""A generation run: plan -> verbalise -> verify -> dataset. What fails is counted and, within bounds, replaced."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Protocol

from knowledge_engine.catalogue import Product
from knowledge_engine.core import (
    DatasetFormat,
    DatasetKind,
    GenerationResult,
    GenerationSpec,
    JobContext,
    Message,
    Progress,
)
from knowledge_engine.datasets import Conversation, Datasets
from knowledge_engine.errors import Reason, StateError
from knowledge_engine.generation.offline import OfflineVerbaliser
from knowledge_engine.generation.planner import Plan, Planner
from knowledge_engine.generation.verifier import Verifier
from knowledge_engine.settings import Settings
from knowledge_engine.text import with_context

# A catalogue is used up, or its verbaliser useless, when fewer than 1 in 10 of so many plans are kept.
_PLANS_A_LOOK = 500
_MIN_KEPT_A_LOOK = 50
_NUM_REPORTS = 50


class Verbaliser(Protocol):
    """Who puts plans into words. It may err: every conversation is verified."""

    @property
    def name(self) -> str:
        """Shown as the provider of the result."""

    def verbalise(self, plan: Plan) -> Sequence[Message]:
        """User and assistant messages in turn, one pair for each exchange of the plan."""


def run_generation(
    context: JobContext, settings: Settings, datasets: Datasets, verbaliser: Verbaliser | None = None
) -> GenerationResult:
    """Generates the conversations that the job asks for and stores them as a dataset. Offline unless told otherwise.

    Raises:
        NotFoundError: DATASET_NOT_FOUND; InvalidSpecError: TOPIC_UNKNOWN, DATASET_KIND_WRONG.
        StateError: CATALOGUE_TOO_SMALL, when so many different conversations cannot be made.
        AlreadyExistsError: DATASET_EXISTS.
        JobStopped: the attempt must end; nothing is stored.
    """
    spec = context.job.spec
    assert isinstance(spec, GenerationSpec)
    catalogue = datasets.get(spec.catalogue) if spec.catalogue else datasets.default_catalogue()
    verbaliser = verbaliser or OfflineVerbaliser()
    run = _Run(context, spec, datasets.products(catalogue.name), verbaliser)
    context.log(f"generating {spec.num_conversations} conversations from {catalogue.name} with {verbaliser.name} words")
    dataset = datasets.store(
        spec.dataset or f"conversations-{context.job.id}",
        DatasetKind.CONVERSATIONS,
        DatasetFormat.JSONL,
        run.lines(),
        parents=(catalogue.digest,),
        job_id=context.job.id,
    )
    return GenerationResult(
        dataset=dataset.name,
        digest=dataset.digest,
        num_conversations=run.num_kept,
        num_rejected=run.rejections.total(),
        rejections=dict(sorted(run.rejections.items())),
        provider=verbaliser.name,
    )


class _Run:
    def __init__(
        self, context: JobContext, spec: GenerationSpec, products: Sequence[Product], verbaliser: Verbaliser
    ) -> None:
        self._context = context
        self._spec = spec
        self._planner = Planner(products, spec)
        self._verifier = Verifier(products)
        self._verbaliser = verbaliser
        self._start = time.monotonic()
        self.num_kept = 0
        self.rejections: Counter[str] = Counter()

    def lines(self) -> Iterator[bytes]:
        """The kept conversations as JSONL, one at a time."""
        wanted = self._spec.num_conversations
        report_every = max(1, wanted // _NUM_REPORTS)
        kept_before = 0
        self._report()
        for number in itertools.count():
            self._context.check()
            if number and number % _PLANS_A_LOOK == 0:
                if self.num_kept - kept_before < _MIN_KEPT_A_LOOK:
                    raise self._too_small()
                kept_before = self.num_kept
            plan = self._planner.plan(number)
            messages = self._verbaliser.verbalise(plan)
            rejection = self._verifier.verify(plan, messages)
            if rejection is not None:
                self.rejections[rejection.value] += 1
                continue
            self.num_kept += 1
            row = _conversation(plan, messages, show_rows=self._spec.include_product_data).to_row()
            yield json.dumps(row, ensure_ascii=False).encode() + b"\n"
            if self.num_kept % report_every == 0 or self.num_kept == wanted:
                self._report()
            if self.num_kept == wanted:
                return

    def _report(self) -> None:
        seconds = time.monotonic() - self._start
        rate = self.num_kept / seconds if self.num_kept and seconds else None
        left = self._spec.num_conversations - self.num_kept
        self._context.report(
            Progress(
                phase="generating",
                step=self.num_kept,
                total_steps=self._spec.num_conversations,
                num_examples=self.num_kept,
                examples_per_second=rate,
                eta_seconds=left / rate if rate else None,
            )
        )

    def _too_small(self) -> StateError:
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(self.rejections.items()))
        return StateError(
            f"only {self.num_kept} of {self._spec.num_conversations} different conversations could be made from the "
            f"products at hand (refused: {counts}); ask for fewer, for more topics or give more products",
            reason=Reason.CATALOGUE_TOO_SMALL,
            num_conversations=self.num_kept,
            wanted=self._spec.num_conversations,
        )


def _conversation(plan: Plan, messages: Sequence[Message], *, show_rows: bool) -> Conversation:
    if not show_rows:
        return Conversation(messages=tuple(messages))
    shown = with_context(messages, {"products": [row.to_context() for row in plan.rows]})
    return Conversation(messages=shown, products=plan.rows)
