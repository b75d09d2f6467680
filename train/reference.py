"""The reference model of preference optimisation: its log-probabilities, computed once and kept beside the token store.

They come from the forward pass that trains, over the same packed batches: with dropout off and equal precision the first loss sees
differences of exactly 0. Later epochs are packed otherwise, which moves an fp32 log-probability by about 1e-5 of its value, one in
bf16 by 1e-2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from model.transformer import SmartHaoAI
from model.weight_files import load_weights, save_weights
from train import parallel
from train.data import Batch
from train.log_probs import completion_log_probs
from train.memory import by_halves
from train.pairs import PackedPairs
from train.runtime import Precision


def reference_log_probs(
    model: SmartHaoAI, source: PackedPairs, precision: Precision, training: bool = True, log: Callable[[str], object] = print
) -> Tensor:
    """Log-probability of every answer of `source` under `model`, (documents,) fp32 on the CPU; NaN for those it never gives.

    training: as in training, else as in evaluation (which may halt a reasoning head early); dropout is off in both. The result is read
    from the store's folder when the same model was asked for the same batches before.
    """
    file = source.store.folder / f"reference-{_key(model, source, precision, training)}.safetensors"
    with parallel.first_before_others():
        if file.is_file():
            try:
                return load_weights(file)["log_probs"]
            except ValueError as error:
                log(f"warning: {error}; computing it again")
        return _compute(file, model, source, precision, training, log)


def _compute(
    file: Path, model: SmartHaoAI, source: PackedPairs, precision: Precision, training: bool, log: Callable[[str], object]
) -> Tensor:
    pairs = int((source.cuts >= 0).sum())
    log(f"computing reference log-probabilities of {pairs:,} {'answers' if source.judged else 'pairs'}, once, before the first step ...")
    values = torch.full((len(source.documents.split),), float("nan"))
    model.train(training)
    with torch.no_grad(), without_dropout(model), precision.autocast():
        bar = tqdm(total=pairs, unit="pair", desc="reference", leave=False, disable=None)

        def measure(batch: Batch) -> None:
            documents = batch.extra["documents"]
            values[documents] = completion_log_probs(model, batch.to(precision.device).inputs).sums().cpu()
            bar.update(len(documents) // 2)

        for batch in source.every_pair():
            by_halves(batch, measure)
        bar.close()
    model.take_expert_load()  # this was no training
    save_weights({"log_probs": values}, file)
    log(f"reference log-probabilities of {int((~values.isnan()).sum()):,} answers: {file}")
    return values


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """The model's dropout is off inside."""
    before = disable_dropout(model)
    try:
        yield
    finally:
        for module, name, rate in before:
            setattr(module, name, rate)


def disable_dropout(model: nn.Module) -> list[tuple[nn.Module, str, float]]:
    """Turn the model's dropout off: with it two forward passes differ, and no ratio would be 1. Returns (module, attribute, rate)."""
    before: list[tuple[nn.Module, str, float]] = []
    for module in model.modules():
        name = "p" if isinstance(module, nn.Dropout) else "dropout"
        rate = getattr(module, name, None)
        if isinstance(rate, float):
            before.append((module, name, rate))
            setattr(module, name, 0.0)
    return before


def _key(model: SmartHaoAI, source: PackedPairs, precision: Precision, training: bool) -> str:
    """Of all that the values depend on, to the last bit."""
    how = (source.split_name, source.max_length, source.units_per_batch, source.units_per_step, precision.name, precision.device, training)
    digest = hashlib.blake2b(repr(how).encode(), digest_size=10)
    digest.update(repr((model.config, model.reasoning_setting)).encode())
    digest.update(source.documents.order(0).tobytes() + source.cuts.tobytes())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
