"""Base models on this machine: which there are, where each lies, and its digest. No torch.

A base is used only once it is prepared: `<data_dir>/bases/<name>/base.json`, written last, records the digest of every
file. The bundled base is written into that folder; a folder of the operator's is used where it is, and only recorded.
Knows nothing of how weights are loaded.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knowledge_engine.core import BASE
from knowledge_engine.errors import (
    IntegrityError,
    InvalidSpecError,
    KnowledgeEngineError,
    Reason,
    UpstreamError,
    Violation,
)
from knowledge_engine.files import read_json, sha256_of
from knowledge_engine.settings import Settings, load_settings

Report = Callable[[str, float], None]
"""Is told the phase of a preparation and how far that is, 0 to 1."""

DEFAULT_MAX_LENGTH = 2048
RECORD = "base.json"
_BUNDLED = "bundled"
_FORMAT = 1  # raised when a prepared folder of an older release must be made anew
_OPTIONAL_FILES = ("generation_config.json", "tokenizer_config.json", "chat_template.jinja")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions")


@dataclass(frozen=True)
class Base:
    """A prepared base. `source` is the name it goes by elsewhere, never a path; `digest` stands for all its files."""

    name: str
    folder: Path
    digest: str
    context_length: int
    architecture: str
    source: str
    size_bytes: int

    def max_length(self, asked: int | None) -> int:
        """Tokens that a training conversation may have: what was asked for, else the smaller of the default and the
        context.

        Raises:
            InvalidSpecError: SPEC_INVALID, more was asked for than the context holds.
        """
        if asked is None:
            return min(DEFAULT_MAX_LENGTH, self.context_length)
        if asked > self.context_length:
            description = f"is above the context of the base model, {self.context_length} tokens"
            raise InvalidSpecError(
                f"max_length {asked} {description}",
                violations=[Violation("spec.max_length", description)],
                context_length=self.context_length,
            )
        return asked


def base_names(settings: Settings) -> list[str]:
    """The names a request may use as `base_model`."""
    return [BASE, *settings.base_models]


def check_bases(settings: Settings) -> None:
    """Refuses at start what could never be prepared.

    Raises:
        InvalidSpecError: SETTINGS_INVALID, a base model is no local folder or lacks a file.
    """
    for name in base_names(settings):
        origin = _origin(settings, name)
        if origin != _BUNDLED:
            _model_files(Path(origin), _setting(name))


def get_base(settings: Settings, name: str = BASE) -> Base:
    """The prepared base `name`; costs a few file system calls.

    Raises:
        InvalidSpecError: BASE_MODEL_UNKNOWN; SETTINGS_INVALID, see `check_bases`.
        UpstreamError: BASE_MODEL_LOADING, it is not prepared yet.
        IntegrityError: BASE_MODEL_CORRUPT, a file changed since it was.
    """
    origin = _origin(settings, name)
    record = _read_record(settings, name)
    if record is None or record["origin"] != origin:
        raise UpstreamError(
            f"the base model {name!r} is being prepared",
            reason=Reason.BASE_MODEL_LOADING,
            retry_after_seconds=5,
            base_model=name,
        )
    folder = _folder(settings, name, origin)
    for file, facts in record["files"].items():
        if _stat(folder / file) != facts["stat"]:
            raise IntegrityError(
                f"{file} of the base model {name!r} changed since it was prepared; restart the service to take it anew",
                reason=Reason.BASE_MODEL_CORRUPT,
                base_model=name,
                file=file,
            )
    return Base(
        name=name,
        folder=folder,
        digest=record["digest"],
        context_length=record["context_length"],
        architecture=record["architecture"],
        source=record["source"],
        size_bytes=record["size_bytes"],
    )


def prepare_base(settings: Settings, name: str, report: Report) -> Base:
    """Makes the base usable if it is not yet, under a lock, so that several processes may ask at once.

    Raises:
        InvalidSpecError: BASE_MODEL_UNKNOWN; SETTINGS_INVALID, see `check_bases`.
        IntegrityError: BASE_MODEL_CORRUPT, the bundled model's own package is damaged.
    """
    origin = _origin(settings, name)
    with _locked(settings, name):
        try:
            base = get_base(settings, name)
        except (UpstreamError, IntegrityError):
            if origin == _BUNDLED:
                _prepare_bundled(settings, name, report)
            else:
                _record_folder(settings, name, Path(origin), report)
            base = get_base(settings, name)
    report("ready", 1.0)
    return base


def _prepare_bundled(settings: Settings, name: str, report: Report) -> None:
    from knowledge_engine.bundled import SOURCE, write_bundled_base  # gguf takes half a second to import

    target = _home(settings, name)
    partial = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".partial", dir=target.parent))
    try:
        write_bundled_base(partial, report)
        _write_record(partial, partial, name=name, origin=_BUNDLED, source=SOURCE, report=report)
        if target.exists():  # damaged, or of another source
            shutil.rmtree(target)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _record_folder(settings: Settings, name: str, folder: Path, report: Report) -> None:
    _model_files(folder, _setting(name))
    home = _home(settings, name)
    if home.exists():
        shutil.rmtree(home)
    home.mkdir()
    _write_record(home, folder, name=name, origin=str(folder), source=_source_name(folder), report=report)


def _write_record(home: Path, folder: Path, *, name: str, origin: str, source: str, report: Report) -> None:
    files = _model_files(folder, _setting(name))
    total = sum(path.stat().st_size for path in files)
    done = 0
    facts: dict[str, Any] = {}
    for path in files:
        report("checking", done / total)
        facts[path.name] = {"sha256": sha256_of(path), "stat": _stat(path)}
        done += path.stat().st_size
    config = json.loads((folder / "config.json").read_bytes())
    contents = json.dumps({file: fact["sha256"] for file, fact in sorted(facts.items())})
    record = {
        "format": _FORMAT,
        "name": name,
        "origin": origin,
        "source": source,
        "digest": f"sha256:{hashlib.sha256(contents.encode()).hexdigest()}",
        "context_length": next(int(config[key]) for key in _CONTEXT_KEYS if key in config),
        "architecture": config["model_type"],
        "size_bytes": total,
        "files": facts,
    }
    temporary = home / f".{RECORD}"
    temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    temporary.rename(home / RECORD)


def _model_files(folder: Path, setting: str) -> list[Path]:
    """What makes up the model in `folder`, by name. Raises InvalidSpecError: SETTINGS_INVALID."""

    def refuse(problem: str) -> InvalidSpecError:
        return InvalidSpecError(f"{setting}: {problem}", reason=Reason.SETTINGS_INVALID, setting=setting)

    if not folder.is_absolute() or not folder.is_dir():
        raise refuse(
            f"{str(folder)!r} is no folder on this machine; write the absolute path of a model folder with "
            "config.json, safetensors weights, tokenizer.json and a chat template (hub names are not understood in "
            "this release)"
        )
    weights = sorted(folder.glob("*.safetensors"))
    needed = [folder / "config.json", folder / "tokenizer.json"]
    missing = [path.name for path in needed if not path.is_file()]
    if missing or not weights:
        raise refuse(f"{folder} lacks {', '.join(missing or ['*.safetensors'])}")
    config = read_json(folder / "config.json")
    if "model_type" not in config or not any(isinstance(config.get(key), int) for key in _CONTEXT_KEYS):
        raise refuse(f"{folder / 'config.json'} names no model_type, or none of {', '.join(_CONTEXT_KEYS)}")
    if not (folder / "chat_template.jinja").is_file() and not read_json(folder / "tokenizer_config.json").get(
        "chat_template"
    ):
        raise refuse(f"{folder} has no chat template: neither chat_template.jinja nor one in tokenizer_config.json")
    optional = [folder / file for file in (*_OPTIONAL_FILES, "model.safetensors.index.json")]
    return sorted([*needed, *weights, *(path for path in optional if path.is_file())])


def _origin(settings: Settings, name: str) -> str:
    if name == BASE:
        return settings.base_model or _BUNDLED
    if name in settings.base_models:
        return settings.base_models[name]
    raise InvalidSpecError(
        f"unknown base model {name!r}; this deployment has {', '.join(base_names(settings))}",
        reason=Reason.BASE_MODEL_UNKNOWN,
        base_model=name,
    )


def _setting(name: str) -> str:
    return "KNOWLEDGE_BASE_MODEL" if name == BASE else "KNOWLEDGE_BASE_MODELS"


def _source_name(folder: Path) -> str:
    """The name on the hub where the config tells one, else the folder's own; a path would say nothing elsewhere."""
    name = read_json(folder / "config.json").get("_name_or_path")
    return name if isinstance(name, str) and _HUB_NAME.fullmatch(name) else folder.name


def _folder(settings: Settings, name: str, origin: str) -> Path:
    return _home(settings, name) if origin == _BUNDLED else Path(origin)


def _home(settings: Settings, name: str) -> Path:
    return settings.data_dir / "bases" / name


def _read_record(settings: Settings, name: str) -> dict[str, Any] | None:
    record = read_json(_home(settings, name) / RECORD)
    return record if record.get("format") == _FORMAT else None


def _stat(path: Path) -> list[int] | None:
    """Size and time of change: enough to notice a file that was replaced, without reading it."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


@contextmanager
def _locked(settings: Settings, name: str) -> Iterator[None]:
    folder = settings.data_dir / "bases"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{name}.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def main(arguments: list[str]) -> int:
    """`python -m knowledge_engine.bases NAME`: prepares a base, one JSON line of progress at a time on stdout."""

    last = ("", -1)

    def report(phase: str, fraction: float) -> None:
        nonlocal last
        now = (phase, int(fraction * 100))
        if now != last:
            last = now
            sys.stdout.write(json.dumps({"phase": phase, "fraction": round(fraction, 4)}) + "\n")
            sys.stdout.flush()

    try:
        (name,) = arguments or [BASE]
        prepare_base(load_settings(), name, report)
    except KnowledgeEngineError as error:
        sys.stderr.write(f"{error.reason}: {error.message}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
