"""Attention of whole texts on a CPU, for training and evaluation: a few queries at a time, in plain matrix products.

The scores of a block of queries stay in the cache from the product that makes them to the one that uses them, keys that no query of
the block may see are left out, and the backward pass is products in the compute type, too (that of torch's kernel for CPUs is not).
Shapes: B batch, T time, H query heads, K key/value heads, G = H / K, D head_dim, n queries of a block, s keys that they may see.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CACHED = 2**21  # bytes of scores that stay in the processor's cache
LONGEST_KEPT = 1024  # tokens up to which the attention weights are kept for the backward pass; beyond, they are computed again


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, window: int | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v, causal: q (B, H, T, D), k and v (B, K, T, D) -> (B, H, T, D); differentiable once.

    mask (B or 1, 1, T, T) additive, with what causality and the window forbid; None: plain causality. window: keys that lie that far
    back are not looked at.
    """
    with torch.autocast(q.device.type, enabled=False):
        return _BlockedAttention.apply(q, k, v, mask, window)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, window: int | None) -> Tensor:
        B, H, T, D = q.shape
        K = k.shape[1]
        scaled = (q * D**-0.5).view(B, K, H // K, T, D)
        out = torch.empty_like(scaled)
        kept: list[Tensor] = []
        keeps = T <= LONGEST_KEPT and any(ctx.needs_input_grad)
        ctx.blocks = _blocks(T, B * H * q.element_size(), window)
        for part, seen in ctx.blocks:
            weights = _weights(scaled, k, mask, part, seen)
            out[:, :, :, part] = (weights @ v[:, :, seen]).view(B, K, H // K, -1, D)
            kept += [weights] if keeps else []
        ctx.save_for_backward(scaled, k, v, mask, *kept)
        return out.view(B, H, T, D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        scaled, k, v, mask, *kept = ctx.saved_tensors
        B, K, G, T, D = scaled.shape
        gradient = gradient.reshape(B, K, G, T, D)
        grad_q, grad_k, grad_v = torch.empty_like(scaled), torch.zeros_like(k), torch.zeros_like(v)
        for index, (part, seen) in enumerate(ctx.blocks):
            weights = kept[index] if kept else _weights(scaled, k, mask, part, seen)
            above = gradient[:, :, :, part].reshape(B, K, -1, D)
            grad_v[:, :, seen] += weights.transpose(2, 3) @ above
            of_weights = above @ v[:, :, seen].transpose(2, 3)
            of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            grad_q[:, :, :, part] = (of_scores @ k[:, :, seen]).view(B, K, G, -1, D)
            grad_k[:, :, seen] += of_scores.transpose(2, 3) @ scaled[:, :, :, part].reshape(B, K, -1, D)
        return (grad_q * D**-0.5).view(B, K * G, T, D), grad_k, grad_v, None, None


def _blocks(length: int, bytes_per_score: int, window: int | None) -> list[tuple[slice, slice]]:
    """Queries that are worked on together, and the keys that one of them may see. bytes_per_score: over batch and heads."""
    count = max(32, CACHED // (bytes_per_score * length) // 32 * 32)
    starts = range(0, length, count)
    oldest = [0 if window is None else max(0, start - window + 1) for start in starts]
    return [(slice(a, min(a + count, length)), slice(first, min(a + count, length))) for a, first in zip(starts, oldest, strict=True)]


def _weights(scaled: Tensor, k: Tensor, mask: Tensor | None, part: slice, seen: slice) -> Tensor:
    """The attention weights (B, K, G * n, s) of a block; scaled (B, K, G, T, D): the queries over sqrt(D)."""
    B, K, G, _, D = scaled.shape
    n, s = part.stop - part.start, seen.stop - seen.start
    scores = scaled[:, :, :, part].reshape(B, K, G * n, D) @ k[:, :, seen].transpose(2, 3)
    if mask is None:
        later = torch.full((n, n), float("-inf"), dtype=scores.dtype, device=scores.device).triu_(1)
        scores.view(B, K, G, n, s)[..., s - n :] += later
    else:
        scores.view(B, K, G, n, s).add_(mask[:, None, :, part, seen])
    return torch.softmax(scores, dim=-1)
