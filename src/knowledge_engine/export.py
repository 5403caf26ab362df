"""A version merged into its base: one folder that any program for safetensors models loads, without PEFT.

What is written is read back and compared with base and adapter on whole conversations, number by number, before the
folder takes its name. Runs where the data directory is, and loads torch.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from knowledge_engine import modeling
from knowledge_engine.bases import Base, prepare_base
from knowledge_engine.core import Message
from knowledge_engine.errors import AlreadyExistsError, IntegrityError, KnowledgeEngineError, Reason
from knowledge_engine.files import sync
from knowledge_engine.manifest import EXPORT_FACTS
from knowledge_engine.registry import Registry
from knowledge_engine.settings import Settings, load_settings
from knowledge_engine.text import ChatText

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
_ALLOWED = {modeling.FLOAT32: 1e-3, modeling.BFLOAT16: 6e-2}
"""Largest difference of a log-probability, in nats: sums in another order, in 24 and 8 bits."""
_PROMPTS = (
    ("Which of these is the cheapest?", "The Field Kettle at 39.90 EUR is the cheapest one in stock."),
    ("Hi! I need a tent for two, below 200 EUR.", "Take the Ridge Tent by Norvik: 189.00 EUR, in stock, 1.9 kg."),
    ("Is the blue one in stock?", "Sorry, the blue one is out of stock. The green one is there, for the same price."),
    ("Was kostet die Lampe?", "Die Lampe kostet 24,50 EUR und ist auf Lager."),
)


@dataclass(frozen=True)
class Export:
    """A written model. `max_difference` is the largest of a log-probability from base and adapter, in nats, over
    `num_tokens` tokens of the golden conversations; `num_same` of these have the same likeliest next token."""

    folder: Path
    precision: str
    size_bytes: int
    num_tokens: int
    num_same: int
    max_difference: float


def export_version(
    settings: Settings, model: str, version: int, folder: Path, tell: Callable[[str], None] = lambda phase: None
) -> Export:
    """Merges a version in the serving precision and writes it to `folder`, which must not be there.

    Raises:
        NotFoundError: MODEL_NOT_FOUND, MODEL_VERSION_NOT_FOUND.
        AlreadyExistsError: EXPORT_EXISTS.
        IntegrityError: MODEL_VERSION_CORRUPT; EXPORT_DIFFERS, what was written does not answer as the version does, and
            is gone again.
    """
    if folder.exists():
        raise AlreadyExistsError(f"{folder} is there already", reason=Reason.EXPORT_EXISTS, folder=str(folder))
    registry = Registry.open(settings)
    known = registry.get(model, version)
    registry.verify(model, version)
    tell("preparing the base")
    base = prepare_base(settings, known.base_model, lambda phase, fraction: None)
    if base.digest != known.base_digest:
        raise IntegrityError(
            f"{model}:{version} was trained on another base than {base.name!r} is now",
            reason=Reason.BASE_MODEL_CORRUPT,
            base_model=base.name,
        )
    device = modeling.default_device()
    precision = modeling.float_precision(device)
    text = ChatText.load(base)
    tell("merging")
    tuned = modeling.add_adapter(
        modeling.load_base(base, precision, device), registry.folder(model, version), "exported"
    )
    modeling.select_adapter(tuned, "exported")
    golden = [(ids, _scores(tuned, ids, device)) for ids in _golden(text)]
    merged = modeling.merge_adapter(tuned)
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Under a name of its own: another export of the same version may be at work.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.", ignore_cleanup_errors=True) as own:
        partial = Path(own)
        tell("writing")
        merged.save_pretrained(str(partial), safe_serialization=True)
        del tuned, merged
        gc.collect()
        _copy_texts(base, registry.folder(model, version), partial)
        tell("checking what was written")
        export = _checked(partial, folder, golden, precision, device)
        facts = {"version": f"{model}:{version}", "version_digest": known.digest}
        facts |= {"base_source": known.base_source, "base_digest": known.base_digest}
        checked = asdict(export)
        del checked["folder"]  # it may be moved
        (partial / EXPORT_FACTS).write_text(json.dumps(facts | checked, indent=2) + "\n", encoding="utf-8")
        for path in partial.iterdir():
            sync(path)
        partial.rename(folder)
        sync(folder.parent)
    return export


def _golden(text: ChatText) -> list[list[int]]:
    """Whole conversations as tokens."""
    return [
        text.encode_example([Message(role="user", content=asked), Message(role="assistant", content=told)]).input_ids
        for asked, told in _PROMPTS
    ]


@torch.no_grad()
def _scores(model: modeling.PreTrainedModel | modeling.PeftModel, ids: list[int], device: str) -> torch.Tensor:
    """Log-probabilities (T, V) after every token."""
    logits: torch.Tensor = model(input_ids=torch.tensor([ids], device=device)).logits[0]
    return logits.float().log_softmax(-1).cpu()


def _checked(
    partial: Path, folder: Path, golden: list[tuple[list[int], torch.Tensor]], precision: str, device: str
) -> Export:
    """Reads back what was written, as anybody would. `golden` are tokens with their scores from base and adapter."""
    dtype = {modeling.FLOAT32: torch.float32, modeling.BFLOAT16: torch.bfloat16}[precision]
    written: Any = AutoModelForCausalLM.from_pretrained(
        partial, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    written.to(device)
    difference, num_tokens, num_same = 0.0, 0, 0
    for ids, expected in golden:
        found = _scores(written, ids, device)
        # Where neither gives a token any chance, the logarithm says nothing.
        likely = torch.maximum(expected, found) > -20
        difference = max(difference, float((expected - found).abs()[likely].max()))
        num_same += int((expected.argmax(-1) == found.argmax(-1)).sum())
        num_tokens += len(ids)
    if not difference <= _ALLOWED[precision]:
        raise IntegrityError(
            f"the merged model differs from base and adapter by up to {difference:.2g} nats, more than "
            f"{_ALLOWED[precision]:g}",
            reason=Reason.EXPORT_DIFFERS,
            difference=difference,
        )
    size = sum(path.stat().st_size for path in partial.iterdir())
    return Export(folder, precision, size, num_tokens, num_same, difference)


def _copy_texts(base: Base, version: Path, folder: Path) -> None:
    for name in _TOKENIZER_FILES:
        if (base.folder / name).is_file():
            shutil.copyfile(base.folder / name, folder / name)
    shutil.copyfile(version / "chat_template.jinja", folder / "chat_template.jinja")


def main() -> None:
    """`python -m knowledge_engine.export MODEL VERSION FOLDER`, the server's child: an error goes to stdout as JSON."""
    model, version, folder = sys.argv[1:]
    os.umask(0o077)
    try:
        export_version(load_settings(env_file=None), model, int(version), Path(folder))
    except KnowledgeEngineError as error:
        print(json.dumps(error.to_dict()))  # noqa: T201 - whoever started this reads it
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
