"""LoRA: what an adapter computes, on which layers, its files, and PEFT on the other side."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_helpers import assert_equal_logits, load_theirs
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import SmartHaoAI
from model.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_base, load_adapter, restore_adapter, save_adapter
from model.checkpoint import load_config, load_pretrained, save_pretrained, weights_to_disk
from model.heads import ValueHead
from model.lora import LoRALinear, LoRASettings, disabled, inject_lora, linear_layers, matrices, merge, use_adapter

ModelMaker = Callable[..., SmartHaoAI]
EXPERTS: dict[str, Any] = {"n_expert": 4, "n_expert_per_token": 2, "moe_intermediate_size": 24}
SMART: dict[str, dict[str, Any]] = {
    "plain": {},
    "qwen2": {"qk_norm": False, "attention_bias": True},
    "experts": EXPERTS,
    "gate": {"attention_gate": "element", "residual_scale": True, "feed_forward": "relu2"},
    "values": {"value_residual": True, "value_embedding": True, "attention_temperature": "query", "logit_softcap": 20.0},
    "reasoning": {"use_reasoning": True, "reasoning_steps": 2, "reasoning_heads": 2},
}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"rslora": True, "targets": ["v_proj", "o_proj"]},
    "dora": {"dora": True},
}


def trained(model: SmartHaoAI, base: str = "", **settings: Any) -> SmartHaoAI:
    """The model with an adapter that matters."""
    adapter = inject_lora(model, LoRASettings(**{"r": 3, "alpha": 7.0, **settings}), base)
    with torch.no_grad():
        for _, _, pair in adapter.pairs(model):
            pair.B.normal_(std=0.2)
            if pair.magnitude is not None:
                pair.magnitude.mul_(torch.empty_like(pair.magnitude).uniform_(0.7, 1.4))
    return model


def randomised(model: SmartHaoAI) -> SmartHaoAI:
    """The optional parts begin without an effect: give them one."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model


def logits(model: SmartHaoAI, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found = model(ids).logits
    assert found is not None
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", SMART)
def test_an_adapter_on_every_kind_of_model(parts: str, kind: str, make_model: ModelMaker, seed: int) -> None:
    """Guards: an adapter that changes the model before it is trained, reaches no layer of some part, trains the base, is merged into
    other weights than it ran beside, or leaves something behind when it is switched off or taken away."""
    settings = dict(KINDS[kind])
    model = randomised(make_model(**SMART[parts]))
    ids = torch.randint(61, (2, 20))
    before, names = logits(model, ids), set(model.state_dict())
    adapter = inject_lora(model, LoRASettings(**{"r": 3, **settings}))
    assert torch.allclose(logits(model, ids), before, atol=1e-4)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning and all(".adapter." in name for name in learning)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == adapter.num_parameters()
    model.train()
    model(ids, labels=ids).loss.backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())
    model.eval().zero_grad(set_to_none=True)
    use_adapter(model, None)
    after = logits(trained(model, **settings), ids)
    assert (after - before).abs().max() > 0.05
    with pytest.raises(KeyError), disabled(model):
        with disabled(model):
            assert torch.equal(logits(model, ids), before)
        assert torch.equal(logits(model, ids), before)
        raise KeyError
    assert torch.equal(logits(model, ids), after)
    own = model.adapter
    use_adapter(model, None)
    assert torch.equal(logits(model, ids), before) and all(parameter.requires_grad for parameter in model.parameters())
    use_adapter(model, own)
    merge(model)
    assert torch.allclose(logits(model, ids), after, atol=2e-5 * float(after.abs().max())) and model.adapter is None
    assert set(model.state_dict()) == names and not any(isinstance(module, LoRALinear) for module in model.modules())


def test_which_layers_have_adapters(make_model: ModelMaker) -> None:
    """Guards: square layers only, experts or routers by accident, a reasoning head that is left out."""
    plain = make_model()
    found = {name for layer in linear_layers(plain) for name in matrices(plain, layer)}
    kinds = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
    assert found == {f"model.layers.{layer}.{kind}" for layer in (0, 1) for kind in kinds}
    experts = make_model(**EXPERTS)
    found = {name for layer in linear_layers(experts) for name in matrices(experts, layer)}
    assert found == {f"model.layers.{layer}.{kind}" for layer in (0, 1) for kind in kinds[:4]}
    head = make_model(use_reasoning=True)
    found = {name for layer in linear_layers(head) for name in matrices(head, layer) if "reasoning" in name}
    parts = ("self_attn.q_proj", "cross_attn.v_proj", "cross_attn.o_proj", "mlp.up_proj", "out_proj")
    assert {f"model.reasoning.{part}" for part in parts} < found and "model.reasoning.confidence" not in found
    adapter = inject_lora(plain, LoRASettings(r=2, targets="k_proj, up_proj"))
    assert {tuple(factors) for factors in adapter.layers.values()} == {("k_proj",), ("up_proj",)}


@pytest.mark.parametrize("dora", [False, True])
def test_the_maths_of_a_fused_layer(dora: bool, make_model: ModelMaker, seed: int) -> None:
    """Guards: the factors of one matrix used for the rows of its neighbour, another scale, a magnitude along the other axis."""
    model = make_model(n_head=4, n_kv_head=2, qk_norm=False, attention_bias=True)
    torch.nn.init.normal_(model.get_parameter("layers.0.self_attn.qkv_proj.bias"))
    base = {name: tensor.double() for name, tensor in weights_to_disk(model.state_dict(), model.config).items()}
    trained(model, r=2, alpha=6.0, rslora=True, dora=dora, targets="k_proj,v_proj")
    layer: Any = model.get_submodule("layers.0.self_attn.qkv_proj")
    x = torch.randn(5, 32)
    got = layer(x).detach().double().split([32, 16, 16], dim=-1)
    for part, piece in zip(("q_proj", "k_proj", "v_proj"), got, strict=True):
        name = f"model.layers.0.self_attn.{part}"
        weight = base[f"{name}.weight"]
        if part != "q_proj":
            pair = layer.adapter[part]
            weight = weight + 6 / 2**0.5 * pair.B.detach().double() @ pair.A.detach().double()
            if dora:
                weight = torch.stack([m * row / row.norm() for m, row in zip(pair.magnitude.detach().double(), weight, strict=True)])
        assert torch.allclose(piece, x.double() @ weight.T + base[f"{name}.bias"], atol=1e-5), part


def test_dropout_is_for_training_only(make_model: ModelMaker, seed: int) -> None:
    """Guards: answers that change from call to call; a dropout setting without an effect."""
    model, ids = trained(make_model(), dropout=0.5), torch.randint(61, (1, 9))
    assert torch.equal(logits(model, ids), logits(model, ids))
    model.train()
    assert not torch.equal(logits(model, ids), logits(model, ids))


def test_a_mixture_of_experts_keeps_its_routers(make_model: ModelMaker) -> None:
    """Guards: experts named as targets and silently left out; a choice bias that moves in a base that should stay as it is."""
    model = make_model(**EXPERTS, router_bias_rate=0.01)
    with pytest.raises(ValueError, match="no gate_proj, up_proj for an adapter, but k_proj.*only the attention"):
        inject_lora(model, LoRASettings(targets="q_proj,gate_proj,up_proj"))
    inject_lora(model, LoRASettings(r=2))
    model.balance_experts(torch.tensor([[9.0, 1, 1, 1]] * 2))
    assert all(not layer.choice_bias.any() for layer in model.expert_layers if layer.choice_bias is not None)
    use_adapter(model, None)
    model.balance_experts(torch.tensor([[9.0, 1, 1, 1]] * 2))
    assert all(layer.choice_bias.any() for layer in model.expert_layers if layer.choice_bias is not None)


@pytest.mark.parametrize("wrong", [{"r": 0}, {"r": 2.5}, {"alpha": 0.0}, {"dropout": 1.0}, {"targets": "qproj"}])
def test_settings_that_cannot_work(wrong: dict[str, Any], make_model: ModelMaker) -> None:
    """Guards: a division by a rank of 0, a misspelt target that trains nothing."""
    with pytest.raises(ValueError, match=f"lora.{next(iter(wrong))}"):
        inject_lora(make_model(), LoRASettings(**wrong))


# ------------------------------------------------------------------------------------------------ files


@pytest.fixture
def folders(tmp_path: Path, make_model: ModelMaker, seed: int) -> tuple[SmartHaoAI, Path, Path]:
    """A model with an adapter, and the folders of its base and of the adapter."""
    model = make_model()
    save_pretrained(model, tmp_path / "base")
    trained(model, str(tmp_path / "base"), dora=True)
    save_pretrained(model, tmp_path / "lora")
    return model, tmp_path / "base", tmp_path / "lora"


def test_an_adapter_folder_stands_for_the_whole_model(folders: tuple[SmartHaoAI, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: an adapter that loads as its base, copies of the base beside every adapter, a base that is lost when both move."""
    model, base, lora = folders
    ids = torch.randint(61, (2, 20))
    assert sorted(file.name for file in lora.iterdir()) == [ADAPTER_CONFIG, ADAPTER_WEIGHTS]
    whole = SmartHaoAI.from_pretrained(lora)
    assert torch.allclose(logits(whole, ids), logits(model, ids), atol=2e-4) and whole.adapter is None
    assert load_config(lora) == load_config(base)
    half = load_pretrained(lora, dtype=torch.bfloat16)
    assert half.embed_tokens.weight.dtype == torch.bfloat16
    apart = SmartHaoAI.from_pretrained(base)
    load_adapter(apart, lora)
    assert torch.equal(logits(apart, ids), logits(model, ids))
    with disabled(apart):
        assert torch.equal(logits(apart, ids), logits(SmartHaoAI.from_pretrained(base), ids))
    place = lora.parent / "elsewhere"
    place.mkdir()
    for folder in (base, lora):
        shutil.move(folder, place / folder.name)
    assert adapter_base(place / "lora") == (place / "base").resolve()
    assert torch.equal(logits(SmartHaoAI.from_pretrained(place / "lora"), ids), logits(whole, ids))
    shutil.rmtree(place / "base")
    with pytest.raises(FileNotFoundError, match="the adapter .*lora needs its base: .*base"):
        SmartHaoAI.from_pretrained(place / "lora")


def test_an_adapter_on_an_adapter(folders: tuple[SmartHaoAI, Path, Path], tmp_path: Path) -> None:
    """Guards: a second adapter trained from the first, whose base is then taken for the plain model; a folder that names itself."""
    model, _, lora = folders
    second = trained(SmartHaoAI.from_pretrained(lora), str(lora), targets="down_proj")
    save_adapter(second, tmp_path / "second")
    ids = torch.randint(61, (2, 20))
    assert torch.allclose(logits(SmartHaoAI.from_pretrained(tmp_path / "second"), ids), logits(second, ids), atol=2e-4)
    edit(lora, base_model_name_or_path=str(lora))
    with pytest.raises(ValueError, match="names its own folder"):
        SmartHaoAI.from_pretrained(tmp_path / "second")


def edit(folder: Path, **changes: Any) -> None:
    file = folder / ADAPTER_CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def test_an_adapter_of_another_base(folders: tuple[SmartHaoAI, Path, Path], make_model: ModelMaker, tmp_path: Path) -> None:
    """Guards: an adapter that answers nonsense on a base of the same shape, or on the same base trained on; a bf16 copy refused."""
    _, base, lora = folders
    other = make_model()
    with pytest.raises(ValueError, match="lora was trained on another base: on '.*base'.*model_dir"):
        load_adapter(other, lora)
    save_pretrained(other, base)
    with pytest.raises(ValueError, match="lora was trained on another base"):
        SmartHaoAI.from_pretrained(lora)
    with pytest.raises(ValueError, match="lora was trained on another base"):
        restore_adapter(trained(SmartHaoAI.from_pretrained(base), dora=True), lora)
    with pytest.raises(ValueError, match="other base"):
        load_adapter(make_model(n_embd=64), lora)
    foreign = load_file(lora / ADAPTER_WEIGHTS)
    save_file(foreign, lora / ADAPTER_WEIGHTS)  # as PEFT writes it: without our fingerprint
    for wrong, words in (
        (make_model(n_embd=64), "q_proj.lora_A.weight has shape .* another base"),
        (make_model(n_layer=1), "lacks or runs"),
    ):
        with pytest.raises(ValueError, match=words):
            load_adapter(wrong, lora)
        save_pretrained(wrong, base)
        with pytest.raises(ValueError, match="another base|does not fit the base"):
            SmartHaoAI.from_pretrained(lora)


def test_half_precision_copies_are_the_same_base(folders: tuple[SmartHaoAI, Path, Path], tmp_path: Path) -> None:
    """Guards: an adapter refused on its own base because that was loaded or exported in bf16."""
    model, base, lora = folders
    load_adapter(load_pretrained(base, dtype=torch.bfloat16), lora)
    save_pretrained(SmartHaoAI.from_pretrained(base), tmp_path / "half", dtype=torch.bfloat16)
    edit(lora, base_model_name_or_path=str(tmp_path / "half"))
    ids = torch.randint(61, (2, 20))
    assert torch.allclose(logits(SmartHaoAI.from_pretrained(lora), ids), logits(model, ids), atol=0.3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "no LoRA adapter"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=.'lm_head'. is not supported"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"r": None}, "adapter_config.json: lora.r"),
        ({"r": 4}, "has shape"),
        ({"use_dora": False}, "lora_magnitude_vector"),
        ({"base_model_name_or_path": None}, "does not name its base"),
    ],
)
def test_adapters_that_cannot_be_read(changes: dict[str, Any], words: str, folders: tuple[SmartHaoAI, Path, Path]) -> None:
    """Guards: what PEFT would compute and we do not, dropped without a word."""
    edit(folders[2], **changes)
    with pytest.raises(ValueError, match=words):
        SmartHaoAI.from_pretrained(folders[2])


def test_damaged_adapters(folders: tuple[SmartHaoAI, Path, Path]) -> None:
    """Guards: traces, or half an adapter, from a file that was cut off or belongs elsewhere."""
    _, base, lora = folders
    tensors = load_file(lora / ADAPTER_WEIGHTS)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    for altered, words in (
        ({key: tensor for key, tensor in tensors.items() if key != name}, f"lacks {name}"),
        ({**tensors, "base_model.model.lm_head.weight": torch.zeros(3)}, "lm_head.weight is no part"),
        ({**tensors, "base_model.model.model.nothing.lora_A.weight": torch.zeros(3, 3)}, "does not fit the base: that has no matrix"),
    ):
        save_file(altered, lora / ADAPTER_WEIGHTS)
        with pytest.raises(ValueError, match=words):
            SmartHaoAI.from_pretrained(lora)
    (lora / ADAPTER_WEIGHTS).write_bytes(b"short")
    with pytest.raises(ValueError, match="damaged or cut off"):
        SmartHaoAI.from_pretrained(lora)
    (lora / ADAPTER_CONFIG).write_text("[", encoding="utf-8")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_adapter(SmartHaoAI.from_pretrained(base), lora)


def test_a_value_head_beside_an_adapter(make_model: ModelMaker, tmp_path: Path, seed: int) -> None:
    """Guards: PPO with an adapter that resumes with a fresh value head, or writes it into the finished adapter."""
    model = make_model()
    save_pretrained(model, tmp_path / "base")
    model = trained(model, str(tmp_path / "base"))
    model.value_head = ValueHead(model.config)
    torch.nn.init.normal_(model.value_head.weight)
    save_pretrained(model, tmp_path / "step", resumable=True)
    save_pretrained(model, tmp_path / "lora")
    again = trained(SmartHaoAI.from_pretrained(tmp_path / "base"))
    again.value_head = ValueHead(again.config)
    restore_adapter(again, tmp_path / "step")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert not any("value_head" in name for name in load_file(tmp_path / "lora" / ADAPTER_WEIGHTS))
    ids = torch.randint(61, (2, 20))
    assert torch.equal(
        logits(SmartHaoAI.from_pretrained(tmp_path / "step"), ids), logits(SmartHaoAI.from_pretrained(tmp_path / "lora"), ids)
    )


# ------------------------------------------------------------------------------------------------ PEFT

PORTABLE: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "llama": {"qk_norm": False, "tie_word_embeddings": False},
    "qwen2": {"qk_norm": False, "attention_bias": True},
    "qwen3_moe": EXPERTS,
    "mixtral": {**EXPERTS, "qk_norm": False},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", PORTABLE)
def test_peft_and_we_read_each_others_adapters(shape: str, kind: str, make_model: ModelMaker, seed: int, tmp_path: Path) -> None:
    """Guards: names, shapes or a scale that PEFT understands otherwise, in either direction."""
    peft = pytest.importorskip("peft")
    ours = make_model(**PORTABLE[shape])
    save_pretrained(ours, tmp_path / "base")
    trained(ours, str(tmp_path / "base"), **KINDS[kind])
    save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(load_theirs(tmp_path / "base"), tmp_path / "ours").eval()
    assert_equal_logits(ours, theirs)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 1.5))
    theirs.save_pretrained(tmp_path / "theirs")
    back = SmartHaoAI.from_pretrained(tmp_path / "base")
    load_adapter(back, tmp_path / "theirs")
    assert_equal_logits(back, theirs)
    edit(tmp_path / "theirs", base_model_name_or_path=str(tmp_path / "base"))
    assert_equal_logits(SmartHaoAI.from_pretrained(tmp_path / "theirs"), theirs.merge_and_unload())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_peft(kind: str, make_model: ModelMaker, seed: int, tmp_path: Path) -> None:
    """Guards: an adapter that computes the right logits and learns something else: a gradient through DoRA's norm, a missing scale."""
    peft = pytest.importorskip("peft")
    ours = make_model()
    save_pretrained(ours, tmp_path / "base")
    trained(ours, str(tmp_path / "base"), **KINDS[kind])
    save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(load_theirs(tmp_path / "base"), tmp_path / "ours", is_trainable=True).eval()
    ids = torch.randint(61, (2, 20))
    ours(ids, labels=ids).loss.backward()
    theirs(ids, labels=ids).loss.backward()
    expected = {
        name.replace(".default", "").removesuffix(".weight"): parameter.grad
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    assert ours.adapter is not None
    checked = 0
    for name, _, pair in ours.adapter.pairs(ours):
        for end, parameter in (("lora_A", pair.A), ("lora_B", pair.B), ("lora_magnitude_vector", pair.magnitude)):
            if parameter is not None:
                reference = expected[f"base_model.model.{name}.{end}"]
                assert parameter.grad is not None and reference is not None
                assert (parameter.grad - reference).abs().max() <= 1e-4 * reference.abs().max(), (name, end)
                checked += 1
    assert checked == len(expected)
