"""ReasoningModule: latent steps between the last layer and the prediction.

A state per token starts as the normalised output of the last layer and is changed n times by one block with shared weights, as in
the Universal Transformer (Dehghani et al., 2018) and recurrent-depth models (Geiping et al., 2025): causal attention among the states
of the step, causal attention to the trunk's output, SwiGLU. What the last state says is added to the trunk's output by a matrix that
starts at zero, so that a model to which the head is added computes the same until it is trained.

After each step a readout of the state estimates the probability that the token predicted from it is right. It is fitted to just that
outcome (cross-entropy on detached states, a proper score; Elbayad et al., 2020, and Schuster et al., 2022, halt by such a classifier).
In use a token may halt when it is sure enough: its state is then carried unchanged through the remaining steps, where others still
attend to it. Every decision is one token's own, so that nothing depends on the batch or on how a text is cut for the cache.

Shapes: B batch, T time, C channels, H query heads, K key/value heads, D head_dim, S keys, N labelled tokens, n steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.attention import RMSNorm, SmartAttention, TokenContext, attend, rotate
from model.cache import LayerCache
from model.config import HaoAIConfig
from model.feedforward import SmartFeedForward

CONFIDENCE_COEF = 0.1  # small: with adaptive optimisers it learns as fast, and its gradient leaves the norm that is clipped to the others
READOUT_GAIN = 4.0  # in effect a larger learning rate of the readout's hidden layer: the states that it reads keep changing
HeadLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class ReasoningPath:
    """What the steps did to the tokens of a forward pass."""

    trunk: Tensor
    """(B, T, C) output of the last layer, before the final norm."""
    states: list[Tensor]
    """n + 1 states (B, T, C): the beginning and after each step. A halted token's state repeats."""
    steps_used: Tensor | None = None
    """(B, T) steps after which each token halted, n where it did not; None where halting is off."""

    @staticmethod
    def joined(pieces: Sequence[ReasoningPath]) -> ReasoningPath:
        """The paths of consecutive pieces of a text as one."""
        used = [piece.steps_used for piece in pieces if piece.steps_used is not None]
        return ReasoningPath(
            torch.cat([piece.trunk for piece in pieces], dim=1),
            [torch.cat(states, dim=1) for states in zip(*(piece.states for piece in pieces), strict=True)],
            torch.cat(used, dim=1) if used else None,
        )


class CrossAttention(nn.Module):
    """Causal attention from the states to the trunk's output. Keys and values are computed once per token and serve all steps."""

    def __init__(self, shape: HaoAIConfig) -> None:
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = shape.n_head, shape.kv_heads, shape.head_size
        self.dropout = shape.attention_dropout
        self.q_proj = nn.Linear(shape.n_embd, self.n_head * self.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.n_embd, self.n_kv_head * self.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.n_embd, self.n_kv_head * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.n_head * self.head_dim, shape.n_embd, bias=False)
        self.q_norm = RMSNorm(self.head_dim, shape.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, shape.rms_norm_eps)

    def keys_and_values(self, memory: Tensor, context: TokenContext, cache: LayerCache | None) -> tuple[Tensor, Tensor]:
        """memory (B, T, C) -> rotated keys and values (B, K, S, D), those in the cache included."""
        B, T, _ = memory.shape
        k, v = (part(memory).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2) for part in (self.k_proj, self.v_proj))
        k = rotate(self.k_norm(k), context.cos, context.sin).to(v.dtype)
        if cache is None:
            return k, v
        keys, values = cache.append(k, v)
        return keys.to(v.dtype), values.to(v.dtype)

    def forward(self, x: Tensor, held: tuple[Tensor, Tensor], context: TokenContext, mask: Tensor | None) -> Tensor:
        """x (B, T, C), held: keys and values (B, K, S, D), mask (B or 1, 1, T, S) as in SmartAttention -> (B, T, C)."""
        B, T, _ = x.shape
        k, v = held
        q = self.q_norm(self.q_proj(x).view(B, T, self.n_head, self.head_dim).transpose(1, 2))
        dropout = self.dropout if self.training else 0.0
        y = attend(rotate(q, context.cos, context.sin).to(v.dtype), k, v, mask, dropout, k.shape[2] == T)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class ConfidenceReadout(nn.Module):
    """Normalised state (..., C) -> (...) fp32, the logit of the probability that the prediction from this state is right.

    The hidden layer is not for want of expression: a state's large common parts make a linear readout learn too slowly to keep up
    with states that still change.
    """

    def __init__(self, config: HaoAIConfig) -> None:
        super().__init__()
        self.hidden = nn.Linear(config.n_embd, config.readout_size, bias=False)
        self.out = nn.Linear(config.readout_size, 1)

    def forward(self, normed: Tensor) -> Tensor:
        with torch.autocast(normed.device.type, enabled=False):  # a rounding error here would be another number of steps
            hidden = F.silu(READOUT_GAIN * F.linear(normed.float(), self.hidden.weight.float()))
            return F.linear(hidden, self.out.weight.float(), self.out.bias.float())[..., 0]

    def of_states(self, normed: Tensor) -> Tensor:
        """The same, where only the states learn."""
        detached = {name: parameter.detach() for name, parameter in self.named_parameters()}
        return torch.func.functional_call(self, detached, (normed,))


class ReasoningModule(nn.Module):
    """n steps of one block over the trunk's output. See the top of the file; the sizes are those of `config.reasoning_shape`."""

    def __init__(self, config: HaoAIConfig) -> None:
        super().__init__()
        shape = config.reasoning_shape
        width, eps = shape.n_embd, shape.rms_norm_eps
        self.dropout = shape.dropout
        self.step_coef, self.ponder_coef = config.reasoning_step_coef, config.reasoning_ponder_coef
        self.memory_norm = RMSNorm(width, eps)
        self.step_embedding = nn.Embedding(config.reasoning_steps, width)
        self.input_layernorm = RMSNorm(width, eps)
        self.self_attn = SmartAttention(shape, layer=0)
        self.cross_attention_layernorm = RMSNorm(width, eps)
        self.cross_attn = CrossAttention(shape)
        self.post_attention_layernorm = RMSNorm(width, eps)
        self.mlp = SmartFeedForward(shape)
        self.read_norm = RMSNorm(width, eps)
        self.out_proj = nn.Linear(width, width, bias=False)
        self.confidence = ConfidenceReadout(config)
        self.reset_parts()

    def reset_parts(self) -> None:
        """Close the way back into the trunk's output; every confidence is 1/2."""
        for parameter in (self.out_proj.weight, self.confidence.out.weight, self.confidence.out.bias):
            nn.init.zeros_(parameter)

    def forward(
        self,
        trunk: Tensor,
        context: TokenContext,
        mask: Tensor | None,
        caches: Sequence[LayerCache] | None,
        steps: int,
        halt: float = 0.0,
    ) -> ReasoningPath:
        """trunk (B, T, C): the last layer's output before the final norm; mask as in SmartAttention, of a layer without a window.

        caches: one for the trunk's keys and values, then one per step. halt > 0: tokens stop once their confidence exceeds it.
        """
        memory = self.memory_norm(trunk)
        held = self.cross_attn.keys_and_values(memory, context, None if caches is None else caches[0])
        path = ReasoningPath(trunk, [memory])
        state = memory
        running = torch.ones(trunk.shape[:2], dtype=torch.bool, device=trunk.device) if halt else None
        used = torch.full(trunk.shape[:2], steps, device=trunk.device) if halt else None
        for step in range(steps):
            cache = None if caches is None else caches[1 + step]
            if running is None or bool(running.any()):
                after = self._step(state, step, held, context, mask, cache)
                if running is not None and used is not None:
                    after = torch.where(running[..., None], after, state)
                    stops = running & (torch.sigmoid(self.confidence_logit(after)) > halt)
                    used = used.masked_fill(stops, step + 1)
                    running = running & ~stops
                state = after
            elif cache is not None:
                # No token here goes on, but later ones attend to these in every step.
                self.self_attn.remember(self.input_layernorm(self._entered(state, step)), context, cache)
            path.states.append(state)
        path.steps_used = used
        return path

    def _step(
        self,
        state: Tensor,
        step: int,
        held: tuple[Tensor, Tensor],
        context: TokenContext,
        mask: Tensor | None,
        cache: LayerCache | None,
    ) -> Tensor:
        x = self._entered(state, step)
        x = x + self._dropped(self.self_attn(self.input_layernorm(x), context, mask, cache))
        x = x + self._dropped(self.cross_attn(self.cross_attention_layernorm(x), held, context, mask))
        return x + self._dropped(self.mlp(self.post_attention_layernorm(x)))

    def _entered(self, state: Tensor, step: int) -> Tensor:
        """The state as step `step` (from 0) sees it. Steps beyond those of training take the last one's embedding."""
        return state + self.step_embedding.weight[min(step, self.step_embedding.num_embeddings - 1)].to(state.dtype)

    def _dropped(self, y: Tensor) -> Tensor:
        return F.dropout(y, self.dropout, self.training) if self.dropout else y

    def fused(self, trunk: Tensor, state: Tensor) -> Tensor:
        """The trunk's output (..., C) with what a state (..., C) adds to it."""
        return trunk + self.out_proj(self.read_norm(state))

    def confidence_logit(self, state: Tensor) -> Tensor:
        """States (..., C) -> (...) fp32, the logit of the confidence. Learning the readout leaves the states as they are."""
        return self.confidence(self.read_norm(state).detach())

    def losses(self, path: ReasoningPath, chosen: Tensor, targets: Tensor, hits: Tensor, head_loss: HeadLoss) -> dict[str, Tensor]:
        """Summed losses besides that of the last step's prediction, by name, each with its coefficient.

        chosen (N,) places of the labelled tokens in B * T, targets (N,), hits (N,) where the last step's prediction is right.
        head_loss(stream (N, C), targets, hits): cross-entropy of the predictions from `stream`; it fills hits.

        The mean over the earlier steps is estimated: every token takes part with one of them, drawn anew each time. So supervision costs
        one more pass through the head, however many steps there are.
        """
        steps = len(path.states) - 1
        width = path.trunk.shape[-1]
        last = path.states[-1].reshape(-1, width).index_select(0, chosen)
        confidence_loss = F.binary_cross_entropy_with_logits(self.confidence_logit(last), hits.float(), reduction="sum")
        losses: dict[str, Tensor] = {}
        if steps > 1:
            earlier = torch.stack(path.states[1:-1])  # (n - 1, B, T, C)
            drawn = torch.randint(steps - 1, chosen.shape, device=chosen.device)
            states = earlier.reshape(-1, width).index_select(0, drawn * path.trunk.shape[:2].numel() + chosen)
            hits = torch.empty_like(hits)
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.step_coef > 0):
                stream = self.fused(path.trunk.reshape(-1, width).index_select(0, chosen), states)
                step_loss = head_loss(stream, targets, hits)
            if self.step_coef:
                losses["reasoning_step_loss"] = self.step_coef * step_loss
            earlier_loss = F.binary_cross_entropy_with_logits(self.confidence_logit(states), hits.float(), reduction="sum")
            confidence_loss = (confidence_loss + (steps - 1) * earlier_loss) / steps
            if self.ponder_coef:
                losses["ponder_loss"] = self.ponder_coef * self._ponder(earlier.reshape(steps - 1, -1, width).index_select(1, chosen))
        losses["confidence_loss"] = CONFIDENCE_COEF * confidence_loss
        return losses

    def _ponder(self, earlier: Tensor) -> Tensor:
        """Expected share of the steps that tokens take when they halt with their confidence after each of the earlier steps
        (n - 1, N, C), summed over the tokens: the cost of ACT (Graves, 2016) and PonderNet (Banino et al., 2021).

        Only the states learn from it; the confidences stay estimates of what is right.
        """
        going_on = F.logsigmoid(-self.confidence.of_states(self.read_norm(earlier))).cumsum(dim=0).exp()  # (n - 1, N)
        return (1 + going_on.sum(dim=0)).sum() / (len(earlier) + 1)
