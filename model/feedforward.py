"""Feed-forward layer: SwiGLU (Shazeer, 2020)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from model.config import HaoAIConfig


class SmartFeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up are one fused product, on disk two matrices. x (B, T, C) -> (B, T, C)."""

    def __init__(self, config: HaoAIConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.n_embd, 2 * config.ffn_size, bias=False)
        self.down_proj = nn.Linear(config.ffn_size, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)
