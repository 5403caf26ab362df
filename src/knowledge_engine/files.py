"""What several stores on disk need: a file's digest, durability, room, a JSON object that may be missing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import psutil

from knowledge_engine.errors import CapacityError, InvalidSpecError, Reason

RESERVE_BYTES = 10**9
"""What a download leaves free on the disk, for the state store above all."""


_NETWORK_FILE_SYSTEMS = frozenset(
    {"9p", "afs", "beegfs", "ceph", "cifs", "fuse.glusterfs", "glusterfs", "lustre", "nfs", "nfs4", "smb3", "smbfs"}
)


class Mount(Protocol):
    """A mounted file system, as psutil tells it."""

    @property
    def mountpoint(self) -> str: ...

    @property
    def fstype(self) -> str: ...


def sha256_of(path: Path) -> str:
    """Hex digest of the content, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Returns once a file's content, or a folder's list of names, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: bytes) -> None:
    """Fills a private file; its name may still be lost in a power cut until its folder is synced too."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, content: bytes) -> None:
    """Gives a file another content: whoever reads it, before or after a power cut, finds the old one or the new."""
    new = path.with_name(f"{path.name}.new")
    write_durably(new, content)
    new.replace(path)
    sync(path.parent)


def demand_local(folder: Path) -> None:
    """Raises InvalidSpecError: SETTINGS_INVALID, when an existing folder lies on a file system of another machine.

    SQLite's log of writes lives in shared memory, which other machines do not see: it would be damaged there.
    """
    kind = file_system_of(folder, psutil.disk_partitions(all=True))
    if kind in _NETWORK_FILE_SYSTEMS or kind.startswith("fuse.ssh"):
        raise InvalidSpecError(
            f"KNOWLEDGE_DATA_DIR: {folder} lies on a network file system ({kind}), where SQLite would be damaged; "
            "choose a folder on a disk of this machine",
            reason=Reason.SETTINGS_INVALID,
            file_system=kind,
        )


def file_system_of(folder: Path, mounts: Iterable[Mount]) -> str:
    """The type of the file system that a folder lies on; empty when no mount holds it."""
    path = folder.resolve()
    holding = [mount for mount in mounts if path.is_relative_to(mount.mountpoint)]
    # Of two mounts on one point the later one is in sight.
    return max(enumerate(holding), key=lambda item: (len(item[1].mountpoint), item[0]))[1].fstype if holding else ""


def demand_space(folder: Path, needed_bytes: int) -> None:
    """Raises CapacityError: DISK_FULL, when a download of so many bytes into `folder` would not fit."""
    free = shutil.disk_usage(folder).free
    if needed_bytes > 0 and free < needed_bytes + RESERVE_BYTES:
        raise CapacityError(
            f"the disk of KNOWLEDGE_DATA_DIR has {free / 1e9:.1f} GB free and the download needs "
            f"{(needed_bytes + RESERVE_BYTES) / 1e9:.1f} GB, 1 GB of it as a reserve; make room, or set "
            "KNOWLEDGE_DATA_DIR to a larger disk",
            reason=Reason.DISK_FULL,
            free_bytes=free,
            needed_bytes=needed_bytes,
        )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty when the file is missing, cannot be read, or holds something else."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
