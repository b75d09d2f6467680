"""What `tools.bench gpu` measures on one accelerator: training of shapes of 0.1B and 0.4B parameters, and decoding, one after the other."""

from __future__ import annotations

from itertools import product

from model.config import HaoAIConfig
from train.config import PretrainConfig

SWITCHES = {"compile": (True, False), "activation_checkpointing": (False, True)}
"""Settings that are tried both ways, where this version has them; the first of each is the row that the goal is about."""


def variants(batch: int, length: int) -> dict[str, list[str]]:
    """Row name -> words: every combination of the switches that there are."""
    train = PretrainConfig().train
    there = {name: values for name, values in SWITCHES.items() if hasattr(train, name)}
    common = ["train.precision=bf16", "train.optimizer=adamw", f"train.batch_size={batch}", f"data.max_length={length}"]
    rows = {}
    for values in product(*there.values()):
        spelling = {name: ("on", "off") if isinstance(getattr(train, name), str) else ("true", "false") for name in there}
        chosen = [f"{name}={spelling[name][not value]}" for name, value in zip(there, values, strict=True)]
        rows[" ".join(["ours", *chosen])] = [*common, *(f"train.{word}" for word in chosen)]
    return rows


def planned_mb(config: HaoAIConfig, batch: int, length: int) -> float:
    """What the account foresees as the peak of a step, 2^20 bytes."""
    return config.account().training_bytes(batch, length, mixed_precision=True) / 2**20
