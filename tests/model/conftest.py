"""Fixtures for the model's tests: models whose parts all matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from model import HaoAIConfig, RMSNorm, SmartHaoAI

ModelMaker = Callable[..., SmartHaoAI]


@pytest.fixture(scope="session")
def make_model() -> ModelMaker:
    """Build a random model from config fields: large weights and uneven norms, no part is left out unnoticed."""

    def make(**fields: Any) -> SmartHaoAI:
        shape: dict[str, Any] = {
            "vocab_size": 61,
            "n_layer": 2,
            "n_head": 4,
            "n_kv_head": 2,
            "n_embd": 32,
            "intermediate_size": 48,
            "max_position_embeddings": 64,
            "initializer_range": 0.15,
        }
        model = SmartHaoAI(HaoAIConfig(**{**shape, **fields})).eval()
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, RMSNorm):
                    module.weight.uniform_(0.5, 1.5)
        return model

    return make
