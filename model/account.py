"""What a shape costs before anything is allocated: parameters, work, cache and memory of training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model.config import HaoAIConfig

PREFILL_BLOCK = 256  # longest piece that is fed to a cache at once


@dataclass(frozen=True)
class Account:
    """What a shape costs. All sizes in bytes, all work in floating-point operations."""

    config: HaoAIConfig
    parameters: int
    body_parameters: int
    active_body_parameters: int
    """Those that compute one token: with experts, only the chosen ones."""
    head_parameters: int
    repeated: int = 0
    """Parameters that compute a token again, counted each time: those of the reasoning head in all steps but the first."""

    @classmethod
    def of(cls, config: HaoAIConfig) -> Account:
        """The account of a shape."""
        width, heads, kv, size = config.n_embd, config.n_head, config.kv_heads, config.head_size
        attention = width * size * (heads + 2 * kv) + heads * size * width + (2 * size if config.qk_norm else 0)
        attention += size * (heads + 2 * kv) if config.attention_bias else 0
        attention += {"none": 0, "head": width * heads, "element": width * heads * size}[config.attention_gate]
        attention += {"none": 0, "query": heads * size, "length": heads}[config.attention_temperature]
        attention += 2 * width if config.residual_scale else 0
        sparse = sum(config.layer_is_sparse(layer) for layer in range(config.n_layer))
        body = config.n_layer * (attention + 2 * width) + (config.n_layer - sparse) * config.ffn_matrices * width * config.ffn_size + width
        body += (config.n_layer - 1) * kv if config.value_residual else 0
        unused = config.vocab_size * kv * size * sum(config.layer_has_value_embedding(layer) for layer in range(config.n_layer))
        body += unused  # looked up, not multiplied
        if sparse:
            expert = 3 * width * config.expert_size
            body += sparse * ((config.n_expert + config.n_shared_expert) * expert + config.n_expert * width)
            unused += sparse * (config.n_expert - config.n_expert_per_token) * expert
        repeated = 0
        if config.use_reasoning:
            shape = config.reasoning_shape
            attention = width * size * (shape.n_head + 2 * shape.kv_heads) + shape.n_head * size * width + 2 * size
            step = 2 * attention + 3 * width * shape.ffn_size + 3 * width
            body += step + config.reasoning_steps * width + width * width + 2 * width  # with step embedding, fusion, norms
            body += config.readout_size * (width + 1) + 1
            repeated = (config.reasoning_steps - 1) * (step - 2 * width * size * shape.kv_heads)  # keys and values of the trunk: once
        embedding = config.vocab_size * width
        total = body + embedding * (1 if config.tie_word_embeddings else 2)
        return cls(config, total, body_parameters=body, active_body_parameters=body - unused, head_parameters=embedding, repeated=repeated)

    def flops_per_token(self, context: int, training: bool = True) -> float:
        """Work per token at a mean attention span of context / 2 (windows shorten it); 6 N + attention in training, 2 N forward."""
        spans = [min(context / 2, self.config.layer_window(i) or context) for i in range(self.config.n_layer)]
        attention = sum(4 * self.config.n_head * self.config.head_size * span for span in spans)
        heads: float = self.head_parameters
        if self.config.use_reasoning:
            attention += 2 * self.config.reasoning_steps * 4 * self.config.reasoning_shape.n_head * self.config.head_size * context / 2
            if training and self.config.reasoning_steps > 1:
                heads *= 2 if self.config.reasoning_step_coef else 4 / 3  # each token predicts from one earlier step, too
        forward = 2 * (self.active_body_parameters + self.repeated + heads) + attention
        return forward * (3 if training else 1)

    def kv_cache_bytes(self, context: int, batch_size: int = 1, bytes_per_value: int = 4, block: int = PREFILL_BLOCK) -> int:
        """What a `KVCache` for `batch_size` sequences of `context` tokens occupies; windowed layers hold the window and one block."""
        per_head = 2 * self.config.head_size * bytes_per_value
        windows = [self.config.layer_window(i) for i in range(self.config.n_layer)]
        lengths = [context if w is None else min(context, w - 1 + min(block, context)) for w in windows]
        tokens = self.config.kv_heads * sum(lengths)
        if self.config.use_reasoning:
            tokens += self.config.reasoning_shape.kv_heads * context * (self.config.reasoning_steps + 1)
        return batch_size * per_head * tokens

    def weight_bytes(self, bytes_per_value: int = 4) -> int:
        return self.parameters * bytes_per_value

    def training_bytes(
        self, batch_size: int, context: int, mixed_precision: bool = False, adapter: int = 0, activation_checkpointing: bool = False
    ) -> int:
        """Estimate of a training step's peak: fp32 weights, gradients and two AdamW moments, plus saved activations. adapter: number of
        parameters that learn in place of the weights. activation_checkpointing: of all blocks but one only their input is kept.

        The activation term counts the tensors autograd keeps per block (norm inputs, q, k, v, attention weights and
        output, four feed-forward tensors) and one chunk of logits with its gradient; it is an estimate, good to some tens of percent.
        """
        c = self.config
        act = 2 if mixed_precision else 4
        per_token_block = (
            4 * c.n_embd * 4  # fp32 residual stream and normalised inputs
            + (c.n_head + 2 * c.kv_heads) * c.head_size * 2 * act  # q, k, v before and after the rotation
            + c.n_head * c.head_size * act
            + 4 * max(c.ffn_size, c.expert_size * (c.n_expert_per_token + c.n_shared_expert) if c.n_expert else 0) * act
            + 2 * c.n_head * context * act  # attention weights, where they are stored
        )
        tokens = batch_size * context
        blocks = c.n_layer + (2 * c.reasoning_steps if c.use_reasoning else 0)
        weights_and_state = self.parameters * 4 + (adapter or self.parameters) * 4 * 3 + (self.parameters * 2 if mixed_precision else 0)
        weights_and_state += adapter * 4
        logits = min(tokens, 1024) * c.vocab_size * 4 * 2
        if activation_checkpointing:
            activations = tokens * (per_token_block * (1 + blocks - c.n_layer) + 4 * c.n_embd * c.n_layer)
        else:
            activations = tokens * per_token_block * blocks
        return weights_and_state + activations + logits

    def _feed_forward(self) -> str:
        c = self.config
        if not c.n_expert:
            return f"feed-forward {c.intermediate_size}"
        shared = f" and {c.n_shared_expert} shared" if c.n_shared_expert else ""
        return f"{c.n_expert} experts of {c.moe_intermediate_size}, {c.n_expert_per_token}{shared} per token"

    def table(self, context: int | None = None) -> str:
        """A few aligned lines for people."""
        context = context or self.config.max_position_embeddings
        rows = [
            (
                "parameters",
                f"{self.parameters / 1e6:.2f} M ({self.head_parameters / 1e6:.2f} M embedding"
                f"{', tied' if self.config.tie_word_embeddings else ', untied'})"
                + (f", {(self.active_body_parameters + self.head_parameters) / 1e6:.2f} M active" if self.config.n_expert else ""),
            ),
            (
                "shape",
                f"{self.config.n_layer} layers, width {self.config.n_embd}, {self.config.n_head}/{self.config.kv_heads} heads of "
                f"{self.config.head_dim}, {self._feed_forward()}, vocabulary {self.config.vocab_size}",
            ),
            ("weights", f"{self.weight_bytes() / 2**20:.1f} MiB fp32, {self.weight_bytes(2) / 2**20:.1f} MiB bf16"),
            (
                "work",
                f"{self.flops_per_token(context) / 1e6:.1f} MFLOP per trained token, "
                f"{self.flops_per_token(context, training=False) / 1e6:.1f} per generated token",
            ),
            ("KV cache", f"{self.kv_cache_bytes(context) / 2**20:.2f} MiB for one sequence of {context} tokens (fp32)"),
        ]
        return "\n".join(f"  {name:<11}{text}" for name, text in rows)
