"""Checkpoints that were cut off, altered or half deleted are seen; the newest intact one is used, and nothing is lost on the way."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_helpers import FAST, TINY_SHAPE, chat_rows, text_rows, write_jsonl

from model import BPETokenizer, SmartHaoAI
from model.lora import LoRASettings, inject_lora
from model.weight_files import load_weights, save_weights
from train import checkpoints
from train.checkpoints import CHECKSUMS_FILE, damage, intact_checkpoint, list_checkpoints, model_digest, save_checkpoint
from train.config import PretrainConfig, SFTConfig, TokenizerStageConfig, parse_command_line
from train.metrics import read_jsonl
from train.train_pretrain import pretrain
from train.train_sft import sft
from train.train_tokenizer import train_tokenizer


@pytest.fixture
def out(tmp_path: Path, tiny_model: SmartHaoAI, tiny_tokenizer: BPETokenizer) -> Path:
    """A run with checkpoints of steps 3 and 6."""
    optimizer = torch.optim.AdamW(tiny_model.parameters())
    tiny_model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    optimizer.step()
    for step in (3, 6):
        save_checkpoint(tmp_path / "run", step, tiny_model, tiny_tokenizer, [optimizer], {"progress": {}}, keep=5)
    return tmp_path / "run"


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 4
    file.write_bytes(content)


def empty(file: Path) -> None:
    file.write_bytes(b"")


DAMAGES: list[tuple[str, Callable[[Path], Any], str]] = [
    ("model.safetensors", cut, "is cut off: it has"),
    ("optimizer.safetensors", flip, "its bytes are not those that were saved"),
    ("state.json", Path.unlink, "is missing"),
    ("config.json", flip, "its bytes are not those that were saved"),
    ("tokenizer.json", empty, "it has 0 bytes instead of"),
    (CHECKSUMS_FILE, cut, "is damaged"),
    (CHECKSUMS_FILE, lambda file: file.write_text("{}"), "is damaged"),
    (CHECKSUMS_FILE, lambda file: file.write_text(file.read_text().replace("state.json", "stage.json")), "its own checksum is another"),
]


@pytest.mark.parametrize(("name", "spoil", "message"), DAMAGES)
def test_the_newest_intact_checkpoint_is_taken(name: str, spoil: Callable[[Path], Any], message: str, out: Path) -> None:
    """Guards a damaged file that is loaded or ends the run, a message that does not name it, and a checkpoint that is deleted for it."""
    old, new = list_checkpoints(out)
    assert intact_checkpoint(out) == (new, [])
    spoil(new / name)
    found, problems = intact_checkpoint(out)
    assert found == old and len(problems) == 1 and str(new / name) in problems[0] and message in problems[0]
    assert (out / "checkpoints" / "step_000006.damaged").is_dir() and list_checkpoints(out) == [old]
    assert intact_checkpoint(out) == (old, []), "said once"


def test_checkpoints_in_order_of_their_steps(tmp_path: Path) -> None:
    """Guards runs of a million steps, and what is not a checkpoint."""
    for name in ("step_999999", "step_1000000", "step_000007", "step_000009.damaged", "step_x", "step_000008.12.tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000007", "step_999999", "step_1000000"]


def test_none_is_intact(out: Path) -> None:
    """Guards a run that begins anew, over the remains of the old one, because they cannot be read; at the second attempt, too."""
    for path in list_checkpoints(out):
        cut(path / "state.json")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"(?s)no checkpoint .* is intact: .*step_000006.*cut off.*step_000003.*--overwrite"):
            intact_checkpoint(out)
    assert len(list_checkpoints(out)) == 2


@pytest.mark.parametrize(
    ("name", "spoil"),
    [("optimizer.safetensors", flip), ("model.safetensors", Path.unlink), ("state.json", cut), ("state.json", Path.unlink)],
)
def test_checkpoints_without_checksums(name: str, spoil: Callable[[Path], Any], out: Path) -> None:
    """Guards runs that were begun before there were checksums: they go on, and what can be seen of damage is seen."""
    old, new = list_checkpoints(out)
    for path in (old, new):
        (path / CHECKSUMS_FILE).unlink()
    assert intact_checkpoint(out) == (new, [])
    spoil(new / name)
    found, problems = intact_checkpoint(out)
    assert found == old and len(problems) == 1 and name in problems[0]


def test_what_was_just_written_is_never_deleted(out: Path, tiny_model: SmartHaoAI, tiny_tokenizer: BPETokenizer) -> None:
    """Guards keep_checkpoints=1 in a run that went back behind checkpoints which are still there: "the newest" is not the last written."""
    cut(list_checkpoints(out)[-1] / "state.json")
    written = save_checkpoint(out, 4, tiny_model, tiny_tokenizer, [], {}, keep=1)
    assert written in list_checkpoints(out) and damage(written) is None
    assert intact_checkpoint(out)[0] == written


def test_a_deletion_that_is_cut_off(
    out: Path, tiny_model: SmartHaoAI, tiny_tokenizer: BPETokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards half a checkpoint that still has its name."""
    removed: list[Path] = []

    def killed(path: Path, *_: Any, **__: Any) -> None:
        if Path(path).name.startswith("step_000003"):
            (Path(path) / "config.json").unlink()
            removed.append(path)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(out, 9, tiny_model, tiny_tokenizer, [], {}, keep=2)
    assert removed and [path.name for path in list_checkpoints(out)] == ["step_000006", "step_000009"]
    assert intact_checkpoint(out) == (list_checkpoints(out)[-1], [])
    assert {entry.name for entry in (out / "checkpoints").iterdir()} == {"step_000006", "step_000009"}


def words(folder: Path, tokenizer_dir: Path, *more: str) -> list[str]:
    write_jsonl(folder / "text.jsonl", text_rows(40))
    return [
        *TINY_SHAPE,
        *FAST,
        "train.max_steps=6",
        "train.checkpoint_every=2",
        "train.log_every=1",
        "model.dropout=0.1",
        f"data.pretrain_file={folder / 'text.jsonl'}",
        f"data.store_dir={folder / 'store'}",
        f"tokenizer_dir={tokenizer_dir}",
        *more,
    ]


def test_a_run_goes_on_from_the_checkpoint_before(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Guards the other end of it: the same weights and rows as without the damage, a line to the user, an event, a whole directory."""
    settings = [parse_command_line(PretrainConfig, words(tmp_path, tokenizer_dir, f"out_dir={tmp_path / name}")) for name in ("one", "two")]
    for one in settings:
        assert pretrain(one, lambda text: None) == 0
    (tmp_path / "two" / "model.safetensors").unlink()
    flip(list_checkpoints(tmp_path / "two")[-1] / "optimizer.safetensors")
    said: list[str] = []
    settings[1].resume = True
    assert pretrain(settings[1], said.append) == 0  # type: ignore[func-returns-value, arg-type]
    (line,) = [text for text in said if "optimizer.safetensors is damaged" in text]
    assert "step_000004" in line and "set aside" in line
    assert [row["step"] for row in read_jsonl(tmp_path / "two" / "events.jsonl") if row["event"] == "damaged_checkpoint"] == [4]
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [row["step"] for row in read_jsonl(tmp_path / "two" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_model_that_the_run_began_with_has_changed(
    tmp_path: Path, tokenizer_dir: Path, tiny_model: SmartHaoAI, tiny_tokenizer: BPETokenizer
) -> None:
    """Guards a base, a reference or a teacher that is written over between a kill and --resume: the rest of the run would be about
    another model, and nobody would know."""
    tiny_model.save_pretrained(tmp_path / "base", tiny_tokenizer)
    chats = write_jsonl(tmp_path / "chat.jsonl", chat_rows(40))
    more = [f"model_dir={tmp_path / 'base'}", "tokenizer_dir=none", f"data.sft_file={chats}", f"out_dir={tmp_path / 'run'}"]
    stage = [word for word in words(tmp_path, tokenizer_dir, *more) if not word.startswith("model.")]
    assert sft(parse_command_line(SFTConfig, stage), lambda text: None) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    torch.nn.init.normal_(tiny_model.get_parameter("layers.0.mlp.down_proj.weight"))
    shutil.copytree(tmp_path / "base", tmp_path / "elsewhere")
    tiny_model.save_pretrained(tmp_path / "base", tiny_tokenizer)
    with pytest.raises(ValueError, match=r"model_dir=.*base is not the model that this run began with.*--overwrite"):
        sft(parse_command_line(SFTConfig, [*stage, "--resume", "train.max_steps=8"]), lambda text: None)
    assert {path: path.read_bytes() for path in before} == before, "a refused run changes nothing"
    moved = [*stage, f"model_dir={tmp_path / 'elsewhere'}", "--resume", "train.max_steps=8"]
    assert sft(parse_command_line(SFTConfig, moved), lambda text: None) == 0, "the same model at another place is the same model"
    state = json.loads((list_checkpoints(tmp_path / "run")[-1] / "state.json").read_text(encoding="utf-8"))
    assert state["models"] == {"model_dir": model_digest(tmp_path / "elsewhere")}


def test_an_adapters_digest_is_of_both(tmp_path: Path, tiny_model: SmartHaoAI, tiny_tokenizer: BPETokenizer) -> None:
    """Guards the base of an adapter that is itself what a run starts from."""
    tiny_model.save_pretrained(tmp_path / "base", tiny_tokenizer)
    inject_lora(tiny_model, LoRASettings(r=2), str(tmp_path / "base"))
    tiny_model.save_pretrained(tmp_path / "adapter", tiny_tokenizer)
    digests = [model_digest(tmp_path / "adapter")]
    for file in ("adapter/adapter_model.safetensors", "base/model.safetensors"):
        weights = load_weights(tmp_path / file)
        next(iter(weights.values())).add_(1)
        save_weights(weights, tmp_path / file)
        digests.append(model_digest(tmp_path / "adapter"))
    flip(tmp_path / "base" / "config.json")
    digests.append(model_digest(tmp_path / "adapter"))
    assert len(set(digests)) == 4


@pytest.mark.parametrize("own", [True, False])
def test_the_same_weights_written_again_are_the_same_model(
    own: bool, tmp_path: Path, tiny_model: SmartHaoAI, tiny_tokenizer: BPETokenizer
) -> None:
    """Guards a stage that is resumed after its end and writes its model once more: the header comes out in another order, and the stage
    after it would be refused. Files without our checksums are known by their bytes."""
    digests, headers = set(), set()
    for _ in range(12):
        tiny_model.save_pretrained(tmp_path / "model", tiny_tokenizer)
        file = tmp_path / "model" / "model.safetensors"
        if not own:
            save_file({name: tensor.contiguous() for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
        digests.add(model_digest(tmp_path / "model"))
        headers.add(file.read_bytes())
    assert len(digests) == 1 and (len(headers) > 1 or not own)


@pytest.mark.parametrize(("number", "said"), [(errno.ENOSPC, "No space left"), (errno.EROFS, "Read-only")])
def test_a_checkpoint_that_does_not_fit(
    number: int, said: str, out: Path, tiny_model: SmartHaoAI, tiny_tokenizer: BPETokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the checkpoints that are there, and a message without the file's name."""

    def full(file: Path, *_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.SafetensorsWeights, "__init__", full)  # not on the way: it must not be called
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=rf"step_000009.*could not be written: {said}.*MiB free there") as raised:
            save_checkpoint(out, 9, tiny_model, tiny_tokenizer, [], {}, keep=1)
    assert raised.value.errno == number and ".tmp" not in str(raised.value)
    assert [damage(path) for path in list_checkpoints(out)] == [None, None]
    assert {entry.name for entry in (out / "checkpoints").iterdir()} == {"step_000003", "step_000006"}


def test_what_is_only_for_show_may_be_missing(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards a run that ends because its plot cannot be written, and one that says so at every evaluation."""
    pytest.importorskip("matplotlib")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("train.plotting.atomic_write_bytes", full)
    monkeypatch.setattr("train.runtime._missed", set())
    more = [f"out_dir={tmp_path / 'run'}", "train.eval_every=2", "data.val_share=0.2"]
    assert pretrain(parse_command_line(PretrainConfig, words(tmp_path, tokenizer_dir, *more)), lambda text: None) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "the run goes on without loss.png" in line]
    assert len(warnings) == 1 and "No space left" in warnings[0] and not (tmp_path / "run" / "loss.png").exists()
    assert (tmp_path / "run" / "report.md").is_file()


def test_a_tokenizer_that_was_cut_off_is_trained_again(tmp_path: Path) -> None:
    """Guards a training that was killed between its files: it was refused as a tokenizer of other people."""
    settings = TokenizerStageConfig(out_dir=str(tmp_path / "tokenizer"))
    settings.data.pretrain_file = str(write_jsonl(tmp_path / "text.jsonl", text_rows(40)))
    settings.tokenizer.vocab_size = 400
    train_tokenizer(settings, lambda text: None)
    whole = (tmp_path / "tokenizer" / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer" / "corpus.json").write_text('{"key": null}', encoding="utf-8")
    (tmp_path / "tokenizer" / "tokenizer_config.json").unlink()
    said: list[str] = []
    train_tokenizer(settings, said.append)
    assert not any("reused" in text for text in said)
    assert (tmp_path / "tokenizer" / "tokenizer.json").read_bytes() == whole
    assert (tmp_path / "tokenizer" / "tokenizer_config.json").is_file()


def test_other_metadata_is_no_damage(tmp_path: Path, out: Path) -> None:
    """Guards weights of other programs: safetensors without checksums load as before."""
    file = list_checkpoints(out)[-1] / "model.safetensors"
    save_file(load_file(file), tmp_path / "plain.safetensors")
    assert load_weights(tmp_path / "plain.safetensors").keys() == load_file(file).keys()
