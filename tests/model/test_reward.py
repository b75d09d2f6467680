"""The reward model: where its score is read, what its files are, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model import BPETokenizer, HaoAIConfig, RewardModel, SmartHaoAI
from model.checkpoint import fill, open_weights, save_pretrained
from model.heads import ValueHead
from model.reward import check_same_vocabulary

SMART = {
    "attention_gate": "head",
    "attention_temperature": "query",
    "residual_scale": True,
    "value_residual": True,
    "logit_softcap": 20.0,
    "deep_supervision": "layers",
    "use_reasoning": True,
}
MIXTURE = {"n_expert": 4, "n_expert_per_token": 2, "moe_intermediate_size": 24, "moe_pattern": "DE", "router_bias_rate": 0.01}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen3-windows": {"n_layer": 4, "use_sliding_window": True, "window_size": 5, "window_pattern": "SSSL"},
    "qwen2-untied": {"qk_norm": False, "attention_bias": True, "tie_word_embeddings": False},
    "llama": {"qk_norm": False},
    "mistral": {"qk_norm": False, "use_sliding_window": True, "window_size": 6, "window_pattern": "S"},
    "mixtral": {"qk_norm": False, "n_expert": 3, "n_expert_per_token": 2, "moe_intermediate_size": 24},
    "qwen3_moe-untied": {"n_expert": 3, "n_expert_per_token": 2, "moe_intermediate_size": 24, "tie_word_embeddings": False},
}


def reward_model(make_model, folder: Path, **fields: Any) -> RewardModel:
    """A reward model on the trunk of a random language model, with a head that matters."""
    make_model(**fields).save_pretrained(folder)
    model = RewardModel.from_pretrained(folder)
    torch.nn.init.normal_(model.score_head.weight)
    return model


def by_hand(model: RewardModel, row: list[int]) -> torch.Tensor:
    """The score of one sequence alone, from its last hidden state in float64."""
    with torch.no_grad():
        state = model.hidden_states(torch.tensor([row]))[0, -1]
    return state.double() @ model.score_head.weight[0].double()


@pytest.mark.parametrize("fields", [{}, SMART, MIXTURE, SHAPES["qwen2-untied"]], ids=["plain", "smart", "mixture", "untied"])
def test_a_score_is_that_of_the_sequence_alone(fields: dict[str, Any], make_model, seed: int, tmp_path: Path) -> None:
    """Guards: a score read at padding, at another sequence's end or in another order; packing and padding that change it."""
    model = reward_model(make_model, tmp_path, **fields)
    rows = [torch.randint(1, 61, (n,)).tolist() for n in (7, 3, 9, 1, 12)]
    expected = torch.stack([by_hand(model, row) for row in rows]).float()
    packed = torch.zeros(2, 22, dtype=torch.long)
    segments = torch.zeros_like(packed)
    for line, members in enumerate(([0, 1, 2], [3, 4])):
        at = 0
        for number, member in enumerate(members, start=1):
            packed[line, at : at + len(rows[member])] = torch.tensor(rows[member])
            segments[line, at : at + len(rows[member])] = number
            at += len(rows[member])
    with torch.no_grad():
        torch.testing.assert_close(model(packed, segment_ids=segments), expected, rtol=1e-5, atol=1e-5)
        padded = torch.tensor([rows[0], [0] * 4 + rows[1], rows[1] + [0] * 4])
        mask = torch.tensor([[1] * 7, [0] * 4 + [1] * 3, [1] * 3 + [0] * 4])
        torch.testing.assert_close(model(padded, attention_mask=mask), expected[[0, 1, 1]], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(torch.tensor(rows[2:3])), expected[2:3], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.train().score_ids(rows), expected, rtol=1e-5, atol=1e-5)
    assert model.training


@pytest.mark.parametrize("fields", [{}, SMART, MIXTURE, SHAPES["qwen2-untied"]], ids=["plain", "smart", "mixture", "untied"])
def test_from_a_language_model_and_back_from_disk(fields: dict[str, Any], make_model, seed: int, tmp_path: Path) -> None:
    """Guards: a new head that is not zero (the first loss would not be ln 2), a trunk or head lost on disk, training-only parts or a
    language-model head in the files."""
    language = make_model(**fields)
    language.save_pretrained(tmp_path / "lm")
    model = RewardModel.from_pretrained(tmp_path / "lm")
    ids = torch.randint(61, (2, 20))
    with torch.no_grad():
        assert model(ids).tolist() == [0.0, 0.0]
        torch.testing.assert_close(model.hidden_states(ids), language.hidden_states(ids), rtol=1e-5, atol=1e-5)
        model.score_head.weight.normal_()
        model.save_pretrained(tmp_path / "reward")
        back = RewardModel.from_pretrained(tmp_path / "reward")
        assert back.config == model.config and not back.training
        assert torch.equal(back(ids), model(ids)) and model(ids).abs().min() > 0
    names = set(load_file(tmp_path / "reward" / "model.safetensors"))
    assert "score.weight" in names and not any("lm_head" in name or "auxiliary" in name for name in names)
    with pytest.raises(ValueError, match="reward model.*RewardModel.from_pretrained"):
        SmartHaoAI.from_pretrained(tmp_path / "reward")


def test_a_resumable_checkpoint_is_put_back_whole(make_model, seed: int, tmp_path: Path) -> None:
    """Guards: a resumed run that lacks the head, the residual scales or the value head; a value head in a finished model."""
    model = reward_model(make_model, tmp_path / "lm", **SMART)
    save_pretrained(model, tmp_path / "step", resumable=True)
    fresh = RewardModel(model.config)
    fill(fresh, open_weights(tmp_path / "step"))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), fresh.state_dict().values(), strict=True))
    policy = make_model()
    policy.value_head = ValueHead(policy.config)
    assert policy.value_head(torch.randn(2, 5, 32)).tolist() == [[0.0] * 5] * 2
    torch.nn.init.normal_(policy.value_head.weight)
    save_pretrained(policy, tmp_path / "ppo", resumable=True)
    policy.save_pretrained(tmp_path / "finished")
    again = make_model()
    again.value_head = ValueHead(again.config)
    fill(again, open_weights(tmp_path / "ppo"))
    assert torch.equal(again.value_head.weight, policy.value_head.weight)
    with pytest.raises(ValueError, match="missing value_head"):
        fill(again, open_weights(tmp_path / "finished"))
    assert SmartHaoAI.from_pretrained(tmp_path / "ppo").value_head is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_stay_fp32(dtype: torch.dtype, make_model, seed: int, tmp_path: Path) -> None:
    """Guards: close scores that autocast or a half-precision model rounds to ties, and gradients that do not reach the trunk."""
    model = reward_model(make_model, tmp_path).to(dtype)
    ids = torch.randint(61, (3, 9))
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(ids)
    assert scores.dtype == torch.float32
    scores.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (model.embed_tokens.weight, model.score_head.weight))


def test_conversations_and_texts(tiny_tokenizer: BPETokenizer, tiny_model: SmartHaoAI, tmp_path: Path, seed: int) -> None:
    """Guards: a score read after the line end behind an answer (rollouts end before it), results in another order than the texts, and
    a text longer than the context that loses its end."""
    tiny_model.save_pretrained(tmp_path, tiny_tokenizer)
    model = RewardModel.from_pretrained(tmp_path)
    torch.nn.init.normal_(model.score_head.weight)
    talk = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "Hello, nice to meet you."}]
    ids = tiny_tokenizer.render(talk).ids
    ids = ids[: len(ids) - ids[::-1].index(tiny_tokenizer.eos_token_id)]
    long = "小猫在窗边睡觉。The end" * 60
    tail = tiny_tokenizer.encode(long)[-256:]
    scores = model.score(["小猫", talk, long], tiny_tokenizer)
    expected = torch.stack([by_hand(model, row) for row in (tiny_tokenizer.encode("小猫"), ids, tail)]).float()
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    assert model.score([], tiny_tokenizer).shape == (0,)
    with pytest.raises(ValueError, match="text 2 .*empty"):
        model.score(["a", ""], tiny_tokenizer)
    with pytest.raises(ValueError, match="conversation 1 .*answer"):
        model.score([talk[:1]], tiny_tokenizer)


def test_another_vocabulary_is_refused(tiny_tokenizer: BPETokenizer, tmp_path: Path) -> None:
    """Guards: ids of one vocabulary scored by a model of another, which gives numbers without meaning."""
    other = BPETokenizer.train(["completely different words 其他的词 " * 4], vocab_size=300, progress=False)
    tiny_tokenizer.save_pretrained(tmp_path)
    check_same_vocabulary(tiny_tokenizer, BPETokenizer.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match=r"weight/reward has another vocabulary.*id \d+"):
        check_same_vocabulary(tiny_tokenizer, other, "weight/reward")
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}", encoding="utf-8")
    with pytest.raises(ValueError, match="another chat template"):
        check_same_vocabulary(tiny_tokenizer, BPETokenizer.from_pretrained(tmp_path))
    model = RewardModel(HaoAIConfig(vocab_size=50, n_layer=1, n_head=2, n_embd=16))
    with pytest.raises(ValueError, match="only 50"):
        model.score(["小猫"], tiny_tokenizer)


@pytest.mark.parametrize("name", SHAPES)
def test_parity_with_transformers(name: str, make_model, seed: int, tmp_path: Path, tiny_tokenizer: BPETokenizer) -> None:
    """Guards: a folder that AutoModelForSequenceClassification reads as another model, and one of its own that is another to us."""
    transformers = pytest.importorskip("transformers", reason="parity tests need: pip install -e .[parity]")
    ours = reward_model(make_model, tmp_path / "lm", vocab_size=tiny_tokenizer.vocab_size, **SHAPES[name])
    ours.save_pretrained(tmp_path / "ours", tiny_tokenizer)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", dtype=torch.float32
    ).eval()
    assert type(theirs).__name__.lower() == f"{name.split('-')[0].replace('_', '')}forsequenceclassification"
    pad = tiny_tokenizer.pad_token_id
    ids = torch.randint(0, pad, (3, 20))
    mask = torch.ones_like(ids)
    ids[1, 13:], mask[1, 13:] = pad, 0
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask).logits[:, 0]
        torch.testing.assert_close(ours(ids, attention_mask=mask), expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))
        theirs.save_pretrained(tmp_path / "theirs")
        back = RewardModel.from_pretrained(tmp_path / "theirs")
        torch.testing.assert_close(back(ids, attention_mask=mask), ours(ids, attention_mask=mask), rtol=0, atol=1e-5)


def test_a_classifier_of_several_labels_is_refused(make_model, seed: int, tmp_path: Path) -> None:
    """Guards: a sentiment classifier taken for a reward model."""
    from safetensors.torch import save_file

    reward_model(make_model, tmp_path).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "score.weight": torch.zeros(3, 32)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="classifier with 3 labels"):
        RewardModel.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["num_labels"] == 1
