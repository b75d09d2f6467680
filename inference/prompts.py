"""Prompts: which template suits a message, and the template filled with what is known.

    engineer = SmartPromptEngineer()                                     # or SmartPromptEngineer.from_file("my_templates.yaml")
    engineer.choose("把“早上好”翻译成法语").template                       # "translation"
    engineer.build(text, template="chat", context=[memory.context(...)]).user

All of a prompt goes into the user's turn, so that the cached beginning of the conversation stays valid. The template `chat` adds nothing
to the message: a small model that never saw instructions is only confused by them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from inference.intents import INTENTS, Intent, detect
from inference.lexical import Language, language

TEMPLATES_FILE = Path(__file__).with_name("templates.yaml")
_FIELD = re.compile(r"\{\{|\}\}|\{(\w+)\}|[{}]")
_FILLED_HERE = ("question", "context", "language")
_TAKEN = (*_FILLED_HERE, "self", "text", "template", "budget", "count")  # arguments of `build`
_LANGUAGE_NAMES = {"zh": "中文", "en": "English"}
_REASONS = {
    "chosen": ("由你选定", "chosen by you"),
    "plain": ("没有更合适的模板，原样发送", "nothing speaks for another template: sent as it is"),
    "intent": ("像是{label}：{cues}", "looks like {label}: {cues}"),
    "words": ("出现了模板“{name}”的词：{cues}", "has words of the template {name!r}: {cues}"),
}


@dataclass(frozen=True)
class PromptTemplate:
    """A way to ask. In its texts `{question}` is the message, `{context}` what is known (with a line end behind it, or empty),
    `{language}` the name of the message's language, and others are its own fields; `{{` and `}}` are braces."""

    name: str
    description: Mapping[str, str]
    """For people to read, by language: zh, en."""
    text: Mapping[str, str]
    """By language: zh, en; taken by the language of the message."""
    fields: Mapping[str, str | None] = field(default_factory=dict)
    """Its own fields and what they are when not given; None: must be given."""
    words: tuple[str, ...] = ()
    """Words in a message for which it is chosen."""
    system: Mapping[str, str] | None = None
    """System text by language. A change of it between turns makes the model read the whole conversation again."""

    @property
    def required(self) -> tuple[str, ...]:
        """The fields that must be given."""
        return ("question", *(name for name, value in self.fields.items() if value is None))

    def fill(self, lang: Language, values: Mapping[str, str]) -> str:
        """The text with its fields replaced, each once: braces inside a value are left alone. ValueError for a missing field."""
        return _fill(self.text[lang], self._given(values))

    def fill_system(self, lang: Language, values: Mapping[str, str]) -> str | None:
        """The system text, filled likewise."""
        return None if self.system is None else _fill(self.system[lang], self._given(values))

    def _given(self, values: Mapping[str, str]) -> dict[str, str]:
        given = {**{name: value for name, value in self.fields.items() if value is not None}, **values}
        missing = [name for name in self.required if name not in given]
        if missing:
            raise ValueError(f"the template {self.name!r} needs a value for {', '.join(missing)}")
        unknown = sorted(set(values) - set(self.fields) - set(_FILLED_HERE))
        if unknown:
            known = ", ".join(self.fields) or "none of its own"
            raise ValueError(f"the template {self.name!r} has no field {', '.join(unknown)}; it has {known}")
        return given


@dataclass(frozen=True)
class Choice:
    """The template that suits a message, and why, in words for people."""

    template: str
    reason: str


@dataclass(frozen=True)
class Prompt:
    """What goes to the model: the user's turn, and the system text where the template has one."""

    user: str
    system: str | None
    template: str
    reason: str
    left_out: int = 0
    """Pieces of context for which there was no room."""


class SmartPromptEngineer:
    """Chooses and fills templates: eight of its own, and those of the user's YAML files. `lang`: language of the reasons it gives."""

    def __init__(self, templates: Iterable[PromptTemplate] = (), lang: Language = "en") -> None:
        self.lang: Language = lang
        self.templates: dict[str, PromptTemplate] = {template.name: template for template in load_templates(TEMPLATES_FILE)}
        for template in templates:
            if template.name in self.templates:
                raise ValueError(f"there is a template {template.name!r} already: give yours another name")
            self.templates[template.name] = template

    @classmethod
    def from_file(cls, path: str | Path, lang: Language = "en") -> SmartPromptEngineer:
        """With the templates of a YAML file beside the eight."""
        return cls(load_templates(path), lang)

    def detect(self, text: str) -> Intent:
        """What a message asks for, by the rules of `inference.intents`."""
        return detect(text)

    def choose(self, text: str, given: Collection[str] | None = None) -> Choice:
        """The template that suits a message: one of the user's with a word of it, else that of its intent; `chat` when unsure. given: names
        of the fields that will be given; templates that need others are passed over."""
        lowered = text.lower()
        for template in self.templates.values():
            cues = [word for word in template.words if _occurs(word.lower(), lowered)]
            if cues and (given is None or set(template.required) <= {"question", *given}):
                return Choice(template.name, self._say("words", name=template.name, cues=self._quoted(cues)))
        intent = detect(text)
        if intent.name == "chat":
            return Choice("chat", self._say("plain"))
        label = INTENTS[intent.name][self.lang == "en"]
        return Choice(intent.name, self._say("intent", label=label, cues=self._quoted(intent.cues)))

    def build(
        self,
        text: str,
        template: str | None = None,
        context: Sequence[str | tuple[float, str]] = (),
        budget: int | None = None,
        count: Callable[[str], int] = len,
        **fields: str,
    ) -> Prompt:
        """A message in a template (None: the one that suits it), with pieces of context before it.

        context: texts, each with its importance in front if it has one ((0.8, text); 1 without). budget: the most that the user's turn may
        be by `count` (text to tokens): the least important pieces are left out, of equal ones the later. The message is never cut: where
        the template makes it too long it goes alone, as with `chat`, and whether it fits then is for the caller to see. fields: the
        template's own.
        """
        if template is not None and template not in self.templates:
            raise ValueError(f"there is no template {template!r}; there are {', '.join(self.templates)}")
        choice = self.choose(text, fields) if template is None else Choice(template, self._say("chosen"))
        chosen = self.templates[choice.template]
        lang = language(text)
        values = {**fields, "question": text, "language": _LANGUAGE_NAMES[lang]}

        def filled(pieces: Sequence[str]) -> str:
            known = "".join(f"{piece}\n" for piece in pieces)
            return chosen.fill(lang, {**values, "context": f"{known}\n" if known else ""})

        pieces = [(1.0, piece) if isinstance(piece, str) else piece for piece in context]
        pieces = [(importance, piece.strip()) for importance, piece in pieces if piece.strip()]
        kept = sorted(range(len(pieces)), key=lambda place: (-pieces[place][0], place))
        user = filled([pieces[place][1] for place in sorted(kept)])
        while budget is not None and kept and count(user) > budget:
            kept.pop()
            user = filled([pieces[place][1] for place in sorted(kept)])
        if budget is not None and count(user) > budget:
            chosen, user = self.templates["chat"], text
        return Prompt(user, chosen.fill_system(lang, {**values, "context": ""}), chosen.name, choice.reason, len(pieces) - len(kept))

    def _say(self, key: str, **values: str) -> str:
        return _REASONS[key][self.lang == "en"].format(**values)

    def _quoted(self, cues: Sequence[str]) -> str:
        return "、".join(f"“{cue}”" for cue in cues) if self.lang == "zh" else ", ".join(f'"{cue}"' for cue in cues)


def load_templates(path: str | Path) -> list[PromptTemplate]:
    """The templates of a YAML file, a list of entries with

    name (letters, digits, - and _), description, template, and if wanted fields (its own fields: what they are when not given, nothing:
    must be given), words (a message with one of them gets this template), system. description, template and system are a text or one for
    each of zh and en. FileNotFoundError, or ValueError naming file, entry and key.
    """
    path = Path(path)
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not readable YAML: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} must hold a list of templates, each with name, description and template")
    templates: dict[str, PromptTemplate] = {}
    for number, entry in enumerate(entries, start=1):
        template = _read_template(entry, f"{path}, template {number}")
        if template.name in templates:
            raise ValueError(f"{path}, template {number}: the name {template.name!r} occurs twice")
        templates[template.name] = template
    return list(templates.values())


def _read_template(entry: Any, place: str) -> PromptTemplate:
    if not isinstance(entry, dict):
        raise ValueError(f"{place}: must be a mapping with name, description and template, not {type(entry).__name__}")
    known = ("name", "description", "template", "fields", "words", "system")
    unknown = sorted(str(key) for key in entry if key not in known)
    if unknown:
        raise ValueError(f"{place}: unknown key {', '.join(unknown)}; there are {', '.join(known)}")
    name = entry.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]{1,40}", name):
        raise ValueError(f"{place}: name is {name!r}; it needs 1 to 40 letters, digits, - or _")
    place = f"{place} ({name})"
    fields = entry.get("fields") or {}
    if not isinstance(fields, dict) or not all(
        _is_field(key) and (value is None or isinstance(value, str)) for key, value in fields.items()
    ):
        raise ValueError(f"{place}: fields must map names (letters, digits, _; not {', '.join(_TAKEN)}) to a text or to nothing")
    words = entry.get("words") or []
    if not isinstance(words, list) or not all(isinstance(word, str) and word.strip() for word in words):
        raise ValueError(f"{place}: words must be a list of texts")
    texts = _by_language(entry, "template", place)
    system = _by_language(entry, "system", place) if "system" in entry else None
    for key, by_language in (("template", texts), ("system", system or {})):
        for text in by_language.values():
            _check_fields(text, {*fields, *_FILLED_HERE}, f"{place}: {key}")
    for text in texts.values():
        if "question" not in _fields_in(text):
            raise ValueError(f"{place}: template must have {{question}}, where the message goes")
    return PromptTemplate(name, _by_language(entry, "description", place), texts, fields, tuple(words), system)


def _by_language(entry: dict[str, Any], key: str, place: str) -> dict[str, str]:
    value = entry.get(key)
    by_language = value if isinstance(value, dict) else {"zh": value, "en": value}
    if set(by_language) == {"zh", "en"} and all(isinstance(text, str) and text.strip() for text in by_language.values()):
        return {lang: str(text).strip("\n") for lang, text in by_language.items()}
    raise ValueError(f"{place}: {key} must be a text, or a mapping of zh and en to texts")


def _is_field(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z_]\w*", name) is not None and name not in _TAKEN


def _fields_in(text: str) -> list[str]:
    return [match.group(1) for match in _FIELD.finditer(text) if match.group(1)]


def _check_fields(text: str, known: set[str], place: str) -> None:
    for match in _FIELD.finditer(text):
        if match.group() in "{}":
            raise ValueError(f"{place} has a single {match.group()}; write {match.group() * 2} for a brace")
        if match.group(1) and match.group(1) not in known:
            raise ValueError(f"{place} has the field {match.group()}, which is not declared; there are {', '.join(sorted(known))}")


def _fill(text: str, values: Mapping[str, str]) -> str:
    """One pass, so that what stands in a value is never taken for a field."""
    return _FIELD.sub(lambda match: values[match.group(1)] if match.group(1) else match.group()[0], text)


def _occurs(word: str, text: str) -> bool:
    """Whether a word stands in a text; a word of Latin letters as a whole word."""
    return re.search(rf"\b{re.escape(word)}\b" if word.isascii() else re.escape(word), text) is not None
