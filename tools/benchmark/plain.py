"""The plain way to train a small model, to compare with: eager fp32, rows padded to one length, logits of the whole batch, a loop of
AdamW over the parameters one by one. It shares no code with `model/` and `train/`.

    run = PlainRun.of(config); loss = run.step(*padded_rows(documents, 340, pad_id))

Shapes: B rows, T tokens, H heads, K kv heads, D head dim, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORE = -100


@dataclass(frozen=True)
class PlainSettings:
    """Those that the best-known small-model project trains with."""

    batch_size: int = 16
    row_length: int = 340
    lr: float = 5e-4
    clip: float = 1.0
    autocast: bool = False
    """bf16 for the products, the weights stay fp32."""


class PlainNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled.type_as(x)


class PlainBlock(nn.Module):
    """Attention and feed-forward layer, each before its norm; names as on disk."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, ffn = config.n_embd, config.ffn_size
        self.heads, self.kv_heads, self.size = config.n_head, config.kv_heads, config.head_size
        self.self_attn = nn.Module()
        for name, rows in (("q_proj", self.heads), ("k_proj", self.kv_heads), ("v_proj", self.kv_heads)):
            self.self_attn.add_module(name, nn.Linear(width, rows * self.size, bias=False))
        self.self_attn.o_proj = nn.Linear(self.heads * self.size, width, bias=False)
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            self.self_attn.q_norm, self.self_attn.k_norm = (PlainNorm(self.size, config.rms_norm_eps) for _ in range(2))
        self.mlp = nn.Module()
        self.mlp.gate_proj, self.mlp.up_proj = nn.Linear(width, ffn, bias=False), nn.Linear(width, ffn, bias=False)
        self.mlp.down_proj = nn.Linear(ffn, width, bias=False)
        self.input_layernorm = PlainNorm(width, config.rms_norm_eps)
        self.post_attention_layernorm = PlainNorm(width, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self._attention(self.input_layernorm(x), cos, sin)
        y = self.post_attention_layernorm(x)
        mlp: Any = self.mlp
        return x + mlp.down_proj(F.silu(mlp.gate_proj(y)) * mlp.up_proj(y))

    def _attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, _ = x.shape
        layer: Any = self.self_attn
        q = layer.q_proj(x).view(B, T, self.heads, self.size)
        k = layer.k_proj(x).view(B, T, self.kv_heads, self.size)
        v = layer.v_proj(x).view(B, T, self.kv_heads, self.size)
        if self.qk_norm:
            q, k = layer.q_norm(q), layer.k_norm(k)
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        times = self.heads // self.kv_heads
        k, v = (y[:, :, :, None].expand(B, T, self.kv_heads, times, self.size).reshape(B, T, self.heads, self.size) for y in (k, v))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        # Padding stands at the end of a row: what comes before it never sees it.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return layer.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # type: ignore[no-any-return]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, heads, D), cos and sin (T, D)."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return ((x * cos[:, None]) + (turned * sin[:, None])).to(x.dtype)


class PlainModel(nn.Module):
    """A Transformer of the shape of a HaoAIConfig that has standard parts only. ValueError for one that has others."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        if config.n_expert or config.use_reasoning or config.use_sliding_window or not config.tie_word_embeddings or config.attention_bias:
            raise ValueError("the plain model has dense layers, full attention, a tied embedding and no biases")
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(PlainBlock(config) for _ in range(config.n_layer))
        self.norm = PlainNorm(config.n_embd, config.rms_norm_eps)
        frequencies = config.rope_theta ** -(torch.arange(0, config.head_size, 2).float() / config.head_size)
        angles = torch.outer(torch.arange(config.max_position_embeddings).float(), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> logits (B, T, V)."""
        x = self.embed_tokens(ids)
        T = ids.shape[1]
        for layer in self.layers:
            x = layer(x, self.cos[:T], self.sin[:T])  # type: ignore[index]
        return F.linear(self.norm(x), self.embed_tokens.weight)

    def load_disk_weights(self, weights: dict[str, Tensor]) -> None:
        """From a checkpoint's tensors, by the names that transformers gives them."""
        self.load_state_dict({name.removeprefix("model."): tensor for name, tensor in weights.items() if name != "lm_head.weight"})


def plain_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labels (B, T) that are not IGNORE, each predicted from the position before."""
    logits = logits[:, :-1].float()
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=IGNORE)


@dataclass
class PlainRun:
    """A model and its optimiser; `step` is all there is to training."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    settings: PlainSettings

    @classmethod
    def of(cls, config: Any, settings: PlainSettings | None = None) -> PlainRun:
        settings = settings or PlainSettings()
        model = PlainModel(config)
        return cls(model, torch.optim.AdamW(model.parameters(), lr=settings.lr), settings)

    def step(self, ids: Tensor, labels: Tensor, done: float = 0.0) -> float:
        """One update with the rows ids and labels (B, T); done: share of the run, which the rate's cosine follows. Returns the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))
        loss = self.loss(ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if self.settings.autocast else contextlib.nullcontext():
            return plain_loss(self.model(ids), labels)


def padded_rows(documents: Sequence[Sequence[int]], length: int, pad_id: int) -> tuple[Tensor, Tensor]:
    """One row per document, cut or padded to `length`: ids and labels (B, T); padding is not learned."""
    ids = torch.full((len(documents), length), pad_id)
    labels = torch.full((len(documents), length), IGNORE)
    for row, document in enumerate(documents):
        part = torch.as_tensor(list(document[:length]))
        ids[row, : len(part)] = labels[row, : len(part)] = part
    return ids, labels
