"""Intervals for measured shares."""

from __future__ import annotations

import math


def wilson(passed: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a share (95% for z = 1.96). Raises ValueError unless 0 <= passed <= total, total > 0."""
    if not 0 <= passed <= total or total == 0:
        raise ValueError(f"passed is {passed} of total {total}; need 0 <= passed <= total and total > 0")
    share = passed / total
    scale = 1 + z * z / total
    middle = (share + z * z / (2 * total)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, middle - half), min(1.0, middle + half)
