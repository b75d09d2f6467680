"""Repairing text and judging documents: what `tools.clean_data` and the corpus recipes do to a row, as pure functions.

Repairs keep what was said: Chinese punctuation, indentation of code and emoji stay. Judgements return the reason for leaving a
document out, with the figure that decided, or None.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from train.raw_rows import optional_package

# Full-width letters and digits become ASCII; Chinese punctuation (also in that block) stays what it is.
_WIDTH = {code: chr(code - 0xFEE0) for code in (*range(0xFF10, 0xFF1A), *range(0xFF21, 0xFF3B), *range(0xFF41, 0xFF5B))}
_ODD = {
    0x3000: " ",
    0xA0: " ",
    0xFF0E: ".",
    0xFF05: "%",
    0xFF0F: "/",
    0xFF0D: "-",
    0xFE50: "，",
    0xFE51: "、",
    0xFE52: "。",
    0xFE54: "；",
    0xFE55: "：",
    0xFF61: "。",
    0xFF64: "、",
    0x2022: "·",
    0x30FB: "·",
    0xFF65: "·",
    0x2028: "\n",
    0x2029: "\n",
    0x85: "\n",
}
_TABLE = {**_WIDTH, **_ODD}
_REPLACED = re.compile("[" + "".join(map(chr, _TABLE)) + "]")
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b\u200c\u200e\u200f\u202a-\u202e\u2060-\u2064\ufeff\ufffc\ufffd]")
_LOOSE_JOINER = re.compile("(?<![\ufe0f\u2600-\u27bf\U0001f000-\U0001faff])\u200d|\u200d(?![\u2600-\u27bf\U0001f000-\U0001faff])")


def _byte_of() -> dict[str, int]:
    """Windows-1252 backwards; the five bytes that it leaves open stand for themselves, as in browsers."""
    return {
        bytes([byte]).decode("cp1252") if byte not in (0x81, 0x8D, 0x8F, 0x90, 0x9D) else chr(byte): byte for byte in range(0x80, 0x100)
    }


_BYTE_OF = _byte_of()
_MISREAD = re.compile("[" + "".join(map(re.escape, {*_BYTE_OF, *map(chr, range(0x80, 0xA0))})) + "]{2,}")
_LOST = re.compile("锟斤拷|\ufffd|烫烫烫|屯屯屯")  # what decoding with the wrong table leaves of characters; cannot be brought back


def repair(text: str) -> str:
    """Composed Unicode, line ends as \\n, ASCII letters and digits, no control, invisible or replacement characters, and UTF-8 that was
    once read as Windows-1252 read rightly. Chinese punctuation, spaces and tabs stay."""
    if text.isascii() and not _HIDDEN.search(text):
        return text
    text = unicodedata.normalize("NFC", _MISREAD.sub(_reread, text)).replace("\r\n", "\n").replace("\r", "\n")
    text = _REPLACED.sub(lambda found: _TABLE[ord(found[0])], text)  # ten times as fast as str.translate where few are found
    return _LOOSE_JOINER.sub("", _HIDDEN.sub("", text))


def _reread(found: re.Match[str]) -> str:
    """`Ã©` -> `é`; what is no UTF-8 stays."""
    try:
        return bytes(_BYTE_OF.get(character, ord(character)) for character in found[0]).decode("utf-8")
    except UnicodeDecodeError:
        return found[0]


def in_every_text(value: Any, change: Callable[[str], str]) -> Any:
    """A row with `change` made to every text in it, however deep; names of fields stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [in_every_text(item, change) for item in value]
    if isinstance(value, dict):
        return {key: in_every_text(item, change) for key, item in value.items()}
    return value


def simplifier() -> Callable[[str], str]:
    """Traditional to simplified Chinese. ValueError when the package is missing."""
    convert: Callable[[str], str] = optional_package("opencc", "converting traditional Chinese").OpenCC("t2s").convert
    return convert


# ---------------------------------------------------------------- lines

_BOILERPLATE = re.compile(
    r"(all rights reserved|copyright (©|\(c\))|©\s?(19|20)\d\d|(accept|we use|use of) cookies|cookie (policy|settings)|privacy policy"
    r"|terms of (use|service)|(click|tap) here|read more|sign (up|in)( now)?|log ?in|subscribe( now| to )|back to top"
    r"|share (on|this) (page|post|article|story|facebook|twitter|x|linkedin|wechat|weibo)"
    r"|skip to (main )?content|follow us|page \d+ of \d+"
    r"|版权所有|未经(授权|许可)|转载请注明|责任编辑|本文来源|点击(这里|此处|查看|进入|阅读)|阅读全文|查看更多|返回(顶部|首页)"
    r"|上一[页篇章]|下一[页篇章]|分享到|扫码|扫一扫|关注我们|微信公众号|登录\s*[/|｜·]?\s*注册|免责声明|ICP备|网站地图|联系我们|友情链接)",
    re.IGNORECASE,
)
BOILERPLATE_CHARACTERS = 60  # a longer line says more than the phrase in it
BOILERPLATE_SHARE = 0.5  # ... and so does one of which the phrases are a small part


def is_boilerplate(line: str) -> bool:
    """Whether a line is of a page's frame (menus, notices of rights and cookies, "read more"), not of its text: short, not ended like a
    sentence, and made of the known phrases to a good part."""
    line = line.strip()
    if not line or len(line) > BOILERPLATE_CHARACTERS or line[-1] in "。！？!?…”":
        return False
    known = sum(len(found[0]) for found in _BOILERPLATE.finditer(line))
    return known >= BOILERPLATE_SHARE * len(line)


def without_lines(text: str, unwanted: Callable[[str], bool]) -> tuple[str, list[str]]:
    """The text without the unwanted lines, and those. Gaps they leave close to one empty line."""
    lines = text.split("\n")
    removed = [line for line in lines if unwanted(line)]
    if not removed:
        return text, []
    left = "\n".join(line for line in lines if not unwanted(line))
    return re.sub(r"\n{3,}", "\n\n", left).strip("\n"), removed


# ---------------------------------------------------------------- documents


@dataclass(frozen=True)
class Limits:
    """What a document has to be; 0 switches a rule off."""

    min_letters: int = 10
    """Letters, digits and Chinese characters of a text."""
    max_characters: int = 0
    """Of any row."""
    min_letter_share: float = 0.3
    """Letters and digits among all that is not space."""
    min_compressed: float = 0.15
    """Size after compression (zlib) against before: text that says the same again and again shrinks to less. The measure is that by which
    Whisper recognises loops (Radford et al., 2022)."""
    max_lost_share: float = 0.001
    """Characters that a wrong decoding has destroyed."""


_SIGNS = re.compile(r"[\W_]+")
COMPRESSED_FROM = 400  # bytes; shorter ones are not judged by compression


def lost_characters(text: str) -> int:
    """How many characters were destroyed by a wrong decoding before this text was made: counted before `repair`."""
    return len(_LOST.findall(text))


def why_unsuitable(text: str, limits: Limits, lost: int = 0, is_text: bool = True) -> tuple[str, str] | None:
    """(rule, reason) when a document is not worth learning from. `is_text`: a running text and no conversation, in which a short
    answer or one of signs only is fine."""
    if limits.max_lost_share and lost > limits.max_lost_share * len(text):
        return "damaged", f"{lost:,} characters were destroyed by a wrong decoding"
    if limits.max_characters and len(text) > limits.max_characters:
        return "long", f"{len(text):,} characters, more than {limits.max_characters:,}"
    if is_text:
        letters = len(_SIGNS.sub("", text))
        if letters < limits.min_letters:
            return "short", f"{letters} letters, fewer than {limits.min_letters}"
        solid = len("".join(text.split()))
        if letters < limits.min_letter_share * solid:
            return "symbols", f"{letters / max(solid, 1):.0%} letters and digits, less than {limits.min_letter_share:.0%}"
    if limits.min_compressed:
        data = text.encode("utf-8")
        if len(data) >= COMPRESSED_FROM:
            share = len(zlib.compress(data, 6)) / len(data)
            if share < limits.min_compressed:
                return "repetitive", f"compresses to {share:.1%}, less than {limits.min_compressed:.0%}"
    return None
