"""Losses: pure functions from a model and a batch to named terms.

Each term is a sum together with the name of the weight it is divided by. The loop divides by the weight's total over all
micro-batches, so that a token counts the same however a step is split.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from train.data import Batch


@dataclass
class Term:
    """`total` (a scalar with gradient) is divided by the step's total of `weight`."""

    name: str
    total: Tensor
    weight: str


def lm_loss(model: torch.nn.Module, batch: Batch) -> list[Term]:
    """Next-token cross-entropy over the labelled tokens, in nats: pretraining and SFT differ only by their labels.

    A mixture of experts adds its auxiliary loss: a statistic of each micro-batch, averaged over those of a step.
    """
    out = model(**batch.inputs)
    terms = [Term("loss", out.loss_sum, "tokens")]
    if out.aux_loss is not None:
        terms.append(Term("aux_loss", out.aux_loss, "micro_batches"))
    for name, total in out.deep_losses.items():
        # Over the same weight as the loss, so that a token counts the same however a step is split.
        terms.append(Term(name, total, "tokens"))
    return terms
