"""Logits -> the next token of one answer, and how likely it was.

In this order, as transformers and vLLM have it: repetition, frequency and presence penalties, the answer's form,
temperature, `top_k`, `top_p`, `min_p`. Everything is computed from the answer's own row and its own random numbers, so
that a seed gives the same answer whatever is answered beside it. Pure numpy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from knowledge_engine.core import SamplingParams, TokenLogprob
from knowledge_engine.errors import KnowledgeEngineError, Reason
from knowledge_engine.inference.grammar import Matcher

Array = np.ndarray[Any, Any]

# Weights relative to the likeliest token's. Sorting those above the first or second is nearly always enough.
_CUTOFFS = (1e-3, 1e-6, 0.0)
_DULLEST = -110.0
"""e to the power of this is 0 in single precision."""


class Sampler:
    """Chooses the tokens of one answer."""

    def __init__(
        self,
        sampling: SamplingParams,
        prompt: Sequence[int],
        vocabulary_size: int,
        matcher: Matcher | None,
        bytes_of: Callable[[int], bytes],
    ) -> None:
        self._sampling = sampling
        self._matcher = matcher
        self._bytes_of = bytes_of
        self._random = np.random.default_rng(sampling.seed)
        self._is_greedy = sampling.temperature == 0 or sampling.top_k == 1 or sampling.top_p == 0 or sampling.min_p == 1
        self._counts: Array | None = None
        """How often the answer has each token; None while no penalty asks."""
        if sampling.repetition_penalty != 1 or sampling.frequency_penalty or sampling.presence_penalty:
            self._counts = np.zeros(vocabulary_size, np.float32)
            self._is_known = np.zeros(vocabulary_size, bool)
            self._is_known[np.asarray(prompt, np.int64)] = True

    @property
    def is_complete(self) -> bool:
        """Whether the answer has its form and nothing may follow."""
        return self._matcher is not None and self._matcher.is_complete

    def forced(self) -> list[int]:
        """Guesses at the next tokens: those that the answer's form leaves no choice of."""
        return self._matcher.forced() if self._matcher is not None else []

    def choose(self, logits: Array) -> tuple[int, TokenLogprob | None]:
        """Takes the answer one token on from its logits (V,) of float32.

        Raises:
            KnowledgeEngineError: NON_FINITE.
            InvalidSpecError: no token keeps the answer's form.
        """
        if not math.isfinite(logits[logits.argmax()]):  # a NaN counts as the largest
            raise KnowledgeEngineError("The model's logits are not finite.", reason=Reason.NON_FINITE)
        changed = logits if self._counts is None else self._penalised(logits, self._counts)
        if self._matcher is not None:
            changed = np.where(self._matcher.mask(), changed, np.float32(-np.inf))
        token = int(changed.argmax())
        if not self._is_greedy:
            token = self._draw(changed, token)
        if self._counts is not None:
            self._counts[token] += 1
            self._is_known[token] = True
        if self._matcher is not None:
            self._matcher.take(token)
        return token, self._logprob(logits, token) if self._sampling.logprobs else None

    def _penalised(self, logits: Array, counts: Array) -> Array:
        """Repetition: Keskar et al. 2019, arXiv 1909.05858, section 4.1, on prompt and answer; the others as OpenAI's
        API defines them, on the answer."""
        sampling = self._sampling
        changed = logits.copy()
        known = np.flatnonzero(self._is_known)
        values = changed[known]
        penalty = np.float32(sampling.repetition_penalty)
        values = np.where(values > 0, values / penalty, values * penalty)
        of_each = counts[known]
        values -= np.float32(sampling.frequency_penalty) * of_each
        values -= np.float32(sampling.presence_penalty) * (of_each > 0)
        changed[known] = values
        return changed

    def _draw(self, logits: Array, best: int) -> int:
        """One of the tokens that are left, by their probability. The nucleus of `top_p` (Holtzman et al. 2019, arXiv
        1904.09751) always keeps the likeliest, as does `min_p` (Nguyen et al. 2024, arXiv 2407.01082)."""
        with np.errstate(over="ignore"):  # of a tiny temperature
            scaled = (logits - logits[best]).astype(np.float64) / self._sampling.temperature
        weights: Array = np.exp(np.maximum(scaled, _DULLEST).astype(np.float32))
        tokens = self._left(weights)
        sums = (weights if tokens is None else weights[tokens]).cumsum(dtype=np.float64)
        position = int(sums.searchsorted(self._random.random() * sums[-1], side="right"))
        return position if tokens is None else int(tokens[position])

    def _left(self, weights: Array) -> Array | None:
        """The tokens that `top_k`, `top_p` and `min_p` leave, the likeliest first; None for all."""
        sampling = self._sampling
        top_k = sampling.top_k if 0 < sampling.top_k < len(weights) else 0
        if not top_k and sampling.top_p >= 1 and not sampling.min_p:
            return None
        tokens = np.empty(0, np.int64)
        for cutoff in _CUTOFFS:
            tokens = np.flatnonzero(weights > cutoff)
            tokens = tokens[np.argsort(-weights[tokens], kind="stable")]
            if top_k:
                if len(tokens) < top_k and cutoff:
                    continue
                tokens = tokens[:top_k]
            if sampling.top_p < 1:
                sums = weights[tokens].cumsum(dtype=np.float64)
                wanted = sampling.top_p * (sums[-1] if top_k else weights.sum(dtype=np.float64))
                if sums[-1] < wanted and cutoff:
                    continue
                tokens = tokens[: int(sums.searchsorted(wanted)) + 1]
            elif not top_k and cutoff >= sampling.min_p:
                continue
            break
        return tokens[weights[tokens] >= sampling.min_p]

    def _logprob(self, logits: Array, token: int) -> TokenLogprob:
        top = float(logits.max())
        total = top + math.log(np.exp(logits - np.float32(top)).sum(dtype=np.float64))
        likeliest: Array = np.empty(0, np.int64)
        if count := min(self._sampling.top_logprobs, len(logits)):
            likeliest = np.flatnonzero(logits >= np.partition(logits, -count)[-count])
            likeliest = likeliest[np.argsort(-logits[likeliest], kind="stable")][:count]

        def of(token: int) -> TokenLogprob:
            return TokenLogprob(token, self._bytes_of(token), float(logits[token]) - total)

        return of(token)._replace(top=tuple(of(int(other)) for other in likeliest))
