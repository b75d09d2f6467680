"""Batches: nothing lost, nothing doubled, no padding where there need be none, and a cursor that resumes exactly."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_helpers import write_store

from model import HaoAIConfig, SmartHaoAI
from train.data import IGNORE, Batch, PackedConversations, PackedText, evaluation_batches, fit_rows
from train.losses import lm_loss
from train.store import TokenStore

PAD = 0


def numbered(lengths: list[int]) -> list[list[int]]:
    """Documents whose tokens are all different, from 1."""
    starts = np.cumsum([1, *lengths]).tolist()
    return [list(range(start, start + n)) for start, n in zip(starts, lengths, strict=False)]


def ids_of(batch: Batch) -> list[int]:
    """Real tokens of a batch in row order."""
    return batch.inputs["input_ids"][batch.inputs["segment_ids"] > 0].tolist()


def same(first: Batch, second: Batch) -> bool:
    return all(torch.equal(first.inputs[k], second.inputs[k]) for k in first.inputs) and first.weights == second.weights


@pytest.fixture(scope="module")
def text_store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return write_store(tmp_path_factory.mktemp("text"), numbered([3, 17, 40, 2, 9, 31, 5, 12]))


@pytest.fixture(scope="module")
def chat_store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    lengths = [5, 9, 14, 3, 16, 7, 7, 11, 40]
    masks = [[0] * (n // 2) + [1] * (n - n // 2 - 1) + [0] for n in lengths]
    return write_store(tmp_path_factory.mktemp("chat"), numbered(lengths), masks)


@pytest.mark.parametrize("length", [4, 7, 16, 50])
def test_an_epoch_of_text_holds_every_token_once(text_store: TokenStore, length: int) -> None:
    """Guards against lost or doubled tokens at the ends of rows; only what does not fill a row may be left out."""
    source, seen = PackedText(text_store, 1, length, PAD, seed=3), []
    while source.epoch == 0:
        batch = source.next_batch()
        if source.epoch == 1 and source.offset:
            break  # this row belongs to the next epoch
        assert batch.real == batch.positions == length and (batch.inputs["segment_ids"] > 0).all()
        seen += ids_of(batch)
    assert max(Counter(seen).values()) == 1
    assert text_store.train.token_count - len(seen) < length


def test_text_rows_know_their_documents(text_store: TokenStore) -> None:
    """Guards labels equal to tokens, and segments that change exactly where documents do."""
    documents = {token: i for i in range(len(text_store.train)) for token in text_store.train.tokens(i).tolist()}
    source = PackedText(text_store, 3, 20, PAD, seed=1)
    for _ in range(4):
        batch = source.next_batch()
        ids, segments = batch.inputs["input_ids"], batch.inputs["segment_ids"]
        assert torch.equal(batch.inputs["labels"], ids)
        for row in range(3):
            owner = [documents[t] for t in ids[row].tolist()]
            changes = [a != b for a, b in zip(owner, owner[1:], strict=False)]
            assert changes == (segments[row, 1:] != segments[row, :-1]).tolist()
        assert batch.weights == {"tokens": float((segments[:, 1:] == segments[:, :-1]).sum())}


def test_epochs_are_shuffled_differently_and_seeds_differ(text_store: TokenStore) -> None:
    """Guards against the same order in every epoch or for every seed."""

    def order(seed: int) -> list[list[int]]:
        documents = PackedText(text_store, 1, 8, PAD, seed).documents
        return [documents.order(epoch).tolist() for epoch in range(2)]

    assert order(0) == order(0) and order(0)[0] != order(0)[1] and order(0)[0] != order(1)[0]
    assert sorted(order(0)[0]) == list(range(8))


def test_short_rows_keep_the_tokens_of_a_batch(text_store: TokenStore) -> None:
    """Guards the curriculum: shorter rows come in larger number, and the switch loses nothing."""
    source = PackedText(text_store, 2, 16, PAD, short_length=4, short_share=0.5)
    shapes = [tuple(source.next_batch(p).inputs["input_ids"].shape) for p in (0.0, 0.49, 0.5, 1.0)]
    assert shapes == [(8, 4), (8, 4), (2, 16), (2, 16)]
    source.load_state_dict({"epoch": 0, "offset": 0})
    seen = ids_of(source.next_batch(0.0)) + ids_of(source.next_batch(1.0))
    assert len(set(seen)) == len(seen) == 64


def test_a_corpus_smaller_than_a_row(tmp_path: Path) -> None:
    """Guards against an endless loop or an empty batch for a few tokens of text."""
    source = PackedText(write_store(tmp_path, numbered([3, 4])), 2, 32, PAD)
    for _ in range(3):
        batch = source.next_batch()
        assert batch.positions == 64 and batch.real == 14 and batch.weights["tokens"] == 10
        assert (batch.inputs["labels"][batch.inputs["segment_ids"] == 0] == IGNORE).all()
    assert len(evaluation_batches(PackedText(write_store(tmp_path, numbered([3, 4])), 2, 32, PAD), 1000)) == 1


def test_weights_say_how_often_an_epoch_reads_a_source(tmp_path: Path) -> None:
    """Guards 2 (twice), 0.5 (another half each epoch) and 0 (never)."""
    store = write_store(tmp_path, numbered([2] * 24), sources=[8, 8, 8], weights=[2, 0.5, 0])
    source = PackedText(store, 1, 4, PAD)
    halves = []
    for epoch in range(6):
        counts = Counter(source.documents.order(epoch).tolist())
        assert [counts[d] for d in range(8)] == [2] * 8 and not any(counts[d] for d in range(16, 24))
        halves.append(frozenset(d for d in range(8, 16) if counts[d]))
        assert len(halves[-1]) == 4 and sum(counts.values()) == 20
    assert len(set(halves)) > 1 and source.rows_per_epoch() == 10
    with pytest.raises(ValueError, match="weight 0"):
        PackedText(write_store(tmp_path, numbered([2]), weights=[0]), 1, 4, PAD).next_batch()


@settings(max_examples=40, deadline=None)
@given(
    before=st.integers(0, 40),
    batch=st.integers(1, 4),
    length=st.integers(2, 45),
    short=st.booleans(),
    kind=st.booleans(),
)
def test_a_cursor_continues_exactly(
    text_store: TokenStore, chat_store: TokenStore, before: int, batch: int, length: int, short: bool, kind: bool
) -> None:
    """Guards resuming at any point, epochs and blocks included: the batches that follow are those of the uninterrupted run."""

    def source() -> Any:
        if kind:
            return PackedConversations(chat_store, batch, length, PAD, seed=5, rows_per_step=batch * 2)
        return PackedText(text_store, batch, length, PAD, 5, 2 if short else 0, 0.5)

    whole = source()
    for i in range(before):
        whole.next_batch(i / 40)
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = source()
    resumed.load_state_dict(state)
    for i in range(before, before + 4):
        assert same(whole.next_batch(i / 40), resumed.next_batch(i / 40))
    assert whole.state_dict() == resumed.state_dict()


def realistic(count: int) -> list[int]:
    return np.random.default_rng(0).lognormal(4.3, 0.8, count).clip(12, 500).astype(int).tolist()


def test_conversations_are_whole_once_per_epoch_and_rows_are_full(tmp_path: Path) -> None:
    """Guards whole conversations, each once per epoch, with at least 98% of all positions real."""
    lengths = realistic(3000)
    documents = [[1 + i % 60_000] * n for i, n in enumerate(lengths)]
    store = write_store(tmp_path, documents, [[0] * 4 + [1] * (n - 5) + [0] for n in lengths])
    source = PackedConversations(store, 4, 512, PAD, rows_per_step=8)
    seen: Counter[int] = Counter()
    positions = real = 0
    while source.epoch == 0:
        before = source.state_dict()
        batch = source.next_batch()
        if source.epoch == 1:  # the last rows are fewer than a batch
            single = PackedConversations(store, 1, 512, PAD, rows_per_step=8)
            single.load_state_dict(before)
            while (batch := single.next_batch()) and single.epoch == 0:
                seen.update(ids_of(batch))
            break
        positions, real = positions + batch.positions, real + batch.real
        segments, ids = batch.inputs["segment_ids"], batch.inputs["input_ids"]
        for row in range(len(ids)):
            for segment in range(1, int(segments[row].max()) + 1):
                tokens = ids[row, segments[row] == segment].tolist()
                assert len(set(tokens)) == 1 and len(tokens) == lengths[tokens[0] - 1]
        seen.update(ids_of(batch))
    assert seen == Counter({i + 1: n for i, n in enumerate(lengths)})
    assert real / positions >= 0.98


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(1, 20), max_size=60), group=st.integers(1, 5), seed=st.integers(0, 3))
def test_fitting_loses_nothing(sizes: list[int], group: int, seed: int) -> None:
    """Guards the row fitting: every piece in exactly one row, no row too long, the same rows for the same seed."""
    pieces = [(i, 5, 5 + size) for i, size in enumerate(sizes)]
    rows, again = (fit_rows(list(pieces), 20, group, np.random.default_rng(seed)) for _ in range(2))
    assert sorted(p for row in rows for p in row) == pieces and rows == again
    assert all(0 < sum(stop - start for _, start, stop in row) <= 20 for row in rows)
    assert len(rows) <= max(1, 2 * sum(sizes) // 20 + 1)


def test_rows_do_not_depend_on_the_micro_batch(chat_store: TokenStore) -> None:
    """Guards the identity of 8 x 1 and 2 x 4: the rows of a step and their order are the same."""

    def rows(batch_size: int) -> list[list[tuple[int, int, int]]]:
        source, found = PackedConversations(chat_store, batch_size, 24, PAD, rows_per_step=8), []
        for _ in range(24 // batch_size):
            inputs = source.next_batch().inputs
            for ids, labels, segments in zip(inputs["input_ids"], inputs["labels"], inputs["segment_ids"], strict=True):
                keep = segments > 0
                found.append(list(zip(ids[keep].tolist(), labels[keep].tolist(), segments[keep].tolist(), strict=True)))
        return found

    assert rows(8) == rows(2) == rows(1)


def test_a_batch_never_exceeds_the_row_length(chat_store: TokenStore) -> None:
    """Guards against rounding a batch up beyond the model's context when data.max_length is no multiple of 8."""
    for length in (13, 20, 41):
        source = PackedConversations(chat_store, 2, length, PAD)
        assert all(source.next_batch().inputs["input_ids"].shape[1] <= length for _ in range(12))


def turn(prompt: int, answer: int) -> list[int]:
    """Mask of one exchange: prompt, answer with its end mark, and the line end after it."""
    return [0] * prompt + [1] * answer + [0]


@pytest.mark.parametrize(
    ("mask", "length", "pieces", "counts"),
    [
        (turn(3, 4), 16, [(0, 8)], (0, 0, 0, 0)),
        (turn(3, 4) * 3, 16, [(0, 16), (16, 24)], (1, 0, 0, 0)),
        (turn(3, 4) * 3, 8, [(0, 8), (8, 16), (16, 24)], (1, 0, 0, 0)),
        (turn(3, 4) + [0] * 20, 16, [(0, 8)], (1, 0, 0, 0)),
        (turn(30, 4), 16, [(19, 35)], (0, 1, 0, 0)),
        (turn(2, 40), 16, [(0, 16)], (0, 0, 1, 0)),
        (turn(30, 40), 16, [(26, 42)], (0, 0, 1, 0)),
        (turn(3, 4) + turn(30, 4) + turn(2, 3), 16, [(0, 8), (27, 43), (43, 49)], (0, 1, 0, 0)),
        (turn(3, 4) + turn(2, 40) + turn(2, 3), 16, [(0, 8), (8, 24), (51, 57)], (0, 0, 1, 0)),
        ([0] * 30, 16, [], (0, 0, 0, 1)),
    ],
    ids=[
        "fits",
        "between-turns",
        "each-turn",
        "question-at-the-end",
        "long-prompt",
        "long-answer",
        "both-long",
        "long-prompt-inside",
        "long-answer-inside",
        "nothing-learned",
    ],
)
def test_conversations_longer_than_the_context(
    tmp_path: Path, mask: list[int], length: int, pieces: list[tuple[int, int]], counts: tuple[int, int, int, int]
) -> None:
    """Guards where a long conversation is cut (never inside an answer that fits) and that every cut is counted."""
    store = write_store(tmp_path, [*numbered([len(mask)]), [9] * 8], [mask, turn(3, 4)])
    said: list[str] = []
    source = PackedConversations(store, 1, length, PAD, log=said.append)
    assert [(start, stop) for _, start, stop in source._pieces(0)] == pieces
    _, report = source._survey()
    assert (report.between_turns, report.inside_prompt, report.inside_answer, report.dropped) == counts
    assert bool(said) == any(counts) and all(f"data.max_length={length}" in line for line in said)
    assert source.kept_tokens == 8 + sum(stop - start for start, stop in pieces)


@settings(max_examples=60, deadline=None)
@given(turns=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=6), length=st.integers(4, 40))
def test_no_answer_that_fits_is_cut(tmp_path_factory: pytest.TempPathFactory, turns: list[tuple[int, int]], length: int) -> None:
    """Guards against answers cut in two or learned twice: whatever fits beside a token of its question is learned whole, once."""
    mask = [m for prompt, answer in turns for m in turn(prompt, answer)]
    store = write_store(tmp_path_factory.mktemp("cut"), numbered([len(mask)]), [mask])
    pieces = PackedConversations(store, 1, length, PAD)._pieces(0)
    assert all(0 <= start < stop <= len(mask) and stop - start <= length for _, start, stop in pieces)
    covered = Counter(i for _, start, stop in pieces for i in range(start, stop))
    assert not covered or max(covered.values()) == 1
    begin = 0
    for prompt, answer in turns:
        inside = range(begin + prompt, begin + prompt + answer)
        if answer < length:
            assert all(covered[i] for i in inside)
            assert any(start <= inside[0] and inside[-1] < stop for _, start, stop in pieces)
        begin += prompt + answer + 1


def test_nothing_to_learn_at_all_is_an_error(tmp_path: Path) -> None:
    """Guards against an endless search for rows when no conversation has a learned token."""
    with pytest.raises(ValueError, match="max_length=16"):
        PackedConversations(write_store(tmp_path, numbered([30]), [[0] * 30]), 1, 16, PAD)
    with pytest.raises(ValueError, match="empty"):
        PackedText(write_store(tmp_path, numbered([5])), 1, 4, PAD, split="val")


def test_a_context_shorter_than_a_turn_gives_no_nan(tmp_path: Path) -> None:
    """Guards finite losses and gradients when rows hold padding, cut turns and few labels."""
    store = write_store(tmp_path, numbered([30, 40, 9]), [turn(26, 3), turn(2, 37), turn(6, 2)])
    model = SmartHaoAI(HaoAIConfig(vocab_size=90, n_layer=1, n_head=2, n_embd=16, intermediate_size=32, max_position_embeddings=8))
    source = PackedConversations(store, 2, 5, PAD)
    for _ in range(4):
        batch = source.next_batch()
        term = lm_loss(model, batch)[0]
        term.total.backward()
        assert torch.isfinite(term.total) and all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        assert batch.weights["tokens"] > 0


def test_held_out_batches_are_one_pass_at_most(text_store: TokenStore) -> None:
    """Guards the evaluation's amount: about the tokens asked for, never a second pass."""

    def source() -> PackedText:
        return PackedText(text_store, 2, 8, PAD)

    seen = [t for b in evaluation_batches(source(), 10**6) for t in ids_of(b)]
    assert len(seen) == len(set(seen)) and text_store.train.token_count - len(seen) < 16 + 8
    assert sum(b.real for b in evaluation_batches(source(), 20)) == 32
