"""Words of Chinese and English text, and a search over them (BM25).

    Bm25([search_words("My dog is called Biscuit."), search_words("我搬到了柏林。")]).relevance(search_words("what is my dog called?"))

With the extra `memory` (`rjieba`, `bm25s`) Chinese is cut into words and the index is a sparse matrix; without it Chinese is cut into
pairs of characters, and the same formula is worked out here. `search_parts()` says what is in use.
"""

from __future__ import annotations

import importlib.util
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import numpy as np

Language = Literal["zh", "en"]

HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
K1, B = 1.5, 0.75
_PART = re.compile(rf"[{HAN}]+|\d+(?:[.:]\d+)*|[^\W\d_{HAN}]+")
_SENTENCE_END = re.compile(r"(?<=[。！？!?；\n])\s*|(?<=[.;])\s+|\n+")
STOP_WORDS = set(
    "a an the this that these those it its of to in on at for from with by as is are was were be been am do does did have has had will "
    "would can could should may might shall not no and or but if so than then there here i me my mine we us our you your he him his she "
    "her they them their what which who whom whose when where why how about just very really please tell know s t m re ve ll d don".split()
)
STOP_HAN = set("的了是我你他她它们在有和与或不也都就还又很这那吗呢吧啊呀哦嘛么个一上下来去到把被给让对从请什怎哪谁几多少之其")
STOP_HAN_WORDS = set(
    "什么 怎么 我们 你们 他们 她们 这个 那个 哪个 哪里 哪儿 为什么 多少 一个 一下 没有 可以 知道 告诉 时候 现在 就是".split()
)


def language(text: str) -> Language:
    """The language that a text is mostly written in: "zh", or "en" for everything else. Two Latin letters weigh as much as a Han one."""
    han = len(re.findall(rf"[{HAN}]", text))
    return "zh" if 2 * han > len(re.findall(r"[A-Za-z]", text)) else "en"


def sentences(text: str) -> list[str]:
    """The sentences of a text, without the space around them; a line end is the end of a sentence."""
    return [part.strip() for part in _SENTENCE_END.split(text) if part.strip()]


def stem(word: str) -> str:
    """An English word without its commonest endings, so that move, moves, moved and moving agree. Not a word to be shown."""
    for ending in ("ing", "ed", "es", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 3 and not word.endswith("ss"):
            word = word[: -len(ending)]
            break
    return word[:-1] if word.endswith("e") and len(word) > 3 else word


def words(text: str) -> list[str]:
    """The words of a text in their order, lower case, without those that say nothing (the, 的)."""
    found: list[str] = []
    for part in _PART.findall(unicodedata.normalize("NFKC", text).lower()):
        if "\u3400" <= part[0] and re.match(f"[{HAN}]", part):
            found += [word for word in _cut(part) if word not in STOP_HAN_WORDS and not set(word) <= STOP_HAN]
        elif part not in STOP_WORDS:
            found.append(part)
    return found


def search_words(text: str) -> list[str]:
    """What a text is found by: the stems of its words, and every Chinese character beside the words, since a cut may be wrong
    (我的狗叫豆豆 is cut into 我 的 狗叫 豆豆) and 住 should find 居住."""
    found = [stem(word) for word in words(text)]
    return found + [char for word in found if len(word) > 1 for char in word if re.match(f"[{HAN}]", char) and char not in STOP_HAN]


def search_parts() -> str:
    """Which search is in use, for people to read."""
    index = "bm25s" if _installed("bm25s") else "built-in BM25"
    return f"{index}, Chinese by {'rjieba words' if _installed('rjieba') else 'character pairs'}"


class Bm25:
    """BM25 over documents given as lists of words: Lucene's form (idf = ln(1 + (N - n + 0.5) / (n + 0.5)), k1 1.5, b 0.75), as `bm25s`
    has it (Lù, 2024); that library does the work where it is installed."""

    def __init__(self, documents: Sequence[Sequence[str]]) -> None:
        self._counts = [Counter(document) for document in documents]
        self._holding = Counter(word for counts in self._counts for word in counts)
        self._index: Any = None
        if _installed("bm25s") and self._holding:
            import bm25s

            self._index = bm25s.BM25(method="lucene", k1=K1, b=B)
            self._index.index([list(document) for document in documents], show_progress=False)

    def scores(self, query: Sequence[str]) -> np.ndarray:
        """The score (N,) of every document; 0 where it has none of the query's words."""
        wanted = [word for word in query if word in self._holding]
        if not wanted:
            return np.zeros(len(self._counts))
        if self._index is not None:
            return np.asarray(self._index.get_scores(wanted), dtype=np.float64)
        lengths = np.array([counts.total() for counts in self._counts], dtype=np.float64)
        norm = K1 * (1 - B + B * lengths / lengths.mean())
        scores = np.zeros(len(self._counts))
        for word in wanted:
            found = np.array([counts[word] for counts in self._counts], dtype=np.float64)
            scores += self._idf(word) * found / (found + norm)
        return scores

    def relevance(self, query: Sequence[str]) -> np.ndarray:
        """Scores (N,) between 0 and 1: 1 is a document of average length that has every word of the query once. A word that no document
        has counts as an average one of the others, so that the figure means the same in a small and a large collection."""
        known = [self._idf(word) for word in query if word in self._holding]
        if not known:
            return np.zeros(len(self._counts))
        best = sum(known) / len(known) * len(query) / (K1 + 1)
        return np.minimum(self.scores(query) / best, 1.0)

    def _idf(self, word: str) -> float:
        holding = self._holding[word]
        return math.log(1 + (len(self._counts) - holding + 0.5) / (holding + 0.5))


@cache
def _installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def _cut(run: str) -> list[str]:
    """A run of Chinese characters as words."""
    if _installed("rjieba"):
        import rjieba

        return rjieba.cut(run)
    return [run[at : at + 2] for at in range(len(run) - 1)] or [run]
