"""Who sees whom: causality, windows, packed documents, padding; and what counts for the loss."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.attention import attention_mask
from model.blocked_attention import blocked_attention
from model.transformer import pad_left

WINDOW = {"use_sliding_window": True, "window_size": 4, "window_pattern": "SL"}


def reference_loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("fields", [{}, WINDOW, {"n_kv_head": 4, "qk_norm": False}], ids=["full", "windows", "multi-head"])
def test_a_token_changes_nothing_before_it(fields: dict, make_model, seed: int) -> None:
    """Guards: a model that sees the future trains to a loss of zero and writes nonsense."""
    model = make_model(**fields)
    ids = torch.randint(61, (1, 16))
    place = int(torch.randint(1, 16, ()))
    changed = ids.clone()
    changed[0, place] = (changed[0, place] + 1) % 61
    with torch.no_grad():
        before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(after[:, :place], before[:, :place], rtol=0, atol=2e-6)
    assert (after[:, place] - before[:, place]).abs().max() > 1e-3


@pytest.mark.parametrize("window", [1, 3, 7])
def test_a_window_is_that_many_keys_with_the_token_itself(window: int, make_model, seed: int) -> None:
    """Guards: a window that is configured and never used, or that is one key too long or too short."""
    model = make_model(n_layer=1, use_sliding_window=True, window_size=window, window_pattern="S")
    ids = torch.randint(61, (1, 12))
    with torch.no_grad():
        before = model(ids).logits[0, -1]
        for distance in range(12):
            changed = ids.clone()
            changed[0, 11 - distance] = (changed[0, 11 - distance] + 1) % 61
            moved = (model(changed).logits[0, -1] - before).abs().max().item()
            if distance < window:
                assert moved > 1e-4, f"a key {distance} back must be seen by a window of {window}"
            else:
                assert moved < 2e-6, f"a key {distance} back must not be seen by a window of {window}"


@pytest.mark.parametrize("fields", [{}, WINDOW, {"tie_word_embeddings": False, "qk_norm": False}], ids=["full", "windows", "untied"])
def test_packed_documents_equal_separate_documents(fields: dict, make_model, seed: int) -> None:
    """Guards: attention or positions that run across a border; labels predicted from another document's last token."""
    model = make_model(**fields)
    documents = [torch.randint(61, (1, n)) for n in (7, 1, 12, 4)]
    row = torch.cat(documents, dim=1)
    segments = torch.cat([torch.full_like(d, i + 5) for i, d in enumerate(documents)], dim=1)
    with torch.no_grad():
        packed = model(row, segment_ids=segments, labels=row, return_logits=True)
        separate = [model(d, labels=d, return_logits=True) for d in documents]
    torch.testing.assert_close(packed.logits, torch.cat([s.logits for s in separate], dim=1), rtol=0, atol=1e-5)
    assert packed.loss_tokens == sum(s.loss_tokens for s in separate) == 6 + 0 + 11 + 3
    torch.testing.assert_close(packed.loss_sum, sum(s.loss_sum for s in separate), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed.loss, packed.loss_sum / packed.loss_tokens)


def test_packed_gradients_equal_separate_gradients(make_model, seed: int) -> None:
    """Guards: a packed training step that optimises something else than its documents."""
    model = make_model(n_layer=1)
    documents = [torch.randint(61, (1, n)) for n in (5, 9)]
    row = torch.cat(documents, dim=1)
    segments = torch.cat([torch.full_like(d, i) for i, d in enumerate(documents)], dim=1)
    weights = list(model.parameters())
    packed = torch.autograd.grad(model(row, segment_ids=segments, labels=row).loss_sum, weights)
    apart = torch.autograd.grad(sum(model(d, labels=d).loss_sum for d in documents), weights)
    for ours, theirs in zip(packed, apart, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_nothing_leaks_from_one_document_into_another(make_model, seed: int) -> None:
    """Guards: a later document that changes with an earlier one."""
    model = make_model(**WINDOW)
    ids = torch.randint(61, (1, 20))
    segments = torch.tensor([[0] * 8 + [1] * 12])
    changed = torch.cat((torch.randint(61, (1, 8)), ids[:, 8:]), dim=1)
    with torch.no_grad():
        difference = model(ids, segment_ids=segments).logits - model(changed, segment_ids=segments).logits
    assert difference[:, 8:].abs().max() < 2e-6


def test_the_loss_is_the_mean_over_labelled_tokens(make_model, seed: int) -> None:
    """Guards: labels shifted twice or not at all; a mean over all tokens instead of the labelled ones."""
    model = make_model()
    ids = torch.randint(61, (3, 11))
    labels = ids.masked_fill(torch.rand(3, 11) < 0.5, -100)
    with torch.no_grad():
        out = model(ids, labels=labels, return_logits=True)
    count = int((labels[:, 1:] != -100).sum())
    expected = reference_loss_sum(out.logits, labels)
    assert out.loss_tokens == count
    torch.testing.assert_close(out.loss_sum.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.loss.double(), expected / max(count, 1), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert model(ids, labels=labels).logits is None


def test_no_label_at_all_gives_zero_and_never_nan(make_model, seed: int) -> None:
    """Guards: 0 / 0 in a batch whose rows are all prompt."""
    model = make_model()
    ids = torch.randint(61, (2, 6))
    out = model(ids, labels=torch.full_like(ids, -100))
    assert out.loss.item() == 0 and out.loss_tokens == 0
    out.loss.backward()
    assert all(p.grad is None or torch.equal(p.grad, torch.zeros_like(p.grad)) for p in model.parameters())


@pytest.mark.parametrize("fields", [{}, WINDOW], ids=["full", "windows"])
def test_fully_padded_rows_stay_finite_and_disturb_nobody(fields: dict, make_model, seed: int) -> None:
    """Guards: NaN from the softmax of a row without any key, forward and backward."""
    model = make_model(**fields)
    ids = torch.randint(61, (3, 9))
    mask = torch.tensor([[1] * 9, [0] * 9, [1] * 6 + [0] * 3])
    labels = ids.masked_fill(mask == 0, -100)
    out = model(ids, attention_mask=mask, labels=labels, return_logits=True)
    assert torch.isfinite(out.logits).all()
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(out.logits[0], model(ids[:1]).logits[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(out.logits[2, :6], model(ids[2:, :6]).logits[0], rtol=0, atol=1e-5)


def test_padding_and_packing_together(make_model, seed: int) -> None:
    """Guards: a packed row whose tail is padding (its own segment) becomes NaN or changes the documents."""
    model = make_model()
    ids = torch.randint(61, (1, 10))
    segments = torch.tensor([[0] * 4 + [1] * 3 + [-1] * 3])
    mask = (segments >= 0).long()
    with torch.no_grad():
        out = model(ids, attention_mask=mask, segment_ids=segments).logits
        assert torch.isfinite(out).all()
        torch.testing.assert_close(out[:, 4:7], model(ids[:, 4:7]).logits, rtol=0, atol=1e-5)


def test_a_text_longer_than_the_context_is_refused(make_model) -> None:
    """Guards: positions the model was never made for, without a word."""
    with pytest.raises(ValueError, match="65 tokens exceed .* 64"):
        make_model()(torch.zeros(1, 65, dtype=torch.long))


def test_a_new_model_starts_at_the_uniform_loss(tiny_model) -> None:
    """Guards: an initialisation so large that training begins far above ln V."""
    ids = torch.randint(tiny_model.config.vocab_size, (4, 32))
    with torch.no_grad():
        assert abs(tiny_model(ids, labels=ids).loss.item() - math.log(tiny_model.config.vocab_size)) < 0.1


def test_dropout_only_acts_in_training(make_model) -> None:
    """Guards: answers that differ from call to call; a dropout setting that is never used."""
    model = make_model(dropout=0.5, attention_dropout=0.5)
    ids = torch.randint(61, (1, 12))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)


def test_pad_left() -> None:
    """Guards: ids and mask that disagree about the side of the padding."""
    ids, mask = pad_left([[5, 6, 7], [8]], pad_id=0)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "again"])
@pytest.mark.parametrize("kind", ["causal", "masked", "window"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_blocked_attention_equals_the_kernel(kv_heads: int, kind: str, kept: bool, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: heads paired with another group's keys, queries or keys lost between the blocks; values and gradients."""
    T = 75  # three blocks, the last one short
    monkeypatch.setattr("model.blocked_attention.CACHED", 1)
    monkeypatch.setattr("model.blocked_attention.LONGEST_KEPT", T if kept else 0)
    inputs = [torch.randn(2, heads, T, 6, requires_grad=True) for heads in (4, kv_heads, kv_heads)]
    mask = None
    if kind == "masked":
        allowed = (torch.rand(2, 1, T, T) < 0.5).tril() | torch.eye(T, dtype=torch.bool)
        mask = torch.zeros(2, 1, T, T).masked_fill(~allowed, float("-inf"))
    if kind == "window":
        mask = attention_mask(torch.arange(T), torch.arange(T), 10, None, None, None, torch.float32)
    q, k, v = inputs
    expected = F.scaled_dot_product_attention(
        q, k.repeat_interleave(4 // kv_heads, 1), v.repeat_interleave(4 // kv_heads, 1), attn_mask=mask, is_causal=mask is None
    )
    actual = blocked_attention(q, k, v, mask, 10 if kind == "window" else None)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(expected)
    gradients = zip(torch.autograd.grad(actual, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True)
    for ours, theirs in gradients:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fields", [{}, WINDOW, {"n_kv_head": 4}], ids=["full", "windows", "multi-head"])
@pytest.mark.parametrize("packed", [False, True])
def test_bfloat16_training_is_the_same_model(fields: dict, packed: bool, make_model, seed: int) -> None:
    """Guards: masks, windows or documents that are lost in the mixed-precision path."""
    model = make_model(initializer_range=0.05, **fields).train()
    ids = torch.randint(61, (2, 24))
    segments = torch.tensor([[0] * 9 + [1] * 15, [0] * 24]) if packed else None
    exact = model(ids, segment_ids=segments, labels=ids, return_logits=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(ids, segment_ids=segments, labels=ids, return_logits=True)
    assert abs(mixed.loss.item() - exact.loss.item()) < 0.02
    torch.testing.assert_close(mixed.logits.float(), exact.logits, rtol=0, atol=0.03 * exact.logits.abs().max().item())
    mixed.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_bfloat16_training_with_a_padded_row_is_finite(make_model, seed: int) -> None:
    """Guards: NaN from -inf minus -inf in the explicit softmax."""
    model = make_model(**WINDOW).train()
    ids = torch.randint(61, (2, 9))
    mask = torch.tensor([[0] * 9, [0] * 3 + [1] * 6])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    out.loss.backward()
    assert torch.isfinite(out.loss) and all(torch.isfinite(p.grad).all() for p in model.parameters())
