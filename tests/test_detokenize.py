from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from tokenizers import Tokenizer, decoders, models

from knowledge_engine.inference.detokenize import Detokenizer, StopFilter
from tests.tiny import SPECIAL_TOKENS, build_tiny_base

ALPHABET = "ab \n.é€漢字🙂👩‍👩‍👧🏽ß\u0301\u200d\u2028\ufffd\x00"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte-level: every character beyond ASCII is several tokens."""
    folder = build_tiny_base(tmp_path_factory.mktemp("base"))
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def fallback_tokenizer() -> Tokenizer:
    """As Llama 2's: words with a leading `▁`, single bytes for what the vocabulary lacks, the first space stripped."""
    vocabulary = {"<unk>": 0, "</s>": 1, **{f"<0x{byte:02X}>": byte + 2 for byte in range(256)}}
    for piece in ("▁", "▁shoe", "shoe", "s", "a", "b", "▁a", ".", "é"):
        vocabulary[piece] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def token_id_of(tokenizer: Tokenizer, token: str) -> int:
    token_id = tokenizer.token_to_id(token)
    assert token_id is not None
    return token_id


def pieces(tokenizer: Tokenizer, token_ids: Sequence[int], stop: Sequence[str] = ()) -> list[str]:
    detokenizer = Detokenizer(tokenizer, stop)
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


def cut(text: str, stop: Sequence[str]) -> str:
    """The definition, read one character at a time."""
    for end in range(1, len(text) + 1):
        if found := [word for word in stop if text[:end].endswith(word)]:
            return text[: end - max(map(len, found))]
    return text


@pytest.mark.parametrize("seed", range(40))
def test_joined_pieces_equal_the_full_decode_of_any_text(tokenizer: Tokenizer, seed: int) -> None:
    text = "".join(random.Random(seed).choices(ALPHABET, k=60))
    token_ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert "".join(pieces(tokenizer, token_ids)) == text


@pytest.mark.parametrize("seed", range(40))
def test_joined_pieces_equal_the_full_decode_of_any_tokens(tokenizer: Tokenizer, seed: int) -> None:
    token_ids = random.Random(seed).choices(range(tokenizer.get_vocab_size()), k=80)
    assert "".join(pieces(tokenizer, token_ids)) == tokenizer.decode(token_ids, skip_special_tokens=True)


@pytest.mark.parametrize("seed", range(20))
def test_pieces_never_break_a_code_point(tokenizer: Tokenizer, seed: int) -> None:
    text = "".join(random.Random(seed).choices(ALPHABET.replace("\ufffd", ""), k=60))
    given = pieces(tokenizer, tokenizer.encode(text, add_special_tokens=False).ids)
    assert not any("\ufffd" in piece for piece in given)


def test_each_code_point_comes_with_its_last_byte(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("€🙂", add_special_tokens=False).ids
    assert len(token_ids) == 7
    assert pieces(tokenizer, token_ids) == ["", "", "€", "", "", "", "🙂", ""]


def test_an_incomplete_code_point_is_not_lost_at_the_end(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("a€", add_special_tokens=False).ids[:-1]
    assert pieces(tokenizer, token_ids) == ["a", "", "", "\ufffd"]


def test_special_tokens_are_never_shown(tokenizer: Tokenizer) -> None:
    special = [token_id_of(tokenizer, token) for token in SPECIAL_TOKENS]
    token_ids = [special[1], *tokenizer.encode("shoe").ids, special[2], special[0], *tokenizer.encode(" fits").ids]
    assert "".join(pieces(tokenizer, token_ids)) == "shoe fits"


@pytest.mark.parametrize("seed", range(60))
def test_stop_strings_split_over_tokens_cut_the_text_before_them(tokenizer: Tokenizer, seed: int) -> None:
    chance = random.Random(seed)
    text = "".join(chance.choices("ab€🙂", k=40))
    places = [(chance.randrange(len(text)), chance.randint(1, 6)) for _ in range(chance.randint(1, 4))]
    stop = [text[at : at + length] for at, length in places] + ["never there"]
    token_ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert "".join(pieces(tokenizer, token_ids, stop)) == cut(text, stop)


@pytest.mark.parametrize("seed", range(200))
def test_how_text_is_split_changes_nothing_for_stop_strings(seed: int) -> None:
    chance = random.Random(seed)
    text = "".join(chance.choices("ab", k=30))
    stop = ["".join(chance.choices("ab", k=chance.randint(1, 7))) for _ in range(chance.randint(1, 3))]
    stop_filter = StopFilter(stop)
    shown, rest = "", text
    while rest:
        size = chance.randint(1, 5)
        shown += stop_filter.push(rest[:size])
        rest = rest[size:]
        assert cut(text, stop).startswith(shown)
    assert shown + stop_filter.flush() == cut(text, stop)
    assert stop_filter.stopped == (cut(text, stop) != text)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    stop_filter = StopFilter(["\n\nUser:"])
    assert stop_filter.push("Hello.\n") == "Hello."
    assert stop_filter.push("\nUse") == ""
    assert stop_filter.push("d shoes\n") == "\n\nUsed shoes"
    assert stop_filter.flush() == "\n"
    assert not stop_filter.stopped


def test_nothing_follows_a_stop_string(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, ["b"])
    shown = [detokenizer.push(token_id) for token_id in tokenizer.encode("abc abc").ids]
    assert "".join(shown) == "a"
    assert detokenizer.stopped
    assert detokenizer.flush() == ""


@pytest.mark.parametrize("seed", range(40))
def test_byte_fallback_tokenizers_give_the_full_decode(fallback_tokenizer: Tokenizer, seed: int) -> None:
    chance = random.Random(seed)
    token_ids: list[int] = []
    for _ in range(30):
        if chance.random() < 0.5:
            token_ids += [byte + 2 for byte in chance.choice("é€漢🙂").encode()]
        else:
            token = chance.choice(["▁", "▁shoe", "s", "▁a", ".", "é", "</s>"])
            token_ids.append(token_id_of(fallback_tokenizer, token))
    given = pieces(fallback_tokenizer, token_ids)
    assert "".join(given) == fallback_tokenizer.decode(token_ids, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in given)


def test_byte_fallback_tokenizers_lose_nothing_of_broken_bytes(fallback_tokenizer: Tokenizer) -> None:
    after = token_id_of(fallback_tokenizer, "▁shoe")
    shown = "".join(pieces(fallback_tokenizer, [0xC3 + 2, 0xA9 + 2, 0xC3 + 2, after, after]))
    assert shown.startswith("é")
    assert shown.endswith(" shoe shoe")
