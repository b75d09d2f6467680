"""The machine: device, precision, memory, threads, signals.

Everything here works on Linux, macOS and Windows; what a system lacks is left out, never assumed.
"""

from __future__ import annotations

import contextlib
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from model.device import find_device, total_memory
from train import parallel
from train.config import OptimizationConfig, UsageError
from train.memory import out_of_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WORTHWHILE = 1.15  # a lower precision must be at least this much faster to be chosen


@contextlib.contextmanager
def only_for_show(what: str) -> Iterator[None]:
    """What is only for people to look at must not end a run: when it cannot be written, that is said once."""
    try:
        yield
    except OSError as error:
        if what not in _missed:
            print(f"warning: the run goes on without {what}: {error}", file=sys.stderr)
        _missed.add(what)


_missed: set[str] = set()


def device_name(wanted: str = "auto") -> str:
    """`find_device` for the setting train.device. Raises UsageError when it is not there."""
    try:
        return str(find_device(wanted))
    except ValueError as error:
        raise UsageError(f"train.device={wanted!r}: {error}") from error


def describe_machine(device: str) -> str:
    """One line: processor or accelerator, cores, memory, torch."""
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, torch {torch.__version__}"
    total = total_memory()
    memory = f"{total / 2**30:.0f} GiB memory, " if total else ""
    return (
        f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} CPU threads "
        f"({torch.backends.cpu.get_cpu_capability()}), {memory}torch {torch.__version__}"
    )


def peak_memory_mb(device: str) -> float | None:
    """Highest memory use so far, 2^20 bytes: the accelerator's, else the process's; None when the system does not tell."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError, StopIteration, ValueError):
        # Linux: getrusage would count what the process held that started this one.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]) / 2**10
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if platform.system() == "Darwin" else peak / 2**10


def set_threads(count: int) -> None:
    if count > 0:
        torch.set_num_threads(count)


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)


def random_states() -> list[torch.Tensor]:
    """Of the CPU, and of the GPU in use where there is one."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]


def set_random_states(states: list[torch.Tensor]) -> None:
    """Back to what `random_states` has noted."""
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)


@dataclass
class Precision:
    """The number type of the matrix products; weights and optimiser stay fp32."""

    name: str
    device: str
    reason: str

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.name == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.split(":")[0], dtype=DTYPES[self.name])

    def scaler(self) -> torch.amp.GradScaler:
        """Loss scaling is for fp16 only; for the others it does nothing."""
        return torch.amp.GradScaler(self.device.split(":")[0], enabled=self.name == "fp16")


def choose_precision(settings: OptimizationConfig, device: str, step: Callable[[], Any]) -> Precision:
    """The setting, or the fastest of what the device offers, measured on `step` (one forward and backward pass).

    fp16 is never chosen on a CPU (it is no faster there) and on a GPU only where bf16 is missing.
    """
    if settings.precision != "auto":
        return Precision(settings.precision, device, "as set")
    if device.startswith("cuda") and not torch.cuda.is_bf16_supported():
        return Precision("fp16", device, "this GPU has no bf16")
    full, half = Precision("fp32", device, ""), Precision("bf16", device, "")
    times: dict[str, list[float]] = {"fp32": [], "bf16": []}
    try:
        for _ in range(4):  # interleaved, the first round warms up
            for precision in (full, half):
                with precision.autocast():
                    times[precision.name].append(timed(step, device))
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        return Precision("fp32", device, f"bf16 does not run here ({str(error).splitlines()[0]})")
    ratio = min(times["fp32"][1:]) / min(times["bf16"][1:])
    chosen = half if ratio >= WORTHWHILE else full
    chosen.reason = f"bf16 measured {ratio:.2f}x the speed of fp32"
    return chosen


def timed(work: Callable[[], Any], device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call, the device's queue included."""
    start = clock()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return clock() - start


class StopRequest:
    """Turns Ctrl-C and a termination request into a flag that the loop reads between steps; a second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.requested = False

    @contextlib.contextmanager
    def installed(self) -> Iterator[StopRequest]:
        previous: dict[int, Any] = {}
        for name in ("SIGINT", "SIGTERM"):
            number = getattr(signal, name, None)
            if number is not None:
                with contextlib.suppress(ValueError):  # not the main thread: signals stay as they are
                    previous[number] = signal.signal(number, self._handle)
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if parallel.running():  # torchrun passes on what the terminal has sent already, and ends what does not end by itself
            self.requested = True
            return  # the first process to know tells the others
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        print("\nstopping after this step; the state is saved (Ctrl-C again ends at once)", file=sys.stderr)


def format_minutes(seconds: float) -> str:
    """4m05s, 2h03m: lengths of time for people."""
    minutes, rest = divmod(int(round(seconds)), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{rest:02d}s"
