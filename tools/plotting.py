"""matplotlib without a screen: what every plot of the tools begins and ends with."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from model.files import atomic_write_bytes


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files only. Raises ValueError that names the extra when matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError('plots need matplotlib: pip install -e ".[app]"') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def save_figure(figure: Any, file: Path) -> None:
    """Write a figure as PNG in one step, and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    pyplot().close(figure)
    atomic_write_bytes(file, buffer.getvalue())
