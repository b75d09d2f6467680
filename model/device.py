"""Where a model runs: the one decision about devices."""

from __future__ import annotations

import torch


def find_device(wanted: str | torch.device | None = None) -> torch.device:
    """The device of that name; for None or "auto" cuda, then mps, then cpu. Raises ValueError when there is none of that name here."""
    if wanted is None or wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # what torch raises differs from build to build
        reason = (str(error).splitlines() or ["unknown"])[0]
        raise ValueError(f"device {str(wanted)!r} cannot be used here ({reason}); try cpu") from error
    return device
