"""Preference optimisation: the first loss, the losses' wiring, the command, and resuming."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_helpers import FAST, call_main, chat_rows, pair_rows, write_jsonl

from model import BPETokenizer, HaoAIConfig, SmartHaoAI
from train import loop, record, train_dpo, train_sft
from train.config import DPO_BETAS, DataConfig, DPOConfig
from train.data import Batch
from train.metrics import OF_THE_MACHINE, held_out_terms, read_jsonl
from train.pairs import PackedPairs
from train.plotting import plot_loss
from train.reference import reference_log_probs, without_dropout
from train.runtime import Precision, StopRequest
from train.store import open_store
from train.train_dpo import WITHOUT_REFERENCE, preference_terms

FP32 = Precision("fp32", "cpu", "")
Command = Callable[..., tuple[int, str, str]]
SMALL = [*FAST, "train.max_steps=3", "train.log_every=1", "train.accumulation_steps=1", "data.max_length=64", "data.val_share=0.2"]


def quiet(text: str) -> None:
    pass


def source_of(folder: Path, tokenizer: BPETokenizer, kind: str = "preference", batch_size: int = 4, seed: int = 0) -> PackedPairs:
    rows = [*pair_rows(14), {"prompt": "q " * 10, "chosen": "fox dog " * 6, "rejected": "cat " * 9}]
    file = write_jsonl(folder / "p.jsonl", rows)
    store = open_store(str(file), tokenizer, kind, DataConfig(store_dir=str(folder / "store"), val_share=0.0), quiet)
    return PackedPairs(store, batch_size, 72, tokenizer.pad_token_id, seed)


def by_name(terms: list[Any], batch: Batch) -> dict[str, float]:
    return {term.name: float(term.total.detach()) / batch.weights.get(term.weight, 1.0) for term in terms}


def smart_config(tokenizer: BPETokenizer, **parts: Any) -> HaoAIConfig:
    shape = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "intermediate_size": 64, "max_position_embeddings": 128}
    return HaoAIConfig(**{"vocab_size": tokenizer.vocab_size, **shape, **parts})


@pytest.mark.parametrize("parts", [{}, {"use_reasoning": True, "reasoning_halt": 0.01}, {"n_expert": 4}])
def test_the_first_loss_is_ln_2(tmp_path: Path, tiny_tokenizer: BPETokenizer, seed: int, parts: dict[str, Any]) -> None:
    """Guards the reference: in fp32 it is the model itself to the last bit, over every batch of the first epoch."""
    model = SmartHaoAI(smart_config(tiny_tokenizer, **parts)).train()
    source = source_of(tmp_path, tiny_tokenizer, seed=seed % 100)
    reference = reference_log_probs(model, source, FP32, log=quiet)
    assert not reference.isnan().any() and float(reference.max()) < 0
    for _ in range(len(list(source.one_pass())) - 1):
        batch = source.next_batch()
        values = by_name(preference_terms(model.train(), batch, DPOConfig(), reference), batch)
        assert values["margin"] == values["chosen_reward"] == values["drift"] == 0.0 and values["accuracy"] == 0.5
        assert values["loss"] == pytest.approx(math.log(2), rel=1e-6)


def test_dropout_is_off_in_the_reference(tmp_path: Path, tiny_tokenizer: BPETokenizer) -> None:
    """Guards against references that are noise, and against dropout that stays off afterwards."""
    source = source_of(tmp_path, tiny_tokenizer)
    plain, noisy = (SmartHaoAI(smart_config(tiny_tokenizer, dropout=rate, attention_dropout=rate)) for rate in (0.0, 0.5))
    noisy.load_state_dict(plain.state_dict())
    expected = reference_log_probs(plain, source, FP32, log=quiet)
    assert torch.equal(expected, reference_log_probs(noisy, source, FP32, log=quiet))
    ids = torch.arange(20)[None]
    noisy.train()
    with without_dropout(noisy):
        assert torch.equal(noisy(ids).logits, noisy(ids).logits)
    assert not torch.equal(noisy(ids).logits, noisy(ids).logits)


def test_the_cache_belongs_to_its_model(tmp_path: Path, tiny_tokenizer: BPETokenizer, tiny_model: SmartHaoAI) -> None:
    """Guards against the references of another model, and against computing the same twice."""
    source = source_of(tmp_path, tiny_tokenizer)
    said: list[str] = []
    first = reference_log_probs(tiny_model, source, FP32, log=said.append)
    assert torch.equal(first, reference_log_probs(tiny_model, source, FP32, log=said.append)) and computed(said) == 1
    with torch.no_grad():
        tiny_model.embed_tokens.weight[7] += 0.1
    assert not torch.equal(first, reference_log_probs(tiny_model, source, FP32, log=said.append)) and computed(said) == 2


def computed(said: list[str]) -> int:
    return sum(line.startswith("computing") for line in said)


def answer_log_probs(model: SmartHaoAI, source: PackedPairs, document: int) -> tuple[float, int]:
    """Log-probability of an answer in float64, its sequence alone in a row, and its number of tokens."""
    ids = torch.from_numpy(source.documents.split.tokens(document).astype("int64"))
    mask = torch.from_numpy(source.documents.split.mask(document).astype(bool))  # type: ignore[union-attr]
    with torch.no_grad():
        log_probs = model.double()(ids[None]).logits[0].log_softmax(-1)
    model.float()
    found = log_probs[:-1].gather(1, ids[1:, None])[:, 0][mask[1:]]
    return float(found.sum()), len(found)


@pytest.mark.parametrize("name", sorted(DPO_BETAS))
def test_losses_and_metrics_against_float64(tmp_path: Path, tiny_tokenizer: BPETokenizer, seed: int, name: str) -> None:
    """Guards the wiring: sums or means, chosen and rejected, policy and reference, KTO's mismatched answers, and the metrics."""
    model = SmartHaoAI(smart_config(tiny_tokenizer)).train()
    source = source_of(tmp_path, tiny_tokenizer, "judged" if name == "kto" else "preference", batch_size=6)
    reference = -60 * torch.rand(len(source.documents.split))
    batch, settings = source.next_batch(), DPOConfig(loss=name, beta=0.3, gamma=0.7, unwanted_weight=0.5)
    got = by_name(preference_terms(model, batch, settings, reference), batch)
    documents = batch.extra["documents"].tolist()
    log_probs, lengths = zip(*(answer_log_probs(model, source, document) for document in documents), strict=True)
    refs = [float(reference[document]) for document in documents]

    def log_sigmoid(x: float) -> float:
        return -math.log1p(math.exp(-x))

    losses, margins, rewards = [], [], []
    shifts = [p - r for p, r in zip(log_probs, refs, strict=True)]
    kl = max(sum(shifts[1::2]) / len(shifts[1::2]), 0.0)
    for n in range(0, len(documents), 2):
        (dc, dr), (nc, nr) = shifts[n : n + 2], lengths[n : n + 2]
        mc, mr = log_probs[n] / nc, log_probs[n + 1] / nr
        if name == "dpo":
            losses.append(-log_sigmoid(0.3 * (dc - dr)))
        elif name == "ipo":
            losses.append((dc / nc - dr / nr - 1 / 0.6) ** 2)
            dc, dr = dc / nc, dr / nr
        elif name == "simpo":
            losses.append(-log_sigmoid(0.3 * (mc - mr) - 0.7))
        elif name == "orpo":
            odds = mc - mr - math.log1p(-math.exp(mc)) + math.log1p(-math.exp(mr))
            losses.append(-mc - 0.3 * log_sigmoid(odds))
        else:
            wanted = bool(batch.extra["wanted"][n // 2])
            losses.append((1.0 if wanted else 0.5) * (1 - 1 / (1 + math.exp(-(1 if wanted else -1) * 0.3 * (dc - kl)))))
        rewards.append(0.3 * (mc if name in ("simpo", "orpo") else dc))
        margins.append(rewards[-1] - 0.3 * (mr if name in ("simpo", "orpo") else dr))
    assert got["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    if name == "kto":
        verdicts = batch.extra["wanted"].tolist()
        chosen = [reward for reward, good in zip(rewards, verdicts, strict=True) if good]
        assert got["kl"] == pytest.approx(kl, rel=1e-5) and got["chosen_reward"] == pytest.approx(sum(chosen) / len(chosen), rel=1e-4)
        right = [(reward > 0.3 * kl) == good for reward, good in zip(rewards, verdicts, strict=True)]
        assert got["accuracy"] == pytest.approx(sum(right) / len(right))
        return
    assert got["margin"] == pytest.approx(sum(margins) / len(margins), rel=1e-4, abs=1e-5)
    assert got["accuracy"] == pytest.approx(sum(margin > 0 for margin in margins) / len(margins))
    if name in ("dpo", "ipo"):
        assert got["drift"] == pytest.approx(sum(map(abs, shifts)) / sum(lengths), rel=1e-4)


def test_held_out_terms_are_means_over_all_batches(tmp_path: Path, tiny_tokenizer: BPETokenizer, tiny_model: SmartHaoAI) -> None:
    """Guards evaluation: batches of different size count by their pairs, and the model trains on afterwards."""
    source = source_of(tmp_path, tiny_tokenizer)
    reference = -40 * torch.rand(len(source.documents.split))

    def loss(model: torch.nn.Module, batch: Batch) -> list[Any]:
        return preference_terms(model, batch, DPOConfig(), reference)

    batches = list(source.one_pass())
    assert len({batch.weights["pairs"] for batch in batches}) > 1
    got = held_out_terms(tiny_model, batches, loss, "cpu")
    assert tiny_model.training
    (whole,) = source_of(tmp_path, tiny_tokenizer, batch_size=100).one_pass()
    expected = by_name(loss(tiny_model.eval(), whole), whole)
    assert {name.removeprefix("val_"): value for name, value in got.items()} == pytest.approx(expected, rel=1e-5)


def test_the_plot_shows_accuracy_and_margin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards loss.png: a second panel for pairs, none for what has no accuracy, and gaps between evaluations."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    labels: list[dict[str, int]] = []

    def note(figure: Any) -> None:
        labels.append({line.get_label(): len(line.get_xdata()) for axis in figure.axes for line in axis.get_lines()})

    monkeypatch.setattr(pyplot, "close", note)
    rows = [{"step": n, "tokens": 1e5 * n, "loss": 0.7 - n / 50, "lr": 1e-5 * n} for n in range(1, 6)]
    judged = [{**row, "accuracy": 0.5 + row["step"] / 20, "margin": row["step"] / 9, "val_accuracy": None} for row in rows]
    judged[-1].update(val_accuracy=0.6, val_margin=0.1, val_loss=0.65)
    assert plot_loss(rows, tmp_path / "a.png", "a") and plot_loss(judged, tmp_path / "b.png", "b")
    assert (tmp_path / "b.png").read_bytes()[:4] == b"\x89PNG"
    assert "accuracy in training" not in labels[0] and labels[0]["training loss"] == 5
    assert labels[1]["accuracy in training"] == labels[1]["reward margin in training"] == 5
    assert labels[1]["held-out accuracy"] == labels[1]["held-out reward margin"] == labels[1]["held-out loss"] == 1


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def command(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_model: SmartHaoAI,
    tiny_tokenizer: BPETokenizer,
) -> Command:
    """command(words...) in a working directory with weight/sft and training_data/rlhf: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HAOAI_DEBUG", raising=False)
    monkeypatch.setattr(record, "plot_loss", lambda *arguments: True)  # a second each
    monkeypatch.setattr(train_sft, "SAMPLE_QUESTIONS", train_sft.SAMPLE_QUESTIONS[:1])
    tiny_model.save_pretrained(tmp_path / "weight" / "sft", tiny_tokenizer)
    write_jsonl(tmp_path / "training_data" / "rlhf" / "p.jsonl", pair_rows(40))
    return lambda *words: call_main(train_dpo.main, words, capsys, monkeypatch)


@pytest.mark.parametrize("name", sorted(DPO_BETAS))
def test_every_loss_runs_and_learns(command: Command, tmp_path: Path, name: str) -> None:
    """Guards the command without any path: start, reference, metrics, held-out figures, finished checkpoint; and that it learns."""
    words = ["train.max_steps=8", "train.lr=3e-3", "train.warmup_steps=0", "train.eval_every=4", f"dpo.loss={name}"]
    status, out, err = command(*SMALL, *words)
    assert status == 0 and "starting from weight/sft" in out, err
    before, *rows = read_jsonl(tmp_path / "weight" / "dpo" / "metrics.jsonl")
    assert before["step"] == 0 and (name in WITHOUT_REFERENCE or before["val_accuracy"] == 0.5)
    if name in ("dpo", "kto"):
        assert rows[0]["loss"] == pytest.approx(math.log(2) if name == "dpo" else 0.5, rel=1e-6)
        assert rows[0]["drift"] == 0.0 and rows[-1]["drift"] > 0.01
    assert rows[-1]["loss"] < 0.97 * rows[0]["loss"] and rows[-1]["accuracy"] > 0.7
    assert rows[-1]["val_loss"] < rows[3]["val_loss"] and 0 <= rows[-1]["val_accuracy"] <= 1
    assert ("margin" in rows[0]) == (name != "kto") and all("chosen_reward" in row and "rejected_reward" in row for row in rows)
    report = (tmp_path / "weight" / "dpo" / "report.md").read_text(encoding="utf-8")
    assert f"{name}, beta" in report and "95% interval" in report and "weight/sft" in report
    assert SmartHaoAI.from_pretrained(tmp_path / "weight" / "dpo").config.n_embd == 32
    caches = list((tmp_path / "weight" / "token_store").rglob("reference-*.safetensors"))
    assert len(caches) == (0 if name in ("simpo", "orpo") else 2)


def test_an_adapter_starts_from_its_base(command: Command, tmp_path: Path) -> None:
    """Guards lora.r: the frozen base is the reference, so that the first loss is ln 2 there, too."""
    pytest.importorskip("model.lora")
    status, _, err = command(*SMALL, "lora.r=2", "train.lr=1e-2", "train.warmup_steps=0", "train.max_steps=6")
    assert status == 0, err
    before, *rows = read_jsonl(tmp_path / "weight" / "dpo" / "metrics.jsonl")
    assert before["val_loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert rows[0]["loss"] == pytest.approx(math.log(2), rel=1e-6) and rows[-1]["drift"] > 0


@pytest.mark.parametrize("forget", [False, True])
@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_a_resumed_run_is_the_uninterrupted_one(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, forget: bool
) -> None:
    """Guards weights and rows after a stop, also when the kept references are gone: they must be those of the start, not of the
    checkpoint."""
    words = [*SMALL, f"dpo.loss={name}", "train.max_steps=6", "train.lr=3e-3", "train.log_every=2", "train.accumulation_steps=2"]
    assert command(*words, "out_dir=straight")[0] == 0
    original = loop._Fit._step
    calls: list[int] = []

    def stopping(self: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            requests[-1].requested = True
        return original(self)

    installed = StopRequest.installed
    requests: list[StopRequest] = []

    def noted(self: StopRequest) -> Any:
        requests.append(self)
        return installed(self)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Fit, "_step", stopping)
        patch.setattr(StopRequest, "installed", noted)
        assert command(*words, "out_dir=parts")[0] == 130
    if forget:
        for file in (tmp_path / "weight" / "token_store").rglob("reference-*.safetensors"):
            file.unlink()
    assert command(*words, "out_dir=parts", "--resume")[0] == 0
    straight, parts = (SmartHaoAI.from_pretrained(tmp_path / folder).state_dict() for folder in ("straight", "parts"))
    assert all(torch.equal(tensor, parts[key]) for key, tensor in straight.items())
    rows = [
        [{k: v for k, v in row.items() if k not in OF_THE_MACHINE} for row in read_jsonl(tmp_path / folder / "metrics.jsonl")]
        for folder in ("straight", "parts")
    ]
    assert rows[0] == rows[1] and [row["step"] for row in rows[0]] == [0, 2, 4, 6]


def test_eight_rows_or_four_times_two(command: Command, tmp_path: Path) -> None:
    """Guards accumulation by pairs: micro-batches with unequal numbers of pairs give the loss and gradient of the whole."""
    words = [*SMALL, "train.lr=1e-3", "train.eval_first=false"]
    assert command(*words, "out_dir=a", "train.batch_size=8", "train.accumulation_steps=1")[0] == 0
    assert command(*words, "out_dir=b", "train.batch_size=2", "train.accumulation_steps=4")[0] == 0
    for a, b in zip(*(read_jsonl(tmp_path / folder / "metrics.jsonl") for folder in "ab"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert a["accuracy"] == pytest.approx(b["accuracy"], abs=0.07) and a["tokens"] == b["tokens"]


def test_the_newest_chat_model(command: Command, tmp_path: Path, tiny_model: SmartHaoAI, tiny_tokenizer: BPETokenizer) -> None:
    """Guards the default start: reasoning after sft; --dry-run writes nothing and needs no reference."""
    tiny_model.save_pretrained(tmp_path / "weight" / "reasoning", tiny_tokenizer)
    status, out, err = command(*SMALL, "--dry-run")
    assert status == 0 and "starting from weight/reasoning" in out and "time" in out, err
    assert not (tmp_path / "weight" / "dpo").exists() and not list(tmp_path.rglob("reference-*"))


@pytest.mark.parametrize(
    ("words", "status", "parts"),
    [
        (["dpo.loss=dop"], 2, ["dpo.loss='dop'", "simpo"]),
        (["dpo.beta=-1"], 2, ["dpo.beta"]),
        (["dpo.label_smoothing=0.5"], 2, ["dpo.label_smoothing"]),
        (["dpo.bta=1"], 2, ["dpo.beta"]),
        (["data.preference_file=nowhere.jsonl"], 1, ["nowhere.jsonl"]),
        (["data.preference_file=chats.jsonl"], 1, ["chats.jsonl:1", "pair"]),
        (["data.preference_file=judged.jsonl"], 1, ["judged.jsonl:1", "pair"]),
        (["data.max_length=12"], 1, ["data.max_length=12", "p.jsonl:"]),
        (["data.val_file=nowhere.jsonl"], 1, ["nowhere.jsonl"]),
        (["model_dir=nowhere"], 1, ["nowhere"]),
    ],
)
def test_mistakes_are_one_line(command: Command, tmp_path: Path, words: list[str], status: int, parts: list[str]) -> None:
    """Guards against tracebacks and against an out_dir of a run that never began."""
    write_jsonl(tmp_path / "chats.jsonl", chat_rows(3))
    write_jsonl(tmp_path / "judged.jsonl", [{"prompt": "q", "completion": "a", "label": True}])
    got, _, err = command(*SMALL, *words)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert got == status and len(lines) == 1 and all(part in lines[0] for part in parts), err
    assert not (tmp_path / "weight" / "dpo").exists()
