"""Cross-entropy and log-probabilities of a linear head whose logits are never stored as a whole.

The head's product and the softmax are computed for `CHUNK` rows at a time: memory is one chunk of fp32 logits whatever the batch.
The cross-entropy, a sum, computes both gradients in the forward pass, and backward only scales them; log-probabilities, which each
get a gradient of their own, compute the logits once more in backward. N rows, C channels, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

CHUNK = 1024
CACHED = 2**21  # bytes of fp32 logits that stay in a CPU's cache from one pass over them to the next
ROW_MULTIPLE = 128  # CPU kernels keep memory for each shape they have met: rows are padded so that few different ones occur
IGNORE = -100


def labelled(labels: Tensor, segment_ids: Tensor | None, width: int, distance: int = 1) -> tuple[Tensor, Tensor]:
    """Where the labelled tokens are predicted, and what: rows (N,) of states (B * width, C), and targets (N,). State t - distance
    predicts label t of the same document. labels and segment_ids (B, T); labels of IGNORE are left out."""
    targets = labels[:, distance:]
    if segment_ids is not None:
        targets = targets.masked_fill(segment_ids[:, distance:] != segment_ids[:, :-distance], IGNORE)
    row, column = (targets != IGNORE).nonzero(as_tuple=True)
    return row * width + column, targets[row, column]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None = None,
    softcap: float = 0.0,
    hits: Tensor | None = None,
) -> Tensor:
    """sum_n w_n * -log softmax(hidden_n @ weight.T)[target_n], a scalar in nats.

    hidden (N, C), weight (V, C), targets (N,) without ignored rows, token_weights (N,) or None for ones. Differentiable in
    hidden and weight. softcap > 0: logits are softcap * tanh(logits / softcap). hits (N,) bool is filled with where the target has
    the largest logit. Runs in the autocast type when autocast is on; the softmax and the sum are fp32.
    """
    if not torch.is_grad_enabled():
        # Inside an autograd function a parameter asks for its gradient even under no_grad: evaluation would pay for it.
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearCrossEntropy.apply(hidden, weight, targets, token_weights, softcap, hits)


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float = 0.0,
    temperature: float = 1.0,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(logits_n / temperature)[target_n] for each row, (N,) nats, and with `entropy` that of each row's distribution, (N,).

    logits = hidden (N, C) @ weight (V, C).T, capped as in `linear_cross_entropy`; targets (N,) without ignored rows. Both results are
    fp32 (float64 for float64 inputs) and differentiable once in hidden and weight. Raises ValueError for a temperature of 0 or less.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}: greedy decoding has no log-probabilities")
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    values, entropies = _LinearLogProbs.apply(hidden, weight, targets, softcap, temperature, entropy)
    return values, entropies if entropy else None


def capped(logits: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(logits / softcap); unchanged for softcap = 0."""
    return torch.tanh(logits / softcap) * softcap if softcap else logits


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The type in which products with `tensor` run now: autocast's, or its own."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


class ScaledGradients(torch.autograd.Function):
    """A scalar function of (hidden, weight, more ...) that keeps both gradients from its forward pass, and weight's dtype."""

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad_output.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad_output).to(ctx.weight_dtype),
            *[None] * (len(ctx.needs_input_grad) - 2),
        )


class _LinearCrossEntropy(ScaledGradients):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        token_weights: Tensor | None,
        softcap: float,
        hits: Tensor | None,
    ) -> Tensor:
        dtype = compute_dtype(hidden)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        head = weight.to(dtype)
        count = hidden.shape[0]
        if surplus := -count % ROW_MULTIPLE:
            # Rows of weight 0 change no sum.
            if token_weights is None:
                token_weights = torch.ones(count, device=hidden.device)
            hidden, targets, token_weights = (
                F.pad(hidden, (0, 0, 0, surplus)),
                F.pad(targets, (0, surplus)),
                F.pad(token_weights, (0, surplus)),
            )
        with torch.autocast(hidden.device.type, enabled=False):
            total = torch.zeros((), device=hidden.device, dtype=torch.float32)
            grad_hidden = torch.empty_like(hidden) if needs_hidden else None
            grad_weight = torch.zeros(weight.shape, device=weight.device, dtype=torch.float32) if needs_weight else None
            for part in _chunks(hidden.shape[0]):
                rows = hidden[part].to(dtype)
                logits = rows @ head.T  # (chunk, V)
                weights, right = (None if values is None else values[part] for values in (token_weights, hits))
                total += _losses(logits, targets[part, None], weights, right, softcap, needs_hidden or needs_weight)
                gradient = logits  # it was put in their place
                if grad_hidden is not None:
                    grad_hidden[part] = gradient @ head
                if grad_weight is not None:
                    grad_weight += gradient.T @ rows
        ctx.save_for_backward(None if grad_hidden is None else grad_hidden[:count], grad_weight)
        ctx.weight_dtype = weight.dtype
        return total


def _losses(logits: Tensor, wanted: Tensor, token_weights: Tensor | None, hits: Tensor | None, softcap: float, gradient: bool) -> Tensor:
    """Summed loss of logits (n, V), in fp32; with `gradient` d loss / d logits takes the place of the logits.

    On a CPU a few rows at a time, so that the fp32 copy of them stays in its cache over all passes.
    """
    total = torch.zeros((), device=logits.device, dtype=torch.float32)
    count = max(8, CACHED // (4 * logits.shape[1])) if logits.device.type == "cpu" else CHUNK
    copy = logits.new_empty((min(count, len(logits)), logits.shape[1]), dtype=torch.float32)
    for start in range(0, len(logits), count):
        part = slice(start, start + count)
        block, target = logits[part], wanted[part]
        values = copy[: len(block)].copy_(block)
        if softcap:
            values = capped(values, softcap)
            slope = 1 - (values / softcap).square()
        chosen = values.gather(1, target)
        largest = values.amax(dim=1, keepdim=True)
        if hits is not None:
            hits[part] = (chosen >= largest)[: len(hits[part]), 0]
        total_exp = values.sub_(largest).exp_().sum(dim=1, keepdim=True)
        losses = total_exp.log() + largest - chosen
        scale = None if token_weights is None else token_weights[part, None].float()
        total += (losses if scale is None else losses * scale).sum()
        if gradient:
            values.mul_(total_exp.reciprocal())
            values.scatter_add_(1, target, torch.full_like(chosen, -1.0))
            if softcap:
                values.mul_(slope)
            block.copy_(values if scale is None else values.mul_(scale))
    return total


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        softcap: float,
        temperature: float,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.dtype, ctx.softcap, ctx.temperature, ctx.entropy = compute_dtype(hidden), softcap, temperature, entropy
        ctx.save_for_backward(hidden, weight, targets)
        head = weight.to(ctx.dtype)
        values = torch.empty(len(targets), dtype=torch.promote_types(ctx.dtype, torch.float32), device=hidden.device)
        entropies = torch.empty_like(values) if entropy else values.new_zeros(0)
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _chunks(len(targets)):
                count = len(targets[part])
                logs = _log_softmax(_row_chunk(hidden[part], ctx.dtype), head, softcap, temperature)[0][:count]
                values[part] = logs.gather(1, targets[part, None])[:, 0]
                if entropy:
                    entropies[part] = -(logs * logs.exp()).sum(dim=1)
        return values, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor, grad_entropies: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, targets = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        head = weight.to(ctx.dtype)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros(weight.shape, device=weight.device, dtype=grad_values.dtype) if needs_weight else None
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _chunks(len(targets)):
                rows, count = _row_chunk(hidden[part], ctx.dtype), len(targets[part])
                logs, slope = _log_softmax(rows, head, ctx.softcap, ctx.temperature)
                # d log p_target / d logit_j = [j = target] - p_j;   d entropy / d logit_j = -p_j (log p_j + entropy)
                upstream = F.pad(grad_values[part], (0, len(rows) - count))[:, None]
                chosen = F.pad(targets[part], (0, len(rows) - count))[:, None]
                factor = -upstream
                if ctx.entropy:
                    entropy = -(logs * logs.exp()).sum(dim=1, keepdim=True)
                    factor = factor - F.pad(grad_entropies[part], (0, len(rows) - count))[:, None] * (logs + entropy)
                gradient = logs.exp_() * factor
                gradient.scatter_add_(1, chosen, upstream)
                gradient = gradient.mul_(slope / ctx.temperature).to(ctx.dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = (gradient @ head)[:count].to(grad_hidden.dtype)
                if grad_weight is not None:
                    grad_weight += gradient.T @ rows
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None


def _chunks(count: int) -> list[slice]:
    return [slice(start, start + CHUNK) for start in range(0, count, CHUNK)]


def _row_chunk(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """rows (n, C) in `dtype`, with rows of zeros after them up to a multiple of ROW_MULTIPLE."""
    return F.pad(rows.to(dtype), (0, 0, 0, -len(rows) % ROW_MULTIPLE))


def _log_softmax(rows: Tensor, head: Tensor, softcap: float, temperature: float) -> tuple[Tensor, Tensor | float]:
    """Log-probabilities (n, V) of rows (n, C), in fp32 or better, and the slope of the cap at each logit."""
    logits = rows @ head.T
    logits = capped(logits.to(torch.promote_types(logits.dtype, torch.float32)), softcap)
    slope = 1 - (logits / softcap).square() if softcap else 1.0
    return (logits / temperature).log_softmax(dim=1), slope
