"""Strict checks of answers: greeting, identity, fact, sum, story. Pure functions of the answer text."""

from __future__ import annotations

import re

from tools.curriculum import stories, stories_en, stories_zh

# Eight words of English; twelve characters of Chinese are about as much, and two names with "and" (five characters)
# plus a common phrase would trip a window of eight in a perfectly good story.
REPEAT_WINDOW = {"en": 8, "zh": 12}
STORY_ENDINGS = {
    "en": ("From that day on", "After that day", "From then on", "Since then", "Ever since", "And so", "The end"),
    "zh": ("从那以后", "从那天起", "从此", "后来", "就这样"),
}
_CJK = re.compile(r"[\u4e00-\u9fff]")
_LETTER = re.compile(r"[A-Za-z]")
_GREETING_WORDS = {
    "en": {
        "hello": r"\b(hello|hi|hey|nice to meet|good (morning|afternoon|evening))\b",
        "how": r"\bI('m| am)\b.*\b(fine|well|good|great)\b",
        "thanks": r"\b(welcome|happy to help|no problem)\b",
        "bye": r"\b(bye|goodbye|see you|good night|nice day)\b",
    },
    "zh": {
        "hello": r"你好|您好|高兴(见到|认识)|早上好|下午好|晚上好",
        "how": r"很好|不错|挺好",
        "thanks": r"不客气|不用谢|能帮到你",
        "bye": r"再见|下次见|明天见|拜拜|晚安",
    },
}
_SELF = r"SmartHaoAI|小好|language model|语言模型"
_IDENTITY_WORDS = {
    "en": {
        "who": _SELF,
        "what": r"model|program",
        "maker": r"SmartHaoAI",
        "can": r"answer|sums|stor(y|ies)|talk|help",
        "limits": r"wrong|mistake|do not know",
        "language": r"Chinese and English|English and Chinese",
    },
    "zh": {
        "who": _SELF,
        "what": r"模型|程序",
        "maker": r"SmartHaoAI",
        "can": r"回答|算|故事|说中文",
        "limits": r"错|不多|不知道",
        "language": r"中文和英文|英文和中文|中文和英语",
    },
}
_OTHER_MODELS = re.compile(r"GPT|OpenAI|Qwen|Claude|Gemini|DeepSeek|Llama|通义|千问|文心|豆包", re.IGNORECASE)


def in_language(text: str, lang: str) -> bool:
    """True if the text is written in `lang`; the assistant's own names count for neither language."""
    text = text.replace("SmartHaoAI", "").replace("小好", "")
    if lang == "en":
        return bool(_LETTER.search(text)) and not _CJK.search(text)
    return bool(_CJK.search(text)) and not _LETTER.search(text)


def sentences(text: str) -> list[str]:
    """The sentences of an English or Chinese text, without their end marks."""
    return [part.strip(' \n"“”') for part in re.split(r"[.!?。！？]+[\"”]?", text) if part.strip(' \n"“”')]


def has_repeat(text: str, lang: str) -> bool:
    """True if a run of REPEAT_WINDOW[lang] words (English) or characters (Chinese) occurs twice."""
    units = re.findall(r"[a-z']+", text.lower()) if lang == "en" else _CJK.findall(text)
    size = REPEAT_WINDOW[lang]
    runs = [tuple(units[i : i + size]) for i in range(len(units) - size + 1)]
    return len(set(runs)) < len(runs)


def is_short(text: str, lang: str) -> bool:
    """True for an answer of a sentence or three, not a story that holds the right word by chance."""
    return len(text) <= (120 if lang == "en" else 50) and len(sentences(text)) <= 3


def check_greeting(text: str, lang: str, kind: str) -> bool:
    """A short reply of the right sort in the right language, not a story."""
    wanted = re.search(_GREETING_WORDS[lang][kind], text, re.IGNORECASE)
    return is_short(text, lang) and in_language(text, lang) and bool(wanted)


def check_identity(text: str, lang: str, kind: str) -> bool:
    """Names itself or says that it is a language model, answers what was asked, claims to be no other model."""
    return (
        in_language(text, lang)
        and not _OTHER_MODELS.search(text)
        and bool(re.search(_SELF, text))
        and bool(re.search(_IDENTITY_WORDS[lang][kind], text))
    )


def check_sum(text: str, result: int) -> bool:
    """The last integer of the answer is the result."""
    numbers = re.findall(r"\d+", text)
    return bool(numbers) and int(numbers[-1]) == result


def _place_word(lang: str, place: str) -> str:
    return place if lang == "en" else re.sub(r"(边|里|上)$", "", stories_zh.PLACES[place][1])


def _contains(text: str, word: str, lang: str) -> bool:
    return bool(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE)) if lang == "en" else word in text


def check_story(text: str, cast: stories.Cast) -> bool:
    """A whole story about the cast that was asked for.

    Four or more sentences in the language; hero, kind and place named; the hero in at least two sentences and still
    there in the second half; at most one other name of the story world; an ending line last; no repeated run.
    """
    lang = cast.lang
    parts = sentences(text)
    kinds = stories_en.KINDS if lang == "en" else stories_zh.KINDS
    if len(parts) < 4 or not in_language(text, lang) or has_repeat(text, lang):
        return False
    if not _contains(text, kinds[cast.kind], lang) or not _contains(text, _place_word(lang, cast.place), lang):
        return False
    told = {name for name in stories.names(lang) if _contains(text, name, lang)}
    with_hero = [i for i, part in enumerate(parts) if _contains(part, cast.hero, lang)]
    if len(told - {cast.hero}) > 1 or len(with_hero) < 2 or with_hero[-1] < len(parts) // 2:
        return False
    return parts[-1].startswith(STORY_ENDINGS[lang])
