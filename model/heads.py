"""Heads besides the language model's. The auxiliary ones and the value head see the trunk's states in training only and are dropped
when a finished model is saved.

Shapes: B batch, T time, C channels, N labelled tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.attention import RMSNorm
from model.config import HaoAIConfig
from model.feedforward import SmartFeedForward


class LayerSupervision(nn.Module):
    """A norm for each supervised inner layer, before the shared language-model head (Lee et al., 2015: deeply-supervised nets)."""

    def __init__(self, config: HaoAIConfig) -> None:
        super().__init__()
        self.norms = nn.ModuleList(RMSNorm(config.n_embd, config.rms_norm_eps) for _ in config.supervised_layers)


class NextTokenModule(nn.Module):
    """State of token t and embedding of token t + 1 -> state that predicts token t + 2, through the shared head.

    The multi-token prediction of DeepSeek-V3 (2024) with a feed-forward layer in place of a whole block.
    """

    def __init__(self, config: HaoAIConfig) -> None:
        super().__init__()
        self.state_norm = RMSNorm(config.n_embd, config.rms_norm_eps)
        self.token_norm = RMSNorm(config.n_embd, config.rms_norm_eps)
        self.join = nn.Linear(2 * config.n_embd, config.n_embd, bias=False)
        self.inner_norm = RMSNorm(config.n_embd, config.rms_norm_eps)
        self.mlp = SmartFeedForward(config)
        self.norm = RMSNorm(config.n_embd, config.rms_norm_eps)

    def forward(self, states: Tensor, embedded: Tensor) -> Tensor:
        """states (B, T, C) after the trunk's final norm, embedded (B, T, C) of the same tokens -> (B, T - 1, C): row t predicts t + 2."""
        x = self.join(torch.cat((self.state_norm(states[:, :-1]), self.token_norm(embedded[:, 1:])), dim=-1))
        return self.norm(x + self.mlp(self.inner_norm(x)))


class ScalarHead(nn.Linear):
    """States (..., C) -> one number each (...), in fp32 also under autocast. Zero in the beginning."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__(width, 1, bias=bias)
        nn.init.zeros_(self.weight)
        if bias:
            nn.init.zeros_(self.bias)

    def forward(self, states: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        with torch.autocast(states.device.type, enabled=False):
            return F.linear(states.float(), self.weight.float(), bias)[..., 0]


class ValueHead(ScalarHead):
    """The value of each state, for PPO: `model.value_head = ValueHead(model.config)`, then model.value_head(hidden states (..., C)).

    Checkpoints to resume from keep it, a finished model does not.
    """

    def __init__(self, config: HaoAIConfig) -> None:
        super().__init__(config.n_embd, bias=True)
