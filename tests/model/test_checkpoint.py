"""Model directories: what is written is what is read, and what does not fit is named."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import BPETokenizer, SmartHaoAI
from model.checkpoint import load_config

KEY = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"qk_norm": False},
        {"tie_word_embeddings": False, "head_dim": 6},
        {"dropout": 0.1, "attention_dropout": 0.2, "use_cache": False},
        {"use_sliding_window": True, "window_size": 3, "window_pattern": "SL"},
        {"qk_norm": False, "use_sliding_window": True, "window_size": 3, "window_pattern": "LS"},
        {
            "rope_theta": 777.0,
            "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
            "rms_norm_eps": 1e-4,
        },
        {
            "qk_norm": False,
            "use_sliding_window": True,
            "window_size": 3,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        },
    ],
    ids=range(8),
)
def test_save_and_load(fields: dict[str, Any], make_model, seed: int, tmp_path: Path) -> None:
    """Guards: a field or a weight that is lost, or a buffer that stays empty, on the way through the files."""
    model = make_model(**fields)
    model.save_pretrained(tmp_path)
    back = SmartHaoAI.from_pretrained(str(tmp_path))
    assert back.config == model.config and not back.training
    ids = torch.randint(61, (2, 20))
    with torch.no_grad():
        assert torch.equal(back(ids).logits, model(ids).logits)
    assert all(p.requires_grad and not p.is_meta for p in back.parameters()) and not any(b.is_meta for b in back.buffers())
    back(ids, labels=ids).loss.backward()


def test_keys_on_disk_are_those_of_transformers(tiny_model: SmartHaoAI, tiny_tokenizer: BPETokenizer, tmp_path: Path) -> None:
    """Guards: fused matrices or our module names in the file; a tied head stored twice; files missing or left over."""
    tiny_model.save_pretrained(tmp_path, tiny_tokenizer)
    names = set(load_file(tmp_path / "model.safetensors"))
    layer = {
        f"model.layers.0.{part}.weight"
        for part in (
            "input_layernorm",
            "post_attention_layernorm",
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "self_attn.q_norm",
            "self_attn.k_norm",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    }
    assert {n for n in names if ".layers.0." in n} == layer
    assert {n for n in names if ".layers." not in n} == {"model.embed_tokens.weight", "model.norm.weight"}
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["eos_token_id"] == tiny_tokenizer.eos_token_id and config["pad_token_id"] == tiny_tokenizer.pad_token_id


def test_saving_again_keeps_other_files(tiny_model: SmartHaoAI, tmp_path: Path) -> None:
    """Guards: metrics and settings beside the model that disappear with the second save."""
    tiny_model.save_pretrained(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
    with torch.no_grad():
        tiny_model.norm.weight.mul_(2)
    tiny_model.save_pretrained(tmp_path)
    assert (tmp_path / "metrics.jsonl").is_file()
    assert torch.equal(SmartHaoAI.from_pretrained(tmp_path).norm.weight, tiny_model.norm.weight)


def test_loading_in_half_precision(tiny_model: SmartHaoAI, tmp_path: Path) -> None:
    """Guards: rotary frequencies rounded with the weights, which moves far positions."""
    tiny_model.save_pretrained(tmp_path)
    back = SmartHaoAI.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in back.parameters()} == {torch.bfloat16} and back.rotary.inverse_frequency.dtype == torch.float32
    ids = torch.randint(back.config.vocab_size, (1, 20))
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits.float(), tiny_model(ids).logits, rtol=0, atol=0.02)


def edit_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")

    return damage


def edit_config(**fields: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "config.json"
        data = {**json.loads(file.read_text(encoding="utf-8")), **fields}
        file.write_text(json.dumps({k: v for k, v in data.items() if v != "absent"}), encoding="utf-8")

    return damage


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def write(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no-config": (lambda folder: (folder / "config.json").unlink(), FileNotFoundError, r"config\.json"),
    "config-cut": (write("config.json", b'{"model_type": '), ValueError, r"config\.json is not valid JSON"),
    "config-empty": (write("config.json", b"  "), ValueError, r"config\.json is not valid JSON"),
    "config-not-utf8": (write("config.json", b"\xff\xfe\x00"), ValueError, r"config\.json is not valid JSON"),
    "config-list": (write("config.json", b"[1]"), ValueError, r"config\.json must hold a JSON object"),
    "unknown-type": (edit_config(model_type="gpt2"), ValueError, r"config\.json.*'gpt2'.*qwen3"),
    "no-type": (edit_config(model_type="absent"), ValueError, r"config\.json.*model_type"),
    "other-activation": (edit_config(hidden_act="gelu"), ValueError, r"config\.json.*hidden_act='gelu'"),
    "bias": (edit_config(attention_bias=True), ValueError, r"config\.json.*attention_bias"),
    "negative-layers": (edit_config(num_hidden_layers=-2), ValueError, r"config\.json.*n_layer.*-2"),
    "text-width": (edit_config(hidden_size="wide"), ValueError, r"config\.json.*wide|config\.json.*n_embd"),
    "text-rope-theta": (
        edit_config(rope_theta="much", rope_parameters="absent"),
        ValueError,
        r"config\.json.*rope_theta",
    ),
    "unknown-scaling": (
        edit_config(rope_parameters={"rope_type": "magic", "factor": 2.0}),
        ValueError,
        r"config\.json.*'magic'",
    ),
    "partial-rotary": (edit_config(partial_rotary_factor=0.5), ValueError, r"config\.json.*partial_rotary_factor"),
    "windows-without-layers": (
        edit_config(use_sliding_window=True, sliding_window=4, num_hidden_layers="absent"),
        ValueError,
        r"config\.json.*num_hidden_layers",
    ),
    "no-weights": (lambda folder: (folder / "model.safetensors").unlink(), FileNotFoundError, r"model\.safetensors"),
    "weights-cut": (truncate, ValueError, r"model\.safetensors is damaged or cut off"),
    "weights-empty": (write("model.safetensors", b""), ValueError, r"model\.safetensors is damaged"),
    "weights-not-safetensors": (
        write("model.safetensors", b"\x80\x02pickled" * 20),
        ValueError,
        r"model\.safetensors is damaged",
    ),
    "missing-part": (edit_weights(lambda w: w.pop(KEY)), ValueError, r"model\.safetensors .*missing .*k_proj"),
    "8-bit": (edit_weights(lambda w: w.update({KEY: torch.ones_like(w[KEY], dtype=torch.int8)})), ValueError, r"k_proj.* int8"),
    "8-bit-float": (edit_weights(lambda w: w.update({KEY: w[KEY].to(torch.float8_e4m3fn)})), ValueError, r"k_proj.*float8_e4m3fn"),
    "endless-width": (edit_config(hidden_size=10**30), ValueError, r"model\.safetensors holds .*config\.json asks for"),
    "endless-vocabulary": (edit_config(vocab_size=10**30), ValueError, r"model\.safetensors holds .*config\.json asks for"),
    "many-layers": (edit_config(num_hidden_layers=60000), ValueError, r"model\.safetensors holds .*config\.json asks for"),
    "config-nested": (write("config.json", b"[" * 200_000), ValueError, r"config\.json is not valid JSON"),
    "missing-key": (
        edit_weights(lambda w: w.pop("model.norm.weight")),
        ValueError,
        r"model\.safetensors .*missing model\.norm\.weight",
    ),
    "extra-key": (
        edit_weights(lambda w: w.update({"model.layers.7.mlp.router": torch.ones(2)})),
        ValueError,
        r"model\.safetensors .*router",
    ),
    "wrong-shape": (
        edit_weights(lambda w: w.update({"model.norm.weight": torch.ones(5)})),
        ValueError,
        r"model\.safetensors: .*norm.* \[5\]",
    ),
    "wrong-part-shape": (
        edit_weights(lambda w: w.update({KEY: torch.ones(3, 4)})),
        ValueError,
        r"model\.safetensors: .*k_proj.* \[3, 4\]",
    ),
    "other-depth": (
        edit_config(num_hidden_layers=3, layer_types="absent"),
        ValueError,
        r"model\.safetensors .*missing.*layers\.2",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_directory_is_refused_by_name(name: str, tiny_model: SmartHaoAI, tmp_path: Path) -> None:
    """Guards: a stack trace, or a model that loads with random weights where the file had none."""
    damage, error, message = DAMAGES[name]
    tiny_model.save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=message) as caught:
        SmartHaoAI.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_names_that_do_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a mistyped folder looked up on the network; a missing folder without a word where it was looked for."""
    with pytest.raises(FileNotFoundError, match="nothing"):
        SmartHaoAI.from_pretrained(tmp_path / "nothing")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weight").mkdir()
    with pytest.raises(FileNotFoundError, match="weight"):
        SmartHaoAI.from_pretrained("weight/sfft")
    with pytest.raises(FileNotFoundError, match="somebody/some-model"):
        SmartHaoAI.from_pretrained("somebody/some-model")
    with pytest.raises(FileNotFoundError, match="config"):
        load_config(tmp_path)


def test_unusual_but_valid_files(tiny_model: SmartHaoAI, tmp_path: Path) -> None:
    """Guards: a tied head or rotary buffers that other programs store, refused or preferred over the embedding."""
    tiny_model.save_pretrained(tmp_path)

    def add(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    edit_weights(add)(tmp_path)
    ids = torch.randint(tiny_model.config.vocab_size, (1, 9))
    with torch.no_grad():
        assert torch.equal(SmartHaoAI.from_pretrained(tmp_path)(ids).logits, tiny_model(ids).logits)


def test_an_interrupted_save_keeps_the_old_weights(tiny_model: SmartHaoAI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a full disk that leaves half a model in place of the whole one."""
    tiny_model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def full_disk(tensors: Any, file: Path, metadata: Any = None) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("model.weight_files.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        tiny_model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    SmartHaoAI.from_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps rights in another way")
def test_weights_can_be_read_by_whom_the_folder_is_for(tiny_model: SmartHaoAI, tmp_path: Path) -> None:
    """Guards: weights that only their owner can read beside a config.json that all can: a server under another name fails."""
    tiny_model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "config.json").stat().st_mode
