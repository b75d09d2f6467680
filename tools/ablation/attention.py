"""How much attention goes to the first token of a text: the sink that heads with nothing to say fall back on (Xiao et al., 2023).

A gate on the attention output lets a head say nothing without one (Qiu et al., 2025).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from model.attention import SmartAttention
from model.transformer import SmartHaoAI

FIRST_QUERY = 32  # later queries only: the first few have nothing else to look at


@torch.no_grad()
def first_token_attention(model: SmartHaoAI, rows: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Share of the attention weights that queries from FIRST_QUERY on give to their text's first token: mean over the heads of layers
    without a window, and the largest of a head. rows: token ids, each longer than FIRST_QUERY. NaN where there are no such layers."""
    shares: dict[int, list[Tensor]] = {}

    def look(layer: SmartAttention, args: tuple[Any, ...]) -> None:
        x, context, mask = args[:3]
        q, k, _ = layer._heads(x, context)
        k = k.repeat_interleave(layer.n_head // layer.n_kv_head, dim=1)
        scores = q.float() @ k.float().transpose(2, 3) / math.sqrt(layer.head_dim)
        T = q.shape[2]
        scores = scores + (torch.full((T, T), float("-inf"), device=q.device).triu_(1) if mask is None else mask.float())
        shares.setdefault(id(layer), []).append(torch.softmax(scores, dim=-1)[0, :, FIRST_QUERY:, 0].mean(dim=1))

    layers = [module for module in model.modules() if isinstance(module, SmartAttention) and module.window is None]
    handles = [layer.register_forward_pre_hook(look) for layer in layers]
    was_training = model.training
    try:
        model.eval()
        for row in rows:
            model.hidden_states(torch.tensor([list(row)], device=model.device))
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    if not shares:
        return math.nan, math.nan
    by_head = torch.cat([torch.stack(values).mean(dim=0) for values in shares.values()])
    return float(by_head.mean()), float(by_head.max())
