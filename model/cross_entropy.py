"""Cross-entropy of a linear head whose logits are never stored as a whole.

The head's product, the softmax and both gradients are computed for `CHUNK` rows at a time, in the forward pass; backward only
scales them. Memory is one chunk of fp32 logits whatever the batch. N rows, C channels, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 1024
ROW_MULTIPLE = 128


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


@torch.no_grad()
def token_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float = 0.0) -> Tensor:
    """log softmax(hidden_n @ weight.T)[target_n] for each row, (N,) fp32, not differentiable."""
    dtype = compute_dtype(hidden)
    weight = weight.to(dtype)
    parts = []
    for rows, wanted in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
        logits = capped((rows.to(dtype) @ weight.T).float(), softcap)
        parts.append(logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(dim=1))
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


def capped(logits: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(logits / softcap); unchanged for softcap = 0."""
    return torch.tanh(logits / softcap) * softcap if softcap else logits


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The type in which products with `tensor` run now: autocast's, or its own."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


class _LinearCrossEntropy(torch.autograd.Function):
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
            # Few different shapes: CPU kernels keep memory for each one they have met. Rows of weight 0 change no sum.
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
            for start in range(0, hidden.shape[0], CHUNK):
                rows = hidden[start : start + CHUNK].to(dtype)
                wanted = targets[start : start + CHUNK, None]
                logits = capped((rows @ head.T).float(), softcap)  # (chunk, V)
                slope = 1 - (logits / softcap).square() if softcap else None  # of the cap
                log_total = logits.logsumexp(dim=1, keepdim=True)
                chosen = logits.gather(1, wanted)
                losses = log_total - chosen
                if hits is not None:
                    hits[start : start + CHUNK] = (chosen >= logits.amax(dim=1, keepdim=True))[: count - start, 0]
                scale = None if token_weights is None else token_weights[start : start + CHUNK, None].float()
                total += (losses if scale is None else losses * scale).sum()
                if not (needs_hidden or needs_weight):
                    continue
                gradient = logits.sub_(log_total).exp_()
                gradient.scatter_add_(1, wanted, torch.full_like(losses, -1.0))
                gradient = gradient if slope is None else gradient.mul_(slope)
                gradient = (gradient if scale is None else gradient.mul_(scale)).to(dtype)
                if grad_hidden is not None:
                    grad_hidden[start : start + CHUNK] = gradient @ head
                if grad_weight is not None:
                    grad_weight += gradient.T @ rows
        ctx.save_for_backward(None if grad_hidden is None else grad_hidden[:count], grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad_output.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad_output).to(ctx.weight_dtype),
            None,
            None,
            None,
            None,
        )
