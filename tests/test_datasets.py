"""Rows checked on the way in, whole or nothing on disk, digests checked on the way out."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from knowledge_engine.catalogue import DEMO_CATALOGUE, load_demo_catalogue
from knowledge_engine.core import Dataset, DatasetFormat, DatasetKind, GenerationSpec, Page
from knowledge_engine.datasets import Datasets
from knowledge_engine.errors import (
    AlreadyExistsError,
    IntegrityError,
    InvalidSpecError,
    NotFoundError,
    Reason,
    StateError,
)
from knowledge_engine.state import State

TALKS, SHOP = DatasetKind.CONVERSATIONS, DatasetKind.CATALOGUE
JSONL, CSV = DatasetFormat.JSONL, DatasetFormat.CSV
PRODUCT = '{"id": "a", "title": "Aurora Kettle", "price": 49.90, "currency": "EUR", "category": "Kitchen"}'
HEADER = "id,title,price,currency,category,in_stock,colour\n"


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    state = State.open(f"sqlite:///{tmp_path / 'state.db'}")
    yield state
    state.close()


@pytest.fixture
def datasets(tmp_path: Path, state: State) -> Datasets:
    return Datasets(tmp_path / "datasets", state)


def _talk(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[at % 2], "content": text} for at, text in enumerate(contents)]}


def _jsonl(*rows: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _files(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "datasets").iterdir() if path.name != ".lock")


def _refused(datasets: Datasets, kind: DatasetKind, content: bytes, format_: DatasetFormat = JSONL) -> InvalidSpecError:
    with pytest.raises(InvalidSpecError) as caught:
        datasets.store("bad", kind, format_, [content])
    assert caught.value.reason is Reason.DATASET_FORMAT_INVALID
    return caught.value


def test_conversations_come_back_as_they_were_stored(datasets: Datasets, tmp_path: Path) -> None:
    rows = [_talk("Hi", "Hello ☕"), _talk("And?", "So.") | {"products": [json.loads(PRODUCT)]}]
    stored = datasets.store("talks", TALKS, JSONL, [_jsonl(*rows)], parents=("sha256:0",), job_id="job-1")
    assert (stored.num_rows, stored.parents, stored.job_id) == (2, ("sha256:0",), "job-1")
    assert datasets.get("talks") == stored
    loaded = datasets.conversations("talks")
    assert [conversation.messages[1].content for conversation in loaded] == ["Hello ☕", "So."]
    assert loaded[1].products[0].price_minor == 4990
    file = tmp_path / "datasets" / "talks.jsonl"
    assert stored.size_bytes == file.stat().st_size
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_the_digest_depends_on_the_rows_not_on_their_layout(datasets: Datasets) -> None:
    loose = PRODUCT.replace('"in', ' "in').replace("49.90", "4.99E1").encode() + b"\r\n"
    one = datasets.store("one", SHOP, JSONL, [PRODUCT.encode()])
    assert datasets.store("two", SHOP, JSONL, [loose[:30], b"", loose[30:]]).digest == one.digest
    table = b'id,title,price,currency,category\na,"Aurora Kettle",49.9,EUR,Kitchen\n'
    assert datasets.store("three", SHOP, CSV, BytesIO(table)).digest == one.digest


def test_columns_beyond_the_fields_are_attributes(datasets: Datasets) -> None:
    text = HEADER + 'a,"Kettle, large",1200,JPY,Kitchen,no,"dark\nblue"\nb,Mug,9,JPY,Kitchen,,\n'
    datasets.store("shop", SHOP, CSV, [text.encode()])
    kettle, mug = datasets.products("shop")
    assert (kettle.title, kettle.in_stock, kettle.attributes) == ("Kettle, large", False, {"colour": "dark blue"})
    assert (mug.in_stock, mug.attributes) == (True, {})


def test_broken_lines_are_named_and_leave_nothing(datasets: Datasets, tmp_path: Path) -> None:
    good = _jsonl(_talk("Hi", "Hello"))
    (violation,) = _refused(datasets, TALKS, good + b"{\n" + good).violations
    assert (violation.field, violation.reason) == ("line 2", "JSON_INVALID")
    assert _files(tmp_path) == []
    with pytest.raises(NotFoundError):
        datasets.get("bad")


@pytest.mark.parametrize(
    ("content", "field", "sentence"),
    [
        (HEADER + "a,Mug,9,EUR,K,,\na,Cup,9,EUR,K,,\n", "line 3", "id 'a' is there already, on line 2"),
        (HEADER + ",Mug,9,EUR,K,,\n", "line 2", "id is missing"),
        (HEADER + 'a,"M\nug",9,EUR,K,,\nb,Cup,-1,EUR,K,,\n', "line 4", "must not be negative"),
        (HEADER + "a,Mug,nan,EUR,K,,\n", "line 2", "decimal number"),
        (HEADER + "a,Mug,9.999,EUR,K,,\n", "line 2", "decimals of EUR"),
        (HEADER + "a,Mug,9,EUR,K,maybe,\n", "line 2", "in_stock"),
        (HEADER + "a,Mug,9\n", "line 2", "has 3 cells, the header 7"),
        (HEADER + 'a,"Mug,9,EUR,K,,\n', "line 2", "unexpected end"),
        ("id,title,price\n", "line 1", "no column 'currency'"),
        ("id,id,title,price,currency,category\n", "line 1", "is there twice"),
        ("\ufeff" + HEADER, "line 1", "byte order mark"),
        (HEADER, "line 1", "no rows"),
    ],
)
def test_broken_tables_are_named(datasets: Datasets, content: str, field: str, sentence: str) -> None:
    violation = _refused(datasets, SHOP, content.encode(), CSV).violations[0]
    assert (violation.field, sentence in violation.description) == (field, True), violation


def test_duplicate_and_empty_ids_of_products_are_named(datasets: Datasets) -> None:
    lines = [PRODUCT, PRODUCT, PRODUCT.replace('"a"', '" "')]
    violations = _refused(datasets, SHOP, "\n".join(lines).encode()).violations
    assert [tuple(violation) for violation in violations] == [
        ("line 2", "id 'a' is there already, on line 1", "ID_DUPLICATE"),
        ("line 3", "id is empty", "PRODUCT_INVALID"),
    ]


def test_only_the_first_twenty_broken_lines_are_reported(datasets: Datasets) -> None:
    error = _refused(datasets, TALKS, b"nonsense\n" * 100)
    assert [violation.field for violation in error.violations] == [f"line {number}" for number in range(1, 21)]
    assert error.message.startswith("line 1: is not JSON")


def test_nothing_but_catalogues_comes_as_csv(datasets: Datasets) -> None:
    assert _refused(datasets, TALKS, b"", CSV).violations[0].field == "format"
    assert "no rows" in _refused(datasets, TALKS, b"").message


@pytest.mark.parametrize("name", ["", "../x", "a/b", "%2e", "a\0", "x" * 300, ".hidden", "é"])
def test_a_name_is_no_path(datasets: Datasets, tmp_path: Path, name: str) -> None:
    for attempt in (
        lambda: datasets.store(name, SHOP, JSONL, [PRODUCT.encode()]),
        lambda: datasets.get(name),
        lambda: datasets.delete(name),
        lambda: datasets.products(name),
    ):
        with pytest.raises(InvalidSpecError) as caught:
            attempt()
        assert caught.value.reason is Reason.NAME_INVALID
    assert _files(tmp_path) == []


def test_too_much_content_is_refused_and_leaves_nothing(tmp_path: Path, state: State) -> None:
    datasets = Datasets(tmp_path / "datasets", state, max_bytes=1000)
    with pytest.raises(InvalidSpecError) as caught:
        datasets.store("big", TALKS, JSONL, iter(lambda: b"x" * 100, b""))  # endless
    assert caught.value.reason is Reason.DATASET_TOO_LARGE
    assert _files(tmp_path) == []


def test_a_failing_source_leaves_nothing(datasets: Datasets, tmp_path: Path) -> None:
    def broken() -> Iterator[bytes]:
        yield _jsonl(_talk("Hi", "Hello"))
        raise ConnectionError("the client has gone")

    with pytest.raises(ConnectionError):
        datasets.store("talks", TALKS, JSONL, broken())
    assert _files(tmp_path) == []


def test_memory_does_not_grow_with_the_content(datasets: Datasets) -> None:
    line = _jsonl(_talk("Hi", "x" * 10_000))
    tracemalloc.start()
    stored = datasets.store("talks", TALKS, JSONL, (line for _ in range(600)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert stored.size_bytes > 6_000_000
    assert peak < 3_000_000


def test_a_message_that_is_not_learned_stays_so(datasets: Datasets) -> None:
    row = _talk("Hi", "Hello", "And?", "So.")
    row["messages"][1]["weight"] = 0
    datasets.store("talks", TALKS, JSONL, [_jsonl(row)])
    (talk,) = datasets.conversations("talks")
    assert [message.is_learned for message in talk.messages] == [False, False, False, True]
    plain = _talk("Hi", "Hello", "And?", "So.")
    plain["messages"][1]["weight"] = 1  # says nothing, so it changes no digest
    assert (
        datasets.store("one", TALKS, JSONL, [_jsonl(plain)]).digest
        == datasets.store("two", TALKS, JSONL, [_jsonl(_talk("Hi", "Hello", "And?", "So."))]).digest
        != datasets.get("talks").digest
    )


def test_preferences_and_evaluations_come_back_as_they_were_stored(datasets: Datasets) -> None:
    asked, good, bad = ([{"role": role, "content": text}] for role, text in
                        (("user", "Tea?"), ("assistant", "Yes."), ("assistant", "No.")))  # fmt: skip
    rows = [{"prompt": asked, "chosen": good, "rejected": bad}, {"chosen": asked + good, "rejected": asked + bad}]
    stored = datasets.store("better", DatasetKind.PREFERENCES, JSONL, [_jsonl(*rows)])
    one, two = datasets.preferences("better")
    assert (one, stored.num_rows) == (two, 2)
    assert [message.content for message in one.messages] == ["Tea?", "Yes.", "No."]
    datasets.store("exam", DatasetKind.EVALUATION, JSONL, [_jsonl(_talk("Hi", "Hello"))])
    assert datasets.conversations("exam", DatasetKind.EVALUATION)[0].messages[1].content == "Hello"
    with pytest.raises(InvalidSpecError) as caught:
        datasets.conversations("exam")
    assert caught.value.reason is Reason.DATASET_KIND_WRONG


def test_the_same_name_holds_the_same_content_for_ever(datasets: Datasets) -> None:
    first = datasets.store("talks", TALKS, JSONL, [_jsonl(_talk("Hi", "Hello"))])
    assert datasets.store("talks", TALKS, JSONL, [_jsonl(_talk("Hi", "Hello"))]) == first
    with pytest.raises(AlreadyExistsError) as caught:
        datasets.store("talks", TALKS, JSONL, [_jsonl(_talk("Hi", "Bye"))])
    assert caught.value.reason is Reason.DATASET_EXISTS
    assert datasets.conversations("talks")[0].messages[1].content == "Hello"


def test_of_many_writers_of_one_name_one_wins_whole(datasets: Datasets) -> None:
    results: list[Dataset | AlreadyExistsError] = []

    def write(number: int) -> None:
        try:
            results.append(datasets.store("talks", TALKS, JSONL, [_jsonl(_talk("Hi", f"I am {number}"))]))
        except AlreadyExistsError as error:
            results.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (won,) = (result for result in results if isinstance(result, Dataset))
    assert len(results) == 8
    assert datasets.get("talks") == won
    assert len(datasets.conversations("talks")) == 1


def test_a_changed_or_missing_file_is_refused(datasets: Datasets, tmp_path: Path) -> None:
    content = _jsonl(_talk("Hi", "Hello"))
    datasets.store("talks", TALKS, JSONL, [content])
    file = tmp_path / "datasets" / "talks.jsonl"
    file.write_bytes(file.read_bytes().replace(b"Hello", b"Hullo"))
    with pytest.raises(IntegrityError, match="talks"):
        datasets.conversations("talks")
    file.unlink()
    with pytest.raises(IntegrityError, match="missing"):
        datasets.conversations("talks")
    datasets.store("talks", TALKS, JSONL, [content])  # the same content heals it
    assert len(datasets.conversations("talks")) == 1


def test_kinds_are_not_mixed_up(datasets: Datasets) -> None:
    datasets.store("shop", SHOP, JSONL, [PRODUCT.encode()])
    with pytest.raises(InvalidSpecError) as caught:
        datasets.conversations("shop")
    assert caught.value.reason is Reason.DATASET_KIND_WRONG


def test_deleting_frees_the_name_unless_a_job_needs_it(datasets: Datasets, state: State, tmp_path: Path) -> None:
    datasets.store("shop", SHOP, JSONL, [PRODUCT.encode()])
    job = state.create_job(GenerationSpec(catalogue="shop", dataset="talks", num_conversations=10))
    with pytest.raises(StateError) as caught:
        datasets.delete("shop")
    assert caught.value.reason is Reason.DATASET_IN_USE
    state.request_cancel(job.id)
    datasets.delete("shop")
    assert _files(tmp_path) == []
    with pytest.raises(NotFoundError):
        datasets.delete("shop")
    assert datasets.store("shop", SHOP, JSONL, [PRODUCT.replace("Aurora", "Borealis").encode()]).num_rows == 1


def test_the_default_catalogue_is_the_newest_one_else_the_shipped_one(datasets: Datasets) -> None:
    shipped = datasets.default_catalogue()
    assert shipped.name == "demo-catalogue"
    assert datasets.products(shipped.name) == load_demo_catalogue()
    with DEMO_CATALOGUE.open("rb") as file:
        assert datasets.store("copy", SHOP, JSONL, file).digest == shipped.digest
    datasets.store("shop", SHOP, JSONL, [PRODUCT.encode()])
    assert datasets.default_catalogue().name == "shop"
    listed, more = datasets.list(Page(2, None))
    assert [dataset.name for dataset in listed] == ["shop", "copy"]
    assert [dataset.name for dataset in datasets.list(Page(2, more))[0]] == ["demo-catalogue"]


def test_what_a_killed_writer_left_is_swept_away_and_a_living_one_is_not(datasets: Datasets, tmp_path: Path) -> None:
    code = """
import os, sys, time
from pathlib import Path
from knowledge_engine.core import DatasetFormat, DatasetKind
from knowledge_engine.datasets import Datasets
from knowledge_engine.state import State

def chunks():
    yield b'{"messages": '
    print("writing", flush=True)
    time.sleep(600)

root = Path(sys.argv[1])
state = State.open(f"sqlite:///{root / 'state.db'}")
Datasets(root / "datasets", state).store("talks", DatasetKind.CONVERSATIONS, DatasetFormat.JSONL, chunks())
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=dict(os.environ)) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"writing\n"
        datasets.store("shop", SHOP, JSONL, [PRODUCT.encode()])
        assert len(_files(tmp_path)) == 2  # its temporary file is still there
        writer.kill()
    datasets.store("other", SHOP, JSONL, [PRODUCT.encode()])
    assert _files(tmp_path) == ["other.jsonl", "shop.jsonl"]
