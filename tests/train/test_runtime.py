"""The machine: exit statuses, devices, precision by measurement, and systems that lack something."""

from __future__ import annotations

import os
import platform
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model import device
from train import runtime
from train.config import OptimizationConfig, UsageError
from train.program import run_main
from train.runtime import StopRequest, choose_precision, describe_machine, device_name, format_minutes, peak_memory_mb, total_memory


def raises(error: BaseException) -> Callable[[], int]:
    def main() -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "status", "text"),
    [
        (lambda: None, 0, ""),
        (lambda: 0, 0, ""),
        (lambda: 130, 130, ""),
        (raises(UsageError("bad key")), 2, "error: bad key"),
        (raises(ValueError("bad row")), 1, "error: bad row"),
        (raises(FileNotFoundError("no 文件")), 1, "error: no 文件"),
        (raises(KeyboardInterrupt()), 130, "stopped"),
    ],
)
def test_exit_statuses(
    main: Callable[[], int | None],
    status: int,
    text: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards what scripts rely on: 0 done, 1 failed, 2 usage, 130 stopped; mistakes are one line on standard error."""
    monkeypatch.delenv("HAOAI_DEBUG", raising=False)
    with pytest.raises(SystemExit) as ended:
        run_main(main)
    shown = capsys.readouterr()
    assert ended.value.code == status and shown.err.strip() == text and not shown.out


def test_defects_are_not_dressed_up_as_mistakes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the trace of a defect of the program, and that HAOAI_DEBUG shows the trace of a mistake too."""
    with pytest.raises(KeyError):
        run_main(raises(KeyError("defect")))
    monkeypatch.setenv("HAOAI_DEBUG", "1")
    with pytest.raises(SystemExit):
        run_main(raises(ValueError("mistake")))
    assert "Traceback" in capsys.readouterr().err


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the order cuda, mps, cpu, and a message for a device that is not there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert device_name() == "cpu" and device_name("cpu") == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device_name() == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_name() == "cuda"
    with pytest.raises(UsageError, match="train.device='gpu'"):
        device_name("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the device exists")
def test_a_missing_accelerator_is_named() -> None:
    """Guards against torch's own error (of another kind in every build) reaching the user as a trace."""
    with pytest.raises(UsageError, match="train.device='cuda'"):
        device_name("cuda")


@pytest.mark.parametrize(("fp32", "bf16", "chosen"), [(1.0, 0.5, "bf16"), (1.0, 0.95, "fp32"), (1.0, 3.0, "fp32"), (1.16, 1.0, "bf16")])
def test_precision_is_chosen_by_measurement(fp32: float, bf16: float, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against bf16 where it is slower (many CPUs), and a first, slow call deciding."""
    seen: list[str] = []

    def fake(work: Callable[[], object], device: str) -> float:
        seen.append("bf16" if torch.is_autocast_enabled("cpu") else "fp32")
        return 100.0 if len(seen) <= 2 else {"fp32": fp32, "bf16": bf16}[seen[-1]]

    monkeypatch.setattr(runtime, "timed", fake)
    got = choose_precision(OptimizationConfig(), "cpu", lambda: None)
    assert got.name == chosen and "measured" in got.reason and set(seen) == {"fp32", "bf16"}


def test_precision_as_set_and_where_bf16_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a setting against measurement, and a device without bf16 against a crash."""

    def never(work: Callable[[], object], device: str) -> float:
        raise RuntimeError("no kernel for bf16\nmore")

    monkeypatch.setattr(runtime, "timed", never)
    assert choose_precision(OptimizationConfig(precision="bf16"), "cpu", lambda: None).name == "bf16"
    got = choose_precision(OptimizationConfig(), "cpu", lambda: None)
    assert got.name == "fp32" and "no kernel for bf16" in got.reason
    assert got.scaler().is_enabled() is False


def test_memory_on_this_machine() -> None:
    """Guards plausible figures in the right unit."""
    total, peak = total_memory(), peak_memory_mb("cpu")
    if total is not None and peak is not None:
        assert 50 < peak < total / 2**20


def test_memory_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a system without `resource` and `os.sysconf`: its own call is asked, the peak is left out."""
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.delattr(os, "sysconf", raising=False)
    monkeypatch.setattr(platform, "system", lambda: "Windows")
    monkeypatch.setattr(device, "_windows_memory", lambda: 7 * 2**30)
    monkeypatch.setattr(Path, "read_text", lambda self, *a, **k: (_ for _ in ()).throw(FileNotFoundError(str(self))))
    assert peak_memory_mb("cpu") is None and total_memory() == 7 * 2**30
    assert "7 GiB memory" in describe_machine("cpu")
    monkeypatch.setattr(platform, "system", lambda: "Other")
    assert total_memory() is None and "memory" not in describe_machine("cpu")


def test_a_containers_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a container whose limit is below the machine's memory, and the word `max`."""
    monkeypatch.setattr(Path, "read_text", lambda self, *a, **k: "1048576\n" if self.name == "memory.max" else "max\n")
    assert total_memory() == 2**20


def test_signals_become_a_flag_and_are_given_back() -> None:
    """Guards that the first Ctrl-C only asks, the second ends at once, and the handlers before are restored."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopRequest().installed() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_stop_request_outside_the_main_thread() -> None:
    """Guards training in a thread (a notebook, a server), where Python lets nobody set handlers."""
    found: list[object] = []

    def work() -> None:
        try:
            with StopRequest().installed() as stop:
                found.append(stop.requested)
        except ValueError as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]


@pytest.mark.parametrize(("seconds", "text"), [(0, "0m00s"), (59.6, "1m00s"), (245, "4m05s"), (7380, "2h03m")])
def test_lengths_of_time(seconds: float, text: str) -> None:
    """Guards 59.6 seconds against becoming 0m60s."""
    assert format_minutes(seconds) == text
