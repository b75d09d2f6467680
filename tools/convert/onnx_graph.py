"""The model as an ONNX graph with a key/value cache, node by node: one graph for prefill and decode, any batch and any length.

Names of inputs and outputs are those of Hugging Face Optimum. The operators are plain ones of opset 17, so that runtimes on phones
and in browsers have them too. Matrices are stored as (in, out) for MatMul, the form that quantisers look for.

Shapes: B batch, T new tokens, P cached tokens, S = P + T, C channels, H heads, K key/value heads, G = H / K, D head_dim, E experts,
F feed-forward width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from model.attention import RMSNorm, SmartAttention, rotary_frequencies
from model.feedforward import MixtureOfExperts, SmartFeedForward
from model.transformer import SmartHaoAI, SmartTransformerBlock

OPSET, IR_VERSION = 17, 8  # what runtimes since 2022 read
FLOATS = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16}
LAST = np.iinfo(np.int64).max
PAST, PRESENT = "past_key_values.{}.{}", "present.{}.{}"
TOTAL = "past_sequence_length + sequence_length"


class GraphWriter:
    """Collects nodes, small constants and weights; every method returns the name of the value it adds."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, TensorProto] = {}
        self.weights: dict[str, Tensor] = {}
        self._scope = ""

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        outer, self._scope = self._scope, f"{self._scope}/{name}"
        yield
        self._scope = outer

    def op(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        return self.ops(kind, *inputs, outputs=[output] if output else 1, **attributes)[0]

    def ops(self, kind: str, *inputs: str, outputs: int | list[str], **attributes: Any) -> list[str]:
        name = f"{self._scope}/{kind}_{len(self.nodes)}"
        names = [f"{name}_output_{i}" for i in range(outputs)] if isinstance(outputs, int) else outputs
        self.nodes.append(helper.make_node(kind, inputs, names, name=name, **attributes))
        return names

    def constant(self, value: Any, kind: type[np.generic] = np.int64) -> str:
        array = np.asarray(value, dtype=kind)
        name = f"constant_{array.dtype}_{'x'.join(map(str, array.shape))}_{'_'.join(str(v) for v in array.reshape(-1))}"
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(array, name)
        return name

    def weight(self, name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> str:
        self.weights[name] = tensor.detach().to(dtype or self.dtype)
        return name

    def cast(self, x: str, source: torch.dtype, target: torch.dtype) -> str:
        return x if source == target else self.op("Cast", x, to=FLOATS[target])

    def reshape(self, x: str, *sizes: int) -> str:
        """0 keeps a dimension, -1 is what remains."""
        return self.op("Reshape", x, self.constant(sizes))

    def linear(self, x: str, layer: torch.nn.Linear, name: str) -> str:
        y = self.op("MatMul", x, self.weight(f"{name}.weight", layer.weight.T))
        return y if layer.bias is None else self.op("Add", y, self.weight(f"{name}.bias", layer.bias))


class ModelGraph:
    """Writes `model` with weights, activations and cache of `dtype`; norms, rotation, softmax, routing and logits are fp32."""

    def __init__(self, model: SmartHaoAI, dtype: torch.dtype) -> None:
        self.model, self.config, self.dtype = model, model.config, dtype
        self.graph = GraphWriter(dtype)
        self.masks: dict[int | None, str] = {}

    def build(self) -> tuple[onnx.ModelProto, dict[str, Tensor]]:
        """The graph without its weights, and the weights by name."""
        g, c = self.graph, self.config
        with g.scope("model"):
            self._layout()
            table = g.weight("model.embed_tokens.weight", self.model.embed_tokens.weight)
            x = g.op("Gather", table, "input_ids", axis=0)  # (B, T, C)
            for index, layer in enumerate(self.model.layers):
                assert isinstance(layer, SmartTransformerBlock)
                name = f"model.layers.{index}"
                with g.scope(f"layers.{index}"):
                    normed = self._norm(x, layer.input_layernorm, f"{name}.input_layernorm")
                    x = g.op("Add", x, self._attention(normed, layer.self_attn, index, f"{name}.self_attn"))
                    normed = self._norm(x, layer.post_attention_layernorm, f"{name}.post_attention_layernorm")
                    x = g.op("Add", x, self._feed_forward(normed, layer.mlp, f"{name}.mlp"))
            x = self._norm(x, self.model.norm, "model.norm")
        with g.scope("lm_head"):
            # Gemm reads the matrix as it lies in the embedding: a tied head is stored once.
            head = table if self.model.lm_head is None else g.weight("lm_head.weight", self.model.lm_head.weight)
            logits = g.op("Gemm", g.reshape(x, -1, c.n_embd), head, transB=1)
            shape = g.op("Concat", g.op("Shape", "input_ids"), g.constant([c.vocab_size]), axis=0)
            g.op("Identity", g.cast(g.op("Reshape", logits, shape), self.dtype, torch.float32), output="logits")
        return self._model(), g.weights

    def _layout(self) -> None:
        """What all layers share: rotation of the new tokens, distances between them and all tokens, which tokens are real."""
        g, c = self.graph, self.config
        new, total = g.op("Shape", "input_ids", start=1, end=2), g.op("Shape", "attention_mask", start=1, end=2)
        past = g.op("Sub", total, new)
        # Positions count real tokens only; that of padding does not matter, nothing looks at it.
        positions = g.op("Sub", g.op("CumSum", "attention_mask", g.constant(1)), g.constant(1))
        positions = g.op("Slice", positions, past, g.constant([LAST]), g.constant([1]))  # (B, T)
        frequencies, scale = rotary_frequencies(c)
        columns = g.op("Unsqueeze", g.op("Cast", positions, to=TensorProto.FLOAT), g.constant([1, 3]))
        half = g.op("Mul", columns, g.weight("model.rotary.inverse_frequency", frequencies, torch.float32))  # (B, 1, T, D/2)
        angles = g.op("Concat", half, half, axis=-1)
        self.cos, self.sin = g.op("Cos", angles), g.op("Sin", angles)
        if scale != 1.0:
            factor = g.constant(scale, np.float32)
            self.cos, self.sin = g.op("Mul", self.cos, factor), g.op("Mul", self.sin, factor)
        slots = g.op("Range", g.constant(0), g.op("Squeeze", total), g.constant(1))
        queries = g.op("Unsqueeze", g.op("Slice", slots, past, g.constant([LAST])), g.constant([1]))
        self.distance = g.op("Sub", queries, slots)  # (T, S)
        real = g.op("Unsqueeze", g.op("Cast", "attention_mask", to=TensorProto.BOOL), g.constant([1]))  # (B, 1, S)
        # A padded query keeps itself, so that no row of the softmax is empty.
        self.visible = g.op("Or", real, g.op("Equal", self.distance, g.constant(0)))  # (B, T, S)

    def _mask(self, window: int | None) -> str:
        """Additive mask (B, 1, G * T, S), fp32, made once for all layers of a window."""
        if window not in self.masks:
            g, groups = self.graph, self.config.n_head // self.config.kv_heads
            with g.scope("mask" if window is None else f"mask_{window}"):
                allowed = g.op("And", g.op("GreaterOrEqual", self.distance, g.constant(0)), self.visible)
                if window is not None:
                    allowed = g.op("And", allowed, g.op("Less", self.distance, g.constant(window)))
                lowest = g.constant(np.finfo(np.float32).min, np.float32)
                mask = g.op("Unsqueeze", g.op("Where", allowed, g.constant(0, np.float32), lowest), g.constant([1]))
                self.masks[window] = mask if groups == 1 else g.op("Tile", mask, g.constant([1, 1, groups, 1]))
        return self.masks[window]

    def _norm(self, x: str, norm: RMSNorm, name: str) -> str:
        g = self.graph
        with g.scope(name.rsplit(".", 1)[1]):
            x = g.cast(x, self.dtype, torch.float32)
            squares = g.op("ReduceMean", g.op("Pow", x, g.constant(2, np.float32)), axes=[-1], keepdims=1)
            root = g.op("Sqrt", g.op("Add", squares, g.constant(norm.eps, np.float32)))
            y = g.op("Mul", g.op("Div", x, root), g.weight(f"{name}.weight", norm.weight, torch.float32))
            return g.cast(y, torch.float32, self.dtype)

    def _rotate(self, x: str) -> str:
        g = self.graph
        x = g.cast(x, self.dtype, torch.float32)
        first, second = g.ops("Split", x, outputs=2, axis=-1)
        turned = g.op("Concat", g.op("Neg", second), first, axis=-1)
        return g.cast(g.op("Add", g.op("Mul", x, self.cos), g.op("Mul", turned, self.sin)), torch.float32, self.dtype)

    def _attention(self, x: str, attention: SmartAttention, index: int, name: str) -> str:
        g = self.graph
        H, K, D = attention.n_head, attention.n_kv_head, attention.head_dim
        mask = self._mask(attention.window)
        with g.scope("self_attn"):
            qkv = g.reshape(g.linear(x, attention.qkv_proj, f"{name}.qkv_proj"), 0, 0, H + 2 * K, D)
            qkv = g.op("Transpose", qkv, perm=[0, 2, 1, 3])  # (B, H + 2K, T, D)
            q, k, v = g.ops("Split", qkv, g.constant([H, K, K]), outputs=3, axis=1)
            if attention.q_norm is not None and attention.k_norm is not None:
                q = self._norm(q, attention.q_norm, f"{name}.q_norm")
                k = self._norm(k, attention.k_norm, f"{name}.k_norm")
            q, k = self._rotate(q), self._rotate(k)
            k = g.op("Concat", PAST.format(index, "key"), k, axis=2, output=PRESENT.format(index, "key"))  # (B, K, S, D)
            v = g.op("Concat", PAST.format(index, "value"), v, axis=2, output=PRESENT.format(index, "value"))
            # The heads of a group are rows of one product: keys and values are read once per group, never repeated.
            q = g.op("Mul", g.reshape(q, 0, K, -1, D), g.constant(D**-0.5, self._numpy))  # (B, K, G * T, D)
            scores = g.cast(g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 3, 2])), self.dtype, torch.float32)
            weights = g.cast(g.op("Softmax", g.op("Add", scores, mask), axis=-1), torch.float32, self.dtype)
            y = g.reshape(g.op("MatMul", weights, v), 0, H, -1, D)
            y = g.reshape(g.op("Transpose", y, perm=[0, 2, 1, 3]), 0, 0, H * D)
            return g.linear(y, attention.o_proj, f"{name}.o_proj")

    def _feed_forward(self, x: str, mlp: SmartFeedForward | MixtureOfExperts, name: str) -> str:
        return self._experts(x, mlp, name) if isinstance(mlp, MixtureOfExperts) else self._swiglu(x, mlp, name)

    def _swiglu(self, x: str, mlp: SmartFeedForward, name: str) -> str:
        g = self.graph
        with g.scope(name.rsplit(".", 1)[1]):
            return g.linear(self._gated(g.linear(x, mlp.gate_up_proj, f"{name}.gate_up_proj")), mlp.down_proj, f"{name}.down_proj")

    def _gated(self, gate_up: str) -> str:
        g = self.graph
        gate, up = g.ops("Split", gate_up, outputs=2, axis=-1)
        return g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up)

    def _experts(self, x: str, moe: MixtureOfExperts, name: str) -> str:
        """All experts for every token, added up with the router's weights, which are 0 for those that were not chosen: E / k times
        the work of the sparse layer, but a graph of plain products."""
        g = self.graph
        with g.scope("mlp"):
            rows = g.reshape(x, -1, self.config.n_embd)  # (N, C), N = B * T
            gate = g.weight(f"{name}.gate.weight", moe.gate.weight.T, torch.float32)
            probabilities = g.op("Softmax", g.op("MatMul", g.cast(rows, self.dtype, torch.float32), gate), axis=-1)  # (N, E)
            preference = probabilities
            if moe.choice_bias is not None:
                preference = g.op("Add", preference, g.weight(f"{name}.choice_bias", moe.choice_bias, torch.float32))
            _, chosen = g.ops("TopK", preference, g.constant([moe.k]), outputs=2, axis=-1)
            picked = g.op("GatherElements", probabilities, chosen, axis=1)  # (N, k)
            if moe.normalise:
                picked = g.op("Div", picked, g.op("ReduceSum", picked, g.constant([1]), keepdims=1))
            nothing = g.op("Mul", probabilities, g.constant(0, np.float32))
            shares = g.op("ScatterElements", nothing, chosen, picked, axis=1)  # (N, E)
            shares = g.op("Unsqueeze", g.op("Transpose", shares, perm=[1, 0]), g.constant([2]))  # (E, N, 1)
            gate_up = g.weight(f"{name}.experts.gate_up_proj", moe.gate_up_proj.transpose(1, 2))  # (E, C, 2F)
            down = g.weight(f"{name}.experts.down_proj", moe.down_proj.transpose(1, 2))  # (E, F, C)
            y = g.op("MatMul", self._gated(g.op("MatMul", g.op("Unsqueeze", rows, g.constant([0])), gate_up)), down)  # (E, N, C)
            y = g.op("Mul", y, g.cast(shares, torch.float32, self.dtype))
            y = g.op("Reshape", g.op("ReduceSum", y, g.constant([0]), keepdims=0), g.op("Shape", x))
            shared = moe.shared_expert
            return y if shared is None else g.op("Add", y, self._swiglu(x, shared, f"{name}.shared_expert"))

    @property
    def _numpy(self) -> type[np.generic]:
        return np.float16 if self.dtype == torch.float16 else np.float32

    def _model(self) -> onnx.ModelProto:
        g, c, kind = self.graph, self.config, FLOATS[self.dtype]
        cache = [(i, part) for i in range(c.n_layer) for part in ("key", "value")]
        info = helper.make_tensor_value_info
        inputs = [
            info("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"]),
            info("attention_mask", TensorProto.INT64, ["batch_size", TOTAL]),
        ]
        inputs += [info(PAST.format(*at), kind, ["batch_size", c.kv_heads, "past_sequence_length", c.head_size]) for at in cache]
        outputs = [info("logits", TensorProto.FLOAT, ["batch_size", "sequence_length", c.vocab_size])]
        outputs += [info(PRESENT.format(*at), kind, ["batch_size", c.kv_heads, TOTAL, c.head_size]) for at in cache]
        graph = helper.make_graph(g.nodes, "model", inputs, outputs, list(g.constants.values()))
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="SmartHaoAI")


__all__ = ["ModelGraph"]
