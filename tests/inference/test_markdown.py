"""Markdown as it is written: widths, styles, and text that is shown once and never changed."""

import random
import re

import pytest

from inference import markdown
from inference.markdown import MarkdownStream, cell_width, fit_cells

ANSI = re.compile(r"\x1b\[[0-9;]*m")
TEXT = """# Title 标题
Hello **bold words** and *it* and `code * x` 2**3 a*b 5 * 3 = 15, snake_case_name \\*star\\*.
今天天气很好，我们一起去公园散步，看看花，听听鸟叫，**然后**再回家吃饭。好吗？今天天气很好，我们一起去公园散步。
- item one is quite long and has to be wrapped around at some point, I guess so
  - nested
1. first
> quoted text
---
```python
def f(x):
    return x ** 2
```
| a | b |
|---|---|
| 1 | 你好 |
after the table **never closed
-5 and *"""


def drawn(text, width=60, cuts=None):
    stream = MarkdownStream(width)
    pieces = cuts or [text]
    return "".join(stream.push(piece) for piece in pieces) + stream.finish()


def test_pieces_of_any_size_give_the_same_picture(seed):
    """Guards: marks that are missed or doubled where a token ends in the middle of them."""
    chance = random.Random(seed)
    for _ in range(20):
        places = sorted({0, len(TEXT), *(chance.randint(0, len(TEXT)) for _ in range(chance.randint(0, 80)))})
        pieces = [TEXT[start:end] for start, end in zip(places, places[1:], strict=False)]
        assert drawn(TEXT, cuts=pieces) == drawn(TEXT)


def test_marks_become_styles_and_formulas_stay(monkeypatch):
    """Guards: sums and names that lose their stars, styles that run on into the user's own prompt, lines that the terminal would cut."""
    monkeypatch.setattr(markdown.importlib.util, "find_spec", lambda name: None)
    out = drawn(TEXT)
    plain = ANSI.sub("", out)
    for words in (
        "Title 标题\n",
        "bold words and it and code * x 2**3 a*b 5 * 3",
        "snake_case_name *star*",
        "• item",
        "  • nested",
        "1. first",
    ):
        assert words in " ".join(plain.split(" ")).replace("\nsnake", "snake").replace("= 15, ", "= 15, "), words
    assert "│ quoted text" in plain and "────" in plain and "  def f(x):\n      return x ** 2\n" in plain
    assert "| 1 | 你好 |\nafter the table never closed\n-5 and *" in plain
    assert out.count("\033[1m") == 3 and "\033[1mbold" in out and "\033[3mit\033[0m" in out and "\033[36mcode * x\033[0m" in out
    assert max(cell_width(line) for line in plain.split("\n")) <= 60
    assert out.rindex("\033[0m") > max(out.rindex("\033[1m"), out.rindex("\033[36m"))


def test_no_letter_is_lost_or_made_up(seed):
    """Guards: text that a half-finished mark swallows, for random soups of marks and words."""
    chance = random.Random(seed)
    soup = ["**", "*", "`", "```\n", "\n", "# ", "- ", "> ", "|", "a", "b c", "你好，", "12", "\\", " ", "1. ", "---"]
    for _ in range(300):
        text = "".join(chance.choices(soup, k=chance.randint(1, 25)))
        letters = re.sub(r"[^abc你好，0-9]", "", text)
        assert re.sub(r"[^abc你好，0-9]", "", ANSI.sub("", drawn(text, width=20))) == letters, text


def test_text_appears_as_it_comes():
    """Guards: an answer that is held back until a line or a paragraph is over."""
    stream = MarkdownStream(80)
    assert stream.push("Hello wor") == "Hello " and stream.push("ld, ") == "world, "
    assert stream.push("今天天气") == "今天天" and stream.finish() == "气"


def test_tables_and_code_are_drawn_with_rich():
    """Guards: columns that do not fit Chinese words."""
    pytest.importorskip("rich")
    plain = ANSI.sub("", drawn("| a | b |\n|---|---|\n| 1 | 你好 |\n\n```python\nx = 1\n```\n"))
    table = [line for line in plain.split("\n") if line[:1] in "┏┃┡│└" and line]
    assert len(table) == 5 and len({cell_width(line) for line in table}) == 1 and "  x = 1\n" in plain


@pytest.mark.parametrize(("text", "cells"), [("abc", 3), ("你好", 4), ("e\u0301", 1), ("😀", 2), ("，", 2), ("", 0), ("\u200b", 0)])
def test_cells(text, cells):
    """Guards: columns that are shifted by Chinese, by accents, by emoji."""
    assert cell_width(text) == cells


def test_one_line_is_cut_to_its_cells():
    """Guards: a status line that wraps and pushes the prompt off the screen."""
    assert fit_cells("你好，世界", 10) == "你好，世界" and fit_cells("你好，世界", 9) == "你好，世…" and fit_cells("a\nb", 9) == "a b"
