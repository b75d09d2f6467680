"""Runs of `fit` on a tiny model, and what they leave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from training_helpers import text_rows, write_jsonl

from model import BPETokenizer, HaoAIConfig, SmartHaoAI
from train.config import DataConfig, OptimizationConfig, PretrainConfig
from train.data import Batch, make_source
from train.loop import FitResult, fit
from train.losses import Term, lm_loss
from train.metrics import OF_THE_MACHINE, read_jsonl
from train.store import open_store

SHAPE = {"n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 16, "intermediate_size": 32, "max_position_embeddings": 64}
TRAIN: dict[str, Any] = {
    "precision": "fp32",
    "batch_size": 2,
    "max_steps": 8,
    "log_every": 1,
    "checkpoint_every": 0,
    "checkpoint_minutes": 0,
    "warmup_steps": 0,
    "schedule": "constant",
    "lr": 3e-3,
    "keep_checkpoints": 50,
}


class Runs:
    """runs(name, model={...}, evaluate=..., loss=..., resume=..., **train settings) -> (model, result) in folder / name."""

    def __init__(self, folder: Path, tokenizer: BPETokenizer, length: int = 32) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        self.data = DataConfig(store_dir=str(folder / "store"), val_share=0.0, max_length=length)
        file = write_jsonl(folder / "t.jsonl", text_rows(60))
        self.store = open_store(str(file), tokenizer, "pretrain", self.data, lambda text: None)
        self.said: list[str] = []

    def __call__(
        self,
        name: str,
        loss: Any = lm_loss,
        evaluate: Any = None,
        model: Any = None,
        resume: bool = False,
        source: Any = None,
        **train: Any,
    ) -> tuple[SmartHaoAI, FitResult]:
        settings = PretrainConfig(
            out_dir=str(self.folder / name), data=self.data, train=OptimizationConfig(**{**TRAIN, **train}), resume=resume
        )
        settings.check()
        torch.manual_seed(0)
        network = SmartHaoAI(HaoAIConfig(vocab_size=self.tokenizer.vocab_size, **{**SHAPE, **(model or {})}))
        batches = make_source(self.store, settings, self.tokenizer.pad_token_id)
        batches = batches if source is None else source(batches)
        log: Callable[[str], object] = self.said.append
        return network, fit(settings, network, batches, loss, evaluate, tokenizer=self.tokenizer, log=log)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """metrics.jsonl without what differs between two equal runs."""
        return [{k: v for k, v in row.items() if k not in OF_THE_MACHINE} for row in read_jsonl(self.folder / name / "metrics.jsonl")]

    def events(self, name: str) -> list[dict[str, Any]]:
        return read_jsonl(self.folder / name / "events.jsonl")


def largest_difference(first: SmartHaoAI, second: SmartHaoAI) -> float:
    return max(float((a - b).detach().abs().max()) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def changed_at(steps: set[int], change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """lm_loss with another loss at these calls, counted from 1."""
    calls: list[int] = []

    def loss(model: SmartHaoAI, batch: Batch) -> list[Term]:
        calls.append(1)
        first, *others = lm_loss(model, batch)
        return [Term("loss", change(first.total) if len(calls) in steps else first.total, first.weight), *others]

    return loss
