"""Helpers of the tests that compare with transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model import SmartHaoAI
from tools.parity import TIE, load_theirs, router_gap

TOLERANCE = 2e-5  # of the largest logit: two implementations, fp32

__all__ = ["assert_equal_logits", "clear_ids", "load_theirs"]


@torch.no_grad()
def clear_ids(model: SmartHaoAI, rows: int, length: int) -> Tensor:
    """Random ids (rows, length) on which no router of the model meets a tie, whose outcome is a rounding error.

    Where many routers make one likely somewhere, each row is drawn token by token: a token changes no choice before it.
    """
    ids = torch.randint(model.config.vocab_size, (rows, length))
    if router_gap(model, ids) >= TIE:
        return ids
    return torch.cat([_clear_row(model, length) for _ in range(rows)])


def _clear_row(model: SmartHaoAI, length: int) -> Tensor:
    row = torch.zeros(1, 0, dtype=torch.long)
    for _ in range(40 * length):
        longer = torch.cat((row, torch.randint(model.config.vocab_size, (1, 1))), dim=1)
        if router_gap(model, longer) >= TIE:
            row = longer
        if row.shape[1] == length:
            return row
    raise AssertionError("no token without a tie: the routers of this model are not decisive")


def assert_equal_logits(ours: SmartHaoAI, theirs: Any, length: int = 40) -> None:
    ids = clear_ids(ours, 2, length)
    with torch.no_grad():
        actual, expected = ours(ids).logits, theirs(ids).logits
    error, largest = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert error <= TOLERANCE * largest, f"largest error {error:.3g} with a largest logit of {largest:.3g}"
