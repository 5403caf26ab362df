"""The manifest of a model version: what the version is, and the sha256 and size of every file in its folder.

Written last and never changed, so its bytes are the version's identity: their sha256 is the version's digest. It may
come from a bucket that others write to, so nothing in it is believed before it is checked.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any, NamedTuple

from pydantic import ValidationError

from knowledge_engine.core import ModelVersion, is_name
from knowledge_engine.errors import IntegrityError, Reason

MANIFEST = "manifest.json"
EXPORT_FACTS = "export.json"
"""In a merged model's folder: where it comes from and how it was checked, with the fields of the contract's Export."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


class FileEntry(NamedTuple):
    sha256: str
    size_bytes: int


class Manifest(NamedTuple):
    version: ModelVersion
    files: dict[str, FileEntry]


def parse_manifest(model: str, version: int, text: bytes) -> Manifest:
    """Raises IntegrityError: MODEL_VERSION_CORRUPT."""
    try:
        manifest = json.loads(text)
        files = {name: _entry(name, entry) for name, entry in manifest.pop("files").items()}
        digest = f"sha256:{hashlib.sha256(text).hexdigest()}"
        size_bytes = sum(entry.size_bytes for entry in files.values()) + len(text)
        parsed = ModelVersion(**manifest, digest=digest, size_bytes=size_bytes)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ValidationError) as error:
        raise corrupt(model, version, MANIFEST, "cannot be read") from error
    if (parsed.model, parsed.version) != (model, version):
        raise corrupt(model, version, MANIFEST, "belongs to another version")
    return Manifest(parsed, files)


def corrupt(model: str, version: int, file: str, what: str) -> IntegrityError:
    return IntegrityError(
        f"version {version} of model {model!r} is damaged: {file} {what}",
        reason=Reason.MODEL_VERSION_CORRUPT,
        model=model,
        version=version,
        file=file,
    )


def _entry(name: str, entry: Any) -> FileEntry:
    """Names become paths, so they must be plain ones."""
    size_bytes = entry["size_bytes"]
    if not is_name(name) or name == MANIFEST or not isinstance(size_bytes, int) or size_bytes < 0:
        raise ValueError(name)
    if not isinstance(entry["sha256"], str) or not _SHA256.fullmatch(entry["sha256"]):
        raise ValueError(name)
    return FileEntry(entry["sha256"], size_bytes)
