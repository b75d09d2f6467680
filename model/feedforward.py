"""Feed-forward layers: SwiGLU (Shazeer, 2020), and a mixture of SwiGLU experts.

Shapes: B batch, T time, C channels (n_embd), N tokens (B * T), E experts, k experts per token, F width of one expert.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import HaoAIConfig
from model.cross_entropy import compute_dtype


class SmartFeedForward(nn.Module):
    """swiglu: down(silu(gate(x)) * up(x)), gate and up one fused product, on disk two matrices; relu2: down(relu(up(x))^2).
    x (B, T, C) -> (B, T, C)."""

    def __init__(self, config: HaoAIConfig, width: int | None = None) -> None:
        super().__init__()
        width = width or config.ffn_size
        if config.feed_forward == "relu2":
            self.up_proj = nn.Linear(config.n_embd, width, bias=False)
        else:
            self.gate_up_proj = nn.Linear(config.n_embd, 2 * width, bias=False)
        self.squared = config.feed_forward == "relu2"
        self.down_proj = nn.Linear(width, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.squared:
            return self.down_proj(F.relu(self.up_proj(x)).square())
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


@dataclass
class Routing:
    """What the training losses need of one layer's router, summed over the real tokens of a micro-batch."""

    chosen: Tensor
    """(E,) how many tokens chose each expert; no gradient."""
    probability: Tensor
    """(E,) summed router probability."""
    squared_logsumexp: Tensor
    """() summed squared log-sum-exp of the router logits."""
    tokens: Tensor
    """() number of tokens."""


class MixtureOfExperts(nn.Module):
    """Each token is computed by the k experts that its router prefers, and the results are added with the router's weights.

    Tokens are sorted by expert, so that each expert multiplies one block of rows; none is dropped, however uneven the load.
    The default is what `qwen3_moe` and `mixtral` compute: softmax over all experts, the best k, weights that add up to 1. With
    `router_bias_rate` a bias is added to the probabilities for the choice alone; with `n_shared_expert` some experts see every token.
    """

    def __init__(self, config: HaoAIConfig) -> None:
        super().__init__()
        self.n_expert, self.k = config.n_expert, config.n_expert_per_token
        self.normalise = config.norm_topk_prob
        self.bias_rate = config.router_bias_rate
        self.gate = nn.Linear(config.n_embd, config.n_expert, bias=False)
        self.gate_up_proj = nn.Parameter(torch.empty(config.n_expert, 2 * config.expert_size, config.n_embd))
        self.down_proj = nn.Parameter(torch.empty(config.n_expert, config.n_embd, config.expert_size))
        self.shared_expert = SmartFeedForward(config, config.n_shared_expert * config.expert_size) if config.n_shared_expert else None
        self.choice_bias: Tensor | None
        self.register_buffer("choice_bias", torch.zeros(config.n_expert) if config.router_bias_rate else None)
        self.load: Tensor | None = None  # (E,) tokens per expert since `take_load`, counted in training
        self.routing: Routing | None = None  # of the newest forward pass in training

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """x (B, T, C) -> (B, T, C). real (B, T): False on padding, which is computed but not counted."""
        rows = x.reshape(-1, x.shape[-1])  # (N, C)
        with torch.autocast(x.device.type, enabled=False):  # a rounding error here would be another expert
            logits = F.linear(rows.float(), self.gate.weight.float())
            probabilities = logits.softmax(dim=-1)  # (N, E)
        preference = probabilities if self.choice_bias is None else probabilities.detach() + self.choice_bias
        experts = preference.topk(self.k, dim=-1).indices  # (N, k)
        weights = probabilities.gather(1, experts)
        if self.normalise:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        if self.training:
            self._count(logits, probabilities, experts, real)
        y = self._compute(rows, experts, weights).view_as(x)
        return y if self.shared_expert is None else y + self.shared_expert(x)

    def _compute(self, rows: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """rows (N, C) through experts (N, k), added up with weights (N, k): (N, C)."""
        dtype = compute_dtype(self.gate_up_proj)
        order = experts.reshape(-1).argsort(stable=True)  # (N * k,) places of (token, choice) pairs, expert by expert
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        counts = torch.bincount(experts.reshape(-1), minlength=self.n_expert)
        grouped = _Dispatch.apply(rows.to(dtype), order, back, self.k)  # (N * k, C)
        gate, up = grouped_linear(grouped, self.gate_up_proj.to(dtype), counts).chunk(2, dim=-1)
        y = grouped_linear(F.silu(gate) * up, self.down_proj.to(dtype), counts)
        return _Combine.apply(y, weights, order, back).to(rows.dtype)

    def _count(self, logits: Tensor, probabilities: Tensor, experts: Tensor, real: Tensor | None) -> None:
        valid = torch.ones(len(logits), device=logits.device) if real is None else real.reshape(-1).float()
        chosen = torch.zeros(self.n_expert, device=logits.device).index_add_(0, experts.reshape(-1), valid.repeat_interleave(self.k))
        self.routing = Routing(chosen, valid @ probabilities, valid @ logits.logsumexp(dim=-1).square(), valid.sum())
        self.load = chosen if self.load is None else self.load + chosen

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """A pass inside is a repetition: what is counted stays as it was."""
        before = self.load, self.routing
        try:
            yield
        finally:
            self.load, self.routing = before

    def take_load(self) -> Tensor:
        """(E,) tokens that chose each expert in training since the last call."""
        load, self.load = self.load, None
        return torch.zeros(self.n_expert, device=self.gate.weight.device) if load is None else load

    @torch.no_grad()
    def balance(self, load: Tensor) -> None:
        """Move the choice bias one step against `load` (E,): up where there was too little work, down where too much."""
        if self.choice_bias is not None:
            self.choice_bias += self.bias_rate * torch.sign(load.mean() - load)


def balance_loss(layers: list[Routing], scope: str = "layer") -> Tensor:
    """E * sum_e f_e P_e: f_e the share of tokens that chose expert e, P_e its mean probability (Fedus et al., 2021).

    f adds up to k, so perfect balance gives k. scope "layer": for each layer, averaged. "model": f and P over the tokens of all layers
    before the product, as transformers computes it; there one layer's favourite may make up for another's.
    """
    tokens = torch.stack([layer.tokens for layer in layers]).clamp(min=1)[:, None]
    chosen = torch.stack([layer.chosen for layer in layers]) / tokens  # (layers, E)
    probability = torch.stack([layer.probability for layer in layers]) / tokens
    if scope == "model":
        chosen, probability = chosen.mean(dim=0, keepdim=True), probability.mean(dim=0, keepdim=True)
    return chosen.shape[1] * (chosen * probability).sum(dim=1).mean()


def z_loss(layers: list[Routing]) -> Tensor:
    """Mean squared log-sum-exp of the router logits (Zoph et al., 2022)."""
    tokens = torch.stack([layer.tokens for layer in layers]).sum().clamp(min=1)
    return torch.stack([layer.squared_logsumexp for layer in layers]).sum() / tokens


def grouped_linear(rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """rows (R, I), of which the first counts[0] belong to expert 0 and so on, times weights (E, O, I): (R, O)."""
    if rows.is_cuda and rows.dtype == torch.bfloat16 and hasattr(F, "grouped_mm") and kernel_fits(weights):
        return kernel_product(rows, weights, counts)
    # One product an expert; an expert without rows costs nothing where nothing is learned.
    pairs = list(zip(rows.split(counts.tolist()), weights.unbind(0), strict=True))
    return torch.cat([F.linear(part, weight) for part, weight in pairs if torch.is_grad_enabled() or len(part)])


def kernel_product(rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """`grouped_linear` by torch's grouped kernel (torch 2.10 and newer): one launch, and no wait for the counts."""
    return F.grouped_mm(rows, weights.transpose(1, 2), offs=counts.cumsum(0).to(torch.int32))


def kernel_fits(weights: Tensor) -> bool:
    """Whether torch's grouped kernel takes bf16 weights (E, O, I), in both directions: it wants rows of a multiple of 16 bytes."""
    return all(size % 8 == 0 for size in weights.shape[1:])


class _Dispatch(torch.autograd.Function):
    """Rows (N, C) repeated k times and brought into `order`. Both directions are plain gathers: `back` undoes `order`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, back: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.k = k
        return rows.index_select(0, order // k)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (back,) = ctx.saved_tensors
        gathered = gradients[0].index_select(0, back)
        total, *others = gathered.view(-1, ctx.k, gathered.shape[-1]).unbind(1)
        for other in others:  # six times as fast as a sum over the short middle dimension
            total = total + other
        return total, None, None, None


class _Combine(torch.autograd.Function):
    """Rows (N * k, C) brought back from `order` into the order of the tokens and added up with weights (N, k): (N, C)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, order: Tensor, back: Tensor) -> Tensor:
        gathered = rows.index_select(0, back).view(*weights.shape, -1)  # (N, k, C)
        ctx.save_for_backward(gathered, weights, order)
        columns = weights.to(rows.dtype).unsqueeze(-1).unbind(1)  # k of (N, 1)
        total, *others = gathered.unbind(1)
        total = total * columns[0]
        for other, column in zip(others, columns[1:], strict=True):
            total.addcmul_(other, column)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gathered, weights, order = ctx.saved_tensors
        gradient, k = gradients[0], weights.shape[1]
        of_weights = torch.stack([(rows * gradient).sum(dim=-1) for rows in gathered.unbind(1)], dim=1).to(weights.dtype)
        of_rows = gradient.index_select(0, order // k) * weights.reshape(-1)[order].to(gradient.dtype).unsqueeze(-1)
        return of_rows, of_weights, None, None
