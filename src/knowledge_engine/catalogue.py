"""Products: rows of JSON and CSV in and out, and search over them. Knows no file, no dataset and no wording.

Prices are integers in the currency's minor unit inside and decimals at the edges. A row that is not sound raises
`ValueError` with one sentence; whoever read the row adds where it stood. `mentions.py` checks free text against rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field

DEMO_CATALOGUE = Path(__file__).with_name("demo_catalogue.jsonl")
"""The shipped demo catalogue, JSONL."""

FIELDS = ("id", "title", "price", "currency", "category", "brand", "description", "attributes", "in_stock")
_REQUIRED = FIELDS[:5]
_MAX_LENGTHS = {"id": 128, "title": 200, "category": 100, "brand": 100, "description": 4000}
_MAX_ATTRIBUTES = 64
_MAX_PRICE_MINOR = 10**12
_PRICE = re.compile(r"(\d{1,13})(?:\.(\d{1,8}))?", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}

# ISO 4217, active codes of money in use; three exceptions to two decimals below.
CURRENCIES = frozenset(
    "AED AFN ALL AMD AOA ARS AUD AWG AZN BAM BBD BDT BGN BHD BIF BMD BND BOB BRL BSD BTN BWP BYN BZD CAD CDF CHF CLP "  # noqa: SIM905
    "CNY COP CRC CUP CVE CZK DJF DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD GNF GTQ GYD HKD HNL HTG HUF "
    "IDR ILS INR IQD IRR ISK JMD JOD JPY KES KGS KHR KMF KPW KRW KWD KYD KZT LAK LBP LKR LRD LSL LYD MAD MDL MGA MKD "
    "MMK MNT MOP MRU MUR MVR MWK MXN MYR MZN NAD NGN NIO NOK NPR NZD OMR PAB PEN PGK PHP PKR PLN PYG QAR RON RSD RUB "
    "RWF SAR SBD SCR SDG SEK SGD SHP SLE SOS SRD SSP STN SVC SYP SZL THB TJS TMT TND TOP TRY TTD TWD TZS UAH UGX USD "
    "UYU UZS VES VND VUV WST XAF XCD XOF XPF YER ZAR ZMW".split()
)
_WITHOUT_DECIMALS = frozenset("BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX VND VUV XAF XOF XPF".split())  # noqa: SIM905
_THREE_DECIMALS = frozenset("BHD IQD JOD KWD LYD OMR TND".split())  # noqa: SIM905


class Product(BaseModel):
    """One row of a catalogue. `price_minor` counts the currency's smallest unit, such as cents."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    title: str
    price_minor: int = Field(ge=0)
    currency: str
    category: str
    brand: str = ""
    description: str = ""
    attributes: dict[str, str] = Field(default_factory=dict)
    in_stock: bool = True

    @property
    def price_text(self) -> str:
        """The price for people, such as `129.00 EUR`."""
        return format_price(self.price_minor, self.currency)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Product:
        """A product from a JSON object with the keys of `FIELDS`.

        Raises:
            ValueError: one sentence that names the field.
        """
        unknown = [key for key in row if key not in FIELDS]
        if unknown:
            raise ValueError(f"unknown field {unknown[0]!r}; known are {', '.join(FIELDS)}")
        missing = [key for key in _REQUIRED if row.get(key) is None]
        if missing:
            raise ValueError(f"{missing[0]} is missing")
        currency = row["currency"]
        if not isinstance(currency, str) or currency not in CURRENCIES:
            raise ValueError("currency must be an ISO 4217 code such as EUR")
        in_stock = row.get("in_stock", True)
        if not isinstance(in_stock, bool):
            raise ValueError("in_stock must be true or false")
        return cls(
            id=_text(row, "id"),
            title=_text(row, "title"),
            price_minor=parse_price(row["price"], currency),
            currency=currency,
            category=_text(row, "category"),
            brand=_text(row, "brand"),
            description=_text(row, "description"),
            attributes=_attributes(row.get("attributes")),
            in_stock=in_stock,
        )

    @classmethod
    def from_cells(cls, header: Sequence[str], cells: Sequence[str]) -> Product:
        """A product from one CSV record; columns beyond the product's fields are its attributes, empty cells nothing.

        Raises:
            ValueError: one sentence that names the column.
        """
        if len(cells) != len(header):
            raise ValueError(f"has {len(cells)} cells, the header {len(header)}")
        row: dict[str, Any] = {}
        attributes: dict[str, str] = {}
        for column, cell in zip(header, cells, strict=True):
            if not cell.strip():
                continue
            if column == "in_stock":
                row[column] = _BOOLEANS.get(cell.strip().lower(), cell)
            elif column in FIELDS:
                row[column] = cell
            else:
                attributes[column] = cell
        return cls.from_row(row | {"attributes": attributes})

    def to_row(self) -> dict[str, Any]:
        """The JSON object that `from_row` reads; the canonical form, every field present."""
        scale = minor_digits(self.currency)
        price = float(Decimal(self.price_minor).scaleb(-scale)) if scale else self.price_minor
        return {
            "id": self.id,
            "title": self.title,
            "price": price,
            "currency": self.currency,
            "category": self.category,
            "brand": self.brand,
            "description": self.description,
            "attributes": self.attributes,
            "in_stock": self.in_stock,
        }

    def to_context(self) -> dict[str, Any]:
        """What a prompt shows of the product, for `text.with_context`: no id, category or description."""
        shown: dict[str, Any] = {"title": self.title}
        if self.brand:
            shown["brand"] = self.brand
        # The text form keeps the currency's own decimals, where a float would always get two.
        shown |= {"price": format_price(self.price_minor, self.currency), "in_stock": self.in_stock}
        return shown | ({"attributes": self.attributes} if self.attributes else {})


def check_header(header: Sequence[str]) -> None:
    """Refuses a CSV header that cannot hold products.

    Raises:
        ValueError: one sentence that names the column.
    """
    missing = [field for field in _REQUIRED if field not in header]
    if missing:
        raise ValueError(f"the header has no column {missing[0]!r}; needed are {', '.join(_REQUIRED)}")
    if "attributes" in header:
        raise ValueError("in CSV every attribute is a column of its own; 'attributes' cannot be one")
    for position, column in enumerate(header):
        if not column.strip():
            raise ValueError(f"column {position + 1} has no name")
        if column in header[:position]:
            raise ValueError(f"column {column!r} is there twice")


# --- money --------------------------------------------------------------------------------------------------------


def minor_digits(currency: str) -> int:
    """Decimals of an ISO 4217 currency."""
    return 0 if currency in _WITHOUT_DECIMALS else 3 if currency in _THREE_DECIMALS else 2


def parse_price(value: object, currency: str) -> int:
    """A decimal number or its text in minor units.

    Raises:
        ValueError: no finite number, negative, more decimals than the currency has, or absurdly large.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal | str):
        raise ValueError("price must be a number")
    text = format(value, "f") if isinstance(value, Decimal) and value.is_finite() else str(value).strip()
    match = _PRICE.fullmatch(text)
    if match is None:
        if text.startswith("-") and _PRICE.fullmatch(text[1:]):
            raise ValueError("price must not be negative")
        raise ValueError("price must be a decimal number such as 129.00")
    digits = minor_digits(currency)
    decimals = (match[2] or "").rstrip("0")
    if len(decimals) > digits:
        raise ValueError(f"price has more than the {digits} decimals of {currency}")
    minor = int(match[1] + decimals.ljust(digits, "0"))
    if minor > _MAX_PRICE_MINOR:
        raise ValueError("price is too large")
    return minor


def format_price(minor: int, currency: str) -> str:
    """`12900, "EUR"` as `129.00 EUR`."""
    digits = minor_digits(currency)
    return f"{Decimal(minor).scaleb(-digits):.{digits}f} {currency}"


# --- search -------------------------------------------------------------------------------------------------------


class Constraints(BaseModel):
    """What a shopper asks for; an empty field asks nothing. `words` must all stand in the title."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    words: tuple[str, ...] = ()
    category: str | None = None
    brand: str | None = None
    max_price_minor: int | None = None
    currency: str | None = None
    attributes: dict[str, str] = Field(default_factory=dict)
    in_stock: bool = False

    def unmet(self, product: Product) -> list[str]:
        """Names of what the product does not satisfy: field names, and attribute names."""
        failed: list[str] = []
        if self.words and not set(map(_stem, self.words)) <= _stems(product.title):
            failed.append("words")
        if self.category is not None and product.category.casefold() != self.category.casefold():
            failed.append("category")
        if self.brand is not None and product.brand.casefold() != self.brand.casefold():
            failed.append("brand")
        if self.max_price_minor is not None and (
            product.price_minor > self.max_price_minor or self.currency not in (None, product.currency)
        ):
            failed.append("max_price_minor")
        failed.extend(
            key
            for key, value in self.attributes.items()
            if product.attributes.get(key, "").casefold() != value.casefold()
        )
        if self.in_stock and not product.in_stock:
            failed.append("in_stock")
        return failed

    def satisfied_by(self, product: Product) -> bool:
        return not self.unmet(product)


def search(products: Iterable[Product], constraints: Constraints) -> list[Product]:
    """The products that satisfy all constraints, cheapest first."""
    return sorted(filter(constraints.satisfied_by, products), key=lambda product: (product.price_minor, product.id))


def matches_topic(product: Product, topic: str) -> bool:
    """Whether every word of `topic` stands in category, title, brand or attributes; singular and plural are one."""
    texts = [product.category, product.title, product.brand, *product.attributes, *product.attributes.values()]
    wanted = _stems(topic)
    return bool(wanted) and wanted <= _stems(" ".join(texts))


def _stems(text: str) -> set[str]:
    return set(map(_stem, re.findall(r"\w+", text.casefold())))


def _stem(word: str) -> str:
    word = word.casefold()
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


# --- reading ------------------------------------------------------------------------------------------------------


def parse_json(line: str) -> Any:
    """Strict JSON: no NaN or Infinity, no key twice, decimals exact (`Decimal`).

    Raises:
        ValueError: one sentence.
    """
    try:
        return _DECODER.decode(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def parse_json_at(text: str, start: int) -> tuple[Any, int]:
    """As `parse_json`, of the value that begins at `start`, and where it ends. Raises ValueError, also where the value
    is not whole yet."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg}") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    return value, end


def load_demo_catalogue() -> list[Product]:
    """The products of `DEMO_CATALOGUE`."""
    lines = DEMO_CATALOGUE.read_text(encoding="utf-8").splitlines()
    return [Product.from_row(parse_json(line)) for line in lines]


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key!r} is there twice")
            seen.add(key)
    return row


def _decimal(text: str) -> Decimal:
    try:
        return Decimal(text)
    except InvalidOperation:
        raise ValueError("a number has too large an exponent") from None


_DECODER = json.JSONDecoder(parse_float=_decimal, parse_constant=_refuse_constant, object_pairs_hook=_unique)


def _text(row: Mapping[str, Any], field: str) -> str:
    value = row.get(field)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{field} must be text")
    text = clean_text(value, field)
    if not text and field in _REQUIRED:
        raise ValueError(f"{field} is empty")
    if len(text) > _MAX_LENGTHS[field]:
        raise ValueError(f"{field} is longer than {_MAX_LENGTHS[field]} characters")
    return text


def clean_text(value: str, field: str) -> str:
    """The text on one line, single-spaced.

    Raises:
        ValueError: a control character, or half of a surrogate pair.
    """
    text = " ".join(value.split())
    if _CONTROL.search(text):
        raise ValueError(f"{field} holds a control character or a lone surrogate")
    return text


def _attributes(value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError("attributes must be an object of names and values")
    if len(value) > _MAX_ATTRIBUTES:
        raise ValueError(f"more than {_MAX_ATTRIBUTES} attributes")
    attributes: dict[str, str] = {}
    for key, item in value.items():
        if not isinstance(item, str | int | Decimal):
            raise ValueError(f"attribute {key!r} must be text, a number or a truth value")
        text = str(item).lower() if isinstance(item, bool) else f"{item:f}" if isinstance(item, Decimal) else str(item)
        name, text = clean_text(str(key), "an attribute"), clean_text(text, f"attribute {key!r}")
        if not name or not text or max(len(name), len(text)) > 200:
            raise ValueError(f"attribute {key!r} is empty or longer than 200 characters")
        if name in attributes:
            raise ValueError(f"attribute {name!r} is there twice")
        attributes[name] = text
    return attributes
