"""The optional parts in random combinations with all else: causal, the same with a cache, packed, padded, saved and loaded; neutral
when they are added; and their formulas against plain references."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from parity_helpers import clear_ids
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

import model.cross_entropy as cross_entropy
from model import HaoAIConfig, KVCache, RMSNorm, SmartHaoAI
from model.checkpoint import load_config, model_type, portability_notes, save_pretrained, weights_to_disk
from model.config import NEUTRAL_PARTS
from model.cross_entropy import linear_cross_entropy, linear_log_probs

TOLERANCE = 2e-5  # of the largest logit, fp32
VOCABULARY = 53
CAP = 2.5
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_layer": 3,
    "n_head": 4,
    "n_kv_head": 2,
    "n_embd": 24,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
}
PARTS: dict[str, dict[str, Any]] = {
    "gate per head": {"attention_gate": "head"},
    "gate per element": {"attention_gate": "element"},
    "temperature from the query": {"attention_temperature": "query"},
    "temperature from the length": {"attention_temperature": "length"},
    "residual scale": {"residual_scale": True},
    "value residual": {"value_residual": True},
    "value embedding": {"value_embedding": True},
    "reasoning": {"use_reasoning": True, "reasoning_steps": 2},
}
TRAINING_ONLY = {"layers": {"deep_supervision": "layers"}, "tokens": {"deep_supervision": "tokens"}}
ROPES = (
    None,
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
)


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    """Any combination of switches that HaoAIConfig allows."""
    fields: dict[str, Any] = {
        "n_layer": draw(st.integers(1, 4)),
        "n_kv_head": draw(st.sampled_from([1, 2, 4])),
        "head_dim": draw(st.sampled_from([6, 8])),
        "qk_norm": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "rope_scaling": draw(st.sampled_from(ROPES)),
        "attention_gate": draw(st.sampled_from(["none", "head", "element"])),
        "attention_temperature": draw(st.sampled_from(["none", "query", "length"])),
        "residual_scale": draw(st.booleans()),
        "value_residual": draw(st.booleans()),
        "value_embedding": draw(st.booleans()),
        "logit_softcap": draw(st.sampled_from([0.0, CAP])),
        "deep_supervision": draw(st.sampled_from(["none", "layers", "tokens"])),
        "feed_forward": draw(st.sampled_from(["swiglu", "relu2"])),
    }
    if draw(st.booleans()):
        fields.update(use_reasoning=True, reasoning_steps=draw(st.integers(1, 3)))
    if draw(st.booleans()):
        windows = {"window_size": draw(st.integers(1, 9)), "window_pattern": draw(st.sampled_from(["S", "SL", "LSS", "SSSL"]))}
        fields.update(use_sliding_window=True, **windows)
    if fields["feed_forward"] == "swiglu" and draw(st.booleans()):
        fields.update(
            n_expert=4,
            n_expert_per_token=draw(st.integers(1, 3)),
            moe_pattern=draw(st.sampled_from(["E", "ED"])),
            n_shared_expert=draw(st.integers(0, 1)),
            norm_topk_prob=draw(st.booleans()),
            router_bias_rate=draw(st.sampled_from([0.0, 0.01])),
        )
    return fields


SEEDS = st.integers(0, 2**31 - 1)


def uneven(model: SmartHaoAI) -> SmartHaoAI:
    """The model with every weight away from the value at which its part does nothing."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("_scale") or "norm" in name:
                tensor.uniform_(0.5, 1.5)
            elif name.endswith((".temperature", ".value_mix", ".bias", ".choice_bias", ".gate_proj.weight", ".value_table.weight")):
                tensor.normal_(std=0.4)
            elif name.endswith(".gate.weight"):
                tensor.normal_(std=0.5)
            elif not bool(tensor.any()):  # what begins closed
                tensor.normal_(std=0.15)
    return model


def build(seed: int, fields: dict[str, Any]) -> SmartHaoAI:
    torch.manual_seed(seed)
    return uneven(SmartHaoAI(HaoAIConfig(**{**BASE, **fields})).eval())


def assert_same(actual: Tensor, expected: Tensor) -> None:
    error, largest = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert error <= TOLERANCE * largest, f"largest error {error:.3g} with a largest logit of {largest:.3g}"


@torch.no_grad()
def logits_of(model: SmartHaoAI, ids: Tensor, **inputs: Any) -> Tensor:
    logits = model(ids, **inputs).logits
    assert torch.isfinite(logits).all()
    return logits


@torch.no_grad()
def decode(model: SmartHaoAI, ids: Tensor, cuts: list[int], block: int, mask: Tensor | None = None) -> Tensor:
    """Logits (B, T, V) of ids fed to a cache in the pieces that end at `cuts`."""
    cache = KVCache(model.config, ids.shape[0], ids.shape[1], block=block)
    pieces, start = [], 0
    for end in [*cuts, ids.shape[1]]:
        first = None if mask is None or start else mask[:, :end]
        pieces.append(model(ids[:, start:end], attention_mask=first, cache=cache).logits)
        start = end
    return torch.cat(pieces, dim=1)


# -------------------------------------------------------------------------------- random combinations


@given(seed=SEEDS, fields=shapes(), changed=st.integers(0, 18))
@hypothesis_settings(max_examples=30, deadline=None)
def test_a_token_changes_nothing_before_it(seed: int, fields: dict[str, Any], changed: int) -> None:
    """Guards: a gate, temperature, table or head that looks at later tokens, or at a mean over the sequence."""
    model = build(seed, fields)
    ids = clear_ids(model, 2, 19)
    other = ids.clone()
    other[:, changed] = (ids[:, changed] + 1 + torch.randint(VOCABULARY - 1, (2,))) % VOCABULARY
    before, after = logits_of(model, ids), logits_of(model, other)
    if changed:
        assert_same(after[:, :changed], before[:, :changed])
    assert (after[:, changed] - before[:, changed]).abs().max() > 1e-3


@given(
    seed=SEEDS,
    fields=shapes(),
    cuts=st.lists(st.integers(1, 20), max_size=6, unique=True).map(sorted),
    block=st.sampled_from([1, 3, 7, 64]),
)
@hypothesis_settings(max_examples=30, deadline=None)
def test_pieces_with_a_cache_equal_the_full_pass(seed: int, fields: dict[str, Any], cuts: list[int], block: int) -> None:
    """Guards: lengths, first values or token vectors of the piece instead of the text; a cache that holds them unmixed."""
    model = build(seed, fields)
    ids = clear_ids(model, 2, 21)
    full = logits_of(model, ids)
    assert_same(decode(model, ids, cuts, block), full)
    assert_same(decode(model, ids, list(range(1, 21)), block), full)


@given(seed=SEEDS, fields=shapes(), lengths=st.lists(st.integers(1, 11), min_size=2, max_size=4))
@hypothesis_settings(max_examples=30, deadline=None)
def test_packed_documents_equal_the_documents_alone(seed: int, fields: dict[str, Any], lengths: list[int]) -> None:
    """Guards: a length-aware temperature that counts the row instead of the document; values mixed over a border."""
    model = build(seed, fields)
    documents = [clear_ids(model, 1, length) for length in lengths]
    padding = 3
    row = torch.cat([*documents, torch.zeros(1, padding, dtype=torch.long)], dim=1)
    segments = torch.tensor([[n + 1 for n, length in enumerate(lengths) for _ in range(length)] + [0] * padding])
    pieces = logits_of(model, row, segment_ids=segments).split([*lengths, padding], dim=1)
    for piece, document in zip(pieces, documents, strict=False):
        assert_same(piece, logits_of(model, document))


@given(
    seed=SEEDS,
    fields=shapes(),
    pads=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    prompt=st.integers(10, 14),
    block=st.sampled_from([2, 64]),
)
@hypothesis_settings(max_examples=30, deadline=None)
def test_left_padded_rows_equal_the_rows_alone(seed: int, fields: dict[str, Any], pads: list[int], prompt: int, block: int) -> None:
    """Guards: parts that see padding, or count it as length; positions that are only right without a cache."""
    model = build(seed, fields)
    total = 15
    rows = [clear_ids(model, 1, total - pad) for pad in pads]
    ids = torch.cat([torch.cat((torch.randint(VOCABULARY, (1, pad)), row), dim=1) for pad, row in zip(pads, rows, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (total - pad) for pad in pads])
    batched = logits_of(model, ids, attention_mask=mask)
    cached = decode(model, ids, list(range(prompt, total)), block, mask)
    for index, (pad, row) in enumerate(zip(pads, rows, strict=True)):
        alone = logits_of(model, row)[0]
        assert_same(batched[index, pad:], alone)
        assert_same(cached[index, pad:], alone)


@given(seed=SEEDS, fields=shapes())
@hypothesis_settings(max_examples=25, deadline=None)
def test_saved_and_loaded_is_the_same(seed: int, fields: dict[str, Any]) -> None:
    """Guards: a field that config.json forgets, a scale folded twice or not at all, a tensor lost on the way."""
    model = build(seed, fields)
    ids = clear_ids(model, 2, 17)
    expected = logits_of(model, ids)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        loaded = SmartHaoAI.from_pretrained(folder)
        assert_same(logits_of(loaded, ids), expected)
        plain = dataclasses.replace(model.config, residual_scale=False, deep_supervision="none")
        assert model_type(loaded.config) == model_type(plain) and portability_notes(loaded.config) == portability_notes(plain)
        again = Path(folder, "again")
        save_pretrained(model, again, resumable=True)
        resumed = SmartHaoAI.from_pretrained(again)
        assert resumed.config == model.config
        state = resumed.state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_a_part_is_added_to_a_model_whose_files_have_other_names(tmp_path: Path) -> None:
    """Guards: experts stored under mixtral's names and looked for under our own, so that they stay whatever the memory held."""
    model = build(3, {"n_expert": 4, "qk_norm": False})
    assert model_type(model.config) == "mixtral"
    ids = clear_ids(model, 2, 13)
    save_pretrained(model, tmp_path)
    larger = SmartHaoAI.from_pretrained(tmp_path, attention_gate="head")
    assert model_type(larger.config) == "haoai"
    assert_same(logits_of(larger, ids), logits_of(model, ids))
    assert all(torch.equal(larger.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@given(seed=SEEDS, fields=shapes(), added=st.lists(st.sampled_from([*PARTS, *TRAINING_ONLY]), min_size=1, unique=True))
@hypothesis_settings(max_examples=25, deadline=None)
def test_switching_parts_on_changes_nothing(seed: int, fields: dict[str, Any], added: list[str]) -> None:
    """Guards: a part that disturbs a finished model before it has learned anything."""
    parts: dict[str, Any] = {}
    for name in added:
        parts.update({**PARTS, **TRAINING_ONLY}[name])
    base = {name: value for name, value in fields.items() if name not in parts}
    model = build(seed, {**base, "residual_scale": False, "deep_supervision": "none"})
    ids = clear_ids(model, 2, 13)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        larger = SmartHaoAI.from_pretrained(folder, **parts)
    assert all(getattr(larger.config, name) == value for name, value in parts.items())
    assert torch.isfinite(torch.cat([parameter.reshape(-1) for parameter in larger.parameters()])).all()
    assert_same(logits_of(larger, ids), logits_of(model, ids))
    larger.train()
    out = larger(ids, labels=ids)
    torch.testing.assert_close(out.loss, model(ids, labels=ids).loss, rtol=1e-5, atol=1e-6)


@given(seed=SEEDS, fields=shapes())
@hypothesis_settings(max_examples=60, deadline=None)
def test_the_account_counts_every_parameter(seed: int, fields: dict[str, Any]) -> None:
    """Guards: a part whose parameters (and memory) the plan does not show."""
    with torch.device("meta"):
        model = SmartHaoAI(HaoAIConfig(**{**BASE, **fields}))
    heads = 0 if model.auxiliary is None else sum(p.numel() for p in model.auxiliary.parameters())
    account = model.config.account()
    assert account.parameters == model.num_parameters() - heads
    assert 0 < account.active_body_parameters <= account.body_parameters


# --------------------------------------------------------------------------------------- single parts


@pytest.mark.parametrize("name", PARTS)
def test_every_part_counts_once_its_values_move(name: str, seed: int) -> None:
    """Guards: a part that is built, saved and counted, and never used."""
    model = SmartHaoAI(HaoAIConfig(**{**BASE, **PARTS[name]})).eval()
    ids = torch.randint(VOCABULARY, (2, 13))
    neutral = logits_of(model, ids)
    plain = SmartHaoAI(HaoAIConfig(**BASE)).eval()
    plain.load_state_dict({key: tensor for key, tensor in model.state_dict().items() if key in plain.state_dict()})
    assert_same(neutral, logits_of(plain, ids))
    own = [key for key in model.state_dict() if key not in plain.state_dict()]
    assert own
    with torch.no_grad():
        for key in own:
            model.state_dict()[key].add_(torch.randn_like(model.state_dict()[key]) * 0.5)
    assert (logits_of(model, ids) - neutral).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["head", "element"])
def test_the_gate_against_its_formula(kind: str, seed: int) -> None:
    """Guards: gates of another head or token, a gate that looks at the attention's output, a factor other than 2 sigmoid."""
    model = build(seed, {"attention_gate": kind, "n_layer": 1})
    attention = model.layers[0].self_attn
    seen: dict[str, Tensor] = {}
    attention.register_forward_pre_hook(lambda module, inputs: seen.update(x=inputs[0]))
    attention.o_proj.register_forward_pre_hook(lambda module, inputs: seen.update(gated=inputs[0]))
    ids = torch.randint(VOCABULARY, (2, 9))
    logits_of(model, ids)
    gated, x = seen["gated"].view(2, 9, 4, 6), seen["x"]
    gate = 2 / (1 + torch.exp(-x @ attention.gate_proj.weight.T))
    with torch.no_grad():
        attention.gate_proj.weight.zero_()
    logits_of(model, ids)
    torch.testing.assert_close(gated, seen["gated"].view(2, 9, 4, 6) * gate.view(2, 9, 4, -1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["query", "length"])
@pytest.mark.parametrize("window", [None, 4])
def test_the_temperature_against_explicit_attention(kind: str, window: int | None, seed: int) -> None:
    """Guards: a temperature on the keys or on the output; the length counted from 0, or beyond a layer's window."""
    windows = {} if window is None else {"use_sliding_window": True, "window_size": window, "window_pattern": "S"}
    model = build(seed, {"attention_temperature": kind, "n_layer": 1, "n_kv_head": 4, **windows})
    attention = model.layers[0].self_attn
    seen: dict[str, Tensor] = {}
    attention.register_forward_pre_hook(lambda module, inputs: seen.update(x=inputs[0]))
    attention.o_proj.register_forward_pre_hook(lambda module, inputs: seen.update(y=inputs[0]))
    logits_of(model, torch.randint(VOCABULARY, (1, 9)))
    q, k, v = (part.view(9, 4, 6).transpose(0, 1) for part in (seen["x"][0] @ attention.qkv_proj.weight.T).split(24, dim=-1))
    q, k = norm(q, attention.q_norm), norm(k, attention.k_norm)
    angles = torch.arange(9.0)[:, None] * 10000.0 ** -(torch.arange(0, 6, 2) / 6)
    cos, sin = angles.cos(), angles.sin()
    turned = [torch.cat((p[..., :3] * cos - p[..., 3:] * sin, p[..., 3:] * cos + p[..., :3] * sin), dim=-1) for p in (q, k)]
    expected = torch.zeros(9, 4, 6)
    for head in range(4):
        for t in range(9):
            first = 0 if window is None else max(0, t - window + 1)
            keys = t + 1 - first
            if kind == "query":
                factor = 2 * torch.sigmoid(q[head, t] @ attention.temperature[head] / 6**0.5)
            else:
                factor = 1 + attention.temperature[head] * torch.tensor(float(keys)).log()
            scores = factor * (turned[1][head, first : t + 1] @ turned[0][head, t]) / 6**0.5
            expected[t, head] = scores.softmax(0) @ v[head, first : t + 1]
    torch.testing.assert_close(seen["y"][0].view(9, 4, 6), expected, rtol=1e-4, atol=1e-5)


def test_values_against_their_formula(seed: int) -> None:
    """Guards: values mixed with the wrong layer's, before its own token vectors are added, or with another token's."""
    model = build(seed, {"value_residual": True, "value_embedding": True, "n_layer": 3, "n_kv_head": 1})
    inputs: dict[int, Tensor] = {}
    for index, layer in enumerate(model.layers):
        layer.self_attn.register_forward_pre_hook(lambda module, args, index=index: inputs.update({index: args[0]}))
    ids = torch.randint(VOCABULARY, (2, 7))
    cache = KVCache(model.config, 2, 7)
    with torch.no_grad():
        model(ids, cache=cache)
        first = None
        for index, layer in enumerate(model.layers):
            attention = layer.self_attn
            assert (attention.value_table is not None) == (index in (0, 2)) and (attention.value_mix is not None) == (index > 0)
            values = inputs[index] @ attention.qkv_proj.weight[-6:].T
            values = values if attention.value_table is None else values + attention.value_table.weight[ids]
            first = values if first is None else first
            if attention.value_mix is not None:
                values = (1 - attention.value_mix) * values + attention.value_mix * first
            torch.testing.assert_close(cache.layers[index].values[:, 0, :7], values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"qk_norm": False}, {"n_expert": 4, "n_expert_per_token": 2}], ids=["qwen3", "llama", "qwen3_moe"])
def test_scales_fold_into_a_standard_model(fields: dict[str, Any], seed: int, tmp_path: Path) -> None:
    """Guards: a finished model that is not standard any more, or is but computes something else; experts left out of the folding."""
    model = build(seed, {"residual_scale": True, "deep_supervision": "tokens", **fields})
    ids = clear_ids(model, 2, 15)
    model.save_pretrained(tmp_path)
    config = load_config(tmp_path)
    assert model_type(config) == ("qwen3_moe" if fields.get("n_expert") else "llama" if fields else "qwen3") and not config.residual_scale
    assert_same(logits_of(SmartHaoAI.from_pretrained(tmp_path), ids), logits_of(model, ids))
    assert model.config.residual_scale and model.auxiliary is not None  # saving leaves the model itself alone


def test_shared_experts_are_scaled_too(seed: int, tmp_path: Path) -> None:
    """Guards: a scale that is folded into the chosen experts only."""
    model = build(seed, {"residual_scale": True, "n_expert": 4, "n_shared_expert": 1, "moe_pattern": "ED"})
    ids = clear_ids(model, 2, 15)
    model.save_pretrained(tmp_path)
    assert_same(logits_of(SmartHaoAI.from_pretrained(tmp_path), ids), logits_of(model, ids))


@pytest.mark.parametrize("part", ["logit_softcap", "feed_forward", "n_embd"])
def test_what_is_fixed_cannot_be_switched_on(part: str, tmp_path: Path, seed: int) -> None:
    """Guards: a finished model that is silently another one."""
    assert part not in NEUTRAL_PARTS
    build(seed, {}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=part):
        SmartHaoAI.from_pretrained(tmp_path, **{part: {"logit_softcap": 15.0, "feed_forward": "relu2", "n_embd": 48}[part]})


# ------------------------------------------------------------------------------------------- softcap


def capped_loss(hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor | None, cap: float) -> Tensor:
    losses = F.cross_entropy(cap * torch.tanh(hidden @ weight.T / cap), targets, reduction="none")
    return losses.sum() if token_weights is None else (losses * token_weights).sum()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("cap", [0.7, 5.0, 30.0])
def test_softcap_value_and_gradients(cap: float, weighted: bool, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: the cap's slope forgotten in one of the gradients, taken from the softmax instead of the logits, or of one chunk only."""
    monkeypatch.setattr(cross_entropy, "CHUNK", 8)
    hidden, weight = torch.randn(21, 12, requires_grad=True), torch.randn(31, 12, requires_grad=True)
    targets, token_weights = torch.randint(31, (21,)), torch.rand(21) * 3 if weighted else None
    loss = linear_cross_entropy(hidden, weight, targets, token_weights, softcap=cap)
    (0.37 * loss).backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    expected = capped_loss(*exact, targets, None if token_weights is None else token_weights.double(), cap)
    (0.37 * expected).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-5)
    for ours, theirs in zip((hidden, weight), exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)
    scores = (cap * torch.tanh(exact[0] @ exact[1].T / cap)).log_softmax(1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(linear_log_probs(hidden, weight, targets, softcap=cap)[0].double(), scores, rtol=1e-5, atol=1e-5)


def test_every_path_to_a_logit_is_capped(seed: int) -> None:
    """Guards: training with capped logits and generation without, or the reverse."""
    model = build(seed, {"logit_softcap": CAP})
    ids = torch.randint(VOCABULARY, (2, 12))
    with torch.no_grad():  # not every random model has logits above the cap
        model.norm.weight *= 2 * CAP / (model.hidden_states(ids) @ model.head_weight.T).abs().max()
    logits = logits_of(model, ids)
    with torch.no_grad():
        plain = model.hidden_states(ids) @ model.head_weight.T
        torch.testing.assert_close(logits, CAP * torch.tanh(plain / CAP), rtol=1e-5, atol=1e-5)
        loss = model(ids, labels=ids).loss
        torch.testing.assert_close(
            loss, F.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1)), rtol=1e-5, atol=1e-5
        )
        scores = model.position_log_probs(ids[:, :-1], ids[:, 1:])
        expected = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).reshape(-1)
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
        assert plain.abs().max() > CAP > logits.abs().max()


# --------------------------------------------------------------------------------- training-only heads


def packed_batch() -> tuple[Tensor, Tensor, Tensor]:
    """ids, labels with gaps, and segments of documents of 1, 2, 3 and more tokens, with padding at the end."""
    lengths = [[1, 2, 3, 6, 2], [7, 1, 1, 5]]
    segments = torch.tensor([[n + 1 for n, length in enumerate(row) for _ in range(length)] + [0] * (16 - sum(row)) for row in lengths])
    ids = torch.randint(VOCABULARY, (2, 16))
    hidden = (torch.rand(2, 16) < 0.2) | (segments == 0)
    return ids, ids.masked_fill(hidden, -100), segments


def naive_loss(states: Tensor, head: Tensor, labels: Tensor, segments: Tensor, distance: int, cap: float) -> Tensor:
    """Sum over all tokens of -log p(label of token t + distance | state of token t), within documents."""
    total = torch.zeros(())
    for row in range(labels.shape[0]):
        for t in range(labels.shape[1] - distance):
            target = int(labels[row, t + distance])
            if target != -100 and segments[row, t] == segments[row, t + distance]:
                logits = head @ states[row, t]
                logits = cap * torch.tanh(logits / cap) if cap else logits
                total = total - logits.log_softmax(0)[target]
    return total


def norm(x: Tensor, module: RMSNorm) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + module.eps).sqrt() * module.weight


@pytest.mark.parametrize("cap", [0.0, CAP])
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_layer_supervision_against_a_plain_reference(cap: float, share: float, seed: int) -> None:
    """Guards: the wrong layer, targets of the next document, a coefficient that is not what the loop set."""
    model = build(seed, {"deep_supervision": "layers", "deep_supervision_coef": 0.7, "n_layer": 4, "logit_softcap": cap}).train()
    model.deep_weight = share
    outputs: dict[int, Tensor] = {}
    for index, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda module, args, result, index=index: outputs.update({index: result}))
    ids, labels, segments = packed_batch()
    out = model(ids, labels=labels, segment_ids=segments)
    assert set(out.deep_losses) == {"layer_1_loss", "layer_2_loss"} and model.config.supervised_layers == [0, 1]
    for index, module in zip([0, 1], model.auxiliary.norms, strict=True):
        expected = naive_loss(norm(outputs[index], module), model.head_weight, labels, segments, 1, cap)
        torch.testing.assert_close(out.deep_losses[f"layer_{index + 1}_loss"], 0.7 * share * expected, rtol=1e-4, atol=1e-4)
    last = naive_loss(norm(outputs[3], model.norm), model.head_weight, labels, segments, 1, cap)
    torch.testing.assert_close(out.loss_sum, last, rtol=1e-4, atol=1e-4)  # and the loss itself is untouched


@pytest.mark.parametrize("cap", [0.0, CAP])
@pytest.mark.parametrize("packed", [False, True])
def test_second_token_loss_against_a_plain_reference(cap: float, packed: bool, seed: int) -> None:
    """Guards: a prediction of t + 1 or t + 3, of a token of the next document, or one that has seen what it predicts."""
    model = build(seed, {"deep_supervision": "tokens", "deep_supervision_coef": 0.4, "logit_softcap": cap}).train()
    ids, labels, segments = packed_batch()
    segments = segments if packed else torch.ones_like(segments)
    inputs = {"segment_ids": segments} if packed else {}
    out = model(ids, labels=labels, **inputs)
    module = model.auxiliary
    states = model.hidden_states(ids, **inputs)
    tokens = torch.cat((model.embed_tokens.weight[ids[:, 1:]], torch.zeros(2, 1, 24)), dim=1)
    x = torch.cat((norm(states, module.state_norm), norm(tokens, module.token_norm)), dim=-1) @ module.join.weight.T
    gate, up = module.mlp.gate_up_proj.weight.chunk(2)
    inner = norm(x, module.inner_norm)
    x = x + (F.silu(inner @ gate.T) * (inner @ up.T)) @ module.mlp.down_proj.weight.T
    expected = naive_loss(norm(x, module.norm), model.head_weight, labels, segments, 2, cap)
    torch.testing.assert_close(out.deep_losses["second_token_loss"], 0.4 * expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", TRAINING_ONLY)
def test_training_heads_are_for_training_only(kind: str, seed: int, tmp_path: Path) -> None:
    """Guards: heads that cost time in evaluation, that stay in a finished model, or that a resumed run has to learn again."""
    model = build(seed, TRAINING_ONLY[kind])
    ids = torch.randint(VOCABULARY, (2, 12))
    assert not model(ids, labels=ids).deep_losses
    model.train()
    assert model(ids, labels=ids).deep_losses
    model.deep_weight = 0.0
    assert not model(ids, labels=ids).deep_losses
    save_pretrained(model, tmp_path / "finished")
    save_pretrained(model, tmp_path / "resumable", resumable=True)
    names = {}
    for folder in ("finished", "resumable"):
        with safe_open(tmp_path / folder / "model.safetensors", framework="pt") as file:
            names[folder] = {name for name in file.keys() if "auxiliary" in name}
    disk = weights_to_disk(model.state_dict(), model.config)
    assert not names["finished"] and names["resumable"] == {name for name in disk if "auxiliary" in name} != set()
    assert load_config(tmp_path / "finished").deep_supervision == "none"
    assert load_config(tmp_path / "resumable").deep_supervision == kind


def test_deep_supervision_reaches_the_layers_below_it(seed: int) -> None:
    """Guards: losses of detached states, which train the heads alone."""
    model = build(seed, {"deep_supervision": "layers", "n_layer": 3}).train()
    ids = torch.randint(VOCABULARY, (2, 12))
    sum(model(ids, labels=ids).deep_losses.values()).backward()
    assert bool(model.layers[0].mlp.down_proj.weight.grad.any())
    assert model.layers[2].mlp.down_proj.weight.grad is None  # above the supervised layers
