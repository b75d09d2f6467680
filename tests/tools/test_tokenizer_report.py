"""The tokenizer report: a healthy folder is all ok, each kind of damage is named, and --fix brings the old state back."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from model import BPETokenizer, SmartHaoAI
from model.checkpoint import save_pretrained
from tests.imported_helpers import llama3
from tools.tokenizer_folder import EMBEDDING, FAIL, OK, OUTPUT, WARN, Check, TokenizerFolder
from tools.tokenizer_repair import repair
from tools.tokenizer_report import main, report
from tools.tokenizer_texts import unreachable

Edit = Callable[[dict[str, Any]], object]
SHORT_TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"


@pytest.fixture
def folder(tmp_path: Path, tiny_tokenizer: BPETokenizer) -> Path:
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def model_folder(tmp_path: Path, tiny_tokenizer: BPETokenizer, tiny_model: SmartHaoAI) -> Path:
    save_pretrained(tiny_model, tmp_path / "model", tiny_tokenizer)
    return tmp_path / "model"


def edit(file: Path, change: Edit) -> None:
    data = json.loads(file.read_text(encoding="utf-8"))
    change(data)
    file.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def read(file: Path) -> dict[str, Any]:
    data = json.loads(file.read_text(encoding="utf-8"))
    assert isinstance(data, dict)
    return data


def look(path: Path, seed: int = 0) -> list[Check]:
    return report(TokenizerFolder.read(path), seed=seed)[0]


def troubles(path: Path) -> dict[str, str]:
    """Check -> its status, without what only follows from another: `BPETokenizer` trips over the same damage."""
    found = {check.name: check.status for check in look(path) if check.status != OK and check.remedy != "see the other lines"}
    assert found or all(check.status == OK for check in look(path))
    return found


def drop(token: str) -> Edit:
    return lambda data: data.update(added_tokens=[t for t in data["added_tokens"] if t["content"] != token])


def flag(token: str, **values: int) -> Edit:
    return lambda data: next(t for t in data["added_tokens"] if t["content"] == token).update(values)


def test_healthy_folders_are_all_ok(folder: Path, model_folder: Path) -> None:
    """Guards: warnings about a folder that has nothing wrong, for texts of any random seed."""
    seed = secrets.randbelow(2**31)
    for path in (folder, model_folder):
        assert [(check, seed) for check in look(path, seed) if check.status != OK] == []
        assert repair(path) == [] and not list(path.glob("*.bak*"))
    assert "model vocabulary" in {check.name for check in look(model_folder)}


BROKEN: dict[str, tuple[str, Edit, str]] = {
    "first control token gone": ("tokenizer.json", drop("<|endoftext|>"), "special tokens"),
    "middle tag gone": ("tokenizer.json", drop("<think>"), "moved ids"),
    "last tag gone": ("tokenizer.json", drop("</tool_response>"), "special tokens"),
    "spare gone": ("tokenizer.json", drop("<|spare_3|>"), "moved ids"),
    "all special tokens gone": ("tokenizer.json", lambda d: d.update(added_tokens=[]), "special tokens"),
    "control token not special": ("tokenizer.json", flag("<|im_end|>", special=False), "flags"),
    "tag special": ("tokenizer.json", flag("<think>", special=True), "flags"),
    "token swallows spaces": ("tokenizer.json", flag("<|im_start|>", rstrip=True), "flags"),
    "token listed twice": ("tokenizer.json", lambda d: d["added_tokens"].append(dict(d["added_tokens"][0], id=999)), "double tokens"),
    "normaliser": ("tokenizer.json", lambda d: d.update(normalizer={"type": "NFKC"}), "normaliser"),
    "no pre-tokenizer": ("tokenizer.json", lambda d: d.update(pre_tokenizer=None), "split pattern"),
    "no decoder": ("tokenizer.json", lambda d: d.update(decoder=None), "split pattern"),
    "eos unknown": ("tokenizer_config.json", lambda d: d.update(eos_token="<|eot|>"), "tokenizer_config.json"),
    "eos of documents": ("tokenizer_config.json", lambda d: d.update(eos_token="<|endoftext|>"), "tokenizer_config.json"),
    "pad missing": ("tokenizer_config.json", lambda d: d.pop("pad_token"), "tokenizer_config.json"),
    "class": ("tokenizer_config.json", lambda d: d.update(tokenizer_class="GPT2Tokenizer"), "tokenizer_config.json"),
    "templates differ": ("tokenizer_config.json", lambda d: d.update(chat_template=SHORT_TEMPLATE), "chat template"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_damage_is_named_and_repaired(folder: Path, tiny_tokenizer: BPETokenizer, name: str) -> None:
    """Guards: damage that goes unseen, or a repair that leaves other ids, flags or names than training wrote."""
    file_name, change, check = BROKEN[name]
    file = folder / file_name
    before = file.read_bytes()
    edit(file, change)
    damaged = file.read_bytes()
    assert damaged != before and check in troubles(folder)
    if file_name == "tokenizer.json" and name not in ("token listed twice", "spare gone", "last tag gone"):
        assert FAIL in troubles(folder).values()
    assert any(found.fixable for found in look(folder))
    assert repair(folder)
    assert troubles(folder) == {}
    assert file.with_name(f"{file_name}.bak").read_bytes() == damaged
    fixed = BPETokenizer.from_pretrained(folder)
    assert json.loads(fixed.backend.to_str()) == json.loads(tiny_tokenizer.backend.to_str())
    if file_name == "tokenizer_config.json":
        names = ("eos_token", "pad_token", "bos_token", "tokenizer_class", "chat_template")
        assert {n: read(file).get(n) for n in names} == {n: json.loads(before).get(n) for n in names}
    assert repair(folder) == []


def test_missing_and_unreadable_files_are_written_anew(folder: Path, tiny_tokenizer: BPETokenizer) -> None:
    """Guards: a folder whose small files are lost or cut off needs a new training run."""
    (folder / "tokenizer_config.json").write_text('{"eos_token": ', encoding="utf-8")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}", encoding="utf-8")
    assert troubles(folder) == {"tokenizer_config.json": FAIL, "chat template": FAIL}
    repair(folder)
    assert troubles(folder) == {}
    assert (folder / "chat_template.jinja").read_text(encoding="utf-8") == tiny_tokenizer.chat_template
    (folder / "tokenizer_config.json").unlink()
    (folder / "chat_template.jinja").unlink()
    assert troubles(folder) == {"tokenizer_config.json": FAIL, "chat template": FAIL}
    repair(folder)
    assert troubles(folder) == {}


def test_an_ordinary_token_does_not_become_the_end_of_a_turn(tmp_path: Path) -> None:
    """Guards: default ids of a config.json (eos 2, bos 1) written as names, where they are letters: every answer ends at the letter."""
    folder = llama3(tmp_path / "imported")
    (folder / "config.json").write_text('{"eos_token_id": 2, "bos_token_id": 1}', encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"eos_token": ', encoding="utf-8")
    repair(folder)
    settings = read(folder / "tokenizer_config.json")
    assert settings["eos_token"] == "<|eot_id|>" and settings["bos_token"] is None


def test_damage_beyond_repair_names_a_way_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a lost byte or a doubled id of learned tokens reported as fine, or --fix that pretends to have repaired it."""
    good = (folder / "tokenizer.json").read_text(encoding="utf-8")

    def double(data: dict[str, Any]) -> None:
        vocab = data["model"]["vocab"]
        vocab[list(vocab)[300]] = vocab[list(vocab)[301]]

    def rename_byte(data: dict[str, Any]) -> None:
        vocab = data["model"]["vocab"]
        lost = next(letter for letter in "\u0100\u0101\u0102" if not any(letter in pair for pair in data["model"]["merges"]))
        data["model"]["vocab"] = {("xyzxyz" if token == lost else token): i for token, i in vocab.items()}

    for change, name in ((double, "double ids"), (rename_byte, "bytes")):
        (folder / "tokenizer.json").write_text(good, encoding="utf-8")
        edit(folder / "tokenizer.json", change)
        assert main([str(folder), "--fix"]) == 1
        out = capsys.readouterr().out
        assert f"FAIL  {name}" in out and "train_tokenizer" in out
    (folder / "tokenizer.json").write_text(good, encoding="utf-8")
    edit(folder / "tokenizer.json", flag("<|spare_7|>", id=10**9))
    assert main([str(folder)]) == 1 and "FAIL  gaps" in capsys.readouterr().out
    (folder / "tokenizer.json").write_text(good[: len(good) // 2], encoding="utf-8")
    assert main([str(folder), "--fix"]) == 1
    assert "not valid JSON" in capsys.readouterr().out


def test_tokens_without_merges_are_found(folder: Path) -> None:
    """Guards: learned tokens that no text can produce, because their merges were lost or the split pattern cuts them."""
    data = read(folder / "tokenizer.json")
    assert unreachable(TokenizerFolder.read(folder)) == []
    merges, vocab = data["model"]["merges"], data["model"]["vocab"]
    wanted = vocab["".join(merges[-1])]
    data["model"]["merges"] = merges[:-1]
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    assert unreachable(TokenizerFolder.read(folder)) == [wanted]
    data["model"]["merges"] = [*merges, ["1", "2"]]  # single digits are cut apart before merging
    vocab["12"] = len(vocab)
    for token in data["added_tokens"]:
        token["id"] += 1
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    assert unreachable(TokenizerFolder.read(folder)) == [vocab["12"]]


def test_ids_and_sizes_of_the_model_files(model_folder: Path) -> None:
    """Guards: generation that never stops or training that indexes beyond the embedding, from a wrong id or size in a file."""
    right = {name: read(model_folder / name) for name in ("config.json", "generation_config.json")}
    size = right["config.json"]["vocab_size"]
    for file, change, check in (
        ("config.json", {"vocab_size": size + 7}, "embedding"),
        ("config.json", {"vocab_size": None}, "embedding"),
        ("config.json", {"eos_token_id": size + 1}, "model ids"),
        ("config.json", {"eos_token_id": 5}, "model ids"),
        ("config.json", {"pad_token_id": "x"}, "model ids"),
        ("config.json", {"bos_token_id": 3}, "model ids"),
        ("generation_config.json", {"eos_token_id": [1, size]}, "model ids"),
        ("generation_config.json", {"eos_token_id": None}, "model ids"),
        ("generation_config.json", {"eos_token_id": [right["config.json"]["eos_token_id"], 40]}, "model ids"),
    ):
        edit(model_folder / file, lambda data, change=change: data.update(change))  # type: ignore[misc]
        assert set(troubles(model_folder)) == {check}, change
        repair(model_folder)
        assert troubles(model_folder) == {} and read(model_folder / file) == right[file], change


def test_model_vocabulary_smaller_than_the_tokenizer(model_folder: Path, tmp_path: Path) -> None:
    """Guards: rows for new special tokens that disturb the old ones, and a foreign tokenizer 'repaired' by inventing rows."""
    weights = {name: tensor.clone() for name, tensor in load_file(model_folder / "model.safetensors").items()}  # the file is rewritten
    rows = weights[EMBEDDING].shape[0]
    cut = {name: tensor[: rows - 2].clone() if name in (EMBEDDING, OUTPUT) else tensor for name, tensor in weights.items()}
    save_file(cut, model_folder / "model.safetensors", metadata={"format": "pt"})
    edit(model_folder / "config.json", lambda data: data.update(vocab_size=rows - 2))
    assert troubles(model_folder) == {"model vocabulary": FAIL}
    repair(model_folder)
    assert troubles(model_folder) == {} and (model_folder / "model.safetensors.bak").is_file()
    grown = load_file(model_folder / "model.safetensors")[EMBEDDING]
    assert torch.equal(grown[: rows - 2], weights[EMBEDDING][: rows - 2])
    assert torch.allclose(grown[rows - 2 :], weights[EMBEDDING][: rows - 2].mean(0).expand(2, -1), atol=1e-6)
    assert SmartHaoAI.from_pretrained(model_folder).config.vocab_size == rows
    small = {name: tensor[:50].clone() if name in (EMBEDDING, OUTPUT) else tensor for name, tensor in weights.items()}
    save_file(small, model_folder / "model.safetensors", metadata={"format": "pt"})
    repair(model_folder)
    assert troubles(model_folder)["model vocabulary"] == FAIL
    assert load_file(model_folder / "model.safetensors")[EMBEDDING].shape[0] == 50


def test_new_rows_of_a_model_in_shards(tiny_model: SmartHaoAI, tiny_tokenizer: BPETokenizer, tmp_path: Path) -> None:
    """Guards: a repaired model that no longer loads, because the index has the checksums of the old rows."""
    save_pretrained(tiny_model, tmp_path, tiny_tokenizer, max_shard_bytes=60_000)
    rows = tiny_model.config.vocab_size
    edit(tmp_path / "tokenizer.json", lambda data: data["added_tokens"].append(dict(data["added_tokens"][-1], content="<|mine|>", id=rows)))
    assert troubles(tmp_path) == {"model vocabulary": FAIL}
    repair(tmp_path)
    assert troubles(tmp_path) == {}
    grown = SmartHaoAI.from_pretrained(tmp_path)
    assert grown.config.vocab_size == rows + 1 and torch.equal(grown.embed_tokens.weight[:rows], tiny_model.embed_tokens.weight)
    index = read(tmp_path / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == sum(4 * p.numel() for p in grown.parameters())


def test_an_index_that_leads_outside_is_damage(model_folder: Path, tmp_path: Path) -> None:
    """Guards: a report that reads, and a repair that rewrites, files of other folders because an index names them."""
    outside = (model_folder / "model.safetensors").rename(tmp_path / "other.safetensors")
    before = outside.read_bytes()
    index = {"weight_map": {EMBEDDING: "../other.safetensors"}}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    edit(model_folder / "config.json", lambda data: data.update(vocab_size=5))
    found = next(check for check in look(model_folder) if check.name == "weights")
    assert found.status == FAIL and "'../other.safetensors'" in found.detail
    repair(model_folder)
    assert outside.read_bytes() == before


def test_missing_token_of_a_full_model_takes_a_spare(model_folder: Path) -> None:
    """Guards: a token added beyond the model's rows although spare ids are there for it."""
    file = model_folder / "tokenizer.json"
    rows = read(model_folder / "config.json")["vocab_size"]

    def without(data: dict[str, Any]) -> None:  # as a tokenizer made without this tag: no id is left open
        data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] != "</tool_response>"]
        extra = dict(data["added_tokens"][-1], content="<|mine|>", id=data["added_tokens"][-1]["id"] + 1)
        data["added_tokens"].append(extra)

    edit(file, without)
    assert "special tokens" in troubles(model_folder)
    repair(model_folder)
    assert troubles(model_folder) == {}
    tokens = {t["content"]: t["id"] for t in read(file)["added_tokens"]}
    assert "<|spare_7|>" not in tokens and max(tokens.values()) == rows - 1 and "</tool_response>" in tokens


def imported(path: Path, normaliser: bool = False) -> Path:
    """A tokenizer in the style of SmolLM2: special tokens first and inside the vocabulary, digits alone, its own names."""
    backend = Tokenizer(BPE())
    digits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(digits)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    if normaliser:
        backend.normalizer = normalizers.NFC()  # type: ignore[assignment]
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]
    special = [AddedToken(name, special=True, normalized=False) for name in names]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["hello world, the quick brown fox"] * 4, trainer)
    path.mkdir()
    (path / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": {"content": "<|im_end|>"}, "bos_token": "<|im_start|>"}
    settings |= {"pad_token": "<|im_end|>", "unk_token": "<|endoftext|>", "chat_template": SHORT_TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    config = {"model_type": "llama", "vocab_size": 320, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 2}
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


def test_imported_tokenizers_keep_their_own_names(tmp_path: Path) -> None:
    """Guards: an imported tokenizer judged, or worse 'repaired', by the names that our own training uses."""
    path = imported(tmp_path / "smol")
    assert troubles(path) == {} and not TokenizerFolder.read(path).own
    assert repair(path) == []
    assert troubles(imported(tmp_path / "nfc", normaliser=True)) == {"normaliser": WARN, "round trip": WARN}
    edit(path / "tokenizer_config.json", lambda data: data.update(eos_token="</s>"))
    edit(path / "config.json", lambda data: data.update(pad_token_id=5000))
    assert troubles(path) == {"tokenizer_config.json": FAIL, "model ids": FAIL}
    repair(path)
    assert troubles(path) == {}
    assert read(path / "tokenizer_config.json")["eos_token"] == "<|im_end|>" and read(path / "config.json")["pad_token_id"] == 2


def test_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: scripts that read the exit status and the JSON; a message on standard output would break them."""
    assert main([str(folder)]) == 0
    out = capsys.readouterr().out
    assert "0 FAIL" in out and "characters/token" in out and all(f"    {name} " in out for name in ("zh", "en", "code"))
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "hello there"}\n{"text": "你好"}\n{"text": 1}\n', encoding="utf-8")
    edit(folder / "tokenizer.json", drop("<|im_end|>"))
    assert main([str(folder), "--json", "--data", str(data)]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (
        found["fails"] and "missing: <|im_end|>" in str(found["checks"]) and {row["language"] for row in found["languages"]} == {"zh", "en"}
    )
    assert main([str(folder), "--json", "--fix"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fails"] == 0 and any("<|im_end|> added" in line for line in found["fixed"])
    for wrong in (tmp_path / "nowhere", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(FileNotFoundError, match="no folder|holds no tokenizer"):
            main([str(wrong)])


def test_use_of_ids_on_data(folder: Path, tiny_tokenizer: BPETokenizer, tmp_path: Path) -> None:
    """Guards: characters and bytes per token counted wrongly, ids of another tokenizer in the data passed over."""
    import numpy as np

    text = "今天天气很好 and hello"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    checks, _, usage = report(TokenizerFolder.read(folder), [tmp_path / "a.jsonl"])
    ids = tiny_tokenizer.encode(text)
    (row,) = usage.table()
    assert row["tokens"] == len(ids) and row["characters_per_token"] == round(len(text) / len(ids), 3)
    assert row["bytes_per_token"] == round(len(text.encode()) / len(ids), 3)
    assert {i for i, n in enumerate(usage.counts.tolist()) if n} == set(ids)
    unused = next(check for check in checks if check.name == "unused ids")
    special = sum(value is not None for value in tiny_tokenizer.backend.get_added_tokens_decoder().values())
    assert unused.detail.startswith(f"{tiny_tokenizer.vocab_size - special - 13 - len(set(ids)):,} of")
    np.save(tmp_path / "ids.npy", np.array([1, 2, 5000], dtype=np.uint16))
    checks, _, _ = report(TokenizerFolder.read(folder), [tmp_path / "ids.npy"])
    assert any(check.name == "data ids" and check.status == FAIL for check in checks)
