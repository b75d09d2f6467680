"""Preference pairs from a model's own answers: who wins, who takes no part, and that the rows are what training reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from inference import Completion, Engine, SamplingSettings
from model import BPETokenizer, HaoAIConfig, SmartHaoAI
from model.reward import RewardModel
from tools import make_preferences
from tools.make_preferences import PairReport, main, make_pairs
from train.config import UsageError
from train.formats import BadRows, as_preference, read_samples
from train.prompts import Prompt
from train.rewards import Judge


class Said:
    """An engine whose answers are given."""

    def __init__(self, answers: dict[tuple[int, ...], list[Completion]]) -> None:
        self.answers, self.batches = answers, []

    def generate(self, prompts: Any, settings: SamplingSettings, seeds: Any = None) -> list[list[Completion]]:
        self.batches.append(len(prompts))
        return [self.answers[tuple(ids)] for ids in prompts]


def said(text: str, reasoning: str = "", finished: bool = True) -> Completion:
    return Completion([1, 2], text, reasoning, "stop" if finished else "length")


def prompt(number: int, reference: str | None = None, reasoning: str = "") -> Prompt:
    answer = {"role": "assistant", "content": reference, **({"reasoning_content": reasoning} if reasoning else {})}
    return Prompt((number,), f"q{number}", reference, [{"role": "user", "content": f"q{number}"}], answer=answer)


def pairs_of(
    answers: list[list[Completion]], references: list[str], reasoning: str = "", **options: Any
) -> tuple[list[dict[str, Any]], PairReport, Said]:
    prompts = [prompt(n, reference, reasoning) for n, reference in enumerate(references)]
    engine, report = Said({p.ids: a for p, a in zip(prompts, answers, strict=True)}), PairReport()
    settings = SamplingSettings(n=len(answers[0]))
    rows = make_pairs(engine, prompts, Judge({"exact": 1.0}, 50), settings, at_once=4, report=report, **options)  # type: ignore[arg-type]
    return list(rows), report, engine


def test_the_best_answer_meets_the_worst() -> None:
    """Guards: chosen and rejected the wrong way round, scores of another question, ties and unusable answers among the pairs."""
    rows, report, engine = pairs_of(
        [
            [said("It is 7."), said("It is 8.", "3 + 5 = 8"), said("9")],
            [said("4"), said("It is 4."), said("four: 4")],
            [said("6"), said("5", finished=False), said("")],
            [said("5"), said("6", finished=False), said("6")],
        ],
        ["8", "4", "6", "6"],
    )
    assert rows == [
        {
            "prompt": "q0",
            "chosen": [{"role": "assistant", "content": "It is 8.", "reasoning_content": "3 + 5 = 8"}],
            "rejected": "It is 7.",
            "chosen_score": 1.0,
            "rejected_score": 0.0,
        },
        {"prompt": "q3", "chosen": "6", "rejected": "5", "chosen_score": 1.0, "rejected_score": 0.0},
    ]
    assert (report.questions, report.answers, report.pairs, report.ties, report.too_few) == (4, 12, 2, 1, 1)
    assert (report.cut_off, report.empty, report.chosen, report.rejected) == (2, 1, 2.0, 0.0)
    assert engine.batches == [1, 1, 1, 1]  # four answers at once hold one question of three


def test_close_scores_are_a_tie() -> None:
    """Guards: a gap that is not applied."""
    rows, report, _ = pairs_of([[said("7"), said("8")]], ["8"], gap=1.0)
    assert rows == [] and report.ties == 1


def test_the_datas_own_answer_meets_the_first_wrong_one() -> None:
    """Guards: right answers rejected because they are worded otherwise, cut-off or empty ones rejected, a question counted twice, the
    thinking of the data's answer lost, so that pairs teach not to think."""
    answers = [
        [said("It is 8."), said("It is 7.", "3 + 5 = 7"), said("9")],
        [said("4"), said("It is 4."), said("four: 4")],
        [said("5", finished=False), said(""), said("6", finished=False)],
        [said("5", finished=False), said("6"), said("")],
    ]
    rows, report, _ = pairs_of(answers, ["3 + 5 = 8.", "4", "6", "6"], "so", reference=True)
    chosen = [{"role": "assistant", "content": "3 + 5 = 8.", "reasoning_content": "so"}]
    rejected = [{"role": "assistant", "content": "It is 7.", "reasoning_content": "3 + 5 = 7"}]
    assert rows == [{"prompt": "q0", "chosen": chosen, "rejected": rejected, "chosen_score": 1.0, "rejected_score": 0.0}]
    assert (report.questions, report.pairs, report.right, report.too_few, report.ties) == (4, 1, 2, 1, 0)
    assert "2 answered right, 1 with too few usable answers" in report.lines()[0]
    rows, _, _ = pairs_of([[said("7")]], ["8"], reference=True)
    assert rows[0]["chosen"] == "8" and rows[0]["rejected"] == "7"


def test_asking_stops_when_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a limit in minutes that is read as seconds, or that takes the pairs made so far with it."""
    clock = iter([0.0, 59.0, 61.0, 121.0, 200.0])
    monkeypatch.setattr(make_preferences.time, "monotonic", lambda: next(clock))
    rows, report, engine = pairs_of([[said("7"), said("6"), said("5"), said("4")]] * 5, ["8"] * 5, reference=True, minutes=2.0)
    assert len(rows) == report.questions == len(engine.batches) == 2


def test_answers_that_training_would_read_otherwise_take_no_part() -> None:
    """Guards: an answer with an unclosed tool call, which would spoil the row."""
    rows, report, _ = pairs_of([[said("<tool_call>{"), said("8"), said("<think>8"), said("7")]], ["8"])
    assert report.empty == 2 and [row["chosen"] for row in rows] == ["8"]


# ---------------------------------------------------------------- whole runs


@pytest.fixture
def model_dir(tmp_path: Path, tiny_config: HaoAIConfig, tiny_tokenizer: BPETokenizer) -> Path:
    """A model that says random words and soon stops: the end of a turn is a likely token in every state."""
    torch.manual_seed(1)
    model = SmartHaoAI(HaoAIConfig(**{**vars(tiny_config), "tie_word_embeddings": False})).eval()
    with torch.no_grad():
        model.embed_tokens.weight += torch.randn(tiny_config.n_embd)
        model.lm_head.weight.normal_(std=0.3)
        mean = model.hidden_states(torch.arange(200)[None]).mean(dim=(0, 1))
        model.lm_head.weight[tiny_tokenizer.eos_token_id] = 4 * mean / mean.square().sum()
    model.save_pretrained(tmp_path / "model", tiny_tokenizer)
    return tmp_path / "model"


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Rows of three formats, one with an earlier turn, and one that asks nothing."""
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}, {"role": "user", "content": "and?"}]
    rows = [
        {"prompt": "你好"},
        {"messages": [*turns, {"role": "assistant", "content": "8"}]},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"text": "asks nothing"},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def words(model_dir: Path, questions: Path, out: Path, *more: str) -> list[str]:
    small = ["--max-new-tokens", "12", "--samples", "6", "--device", "cpu"]
    return [str(model_dir), "--prompts", str(questions), *small, *more, str(out)]


def test_rows_are_preferences_and_equal_seeds_give_equal_files(
    model_dir: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards: rows that train_dpo cannot read, earlier turns that are lost, a seed without effect, {prompt} rows refused."""
    rules = ["--by", "rule", "--rule", "variety", "--rule", "length=0.5"]
    assert main(words(model_dir, questions, tmp_path / "a.jsonl", *rules)) == 0
    shown = capsys.readouterr().out
    assert "questions.jsonl:4" in shown and "ranked by 1 x variety + 0.5 x length" in shown
    bad = BadRows()
    samples = [sample for _, sample in read_samples(tmp_path / "a.jsonl", bad, as_preference)]
    assert samples and not bad.total
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(row["chosen_score"] > row["rejected_score"] for row in rows)
    assert {"你好", "and?"} <= {sample.prompt[-1]["content"] for sample in samples}
    assert any(len(sample.prompt) == 3 for sample in samples)
    main(words(model_dir, questions, tmp_path / "b.jsonl", *rules))
    main(words(model_dir, questions, tmp_path / "c.jsonl", *rules, "--seed", "1"))
    a, b, c = ((tmp_path / f"{name}.jsonl").read_bytes() for name in "abc")
    assert a == b != c


def test_pairs_with_the_datas_own_answers_are_preferences(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: thinking in the chosen answer and none in the rejected where the prompt closes it; rows that train_dpo cannot read."""
    turns = [{"role": "user", "content": "3 + 5"}, {"role": "assistant", "content": "3 + 5 = 8", "reasoning_content": "count"}]
    asked = [{"messages": turns}, {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello to you too!"}]}]
    questions = tmp_path / "sums.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
    for name, more, thought in (("open", [], "count"), ("closed", ["--no-thinking"], "")):
        out = tmp_path / f"{name}.jsonl"
        assert main(words(model_dir, questions, out, "--by", "reference", "--samples", "6", *more)) == 0
        assert "1 without a result that can be checked" in capsys.readouterr().out
        bad = BadRows()
        (sample,) = [sample for _, sample in read_samples(out, bad, as_preference)]
        assert not bad.total and sample.chosen[0]["content"] == "3 + 5 = 8"
        assert (sample.chosen[0].get("reasoning_content") or "") == thought
        assert sample.thinking is (False if more else None), "the answers were given to another prompt"


def test_a_reward_model_ranks(
    model_dir: Path, questions: Path, tmp_path: Path, tiny_tokenizer: BPETokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: scores of another row, or of the answer without its question."""
    reward = RewardModel.from_pretrained(model_dir)
    torch.nn.init.normal_(next(reward.score_head.parameters()), generator=torch.Generator().manual_seed(2))
    reward.save_pretrained(tmp_path / "reward", tiny_tokenizer)
    heard: list[tuple[Prompt, list[Completion]]] = []
    original = Engine.generate

    def generate(self: Engine, prompts: Any, settings: SamplingSettings, seeds: Any) -> list[list[Completion]]:
        replies = original(self, prompts, settings, seeds)
        heard.extend(zip([tuple(ids) for ids in prompts], replies, strict=True))  # type: ignore[arg-type]
        return replies

    monkeypatch.setattr(make_preferences.Engine, "generate", generate)
    out = tmp_path / "out.jsonl"
    assert main(words(model_dir, questions, out, "--by", "reward", "--reward-model", str(tmp_path / "reward"))) == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    best = {
        round(max(reward.score_ids([[*ids, *r.ids] for r in group if r.finish_reason == "stop" and r.text.strip()]).tolist()), 3)
        for ids, group in heard
        if any(r.finish_reason == "stop" and r.text.strip() for r in group)
    }
    assert rows and all(any(abs(row["chosen_score"] - score) < 2e-3 for score in best) for row in rows)


def test_mistakes_are_named(model_dir: Path, questions: Path, tmp_path: Path) -> None:
    """Guards: hours of sampling before a wrong option is noticed; a result that is overwritten."""
    out = tmp_path / "out.jsonl"
    other = tmp_path / "other"
    tokenizer = BPETokenizer.train(["other words"] * 3, vocab_size=300, progress=False)
    model = SmartHaoAI.from_pretrained(model_dir)
    RewardModel(model.config).save_pretrained(other, tokenizer)
    cases = [
        (["--by", "rule"], UsageError, "needs --rule"),
        (["--by", "rule", "--rule", "beauty"], UsageError, "known: exact"),
        (["--by", "reward", "--rule", "exact"], UsageError, "--by rule"),
        (["--by", "reference", "--rule", "exact"], UsageError, "data's own answers alone"),
        (["--by", "reference", "--reward-model", str(other)], UsageError, "--by reward for"),
        (["--by", "reward", "--reward-model", str(other)], ValueError, "another vocabulary"),
        (["--by", "rule", "--rule", "format", "--max-new-tokens", "9999"], UsageError, "leaves no room"),
        (["--by", "rule", "--rule", "format"], ValueError, "no pair was made"),
    ]
    for more, kind, text in cases:
        with pytest.raises(kind, match=text):
            main(words(model_dir, questions, out, *more))
    assert not out.exists()
    out.write_text("kept", encoding="utf-8")
    with pytest.raises(UsageError, match="--overwrite"):
        main(words(model_dir, questions, out, "--by", "rule", "--rule", "variety"))
    with pytest.raises(SystemExit):
        main(words(model_dir, questions, out, "--by", "rule", "--samples", "1"))
    assert out.read_text(encoding="utf-8") == "kept"
