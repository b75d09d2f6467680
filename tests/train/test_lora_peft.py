"""Adapters that the stages trained, on every kind of base: what PEFT computes with them, and what is left when they are merged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from imported_helpers import llama3
from torch import Tensor
from training_helpers import FAST, call_main, chat_rows, pair_rows, write_jsonl

from model import BPETokenizer, HaoAIConfig, SmartHaoAI
from model.adapter_files import ADAPTER_CONFIG, is_adapter, load_adapter
from model.lora import disabled
from tools.parity import difference, load_theirs
from train import train_dpo, train_grpo, train_lora, train_ppo
from train.metrics import read_jsonl

LIMIT = 1e-5  # of the largest logit
EXPERTS: dict[str, Any] = {"n_expert": 4, "n_expert_per_token": 2, "moe_intermediate_size": 24}
SMART: dict[str, Any] = {
    "attention_gate": "element",
    "residual_scale": True,
    "feed_forward": "relu2",
    "value_residual": True,
    "value_embedding": True,
    "attention_temperature": "query",
    "logit_softcap": 20.0,
}
OURS = {"plain": {}, "experts": EXPERTS, "smart": SMART, "reasoning": {"use_reasoning": True, "reasoning_steps": 2, "reasoning_heads": 2}}
NO_PEFT = ("smart", "reasoning")  # transformers has no such layers
# Random answers that are long enough to differ in what they are worth.
ROLLOUT = [
    "data.prompt_file=prompts.jsonl",
    "data.max_length=160",
    "rollout.prompts=4",
    "rollout.max_new_tokens=40",
    *("rewards.variety=1", "rewards.language=1", "rewards.format=1"),
]
STAGES: dict[str, tuple[Callable[[], int], list[str]]] = {
    "lora": (train_lora.main, ["data.sft_file=chats.jsonl"]),
    "dpo": (train_dpo.main, ["data.preference_file=pairs.jsonl"]),
    "ppo": (train_ppo.main, [*ROLLOUT, "train.batch_size=4"]),
    "grpo": (train_grpo.main, [*ROLLOUT, "rollout.samples=3", "train.batch_size=6", "grpo.beta=0.05", "grpo.epochs=2"]),
}
KINDS = {"plain": [], "rslora": ["lora.rslora=true"], "dora": ["lora.dora=true"]}
RUNS = [
    ("lora", "imported", "rslora"),
    ("lora", "experts", "dora"),
    ("lora", "smart", "dora"),
    ("lora", "reasoning", "rslora"),
    ("dpo", "imported", "dora"),
    ("dpo", "experts", "plain"),
    ("dpo", "smart", "rslora"),
    ("ppo", "plain", "rslora"),
    ("grpo", "plain", "dora"),
    ("grpo", "imported", "plain"),
    ("grpo", "experts", "rslora"),
    ("grpo", "reasoning", "plain"),
]


@pytest.fixture
def make_base(tmp_path: Path, tiny_config: HaoAIConfig, tiny_tokenizer: BPETokenizer, seed: int) -> Callable[[str], Path]:
    """A chat model of a kind in `base`; `imported` is written by transformers, with a tokenizer that is not ours."""

    def make(kind: str) -> Path:
        folder = tmp_path / "base"
        if kind == "imported":
            transformers = pytest.importorskip("transformers")
            llama3(folder)
            size = len(transformers.AutoTokenizer.from_pretrained(folder))
            shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
            config = transformers.LlamaConfig(vocab_size=size, max_position_embeddings=256, initializer_range=0.15, **shape)
            transformers.LlamaForCausalLM(config).save_pretrained(folder)
        else:
            config = HaoAIConfig(**{**vars(tiny_config), "initializer_range": 0.15, **OURS[kind]})
            model = SmartHaoAI(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    if not parameter.any():  # the optional parts begin without an effect
                        parameter.normal_(std=0.1)
            model.save_pretrained(folder, tiny_tokenizer)
        return folder

    return make


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids).logits
    return found


@pytest.mark.parametrize(("stage", "kind", "settings"), RUNS)
def test_a_trained_adapter_is_the_same_everywhere(
    stage: str,
    kind: str,
    settings: str,
    make_base: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Guards: an adapter of a stage that PEFT reads otherwise, or whose merged model is another; a base that a stage has changed; a
    first update of a policy with an adapter that does not start at the base."""
    if kind not in NO_PEFT:
        pytest.importorskip("peft")
    base = make_base(kind)
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "chats.jsonl", chat_rows(24))
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(24))
    questions = [{"instruction": f"How much is {number} and 4?", "output": f"The answer is {number + 4}."} for number in range(24)]
    write_jsonl(tmp_path / "prompts.jsonl", questions)
    main, words = STAGES[stage]
    steps = ["train.max_steps=3", "train.lr=0.03", "train.warmup_steps=0", "train.log_every=1", "lora.r=4", "lora.alpha=8"]
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    status, _, err = call_main(
        main, [*FAST, "data.max_length=96", *words, *steps, *KINDS[settings], "model_dir=base", "out_dir=out"], capsys, monkeypatch
    )
    assert status == 0 and is_adapter(tmp_path / "out"), err
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before
    first = next(row for row in read_jsonl(tmp_path / "out" / "metrics.jsonl") if row["step"] == 1)
    if stage in ("ppo", "grpo"):
        assert (first["ratio"], first["kl"], first["clip_fraction"]) == (1.0, 0.0, 0.0)

    apart = SmartHaoAI.from_pretrained(base)
    ids = torch.randint(apart.config.vocab_size, (2, 40))
    plain = logits(apart, ids)
    load_adapter(apart, tmp_path / "out")
    expected = logits(apart, ids)
    assert difference(expected, plain) > 1e-2, "three steps at this rate are seen"
    with disabled(apart):
        assert torch.equal(logits(apart, ids), plain)
    merged = SmartHaoAI.from_pretrained(tmp_path / "out")
    assert merged.adapter is None and difference(logits(merged, ids), expected) < LIMIT
    if kind not in NO_PEFT:
        import peft

        theirs = peft.PeftModel.from_pretrained(load_theirs(base), tmp_path / "out").eval()
        assert difference(expected, logits(theirs, ids)) < LIMIT
        assert difference(logits(merged, ids), logits(theirs.merge_and_unload(), ids)) < LIMIT


@pytest.mark.parametrize("targets", ["all-linear", r".*\.(q|v|down)_proj"])
@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["plain", "rslora", "dora"])
def test_an_adapter_that_peft_made(more: dict[str, Any], targets: str, make_base: Callable[[str], Path], tmp_path: Path) -> None:
    """Guards: PEFT's own ways to name targets, and its defaults, on a base that transformers wrote."""
    peft = pytest.importorskip("peft")
    base = make_base("imported")
    wanted = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=10, lora_dropout=0.1, target_modules=targets, **more)
    theirs = peft.get_peft_model(load_theirs(base), wanted)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
            elif "magnitude" in name:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.7, 1.4))
    theirs.eval().save_pretrained(tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs" / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"] == str(base)
    ours = SmartHaoAI.from_pretrained(base)
    ids = torch.randint(ours.config.vocab_size, (2, 40))
    plain = logits(ours, ids)
    load_adapter(ours, tmp_path / "theirs")
    assert difference(logits(ours, ids), logits(theirs, ids)) < LIMIT < difference(logits(ours, ids), plain)
    assert difference(logits(SmartHaoAI.from_pretrained(tmp_path / "theirs"), ids), logits(theirs.merge_and_unload(), ids)) < LIMIT
