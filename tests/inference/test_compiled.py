"""Compiled steps of one reply: the same tokens and logits as without, whatever the cache holds."""

import os
import subprocess
import sys

import pytest
import torch

from inference import Engine, SamplingSettings
from inference.compiled import row_product
from inference.prefixes import PromptCache
from inference.quantized import quantize

SHAPE = dict(n_embd=64, n_head=4, n_kv_head=2, intermediate_size=96, vocab_size=160)
PARTS = {
    "plain": {},
    "windows": dict(use_sliding_window=True, window_size=6, window_pattern="SL"),
    "parts": dict(attention_gate="head", attention_temperature="length", residual_scale=True, value_residual=True, logit_softcap=8.0),
    "untied": dict(tie_word_embeddings=False, qk_norm=True, n_kv_head=4),
}


@pytest.fixture
def uncompiled(monkeypatch):
    """The graph run as it is written: compiling each of these would take a minute."""
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)


def both(make_model, parts, kind="none"):
    model = quantize(make_model(std=0.05, **SHAPE | parts), kind)
    compiled = Engine(model)
    compiled.compile()
    return Engine(model), compiled


def replies(engine, prompts, **settings):
    greedy = SamplingSettings(temperature=0, max_new_tokens=20, eos_token_id=[], logprobs=True, **settings)
    return [(row[0].ids, row[0].logprobs) for row in engine.generate(prompts, greedy)]


def same(found, expected, tolerance):
    for (ids, logprobs), (wanted, likely) in zip(found, expected, strict=True):
        assert ids == wanted
        assert logprobs == pytest.approx(likely, abs=tolerance)


@pytest.mark.parametrize("parts", PARTS)
def test_the_graph_is_the_model(make_model, parts, uncompiled):
    """Guards: a window that slides, a cache that grows or is gone on with, and parts of a block that the graph leaves out."""
    plain, compiled = both(make_model, PARTS[parts])
    prompt = torch.randint(0, plain.vocab_size, (9,)).tolist()
    same(replies(compiled, [prompt]), replies(plain, [prompt]), 1e-4)
    batch = [prompt, prompt[:4]]  # not one reply: runs as before, and the longer reply goes on alone
    same(replies(compiled, batch), replies(plain, batch), 1e-4)
    greedy = SamplingSettings(temperature=0, max_new_tokens=20, eos_token_id=[])
    kept = PromptCache()
    for text in (prompt, prompt + [1, 2, 3], prompt[:5]):
        streamed = [token for piece in compiled.stream(text, greedy, kept) for token in piece.ids]
        assert streamed == plain.generate([text], greedy)[0][0].ids


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8", "int4"])
def test_prepared_weights(make_model, kind, uncompiled):
    """Guards: scales and biases that are lost when matrices are stored once more."""
    plain, compiled = both(make_model, dict(attention_bias=True), kind)
    ids = torch.randint(0, plain.vocab_size, (12, 1, 1))
    mine, other = compiled.new_cache(1, 20), plain.new_cache(1, 20)
    with torch.inference_mode():
        for token in ids:
            found, expected = compiled.feed(token, mine), plain.feed(token, other)
            assert float((found - expected).norm() / expected.norm()) < {"fp32": 1e-5, "bf16": 2e-2, "int8": 3e-2, "int4": 2e-2}[kind]


def test_the_product_of_one_row():
    """Guards: a transposed matrix, a scale of the wrong axis."""
    linear = torch.nn.Linear(48, 20)
    x = torch.randn(1, 1, 48)
    torch.testing.assert_close(row_product(linear)(x), linear(x))


def test_what_is_not_compiled_is_said(make_model):
    """Guards: experts or a reasoning head that a graph would compute wrongly, without a word."""
    for parts, name in ((dict(n_expert=4), "experts"), (dict(use_reasoning=True), "reasoning head")):
        with pytest.raises(ValueError, match=name):
            Engine(make_model(**parts)).compile()
    with pytest.raises(ValueError, match="bfloat16"):
        Engine(make_model().bfloat16()).compile()


def test_a_wrong_graph_is_not_used(make_model, uncompiled, monkeypatch):
    """Guards: a compiler whose result differs from the model's."""
    monkeypatch.setattr("inference.compiled.RowProduct.forward", lambda self, x: torch.randn(1, 1, len(self.rows)))
    engine = Engine(make_model())
    with pytest.raises(ValueError, match="off by"):
        engine.compile()


@pytest.mark.slow
@pytest.mark.parametrize(("parts", "kind"), [("windows", "none"), ("plain", "int8"), ("plain", "bf16")])
def test_compiled_for_real(make_model, parts, kind):
    """Guards: code of the compiler that is wrong, that is made anew for each length of the cache, or was made for another model."""
    plain, compiled = both(make_model, PARTS[parts], kind)
    counters = torch._dynamo.utils.counters["stats"]
    made = counters["unique_graphs"]
    for length in (3, 9, 40):
        prompt = torch.randint(0, plain.vocab_size, (length,)).tolist()
        if kind == "none":
            same(replies(compiled, [prompt]), replies(plain, [prompt]), 1e-4)
        else:
            replies(compiled, [prompt])
    assert counters["unique_graphs"] == made


@pytest.mark.slow
def test_without_a_compiler(tmp_path):
    """Guards: a traceback where there is no C++ compiler."""
    code = """
from inference import Engine
from model import HaoAIConfig, SmartHaoAI
try:
    Engine(SmartHaoAI(HaoAIConfig(n_layer=1, n_embd=32, n_head=2, vocab_size=64)).eval()).compile()
except ValueError as error:
    print(error)
"""
    environment = os.environ | {"CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, encoding="utf-8")
    assert "is there a C++ compiler" in done.stdout, done.stderr
