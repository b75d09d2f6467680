"""SmartHaoAI: embedding, pre-norm Transformer blocks, final norm, language-model head.

Shapes: B batch, T time, C channels (n_embd), V vocabulary, S keys.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from model.attention import RMSNorm, RotaryEmbedding, SmartAttention, TokenContext, attention_mask
from model.cache import CacheSetting, KVCache, LayerCache
from model.config import HaoAIConfig
from model.cross_entropy import IGNORE, capped, compute_dtype, labelled, linear_cross_entropy, linear_log_probs
from model.feedforward import MixtureOfExperts, Routing, SmartFeedForward, balance_loss, z_loss
from model.heads import LayerSupervision, NextTokenModule, ValueHead
from model.output import ModelOutput
from model.reasoning import ReasoningModule, ReasoningPath

if TYPE_CHECKING:
    from model.lora import Adapter
    from model.tokenizer import BPETokenizer


class SmartTransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); with residual_scale each branch times a learned vector."""

    def __init__(self, config: HaoAIConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd, config.rms_norm_eps)
        self.self_attn = SmartAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.rms_norm_eps)
        self.mlp = MixtureOfExperts(config) if config.layer_is_sparse(layer) else SmartFeedForward(config)
        self.dropout = config.dropout
        self.attention_scale = nn.Parameter(torch.ones(config.n_embd)) if config.residual_scale else None
        self.mlp_scale = nn.Parameter(torch.ones(config.n_embd)) if config.residual_scale else None

    def reset_parts(self) -> None:
        """Give the optional parts the values at which they change nothing."""
        for scale in (self.attention_scale, self.mlp_scale):
            if scale is not None:
                nn.init.ones_(scale)

    def forward(self, x: Tensor, context: TokenContext, mask: Tensor | None, cache: LayerCache | None = None) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        x = x + self._branch(self.self_attn(self.input_layernorm(x), context, mask, cache), self.attention_scale)
        normed = self.post_attention_layernorm(x)
        y = self.mlp(normed, context.real) if isinstance(self.mlp, MixtureOfExperts) else self.mlp(normed)
        return x + self._branch(y, self.mlp_scale)

    def _branch(self, y: Tensor, scale: Tensor | None) -> Tensor:
        y = y if scale is None else y * scale
        return F.dropout(y, self.dropout, self.training) if self.dropout else y


class SmartHaoAI(nn.Module):
    """The language model. `model(input_ids)` gives logits; with labels it gives the loss and no logits."""

    def __init__(self, config: HaoAIConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(SmartTransformerBlock(config, layer) for layer in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.rotary = RotaryEmbedding(config)
        kinds = {"layers": LayerSupervision, "tokens": NextTokenModule}
        self.auxiliary = kinds[config.deep_supervision](config) if config.deep_supervision in kinds else None
        self.value_head: ValueHead | None = None
        """Put there by PPO."""
        self.adapter: Adapter | None = None
        """The LoRA adapter in use; set by `model.lora.use_adapter`."""
        self.reasoning = ReasoningModule(config) if config.use_reasoning else None
        self._reasoning_steps, self._reasoning_halt = config.reasoning_steps, config.reasoning_halt
        self.deep_weight = 1.0
        """Share of deep_supervision_coef that counts now; the loop lowers it to 0 at the end of a run."""
        self.activation_checkpointing = False
        """Where gradients are wanted, keep only what enters each block and compute the block again in backward (Chen et al., 2016)."""
        self.initialised(self)

    def initialised(self, part: nn.Module) -> nn.Module:
        """`part` with normal weights of initializer_range; what writes into the residual stream is smaller, so that its variance does
        not grow with depth (GPT-2). The optional parts change nothing yet."""
        std = self.config.initializer_range
        for name, parameter in part.named_parameters():
            if parameter.dim() < 2:
                if name.endswith(".bias"):
                    nn.init.zeros_(parameter)
                continue
            into_residual = name.removesuffix(".weight").endswith(("o_proj", "down_proj"))
            nn.init.normal_(parameter, std=std / math.sqrt(2 * self.config.n_layer) if into_residual else std)
        _reset_parts(part)
        return part

    def reset_parts(self) -> None:
        """Give every optional part the values at which it changes nothing."""
        _reset_parts(self)

    @property
    def reasoning_steps(self) -> int:
        """Latent steps of the reasoning head; may be set to any number, also to more than it was trained with. A KVCache that holds
        tokens of another number is refused."""
        return self._reasoning_steps

    @reasoning_steps.setter
    def reasoning_steps(self, steps: int) -> None:
        self.set_reasoning(steps=steps)

    @property
    def reasoning_halt(self) -> float:
        """Confidence above which a token takes no more reasoning steps, in evaluation; 0: never. May be set."""
        return self._reasoning_halt

    @reasoning_halt.setter
    def reasoning_halt(self, halt: float) -> None:
        self.set_reasoning(halt=halt)

    def set_reasoning(self, steps: int | None = None, halt: float | None = None) -> None:
        """Set `reasoning_steps` and `reasoning_halt`; None leaves one as it is. ValueError changes neither."""
        if steps is None and halt is None:
            return
        if self.reasoning is None:
            raise ValueError("the model has no reasoning head; add one: SmartHaoAI.from_pretrained(path, use_reasoning=True)")
        steps, halt = (self._reasoning_steps if steps is None else steps), (self._reasoning_halt if halt is None else halt)
        checked = dataclasses.replace(self.config, reasoning_steps=steps, reasoning_halt=halt)
        self._reasoning_steps, self._reasoning_halt = checked.reasoning_steps, checked.reasoning_halt

    @property
    def reasoning_setting(self) -> tuple[int, float] | None:
        """Steps and halting threshold of the reasoning head, if any."""
        return None if self.reasoning is None else (self.reasoning_steps, 0.0 if self.training else float(self.reasoning_halt))

    @property
    def cache_setting(self) -> CacheSetting:
        """What the entries of a KVCache depend on besides tokens and weights."""
        return CacheSetting(self.reasoning_setting, self.adapter)

    @property
    def head_weight(self) -> Tensor:
        """(V, C) weight of the language-model head, the embedding when tied."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        labels: Tensor | None = None,
        token_weights: Tensor | None = None,
        cache: KVCache | None = None,
        return_logits: bool | None = None,
        last_only: bool = False,
        output_hidden_states: bool = False,
        output_reasoning: bool = False,
    ) -> ModelOutput:
        """input_ids (B, T). attention_mask (B, T): 1 real, 0 padding. segment_ids (B, T): a number per packed document, 0 for padding;
        tokens see only their own document. labels (B, T) unshifted, -100 ignored: label t is predicted from token t - 1 of the same
        document. token_weights (B, T): how much each label counts in the loss; None: all the same. cache: keys and values of the
        tokens before; it is appended to. output_reasoning: return what the steps of the reasoning head did. Raises ValueError when T
        exceeds the context.
        """
        hidden, context, path = self._run(input_ids, attention_mask, position_ids, segment_ids, cache)
        out = ModelOutput(hidden_states=hidden if output_hidden_states else None)
        if self.training:
            self._add_auxiliary(out)
        if labels is not None:
            chosen, targets = labelled(labels, segment_ids, hidden.shape[1])
            hits = torch.empty(targets.shape, dtype=torch.bool, device=targets.device) if path is not None and self.training else None
            out.loss_tokens = targets.numel()
            weights = None if token_weights is None else token_weights.flatten()[chosen + 1]
            out.loss_sum = self._head_loss(_rows(hidden, chosen), targets, hits, weights)
            out.loss = out.loss_sum / (max(out.loss_tokens, 1) if weights is None else weights.sum().clamp(min=1.0))
            if self.training:
                out.deep_losses = self._deep_losses(hidden, context, labels, segment_ids)
                if self.reasoning is not None and path is not None and hits is not None:
                    out.deep_losses.update(
                        self.reasoning.losses(path, chosen, targets, hits, lambda x, t, h: self._head_loss(self.norm(x), t, h))
                    )
        if path is not None and (output_reasoning or not self.training):
            self._describe_reasoning(out, path, output_reasoning)
        if return_logits if return_logits is not None else labels is None:
            out.logits = self.logits(hidden[:, -1:] if last_only else hidden)
        return out

    def logits(self, states: Tensor) -> Tensor:
        """(..., C) after the final norm -> (..., V)."""
        logits = F.linear(states, self.embed_tokens.weight) if self.lm_head is None else self.lm_head(states)
        return capped(logits, self.config.logit_softcap)

    @torch.no_grad()
    def position_log_probs(self, input_ids: Tensor, targets: Tensor, **inputs: Any) -> Tensor:
        """Log-probability of targets (B, T) given the tokens up to and including the same position, (N,) fp32 nats in row order;
        targets of -100 are left out. No gradient."""
        hidden = self.hidden_states(input_ids, **inputs)
        chosen = (targets != IGNORE).reshape(-1).nonzero()[:, 0]
        rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, chosen)
        wanted = targets.reshape(-1).index_select(0, chosen)
        return linear_log_probs(rows, self.head_weight, wanted, self.config.logit_softcap)[0]

    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(B, T, C) after the final norm; arguments as in `forward`."""
        return self._run(input_ids, attention_mask, position_ids, segment_ids, cache)[0]

    def _run(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        segment_ids: Tensor | None,
        cache: KVCache | None,
    ) -> tuple[Tensor, TokenContext, ReasoningPath | None]:
        """Hidden states (B, T, C) after the final norm, and what the losses need of how they came about."""
        T = input_ids.shape[1]
        if cache is not None and T > cache.block:
            pieces, paths = [], []
            for start in range(0, T, cache.block):
                part = slice(start, start + cache.block)
                positions = None if position_ids is None else position_ids[:, part]
                piece, context, path = self._run(input_ids[:, part], attention_mask, positions, None, cache)
                pieces.append(piece)
                paths += [] if path is None else [path]
            return torch.cat(pieces, dim=1), context, ReasoningPath.joined(paths) if paths else None
        if cache is None and T > self.config.max_position_embeddings:
            raise ValueError(f"{T} tokens exceed the model's context of {self.config.max_position_embeddings}")
        positions, masks = self._layout(input_ids, attention_mask, position_ids, segment_ids, cache)
        x = self.embed_tokens(input_ids)
        cos, sin = self.rotary(positions)
        seen = 0 if cache is None else cache.length  # the mask reaches over the cached tokens, too
        real = segment_ids > 0 if segment_ids is not None else None if attention_mask is None else attention_mask[:, seen : seen + T]
        context = TokenContext(input_ids, positions, cos, sin, real)
        kept = self.config.supervised_layers if isinstance(self.auxiliary, LayerSupervision) and self.training else []
        path = None
        for index, layer in enumerate(self.layers):
            x = self._block(layer, x, context, masks[index], None if cache is None else cache.layers[index])
            if index in kept:
                context.kept[index] = x
        if self.reasoning is not None:
            halt = 0.0 if self.training else self.reasoning_halt
            path = self.reasoning(x, context, masks[-1], None if cache is None else cache.reasoning, self.reasoning_steps, halt)
            x = self.reasoning.fused(x, path.states[-1])
        if cache is not None:
            cache.length += T
        return self.norm(x), context, path

    def _block(self, layer: Any, x: Tensor, context: TokenContext, mask: Tensor | None, cache: LayerCache | None) -> Tensor:
        if not (self.activation_checkpointing and torch.is_grad_enabled()):
            return layer(x, context, mask, cache)
        experts = layer.mlp if isinstance(layer.mlp, MixtureOfExperts) else None
        again = contextlib.nullcontext if experts is None else experts.uncounted
        return checkpoint(layer, x, context, mask, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), again()))

    def _layout(
        self,
        input_ids: Tensor,
        padding_mask: Tensor | None,
        position_ids: Tensor | None,
        segment_ids: Tensor | None,
        cache: KVCache | None,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Positions (B or 1, T) for the rotation, and one attention mask per layer (shared between like layers), the reasoning head's
        at the end."""
        B, T = input_ids.shape
        device = input_ids.device
        dtype = compute_dtype(self.norm.weight)
        start = 0
        key_valid = None if padding_mask is None or cache is not None else padding_mask.bool()
        if cache is not None:
            if segment_ids is not None:
                raise ValueError("segment_ids (packed documents) cannot be used together with a cache")
            if padding_mask is not None and cache.length == 0:
                cache.padding = _left_padding(padding_mask)
            cache.prepare(T, self.cache_setting)
            start = cache.length
        slots = torch.arange(start, start + T, device=device)
        if position_ids is None:
            position_ids = slots[None]
            if segment_ids is not None:
                position_ids = _positions_in_segments(segment_ids)
            elif cache is not None and cache.padding is not None:
                position_ids = (slots[None] - cache.padding[:, None]).clamp(min=0)
            elif key_valid is not None:
                position_ids = (key_valid.long().cumsum(1) - 1).clamp(min=0)
        made: dict[tuple[int | None, int], Tensor | None] = {}
        masks = []
        windows = [self.config.layer_window(index) for index in range(self.config.n_layer)]
        for index, window in enumerate(windows if self.reasoning is None else [*windows, None]):
            held = T if cache is None else cache.all_layers[index].filled + T
            if (window, held) not in made:
                keys = slots if cache is None else cache.key_positions(index, T)
                if cache is not None:
                    key_valid = None if cache.padding is None else keys[None] >= cache.padding[:, None]
                free = key_valid is None and segment_ids is None and (window is None or held <= window)
                if free and (T == 1 or held == T):
                    made[window, held] = None  # plain causality: the kernels need no mask
                else:
                    made[window, held] = attention_mask(slots, keys, window, key_valid, segment_ids, segment_ids, dtype)
            masks.append(made[window, held])
        return position_ids, masks

    @property
    def expert_layers(self) -> list[MixtureOfExperts]:
        """The layers with experts, in order; none in a dense model."""
        return [layer.mlp for layer in self.layers if isinstance(layer.mlp, MixtureOfExperts)]

    def take_expert_load(self) -> Tensor | None:
        """(layers with experts, E) tokens that chose each expert in training since the last call; None for a dense model."""
        return torch.stack([layer.take_load() for layer in self.expert_layers]) if self.expert_layers else None

    def forget_pass(self) -> None:
        """Let go of what a forward pass leaves for the loss and for `take_expert_load`: it was a trial, or came to no end."""
        self.take_expert_load()
        for layer in self.expert_layers:
            layer.routing = None  # it holds the graph

    def balance_experts(self, load: Tensor) -> None:
        """After an optimiser step: move the choice biases (`router_bias_rate`) against the step's load (layers with experts, E)."""
        for layer, counts in zip(self.expert_layers, load, strict=True):
            layer.balance(counts)

    def _add_auxiliary(self, out: ModelOutput) -> None:
        routings: list[Routing] = [layer.routing for layer in self.expert_layers if layer.routing is not None]
        if not routings:
            return
        out.aux_terms = {"balance": balance_loss(routings, self.config.router_balance_scope), "router_z": z_loss(routings)}
        coefficients = {"balance": self.config.router_aux_loss_coef, "router_z": self.config.router_z_loss_coef}
        out.aux_loss = torch.stack([coefficients[name] * term for name, term in out.aux_terms.items()]).sum()
        for layer in self.expert_layers:
            layer.routing = None  # it holds the graph

    def _deep_losses(self, hidden: Tensor, context: TokenContext, labels: Tensor, segment_ids: Tensor | None) -> dict[str, Tensor]:
        """Summed losses of the training-only heads, by name, with their coefficient."""
        weight = self.config.deep_supervision_coef * self.deep_weight
        losses: dict[str, Tensor] = {}
        if not weight:
            return losses
        if isinstance(self.auxiliary, LayerSupervision):
            for index, norm in zip(self.config.supervised_layers, self.auxiliary.norms, strict=True):
                chosen, targets = labelled(labels, segment_ids, labels.shape[1])
                losses[f"layer_{index + 1}_loss"] = weight * self._head_loss(_rows(norm(context.kept[index]), chosen), targets)
        elif isinstance(self.auxiliary, NextTokenModule) and labels.shape[1] > 2:
            states = self.auxiliary(hidden, self.embed_tokens(context.input_ids))
            chosen, targets = labelled(labels, segment_ids, states.shape[1], distance=2)
            losses["second_token_loss"] = weight * self._head_loss(_rows(states, chosen), targets)
        return losses

    def _describe_reasoning(self, out: ModelOutput, path: ReasoningPath, whole: bool) -> None:
        assert self.reasoning is not None
        # The readout sees the state alone: that of a halted token still gives the confidence with which it halted.
        out.confidence = torch.sigmoid(self.reasoning.confidence_logit(path.states[-1]))
        out.steps_used = path.steps_used
        if whole:
            out.reasoning_states = torch.stack(path.states)
            out.step_hidden_states = self.norm(self.reasoning.fused(path.trunk, out.reasoning_states[1:]))
            out.step_confidence = torch.sigmoid(self.reasoning.confidence_logit(out.reasoning_states[1:]))

    def _head_loss(self, rows: Tensor, targets: Tensor, hits: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        return linear_cross_entropy(rows, self.head_weight, targets, weights, self.config.logit_softcap, hits)

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **settings: Any) -> Tensor:
        """Continue input_ids (B, T); returns (B, T + new). Settings mean what they mean in transformers; temperature=0 is greedy."""
        from inference.engine import generate_ids

        return generate_ids(self, input_ids, attention_mask=attention_mask, **settings)

    def generate_with_reasoning(self, messages: str | Sequence[dict[str, Any]], tokenizer: BPETokenizer, **options: Any) -> Any:
        """Answer a conversation (or one question) with thinking: a ReasoningResult with .thinking .answer .confidence .votes.

        options: samples=5 for a vote, thinking, budget, calculator, settings, tools; see `inference.reasoning.generate_with_reasoning`.
        """
        from inference.engine import Engine
        from inference.reasoning import generate_with_reasoning

        return generate_with_reasoning(Engine(self, tokenizer), messages, **options)

    def save_pretrained(self, path: str | Path, tokenizer: BPETokenizer | None = None) -> None:
        """Write the model (and tokenizer) as a transformers directory."""
        from model.checkpoint import save_pretrained

        save_pretrained(self, path, tokenizer)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, **parts: Any
    ) -> SmartHaoAI:
        """Read a directory written by `save_pretrained` or by transformers: llama, mistral, qwen2, qwen3, mixtral, qwen3_moe.

        parts: optional parts to add to the model, for example attention_gate="head"; they change nothing until they are trained.
        """
        from model.checkpoint import load_pretrained

        return load_pretrained(path, device, dtype, **parts)


def _reset_parts(part: nn.Module) -> None:
    for module in part.modules():
        if isinstance(module, (SmartAttention, SmartTransformerBlock, ReasoningModule)):
            module.reset_parts()


def _rows(states: Tensor, chosen: Tensor) -> Tensor:
    """Rows `chosen` (N,) of states (B, T, C) as one list: (N, C)."""
    return states.reshape(-1, states.shape[-1]).index_select(0, chosen)


def _left_padding(mask: Tensor) -> Tensor | None:
    """Number of padding tokens (B,) at the left of each row, None when there is none. Raises ValueError for other padding."""
    mask = mask.bool()
    if bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise ValueError("a batch that is decoded with a cache must be padded on the left: attention_mask has a 0 after a 1")
    padding = (~mask).sum(dim=1)
    return padding if bool(padding.any()) else None


def _positions_in_segments(segment_ids: Tensor) -> Tensor:
    """Position of each token within its document: (B, T) -> (B, T)."""
    T = segment_ids.shape[1]
    index = torch.arange(T, device=segment_ids.device).expand_as(segment_ids)
    begins = torch.ones_like(segment_ids, dtype=torch.bool)
    begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return index - torch.where(begins, index, 0).cummax(dim=1).values


def pad_left(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """Token rows of different lengths as input_ids and attention_mask (B, T), padded on the left."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[pad_id] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask
