"""Prepared weights: the same model within the rounding of each kind, through every way of decoding."""

import pytest
import torch
from generate_helpers import greedy_by_full_forward
from torch.nn import functional as F

from inference import Engine, SamplingSettings
from inference.choices import QUANTIZE, WEIGHT_KINDS
from inference.loading import Adapters, load_stage
from inference.quantized import GROUP, int4_codes, is_prepared, prepared, quantize, weight_bytes
from inference.session import ChatSession
from model.adapter_files import save_adapter
from model.attention import attend, attention_mask
from model.lora import LoRASettings, inject_lora, merge

TOLERANCE = {"fp32": 1e-6, "bf16": 6e-3, "int8": 2e-2, "int4": 0.12}  # of a product with normal numbers, by norms

GREEDY = SamplingSettings(temperature=0, max_new_tokens=8, eos_token_id=[])
SHAPE = dict(n_embd=64, n_head=4, n_kv_head=2, intermediate_size=96, vocab_size=160)


def error(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("kind", WEIGHT_KINDS)
def test_a_prepared_product_is_the_product(kind, rows):
    """Guards: scales of the wrong axis, a bias that is lost, a kernel that is wrong for one token or for many."""
    weight, bias, x = torch.randn(64, 96), torch.randn(64), torch.randn(2, rows, 96)
    weight *= torch.rand(64, 1) * 10 + 0.01  # rows of very different size
    module = prepared(weight, bias, kind)
    expected = F.linear(x.double(), weight.double(), bias.double())
    with torch.inference_mode():
        assert error(module(x), expected) < TOLERANCE[kind]
        assert module(x).dtype == torch.float32 and module(x).shape == expected.shape
        assert error(module.weight, weight) < TOLERANCE[kind]
    assert module.nbytes < weight.nbytes * {"fp32": 1.01, "bf16": 0.51, "int8": 0.27, "int4": 0.17}[kind]


def test_a_quantized_row_does_not_depend_on_its_neighbours():
    """Guards: one scale for all tokens of a batch, by which a large token would wipe out the others."""
    module = prepared(torch.randn(64, 96), None, "int8")
    x = torch.randn(4, 96)
    with torch.inference_mode():
        alone = module(x[:2])
        beside = module(torch.cat((x[:2], 1e4 * x[2:])))[:2]
        assert torch.equal(alone, beside)
        assert error(module(x[:1]), alone[:1]) < 2e-2
        assert not module(torch.zeros(3, 96)).any() and not module(torch.zeros(1, 96)).any()


def test_int8_without_the_kernels_of_x86(monkeypatch):
    """Guards: other processors than those for which torch brings fbgemm."""
    monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", ["qnnpack"])
    weight, x = torch.randn(64, 96), torch.randn(2, 3, 96)
    module = prepared(weight, None, "int8")
    with torch.inference_mode():
        assert error(module(x), F.linear(x, weight)) < TOLERANCE["int8"]
        assert error(module.weight, weight) < TOLERANCE["int8"]


def test_int4_codes_are_the_nearest_steps():
    """Guards: groups of a wrong axis, codes chosen for scales that are rounded afterwards."""
    weight = torch.randn(16, 2 * GROUP)
    codes, scales, middles = int4_codes(weight)
    assert codes.min() >= 0 and codes.max() <= 15
    steps = scales.double()[..., None] * (torch.arange(16) - 8) + middles.double()[..., None]  # (O, groups, 16)
    nearest = (weight.view(16, 2, GROUP, 1).double() - steps[:, :, None]).abs().argmin(dim=-1)
    assert (codes.view(16, 2, GROUP) != nearest).float().mean() < 0.01  # ties apart


@pytest.mark.parametrize(
    "changes", [{}, {"qk_norm": False, "attention_bias": True}, {"use_sliding_window": True, "window_size": 5, "window_pattern": "SL"}]
)
def test_the_same_ids_with_packed_weights(make_model, changes):
    """Guards: a prepared norm, attention or head that computes something else, in batches with padding and beyond a block."""
    prompts = [[5, 6, 7], [60, 61, 62, 63, 64, 65, 66, 67, 68]]
    model = make_model(**SHAPE, **changes)
    expected = [greedy_by_full_forward(model, prompt, 8) for prompt in prompts]
    found = Engine(quantize(model, "fp32")).generate(prompts, GREEDY)
    assert [reply[0].ids for reply in found] == expected


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("changes", [{}, {"n_expert": 4, "n_expert_per_token": 2, "moe_intermediate_size": 32}, {"use_reasoning": True}])
def test_a_quantized_model_says_nearly_the_same(make_model, kind, changes):
    """Guards: parts of the model that the change forgets or breaks: experts, reasoning head, cache against one pass."""
    model = make_model(std=0.05, **SHAPE, **changes)
    ids = torch.randint(160, (2, 70))
    with torch.inference_mode():
        expected = model(ids).logits
        quantize(model, kind)
        engine = Engine(model)
        found = model(ids).logits
        cache = engine.new_cache(2, 80)
        engine.prefill(ids[:, :60], None, cache)
        stepped = [engine.decode(ids[:, place], cache) for place in range(60, 70)]
    bound = {"bf16": 0.02, "int8": 0.06, "int4": 0.4}[kind]
    assert error(found, expected) < bound
    assert error(torch.stack(stepped, dim=1), expected[:, 60:]) < bound


def test_memory(make_model):
    """Guards: a dense copy of a matrix that stays behind its packed one."""
    shape = dict(n_embd=128, n_head=4, n_kv_head=2, intermediate_size=512, vocab_size=512)
    plain = weight_bytes(make_model(**shape))
    for kind, share in {"bf16": 0.63, "int8": 0.34, "int4": 0.26}.items():  # embedding and head lie apart
        assert weight_bytes(quantize(make_model(**shape), kind)) < share * plain


def test_attention_of_prompts_in_bf16():
    """Guards: the causal edge and masks where a prompt goes on behind cached tokens, over several blocks of queries."""
    from inference.quantized import half_attend

    for T, S, window in ((100, 100, None), (70, 90, None), (130, 150, 40)):
        q, k, v = torch.randn(2, 4, T, 16), torch.randn(2, 2, S, 16), torch.randn(2, 2, S, 16)
        mask = None
        if T < S or window:
            valid = torch.arange(S)[None] >= torch.tensor([[0], [7]])
            mask = attention_mask(torch.arange(S - T, S), torch.arange(S), window, valid, None, None, torch.float32)
        assert error(half_attend(q, k, v, mask, 0.0, False, window), attend(q, k, v, mask, 0.0, False, window)) < 1e-2


def test_refusals(make_model):
    """Guards: a second rounding of rounded weights, an adapter lost without a word."""
    model = make_model(**SHAPE)
    with pytest.raises(ValueError, match="int3.*known: none"):
        quantize(model, "int3")
    assert quantize(model, "none") is model and not is_prepared(model)
    inject_lora(model, LoRASettings(r=2))
    with pytest.raises(ValueError, match="merge"):
        quantize(model, "int8")
    merge(model)
    quantize(model, "auto")
    assert is_prepared(model)
    with pytest.raises(ValueError, match="before"):
        quantize(model, "bf16")
    with pytest.raises(ValueError, match="without quantize"):
        Adapters(model).use("anywhere")


@pytest.mark.parametrize("kind", QUANTIZE)
def test_a_session_with_quantized_weights(tmp_path, tokenizer, make_model, kind):
    """Guards: the setting not reaching the model."""
    make_model(tokenizer).save_pretrained(tmp_path, tokenizer)
    session = ChatSession.from_pretrained(tmp_path, device="cpu", quantize=kind, temperature=0.0, max_new_tokens=5)
    session.chat("Hello!")
    assert is_prepared(session.model) == (kind != "none")


def test_an_adapter_is_merged_before(tmp_path, tokenizer, make_model):
    """Guards: the quantised base answering without its adapter."""
    model = make_model(tokenizer)
    model.save_pretrained(tmp_path / "base", tokenizer)
    adapter = inject_lora(model, LoRASettings(r=2), base=str(tmp_path / "base"))
    for factors in adapter.layers.values():
        for parameter in factors.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    save_adapter(model, tmp_path / "adapter")
    ids = torch.randint(300, (1, 9))
    with torch.inference_mode():
        expected = model(ids).logits
        found = load_stage(tmp_path / "adapter", "cpu", torch.float32, {}, "fp32")
        assert found.adapter is None
        torch.testing.assert_close(found.model(ids).logits, expected, rtol=1e-3, atol=1e-3)
