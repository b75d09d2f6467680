"""Checkpoints of a running training: `checkpoints/step_000500/` holds all that resuming needs.

Model in the ordinary layout (fp32), or only its adapter where that is what learns; optimiser tensors in safetensors, everything else as
JSON; written to a temporary directory, flushed and renamed. Nothing is unpickled. Of a model that is divided among processes each writes
a share (`train/sharding.py`); any number of processes goes on from that. `checksums.json`, written last, says what each file has to be; a
run that is resumed takes the newest checkpoint that is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.adapter_files import ADAPTER_CONFIG, adapter_base, is_adapter, restore_adapter
from model.checkpoint import CONFIG_FILE, fill, find_model, open_weights, save_pretrained
from model.files import atomic_write_text, discard_directory, recover_directory, remove_leftovers, writing
from model.tokenizer import BPETokenizer
from model.transformer import SmartHaoAI
from model.weight_files import SafetensorsWeights, indexed_weights, save_weights
from train import parallel, sharding
from train.store import file_digest

FOLDER, STATE_FILE, OPTIMIZER_FILE, CHECKSUMS_FILE = "checkpoints", "state.json", "optimizer.safetensors", "checksums.json"
OPTIMIZER_INDEX = f"{OPTIMIZER_FILE}.index.json"
BEST = "best"  # beside the checkpoints: the weights that early stopping returns to
DAMAGED = ".damaged"  # end of the name of a checkpoint that was set aside
BEGUN_FROM = ("model_dir", "reward_model_dir", "teacher_dir")  # settings that name models which a run reads again when it is resumed


def save_checkpoint(
    out_dir: Path,
    step: int,
    model: SmartHaoAI,
    tokenizer: BPETokenizer,
    optimizers: list[torch.optim.Optimizer],
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write the checkpoint of `step` and delete all but the newest `keep`. Every process of a run has to call it."""
    path = out_dir / FOLDER / f"step_{step:06d}"
    with parallel.shared_directory(path) as folder:
        tensors, values = _optimizer_state(model, optimizers)
        tensors["random/cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["random/cuda"] = torch.cuda.get_rng_state()
        _save_model(model, folder, tokenizer)
        if sharding.is_sharded(model):
            sharding.save_share(tensors, folder, OPTIMIZER_INDEX)
        elif parallel.is_first():
            save_weights(tensors, folder / OPTIMIZER_FILE)
        parallel.barrier()
        if parallel.is_first():
            atomic_write_text(folder / STATE_FILE, json.dumps({**state, "step": step, "optimizer": values}, indent=1))
            write_checksums(folder)  # last: it vouches for all the others
    for old in list_checkpoints(out_dir)[:-keep] if parallel.is_first() else []:
        if old != path:  # with later steps beside it, which nobody has looked at: this one is known to be whole
            with contextlib.suppress(OSError):  # it is in use (Windows), or the disk takes no writes: the next save says so
                discard_directory(old)
    return path


def save_best(out_dir: Path, model: SmartHaoAI, tokenizer: BPETokenizer) -> None:
    """Keep the weights as they are now in place of those kept before. Every process of a run has to call it."""
    with parallel.shared_directory(out_dir / FOLDER / BEST) as folder:
        _save_model(model, folder, tokenizer)


def load_best(out_dir: Path, model: SmartHaoAI) -> None:
    """Back to what `save_best` has kept."""
    with parallel.first_before_others():
        recover_directory(out_dir / FOLDER / BEST)
    _load_weights(out_dir / FOLDER / BEST, model)


def _save_model(model: SmartHaoAI, folder: Path, tokenizer: BPETokenizer) -> None:
    """Of a divided model every process writes a share; an adapter is small, and rank 0 writes it."""
    divided = sharding.is_sharded(model)
    if divided and model.adapter is None:
        sharding.save_model_shares(model, folder)
    with sharding.whole(model) if model.adapter is not None else contextlib.nullcontext():
        if parallel.is_first():
            save_pretrained(model, folder, tokenizer, resumable=True, state={} if divided else None)


def list_checkpoints(out_dir: Path) -> list[Path]:
    """Checkpoints by their steps, oldest first; whether they are intact is for `intact_checkpoint` to say. An interrupted write never has
    such a name."""
    found = (path for path in (out_dir / FOLDER).glob("step_*") if re.fullmatch(r"step_\d+", path.name) and path.is_dir())
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))  # by name, a millionth step would come before the others


def newest_checkpoint(out_dir: Path) -> Path | None:
    """The last one that was written, after cleaning up behind a killed run."""
    for folder in (out_dir, out_dir / FOLDER):
        if folder.is_dir():
            remove_leftovers(folder)
    found = list_checkpoints(out_dir)
    return found[-1] if found else None


def intact_checkpoint(out_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are those that were saved, None when there is no checkpoint; and what is wrong with newer ones.

    Those are set aside (step_000006.damaged), so that they are neither counted nor taken for newer once more. ValueError when there are
    checkpoints, but none is intact; then nothing is renamed.
    """
    newest_checkpoint(out_dir)
    damaged: dict[Path, str] = {}
    for path in reversed(list_checkpoints(out_dir)):
        problem = damage(path)
        if problem is None:
            for bad in damaged:
                with writing(bad):
                    os.replace(bad, _free_name(bad))
            return path, list(damaged.values())
        damaged[path] = problem
    if damaged:
        raise ValueError(
            f"no checkpoint in {out_dir / FOLDER} is intact: {'; '.join(damaged.values())}. Nothing was deleted: bring back a copy of one, "
            "or begin again with --overwrite"
        )
    return None, []


def _free_name(path: Path) -> Path:
    names = [path.with_name(f"{path.name}{DAMAGED}"), *(path.with_name(f"{path.name}.{n}{DAMAGED}") for n in range(2, 1000))]
    return next(name for name in names if not name.exists())


def write_checksums(folder: Path) -> None:
    """checksums.json: size and SHA-256 of every other file of the folder, and of this list itself: damaged, it would accuse the others."""
    files = {file.name: file for file in sorted(folder.iterdir()) if file.is_file() and file.name != CHECKSUMS_FILE}
    sums = {name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for name, file in files.items()}
    atomic_write_text(folder / CHECKSUMS_FILE, json.dumps({"files": sums, "sha256": _sha256_of_list(sums)}, indent=1) + "\n")


def damage(checkpoint: Path) -> str | None:
    """What is wrong with the first file of a checkpoint that is not what was saved; None when all are.

    Older checkpoints have no checksums.json: there the JSON files must be readable, and the tensors have the checksums in their files.
    """
    try:
        if (checkpoint / CHECKSUMS_FILE).is_file():
            _check_sums(checkpoint)
        else:
            _check_readable(checkpoint)
    except (ValueError, OSError) as error:
        return str(error)
    return None


def _check_sums(checkpoint: Path) -> None:
    record = checkpoint / CHECKSUMS_FILE
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
        if found["sha256"] != _sha256_of_list(found["files"]):
            raise ValueError("its own checksum is another")
        sums = {checkpoint / name: (int(of["bytes"]), str(of["sha256"])) for name, of in found["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{record} is damaged: {error!r}") from error
    for file, (size, sha256) in sums.items():
        if not file.is_file():
            raise ValueError(f"{file} is missing")
        there = file.stat().st_size
        if there != size:
            raise ValueError(f"{file} is {'cut off' if there < size else 'damaged'}: it has {there:,} bytes instead of {size:,}")
        if _sha256(file) != sha256:
            raise ValueError(f"{file} is damaged: its bytes are not those that were saved (SHA-256)")


def _check_readable(checkpoint: Path) -> None:
    for file in [checkpoint / STATE_FILE, *sorted(checkpoint.glob("*.json"))]:
        if not file.is_file():
            raise ValueError(f"{file} is missing")
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is damaged: {error}") from error
    if not is_adapter(checkpoint):
        open_weights(checkpoint)
    for tensors in [_optimizer_tensors(checkpoint), *(SafetensorsWeights([file]) for file in sorted(checkpoint.glob("*.safetensors")))]:
        for name in tensors.shapes():
            tensors.tensor(name)


def _sha256_of_list(sums: Any) -> str:
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode("utf-8")).hexdigest()


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while piece := opened.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def model_digest(folder: str | Path) -> str:
    """Changes with a model's configuration and with every weight; of an adapter, with those of its base, too.

    A model that is saved once more has the same: safetensors writes the entries of a header in any order, so that for files of ours
    the tensors' checksums stand for them (their bytes are held against these when they are loaded).
    """
    digest = hashlib.blake2b(digest_size=10)
    place = find_model(folder)
    while True:
        names = (CONFIG_FILE, ADAPTER_CONFIG) if is_adapter(place) else (CONFIG_FILE,)
        for file in (place / name for name in names if (place / name).is_file()):
            digest.update(file_digest(file))
        for file in sorted(place.glob("*.safetensors")):
            weights = SafetensorsWeights([file])
            sums = weights.checksums()
            content = json.dumps([sums, weights.shapes()], sort_keys=True).encode("utf-8")
            digest.update(content if sums is not None else file_digest(file))
        if not is_adapter(place):
            return digest.hexdigest()
        place = adapter_base(place)


def models_begun_from(settings: Any) -> dict[str, str]:
    """The setting and digest of each model that a run with these settings starts from, compares with or learns from."""
    return {name: model_digest(folder) for name in BEGUN_FROM if (folder := getattr(settings, name, None)) is not None}


def check_same_models(checkpoint: Path, saved: Mapping[str, str], now: Mapping[str, str], settings: Any) -> None:
    """Raises ValueError when a model that the run began with has changed since: what it learned is about the one that was there."""
    for name, digest in saved.items():
        if now.get(name, digest) != digest:
            raise ValueError(
                f"{name}={getattr(settings, name)} is not the model that this run began with: it has changed since {checkpoint} was "
                "written; bring that model back (or name the folder where it is now), or begin again with --overwrite"
            )


def load_state(path: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint. Raises ValueError when it is damaged."""
    try:
        return json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path / STATE_FILE} is damaged: {error}") from error


def restore_model(path: Path, model: SmartHaoAI) -> None:
    """Put the weights of a checkpoint back in place, whoever wrote it. Of a divided model every process has to ask."""
    if is_adapter(path) != (model.adapter is not None):
        kind = "a run with an adapter" if is_adapter(path) else "a run without an adapter"
        raise ValueError(f"{path} was written by {kind}: go on with the settings it was begun with (lora.r)")
    _load_weights(path, model)


def restore_optimizers(path: Path, model: SmartHaoAI, optimizers: list[torch.optim.Optimizer]) -> None:
    """Put optimiser and random state of a checkpoint back in place."""
    source = _optimizer_tensors(path)
    stored = list(source.shapes())
    values = load_state(path)["optimizer"]
    names = {p: name for name, p in model.named_parameters()}
    for number, optimizer in enumerate(optimizers):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                prefix = f"{number}/{names[parameter]}/"
                state: dict[str, Any] = {}
                for key in (key for key in stored if key.startswith(prefix)):
                    tensor = source.tensor(key).clone()
                    step = key.endswith("/step")
                    state[key.removeprefix(prefix)] = tensor if step else sharding.own_part(tensor.to(parameter.device), parameter)
                state.update(values.get(prefix, {}))
                optimizer.state[parameter] = state
    torch.set_rng_state(source.tensor("random/cpu").clone())
    if "random/cuda" in stored and torch.cuda.is_available():
        torch.cuda.set_rng_state(source.tensor("random/cuda").clone())


def _load_weights(path: Path, model: SmartHaoAI) -> None:
    if model.adapter is not None:
        with sharding.rewritten(model):
            restore_adapter(model, path)
    elif sharding.is_sharded(model):
        sharding.load_model_shares(model, open_weights(path))
    else:
        fill(model, open_weights(path))


def _optimizer_tensors(path: Path) -> SafetensorsWeights:
    index = path / OPTIMIZER_INDEX
    return indexed_weights(index) if index.is_file() else SafetensorsWeights([path / OPTIMIZER_FILE])


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
