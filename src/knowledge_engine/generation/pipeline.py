"""A generation run: plan -> verbalise -> verify -> dataset. What fails is counted and, within bounds, replaced."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from knowledge_engine.catalogue import Product
from knowledge_engine.core import (
    DatasetFormat,
    DatasetKind,
    GenerationProvider,
    GenerationResult,
    GenerationSpec,
    GenerationUsage,
    JobContext,
    Message,
    Progress,
    Service,
)
from knowledge_engine.datasets import Datasets
from knowledge_engine.errors import Reason, StateError
from knowledge_engine.generation.offline import OfflineVerbaliser
from knowledge_engine.generation.planner import Plan, Planner
from knowledge_engine.generation.verifier import Rejection, Reply, Verifier
from knowledge_engine.rows import Conversation
from knowledge_engine.settings import Settings
from knowledge_engine.text import with_context

# A catalogue is used up when fewer than 1 in 10 of so many plans are kept.
_PLANS_A_LOOK = 500
_MIN_KEPT_A_LOOK = 50
# One that costs money is useless much sooner: when more than 9 in 10 of the first, or of any so many later, are
# rejected for what it said.
_FIRST_PLANS = 50
_LATER_PLANS = 200
_NUM_REPORTS = 50
# Each rejection is a line of the job's log, up to so many; counted they are all.
_MAX_REJECTION_LINES = 1000


class Verbaliser(Protocol):
    """Who puts plans into words. It may err: every conversation is verified."""

    @property
    def name(self) -> str:
        """Shown as the provider of the result."""

    @property
    def language_model(self) -> str:
        """The model behind the words; empty where there is none."""

    @property
    def usage(self) -> GenerationUsage | None:
        """What the words took so far, over all attempts of the job; None where they cost nothing."""

    def replies(self, plans: Iterable[Plan]) -> Iterator[tuple[Plan, Reply]]:
        """Each plan with what came of it, in the plans' order. All of them are worked on: ask for what is wanted."""


def run_generation(
    context: JobContext, settings: Settings, datasets: Datasets, verbaliser: Verbaliser | None = None
) -> GenerationResult:
    """Generates the conversations that the job asks for and stores them as a dataset.

    `verbaliser` stands in for the provider that the job's spec names.

    Raises:
        NotFoundError: DATASET_NOT_FOUND; InvalidSpecError: TOPIC_UNKNOWN, DATASET_KIND_WRONG.
        StateError: CATALOGUE_TOO_SMALL, when so many different conversations cannot be made; GENERATION_UNUSABLE, when
            nearly all that the provider says is wrong; PROVIDER_NOT_CONFIGURED.
        AlreadyExistsError: DATASET_EXISTS.
        KnowledgeEngineError: as `ChatClient.ask`, when conversations come from a model.
        JobStopped: the attempt must end; nothing is stored.
    """
    spec = context.job.spec
    assert isinstance(spec, GenerationSpec)
    catalogue = datasets.get(spec.catalogue) if spec.catalogue else datasets.default_catalogue()
    products = datasets.products(catalogue.name)
    with _provider(context, settings, spec, verbaliser) as chosen:
        run = _Run(context, spec, products, chosen)
        context.log(f"generating {spec.num_conversations} conversations from {catalogue.name} with {chosen.name} words")
        try:
            dataset = datasets.store(
                spec.dataset or f"conversations-{context.job.id}",
                DatasetKind.CONVERSATIONS,
                DatasetFormat.JSONL,
                run.lines(),
                parents=(catalogue.digest,),
                job_id=context.job.id,
            )
        finally:
            if chosen.usage is not None:
                context.log(_told(chosen.usage, chosen.language_model))
        return GenerationResult(
            dataset=dataset.name,
            digest=dataset.digest,
            num_conversations=run.num_kept,
            num_rejected=run.rejections.total(),
            rejections=dict(sorted(run.rejections.items())),
            provider=chosen.name,
            language_model=chosen.language_model,
            usage=chosen.usage,
        )


def _provider(
    context: JobContext, settings: Settings, spec: GenerationSpec, verbaliser: Verbaliser | None
) -> contextlib.AbstractContextManager[Verbaliser]:
    """Jobs stored before there was a choice name no provider; they were promised offline words."""
    if verbaliser is not None:
        return contextlib.nullcontext(verbaliser)
    if spec.provider is GenerationProvider.OPENAI:
        from knowledge_engine.generation.online import OpenAIVerbaliser

        return OpenAIVerbaliser(context, settings)
    return contextlib.nullcontext(OfflineVerbaliser())


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
        self._num_taken = 0
        self._kept_before = 0
        self._unusable: deque[bool] = deque(maxlen=_LATER_PLANS)
        self.num_kept = 0
        self.rejections: Counter[str] = Counter()

    def lines(self) -> Iterator[bytes]:
        """The kept conversations as JSONL, one at a time."""
        wanted = self._spec.num_conversations
        report_every = max(1, wanted // _NUM_REPORTS)
        plans = map(self._planner.plan, itertools.count())
        self._report()
        while self.num_kept < wanted:
            # Never more plans than conversations still wanted: every reply may cost money.
            for plan, reply in self._verbaliser.replies(itertools.islice(plans, wanted - self.num_kept)):
                self._context.check()
                rejection = reply if isinstance(reply, Rejection) else self._verifier.verify(plan, reply)
                self._count(rejection)
                if rejection is not None or isinstance(reply, Rejection):
                    continue
                row = _conversation(plan, reply, show_rows=self._spec.include_product_data).to_row()
                yield json.dumps(row, ensure_ascii=False).encode() + b"\n"
                if self.num_kept % report_every == 0 or self.num_kept == wanted:
                    self._report()

    def _count(self, rejection: Rejection | None) -> None:
        """Writes down what became of the next plan.

        Raises:
            StateError: GENERATION_UNUSABLE, CATALOGUE_TOO_SMALL: going on leads nowhere.
        """
        number = self._num_taken
        self._num_taken += 1
        self._unusable.append(rejection not in {None, Rejection.DUPLICATE})
        if rejection is None:
            self.num_kept += 1
        else:
            self.rejections[rejection.value] += 1
            if (num_lines := self.rejections.total()) <= _MAX_REJECTION_LINES:
                self._context.log(f"conversation {number}: {rejection.value}")
                if num_lines == _MAX_REJECTION_LINES:
                    self._context.log("further rejections are counted only")
        is_look = self._num_taken == _FIRST_PLANS or self._num_taken >= _LATER_PLANS
        if self._verbaliser.usage is not None and is_look and sum(self._unusable) > 0.9 * len(self._unusable):
            raise self._useless()
        if self._num_taken % _PLANS_A_LOOK == 0:
            if self.num_kept - self._kept_before < _MIN_KEPT_A_LOOK:
                is_used_up = self.rejections[Rejection.DUPLICATE] * 2 >= self.rejections.total()
                raise self._too_small() if is_used_up else self._useless()
            self._kept_before = self.num_kept

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

    def _useless(self) -> StateError:
        error = StateError(
            f"nearly everything that {self._verbaliser.name} says is rejected: of {self._num_taken} conversations "
            f"{self.num_kept} were kept ({self._counts}); take another model or provider",
            reason=Reason.GENERATION_UNUSABLE,
            num_conversations=self.num_kept,
            num_rejected=self.rejections.total(),
            rejections=self._counts,
        )
        if self._verbaliser.name == GenerationProvider.OPENAI:
            self._context.observe(Service.OPENAI, error.message)
        return error

    def _too_small(self) -> StateError:
        return StateError(
            f"only {self.num_kept} of {self._spec.num_conversations} different conversations could be made from the "
            f"products at hand (refused: {self._counts}); ask for fewer, for more topics or give more products",
            reason=Reason.CATALOGUE_TOO_SMALL,
            num_conversations=self.num_kept,
            wanted=self._spec.num_conversations,
        )

    @property
    def _counts(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in sorted(self.rejections.items()))


def _told(usage: GenerationUsage, language_model: str) -> str:
    cost = "" if usage.cost_usd is None else f", {usage.cost_usd:.6f} USD"
    return (
        f"{f'replies from {language_model}' if language_model else 'no reply'}: requests {usage.num_requests}, of them "
        f"repeated {usage.num_retries}, tokens read {usage.prompt_tokens}, written {usage.completion_tokens}{cost}"
    )


def _conversation(plan: Plan, messages: Sequence[Message], *, show_rows: bool) -> Conversation:
    if not show_rows:
        return Conversation(messages=tuple(messages))
    shown = with_context(messages, {"products": [row.to_context() for row in plan.rows]})
    return Conversation(messages=shown, products=plan.rows)
