"""Helpers of the tests of rollouts, PPO and GRPO: a source over a tiny model, and rewards that any answer can get."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from inference import Completion
from model import BPETokenizer, SmartHaoAI
from train.config import RolloutConfig
from train.prompts import Prompt
from train.rollout import RolloutSource
from train.runtime import Precision

TEMPERATURE = 0.9


def make_prompts(tokenizer: BPETokenizer, count: int) -> list[Prompt]:
    """Prompts of different lengths; the reference of each is its number."""
    texts = [f"{'请问 ' * (n % 4)}{n} + {n + 1} = ?" for n in range(count)]
    rendered = [tokenizer.render([{"role": "user", "content": text}], add_generation_prompt=True).ids for text in texts]
    return [Prompt(tuple(ids), text, str(n)) for n, (ids, text) in enumerate(zip(rendered, texts, strict=True))]


class HashJudge:
    """Rewards between 0 and 1 that depend on the answer's tokens alone, in `levels` steps."""

    weights: dict[str, float] = {}
    reward_model = None

    def __init__(self, levels: int = 100) -> None:
        self.levels = levels

    def __call__(self, pairs: Sequence[tuple[Prompt, Completion]]) -> list[dict[str, float]]:
        return [{"reward": zlib.crc32(bytes(str(reply.ids), "ascii")) % self.levels / self.levels} for _, reply in pairs]


def make_source(
    kind: Callable[..., RolloutSource],
    model: SmartHaoAI,
    tokenizer: BPETokenizer,
    *first: Any,
    prompts: int = 6,
    judge: Any = None,
    rollout: dict[str, Any] | None = None,
    **more: Any,
) -> RolloutSource:
    """A source of this kind that serves the model; `first` are its own settings."""
    settings = RolloutConfig(**{"prompts": 4, "samples": 2, "max_new_tokens": 12, "temperature": TEMPERATURE, **(rollout or {})})
    shape: dict[str, Any] = {"row_length": 200, "batch_size": 3, **more}
    source = kind(*first, tokenizer, make_prompts(tokenizer, prompts), judge or HashJudge(), settings, **shape)
    source.attach(model)
    source.precision = Precision("fp32", "cpu", "")
    return source


def perturb(model: torch.nn.Module, size: float) -> None:
    """What an update does to the weights, roughly."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn_like(parameter))
