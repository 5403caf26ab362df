"""Words for plans without a model or a network: many ways to say each thing, chosen by the plan's own key.

It knows plans and nothing of how its words will be judged. Answers are short and copy names and prices exactly as a
product list shows them, which is what a small model can learn.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from knowledge_engine.catalogue import Constraints, Product, format_price, minor_digits
from knowledge_engine.core import Message
from knowledge_engine.generation.planner import Act, Exchange, Plan
from knowledge_engine.generation.verifier import Reply

_NEED = (
    "I'm looking for {wish}.",
    "Do you have {wish}?",
    "Can you recommend {wish}?",
    "I need {wish}.",
    "Hi, I want to buy {wish}.",
    "Could you help me find {wish}?",
    "Show me {wish}, please.",
    "What would you suggest? I want {wish}.",
    "Looking for {wish}.",
    "Hello! I'd like {wish}.",
    "Is there {wish} in your shop?",
    "Any idea for {wish}?",
)
_CHANGE = (
    "Actually, I'd rather have something {wish}.",
    "Hm, I changed my mind: something {wish} would be better.",
    "What about something {wish} instead?",
    "Wait, could it be something {wish}?",
    "On second thought, I want something {wish}.",
    "And if I want something {wish}?",
)
_ONE_PICK = (
    "I'd go for the {title}{brand} at {price}. {facts}",
    "The {title}{brand} fit{s}: {it} cost{s} {price} and {are} in stock. {facts}",
    "My pick is the {title}{brand} for {price}. {facts}",
    "Have a look at the {title}{brand}, {price}. {facts}",
    "I recommend the {title}{brand}. {It} cost{s} {price}. {facts}",
    "The {title}{brand} {are} what you want. {facts} The price is {price}.",
    "Take the {title}{brand}: {price}, in stock. {facts}",
)
_PICK_AFTER_CHANGE = (
    "Then take the {title}{brand} at {price}. {facts}",
    "In that case, the {title}{brand} for {price} {are} better. {facts}",
    "Sure, the {title}{brand} cost{s} {price}. {facts}",
    "No problem: the {title}{brand}, {price}. {facts}",
)
_TWO_PICKS = (
    "Two fit: the {title}{brand} at {price} and the {other}{other_brand} at {other_price}. {verdict}",
    "You can choose between the {title} for {price} and the {other} for {other_price}. {verdict}",
    "I'd look at the {title} ({price}) and the {other} ({other_price}). {verdict}",
    "Both the {title} at {price} and the {other} at {other_price} fit and are in stock. {verdict}",
)
_NO_MATCH = (
    "Sorry, nothing here fits that. The closest I have: the {title}{brand} at {price}. {reason}",
    "I have nothing that meets all of that. The {title}{brand} come{s} near for {price}. {reason}",
    "Unfortunately there is no match. The {title}{brand} come{s} closest at {price}. {reason}",
    "Nothing here fits exactly. The {title} for {price} {are} the closest. {reason}",
)
_ASK_PRICE = (
    "How much {are} the {title}?",
    "What {do} the {title} cost?",
    "And the price of the {title}?",
    "What would I pay for the {title}?",
)
_TELL_PRICE = (
    "The {title} cost{s} {price}.",
    "{It} cost{s} {price}.",
    "The {title}{brand} {are} {price}.",
    "The price of the {title} is {price}.",
)
_ASK_STOCK = (
    "{Are} the {title} in stock?",
    "Can I get the {title} right away?",
    "{Are} the {title} available?",
    "Do you have the {title} there now?",
)
_YES_STOCK = (
    "Yes, the {title} {are} in stock at {price}.",
    "Yes, {it} {are} in stock. The {title} cost{s} {price}.",
    "{It} {are}: the {title} {are} in stock for {price}.",
)
_NO_STOCK = (
    "Sorry, the {title} {are} out of stock at the moment.",
    "No, the {title} {are} out of stock right now.",
    "Not at the moment: the {title}{brand} {are} out of stock.",
)
_ASK_ATTRIBUTE = (
    "What {name_is} the {name} of the {title}?",
    "What {name} {do} the {title} have?",
    "Can you tell me the {name} of the {title}?",
    "What about the {name}?",
)
_TELL_ATTRIBUTE = (
    "The {name} of the {title} {name_is} {value}.",
    "The {title} {phrase}.",
    "The {name} {name_is} {value}.",
    "For the {title}, the {name} {name_is} {value}.",
)
_ASK_COMPARE = (
    "How {do} the {title} compare with the {other}?",
    "What is the difference between the {title} and the {other}?",
    "Should I take the {title} or the {other}?",
    "The {title} or the {other}?",
)
_TELL_COMPARE = (
    "The {title} cost{s} {price}{phrase}; the {other} cost{other_s} {other_price}{other_phrase}. {verdict}",
    "The {title} {are} {price}{phrase}. The {other} {other_are} {other_price}{other_phrase}. {verdict}",
)
_ASK_CHEAPER = (
    "Is there anything cheaper?",
    "Anything cheaper than the {title}?",
    "Do you have something less expensive?",
    "That is a bit much. Is there something cheaper?",
)
_YES_CHEAPER = (
    "Yes, the {other}{other_brand} cost{other_s} {other_price}, which is {difference} less than the {title}.",
    "The {other} {other_are} {difference} cheaper, for {other_price}.",
    "Yes, have a look at the {other} for {other_price}. You save {difference}.",
)
_NO_CHEAPER = (
    "No, at {price} the {title} {are} the cheapest in stock.",
    "The {title} for {price} {are} already the cheapest in stock.",
    "Nothing cheaper is in stock than the {title} at {price}.",
)
_ASK_TOTAL = (
    "What do the {title} and the {other} cost together?",
    "How much for the {title} plus the {other}?",
    "I'd take the {title} and the {other}. What is the total?",
)
_TELL_TOTAL = (
    "The {title} at {price} and the {other} at {other_price} come to {total} together.",
    "{total} in total: the {title} {are} {price}, the {other} {other_price}.",
    "Together they cost {total}.",
)
_LIMIT = ("under {money}", "below {money}", "for at most {money}", "up to {money}", "for no more than {money}")
_WITHIN = ("That is within your {money} budget.", "It stays under {money}.", "That fits your limit of {money}.")
_WITH = {
    "color": "in {value}",
    "colour": "in {value}",
    "size": "in size {value}",
    "material": "made of {value}",
    "age": "for ages {value}",
    "format": "in {value}",
    "skin": "for {value} skin",
    "hair": "for {value} hair",
    "players": "for {value} players",
    "pages": "with {value} pages",
    "pieces": "with {value} pieces",
    "scent": "with a {value} scent",
    "finish": "with a {value} finish",
    "battery": "with {value} of battery",
    "capacity": "with {value} capacity",
    "power": "with {value} power",
    "storage": "with {value} storage",
}
_SYMBOLS = {"EUR": "€", "USD": "$", "GBP": "£"}
_SPOKEN = {"EUR": "euros", "USD": "dollars", "GBP": "pounds"}


class OfflineVerbaliser:
    """Puts plans into words by itself; the same plan always gets the same words."""

    name = "offline"
    language_model = ""
    usage = None

    def replies(self, plans: Iterable[Plan]) -> Iterator[tuple[Plan, Reply]]:
        """Each plan with its words."""
        return ((plan, self.verbalise(plan)) for plan in plans)

    def verbalise(self, plan: Plan) -> list[Message]:
        """User and assistant messages in turn, one pair for each exchange."""
        speaker = _Speaker(plan)
        messages: list[Message] = []
        for exchange in plan.exchanges:
            question, answer = speaker.say(exchange)
            messages.append(Message(role="user", content=question))
            messages.append(Message(role="assistant", content=answer))
        return messages


class _Speaker:
    """The words of one conversation; remembers nothing but its random stream."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._rng = random.Random(f"words/{plan.key}")  # noqa: S311 - no secret

    def say(self, exchange: Exchange) -> tuple[str, str]:
        match exchange.act:
            case Act.NEED:
                return self._need(exchange), self._recommendation(exchange, _ONE_PICK)
            case Act.CHANGE:
                return self._change(exchange), self._recommendation(exchange, _PICK_AFTER_CHANGE)
            case Act.NO_MATCH:
                opens = exchange is self._plan.exchanges[0]
                return self._need(exchange) if opens else self._change(exchange), self._refusal(exchange)
            case Act.PRICE:
                return self._pair(_ASK_PRICE, _TELL_PRICE, exchange)
            case Act.STOCK:
                answers = _YES_STOCK if exchange.products[0].in_stock else _NO_STOCK
                return self._pair(_ASK_STOCK, answers, exchange)
            case Act.ATTRIBUTE:
                return self._attribute(exchange)
            case Act.COMPARE:
                return self._comparison(exchange)
            case Act.CHEAPER:
                answers = _YES_CHEAPER if len(exchange.products) > 1 else _NO_CHEAPER
                return self._pair(_ASK_CHEAPER, answers, exchange)
            case Act.TOTAL:
                return self._total(exchange)

    # --- the shopper ----------------------------------------------------------------------------------------------

    def _need(self, exchange: Exchange) -> str:
        need = self._plan.need
        category = exchange.products[0].category
        thing = f"something from {category.lower()}" if need == category.lower() else _with_article(need)
        return self._choose(_NEED).format(wish=f"{thing} {self._wishes(exchange.said)}".rstrip())

    def _change(self, exchange: Exchange) -> str:
        return self._choose(_CHANGE).format(wish=self._wishes(exchange.said))

    def _wishes(self, said: Constraints) -> str:
        parts = _joined([_phrase(name, value) for name, value in said.attributes.items()])
        if said.brand:
            parts.append(f"{self._choose(('by', 'from'))} {said.brand}")
        if said.max_price_minor is not None and said.currency is not None:
            money = self._money(said.max_price_minor, said.currency)
            parts.append(self._choose(_LIMIT).format(money=money))
        return " ".join(parts)

    def _money(self, minor: int, currency: str) -> str:
        """An amount as people write it: 70 EUR, €70, 70 euros."""
        unit: int = 10 ** minor_digits(currency)
        number = str(minor // unit) if minor % unit == 0 else format_price(minor, currency).split()[0]
        ways = [f"{number} {currency}"]
        if currency in _SYMBOLS:
            ways.extend((f"{_SYMBOLS[currency]}{number}", f"{number} {_SPOKEN[currency]}"))
        return self._choose(ways)

    # --- the assistant --------------------------------------------------------------------------------------------

    def _recommendation(self, exchange: Exchange, templates: Sequence[str]) -> str:
        if len(exchange.products) > 1:
            return self._fill(_TWO_PICKS, exchange, verdict=self._verdict(*exchange.products[:2]))
        product = exchange.products[0]
        asked = [name for name in exchange.said.attributes if name in product.attributes]
        if not asked and product.attributes and self._rng.random() < 0.6:
            asked = [self._choose(list(product.attributes))]
        facts = []
        if asked:
            facts.append(f"{_it(product)} {self._described(product, asked)}.")
        limit = exchange.said.max_price_minor
        if limit is not None and self._rng.random() < 0.5:
            facts.append(self._choose(_WITHIN).format(money=self._shown_limit(limit, product.currency)))
        return self._fill(templates, exchange, facts=" ".join(facts))

    def _refusal(self, exchange: Exchange) -> str:
        product, wanted = exchange.products[0], exchange.constraints
        reasons: list[str] = []
        are = _number(product)["are"]
        for name in exchange.unmet:
            if name == "max_price_minor" and wanted.max_price_minor is not None:
                over = format_price(product.price_minor - wanted.max_price_minor, product.currency)
                limit = self._shown_limit(wanted.max_price_minor, product.currency)
                reasons.append(self._choose((f"{are} above your limit of {limit}", f"{are} {over} over your limit")))
            elif name == "in_stock":
                reasons.append(f"{are} out of stock")
            elif name == "brand":
                reasons.append(f"{are} by {product.brand}" if product.brand else f"{are} by another brand")
            elif name in product.attributes:
                reasons.append(self._described(product, [name]))
            else:
                reasons.append(f"{'have' if _is_plural(product.title) else 'has'} no {name} that I know of")
        return self._fill(_NO_MATCH, exchange, reason=f"{_it(product)} {_listed(reasons)}.")

    def _described(self, product: Product, names: Sequence[str]) -> str:
        """Attributes as predicates: "is made of oak and comes in size M"."""
        parts: list[str] = []
        verb = ""
        for name in names:
            phrase = _phrase(name, product.attributes[name])
            last, verb = verb, _verb(product, phrase)
            parts.append(phrase if verb == last else f"{verb} {phrase}")
        return _listed(parts)

    def _attribute(self, exchange: Exchange) -> tuple[str, str]:
        name = exchange.attribute
        product = exchange.products[0]
        name_is = "are" if _is_plural(name) else "is"
        facts = {
            "name": name,
            "name_is": name_is,
            "value": product.attributes[name],
            "phrase": self._described(product, [name]),
        }
        return self._fill(_ASK_ATTRIBUTE, exchange, **facts), self._fill(_TELL_ATTRIBUTE, exchange, **facts)

    def _comparison(self, exchange: Exchange) -> tuple[str, str]:
        first, second = exchange.products[:2]
        shared = [name for name in first.attributes if name in second.attributes]
        phrases = {"phrase": "", "other_phrase": ""}
        if shared:
            name = self._choose(shared)
            phrases["phrase"] = f" and {self._described(first, [name])}"
            phrases["other_phrase"] = f" and {self._described(second, [name])}"
        answer = self._fill(_TELL_COMPARE, exchange, **phrases, verdict=self._verdict(first, second))
        return self._fill(_ASK_COMPARE, exchange), answer

    def _total(self, exchange: Exchange) -> tuple[str, str]:
        answer = self._fill(_TELL_TOTAL, exchange)
        gone = [product for product in exchange.products if not product.in_stock]
        if gone:
            answer += f" The {gone[0].title} {_number(gone[0])['are']} out of stock, though."
        return self._fill(_ASK_TOTAL, exchange), answer

    def _verdict(self, first: Product, second: Product) -> str:
        """One closing sentence on two products: who is out of stock, else who is cheaper."""
        gone = [product for product in (first, second) if not product.in_stock]
        if gone:
            return " ".join(f"The {product.title} {_number(product)['are']} out of stock." for product in gone)
        if first.price_minor == second.price_minor:
            return "They cost the same."
        cheap = min(first, second, key=lambda product: product.price_minor)
        difference = format_price(abs(first.price_minor - second.price_minor), first.currency)
        are = _number(cheap)["are"]
        return self._choose(
            (f"The {cheap.title} {are} {difference} cheaper.", f"The cheaper choice: the {cheap.title}.")
        )

    # --- words ----------------------------------------------------------------------------------------------------

    def _pair(self, questions: Sequence[str], answers: Sequence[str], exchange: Exchange) -> tuple[str, str]:
        return self._fill(questions, exchange), self._fill(answers, exchange)

    def _fill(self, templates: Sequence[str], exchange: Exchange, **more: str) -> str:
        values = _slots(exchange.products[0], "") | more
        if len(exchange.products) > 1:
            first, other = exchange.products[:2]
            values |= _slots(other, "other")
            values["difference"] = format_price(abs(first.price_minor - other.price_minor), first.currency)
            values["total"] = format_price(first.price_minor + other.price_minor, first.currency)
        return " ".join(self._choose(templates).format(**values).split())

    def _shown_limit(self, minor: int, currency: str) -> str:
        """A stated limit as the assistant repeats it: without decimals where it has none."""
        unit: int = 10 ** minor_digits(currency)
        return f"{minor // unit} {currency}" if minor % unit == 0 else format_price(minor, currency)

    def _choose(self, options: Sequence[str]) -> str:
        return self._rng.choice(options)


def _slots(product: Product, prefix: Literal["", "other"]) -> dict[str, str]:
    brand = f" by {product.brand}" if product.brand else ""
    if not prefix:
        return {"title": product.title, "brand": brand, "price": product.price_text} | _number(product)
    number = {f"other_{key}": word for key, word in _number(product).items()}
    return {"other": product.title, "other_brand": brand, "other_price": product.price_text} | number


def _number(product: Product) -> dict[str, str]:
    """The words that agree with a title: "the kettle costs", "the headphones cost"."""
    if _is_plural(product.title):
        return {"are": "are", "Are": "Are", "do": "do", "s": "", "it": "they", "It": "They"}
    return {"are": "is", "Are": "Is", "do": "does", "s": "s", "it": "it", "It": "It"}


def _it(product: Product) -> str:
    return _number(product)["It"]


def _verb(product: Product, phrase: str) -> str:
    number = _number(product)
    return number["are"] if phrase.startswith(("made of ", "for ")) else f"come{number['s']}"


def _phrase(name: str, value: str) -> str:
    """An attribute as a phrase that follows a noun or "it comes"."""
    if form := _WITH.get(name.lower()):
        return form.format(value=value)
    return f"with {value} {name}" if _is_plural(name) else f"with {_with_article(name)} of {value}"


def _joined(phrases: Sequence[str]) -> list[str]:
    """Phrases that begin alike as one: "with a height of 3 m and a pot of 5 l"."""
    joined: list[str] = []
    for phrase in phrases:
        if joined and phrase.startswith("with ") and joined[-1].startswith("with "):
            joined[-1] += f" and {phrase.removeprefix('with ')}"
        else:
            joined.append(phrase)
    return joined


def _with_article(noun: str) -> str:
    if _is_plural(noun):
        return noun
    return f"{'an' if noun[:1].lower() in 'aeio' else 'a'} {noun}"


def _is_plural(noun: str) -> bool:
    return noun.endswith("s") and not noun.endswith(("ss", "us"))


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
