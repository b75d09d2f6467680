"""Memory: whether an error means that there is too little of it, how much is in use, and when it is about to end.

`by_halves` is the remedy where a batch is only measured; how a step is halved stands in `train.planning`.
"""

from __future__ import annotations

import errno
import gc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from model.device import available_memory, total_memory

if TYPE_CHECKING:
    from train.data import Batch

T = TypeVar("T")
# What torch's allocators, oneDNN and the C++ library say; none of them has an exception of its own.
SIGNS = ("out of memory", "allocate memory", "not enough memory", "bad_alloc", "could not create a memory")
NEAR = 0.05  # share of the memory that may be left before there is a warning

MEMORY_LOW = (
    "warning: step {step}: only {left:,} MiB of {there:,} MiB of memory are left; when they are gone the system ends the run: close other "
    "programs, or stop it (Ctrl-C), and --resume with less beside it"
)


def out_of_memory(error: BaseException) -> bool:
    """Whether this error says that memory could not be had."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)


def reason_of(error: BaseException) -> str:
    """Its first line, for people."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def release(device: str) -> None:
    """Give back what an attempt that failed has left: tensors in cycles, blocks that the allocator keeps."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def by_halves(batch: Batch, work: Callable[[Batch], T]) -> list[T]:
    """work(batch), or where memory does not suffice work of its halves, and so on down to what has to stay together."""
    try:
        return [work(batch)]
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error) or len(batch.boundaries()) == 2:
            raise
    release(str(batch.inputs["input_ids"].device))  # here, not above: the error holds what the attempt computed
    return [result for half in batch.split(-(-len(batch.inputs["input_ids"]) // 2)) for result in by_halves(half, work)]


def memory_in_use(device: str) -> dict[str, float]:
    """For metrics.jsonl, in MiB: `memory_mb`, on a GPU what tensors occupy, with `reserved_memory_mb` for what torch holds; else what the
    process holds and no file backs (a mapped token store can be dropped at any time). Empty where the system does not tell."""
    if device.startswith("cuda"):
        allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        return {"memory_mb": allocated / 2**20, "reserved_memory_mb": reserved / 2**20}
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return {"memory_mb": sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:"))) / 2**10}


def memory_left(device: str) -> tuple[int, int] | None:
    """Bytes that are left and that there are, before the system ends the process; None where it does not tell."""
    if device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + kept, total
    left, total_bytes = available_memory(), total_memory()
    return None if left is None or total_bytes is None else (left, total_bytes)


class MemoryWatch:
    """Tells once that memory nears its end."""

    def __init__(self) -> None:
        self.told = False

    def due(self, device: str) -> tuple[int, int] | None:
        """MiB that are left and that there are, the first time that hardly any are left; else None."""
        left = None if self.told else memory_left(device)
        if left is None or left[0] > NEAR * left[1]:
            return None
        self.told = True
        return left[0] // 2**20, left[1] // 2**20
