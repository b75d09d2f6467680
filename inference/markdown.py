"""Markdown for a terminal while it is still being written: nothing that was shown is ever changed or shown again.

    shown = MarkdownStream(width=80)
    for piece in pieces: print(shown.push(piece), end="")
    print(shown.finish(), end="")

Text appears word by word, wrapped between words and counted in terminal cells (a Chinese character takes two). What needs a whole
line waits for its end (code, headings' marks, rules), a table for its last row. With `rich` installed, code is coloured and tables
are drawn; without it they stand as they were written.
"""

from __future__ import annotations

import importlib.util
import io
import re
import unicodedata

RESET, BOLD, ITALIC, CODE, DIM, HEADING = "\033[0m", "\033[1m", "\033[3m", "\033[36m", "\033[2m", "\033[1;34m"
# The beginning of a line that may still become a heading, a list, a quote, a fence, a table or a rule.
_UNDECIDED = re.compile(r"[ \t]*(?:#{1,6}|[-*+_](?:[ \t]*[-*_])*[ \t]*|\d{1,3}[.)]?|`{1,2}|~{1,2}|(?:```|~~~|\|).*|>)?")
_FENCE = re.compile(r"[ \t]*(```+|~~~+)[ \t]*([\w+#.-]*)(?!.*`)")  # with a mark after it, it is code within the line
_RULE = re.compile(r"[ \t]*([-*_])(?:[ \t]*\1){2,}[ \t]*")
_LIST = re.compile(r"([ \t]*)(?:[-*+]|(\d{1,3}[.)]))[ \t]+")
_DIVIDER = re.compile(r"[ \t]*\|?[ \t:|-]*-[ \t:|-]*")


def cell_width(text: str) -> int:
    """Terminal cells that a text takes: two for wide characters (Chinese, most emoji), none for combining ones."""
    return sum(_cells(character) for character in text)


def _cells(character: str) -> int:
    if character.isascii():
        return 1
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def fit_cells(text: str, width: int) -> str:
    """The text on one line, cut with … to take at most `width` cells."""
    text = " ".join(text.split())
    if cell_width(text) <= width:
        return text
    while text and cell_width(text) > width - 1:
        text = text[:-1]
    return text + "…"


def wrapped(text: str, width: int) -> str:
    """A plain text with its lines broken between words, so that the terminal does not break them within."""
    stream = MarkdownStream(width)
    for character in text.expandtabs(4):
        stream._show(character)
    stream._end_word()
    return stream._taken()


class MarkdownStream:
    """One answer. `push` returns what to write to the terminal now; `finish` the rest."""

    def __init__(self, width: int = 80) -> None:
        self.width = max(width, 20)
        self._out: list[str] = []
        self._start = ""  # the beginning of a line while it is undecided
        self._at_start = True
        self._fence: str | None = None  # what closes the code block that is open
        self._language = ""
        self._table: list[str] = []
        self._column, self._indent = 0, 0
        self._word, self._word_cells = "", 0
        self._styles: list[str] = []
        self._before, self._marks = " ", ""  # the last character, and marks whose meaning the next one decides
        self._rich = importlib.util.find_spec("rich") is not None

    def push(self, text: str) -> str:
        for character in text.expandtabs(4):
            if self._at_start:
                self._begin(character)
            else:
                self._inline(character)
        return self._taken()

    def finish(self) -> str:
        """The rest; the cursor stays at the end of the last line."""
        if self._at_start and self._start:
            self._decide(self._start, ended=False)
        self._settle_marks(" ")
        self._end_word()
        self._end_table(last=True)
        while self._styles:
            self._style(self._styles[-1])
        self._end_word()
        return self._taken()

    def _taken(self) -> str:
        shown, self._out = "".join(self._out), []
        return shown

    # ---------------------------------------------------------------- the beginning of a line

    def _begin(self, character: str) -> None:
        if character == "\n":
            self._decide(self._start, ended=True)
        elif self._fence is not None or _UNDECIDED.fullmatch(self._start + character):
            self._start += character
        else:
            self._decide(self._start + character, ended=False)

    def _decide(self, line: str, ended: bool) -> None:
        """What the line is, as far as it is there; the rest of a line that has not ended is shown as it comes."""
        self._start = ""
        if self._fence is not None:
            self._code_line(line)
            return
        if line.lstrip().startswith("|"):
            self._table.append(line)
            return
        self._end_table()
        if fence := _FENCE.match(line):
            self._fence, self._language = fence[1], fence[2]
            return
        self._at_start = False
        if ended and _RULE.fullmatch(line):
            self._raw(DIM + "─" * min(self.width, 40) + RESET)
            line = ""
        elif heading := re.match(r"#{1,6} ", line):
            self._style(HEADING)
            line = line[heading.end() :]
        elif item := _LIST.match(line):
            self._indent = cell_width(item[1]) + len(item[2] or "•") + 1
            for letter in item[1] + (item[2] or "•") + " ":
                self._show(letter)
            line = line[item.end() :]
        elif line.startswith(">"):
            self._indent = 2
            self._raw(DIM + "│ " + RESET)
            self._column = 2
            line = line[1:].lstrip(" ")
        for letter in line:
            self._inline(letter)
        if ended:
            self._inline("\n")

    def _code_line(self, line: str) -> None:
        if line.strip().startswith(self._fence or "") and not line.strip().strip((self._fence or "`")[0]):
            self._fence = None
        else:
            self._raw("  " + (_coloured(line, self._language) if self._rich else CODE + line + RESET) + "\n")

    def _end_table(self, last: bool = False) -> None:
        if not self._table:
            return
        rows, self._table = self._table, []
        drawn = _drawn(rows, self.width) if self._rich and len(rows) > 1 and _DIVIDER.fullmatch(rows[1]) else "\n".join(rows)
        self._raw(drawn + ("" if last else "\n"))

    # ---------------------------------------------------------------- inside a line

    def _inline(self, character: str) -> None:
        if character in "*`" and self._marks in ("", character, character * 2) and self._before != "\\":
            self._marks += character
            return
        if self._marks:
            self._settle_marks(character)
        if character == "\\" and CODE not in self._styles and self._before != "\\":
            self._before = character  # shown only when it escapes nothing
            return
        if self._before == "\\" and character not in r"\`*_{}[]()#+-.!|>~":
            self._show("\\")
        if character == "\n":
            while self._styles:
                self._style(self._styles[-1])
            self._indent, self._at_start = 0, True
        self._show(character)
        self._before = " " if self._before == "\\" == character else character

    def _settle_marks(self, following: str) -> None:
        """Whether the marks held back (* ** ` ...) change the style or stand for themselves."""
        marks, self._marks = self._marks, ""
        if not marks:
            return
        style = CODE if marks[0] == "`" else {1: ITALIC, 2: BOLD}.get(len(marks), "")
        formula = _is_ascii_word(self._before) and _is_ascii_word(following)  # 2**3, a*b
        if style == CODE:
            changes = len(marks) == 1
        elif style in self._styles:
            changes = not self._before.isspace()
        else:
            changes = not following.isspace() and not formula and (style == BOLD or following.isalpha())
        if changes and style and (style == CODE or CODE not in self._styles):
            self._style(style)
        else:
            for mark in marks:
                self._show(mark)
        self._before = marks[0]

    def _style(self, style: str) -> None:
        """Switch a style on or off."""
        if style in self._styles:
            self._styles.remove(style)
            self._word += RESET + "".join(self._styles)
        else:
            self._styles.append(style)
            self._word += style

    # ---------------------------------------------------------------- words and lines

    def _show(self, character: str) -> None:
        cells = _cells(character)
        if character == "\n":
            self._end_word()
            self._out.append("\n")
            self._column = 0
        elif character == " ":
            self._end_word()
            if self._column < self.width:
                self._out.append(" ")
                self._column += 1
        elif cells == 2:
            # A closing mark stays with the character before it.
            if not (self._word_cells and unicodedata.category(character) in ("Po", "Pe", "Pf")):
                self._end_word()
            self._word += character
            self._word_cells += cells
        else:
            if self._word_cells and _cells(self._word[-1]) == 2:
                self._end_word()
            self._word += character
            self._word_cells += cells

    def _end_word(self) -> None:
        if self._column + self._word_cells > self.width and self._column > self._indent:
            self._out.append("\n" + " " * self._indent)
            self._column = self._indent
        self._out.append(self._word)
        self._column = (self._column + self._word_cells - 1) % self.width + 1 if self._word_cells else self._column
        self._word, self._word_cells = "", 0

    def _raw(self, text: str) -> None:
        self._end_word()
        self._out.append(text)


def _is_ascii_word(character: str) -> bool:
    return character.isascii() and (character.isalnum() or character in "()")


def _rendered(thing: object, width: int) -> str:
    from rich.console import Console

    file = io.StringIO()
    Console(file=file, width=width, force_terminal=True, color_system="standard", highlight=False, legacy_windows=False).print(
        thing, end=""
    )
    return file.getvalue().rstrip("\n")


def _coloured(line: str, language: str) -> str:
    from rich.syntax import Syntax

    code = Syntax(line, language or "text", theme="ansi_dark", background_color="default").highlight(line)
    code.rstrip()
    return _rendered(code, max(1000, 2 * len(line)))


def _drawn(rows: list[str], width: int) -> str:
    from rich.table import Table

    cells = [[cell.strip().replace("**", "").replace("`", "") for cell in row.strip().strip("|").split("|")] for row in rows]
    table = Table(*cells[0])
    for row in cells[2:]:
        table.add_row(*row[: len(cells[0])])
    return _rendered(table, width)
