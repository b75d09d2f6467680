"""A ReasoningPath for people: as an indented tree of text, and as a picture."""

from __future__ import annotations

import io
import unicodedata
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inference.markdown import cell_width
from model.files import atomic_write_bytes

if TYPE_CHECKING:
    from inference.reasoning import ReasoningPath

# Each entry is (Chinese, English).
TEXTS = {
    "question": ("问题：", "Question: "),
    "answer": ("答案：", "Answer: "),
    "thinking": ("思考：", "thinking: "),
    "calculated": ("计算器：", "calculator: "),
    "confidence": ("（把握 {value:.0%}）", " (confidence {value:.0%})"),
    "overall": ("整条路径的把握：{value:.0%}", "confidence of the whole path: {value:.0%}"),
    "unplanned": ("模型没有给出分步计划，因此一步作答。", "The model gave no plan, so the question was answered in one step."),
    "cut": ("（到达长度上限）", " (cut off at the length limit)"),
    "nothing": ("（没有结果）", "(no result)"),
}
LONGEST_SIDE = 60_000  # pixels; matplotlib draws no more than 65,535
MOST_THINKING = 400  # characters of a step's thinking that are shown
NODE_WIDTH = 60  # columns of text in a node of the picture
LINE, COLUMN, GAP, MARGIN = 0.22, 0.072, 0.32, 0.2  # inches: height of a line, width of a column, between nodes, around the text
CHINESE_FONTS = (
    "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN", "Microsoft YaHei", "PingFang SC", "Hiragino Sans GB",
    "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "SimHei", "SimSun", "Heiti SC", "Arial Unicode MS", "Noto Sans CJK JP",
)  # fmt: skip


def wrap(text: str, width: int) -> list[str]:
    """The text in lines of at most `width` columns, and a Chinese full stop behind: broken at spaces, beside Chinese characters, and
    within a word that fills a line."""
    lines: list[str] = []
    for paragraph in text.splitlines() or [""]:
        line = word = ""
        for character in [*paragraph, ""]:
            wide = bool(character) and unicodedata.east_asian_width(character) in "WF"
            if not character or character.isspace() or wide:
                line, word = _put(lines, line, word, width), ""
            if wide and unicodedata.category(character) in ("Po", "Pe", "Pf") and line and cell_width(line) <= width:
                line += character  # no line begins with a full stop
            elif wide:
                line = _put(lines, line, character, width)
            elif character.isspace():
                line += " " * bool(line)
            else:
                word += character
        lines.append(line.rstrip())
    return lines


def _put(lines: list[str], line: str, word: str, width: int) -> str:
    """Add a word to a line, or begin another one; finished lines go into `lines`."""
    if not word or cell_width(line + word) <= width:
        return line + word
    if line.strip():
        lines.append(line.rstrip())
    while cell_width(word) > width:
        fits = max(1, next(n for n in range(1, len(word) + 1) if cell_width(word[:n]) > width) - 1)
        lines.append(word[:fits])
        word = word[fits:]
    return word


def nodes(path: ReasoningPath, language: str) -> list[tuple[str, list[str]]]:
    """(kind, paragraphs) of each node: question, the steps, answer."""

    def say(name: str, **values: object) -> str:
        return TEXTS[name][language == "en"].format(**values)

    found = [("question", [say("question") + path.question.strip()])]
    if not path.planned:
        found[0][1].append(say("unplanned"))
    for number, step in enumerate(path.steps, start=1) if path.planned else [(0, path.steps[0])]:
        paragraphs = [f"{number}. {step.title}"] if path.planned else []
        if step.thinking:
            shown = step.thinking.strip()
            paragraphs.append(say("thinking") + (shown[:MOST_THINKING] + "…" if len(shown) > MOST_THINKING else shown))
        if step.calls:
            paragraphs.append(say("calculated") + ", ".join(f"{call.expression} = {call.value}" for call in step.calls))
        if path.planned:
            ending = say("cut") * (step.finish_reason == "length") + say("confidence", value=step.confidence)
            paragraphs.append("→ " + (step.result or say("nothing")) + ending)
        if paragraphs:
            found.append(("step", paragraphs))
    answer = say("answer") + (path.answer or say("nothing")) + say("confidence", value=path.answer_confidence)
    found.append(("answer", [answer, *([say("overall", value=path.confidence)] if path.planned else [])]))
    return found


def tree(path: ReasoningPath, language: str, width: int) -> str:
    """The path as an indented tree, at most `width` columns wide (at least 20)."""
    lines: list[str] = []
    (_, question), *branches = nodes(path, language)
    for paragraph in question:
        lines += wrap(paragraph, max(width, 20))
    for index, (_, paragraphs) in enumerate(branches):
        last = index == len(branches) - 1
        branch, trunk = ("└─ ", "   ") if last else ("├─ ", "│  ")
        for place, paragraph in enumerate(paragraphs):
            indent = "   " * (place > 0)
            for number, line in enumerate(wrap(paragraph, max(width - 6, 14))):
                lines.append((branch if place == number == 0 else trunk) + indent + line)
    return "\n".join(line.rstrip() for line in lines)


def draw(path: ReasoningPath, file: Path, language: str) -> Path:
    """The path as nodes from top to bottom, coloured by how sure they are. ValueError without matplotlib, or for an unknown suffix."""
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError('pictures need matplotlib: pip install -e ".[app]"') from error
    boxes = [(kind, [line for paragraph in parts for line in wrap(paragraph, NODE_WIDTH)]) for kind, parts in nodes(path, language)]
    font, known = _font("".join(line for _, lines in boxes for line in lines))
    heights = [len(lines) * LINE + 2 * MARGIN for _, lines in boxes]
    wide, high = NODE_WIDTH * COLUMN + 0.9, sum(heights) + GAP * (len(boxes) + 1)
    figure = Figure(figsize=(wide, high), dpi=min(130, LONGEST_SIDE / high))
    canvas = FigureCanvasAgg(figure)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, wide), ylim=(high, 0))
    axis.axis("off")
    sure = iter([step.confidence for step in path.steps] if path.planned else [])
    y = GAP
    for index, ((kind, lines), height) in enumerate(zip(boxes, heights, strict=True)):
        value = path.answer_confidence if kind == "answer" else next(sure, None) if kind == "step" else None
        colour = "#eef1f5" if value is None else colormaps["RdYlGn"](0.15 + 0.7 * value, alpha=0.35)
        if index:
            arrow = {"arrowstyle": "-|>", "color": "#5b6673", "linewidth": 1.2}
            axis.annotate("", xy=(wide / 2, y), xytext=(wide / 2, y - GAP), arrowprops=arrow)
        edge = {"facecolor": colour, "edgecolor": "#5b6673", "linewidth": 1.6 if kind == "answer" else 0.9}
        axis.add_patch(_box(0.3, y, wide - 0.6, height, edge))
        for number, line in enumerate(lines):
            shown = "".join(c if ord(c) in known or c == " " else "□" for c in line)
            place = y + MARGIN + (number + 0.5) * LINE
            # Dollar signs are no formulas here.
            axis.text(0.3 + MARGIN, place, shown.replace("$", r"\$"), va="center", fontproperties=font)
        y += height + GAP
    buffer = io.BytesIO()
    canvas.print_figure(buffer, format=file.suffix.lstrip(".").lower() or "png")
    atomic_write_bytes(file, buffer.getvalue())
    return file


def _box(x: float, y: float, width: float, height: float, style: dict[str, Any]) -> Any:
    from matplotlib.patches import FancyBboxPatch

    return FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", **style)


def _font(text: str) -> tuple[Any, set[int]]:
    """A font for the text, and the code points it has. Warns when Chinese is asked for and no font has it."""
    from matplotlib.font_manager import FontProperties, fontManager, get_font

    chinese = any("\u3400" <= c <= "\u9fff" for c in text)
    installed = {entry.name: entry.fname for entry in fontManager.ttflist}
    name = next((name for name in CHINESE_FONTS if chinese and name in installed), "DejaVu Sans")
    if chinese and name == "DejaVu Sans":
        warnings.warn(
            "no installed font has Chinese characters, so the picture shows boxes in their place: install one, such as Noto Sans CJK SC "
            "(Debian, Ubuntu: apt install fonts-noto-cjk), and delete matplotlib's font cache",
            stacklevel=4,
        )
    names = dict.fromkeys((name, "DejaVu Sans"))  # the second one for what the first has not
    return FontProperties(family=[*names], size=9), {point for each in names for point in get_font(installed[each]).get_charmap()}
