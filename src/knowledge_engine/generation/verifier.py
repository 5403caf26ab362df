"""The judge of generated conversations: every name, price and stock claim must be in the plan's rows.

It trusts nothing a verbaliser wrote and shares no code with one; what it knows of text is `mentions.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from enum import StrEnum

from knowledge_engine.catalogue import Product
from knowledge_engine.core import Message
from knowledge_engine.generation.planner import Act, Exchange, Plan
from knowledge_engine.mentions import CatalogueNames, FactChecker, find_prices

_ROLES = ("user", "assistant")


class Rejection(StrEnum):
    """Why a conversation was not kept."""

    UNKNOWN_PRODUCT = "UNKNOWN_PRODUCT"  # names a product or brand that is not in its rows
    WRONG_PRICE = "WRONG_PRICE"  # states an amount that its rows and its plan do not support
    WRONG_STOCK = "WRONG_STOCK"  # says that a product can be had when it cannot, or the other way round
    OFF_PLAN = "OFF_PLAN"  # not the planned turns, or a recommendation without the planned products
    DUPLICATE = "DUPLICATE"  # the same words as one kept before
    # What only a model does: there are no words to judge.
    REFUSED = "REFUSED"  # it would not
    CONTENT_FILTERED = "CONTENT_FILTERED"  # its provider would not let it
    TRUNCATED = "TRUNCATED"  # it did not come to an end
    MALFORMED = "MALFORMED"  # not the JSON it was asked for, or text that no conversation may hold


Reply = Sequence[Message] | Rejection
"""What came of a plan: user and assistant messages in turn, one pair for each exchange, or why there are none."""


class Verifier:
    """Judges the conversations of one run; remembers those it kept, to find repetitions."""

    def __init__(self, products: Sequence[Product]) -> None:
        self._names = CatalogueNames(products)
        self._kept: set[bytes] = set()

    def verify(self, plan: Plan, messages: Sequence[Message]) -> Rejection | None:
        """Why the conversation must not be kept, or None: then it counts as kept."""
        if [message.role for message in messages] != list(_ROLES) * len(plan.exchanges):
            return Rejection.OFF_PLAN
        checker = FactChecker(self._names, plan.rows)
        before = ""
        for exchange, question, answer in zip(plan.exchanges, messages[::2], messages[1::2], strict=True):
            before = f"{before}\n{question.content}"
            rejection = _judge_question(plan, checker, question.content)
            rejection = rejection or self._judge_answer(plan, checker, exchange, answer.content, before)
            if rejection is not None:
                return rejection
            before = answer.content
        key = _fingerprint(messages)
        if key in self._kept:
            return Rejection.DUPLICATE
        self._kept.add(key)
        return None

    def _judge_answer(
        self, plan: Plan, checker: FactChecker, exchange: Exchange, text: str, before: str
    ) -> Rejection | None:
        claims = checker.check(text, budgets=plan.budgets, before=before)
        if claims.unknown_names:
            return Rejection.UNKNOWN_PRODUCT
        if claims.wrong_prices:
            return Rejection.WRONG_PRICE
        if claims.wrong_stock:
            return Rejection.WRONG_STOCK
        if exchange.act in {Act.NEED, Act.CHANGE, Act.NO_MATCH}:
            named = {product_id for mention in self._names.find(text) for product_id in mention.ids}
            if not {product.id for product in exchange.products} <= named:
                return Rejection.OFF_PLAN
        return None


def _judge_question(plan: Plan, checker: FactChecker, text: str) -> Rejection | None:
    """Shoppers name what is on the table, and the limits that were planned for them."""
    if checker.unknown_names(text):
        return Rejection.UNKNOWN_PRODUCT
    known = plan.budgets | {row.price_minor for row in plan.rows}
    currencies = {row.currency for row in plan.rows}
    if any(not known & {price.minor(currency) for currency in currencies} for price in find_prices(text)):
        return Rejection.WRONG_PRICE
    return None


def _fingerprint(messages: Sequence[Message]) -> bytes:
    text = "\n".join(" ".join(message.content.casefold().split()) for message in messages)
    return hashlib.sha256(text.encode()).digest()[:16]
