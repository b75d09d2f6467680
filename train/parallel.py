"""Several processes that train one model: `torchrun --nproc_per_node=2 -m train.train_pretrain ...` (gloo on CPUs, NCCL on GPUs).

Every process composes the same batches from the same cursor and computes its rows of them, so that order and cursor know nothing of
the number of processes. The weights of a step are counted before that: each process divides its part of the loss by the weights of all,
and the gradients are added up. Rank 0 alone prints and writes. In one process nothing here communicates. How a model larger than one
device's share is divided: `train/sharding.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from model.files import atomic_directory
from train.config import UsageError

if TYPE_CHECKING:
    from train.data import Batch
    from train.losses import Term

TIMEOUT = timedelta(hours=2)  # rank 0 may read a large corpus for the first time, or write samples, while the others wait
LOST = "another process of this run has ended or cannot be reached: see what it said; --resume goes on (HAOAI_DEBUG=1 says more)"
BUCKET_MIB = 25  # of gradients that are sent together while the rest is still being computed

_alone = False


def size() -> int:
    """Number of processes that train together; 1 without torchrun, and inside `alone`."""
    return 1 if _alone or not running() else torch.distributed.get_world_size()


def rank() -> int:
    """Number of this process, from 0."""
    return torch.distributed.get_rank() if running() else 0


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0


def running() -> bool:
    """Whether this process is one of several."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun started; those after the first print nothing but errors.

    CPU tensors travel by gloo, also where GPUs compute: what the processes agree on is small and lies there.
    """
    if not torch.distributed.is_available():
        raise UsageError("this build of torch has no torch.distributed: start one process, without torchrun")
    gpu = torch.cuda.is_available() and torch.distributed.is_nccl_available()
    place = int(os.environ.get("LOCAL_RANK", "0"))
    if gpu and place < torch.cuda.device_count():
        torch.cuda.set_device(place)
    store, number, count = next(torch.distributed.rendezvous("env://", timeout=TIMEOUT))
    # What processes that torchrun has replaced left in its store would lead the new ones to addresses where nobody is.
    store = torch.distributed.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=number, world_size=count, timeout=TIMEOUT)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        with contextlib.nullcontext() if is_first() else contextlib.redirect_stdout(nowhere):
            yield
    torch.distributed.destroy_process_group()  # not after an error: others may still be waiting in the middle of something


def check_device(device: str) -> None:
    """Raise UsageError where this process cannot have the device for itself."""
    if size() == 1:
        return
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"train.device={device}: several processes run on cpu or cuda")
    here = int(os.environ.get("LOCAL_RANK", "0"))
    if kind == "cuda" and number:
        raise UsageError(f"train.device={device}: each process takes a GPU of its own; set train.device=cuda")
    if kind == "cuda" and here >= torch.cuda.device_count():
        raise UsageError(f"--nproc_per_node is larger than the number of GPUs, {torch.cuda.device_count()}; train.device=cpu needs none")


def lost_process(error: BaseException) -> bool:
    """Whether an error says that another process of the run has gone."""
    if not running() or not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    return isinstance(error, torch.distributed.DistError) or any(word in text for word in ("gloo", "nccl", "connection closed"))


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """What rank 0 does by itself: inside, there is one process."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


# ------------------------------------------------------------------------------------------ agreeing


def barrier() -> None:
    """Wait until every process is here."""
    if size() > 1:
        torch.distributed.all_reduce(torch.zeros(1))


@contextlib.contextmanager
def first_before_others() -> Iterator[None]:
    """Rank 0 passes through before the others begin: they find the files that it makes."""
    if not is_first():
        barrier()
    with alone():
        yield
    if is_first():
        barrier()


def summed(values: Sequence[float]) -> list[float]:
    """Each number added up over all processes."""
    return _reduced(values, "SUM")


def largest(*values: float) -> list[float]:
    """The largest of each number over all processes: one that wants to stop stops all, the slowest clock counts."""
    return _reduced(values, "MAX")


def _reduced(values: Sequence[float], how: str) -> list[float]:
    if size() == 1:
        return list(values)
    numbers = torch.tensor(values, dtype=torch.float64)
    torch.distributed.all_reduce(numbers, getattr(torch.distributed.ReduceOp, how))
    return numbers.tolist()


def from_first(value: Any) -> Any:
    """What rank 0 says, a JSON value."""
    return gathered(value if is_first() else None)[0] if size() > 1 else value


def gathered(value: Any) -> list[Any]:
    """The JSON values of all processes, by rank."""
    if size() == 1:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.long) for _ in range(size())]
    torch.distributed.all_gather(lengths, torch.tensor([len(data)]))
    longest = max(int(length) for length in lengths)
    received = [torch.empty(longest, dtype=torch.uint8) for _ in lengths]
    torch.distributed.all_gather(received, nn.functional.pad(data, (0, longest - len(data))))
    return [json.loads(bytes(piece[: int(length)].tolist())) for piece, length in zip(received, lengths, strict=True)]


@contextlib.contextmanager
def shared_directory(path: Path) -> Iterator[Path]:
    """`atomic_directory` that every process may write into; all see `path` finished, or none. The folder must be one for all machines."""
    if size() == 1:
        with atomic_directory(path) as folder:
            yield folder
        return
    with atomic_directory(path) if is_first() else contextlib.nullcontext() as own:
        yield Path(from_first(str(own)))
        barrier()
    barrier()


# ------------------------------------------------------------------------------------------ the data of a step


def share(batch: Batch, place: int, count: int) -> Batch | None:
    """Part `place` of `count` about equal parts of a batch, with the weights of the whole; None where there are fewer rows than parts.
    Part 0 is the largest. A batch whose rows have to be computed together is all in part 0."""
    ends = batch.boundaries()
    start, stop = (next(end for end in ends if end * count >= number * ends[-1]) for number in (place, place + 1))
    return batch.rows(start, stop) if start < stop else None


def own_parts(batches: Sequence[Batch], cut: Callable[[Batch], list[Batch]]) -> tuple[list[tuple[Batch, float]], int]:
    """What this process computes of a step's batches, cut into passes, each with the factor by which it counts; and how many passes
    count over all processes.

    Every process makes as many passes, since they meet in each: one that has none left computes rows that count 0.
    """
    count = size()
    # Batches take turns in who gets the larger parts.
    parts = [
        [piece for turn, batch in enumerate(batches) if (own := share(batch, (place - turn) % count, count)) for piece in cut(own)]
        for place in range(count)
    ]
    passes = [(piece, 1.0) for piece in parts[rank() if count > 1 else 0]]
    idle = batches[0].rows(0, batches[0].boundaries()[1])
    passes += [(idle, 0.0)] * (max(map(len, parts)) - len(passes))
    return passes, sum(map(len, parts))


def own_share(batch: Batch) -> Batch:
    """This process's part of a batch; of one with too few rows, what rank 0 has."""
    return share(batch, rank() if size() > 1 else 0, size()) or share(batch, 0, size()) or batch


def seed_step(seed: int, step: int) -> None:
    """Several processes draw their dropout from (seed, step, rank): nothing of it has to be kept for a run that is resumed."""
    if size() > 1:
        torch.manual_seed((seed * 1_000_003 + step) * 4096 + rank())


def add_up(
    loss_sum: float, others: dict[str, float], metrics: dict[str, list[float]], load: Tensor | None
) -> tuple[float, dict[str, float], dict[str, list[float]], Tensor | None]:
    """A step's sums over all processes, in one message. metrics: [sum, weight], whose weights are those of all already."""
    if size() == 1:
        return loss_sum, others, metrics, load
    counts = [] if load is None else load.flatten().tolist()
    total, *rest = summed([loss_sum, *others.values(), *(pair[0] for pair in metrics.values()), *counts])
    others = dict(zip(others, rest[: len(others)], strict=True))
    rest = rest[len(others) :]
    metrics = {name: [value, pair[1]] for (name, pair), value in zip(metrics.items(), rest, strict=False)}
    if load is not None:
        load = torch.tensor(rest[len(metrics) :], dtype=load.dtype, device=load.device).view_as(load)
    return total, others, metrics, load


# ------------------------------------------------------------------------------------------ the passes of a step


class SharedLoss:
    """Calls the loss function so that the gradients of all processes have been averaged after the last pass of a step.

    What DistributedDataParallel wraps is the loss, not the model: inside, loss functions see the plain model, and whatever they do with
    its head, its embedding or a value head is part of the graph that DDP watches. (Wrapping the model would hide from it what is used
    outside of the model's own forward pass.) Parameters that a step does not reach keep no gradient, as in one process.
    """

    def __init__(self, model: nn.Module, loss_fn: Callable[[nn.Module, Batch], list[Term]], kind: str) -> None:
        """kind: "none", "ddp", or "fsdp" for a model that was divided by `train.sharding.shard`, which sends gradients in every pass:
        to wait for the last one would keep those of the whole model in every process."""
        self.model, self.loss = model, _LossOf(model, loss_fn)
        self.ddp = None
        if kind == "ddp":
            # These parts learn only where there are labels; all others take part in every loss.
            sometimes = any(getattr(model, part, None) is not None for part in ("reasoning", "auxiliary"))
            self.ddp = nn.parallel.DistributedDataParallel(
                self.loss, find_unused_parameters=sometimes, bucket_cap_mb=BUCKET_MIB, gradient_as_bucket_view=True
            )

    def __call__(self, batch: Batch) -> list[Term]:
        if self.ddp is None:
            return self.loss.loss_fn(self.model, batch)
        totals = iter(self.ddp(batch))
        return [term if term.metric else replace(term, total=next(totals)) for term in self.loss.terms]

    def sending(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around a forward and backward pass: with ddp only the last one of a step sends gradients."""
        return self.ddp.no_sync() if self.ddp is not None and not last else contextlib.nullcontext()


class _LossOf(nn.Module):
    """The loss as a module: a batch in, the totals of its terms out."""

    def __init__(self, model: nn.Module, loss_fn: Callable[[nn.Module, Batch], list[Term]]) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn
        self.terms: list[Term] = []

    def forward(self, batch: Batch) -> list[Tensor]:
        self.terms = self.loss_fn(self.model, batch)
        return [term.total for term in self.terms if not term.metric]
