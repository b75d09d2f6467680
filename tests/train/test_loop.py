"""The loop: accumulation, resuming, non-finite steps, and what a run leaves behind."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from training_helpers import chat_rows, text_rows, write_jsonl

from model import BPETokenizer, HaoAIConfig, SmartHaoAI
from train import loop, planning, record
from train.checkpoints import list_checkpoints
from train.config import DataConfig, OptimizationConfig, PretrainConfig, SFTConfig, StageConfig, to_dict
from train.data import Batch, Row, collate, make_source
from train.loop import FitResult, fit
from train.losses import Term, lm_loss
from train.metrics import OF_THE_MACHINE, read_jsonl
from train.runtime import StopRequest
from train.store import TokenStore, open_store

KEYS = {
    "step",
    "tokens",
    "loss",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "real_token_share",
    "val_loss",
    "val_bpb",
    "peak_memory_mb",
}
Fit = Callable[..., tuple[SmartHaoAI, FitResult]]


@pytest.fixture
def stores(tmp_path: Path, tiny_tokenizer: BPETokenizer) -> dict[str, TokenStore]:
    data = DataConfig(store_dir=str(tmp_path / "store"), val_share=0.0)
    quiet: Callable[[str], object] = lambda text: None  # noqa: E731
    return {
        "pretrain": open_store(str(write_jsonl(tmp_path / "t.jsonl", text_rows(30))), tiny_tokenizer, "pretrain", data, quiet),
        "sft": open_store(str(write_jsonl(tmp_path / "c.jsonl", chat_rows(60))), tiny_tokenizer, "sft", data, quiet),
    }


@pytest.fixture
def run(tmp_path: Path, stores: dict[str, TokenStore], tiny_tokenizer: BPETokenizer) -> Fit:
    """run(name, kind, resume=..., loss=..., dropout=..., **train settings) -> (model, result) in tmp_path / name."""

    def run(
        name: str,
        kind: str = "pretrain",
        resume: bool = False,
        loss: Any = lm_loss,
        dropout: float = 0.0,
        evaluate: Any = None,
        sample: Any = None,
        prepare: Any = None,
        max_length: int = 32,
        **train: Any,
    ) -> tuple[SmartHaoAI, FitResult]:
        options = {
            "precision": "fp32",
            "batch_size": 2,
            "max_steps": 8,
            "log_every": 3,
            "checkpoint_every": 0,
            "checkpoint_minutes": 0,
            "warmup_steps": 2,
            "lr": 3e-3,
            "keep_checkpoints": 50,
            **train,
        }
        settings: StageConfig = (PretrainConfig if kind == "pretrain" else SFTConfig)(
            out_dir=str(tmp_path / name),
            data=DataConfig(max_length=max_length),
            train=OptimizationConfig(**options),
            resume=resume,
        )
        torch.manual_seed(0)
        model = SmartHaoAI(
            HaoAIConfig(
                vocab_size=tiny_tokenizer.vocab_size,
                n_layer=2,
                n_head=2,
                n_kv_head=1,
                n_embd=16,
                intermediate_size=32,
                max_position_embeddings=256,
                dropout=dropout,
                attention_dropout=dropout,
            )
        )
        source = make_source(stores[kind], settings, tiny_tokenizer.pad_token_id)
        hooks = {"sample": sample, "prepare": prepare}
        return model, fit(settings, model, source, loss, evaluate, tokenizer=tiny_tokenizer, log=lambda text: None, **hooks)

    return run


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in OF_THE_MACHINE} for row in read_jsonl(folder / "metrics.jsonl")]


def largest_difference(first: SmartHaoAI, second: SmartHaoAI) -> float:
    return max(float((a - b).detach().abs().max()) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_eight_rows_or_four_times_two(run: Fit, tmp_path: Path, optimizer: str) -> None:
    """Guards token-weighted accumulation: micro-batches with unequal numbers of learned tokens count by token, not by batch."""
    whole, _ = run("8x1", "sft", batch_size=8, accumulation_steps=1, log_every=1, optimizer=optimizer, max_steps=4)
    split, _ = run("2x4", "sft", batch_size=2, accumulation_steps=4, log_every=1, optimizer=optimizer, max_steps=4)
    for a, b in zip(rows_of(tmp_path / "8x1"), rows_of(tmp_path / "2x4"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["tokens"] == b["tokens"]
    assert largest_difference(whole, split) < 1e-5


def test_micro_batches_have_unequal_weights(stores: dict[str, TokenStore], tiny_tokenizer: BPETokenizer) -> None:
    """Guards the test above: it would prove nothing if every micro-batch held as many learned tokens."""
    settings = SFTConfig(data=DataConfig(max_length=32), train=OptimizationConfig(batch_size=2, accumulation_steps=4))
    source = make_source(stores["sft"], settings, tiny_tokenizer.pad_token_id)
    assert len({source.next_batch(0.0).weights["tokens"] for _ in range(4)}) > 1


def test_overfitting_one_document(run: Fit, stores: dict[str, TokenStore], tmp_path: Path, tiny_tokenizer: BPETokenizer) -> None:
    """Guards that the whole of model, loss, optimiser and schedule learns: one document is known by heart."""
    file = write_jsonl(tmp_path / "one.jsonl", [{"text": "小猫在窗边睡觉，它梦见了一条鱼。"}])
    stores["pretrain"] = open_store(
        str(file),
        tiny_tokenizer,
        "pretrain",
        DataConfig(store_dir=str(tmp_path / "one"), val_share=0.0),
        lambda text: None,
    )
    for optimizer in ("adamw", "muon"):
        _, result = run(optimizer, optimizer=optimizer, lr=0.02, max_steps=80, batch_size=1, log_every=10)
        assert result.last["loss"] < 0.1, optimizer


def stopping(requests: list[StopRequest], at: int) -> Any:
    """lm_loss that asks the newest run to stop at this call."""
    calls = []

    def loss(model: SmartHaoAI, batch: Batch) -> list[Term]:
        calls.append(1)
        requests[-1].requested |= len(calls) == at
        return lm_loss(model, batch)

    return loss


@pytest.mark.parametrize("kind", ["pretrain", "sft"])
def test_rows_computed_at_once_change_nothing(run: Fit, tmp_path: Path, kind: str) -> None:
    """Guards tokens lost, counted twice or weighed by piece when a micro-batch is computed in parts, the last one smaller."""
    whole, _ = run("whole", kind, batch_size=7, log_every=1, max_steps=4)
    split, _ = run("split", kind, batch_size=7, log_every=1, max_steps=4, micro_batch=2)
    for a, b in zip(rows_of(tmp_path / "whole"), rows_of(tmp_path / "split"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["tokens"] == b["tokens"] and a["real_token_share"] == b["real_token_share"]
    assert largest_difference(whole, split) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_blocks_learn_the_same(run: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """Guards a fast path that computes something else, or runs with blocks that are compiled for another shape; and one that is given up
    or measured anew when the run is resumed."""
    options: dict[str, Any] = {"precision": precision, "log_every": 1, "compile": "on", "checkpoint_every": 4}
    evaluate = lambda model: {"val_loss": float(model(torch.arange(9)[None]).logits.detach().sum()), "val_bpb": 1.0}  # noqa: E731
    run("eager", **{**options, "compile": "off"}, evaluate=evaluate)
    compiled, _ = run("compiled", **options, evaluate=evaluate)
    tolerance = 1e-4 if precision == "fp32" else 0.02
    for a, b in zip(rows_of(tmp_path / "eager"), rows_of(tmp_path / "compiled"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=tolerance) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=tolerance)
    if precision == "fp32":
        shutil.rmtree(tmp_path / "compiled" / "checkpoints" / "step_000008")
        monkeypatch.setattr(planning, "try_compiled", None)
        resumed, _ = run("compiled", **options, evaluate=evaluate, resume=True)
        assert largest_difference(compiled, resumed) == 0.0


@pytest.mark.parametrize(
    ("kind", "optimizer", "stops"),
    [("pretrain", "adamw", [4]), ("pretrain", "muon", [1, 5]), ("sft", "adamw", [2, 7]), ("sft", "muon", [5])],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    run: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, optimizer: str, stops: list[int]
) -> None:
    """Guards weights, optimiser, random states, cursor and the rows of metrics.jsonl, with dropout and accumulation, at steps
    that fall between two logged rows."""
    options: dict[str, Any] = {
        "optimizer": optimizer,
        "dropout": 0.2,
        "accumulation_steps": 2,
        "eval_every": 4,
        "evaluate": lambda model: {"val_loss": float(next(model.parameters()).detach().sum()), "val_bpb": 1.0},
    }
    straight, result = run("straight", kind, **options)
    original = loop.StopRequest.installed
    requests: list[StopRequest] = []

    def installed(self: StopRequest) -> Any:
        requests.append(self)
        return original(self)

    monkeypatch.setattr(loop.StopRequest, "installed", installed)
    for before, stop_at in zip([0, *stops], stops, strict=False):
        _, stopped = run("parts", kind, resume=before > 0, loss=stopping(requests, 2 * (stop_at - before)), **options)
        assert stopped.interrupted and stopped.step == stop_at
    resumed, again = run("parts", kind, resume=True, **options)
    assert not again.interrupted and (again.step, again.tokens) == (result.step, result.tokens)
    assert largest_difference(straight, resumed) == 0.0
    assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "straight")
    assert [p.name for p in list_checkpoints(tmp_path / "parts")] == [f"step_{s:06d}" for s in [*stops, 8]]


def test_a_metric_is_logged_and_changes_nothing(run: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards metric terms: over their own weight, summed over micro-batches and the steps of a row, never differentiated, and kept over
    a stop between two rows."""

    def measured(model: SmartHaoAI, batch: Batch) -> list[Term]:
        loss = lm_loss(model, batch)[0]
        norm = next(model.parameters()).square().sum()
        return [loss, Term("again", loss.total * 2, "tokens", metric=True), Term("norm", norm, "micro_batches", metric=True)]

    options: dict[str, Any] = {"accumulation_steps": 2, "max_steps": 6}
    plain, _ = run("plain", "sft", **options)
    watched, _ = run("watched", "sft", loss=measured, **options)
    assert largest_difference(plain, watched) == 0.0
    rows = rows_of(tmp_path / "watched")
    assert len(rows) == 2 and all(row["again"] == pytest.approx(2 * row["loss"], rel=1e-6) for row in rows)
    assert all(0 < row["norm"] < 100 for row in rows)
    stop = loop.StopRequest()
    calls: list[int] = []

    def stopped(model: SmartHaoAI, batch: Batch) -> list[Term]:
        calls.append(1)
        stop.requested |= len(calls) == 4
        return measured(model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "StopRequest", lambda: stop)
        assert run("parts", "sft", loss=stopped, **options)[1].step == 2
    run("parts", "sft", loss=measured, resume=True, **options)
    assert rows_of(tmp_path / "parts") == rows


def test_prepare_sees_the_starting_weights(run: Fit, tmp_path: Path) -> None:
    """Guards references: asked for once, before the first step, and again on resuming with the weights the model came with."""
    seen: list[tuple[float, str]] = []

    def prepare(model: SmartHaoAI, precision: Any) -> None:
        seen.append((float(next(model.parameters()).detach().sum()), precision.name))
        torch.rand(7)  # what it draws must not change the run

    plain, _ = run("plain", dropout=0.2, max_steps=4)
    prepared, _ = run("prepared", dropout=0.2, max_steps=4, prepare=prepare)
    assert largest_difference(plain, prepared) == 0.0
    run("prepared", dropout=0.2, max_steps=5, resume=True, prepare=prepare)
    assert len(seen) == 2 and seen[0] == seen[1] and seen[0][1] == "fp32"
    assert seen[0][0] != float(next(prepared.parameters()).detach().sum())


def test_rows_after_the_checkpoint_are_not_doubled(run: Fit, tmp_path: Path) -> None:
    """Guards against doubled rows and events when a crash came after the checkpoint, and against a torn last line."""
    run("run", checkpoint_every=4, log_every=1, max_steps=7)
    out = tmp_path / "run"
    (out / "checkpoints" / "step_000007" / "state.json").unlink()
    with open(out / "metrics.jsonl", "ab") as file:
        file.write('{"step": 8, "note": "猫'.encode()[:-1])
    run("run", resume=True, checkpoint_every=4, log_every=1, max_steps=7)
    assert [row["step"] for row in read_jsonl(out / "metrics.jsonl")] == list(range(1, 8))


def test_resuming_a_finished_run_changes_nothing(run: Fit, tmp_path: Path) -> None:
    """Guards against losing the last figures (and the report) when a finished run is resumed once more."""
    first, result = run("run")
    second, again = run("run", resume=True)
    assert largest_difference(first, second) == 0.0 and again.last["loss"] == result.last["loss"]


def poisoned(bad_steps: set[int], value: float) -> Any:
    """lm_loss that is not finite at these calls (counted from 1)."""
    calls = []

    def loss(model: SmartHaoAI, batch: Batch) -> list[Term]:
        calls.append(1)
        term = lm_loss(model, batch)[0]
        return [Term("loss", term.total * value if len(calls) in bad_steps else term.total, term.weight)]

    return loss


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_skipped(run: Fit, tmp_path: Path, value: float) -> None:
    """Guards the weights, the log (valid JSON, no NaN in the row) and the count of skipped steps."""
    before, _ = run("before", max_steps=3, log_every=1, warmup_steps=0, schedule="constant")
    after, result = run("after", max_steps=4, log_every=2, warmup_steps=0, schedule="constant", loss=poisoned({4}, value))
    assert largest_difference(before, after) == 0.0
    events = read_jsonl(tmp_path / "after" / "events.jsonl")
    assert [(e["step"], e["event"]) for e in events] == [(4, "skipped")]
    rows = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "after" / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [row["skipped"] for row in rows] == [0, 1] and all(
        math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in rows
    )
    assert result.step == 4


def test_several_bad_steps_in_a_row_stop_the_run(run: Fit) -> None:
    """Guards against a run that goes on for hours without learning; single bad steps in between do not add up."""
    with pytest.raises(ValueError, match=r"3 steps in a row.*train\.lr"):
        run("bad", loss=poisoned(set(range(3, 99)), math.nan), max_skipped_steps=2)
    _, result = run("good", loss=poisoned({2, 4, 6, 8}, math.nan), max_skipped_steps=2)
    assert result.step == 8


@torch.no_grad()
def test_a_packed_rows_loss_is_that_of_its_documents(tiny_model: SmartHaoAI) -> None:
    """Guards against attention, positions or labels that cross documents in a packed row."""
    random = torch.Generator().manual_seed(2)
    documents = [torch.randint(1, 300, (n,), generator=random).numpy() for n in (5, 9, 2, 12)]
    packed = Row()
    for ids in documents:
        packed.add(ids, None)
    whole = lm_loss(tiny_model, collate([packed], 0, 40))[0]
    separate = 0.0
    for ids in documents:
        logits = tiny_model(torch.from_numpy(ids)[None]).logits[0].double()
        separate += float(torch.nn.functional.cross_entropy(logits[:-1], torch.from_numpy(ids)[1:], reduction="sum"))
    assert float(whole.total) == pytest.approx(separate, rel=1e-5)
    assert collate([packed], 0, 40).weights[whole.weight] == 5 + 9 + 2 + 12 - 4


def test_what_a_run_leaves(run: Fit, tmp_path: Path) -> None:
    """Guards the keys of metrics.jsonl, the settings, the plot, samples, and the number of kept checkpoints."""
    pytest.importorskip("matplotlib")
    _, result = run(
        "run",
        evaluate=lambda model: {"val_loss": 2.5, "val_bpb": 1.5},
        eval_every=4,
        checkpoint_every=2,
        keep_checkpoints=2,
        sample=lambda model: [("从前", "有\u2028一只猫")],
    )
    out = tmp_path / "run"
    rows = read_jsonl(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [3, 4, 6, 8] and all(set(row) >= KEYS for row in rows)
    assert [row["val_loss"] for row in rows] == [None, 2.5, None, 2.5]
    assert rows[-1]["tokens"] == result.tokens == 8 * 2 * 32 and rows[-1]["real_token_share"] == 1.0
    assert yaml.safe_load((out / "run.yaml").read_text(encoding="utf-8"))["train"] == to_dict(
        OptimizationConfig(
            precision="fp32",
            batch_size=2,
            max_steps=8,
            log_every=3,
            checkpoint_every=2,
            checkpoint_minutes=0,
            warmup_steps=2,
            lr=3e-3,
            keep_checkpoints=2,
            eval_every=4,
        )
    )
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert [p.name for p in list_checkpoints(out)] == ["step_000006", "step_000008"]
    assert [e["answer"] for e in read_jsonl(out / "events.jsonl")] == ["有\u2028一只猫"]
    assert result.last["val_bpb"] == 1.5


def test_figures_from_before_the_first_step(run: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards eval_first: one row of step 0 with the weights the model came with, also after a stop and when a run that was killed
    before its first checkpoint begins anew; it changes nothing in the run, and the plot shows it."""
    seen: list[float] = []

    def evaluate(model: SmartHaoAI) -> dict[str, float]:
        seen.append(float(next(model.parameters()).detach().sum()))
        return {"val_loss": seen[-1]}

    drawn: list[Any] = []
    monkeypatch.setattr(record, "plot_loss", lambda rows, *more: drawn.append([row["step"] for row in rows]))
    options: dict[str, Any] = {"evaluate": evaluate, "dropout": 0.2, "max_steps": 5, "eval_every": 3}
    plain, _ = run("plain", **options)
    seen.clear()
    first, result = run("first", eval_first=True, **options)
    rows = rows_of(tmp_path / "first")
    assert rows[1:] == rows_of(tmp_path / "plain") and largest_difference(plain, first) == 0.0
    assert [row["step"] for row in rows] == [0, 3, 5] == drawn[-1] and rows[0]["tokens"] == 0
    assert (rows[0]["val_loss"], rows[0]["loss"], rows[0]["lr"]) == (seen[0], None, None) and len(set(seen)) == 3
    assert result.last["val_loss"] == seen[-1]
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "metrics.jsonl").write_text('{"step": 0, "val_loss": 9.0}\n{"step": 3, "loss": 9.0}\n', encoding="utf-8")
    run("killed", eval_first=True, resume=True, **{**options, "max_steps": 3})
    run("killed", eval_first=True, resume=True, **options)
    resumed = rows_of(tmp_path / "killed")
    assert [row["step"] for row in resumed] == [0, 3, 5] and resumed[0] == rows[0]
    run("nothing held out", eval_first=True, **{**options, "evaluate": None})
    assert [row["step"] for row in rows_of(tmp_path / "nothing held out")] == [3, 5]


def test_epochs_give_the_number_of_steps(run: Fit, stores: dict[str, TokenStore]) -> None:
    """Guards the length of a run that is set by epochs."""
    _, result = run("run", max_steps=0, epochs=0.5, batch_size=4, accumulation_steps=2)
    assert result.step == round(0.5 * stores["pretrain"].train.token_count / 32 / 8)


def test_a_time_budget_gives_steps_and_ends(run: Fit) -> None:
    """Guards the plan of a time budget: some steps, and an end near the budget however fast the machine is."""
    _, result = run("run", max_steps=0, max_minutes=0.02, batch_size=2)
    assert 1 <= result.step == result.total_steps and result.seconds < 1.2 * 2
