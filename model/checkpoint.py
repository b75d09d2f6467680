"""A model directory in the layout of transformers: config.json, weights as safetensors (one file, or shards with an index), the
tokenizer's files.

What only standard parts make up is written under the model_type of transformers that computes it (`llama`, `qwen2`, `mistral`, `qwen3`,
`mixtral`, `qwen3_moe`) and loads there unchanged; the rest is written as `haoai` with every field. `model/disk_config.py` owns the
names in config.json, `model/weight_files.py` how tensors lie in files; this file owns the names of the tensors (inside, q/k/v, gate/up
and the experts are fused, on disk they are not) and what makes a model of them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from model.config import NEUTRAL_PARTS, HaoAIConfig, allowed_changes, training_settings
from model.disk_config import CONFIG_FILE, config_from_disk, config_to_disk, model_type, portability_notes, read_config
from model.files import atomic_directory, atomic_write_text, recover_directory, writing
from model.shapes import give_room, without_values
from model.weight_files import (
    INDEX_FILE,
    MAX_SHARD_BYTES,
    WEIGHTS_FILE,
    SafetensorsWeights,
    WeightSource,
    indexed_weights,
    load_weights,
    read_index,
    save_sharded,
    save_weights,
)

if TYPE_CHECKING:
    from model.tokenizer import BPETokenizer
    from model.transformer import SmartHaoAI

GENERATION_FILE = "generation_config.json"
STAGES = ("pretrain", "sft", "lora", "reward", "dpo", "ppo", "grpo", "distill")  # their results lie in folders of these names
RESULTS_FOLDER = "weight"  # local by convention: a name in it is never looked up online
EXPERTS_END = "mlp.shared_expert.down_proj.weight"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DAMAGED_CONFIG = 100  # times as many parameters as the file holds
NOT_PARAMETERS = ("rotary_emb.inv_freq",)  # stored by old versions of transformers, computed here
HEADS = {"lm_head.": "lm_head.", "score_head.": "score.", "value_head.": "value_head."}  # ours -> on disk, where all else is in "model."
TRAINING_ONLY = ("auxiliary.", "value_head.")


# ------------------------------------------------------------------------------------------------ saving


def save_pretrained(
    model: SmartHaoAI,
    path: str | Path,
    tokenizer: BPETokenizer | None = None,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    resumable: bool = False,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write (or replace) the model files of `path`; other files that stand there are kept.

    Weights of more than `max_shard_bytes` are written in shards with an index. What only training needs is left out and learned
    residual scales are folded into the matrices behind them, unless the model is to be trained on (`resumable`). Of a model with an
    adapter in use only that is written (`model.lora.merge` makes one model of the two). state: the model's, where it does not hold it
    in one piece; an empty one: all files but the weights.
    """
    path = Path(path)
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    described = state is not None and not state
    state = model.state_dict() if state is None else state
    shape, state = (model.config, state) if resumable else finished(model, state)
    reward = hasattr(model, "score_head")
    if tokenizer is not None and not reward:
        generation = {
            "eos_token_id": tokenizer.stop_ids,
            "pad_token_id": tokenizer.pad_token_id,
            "do_sample": True,
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 40,
        }
        if tokenizer.bos_token_id is not None:
            generation["bos_token_id"] = tokenizer.bos_token_id
        atomic_write_text(path / GENERATION_FILE, json.dumps(generation, indent=2) + "\n")
    if model.adapter is not None:
        from model.adapter_files import save_adapter

        save_adapter(model, path, resumable)
        return
    if not described:
        save_sharded(weights_to_disk(state, shape), path, dtype, max_shard_bytes)
    config = config_to_disk(shape, tokenizer, dtype, reward)
    atomic_write_text(path / CONFIG_FILE, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def finished_config(config: HaoAIConfig) -> HaoAIConfig:
    """The shape that a model of `config` is finished in."""
    return dataclasses.replace(config, residual_scale=False, deep_supervision="none")


def finished(model: SmartHaoAI, state: Mapping[str, Tensor] | None = None) -> tuple[HaoAIConfig, dict[str, Tensor]]:
    """Shape and state of the same model without its training-only heads, and with its residual scales folded. state: as in
    `save_pretrained`."""
    config = finished_config(model.config)
    whole = model.state_dict() if state is None else state
    state = {name: tensor for name, tensor in whole.items() if not name.startswith(TRAINING_ONLY)}
    for scale_name in [name for name in state if name.endswith(("attention_scale", "mlp_scale"))]:
        scale = state.pop(scale_name)
        block, _, branch = scale_name.rpartition(".")
        ends = {"attention_scale": ("self_attn.o_proj.weight",), "mlp_scale": ("mlp.down_proj.weight", "mlp.down_proj", EXPERTS_END)}
        for end in ends[branch]:
            if f"{block}.{end}" in state:
                state[f"{block}.{end}"] = state[f"{block}.{end}"] * scale[:, None]  # rows of an (out, in) matrix, or of each expert's
    return config, state


def load_finished(path: str | Path, log: Callable[[str], object] = print) -> SmartHaoAI:
    """The model of a directory as `save_pretrained` would finish it: for exports. Says what was folded or left out, in a checkpoint of
    a running training. Errors as in `load_pretrained`."""
    from model.transformer import SmartHaoAI

    model = load_pretrained(path)
    if model.config.residual_scale:
        log("residual_scale=True: the learned scales are folded into o_proj and down_proj")
    if model.config.deep_supervision != "none":
        log(f"deep_supervision={model.config.deep_supervision!r}: the heads, which only training uses, are left out")
    config, state = finished(model)
    if config == model.config:
        return model
    plain = SmartHaoAI(config)
    plain.load_state_dict(state)
    return plain.eval()


# ----------------------------------------------------------------------------------------------- loading


def load_pretrained(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    make: type[SmartHaoAI] | None = None,
    source: WeightSource | None = None,
    **parts: Any,
) -> SmartHaoAI:
    """Read a model directory. FileNotFoundError or ValueError say what is missing or does not fit.

    make: the class, None for SmartHaoAI. source: the weights in the form that the class needs, None for those of the directory.
    parts: settings of NEUTRAL_PARTS to switch on in a model that was trained without them, with what belongs to them
    (PART_SETTINGS); it computes the same until it is trained. And TRAINING_SETTINGS, in any model that has the part they belong to.
    """
    path = find_model(path)
    config = load_config(path)
    changes = allowed_changes(config, parts)
    fixed = sorted(name for name, value in parts.items() if name not in changes and getattr(config, name, None) != value)
    if fixed:
        free = ", ".join([*NEUTRAL_PARTS, *training_settings(config)])
        use = "; in use: model.reasoning_steps = N" if "reasoning_steps" in fixed and config.use_reasoning else ""
        raise ValueError(f"{', '.join(fixed)} cannot be changed in a trained model; these can: {free}{use}")
    new_parts = [name for name in changes if name in NEUTRAL_PARTS]
    return build_model(dataclasses.replace(config, **changes), source or open_weights(path), device, dtype, new_parts, make)


def build_model(
    config: HaoAIConfig,
    source: WeightSource,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    new_parts: Collection[str] = (),
    make: type[SmartHaoAI] | None = None,
) -> SmartHaoAI:
    """A model of `config` with the weights of `source`, in evaluation mode. The source need not have the tensors of `new_parts`.
    make: its class, None for SmartHaoAI.

    Names and shapes are checked first (see `fill`); then each tensor is read and copied to its place, so that the weights
    exist only once in memory. ValueError names a tensor that is missing, not expected, or of another shape.
    """
    from model.attention import RotaryEmbedding
    from model.transformer import SmartHaoAI

    without = dataclasses.replace(config, **{name: getattr(HaoAIConfig(), name) for name in new_parts})
    stored = without if new_parts else config
    make = make or SmartHaoAI
    names = _check_weights(stored, source, make)  # before a wrong size in config.json asks for memory
    with without_values():
        model = make(config)
    give_room(model, device, dtype)  # addresses only: memory is taken when a tensor is copied
    model.reset_parts()
    for part, name in (("deep_supervision", "auxiliary"), ("use_reasoning", "reasoning")):
        if part in new_parts:
            setattr(model, name, model.initialised(type(getattr(model, name))(config)).to(device, dtype))
    _copy_weights(model, source, names, model_type(stored))
    for module in model.modules():
        if isinstance(module, RotaryEmbedding):  # not a weight: computed, and always fp32
            module.reset(config, device)
    return model.eval()


def fill(model: SmartHaoAI, source: WeightSource) -> None:
    """Copy the weights of `source` into the model, tensor by tensor. Raises ValueError where they do not fit."""
    _copy_weights(model, source, _check_names(weights_to_disk(model.state_dict(), model.config), model.config, source), None)


@torch.no_grad()
def _copy_weights(model: SmartHaoAI, source: WeightSource, names: Collection[str], kind: str | None) -> None:
    """Copy the tensors `names`, which are those of a model of model_type `kind`; what the model has beyond them is left as it is."""
    places = weights_to_disk(model.state_dict(), model.config, kind)
    for name in names:
        place, tensor = places[name], source.tensor(name)
        if tensor.dtype not in FLOATS:  # 8-bit weights mean nothing without their scales
            raise ValueError(
                f"{source.file}: {name} is stored as {str(tensor.dtype).removeprefix('torch.')}, which is no plain number type"
            )
        place.copy_(tensor)


def load_config(path: str | Path) -> HaoAIConfig:
    """The HaoAIConfig of a model directory; that of the base for an adapter. ValueError names what this code base cannot express."""
    from model.adapter_files import whole_model

    return read_config(whole_model(Path(path)))


def open_weights(folder: Path) -> WeightSource:
    """The weights of a model directory, whole or in shards; of an adapter, those of its base with the update merged in.
    FileNotFoundError names a file that is missing."""
    from model.adapter_files import AdapterWeights, is_adapter

    if is_adapter(folder):
        return AdapterWeights(folder)
    if (folder / WEIGHTS_FILE).is_file():
        return SafetensorsWeights([folder / WEIGHTS_FILE])
    index = folder / INDEX_FILE
    if not index.is_file():
        other = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        hint = f"; {other[0]} is a pickled file, which is never read: convert it to safetensors" if other else ""
        raise FileNotFoundError(f"the weights {folder / WEIGHTS_FILE} are missing{hint}")
    return indexed_weights(index)


def find_model(path: str | Path) -> Path:
    """The directory itself (of a model, or of an adapter, which stands for its base with the update), or that of a hub name ("org/name")
    fetched through huggingface_hub. FileNotFoundError otherwise."""
    from model.adapter_files import is_adapter

    folder = Path(path)
    recover_directory(folder)
    if (folder / CONFIG_FILE).is_file() or is_adapter(folder):
        return folder
    if folder.exists() or Path(path).is_absolute() or str(path).count("/") != 1 or str(path).startswith("."):
        raise FileNotFoundError(f"{folder} is not a model directory: it has no {CONFIG_FILE}")
    if folder.parts[0] == RESULTS_FOLDER:
        how = f"train it first: `python -m train.train_{folder.name}`, or " if folder.name in STAGES else ""
        raise FileNotFoundError(f"there is no model at {folder}; {how}name another model")
    if folder.parent.is_dir():
        raise FileNotFoundError(f"there is no model at {folder} (its folder {folder.parent} exists, this name does not)")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise FileNotFoundError(f"there is no folder {folder}, and huggingface_hub is not installed to look for it online") from error
    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except Exception as error:  # the hub client raises many kinds: offline, unknown name, no permission
        raise FileNotFoundError(
            f"there is no folder {folder}, and the model hub could not give {path!r} ({type(error).__name__}); check the name, or go online"
        ) from error


# --------------------------------------------------------------------------------------- names of tensors


def weights_to_disk(state: Mapping[str, Tensor], config: HaoAIConfig, kind: str | None = None) -> dict[str, Tensor]:
    """Our state dict under the key names of `kind`, a model_type (None: the config's own). Fused matrices are split into views: what is
    written into a view is written into the model, so this one table serves saving and loading."""
    heads, latent_heads = _rows_of_heads(config), _rows_of_heads(config.reasoning_shape if config.use_reasoning else config)
    mixtral = (kind or model_type(config)) == "mixtral"
    disk: dict[str, Tensor] = {}
    for name, tensor in state.items():
        head = name[: name.find(".") + 1]
        name = HEADS[head] + name.removeprefix(head) if head in HEADS else f"model.{name}"
        if ".qkv_proj." in name:
            rows = tensor.split(latent_heads if name.startswith("model.reasoning.") else heads)
            pieces = zip(("q_proj", "k_proj", "v_proj"), rows, strict=True)
            disk.update({name.replace("qkv_proj", part): piece for part, piece in pieces})
        elif ".gate_up_proj." in name:
            halves = zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True)
            disk.update({name.replace("gate_up_proj", part): half for part, half in halves})
        elif name.endswith(".mlp.gate_up_proj") or name.endswith(".mlp.down_proj"):
            disk.update(_split_experts(name, tensor, mixtral))
        elif name.endswith(".mlp.choice_bias"):
            disk[name.replace("choice_bias", "gate.e_score_correction_bias")] = tensor
        else:
            disk[name.replace(".mlp.gate.", ".block_sparse_moe.gate.") if mixtral else name] = tensor
    return disk


def _rows_of_heads(config: HaoAIConfig) -> list[int]:
    """Rows of q, k and v in a fused projection."""
    return [heads * config.head_size for heads in (config.n_head, config.kv_heads, config.kv_heads)]


def _split_experts(name: str, tensor: Tensor, mixtral: bool) -> dict[str, Tensor]:
    """A stack of all experts' matrices (E, rows, columns) as one disk tensor an expert and matrix."""
    block, _, kind = name.rpartition(".")
    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    if mixtral:
        block, names = block.replace(".mlp", ".block_sparse_moe"), {"gate": "w1", "up": "w3", "down": "w2"}
    disk = {}
    for index, expert in enumerate(tensor.unbind(0)):
        parts = {"gate": expert.chunk(2)[0], "up": expert.chunk(2)[1]} if kind == "gate_up_proj" else {"down": expert}
        disk.update({f"{block}.experts.{index}.{names[part]}.weight": piece for part, piece in parts.items()})
    return disk


def _check_weights(config: HaoAIConfig, source: WeightSource, make: type[SmartHaoAI]) -> list[str]:
    """Names of the tensors that a model of `config` needs. Raises ValueError when the source has others, or of another shape."""
    asked, held = config.account().parameters, sum(math.prod(shape) for shape in source.shapes().values())
    if asked > DAMAGED_CONFIG * max(held, 1):  # building the modules would take minutes, or more than torch can count
        raise ValueError(f"{source.file} holds {held:,} parameters, its config.json asks for {asked:,}: one of the two is damaged")
    with without_values():
        model = make(config)
    return _check_names(weights_to_disk(model.state_dict(), config), config, source)


def _check_names(places: Mapping[str, Tensor], config: HaoAIConfig, source: WeightSource) -> list[str]:
    """Names of `places`, the tensors to fill. Raises ValueError when the source has others, or of another shape."""
    expected = {name: tuple(tensor.shape) for name, tensor in places.items()}
    found = {name: shape for name, shape in source.shapes().items() if not name.endswith(NOT_PARAMETERS)}
    for name in [name for name in found if name.startswith("value_head.") and name not in expected]:
        found.pop(name)  # PPO's, in a checkpoint to resume from
    if config.tie_word_embeddings:
        found.pop("lm_head.weight", None)
    if "score.weight" in found.keys() - expected.keys():
        raise ValueError(f"{source.file} is a reward model: it gives scores, no words; load it with RewardModel.from_pretrained")
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        lacks = f"missing {_some(missing)}" if missing else ""
        surplus = f"not expected {_some(extra)}" if extra else ""
        raise ValueError(f"{source.file} does not fit its config.json: {'; '.join(filter(None, (lacks, surplus)))}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(f"{source.file}: {name} has shape {list(found[name])}, config.json asks for {list(shape)}")
    return list(expected)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


__all__ = [
    "WeightSource",
    "atomic_directory",
    "build_model",
    "config_from_disk",
    "config_to_disk",
    "fill",
    "find_model",
    "finished_config",
    "load_config",
    "load_finished",
    "load_pretrained",
    "load_weights",
    "model_type",
    "open_weights",
    "portability_notes",
    "read_index",
    "save_pretrained",
    "save_weights",
    "weights_to_disk",
]
