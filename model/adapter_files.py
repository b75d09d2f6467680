"""LoRA adapters on disk, as PEFT writes them: adapter_config.json and adapter_model.safetensors.

A folder with these two stands for a model wherever one is named: the base it was made for (base_model_name_or_path) with the update
merged into the weights. Ours carry a fingerprint of the base, so that another one is refused even where it has the same shape.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from model.checkpoint import (
    CONFIG_FILE,
    NOT_PARAMETERS,
    TRAINING_ONLY,
    find_model,
    load_config,
    open_weights,
    weights_to_disk,
)
from model.files import atomic_write_text
from model.lora import Adapter, LoRAPair, LoRASettings, last, new_adapter, use_adapter
from model.weight_files import INDEX_FILE, WEIGHTS_FILE, SafetensorsWeights, save_weights

if TYPE_CHECKING:
    from model.transformer import SmartHaoAI

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PARTS = {".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_magnitude_vector": "magnitude"}
BASE = "base_fingerprint"  # entry of the file's metadata
VALUE_HEAD = f"{PREFIX}value_head."  # PPO's, in a checkpoint to resume from
# Fields of PEFT's LoraConfig that change what is computed, in ways that are not computed here.
REFUSED = (
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "lora_bias",
    "fan_in_fan_out",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")  # beginnings that leave another base behind


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and no weights of its own."""
    return (folder / ADAPTER_CONFIG).is_file() and not any((folder / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE))


def adapter_base(folder: Path) -> Path:
    """The folder of the model that an adapter was made for: where it is named, else beside the adapter's run. FileNotFoundError."""
    named = read_config(folder).get("base_model_name_or_path")
    if not named or not isinstance(named, str):
        raise ValueError(f"{folder / ADAPTER_CONFIG} does not name its base (base_model_name_or_path)")
    own = folder.resolve()
    runs = (own.parent, *own.parents[2:3])  # of a finished adapter, and of one in checkpoints/step_000500
    for place in (Path(named), *(run / Path(named).name for run in runs)):
        if ((place / CONFIG_FILE).is_file() or is_adapter(place)) and place.resolve() != own:
            return place
    try:
        base = find_model(named)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the adapter {folder} needs its base: {error}") from error
    if base.resolve() == own:
        raise ValueError(f"{folder / ADAPTER_CONFIG} names its own folder as its base")
    return base


def whole_model(folder: Path) -> Path:
    """The folder itself, or for an adapter that of the model beneath it."""
    return whole_model(adapter_base(folder)) if is_adapter(folder) else folder


def read_config(folder: Path) -> dict[str, Any]:
    """What adapter_config.json holds. FileNotFoundError, or ValueError for what is no JSON object or no LoRA."""
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{folder} is no adapter: it has no {ADAPTER_CONFIG}")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(data, dict) or data.get("peft_type") != "LORA":
        raise ValueError(f"{file} describes no LoRA adapter (peft_type: LORA)")
    return data


def read_settings(folder: Path) -> LoRASettings:
    """The settings of an adapter. ValueError names a field that asks for what is not computed here."""
    data = read_config(folder)
    for name in REFUSED:
        if data.get(name):
            raise ValueError(f"{folder / ADAPTER_CONFIG}: {name}={data[name]!r} is not supported")
    if data.get("bias", "none") != "none":
        raise ValueError(f"{folder / ADAPTER_CONFIG}: bias={data['bias']!r} is not supported, only 'none'")
    start = data.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise ValueError(
            f"{folder / ADAPTER_CONFIG}: init_lora_weights={start!r} changes the base; save it converted to plain LoRA in PEFT"
        )
    try:
        settings = LoRASettings(
            r=data["r"],
            alpha=float(data["lora_alpha"]),
            dropout=float(data.get("lora_dropout") or 0.0),
            rslora=bool(data.get("use_rslora")),
            dora=bool(data.get("use_dora")),
            targets=data.get("target_modules"),
        )
        settings.check()
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / ADAPTER_CONFIG}: {error}") from error
    return settings


def save_adapter(model: SmartHaoAI, path: str | Path, resumable: bool = False) -> None:
    """Write the adapter in use as PEFT's two files. resumable: with the value head, where there is one."""
    folder, adapter = Path(path), model.adapter
    if adapter is None:
        raise ValueError("the model has no adapter in use; inject_lora gives it one")
    folder.mkdir(parents=True, exist_ok=True)
    adapter.fingerprint = adapter.fingerprint or fingerprint(model)
    notes = {BASE: adapter.fingerprint} if adapter.fingerprint else {}
    # Copies, which are small: numpy never lets go of the memory that it has checked, and FSDP gives it back after use.
    tensors = {name: tensor.detach().clone() for name, tensor in _places(model, adapter, resumable).items()}
    save_weights(tensors, folder / ADAPTER_WEIGHTS, notes=notes)
    settings = adapter.settings
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "r": settings.r,
        "lora_alpha": int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rslora,
        "use_dora": settings.dora,
        "target_modules": sorted({last(name) for name, _, _ in adapter.pairs(model)}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    atomic_write_text(folder / ADAPTER_CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def load_adapter(model: SmartHaoAI, path: str | Path) -> Adapter:
    """Read an adapter, ours or PEFT's, for this model and take it into use. ValueError when it belongs to another base."""
    folder = find_model(path)
    settings = read_settings(folder)
    source = SafetensorsWeights([folder / ADAPTER_WEIGHTS])
    _check_base(folder, source, fingerprint(model))
    adapter = new_adapter(model, settings, _matrices(folder, source), str(read_config(folder).get("base_model_name_or_path") or ""))
    _fill(_places(model, adapter), source, folder)
    use_adapter(model, adapter)
    return adapter


def restore_adapter(model: SmartHaoAI, folder: Path) -> None:
    """Copy the tensors of a checkpoint to resume from into the adapter in use. ValueError when it was trained on another base."""
    adapter = model.adapter
    assert adapter is not None
    source = SafetensorsWeights([folder / ADAPTER_WEIGHTS])
    adapter.fingerprint = adapter.fingerprint or fingerprint(model)
    _check_base(folder, source, adapter.fingerprint)
    _fill(_places(model, adapter, resumable=True), source, folder)


class AdapterWeights:
    """The weights of an adapter's base with its update merged in, tensor by tensor, in fp32."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / ADAPTER_WEIGHTS
        self._base, self._settings = open_weights(adapter_base(folder)), read_settings(folder)
        self._source = SafetensorsWeights([self.file])
        shapes = self._base.shapes()
        unused = (*NOT_PARAMETERS, "lm_head.weight") if load_config(folder).tie_word_embeddings else NOT_PARAMETERS
        _check_base(folder, self._source, _fingerprint((name for name in shapes if not name.endswith(unused)), self._base.tensor))
        self._pairs: dict[str, LoRAPair] = {}
        for name in _matrices(folder, self._source):
            shape = shapes.get(f"{name}.weight", ())
            if len(shape) != 2:
                raise ValueError(f"{self.file} does not fit the base: that has no matrix {name}")
            self._pairs[name] = LoRAPair(self._base.tensor(f"{name}.weight"), self._settings)
        _fill({PREFIX + name + end: tensor for name, pair in self._pairs.items() for end, tensor in _of_pair(pair)}, self._source, folder)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._base.shapes()

    @torch.no_grad()
    def tensor(self, name: str) -> Tensor:
        weight = self._base.tensor(name)
        pair = self._pairs.get(name.removesuffix(".weight"))
        return weight if pair is None else pair.merged(weight)


def fingerprint(model: SmartHaoAI) -> str | None:
    """A checksum of the base's weights, the same for fp32 and bf16 copies of them; None for other number types, which round otherwise."""
    state = {name: tensor for name, tensor in model.state_dict().items() if ".adapter." not in name and not name.startswith(TRAINING_ONLY)}
    disk = weights_to_disk(state, model.config)
    return _fingerprint(disk, disk.__getitem__)


def _fingerprint(names: Iterable[str], read: Callable[[str], Tensor]) -> str | None:
    total = 0
    for name in sorted(names):
        tensor = read(name)
        if tensor.dtype not in (torch.float32, torch.bfloat16):
            return None
        total = zlib.crc32(name.encode(), total)
        total = zlib.crc32(tensor.detach().to("cpu", torch.bfloat16).reshape(-1).view(torch.uint8).numpy().data, total)
    return f"{total:08x}"


def _check_base(folder: Path, source: SafetensorsWeights, found: str | None) -> None:
    made_for = source.notes.get(BASE)
    if made_for and found and made_for != found:
        named = read_config(folder).get("base_model_name_or_path")
        raise ValueError(
            f"the adapter {folder} was trained on another base: on {named!r} with weights {made_for}, and this model's are {found}; "
            "give it the checkpoint it was trained on (model_dir, or base_model_name_or_path in its adapter_config.json)"
        )


def _matrices(folder: Path, source: SafetensorsWeights) -> list[str]:
    """Names on disk of the matrices that an adapter changes. ValueError for tensors that are no part of a LoRA update."""
    found: dict[str, None] = {}
    for key in source.shapes():
        end = next((end for end in PARTS if key.endswith(end)), None)
        if end is None or not key.startswith(PREFIX):
            if not key.startswith(VALUE_HEAD):
                raise ValueError(f"{folder / ADAPTER_WEIGHTS}: {key} is no part of an adapter for linear layers")
            continue
        found[key.removeprefix(PREFIX).removesuffix(end)] = None
    return list(found)


def _of_pair(pair: LoRAPair) -> list[tuple[str, Tensor]]:
    """The tensors of one pair by the ends of their names on disk."""
    held = [(end, getattr(pair, name)) for end, name in PARTS.items()]
    return [(end, tensor) for end, tensor in held if tensor is not None]


def _places(model: SmartHaoAI, adapter: Adapter, resumable: bool = False) -> dict[str, Tensor]:
    """The trained tensors by their names in the file."""
    places = {PREFIX + name + end: tensor for name, _, pair in adapter.pairs(model) for end, tensor in _of_pair(pair)}
    if resumable and model.value_head is not None:
        places.update({VALUE_HEAD + name: tensor for name, tensor in model.value_head.named_parameters()})
    return places


@torch.no_grad()
def _fill(places: Mapping[str, Tensor], source: SafetensorsWeights, folder: Path) -> None:
    """Copy the tensors of an adapter's file to their places. ValueError names one that is missing, surplus or of another shape."""
    shapes = source.shapes()
    surplus = [key for key in shapes if key not in places and not key.startswith(VALUE_HEAD)]
    for key in [*places, *surplus]:
        if key not in shapes:
            raise ValueError(f"{source.file} lacks {key}, which its settings ask for")
        if key not in places:
            raise ValueError(
                f"{source.file} changes {key.removeprefix(PREFIX)}, which this model lacks or runs without an adapter: it belongs to "
                f"another base than this, or has to be merged first: python -m tools.convert merge-lora {folder} OUT"
            )
        if shapes[key] != tuple(places[key].shape):
            raise ValueError(
                f"{source.file}: {key} has shape {list(shapes[key])}, this model asks for {list(places[key].shape)}: the adapter belongs "
                "to another base, or was trained with another lora.r"
            )
    for key, place in places.items():
        place.copy_(source.tensor(key))


__all__ = [
    "AdapterWeights",
    "adapter_base",
    "fingerprint",
    "is_adapter",
    "load_adapter",
    "read_settings",
    "restore_adapter",
    "save_adapter",
    "whole_model",
]
