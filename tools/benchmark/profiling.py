"""Where the time of a training step, and of a decoding step, goes: operations recorded by torch.profiler, added up by what they are for."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from torch.profiler import ProfilerActivity, profile, record_function

import model.transformer
from inference.sampling import SamplingSettings
from model.tokenizer import BPETokenizer
from model.transformer import SmartHaoAI
from tools.benchmark.decoding import DecodeSetting, make_engine
from tools.benchmark.training import TrainSetting, documents_of, stage_settings
from train.data import make_source
from train.loop import fit
from train.losses import lm_loss

WARM_UP = 3  # steps that are not recorded
OUTER = {"Optimizer.step": "optimiser", "loss": "loss", "_BlockedAttention": "attention", "scaled_dot_product": "attention"}
"""Beginning of an operation's name -> what everything within it is for."""
OPERATIONS = {
    "aten::bmm": "attention",
    "aten::_softmax": "attention",
    "aten::mm": "matrix products",
    "aten::addmm": "matrix products",
    "mkldnn::_linear_pointwise": "matrix products",
    "aten::mkldnn_linear": "matrix products",
    "quantized::linear": "matrix products",
    "aten::_weight_int": "matrix products",
    "aten::linalg_vector_norm": "norms",
    "aten::rms_norm": "norms",
    "aten::copy_": "copies and casts",
    "aten::cat": "copies and casts",
}
"""Beginning of an operation's name -> what it is for, where nothing around it says more."""
COMPILED = "compiled element-wise kernels"
OTHER = "other operations"
BETWEEN = "between operations (Python)"


@dataclass
class Costs:
    """Milliseconds of a step by what they were for, largest first; `steps` were recorded."""

    steps: int
    milliseconds: dict[str, float]
    operations: list[tuple[str, float, float]]
    """(operation, calls a step, milliseconds a step), largest first."""

    @property
    def total(self) -> float:
        return sum(self.milliseconds.values())


@contextlib.contextmanager
def _named_loss() -> Iterator[None]:
    """The loss recorded under its name: what it consists of is also used elsewhere."""
    real = model.transformer.linear_cross_entropy

    def named(*inputs: Any, **options: Any) -> Any:
        with record_function("loss"):
            return real(*inputs, **options)

    with patch.object(model.transformer, "linear_cross_entropy", named):
        yield


class _Recording:
    """Recorded from `start` to `stop`."""

    def __init__(self) -> None:
        self.profile = profile(activities=[ProfilerActivity.CPU])
        self.seconds = 0.0

    def start(self) -> None:
        self.profile.start()
        self.begun = time.perf_counter()

    def stop(self) -> None:
        self.seconds = time.perf_counter() - self.begun
        self.profile.stop()

    def costs(self, steps: int) -> Costs:
        found: dict[str, float] = defaultdict(float)
        single: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for event in self.profile.events() or []:
            spent = event.self_cpu_time_total / 1000 / steps
            found[purpose(event)] += spent
            single[event.name][0] += 1 / steps
            single[event.name][1] += spent
        found[BETWEEN] = max(0.0, self.seconds * 1000 / steps - sum(found.values()))
        operations = sorted(((name, calls, spent) for name, (calls, spent) in single.items()), key=lambda row: -row[2])
        return Costs(steps, dict(sorted(found.items(), key=lambda row: -row[1])), operations)


def purpose(event: Any) -> str:
    """What a recorded operation is for: by what it is part of, else by its own name."""
    inside, compiled = event, False
    while inside is not None:
        for start, name in OUTER.items():
            if inside.name.removeprefix("aten::").startswith(start):
                return name
        compiled |= inside.name.startswith(("CompiledFunction", "Torch-Compiled Region", "## Call CompiledFxGraph"))
        inside = inside.cpu_parent
    for start, name in OPERATIONS.items():
        if event.name.startswith(start):
            return name
    return COMPILED if compiled else OTHER


def training_costs(setting: TrainSetting, words: Sequence[str], steps: int = 5) -> Costs:
    """Of fit() at the settings of train_pretrain but for `words`."""
    recording = _Recording()
    done = 0

    def after_step(_: SmartHaoAI) -> dict[str, float]:
        nonlocal done
        done += 1
        if done == WARM_UP:
            recording.start()
        elif done == WARM_UP + steps:
            recording.stop()
        return {}

    with tempfile.TemporaryDirectory() as folder, _named_loss():
        settings = stage_settings(setting, [*words, f"train.max_steps={WARM_UP + steps + 1}"], folder)
        model = SmartHaoAI.from_pretrained(setting.place.model)
        tokenizer = BPETokenizer.from_pretrained(setting.place.model)
        store, _ = documents_of(setting.place)
        source = make_source(store, settings, tokenizer.pad_token_id)
        fit(settings, model, source, lm_loss, after_step, tokenizer=tokenizer, log=lambda text: None)
    return recording.costs(steps)


def decoding_costs(setting: DecodeSetting, precision: str) -> Costs:
    """Of Engine.generate; setting.prompt should be short, since it is counted."""
    engine = make_engine(setting.place.model, precision, setting.device)
    prompts = setting.prompts()

    def answer(new: int) -> None:
        engine.generate(prompts, SamplingSettings(temperature=0.0, max_new_tokens=new, eos_token_id=[]))

    for _ in range(WARM_UP):
        answer(8)
    recording = _Recording()
    recording.start()
    answer(setting.new)
    recording.stop()
    return recording.costs(setting.new)


def text(title: str, costs: Costs, operations: int) -> str:
    """A table of the purposes and one of the single operations."""
    lines = [f"{title}: {costs.total:.2f} ms a step, the profiler's own work included"]
    lines += [f"  {spent:9.2f} ms {spent / costs.total:5.0%}  {name}" for name, spent in costs.milliseconds.items()]
    lines += ["  single operations, milliseconds (calls) a step:"]
    lines += [f"  {spent:9.2f} ({calls:6.1f})  {name}" for name, calls, spent in costs.operations[:operations]]
    return "\n".join(lines)
