"""Bits per byte against a computation by hand, and the logs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_helpers import text_rows, write_jsonl

from model import BPETokenizer, SmartHaoAI
from train import metrics
from train.config import DataConfig, PretrainConfig
from train.data import IGNORE, evaluation_batches, make_source
from train.metrics import MetricsLog, _windows, bits_per_byte, held_out_loss, read_jsonl, write_report
from train.plotting import plot_loss
from train.store import open_store

TEXTS = [
    "小猫在窗边睡觉，阳光照在它的身上，它梦见了一条很大的鱼。" * 3,
    "The quick brown fox jumps over the lazy dog. " * 4,
    "a",
    "",
    "你好",
]


@torch.no_grad()
def nats_by_hand(model: SmartHaoAI, tokenizer: BPETokenizer, text: str, context: int, stride: int) -> float:
    """Token by token: the window that scores token t, one forward pass each, a full softmax in float64."""
    end, ids = tokenizer.document_end_id, tokenizer.encode(text)
    nats = 0.0
    for t, token in enumerate(ids):
        if stride == context:
            seen = [end, *ids[t - t % context : t]]
        else:
            last = context if t < context else context + (t - context) // stride * stride + stride  # tokens scored once this window is done
            stop = min(last, len(ids))
            seen = [end, *ids][max(0, stop - context) : t + 1]
        assert 1 <= len(seen) <= context
        logits = model(torch.tensor([seen])).logits[0, -1].double()
        nats -= float(torch.log_softmax(logits, dim=0)[token])
    return nats


@pytest.mark.parametrize(("context", "stride"), [(16, None), (16, 16), (16, 5), (8, 1), (256, None)])
def test_bits_per_byte_equal_a_computation_by_hand(
    tiny_model: SmartHaoAI, tiny_tokenizer: BPETokenizer, context: int, stride: int | None
) -> None:
    """Guards the windows, the softmax over the whole vocabulary, the division by UTF-8 bytes; Chinese has three a character."""
    got = bits_per_byte(tiny_model, tiny_tokenizer, TEXTS, context, stride)
    nats = sum(nats_by_hand(tiny_model, tiny_tokenizer, text, context, stride or context) for text in TEXTS)
    assert got.bytes == sum(len(text.encode("utf-8")) for text in TEXTS)
    assert got.tokens == sum(len(tiny_tokenizer.encode(text)) for text in TEXTS)
    assert got.nats == pytest.approx(nats, rel=1e-5) and got.bpb == pytest.approx(nats / math.log(2) / got.bytes, rel=1e-5)


def test_bits_per_byte_do_not_depend_on_batching(
    tiny_model: SmartHaoAI, tiny_tokenizer: BPETokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against padding or neighbours in a batch that change a text's score."""
    whole = bits_per_byte(tiny_model, tiny_tokenizer, TEXTS, 16, 7)
    monkeypatch.setattr(metrics, "EVALUATION_ROWS", 1)
    single = bits_per_byte(tiny_model, tiny_tokenizer, TEXTS[::-1], 16, 7)
    assert single.nats == pytest.approx(whole.nats, rel=1e-6) and (single.bytes, single.tokens) == (
        whole.bytes,
        whole.tokens,
    )
    assert bits_per_byte(tiny_model, tiny_tokenizer, [""], 16).bpb is None


@pytest.mark.parametrize(("context", "stride"), [(257, None), (16, 17), (16, 0), (0, None)])
def test_impossible_windows_are_refused(tiny_model: SmartHaoAI, tiny_tokenizer: BPETokenizer, context: int, stride: int | None) -> None:
    """Guards a message instead of a wrong figure for a context the model does not have."""
    with pytest.raises(ValueError, match="context"):
        bits_per_byte(tiny_model, tiny_tokenizer, TEXTS, context, stride)


@settings(max_examples=200, deadline=None)
@given(length=st.integers(0, 60), context=st.integers(1, 20), data=st.data())
def test_windows_score_every_token_once(length: int, context: int, data: st.DataObject) -> None:
    """Guards against tokens that are skipped or counted twice, or predicted from themselves or from a gap."""
    stride = data.draw(st.integers(1, context))
    sequence = list(range(1000, 1001 + length))  # token t stands at place t; 1000 is the document end
    scored = []
    for inputs, labels in _windows(sequence, context, stride):
        assert len(inputs) == len(labels) <= context
        places = [i for i, label in enumerate(labels) if label != IGNORE]
        scored += [labels[i] for i in places]
        assert places == list(range(places[0], len(labels)))
        for i in places:
            assert inputs[i] == labels[i] - 1 or (i == 0 and inputs[0] == 1000 and stride == context)
        assert all(b == a + 1 for a, b in zip(inputs[1:], inputs[2:], strict=False))
    assert scored == sequence[1:]


def test_held_out_loss_is_the_mean_over_tokens_and_bytes(tmp_path: Path, tiny_model: SmartHaoAI, tiny_tokenizer: BPETokenizer) -> None:
    """Guards val_loss and val_bpb against sums by hand over the same rows, independent of the batch size, and the model's mode."""
    file = write_jsonl(tmp_path / "t.jsonl", text_rows(12))
    store = open_store(
        str(file),
        tiny_tokenizer,
        "pretrain",
        DataConfig(store_dir=str(tmp_path / "s"), val_share=0.0),
        lambda text: None,
    )
    lengths = torch.tensor(tiny_tokenizer.token_byte_lengths())

    def measured(batch_size: int) -> dict[str, float]:
        settings = PretrainConfig(data=DataConfig(max_length=24))
        settings.train.batch_size = batch_size
        batches = evaluation_batches(make_source(store, settings, tiny_tokenizer.pad_token_id), 24 * 8)
        return held_out_loss(tiny_model, batches, lengths, "cpu")

    settings = PretrainConfig(data=DataConfig(max_length=24))
    settings.train.batch_size = 1
    nats = tokens = size = 0.0
    for batch in evaluation_batches(make_source(store, settings, tiny_tokenizer.pad_token_id), 24 * 8):
        ids, segments = batch.inputs["input_ids"][0], batch.inputs["segment_ids"][0]
        for segment in segments.unique():
            own = ids[segments == segment]
            with torch.no_grad():
                log_probs = torch.log_softmax(tiny_model.eval()(own[None]).logits[0].double(), dim=-1)
            nats -= float(log_probs[:-1].gather(1, own[1:, None]).sum())
            tokens += len(own) - 1
            size += sum(len(tiny_tokenizer.token_bytes(t)) for t in own[1:].tolist() if t != tiny_tokenizer.document_end_id)
    for batch_size in (1, 4):
        got = measured(batch_size)
        assert got["val_loss"] == pytest.approx(nats / tokens, rel=1e-5) and got["val_bpb"] == pytest.approx(
            nats / math.log(2) / size, rel=1e-5
        )
    assert tiny_model.training


def test_token_lengths_are_those_of_the_text(tiny_tokenizer: BPETokenizer) -> None:
    """Guards the denominator of val_bpb: token lengths add up to the text's bytes, control tokens count as nothing."""
    lengths = tiny_tokenizer.token_byte_lengths()
    for text in TEXTS:
        assert sum(lengths[i] for i in tiny_tokenizer.encode(text)) == len(text.encode("utf-8"))
    assert lengths[tiny_tokenizer.document_end_id] == lengths[tiny_tokenizer.im_end_id] == 0


def test_logs_survive_a_torn_line_and_strange_line_ends(tmp_path: Path) -> None:
    """Guards reading back: U+2028 inside a sample is no line end, a line cut inside a character is dropped alone."""
    log = MetricsLog(tmp_path)
    log.add({"step": 1, "loss": 2.0})
    log.event(1, "sample", answer="a\u2028b\x85c\nd")
    log.event(2, "sample", answer="later")
    log.close()
    with open(tmp_path / "events.jsonl", "ab") as file:
        file.write('{"step": 3, "answer": "猫'.encode()[:-1])
    events = read_jsonl(tmp_path / "events.jsonl")
    assert [e["step"] for e in events] == [1, 2] and events[0]["answer"] == "a\u2028b\x85c\nd"
    MetricsLog(tmp_path, 1).close()
    assert [e["step"] for e in read_jsonl(tmp_path / "events.jsonl")] == [1]
    assert read_jsonl(tmp_path / "missing.jsonl") == []


def test_plot_and_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the plot of an empty and of a short run, a point from before the first step, and that the report leaves out what is not
    known."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    assert plot_loss([], tmp_path / "empty.png", "no rows yet")
    assert plot_loss(
        [{"tokens": 5, "loss": 1.0, "lr": 0.1, "val_loss": 2.0}, {"tokens": 9, "loss": None, "lr": 0.1}],
        tmp_path / "a.png",
        "one",
    )
    assert (tmp_path / "a.png").stat().st_size > 1000
    lines: dict[str, int] = {}

    def points(figure: Any) -> dict[str, int]:
        return {line.get_label(): len(line.get_xdata()) for line in figure.axes[0].get_lines()}

    monkeypatch.setattr(pyplot, "close", lambda figure: lines.update(points(figure)))
    assert plot_loss(
        [{"step": 0, "tokens": 0, "loss": None, "lr": None, "val_loss": 3.0}, {"tokens": 5, "loss": 1.0}], tmp_path / "b.png", ""
    )
    assert lines == {"training loss": 1, "held-out loss": 1}
    write_report(tmp_path, "运行", {"parameters": "1", "held-out loss": None}, [("从前", "有一天\n")], 90)
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert (
        "# 运行" in report and "- parameters: 1" in report and "held-out" not in report and "有一天" in report and "1.5 minutes" in report
    )
