"""Rewards by rule, the judge that adds them up, and the prompts they are about."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from training_helpers import write_jsonl

from inference import Completion
from inference.answers import final_answer
from model import BPETokenizer, HaoAIConfig, RewardModel
from train.config import UsageError
from train.prompts import Prompt, fingerprint, read_prompts
from train.rewards import RULES, Answer, Judge, check_weights


def answer(text: str, **more: object) -> Answer:
    return Answer(question=str(more.pop("question", "3 + 5 = ?")), text=text, **more)  # type: ignore[arg-type]


def test_each_rule() -> None:
    """Guards each rule on a good and a bad answer; a rule that is always 1 would teach nothing."""
    expected = {
        "exact": (answer("3 + 5 = 8.", reference="#### 8"), answer("3 + 5 = 9.", reference="#### 8")),
        "format": (answer("8"), answer("8", finished=False)),
        "steps": (answer("3 + 5 = 8."), answer("3 + 5 = 9.")),
        "language": (answer("八", question="三加五等于几？"), answer("eight", question="三加五等于几？")),
        "punctuation": (answer("It is 8."), answer("It is 8")),
    }
    for name, (good, bad) in expected.items():
        assert (RULES[name](good), RULES[name](bad)) == (1.0, 0.0), name
    assert RULES["steps"](answer("8")) == 0.0 and RULES["steps"](answer("1+1=2 1+1=2 1+1=3")) == 0.5
    assert RULES["exact"](answer("8")) == 0.0, "without a reference nothing is right"
    assert [RULES["length"](answer("", tokens=n, limit=100)) for n in (10, 50, 75, 100)] == [0.0, 0.0, -0.5, -1.0]
    assert RULES["variety"](answer("abcd" * 50)) < 0.05 < 0.9 < RULES["variety"](answer("Each of these words differs."))
    assert set(expected) | {"length", "overlap", "variety"} == set(RULES)


def test_overlap_is_chrf() -> None:
    """Guards: character runs counted with their spaces or more often than both texts have them. By hand; then as sacrebleu does it."""
    assert RULES["overlap"](answer("anything")) == 0.0
    assert RULES["overlap"](answer("a b c", reference="abc")) == 1.0
    # aab against ab: runs of 1: shared a, b (2/3 of those given, 2/2 of those wanted); of 2: shared ab (1/2, 1/1)
    precision, recall = (2 / 3 + 1 / 2) / 2, 1.0
    assert RULES["overlap"](answer("aab", reference="ab")) == pytest.approx(5 * precision * recall / (4 * precision + recall))
    chrf = pytest.importorskip("sacrebleu.metrics").CHRF()
    letters = random.Random()
    for _ in range(200):
        given, wanted = ("a" + "".join(letters.choice("ab 中文") for _ in range(letters.randrange(30))) for _ in range(2))
        score = chrf.sentence_score(given, [wanted]).score / 100
        assert RULES["overlap"](answer(given, reference=wanted)) == pytest.approx(score, abs=1e-9)


def test_weights_are_checked() -> None:
    """Guards against a misspelt rule that silently rewards nothing."""
    assert check_weights({"exact": "1", "format": 0.5, "steps": 0}) == {"exact": 1.0, "format": 0.5}
    for wrong in ({"exakt": 1.0}, {"exact": "much"}, {"exact": "nan"}, {"exact": None}):
        with pytest.raises(UsageError, match="rewards.exa"):
            check_weights(wrong)


def test_judge_adds_rules_model_and_missing_end(tiny_config: HaoAIConfig) -> None:
    """Guards the sum that is learned from: weights, reward model and the price of a missing end all count, once."""
    torch.manual_seed(0)
    reward_model = RewardModel(tiny_config)
    torch.nn.init.normal_(reward_model.score_head.weight)
    prompts = [Prompt((5, 6, 7), "3 + 5 = ?", "8"), Prompt((9, 8), "2 + 2 = ?", "4")]
    replies = [Completion([11, 12, 13], "8", finish_reason="stop"), Completion([14], "5", finish_reason="length")]
    judge = Judge({"exact": 2.0, "format": 0.5}, limit=16, reward_model=reward_model, missing_end=3.0)
    first, second = judge(list(zip(prompts, replies, strict=True)))
    alone = [float(reward_model(torch.tensor([ids])).detach()) for ids in ([5, 6, 7, 11, 12, 13], [9, 8, 14])]
    assert first == pytest.approx({"exact": 1.0, "format": 1.0, "model": alone[0], "reward": 2.5 + alone[0]}, abs=1e-5)
    assert second == pytest.approx({"exact": 0.0, "format": 0.0, "model": alone[1], "reward": alone[1] - 3.0}, abs=1e-5)


def test_prompts_of_all_kinds_of_rows(tmp_path: Path, tiny_tokenizer: BPETokenizer) -> None:
    """Guards what a rollout begins with: no word of the answer, the reference of the last turn, nothing twice, nothing too long."""
    rows = [
        {"prompt": "1 + 1 = ?", "response": "1 + 1 = 2."},
        {"prompt": "1 + 1 = ?", "response": "2"},
        {"prompt": "2 + 3 = ?", "chosen": "5", "rejected": "6"},
        {"messages": [{"role": "user", "content": q} for q in ["a"]] + [{"role": "assistant", "content": "no number in this text at all"}]},
        {"question": "2 * 21 = ?", "answer": "2 * 21 = <<2*21=42>>42\n#### 42"},
        {"prompt": "x" * 400, "response": "7"},
        {"text": "no prompt"},
    ]
    said: list[str] = []
    prompts, held = read_prompts(write_jsonl(tmp_path / "p.jsonl", rows), tiny_tokenizer, 100, verifiable=True, log=said.append)
    assert [(p.question, p.reference) for p in prompts] == [
        ("1 + 1 = ?", "1 + 1 = 2."),
        ("2 + 3 = ?", "5"),
        ("2 * 21 = ?", rows[4]["answer"]),
    ]
    assert not held and final_answer(str(prompts[2].reference)) == "42"
    rendered = tiny_tokenizer.render([{"role": "user", "content": "2 + 3 = ?"}], add_generation_prompt=True)
    assert prompts[1].ids == tuple(rendered.ids)
    notes = "\n".join(map(str, said))
    for note in ("p.jsonl:7", "1 unusable", "1 said before", "1 longer than 100 tokens", "1 without a result"):
        assert note in notes
    everything, _ = read_prompts(tmp_path / "p.jsonl", tiny_tokenizer, 100, log=said.append)
    assert len(everything) == 4 and fingerprint(everything) != fingerprint(prompts)
    with pytest.raises(ValueError, match="no prompt that can be used.*longer than 3 tokens"):
        read_prompts(tmp_path / "p.jsonl", tiny_tokenizer, 3, log=said.append)


def test_held_out_prompts_are_the_same_every_time(tmp_path: Path, tiny_tokenizer: BPETokenizer) -> None:
    """Guards against training on the prompts that measure the result when rows are added or reordered."""
    rows = [{"prompt": f"{n} + 1 = ?", "response": str(n + 1)} for n in range(60)]
    train, held = read_prompts(write_jsonl(tmp_path / "a.jsonl", rows), tiny_tokenizer, 100, val_share=0.3)
    _, again = read_prompts(write_jsonl(tmp_path / "b.jsonl", rows[::-1][:40]), tiny_tokenizer, 100, val_share=0.3)
    assert 5 < len(held) < 35 and len(train) + len(held) == 60
    assert {p.ids for p in again} <= {p.ids for p in held}
