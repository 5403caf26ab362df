"""Compiles kernels, unless that was done: `python -m tests.compile_kernels serving`, or `training`.

Once, before tests share the cores; else every engine or training that starts meanwhile would do it for itself.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from knowledge_engine.settings import Settings
from tests.tiny import build_tiny_base


def compile_training() -> None:
    from knowledge_engine.training import kernels

    kernels.warm_up(len(os.sched_getaffinity(0)))


def compile_serving() -> None:
    from knowledge_engine import modeling
    from knowledge_engine.bases import prepare_base
    from knowledge_engine.inference.serving import serving_model

    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(data_dir=Path(folder) / "data", base_model=str(build_tiny_base(Path(folder) / "base")))
        base = prepare_base(settings, "base", lambda phase, share: None)
        loaded = modeling.load_base(base, modeling.INT8, "cpu")
        serving_model(loaded, base, modeling.INT8, settings, print)


if __name__ == "__main__":
    {"serving": compile_serving, "training": compile_training}[sys.argv[1]]()
