"""Helpers of the tests that compare with transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model import SmartHaoAI
from tools.parity import TIE, load_theirs, router_gap

TOLERANCE = 2e-5  # of the largest logit: two implementations, fp32

__all__ = ["assert_equal_logits", "clear_ids", "load_theirs"]


def clear_ids(model: SmartHaoAI, rows: int, length: int) -> Tensor:
    """Random ids (rows, length) on which no router of the model meets a tie, whose outcome is a rounding error."""
    for _ in range(20):
        ids = torch.randint(model.config.vocab_size, (rows, length))
        with torch.no_grad():
            if router_gap(model, ids) >= TIE:
                return ids
    raise AssertionError("every draw had a tie: the routers of this model are not decisive")


def assert_equal_logits(ours: SmartHaoAI, theirs: Any, length: int = 40) -> None:
    ids = clear_ids(ours, 2, length)
    with torch.no_grad():
        actual, expected = ours(ids).logits, theirs(ids).logits
    error, largest = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert error <= TOLERANCE * largest, f"largest error {error:.3g} with a largest logit of {largest:.3g}"
