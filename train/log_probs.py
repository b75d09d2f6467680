"""Log-probabilities of completions under a model: the one way in which preference and reinforcement learning get them.

Several sequences are packed in a row as segments; the labelled tokens of a segment are its completion. The same function serves the
policy (with gradient) and, under torch.no_grad(), the old policy and the reference: with dropout off, equal weights and equal packing
they agree to the last bit. Shapes: B rows, T tokens, N labelled tokens, S sequences, L longest completion, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.cross_entropy import labelled, linear_log_probs


@dataclass
class LogProbs:
    """Of the labelled tokens of a batch, in row-major order: so those of a sequence stand together, and sequence follows sequence."""

    values: Tensor
    """(N,) fp32, nats, with gradient."""
    sequence: Tensor
    """(N,) long, ascending: which of the S sequences, counted over rows and segments in row-major order, a token belongs to."""
    count: int
    """S, those without a labelled token included."""
    states: Tensor
    """(N, C) hidden states that the tokens were predicted from: where a value head reads."""
    entropy: Tensor | None = None
    """(N,) fp32, nats, of each token's distribution, with gradient; when asked for."""
    aux_loss: Tensor | None = None
    """In training, of a mixture of experts: its auxiliary loss, a term over "micro_batches"."""

    def sums(self) -> Tensor:
        """Log-probability of each completion, (S,); 0 for one without tokens."""
        return sequence_sums(self.values, self.sequence, self.count)

    def lengths(self) -> Tensor:
        """Labelled tokens of each sequence, (S,) long."""
        return torch.bincount(self.sequence, minlength=self.count)


def sequence_sums(values: Tensor, sequence: Tensor, count: int) -> Tensor:
    """Sums of values (N,) by sequence (N,): (count,)."""
    return values.new_zeros(count).index_add(0, sequence, values)


def pad_sequences(values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Values (N,) of consecutive sequences of these lengths (S,) as rows (S, L) with zeros behind, and their mask (S, L) bool."""
    longest = int(lengths.max()) if len(lengths) else 0
    mask = torch.arange(longest, device=lengths.device) < lengths[:, None]
    rows = values.new_zeros(mask.shape)
    return rows.masked_scatter(mask, values), mask


def sequence_numbers(input_ids: Tensor, segment_ids: Tensor | None) -> tuple[Tensor, int]:
    """Number of the sequence that each position of (B, T) belongs to, -1 before the first, and how many there are.

    Sequences are the segments (runs of an equal number above 0), or the rows where segment_ids is None.
    """
    if segment_ids is None:
        B, T = input_ids.shape
        return torch.arange(B, device=input_ids.device)[:, None].expand(B, T), B
    begins = segment_ids > 0
    begins[:, 1:] &= segment_ids[:, 1:] != segment_ids[:, :-1]
    numbers = begins.flatten().cumsum(0).view_as(segment_ids) - 1
    return numbers, int(begins.sum())


def completion_log_probs(model: nn.Module, inputs: dict[str, Tensor], temperature: float = 1.0, entropy: bool = False) -> LogProbs:
    """Log-probability of every labelled token given those before it in its own sequence.

    inputs: a batch's `input_ids` and `labels` (B, T, unshifted, -100 outside the completions), with `segment_ids` or
    `attention_mask`. `model` is a SmartHaoAI. The logits are divided by `temperature`, as in
    sampling. The first token of a sequence is given, never predicted. Raises ValueError without labels or for temperature <= 0.
    """
    if "labels" not in inputs:
        raise ValueError("log-probabilities need labels: -100 where a token is not part of a completion")
    labels, segment_ids = inputs["labels"], inputs.get("segment_ids")
    arguments = {name: value for name, value in inputs.items() if name != "labels"}
    out = model(**arguments, output_hidden_states=True, return_logits=False)
    policy: Any = model
    chosen, targets = labelled(labels, segment_ids, labels.shape[1])
    states = out.hidden_states.reshape(-1, out.hidden_states.shape[-1]).index_select(0, chosen)
    values, entropies = linear_log_probs(states, policy.head_weight, targets, policy.config.logit_softcap, temperature, entropy)
    numbers, count = sequence_numbers(inputs["input_ids"], segment_ids)
    return LogProbs(values, numbers.flatten()[chosen], count, states, entropies, out.aux_loss)
