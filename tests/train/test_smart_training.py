"""Training with the optional parts: resumed bit for bit, every part learned, and training-only losses that end before the run does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training_helpers import FAST, TINY_SHAPE, text_rows, write_jsonl

import train.stage as stage
from model import SmartHaoAI
from model.checkpoint import load_weights
from train.checkpoints import newest_checkpoint
from train.config import PretrainConfig, parse_command_line
from train.losses import Term
from train.metrics import read_jsonl
from train.optim import build_optimizers
from train.train_pretrain import pretrain

PARTS = {
    "attention": ["model.attention_gate=head", "model.attention_temperature=query", "model.value_residual=true"],
    "tables": ["model.attention_gate=element", "model.attention_temperature=length", "model.value_embedding=true"],
    "scales and layers": ["model.residual_scale=true", "model.deep_supervision=layers", "model.logit_softcap=5"],
    "relu2 and tokens": ["model.feed_forward=relu2", "model.deep_supervision=tokens", "model.residual_scale=true"],
    "experts": ["model.n_expert=4", "model.n_expert_per_token=2", "model.deep_supervision=tokens", "model.attention_gate=head"],
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pictures and no samples."""
    monkeypatch.setattr("train.record.plot_loss", lambda *args: False)
    monkeypatch.setattr("train.train_pretrain.sample_continuations", lambda *args: [])


def settings_for(folder: Path, tokenizer_dir: Path, out: str, *words: str) -> PretrainConfig:
    if not (folder / "text.jsonl").is_file():
        write_jsonl(folder / "text.jsonl", text_rows(40))
    files = [f"data.pretrain_file={folder / 'text.jsonl'}", f"data.store_dir={folder / 'store'}", f"tokenizer_dir={tokenizer_dir}"]
    return parse_command_line(PretrainConfig, [*TINY_SHAPE, *FAST, *files, f"out_dir={folder / out}", "train.log_every=1", *words])


def silent(line: str) -> None:
    """A log that nobody reads."""


@pytest.mark.parametrize("name", PARTS)
def test_a_resumed_run_ends_with_the_same_bits(name: str, tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: scales folded and heads dropped in a checkpoint; optimiser state of a part given to another; a fade that restarts."""
    words = [*PARTS[name], "train.max_steps=14", "train.checkpoint_every=5", "train.keep_checkpoints=9", "model.dropout=0.1"]
    assert pretrain(settings_for(tmp_path, tokenizer_dir, "straight", *words), silent) == 0
    original = stage.lm_loss
    calls: list[int] = []

    def interrupted(model: Any, batch: Any) -> list[Term]:
        calls.append(1)
        if len(calls) == 14:
            raise KeyboardInterrupt
        return original(model, batch)

    monkeypatch.setattr(stage, "lm_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrain(settings_for(tmp_path, tokenizer_dir, "resumed", *words), silent)
    monkeypatch.setattr(stage, "lm_loss", original)
    assert newest_checkpoint(tmp_path / "resumed") == tmp_path / "resumed" / "checkpoints" / "step_000010"
    assert pretrain(settings_for(tmp_path, tokenizer_dir, "resumed", *words, "--resume"), silent) == 0
    for file in ("model.safetensors", "checkpoints/step_000014/model.safetensors", "checkpoints/step_000014/optimizer.safetensors"):
        straight, resumed = (load_weights(tmp_path / out / file) for out in ("straight", "resumed"))
        assert straight.keys() == resumed.keys() and all(torch.equal(straight[key], resumed[key]) for key in straight), file
    rows = [read_jsonl(tmp_path / out / "metrics.jsonl") for out in ("straight", "resumed")]
    names = {key for key in rows[0][0] if "loss" in key}
    assert [[row[key] for key in names] for row in rows[0]] == [[row[key] for key in names] for row in rows[1]]


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_moves(name: str, optimizer: str, tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a part that no optimiser holds, that gets no gradient, or that weight decay alone moves."""
    states: list[dict[str, torch.Tensor]] = []
    original = stage.fit

    def watched(settings: Any, model: SmartHaoAI, *args: Any, **named: Any) -> Any:
        states.append({key: tensor.clone() for key, tensor in model.named_parameters()})
        result = original(settings, model, *args, **named)
        states.append({key: tensor.clone() for key, tensor in model.named_parameters()})
        return result

    monkeypatch.setattr(stage, "fit", watched)
    words = [*PARTS[name], "train.max_steps=6", f"train.optimizer={optimizer}", "train.weight_decay=0"]
    assert pretrain(settings_for(tmp_path, tokenizer_dir, "out", *words), silent) == 0
    still = [key for key in states[0] if torch.equal(states[0][key], states[1][key])]
    assert not still and states[0].keys() == states[1].keys()


def test_what_is_not_a_map_is_not_made_orthogonal(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Guards: tables of tokens, temperatures and routers turned into semi-orthogonal matrices by muon."""
    words = [*PARTS["attention"], "model.value_embedding=true", "model.n_expert=4", "model.residual_scale=true"]
    settings = settings_for(tmp_path, tokenizer_dir, "out", *words, "train.optimizer=muon")
    from model import BPETokenizer

    model = stage.make_model(settings, stage.model_config(settings, BPETokenizer.from_pretrained(tokenizer_dir)))
    adamw, muon = build_optimizers(model, settings.train, "cpu")
    names = {parameter: name for name, parameter in model.named_parameters()}
    by_muon = {names[p].split("layers.")[-1].split(".", 1)[1] for group in muon.param_groups for p in group["params"]}
    assert by_muon == {
        "self_attn.qkv_proj.weight",
        "self_attn.o_proj.weight",
        "self_attn.gate_proj.weight",
        "mlp.gate_up_proj",
        "mlp.down_proj",
    }
    undecayed = {names[p].split(".")[-1] for p in adamw.param_groups[1]["params"]}
    assert undecayed == {"weight", "value_mix", "attention_scale", "mlp_scale"}


@pytest.mark.parametrize(("kind", "loss"), [("layers", "layer_1_loss"), ("tokens", "second_token_loss")])
def test_training_only_losses_fade(kind: str, loss: str, tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a model that ends its run still pulled by predictions nobody uses; a fade over the whole run."""
    weights: list[float] = []
    original = stage.lm_loss

    def watched(model: Any, batch: Any) -> list[Term]:
        terms = original(model, batch)
        if model.training and torch.is_grad_enabled():
            weights.append(model.deep_weight)
            named = {term.name: term.total for term in terms}
            assert named.keys() == {"loss", loss} and named[loss].item() > 0
        return terms

    monkeypatch.setattr(stage, "lm_loss", watched)
    words = [f"model.deep_supervision={kind}", "model.deep_supervision_coef=0.5", "train.max_steps=40"]
    assert pretrain(settings_for(tmp_path, tokenizer_dir, "out", *words), silent) == 0
    expected = [min(1.0, (1 - step / 40) / 0.1) for step in range(40)]
    assert weights == pytest.approx(expected) and weights[35] == 1.0 and weights[-1] == pytest.approx(0.25)
    rows = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    ratios = [row[loss] / row["loss"] for row in rows]
    assert 0.3 < ratios[5] < 0.7 and ratios[-1] == pytest.approx(ratios[30] * 0.25, rel=0.3)
    assert not [key for key in load_weights(tmp_path / "out" / "model.safetensors") if "auxiliary" in key]


@pytest.mark.parametrize("split", [(4, 1), (1, 4)])
def test_a_token_counts_the_same_however_a_step_is_split(split: tuple[int, int], tmp_path: Path, tokenizer_dir: Path) -> None:
    """Guards: training-only losses that are averaged per micro-batch."""
    size, accumulation = split
    words = ["model.deep_supervision=tokens", "train.max_steps=3", "train.optimizer=adamw", "train.lr=1e-3"]
    words += [f"train.batch_size={size}", f"train.accumulation_steps={accumulation}"]
    assert pretrain(settings_for(tmp_path, tokenizer_dir, "out", *words), silent) == 0
    reference = settings_for(tmp_path, tokenizer_dir, "two", *words[:4], "train.batch_size=2", "train.accumulation_steps=2")
    assert pretrain(reference, silent) == 0
    for first, second in zip(*(read_jsonl(tmp_path / out / "metrics.jsonl") for out in ("out", "two")), strict=True):
        assert first["second_token_loss"] == pytest.approx(second["second_token_loss"], rel=1e-4)
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-4) and first["grad_norm"] == pytest.approx(
            second["grad_norm"], rel=1e-3
        )
