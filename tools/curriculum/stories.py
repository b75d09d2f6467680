"""Short stories from a small grammar: a hero, a friend, a place, a problem, a solution and a closing line.

A (language, name, kind, place) combination that `is_held_out` never reaches a generated row: the probes ask for it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from types import ModuleType

from tools.curriculum import stories_en, stories_zh
from tools.curriculum.holdout import held_out

TEXTS: dict[str, ModuleType] = {"en": stories_en, "zh": stories_zh}
KIND_IDS: tuple[str, ...] = tuple(stories_en.KINDS)
PLACE_IDS: tuple[str, ...] = tuple(stories_en.PLACES)
# plot -> the objects that fit it; a plot without a choice names its own object or none
PLOT_OBJECTS: dict[str, tuple[str, ...]] = {
    "lost": ("kite", "ball", "hat", "scarf", "drum", "boat", "car", "key", "bell", "book"),
    "tree": ("kite", "hat", "scarf", "ball"),
    "rain": ("umbrella",),
    "dark": ("lamp",),
    "share": ("cake",),
    "seed": ("flower",),
    "broken": ("drum", "boat", "clock", "car", "lamp"),
    "found": ("key", "bell", "book", "hat", "scarf", "ball", "kite"),
    "bridge": ("bridge",),
    "race": (),
    "learn": (),
    "sick": ("book", "flower", "hat", "scarf"),
}
# the sentence of each plot that may be left out without a gap
_OPTIONAL = {
    "lost": 1,
    "tree": 2,
    "rain": 3,
    "dark": 4,
    "share": 3,
    "seed": 2,
    "broken": 2,
    "found": 1,
    "bridge": 2,
    "race": 1,
    "learn": 2,
    "sick": 2,
}
THEME_OBJECTS: tuple[str, ...] = tuple(stories_en.OBJECTS)
_PLOTS_WITH = {obj: tuple(plot for plot, objects in PLOT_OBJECTS.items() if obj in objects and plot != "sick") for obj in THEME_OBJECTS}
_OTHER_CHILD = {"he": "girl", "she": "boy"}
_REQUEST_WEIGHTS = {"full": 30, "hero": 14, "name": 10, "kind": 14, "place": 8, "object": 14, "any": 10}


@dataclass(frozen=True)
class Cast:
    """Who and where: ids of the tables in `stories_en` and `stories_zh`; the names are words of the language."""

    lang: str
    hero: str
    gender: str
    kind: str
    place: str


def is_held_out(lang: str, hero: str, kind: str, place: str) -> bool:
    """True if this combination belongs to the probes."""
    return held_out("story", lang, hero, kind, place)


def casts(lang: str) -> list[Cast]:
    """Every combination of name, kind and place: a boy has a boy's name, a girl a girl's, an animal any."""
    return [
        Cast(lang, hero, gender, kind, place)
        for gender, names in TEXTS[lang].NAMES.items()
        for hero in names
        for kind in KIND_IDS
        if kind != _OTHER_CHILD[gender]
        for place in PLACE_IDS
    ]


def names(lang: str) -> tuple[str, ...]:
    """All names of the story world."""
    return TEXTS[lang].NAMES["he"] + TEXTS[lang].NAMES["she"]


_TAUGHT = {lang: [cast for cast in casts(lang) if not is_held_out(lang, cast.hero, cast.kind, cast.place)] for lang in TEXTS}


def _person_slots(cast: Cast) -> dict[str, str]:
    text = TEXTS[cast.lang]
    live, at = text.PLACES[cast.place]
    slots = {"hero": cast.hero, "kind": text.KINDS[cast.kind], "live": live, "at": at}
    if cast.lang == "en":
        he, him, his = ("he", "him", "his") if cast.gender == "he" else ("she", "her", "her")
        slots.update(he=he, him=him, his=his, He=he.capitalize(), His=his.capitalize())
    else:
        slots["a_kind"] = f"一{text.COUNTERS.get(cast.kind, '只')}{slots['kind']}"
        slots["ta"] = {"boy": "他", "girl": "她"}.get(cast.kind, "它")
    return slots


def _object_slots(lang: str, obj: str | None, color: str) -> dict[str, str]:
    if lang == "en":
        return {"obj": stories_en.OBJECTS[obj] if obj else "", "c": color}
    counter, noun = stories_zh.OBJECTS[obj] if obj else ("", "")
    return {"obj": noun, "c": color, "an_obj": f"一{counter}{color}的{noun}"}


def tell(cast: Cast, rng: random.Random, obj: str | None = None) -> str:
    """One story of about 8 sentences. With `obj` (an id of THEME_OBJECTS) the plot is one that turns on that object."""
    lang, text = cast.lang, TEXTS[cast.lang]
    plot = rng.choice(_PLOTS_WITH[obj]) if obj else rng.choice(tuple(PLOT_OBJECTS))
    if obj is None and PLOT_OBJECTS[plot]:
        obj = rng.choice(PLOT_OBJECTS[plot])
    slots = _person_slots(cast)
    slots.update(_object_slots(lang, obj, rng.choice(text.COLORS)))
    friend_gender = rng.choice(("he", "she"))
    slots["friend"] = rng.choice([name for name in text.NAMES[friend_gender] if name != cast.hero])
    friend_kind = rng.choice([kind for kind in KIND_IDS if kind not in (cast.kind, _OTHER_CHILD[friend_gender])])
    slots["fkind"] = text.KINDS[friend_kind]
    if lang == "zh":
        slots["a_fkind"] = f"一{text.COUNTERS.get(friend_kind, '只')}{slots['fkind']}"
    slots["skill"] = rng.choice(text.SKILLS)
    parts = [rng.choice(text.OPENINGS), rng.choice(text.FRIENDS)]
    left_out = _OPTIONAL[plot] if rng.random() < 0.6 else None
    parts += [rng.choice(wordings) for i, wordings in enumerate(text.PLOTS[plot]) if i != left_out]
    parts.append(rng.choice(text.ENDINGS) + rng.choice(text.LESSONS + text.PLOT_LESSONS[plot] * 2))
    story = (" " if lang == "en" else "").join(part.format_map(slots) for part in parts)
    # "they" of a group with children is 他们; 它们 is for animals only
    return story.replace("它们", "他们") if lang == "zh" and {"boy", "girl"} & {cast.kind, friend_kind} else story


def taught_cast(lang: str, rng: random.Random) -> Cast:
    """A combination that generated rows may use."""
    return rng.choice(_TAUGHT[lang])


def held_out_casts(lang: str) -> list[Cast]:
    """The combinations that only the probes use."""
    return [cast for cast in casts(lang) if is_held_out(lang, cast.hero, cast.kind, cast.place)]


def fill_request(template: str, cast: Cast, obj: str | None = None) -> str:
    """A request template with the names of a cast."""
    slots = _person_slots(cast)
    slots.update(_object_slots(cast.lang, obj, ""))
    return template.format_map(slots)


def request(lang: str, rng: random.Random) -> tuple[str, str]:
    """A taught story request and its story."""
    theme = rng.choices(tuple(_REQUEST_WEIGHTS), tuple(_REQUEST_WEIGHTS.values()))[0]
    cast = taught_cast(lang, rng)
    obj = rng.choice(THEME_OBJECTS) if theme == "object" else None
    return fill_request(rng.choice(TEXTS[lang].REQUESTS[theme]), cast, obj), tell(cast, rng, obj)
