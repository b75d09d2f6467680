"""What a source's reader yields, and the small repairs that all readers share."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from train.cleaning import repair

Turns = list[dict[str, str]]  # [{"role", "content"}, ...]


@dataclass(frozen=True)
class Unit:
    """One natural unit (a chapter, a fable, an article): its text, and chat rows made from it.

    `text` may be empty (rows only). `lang` is zh, en or both. Units of a higher `priority` are taken first where a source is capped.
    """

    text: str
    lang: str
    rows: tuple[Turns, ...] = field(default=())
    priority: int = 0


_HAN = "\u4e00-\u9fff"
_NEXT_TO_HAN = re.compile(f"(?<=[{_HAN}”》）])\\s*([,;:?!])\\s*|([,;:?!])\\s*(?=[{_HAN}“《])")
_FULL = str.maketrans(",;:?!", "，；：？！")

# Frequent characters that only Traditional text uses: one of them marks a unit as not yet converted.
TRADITIONAL = re.compile(
    "[們來時個這為學國會後對說過還進發東車長門問間開關書馬鳥魚風飛雲電話語讀寫詩歲萬與無樂從聽見當應實現點動種經頭"
    "處邊遠樹葉紅綠黃銀錢鐘龍鳳雞張陳劉楊趙孫諸將軍戰爭愛親兒將畫筆墨紙遊園舊憶淚歸淺漢滿澤濃濕燈煙獨獻環盡監]"
)
# Not a judgement of people: rows with these words are simply left out of a small chat model's examples.
UNSUITABLE = re.compile(
    r"\b(sex\w*|porn\w*|nude|naked|damn\w*|hell|crap|shit\w*|fuck\w*|ass|bitch\w*|bastard|idiot|stupid|suck\w*|kill\w*|murder\w*|suicid\w*|"
    r"die|dead|death|drunk|drugs?|weed|gun|rape\w*|racis\w*|nazi\w*|hitler|trump|hillary|clinton|obama|terroris\w*)\b"
    r"|色情|裸体|强奸|妓|嫖|淫|性交|卖淫|毒品|自杀|他妈|操你|傻逼|傻B|狗屁|王八|婊|混蛋|放屁|纳粹|恐怖分子",
    re.IGNORECASE,
)
LINK = re.compile(r"https?:|www\.|\.(com|cn|net|org)\b|@|\bQQ\b|\d{7,}", re.IGNORECASE)


def tidy(text: str) -> str:
    """Composed Unicode, ASCII letters and digits, Chinese punctuation kept, no control characters, no stray space or empty lines."""
    text = repair(text).replace("\t", " ").replace("\u200d", "")
    lines = (re.sub(r" {2,}", " ", line).strip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def chinese(text: str) -> str:
    """`tidy`, full-width punctuation beside Chinese characters, no spaces between them, and quotation marks in pairs."""
    text = re.sub(f"(?<=[{_HAN}，。！？；：、”]) +(?=[{_HAN}“])", "", tidy(text))
    text = _NEXT_TO_HAN.sub(lambda match: (match[1] or match[2]).translate(_FULL), text)
    text = re.sub(f"(?<=[{_HAN}])\\.(?=\\s|$)", "。", text)
    if text.count("“") != text.count("”"):  # lost halves of quotations: without marks the text still reads well
        text = re.sub("[“”]", "", text)
    return text


def letters(text: str) -> int:
    """How many letters or Chinese characters the text holds."""
    return sum(character.isalpha() for character in text)


def han_share(text: str) -> float:
    """Chinese characters among all letters, 0 to 1."""
    return len(re.findall(f"[{_HAN}]", text)) / max(letters(text), 1)


def fingerprint(text: str) -> bytes:
    """Equal for texts that differ in nothing but case, space and punctuation."""
    return hashlib.sha256("".join(c for c in text.casefold() if c.isalnum()).encode()).digest()[:16]


def draw(*parts: str | int) -> float:
    """A number in [0, 1) fixed by its arguments: choices that neither order nor platform changes."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def choice(options: Iterable[str], key: str) -> str:
    """One of the options, fixed by `key`."""
    listed = list(options)
    return listed[int(draw("choice", key) * len(listed))]


def exchange(question: str, answer: str) -> Turns:
    """A conversation of one question and one answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
