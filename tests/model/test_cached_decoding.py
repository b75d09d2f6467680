"""Decoding with a KVCache gives the logits of one pass over the whole text, whatever the switches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model import KVCache, SmartHaoAI

TOLERANCE = 1e-5  # of the largest logit, fp32

SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "multi-head": {"n_kv_head": 4},
    "multi-query": {"n_kv_head": 1},
    "no-qk-norm": {"qk_norm": False},
    "untied": {"tie_word_embeddings": False},
    "wide-heads": {"head_dim": 12},
    "window-all": {"use_sliding_window": True, "window_size": 3, "window_pattern": "S"},
    "window-some": {"n_layer": 4, "use_sliding_window": True, "window_size": 5, "window_pattern": "SSSL"},
    "window-one": {"use_sliding_window": True, "window_size": 1, "window_pattern": "SL"},
    "window-multi-head": {"n_kv_head": 4, "use_sliding_window": True, "window_size": 4, "window_pattern": "LS"},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
}


def assert_same(actual: Tensor, expected: Tensor) -> None:
    error, largest = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert error <= TOLERANCE * largest, f"largest error {error:.3g} with a largest logit of {largest:.3g}"


@torch.no_grad()
def decode(model: SmartHaoAI, ids: Tensor, cuts: list[int], block: int = 256, mask: Tensor | None = None) -> Tensor:
    """Logits (B, T, V) of ids fed in the pieces that end at `cuts`."""
    cache = KVCache(model.config, ids.shape[0], ids.shape[1], block=block)
    pieces, start = [], 0
    for end in [*cuts, ids.shape[1]]:
        pieces.append(
            model(
                ids[:, start:end],
                attention_mask=None if mask is None else mask[:, :end] if start == 0 else None,
                cache=cache,
            ).logits
        )
        start = end
    assert cache.length == ids.shape[1]
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("name", SHAPES)
def test_prefill_then_single_tokens_equal_the_full_pass(name: str, make_model, seed: int) -> None:
    """Guards: a single fed token that sees only position 0; a window that is used in one of the two paths only."""
    model = make_model(**SHAPES[name])
    ids = torch.randint(61, (2, 20))
    with torch.no_grad():
        full = model(ids).logits
    assert_same(decode(model, ids, cuts=list(range(7, 20))), full)
    assert_same(decode(model, ids, cuts=list(range(1, 20))), full)


@pytest.mark.parametrize("name", SHAPES)
def test_chunked_prefill_equals_the_full_pass(name: str, make_model, seed: int) -> None:
    """Guards: a prompt longer than the cache's block, where the second piece must see the first through the window."""
    model = make_model(**SHAPES[name])
    ids = torch.randint(61, (2, 23))
    with torch.no_grad():
        full = model(ids).logits
    assert_same(decode(model, ids, cuts=[17, 18, 21], block=4), full)


@pytest.mark.parametrize("name", SHAPES)
def test_left_padded_rows_equal_the_rows_alone(name: str, make_model, seed: int) -> None:
    """Guards: a padding mask of ones and zeros added to the scores (it is seen); positions that count the padding."""
    model = make_model(**SHAPES[name])
    lengths, total, prompt = [15, 9, 6], 15, 10  # 10, 4 and 1 real tokens in the prompt
    rows = [torch.randint(61, (1, n)) for n in lengths]
    ids = torch.cat([torch.cat((torch.randint(61, (1, total - row.shape[1])), row), dim=1) for row in rows])
    mask = torch.tensor([[0] * (total - n) + [1] * n for n in lengths])
    with torch.no_grad():
        batched = model(ids, attention_mask=mask).logits
        for block in (256, 4):
            cached = decode(model, ids, cuts=list(range(prompt, total)), block=block, mask=mask)
            assert torch.isfinite(cached).all()
            for index, row in enumerate(rows):
                alone = model(row).logits[0]
                assert_same(batched[index, total - lengths[index] :], alone)
                assert_same(cached[index, total - lengths[index] :], alone)


@given(
    seed=st.integers(0, 2**31 - 1),
    kv=st.sampled_from([1, 2, 4]),
    qk_norm=st.booleans(),
    tied=st.booleans(),
    head_dim=st.sampled_from([6, 8]),
    window=st.sampled_from([None, 1, 2, 6, 40]),
    pattern=st.sampled_from(["S", "SL", "LSS"]),
    block=st.sampled_from([1, 3, 7, 64]),
    rope=st.sampled_from(["grouped", "linear", "yarn", "llama3"]),
    pads=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    cuts=st.lists(st.integers(1, 21), max_size=5, unique=True).map(sorted),
)
@settings(max_examples=40, deadline=None)
def test_random_combinations(
    make_model,
    seed: int,
    kv: int,
    qk_norm: bool,
    tied: bool,
    head_dim: int,
    window: int | None,
    pattern: str,
    block: int,
    rope: str,
    pads: list[int],
    cuts: list[int],
) -> None:
    """Guards: features that are right alone and wrong together."""
    torch.manual_seed(seed)
    windows = {} if window is None else {"use_sliding_window": True, "window_size": window, "window_pattern": pattern}
    model = make_model(n_kv_head=kv, qk_norm=qk_norm, tie_word_embeddings=tied, head_dim=head_dim, **windows, **SHAPES[rope])
    ids = torch.randint(61, (len(pads), 22))
    mask = torch.tensor([[0] * pad + [1] * (22 - pad) for pad in pads])
    with torch.no_grad():
        full = model(ids, attention_mask=mask).logits
    first = max(max(pads) + 1, cuts[0] if cuts else 1)  # the mask of the padding belongs to the first call
    cached = decode(model, ids, [first] + [cut for cut in cuts if cut > first], block, mask)
    real = mask.bool()
    assert_same(cached[real], full[real])


def test_last_only_gives_the_last_position(make_model, seed: int) -> None:
    """Guards: the shortcut of the decoder that skips the head for all but the last token."""
    model = make_model()
    ids = torch.randint(61, (2, 9))
    with torch.no_grad():
        short = model(ids, cache=KVCache(model.config, 2, 9, block=4), last_only=True).logits
        assert short.shape == (2, 1, 61)
        assert_same(short[:, 0], model(ids).logits[:, -1])


@pytest.mark.parametrize("name", ["grouped", "window-some"])
def test_rewind_then_another_continuation(name: str, make_model, seed: int) -> None:
    """Guards: keys of forgotten tokens that stay visible."""
    model = make_model(**SHAPES[name])
    ids, other = torch.randint(61, (1, 14)), torch.randint(61, (1, 5))
    with torch.no_grad():
        cache = KVCache(model.config, 1, 64)
        model(ids, cache=cache)
        assert cache.rewind(9) and cache.length == 9
        continued = model(other, cache=cache).logits
        assert_same(continued, model(torch.cat((ids[:, :9], other), dim=1)).logits[:, 9:])


def test_windowed_rewind_never_answers_wrongly(make_model, seed: int) -> None:
    """Guards: a windowed layer that goes back to where its keys are overwritten. It either refuses or is right."""
    model = make_model(**SHAPES["window-some"])
    ids, other = torch.randint(61, (1, 30)), torch.randint(61, (1, 3))
    answers = []
    for length in range(31):
        cache = KVCache(model.config, 1, 64, block=4)
        with torch.no_grad():
            model(ids, cache=cache)
            answers.append(cache.rewind(length))
            if answers[-1]:
                expected = model(torch.cat((ids[:, :length], other), dim=1)).logits[:, length:]
                assert_same(model(other, cache=cache).logits, expected)
            else:
                assert cache.length == 30, "a refused rewind must change nothing"
                assert_same(model(other, cache=cache).logits, model(torch.cat((ids, other), dim=1)).logits[:, 30:])
    assert answers[30] and answers[29] and not answers[10]
    with pytest.raises(ValueError, match="31"):
        KVCache(model.config, 1, 64).rewind(31)


def test_rewind_to_nothing_forgets_the_padding(make_model, seed: int) -> None:
    """Guards: the padding of an earlier batch that hides the first tokens of the next one."""
    model = make_model()
    ids = torch.randint(61, (2, 8))
    cache = KVCache(model.config, 2, 16)
    with torch.no_grad():
        model(ids, attention_mask=torch.tensor([[0] * 3 + [1] * 5, [1] * 8]), cache=cache)
        assert cache.rewind(0)
        assert_same(model(ids, cache=cache).logits, model(ids).logits)


def test_reorder_keeps_repeats_and_drops_rows(make_model, seed: int) -> None:
    """Guards: rows that get another row's keys or padding when samples are repeated and finished rows are left out."""
    model = make_model(**SHAPES["window-some"])
    ids, new = torch.randint(61, (3, 12)), torch.randint(61, (4, 1))
    mask = torch.tensor([[1] * 12, [0] * 5 + [1] * 7, [0] * 2 + [1] * 10])
    order = torch.tensor([2, 0, 2, 1])
    cache = KVCache(model.config, 3, 20, block=4)
    with torch.no_grad():
        model(ids, attention_mask=mask, cache=cache)
        cache.reorder(order)
        assert cache.batch_size == 4
        step = model(new, cache=cache).logits[:, 0]
        whole = model(torch.cat((ids[order], new), dim=1), attention_mask=torch.cat((mask[order], torch.ones(4, 1)), dim=1)).logits[:, -1]
    assert_same(step, whole)


def test_full_cache_and_wrong_padding_are_refused(make_model) -> None:
    """Guards: writing past the buffer; a right-padded batch decoded as a left-padded one; packed rows in a cache."""
    model = make_model()
    cache = KVCache(model.config, 1, 4)
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.long), cache=cache)
        with pytest.raises(ValueError, match="capacity of 4"):
            model(torch.zeros(1, 1, dtype=torch.long), cache=cache)
        ids = torch.zeros(1, 3, dtype=torch.long)
        with pytest.raises(ValueError, match="left"):
            model(ids, attention_mask=torch.tensor([[1, 1, 0]]), cache=KVCache(model.config, 1, 4))
        with pytest.raises(ValueError, match="segment_ids"):
            model(ids, segment_ids=torch.zeros_like(ids), cache=KVCache(model.config, 1, 4))
    with pytest.raises(ValueError, match="capacity"):
        KVCache(model.config, 1, 0)
