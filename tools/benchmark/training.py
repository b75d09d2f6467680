"""The rows of `tools.bench train`: fit() as the stages call it, the plain loop, transformers. Each counts the tokens that carry loss."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.checkpoint import load_config
from model.tokenizer import BPETokenizer
from model.transformer import SmartHaoAI
from tools.benchmark.measure import Measured, Missing, Row, Turn, relative
from tools.benchmark.plain import IGNORE, PlainRun, PlainSettings, padded_rows
from tools.benchmark.shapes import Workplace
from train.config import PretrainConfig, set_value
from train.data import Batch, BatchSource, make_source
from train.loop import fit
from train.losses import lm_loss
from train.metrics import read_jsonl
from train.runtime import DTYPES
from train.store import TokenStore, open_store

CHECK_ROWS, CHECK_LENGTH = 4, 120
TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 5e-3}
"""Relative, of the loss; the norm of the gradient may be off by twice as much."""


@dataclass(frozen=True)
class TrainSetting:
    """What all training rows of a run share."""

    place: Workplace
    seconds: float = 3.0
    """A turn ends with the step after which it has lasted this long."""
    batch_size: int = 16
    """Rows of the padded programs; ours chooses by its own settings."""
    row_length: int = 340
    device: str = "cpu"


def our_row(setting: TrainSetting, name: str, words: Sequence[str], group: str = "") -> Row:
    return Row(name, partial(ours, setting, tuple(words)), group)


def peer_rows(setting: TrainSetting, against: Sequence[str], group: str = "") -> list[Row]:
    """Each in fp32, as such programs train on a CPU, and under bf16 autocast."""
    known: dict[str, Callable[[TrainSetting, str, Turn], None]] = {"plain": plain, "transformers": transformers}
    return [
        Row(f"{name} {precision}", partial(work, setting, precision), group)
        for name, work in known.items()
        if name in against
        for precision in ("fp32", "bf16")
    ]


# ------------------------------------------------------------------------------------------------ ours


def ours(setting: TrainSetting, words: Sequence[str], turn: Turn) -> None:
    """fit() itself, at the settings of train_pretrain but for `words`; between its steps its evaluation waits for the next turn."""
    with tempfile.TemporaryDirectory() as folder:
        settings = stage_settings(setting, words, folder)
        model = SmartHaoAI.from_pretrained(setting.place.model)
        tokenizer = BPETokenizer.from_pretrained(setting.place.model)
        store = open_store(str(setting.place.documents), tokenizer, "pretrain", settings.data, log=lambda text: None)
        source = CountedSource(make_source(store, settings, tokenizer.pad_token_id), settings.train.accumulation_steps)
        said: list[str] = []
        pauses = Pauses(setting, settings, source, said, turn)
        # Nothing is ever saved: the last turn ends the run.
        fit(settings, model, source, lm_loss, pauses, tokenizer=tokenizer, log=lambda text: said.append(str(text)))


def stage_settings(setting: TrainSetting, words: Sequence[str], folder: str) -> PretrainConfig:
    """Those of train_pretrain, with nothing that only a whole run needs, and then the words."""
    settings = PretrainConfig(out_dir=folder, model={})
    settings.data.store_dir = str(setting.place.store)
    train = settings.train
    train.max_steps, train.eval_every, train.log_every = 1_000_000, 1, 1
    train.checkpoint_every, train.checkpoint_minutes, train.sample_every = 0, 0.0, 0
    train.device = setting.device
    for word in words:
        name, _, value = word.partition("=")
        set_value(settings, name, value)
    settings.check()
    return settings


class CountedSource:
    """Counts what the batches hold that fit() takes, and keeps those of the first step."""

    def __init__(self, source: BatchSource, accumulation_steps: int) -> None:
        self.source, self.accumulation_steps, self.tokens = source, accumulation_steps, 0.0
        self.first: list[Batch] = []

    def next_batch(self, progress: float) -> Batch:
        batch = self.source.next_batch(progress)
        self.tokens += batch.weights["tokens"]
        if len(self.first) < self.accumulation_steps:
            self.first.append(batch)
        return batch

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.source.load_state_dict(state)
        self.first.clear()  # what was taken before was for trying out

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)


class Pauses:
    """What fit() calls after each step. Its report of the first one, which every fast path has gone into, is what is compared."""

    def __init__(self, setting: TrainSetting, settings: PretrainConfig, source: CountedSource, said: list[str], turn: Turn) -> None:
        self.setting, self.settings, self.source, self.said, self.turn = setting, settings, source, said, turn
        self.steps, self.begun = 0, 0.0

    def __call__(self, model: SmartHaoAI) -> dict[str, float]:
        now = time.perf_counter()
        self.steps += 1
        if self.steps == 1:  # its row is written when this returns
            return {}
        if self.steps == 2:
            self.turn(self._first_step())
        elif now - self.begun < self.setting.seconds:
            return {}
        else:
            self.turn({"units": self.source.tokens, "seconds": now - self.begun})
        self.source.tokens = 0
        self.begun = time.perf_counter()
        return {}

    def _first_step(self) -> dict[str, Any]:
        row = next(row for row in read_jsonl(Path(self.settings.out_dir) / "metrics.jsonl") if row.get("step") == 1 and "loss" in row)
        file = self.setting.place.folder / f"first_step_{os.getpid()}_{id(self)}.safetensors"
        tensors = {f"{number}.{name}": value for number, batch in enumerate(self.source.first) for name, value in batch.inputs.items()}
        save_file(tensors, file)
        found = {"loss": row["loss"], "grad_norm": row["grad_norm"], "batch": str(file)}
        return {**found, "precision": running_precision(self.setting.device), "said": list(self.said)}


def running_precision(device: str) -> str:
    """The number type of the products where this is called."""
    kind = device.split(":")[0]
    names = {dtype: name for name, dtype in DTYPES.items()}
    return names[torch.get_autocast_dtype(kind)] if torch.is_autocast_enabled(kind) else "fp32"


# ------------------------------------------------------------------------------------------------ the others


def plain(setting: TrainSetting, precision: str, turn: Turn) -> None:
    """The loop of benchmark/plain.py, AdamW not fused."""
    run = PlainRun.of(load_config(setting.place.model), PlainSettings(autocast=precision == "bf16"))
    run.model.load_disk_weights(load_file(setting.place.model / "model.safetensors"))  # type: ignore[operator]
    _padded(setting, run, turn)


def transformers(setting: TrainSetting, precision: str, turn: Turn) -> None:
    """The same loop around the model of transformers, with its own way to the loss."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise Missing('pip install -e ".[parity]"') from error

    model = AutoModelForCausalLM.from_pretrained(setting.place.model, dtype=torch.float32).train()
    model.get_input_embeddings().padding_idx = None  # the token to pad with also begins documents: it is to be learned there
    settings = PlainSettings(autocast=precision == "bf16")
    _padded(setting, OtherRun(model, torch.optim.AdamW(model.parameters(), lr=settings.lr), settings), turn)


class OtherRun(PlainRun):
    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if self.settings.autocast else contextlib.nullcontext():
            return cast(Tensor, self.model(input_ids=ids, labels=labels).loss)


def _padded(setting: TrainSetting, run: PlainRun, turn: Turn) -> None:
    store, pad = documents_of(setting.place)
    batch = check_batch(setting.place)
    run.model.train()
    found = loss_and_norm(lambda: run.loss(batch.inputs["input_ids"], batch.inputs["labels"]), run.model)
    turn({**found, "precision": "bf16" if run.settings.autocast else "fp32", "batch": ""})
    number, size = 0, setting.batch_size
    while True:
        tokens, start = 0, time.perf_counter()
        while (seconds := time.perf_counter() - start) < setting.seconds:
            documents = [store.train.tokens(i % len(store.train)).tolist() for i in range(number, number + size)]
            ids, labels = padded_rows(documents, setting.row_length, pad)
            run.step(ids, labels)
            tokens += int((labels[:, 1:] != IGNORE).sum())
            number += size
        turn({"units": tokens, "seconds": seconds})


# ------------------------------------------------------------------------------------------------ what is right


def reference(place: Workplace, file: str, device: str, turn: Turn) -> None:
    """Loss and gradient of our model, eager, in fp32, on the batches in `file` (empty: the check batch), without experts row by row."""
    model = SmartHaoAI.from_pretrained(place.model, device=device).train()
    batches = read_batches(Path(file)) if file else [check_batch(place)]
    tokens = sum(batch.weights["tokens"] for batch in batches)
    loss = 0.0
    for batch in batches:
        # The balance of experts is a statistic of a batch; all else is a sum over its rows, and a row needs little memory.
        for part in [batch] if model.expert_layers else rows_of(batch):
            terms = lm_loss(model, part.to(device))
            torch.stack([term.total / (tokens if term.weight == "tokens" else len(batches)) for term in terms]).sum().backward()
            loss += float(terms[0].total.detach()) / tokens
    turn({"loss": loss, "grad_norm": gradient_norm(model)})


def read_batches(file: Path) -> list[Batch]:
    tensors = load_file(file)
    numbers = sorted({int(name.split(".")[0]) for name in tensors})
    return [as_batch({name.split(".")[1]: value for name, value in tensors.items() if int(name.split(".")[0]) == n}) for n in numbers]


def rows_of(batch: Batch) -> list[Batch]:
    return [as_batch({k: v[row : row + 1] for k, v in batch.inputs.items()}) for row in range(len(batch.inputs["labels"]))]


def as_batch(inputs: dict[str, Tensor]) -> Batch:
    labels, segments = inputs["labels"], inputs["segment_ids"]
    count = int(((labels[:, 1:] != IGNORE) & (segments[:, 1:] == segments[:, :-1])).sum())
    return Batch(inputs, {"tokens": float(count)}, labels.numel(), int((segments > 0).sum()))


def documents_of(place: Workplace) -> tuple[TokenStore, int]:
    """The store of the shared documents, and the id to pad with."""
    tokenizer = BPETokenizer.from_pretrained(place.model)
    data = PretrainConfig().data
    data.store_dir = str(place.store)
    return open_store(str(place.documents), tokenizer, "pretrain", data, log=lambda text: None), tokenizer.pad_token_id


def check_batch(place: Workplace) -> Batch:
    """A few padded rows, the same for every program."""
    store, pad = documents_of(place)
    limits = [CHECK_LENGTH - 30 * row for row in range(CHECK_ROWS)]
    ids, labels = padded_rows([store.train.tokens(row, 0, limit).tolist() for row, limit in enumerate(limits)], CHECK_LENGTH, pad)
    return as_batch({"input_ids": ids, "labels": labels, "segment_ids": (labels != IGNORE).long()})


def loss_and_norm(loss: Callable[[], Tensor], model: nn.Module) -> dict[str, float]:
    value = loss()
    value.backward()
    norm = gradient_norm(model)
    model.zero_grad(set_to_none=True)
    return {"loss": float(value.detach()), "grad_norm": norm}


def gradient_norm(model: nn.Module) -> float:
    return float(torch.stack([p.grad.float().norm() for p in model.parameters() if p.grad is not None]).norm())


def add_checks(found: Sequence[Measured], expected: dict[str, Any]) -> None:
    """Compare the first loss and gradient of rows with the reference's."""
    for row in found:
        tolerance = TOLERANCES[row.facts["precision"]]
        row.checks += [
            relative("loss", row.facts["loss"], expected["loss"], tolerance),
            relative("gradient norm", row.facts["grad_norm"], expected["grad_norm"], 2 * tolerance),
        ]


def flops_per_token(place: Workplace) -> float:
    """Useful work per token that carries loss: attention within a document of the mean length, none for padding."""
    store, _ = documents_of(place)
    return load_config(place.model).account().flops_per_token(round(store.train.token_count / len(store.train)))
