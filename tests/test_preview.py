"""Previews through the real server, the gateway and the command line: what is shown is what would be trained."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence

import httpx2
import pytest
from typer.testing import CliRunner

from gateway.app import create_app
from knowledge_engine.bases import Base, prepare_base
from knowledge_engine.cli import app
from knowledge_engine.client import Client
from knowledge_engine.core import BASE, DatasetKind, Message, PreviewedToken, Truncation
from knowledge_engine.errors import KnowledgeEngineError, Reason
from knowledge_engine.preview import MAX_ISSUES, preview_dataset, preview_row
from knowledge_engine.rows import Conversation, Preference
from knowledge_engine.server.app import start_server
from knowledge_engine.settings import Settings
from knowledge_engine.text import ChatText
from knowledge_engine.training.material import Pair, fit
from tests.test_templates import conversation, text_of

PRODUCT = b'{"id": "1", "title": "x", "price": 1, "currency": "EUR", "category": "y"}'
ROWS = [("Which shoe?", "The trail shoe 👟 at 89.95 EUR."), ("Größe?", "46 – ja."), ("Long?", "word " * 400)]


def content() -> bytes:
    lines = [
        json.dumps({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]})
        for asked, told in ROWS
    ]
    return "\n".join(lines).encode()


ERROR = Truncation.ERROR


def talk(*contents: str, system: str = "") -> Conversation:
    return Conversation(messages=tuple(conversation(*contents, system=system)))


def prepared(settings: Settings) -> Base:
    (settings.data_dir / "bases").mkdir(parents=True, exist_ok=True)
    return prepare_base(settings, BASE, lambda phase, fraction: None)


def test_tokens_joined_are_the_text_and_trained_ones_the_answer() -> None:
    text = text_of("chatml")
    row = preview_row(talk("Größe?", "46 – ja 👟."), 7, text, 100, ERROR)
    assert (row.row, row.problem) == (7, "")
    assert "".join(token.text for token in row.tokens) == row.text
    assert row.text == text.render(talk("Größe?", "46 – ja 👟.").messages, add_generation_prompt=False)
    assert "".join(token.text for token in row.tokens if token.is_trained) == "46 – ja 👟.<|im_end|>"
    assert {token.text for token in row.tokens if token.is_control} == {"<|im_start|>", "<|im_end|>"}
    quoted = preview_row(talk("<|im_end|>", "Yes."), 1, text, 100, ERROR)
    assert [token.text for token in quoted.tokens if token.is_control].count("<|im_end|>") == 2  # not the user's


def test_rows_that_a_training_refuses_are_named() -> None:
    text = text_of("gemma")
    talks = [talk("a", "b"), talk("a", "b", system="c"), talk("a"), talk("a", "word " * 90)]
    whole = preview_dataset(talks, text, 50, ERROR)
    assert (whole.num_rows, whole.num_issues) == (4, 3)
    assert [issue.row for issue in whole.issues] == [2, 3, 4]
    reasons = ("System role not supported", "no assistant turn", "more than max_length (50)")
    for issue, reason in zip(whole.issues, reasons, strict=True):
        assert reason in issue.problem
    assert preview_row(talks[1], 2, text, 50, ERROR).tokens == ()
    example = text.encode_example(talks[0].messages)
    assert (whole.lengths.min, whole.lengths.max) == (len(text.encode_example(talks[2].messages).input_ids),
                                                     len(text.encode_example(talks[3].messages).input_ids))  # fmt: skip
    assert whole.num_trained_tokens == sum(example.trained) + sum(text.encode_example(talks[3].messages).trained)
    assert whole.num_messages == {"user": 4, "assistant": 3, "system": 1}
    assert (whole.num_learned_messages, whole.num_changes) == (3, 0)
    assert sum(each.num_rows for each in whole.length_bins) == 3  # one cannot be rendered
    nothing = preview_dataset([], text, 50, ERROR)
    assert (nothing.lengths.mean, nothing.length_bins, nothing.num_messages) == (0, (), {})
    many = preview_dataset([talks[2]] * (MAX_ISSUES + 5), text, 50, ERROR)
    assert (many.num_issues, len(many.issues)) == (MAX_ISSUES + 5, MAX_ISSUES)


def test_what_truncation_does_and_what_says_the_same_is_named() -> None:
    text = text_of("chatml")
    long = "word " * 60
    talks = [
        talk("Is it in stock?", "Yes, all of them are in stock, and we deliver them tomorrow morning."),
        talk("a", long, "b", "c"),
        talk("Is it in stock?", "Yes, all of them are in stock and we deliver them tomorrow morning!"),
        talk("a", long),
    ]
    whole = preview_dataset(talks, text, 60, Truncation.KEEP_LAST_TURNS)
    assert (whole.num_issues, whole.num_changes) == (0, 2)
    assert [(change.row, change.problem.rpartition(": ")[2]) for change in whole.changes] == [
        (2, "its first 2 messages are left out"),
        (4, "dropped"),
    ]
    assert [tuple(pair) for pair in whole.near_duplicates] == [(3, 1)]
    shown = preview_row(talks[1], 2, text, 60, Truncation.KEEP_LAST_TURNS)
    assert shown.text == text.render(conversation("b", "c"), add_generation_prompt=False)
    assert shown.change == whole.changes[0].problem
    assert preview_row(talks[3], 4, text, 60, Truncation.DROP).tokens == ()
    bins = [(each.max_tokens, each.num_rows) for each in preview_dataset(talks, text, 1000, ERROR).length_bins]
    assert [at for at, _ in bins] == sorted(at for at, _ in bins)
    assert sum(number for _, number in bins) == 4


def preference(asked: str, chosen: str, rejected: str) -> dict[str, list[dict[str, str]]]:
    return {
        "prompt": [
            {"role": "user", "content": "Hello!"},
            {"role": "assistant", "content": "How can I help?"},
            {"role": "user", "content": asked},
        ],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def trained_text(tokens: Sequence[PreviewedToken]) -> str:
    return "".join(token.text for token in tokens if token.is_trained)


def test_a_preference_shows_both_answers_as_a_training_would_learn_them() -> None:
    text = text_of("chatml")
    rows = [
        Preference.from_row(preference("Which kettle?", "The blue one.", "No idea.")),
        Preference.from_row(preference("Which shoe?", "The red one.", "word " * 90)),
    ]
    shown = preview_row(rows[0], 1, text, 60, ERROR)
    assert shown.rejected is not None
    for side, tokens in ((shown.text, shown.tokens), (shown.rejected.text, shown.rejected.tokens)):
        assert "".join(token.text for token in tokens) == side
        assert "How can I help?" in side
    assert (trained_text(shown.tokens), trained_text(shown.rejected.tokens)) == (
        "The blue one.<|im_end|>",
        "No idea.<|im_end|>",
    )
    learned = fit(rows[:1], text, 60, ERROR, lambda item: item).items[0]
    assert isinstance(learned, Pair)
    for side, tokens in ((learned.chosen, shown.tokens), (learned.rejected, shown.rejected.tokens)):
        assert [token.id for token in tokens] == side.input_ids
        assert [token.is_trained for token in tokens] == side.trained

    whole = preview_dataset(rows, text, 60, ERROR)
    assert [(issue.row, "more than max_length (60)" in issue.problem) for issue in whole.issues] == [(2, True)]
    both = preview_row(rows[1], 2, text, 60, ERROR)
    assert both.rejected is not None
    sides = [shown.tokens, shown.rejected.tokens, both.tokens, both.rejected.tokens]
    assert whole.num_tokens == sum(map(len, sides))
    assert whole.num_trained_tokens == sum(token.is_trained for side in sides for token in side)
    assert (whole.lengths.min, whole.lengths.max) == (max(map(len, sides[:2])), len(both.rejected.tokens))
    assert (whole.num_messages, whole.num_learned_messages) == ({"user": 4, "assistant": 6}, 4)
    dropped = preview_row(rows[1], 2, text, 60, Truncation.DROP)
    assert (dropped.tokens, dropped.rejected, "dropped" in dropped.change) == ((), None, True)


@pytest.mark.parametrize("longer", ["chosen", "rejected"])
def test_truncation_leaves_both_answers_one_prompt(longer: str) -> None:
    text = text_of("chatml")
    answers = {"chosen": "The blue one.", "rejected": "No idea."}
    rows = [Preference.from_row(preference("Which kettle?", **answers | {longer: "word " * 10}))]
    (pair,) = fit(rows, text, 10_000, ERROR, lambda item: item).items
    assert isinstance(pair, Pair)
    lengths = sorted((len(pair.chosen.input_ids), len(pair.rejected.input_ids)))
    fitted = fit(rows, text, lengths[0], Truncation.KEEP_LAST_TURNS, lambda item: item)  # the shorter one would do
    (pair,) = fitted.items
    assert isinstance(pair, Pair)
    shown = preview_row(rows[0], 1, text, lengths[0], Truncation.KEEP_LAST_TURNS)
    assert fitted.changes == [f"row 1 {shown.change}"]
    assert shown.change.endswith("its first 2 messages are left out")
    assert shown.rejected is not None
    for side, learned in ((shown, pair.chosen), (shown.rejected, pair.rejected)):
        assert [token.id for token in side.tokens] == learned.input_ids
        assert side.text.startswith(text.render(rows[0].prompt[2:], add_generation_prompt=True))
    tight = fit(rows * 2, text, 10_000, Truncation.KEEP_LAST_TURNS, lambda item: item)
    assert (len(tight.items), tight.changes) == (2, [])
    with pytest.raises(KnowledgeEngineError) as nothing:
        fit(rows, text, 12, Truncation.KEEP_LAST_TURNS, lambda item: item)
    assert nothing.value.reason is Reason.NOTHING_TO_TRAIN


def test_a_preference_of_which_no_prompt_would_be_left_is_dropped() -> None:
    text = text_of("chatml")
    turns = [("assistant", "word " * 20), ("user", "And?"), ("assistant", "Yes.")]
    long = [{"role": role, "content": content} for role, content in turns]
    row = Preference.from_row(preference("Which kettle?", "Blue.", "No.") | {"rejected": long})
    short = Preference.from_row({"chosen": long[1:], "rejected": [*long[1:2], {"role": "assistant", "content": "No."}]})
    fitted = fit([row, short], text, 45, Truncation.KEEP_LAST_TURNS, lambda item: item)
    assert [isinstance(item, Pair) for item in fitted.items] == [False, True]
    (change,) = fitted.changes
    assert change.endswith(": dropped")
    with pytest.raises(KnowledgeEngineError) as nothing:
        fit([row], text, 45, Truncation.KEEP_LAST_TURNS, lambda item: item)
    assert nothing.value.reason is Reason.NOTHING_TO_TRAIN
    assert preview_row(row, 1, text, 45, Truncation.KEEP_LAST_TURNS).tokens == ()


async def test_a_preview_over_grpc_rest_and_the_command_line(make_settings: Callable[..., Settings]) -> None:
    settings = make_settings()
    base = await asyncio.to_thread(prepared, settings)
    text = ChatText.load(base)
    async with await start_server(settings) as server:
        with Client(server.address) as client:
            await asyncio.to_thread(client.upload_dataset, "talks", content(), kind=DatasetKind.CONVERSATIONS)
            rows, whole = await asyncio.to_thread(lambda: client.preview_dataset("talks", first_row=2, max_length=300))
            with pytest.raises(KnowledgeEngineError) as caught:
                await asyncio.to_thread(lambda: client.preview_dataset("talks", max_length=15))
            with pytest.raises(KnowledgeEngineError) as unknown:
                await asyncio.to_thread(lambda: client.preview_dataset("talks", base_model="other"))
            await asyncio.to_thread(
                client.upload_dataset, "shop", PRODUCT,
                kind=DatasetKind.CATALOGUE,
            )  # fmt: skip
            better = json.dumps(preference("Which kettle?", "The blue one.", "No idea.")).encode()
            await asyncio.to_thread(client.upload_dataset, "better", better, kind=DatasetKind.PREFERENCES)
            (pair,), _ = await asyncio.to_thread(lambda: client.preview_dataset("better"))
            with pytest.raises(KnowledgeEngineError) as wrong:
                await asyncio.to_thread(lambda: client.preview_dataset("shop"))
        assert (caught.value.reason, caught.value.violations[0].field) == (Reason.SPEC_INVALID, "max_length")
        assert unknown.value.reason is Reason.BASE_MODEL_UNKNOWN
        assert wrong.value.reason is Reason.DATASET_KIND_WRONG

        assert [row.row for row in rows] == [2, 3]
        messages = [Message(role="user", content="Größe?"), Message(role="assistant", content="46 – ja.")]
        example = text.encode_example(messages)
        assert [token.id for token in rows[0].tokens] == example.input_ids
        assert [token.is_trained for token in rows[0].tokens] == example.trained
        assert "more than max_length (300)" in rows[1].problem
        assert (whole.num_rows, [issue.row for issue in whole.issues]) == (3, [3])

        application = create_app(settings.model_copy(update={"grpc_address": server.address}))
        async with application.router.lifespan_context(application):
            transport = httpx2.ASGITransport(application)
            async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1:8001") as http:
                url = "/api/v1/datasets/talks/preview"
                page = (await http.get(url, params={"page_size": 2, "max_length": 300})).json()
                of_pair = (await http.get("/api/v1/datasets/better/preview")).json()["rows"][0]
                rest = (await http.get(url, params={"page_size": 2, "page_token": page["next_page_token"]})).json()
                bad = [
                    (await http.get(url, params=params)).status_code
                    for params in ({"page_size": 101}, {"page_token": "x"}, {"skip": -1}, {"max_length": 1}, {"x": 1})
                ]
        assert [row["row"] for row in page["rows"]] == [1, 2]
        assert ([row["row"] for row in rest["rows"]], rest["next_page_token"]) == ([3], "")
        assert page["rows"][1]["tokens"] == [token._asdict() for token in rows[0].tokens]
        assert page["dataset"]["lengths"]["max"] == whole.lengths.max
        assert page["chat_template_digest"] == text.template_digest
        assert all(status in {400, 422} for status in bad)
        assert page["rows"][0]["rejected"] is None
        assert pair.rejected is not None
        assert of_pair["rejected"] == {
            "text": pair.rejected.text,
            "tokens": [token._asdict() for token in pair.rejected.tokens],
            "num_trained_tokens": pair.rejected.num_trained_tokens,
        }
        assert trained_text(pair.rejected.tokens) == "No idea.<|im_end|>"

        shown = await asyncio.to_thread(run_cli, "data", "preview", "talks", "--rows", "1", "--server", server.address)
        assert "«The trail shoe 👟 at 89.95 EUR.<|im_end|>»" in shown
        told = json.loads(
            await asyncio.to_thread(run_cli, "data", "preview", "talks", "--row", "2", "--rows", "1", "--json",
                                    "--server", server.address)
        )  # fmt: skip
        assert told["rows"][0]["tokens"] == page["rows"][1]["tokens"]
        shown = await asyncio.to_thread(run_cli, "data", "preview", "better", "--server", server.address)
        assert "row 1, chosen" in shown
        assert "«The blue one.<|im_end|>»" in shown
        assert "row 1, rejected" in shown
        assert "«No idea.<|im_end|>»" in shown
        told = json.loads(
            await asyncio.to_thread(run_cli, "data", "preview", "better", "--json", "--server", server.address)
        )
        assert told["rows"][0]["rejected"]["tokens"] == of_pair["rejected"]["tokens"]


def run_cli(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.stdout
