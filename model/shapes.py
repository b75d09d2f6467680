"""Modules without values: their names and shapes, before weights are read or asked for.

What torch has for it (`torch.device("meta")`, `to_empty`) imports its compiler on the way, which takes longer than reading a small model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class _NoStartValues(TorchFunctionMode):
    """`torch.nn.init` leaves its tensors as they are."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init" or func in (torch.Tensor.normal_, torch.Tensor.uniform_):
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Modules made inside take no memory: their parameters are on the meta device."""
    with torch.device("meta"), _NoStartValues():
        yield


def give_room(module: nn.Module, device: torch.device | str, dtype: torch.dtype) -> None:
    """Undefined values on `device` for a module without values, its floating-point ones as `dtype`.

    As `to_empty`, which imports a package for symbolic mathematics."""
    module._apply(lambda tensor: torch.empty(tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype, device=device))
