"""A GGUF file as a checkpoint: the same function, the same ids, and no half-written directory when a file is bad."""

from __future__ import annotations

import importlib.util
import json
import math
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf")
from gguf_files import model_fields, model_tensors, random_model, tokenizer_fields, write_gguf  # noqa: E402

from model import BPETokenizer, SmartHaoAI  # noqa: E402
from model.attention import rotary_frequencies  # noqa: E402
from model.checkpoint import load_config, load_pretrained, model_type, weights_to_disk  # noqa: E402
from model.config import HaoAIConfig  # noqa: E402
from tools.convert.gguf_import import import_gguf  # noqa: E402

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"qk_norm": False}),
    "llama_untied": ("llama", {"qk_norm": False, "tie_word_embeddings": False, "rope_theta": 500000.0, "rms_norm_eps": 1e-5}),
    "qwen2": ("qwen2", {"qk_norm": False, "attention_bias": True, "head_dim": 16}),  # llama.cpp runs no other head width
    "qwen3": ("qwen3", {}),
    "mixtral": ("llama", {"qk_norm": False, "n_expert": 4, "moe_intermediate_size": 96, "tie_word_embeddings": False}),
    "qwen3_moe": ("qwen3moe", {"n_expert": 4, "moe_intermediate_size": 32}),
}
Writer = Callable[..., tuple[SmartHaoAI, Path]]


@pytest.fixture
def write(tmp_path: Path, tiny_tokenizer: BPETokenizer) -> Writer:
    """Write a random model (a new seed each time, printed when a test fails) as tmp_path/model.gguf."""
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")

    def make(
        arch: str = "qwen3",
        shape: dict[str, Any] | None = None,
        kind: str = "F32",
        fields: dict[str, Any] | None = None,
        tensors: dict[str, np.ndarray | None] | None = None,
    ) -> tuple[SmartHaoAI, Path]:
        torch.manual_seed(seed)
        model = random_model({"vocab_size": tiny_tokenizer.vocab_size, **(shape or {})})
        metadata = {**model_fields(model.config, arch), **tokenizer_fields(tiny_tokenizer, model.config.vocab_size), **(fields or {})}
        data = {name: value for name, value in {**model_tensors(model, arch), **(tensors or {})}.items() if value is not None}
        return model, write_gguf(tmp_path / "model.gguf", arch, metadata, data, kind)

    return make


def quiet(message: str) -> None:
    """A log that nobody reads."""


def logits(model: SmartHaoAI, length: int = 40) -> torch.Tensor:
    ids = torch.randint(model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model(ids).logits


@pytest.mark.parametrize("name", SHAPES)
def test_an_fp32_file_is_the_same_model(name: str, write: Writer, tmp_path: Path) -> None:
    """Guards: q and k left in the other order of rotation pairs, gate and up exchanged, experts or biases mixed up, a shape misread."""
    arch, shape = SHAPES[name]
    model, file = write(arch, shape)
    folder = import_gguf(file, tmp_path / "out", log=quiet)
    again = load_pretrained(folder)
    assert model_type(again.config) == name.removesuffix("_untied")
    assert (again.config.max_position_embeddings, again.config.rms_norm_eps) == (128, model.config.rms_norm_eps)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral"])
def test_quantised_weights_are_those_of_the_format(kind: str, name: str, write: Writer, tmp_path: Path) -> None:
    """Guards: blocks read at the wrong place, an expert sliced out of its stack by bytes that are not its own."""
    arch, shape = SHAPES[name]
    model, file = write(arch, shape, kind=kind)
    quantised = gguf.GGMLQuantizationType[kind]
    found = {
        n: t.clone()
        for n, t in weights_to_disk(load_pretrained(import_gguf(file, tmp_path / "out", log=quiet)).state_dict(), model.config).items()
    }
    for key, weight in weights_to_disk(model.state_dict(), model.config).items():
        data = weight.detach().contiguous().numpy()
        if data.ndim > 1:
            data = gguf.quants.dequantize(gguf.quants.quantize(data, quantised), quantised)
        assert np.array_equal(found[key].numpy(), data), key


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_the_precision_asked_for_is_written(dtype: str, expected: torch.dtype, write: Writer, tmp_path: Path) -> None:
    """Guards: a --dtype that is only written into config.json, or rounded twice."""
    from safetensors.torch import load_file

    model, file = write()
    folder = import_gguf(file, tmp_path / "out", dtype, log=quiet)
    stored = load_file(folder / "model.safetensors")
    original = weights_to_disk(model.state_dict(), model.config)
    assert all(torch.equal(stored[name], original[name].to(expected)) for name in original) and len(stored) == len(original)
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"] == str(expected).removeprefix("torch.")


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_reads_the_directory(name: str, write: Writer, tmp_path: Path) -> None:
    """Guards: an import that only this code base can load."""
    transformers = pytest.importorskip("transformers")
    arch, shape = SHAPES[name]
    model, file = write(arch, shape)
    folder = import_gguf(file, tmp_path / "out", log=quiet)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(theirs(ids).logits, logits(model), rtol=0, atol=1e-4)


ROPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({"rope_type": "linear", "factor": 2.5}, {"type": "linear", "factor": 2.5}),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {"type": "yarn", "factor": 4.0, "original_context_length": 32},
    ),
    "yarn_scaled": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 0.8 * (0.1 * math.log(4.0) + 1)},
        {"type": "yarn", "factor": 4.0, "original_context_length": 32, "attn_factor": 0.8},
    ),
    "llama3": (
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
        {},
    ),
    "llama3_other": (
        {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 6.0, "original_max_position_embeddings": 40},
        {},
    ),
}


def rope_case(name: str, write: Writer) -> tuple[SmartHaoAI, Path]:
    scaling, keys = ROPES[name]
    shape = {"qk_norm": False, "rope_scaling": scaling, "head_dim": 64}
    tensors: dict[str, np.ndarray | None] = {}
    if scaling["rope_type"] == "llama3":
        config = HaoAIConfig(n_head=4, n_embd=64, head_dim=64, rope_scaling=scaling)
        plain = 10000.0 ** -(np.arange(0, 64, 2, dtype=np.float64) / 64)
        tensors["rope_freqs.weight"] = (plain / rotary_frequencies(config)[0].double().numpy()).astype(np.float32)
    return write("llama", shape, fields={f"llama.rope.scaling.{key}": value for key, value in keys.items()}, tensors=tensors)


@pytest.mark.parametrize("name", ROPES)
def test_context_extension_comes_over(name: str, write: Writer, tmp_path: Path) -> None:
    """Guards: long-context models that lose their frequencies, seen only far into a text."""
    model, file = rope_case(name, write)
    again = load_pretrained(import_gguf(file, tmp_path / "out", log=quiet))
    ours, theirs = rotary_frequencies(model.config), rotary_frequencies(again.config)
    torch.testing.assert_close(theirs[0], ours[0], rtol=1e-6, atol=0)
    assert theirs[1] == pytest.approx(ours[1]) and again.config.rope_scaling is not None
    torch.testing.assert_close(logits(again, 120), logits(model, 120), rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", ["llama", "llama_untied", "qwen2", "qwen3", "mixtral", "qwen3_moe", *ROPES])
def test_llama_cpp_computes_what_was_imported(name: str, write: Writer, tmp_path: Path) -> None:
    """Guards: a shared misunderstanding of the format in the importer and in this test's writer. llama.cpp runs the same file."""
    pytest.importorskip("xllamacpp")
    from tools.convert.compare import log_probs
    from tools.convert.llama_server import LlamaServer

    file = rope_case(name, write)[1] if name in ROPES else write(*SHAPES[name])[1]
    ours = load_pretrained(import_gguf(file, tmp_path / "out", log=quiet))
    ids = torch.randint(ours.config.vocab_size, (100,), generator=torch.Generator().manual_seed(2)).tolist()
    expected = log_probs(ours, ids)
    with LlamaServer(file, 128) as server:
        for length in (3, 100):
            for token, value in server.next_log_probs(ids[:length], 400).items():
                assert value == pytest.approx(expected[length - 1, token].item(), abs=3e-4)


def test_a_window_becomes_mistral(write: Writer, tmp_path: Path) -> None:
    """Guards: a sliding window that is dropped without a word."""
    _, file = write("llama", {"qk_norm": False}, fields={"llama.attention.sliding_window": 48})
    config = load_config(import_gguf(file, tmp_path / "out", log=quiet))
    assert model_type(config) == "mistral" and config.layer_window(0) == config.layer_window(1) == 48


# ------------------------------------------------------------------------------------------------ bad files

BAD_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown architecture": ({"general.architecture": "mamba"}, "mamba"),
    "no layers": ({"qwen3.block_count": None}, "qwen3.block_count"),
    "no width": ({"qwen3.embedding_length": None}, "qwen3.embedding_length"),
    "no epsilon": ({"qwen3.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon"),
    "no tokens": ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens"),
    "no merges": ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges"),
    "no tokenizer": ({"tokenizer.ggml.model": None}, "tokenizer.ggml.model"),
    "other tokenizer": ({"tokenizer.ggml.model": "t5"}, "t5"),
    "unknown cut": ({"tokenizer.ggml.pre": "martian"}, "martian"),
    "no end token": ({"tokenizer.ggml.eos_token_id": None}, "eos_token_id"),
    "end token outside": ({"tokenizer.ggml.eos_token_id": 10**6}, "eos_token_id=1000000"),
    "a million layers": ({"qwen3.block_count": 10**6}, "block_count=1000000"),
    "too few layers": ({"qwen3.block_count": 1}, "block_count=1"),
    "text for a number": ({"qwen3.context_length": "long"}, "qwen3.context_length"),
    "huge layers": ({"qwen3.feed_forward_length": 2**31}, "2147483648"),
    "other width": ({"qwen3.embedding_length": 96}, "embedding_length=96"),
    "partial rotation": ({"qwen3.rope.dimension_count": 16}, "rope.dimension_count=16"),
    "layers of different shapes": ({"qwen3.attention.head_count": [4, 2]}, "differs between layers"),
    "longrope": ({"qwen3.rope.scaling.type": "longrope", "qwen3.rope.scaling.factor": 4.0}, "longrope"),
    "window": ({"qwen3.attention.sliding_window": 16}, "sliding_window=16"),
    "soft cap": ({"qwen3.final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
    "shared experts": ({"qwen3.expert_shared_count": 1}, "expert_shared_count=1"),
    "experts without tensors": ({"qwen3.expert_count": 10**9, "qwen3.expert_used_count": 2}, "expert_count=1000000000"),
    "split": ({"split.count": 3, "split.no": 0}, "3 files"),
}


def assert_refused(file: Path, folder: Path, words: str) -> None:
    before = sorted(folder.iterdir())
    with pytest.raises(ValueError) as caught:
        import_gguf(file, folder / "out", log=quiet)
    assert file.name in str(caught.value) and words in str(caught.value)
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_metadata_that_does_not_fit_is_named(case: str, write: Writer, tmp_path: Path) -> None:
    """Guards: a KeyError, an endless loop or a wrong model instead of a message with the key."""
    changes, words = BAD_FIELDS[case]
    fields = {name: value for name, value in changes.items() if name != "general.architecture"}
    _, file = write(changes.get("general.architecture", "qwen3"), fields=fields)
    assert_refused(file, tmp_path, words)


BAD_TENSORS: dict[str, tuple[dict[str, np.ndarray | None], str]] = {
    "missing": ({"blk.1.ffn_up.weight": None}, "up_proj"),
    "missing embedding": ({"token_embd.weight": None}, "token_embd.weight"),
    "wrong shape": ({"blk.0.ffn_up.weight": np.zeros((32, 64), np.float32)}, "[32, 64]"),
    "unknown": ({"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}, "blk.0.attn_sinks.weight"),
    "whole numbers": ({"blk.0.ffn_up.weight": np.zeros((96, 64), np.int32)}, "I32"),
    "strange frequencies": ({"rope_freqs.weight": np.linspace(1, 3, 16).astype(np.float32)}, "rope_freqs.weight"),
    "short frequencies": ({"rope_freqs.weight": np.ones(3, np.float32)}, "rope_freqs.weight"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_do_not_fit_are_named(case: str, write: Writer, tmp_path: Path) -> None:
    """Guards: a model with random or reinterpreted weights."""
    changes, words = BAD_TENSORS[case]
    _, file = write(tensors=changes)
    assert_refused(file, tmp_path, words)


def test_a_file_cut_anywhere_is_refused(write: Writer, tmp_path: Path) -> None:
    """Guards: a download that broke off, read as zeros or ending in a raw error of NumPy."""
    _, file = write(kind="Q8_0")
    data = file.read_bytes()
    generator = np.random.default_rng(secrets.randbelow(2**31))
    for length in [0, 3, 4, 8, 20, 24, 40, len(data) - 1, len(data) // 2, *generator.integers(25, len(data) - 64, 60).tolist()]:
        file.write_bytes(data[:length])
        assert_refused(file, tmp_path, "")


def test_damaged_bytes_end_in_a_message(write: Writer, tmp_path: Path) -> None:
    """Guards: lengths and types in the header that are believed: endless loops, huge allocations, raw errors."""
    _, file = write()
    data = bytearray(file.read_bytes())
    generator = np.random.default_rng(secrets.randbelow(2**31))
    for round_number, position in enumerate(generator.integers(4, 6000, 60).tolist()):
        damaged = bytearray(data)
        damaged[position : position + 4] = generator.bytes(4)
        file.write_bytes(damaged)
        try:
            import_gguf(file, tmp_path / f"out{round_number}", log=quiet)  # some bytes are only text
        except ValueError as error:
            assert file.name in str(error)
            assert not (tmp_path / f"out{round_number}").exists()


def test_other_files_are_told_apart(write: Writer, tmp_path: Path) -> None:
    """Guards: a big-endian, ancient or foreign file read as nonsense."""
    other = tmp_path / "weights.gguf"
    for start, words in (
        (b"PK\x03\x04" + bytes(40), "is not a GGUF file"),
        (b"GGUF\x00\x00\x00\x03" + bytes(40), "big-endian"),
        (b"GGUF\x01\x00\x00\x00" + bytes(40), "version 1"),
    ):
        other.write_bytes(start)
        assert_refused(other, tmp_path, words)
    with pytest.raises(FileNotFoundError, match="nowhere.gguf"):
        import_gguf(tmp_path / "nowhere.gguf", tmp_path / "out", log=quiet)


def test_results_are_not_overwritten(write: Writer, tmp_path: Path) -> None:
    """Guards: an import into a folder that holds somebody's work; a dtype that nobody knows."""
    _, file = write()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="already exists"):
        import_gguf(file, tmp_path / "out", log=quiet)
    with pytest.raises(ValueError, match="q8_0"):
        import_gguf(file, tmp_path / "new", "q8_0", log=quiet)
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["notes.txt"] and not (tmp_path / "new").exists()
    import_gguf(file, tmp_path / "out", log=quiet, overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").is_file() and not (tmp_path / "out" / "notes.txt").exists()


def test_a_missing_package_is_named(write: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: an ImportError that does not say what to install."""
    import sys

    assert importlib.util.find_spec("gguf")
    _, file = write()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r'pip install -e "\.\[export\]"'):
        import_gguf(file, tmp_path / "out", log=quiet)
