"""The devices of this machine: which there are, how much memory of one the service may use, and what a process took.

No torch; the only user of pynvml.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from knowledge_engine.settings import Settings

CPU, CUDA = "cpu", "cuda"

_CGROUPS = Path("/sys/fs/cgroup")
_CGROUP_OF_THIS_PROCESS = Path("/proc/self/cgroup")
_CPU_FACTS = Path("/proc/cpuinfo")


def has_cuda_device() -> bool:
    """Whether torch would find a CUDA device, without importing it: a visible device, and a build that can use one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.split(",")[0].strip() in ("", "-1", "NoDevFiles"):
        return False
    return _count_devices() > 0 and _torch_has_cuda()


def default_device() -> str:
    """The device that engine and trainings use: `cuda` where torch would find one, else `cpu`."""
    return CUDA if has_cuda_device() else CPU


def total_memory(settings: Settings) -> int:
    """Bytes of the default device that the service may use, whoever holds them now."""
    info = _cuda_memory() if default_device() == CUDA else None
    total = _host_memory() if info is None else int(info.total)
    return min(total, settings.memory_limit_bytes or total)


def memory_in_use() -> int:
    """Bytes of the default device that are taken now, by whomever."""
    if default_device() == CUDA and (info := _cuda_memory()) is not None:
        return int(info.used)
    return int(psutil.virtual_memory().used)


def free_host_memory(settings: Settings) -> int:
    """Bytes of the host that this process may take beside what it has: what nobody holds, or less where a container's
    limit, or on a CPU that of the settings, leaves less. Negative where it has more than it may."""
    rooms = [psutil.virtual_memory().available, *cgroup_rooms(_CGROUPS, _CGROUP_OF_THIS_PROCESS)]
    if settings.memory_limit_bytes is not None and default_device() == CPU:
        rooms.append(settings.memory_limit_bytes - resident_memory())
    return int(min(rooms))


def has_bfloat16() -> bool:
    """Whether the CUDA device computes in bfloat16: compute capability 8.0, Ampere, and newer."""
    with _nvml() as nvml:
        major, _ = nvml.nvmlDeviceGetCudaComputeCapability(_first_device())
        return int(major) >= 8


def resident_memory() -> int:
    """Bytes that this process has resident now."""
    return int(psutil.Process().memory_info().rss)


def peak_memory() -> int:
    """Bytes that this process had resident at most. The kernel's `ru_maxrss` will not do: it begins with what the
    process that started this one had."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    """The driver's library. Raises pynvml.NVMLError where there is none, or it does not answer."""
    import pynvml

    pynvml.nvmlInit()
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def _cuda_memory() -> Any | None:
    """NVML's `total` and `used` bytes; None for a chip that shares its memory with the host."""
    with _nvml() as nvml:
        try:
            return nvml.nvmlDeviceGetMemoryInfo(_first_device())
        except nvml.NVMLError_NotSupported:
            return None


def _first_device() -> object:
    """The one that torch calls `cuda`."""
    import pynvml

    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if first.isdecimal():
        return pynvml.nvmlDeviceGetHandleByIndex(int(first))
    return pynvml.nvmlDeviceGetHandleByUUID(first)


def _host_memory() -> int:
    """What the machine has, or less where a container's limit says so."""
    return min([psutil.virtual_memory().total, *cgroup_limits(_CGROUPS, _CGROUP_OF_THIS_PROCESS)])


def cgroup_limits(root: Path, membership: Path) -> Iterator[int]:
    """Bytes of every memory limit that binds this process: those of its groups and of all groups above, v2 and v1.

    `root` is where the hierarchies are mounted, `membership` the process's `/proc/PID/cgroup`. Inside a container the
    paths named there may not exist; its own limit then stands at the root.
    """
    return (limit for _, limit in _limited_groups(root, membership))


def cgroup_rooms(root: Path, membership: Path) -> Iterator[int]:
    """Of each of these limits, what its group does not hold; files that the kernel only caches count for nothing."""
    for group, limit in _limited_groups(root, membership):
        used = _read_limit(group / "memory.current") or _read_limit(group / "memory.usage_in_bytes") or 0
        cached = 0
        with contextlib.suppress(OSError):
            lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
            facts = dict(line.split(" ", 1) for line in lines)
            prefix = "total_" if "total_inactive_file" in facts else ""  # v1: with the groups below
            cached = sum(int(facts.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
        yield limit - max(0, used - cached)


def _limited_groups(root: Path, membership: Path) -> Iterator[tuple[Path, int]]:
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return  # no cgroups here
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            folder, file = root, "memory.max"
        elif "memory" in controllers.split(","):
            folder, file = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = folder / path.lstrip("/")
        for level in (group, *group.parents):
            if not level.is_relative_to(folder):
                break
            if (limit := _read_limit(level / file)) is not None:
                yield level, limit


def _read_limit(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None  # "max" is none


def prepare_compiler(settings: Settings) -> None:
    """Tells numba how many threads there are, and where it keeps what it compiled if not beside its source: for
    `settings`, and before it is imported, when it reads this."""
    os.environ.setdefault("NUMBA_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0)))))
    if not os.access(Path(__file__).parent, os.W_OK):
        os.environ.setdefault("NUMBA_CACHE_DIR", str(settings.data_dir.absolute() / "kernels"))


def is_zen3() -> bool:
    """Whether this CPU is an AMD of the generation that came before AVX-512."""
    facts = _cpu_facts()
    return (
        facts.get("vendor_id") == ["AuthenticAMD"]
        and facts.get("cpu family") == ["25"]
        and "avx512f" not in facts.get("flags", [])
    )


def has_vnni() -> bool:
    """Whether this CPU multiplies and adds up whole numbers of eight bits in one instruction."""
    return not {"avx512_vnni", "avx_vnni"}.isdisjoint(_cpu_facts().get("flags", []))


@functools.cache
def _cpu_facts() -> dict[str, list[str]]:
    """Of its last core."""
    try:
        lines = _CPU_FACTS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return {name.strip(): value.split() for name, _, value in (line.partition(":") for line in lines)}


@functools.cache
def _count_devices() -> int:
    import pynvml

    try:
        with _nvml() as nvml:
            return int(nvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:  # no driver here, or one that does not answer
        return 0


@functools.cache
def _torch_has_cuda() -> bool:
    return not importlib.metadata.version("torch").endswith("+cpu")
