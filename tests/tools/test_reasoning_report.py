"""tools.reasoning_report: what it measures, against generation and against arithmetic by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from inference import Engine, SamplingSettings
from model import BPETokenizer, HaoAIConfig, SmartHaoAI
from tools.reasoning_report import main, model_names, read_tasks, settings_of
from tools.reasoning_tasks import make_dataset, measure
from tools.reasoning_tasks.tables import Entry, over_seeds
from train.config import UsageError

Row = dict[str, Any]


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    make_dataset(folder, rows=12, test_rows=24, kinds=["sums", "parity"], languages=["en"])
    return folder


@pytest.fixture(scope="module")
def rows(tasks_dir: Path) -> list[Row]:
    return read_tasks(tasks_dir)["valid"]


def trained(tokenizer: BPETokenizer, config: HaoAIConfig, rows: list[Row]) -> SmartHaoAI:
    """A model that has learned the answers of some rows by heart, and so gets some of them right and others wrong."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = SmartHaoAI(config)
        pairs = [measure.encode(tokenizer, row, 256) for row in rows]
        longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
        ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
        labels = torch.full_like(ids, -100)
        for place, (prompt, answer) in enumerate(pairs):
            ids[place, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            labels[place, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
        for _ in range(40):
            out = model(ids, labels=labels)
            (out.loss + sum(out.deep_losses.values(), torch.zeros(())) / out.loss_tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def plain(tiny_tokenizer: BPETokenizer, tiny_config: HaoAIConfig, rows: list[Row]) -> SmartHaoAI:
    return trained(tiny_tokenizer, tiny_config, rows[:10])


@pytest.fixture(scope="module")
def latent(tiny_tokenizer: BPETokenizer, tiny_config: HaoAIConfig, rows: list[Row]) -> SmartHaoAI:
    return trained(tiny_tokenizer, dataclasses.replace(tiny_config, use_reasoning=True, reasoning_steps=3), rows[:10])


@pytest.mark.parametrize(("kind", "steps", "halt"), [("plain", None, 0.0), ("latent", 1, 0.0), ("latent", 3, 0.0), ("latent", 3, 0.6)])
def test_right_answers_are_those_that_greedy_decoding_gives(
    kind: str, steps: int | None, halt: float, request: pytest.FixtureRequest, tiny_tokenizer: BPETokenizer, rows: list[Row]
) -> None:
    """Guards: a shifted comparison, padding that is read, an end of the turn that is not asked for, a batch that mixes up its rows."""
    model = request.getfixturevalue(kind)
    measure.set_steps(model, steps, halt)
    found = measure.answer_rows(model, tiny_tokenizer, rows)
    prompts = [tiny_tokenizer.render(row["messages"][:1], add_generation_prompt=True, enable_thinking=False).ids for row in rows]
    replies = Engine(model, tiny_tokenizer).generate(prompts, SamplingSettings(max_new_tokens=5, temperature=0.0))
    said = [c[0].finish_reason == "stop" and c[0].text == row["answer"] for c, row in zip(replies, rows, strict=True)]
    assert found.correct == said
    assert len(rows) > sum(said) > 3
    assert (found.confidence is None) == (steps is None) and (found.answer_steps is None) == (not halt)
    if found.answer_steps is not None:
        assert 1 <= found.answer_steps <= 3 and found.answer_steps != found.all_steps


def test_prompt_and_answer_are_what_training_sees(tiny_tokenizer: BPETokenizer, rows: list[Row]) -> None:
    """Guards: an answer that is asked for in other tokens than it was taught in."""
    for row in rows:
        whole = tiny_tokenizer.render(row["messages"]).ids
        prompt, answer = measure.encode(tiny_tokenizer, row, 256)
        assert whole[: len(prompt) + len(answer)] == prompt + answer
    with pytest.raises(ValueError, match="longer than the model's context of 8"):
        measure.encode(tiny_tokenizer, rows[0], 8)


def test_confidence_belongs_to_its_token(latent: SmartHaoAI, tiny_tokenizer: BPETokenizer, rows: list[Row]) -> None:
    """Guards: hits, softmax and confidence of different tokens side by side."""
    measure.set_steps(latent, 3, 0.0)
    some = sorted(rows, key=lambda row: len(tiny_tokenizer.render(row["messages"]).ids))  # the order in which they are computed
    found = measure.answer_rows(latent, tiny_tokenizer, some)
    hits, largest, sure = [], [], []
    with torch.no_grad():
        for row in some:
            prompt, answer = measure.encode(tiny_tokenizer, row, 256)
            out = latent(torch.tensor([prompt + answer]))
            for place, token in enumerate(answer[:-1], len(prompt) - 1):
                chances = torch.softmax(out.logits[0, place].double(), dim=-1)
                hits.append(int(chances.argmax()) == token)
                largest.append(float(chances.max()))
                sure.append(float(out.confidence[0, place]))
    assert found.hits.tolist() == hits
    torch.testing.assert_close(found.softmax.double(), torch.tensor(largest).double(), atol=1e-5, rtol=0)
    assert found.confidence is not None
    torch.testing.assert_close(found.confidence.double(), torch.tensor(sure).double(), atol=1e-5, rtol=0)


def test_calibration_by_hand() -> None:
    """Guards: intervals that weigh the same however many tokens fall into them, and a 1.0 that falls out."""
    result = measure.calibration(torch.tensor([0.12, 0.18, 0.92, 0.98, 1.0, 0.95]), torch.tensor([False, True, True, True, True, False]))
    low, high = result["bins"]
    assert (low["count"], high["count"]) == (2, 4) and (low["rate"], high["rate"]) == (0.5, 0.75)
    assert result["ece"] == pytest.approx((2 * abs(0.15 - 0.5) + 4 * abs(0.9625 - 0.75)) / 6, abs=1e-6)
    assert result["brier"] == pytest.approx((0.12**2 + 0.82**2 + 0.08**2 + 0.02**2 + 0 + 0.95**2) / 6, abs=1e-6)
    # Outcomes drawn with the estimated probabilities leave no error but chance.
    estimates = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    assert measure.calibration(estimates, torch.rand(200_000, generator=torch.Generator().manual_seed(1)) < estimates)["ece"] < 0.01


def test_guessing_knows_kind_and_language() -> None:
    """Guards: a baseline below what guessing from the question's form gives, or one that has seen the answers it is tested on."""
    rows = [{"kind": k, "lang": "en", "answer": a} for k, a in (("sums", "1"), ("sums", "2"), ("sums", "2"), ("parity", "on"))]
    frequent = measure.most_frequent(rows)
    assert measure.guessing(rows, frequent) == [False, True, True, True]
    others = [{"kind": k, "lang": lang, "answer": "1"} for k, lang in (("sums", "en"), ("sums", "zh"), ("order", "en"))]
    assert measure.guessing(others, frequent) == [False] * 3


def test_work_of_a_mean_number_of_steps(latent: SmartHaoAI, plain: SmartHaoAI) -> None:
    """Guards: a count that differs from the account at whole numbers, or does not lie between them."""
    exact = [dataclasses.replace(latent.config, reasoning_steps=n).account().flops_per_token(50, False) for n in (1, 2, 3)]
    assert [measure.flops_per_token(latent, n, 50) for n in (1, 2, 3)] == pytest.approx(exact)
    assert measure.flops_per_token(latent, 2.5, 50) == pytest.approx((exact[1] + exact[2]) / 2)
    assert measure.flops_per_token(plain, None, 50) == plain.config.account().flops_per_token(50, False)


def test_path_ends_with_the_prediction(latent: SmartHaoAI, plain: SmartHaoAI, tiny_tokenizer: BPETokenizer, rows: list[Row]) -> None:
    """Guards: steps in the wrong order, and another token's path."""
    measure.set_steps(latent, 3, 0.0)
    path = measure.reasoning_path(latent, tiny_tokenizer, rows[0])
    for steps in (1, 2, 3):
        measure.set_steps(latent, steps, 0.0)
        prompt, answer = measure.encode(tiny_tokenizer, rows[0], 256)
        with torch.no_grad():
            out = latent(torch.tensor([prompt + answer]))
        asked = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
        chances, tops = out.logits[0, asked].softmax(dim=-1).max(dim=-1)
        assert path.predicted[steps - 1] == [measure.shown(tiny_tokenizer, token) for token in tops.tolist()]
        assert path.probability[steps - 1] == pytest.approx(chances.tolist(), abs=1e-5)
        assert path.confidence[steps - 1] == pytest.approx(out.confidence[0, asked].tolist(), abs=1e-5)
    assert path.tokens[-1] == "<end>" and len(path.predicted) == 3
    with pytest.raises(ValueError, match="no reasoning head"):
        measure.reasoning_path(plain, tiny_tokenizer, rows[0])


def test_settings_and_names(latent: SmartHaoAI, plain: SmartHaoAI) -> None:
    """Guards: a reasoning model that is not measured as it was trained, seeds that count as models of their own."""
    assert settings_of(plain, [1, 2], 0.9) == [(None, 0.0)]
    assert settings_of(latent, [4, 1], 0.9) == [(1, 0.0), (3, 0.0), (4, 0.0), (3, 0.9)]
    assert settings_of(latent, [1], 0.0) == [(1, 0.0), (3, 0.0)]
    assert model_names(["a/plain/seed_0", "a/plain/seed_1", "a/deep"]) == [
        ("plain/seed_0", "plain"), ("plain/seed_1", "plain"), ("deep", "deep"),
    ]  # fmt: skip
    with pytest.raises(UsageError, match="two of the models are called plain"):
        model_names(["a/plain", "b/plain"])


def test_seeds_are_averaged() -> None:
    """Guards: an interval over rows where one over seeds is meant."""
    entries = [Entry("m", "m", None, 0.0, None, 1, correct={"valid": [True] * n + [False] * (10 - n)}) for n in (4, 5, 6)]
    rate, low, high = over_seeds(entries, "valid")
    assert (rate, high - rate) == pytest.approx((0.5, 4.303 * 0.1 / 3**0.5), abs=1e-3) and rate - low == pytest.approx(high - rate)
    assert over_seeds(entries[:1], "valid") == pytest.approx((0.4, 0.168, 0.687), abs=1e-3)


def test_whole_report(
    latent: SmartHaoAI,
    plain: SmartHaoAI,
    tiny_tokenizer: BPETokenizer,
    tasks_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Guards: a report that lacks a model, a setting, a file or a plot, or that fails without a reasoning head."""
    pytest.importorskip("matplotlib")
    for seed in (0, 1):
        latent.save_pretrained(tmp_path / "latent" / f"seed_{seed}", tiny_tokenizer)
    plain.save_pretrained(tmp_path / "plain", tiny_tokenizer)
    words = [str(tmp_path / "latent/seed_0"), str(tmp_path / "latent/seed_1"), str(tmp_path / "plain"), "--tasks", str(tasks_dir)]
    main([*words, "--steps", "1", "--limit", "12", "--generate", "--device", "cpu", "--out", str(tmp_path / "out")])
    facts = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    settings = [(m["model"], m["steps"], m["halt"]) for m in facts["models"]]
    of_latent = [(1, 0.0), (3, 0.0), (3, 0.9)]
    assert settings == [(f"latent/seed_{seed}", *s) for seed in (0, 1) for s in of_latent] + [("plain", None, 0.0)]
    for entry in facts["models"]:
        assert entry["correct"]["valid"]["all"]["total"] == 12 and entry["milliseconds"]["median"] > 0
        assert sum(cell["passed"] for cell in entry["correct"]["valid"]["kind"].values()) == entry["correct"]["valid"]["all"]["passed"]
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    for part in (
        "## Over seeds",
        "## longer, by kind",
        "## Generated freely",
        "3, halt 0.9",
        "## A path: latent/seed_0",
        "![path](path.png)",
    ):
        assert part in text
    for name in ("accuracy", "calibration", "path"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    main([*words[2:], "--limit", "6", "--device", "cpu", "--out", str(tmp_path / "out2")])
    assert not (tmp_path / "out2" / "path.png").exists()
    assert "plain" in capsys.readouterr().out


def test_mistakes_are_named(tmp_path: Path, tasks_dir: Path) -> None:
    """Guards: a trace where a word about the remedy would do."""
    with pytest.raises(FileNotFoundError, match="python -m tools.make_reasoning"):
        read_tasks(tmp_path)
    for split in ("valid", "held_templates", "longer"):
        (tmp_path / f"{split}.jsonl").write_text('{"text": "x"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="valid.jsonl:1 is no reasoning task"):
        read_tasks(tmp_path)
    for words in (["--steps", "0"], ["--halt", "1"], ["--limit", "0"]):
        with pytest.raises(UsageError):
            main(["x", "--tasks", str(tasks_dir), *words])
