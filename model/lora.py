"""LoRA: small trained matrices beside a frozen model (Hu et al., 2021), with rsLoRA (Kalajdzievski, 2023) and DoRA (Liu et al., 2024).

    adapter = inject_lora(model, LoRASettings(r=16))      # the base is frozen, the adapter is what trains
    with disabled(model): ...                             # the base itself, for example as the reference model
    use_adapter(model, other)                             # several share one base; None: the base alone, a plain model
    merge(model)                                          # W += scale * B A, and a plain model again

Files are in model/adapter_files.py. Every linear layer of the blocks and of the reasoning head may carry an update; embedding, output
head, routers, experts and the confidence readout never do. q, k, v and gate, up are fused here and separate in PEFT: a fused layer has
one pair of factors for each of the matrices in it. Their names and rows come from `weights_to_disk`, the one table of names.

Shapes: I inputs and O outputs of one matrix W (O, I), r rank; A (r, I), B (O, r).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.checkpoint import weights_to_disk
from model.cross_entropy import compute_dtype

if TYPE_CHECKING:
    from model.transformer import SmartHaoAI

ALL = "all"
WHERE = ("layers.", "reasoning.")
NEVER = (".mlp.gate", ".confidence.hidden", ".confidence.out")  # a router's rows are addresses; the readout is not called as a layer
SMALLEST_NORM = 1e-12  # of a row that is all zeros, as in a gate that was just added


@dataclass
class LoRASettings:
    """What an adapter is: the fields of PEFT's LoraConfig that are computed here."""

    r: int = 16
    """Rank of the update of each matrix."""
    alpha: float = 32.0
    """The update counts alpha / r times (rslora: alpha / sqrt(r))."""
    dropout: float = 0.0
    """Dropout on the adapter's inputs, in training."""
    rslora: bool = False
    """Scale by alpha / sqrt(r): ranks above 32 then learn as fast as small ones."""
    dora: bool = False
    """DoRA: learn the length of each row of the matrix apart from its direction; about half as fast."""
    targets: Any = ALL
    """all linear layers (on a mixture of experts those of the attention), or names: q_proj,v_proj or a list. Known: q_proj k_proj v_proj
    o_proj gate_proj up_proj down_proj; gate_proj is an attention gate, too, out_proj a reasoning head's."""

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def target_names(self) -> list[str]:
        """The names as a list; empty for all."""
        names = self.targets.split(",") if isinstance(self.targets, str) else list(self.targets or [ALL])
        names = [str(name).strip() for name in names]
        return [] if names == [ALL] else names

    def check(self) -> None:
        """Raise ValueError for values that cannot work."""
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"lora.r={self.r!r} must be a positive integer")
        if not self.alpha > 0:
            raise ValueError(f"lora.alpha={self.alpha!r} must be above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout={self.dropout!r} must lie in [0, 1)")


class LoRAPair(nn.Module):
    """Update of one matrix W: W + scale * B A; with a magnitude m (O,): m * V / |V| by rows of V = W + scale * B A (DoRA)."""

    def __init__(self, weight: Tensor, settings: LoRASettings) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.scale = settings.scale
        self.A = nn.Parameter(torch.empty(settings.r, columns, device=weight.device))
        self.B = nn.Parameter(torch.zeros(rows, settings.r, device=weight.device))  # so that the model begins unchanged
        self.magnitude = nn.Parameter(_row_norms(weight)) if settings.dora else None
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor, plain: Tensor, weight: Tensor) -> Tensor:
        """What is added to plain = x W^T (..., O). x (..., I), W = weight (O, I)."""
        update = F.linear(F.linear(x, self.A), self.B) * self.scale
        if self.magnitude is None:
            return update
        factor = self.magnitude / _row_norms(self._sum(weight).detach())  # no gradient through the norm: section 4.3 of the paper
        return (factor - 1) * plain + factor * update

    def merged(self, weight: Tensor) -> Tensor:
        """The matrix (O, I), fp32, that computes the same alone."""
        total = self._sum(weight)
        return total if self.magnitude is None else total * (self.magnitude / _row_norms(total))[:, None]

    def _sum(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            return weight.float() + self.scale * (self.B.float() @ self.A.float())


class LoRAFactors(nn.ModuleDict):
    """The pairs of one linear layer by the names of the matrices (O, I) that they change: not always of all that are fused in it."""

    def __init__(self, weights: dict[str, Tensor], settings: LoRASettings) -> None:
        super().__init__({name: LoRAPair(weight, settings) for name, weight in weights.items()})
        self.dropout = settings.dropout


class LoRALinear(nn.Linear):
    """A linear layer, whose weight is shared and frozen, with the update of the adapter in use."""

    def __init__(self, plain: nn.Linear, rows: dict[str, int], adapter: LoRAFactors) -> None:
        """rows: number of rows of each matrix in the layer, by name."""
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        self.weight, self.bias = plain.weight, plain.bias
        self.rows, self.adapter, self.enabled = rows, adapter, True

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)  # (..., O)
        if not self.enabled:
            return y
        sizes = list(self.rows.values())
        pieces, weights = list(y.split(sizes, dim=-1)), self.weight.split(sizes)
        biases = [None] * len(sizes) if self.bias is None else self.bias.split(sizes)
        dtype = compute_dtype(next(self.adapter.parameters()))
        x = F.dropout(x, self.adapter.dropout, self.training).to(dtype)
        for place, name in enumerate(self.rows):
            if name in self.adapter:
                bias = biases[place]
                plain = pieces[place] if bias is None else pieces[place] - bias  # only the matrix is rescaled
                pieces[place] = pieces[place] + self.adapter[name](x, plain, weights[place]).to(y.dtype)
        return torch.cat(pieces, dim=-1) if len(pieces) > 1 else pieces[0]


@dataclass
class Adapter:
    """The trained matrices of one adapter, in use or not, and what they belong to."""

    settings: LoRASettings
    layers: dict[str, LoRAFactors]
    """By the names of the model's linear layers."""
    base: str = ""
    """Checkpoint that it was made for, as it was named."""
    fingerprint: str | None = None
    """Of the base's weights, once it was needed: they do not change."""

    def num_parameters(self) -> int:
        return sum(parameter.numel() for factors in self.layers.values() for parameter in factors.parameters())

    def pairs(self, model: SmartHaoAI) -> Iterator[tuple[str, Tensor, LoRAPair]]:
        """Each changed matrix: its name on disk, a view (O, I) of the model's weight, and its update."""
        for layer, factors in self.layers.items():
            for name, view in matrices(model, layer).items():
                if last(name) in factors:
                    pair = factors[last(name)]
                    assert isinstance(pair, LoRAPair)
                    yield name, view, pair


def inject_lora(model: SmartHaoAI, settings: LoRASettings, base: str = "") -> Adapter:
    """Freeze the model and give it a new adapter, which computes nothing until it is trained. base: the checkpoint's name, for the files.

    ValueError for targets that the model does not have, and for the experts of a mixture.
    """
    settings.check()
    wanted = set(settings.target_names())
    known = [name for layer in linear_layers(model) for name in matrices(model, layer)]
    kinds = {last(name) for name in known}
    if missing := sorted(wanted - kinds):
        experts = "; in a mixture of experts only the attention takes adapters" if model.config.n_expert else ""
        raise ValueError(f"lora.targets: this model has no {', '.join(missing)} for an adapter, but {', '.join(sorted(kinds))}{experts}")
    chosen = [name for name in known if not wanted or last(name) in wanted]
    adapter = new_adapter(model, settings, chosen, base)
    use_adapter(model, adapter)
    return adapter


def linear_layers(model: SmartHaoAI) -> list[str]:
    """Names of the linear layers that may carry an update."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.startswith(WHERE)]
    dense = [name for name in names if not name.endswith(NEVER)]
    # PEFT sees experts as stacks of matrices, which its list of target modules does not reach: neither ours nor theirs train them.
    return [name for name in dense if ".mlp." not in name or not model.config.n_expert]


def matrices(model: SmartHaoAI, layer: str) -> dict[str, Tensor]:
    """The matrices (O, I) in a linear layer by their names on disk, without `.weight`, as views of its weight."""
    weight = model.get_submodule(layer).weight
    assert isinstance(weight, Tensor)
    disk = weights_to_disk({f"{layer}.weight": weight}, model.config)
    return {name.removesuffix(".weight"): view for name, view in disk.items()}


def last(name: str) -> str:
    """q_proj of model.layers.0.self_attn.q_proj."""
    return name.rpartition(".")[2]


def new_adapter(model: SmartHaoAI, settings: LoRASettings, chosen: Collection[str], base: str = "") -> Adapter:
    """An adapter for the matrices `chosen`, by their names on disk; not yet in use."""
    layers: dict[str, LoRAFactors] = {}
    for layer in linear_layers(model):
        found = {last(name): view.detach() for name, view in matrices(model, layer).items() if name in chosen}
        if found:
            layers[layer] = LoRAFactors(found, settings)
    return Adapter(settings, layers, base)


def use_adapter(model: SmartHaoAI, adapter: Adapter | None) -> None:
    """Compute with this adapter from now on, its base frozen; None: with the base alone, as a plain model whose weights may train.

    Keys and values in a KVCache are those of the adapter they were computed with: begin a new one.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            bare = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            bare.weight, bare.bias = module.weight, module.bias
            _replace(model, name, bare)
    model.requires_grad_(adapter is None)
    if model.value_head is not None:
        model.value_head.requires_grad_(True)
    for layer in model.expert_layers:  # the base stays what it is: no balancing of its routers
        layer.bias_rate = model.config.router_bias_rate if adapter is None else 0.0
    model.adapter = adapter
    for name, factors in ({} if adapter is None else adapter.layers).items():
        plain = model.get_submodule(name)
        assert isinstance(plain, nn.Linear)
        rows = {last(full): len(view) for full, view in matrices(model, name).items()}
        _replace(model, name, LoRALinear(plain, rows, factors.to(plain.weight.device)).train(model.training))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model is its base: a reference model that costs no second copy. Without an adapter nothing changes."""
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


@torch.no_grad()
def merge(model: SmartHaoAI) -> None:
    """Write the adapter in use into the weights: a plain model that computes the same. Nothing happens without one."""
    if model.adapter is None:
        return
    for _, view, pair in model.adapter.pairs(model):
        view.copy_(pair.merged(view))
    use_adapter(model, None)


def _row_norms(weight: Tensor) -> Tensor:
    """(O,) fp32 lengths of the rows of (O, I)."""
    return weight.float().norm(dim=1).clamp(min=SMALLEST_NORM)
