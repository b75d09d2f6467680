"""A finished stage from its folder, as a conversation needs it: model, tokenizer, settings and, of an adapter, its base."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from inference.quantized import is_prepared
from inference.quantized import quantize as prepare
from inference.sampling import SamplingSettings
from model.adapter_files import adapter_base, is_adapter, load_adapter
from model.checkpoint import GENERATION_FILE, find_model
from model.device import find_device
from model.lora import Adapter, merge, use_adapter
from model.tokenizer import BPETokenizer
from model.transformer import SmartHaoAI

# What a checkpoint's generation_config.json may preset.
PRESETTABLE = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size")


@dataclass
class Loaded:
    """What was read. `adapter` is the folder of an adapter that is still to be put on the model."""

    model: SmartHaoAI
    tokenizer: BPETokenizer
    settings: SamplingSettings
    adapter: Path | None


class Adapters:
    """The LoRA adapters of one model: each is read once, one or none is in use."""

    def __init__(self, model: SmartHaoAI) -> None:
        self.model = model
        self.current: str | None = None
        """Folder of the one in use."""
        self._known: dict[str, Adapter] = {}

    def use(self, path: str | Path | None) -> None:
        """Switch to the adapter in a folder, or to none. FileNotFoundError, or ValueError when it was made for another base."""
        if path is None:
            use_adapter(self.model, None)
        elif is_prepared(self.model):
            raise ValueError(f"the adapter {path} needs a model whose weights are as they were trained: load it without quantize")
        else:
            folder = find_model(path)
            key = str(folder.resolve())
            if key in self._known:
                use_adapter(self.model, self._known[key])
            else:
                self._known[key] = load_adapter(self.model, folder)
        self.current = None if path is None else Path(path).as_posix()


def load_stage(
    path: str | Path, device: str | torch.device | None, dtype: torch.dtype, settings: dict[str, Any], quantize: str = "none"
) -> Loaded:
    """settings: fields of SamplingSettings; the others come from generation_config.json, then from the defaults.
    quantize: as in `inference.quantized`; an adapter is then merged into its base.

    Raises TypeError for an unknown setting, FileNotFoundError or ValueError for what cannot be loaded."""
    known = [field.name for field in dataclasses.fields(SamplingSettings)]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise TypeError(f"ChatSession has no setting {', '.join(unknown)}; it knows {', '.join(known)}")
    folder = find_model(path)
    sampling = SamplingSettings(**{**preset_settings(folder), **settings})
    # An adapter stays apart from its base, so that the session can go on with another or with none.
    base = adapter_base(folder) if is_adapter(folder) else folder
    model = SmartHaoAI.from_pretrained(base, device=find_device(device), dtype=dtype)
    model.eval()
    has_tokenizer = (folder / "tokenizer.json").is_file()  # some adapters come without
    tokenizer = BPETokenizer.from_pretrained(folder if has_tokenizer else base)
    adapter = None if base is folder else folder
    if quantize != "none":
        if adapter is not None:
            load_adapter(model, adapter)
            merge(model)
        prepare(model, quantize)
        adapter = None
    return Loaded(model, tokenizer, sampling, adapter)


def preset_settings(path: Path) -> dict[str, Any]:
    """What the generation_config.json in `path` presets of SamplingSettings. ValueError when it is not a JSON object."""
    file = path / GENERATION_FILE
    if not file.is_file():
        return {}
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(stored, dict):
        raise ValueError(f"{file} must hold a JSON object, not {type(stored).__name__}")
    preset = {name: stored[name] for name in PRESETTABLE if stored.get(name) is not None}
    # transformers then takes the likeliest token, whatever the temperature. A file that does not say it (there: greedy too) was
    # mostly written without a thought to sampling, as of a base model: our own defaults serve a conversation better.
    if stored.get("do_sample") is False:
        preset["temperature"] = 0.0
    return preset


def newest_stage(weights: Path) -> Path | None:
    """The finished model directory to talk to: the newest stage after pretraining, else the newest pretraining."""
    found = [
        file.parent
        for file in weights.glob("*/*model.safetensors")
        if ((file.parent / "config.json").is_file() or is_adapter(file.parent))
        and not file.parent.name.startswith((".", "reward"))
        and not file.parent.name.endswith((".tmp", ".old"))
    ]

    def rank(folder: Path) -> tuple[bool, float]:
        return not folder.name.startswith("pretrain"), max(file.stat().st_mtime for file in folder.glob("*model.safetensors"))

    return max(found, key=rank, default=None)


def known_adapters(weights: Path) -> list[str]:
    """Folders of adapters in weight/, whatever base they are for."""
    return sorted(file.parent.as_posix() for file in weights.glob("*/adapter_config.json") if is_adapter(file.parent))
