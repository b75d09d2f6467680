"""ModelOutput: what a forward pass of SmartHaoAI returns.

Shapes: B batch, T time, C channels, V vocabulary, n reasoning steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class ModelOutput:
    """What a forward pass returns; fields that were not asked for are None."""

    logits: Tensor | None = None
    """(B, T, V), or (B, 1, V) with last_only."""
    loss: Tensor | None = None
    """Mean cross-entropy over the labelled tokens, nats; 0 when there is none."""
    loss_sum: Tensor | None = None
    """The same, summed: what a token-weighted accumulation divides by its own total."""
    loss_tokens: int = 0
    """Number of labelled tokens in the sum."""
    aux_loss: Tensor | None = None
    """What training adds to the loss: the auxiliary terms, each with its coefficient; None for a plain model or in evaluation."""
    aux_terms: dict[str, Tensor] = field(default_factory=dict)
    """The same terms by name, without coefficients: `balance` and `router_z` of a mixture of experts."""
    deep_losses: dict[str, Tensor] = field(default_factory=dict)
    """Losses of the training-only heads, summed over the labelled tokens, each with its coefficient."""
    hidden_states: Tensor | None = None
    """(B, T, C) after the final norm."""
    confidence: Tensor | None = None
    """(B, T) of a model with a reasoning head, in evaluation: estimated probability that the most probable next token is right."""
    steps_used: Tensor | None = None
    """(B, T) reasoning steps that each token took, where halting is on."""
    reasoning_states: Tensor | None = None
    """(n + 1, B, T, C) with output_reasoning: the latent states, from the beginning to after the last step."""
    step_hidden_states: Tensor | None = None
    """(n, B, T, C) with output_reasoning: what the head would predict from after each step; `hidden_states` is the last of them."""
    step_confidence: Tensor | None = None
    """(n, B, T) with output_reasoning: `confidence` after each step."""
