"""The files of a data set: train.jsonl, and what is held out of it (valid, held_templates, longer)."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from model.files import atomic_write_text
from tools.curriculum.holdout import held_out
from tools.reasoning_tasks.problems import KINDS
from tools.reasoning_tasks.verify import check_row
from tools.reasoning_tasks.wordings import LANGUAGES, WORDINGS, answer, question, template_name, working

TRAINED_STEPS = (1, 2, 3, 4)
LONGER_STEPS = (5, 6, 7)
# The steps of a split, and whether it asks in the wordings that are held out.
SPLITS = {
    "train": (TRAINED_STEPS, False),
    "valid": (TRAINED_STEPS, False),
    "held_templates": (TRAINED_STEPS, True),
    "longer": (LONGER_STEPS, False),
}
STYLES = ("latent", "think", "both")
MOST_TRIES = 500  # draws for one row, before its kind counts as used up

Row = dict[str, Any]


def make_dataset(
    folder: Path,
    rows: int,
    test_rows: int,
    seed: int = 0,
    kinds: Sequence[str] = tuple(KINDS),
    languages: Sequence[str] = LANGUAGES,
    style: str = "latent",
) -> dict[str, list[Row]]:
    """Write the files of all SPLITS into `folder`: `rows` to train on, `test_rows` in each of the others. Returns the rows.

    The same arguments give the same files. Raises ValueError for unknown names, numbers below 1, and more rows than there are.
    """
    _check_names("kind", kinds, KINDS)
    _check_names("language", languages, LANGUAGES)
    _check_names("style", [style], STYLES)
    for name, count in (("rows", rows), ("test rows", test_rows)):
        if count < 1:
            raise ValueError(f"{count} {name} are asked for; ask for 1 or more")
    made = {}
    for split in SPLITS:
        made[split] = list(split_rows(split, rows if split == "train" else test_rows, seed, kinds, languages, style))
    for split, found in made.items():
        atomic_write_text(folder / f"{split}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found))
    return made


def split_rows(split: str, count: int, seed: int, kinds: Sequence[str], languages: Sequence[str], style: str) -> Iterator[Row]:
    """`count` checked rows of one split: languages and kinds in turn, the number of steps drawn.

    All questions of the training rows are different; in what is held out, all problems of a kind and language are.
    """
    rng = random.Random(f"reasoning/{seed}/{split}")
    seen: set[object] = set()
    for index in range(count):
        lang = languages[index % len(languages)]
        kind = kinds[index // len(languages) % len(kinds)]
        yield _row(split, kind, lang, rng, seen, style)


def _row(split: str, kind: str, lang: str, rng: random.Random, seen: set[object], style: str) -> Row:
    steps, reserved = SPLITS[split]
    wordings = [index for index, wording in enumerate(WORDINGS[kind, lang]) if wording.held_out == reserved]
    for _ in range(MOST_TRIES):
        length = rng.choice(steps)
        problem = KINDS[kind](length, rng)
        if length in TRAINED_STEPS and held_out("reasoning", *problem.key) == (split == "train"):
            continue
        index = rng.choice(wordings)
        asked = question(problem, WORDINGS[kind, lang][index], lang, rng)
        mark = asked if split == "train" else (kind, lang, problem.key)
        if mark not in seen:
            seen.add(mark)
            break
    else:
        raise ValueError(f"{split}: there are hardly more different problems of the kind {kind} in {lang}; ask for fewer rows")
    said, steps_text = answer(problem, lang), working(problem, lang)
    check_row(kind, asked, said, steps_text)
    reply = {"role": "assistant", "content": said}
    thinks = style == "think" or style == "both" and rng.random() < 0.5
    if thinks:
        reply["reasoning_content"] = steps_text
    # Of two ways to answer the same kind of question, the switch decides: the model shall not learn to toss a coin.
    switch = {"chat_template_kwargs": {"enable_thinking": False}} if style == "both" and not thinks else {}
    return {
        **switch,
        "messages": [{"role": "user", "content": asked}, reply],
        "kind": kind,
        "steps": length,
        "lang": lang,
        "answer": said,
        "template": template_name(kind, lang, index),
    }


def _check_names(what: str, names: Sequence[str], known: Any) -> None:
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        shown = f"unknown {what} {unknown[0]!r}" if unknown else f"no {what} is given"
        raise ValueError(f"{shown}; known: {', '.join(known)}")
