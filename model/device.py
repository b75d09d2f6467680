"""Where a model runs: the one decision about devices, and how much memory there is."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path

import torch


def find_device(wanted: str | torch.device | None = None) -> torch.device:
    """The device of that name; for None or "auto" cuda, then mps, then cpu. Raises ValueError when there is none of that name here."""
    if wanted is None or wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # what torch raises differs from build to build
        reason = (str(error).splitlines() or ["unknown"])[0]
        raise ValueError(f"device {str(wanted)!r} cannot be used here ({reason}); try cpu") from error
    return device


def total_memory() -> int | None:
    """Bytes this process may use at most: the machine's, or its container's limit; None when the system does not tell."""
    limits = []
    with contextlib.suppress(ValueError, OSError, AttributeError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            limits.append(int(Path(file).read_text(encoding="utf-8")))
    if platform.system() == "Windows":
        limits.append(_windows_memory())
    return min(limits) if limits else None


def available_memory() -> int | None:
    """Bytes that are left of `total_memory`, files in the cache not counted as used; None when the system does not tell."""
    left = []
    with contextlib.suppress(OSError, ValueError, KeyError):
        left.append(_fields("/proc/meminfo")["MemAvailable:"] * 2**10)
    for used, limit, statistics, cached in (
        ("memory.current", "memory.max", "memory.stat", "inactive_file"),
        ("memory/memory.usage_in_bytes", "memory/memory.limit_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        with contextlib.suppress(OSError, ValueError, KeyError):
            group = Path("/sys/fs/cgroup")
            occupied = int((group / used).read_text(encoding="utf-8")) - _fields(group / statistics)[cached]
            left.append(int((group / limit).read_text(encoding="utf-8")) - occupied)
    return max(min(left), 0) if left else None


def _fields(file: str | Path) -> dict[str, int]:
    """The first two words of each line of a file of /proc or /sys."""
    return {name: int(value) for name, value, *_ in map(str.split, Path(file).read_text(encoding="utf-8").splitlines())}


def _windows_memory() -> int:
    import ctypes

    class Status(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong), *[(name, ctypes.c_ulonglong) for name in "abcdefg"]]

    status = Status()
    status.length = ctypes.sizeof(Status)
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined]
    return int(status.a)
