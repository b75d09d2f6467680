"""Settings of training on a model that exists: heeded in training, no other model in use, and refused without their part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model import SmartHaoAI
from model.checkpoint import save_pretrained
from model.config import NEUTRAL_PARTS, TRAINING_SETTINGS

SHAPES: dict[str, dict[str, Any]] = {
    "": {},
    "n_expert": {"n_expert": 4, "n_expert_per_token": 2, "moe_intermediate_size": 16, "n_layer": 3},
    "deep_supervision": {"deep_supervision": "layers", "n_layer": 3},
    "use_reasoning": {"use_reasoning": True, "reasoning_steps": 3},
}
OTHER: dict[str, Any] = {"router_balance_scope": "model", "reasoning_halt": 1e-9}
SETTINGS = [(part, name) for part, names in TRAINING_SETTINGS.items() for name in names]


def saved(make_model: Any, folder: Path, part: str) -> SmartHaoAI:
    model = make_model(**SHAPES[part])
    if model.reasoning is not None:
        with torch.no_grad():
            model.reasoning.out_proj.weight.normal_(std=0.3)
            model.reasoning.confidence.out.weight.normal_(std=0.6)
    save_pretrained(model, folder, resumable=True)  # a finished model has no deep supervision
    return model


def training_loss(model: SmartHaoAI, ids: Tensor) -> float:
    torch.manual_seed(7)
    out = model.train()(ids, labels=ids)
    model.eval()
    assert out.loss is not None
    return out.loss.item() + sum(term.item() for term in out.deep_losses.values()) + (0 if out.aux_loss is None else out.aux_loss.item())


@pytest.mark.parametrize(("part", "name"), SETTINGS, ids=lambda value: str(value) or "any")
def test_a_setting_is_heeded_and_the_model_stays_the_same(part: str, name: str, make_model, seed: int, tmp_path: Path) -> None:
    """Guards: a setting that is written down and has no effect, because the modules were built with the old one; one that is lost when
    the model is saved; one that changes what the model answers."""
    saved(make_model, tmp_path / "old", part)
    value, ids = OTHER.get(name, 0.37), torch.randint(61, (3, 16))
    old, new = SmartHaoAI.from_pretrained(tmp_path / "old"), SmartHaoAI.from_pretrained(tmp_path / "old", **{name: value})
    assert getattr(old.config, name) != value == getattr(new.config, name)
    save_pretrained(new, tmp_path / "new", resumable=True)
    assert SmartHaoAI.from_pretrained(tmp_path / "new").config == new.config
    with torch.no_grad():
        if name == "reasoning_halt":  # the one choice of use among them
            assert old(ids).steps_used is None and bool((new(ids).steps_used == 1).all())
        else:
            assert torch.equal(old(ids).logits, new(ids).logits)
    losses = training_loss(old, ids), training_loss(new, ids)
    assert (losses[0] == losses[1]) == (name == "reasoning_halt")


def test_settings_go_together_with_new_parts(make_model, seed: int, tmp_path: Path) -> None:
    """Guards: settings that are free only as long as no part is switched on, or a part that is then taken for one that has weights."""
    saved(make_model, tmp_path, "n_expert")
    changes: dict[str, Any] = {"dropout": 0.2, "router_z_loss_coef": 0.1, "deep_supervision": "tokens", "deep_supervision_coef": 0.7}
    model = SmartHaoAI.from_pretrained(tmp_path, **changes, n_expert=4)
    assert {name: getattr(model.config, name) for name in changes} == changes and model.layers[0].dropout == 0.2


@pytest.mark.parametrize(("part", "name"), [pair for pair in SETTINGS if pair[0]])
def test_a_setting_without_its_part_is_refused(part: str, name: str, make_model, tmp_path: Path) -> None:
    """Guards: a run that seems to be told something and heeds nothing of it."""
    saved(make_model, tmp_path, "")
    with pytest.raises(ValueError, match=f"^{name} cannot be changed.*attention_gate.*dropout"):
        SmartHaoAI.from_pretrained(tmp_path, **{name: OTHER.get(name, 0.37)})


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("use_reasoning", {"reasoning_steps": 9}, "reasoning_steps cannot.*model.reasoning_steps"),
        ("use_reasoning", {"use_reasoning": False}, "use_reasoning cannot"),
        ("use_reasoning", {"reasoning_halt": 1.0}, "reasoning_halt .*1.0"),
        ("n_expert", {"router_bias_rate": 0.001}, "router_bias_rate cannot"),
        ("n_expert", {"router_aux_loss_coef": -1}, "router_aux_loss_coef .*-1"),
        ("", {"dropout": 1.5}, "dropout .*1.5"),
        ("", {"initializer_range": 0.1, "dropout": 0.1}, "^initializer_range cannot"),
    ],
)
def test_what_weights_depend_on_and_bad_values_are_refused(
    part: str, change: dict[str, Any], message: str, make_model, tmp_path: Path
) -> None:
    """Guards: weights without a place, or a place without weights; values that a new model is not made with either."""
    saved(make_model, tmp_path, part)
    with pytest.raises(ValueError, match=message):
        SmartHaoAI.from_pretrained(tmp_path, **change)


def test_no_setting_is_a_part() -> None:
    """Guards: a part that is taken for a setting of training: it would be switched on in a model that has no weights for it."""
    assert not {name for _, name in SETTINGS} & {*NEUTRAL_PARTS}
