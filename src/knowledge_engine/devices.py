"""The devices of this machine, read through NVML. No torch; the only user of pynvml."""

from __future__ import annotations

import functools
import importlib.metadata
import os


def has_cuda_device() -> bool:
    """Whether torch would find a CUDA device, without importing it: a visible device, and a build that can use one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.split(",")[0].strip() in ("", "-1", "NoDevFiles"):
        return False
    return _count_devices() > 0 and _torch_has_cuda()


@functools.cache
def _count_devices() -> int:
    import pynvml

    try:
        pynvml.nvmlInit()
        try:
            return int(pynvml.nvmlDeviceGetCount())
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:  # no driver here, or one that does not answer
        return 0


@functools.cache
def _torch_has_cuda() -> bool:
    return not importlib.metadata.version("torch").endswith("+cpu")
