"""A model divided among processes (FSDP2, torch's `fully_shard`): each keeps a share of weights, gradients and optimiser state; a
block's weights are gathered for its passes and dropped again. Weights stay fp32, and products have the type of the run's autocast, as in
one process.

A finished model and the evaluation see whole weights (`whole`); checkpoints are gathered tensor by tensor, and each process
writes the tensors that fall to it, in the sharded layout of safetensors that any number of processes reads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.adapter_files import fingerprint
from model.checkpoint import weights_to_disk
from model.transformer import SmartHaoAI
from model.weight_files import INDEX_FILE, WeightSource, save_weights, write_index
from train import parallel

TRAINING_BYTES = 16  # of a parameter with its gradient and AdamW's two values
OF_MEMORY = 0.6  # of a GPU, which has activations to hold, too


def choose(setting: str, model: SmartHaoAI, device: str) -> str:
    """How several processes share the model, "none" in one: train.parallel, or for auto ddp, unless that would fill a GPU."""
    if parallel.size() == 1:
        return "none"
    if setting != "auto":
        return setting
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    too_large = device.startswith("cuda") and (
        TRAINING_BYTES * learning + 4 * (model.num_parameters() - learning)
        > OF_MEMORY * torch.cuda.get_device_properties(device).total_memory
    )
    return "fsdp" if too_large else "ddp"


def shard(model: SmartHaoAI, device: str) -> None:
    """Divide the model, which must be the same in every process, in place: block by block, then what is left."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if model.adapter is not None:  # of the base, while it is in one piece
        model.adapter.fingerprint = model.adapter.fingerprint or fingerprint(model)
    mesh = init_device_mesh(device.split(":")[0], (parallel.size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    return bool(_parts(model))


def _parts(model: nn.Module) -> list[Any]:
    if not parallel.running():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextlib.contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Every process has the whole model inside, and may use it without the others. All must enter."""
    parts = _parts(model)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()


@contextlib.contextmanager
def rewritten(model: nn.Module) -> Iterator[None]:
    """The same, and what is written into the weights inside stays there; it must be the same in every process."""
    shares = dict(model.named_parameters())
    with whole(model):
        yield
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter is not shares[name]:
                    shares[name].copy_(own_part(parameter.detach(), shares[name]))


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a divided tensor; every process has to ask."""
    if not parallel.running():
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor divided as `like` is, which may be in one piece."""
    if not parallel.running():
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def whole_state(model: nn.Module) -> dict[str, Tensor] | None:
    """A divided model's state in the memory of rank 0's machine (empty in the others); None for one that is in one piece."""
    if not is_sharded(model):
        return None
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        tensor = whole_tensor(tensor)
        if parallel.is_first():
            found[name] = tensor.cpu()
    return found


def save_model_shares(model: SmartHaoAI, folder: Path) -> None:
    """Every process writes its share of the model as model-00001-of-00002.safetensors and so on; rank 0 the index."""
    own = {}
    for name, tensor in _dealt(model.state_dict()):
        own.update(weights_to_disk({name: tensor}, model.config))
    _save_share(own, folder, INDEX_FILE)


@torch.no_grad()
def load_model_shares(model: SmartHaoAI, source: WeightSource) -> None:
    """Every process takes its share of the weights, which are those of this model, tensor by tensor."""
    for name, share in model.state_dict().items():
        tensor = torch.empty(share.shape, dtype=share.dtype)
        places = weights_to_disk({name: tensor}, model.config)
        for stored, place in places.items():
            place.copy_(source.tensor(stored))
        if places:  # what is not stored is tied to something that is
            share.copy_(own_part(tensor, share))


def save_share(tensors: Mapping[str, Tensor], folder: Path, index: str) -> None:
    """The same for divided tensors by any name: NAME-00001-of-00002.safetensors for the index NAME.safetensors.index.json."""
    _save_share(dict(_dealt(tensors)), folder, index)


def _dealt(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Those tensors that fall to this process, whole: each to the one that has the fewest bytes so far."""
    held = [0] * parallel.size()
    for name, tensor in tensors.items():
        owner = held.index(min(held))
        held[owner] += tensor.nbytes
        gathered = whole_tensor(tensor)
        if owner == parallel.rank():
            yield name, gathered.cpu()


def _save_share(own: dict[str, Tensor], folder: Path, index: str) -> None:
    file = f"{index.split('.')[0]}-{parallel.rank() + 1:05d}-of-{parallel.size():05d}.safetensors"
    checksums = save_weights(own, folder / file) if own else {}
    shares = parallel.gathered([file, checksums, sum(tensor.nbytes for tensor in own.values())])
    if parallel.is_first():
        places = {name: file for file, found, _ in shares for name in found}
        known = {name: value for _, found, _ in shares for name, value in found.items()}
        write_index(folder / index, places, known, sum(total for _, _, total in shares))
