"""Which contents are kept for the probes: a fixed hash decides, so every seed and every machine agrees."""

from __future__ import annotations

import hashlib
from functools import cache

HELD_OUT_SHARE = 0.15


@cache
def held_out(*key: object) -> bool:
    """True for about 15% of keys; depends on the key's parts only, never on a seed or on Python's hash."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode("utf-8"), digest_size=4).digest()
    return int.from_bytes(digest, "big") / 2**32 < HELD_OUT_SHARE
