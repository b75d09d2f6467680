"""The reasoning head: nothing changes when it is added, nothing leaks, decoding equals the full pass, tokens halt one by one."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from inference.engine import Engine, PromptCache
from inference.sampling import SamplingSettings
from model import HaoAIConfig, KVCache, SmartHaoAI
from model.checkpoint import load_config, portability_notes, save_pretrained
from model.reasoning import CONFIDENCE_COEF
from train.config import OptimizationConfig
from train.optim import build_optimizers

TOLERANCE = 2e-5  # of the largest logit, fp32
MIXED: dict[str, Any] = {
    "n_layer": 3,
    "use_sliding_window": True,
    "window_size": 5,
    "window_pattern": "SL",
    "n_expert": 3,
    "moe_intermediate_size": 16,
    "attention_gate": "head",
    "attention_temperature": "length",
    "residual_scale": True,
    "value_residual": True,
    "value_embedding": True,
    "logit_softcap": 20.0,
}


def opened(make_model, halt: float = 0.0, **fields: Any) -> SmartHaoAI:
    """A model whose reasoning head takes part: random fusion, and confidences that spread over (0, 1)."""
    model = make_model(**{"use_reasoning": True, "reasoning_steps": 3, "reasoning_halt": halt, **fields})
    with torch.no_grad():
        for layer in model.layers:
            for part in (layer.self_attn.temperature, layer.self_attn.value_mix):
                if part is not None:
                    part.uniform_(-0.3, 0.3)
            for module in (layer.self_attn.gate_proj, layer.self_attn.value_table):
                if module is not None:
                    module.weight.normal_(std=0.3)
        model.reasoning.out_proj.weight.normal_(std=0.3)
        model.reasoning.confidence.out.weight.normal_(std=0.8)
    return model


def assert_same(actual: Tensor, expected: Tensor) -> None:
    error, largest = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert error <= TOLERANCE * largest, f"largest error {error:.3g} with a largest value of {largest:.3g}"


@torch.no_grad()
def decode(model: SmartHaoAI, ids: Tensor, cuts: list[int], block: int = 256, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits (B, T, V) and confidences (B, T) of ids fed in the pieces that end at `cuts`."""
    cache = KVCache(model.config, ids.shape[0], ids.shape[1], block=block)
    outs, start = [], 0
    for end in [*cuts, ids.shape[1]]:
        first = None if mask is None or start else mask[:, :end]
        outs.append(model(ids[:, start:end], attention_mask=first, cache=cache))
        start = end
    return torch.cat([out.logits for out in outs], dim=1), torch.cat([out.confidence for out in outs], dim=1)


def train(model: SmartHaoAI, batches: Iterable[Tensor], lr: float = 3e-3) -> dict[str, list[float]]:
    """One step for each batch (B, T); every loss per token, step by step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    history: dict[str, list[float]] = {}
    model.train()
    for rows in batches:
        out = model(rows, labels=rows)
        terms = {"loss": out.loss_sum, **out.deep_losses}
        (torch.stack(list(terms.values())).sum() / out.loss_tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, total in terms.items():
            history.setdefault(name, []).append(float(total.detach()) / out.loss_tokens)
    model.eval()
    return history


# ------------------------------------------------------------------------------------- nothing leaks, nothing depends on the cut


@given(
    seed=st.integers(0, 2**31 - 1),
    mixed=st.booleans(),
    steps=st.integers(1, 5),
    halt=st.sampled_from([0.0, 0.3, 0.5, 0.7]),
    heads=st.sampled_from([None, 2, 4]),
    place=st.integers(1, 21),
)
@settings(max_examples=25, deadline=None)
def test_no_token_sees_a_later_one(make_model, seed: int, mixed: bool, steps: int, halt: float, heads: int | None, place: int) -> None:
    """Guards: states that attend forwards; a halting decision that looks at the whole text."""
    torch.manual_seed(seed)
    model = opened(make_model, halt, reasoning_heads=heads, **(MIXED if mixed else {}))
    model.reasoning_steps = steps
    ids = torch.randint(61, (2, 22))
    other = ids.clone()
    other[:, place:] = torch.randint(61, (2, 22 - place))
    with torch.no_grad():
        before, after = model(ids), model(other)
    assert_same(after.logits[:, :place], before.logits[:, :place])
    assert_same(after.confidence[:, :place], before.confidence[:, :place])


@given(
    seed=st.integers(0, 2**31 - 1),
    mixed=st.booleans(),
    steps=st.integers(1, 5),
    halt=st.sampled_from([0.0, 0.3, 0.5, 0.7]),
    heads=st.sampled_from([None, 2]),
    block=st.sampled_from([1, 3, 7, 64]),
    pads=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    cuts=st.lists(st.integers(1, 21), max_size=5, unique=True).map(sorted),
)
@settings(max_examples=40, deadline=None)
def test_cached_padded_and_cut_equal_the_rows_alone(
    make_model, seed: int, mixed: bool, steps: int, halt: float, heads: int | None, block: int, pads: list[int], cuts: list[int]
) -> None:
    """Guards: halted tokens that are missing in the caches of later steps; a batch that waits for its slowest row; counted padding."""
    torch.manual_seed(seed)
    model = opened(make_model, halt, reasoning_heads=heads, **(MIXED if mixed else {}))
    model.reasoning_steps = steps
    ids = torch.randint(61, (len(pads), 22))
    mask = torch.tensor([[0] * pad + [1] * (22 - pad) for pad in pads])
    first = max(max(pads) + 1, cuts[0] if cuts else 1)
    logits, confidence = decode(model, ids, [first] + [cut for cut in cuts if cut > first], block, mask)
    with torch.no_grad():
        full = model(ids, attention_mask=mask)
        assert_same(logits[mask.bool()], full.logits[mask.bool()])
        assert_same(confidence[mask.bool()], full.confidence[mask.bool()])
        for row, pad in enumerate(pads):
            alone = model(ids[row : row + 1, pad:])
            assert_same(full.logits[row, pad:], alone.logits[0])
            if halt:
                assert torch.equal(full.steps_used[row, pad:], alone.steps_used[0])


@pytest.mark.parametrize("halt", [0.0, 0.5])
def test_packed_documents_equal_documents_alone(halt: float, make_model, seed: int) -> None:
    """Guards: states that attend across the border of two documents in one row; positions that go on over it."""
    model = opened(make_model, halt)
    first, second = torch.randint(61, (1, 9)), torch.randint(61, (1, 6))
    packed = torch.cat((first, second, torch.zeros(1, 3, dtype=torch.long)), dim=1)
    segments = torch.tensor([[1] * 9 + [2] * 6 + [0] * 3])
    with torch.no_grad():
        logits = model(packed, segment_ids=segments).logits
        assert_same(logits[:, :9], model(first).logits)
        assert_same(logits[:, 9:15], model(second).logits)


@pytest.mark.parametrize("halt", [0.0, 0.5])
def test_packed_loss_equals_the_losses_alone(halt: float, make_model, seed: int) -> None:
    """Guards: a label that is predicted from another document, in the main loss or in those of the steps."""
    model = opened(make_model, halt, reasoning_steps=2)  # with two steps nothing is drawn: all tokens take the one earlier step
    first, second = torch.randint(61, (1, 9)), torch.randint(61, (1, 6))
    packed, segments = torch.cat((first, second), dim=1), torch.tensor([[1] * 9 + [2] * 6])
    model.train()
    whole = model(packed, segment_ids=segments, labels=packed)
    parts = [model(ids, labels=ids) for ids in (first, second)]
    torch.testing.assert_close(whole.loss_sum, parts[0].loss_sum + parts[1].loss_sum)
    for name in ("reasoning_step_loss", "confidence_loss"):
        torch.testing.assert_close(whole.deep_losses[name], parts[0].deep_losses[name] + parts[1].deep_losses[name])


# ------------------------------------------------------------------------------------------------------------------------ halting


def test_a_halted_token_is_carried_unchanged_and_read_where_it_stopped(make_model, seed: int) -> None:
    """Guards: a state that moves after its token halted; a confidence of another step than the one that was used."""
    model = opened(make_model, 0.5)
    model.reasoning_steps = 6
    with torch.no_grad():
        out = model(torch.randint(61, (3, 20)), output_reasoning=True, output_hidden_states=True)
    states, used = out.reasoning_states, out.steps_used
    assert states.shape == (7, 3, 20, 32) and out.step_confidence.shape == (6, 3, 20)
    assert 1 < len(used.unique()), "the test needs tokens that halt at different steps"
    for step in range(1, 7):
        halted = used < step
        assert torch.equal(states[step][halted], states[step - 1][halted])
        assert not (states[step][~halted] == states[step - 1][~halted]).all(dim=-1).any()
        assert (out.step_confidence[step - 1][used > step] <= 0.5).all()
    stopped = out.step_confidence.gather(0, used[None] - 1)[0]
    assert (stopped[used < 6] > 0.5).all()
    torch.testing.assert_close(out.confidence, stopped)
    torch.testing.assert_close(out.step_hidden_states[-1], out.hidden_states)


def test_halting_off_takes_every_step_and_a_threshold_of_nothing_takes_one(make_model, seed: int) -> None:
    """Guards: halting in training; a threshold that counts steps from 0."""
    model = opened(make_model)
    ids = torch.randint(61, (2, 15))
    with torch.no_grad():
        every = model(ids)
        assert every.steps_used is None
        model.reasoning_halt = 1e-30
        early = model(ids)
        assert (early.steps_used == 1).all()
        model.reasoning_halt, model.reasoning_steps = 0.0, 1
        assert_same(early.logits, model(ids).logits)
        model.train()
        model.reasoning_halt, model.reasoning_steps = 1e-30, 3
        assert_same(model(ids).logits, every.logits)


def test_halting_is_decided_row_by_row_while_decoding(make_model, seed: int) -> None:
    """Guards: a step that is left out for all rows because most have halted, and its keys with it."""
    model = opened(make_model, 0.5)
    ids = torch.randint(61, (4, 18))
    together, _ = decode(model, ids, list(range(1, 18)))
    for row in range(4):
        alone, _ = decode(model, ids[row : row + 1], list(range(1, 18)))
        assert_same(together[row : row + 1], alone)


# ------------------------------------------------------------------------------------------------------- added to a trained model


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": False, "n_expert": 3}, {"feed_forward": "relu2", "head_dim": 6}])
def test_added_to_a_saved_model_it_changes_no_bit(fields: dict[str, Any], make_model, seed: int, tmp_path: Path) -> None:
    """Guards: a head that starts open; fresh weights from uninitialised memory; settings that are not taken over."""
    plain = make_model(**fields)
    plain.save_pretrained(tmp_path)
    model = SmartHaoAI.from_pretrained(tmp_path, use_reasoning=True, reasoning_steps=5, reasoning_heads=2, reasoning_ffn=24)
    assert model.reasoning_steps == 5 and model.config.reasoning_shape.n_head == 2
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert 0.01 < model.reasoning.mlp.gate_up_proj.weight.std() < 0.2 and model.reasoning.read_norm.weight.eq(1).all()
    ids = torch.randint(61, (2, 14))
    with torch.no_grad():
        out = model(ids)
        assert torch.equal(out.logits, plain(ids).logits) and out.confidence.eq(0.5).all()
        assert torch.equal(decode(model, ids, [5, 9])[0], decode_plain(plain, ids, [5, 9]))
    with pytest.raises(ValueError, match="n_layer cannot be changed"):
        SmartHaoAI.from_pretrained(tmp_path, use_reasoning=True, n_layer=3)


def decode_plain(model: SmartHaoAI, ids: Tensor, cuts: list[int]) -> Tensor:
    cache, pieces = KVCache(model.config, *ids.shape), []
    for start, end in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        pieces.append(model(ids[:, start:end], cache=cache).logits)
    return torch.cat(pieces, dim=1)


def test_an_added_head_learns_from_the_first_step(make_model, seed: int, tmp_path: Path) -> None:
    """Guards: a product of two zeros, which no gradient opens."""
    make_model().save_pretrained(tmp_path)
    model = SmartHaoAI.from_pretrained(tmp_path, use_reasoning=True, reasoning_steps=2)
    before = {name: p.clone() for name, p in model.reasoning.named_parameters()}
    train(model, [torch.randint(61, (4, 12)) for _ in range(3)])
    same = [name for name, p in model.reasoning.named_parameters() if torch.equal(p, before[name])]
    assert not same, f"these never moved: {same}"


def test_saved_and_loaded_is_the_same(make_model, seed: int, tmp_path: Path) -> None:
    """Guards: a head whose query heads are cut by the trunk's sizes; settings that are lost with the file."""
    model = opened(make_model, 0.4, reasoning_heads=2, reasoning_ffn=20, reasoning_ponder_coef=0.01, reasoning_step_coef=0.2)
    model.save_pretrained(tmp_path)
    assert load_config(tmp_path) == model.config
    back, ids = SmartHaoAI.from_pretrained(tmp_path), torch.randint(61, (2, 13))
    with torch.no_grad():
        assert torch.equal(back(ids).logits, model(ids).logits)
    assert portability_notes(model.config) == ["use_reasoning=True"]
    save_pretrained(model, tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        assert SmartHaoAI.from_pretrained(tmp_path, dtype=torch.bfloat16)(ids).logits.isfinite().all()


# --------------------------------------------------------------------------------------------------------------- number of steps


def test_other_numbers_of_steps(make_model, seed: int) -> None:
    """Guards: a cache whose earlier tokens took another number of steps, silently wrong; steps beyond those of training."""
    model = opened(make_model)
    ids, more = torch.randint(61, (1, 9)), torch.randint(61, (1, 2))
    cache = KVCache(model.config, 1, 32)
    with torch.no_grad():
        three = model(ids, cache=cache, output_reasoning=True)
        for change in ({"reasoning_steps": 2}, {"reasoning_halt": 0.5}):
            old = {name: getattr(model, name) for name in change}
            for name, value in change.items():
                setattr(model, name, value)
            with pytest.raises(ValueError, match="feed them again"):
                model(more, cache=cache)
            for name, value in old.items():
                setattr(model, name, value)
        assert_same(model(more, cache=cache).logits, model(torch.cat((ids, more), dim=1)).logits[:, 9:])
        for steps in (1, 2, 7):
            model.reasoning_steps = steps
            assert cache.rewind(0)
            out = model(ids, cache=cache, output_reasoning=True)
            assert out.reasoning_states.shape[0] == steps + 1 and len(cache.reasoning) == steps + 1
            shared = min(steps, 3)
            assert_same(out.reasoning_states[: shared + 1], three.reasoning_states[: shared + 1])
            assert_same(model(more, cache=cache).logits, model(torch.cat((ids, more), dim=1)).logits[:, 9:])
    with pytest.raises(ValueError, match="reasoning_steps .*0"):
        model.reasoning_steps = 0
    for change in ((0, 0.5), (2, 1.0), (2, -0.1), (2, float("nan"))):
        with pytest.raises(ValueError, match="reasoning_(steps|halt)"):
            model.set_reasoning(*change)
        assert (model.reasoning_steps, model.reasoning_halt) == (7, 0.0)  # neither of them
    model.set_reasoning(halt=0.5)
    assert model.reasoning_setting == (7, 0.5)
    plain = make_model()
    plain.set_reasoning()  # nothing is asked of a head that is not there
    for name, value in (("reasoning_steps", 2), ("reasoning_halt", 0.5)):
        with pytest.raises(ValueError, match="no reasoning head"):
            setattr(plain, name, value)


def test_every_step_has_its_own_embedding_and_later_ones_the_last(make_model, seed: int) -> None:
    """Guards: steps that cannot be told apart; one beyond those of training that falls back to the first one's embedding."""
    model = opened(make_model)
    model.reasoning_steps = 5
    ids = torch.randint(61, (1, 8))
    with torch.no_grad():
        before = model(ids, output_reasoning=True).reasoning_states
        assert_same(opened_like(model, [0, 1, 2, 2, 2])(ids, output_reasoning=True).reasoning_states, before)
        for step in range(3):
            model.reasoning.step_embedding.weight[step] += 1.0
            after = model(ids, output_reasoning=True).reasoning_states
            assert torch.equal(after[: step + 1], before[: step + 1]) and not torch.equal(after[step + 1], before[step + 1])
            before = after


def opened_like(model: SmartHaoAI, rows: list[int]) -> SmartHaoAI:
    """The same model made for len(rows) steps, each with the embedding of the step that is named."""
    longer = SmartHaoAI(HaoAIConfig(**{**model.config.to_dict(), "reasoning_steps": len(rows)})).eval()
    state = model.state_dict()
    state["reasoning.step_embedding.weight"] = state["reasoning.step_embedding.weight"][rows]
    longer.load_state_dict(state)
    return longer


def test_the_cache_rewinds_and_reorders_the_steps(make_model, seed: int) -> None:
    """Guards: keys of the steps that stay when tokens are forgotten or rows change places."""
    model = opened(make_model, 0.5)
    ids, other = torch.randint(61, (2, 12)), torch.randint(61, (2, 4))
    with torch.no_grad():
        cache = KVCache(model.config, 2, 20)
        assert cache.nbytes == model.config.account().kv_cache_bytes(20, 2)
        model(ids, cache=cache)
        assert cache.rewind(7)
        cache.reorder(torch.tensor([1, 0]))
        expected = model(torch.cat((ids[[1, 0], :7], other), dim=1)).logits[:, 7:]
        assert_same(model(other, cache=cache).logits, expected)


@pytest.mark.parametrize("halt", [0.0, 0.5])
def test_generation_equals_generation_without_a_cache(halt: float, make_model, seed: int) -> None:
    """Guards: an engine that feeds the head other states than a full pass does."""
    model = opened(make_model, halt)
    ids = torch.randint(61, (2, 7))
    out = model.generate(ids, max_new_tokens=10, temperature=0)
    for _ in range(10):
        with torch.no_grad():
            ids = torch.cat((ids, model(ids).logits[:, -1].argmax(dim=-1, keepdim=True)), dim=1)
    assert torch.equal(out, ids)


def test_a_conversation_goes_on_after_the_steps_change(make_model, seed: int) -> None:
    """Guards: a conversation's cache that is continued with another number of steps, or that raises in the middle of a chat."""
    model = opened(make_model)
    engine, held, settings_ = Engine(model), PromptCache(), SamplingSettings(max_new_tokens=6, temperature=0)
    prompt = torch.randint(61, (9,)).tolist()

    def reply(cache: PromptCache) -> list[int]:
        return [token for piece in engine.stream(prompt, settings_, cache) for token in piece.ids]

    reply(held)
    for steps, halt in ((1, 0.0), (6, 0.0), (6, 0.5)):
        model.reasoning_steps, model.reasoning_halt = steps, halt
        assert reply(held) == reply(PromptCache()) and held.reused == 0
    reply(held)
    assert held.reused == 8


# ---------------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("fields", [{}, MIXED, {"reasoning_steps": 1}, {"reasoning_step_coef": 0.0}])
def test_gradients_reach_everything_and_stay_where_they_belong(fields: dict[str, Any], make_model, seed: int) -> None:
    """Guards: parts that no loss trains; a confidence that bends the states to look sure."""
    model = opened(make_model, **{"reasoning_ponder_coef": 0.01, **fields}).train()
    ids = torch.randint(61, (3, 16))
    out = model(ids, labels=ids)
    torch.stack([out.loss_sum, *out.deep_losses.values()]).sum().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not dead, f"without a gradient: {dead}"
    model.zero_grad()
    model(ids, labels=ids).deep_losses["confidence_loss"].backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == {"reasoning.confidence.hidden.weight", "reasoning.confidence.out.weight", "reasoning.confidence.out.bias"}
    if "ponder_loss" in out.deep_losses:
        model.zero_grad()
        model(ids, labels=ids).deep_losses["ponder_loss"].backward()
        assert model.reasoning.confidence.out.weight.grad is None and model.reasoning.mlp.down_proj.weight.grad.abs().sum() > 0


def test_the_losses_are_what_they_say(make_model, seed: int) -> None:
    """Guards: a step loss of the wrong step or scale; hits that belong to other tokens. Two steps: nothing is drawn."""
    model = opened(make_model, reasoning_steps=2, reasoning_ponder_coef=0.5, logit_softcap=8.0)
    exact = copy.deepcopy(model).double()
    ids = torch.randint(61, (2, 15))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    with torch.no_grad():
        out = exact(ids, output_reasoning=True)
        states = torch.nn.functional.linear(out.step_hidden_states, exact.head_weight)
        logits = (torch.tanh(states / 8) * 8)[:, :, :-1]  # (2, B, T - 1, V)
        targets, real = labels[:, 1:], labels[:, 1:] != -100
        nats = -logits.log_softmax(-1).gather(-1, targets.clamp(min=0).expand(2, -1, -1)[..., None])[..., 0]
        right = logits.argmax(-1) == targets
        odds = exact.reasoning.confidence_logit(out.reasoning_states[1:])[:, :, :-1]  # near 1, a confidence has no digits left
        sure = odds.sigmoid()
        missed = -torch.where(right, torch.nn.functional.logsigmoid(odds), torch.nn.functional.logsigmoid(-odds))
        model.train()
        trained = model(ids, labels=labels)
    expected = {
        "reasoning_step_loss": 0.3 * nats[0][real].sum(),
        "confidence_loss": CONFIDENCE_COEF * missed[:, real].sum() / 2,
        "ponder_loss": 0.5 * ((1 + 1 - sure[0][real]) / 2).sum(),
    }
    torch.testing.assert_close(trained.loss_sum, nats[1][real].sum(), rtol=1e-4, atol=1e-4, check_dtype=False)
    torch.testing.assert_close(trained.deep_losses, expected, rtol=2e-4, atol=1e-4, check_dtype=False)


def test_drawn_steps_estimate_the_mean_over_all(make_model, seed: int) -> None:
    """Guards: a draw that leaves out a step, or that weighs the last one twice."""
    model = opened(make_model, reasoning_steps=4).train()
    ids = torch.randint(61, (4, 32))
    with torch.no_grad():
        draws = [model(ids, labels=ids).deep_losses for _ in range(60)]
        model.eval()
        hidden = model(ids, output_reasoning=True).step_hidden_states
        logs = torch.nn.functional.linear(hidden, model.head_weight)[:, :, :-1].log_softmax(-1)
        nats = -logs.gather(-1, ids[:, 1:].expand(4, -1, -1)[..., None])[..., 0].flatten(1)  # (4, N)
    found = torch.stack([draw["reasoning_step_loss"] for draw in draws])
    expected, spread = 0.3 * nats[:3].mean(dim=0).sum(), found.std() / len(found) ** 0.5
    assert abs(found.mean() - expected) < 5 * spread + 1e-3


def test_confidence_learns_what_can_be_known(make_model, seed: int) -> None:
    """Guards: a confidence that does not tell sure tokens from guesses. Every second token follows from the one before it."""

    def rows(count: int) -> Tensor:
        chance = torch.randint(30, (count, 8))
        return torch.stack((chance, chance + 30), dim=2).flatten(1)

    model = make_model(use_reasoning=True, reasoning_steps=3, initializer_range=0.08)
    history = train(model, rows(1000).split(10), lr=1e-2)
    assert history["confidence_loss"][-1] < 0.8 * history["confidence_loss"][0]
    fresh = rows(50)
    with torch.no_grad():
        out = model(fresh)
    right = (out.logits[:, :-1].argmax(-1) == fresh[:, 1:]).float()
    sure, unsure = out.confidence[:, :-1][:, 0::2], out.confidence[:, :-1][:, 1::2]
    assert right[:, 0::2].mean() > 0.9 and sure.mean() > 0.65 and unsure.mean() < 0.2
    assert abs(out.confidence[:, :-1].mean() - right.mean()) < 0.2  # after 100 steps it still lags behind
    model.reasoning_halt = 0.5
    with torch.no_grad():
        halted = model(fresh)
    assert halted.steps_used[:, 0::2].float().mean() < halted.steps_used[:, 1::2].float().mean() - 1
    assert (halted.logits[:, :-1:2].argmax(-1) == fresh[:, 1::2]).float().mean() > 0.9


@pytest.mark.parametrize("fields", [{}, MIXED])
def test_bf16_products(fields: dict[str, Any], make_model, seed: int) -> None:
    """Guards: types that do not meet under autocast, in training, in use and with a cache."""
    model = opened(make_model, 0.5, reasoning_ponder_coef=0.01, **fields)
    ids = torch.randint(61, (2, 12))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            full, cached = model(ids).logits, decode(model, ids, [5, 6])[0]
        assert full.isfinite().all() and cached.isfinite().all()
        model.train()
        out = model(ids, labels=ids)
        torch.stack([out.loss_sum, *out.deep_losses.values()]).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_optimisers_hold_the_head(make_model) -> None:
    """Guards: a head whose maps are left to the slower optimiser; a table or a readout treated as a map."""
    model = make_model(use_reasoning=True)
    muon = {id(p) for g in build_optimizers(model, OptimizationConfig(optimizer="muon"), "cpu")[1].param_groups for p in g["params"]}
    inside = {name for name, p in model.reasoning.named_parameters() if id(p) in muon}
    assert {"self_attn.qkv_proj.weight", "cross_attn.k_proj.weight", "mlp.gate_up_proj.weight", "out_proj.weight"} <= inside
    assert not inside & {"step_embedding.weight", "confidence.out.weight"}


# ------------------------------------------------------------------------------------------------------------------------ config


@pytest.mark.parametrize(
    "fields", [{}, {"reasoning_steps": 2, "reasoning_heads": 2, "reasoning_ffn": 320}, {"feed_forward": "relu2"}, MIXED]
)
def test_the_account_counts_the_head(fields: dict[str, Any]) -> None:
    """Guards: a head that costs nothing on paper; work that does not grow with the steps."""
    shape = {"vocab_size": 61, "n_layer": 3, "n_head": 4, "n_kv_head": 2, "n_embd": 32, **fields}
    account, plain = (HaoAIConfig(**shape, use_reasoning=on).account() for on in (True, False))
    with torch.device("meta"):
        assert account.parameters == SmartHaoAI(account.config).num_parameters()
    more = HaoAIConfig(**{**shape, "use_reasoning": True, "reasoning_steps": 8}).account()
    for training in (True, False):
        assert plain.flops_per_token(64, training) < account.flops_per_token(64, training) < more.flops_per_token(64, training)
    assert plain.kv_cache_bytes(64) < account.kv_cache_bytes(64) < more.kv_cache_bytes(64)
    assert plain.training_bytes(2, 64) < account.training_bytes(2, 64)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reasoning_steps": 0}, "reasoning_steps .*0"),
        ({"reasoning_heads": 3}, "reasoning_heads=3.*multiple.*2"),
        ({"reasoning_ffn": -4}, "reasoning_ffn .*-4"),
        ({"reasoning_halt": 1.0}, "reasoning_halt .*1.0"),
        ({"reasoning_ponder_coef": -0.1}, "reasoning_ponder_coef .*-0.1"),
    ],
)
def test_wrong_settings_are_named(fields: dict[str, Any], message: str) -> None:
    """Guards: a shape error from deep inside torch; a threshold that no token can pass."""
    with pytest.raises(ValueError, match=message):
        HaoAIConfig(use_reasoning=True, n_head=8, n_kv_head=4, **fields)


def test_off_it_leaves_no_trace(make_model, seed: int) -> None:
    """Guards: settings of a head that is not there which make a standard model unportable."""
    model = make_model(reasoning_steps=7, reasoning_halt=0.3)
    assert model.reasoning is None and not portability_notes(model.config)
    with torch.no_grad():
        assert model(torch.randint(61, (1, 5))).confidence is None
    assert not KVCache(model.config, 1, 8).reasoning
