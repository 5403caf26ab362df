"""Nothing of what is held out was seen in training; what cannot be split so is refused."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from knowledge_engine.catalogue import Product, load_demo_catalogue
from knowledge_engine.core import Message, SplitBy
from knowledge_engine.errors import InvalidSpecError, Reason
from knowledge_engine.rows import Conversation
from knowledge_engine.splits import near_duplicates, split_rows

PRODUCTS = load_demo_catalogue()
WORDS = [
    "kettle",
    "lamp",
    "shoe",
    "tent",
    "mug",
    "chair",
    "desk",
    "bag",
    "scarf",
    "bottle",
    "towel",
    "bowl",
    "torch",
    "glove",
    "hat",
    "ball",
    "rope",
    "pan",
    "vase",
    "rug",
]


def talk(asked: str, told: str = "Yes, it is.", products: Sequence[Product] = (), system: str = "") -> Conversation:
    messages = [Message(role="system", content=system)] if system else []
    messages += [Message(role="user", content=asked), Message(role="assistant", content=told)]
    return Conversation(messages=tuple(messages), products=tuple(products))


def talks(number: int) -> list[Conversation]:
    return [
        talk(f"Is the {WORDS[at % 20]} with the {WORDS[(at * 7) % 20]} number {at} here?", f"No {at} is sold out.")
        for at in range(number)
    ]


@pytest.mark.parametrize(("number", "share", "held_out"), [(100, 0.1, 10), (5, 0.1, 1), (2, 0.5, 1), (9, 0, 0)])
def test_the_split_holds_out_its_share(number: int, share: float, held_out: int) -> None:
    split = split_rows(talks(number), share, seed=7)
    assert len(split.held_out) == held_out
    assert sorted(split.train + split.held_out) == list(range(number))
    assert (split.train, split.held_out) == (sorted(split.train), sorted(split.held_out))


def test_the_split_follows_its_seed_and_refuses_the_impossible() -> None:
    rows = talks(50)
    assert split_rows(rows, 0.2, seed=1) == split_rows(rows, 0.2, seed=1)
    assert split_rows(rows, 0.2, seed=1) != split_rows(rows, 0.2, seed=2)
    with pytest.raises(InvalidSpecError) as caught:
        split_rows(rows[:1], 0.1, seed=1)
    assert caught.value.reason is Reason.SPLIT_IMPOSSIBLE
    assert caught.value.violations[0].field == "spec.eval_split"


def test_near_duplicates_stay_on_one_side() -> None:
    asked = "I am looking for a light tent for two people that fits into a small backpack, below 200 euros please"
    told = "Take the Aurora tent: it weighs 1.8 kg, costs 189 EUR and folds down to the size of a bottle of wine."
    alike = [talk(asked, told), talk(asked.replace("light", "very light"), told), talk(asked.upper(), told + "!!")]
    rows = [
        row for at, other in enumerate(talks(30)) for row in ([other, alike[at // 10]] if at % 10 == 5 else [other])
    ]
    same = [index for index, row in enumerate(rows) if row in alike]
    assert [(one, other) for one, other in near_duplicates(rows)] == [(same[0], same[1]), (same[0], same[2])]
    for seed in range(30):
        split = split_rows(rows, 0.3, seed)
        assert len({index in split.held_out for index in same}) == 1, seed
    with pytest.raises(InvalidSpecError) as caught:
        split_rows(alike, 0.3, seed=1)
    assert "3 of 3 conversations say nearly the same" in caught.value.message


def test_a_set_in_which_all_is_alike_takes_no_longer() -> None:
    """Each row compared with all others would be 200 million comparisons."""
    text = "Take the Aurora tent: it weighs 1.8 kg, costs 189 EUR and folds down to the size of a bottle of wine." * 3
    rows = [talk("Which tent?", text) for _ in range(10_000)]
    rows += [talk("Which tent?", f"{text} Number {number}.") for number in range(10_000)]
    assert len(near_duplicates(rows)) == len(rows) - 1


def test_what_all_conversations_of_a_shop_share_makes_none_of_them_alike() -> None:
    rules = "You are the assistant of a shop. " * 20
    rows = [
        talk(f"Do you have a {word}?", f"The {word} is on shelf {at}.", system=rules) for at, word in enumerate(WORDS)
    ]
    assert near_duplicates(rows) == []


def test_products_stay_on_one_side() -> None:
    rows = [
        talk(f"What about the {WORDS[at % 20]} {at}?", products=PRODUCTS[3 * (at % 12) : 3 * (at % 12) + 3])
        for at in range(60)
    ]
    rows += talks(20)  # which show none
    for seed in range(20):
        split = split_rows(rows, 0.2, seed, SplitBy.PRODUCT)
        seen, unseen = ({product.id for index in side for product in rows[index].products}
                        for side in (split.train, split.held_out))  # fmt: skip
        assert seen
        assert unseen
        assert not seen & unseen
        assert 8 <= len(split.held_out) <= 24


@pytest.mark.parametrize("with_others", [False, True], ids=["alone", "beside some that show none"])
def test_products_that_hang_together_are_no_split(with_others: bool) -> None:
    chained = [talk(f"The {WORDS[at]}?", products=PRODUCTS[at : at + 2]) for at in range(20)]
    rows = chained + (talks(20) if with_others else [])
    with pytest.raises(InvalidSpecError) as caught:
        split_rows(rows, 0.2, 1, SplitBy.PRODUCT)
    assert caught.value.reason is Reason.SPLIT_IMPOSSIBLE
    assert caught.value.violations[0].field == "spec.split_by"
    assert "hang together" in caught.value.message


def test_without_products_there_is_no_split_by_them() -> None:
    with pytest.raises(InvalidSpecError, match="no conversation shows a product"):
        split_rows(talks(20), 0.2, 1, SplitBy.PRODUCT)
