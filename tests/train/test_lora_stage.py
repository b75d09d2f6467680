"""The LoRA stage: what learns, what is written, and going on after a stop."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_helpers import FAST, call_main, chat_rows, write_jsonl

from inference import ChatSession
from model import SmartHaoAI
from model.adapter_files import ADAPTER_WEIGHTS
from model.tokenizer import BPETokenizer
from train import train_lora, train_sft
from train.checkpoints import list_checkpoints
from train.config import LoRAStageConfig, OptimizationConfig, RewardStageConfig, UsageError, parse_command_line
from train.optim import Muon, build_optimizers

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    tmp_path: Path,
    tiny_model: SmartHaoAI,
    tiny_tokenizer: BPETokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """run(words..., main=train_lora.main) in a folder with weight/sft and training_data/sft: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    tiny_model.save_pretrained(tmp_path / "weight" / "sft", tiny_tokenizer)
    write_jsonl(tmp_path / "training_data" / "sft" / "c.jsonl", chat_rows(40))
    steps = ["train.max_steps=4", "train.checkpoint_every=2", "train.log_every=1", "train.lr=1e-2", "lora.r=4", "lora.dropout=0.2"]
    return lambda *words, main=train_lora.main: call_main(main, [*FAST, *steps, *words], capsys, monkeypatch)


def weights(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / ADAPTER_WEIGHTS)


def test_the_base_stays_and_the_adapter_learns(run: Run) -> None:
    """Guards: a base that is written to, whole models in weight/lora and its checkpoints, an adapter that stays at nothing, a plan that
    does not say what learns, and a result that chat, tools and PEFT cannot find their way from."""
    base = Path("weight/sft/model.safetensors").read_bytes()
    status, out, err = run()
    assert status == 0, err
    assert "starting from weight/sft" in out and "adapter    LoRA of rank 4 on q_proj k_proj v_proj" in out
    assert "4,096 parameters learn" in out and "adamw" in out
    assert Path("weight/sft/model.safetensors").read_bytes() == base
    held = {file.name for file in Path("weight/lora").iterdir()}
    assert {
        "adapter_config.json",
        ADAPTER_WEIGHTS,
        "tokenizer.json",
        "run.yaml",
        "metrics.jsonl",
    } < held and "model.safetensors" not in held
    assert {file.name for file in list_checkpoints(Path("weight/lora"))[-1].iterdir()} > {ADAPTER_WEIGHTS, "optimizer.safetensors"}
    assert all(tensor.any() for tensor in weights("weight/lora").values())
    config = json.loads(Path("weight/lora/adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "weight/sft" and config["lora_dropout"] == 0.2
    rows = [json.loads(line)["loss"] for line in Path("weight/lora/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[-1] < rows[0]
    chat = ChatSession.from_pretrained("weight/lora", device="cpu", temperature=0, max_new_tokens=4)
    assert chat.adapter == "weight/lora" and chat.chat("3 + 4 = ?")
    status, out, err = run("model_dir=weight/lora", "out_dir=weight/second")  # from an adapter, the two merged
    assert status == 0 and SmartHaoAI.from_pretrained("weight/second").adapter is None, err


def test_resume_equals_the_uninterrupted_run(run: Run) -> None:
    """Guards: adapter, optimiser or dropout that go on from another place, and a base that changed in between."""
    assert run("out_dir=weight/straight")[0] == 0
    shutil.copytree("weight/straight", "weight/stopped")
    shutil.rmtree("weight/stopped/checkpoints/step_000004")
    Path("weight/stopped", ADAPTER_WEIGHTS).unlink()
    status, out, err = run("out_dir=weight/stopped", "--resume")
    assert status == 0 and "resuming from" in out and "at step 2" in out, err
    straight, resumed = weights("weight/straight"), weights("weight/stopped")
    assert straight.keys() == resumed.keys() and all(torch.equal(straight[name], resumed[name]) for name in straight)
    shutil.rmtree("weight/stopped/checkpoints/step_000004")
    for words, message in (
        (["lora.r=8"], "has shape [4, 32], this model asks for [8, 32]"),
        (["model_dir=weight/changed"], "model_dir=weight/changed is not the model that this run began with"),
    ):
        changed = SmartHaoAI.from_pretrained("weight/sft")
        torch.nn.init.normal_(changed.get_parameter("layers.1.mlp.down_proj.weight"))
        changed.save_pretrained("weight/changed", BPETokenizer.from_pretrained("weight/sft"))
        status, _, err = run("out_dir=weight/stopped", "--resume", *words)
        assert status == 1 and message in err and "Traceback" not in err
    status, _, err = run("out_dir=weight/stopped", "--resume", "model_dir=weight/sft", "lora.r=0", main=train_sft.main)
    assert status == 1 and "a run with an adapter: go on with the settings it was begun with (lora.r)" in err


def test_an_adapter_in_another_stage(run: Run) -> None:
    """Guards: lora.r that only one stage knows; Muon, which is the default there, on two factors that are one map only together."""
    status, out, err = run("out_dir=weight/other", "model_dir=weight/sft", "lora.targets=[q_proj, down_proj]", main=train_sft.main)
    assert status == 0 and "on q_proj down_proj: " in out and "adamw, peak rate" in out, err
    assert {name.split(".")[-3] for name in weights("weight/other")} == {"q_proj", "down_proj"}


def test_muon_leaves_adapters_alone(tiny_model: SmartHaoAI) -> None:
    """Guards: factors that are orthogonalised, or frozen weights that an optimiser holds."""
    from model.lora import LoRASettings, inject_lora

    adapter = inject_lora(tiny_model, LoRASettings(r=2))
    optimizers = build_optimizers(tiny_model, OptimizationConfig(optimizer="muon"), "cpu")
    held = [parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]]
    assert not any(isinstance(optimizer, Muon) for optimizer in optimizers)
    assert sum(parameter.numel() for parameter in held) == adapter.num_parameters()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lora.r=0"], "lora.r=0 must be at least 1"),
        (["lora.r=-2"], "lora.r=-2"),
        (["lora.dropout=1"], "lora.dropout=1.0"),
    ],
)
def test_settings_that_cannot_work(words: list[str], message: str) -> None:
    """Guards: a run that fails after the data was read, or trains a random model's adapter."""
    with pytest.raises(UsageError, match=message):
        parse_command_line(LoRAStageConfig, words)


def test_mistakes_are_told_before_anything_is_written(run: Run) -> None:
    """Guards: traces for a misspelt target or a part that is added to a frozen base; a reward model that ignores lora.r."""
    for words, status, message in (
        (["lora.targets=q_prj"], 1, "this model has no q_prj for an adapter, but down_proj"),
        (["model_dir=none", "tokenizer_dir=weight/sft"], 2, "lora.r=4 needs model_dir"),
        (["model.attention_gate=head"], 2, "model.attention_gate: an adapter's base stays as it is"),
    ):
        ended = run(*words)
        assert ended[0] == status and message in ended[2] and not Path("weight/lora").exists()
    with pytest.raises(UsageError, match="lora.r=4 must be 0"):
        parse_command_line(RewardStageConfig, ["lora.r=4"])


def test_dry_run(run: Run) -> None:
    """Guards: a plan whose memory is that of training every weight."""
    status, out, err = run("--dry-run")
    assert status == 0 and "time " in out and not Path("weight/lora").exists(), err
    plain = run("--dry-run", "model_dir=weight/sft", "lora.r=0", "out_dir=weight/x", main=train_sft.main)[1]

    def mebibytes(text: str) -> float:
        return float(text.split("memory     about ")[1].split(" MiB")[0])

    assert mebibytes(out) <= mebibytes(plain)
