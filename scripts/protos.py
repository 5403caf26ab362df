"""Generates the typed stubs of `protos/` into `src/`.

`uv run python scripts/protos.py` writes them; with `--check` it exits 1 when the committed stubs differ from
what the protos say. Google's own messages come from googleapis-common-protos.
"""

from __future__ import annotations

import argparse
import filecmp
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
STUBS = Path("knowledge_engine/v1")


def generate(destination: Path) -> None:
    """Runs protoc over every proto of ours.

    Raises:
        SystemExit: protoc refused the protos; it has said why.
    """
    # mypy-protobuf's plugins are found on PATH only.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    spec = importlib.util.find_spec("google.api")
    assert spec
    assert spec.submodule_search_locations
    googleapis = Path(next(iter(spec.submodule_search_locations))).parent.parent
    files = sorted(str(path.relative_to(PROTOS)) for path in (PROTOS / STUBS).glob("*.proto"))
    if protoc.main(
        [
            "protoc",
            f"-I{PROTOS}",
            f"-I{googleapis}",
            f"-I{Path(grpc_tools.__file__).parent / '_proto'}",
            f"--python_out={destination}",
            f"--grpc_python_out={destination}",
            f"--mypy_out=quiet:{destination}",
            f"--mypy_grpc_out=quiet:{destination}",
            *files,
        ]
    ):
        raise SystemExit("protoc refused the protos")
    (destination / STUBS / "__init__.py").write_text(
        '"""Generated from `protos/knowledge_engine/v1` by `scripts/protos.py`; never edited."""\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the stubs are stale")
    arguments = parser.parse_args()
    committed = ROOT / "src" / STUBS
    if not arguments.check:
        committed.mkdir(parents=True, exist_ok=True)
        for old in committed.glob("*_pb2*"):
            old.unlink()
        generate(ROOT / "src")
        return
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh = Path(folder) / STUBS
        names = sorted({p.name for d in (fresh, committed) for p in d.iterdir() if p.suffix in {".py", ".pyi"}})
        stale = [name for name in names if name not in filecmp.cmpfiles(fresh, committed, names, shallow=False)[0]]
    if stale:
        raise SystemExit(f"stale stubs: {', '.join(stale)}; run `uv run python scripts/protos.py`")


if __name__ == "__main__":
    main()
