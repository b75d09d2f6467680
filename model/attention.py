"""Attention: rotary positions, grouped-query attention with optional QK-norm, masks for windows, padding and packed documents.

Shapes: B batch, T time (queries), S keys, C channels (n_embd), H query heads, K key/value heads, D head_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.blocked_attention import blocked_attention
from model.cache import LayerCache
from model.config import HaoAIConfig


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in fp32 (Zhang and Sennrich, 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(x.dtype)


class RotaryEmbedding(nn.Module):
    """Rotary position embedding, half-split form (Su et al., 2021), with linear, YaRN and llama3 context extension.

    `forward(positions (B, T))` gives cos and sin (B, 1, T, D) in fp32. Frequencies are recomputed from the config, never saved.
    """

    def __init__(self, config: HaoAIConfig) -> None:
        super().__init__()
        self.inverse_frequency: Tensor
        self.register_buffer("inverse_frequency", None, persistent=False)
        self.reset(config)

    def reset(self, config: HaoAIConfig, device: torch.device | str | None = None) -> None:
        """Compute the frequencies again: after the module was moved without its values."""
        frequencies, self.attention_scale = rotary_frequencies(config)
        self.inverse_frequency = frequencies.to(device)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[:, None, :, None].float() * self.inverse_frequency  # (B, 1, T, D/2)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self.attention_scale, angles.sin() * self.attention_scale


def rotary_frequencies(config: HaoAIConfig) -> tuple[Tensor, float]:
    """Inverse frequencies (D/2,) and the factor on cos and sin for the config's `rope_scaling`.

    linear: Chen et al., 2023; YaRN: Peng et al., 2023; llama3: the frequency bands of Llama 3.1.
    """
    size, theta = config.head_size, config.rope_theta
    frequencies = theta ** -(torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies, 1.0
    kind, factor = config.rope_type, float(scaling["factor"])
    original = int(scaling.get("original_max_position_embeddings") or config.max_position_embeddings)
    if kind == "linear":
        return frequencies / factor, 1.0
    if kind == "llama3":
        low, high = float(scaling.get("low_freq_factor", 1.0)), float(scaling.get("high_freq_factor", 4.0))
        turns = original * frequencies / (2 * math.pi)  # full turns within the original context
        blend = ((turns - low) / (high - low)).clamp(0, 1)
        return frequencies * (blend + (1 - blend) / factor), 1.0
    fast, slow = float(scaling.get("beta_fast") or 32), float(scaling.get("beta_slow") or 1)

    def dimension(turns: float) -> float:
        """Index of the dimension that makes `turns` full turns within the original context."""
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low_dim, high_dim = dimension(fast), dimension(slow)
    if scaling.get("truncate", True):
        low_dim, high_dim = math.floor(low_dim), math.ceil(high_dim)
    low_dim, high_dim = max(low_dim, 0), min(high_dim, size - 1)
    ramp = ((torch.arange(size // 2, dtype=torch.float32, device="cpu") - low_dim) / max(high_dim - low_dim, 0.001)).clamp(0, 1)
    scale = scaling.get("attention_factor")
    if scale is None:
        numerator, denominator = scaling.get("mscale"), scaling.get("mscale_all_dim")
        scale = _yarn_scale(factor, numerator) / _yarn_scale(factor, denominator) if numerator and denominator else _yarn_scale(factor, 1.0)
    return frequencies * (1 - ramp) + frequencies / factor * ramp, float(scale)


def _yarn_scale(factor: float, strength: float) -> float:
    return 0.1 * strength * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of x (B, H, T, D); the result keeps x's dtype."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


def attention_mask(
    query_positions: Tensor,
    key_positions: Tensor,
    window: int | None,
    key_valid: Tensor | None,
    query_segments: Tensor | None,
    key_segments: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Additive mask (B or 1, 1, T, S), 0 where a query may look and -inf elsewhere: causal, in the window, real, same document.

    query_positions (T,) and key_positions (S,) count slots of the row; key_valid (B, S) is False on padding; segments (B, T / S)
    number the packed documents.
    """
    distance = query_positions[:, None] - key_positions[None, :]  # (T, S)
    allowed = distance >= 0
    if window is not None:
        allowed = allowed & (distance < window)
    allowed = allowed[None, None]
    if key_valid is not None:
        # A padded query has no real key; it keeps itself, so that no row of the softmax is empty (never a NaN).
        allowed = allowed & (key_valid[:, None, None, :] | (distance == 0)[None, None])
    if query_segments is not None and key_segments is not None:
        allowed = allowed & (query_segments[:, None, :, None] == key_segments[:, None, None, :])
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))


@dataclass
class TokenContext:
    """What the layers know of the tokens of one forward pass."""

    input_ids: Tensor
    """(B, T)"""
    positions: Tensor
    """(B or 1, T) places in their documents, counted from 0."""
    cos: Tensor
    sin: Tensor
    real: Tensor | None = None
    """(B, T) false on padding; None: all are real."""
    first_values: Tensor | None = None
    """(B, K, T, D) the first layer's values, for the layers that mix them in."""
    kept: dict[int, Tensor] = field(default_factory=dict)
    """Outputs (B, T, C) of the layers that deep supervision looks at."""


class SmartAttention(nn.Module):
    """Causal grouped-query self-attention. q, k and v come from one fused product; on disk they are three matrices.

    The optional parts act outside of softmax(q k^T) v, so that every kernel serves them: a temperature is a factor on the queries,
    a gate one on the output. Each starts without an effect (`reset_parts`).
    """

    def __init__(self, config: HaoAIConfig, layer: int) -> None:
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.kv_heads, config.head_size
        self.window = config.layer_window(layer)
        self.layer = layer
        self.dropout = config.attention_dropout
        self.kernel = attend
        self.qkv_proj = nn.Linear(config.n_embd, (self.n_head + 2 * self.n_kv_head) * self.head_dim, config.attention_bias)
        self.o_proj = nn.Linear(self.n_head * self.head_dim, config.n_embd, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        gates = {"none": 0, "head": self.n_head, "element": self.n_head * self.head_dim}[config.attention_gate]
        self.gate_proj = nn.Linear(config.n_embd, gates, bias=False) if gates else None
        self.temperature_kind = config.attention_temperature
        sizes = {"query": (self.n_head, self.head_dim), "length": (self.n_head,)}
        self.temperature = nn.Parameter(torch.empty(sizes[self.temperature_kind])) if self.temperature_kind in sizes else None
        mixes = config.value_residual and layer > 0
        self.value_mix = nn.Parameter(torch.empty(self.n_kv_head)) if mixes else None
        tabled = config.layer_has_value_embedding(layer)
        self.value_table = nn.Embedding(config.vocab_size, self.n_kv_head * self.head_dim) if tabled else None
        self.gives_values = config.value_residual and layer == 0
        self.reset_parts()

    def reset_parts(self) -> None:
        """Give the optional parts the values at which they change nothing."""
        for part in (self.temperature, self.value_mix):
            if part is not None:
                nn.init.zeros_(part)
        for module in (self.gate_proj, self.value_table):
            if module is not None:
                nn.init.zeros_(module.weight)

    def forward(self, x: Tensor, context: TokenContext, mask: Tensor | None, cache: LayerCache | None = None) -> Tensor:
        """x (B, T, C); mask (B or 1, 1, T, S) additive, or None: T = S tokens with plain causality, or one token that sees all."""
        B, T, _ = x.shape
        H, D = self.n_head, self.head_dim
        q, k, v = self._heads(x, context)
        if cache is not None:
            k, v = (held.to(q.dtype) for held in cache.append(k, v))
        dropout = self.dropout if self.training else 0.0
        y = self.kernel(q, k, v, mask, dropout, cache is None, self.window)  # (B, H, T, D)
        if self.gate_proj is not None:
            gate = 2 * torch.sigmoid(self.gate_proj(x).float())
            y = y * gate.view(B, T, H, -1).transpose(1, 2).to(y.dtype)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, H * D))

    def remember(self, x: Tensor, context: TokenContext, cache: LayerCache) -> None:
        """Put the keys and values of x (B, T, C) into the cache and compute nothing else."""
        _, k, v = self._heads(x, context)
        cache.append(k, v)

    def _heads(self, x: Tensor, context: TokenContext) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C) -> rotated queries (B, H, T, D) and keys, and values, both (B, K, T, D)."""
        B, T, _ = x.shape
        H, K, D = self.n_head, self.n_kv_head, self.head_dim
        qkv = self.qkv_proj(x).view(B, T, H + 2 * K, D).transpose(1, 2)  # (B, H + 2K, T, D)
        q, k, v = qkv.split((H, K, K), dim=1)
        dtype = v.dtype
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.temperature is not None:
            q = q * self._temperature(q, context.positions).to(q.dtype)
        v = self._values(v, context)
        return rotate(q, context.cos, context.sin).to(dtype), rotate(k, context.cos, context.sin).to(dtype), v

    def _temperature(self, q: Tensor, positions: Tensor) -> Tensor:
        """Factor on the queries (B or 1, H, T, 1): an inverse temperature of the softmax."""
        assert self.temperature is not None
        if self.temperature_kind == "query":
            # Over sqrt(D), like the scores: with QK-norm each entry of q is about 1, and one step would move the sum by D times its size.
            return 2 * torch.sigmoid((q.float() * self.temperature[:, None]).sum(dim=-1, keepdim=True) * self.head_dim**-0.5)
        keys = positions + 1 if self.window is None else (positions + 1).clamp(max=self.window)
        return 1 + self.temperature[:, None, None] * keys.float().log()[:, None, :, None]

    def _values(self, v: Tensor, context: TokenContext) -> Tensor:
        """Values (B, K, T, D) with the token's own vector and a share of the first layer's values."""
        if self.value_table is not None:
            B, K, T, D = v.shape
            v = v + self.value_table(context.input_ids).view(B, T, K, D).transpose(1, 2).to(v.dtype)
        if self.gives_values:
            context.first_values = v
        if self.value_mix is not None:
            assert context.first_values is not None
            v = v + self.value_mix[:, None, None].to(v.dtype) * (context.first_values - v)
        return v


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, whole: bool, window: int | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v with grouped heads: q (B, H, T, D), k and v (B, K, S, D) -> (B, H, T, D), by the fastest kernel.

    mask (B or 1, 1, T, S) additive; None: S = T with plain causality, or one query that sees all. whole: the keys are
    those of the queries and not of a cache; then training and evaluation agree to the last bit (a first ratio of 1, a first KL of 0).
    window: what the mask allows at most, for kernels that can leave out the rest.
    """
    B, H, T, D = q.shape
    K = k.shape[1]
    causal = mask is None and T > 1
    if T == 1 and K < H:
        # One query: the heads of a group become rows of one product, so that keys and values are read once per group.
        y = F.scaled_dot_product_attention(q.view(B, K, H // K, D), k, v, attn_mask=mask, dropout_p=dropout)
        return y.view(B, H, T, D)
    if whole and q.device.type == "cpu" and not dropout:
        return blocked_attention(q, k, v, mask, window)
    if K < H:
        k, v = k.repeat_interleave(H // K, dim=1), v.repeat_interleave(H // K, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
