"""Log-probabilities of packed completions against each sequence on its own, in plain maths."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from model import HaoAIConfig, SmartHaoAI
from train.log_probs import completion_log_probs, pad_sequences, sequence_numbers, sequence_sums
from train.losses import dpo_loss, kl_estimate, ppo_policy_loss

VOCABULARY = 53
LENGTHS = [[(5, 2), (4, 0), (7, 6)], [(9, 4), (3, 3)]]  # of each row's sequences: tokens, and how many of them are completion

pytestmark = pytest.mark.usefixtures("seed")


def make_model(**fields: object) -> SmartHaoAI:
    shape: dict[str, object] = {"vocab_size": VOCABULARY, "n_layer": 2, "n_head": 2, "n_embd": 16, "intermediate_size": 24}
    return SmartHaoAI(HaoAIConfig(**{**shape, "initializer_range": 0.3, **fields}))  # type: ignore[arg-type]


def packed() -> tuple[dict[str, Tensor], list[tuple[Tensor, int]]]:
    """A packed batch, and its sequences: ids, and how many of the last are completion."""
    T = 1 + max(sum(length for length, _ in row) for row in LENGTHS)
    inputs = {"input_ids": torch.zeros(2, T, dtype=torch.long), "labels": torch.full((2, T), -100), "segment_ids": torch.zeros(2, T).long()}
    sequences = []
    for row, parts in enumerate(LENGTHS):
        start = 0
        for number, (length, learned) in enumerate(parts, start=1):
            ids = torch.randint(VOCABULARY, (length,))
            inputs["input_ids"][row, start : start + length] = ids
            inputs["labels"][row, start + length - learned : start + length] = ids[length - learned :]
            inputs["segment_ids"][row, start : start + length] = number
            sequences.append((ids, min(learned, length - 1)))  # the first token is given
            start += length
    return inputs, sequences


@pytest.mark.parametrize(("cap", "temperature"), [(0.0, 1.0), (2.0, 0.6)])
def test_packed_equals_one_by_one(cap: float, temperature: float) -> None:
    """Guards: a completion's first token predicted from its neighbour, tokens credited to another sequence, a forgotten temperature."""
    model = make_model(logit_softcap=cap).eval()
    inputs, sequences = packed()
    found = completion_log_probs(model, inputs, temperature, entropy=True)
    expected_values, expected_entropies = [], []
    with torch.no_grad():
        for ids, learned in sequences:
            logs = (model(ids[None]).logits[0].double() / temperature).log_softmax(-1)[:-1]
            expected_values.append(logs.gather(1, ids[1:, None])[len(logs) - learned :, 0])
            expected_entropies.append(-(logs.exp() * logs).sum(-1)[len(logs) - learned :])
    assert found.count == len(sequences) and found.lengths().tolist() == [learned for _, learned in sequences]
    assert found.sequence.tolist() == [n for n, (_, learned) in enumerate(sequences) for _ in range(learned)]
    torch.testing.assert_close(found.values.double(), torch.cat(expected_values), rtol=1e-5, atol=1e-5)
    assert found.entropy is not None
    torch.testing.assert_close(found.entropy.double(), torch.cat(expected_entropies), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.sums().double(), torch.stack([v.sum() for v in expected_values]), rtol=1e-5, atol=1e-5)


def test_the_gradient_is_that_of_the_logits() -> None:
    """Guards: a head or a trunk that the log-probabilities do not reach."""
    model = make_model().eval()
    inputs, sequences = packed()
    upstream = torch.randn(len(sequences))
    (completion_log_probs(model, inputs).sums() * upstream).sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    parts = [model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[len(ids) - 1 - n :, 0].sum() for ids, n in sequences]
    (torch.stack(parts) * upstream).sum().backward()
    assert found.keys() == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-4)


def test_the_same_weights_agree_to_the_last_bit() -> None:
    """Guards: a first ratio near 1, a first KL near 0, a first DPO loss near ln 2: references that come from another computation."""
    policy = make_model(dropout=0.0).train()
    reference = copy.deepcopy(policy).eval()
    inputs, _ = packed()
    with torch.no_grad():
        old = completion_log_probs(reference, inputs)
    new = completion_log_probs(policy, inputs, entropy=True)
    assert torch.equal(old.values, new.values) and torch.equal((new.values - old.values).exp(), torch.ones(len(new.values)))
    for kind in ("k1", "k2", "k3"):
        assert not kl_estimate(new.values, old.values, kind).any()
    advantages = torch.randn(len(new.values))
    assert torch.equal(ppo_policy_loss(new.values, old.values, advantages, 0.2), -advantages)
    pairs, ref = new.sums()[:4].view(2, 2), old.sums()[:4].view(2, 2)
    losses = dpo_loss(pairs[:, 0], pairs[:, 1], ref[:, 0], ref[:, 1], 0.1)
    assert losses.tolist() == [torch.tensor(math.log(2)).item()] * 2
    losses.sum().backward()
    assert all(parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in policy.parameters())


def test_padded_rows_and_attention_masks() -> None:
    """Guards: rows without segments counted as one sequence; padding on the left that shifts positions."""
    model = make_model().eval()
    ids = torch.randint(VOCABULARY, (3, 6))
    labels = ids.masked_fill(torch.arange(6) < 3, -100)
    plain = completion_log_probs(model, {"input_ids": ids, "labels": labels})
    assert plain.count == 3 and plain.lengths().tolist() == [3, 3, 3]
    widened = {
        "input_ids": torch.cat((torch.zeros(3, 2, dtype=torch.long), ids), 1),
        "labels": torch.cat((torch.full((3, 2), -100), labels), 1),
    }
    widened["attention_mask"] = torch.cat((torch.zeros(3, 2), torch.ones(3, 6)), 1).long()
    torch.testing.assert_close(completion_log_probs(model, widened).values, plain.values, rtol=1e-5, atol=1e-5)


def test_no_labelled_token() -> None:
    """Guards: a micro-batch that teaches nothing and crashes, or divides by zero."""
    model = make_model()
    inputs, sequences = packed()
    found = completion_log_probs(model, {**inputs, "labels": torch.full_like(inputs["labels"], -100)}, entropy=True)
    assert found.count == len(sequences) and not len(found.values) and found.sums().tolist() == [0.0] * len(sequences)
    found.sums().sum().backward()
    rows, mask = pad_sequences(found.values, found.lengths())
    assert rows.shape == mask.shape == (len(sequences), 0)
    with pytest.raises(ValueError, match="labels"):
        completion_log_probs(model, {"input_ids": inputs["input_ids"]})


def test_states_are_those_the_tokens_were_predicted_from() -> None:
    """Guards: a value head that sees the token it should value before."""
    model = make_model().eval()
    inputs, _ = packed()
    found = completion_log_probs(model, inputs, entropy=False)
    logs = (found.states @ model.head_weight.T).log_softmax(-1)
    labels = inputs["labels"][:, 1:][(inputs["labels"][:, 1:] != -100) & (inputs["segment_ids"][:, 1:] == inputs["segment_ids"][:, :-1])]
    torch.testing.assert_close(logs.gather(1, labels[:, None])[:, 0], found.values, rtol=1e-5, atol=1e-5)
    assert found.entropy is None


def test_experts_add_their_auxiliary_loss_in_training_only() -> None:
    """Guards: experts that collapse during preference training, because only the labelled loss balanced them."""
    model = make_model(n_expert=4, n_expert_per_token=2, moe_intermediate_size=16, router_aux_loss_coef=0.1)
    inputs, _ = packed()
    aux_loss = completion_log_probs(model.train(), inputs).aux_loss
    assert aux_loss is not None and aux_loss.requires_grad
    assert completion_log_probs(model.eval(), inputs).aux_loss is None
    assert completion_log_probs(make_model().train(), inputs).aux_loss is None


def test_sequences_are_numbered_over_rows() -> None:
    """Guards: equal segment numbers of two rows taken for one sequence; padding in front or behind that counts as one."""
    segments = torch.tensor([[1, 1, 2, 0], [0, 1, 2, 2], [3, 3, 3, 3]])
    numbers, count = sequence_numbers(torch.zeros_like(segments), segments)
    assert count == 5 and numbers[segments > 0].tolist() == [0, 0, 1, 2, 3, 3, 4, 4, 4, 4]
    assert segments.tolist() == [[1, 1, 2, 0], [0, 1, 2, 2], [3, 3, 3, 3]]


def test_rows_and_back() -> None:
    """Guards: values that come back in another order from the rows in which advantages are computed."""
    lengths = torch.tensor([2, 0, 3])
    values = torch.randn(5, requires_grad=True)
    rows, mask = pad_sequences(values, lengths)
    assert mask.tolist() == [[True, True, False], [False] * 3, [True] * 3] and torch.equal(rows[mask], values)
    assert not rows[~mask].any()
    rows.sum().backward()
    assert values.grad is not None and torch.equal(values.grad, torch.ones(5))
    sums = sequence_sums(values, torch.tensor([0, 0, 2, 2, 2]), 3)
    torch.testing.assert_close(sums, rows.sum(dim=1))
