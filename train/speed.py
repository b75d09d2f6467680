"""What makes a step fast on the machine at hand: memory that is kept, rows per pass, compiled blocks. Each is measured, once a run.

The results of a step do not depend on the first two beyond rounding; compiled kernels round differently, too. So a run that is resumed
obeys what was decided at its start.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from model.feedforward import MixtureOfExperts
from model.transformer import SmartHaoAI
from train.data import Batch
from train.memory import out_of_memory
from train.metrics import LossFunction
from train.runtime import timed

PASSES = (1024, 2048, 4096)
"""Positions (rows times length) of a pass that may suit a CPU: with fewer the matrix products are too small to be fast, with more what
they leave falls out of the cache."""
USUAL_PASS = 2048  # where it is not measured
CALIBRATED = 60.0  # seconds of a run from which on it is worth trying out rows per pass
COMPILED = 300.0  # ... and compiled blocks, whose making takes up to half a minute
COMPILED_GAIN = 1.05  # speed from which on they are kept
PROBE = "import torch; torch.compile(lambda x: x.sin() + 1)(torch.ones(64))"
PROBE_SECONDS = 120
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next step, which asks for the same sizes again.

    By default every tensor of more than some megabytes goes back to the system at once, and its pages are zeroed and mapped anew by
    the next one: a fifth of a step's time. Other systems are left as they are.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """After trials that needed more than a step does: back to the system with what `keep_freed_memory` kept of them."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def usual_positions(micro_batch: int, length: int, device: str, apart: bool = True) -> int:
    """Positions of a pass when nothing is measured: micro_batch rows of `length` if it is set, else what suits the device; 0: all.
    apart: each row stands for itself; of others all that fit are computed together, so that a frozen reference sees the same passes."""
    return micro_batch * length or (USUAL_PASS if device == "cpu" and apart else 0)


def in_parts(batch: Batch, positions: int) -> list[Batch]:
    """The batch in parts of at most `positions`, as far as it can be divided; 0: as it is."""
    return batch.split(max(1, positions // batch.inputs["input_ids"].shape[1])) if positions else [batch]


def trial(model: SmartHaoAI, loss_fn: LossFunction, batch: Batch) -> None:
    """A forward and a backward pass that changes nothing."""
    try:
        terms = loss_fn(model, batch)
        torch.stack([term.total for term in terms if not term.metric]).sum().backward()
    finally:
        model.zero_grad(set_to_none=True)


def best_positions(batch: Batch, work: Callable[[Batch], Any], device: str, rounds: int = 3) -> int:
    """How many positions of `batch` to compute at once for the shortest time of all of it; `work` is a forward and a backward pass.

    Interleaved: every candidate is timed once a round. Of candidates that are about as fast the smallest wins: it needs less memory. One
    for which memory does not suffice is as slow as can be.
    """
    rows, length = batch.inputs["input_ids"].shape
    known = [positions for positions in PASSES if positions // length < rows and positions >= length and batch.group]
    candidates = known + [rows * length] * (rows * length <= PASSES[-1] or not known)
    times = dict.fromkeys(candidates, float("inf"))
    for turn in range(rounds + 1 if len(candidates) > 1 else 0):
        for positions in candidates:
            try:
                seconds = sum(timed(partial(work, part), device) for part in in_parts(batch, positions))
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                seconds = float("inf")
            if turn:  # the first round warms up
                times[positions] = min(seconds, times[positions])
    best = min(times.values())
    return next(positions for positions in candidates if times[positions] <= 1.02 * best)


def compiler_problem() -> str | None:
    """Why torch.compile does not work here, None when it does. Tried in a process of its own, which may crash or hang."""
    try:
        tried = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=PROBE_SECONDS, errors="replace")
    except subprocess.TimeoutExpired:
        return f"it took more than {PROBE_SECONDS} s"
    if tried.returncode == 0:
        return None
    said = [line.strip() for line in tried.stderr.splitlines() if "Error" in line or "not found" in line.lower()]
    return (said[-1] if said else f"exit status {tried.returncode}")[:200]


def compile_blocks(model: SmartHaoAI) -> None:
    """Compile each block's training pass; blocks of one shape share the code. Nothing is made before the first call."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for layer in model.layers:
        # How many rows an expert gets is known only on the way: no fixed program can be made of that.
        part: Any = layer.self_attn if isinstance(layer.mlp, MixtureOfExperts) else layer
        part.compile(dynamic=False)


def compiled_passes(wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """Whether blocks that `compile_blocks` was called on run compiled or as they are written: evaluation and sampling have other shapes,
    and code for each would cost more than it saves."""
    return torch.compiler.set_stance("default" if wanted else "force_eager")


def try_compiled(
    model: SmartHaoAI, batches: list[Batch], work: Callable[[Batch], Any], device: str, least_gain: float = COMPILED_GAIN, rounds: int = 3
) -> tuple[bool, str]:
    """Compile the blocks and measure them against the uncompiled ones on batches of each shape that will come. Returns whether they are
    used from now on, and why, in words: not when they do not work here, or bring less than `least_gain`."""
    problem = compiler_problem()
    if problem is not None:
        advice = "install a C++ compiler (g++, clang, MSVC) for about 1.3x the speed; train.compile=off hides this line"
        return False, f"the blocks are not compiled: torch.compile does not work here ({problem}); {advice}"
    compile_blocks(model)
    start = time.perf_counter()
    try:
        with compiled_passes(True):
            for batch in batches:
                work(batch)
    except Exception as error:  # what a compiler may raise has no common class, and a run must not end by it
        undo_compiling(model)
        return False, f"the blocks are not compiled: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
    warm_up = time.perf_counter() - start
    times: dict[bool, float] = {}
    for turn in range(rounds + 1):
        for compiled in (False, True):
            with compiled_passes(compiled):
                seconds = sum(timed(partial(work, batch), device) for batch in batches)
            if turn:
                times[compiled] = min(seconds, times.get(compiled, seconds))
    gain = times[False] / times[True]
    said = f"compiled blocks measured {gain:.2f}x the speed of uncompiled ones, after a warm-up of {warm_up:.0f} s"
    if gain < least_gain:
        undo_compiling(model)
        return False, f"{said}: not used"
    return True, said


def undo_compiling(model: SmartHaoAI) -> None:
    """Every block runs as it is written again."""
    for module in model.modules():
        module._compiled_call_impl = None
