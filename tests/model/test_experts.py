"""Mixture of experts against a reference that goes through the tokens one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from model import HaoAIConfig, SmartHaoAI
from model.cache import KVCache
from model.feedforward import MixtureOfExperts, Routing, balance_loss, grouped_linear, kernel_fits, kernel_product, z_loss
from model.transformer import pad_left

SPARSE: dict[str, Any] = {"n_expert": 5, "n_expert_per_token": 2, "moe_intermediate_size": 24}


def make_layer(**fields: Any) -> MixtureOfExperts:
    """One layer with large random weights and a decisive router."""
    config = HaoAIConfig(n_layer=1, n_head=2, n_embd=12, intermediate_size=20, **{**SPARSE, "moe_intermediate_size": 8, **fields})
    layer = MixtureOfExperts(config)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.6)
        if layer.choice_bias is not None:
            layer.choice_bias.normal_(std=0.5)
    return layer


def reference(layer: MixtureOfExperts, x: Tensor) -> tuple[Tensor, list[list[int]]]:
    """What the layer must compute for x (N, C), token by token, and the experts of each token."""
    rows, chosen = [], []
    for token in x:
        probabilities = F.softmax(token @ layer.gate.weight.T, dim=0)
        order = probabilities if layer.choice_bias is None else probabilities + layer.choice_bias
        best = sorted(range(layer.n_expert), key=lambda e: -order[e].item())[: layer.k]
        total = sum(probabilities[e] for e in best) if layer.normalise else 1.0
        y = torch.zeros_like(token)
        for e in best:
            gate, up = layer.gate_up_proj[e].chunk(2)
            y = y + probabilities[e] / total * (layer.down_proj[e] @ (F.silu(gate @ token) * (up @ token)))
        if layer.shared_expert is not None:
            gate, up = layer.shared_expert.gate_up_proj.weight.chunk(2)
            y = y + layer.shared_expert.down_proj.weight @ (F.silu(gate @ token) * (up @ token))
        rows.append(y)
        chosen.append(sorted(best))
    return torch.stack(rows), chosen


def choices(layer: MixtureOfExperts, x: Tensor) -> list[list[int]]:
    """The experts of each token of x (N, C), seen from outside: those whose weights the token's output depends on."""
    result = []
    for token in x:
        (gradient,) = torch.autograd.grad(layer(token[None, None]).sum(), layer.down_proj)
        result.append([e for e in range(layer.n_expert) if bool(gradient[e].any())])
    return result


@pytest.mark.parametrize(
    "fields",
    [{"n_expert_per_token": k, "norm_topk_prob": norm} for k in range(1, 6) for norm in (True, False)]
    + [{"n_shared_expert": 2}, {"router_bias_rate": 0.1}, {"router_bias_rate": 0.1, "norm_topk_prob": False, "n_shared_expert": 1}],
    ids=str,
)
def test_forward_and_gradients_equal_the_reference(fields: dict[str, Any], seed: int) -> None:
    """Guards: tokens sent to the wrong expert or brought back to the wrong place, weights of another token, lost gradients."""
    layer = make_layer(**fields)
    x = torch.randn(3, 7, 12, requires_grad=True)
    inputs = [x, *layer.parameters()]
    weight = torch.randn(3, 7, 12)
    actual, (expected, _) = layer(x), reference(layer, x.view(-1, 12))
    torch.testing.assert_close(actual, expected.view_as(x), rtol=1e-4, atol=1e-5)
    got = torch.autograd.grad((actual * weight).sum(), inputs)
    wanted = torch.autograd.grad((expected.view_as(x) * weight).sum(), inputs)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
    assert all(bool(g.any()) for g in got[:2]) or layer.k == 1 and layer.normalise


def test_a_choice_bias_changes_the_choice_and_not_the_weights(seed: int) -> None:
    """Guards: a balancing bias that leaks into the weights, and so into what the model computes."""
    layer = make_layer(router_bias_rate=0.1, n_expert_per_token=2)
    assert layer.choice_bias is not None
    x = torch.randn(20, 12)
    with torch.no_grad():
        layer.choice_bias.zero_()
    before = choices(layer, x)
    plain = layer(x[None])
    with torch.no_grad():
        layer.choice_bias.fill_(3.0)  # equal for all: the same choice, so the same result
    assert choices(layer, x) == before and torch.equal(layer(x[None]), plain)
    with torch.no_grad():
        layer.choice_bias.copy_(torch.tensor([2.0, 0, 0, 0, 0]))
    after = choices(layer, x)
    assert after == reference(layer, x)[1] and after != before and all(0 in experts for experts in after)


@pytest.mark.parametrize("k", [1, 2])
def test_all_tokens_at_one_expert(k: int, seed: int) -> None:
    """Guards: a capacity that drops tokens; experts without a single token that break the sort, the product or the gradient."""
    layer = make_layer(n_expert_per_token=k, norm_topk_prob=False)
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate.weight[3] = 5.0
        layer.gate.weight[1] = 2.5
    x = torch.rand(4, 50, 12) + 0.1  # positive: every token prefers expert 3, then 1
    layer.train()
    actual = layer(x)
    torch.testing.assert_close(actual, reference(layer, x.view(-1, 12))[0].view_as(x), rtol=1e-4, atol=1e-5)
    assert layer.take_load().tolist() == [0, 200 if k == 2 else 0, 0, 200, 0]
    actual.sum().backward()
    assert layer.gate_up_proj.grad is not None and layer.down_proj.grad is not None
    for gradient in (layer.gate_up_proj.grad, layer.down_proj.grad):
        assert [bool(gradient[e].any()) for e in range(5)] == [False, k == 2, False, True, False]
        assert torch.isfinite(gradient).all()
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), actual, rtol=1e-5, atol=1e-6)  # without gradients empty experts are left out


def test_a_token_does_not_depend_on_its_company(seed: int) -> None:
    """Guards: results that change with what else is in the batch."""
    layer = make_layer().eval()
    x = torch.randn(2, 9, 12)
    with torch.no_grad():
        whole = layer(x)
        torch.testing.assert_close(torch.cat([layer(x[:, t : t + 1]) for t in range(9)], dim=1), whole, rtol=1e-4, atol=1e-5)


def captured_logits(model: SmartHaoAI, ids: Tensor, **inputs: Any) -> tuple[list[Tensor], Any]:
    """Router logits (N, E) of every layer with experts, and the output of a forward pass with labels."""
    logits: list[Tensor] = []

    def keep(layer: MixtureOfExperts, arguments: tuple[Any, ...]) -> None:
        x = arguments[0]
        logits.append(x.reshape(-1, x.shape[-1]) @ layer.gate.weight.T)

    handles = [layer.register_forward_pre_hook(keep) for layer in model.expert_layers]
    out = model(ids, labels=ids, **inputs)
    for handle in handles:
        handle.remove()
    return logits, out


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("masked", ["nothing", "attention_mask", "segment_ids"])
def test_auxiliary_losses_are_the_published_ones(masked: str, scope: str, make_model, seed: int) -> None:
    """Guards: statistics over padding, over other layers than the scope says, or of another scale (formulas written out here)."""
    coefficients = {"router_aux_loss_coef": 0.3, "router_z_loss_coef": 0.05}
    model = make_model(**SPARSE, n_layer=3, moe_pattern="EDE", router_balance_scope=scope, **coefficients).train()
    ids = torch.randint(61, (3, 11))
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[0, 7:] = 0
    mask[2, 3:] = 0
    inputs = {} if masked == "nothing" else {masked: mask}
    logits, out = captured_logits(model, ids, **inputs)
    real = torch.ones(33, dtype=torch.bool) if masked == "nothing" else mask.bool().view(-1)
    assert len(logits) == 2
    rows = torch.cat([part[real] for part in logits])  # (layers * tokens, E)
    probabilities = rows.softmax(-1)
    chosen = torch.zeros(len(rows), 5).scatter_(1, probabilities.topk(2).indices, 1.0)
    groups = [slice(None)] if scope == "model" else [slice(0, len(rows) // 2), slice(len(rows) // 2, None)]
    balance = torch.stack([5 * (chosen[g].mean(0) * probabilities[g].mean(0)).sum() for g in groups]).mean()
    torch.testing.assert_close(out.aux_terms["balance"], balance, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.aux_terms["router_z"], rows.exp().sum(-1).log().square().mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.aux_loss, 0.3 * out.aux_terms["balance"] + 0.05 * out.aux_terms["router_z"])
    load = model.take_expert_load()
    assert load is not None and load.shape == (2, 5) and load.sum(1).tolist() == [2.0 * int(real.sum())] * 2
    assert load.sum(0).tolist() == chosen.sum(0).tolist()


def test_the_balance_loss_equals_that_of_transformers(make_model, seed: int) -> None:
    """Guards: a coefficient that means something else here than in the same file there."""
    theirs = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe").load_balancing_loss_func
    model = make_model(**SPARSE, router_balance_scope="model").train()
    ids = torch.randint(61, (3, 11))
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[1, 4:] = 0
    for given_mask in (None, mask):
        logits, out = captured_logits(model, ids, attention_mask=given_mask)
        torch.testing.assert_close(out.aux_terms["balance"], theirs(tuple(logits), 5, 2, given_mask), rtol=1e-5, atol=1e-6)


def test_auxiliary_losses_train_the_router_alone(make_model, seed: int) -> None:
    """Guards: counts that carry a gradient, or a balance loss without one."""
    model = make_model(**SPARSE).train()
    ids = torch.randint(61, (2, 9))
    out = model(ids, labels=ids)
    parameters = dict(model.named_parameters())
    last = "layers.1.mlp.gate.weight"
    names = [last, "layers.1.mlp.down_proj"]
    gate, down = torch.autograd.grad(out.aux_loss, [parameters[n] for n in names], allow_unused=True)
    assert gate is not None and bool(gate.any()) and down is None


def test_perfect_balance_gives_k() -> None:
    """Guards: the scale that the docstring promises."""
    even = Routing(torch.full((4,), 5.0), torch.full((4,), 2.5), torch.tensor(10.0), torch.tensor(10.0))
    for scope in ("layer", "model"):
        assert float(balance_loss([even, even], scope)) == pytest.approx(2.0)
    assert float(z_loss([even, even])) == pytest.approx(1.0)


def test_one_layers_favourite_is_not_made_up_for_by_another() -> None:
    """Guards: layers that each use half of their experts counted as balanced because together they use all (scope "layer")."""
    first = Routing(torch.tensor([10.0, 10.0, 0.0, 0.0]), torch.tensor([5.0, 5.0, 0.0, 0.0]), torch.tensor(0.0), torch.tensor(10.0))
    second = Routing(torch.tensor([0.0, 0.0, 10.0, 10.0]), torch.tensor([0.0, 0.0, 5.0, 5.0]), torch.tensor(0.0), torch.tensor(10.0))
    assert float(balance_loss([first, second], "model")) == pytest.approx(2.0)
    assert float(balance_loss([first, second], "layer")) == pytest.approx(4.0)


def test_evaluation_adds_no_auxiliary_loss(make_model, seed: int) -> None:
    """Guards: a validation loss that is not comparable with a dense model's; counting while evaluating."""
    model = make_model(**SPARSE, router_aux_loss_coef=5.0)
    ids = torch.randint(61, (2, 9))
    out = model(ids, labels=ids)
    assert out.aux_loss is None and not out.aux_terms
    assert bool((model.take_expert_load() == 0).all())
    logits = model(ids).logits
    torch.testing.assert_close(out.loss, F.cross_entropy(logits[:, :-1].reshape(-1, 61), ids[:, 1:].reshape(-1)))
    dense = make_model().train()
    assert dense(ids, labels=ids).aux_loss is None and dense.take_expert_load() is None


def test_bias_balancing_evens_the_load(seed: int) -> None:
    """Guards: a bias that moves the wrong way, or into a model that was not asked to have one."""
    layer = make_layer(router_bias_rate=0.002, n_expert=6).train()
    x = torch.randn(1, 300, 12) + 0.7 * torch.randn(12)  # a common direction, which some experts prefer

    def unevenness() -> float:
        with torch.no_grad():
            layer(x)
        load = layer.take_load()
        layer.balance(load)
        return float(load.max() / load.mean())

    with torch.no_grad():
        layer.choice_bias.zero_()  # type: ignore[union-attr]
        layer.gate.weight.mul_(0.3)  # probabilities within reach of so small a rate
    first = unevenness()
    later = [unevenness() for _ in range(250)][-20:]
    assert sum(later) / 20 < min(1.2, first)
    plain = make_layer().train()
    plain(x)
    plain.balance(plain.take_load())
    assert plain.choice_bias is None and "choice_bias" not in plain.state_dict()


def test_load_is_counted_until_it_is_taken(make_model, seed: int) -> None:
    """Guards: accumulation steps of which only the last is counted; a load that is counted twice."""
    model = make_model(**SPARSE).train()
    ids = torch.randint(61, (2, 8))
    model(ids, labels=ids)
    once = model.take_expert_load()
    for _ in range(3):
        model(ids, labels=ids)
    assert torch.equal(model.take_expert_load(), 3 * once)
    assert bool((model.take_expert_load() == 0).all())


def test_load_with_a_cache_is_that_of_the_new_tokens(make_model, seed: int) -> None:
    """Guards: a mask over the cached tokens, too, that is counted against the new ones (rollouts of a model in training mode)."""
    model = make_model(**SPARSE).train()
    ids, mask = pad_left([torch.randint(61, (n,)).tolist() for n in (9, 5)], pad_id=0)
    model(ids, attention_mask=mask)
    whole = model.take_expert_load()
    cache = KVCache(model.config, 2, 9)
    for start, end in ((0, 6), (6, 8), (8, 9)):
        model(ids[:, start:end], attention_mask=mask[:, :end], cache=cache)
    assert torch.equal(model.take_expert_load(), whole)


MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mixtral": {"qk_norm": False},
    "all": {"n_expert_per_token": 5},
    "everything": {"n_shared_expert": 1, "router_bias_rate": 0.1, "moe_pattern": "DE", "use_sliding_window": True, "window_size": 4},
}


@pytest.mark.parametrize("name", MODELS)
def test_decoding_with_a_cache_equals_the_whole_sequence(name: str, make_model, seed: int) -> None:
    """Guards: experts chosen otherwise for one token than for the same token in a row; also in left-padded batches."""
    model = make_model(**{**SPARSE, **MODELS[name]}, n_layer=3)
    rows = [torch.randint(61, (n,)).tolist() for n in (13, 6, 9)]
    ids, mask = pad_left(rows, pad_id=0)
    cache = KVCache(model.config, 3, 13)
    with torch.no_grad():
        parts = [model(ids[:, :8], attention_mask=mask[:, :8], cache=cache).logits]
        parts += [model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], cache=cache).logits for t in range(8, 13)]
        cached = torch.cat(parts, dim=1)
        for index, row in enumerate(rows):
            alone = model(torch.tensor([row])).logits[0]
            torch.testing.assert_close(cached[index, 13 - len(row) :], alone, rtol=0, atol=2e-5 * float(alone.abs().max()))


@pytest.mark.parametrize("name", MODELS)
def test_half_precision_trains(name: str, make_model, seed: int) -> None:
    """Guards: dtypes that do not meet under autocast; routers rounded with the rest."""
    model = make_model(**{**SPARSE, **MODELS[name]}).train()
    ids = torch.randint(61, (2, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(ids, labels=ids)
        (out.loss + out.aux_loss).backward()
    assert out.aux_loss.dtype == torch.float32
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name
    full = model(ids, labels=ids)
    assert abs(out.loss.item() - full.loss.item()) < 0.1 * full.loss.item()
    model.to(torch.bfloat16).eval()
    assert torch.isfinite(model(ids).logits).all()


@pytest.mark.parametrize("counts", [[4, 0, 6, 1], [0, 0, 11, 0], [3, 3, 3, 2]], ids=str)
def test_grouped_product_equals_the_loop(counts: list[int], seed: int) -> None:
    """Guards: offsets or the transposition of the one-kernel product, which is otherwise only reached on a GPU."""
    if not hasattr(F, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    assert kernel_fits(torch.empty(4, 24, 16))
    rows = torch.randn(11, 16).bfloat16().requires_grad_()
    weights = torch.randn(4, 24, 16).bfloat16().requires_grad_()
    sizes, weight = torch.tensor(counts), torch.randn(11, 24).bfloat16()
    loop = grouped_linear(rows, weights, sizes)
    kernel = kernel_product(rows, weights, sizes)
    torch.testing.assert_close(kernel, loop, rtol=0.02, atol=0.02)
    for a, b in zip(
        torch.autograd.grad((kernel * weight).sum(), [rows, weights]),
        torch.autograd.grad((loop * weight).sum(), [rows, weights]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.05)


@pytest.mark.parametrize(("outputs", "inputs"), [(24, 20), (20, 24), (12, 12)])
def test_sizes_that_the_kernel_refuses_are_known(outputs: int, inputs: int) -> None:
    """Guards: a width of experts that trains on a CPU and raises on a GPU ("strides should be multiple of 16 bytes")."""
    if not hasattr(F, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    assert not kernel_fits(torch.empty(2, outputs, inputs))
    rows = torch.randn(5, inputs).bfloat16().requires_grad_()
    weights = torch.randn(2, outputs, inputs).bfloat16().requires_grad_()
    with pytest.raises(RuntimeError, match="16 bytes"):
        products = kernel_product(rows, weights, torch.tensor([2, 3]))
        products.backward(torch.ones(5, outputs).bfloat16())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("width", [32, 24, 20])
def test_experts_on_a_gpu_equal_those_on_a_cpu(width: int, seed: int) -> None:
    """Guards: the grouped kernel on real hardware, which asks for aligned rows, against the loop in fp32."""
    layer = make_layer(moe_intermediate_size=width, n_embd=32, head_dim=16)
    x = torch.randn(2, 40, 32)
    expected = layer(x)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        actual = layer.cuda()(x.cuda())
    actual.sum().backward()
    torch.testing.assert_close(actual.cpu().float(), expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    experts = draw(st.integers(0, 5))
    fields: dict[str, Any] = {
        "vocab_size": draw(st.integers(3, 40)),
        "n_layer": draw(st.integers(1, 4)),
        "n_head": 2 * draw(st.integers(1, 2)),
        "n_kv_head": draw(st.sampled_from([1, 2])),
        "n_embd": 8,
        "head_dim": draw(st.sampled_from([2, 6])),
        "intermediate_size": draw(st.integers(1, 20)),
        "qk_norm": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "n_expert": experts,
    }
    if experts:
        fields.update(
            n_expert_per_token=draw(st.integers(1, experts)),
            moe_intermediate_size=draw(st.one_of(st.none(), st.integers(1, 9))),
            moe_pattern=draw(st.sampled_from(["E", "ED", "EED"])),
            n_shared_expert=draw(st.integers(0, 2)),
            router_bias_rate=draw(st.sampled_from([0.0, 0.01])),
        )
    return fields


@given(shapes())
@hypothesis_settings(max_examples=60, deadline=None)
def test_the_account_counts_every_parameter(fields: dict[str, Any]) -> None:
    """Guards: a --dry-run that promises another size; active parameters that are more than all."""
    config = HaoAIConfig(**fields)
    with torch.device("meta"):
        model = SmartHaoAI(config)
    account = config.account()
    assert account.parameters == model.num_parameters()
    used = [e for e in range(config.n_expert) if e < config.n_expert_per_token]
    active = sum(
        p.numel() if p.dim() < 3 else p[0].numel() * len(used) for n, p in model.named_parameters() if n.split(".")[0] in ("layers", "norm")
    )
    assert account.active_body_parameters == active


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_expert_per_token": 6}, "n_expert_per_token=6.*n_expert=5"),
        ({"n_expert_per_token": 0}, "n_expert_per_token=0"),
        ({"n_expert": -1}, "n_expert .*-1"),
        ({"n_expert": 2.0}, "n_expert .*2.0"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size .*0"),
        ({"moe_pattern": "EX"}, "moe_pattern.*'EX'"),
        ({"moe_pattern": ""}, "moe_pattern"),
        ({"moe_pattern": "DDDE", "n_layer": 2}, "moe_pattern='DDDE'.*2 layers.*n_expert=0"),
        ({"n_shared_expert": -1}, "n_shared_expert .*-1"),
        ({"router_aux_loss_coef": -0.1}, "router_aux_loss_coef .*-0.1"),
        ({"router_bias_rate": -1.0}, "router_bias_rate .*-1.0"),
    ],
    ids=str,
)
def test_wrong_fields_are_named(fields: dict[str, Any], message: str) -> None:
    """Guards: a top-k or shape error from deep inside torch."""
    with pytest.raises(ValueError, match=message):
        HaoAIConfig(**{**SPARSE, **fields})
