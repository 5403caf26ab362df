"""Products in and out, search, and what free text may say about them."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from knowledge_engine.catalogue import (
    Constraints,
    Product,
    format_price,
    load_demo_catalogue,
    matches_topic,
    parse_json,
    parse_price,
    search,
)
from knowledge_engine.core import Message
from knowledge_engine.mentions import CatalogueNames, Claims, FactChecker, find_prices
from knowledge_engine.text import with_context

ROW: dict[str, Any] = {"id": "k1", "title": "Aurora Kettle", "price": 49.9, "currency": "EUR", "category": "Kitchen"}


def _checker(*ids: str) -> FactChecker:
    products = load_demo_catalogue()
    return FactChecker(CatalogueNames(products), [product for product in products if product.id in ids])


KETTLES = ("ki-01", "ki-02", "ki-03")  # Aurora 49.90, Swan Gooseneck 74.00, Bistro 29.90


def test_the_demo_catalogue_is_varied_and_unambiguous() -> None:
    products = load_demo_catalogue()
    titles = [product.title.casefold() for product in products]
    assert len(products) >= 150
    assert len({product.category for product in products}) >= 8
    assert len({product.id for product in products}) == len(set(titles)) == len(products)
    assert not [(one, other) for one in titles for other in titles if one != other and one in other]
    assert {product.currency for product in products} == {"EUR"}
    assert 5 <= sum(not product.in_stock for product in products) <= len(products) // 4
    assert all(1 <= len(product.attributes) <= 4 and product.brand and product.description for product in products)


def test_a_row_survives_the_round_trip() -> None:
    for product in load_demo_catalogue():
        assert Product.from_row(product.to_row()) == product


@pytest.mark.parametrize(
    ("value", "currency", "minor"),
    [
        (49.9, "EUR", 4990),
        (Decimal("129.00"), "EUR", 12900),
        ("129.00", "EUR", 12900),
        (7, "EUR", 700),
        ("12.500", "EUR", 1250),
        (1500, "JPY", 1500),
        ("1.234", "KWD", 1234),
        (0, "EUR", 0),
        (Decimal("1E+3"), "EUR", 100000),
    ],
)
def test_prices_become_minor_units(value: object, currency: str, minor: int) -> None:
    assert parse_price(value, currency) == minor


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (-1, "negative"),
        ("-0.01", "negative"),
        (float("nan"), "decimal number"),
        (float("inf"), "decimal number"),
        ("1.001", "more than the 2 decimals"),
        ("1,50", "decimal number"),
        ("1_000", "decimal number"),
        ("", "decimal number"),
        (True, "must be a number"),
        (None, "must be a number"),
        ([], "must be a number"),
        (10**11, "too large"),
    ],
)
def test_bad_prices_are_refused(value: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        parse_price(value, "EUR")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"currency": "EURO"}, "ISO 4217"),
        ({"currency": "ABC"}, "ISO 4217"),
        ({"title": "  "}, "title is empty"),
        ({"title": 5}, "title must be text"),
        ({"title": "a\x07b"}, "control character"),
        ({"title": "\ud800"}, "lone surrogate"),
        ({"id": None}, "id is missing"),
        ({"id": "x" * 129}, "longer than 128"),
        ({"in_stock": "yes"}, "in_stock must be true or false"),
        ({"attributes": []}, "attributes must be an object"),
        ({"attributes": {"colour": {}}}, "attribute 'colour'"),
        ({"attributes": {"colour": ""}}, "empty"),
        ({"attributes": {str(number): 1 for number in range(65)}}, "more than 64"),
        ({"colour": "red"}, "unknown field 'colour'"),
    ],
)
def test_bad_rows_name_the_field(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Product.from_row(ROW | change)


def test_attribute_values_become_text() -> None:
    row = parse_json('{"slots": 4, "weight": 2.30, "wireless": true}')
    assert Product.from_row(ROW | {"attributes": row}).attributes == {
        "slots": "4",
        "weight": "2.30",
        "wireless": "true",
    }


@pytest.mark.parametrize("line", ["{", "NaN", '{"a": Infinity}', '{"a": 1, "a": 2}', "[" * 100_000])
def test_json_is_read_strictly(line: str) -> None:
    with pytest.raises(ValueError, match=r"JSON|no number|twice|deep"):
        parse_json(line)


def test_the_prompt_shows_a_product_in_the_currency_s_own_decimals() -> None:
    product = Product.from_row(ROW | {"price": 1500, "currency": "JPY", "brand": "Tavola", "attributes": {"size": "M"}})
    (system, _) = with_context([Message(role="user", content="?")], {"products": [product.to_context()]})
    assert system.content.endswith("\n- Aurora Kettle by Tavola, 1500 JPY, in stock, size: M")
    assert format_price(12900, "EUR") == "129.00 EUR"


def test_search_applies_every_constraint() -> None:
    products = load_demo_catalogue()
    kettles = search(products, Constraints(words=("kettles",)))
    assert [product.title for product in kettles] == ["Bistro Kettle", "Aurora Kettle", "Swan Gooseneck Kettle"]
    wanted = Constraints(words=("kettle",), category="kitchen", brand="Tavola", max_price_minor=5000, currency="EUR")
    assert [product.id for product in search(products, wanted)] == ["ki-01"]
    assert wanted.unmet(kettles[2]) == ["brand", "max_price_minor"]
    assert Constraints(attributes={"colour": "black"}, in_stock=True).unmet(kettles[0]) == ["colour"]
    sold_out = next(product for product in products if not product.in_stock)
    assert Constraints(in_stock=True).unmet(sold_out) == ["in_stock"]
    assert Constraints(max_price_minor=10**9, currency="USD").unmet(sold_out) == ["max_price_minor"]


def test_topics_look_at_category_title_brand_and_attributes() -> None:
    product = load_demo_catalogue()[0]
    matching = ("electronics", "Headphone", "kinso", "black headphones", "battery")
    assert all(matches_topic(product, topic) for topic in matching)
    assert not any(matches_topic(product, topic) for topic in ("garden", "white headphones", "!", "noise"))


@pytest.mark.parametrize(
    ("text", "amounts"),
    [
        ("129.00 EUR", [("129.00", "EUR")]),
        ("€129 or 129 €", [("129", "EUR"), ("129", "EUR")]),
        ("1,299.00 today", [("1299.00", None)]),
        ("1.299,00 EUR", [("1299.00", "EUR")]),
        ("EUR 1 299.50", [("1299.50", "EUR")]),
        ("129 euros, $5, 7 pounds", [("129", "EUR"), ("5", "USD"), ("7", "GBP")]),
        ("129EUR", [("129", "EUR")]),
        ("it costs 129.", [("129", None)]),
        ("it costs 49.90 EUR", [("49.90", "EUR")]),
        ("ten euros", [(None, "EUR")]),
        ("3.475 KWD, or KWD 1,250.500, not 3.475 EUR", [("3.475", "KWD"), ("1250.500", "KWD"), ("3475", "EUR")]),
        ("1.75 L, 2.40 m, 20,000 mAh, 4 people, USB 129, version 2.5.1", []),
    ],
)
def test_prices_are_found_in_many_forms(text: str, amounts: list[tuple[str | None, str | None]]) -> None:
    found = [(mention.amount, mention.currency) for mention in find_prices(text)]
    assert found == [(None if amount is None else Decimal(amount), currency) for amount, currency in amounts]


@pytest.mark.parametrize(
    "text",
    [
        "The Aurora Kettle by Tavola costs 49.90 EUR and is in stock.",
        "I'd take the Bistro Kettle (29.90 EUR) or the Aurora Kettle (€49.90).",
        "The Bistro Kettle is 20.00 EUR cheaper than the Aurora Kettle.",
        "The Aurora Kettle and the Bistro Kettle come to 79.80 EUR together.",
        "It stays under 60 EUR.",
        "You get the aurora kettle in steel, it holds 1.7 L.",
        "A yoga mat is something else. Sorry!",
        "At 29.90 EUR the Bistro Kettle is the cheapest; the Swan Gooseneck Kettle is 74.00 EUR.",
    ],
)
def test_supported_statements_pass(text: str) -> None:
    assert _checker(*KETTLES).check(text, budgets=[6000]) == Claims([], [], [])


@pytest.mark.parametrize(
    ("text", "claims"),
    [
        ("Take the Vortex Blender.", Claims(["Vortex Blender"], [], [])),
        ("Try the ZetaPhone 9000!", Claims(["ZetaPhone 9000"], [], [])),
        ("ZetaPhone is better.", Claims(["ZetaPhone"], [], [])),
        ("The Aurora Kettle Pro is better.", Claims(["Aurora Kettle Pro"], [], [])),
        ("We have the Aurora Blender.", Claims(["Aurora Blender"], [], [])),
        ("I like kettles by Kinso.", Claims(["Kinso"], [], [])),
        ("Get the lotus yoga mat.", Claims(["lotus yoga mat"], [], [])),
        ("The Bistro Kettle costs 49.90 EUR.", Claims([], ["49.90 EUR"], [])),
        ("The Bistro Kettle costs 28 euros.", Claims([], ["28 euros"], [])),
        ("The Bistro Kettle costs 29.90 USD.", Claims([], ["29.90 USD"], [])),
        ("The Bistro Kettle costs 60 EUR.", Claims([], ["60 EUR"], [])),
        ("It is under 61 EUR.", Claims([], ["61 EUR"], [])),
        ("The Bistro Kettle is 21.00 EUR cheaper than the Aurora Kettle.", Claims([], ["21.00 EUR"], [])),
        ("It costs thirty euros.", Claims([], ["thirty euros"], [])),
        ("The Bistro Kettle is out of stock.", Claims([], [], ["Bistro Kettle: out of stock"])),
    ],
)
def test_unsupported_statements_are_named(text: str, claims: Claims) -> None:
    assert _checker(*KETTLES).check(text, budgets=[6000]) == claims


def test_what_was_said_before_gives_it_and_both_a_meaning() -> None:
    checker = _checker(*KETTLES)
    assert not checker.check("It costs 29.90 EUR.", before="How much is the Bistro Kettle?").wrong_prices
    assert checker.check("It costs 49.90 EUR.", before="How much is the Bistro Kettle?").wrong_prices
    asked = "What do the Aurora Kettle and the Bistro Kettle cost?"
    assert not checker.check("Together they cost 79.80 EUR.", before=asked).wrong_prices
    assert checker.check("Together they cost 123.90 EUR.", before=asked).wrong_prices


def test_a_sold_out_product_is_not_available() -> None:
    checker = _checker("ki-08", "ki-09")  # the Sip Blender is sold out
    assert checker.check("Yes, the Sip Blender is available.").wrong_stock == ["Sip Blender: available"]
    assert not checker.check("The Sip Blender isn't in stock, the Vortex Blender is in stock.").wrong_stock
    assert checker.check("Both the Vortex Blender and the Sip Blender are in stock.").wrong_stock


def test_the_longest_title_wins() -> None:
    products = [Product.from_row(ROW), Product.from_row(ROW | {"id": "k2", "title": "Aurora Kettle Mini"})]
    names = CatalogueNames(products)
    assert [mention.ids for mention in names.find("the Aurora Kettle Mini")] == [{"k2"}]
    assert FactChecker(names, products[:1]).unknown_names("the Aurora Kettle Mini") == ["Aurora Kettle Mini"]
