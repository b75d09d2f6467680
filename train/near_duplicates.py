"""Texts that say nearly the same, and texts that give away a test: hashes of words and Chinese characters, MinHash, n-gram overlap.

Near-duplicates by MinHash (Broder, 1997) with banding (Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3), of which
the lowest byte of each value is kept for comparing (b-bit minwise hashing, Li and König, 2010). Contamination by shared 13-grams (Brown et
al., 2020). A unit is a word, or one Chinese character, Japanese kana or Korean syllable; case, space and punctuation do not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache

import numpy as np

SHINGLE = 3
"""Units that are hashed together. Two texts of which one has 5% of its units changed share about 75% of them."""
BANDS, ROWS_OF_BAND = 20, 6
"""A pair that shares 50, 70, 80% of its shingles is looked at with a probability of 27, 92, 99.8%."""
PERMUTATIONS = BANDS * ROWS_OF_BAND
NGRAM = 13
_PIECE = 2048  # shingles permuted at a time: what fits into a processor's cache
_MIX, _ODD = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)
_LONGEST_WORD = 64
_POWERS = np.cumprod(np.full(_LONGEST_WORD, 0x100000001B3, dtype=np.uint64))
_random = np.random.default_rng(20240229)
_FACTORS = _random.integers(0, 2**32, PERMUTATIONS, dtype=np.uint32) | np.uint32(1)
_MASKS = _random.integers(0, 2**32, PERMUTATIONS, dtype=np.uint32)


@lru_cache(maxsize=1)
def _folded() -> tuple[np.ndarray, np.ndarray]:
    """By code: the lower-case letter or digit, 0 for all else; and which are units by themselves. Beyond the 16-bit plane, Chinese only."""
    letters = np.fromiter(
        (ord(chr(code).lower()[0]) if chr(code).isalnum() else 0 for code in range(1 << 16)), dtype=np.uint32, count=1 << 16
    )
    alone = np.zeros(1 << 16, dtype=bool)
    for first, last in ((0x3040, 0x9FFF), (0xAC00, 0xD7A3), (0xF900, 0xFAFF)):
        alone[first : last + 1] = True
    return letters, alone & (letters > 0)


def units(text: str) -> np.ndarray:
    """One 64-bit hash per word or Chinese character, (N,)."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    letters, alone_table = _folded()
    astral = codes >= 1 << 16
    low = np.where(astral, 0, codes)
    rare = astral & (codes >= 0x20000) & (codes < 0x33480)
    folded = np.where(rare, codes, letters[low])
    alone = alone_table[low] | rare
    kept = np.flatnonzero(folded)
    if not kept.size:
        return np.zeros(0, dtype=np.uint64)
    single = alone[kept]
    begins = np.ones(kept.size, dtype=bool)
    begins[1:] = single[1:] | single[:-1] | (np.diff(kept) > 1)
    starts = np.flatnonzero(begins)
    places = np.arange(kept.size) - np.repeat(starts, np.diff(np.append(starts, kept.size)))
    return np.add.reduceat(folded[kept] * _MIX * _POWERS[np.minimum(places, _LONGEST_WORD - 1)], starts)


def ngrams(hashes: np.ndarray, n: int) -> np.ndarray:
    """One 64-bit hash per n units in a row, (N - n + 1,), none when there are fewer."""
    count = hashes.size - n + 1
    if count < 1:
        return np.zeros(0, dtype=np.uint64)
    result = np.zeros(count, dtype=np.uint64)
    for offset in range(n):
        part = hashes[offset : offset + count]
        result = (result ^ part ^ (part >> np.uint64(29))) * _ODD
    return result ^ (result >> np.uint64(32))


def signature(hashes: np.ndarray) -> np.ndarray:
    """The MinHash values (PERMUTATIONS,) uint32 of a text's units; the text must have at least SHINGLE."""
    shingles = np.unique(ngrams(hashes, SHINGLE).astype(np.uint32))
    lowest = np.full(PERMUTATIONS, 0xFFFFFFFF, dtype=np.uint32)
    for first in range(0, shingles.size, _PIECE):
        piece = shingles[first : first + _PIECE]
        permuted = (piece[None, :] ^ _MASKS[:, None]) * _FACTORS[:, None]
        permuted ^= permuted >> np.uint32(15)
        permuted *= np.uint32(0x2C1B3C6D)
        np.minimum(lowest, permuted.min(axis=1), out=lowest)
    return lowest


def band_keys(values: np.ndarray) -> np.ndarray:
    """(BANDS,) uint64: texts that agree in one are compared."""
    keys = np.zeros(BANDS, dtype=np.uint64)
    for column in values.reshape(BANDS, ROWS_OF_BAND).T.astype(np.uint64):
        keys = (keys ^ column) * _MIX
        keys ^= keys >> np.uint64(31)
    return keys


def similarity(first: np.ndarray, second: np.ndarray) -> float:
    """The estimated share of common shingles (Jaccard), from the lowest bytes of two signatures."""
    agreeing = float((first == second).mean())
    return max(0.0, (agreeing - 1 / 256) / (1 - 1 / 256))  # bytes agree by chance once in 256


def near_duplicates(keys: np.ndarray, bytes_of: np.ndarray, threshold: float) -> dict[int, tuple[int, float]]:
    """{later text: (earlier text that stays, similarity)} for texts of at least `threshold` common shingles.

    keys: (N, BANDS); bytes_of: (N, PERMUTATIONS) uint8, the signatures' lowest bytes. Both may be memory maps; memory is 16 bytes a
    text and what the pairs need.
    """
    pairs: set[tuple[int, int]] = set()
    for band in range(BANDS):
        column = np.array(keys[:, band])
        order = np.argsort(column, kind="stable")
        ordered = column[order]
        same = np.flatnonzero(ordered[1:] == ordered[:-1])
        first = order[np.searchsorted(ordered, ordered[same], side="left")]
        later = order[same + 1]
        pairs.update(zip(first.tolist(), later.tolist(), strict=True))
        pairs.update(zip(order[same].tolist(), later.tolist(), strict=True))
    found: dict[int, tuple[int, float]] = {}
    for copy, original in sorted((copy, original) for original, copy in pairs):
        if copy in found:
            continue
        kept = found[original][0] if original in found else original
        alike = similarity(bytes_of[kept], bytes_of[copy])
        if alike >= threshold:
            found[copy] = (kept, alike)
    return found


class TestTexts:
    """The n-grams of questions that are for measuring: `match` finds the one that a text gives away.

    A question (any text of at least NGRAM units) counts as given away when the text holds at least `overlap` of its n-grams. N-grams that
    several questions share belong to the first. Memory grows with the questions, not with what is checked.
    """

    __test__ = False  # for pytest: no test class

    def __init__(self, texts: Iterable[tuple[str, str]], overlap: float = 0.5) -> None:
        """texts: (where it stands, text)."""
        self.names: list[str] = []
        self.too_short = 0
        hashes, owners = [], []
        for name, text in texts:
            grams = np.unique(ngrams(units(text), NGRAM))
            if not grams.size:
                self.too_short += 1
                continue
            hashes.append(grams)
            owners.append(np.full(grams.size, len(self.names)))
            self.names.append(name)
        every = np.concatenate([*hashes, np.zeros(0, dtype=np.uint64)])
        self._grams, first = np.unique(every, return_index=True)
        self._owners = np.concatenate([*owners, np.zeros(0, dtype=np.int64)])[first].astype(np.int64)
        self._needed = np.maximum(1, np.ceil(overlap * np.bincount(self._owners, minlength=len(self.names))))

    def match(self, hashes: np.ndarray) -> str | None:
        """Where the question stands of which a text with these units holds too much; None when there is none."""
        grams = np.unique(ngrams(hashes, NGRAM))
        if not grams.size or not self._grams.size:
            return None
        places = np.minimum(np.searchsorted(self._grams, grams), self._grams.size - 1)
        owners = self._owners[places[self._grams[places] == grams]]
        if not owners.size:
            return None
        counts = np.bincount(owners, minlength=len(self.names))
        given_away = np.flatnonzero(counts >= self._needed)
        return self.names[given_away[0]] if given_away.size else None


def texts_in(value: object) -> Iterator[str]:
    """Every text in a row, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from texts_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from texts_in(item)
