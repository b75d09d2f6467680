"""Optimisers and learning-rate schedules.

AdamW for everything, or Muon for the matrices of the blocks and AdamW for the rest. Both take the same `train.lr`: Muon's
update is scaled to the size of AdamW's (Liu et al., 2025).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from train.config import OptimizationConfig
from train.sharding import own_part, whole_tensor

NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5
# Not maps from one space to another, though they have two dimensions: a router's and a temperature's rows are addresses, a table's entries.
NOT_MAPS = (".mlp.gate.weight", ".temperature", ".value_table.weight", ".step_embedding.weight", ".confidence.out.weight")


ADAPTER = ".adapter."
RATE = "rate"  # a group's own factor on the learning rate
VALUE_HEAD, VALUE_RATE = "value_head.", 20.0
"""PPO's value head is new where the policy is finished: at the policy's rate its baseline would come too late to help."""


class Muon(torch.optim.Optimizer):
    """Momentum, then the nearest semi-orthogonal matrix by Newton-Schulz steps (Jordan et al., 2024).

    Parameters are matrices, or stacks of them (experts). A group's `split` gives the row counts of matrices that are fused into
    one; each is orthogonalised on its own. `compute_dtype` is the type of its products: bf16 is enough where it is fast.
    """

    compute_dtype = torch.float32

    def __init__(self, params: Iterable[dict[str, Any]], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "split": None})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor, float]]] = {}
        divided: list[tuple[Tensor, Tensor]] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(momentum, group["momentum"])  # Nesterov
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                rows = group["split"] or update.shape[-2]
                whole = parameter
                if (gathered := whole_tensor(update)) is not update:  # divided among processes; orthogonal is only all of it
                    update, whole = gathered, torch.zeros_like(gathered)
                    divided.append((parameter, whole))
                # A stack of matrices is one tall matrix of fused ones.
                columns = update.shape[-1]
                targets = whole.view(-1, columns).split(rows)
                for piece, target in zip(update.reshape(-1, columns).split(rows), targets, strict=True):
                    if piece.shape[0] > piece.shape[1]:
                        piece, target = piece.T, target.T
                    by_shape.setdefault((piece.shape[0], piece.shape[1]), []).append((piece, target, group["lr"]))
        for shape, items in by_shape.items():
            # Matrices of one shape, over all layers, are orthogonalised together: a few large products instead of many small ones.
            results = orthogonalise(torch.stack([piece for piece, _, _ in items]), self.compute_dtype)
            for result, (_, target, lr) in zip(results, items, strict=True):
                # 0.2 * sqrt(longer side) gives the update the root mean square of a typical AdamW update.
                target.add_(result.to(target.dtype), alpha=-lr * 0.2 * math.sqrt(max(shape)))
        for parameter, change in divided:
            parameter.add_(own_part(change, parameter))


def orthogonalise(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Approximate U V^T of each matrix = U S V^T by five Newton-Schulz steps of degree 5. matrices (..., R, C), products in `dtype`."""
    shape = matrices.shape
    x = matrices.reshape(-1, *shape[-2:])
    transposed = shape[-2] > shape[-1]
    if transposed:
        x = x.transpose(1, 2)
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    for a, b, c in NEWTON_SCHULZ:
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.transpose(1, 2) if transposed else x).reshape(shape)


def build_optimizers(model: torch.nn.Module, settings: OptimizationConfig, device: str) -> list[torch.optim.Optimizer]:
    """One or two optimisers that together hold every trainable parameter exactly once.

    Matrices decay, norms and biases do not. With muon, embeddings, heads and routers (a row is an expert's address, not part of
    one map) stay with AdamW, and so do adapters, whose two factors are one map only together.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = {n: p for n, p in parameters.items() if p.dim() >= 2}
    inner = {n: p for n, p in matrices.items() if ("layers." in n or "reasoning." in n) and not n.endswith(NOT_MAPS) and ADAPTER not in n}
    muon = inner if settings.optimizer == "muon" else {}
    values = {n: p for n, p in parameters.items() if n.startswith(VALUE_HEAD)}
    decayed = [p for n, p in matrices.items() if n not in muon and n not in values]
    plain = [p for n, p in parameters.items() if n not in matrices and n not in values]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    groups.append({"params": list(values.values()), "weight_decay": 0.0, RATE: VALUE_RATE})
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            fused=device.split(":")[0] in ("cpu", "cuda"),
        )
    ]
    if muon:
        optimizers.append(Muon(_muon_groups(model, muon), lr=settings.lr, weight_decay=settings.weight_decay))
    held = sum(p.numel() for o in optimizers for g in o.param_groups for p in g["params"])
    assert held == sum(p.numel() for p in parameters.values()), "every parameter belongs to exactly one optimiser"
    return optimizers


def _muon_groups(model: torch.nn.Module, matrices: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    by_split: dict[tuple[int, ...], list[Tensor]] = {}
    for name, parameter in matrices.items():
        split: tuple[int, ...] = ()
        if "qkv_proj" in name:
            attention: Any = model.get_submodule(name.split(".qkv_proj")[0])
            kv_rows = attention.n_kv_head * attention.head_dim
            split = (parameter.shape[0] - 2 * kv_rows, kv_rows, kv_rows)
        elif "gate_up_proj" in name:
            experts = parameter.shape[0] if parameter.dim() == 3 else 1
            split = (parameter.shape[-2] // 2,) * 2 * experts
        by_split.setdefault(split, []).append(parameter)
    return [{"params": params, "split": list(split) or None} for split, params in by_split.items()]


def lr_factor(settings: OptimizationConfig, step: int, total: int) -> float:
    """Share of the peak learning rate at step `step` (counted from 0) of `total`."""
    warmup = min(settings.warmup_steps, max(total // 4, 1))
    if step < warmup:
        return (step + 1) / warmup
    floor, done = settings.min_lr_ratio, (step - warmup) / max(total - warmup, 1)
    if settings.schedule == "constant":
        return 1.0
    if settings.schedule == "linear":
        return floor + (1 - floor) * (1 - done)
    if settings.schedule == "cosine":
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
    decay_from = 1 - settings.decay_share
    return 1.0 if done < decay_from else floor + (1 - floor) * max(0.0, (1 - done) / settings.decay_share)
