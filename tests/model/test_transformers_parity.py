"""The same files give the same numbers in transformers, in both directions. Needs the extra `parity`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_helpers import assert_equal_logits, load_theirs

from model import HaoAIConfig, SmartHaoAI
from model.transformer import pad_left
from tools.parity import LLAMA3, YARN, in_their_words, major_version

transformers = pytest.importorskip("transformers", reason="parity tests need: pip install -e .[parity]")

OURS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen3-untied": {"tie_word_embeddings": False},
    "qwen3-wide-heads": {"head_dim": 12, "n_kv_head": 4},
    "qwen3-windows": {"n_layer": 4, "use_sliding_window": True, "window_size": 5, "window_pattern": "SSSL"},
    "qwen3-first-full": {"n_layer": 3, "use_sliding_window": True, "window_size": 3, "window_pattern": "LSS"},
    "llama": {"qk_norm": False, "rms_norm_eps": 1e-5, "rope_theta": 5e5},
    "llama-untied": {"qk_norm": False, "tie_word_embeddings": False, "n_kv_head": 1},
    "llama-wide-heads": {"qk_norm": False, "head_dim": 6},
    "qwen3-linear": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    "qwen3-yarn": {"rope_scaling": YARN},
    "llama-llama3": {"qk_norm": False, "rope_scaling": LLAMA3},
    "llama-yarn-factor": {
        "qk_norm": False,
        "rope_scaling": {**YARN, "attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0},
    },
    "llama-yarn-mscale": {"qk_norm": False, "rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4}},
    "llama-yarn-no-original": {"qk_norm": False, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
}


@pytest.mark.parametrize("name", OURS)
def test_our_files_in_transformers(name: str, make_model, seed: int, tmp_path: Path) -> None:
    """Guards: a checkpoint that transformers reads as another model (rotary base, windows, head size, tied head)."""
    ours = make_model(**OURS[name])
    ours.save_pretrained(tmp_path)
    theirs = load_theirs(tmp_path)
    assert type(theirs).__name__ == ("LlamaForCausalLM" if name.startswith("llama") else "Qwen3ForCausalLM")
    assert sum(p.numel() for p in theirs.parameters()) == ours.num_parameters()
    assert_equal_logits(ours, theirs)


@pytest.mark.parametrize("name", OURS)
def test_our_files_come_back_through_transformers(name: str, make_model, seed: int, tmp_path: Path) -> None:
    """Guards: what transformers writes after reading ours (only the new spellings of 5.x) is another model to us."""
    ours = make_model(**OURS[name])
    ours.save_pretrained(tmp_path / "ours")
    load_theirs(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    back = SmartHaoAI.from_pretrained(tmp_path / "theirs")
    ids = torch.randint(61, (2, 30))
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, ours(ids).logits, rtol=0, atol=1e-5)


def their_config(kind: str, **fields: Any) -> Any:
    shape: dict[str, Any] = {
        "vocab_size": 53,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.15,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    make = {"qwen3": transformers.Qwen3Config, "llama": transformers.LlamaConfig}[kind]
    return make(**{**shape, **in_their_words(fields)})


THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {"head_dim": 8}),
    "qwen3-tied": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-max-window-layers": (
        "qwen3",
        {"head_dim": 8, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    ),
    "qwen3-layer-types": (
        "qwen3",
        {
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen3-switched-off": (
        "qwen3",
        {"head_dim": 8, "use_sliding_window": False, "sliding_window": 6, "max_window_layers": 0},
    ),
    "qwen3-linear": (
        "qwen3",
        {"head_dim": 8, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ),
    "llama": ("llama", {}),
    "llama-tied-multi-query": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama3": ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}),
    "llama-yarn": ("llama", {"rope_parameters": {**YARN, "rope_theta": 1e4}}),
}


@pytest.mark.parametrize("name", THEIRS)
def test_their_files_in_our_model(name: str, seed: int, tmp_path: Path) -> None:
    """Guards: a downloaded llama or qwen3 checkpoint that is read as another model."""
    kind, fields = THEIRS[name]
    config = their_config(kind, **fields)
    config._attn_implementation = "eager"
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in theirs.named_parameters():
            if "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
    theirs.save_pretrained(tmp_path)
    assert_equal_logits(SmartHaoAI.from_pretrained(tmp_path), theirs)


@pytest.mark.parametrize(
    "scaling",
    [None, {"type": "linear", "factor": 2.0}, {"rope_type": "llama3", **LLAMA3}, {"type": "yarn", **YARN}],
    ids=["none", "linear", "llama3", "yarn"],
)
def test_old_and_new_spellings_mean_the_same(scaling: dict | None, make_model, tmp_path: Path) -> None:
    """Guards: files of transformers 4 (rope_theta, rope_scaling, torch_dtype) and 5 (rope_parameters, dtype)."""
    fields = {} if scaling is None else {"rope_scaling": {"rope_type": scaling.get("rope_type", scaling.get("type")), **scaling}}
    model = make_model(rope_theta=12345.0, **fields)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    assert data["torch_dtype"] == data["dtype"] == "float32" and data["rope_theta"] == data["rope_parameters"]["rope_theta"] == 12345.0
    old = {
        **{k: v for k, v in data.items() if k not in ("rope_parameters", "dtype", "layer_types")},
        "rope_scaling": scaling,
    }
    new = {k: v for k, v in data.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    ids = torch.randint(61, (1, 30))
    with torch.no_grad():
        for spelling in (old, new):
            file.write_text(json.dumps(spelling), encoding="utf-8")
            back = SmartHaoAI.from_pretrained(tmp_path)
            assert back.config.rope_theta == 12345.0
            assert torch.equal(back(ids).logits, model(ids).logits)
            if spelling is old or major_version() >= 5:
                assert_equal_logits(model, load_theirs(tmp_path), 30)


def test_windows_that_llama_does_not_have(make_model, tmp_path: Path) -> None:
    """Guards: a windowed model without QK-norm written as llama, which would ignore the windows."""
    model = make_model(qk_norm=False, use_sliding_window=True, window_size=3, window_pattern="SL")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["model_type"] == "haoai"
    back = SmartHaoAI.from_pretrained(tmp_path)
    assert back.config == model.config


def test_bfloat16_files_are_read(seed: int, tmp_path: Path) -> None:
    """Guards: a checkpoint in half precision that keeps its type in a fp32 model."""
    theirs = transformers.AutoModelForCausalLM.from_config(their_config("llama")).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    ours = SmartHaoAI.from_pretrained(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert_equal_logits(ours, load_theirs(tmp_path))


def test_packed_rows_equal_theirs(make_model, seed: int, tmp_path: Path) -> None:
    """Guards: documents of a packed row computed otherwise than transformers does from position_ids."""
    model = make_model()
    model.save_pretrained(tmp_path)
    theirs = load_theirs(tmp_path)
    ids = torch.randint(61, (1, 15))
    segments = torch.tensor([[0] * 6 + [1] * 9])
    positions = torch.tensor([[*range(6), *range(9)]])
    with torch.no_grad():
        ours = model(ids, segment_ids=segments).logits
        apart = torch.cat((theirs(ids[:, :6]).logits, theirs(ids[:, 6:]).logits), dim=1)
        torch.testing.assert_close(ours, apart, rtol=0, atol=1e-4)
        torch.testing.assert_close(ours, theirs(ids, position_ids=positions, use_cache=False).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen3", "qwen3-windows", "llama-llama3"])
def test_greedy_generation_equals_theirs(name: str, make_model, seed: int, tmp_path: Path) -> None:
    """Guards: a decoder that leaves the reference: cache, positions or padding. Near-ties may go either way."""
    pytest.importorskip("inference.engine")
    ours = make_model(**OURS[name])
    ours.save_pretrained(tmp_path)
    theirs = load_theirs(tmp_path)
    ids, mask = pad_left([torch.randint(1, 61, (n,)).tolist() for n in (9, 4, 12)], pad_id=0)
    actual = ours.generate(ids, attention_mask=mask, max_new_tokens=16, temperature=0)
    expected = theirs.generate(ids, attention_mask=mask, max_new_tokens=16, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert actual.shape == expected.shape == (3, 28)
    for row in range(3):
        different = (actual[row] != expected[row]).nonzero()
        if len(different):
            first = int(different[0])
            with torch.no_grad():
                top = ours(
                    actual[row : row + 1, :first],
                    attention_mask=torch.cat((mask[row], torch.ones(first - 12, dtype=torch.long)))[None],
                )
            best, second = top.logits[0, -1].topk(2).values.tolist()
            assert best - second < 1e-4, f"row {row} leaves the reference at token {first} with a margin of {best - second:.3g}"


CONVERSATIONS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "你好！"}, {"role": "assistant", "content": "你好，很高兴认识你 😊"}]},
    {
        "messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "12 + 35 = ?"}],
        "add_generation_prompt": True,
    },
    {"messages": [{"role": "user", "content": "1+1?"}], "add_generation_prompt": True, "enable_thinking": False},
    {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "reasoning_content": "想一想"},
            {"role": "user", "content": "  c\n\n d "},
            {"role": "assistant", "content": " e", "reasoning_content": "f\n\ng"},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "time?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "clock", "arguments": {"zone": "北京"}}}],
            },
            {"role": "tool", "content": "12:30"},
            {"role": "assistant", "content": "12:30."},
        ],
        "tools": [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}],
    },
]


def test_the_tokenizer_files_load_in_transformers(tiny_tokenizer, tmp_path: Path) -> None:
    """Guards: other ids, another end token or another template once the files are read by somebody else."""
    tiny_tokenizer.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == tiny_tokenizer.vocab_size
    assert theirs.eos_token_id == tiny_tokenizer.eos_token_id and theirs.pad_token_id == tiny_tokenizer.document_end_id
    for text in (
        "今天天气很好 12345",
        "<|im_start|>user\nhi<|im_end|>\n<think>\n\n</think>",
        "a  b\t\n\n c",
        "🤖é\u0301 don't",
        "<|spare_0|>",
        "",
    ):
        ids = tiny_tokenizer.encode(text, parse_special=True)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == tiny_tokenizer.decode(ids, skip_special_tokens=False) == text
        assert theirs.decode(ids, skip_special_tokens=True) == tiny_tokenizer.decode(ids)
    assert theirs.chat_template == tiny_tokenizer.chat_template


@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_their_chat_template_gives_our_ids(conversation: dict[str, Any], tiny_tokenizer, tmp_path: Path) -> None:
    """Guards: a conversation that is trained on with other tokens than it is served with."""
    tiny_tokenizer.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = tiny_tokenizer.render(**conversation)
    settings = dict(conversation)
    messages = settings.pop("messages")
    assert theirs.apply_chat_template(messages, tokenize=False, **settings) == ours.text
    assert theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **settings) == ours.ids


def test_a_config_of_theirs_gives_our_fields(tmp_path: Path) -> None:
    """Guards: defaults that transformers leaves out of the file and we fill in otherwise."""
    from model.checkpoint import load_config

    their_config("llama", head_dim=8).save_pretrained(tmp_path)
    expected = HaoAIConfig(
        vocab_size=53,
        n_layer=4,
        n_head=4,
        n_kv_head=2,
        n_embd=32,
        head_dim=8,
        intermediate_size=40,
        max_position_embeddings=64,
        qk_norm=False,
        tie_word_embeddings=False,
        initializer_range=0.15,
    )
    assert load_config(tmp_path) == expected
