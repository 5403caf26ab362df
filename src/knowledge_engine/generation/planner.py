"""Plans of conversations: who needs what, under which constraints, which rows satisfy them, and what is asked in turn.

A plan is facts only; a verbaliser puts it into words and a verifier judges the words. Every plan follows from the
catalogue, the spec and its own number, so plan 17 is the same whoever asks for it.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from knowledge_engine.catalogue import Constraints, Product, matches_topic, minor_digits, search
from knowledge_engine.core import DifficultyLevel, GenerationSpec
from knowledge_engine.errors import InvalidSpecError, Reason, Violation

MAX_ROWS = 4
NO_CONSTRAINTS = Constraints()
_NUM_CONSTRAINTS = {DifficultyLevel.SIMPLE: 1, DifficultyLevel.MEDIUM: 2, DifficultyLevel.COMPLEX: 3}
# Budgets that people say; the next one at or above a price is the natural limit for it, in major units.
_STEPS = (2, 5, 10, 25, 50, 100)


class Act(StrEnum):
    """What one exchange is about."""

    NEED = "need"  # a need is stated: recommend what satisfies it
    CHANGE = "change"  # a constraint is changed: recommend again
    NO_MATCH = "no_match"  # nothing satisfies the need: say so, name the closest and what is wrong with it
    PRICE = "price"  # what does it cost?
    STOCK = "stock"  # can I have it now?
    ATTRIBUTE = "attribute"  # what is its `attribute`?
    COMPARE = "compare"  # how do these two differ?
    CHEAPER = "cheaper"  # is there a cheaper one? `products` is the asked one, then the cheaper one if there is any
    TOTAL = "total"  # what do both cost together?


@dataclass(frozen=True)
class Exchange:
    """One question and its answer. `products` are the rows the answer must name, the main one first.

    `constraints` is all that the shopper wants by then, `said` the part of it that is said in this turn, and
    `unmet` what the closest product fails in, for NO_MATCH.
    """

    act: Act
    products: tuple[Product, ...]
    constraints: Constraints = NO_CONSTRAINTS
    said: Constraints = NO_CONSTRAINTS
    attribute: str = ""
    unmet: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """One conversation to be; `need` is what the shopper calls the thing, such as `yoga mat`.

    `key` seeds every choice of words.
    """

    key: str
    need: str
    rows: tuple[Product, ...]
    exchanges: tuple[Exchange, ...]

    @property
    def budgets(self) -> frozenset[int]:
        """The limits the shopper states, in minor units."""
        stated = (exchange.said.max_price_minor for exchange in self.exchanges)
        return frozenset(budget for budget in stated if budget is not None)


class Planner:
    """Plans for one catalogue and spec."""

    def __init__(self, products: Sequence[Product], spec: GenerationSpec) -> None:
        """Raises InvalidSpecError: TOPIC_UNKNOWN, for a topic that matches no product."""
        self._spec = spec
        self._pool = _about(products, spec.topics)
        self._wanted = [product for product in self._pool if product.in_stock] or self._pool
        self._by_category: defaultdict[str, list[Product]] = defaultdict(list)
        self._by_need: defaultdict[str, list[Product]] = defaultdict(list)
        for product in self._pool:
            self._by_category[product.category].append(product)
            self._by_need[need_of(product)].append(product)

    def plan(self, number: int) -> Plan:
        """The plan with this number, counted from 0."""
        key = f"{self._spec.seed}/{number}"
        # A text seeds the same way in every process and on every machine.
        rng = random.Random(f"plan/{key}")  # noqa: S311 - no secret
        target = rng.choice(self._wanted)
        rows = self._candidates(target, rng)
        draft = _Draft(rng, target, need_of(target), rows)
        match self._spec.difficulty_level:
            case DifficultyLevel.SIMPLE:
                exchanges = [draft.opening(1)]
            case DifficultyLevel.MEDIUM:
                first = draft.opening(2)
                exchanges = [first, draft.follow_up(first)]
            case DifficultyLevel.COMPLEX:
                exchanges = draft.complex()
        return Plan(key=key, need=draft.need, rows=rows, exchanges=tuple(exchanges))

    def _candidates(self, target: Product, rng: random.Random) -> tuple[Product, ...]:
        """The target among what a search for it could have shown: its own kind first, then its category."""
        # One currency in a conversation: prices of several cannot be compared.
        kin = [p for p in self._by_need[need_of(target)] if p.id != target.id and p.currency == target.currency]
        shelf = [
            p
            for p in self._by_category[target.category]
            if p.id != target.id and p.currency == target.currency and p not in kin
        ]
        rng.shuffle(kin)
        rng.shuffle(shelf)
        rows = [target, *(kin + shelf)[: rng.randint(MAX_ROWS - 2, MAX_ROWS - 1)]]
        rng.shuffle(rows)
        return tuple(rows)


def need_of(product: Product) -> str:
    """What a shopper would call the thing: the last words of the title that its description uses in lower case.

    Titles say model names as well; the description is where a shop says what the thing is. Without such words, the
    category.
    """
    words = re.findall(r"[^\W\d_]+", product.title.lower())
    # A description's first word has a capital for another reason.
    description = product.description[:1].lower() + product.description[1:]
    for length in range(min(3, len(words)), 0, -1):
        tail = " ".join(words[-length:])
        if re.search(rf"\b{re.escape(tail)}\b", description):
            return tail
    return product.category.lower()


def _about(products: Sequence[Product], topics: Sequence[str]) -> list[Product]:
    if not topics:
        return list(products)
    for position, topic in enumerate(topics):
        if not any(matches_topic(product, topic) for product in products):
            known = sorted({product.category for product in products})
            description = f"no product is about {topic!r}; categories are {', '.join(known[:50])}"
            raise InvalidSpecError(
                description,
                reason=Reason.TOPIC_UNKNOWN,
                violations=[Violation(f"spec.topics[{position}]", description)],
                topic=topic,
                categories=", ".join(known[:50]),
            )
    return [product for product in products if any(matches_topic(product, topic) for topic in topics)]


class _Draft:
    """The exchanges of one plan in the making, around one target product that the shopper will end up with."""

    def __init__(self, rng: random.Random, target: Product, need: str, rows: tuple[Product, ...]) -> None:
        self._rng = rng
        self._target = target
        self._rows = rows
        self.need = need
        # A need that is only a category's name stands in no title.
        words = tuple(need.split()) if need != target.category.lower() else ()
        self._base = Constraints(words=words, category=target.category)

    def opening(self, num_constraints: int) -> Exchange:
        """A need that the target satisfies; now and then one that nothing does."""
        said = self._constraints(num_constraints)
        wanted = self._merged(said)
        picks = self._satisfying(wanted)
        if not picks:
            return self._no_match(wanted, said)
        if self._rng.random() < 0.15 and (limit := self._too_low()) is not None:
            said = said.model_copy(update={"max_price_minor": limit, "currency": self._target.currency})
            return self._no_match(self._merged(said), said)
        return Exchange(Act.NEED, picks[: self._rng.choice((1, 2, 2))], constraints=wanted, said=said)

    def follow_up(self, before: Exchange) -> Exchange:
        """A question about what was just recommended, or about another row."""
        main = before.products[0]
        others = [row for row in self._rows if row.id != main.id and row.currency == main.currency]
        alike = sorted((row for row in others if self._alike(row)), key=lambda row: (row.price_minor, row.id))
        options = [Exchange(Act.ATTRIBUTE, (main,), attribute=name) for name in main.attributes]
        options.extend(Exchange(Act.STOCK, (row,)) for row in self._rows if not row.in_stock or row.id == main.id)
        options.extend(Exchange(Act.COMPARE, (main, row)) for row in alike)
        options.extend(Exchange(Act.TOTAL, (main, row)) for row in others)
        # A price was just said; asking for it is only natural of another product.
        options.extend(Exchange(Act.PRICE, (row,)) for row in others if row not in before.products)
        cheapest = min(before.products, key=lambda row: row.price_minor)
        if alike and cheapest.in_stock:
            cheaper = [row for row in alike if row.in_stock and row.price_minor < cheapest.price_minor]
            options.append(Exchange(Act.CHEAPER, (cheapest, *cheaper[:1])))
        act = self._rng.choice(sorted({option.act for option in options}))
        return self._rng.choice([option for option in options if option.act is act])

    def complex(self) -> list[Exchange]:
        """Three constraints, then a change of mind or a need that nothing satisfies, then a question or two."""
        first = self.opening(3)
        second = self._change(first)
        last = self.follow_up(second)
        exchanges = [first, second, last]
        if self._rng.random() < 0.4:
            another = self.follow_up(second)
            if another != last:
                exchanges.append(another)
        return exchanges

    def _change(self, before: Exchange) -> Exchange:
        """The shopper drops what they said before and asks for something else of another row, or for too much."""
        limit = self._too_low()
        others = [row for row in self._rows if row.id != before.products[0].id]
        alike = [row for row in others if self._alike(row) and row.in_stock]
        if not alike or (limit is not None and self._rng.random() < 0.35):
            if limit is None or before.act is Act.NO_MATCH:
                return self.follow_up(before)
            said = Constraints(max_price_minor=limit, currency=self._target.currency)
            return self._no_match(self._merged(said), said)
        row = self._rng.choice(alike)
        # A change of mind asks for what the first recommendation is not, if the other row has any such thing.
        drafts = [self._constraints(1, row) for _ in range(4)]
        said = next((draft for draft in drafts if draft.unmet(before.products[0])), drafts[0])
        wanted = self._merged(said)
        return Exchange(Act.CHANGE, self._satisfying(wanted, first=row)[:2], constraints=wanted, said=said)

    def _constraints(self, number: int, target: Product | None = None) -> Constraints:
        """Up to `number` things that are true of the target, as a shopper would ask for them."""
        target = target or self._target
        wishes = [
            ("price", ""),
            *([("brand", "")] if target.brand else []),
            *(("attribute", n) for n in target.attributes),
        ]
        chosen = self._rng.sample(wishes, min(number, len(wishes)))
        # A budget is the commonest wish of all.
        if wishes[0] not in chosen and self._rng.random() < 0.5:
            chosen[-1] = wishes[0]
        has_price = wishes[0] in chosen
        return Constraints(
            brand=target.brand if ("brand", "") in chosen else None,
            max_price_minor=_limit(target, self._rng) if has_price else None,
            currency=target.currency if has_price else None,
            attributes={name: target.attributes[name] for kind, name in chosen if kind == "attribute"},
        )

    def _merged(self, said: Constraints) -> Constraints:
        """What is said, of the kind of thing that is needed, to be had now."""
        return said.model_copy(update={"words": self._base.words, "category": self._base.category, "in_stock": True})

    def _satisfying(self, wanted: Constraints, first: Product | None = None) -> tuple[Product, ...]:
        first = first or self._target
        found = search(self._rows, wanted)
        return tuple(sorted(found, key=lambda product: product.id != first.id))

    def _no_match(self, wanted: Constraints, said: Constraints) -> Exchange:
        """The closest rows are those that fail in the fewest things, the cheapest first."""
        kind = [row for row in self._rows if self._alike(row)]
        closest = min(kind, key=lambda row: (len(wanted.unmet(row)), row.price_minor, row.id))
        unmet = tuple(wanted.unmet(closest))
        return Exchange(Act.NO_MATCH, (closest,), constraints=wanted, said=said, unmet=unmet)

    def _alike(self, row: Product) -> bool:
        return self._base.satisfied_by(row)

    def _too_low(self) -> int | None:
        """A round limit below the price of everything of this kind; None where there is none."""
        prices = [row.price_minor for row in self._rows if self._alike(row)]
        unit: int = 10 ** minor_digits(self._target.currency)
        cheapest = min(prices) // unit
        limits = [step * 10**power for power in range(10) for step in (1, 2, 5)]
        below = [limit for limit in limits if cheapest * 0.4 <= limit < cheapest]
        return below[-1] * unit if below else None


def _limit(product: Product, rng: random.Random) -> int:
    """A round budget at or above the price, in minor units: 69.00 gives 70, 75 or 100."""
    unit: int = 10 ** minor_digits(product.currency)
    price = -(-product.price_minor // unit)
    size: int = 10 ** max(0, len(str(price)) - 2)
    limits = {-(-price // (step * size)) * step * size for step in _STEPS}
    return rng.choice(sorted(limit for limit in limits if limit <= 2 * price) or [price]) * unit
