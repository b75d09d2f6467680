"""Preference data: rows as stored pairs, packing that keeps pairs together, what is cut, and an exact cursor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_helpers import pair_rows, write_jsonl

from model import BPETokenizer
from train.config import DataConfig
from train.data import Batch
from train.pairs import PackedPairs
from train.store import TokenStore, open_store


def store_of(folder: Path, rows: list[Any], tokenizer: BPETokenizer, kind: str = "preference", share: float = 0.0) -> TokenStore:
    file = write_jsonl(folder / "p.jsonl", rows)
    return open_store(str(file), tokenizer, kind, DataConfig(store_dir=str(folder / "store"), val_share=share), lambda text: None)


def answers_of(batch: Batch) -> list[list[int]]:
    """The labelled tokens of each sequence, in row-major order."""
    found = []
    for labels, segments in zip(batch.inputs["labels"], batch.inputs["segment_ids"], strict=True):
        for number in range(1, int(segments.max()) + 1):
            part = labels[segments == number]
            found.append(part[part >= 0].tolist())
    return found


def pairs_of(batch: Batch) -> list[int]:
    documents = batch.extra["documents"].tolist()
    assert all(a % 2 == 0 and b == a + 1 for a, b in zip(documents[::2], documents[1::2], strict=True))
    return [document // 2 for document in documents[::2]]


def test_pairs_are_stored_as_two_documents(tmp_path: Path, tiny_tokenizer: BPETokenizer) -> None:
    """Guards the order chosen, rejected; the mask from the answer's first token to its end token; lines and margins."""
    rows: list[dict[str, Any]] = [
        {"prompt": "1 + 1 = ?", "chosen": "2", "rejected": "three", "margin": 0.5},
        {"prompt": "你好", "chosen": "你好！", "rejected": "no"},
    ]
    store = store_of(tmp_path, rows, tiny_tokenizer)
    split, end = store.train, tiny_tokenizer.eos_token_id
    assert split.lines is not None and split.values is not None
    assert split.lines.tolist() == [1, 1, 2, 2] and split.values.tolist() == [0.5, 0.5, 0.0, 0.0]
    for number, (row, name) in enumerate((row, name) for row in rows for name in ("chosen", "rejected")):
        ids, mask = split.tokens(number), split.mask(number)
        assert mask is not None
        learned = ids[mask == 1].tolist()
        assert learned[-1] == end and tiny_tokenizer.decode(learned[:-1]).endswith(str(row[name]))
        assert str(row["prompt"]) in tiny_tokenizer.decode(ids[mask == 0].tolist())
    assert store.where("train", 3).endswith("p.jsonl:2")


@pytest.mark.parametrize("kind", ["preference", "judged"])
def test_answers_follow_the_prompt_they_were_given_to(tmp_path: Path, tiny_tokenizer: BPETokenizer, kind: str) -> None:
    """Guards pairs of answers that were sampled with the thinking closed: learned behind another prompt, they teach not to think."""
    turns = [{"role": "user", "content": "1 + 1 = ?"}]
    row: dict[str, Any] = {"prompt": turns, "chosen": "2", "rejected": "three"}
    rows = [{**row, "chat_template_kwargs": {"enable_thinking": False}}, row]
    split = store_of(tmp_path, rows, tiny_tokenizer, kind).train
    for number, thinking in enumerate((False, False, None, None)):
        place = number if kind == "preference" else 2 * number
        ids, mask = split.tokens(place), split.mask(place)
        assert mask is not None
        asked = tiny_tokenizer.render(turns, add_generation_prompt=True, enable_thinking=thinking).ids
        assert ids[: len(asked)].tolist() == asked and not mask[: len(asked)].any() and mask[len(asked) :].all()


def test_pairs_of_one_prompt_are_held_out_together(tmp_path: Path, tiny_tokenizer: BPETokenizer) -> None:
    """Guards against measuring on prompts that were trained on with other answers."""
    rows = [{"prompt": f"question {n % 20}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(60)]
    store = store_of(tmp_path, rows, tiny_tokenizer, share=0.4)
    questions = [
        {tiny_tokenizer.decode(split.tokens(i)[split.mask(i) == 0].tolist()) for i in range(len(split))}
        for split in (store.train, store.val)
    ]
    assert all(questions) and not questions[0] & questions[1] and len(questions[0] | questions[1]) == 20
    assert len(store.train) + len(store.val) == 120 and len(store.val) % 6 == 0


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "chosen": "same", "rejected": "same"}, "the same"),
        ({"prompt": "q", "chosen": "", "rejected": "b"}, "chosen is empty"),
        ({"prompt": "q", "chosen": "a", "rejected": " \n"}, "rejected is empty"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "prompt is empty"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": "much"}, "margin is 'much'"),
        ({"prompt": "q", "completion": "a", "label": True}, "expected a pair"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "expected a pair"),
    ],
)
def test_unusable_rows_are_named(tmp_path: Path, tiny_tokenizer: BPETokenizer, row: dict[str, Any], reason: str) -> None:
    """Guards against pairs without a difference and empty answers in training, and against rows that vanish without file and line."""
    log: list[str] = []
    file = write_jsonl(tmp_path / "p.jsonl", [*pair_rows(2), row])
    data = DataConfig(store_dir=str(tmp_path / "store"), val_share=0.0)
    store = open_store(str(file), tiny_tokenizer, "preference", data, log.append)
    assert store.bad == 1 and len(store.train) == 4
    assert any("p.jsonl:3: " in line and reason in line for line in log), log
    alone = write_jsonl(tmp_path / "alone.jsonl", [row])
    with pytest.raises(ValueError, match=r"no usable \{prompt, chosen, rejected\} row in .*alone\.jsonl:1: "):
        open_store(str(alone), tiny_tokenizer, "preference", data, log.append)


def test_answers_that_are_equal_as_tokens(tmp_path: Path, tiny_tokenizer: BPETokenizer) -> None:
    """Guards against pairs that differ only in what the chat template strips."""
    log: list[str] = []
    rows = [*pair_rows(1), {"prompt": "q", "chosen": "a", "rejected": "<think>\n\n</think>\n\na"}]
    file = write_jsonl(tmp_path / "p.jsonl", rows)
    store = open_store(str(file), tiny_tokenizer, "preference", DataConfig(store_dir=str(tmp_path / "s"), val_share=0.0), log.append)
    assert len(store.train) == 2 and "p.jsonl:2: chosen and rejected are the same" in "\n".join(log)


def test_judged_answers_have_a_mismatched_partner(tmp_path: Path, tiny_tokenizer: BPETokenizer) -> None:
    """Guards KTO's data: labels, pairs taken as two judged answers, and partners that answer another prompt."""
    rows = [
        {"prompt": "q1", "completion": "one", "label": True},
        {"prompt": "q1", "completion": "two", "label": False},
        {"prompt": "q2", "chosen": "three", "rejected": "four"},
    ]
    store = store_of(tmp_path, rows, tiny_tokenizer, kind="judged")
    split = store.train
    assert split.values is not None and split.values[::2].tolist() == [1.0, 0.0, 1.0, 0.0]

    def text(document: int, learned: int) -> str:
        return tiny_tokenizer.decode(split.tokens(document)[split.mask(document) == learned].tolist())

    assert all(said in text(2 * n, 1) for n, said in enumerate(["one", "two", "three", "four"]))
    assert [text(d, 0) for d in range(0, 8, 2)] == [text(d, 0) for d in range(1, 8, 2)], "the prompts stay"
    mine, theirs = {"one", "two"}, {"three", "four"}
    for document, others in ((1, theirs), (3, theirs), (5, mine), (7, mine)):
        assert any(other in text(document, 1) for other in others)
    batch = PackedPairs(store, 4, 64, tiny_tokenizer.pad_token_id).next_batch()
    wanted = [bool(split.values[2 * pair]) for pair in pairs_of(batch)]
    assert batch.extra["wanted"].tolist() == wanted and (batch.weights["wanted"], batch.weights["unwanted"]) == (2.0, 2.0)
    assert batch.weights["tokens"] == sum(len(answer) for answer in answers_of(batch)[::2])


def random_pairs(seed: int, count: int) -> list[dict[str, str]]:
    """Pairs from a few to more tokens than half a row."""
    random = np.random.default_rng(seed)
    sizes = [(0, 1), (5, 24), *((int(random.integers(0, 6)), int(random.integers(1, 25))) for _ in range(count - 2))]
    return [
        {"prompt": f"{n}? " + "a b " * prompt, "chosen": "x y " * answer, "rejected": f"z{n}"} for n, (prompt, answer) in enumerate(sizes)
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_every_pair_comes_once_and_stays_together(tmp_path: Path, tiny_tokenizer: BPETokenizer, seed: int, batch_size: int) -> None:
    """Guards the pairing in row-major order, also of pairs that need two rows, the rows' length, and that an epoch has each pair once."""
    store = store_of(tmp_path, random_pairs(seed, 70), tiny_tokenizer)
    source = PackedPairs(store, batch_size, 140, tiny_tokenizer.pad_token_id, seed)
    lengths = store.train.lengths.reshape(-1, 2).sum(axis=1)
    assert (lengths > 140).any() and (lengths <= 70).any(), "both kinds of pairs must occur"
    seen: list[int] = []
    for batch in source.one_pass():
        pairs = pairs_of(batch)
        assert batch.inputs["input_ids"].shape[1] <= 140 and batch.inputs["input_ids"].shape[0] <= batch_size + batch_size % 2
        expected = [store.train.tokens(d)[store.train.mask(d) == 1].tolist() for pair in pairs for d in (2 * pair, 2 * pair + 1)]
        assert answers_of(batch) == expected
        assert batch.weights == {"pairs": len(pairs), "tokens": sum(map(len, expected))}
        seen += pairs
    assert sorted(seen) == list(range(70))


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_an_epoch_is_as_long_as_its_batches(tmp_path: Path, tiny_tokenizer: BPETokenizer, batch_size: int) -> None:
    """Guards the number of steps of an uneven batch size: a batch holds one row more than it says."""
    store = store_of(tmp_path, pair_rows(300), tiny_tokenizer)
    source = PackedPairs(store, batch_size, 96, tiny_tokenizer.pad_token_id)
    batches = sum(1 for _ in source.one_pass())
    assert source.rows_per_epoch() / batch_size == pytest.approx(batches, rel=0.1, abs=1)


def test_one_pass_is_the_first_epoch(tmp_path: Path, tiny_tokenizer: BPETokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the reference's log-probabilities: computed over the very batches that are trained on, across blocks of documents."""
    monkeypatch.setattr(PackedPairs, "block_size", 10)
    source = PackedPairs(store_of(tmp_path, random_pairs(1, 45), tiny_tokenizer), 4, 140, tiny_tokenizer.pad_token_id, 3)
    passed = list(source.one_pass())[:-1]
    assert len(passed) > 3
    for batch in passed:
        again = source.next_batch()
        assert torch.equal(batch.inputs["input_ids"], again.inputs["input_ids"])
        assert torch.equal(batch.extra["documents"], again.extra["documents"])


def test_micro_batches_join_to_the_large_batch(tmp_path: Path, tiny_tokenizer: BPETokenizer) -> None:
    """Guards accumulation: 8 rows at once hold the pairs of 4 times 2 rows."""
    store = store_of(tmp_path, random_pairs(2, 60), tiny_tokenizer)
    large = PackedPairs(store, 8, 140, 0, rows_per_step=8)
    small = PackedPairs(store, 2, 140, 0, rows_per_step=8)
    for _ in range(4):
        assert pairs_of(large.next_batch()) == [pair for _ in range(4) for pair in pairs_of(small.next_batch())]


@pytest.mark.parametrize("kind", ["preference", "judged"])
def test_the_cursor_resumes_exactly(tmp_path: Path, tiny_tokenizer: BPETokenizer, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Guards resuming over the ends of blocks and epochs, with a cursor that went through JSON."""
    monkeypatch.setattr(PackedPairs, "block_size", 8)
    store = store_of(tmp_path, random_pairs(4, 20), tiny_tokenizer, kind=kind)

    def source() -> PackedPairs:
        return PackedPairs(store, 4, 140, tiny_tokenizer.pad_token_id, 7)

    straight = source()
    for _ in range(40):
        cursor = json.loads(json.dumps(straight.state_dict()))
        batch = straight.next_batch()
        other = source()
        other.load_state_dict(cursor)
        again = other.next_batch()
        assert torch.equal(batch.inputs["input_ids"], again.inputs["input_ids"]) and batch.weights == again.weights
    assert straight.epoch >= 2


def test_long_prompts_lose_their_beginning(tmp_path: Path, tiny_tokenizer: BPETokenizer) -> None:
    """Guards against answers that are cut, against two different prompts in a pair, and against a cut that nobody hears of."""
    rows = [
        {"prompt": "word " * 90 + "last", "chosen": "yes", "rejected": "no no no no no"},
        {"prompt": "q", "chosen": "long " * 90, "rejected": "short"},
        {"prompt": "q", "chosen": "yes", "rejected": "no"},
    ]
    store = store_of(tmp_path, rows, tiny_tokenizer)
    log: list[str] = []
    source = PackedPairs(store, 4, 64, tiny_tokenizer.pad_token_id, log=log.append)
    assert len(log) == 1 and "1 lost the beginning" in log[0] and "1 left out" in log[0] and "p.jsonl:2" in log[0]
    (batch,) = source.one_pass()
    pairs = pairs_of(batch)
    assert sorted(pairs) == [0, 2]
    at = 2 * pairs.index(0)
    expected = [store.train.tokens(d)[store.train.mask(d) == 1].tolist() for d in (0, 1)]
    assert answers_of(batch)[at : at + 2] == expected
    pieces = source._pieces(0)
    assert pieces[0][1] == pieces[1][1] > 0 and max(stop - start for _, start, stop in pieces) == 64
    with pytest.raises(ValueError, match=r"none of the 3 pairs fits into data.max_length=12 .*p\.jsonl:1, .*raise data.max_length"):
        PackedPairs(store, 4, 12, tiny_tokenizer.pad_token_id)


def test_pairs_that_only_later_epochs_read(tmp_path: Path, tiny_tokenizer: BPETokenizer) -> None:
    """Guards the references of sources with a weight below 1: every pair that is ever read has one."""
    files = [write_jsonl(tmp_path / f"{name}.jsonl", random_pairs(5, 10)) for name in ("half", "whole")]
    spec = [{"path": str(file), "weight": weight} for file, weight in zip(files, (0.5, 1), strict=True)]
    store = open_store(spec, tiny_tokenizer, "preference", DataConfig(store_dir=str(tmp_path / "s"), val_share=0.0), lambda text: None)
    source = PackedPairs(store, 4, 140, tiny_tokenizer.pad_token_id)
    assert len([pair for batch in source.one_pass() for pair in pairs_of(batch)]) == 15
    assert sorted(pair for batch in source.every_pair() for pair in pairs_of(batch)) == list(range(20))
