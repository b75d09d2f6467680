"""Too little memory: steps that are halved, evaluation by halves, and what is said of it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_helpers import Runs, largest_difference
from training_helpers import run_python

from model import BPETokenizer, SmartHaoAI, device
from train import memory, planning
from train.config import OptimizationConfig, StageConfig
from train.data import Batch, make_source
from train.losses import Term, lm_loss
from train.memory import by_halves, memory_in_use, memory_left, out_of_memory
from train.metrics import held_out_loss, held_out_terms
from train.speed import best_positions

CPU_SAYS = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
WINDOWS_SAYS = "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."


def fits(rows: int, error: BaseException | None = None, after_backward: bool = False) -> Any:
    """lm_loss for which there is memory for that many rows only; it fails before or after a part of the gradients is there."""

    def loss(model: SmartHaoAI, batch: Batch) -> list[Term]:
        terms = lm_loss(model, batch)
        if len(batch.inputs["input_ids"]) > rows:
            if after_backward:
                terms[0].total.backward()
            raise error or RuntimeError(CPU_SAYS)
        return terms

    return loss


@pytest.fixture
def runs(tmp_path: Path, tiny_tokenizer: BPETokenizer) -> Runs:
    return Runs(tmp_path, tiny_tokenizer)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError(CPU_SAYS), True),
        (RuntimeError(WINDOWS_SAYS), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (OSError(28, "No space left on device"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_means_too_little_memory(error: BaseException, expected: bool) -> None:
    """Guards a step that is halved for another error, and one that ends the run on another system."""
    assert out_of_memory(error) is expected


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_halved_step_is_that_of_a_run_that_began_so(runs: Runs, dropout: float) -> None:
    """Guards gradients, rows, random numbers and expert counts of the failed attempt that stay in the step, and tokens per step that
    change."""
    shape = {"dropout": dropout, "n_expert": 3, "moe_intermediate_size": 16, "router_bias_rate": 0.01}
    common: dict[str, Any] = {"batch_size": 8, "accumulation_steps": 2, "model": shape}
    wanted, _ = runs("wanted", micro_batch=2, **common)
    for name, after in (("before", False), ("after", True)):
        halved, _ = runs(name, loss=fits(2, after_backward=after), **common)
        assert largest_difference(wanted, halved) == 0.0
        assert runs.rows(name) == runs.rows("wanted")
        events = runs.events(name)
        assert [(e["step"], e["event"], e["before"], e["at_once"]) for e in events] == [(1, "halved", 256, 128), (1, "halved", 128, 64)]
        assert "can't allocate memory" in events[0]["reason"]
    assert sum("half as many from now on" in line for line in runs.said) == 4


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")])
def test_a_halving_in_the_middle_is_kept_by_a_resumed_run(runs: Runs, error: BaseException) -> None:
    """Guards a run that is resumed with the size that did not fit, and a halving that is done anew each step."""
    tries: list[int] = []

    def loss(model: SmartHaoAI, batch: Batch) -> list[Term]:
        tries.append(len(batch.inputs["input_ids"]))
        if len(tries) > 3 and tries[-1] > 2:
            raise error
        return lm_loss(model, batch)

    straight, _ = runs("straight", loss, batch_size=4, checkpoint_every=5)
    assert tries == [4, 4, 4, 4, *[2, 2] * 5]
    shutil.rmtree(runs.folder / "straight" / "checkpoints" / "step_000008")
    tries[:] = [0, 0, 0]
    resumed, _ = runs("straight", loss, batch_size=4, checkpoint_every=5, resume=True)
    assert tries[3:] == [2, 2] * 3 and largest_difference(straight, resumed) == 0.0
    assert [(e["step"], e["event"]) for e in runs.events("straight")] == [(4, "halved")]


def test_trials_are_halved_too(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a run that ends while precision and rows at once are measured, and one that takes bf16's lack of memory for a lack of bf16."""
    monkeypatch.setattr(planning, "CALIBRATED", 0.0)
    _, result = runs("run", fits(2), batch_size=8, precision="auto", max_steps=2)
    assert result.step == 2 and "does not run here" not in "\n".join(runs.said)
    state = json.loads((runs.folder / "run" / "checkpoints" / "step_000002" / "state.json").read_text(encoding="utf-8"))
    assert 0 < state["progress"]["at_once"] <= 2 * 32
    assert all(e["event"] == "halved" for e in runs.events("run")) and runs.events("run")


def test_the_fastest_size_is_one_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a trial of more rows than fit that ends the run."""
    ids = torch.zeros(8, 512, dtype=torch.long)
    batch = Batch({"input_ids": ids}, {"tokens": 1.0}, ids.numel(), ids.numel(), group=1)

    def work(part: Batch) -> None:
        if len(part.inputs["input_ids"]) > 2:
            raise RuntimeError(CPU_SAYS)

    assert best_positions(batch, work, "cpu") == 1024


def test_what_cannot_be_halved_says_what_to_do(runs: Runs) -> None:
    """Guards an endless loop, a trace instead of advice, and the loss of the last checkpoint."""
    with pytest.raises(ValueError, match=r"1 x 32 tokens, the fewest.*can't allocate.*data\.max_length.*activation_checkpointing"):
        runs("run", fits(0), batch_size=4)

    class Together:
        """A source whose batches are one group."""

        def __init__(self, source: Any) -> None:
            self.source = source

        def next_batch(self, progress: float) -> Batch:
            batch = self.source.next_batch(progress)
            batch.group = 0
            return batch

        def __getattr__(self, name: str) -> Any:
            return getattr(self.source, name)

    with pytest.raises(ValueError, match=r"4 x 32 tokens.*halve train\.batch_size and double train\.accumulation_steps"):
        runs("together", fits(2), batch_size=4, source=Together)
    with pytest.raises(RuntimeError, match="shapes"):
        runs("other", fits(0, RuntimeError("shapes do not match")))


def test_held_out_figures_by_halves_are_the_same(runs: Runs, tiny_tokenizer: BPETokenizer) -> None:
    """Guards tokens counted twice when a held-out batch is measured in parts."""
    model, _ = runs("run", max_steps=1)
    settings = StageConfig(data=runs.data, train=OptimizationConfig(batch_size=7))
    batches = [make_source(runs.store, settings, 0).next_batch(1.0) for _ in range(2)]
    lengths = torch.tensor(tiny_tokenizer.token_byte_lengths())
    whole = held_out_loss(model, batches, lengths, "cpu"), held_out_terms(model, batches, lm_loss, "cpu")

    def tight(module: torch.nn.Module, args: Any, inputs: dict[str, torch.Tensor]) -> None:
        if len(inputs["input_ids"]) > 2:
            raise RuntimeError(CPU_SAYS)

    model.register_forward_pre_hook(tight, with_kwargs=True)
    halves = held_out_loss(model, batches, lengths, "cpu"), held_out_terms(model, batches, lm_loss, "cpu")
    for before, after in zip(whole, halves, strict=True):
        assert after == pytest.approx(before, rel=1e-5)
    with pytest.raises(MemoryError):
        by_halves(batches[0], lambda part: (_ for _ in ()).throw(MemoryError()))


def test_an_evaluation_that_does_not_fit_is_left_out(runs: Runs) -> None:
    """Guards hours of training that end because a figure could not be measured."""
    calls: list[int] = []

    def evaluate(model: SmartHaoAI) -> dict[str, float]:
        calls.append(1)
        model.eval()
        if len(calls) == 1:
            raise RuntimeError(CPU_SAYS)
        return {"val_loss": 1.0}

    _, result = runs("run", evaluate=evaluate, eval_every=4, model={"dropout": 0.2})
    assert result.step == 8 and [row["val_loss"] for row in runs.rows("run") if row["step"] in (4, 8)] == [None, 1.0]
    assert [(e["step"], e["event"]) for e in runs.events("run")] == [(4, "not_evaluated")]


def test_memory_is_watched(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a process that the system ends without a word before, and a warning at every row."""
    monkeypatch.setattr(memory, "memory_left", lambda device: (2**30, 100 * 2**30))
    runs("run")
    assert [(e["event"], e["left_mb"], e["of_mb"]) for e in runs.events("run")] == [("memory_low", 1024, 102400)]
    assert sum("1,024 MiB of 102,400 MiB" in line for line in runs.said) == 1
    left, used = memory_left("cpu"), memory_in_use("cpu")
    if left is not None:
        assert 0 < left[0] < left[1]
    if used:
        block = torch.ones(2**24)
        assert 50 < memory_in_use("cpu")["memory_mb"] - used["memory_mb"] < 80
        del block


def test_a_containers_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the machine's memory where a container has less, and cached files that count as used."""
    files = {
        "/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n",
        "/sys/fs/cgroup/memory.current": "5000000\n",
        "/sys/fs/cgroup/memory.max": "6000000\n",
        "/sys/fs/cgroup/memory.stat": "anon 1\ninactive_file 3000000\n",
    }

    def read_text(self: Path, **options: Any) -> str:
        if str(self) not in files:
            raise FileNotFoundError(str(self))
        return files[self.as_posix()]

    monkeypatch.setattr(Path, "read_text", read_text)
    assert device.available_memory() == 4_000_000
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert device.available_memory() == 8000 * 1024
    files.clear()
    assert device.available_memory() is None


LIMITED = """
import json, resource, sys
from pathlib import Path
import torch
sys.path[:0] = [sys.argv[3]]
from loop_helpers import Runs, TRAIN
from model import BPETokenizer
from train import loop

spare, kept = int(sys.argv[1]) * 2**20, loop.Display.__enter__
def limited(self):
    if spare:  # from the first step on
        used = int(next(l for l in open("/proc/self/status") if l.startswith("VmSize")).split()[1]) * 2**10
        resource.setrlimit(resource.RLIMIT_AS, (used + spare, used + spare))
    return kept(self)
loop.Display.__enter__ = limited
folder = Path(sys.argv[2])
runs = Runs(folder, BPETokenizer.from_pretrained(sys.argv[4]), length=64)
shape = {"n_layer": 4, "n_embd": 128, "intermediate_size": 512}
model, result = runs("run", batch_size=64, micro_batch=int(sys.argv[5]), max_steps=2, model=shape)
digest = sum(float(p.detach().double().sum()) for p in model.parameters())
print(json.dumps({"at_once": runs.events("run"), "digest": digest, "rows": runs.rows("run")}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="an address-space limit is a matter of Linux")
def test_an_address_space_limit_halves_the_step(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Guards the real error of the allocator, in the middle of a pass, under a limit that whole batches exceed."""

    def trained(name: str, spare: int, micro_batch: int) -> dict[str, Any]:
        (tmp_path / name).mkdir()
        words = ["-c", LIMITED, str(spare), str(tmp_path / name), str(Path(__file__).parent), str(tokenizer_dir), str(micro_batch)]
        done = run_python(*words)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    limited = trained("limited", 150, 64)
    assert limited["at_once"] and all(event["event"] == "halved" for event in limited["at_once"])
    size = limited["at_once"][-1]["at_once"] // 64
    free = trained("free", 0, size)
    # To rounding only: where memory lies and which kernel its lack leaves differ between two processes.
    assert not free["at_once"] and limited["digest"] == pytest.approx(free["digest"], rel=1e-6)
    learned = [[{key: row[key] for key in ("step", "tokens", "loss", "grad_norm")} for row in run["rows"]] for run in (limited, free)]
    for one, other in zip(*learned, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
