"""Distillation: the chunked loss against plain float64 maths, the cache, the weights of structure tokens, and the stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from training_helpers import FAST, TINY_SHAPE, call_main, chat_rows, text_rows, write_jsonl

from model import BPETokenizer, HaoAIConfig, SmartHaoAI
from train import distillation, train_distill
from train.config import DistillConfig, OptimizationConfig
from train.data import Batch, Row, collate
from train.distillation import (
    CachedTeacher,
    Teacher,
    WeightedStructure,
    cache_folder,
    distillation_loss,
    labelled_documents,
    linear_row_loss,
    shared_vocabulary,
    structure_ids,
)
from train.losses import forward_kl, lm_loss
from train.metrics import read_jsonl


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks and a rest, without hundreds of rows."""
    monkeypatch.setattr(distillation, "CHUNK", 8)


def packed(config: HaoAIConfig, seed: int = 0, rows: int = 2) -> Batch:
    """Rows of two documents each; the first two tokens of every document are not learned, one document not at all."""
    random = np.random.default_rng(seed)
    made = []
    for number in range(rows):
        row = Row()
        for length in random.integers(4, 12, size=2):
            mask = np.arange(length) >= (2 if number or row.length else length)
            row.add(random.integers(0, config.vocab_size, size=length), mask)
        made.append(row)
    return collate(made, 0)


@pytest.fixture
def teacher_model(tiny_config: HaoAIConfig) -> SmartHaoAI:
    """Another model of the same vocabulary, with a wider spread of its logits."""
    torch.manual_seed(5)
    model = SmartHaoAI(tiny_config)
    torch.nn.init.normal_(model.embed_tokens.weight, std=0.3)
    return model


def expected_kl(student: SmartHaoAI, teacher: SmartHaoAI, batch: Batch, kind: str, temperature: float) -> Tensor:
    """The sum of the divergences at the labelled tokens, from whole logits in float64, by definition."""
    segments, labels = batch.inputs["segment_ids"], batch.inputs["labels"]
    total = torch.zeros((), dtype=torch.float64)
    p, q = (
        (m(batch.inputs["input_ids"], segment_ids=segments).logits.double() / temperature).softmax(-1) for m in (teacher.eval(), student)
    )
    if kind == "reverse_kl":
        p, q = q, p
    for row in range(len(labels)):
        for t in range(1, labels.shape[1]):
            if labels[row, t] != -100 and segments[row, t] == segments[row, t - 1]:
                total = total + (p[row, t - 1] * (p[row, t - 1] / q[row, t - 1]).log()).sum()
    return total


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.5), (2.5, 1.0)])
def test_the_loss_and_its_gradients_equal_the_definition(
    tiny_model: SmartHaoAI, teacher_model: SmartHaoAI, kind: str, temperature: float, alpha: float
) -> None:
    """Guards: the divergence the wrong way round, a chunk left out, states of the wrong position, a gradient into the teacher, the
    factor temperature squared."""
    batch = packed(tiny_model.config, seed=1, rows=5)
    settings = DistillConfig(kind=kind, temperature=temperature, alpha=alpha)
    loss = distillation_loss(settings, Teacher(teacher_model, tiny_model.config.vocab_size, temperature))
    tiny_model.train()
    terms = {term.name: term for term in loss(tiny_model, batch)}
    terms["loss"].total.backward()
    found = {name: p.grad.clone() for name, p in tiny_model.named_parameters()}
    tiny_model.zero_grad()
    kl = expected_kl(tiny_model, teacher_model, batch, kind, temperature)
    hard = lm_loss(tiny_model, batch)[0].total
    (alpha * temperature**2 * kl + (1 - alpha) * hard).backward()
    torch.testing.assert_close(terms["kl"].total.double(), kl.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(terms["hard_loss"].total, hard.detach())
    assert terms["kl"].metric and terms["hard_loss"].metric and not terms["loss"].metric
    for name, p in tiny_model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-5, msg=name)
    assert all(p.grad is None for p in teacher_model.parameters())


@pytest.mark.parametrize("rows", [0, 1, 8, 21])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_row_losses_in_chunks(rows: int, softcap: float) -> None:
    """Guards: padding rows that count, weights and slices that slip against each other, a cap without its slope."""
    hidden, weight = torch.randn(rows, 12, requires_grad=True), torch.randn(31, 12, requires_grad=True)
    goal, weights = torch.randn(rows, 31), torch.rand(rows)
    loss = linear_row_loss(hidden, weight, softcap, lambda z, part: forward_kl(z, goal[part], 1.7), weights)
    (loss * 0.37).backward()
    exact_hidden, exact_weight = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    z = exact_hidden @ exact_weight.T
    z = softcap * torch.tanh(z / softcap) if softcap else z
    losses = F.kl_div((z / 1.7).log_softmax(-1), (goal.double() / 1.7).softmax(-1), reduction="none").sum(-1)
    exact = (losses * weights.double()).sum()
    (exact * 0.37).backward()
    torch.testing.assert_close(loss.detach().double(), exact.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), exact_hidden.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), exact_weight.grad, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert not linear_row_loss(hidden, weight, softcap, lambda z, part: forward_kl(z, goal[part])).requires_grad


def test_a_student_that_is_its_teacher_has_nothing_to_learn(tiny_model: SmartHaoAI) -> None:
    """Guards: a teacher in training mode, another temperature on one side, a divergence that is not zero at its minimum."""
    teacher = SmartHaoAI(tiny_model.config)
    teacher.load_state_dict(tiny_model.state_dict())
    loss = distillation_loss(DistillConfig(alpha=1.0), Teacher(teacher, tiny_model.config.vocab_size, 2.0))
    total = loss(tiny_model.train(), packed(tiny_model.config))[0].total
    total.backward()
    assert abs(total.item()) < 1e-4
    assert max(float(p.grad.abs().max()) for p in tiny_model.parameters()) < 1e-4


def test_a_padded_vocabulary_is_cut_to_what_both_have(tiny_config: HaoAIConfig, tiny_model: SmartHaoAI) -> None:
    """Guards: imported models, which pad their vocabulary with ids that stand for nothing."""
    wide = HaoAIConfig(**{**vars(tiny_config), "vocab_size": tiny_config.vocab_size + 24})
    loss = distillation_loss(DistillConfig(kind="reverse_kl"), Teacher(SmartHaoAI(wide), tiny_config.vocab_size, 2.0))
    terms = loss(tiny_model.train(), packed(tiny_config))
    assert torch.isfinite(terms[0].total)


# ---------------------------------------------------------------- cache


class Loader:
    """Loads a teacher and counts how often."""

    def __init__(self, model: SmartHaoAI, temperature: float = 2.0) -> None:
        self.model, self.temperature, self.loads = model, temperature, 0

    def __call__(self) -> Teacher:
        self.loads += 1
        return Teacher(self.model, self.model.config.vocab_size, self.temperature)

    def cache(self, folder: Path, top_k: int = 8) -> CachedTeacher:
        return CachedTeacher(folder, self, self.model.config.vocab_size, self.temperature, top_k)


def test_cached_distributions_are_the_teachers(tmp_path: Path, teacher_model: SmartHaoAI, tiny_model: SmartHaoAI) -> None:
    """Guards: rows of documents that are mixed up, ids cut to 16 bits, a rest that is not the rest, a cache that is not used."""
    loader, batch = Loader(teacher_model), packed(tiny_model.config, seed=3, rows=4)
    cache = loader.cache(tmp_path)
    ids, logs = cache.top(batch)
    teacher = Teacher(teacher_model, tiny_model.config.vocab_size, 2.0)
    exact = (teacher.logits(teacher.states(batch)).double() / 2.0).log_softmax(-1)
    assert ids.tolist() == exact.topk(8).indices.tolist()
    torch.testing.assert_close(logs[:, :-1].double(), exact.gather(1, ids), rtol=0, atol=5e-3)
    torch.testing.assert_close(logs.exp().sum(-1), torch.ones(len(logs)))
    rest = exact.exp().scatter(1, ids, 0.0).sum(-1)
    torch.testing.assert_close(logs[:, -1].exp().double(), rest, rtol=1e-2, atol=1e-3)
    # Another process: the same documents in other rows and another order, without loading the teacher.
    loader.loads = 0
    again = loader.cache(tmp_path)
    halves = [Batch({k: v[at] for k, v in batch.inputs.items()}, {}, 0, 0) for at in (slice(2, 4), slice(0, 2))]
    (late_ids, late_logs), (early_ids, early_logs) = again.top(halves[0]), again.top(halves[1])
    assert loader.loads == 0 and len(again) == len(cache)
    assert torch.equal(torch.cat((early_ids, late_ids)), ids) and torch.equal(torch.cat((early_logs, late_logs)), logs)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_nearly_all_tokens_kept_is_nearly_the_whole_divergence(
    tmp_path: Path, teacher_model: SmartHaoAI, tiny_model: SmartHaoAI, kind: str
) -> None:
    """Guards: a cached loss that is another one than the teacher's own; fewer tokens may only lower the divergence."""
    batch, size = packed(tiny_model.config, seed=4, rows=3), tiny_model.config.vocab_size
    settings, loader = DistillConfig(kind=kind, alpha=1.0), Loader(teacher_model)

    def kl(teacher: Teacher | CachedTeacher) -> float:
        return distillation_loss(settings, teacher)(tiny_model, batch)[0].total.item()

    whole = kl(loader())
    assert kl(loader.cache(tmp_path / "most", size - 2)) == pytest.approx(whole, rel=2e-3)
    assert kl(loader.cache(tmp_path / "few", 4)) < whole


def test_a_record_that_was_cut_off_is_made_again(tmp_path: Path, teacher_model: SmartHaoAI) -> None:
    """Guards: a killed run whose half-written record is read as another document's, or hides those that follow."""
    loader, batch = Loader(teacher_model), packed(teacher_model.config, seed=6, rows=4)
    first = loader.cache(tmp_path)
    whole = first.top(batch)
    (file,) = tmp_path.glob("*.bin")
    file.write_bytes(file.read_bytes()[:-7])
    second = loader.cache(tmp_path)
    assert len(second) == len(first) - 1
    for before, after in zip(whole, second.top(batch), strict=True):
        assert torch.equal(before, after)
    assert loader.loads == 2 and len(loader.cache(tmp_path)) == len(first)


def test_documents_are_known_by_tokens_and_labels(tiny_config: HaoAIConfig) -> None:
    """Guards: one digest for two documents, padding and unlearned documents in the cache."""
    batch = packed(tiny_config, seed=7, rows=3)
    documents = labelled_documents(batch)
    assert sum(count for _, count in documents) == batch.weights["tokens"] and len({d for d, _ in documents}) == len(documents) == 5
    batch.inputs["labels"][1, -1] = -100
    batch.inputs["labels"][2, :] = -100
    assert len(set(labelled_documents(batch)) & set(documents)) < 4


def test_the_cache_belongs_to_one_teacher(tmp_path: Path, tiny_model: SmartHaoAI, tiny_tokenizer: BPETokenizer) -> None:
    """Guards: distributions of yesterday's weights, of another temperature or k."""
    tiny_model.save_pretrained(tmp_path / "a", tiny_tokenizer)
    first = cache_folder("store", tmp_path / "a", 400, 2.0, 8)
    tiny_model.norm.weight.data += 0.1
    tiny_model.save_pretrained(tmp_path / "b", tiny_tokenizer)
    assert len({first, cache_folder("store", tmp_path / "b", 400, 2.0, 8), cache_folder("store", tmp_path / "a", 400, 1.0, 8)}) == 3
    assert cache_folder("store", tmp_path / "a", 399, 2.0, 8) != first, "probabilities of others and of fewer tokens"
    assert cache_folder("store", tmp_path / "a", 400, 2.0, 4) != first == cache_folder("store", tmp_path / "a", 400, 2.0, 8)


# ---------------------------------------------------------------- structure tokens


class One:
    """A source of one batch."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def next_batch(self, progress: float = 1.0) -> Batch:
        return Batch(dict(self.batch.inputs), dict(self.batch.weights), self.batch.positions, self.batch.real)

    def rows_per_epoch(self) -> float:
        return 1.0

    def state_dict(self) -> dict[str, Any]:
        return {"at": 3}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def test_structure_tokens_weigh_more_and_the_loss_stays_a_mean(tiny_model: SmartHaoAI, tiny_tokenizer: BPETokenizer) -> None:
    """Guards: weights on the wrong side of a label, on prompts, or in the sum but not in what it is divided by."""
    words = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": "because"}]
    rendered = tiny_tokenizer.render(words)
    row = Row()
    row.add(np.array(rendered.ids), np.array(rendered.loss_mask))
    plain = collate([row], 0)
    ids = structure_ids(tiny_tokenizer)
    assert {tiny_tokenizer.token_id(t) for t in ("<think>", "</think>", "<|im_end|>")} <= set(ids)
    source = WeightedStructure(One(plain), ids, 10.0)
    batch = source.next_batch()
    logits = tiny_model(plain.inputs["input_ids"]).logits[0].detach().double().log_softmax(-1)
    total = weight_sum = 0.0
    for t in range(1, len(rendered.ids)):
        if rendered.loss_mask[t]:
            weight = 10.0 if rendered.ids[t] in ids else 1.0
            total, weight_sum = total - weight * float(logits[t - 1, rendered.ids[t]]), weight_sum + weight
    assert batch.weights["tokens"] == weight_sum > plain.weights["tokens"] + 20
    (term,) = lm_loss(tiny_model, batch)
    assert term.total.item() == pytest.approx(total, rel=1e-5)
    assert tiny_model(**batch.inputs).loss.item() == pytest.approx(total / weight_sum, rel=1e-5)
    assert source.state_dict() == {"at": 3} and "token_weights" not in plain.inputs


def test_the_teachers_share_is_weighted_too(tiny_model: SmartHaoAI, teacher_model: SmartHaoAI) -> None:
    """Guards: a structure weight that vanishes with alpha = 1."""
    batch = packed(tiny_model.config, seed=8)
    loss = distillation_loss(DistillConfig(alpha=1.0), Teacher(teacher_model, tiny_model.config.vocab_size, 2.0))
    plain = loss(tiny_model, batch)[0].total.item()
    batch.inputs["token_weights"] = torch.full(batch.inputs["labels"].shape, 3.0)
    assert loss(tiny_model, batch)[0].total.item() == pytest.approx(3 * plain, rel=1e-5)


# ---------------------------------------------------------------- the stage

SMALL = [*FAST, "train.max_steps=4", "train.log_every=1", "train.checkpoint_every=2", "distill.temperature=1.5"]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_tokenizer: BPETokenizer) -> Any:
    """command(words...) -> (status, stdout, stderr) in a folder with data and a finished teacher in weight/sft."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HAOAI_DEBUG", raising=False)
    write_jsonl(tmp_path / "training_data" / "sft" / "c.jsonl", chat_rows(40))
    write_jsonl(tmp_path / "training_data" / "pretrain" / "a.jsonl", text_rows(40))
    torch.manual_seed(1)
    shape = HaoAIConfig(vocab_size=tiny_tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=32, max_position_embeddings=64)
    SmartHaoAI(shape).save_pretrained(tmp_path / "weight" / "sft", tiny_tokenizer)
    return lambda *words: call_main(train_distill.main, words, capsys, monkeypatch)


@pytest.mark.parametrize("data", ["sft", "pretrain"])
def test_the_stage_trains_a_student(command: Any, tmp_path: Path, data: str) -> None:
    """Guards: the defaults (newest teacher, its tokenizer, a new student), metrics, and a finished checkpoint."""
    status, out, err = command(*SMALL, *TINY_SHAPE, f"distill.data={data}", "data.val_share=0.3")
    assert status == 0 and "teacher weight" in out, err
    rows = read_jsonl(tmp_path / "weight" / "distill" / "metrics.jsonl")
    assert len(rows) == 4
    for row in rows:
        assert row["loss"] == pytest.approx(0.5 * 1.5**2 * row["kl"] + 0.5 * row["hard_loss"], rel=1e-4)
    assert rows[-1]["val_loss"] > 0
    assert SmartHaoAI.from_pretrained(tmp_path / "weight" / "distill").config.n_layer == 2
    assert "teacher" in (tmp_path / "weight" / "distill" / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("top_k", [0, 6])
def test_a_resumed_run_equals_an_uninterrupted_one(command: Any, tmp_path: Path, top_k: int) -> None:
    """Guards: teacher values that depend on whether they were read from disk; a cursor lost in the weighted source."""
    words = [*SMALL, *TINY_SHAPE, f"distill.top_k={top_k}", "distill.structure_weight=4"]
    assert command(*words, "out_dir=whole", "data.store_dir=store1")[0] == 0
    assert command(*words, "out_dir=parts", "data.store_dir=store2")[0] == 0
    last = tmp_path / "parts" / "checkpoints" / "step_000004"
    assert last.is_dir()
    for file in [*last.iterdir()]:
        file.unlink()
    last.rmdir()
    assert command(*words, "out_dir=parts", "data.store_dir=store2", "--resume")[0] == 0
    whole, parts = ([(r["loss"], r["grad_norm"]) for r in read_jsonl(tmp_path / n / "metrics.jsonl")] for n in ("whole", "parts"))
    assert whole == parts and len(parts) == 4


def test_texts_alone(command: Any, tmp_path: Path) -> None:
    """Guards: traces of a foreign teacher need no checkpoint of it."""
    status, out, err = command(*SMALL, *TINY_SHAPE, "teacher_dir=none", "tokenizer_dir=weight/sft", "distill.structure_weight=5")
    assert status == 0 and "teacher weight" not in out, err
    assert "kl" not in read_jsonl(tmp_path / "weight" / "distill" / "metrics.jsonl")[-1]


def test_mistakes_are_named(command: Any, tmp_path: Path) -> None:
    """Guards: a teacher of other tokens, whose ids would be compared all the same; one that cannot read the rows."""
    other = BPETokenizer.train(["something else entirely, 别的东西"] * 4, vocab_size=300, progress=False)
    other.save_pretrained(tmp_path / "other")

    def error(*words: str) -> tuple[int, str]:
        status, _, err = command(*SMALL, *TINY_SHAPE, *words)
        return status, err

    assert "another vocabulary" in error("tokenizer_dir=other")[1]
    assert error("data.max_length=100") == (2, "error: data.max_length=100 exceeds the context of the teacher weight/sft, 64\n")
    assert "smaller than the vocabulary" in error("distill.top_k=4000")[1]
    assert "distill.kind" in error("distill.kind=sideways")[1] and error("distill.kind=sideways")[0] == 2
    assert "no model at" in error("teacher_dir=weight/nothing")[1]
    assert not (tmp_path / "weight" / "distill").exists()


def test_the_same_tokens_in_another_order_are_another_vocabulary(
    tmp_path: Path, tiny_model: SmartHaoAI, tiny_tokenizer: BPETokenizer
) -> None:
    """Guards: a check that only counts tokens."""
    tiny_model.save_pretrained(tmp_path, tiny_tokenizer)
    shared_vocabulary(tiny_tokenizer, tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = data["model"]["vocab"]
    first, second = sorted(vocab, key=vocab.get)[:2]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ValueError, match=r"another vocabulary .* id 0"):
        shared_vocabulary(tiny_tokenizer, tmp_path)


def test_defaults_can_be_parsed() -> None:
    """Guards: a default of the stage that its own check refuses."""
    from train.config import DistillStageConfig

    settings = DistillStageConfig()
    settings.check()
    assert isinstance(settings.train, OptimizationConfig) and settings.distill == DistillConfig()
