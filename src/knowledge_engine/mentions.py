"""What free text says about products: names, prices and stock, checked against the rows it may speak of.

Shared by whoever must not take a text on trust: generation now, evaluation later. It knows no plan, no wording and no
model. It is a reader of plain sentences, not of language: where it must guess it prefers to object.

- A name is a title or brand of the catalogue, or a capitalised or model-like word that no row explains.
- A price belongs to the title before it in its clause, else to the one after it, else to the last one named before.
- A budget, a sum or a difference needs a word that says so ("under", "together", "cheaper").
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from itertools import combinations, pairwise
from typing import Literal, NamedTuple

from knowledge_engine.catalogue import CURRENCIES, Product, minor_digits

_WORD = re.compile(r"\w+")
_JOINT = re.compile(r"(?:[ \t\u00a0\-‐-―'’&/+]|\.(?!\s)){1,3}")
_SENTENCE_END = re.compile(r"(?<=[.!?;])\s+|\n+")
_MODEL_LIKE = re.compile(r"[A-Za-z]+\d{2,}\w*|[A-Z]?[a-z]+[A-Z]\w*|[A-Z]+\d+\w*")
_ORDINARY = frozenset(
    "I OK Monday Tuesday Wednesday Thursday Friday Saturday Sunday January February March April May June July August "  # noqa: SIM905
    "September October November December Christmas Easter Valentine Halloween Europe European".split()
)

# --- names --------------------------------------------------------------------------------------------------------


class Mention(NamedTuple):
    """`text[start:end]` names the products with these ids; a brand names all of its products."""

    start: int
    end: int
    text: str
    kind: Literal["title", "brand"]
    ids: frozenset[str]


class _Words:
    """A text as words with their places."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.spans = [match.span() for match in _WORD.finditer(text)]
        self.words = [text[start:end] for start, end in self.spans]
        self.folded = [word.casefold() for word in self.words]
        # Whether word i and word i+1 can belong to one name: "USB-C" can, "the Kettle, Toaster" cannot.
        self.gaps = [text[left[1] : right[0]] for left, right in pairwise(self.spans)]
        self.joined = [gap == " " or _JOINT.fullmatch(gap) is not None for gap in self.gaps]

    def has(self, phrase: _Words, at: int) -> bool:
        """Whether it stands here, its words parted as in itself or by what holds words together."""
        end = at + len(phrase.words)
        return self.folded[at:end] == phrase.folded and all(
            joined or gap == own
            for joined, gap, own in zip(self.joined[at : end - 1], self.gaps[at : end - 1], phrase.gaps, strict=True)
        )


@lru_cache(maxsize=64)
def _read(text: str) -> _Words:
    """The words of a text; kept a while, since every check of an answer reads it again."""
    return _Words(text)


class _Phrases:
    """Word sequences to look for, the longest first wherever several begin."""

    def __init__(self, phrases: Iterable[str]) -> None:
        self._by_first: defaultdict[str, list[tuple[_Words, str]]] = defaultdict(list)
        for phrase in dict.fromkeys(phrases):
            words = _Words(phrase)
            if words.words:
                self._by_first[words.folded[0]].append((words, phrase))
        for found in self._by_first.values():
            found.sort(key=lambda item: -len(item[0].words))

    def find(self, text: _Words) -> Iterator[tuple[int, int, list[str]]]:
        """Non-overlapping hits as (first word, word after the last, phrases of that spelling)."""
        at = 0
        while at < len(text.words):
            hits = [item for item in self._by_first.get(text.folded[at], ()) if text.has(item[0], at)]
            if not hits:
                at += 1
                continue
            length = len(hits[0][0].words)
            yield at, at + length, [phrase for words, phrase in hits if len(words.words) == length]
            at += length


class CatalogueNames:
    """Every title and brand of a catalogue, and the words it uses as ordinary ones. Built once, then only read."""

    def __init__(self, products: Iterable[Product]) -> None:
        self._titles: defaultdict[str, set[str]] = defaultdict(set)
        self._brands: defaultdict[str, set[str]] = defaultdict(set)
        self._vocabulary: set[str] = set()
        for product in products:
            self._titles[product.title].add(product.id)
            if product.brand:
                self._brands[product.brand].add(product.id)
            said = (product.description, product.category, *product.attributes, *product.attributes.values())
            self._vocabulary.update(word for text in said for word in _WORD.findall(text))
        self._phrases = _Phrases([*self._titles, *self._brands])

    def find(self, text: str) -> list[Mention]:
        """The catalogue's titles and brands in the text, the longest where they overlap, in order."""
        return list(self._find(_read(text)))

    def _find(self, words: _Words) -> Iterator[Mention]:
        for first, after, phrases in self._phrases.find(words):
            start, end = words.spans[first][0], words.spans[after - 1][1]
            said = words.text[start:end]
            titles = [phrase for phrase in phrases if phrase in self._titles]
            if not self._is_name(said, words.words[first:after], is_title=bool(titles)):
                continue
            table = self._titles if titles else self._brands
            ids = frozenset().union(*(table[phrase] for phrase in phrases if phrase in table))
            yield Mention(start, end, said, "title" if titles else "brand", ids)

    def _is_name(self, said: str, words: Sequence[str], *, is_title: bool) -> bool:
        """Whether a hit is meant as a name: "yoga mat" is not the Yoga Mat, "aurora kettle" can be nothing else."""
        if said != said.lower() or any(character.isdigit() for character in said):
            return True
        return is_title and not all(word in self._vocabulary for word in words)

    def unknown(self, text: str, ids: Collection[str], explained: _Phrases) -> list[str]:
        """Names that none of the products with these ids bears: of other products, and invented ones.

        `explained` are phrases that may stand capitalised without being names.
        """
        words = _read(text)
        mentions = list(self._find(words))
        names = [mention.text for mention in mentions if mention.ids.isdisjoint(ids)]
        covered = [(mention.start, mention.end) for mention in mentions]
        for first, after, _ in explained.find(words):
            covered.append((words.spans[first][0], words.spans[after - 1][1]))
        covered.extend((price.start, price.end) for price in find_prices(text))
        return names + self._invented(words, sorted(covered))

    def _invented(self, words: _Words, covered: Sequence[tuple[int, int]]) -> list[str]:
        starts = [start for start, _ in covered]

        def is_covered(index: int) -> bool:
            at = bisect_right(starts, words.spans[index][0]) - 1
            return at >= 0 and words.spans[index][0] < max(end for _, end in covered[max(0, at - 1) : at + 1])

        found: list[str] = []
        for first, after in _name_runs(words):
            left = [index for index in range(first, after) if not is_covered(index)]
            opens = left[:1] == [first] and _opens_sentence(words, first)
            if opens and not _MODEL_LIKE.match(words.words[first]):
                first, left = first + 1, left[1:]
            if any(not self._is_ordinary(words.words[index]) for index in left):
                found.append(words.text[words.spans[first][0] : words.spans[after - 1][1]])
        return found

    def _is_ordinary(self, word: str) -> bool:
        if word in _ORDINARY or word in CURRENCIES or word.isdigit():
            return True
        return word.isupper() and len(word) <= 4 and word in self._vocabulary


def _name_runs(words: _Words) -> Iterator[tuple[int, int]]:
    """Stretches of words that could be a name: capitalised or model-like ones, with numbers among them."""
    at = 0
    while at < len(words.words):
        if not (words.words[at][0].isupper() or _MODEL_LIKE.fullmatch(words.words[at])):
            at += 1
            continue
        first = at
        while at < len(words.words) and (words.words[at][0].isupper() or words.words[at][0].isdigit() or at == first):
            at += 1
            if at < len(words.words) and not words.joined[at - 1]:
                break
        yield first, at


def _opens_sentence(words: _Words, index: int) -> bool:
    before = words.text[: words.spans[index][0]].rstrip(" \t\"'“‘(*-–—•")
    return not before or before[-1] in ".!?:;\n…"


# --- prices -------------------------------------------------------------------------------------------------------

_SYMBOLS = {"€": "EUR", "$": "USD", "£": "GBP", "¥": "JPY"}
_SPOKEN = {"euro": "EUR", "dollar": "USD", "pound": "GBP", "yen": "JPY"}
_NUMBER = r"(?<![\w.,])(?:\d{1,3}(?:[.,' \u00a0\u202f]\d{3})+(?:[.,]\d{1,3})?|\d+(?:[.,]\d{1,3})?)(?!\d)"
# The looks ahead spare the long list of codes at most places.
_CURRENCY = (
    rf"(?:[€$£¥]|(?<![A-Za-z])(?:(?=[A-Z]{{3}}\b)(?:{'|'.join(sorted(CURRENCIES))})"
    rf"|(?=[edpyEDPY])(?i:(?:{'|'.join(_SPOKEN)})s?))\b)"
)
_UNIT = (
    r"(?i:\s?(?:%|°|\"|x\d|(?:[nµmck]?[mglwv]|[mk]wh|m?ah|m?bps|[kmgt]i?b|[kmg]?hz|h|min|hours?|days?|inch|ft|lbs?|oz|"
    r"pieces|pages|people|years|times|cl|dl)\b))"
)
_TENS = "twen|thir|for|fif|six|seven|eigh|nine"
_PRICES = re.compile(
    rf"(?P<before>{_CURRENCY})\s?(?P<a>{_NUMBER})|(?P<b>{_NUMBER})\s?(?P<after>{_CURRENCY})"
    rf"|(?<![\w.,])(?P<bare>\d+(?:[,' ]\d{{3}})*\.\d{{2}})(?![\d.]|{_UNIT})"
    r"|\b(?i:costs?|cost you|priced at|price is|price of|sells for)\s(?:about |only |just )?"
    rf"(?P<plain>\d+)(?!\d|[.,]\d|\s?{_CURRENCY}|{_UNIT})"
    rf"|\b(?i:hundred|thousand|(?:{_TENS})(?:ty|teen)|ten|eleven|twelve|one|two|three|four|five|six|seven|eight|nine)"
    rf"\s(?P<spoken>(?i:{'|'.join(_SPOKEN)}))s?\b"
)


class PriceMention(NamedTuple):
    """`text[start:end]` states an amount; `amount` is None for one in words, `currency` where none is said."""

    start: int
    end: int
    text: str
    amount: Decimal | None
    currency: str | None

    def minor(self, currency: str) -> int | None:
        """The amount in minor units of `currency`; None when it is another currency or no such amount."""
        if self.amount is None or self.currency not in (None, currency):
            return None
        scaled = self.amount.scaleb(minor_digits(currency))
        return int(scaled) if scaled == scaled.to_integral_value() else None


def find_prices(text: str) -> list[PriceMention]:
    """Amounts of money: `129.00 EUR`, `€129`, `1,299.00`, `1.299,00 €`, `129 euros`, `costs 129`."""
    found: list[PriceMention] = []
    for match in _PRICES.finditer(text):
        number = match["a"] or match["b"] or match["bare"] or match["plain"]
        said = match["before"] or match["after"] or match["spoken"]
        currency = None if said is None else _SYMBOLS.get(said) or _SPOKEN.get(said.lower().rstrip("s"), said)
        amount = None if number is None else _amount(number, currency)
        found.append(PriceMention(match.start(), match.end(), match[0], amount, currency))
    return found


def _amount(number: str, currency: str | None) -> Decimal:
    """A number with separators of either kind; a single one before exactly three digits separates thousands, unless the
    currency has three decimals."""
    plain = re.sub(r"['\s]", "", number)
    marks = [character for character in plain if character in ".,"]
    is_grouped = len(marks) == 1 and len(plain) - plain.index(marks[0]) == 4 and minor_digits(currency or "EUR") != 3
    decimal = marks[-1] if len(set(marks)) == 2 or (len(marks) == 1 and not is_grouped) else ""
    for mark in set(marks) - {decimal}:
        plain = plain.replace(mark, "")
    return Decimal(plain.replace(decimal, ".") if decimal else plain)


# --- claims -------------------------------------------------------------------------------------------------------

_BUDGET = re.compile(
    r"(?i)\b(?:under|below|over|above|within|beyond|up to|at most|max(?:imum)?|budget|limit|less than|more than|"
    r"cheaper than|spend|exceeds?|fits?)\b[^.]{0,25}$"
)
_DIFFERENCE = re.compile(r"(?i)^\s?(?:cheaper|less|more|extra|dearer|below|over|above|under)\b")
_DIFFERENCE_BEFORE = re.compile(r"(?i)\b(?:saves?(?: you)?|difference(?: is| of)?|saving)\s(?:about )?$")
_TOTAL = re.compile(r"(?i)\b(?:together|total|altogether|combined|sum)\b")
_OUT_OF_STOCK = re.compile(
    r"(?i)\b(?:out of stock|sold out|unavailable|(?:not|isn't|aren't)(?: \w+)? (?:in stock|available))\b"
)
_IN_STOCK = re.compile(r"(?i)\b(?:in stock|available)\b")


@dataclass(frozen=True)
class Claims:
    """What an answer says that the rows do not support; empty where all is well."""

    unknown_names: list[str]
    wrong_prices: list[str]
    wrong_stock: list[str]


class FactChecker:
    """Checks what is said about some rows of a catalogue."""

    def __init__(self, names: CatalogueNames, rows: Sequence[Product]) -> None:
        self._names = names
        self._rows = {row.id: row for row in rows}
        said = (text for row in rows for text in (row.category, *row.attributes, *row.attributes.values()))
        self._explained = _Phrases(said)

    def unknown_names(self, text: str) -> list[str]:
        """Names in the text that none of the rows bears: other products and brands, and invented ones."""
        return self._names.unknown(text, self._rows.keys(), self._explained)

    def check(self, text: str, *, budgets: Collection[int] = (), before: str = "") -> Claims:
        """Checks one answer.

        `budgets` are amounts the shopper stated, in minor units; `before` is what was said just before, which may name
        what the answer only calls "it" or "both".
        """
        wrong_prices: list[str] = []
        wrong_stock: list[str] = []
        spoken_of = self._products(before)
        on_the_table = spoken_of + self._products(text)
        for clause in filter(None, _SENTENCE_END.split(text)):
            named = [(mention, self._of(mention)) for mention in self._names.find(clause) if mention.kind == "title"]
            for price in find_prices(clause):
                about = _subject(named, price.start) or spoken_of[-1:] or [list(self._rows.values())]
                if not self._supports(clause, price, about[0], on_the_table, budgets):
                    wrong_prices.append(price.text)
            wrong_stock.extend(_wrong_stock(clause, named, spoken_of))
            spoken_of = [products for _, products in named] or spoken_of
        return Claims(self.unknown_names(text), wrong_prices, wrong_stock)

    def _of(self, mention: Mention) -> list[Product]:
        return [self._rows[product_id] for product_id in sorted(mention.ids) if product_id in self._rows]

    def _products(self, text: str) -> list[list[Product]]:
        return [self._of(mention) for mention in self._names.find(text) if mention.kind == "title"]

    def _supports(
        self,
        clause: str,
        price: PriceMention,
        about: Sequence[Product],
        on_the_table: Sequence[Sequence[Product]],
        budgets: Collection[int],
    ) -> bool:
        before, after = clause[: price.start], clause[price.end :]
        rows = self._rows.values()
        amounts = {price.minor(row.currency) for row in rows} - {None}
        if not amounts:
            return False
        if amounts & set(budgets) and _BUDGET.search(before):
            return True
        prices = {row.price_minor for group in on_the_table for row in group} or {row.price_minor for row in rows}
        if _DIFFERENCE.search(after) or _DIFFERENCE_BEFORE.search(before):
            return bool(amounts & {abs(a - b) for a in prices for b in prices | set(budgets) if a != b})
        if _TOTAL.search(clause) and amounts & {sum(some) for n in (2, 3) for some in combinations(sorted(prices), n)}:
            return True
        return any(price.minor(product.currency) == product.price_minor for product in about)


def _subject(named: Sequence[tuple[Mention, list[Product]]], at: int) -> list[list[Product]]:
    """The products that a statement at `at` is about: the title before it, else the one after it, else none."""
    before = [products for mention, products in named if mention.start < at]
    after = [products for mention, products in named if mention.start >= at]
    return before[-1:] or after[:1]


def _wrong_stock(
    clause: str, named: Sequence[tuple[Mention, list[Product]]], spoken_of: Sequence[Sequence[Product]]
) -> Iterator[str]:
    for match, says_in_stock in _stock_claims(clause):
        about: Sequence[Sequence[Product]] = _subject(named, match.start()) or spoken_of[-1:]
        if re.search(r"(?i)\bboth\b", clause) and len(named) > 1:
            about = [products for _, products in named]
        for products in about:
            if products and all(product.in_stock is not says_in_stock for product in products):
                yield f"{products[0].title}: {match[0]}"


def _stock_claims(clause: str) -> Iterator[tuple[re.Match[str], bool]]:
    out = list(_OUT_OF_STOCK.finditer(clause))
    for match in out:
        yield match, False
    for match in _IN_STOCK.finditer(clause):
        if not any(other.start() <= match.start() < other.end() for other in out):
            yield match, True
