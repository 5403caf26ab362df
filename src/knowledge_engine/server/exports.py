"""Exports in child processes, one after the other: the server itself holds no model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

from knowledge_engine.core import ModelVersion
from knowledge_engine.errors import KnowledgeEngineError, from_dict
from knowledge_engine.files import read_json
from knowledge_engine.manifest import EXPORT_FACTS
from knowledge_engine.settings import Settings

FOLDER = "exports"
_LAST_WORDS = 2000

_LOG = logging.getLogger(__name__)


class Exports:
    """Merged versions below the data directory, each made once."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._turn = asyncio.Lock()
        for left in (settings.data_dir / FOLDER).glob(".*"):  # by a child whose server was killed
            shutil.rmtree(left, ignore_errors=True)

    async def export(self, version: ModelVersion) -> dict[str, Any]:
        """The facts of the export with its `folder`, as seen from the data directory. A call that is cancelled ends its
        child.

        Raises:
            KnowledgeEngineError: whatever `export.export_version` raises.
        """
        name = _name(version)
        folder = self._settings.data_dir / name
        async with self._turn:
            facts = await asyncio.to_thread(read_json, folder / EXPORT_FACTS)
            if facts.get("version_digest") != version.digest:
                # Of a version that was deleted, and its name given to another deployment's; nobody else writes here.
                await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
                await self._run(version, folder)
                facts = await asyncio.to_thread(read_json, folder / EXPORT_FACTS)
        return facts | {"folder": name}

    async def forget(self, version: ModelVersion) -> None:
        """Removes the export of a version that is no more."""
        folder = self._settings.data_dir / _name(version)
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    async def _run(self, version: ModelVersion, folder: Path) -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            "knowledge_engine.supervisor",  # ends it with this process
            "knowledge_engine.export",
            version.model,
            str(version.version),
            str(folder),
            env=self._settings.child_environment(),
            stdin=asyncio.subprocess.PIPE,  # the lifeline; `communicate` would cut it
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            told, complained = await asyncio.gather(process.stdout.read(), process.stderr.read())
            await process.wait()
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if process.returncode == 0:
            return
        with contextlib.suppress(ValueError, KeyError, TypeError):
            raise from_dict(json.loads(told.splitlines()[-1] if told else b""))
        _LOG.error(
            "an export ended with %s: %s", process.returncode, complained.decode(errors="replace")[-_LAST_WORDS:]
        )
        raise KnowledgeEngineError(f"the export of {version.model}:{version.version} ended before it was done")


def _name(version: ModelVersion) -> str:
    """An export's folder, as seen from the data directory."""
    return f"{FOLDER}/{version.model}-{version.version}"
