"""Checkpoints of a running training: `checkpoints/step_000500/` holds all that resuming needs.

Model in the ordinary layout (fp32), or only its adapter where that is what learns; optimiser tensors in safetensors, everything else as
JSON; written to a temporary directory, flushed and renamed. Nothing is unpickled.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.adapter_files import is_adapter, restore_adapter
from model.checkpoint import fill, open_weights, save_pretrained
from model.files import atomic_directory, remove_leftovers
from model.tokenizer import BPETokenizer
from model.transformer import SmartHaoAI
from model.weight_files import load_weights, save_weights

FOLDER, STATE_FILE, OPTIMIZER_FILE = "checkpoints", "state.json", "optimizer.safetensors"


def save_checkpoint(
    out_dir: Path,
    step: int,
    model: SmartHaoAI,
    tokenizer: BPETokenizer,
    optimizers: list[torch.optim.Optimizer],
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write the checkpoint of `step` and delete all but the newest `keep`."""
    path = out_dir / FOLDER / f"step_{step:06d}"
    with atomic_directory(path) as folder:
        save_pretrained(model, folder, tokenizer, resumable=True)
        tensors, values = _optimizer_state(model, optimizers)
        tensors["random/cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["random/cuda"] = torch.cuda.get_rng_state()
        save_weights(tensors, folder / OPTIMIZER_FILE)
        (folder / STATE_FILE).write_text(json.dumps({**state, "step": step, "optimizer": values}, indent=1), encoding="utf-8")
    for old in list_checkpoints(out_dir)[:-keep]:
        shutil.rmtree(old)
    return path


def list_checkpoints(out_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first. An interrupted write never has the final name."""
    return sorted(p for p in (out_dir / FOLDER).glob("step_*") if p.suffix == "" and (p / STATE_FILE).is_file())


def newest_checkpoint(out_dir: Path) -> Path | None:
    if (out_dir / FOLDER).is_dir():
        remove_leftovers(out_dir / FOLDER)
    found = list_checkpoints(out_dir)
    return found[-1] if found else None


def load_state(path: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint. Raises ValueError when it is damaged."""
    try:
        return json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path / STATE_FILE} is damaged: {error}; delete this checkpoint to go on from the one before") from error


def restore(path: Path, model: SmartHaoAI, optimizers: list[torch.optim.Optimizer]) -> None:
    """Put weights, optimiser and random state of a checkpoint back in place."""
    if is_adapter(path) != (model.adapter is not None):
        kind = "a run with an adapter" if is_adapter(path) else "a run without an adapter"
        raise ValueError(f"{path} was written by {kind}: go on with the settings it was begun with (lora.r)")
    if model.adapter is None:
        fill(model, open_weights(path))
    else:
        restore_adapter(model, path)
    tensors = load_weights(path / OPTIMIZER_FILE)
    values = load_state(path)["optimizer"]
    names = {p: name for name, p in model.named_parameters()}
    for number, optimizer in enumerate(optimizers):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                prefix = f"{number}/{names[parameter]}/"
                state: dict[str, Any] = {
                    key.removeprefix(prefix): tensor if key.endswith("/step") else tensor.to(parameter.device)
                    for key, tensor in tensors.items()
                    if key.startswith(prefix)
                }
                state.update(values.get(prefix, {}))
                optimizer.state[parameter] = state
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random/cuda"])


def _optimizer_state(model: SmartHaoAI, optimizers: list[torch.optim.Optimizer]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by "<optimiser>/<parameter>/<entry>", and plain values by "<optimiser>/<parameter>/"."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    for number, optimizer in enumerate(optimizers):
        for parameter, state in optimizer.state.items():
            prefix = f"{number}/{names[parameter]}/"
            tensors.update({prefix + key: value for key, value in state.items() if isinstance(value, Tensor)})
            plain = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
            if plain:
                values[prefix] = plain
    return tensors, values
