"""Rows that join a KVCache, leave it and are copied out of it: what follows is what a full pass over each row's tokens gives."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import KVCache, SmartHaoAI

TOLERANCE = 1e-5  # of the largest logit, fp32
SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "windows": {"n_layer": 4, "use_sliding_window": True, "window_size": 5, "window_pattern": "SSSL"},
    "window-one": {"use_sliding_window": True, "window_size": 1, "window_pattern": "SL"},
    "reasoning": {"use_reasoning": True, "reasoning_steps": 2},
}


def cache_of(model: SmartHaoAI, ids: list[int], block: int) -> KVCache:
    cache = KVCache(model.config, 1, len(ids), block=block)
    model(torch.tensor([ids]), cache=cache)
    return cache


def assert_next_tokens(model: SmartHaoAI, cache: KVCache, rows: list[list[int]], new: torch.Tensor) -> None:
    """Feeding new (B, T) gives every row the logits of a pass over all its tokens."""
    cache.reserve(len(rows), cache.length + new.shape[1])
    logits = model(new, cache=cache).logits
    assert bool(torch.isfinite(logits).all())
    for row, more, actual in zip(rows, new.tolist(), logits, strict=True):
        row += more
        expected = model(torch.tensor([row])).logits[0, -len(more) :]
        assert float((actual - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


@pytest.mark.parametrize("shape", SHAPES)
@given(seed=st.integers(0, 2**31 - 1), block=st.sampled_from([2, 5, 64]))
@settings(max_examples=5, deadline=None)
def test_random_operations(shape: str, make_model, seed: int, block: int) -> None:
    """Guards: rows that are shifted, cut or mixed up when others join with longer prompts, leave, or make the buffers grow; a beginning
    of a row that a windowed layer has forgotten and gives away all the same."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model = make_model(**SHAPES[shape])
    cache, rows = KVCache(model.config, 1, 3, block=block), []
    cache.drop(0)
    kept: list[tuple[list[int], KVCache]] = []
    with torch.no_grad():
        for _ in range(30):
            act = rng.choice(["join", "share", "drop", "keep", "reorder", "feed", "feed"])
            if act == "join":
                ids = [rng.randrange(61) for _ in range(rng.choice([1, 3, 12, 25]))]
                row = len(rows) if len(rows) < 6 else rng.randrange(6)  # a new one, or in the place of another
                rows[row : row + 1] = [ids]
                cache.put(row, cache_of(model, ids, block))
            elif act == "share" and len(rows) < 6 and (rows or kept):
                places = [(ids, cache, row) for row, ids in enumerate(rows)] + [(ids, held, 0) for ids, held in kept]
                ids, source, row = rng.choice(places)
                count = rng.randint(1, len(ids))
                if source.has_prefix(row, count):
                    cache.put(len(rows), source, row, count)
                    rows.append(ids[:count])
                else:
                    assert count < len(ids) and "window" in shape
            elif act == "drop" and rows:
                row = rng.randrange(len(rows))
                cache.drop(row)
                rows[row] = rows[-1]
                del rows[-1]
            elif act == "keep" and rows:
                row = rng.randrange(len(rows))
                kept = [*kept, (list(rows[row]), cache.copied(row))][-2:]
            elif act == "reorder" and rows:
                order = [rng.randrange(len(rows)) for _ in range(rng.randint(1, 6))]
                cache.reorder(torch.tensor(order))
                rows = [list(rows[row]) for row in order]
            elif act == "feed" and rows and max(map(len, rows)) < 60:
                assert_next_tokens(model, cache, rows, torch.randint(61, (len(rows), rng.randint(1, 4))))
            assert cache.batch_size == len(rows)
            # Each row ends where all end; columns that nobody needs are given up before they are many.
            assert (cache.length - cache.starts).tolist() == [len(ids) for ids in rows]
            assert act != "drop" or not rows or 3 * cache.length <= 4 * max(map(len, rows))
        for ids, held in kept:
            assert held.padding is None and held.length == len(ids)
            assert_next_tokens(model, held, [ids], torch.randint(61, (1, 2)))


def test_what_another_row_left_behind_is_never_read(make_model, seed: int) -> None:
    """Guards: NaN of a damaged row in the place of the next one: masked keys have weight zero, and zero times NaN is NaN."""
    model = make_model(**SHAPES["windows"])
    rows = [[1, 2, 3, 4, 5, 6, 7, 8], [9, 8, 7]]
    cache = cache_of(model, rows[0], 4)
    with torch.no_grad():
        cache.put(1, cache_of(model, rows[0], 4))
        for layer in cache.all_layers:
            layer.keys[1], layer.values[1] = float("nan"), float("nan")
        cache.drop(1)
        cache.put(1, cache_of(model, rows[1], 4))
        assert_next_tokens(model, cache, rows, torch.randint(61, (2, 3)))


def test_buffers_double_and_stay_whole_when_memory_runs_out(make_model, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Guards: growing by one row at a time, each time with a copy of everything; half-grown buffers after an error."""
    model, rows = make_model(), [[1, 2, 3, 4]]
    with torch.no_grad():
        cache = cache_of(model, rows[0], 64)
        cache.reserve(1, 5)
        assert (cache.row_room, cache.capacity) == (1, 8)
        cache.reserve(2, 8)
        cache.reserve(3, 30)
        assert (cache.row_room, cache.capacity) == (4, 30)
        calls, original = [], torch.zeros

        def short_of_memory(*args: Any, **named: Any) -> torch.Tensor:
            calls.append(args)
            if len(calls) > 2:
                raise RuntimeError("not enough memory")
            return original(*args, **named)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "zeros", short_of_memory)
            with pytest.raises(RuntimeError, match="memory"):
                cache.reserve(9, 60)
        assert cache.capacity == 30
        assert_next_tokens(model, cache, rows, torch.randint(61, (1, 5)))
        cache.reserve(9, 60)
        assert (cache.row_room, cache.capacity) == (9, 60)
        assert_next_tokens(model, cache, rows, torch.randint(61, (1, 40)))


def test_beams_that_change_places_move_no_more_than_they_hold(make_model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a new buffer for the whole context at every step of a beam search."""
    model = make_model()
    cache = KVCache(model.config, 4, 1000)
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]] * 4), cache=cache)
    before = [layer.keys.data_ptr() for layer in cache.all_layers]
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: pytest.fail("a new buffer"))
    cache.reorder(torch.tensor([3, 0, 0, 1]))
    cache.reorder(torch.tensor([2]))
    assert [layer.keys.data_ptr() for layer in cache.all_layers] == before
    assert (cache.batch_size, cache.row_room, cache.capacity) == (1, 4, 1000)


def test_rows_of_other_reasoning_settings_are_refused(make_model) -> None:
    """Guards: keys of two steps beside keys of three."""
    model = make_model(**SHAPES["reasoning"])
    with torch.no_grad():
        cache = cache_of(model, [1, 2, 3], 64)
        model.reasoning_steps = 3
        other = cache_of(model, [1, 2, 3], 64)
        with pytest.raises(ValueError, match="reasoning_steps"):
            cache.put(1, other)
        cache.drop(0)
        cache.put(0, other)
        assert_next_tokens(model, cache, [[1, 2, 3]], torch.tensor([[4]]))


def test_a_row_gives_away_only_what_it_brought(make_model) -> None:
    """Guards: slots of a windowed layer in which a row that joined late, or one beside it, has no keys, given away as its beginning."""
    torch.manual_seed(0)
    model = make_model(**SHAPES["windows"])
    early, late = torch.randint(61, (1, 40)), torch.randint(61, (1, 30))
    with torch.no_grad():
        cache, joined = cache_of(model, early[0].tolist(), 64), cache_of(model, late[0].tolist(), 64)
        assert cache.has_prefix(0, 10) and joined.has_prefix(0, 10)
        cache.put(1, joined.copied(0))  # a copy holds the last tokens of its windows
        assert cache.has_prefix(0, 10) and not cache.has_prefix(1, 10) and cache.has_prefix(1, 30)
        short = cache_of(model, early[0].tolist(), 64).copied(0)
        short.put(1, joined)  # makes room for more of each row than the first one brought
        assert not short.has_prefix(0, 10) and short.has_prefix(0, 40)
        cache.drop(0)
        assert not cache.has_prefix(0, 10)
        cache.reorder(torch.tensor([0, 0]))
        assert not cache.has_prefix(1, 10)
