"""GGUF export: the file, run by llama.cpp, is the same model with the same tokens."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from model import BPETokenizer, HaoAIConfig, SmartHaoAI
from model.token_names import TokenNames
from model.tokenizer import CONTROL_TOKENS, SPECIAL_TOKENS, TAG_TOKENS
from tests.conftest import SENTENCES
from tools.convert.compare import PROBE_TEXTS
from tools.convert.gguf_export import check_expressible, check_gguf, export_gguf
from tools.convert.gguf_names import INEXACT, PRE_TOKENIZERS, permute_rows, unpermute_rows
from tools.convert.llama_server import LlamaServer

gguf = pytest.importorskip("gguf")
EXPERTS = {"n_expert": 4, "n_expert_per_token": 2, "moe_intermediate_size": 48}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen3, wide heads, untied": {"head_dim": 16, "tie_word_embeddings": False},
    "llama": {"qk_norm": False},
    "llama, llama3 frequencies": {
        "qk_norm": False,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "qwen3, yarn": {"head_dim": 32, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 200}},
    "llama, yarn with its own attention factor": {
        "qk_norm": False,
        "head_dim": 32,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 200, "attention_factor": 1.3},
    },
    "qwen3, linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    "qwen2": {"qk_norm": False, "attention_bias": True},
    "mistral": {"qk_norm": False, "use_sliding_window": True, "window_pattern": "S", "window_size": 40},
    "qwen3, window shorter than prompt and continuation": {"use_sliding_window": True, "window_pattern": "S", "window_size": 16},
    "mixtral": {"qk_norm": False, **EXPERTS},
    "qwen3_moe": EXPERTS,
}


def save(config: HaoAIConfig, tokenizer: BPETokenizer, folder: Path) -> SmartHaoAI:
    """A model whose weights are all large enough to matter, fresh in every run, saved in `folder`."""
    model = SmartHaoAI(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(folder, tokenizer)
    return model


@pytest.mark.parametrize("changes", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_f32_file_computes_the_same(
    changes: dict[str, Any], tiny_config: HaoAIConfig, tiny_tokenizer: BPETokenizer, tmp_path: Path
) -> None:
    """Guards: a permutation, a scale, a bias or an expert lost on the way: fluent nonsense in another program."""
    pytest.importorskip("xllamacpp")
    config = replace(tiny_config, head_dim=changes.get("head_dim", 8), **{k: v for k, v in changes.items() if k != "head_dim"})
    save(config, tiny_tokenizer, tmp_path / "model")
    file = export_gguf(tmp_path / "model", tmp_path / "model.gguf", "f32", log=lambda text: None)
    result = check_gguf(tmp_path / "model", file)
    assert result is not None
    assert result.largest < 1e-4, result.line()
    assert result.same_ids and result.same_greedy, result.line()
    assert result.same_template


@pytest.mark.parametrize(("dtype", "bound"), [("f16", 0.05), ("bf16", 0.5), ("q8_0", 0.5), ("q4_0", 6.0)])
def test_smaller_types_stay_near(dtype: str, bound: float, tiny_config: HaoAIConfig, tiny_tokenizer: BPETokenizer, tmp_path: Path) -> None:
    """Guards: blocks written in the wrong order or a type that the header does not name."""
    pytest.importorskip("xllamacpp")
    save(tiny_config, tiny_tokenizer, tmp_path / "model")
    lines: list[str] = []
    file = export_gguf(tmp_path / "model", tmp_path / "model.gguf", dtype, log=lines.append)
    result = check_gguf(tmp_path / "model", file)
    assert result is not None and result.same_ids
    assert 0 < result.largest < bound, result.line()


def test_check_sees_another_model(tiny_config: HaoAIConfig, tiny_tokenizer: BPETokenizer, tmp_path: Path) -> None:
    """Guards: a comparison that passes whatever it compares."""
    pytest.importorskip("xllamacpp")
    save(tiny_config, tiny_tokenizer, tmp_path / "one")
    save(tiny_config, tiny_tokenizer, tmp_path / "two")
    result = check_gguf(tmp_path / "two", export_gguf(tmp_path / "one", tmp_path / "one.gguf", log=lambda text: None))
    assert result is not None and result.largest > 0.1 and result.same_greedy is False


def trained(patterns: tuple[str, ...], ignore_merges: bool) -> BPETokenizer:
    """A byte-level tokenizer that cuts text by `patterns`."""
    backend = Tokenizer(BPE(ignore_merges=ignore_merges))
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    texts = [*SENTENCES, *PROBE_TEXTS, "    four  spaces\n\n", "2024 1234567 12 123", "it's we'LL don't CamelCase"] * 3
    trainer = BpeTrainer(vocab_size=700, show_progress=False, special_tokens=[], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL_TOKENS if t in CONTROL_TOKENS])
    backend.add_tokens([AddedToken(t, normalized=False, special=False) for t in TAG_TOKENS])
    return BPETokenizer(backend)


def texts_to_cut(seed: int) -> list[str]:
    """The probes and random strings of what splits words: spaces, digits, marks, quotes, letters of several scripts."""
    letters = [*"aZ好é ００９42'\"!，。\n\r\t_#", "'s", "'LL", "  ", " \n", "\u3000", "😀", "한", "e\u0301", "123", " 7", "ß", "я"]
    generator = random.Random(seed)
    return [*PROBE_TEXTS, *("".join(generator.choices(letters, k=24)) for _ in range(20))]


@pytest.mark.parametrize("name", [name for name in PRE_TOKENIZERS if name not in (*INEXACT, "starcoder", "refact")])
def test_pre_tokenizers_cut_alike(name: str, tiny_config: HaoAIConfig, tmp_path: Path) -> None:
    """Guards: a pre-tokenizer's name that stands for another way to cut text, so that ids differ on digits or white space only."""
    pytest.importorskip("xllamacpp")
    tokenizer = trained(PRE_TOKENIZERS[name].patterns, PRE_TOKENIZERS[name].ignore_merges)
    save(replace(tiny_config, vocab_size=tokenizer.vocab_size + 3), tokenizer, tmp_path / "model")
    file = export_gguf(tmp_path / "model", tmp_path / "model.gguf", log=lambda text: None)
    assert gguf.GGUFReader(file).fields["tokenizer.ggml.pre"].contents() == name
    with LlamaServer(file, 64) as server:
        for text in texts_to_cut(random.randrange(1 << 30)):
            if "<" not in text:
                assert server.tokenize(text) == tokenizer.encode(text), repr(text)


def sentencepiece(broken: bool = False) -> BPETokenizer:
    """A tokenizer in the style of Llama 2: "▁" for spaces, byte tokens, merges in the order of the pieces."""
    words = "▁ ▁the ▁th th he re er in an on ▁a ▁w ▁is is en ▁▁ ▁▁▁▁ aa aaa aaaa ll el 今天 天气 你好 12 00 。\n".split(" ")
    letters = sorted(set("".join([*words, *SENTENCES])) - {" "})
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *dict.fromkeys([*words, *letters])]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    cuts = [(word[:cut], word[cut:]) for word in words for cut in range(1, len(word))]
    merges = [cut for cut in cuts if cut[0] in vocab and cut[1] in vocab]
    if broken:
        merges.remove(("a", "aa"))
    backend = Tokenizer(BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # type: ignore[assignment]
    backend.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")])
    backend.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", 1)])  # type: ignore[assignment]
    names = TokenNames(eos="</s>", document_end="</s>", pad="</s>", bos="<s>", unk="<unk>")
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<s>[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
    )
    return BPETokenizer(backend, template, names)


def test_sentencepiece_style(tiny_config: HaoAIConfig, tmp_path: Path) -> None:
    """Guards: a Llama 2 or Mistral tokenizer whose merges become scores of another order, or lose the space before a text."""
    pytest.importorskip("xllamacpp")
    tokenizer = sentencepiece()
    save(replace(tiny_config, vocab_size=tokenizer.vocab_size, qk_norm=False), tokenizer, tmp_path / "model")
    file = export_gguf(tmp_path / "model", tmp_path / "model.gguf", log=lambda text: None)
    fields = gguf.GGUFReader(file).fields
    assert fields["tokenizer.ggml.model"].contents() == "llama" and fields["tokenizer.ggml.add_bos_token"].contents() is True
    result = check_gguf(tmp_path / "model", file)
    assert result is not None and result.same_ids and result.same_template, result
    assert result.largest < 1e-4 and result.same_greedy
    with LlamaServer(file, 64) as server:
        for text in [*texts_to_cut(random.randrange(1 << 30)), "aaaaaaaaa the   theaaaa", "the there    then"]:
            assert server.tokenize(text) == tokenizer.encode(text), repr(text)


def test_merges_without_scores_are_refused(tiny_config: HaoAIConfig, tmp_path: Path) -> None:
    """Guards: a trained BPE with spaces as "▁" written as SentencePiece, which would merge pairs that it must not."""
    tokenizer = sentencepiece(broken=True)
    save(replace(tiny_config, vocab_size=tokenizer.vocab_size), tokenizer, tmp_path / "model")
    with pytest.raises(ValueError, match="may not merge 'a' and 'aa'"):
        export_gguf(tmp_path / "model", tmp_path / "model.gguf", log=lambda text: None)


def test_fields_of_the_file(tiny_config: HaoAIConfig, tiny_tokenizer: BPETokenizer, tmp_path: Path) -> None:
    """Guards: stops, kinds of tokens, padding rows and the context of a windowed model as other programs read them."""
    size = tiny_tokenizer.vocab_size
    config = replace(tiny_config, vocab_size=size + 5, use_sliding_window=True, window_pattern="SL", window_size=24)
    save(config, tiny_tokenizer, tmp_path / "model")
    lines: list[str] = []
    reader = gguf.GGUFReader(export_gguf(tmp_path / "model", tmp_path / "out" / "model.gguf", "q8_0", log=lines.append))
    value = {name: field.contents() for name, field in reader.fields.items()}
    assert value["general.architecture"] == "qwen3" and value["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert value["qwen3.context_length"] == 24 and any("sliding windows" in line for line in lines)
    kinds, tokens = value["tokenizer.ggml.token_type"], value["tokenizer.ggml.tokens"]
    assert kinds[size:] == [gguf.TokenType.UNUSED] * 5 and len(set(tokens)) == len(tokens) == size + 5
    assert kinds[tokens.index("<|im_end|>")] == gguf.TokenType.CONTROL and kinds[tokens.index("<think>")] == gguf.TokenType.USER_DEFINED
    assert value["tokenizer.ggml.eos_token_id"] == value["tokenizer.ggml.eot_token_id"] == tiny_tokenizer.eos_token_id
    assert value["tokenizer.ggml.padding_token_id"] == tiny_tokenizer.pad_token_id and value["tokenizer.ggml.add_bos_token"] is False
    assert value["tokenizer.chat_template"] == tiny_tokenizer.chat_template
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["token_embd.weight"] == "Q8_0" and types["blk.0.attn_norm.weight"] == "F32" and "output.weight" not in types


def test_odd_rows_stay_f16(tiny_config: HaoAIConfig, tiny_tokenizer: BPETokenizer, tmp_path: Path) -> None:
    """Guards: a crash, or rows cut across blocks, when a matrix is not a multiple of 32 wide."""
    pytest.importorskip("xllamacpp")
    save(replace(tiny_config, intermediate_size=72), tiny_tokenizer, tmp_path / "model")
    lines: list[str] = []
    file = export_gguf(tmp_path / "model", tmp_path / "model.gguf", "q4_0", log=lines.append)
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert types["blk.1.ffn_down.weight"] == "F16" and types["blk.1.ffn_up.weight"] == "Q4_0"
    assert any("2 tensors stay F16" in line for line in lines)
    result = check_gguf(tmp_path / "model", file)
    assert result is not None and 0 < result.largest < 6


REFUSED: dict[str, dict[str, Any]] = {
    "window_pattern": {"qk_norm": False, "use_sliding_window": True, "window_pattern": "SL"},
    "norm_topk_prob": {**EXPERTS, "norm_topk_prob": False},
    "head_dim": {"qk_norm": False, "attention_bias": True, "head_dim": 16},
    "moe_pattern": {**EXPERTS, "moe_pattern": "DE"},
    "n_shared_expert": {**EXPERTS, "n_shared_expert": 1},
    "llama3": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
    "beta_fast": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16}},
    "truncate": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": False}},
}


@pytest.mark.parametrize("setting", REFUSED)
def test_what_llama_cpp_cannot_compute_is_refused(setting: str, tiny_config: HaoAIConfig) -> None:
    """Guards: a file that loads and answers wrongly."""
    with pytest.raises(ValueError, match=setting):
        check_expressible(replace(tiny_config, **REFUSED[setting]))


def test_an_error_leaves_no_file(tiny_config: HaoAIConfig, tiny_tokenizer: BPETokenizer, tmp_path: Path) -> None:
    """Guards: half a file under the final name, or a temporary one, after a failed export."""
    model = save(tiny_config, tiny_tokenizer, tmp_path / "model")
    with torch.no_grad():
        model.embed_tokens.weight[3, 3] = 1e6
    model.save_pretrained(tmp_path / "model", tiny_tokenizer)
    with pytest.raises(ValueError, match="token_embd.weight holds 1e"):
        export_gguf(tmp_path / "model", tmp_path / "out" / "model.gguf", "f16", log=lambda text: None)
    with pytest.raises(ValueError, match="dtype='int3'"):
        export_gguf(tmp_path / "model", tmp_path / "out" / "model.gguf", "int3", log=lambda text: None)
    assert list((tmp_path / "out").iterdir()) == []


def test_unknown_split_patterns_are_refused(tiny_config: HaoAIConfig, tmp_path: Path) -> None:
    """Guards: a default pre-tokenizer put where none fits: other ids for the same text, and no error."""
    tokenizer = trained((r"\p{N}{1,2}",), False)
    save(replace(tiny_config, vocab_size=tokenizer.vocab_size), tokenizer, tmp_path / "model")
    with pytest.raises(ValueError, match=r"no pre-tokenizer that cuts text by .*1,2"):
        export_gguf(tmp_path / "model", tmp_path / "model.gguf", log=lambda text: None)


def test_a_broken_file_is_a_message(tmp_path: Path) -> None:
    """Guards: the native library's crash or stack trace reaching the user."""
    pytest.importorskip("xllamacpp")
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ValueError, match="llama.cpp cannot load"):
        with LlamaServer(file, 32):
            pass


def test_permutation_has_an_inverse() -> None:
    """Guards: the importer undoing another permutation than the exporter's."""
    weight = torch.randn(24, 5)
    assert permute_rows(weight, 3)[:4].equal(weight[[0, 4, 1, 5]])
    assert unpermute_rows(permute_rows(weight, 3), 3).equal(weight)
    assert unpermute_rows(permute_rows(weight[:, 0], 3), 3).equal(weight[:, 0])
