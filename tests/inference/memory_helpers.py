"""What the tests of the memory share."""

import pytest

from inference import lexical, memory


@pytest.fixture(params=["libraries", "built in"])
def search(request, monkeypatch):
    """Runs a test twice: with bm25s and rjieba (skipped without them), and with what is built in."""
    if request.param == "libraries":
        pytest.importorskip("bm25s")
        pytest.importorskip("rjieba")
    else:
        monkeypatch.setattr(lexical, "_installed", lambda library: False)
    memory._index_words.cache_clear()
    yield request.param
    memory._index_words.cache_clear()


def characters(text):
    """A stand-in for the number of tokens."""
    return len(text)
