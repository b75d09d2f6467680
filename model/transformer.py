"""SmartHaoAI: embedding, pre-norm Transformer blocks, final norm, language-model head.

Shapes: B batch, T time, C channels (n_embd), V vocabulary, S keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.attention import RMSNorm, RotaryEmbedding, SmartAttention, attention_mask
from model.cache import KVCache, LayerCache
from model.config import HaoAIConfig
from model.cross_entropy import compute_dtype, linear_cross_entropy, token_log_probs
from model.feedforward import MixtureOfExperts, Routing, SmartFeedForward, balance_loss, z_loss

if TYPE_CHECKING:
    from model.tokenizer import BPETokenizer

IGNORE = -100


@dataclass
class ModelOutput:
    """What a forward pass returns; fields that were not asked for are None."""

    logits: Tensor | None = None
    """(B, T, V), or (B, 1, V) with last_only."""
    loss: Tensor | None = None
    """Mean cross-entropy over the labelled tokens, nats; 0 when there is none."""
    loss_sum: Tensor | None = None
    """The same, summed: what a token-weighted accumulation divides by its own total."""
    loss_tokens: int = 0
    """Number of labelled tokens in the sum."""
    aux_loss: Tensor | None = None
    """What training adds to the loss: the auxiliary terms, each with its coefficient; None for a plain model or in evaluation."""
    aux_terms: dict[str, Tensor] = field(default_factory=dict)
    """The same terms by name, without coefficients: `balance` and `router_z` of a mixture of experts."""
    hidden_states: Tensor | None = None
    """(B, T, C) after the final norm."""


class SmartTransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: HaoAIConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd, config.rms_norm_eps)
        self.self_attn = SmartAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.rms_norm_eps)
        self.mlp = MixtureOfExperts(config) if config.layer_is_sparse(layer) else SmartFeedForward(config)
        self.dropout = config.dropout

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        cache: LayerCache | None = None,
        real: Tensor | None = None,
    ) -> Tensor:
        x = x + self._drop(self.self_attn(self.input_layernorm(x), cos, sin, mask, cache))
        normed = self.post_attention_layernorm(x)
        return x + self._drop(self.mlp(normed, real) if isinstance(self.mlp, MixtureOfExperts) else self.mlp(normed))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


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
        self._initialise()

    def _initialise(self) -> None:
        """Normal weights of initializer_range; what writes into the residual stream is smaller, so that its variance does not grow
        with depth (GPT-2)."""
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                if name.endswith(".bias"):
                    nn.init.zeros_(parameter)
                continue
            into_residual = name.removesuffix(".weight").endswith(("o_proj", "down_proj"))
            nn.init.normal_(parameter, std=std / math.sqrt(2 * self.config.n_layer) if into_residual else std)

    @property
    def head_weight(self) -> Tensor:
        """(V, C) weight of the language-model head, the embedding when tied."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        labels: Tensor | None = None,
        cache: KVCache | None = None,
        return_logits: bool | None = None,
        last_only: bool = False,
        output_hidden_states: bool = False,
    ) -> ModelOutput:
        """input_ids (B, T). attention_mask (B, T): 1 real, 0 padding. segment_ids (B, T): a number per packed document, 0 for padding;
        tokens see only their own document. labels (B, T) unshifted, -100 ignored: label t is predicted from token t - 1 of the same
        document. cache: keys and values of the tokens before; it is appended to. Raises ValueError when T exceeds the context.
        """
        hidden = self.hidden_states(input_ids, attention_mask, position_ids, segment_ids, cache)
        out = ModelOutput(hidden_states=hidden if output_hidden_states else None)
        if labels is not None:
            rows, targets = self._predictions(hidden, labels, segment_ids)
            out.loss_tokens = targets.numel()
            out.loss_sum = linear_cross_entropy(rows, self.head_weight, targets)
            out.loss = out.loss_sum / max(out.loss_tokens, 1)
            if self.training:
                self._add_auxiliary(out)
        if return_logits if return_logits is not None else labels is None:
            out.logits = F.linear(hidden[:, -1:] if last_only else hidden, self.head_weight)
        return out

    @torch.no_grad()
    def position_log_probs(self, input_ids: Tensor, targets: Tensor, **inputs: Any) -> Tensor:
        """Log-probability of targets (B, T) given the tokens up to and including the same position, (N,) fp32 nats in row order;
        targets of -100 are left out. No gradient."""
        hidden = self.hidden_states(input_ids, **inputs)
        chosen = (targets != IGNORE).reshape(-1).nonzero()[:, 0]
        rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, chosen)
        return token_log_probs(rows, self.head_weight, targets.reshape(-1).index_select(0, chosen))

    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(B, T, C) after the final norm; arguments as in `forward`."""
        T = input_ids.shape[1]
        if cache is not None and T > cache.block:
            pieces = []
            for start in range(0, T, cache.block):
                part = slice(start, start + cache.block)
                pieces.append(
                    self.hidden_states(
                        input_ids[:, part], attention_mask, None if position_ids is None else position_ids[:, part], None, cache
                    )
                )
            return torch.cat(pieces, dim=1)
        if cache is None and T > self.config.max_position_embeddings:
            raise ValueError(f"{T} tokens exceed the model's context of {self.config.max_position_embeddings}")
        positions, masks = self._layout(input_ids, attention_mask, position_ids, segment_ids, cache)
        x = self.embed_tokens(input_ids)
        cos, sin = self.rotary(positions)
        seen = 0 if cache is None else cache.length  # the mask reaches over the cached tokens, too
        real = segment_ids > 0 if segment_ids is not None else None if attention_mask is None else attention_mask[:, seen : seen + T]
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, masks[index], None if cache is None else cache.layers[index], real)
        if cache is not None:
            cache.length += T
        return self.norm(x)

    def _layout(
        self,
        input_ids: Tensor,
        padding_mask: Tensor | None,
        position_ids: Tensor | None,
        segment_ids: Tensor | None,
        cache: KVCache | None,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Positions (B or 1, T) for the rotation, and one attention mask per layer (shared between like layers)."""
        B, T = input_ids.shape
        device = input_ids.device
        dtype = compute_dtype(self.embed_tokens.weight)
        start = 0
        key_valid = None if padding_mask is None or cache is not None else padding_mask.bool()
        if cache is not None:
            if segment_ids is not None:
                raise ValueError("segment_ids (packed documents) cannot be used together with a cache")
            if padding_mask is not None and cache.length == 0:
                cache.padding = _left_padding(padding_mask)
            cache.prepare(T)
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
        for index in range(self.config.n_layer):
            window = self.config.layer_window(index)
            held = T if cache is None else cache.layers[index].filled + T
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

    def _predictions(self, hidden: Tensor, labels: Tensor, segment_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Hidden states (N, C) and targets (N,) of the labelled tokens: state t - 1 predicts label t of the same document."""
        targets = labels[:, 1:]
        if segment_ids is not None:
            targets = targets.masked_fill(segment_ids[:, 1:] != segment_ids[:, :-1], IGNORE)
        chosen = (targets != IGNORE).reshape(-1).nonzero()[:, 0]
        rows = hidden[:, :-1].reshape(-1, hidden.shape[-1]).index_select(0, chosen)
        return rows, targets.reshape(-1).index_select(0, chosen)

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **settings: Any) -> Tensor:
        """Continue input_ids (B, T); returns (B, T + new). Settings mean what they mean in transformers; temperature=0 is greedy."""
        from inference.engine import generate_ids

        return generate_ids(self, input_ids, attention_mask=attention_mask, **settings)

    def save_pretrained(self, path: str | Path, tokenizer: BPETokenizer | None = None) -> None:
        """Write the model (and tokenizer) as a transformers directory."""
        from model.checkpoint import save_pretrained

        save_pretrained(self, path, tokenizer)

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> SmartHaoAI:
        """Read a directory written by `save_pretrained` or by transformers: llama, mistral, qwen2, qwen3, mixtral, qwen3_moe."""
        from model.checkpoint import load_pretrained

        return load_pretrained(path, device, dtype)


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
