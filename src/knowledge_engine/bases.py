"""Base models on this machine: which there are, where each lies, and its digest. No torch.

A base is used only once it is prepared: `<data_dir>/bases/<name>/base.json`, written last, records the digest of every
file. The bundled base and those of the hub are written into that folder, by way of `.<name>.partial` beside it, which
keeps a cut download; a folder of the operator's is used where it is, and only recorded. A base of the hub stays at the
commit that its revision first meant, until the setting changes. Knows nothing of how weights are loaded.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import json
import logging
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from knowledge_engine import hub
from knowledge_engine.core import BASE
from knowledge_engine.errors import (
    IntegrityError,
    InvalidSpecError,
    KnowledgeEngineError,
    NotFoundError,
    Reason,
    UpstreamError,
    Violation,
)
from knowledge_engine.files import read_json, sha256_of, sync
from knowledge_engine.hub import HubId, Report
from knowledge_engine.settings import Settings, load_settings

DEFAULT_MAX_LENGTH = 2048
RECORD = "base.json"
_BUNDLED = "bundled"
_FORMAT = 1  # raised when a prepared folder of an older release must be made anew
_OPTIONAL_FILES = ("generation_config.json", "tokenizer_config.json", "chat_template.jinja")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions")
_LOCK_SECONDS = 0.2

# Ours. Llama-2-7b is a plain base model without a template, so it gets the prompt format that Meta published for its
# chat siblings (github.com/meta-llama/llama, llama/generation.py, chat_completion), the refusal of its tags included.
LLAMA_2_TEMPLATE = """\
{%- set state = namespace(system='', turn='user') -%}
{%- for message in messages -%}
{%- for tag in ['[INST]', '[/INST]', '<<SYS>>', '<</SYS>>'] if tag in message['content'] -%}
{{ raise_exception('a message holds ' ~ tag ~ ', which this prompt format reserves') }}
{%- endfor -%}
{%- if message['role'] == 'system' and loop.first -%}
{%- set state.system = '<<SYS>>\\n' ~ message['content'] ~ '\\n<</SYS>>\\n\\n' -%}
{%- elif message['role'] != state.turn -%}
{{ raise_exception('after an optional system message, user and assistant must take turns') }}
{%- elif message['role'] == 'user' -%}
{{ bos_token ~ '[INST] ' ~ (state.system ~ message['content']) | trim ~ ' [/INST]' }}
{%- set state.system = '' -%}
{%- set state.turn = 'assistant' -%}
{%- else -%}
{{ ' ' ~ message['content'] | trim ~ ' ' ~ eos_token }}
{%- set state.turn = 'user' -%}
{%- endif -%}
{%- endfor -%}
"""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Base:
    """A prepared base. `source` is the name it goes by elsewhere, never a path; `digest` stands for all its files;
    `revision` is the commit of one from the hub."""

    name: str
    folder: Path
    digest: str
    context_length: int
    architecture: str
    source: str
    size_bytes: int
    revision: str = ""

    def max_length(self, asked: int | None, field: str = "spec.max_length") -> int:
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
                violations=[Violation(field, description)],
                context_length=self.context_length,
            )
        return asked


def base_names(settings: Settings) -> list[str]:
    """The names a request may use as `base_model`."""
    return [BASE, *settings.base_models]


def check_bases(settings: Settings) -> None:
    """Refuses at start what could never be prepared, without asking the hub.

    Raises:
        InvalidSpecError: SETTINGS_INVALID, a base model is neither a hub id nor a local folder, or lacks a file.
    """
    for name in base_names(settings):
        origin = _origin(settings, name)
        _LOG.info("base model %r: %s", name, describe_origin(settings, name))
        if isinstance(origin, Path):
            _model_files(origin, _refuse_folder(name, origin))


def describe_origin(settings: Settings, name: str = BASE) -> str:
    """Where the base comes from, and for a default why from there; names no path, as clients may see it."""
    origin = _origin(settings, name)
    source = f"the folder {origin.name}" if isinstance(origin, Path) else str(origin)
    if name == BASE and settings.base_model is None:
        return f"{source}, as {hub.choose_default(settings)[1]}"
    return f"{source}, as {_setting(name)} says"


def get_base(settings: Settings, name: str = BASE) -> Base:
    """The prepared base `name`; costs a few file system calls.

    Raises:
        InvalidSpecError: BASE_MODEL_UNKNOWN; SETTINGS_INVALID, see `check_bases`.
        UpstreamError: BASE_MODEL_LOADING, it is not prepared yet.
        IntegrityError: BASE_MODEL_CORRUPT, a file changed since it was.
    """
    origin = _origin(settings, name)
    record = _read_record(settings, name)
    if record is None or record["origin"] != str(origin):
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
        revision=record.get("revision", ""),
    )


def prepare_base(settings: Settings, name: str, report: Report) -> Base:
    """Makes the base usable if it is not yet, under a lock, so that several processes may ask at once.

    What `report` raises ends it; a download goes on from there the next time. A base that is ready costs no request.

    Raises:
        InvalidSpecError: BASE_MODEL_UNKNOWN; SETTINGS_INVALID, see `check_bases`; BASE_MODEL_UNSUPPORTED.
        IntegrityError: BASE_MODEL_CORRUPT, the bundled model's own package is damaged, or what the hub sends.
        CapacityError: DISK_FULL.
        UpstreamError, NotFoundError, CredentialsError: see `hub.find_snapshot`.
    """
    origin = _origin(settings, name)
    with _locked(settings, name, report):
        try:
            base = get_base(settings, name)
        except (UpstreamError, IntegrityError) as error:
            if isinstance(error, UpstreamError) or not _was_only_moved(settings, name, origin, report):
                _LOG.info("preparing the base model %r: %s", name, describe_origin(settings, name))
                _prepare(settings, name, origin, report)
            base = get_base(settings, name)
    report("ready", 1.0)
    return base


def _was_only_moved(settings: Settings, name: str, origin: Origin, report: Report) -> bool:
    """Whether all bytes are as recorded although files look changed: a copy or an image layer has other times.

    Then the record is set right.
    """
    record, folder = read_json(_home(settings, name) / RECORD), _folder(settings, name, origin)
    for done, (file, facts) in enumerate(record["files"].items()):
        report("checking", done / len(record["files"]))
        path = folder / file
        if not path.is_file() or path.stat().st_size != facts["stat"][0] or sha256_of(path) != facts["sha256"]:
            return False
        facts["stat"] = _stat(path)
    _save_record(_home(settings, name), record)
    return True


def _prepare(settings: Settings, name: str, origin: Origin, report: Report) -> None:
    if isinstance(origin, Path):
        shutil.rmtree(_partial(settings, name), ignore_errors=True)
        _record_folder(settings, name, origin, report)
    elif isinstance(origin, HubId):
        _prepare_from_hub(settings, name, origin, report)
    else:
        _prepare_bundled(settings, name, report)


def _prepare_bundled(settings: Settings, name: str, report: Report) -> None:
    from knowledge_engine.bundled import SOURCE, write_bundled_base  # gguf takes half a second to import

    partial = _partial(settings, name)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(mode=0o700)
    try:
        write_bundled_base(partial, report)
        record = _record(partial, _model_files(partial, _refuse_folder(name, partial)), report)
        _save_record(partial, record | {"name": name, "origin": _BUNDLED, "source": SOURCE})
        _move_into_place(settings, name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _record_folder(settings: Settings, name: str, folder: Path, report: Report) -> None:
    files = _model_files(folder, _refuse_folder(name, folder))
    record = _record(folder, files, report) | {"name": name, "origin": str(folder), "source": _source_name(folder)}
    home = _home(settings, name)
    if home.exists():
        shutil.rmtree(home)
    home.mkdir()
    _save_record(home, record)


def _prepare_from_hub(settings: Settings, name: str, hub_id: HubId, report: Report) -> None:
    partial = _partial(settings, name)
    snapshot = _find_snapshot(settings, name, hub_id, report)
    pinned = {"format": _FORMAT, "name": name, "origin": str(hub_id), "revision": snapshot.commit}
    if not (partial / RECORD).is_file():
        partial.mkdir(mode=0o700, exist_ok=True)
        _save_record(partial, pinned)  # a download that is cut goes on at this commit, wherever the branch is by then

    def refuse(problem: str) -> InvalidSpecError:
        message = f"{_setting(name)}: {hub_id.repository} on the hub {problem}"
        return InvalidSpecError(message, reason=Reason.BASE_MODEL_UNSUPPORTED, repository=hub_id.repository)

    digests = hub.fetch(settings, snapshot, hub.text_files(snapshot), partial, lambda phase, _: report(phase, 0.0))
    is_ours = _add_template(partial, hub_id)
    _check_texts(partial, refuse)
    _check_known_to_transformers(partial, refuse)
    digests |= hub.fetch(settings, snapshot, hub.weight_files(snapshot, partial), partial, report)
    record = _record(partial, _model_files(partial, refuse), report, digests)
    template = "home-made" if is_ours else "repository"
    _save_record(partial, record | pinned | {"source": hub_id.repository, "chat_template": template})
    _move_into_place(settings, name)


def _find_snapshot(settings: Settings, name: str, hub_id: HubId, report: Report) -> hub.Snapshot:
    """What is to be fetched: the commit that was settled on before, if any, else what the revision means now."""
    partial, home = _partial(settings, name), _home(settings, name)
    if read_json(home / RECORD).get("origin") == str(hub_id):  # damaged: what is right of it is kept
        shutil.rmtree(partial, ignore_errors=True)
        home.rename(partial)
    begun = read_json(partial / RECORD)
    if begun.get("origin") != str(hub_id):
        shutil.rmtree(partial, ignore_errors=True)
        return hub.find_snapshot(settings, hub_id, report)
    try:
        return hub.find_snapshot(settings, HubId(hub_id.repository, begun["revision"]), report)
    except NotFoundError:
        if "digest" in begun:  # it was complete once: another commit would be another model
            raise
        _LOG.warning("%s has lost the commit that was being fetched; starting over", hub_id.repository)
        shutil.rmtree(partial)
        return hub.find_snapshot(settings, hub_id, report)


def _add_template(folder: Path, hub_id: HubId) -> bool:
    """Gives the default model, which comes without one, our chat template; whether the folder has ours."""
    path = folder / "chat_template.jinja"
    if hub_id.repository == hub.DEFAULT.repository and not _has_template(folder):
        path.write_text(LLAMA_2_TEMPLATE, encoding="utf-8")
    return path.is_file() and path.read_text(encoding="utf-8") == LLAMA_2_TEMPLATE


def _move_into_place(settings: Settings, name: str) -> None:
    home = _home(settings, name)
    if home.exists():  # damaged, or of another source
        shutil.rmtree(home)
    _partial(settings, name).rename(home)
    sync(home.parent)


def _record(
    folder: Path, files: list[Path], report: Report, digests: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The facts of a model's files; `digests` are those that are known already, sha256 by name."""
    total = sum(path.stat().st_size for path in files)
    done = 0
    facts: dict[str, Any] = {}
    for path in files:
        report("checking", done / total)
        facts[path.name] = {"sha256": (digests or {}).get(path.name) or sha256_of(path), "stat": _stat(path)}
        done += path.stat().st_size
    config = json.loads((folder / "config.json").read_bytes())
    contents = json.dumps({file: fact["sha256"] for file, fact in sorted(facts.items())})
    return {
        "format": _FORMAT,
        "digest": f"sha256:{hashlib.sha256(contents.encode()).hexdigest()}",
        "context_length": next(int(config[key]) for key in _CONTEXT_KEYS if key in config),
        "architecture": config["model_type"],
        "size_bytes": total,
        "files": facts,
    }


def _save_record(home: Path, record: dict[str, Any]) -> None:
    temporary = home / f".{RECORD}"
    temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    sync(temporary)
    temporary.rename(home / RECORD)


# --- what makes a model -------------------------------------------------------------------------------------------

_Refuse = Callable[[str], InvalidSpecError]
"""Makes the error of a problem that completes the sentence `X ...`."""


def _refuse_folder(name: str, folder: Path) -> _Refuse:
    def refuse(problem: str) -> InvalidSpecError:
        setting = _setting(name)
        return InvalidSpecError(f"{setting}: {folder} {problem}", reason=Reason.SETTINGS_INVALID, setting=setting)

    return refuse


def _model_files(folder: Path, refuse: _Refuse) -> list[Path]:
    """What makes up the model in `folder`, by name. Raises InvalidSpecError."""
    if not folder.is_dir():
        raise refuse("is no folder on this machine")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise refuse("lacks *.safetensors")
    _check_texts(folder, refuse)
    needed = [folder / "config.json", folder / "tokenizer.json"]
    optional = [folder / file for file in (*_OPTIONAL_FILES, "model.safetensors.index.json")]
    return sorted([*needed, *weights, *(path for path in optional if path.is_file())])


def _check_texts(folder: Path, refuse: _Refuse) -> None:
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    if missing:
        raise refuse(f"lacks {', '.join(missing)}")
    config = read_json(folder / "config.json")
    if "model_type" not in config or not any(isinstance(config.get(key), int) for key in _CONTEXT_KEYS):
        raise refuse(f"has a config.json that names no model_type, or none of {', '.join(_CONTEXT_KEYS)}")
    if not _has_template(folder):
        raise refuse(
            "has no chat template, neither chat_template.jinja nor one in tokenizer_config.json; take a model that was "
            "made for conversations, which often has -Instruct or -Chat in its name"
        )


def _has_template(folder: Path) -> bool:
    return (folder / "chat_template.jinja").is_file() or bool(
        read_json(folder / "tokenizer_config.json").get("chat_template")
    )


def _check_known_to_transformers(folder: Path, refuse: _Refuse) -> None:
    """Refuses a model whose code is not in transformers, before its weights are fetched; code of a repository is never
    run."""
    kind, known = read_json(folder / "config.json")["model_type"], _known_model_types()
    if known and kind not in known:
        raise refuse(
            f"is of the type {kind!r}, which this release of transformers has no language model for; code that comes "
            "with a repository is never run"
        )


@functools.cache
def _known_model_types() -> frozenset[str]:
    """The causal language models that transformers has code for, read from its source: importing it brings torch.

    Empty when the source looks otherwise than expected; then loading tells.
    """
    spec = importlib.util.find_spec("transformers")
    (folder,) = (spec.submodule_search_locations if spec else None) or [""]
    path = Path(folder) / "models" / "auto" / "modeling_auto.py"
    source = path.read_text(encoding="utf-8") if path.is_file() else ""
    table = re.search(r"^MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = OrderedDict\((.*?)^\)", source, re.DOTALL | re.MULTILINE)
    return frozenset(re.findall(r'^\s+\(\s*"([^"]+)",', table[1], re.MULTILINE)) if table else frozenset()


# --- where things are ---------------------------------------------------------------------------------------------

Origin = Path | HubId | str
"""Where a base comes from: a folder, the hub, or `bundled`."""


def _origin(settings: Settings, name: str) -> Origin:
    if name == BASE:
        value = settings.base_model
    elif name in settings.base_models:
        value = settings.base_models[name]
    else:
        raise InvalidSpecError(
            f"unknown base model {name!r}; this deployment has {', '.join(base_names(settings))}",
            reason=Reason.BASE_MODEL_UNKNOWN,
            base_model=name,
        )
    if value is None:
        return hub.choose_default(settings)[0] or _BUNDLED
    if Path(value).is_absolute():
        return Path(value)
    if (hub_id := hub.parse_hub_id(value)) is not None:
        return hub_id
    raise InvalidSpecError(
        f"{_setting(name)}: {value!r} is neither the absolute path of a model folder nor the id of a model on the hub, "
        "such as org/name or org/name@revision",
        reason=Reason.SETTINGS_INVALID,
        setting=_setting(name),
    )


def _setting(name: str) -> str:
    return "KNOWLEDGE_BASE_MODEL" if name == BASE else "KNOWLEDGE_BASE_MODELS"


def _source_name(folder: Path) -> str:
    """The name on the hub where the config tells one, else the folder's own; a path would say nothing elsewhere."""
    name = read_json(folder / "config.json").get("_name_or_path")
    return name if isinstance(name, str) and _HUB_NAME.fullmatch(name) else folder.name


def _folder(settings: Settings, name: str, origin: Origin) -> Path:
    return origin if isinstance(origin, Path) else _home(settings, name)


def _home(settings: Settings, name: str) -> Path:
    return settings.data_dir / "bases" / name


def _partial(settings: Settings, name: str) -> Path:
    """Where a base is made; only who holds its lock touches it."""
    return settings.data_dir / "bases" / f".{name}.partial"


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
def _locked(settings: Settings, name: str, report: Report) -> Iterator[None]:
    folder = settings.data_dir / "bases"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{name}.lock").open("w") as stream:
        while not _try_lock(stream):
            report("waiting", 0.0)  # for another process that prepares it
            time.sleep(_LOCK_SECONDS)
        yield


def _try_lock(stream: IO[str]) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


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
