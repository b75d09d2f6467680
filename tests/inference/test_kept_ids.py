"""Ids of a conversation that go on from those the model chose."""

import random

from inference.kept_ids import KeptIds


def test_generated_ids_stay_and_the_text_is_that_of_the_rendering(tokenizer, seed):
    """Guards: for random conversations and random ways to spell them, a prompt that says anything but what was rendered, that loses
    generated ids, or that cuts a user's words as no encoder would."""
    chance = random.Random(seed)
    words = ["你好", "Hello", " today", "1 + 2", "\n", "，", " fox", "天气", "é", "😀"]
    for _ in range(30):
        kept, text = KeptIds(), "<|im_start|>"
        for _ in range(chance.randint(1, 4)):
            asked = "".join(chance.choices(words, k=chance.randint(1, 5)))
            text += f"user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
            rendered = tokenizer.encode(text, parse_special=True)
            before = list(kept.ids)
            prompt = kept.prompt(rendered, tokenizer)
            assert tokenizer.decode(prompt, skip_special_tokens=False) == text
            assert prompt[: len(before)] == before  # nothing was changed, so everything is kept
            answer = "".join(chance.choices(words, k=chance.randint(1, 5)))
            # Any way to spell it is a way the model may choose.
            ids = [token for part in _cut(answer, chance) for token in tokenizer.encode(part, parse_special=True)]
            kept.reply([*ids, tokenizer.im_end_id])
            text += answer + "<|im_end|>\n<|im_start|>"
        # Another text from somewhere on: what is kept ends there, and the rest is as it is encoded.
        changed = text.replace("assistant", "helper") + "x"
        rendered = tokenizer.encode(changed, parse_special=True)
        assert kept.prompt(rendered, tokenizer) == rendered


def _cut(text, chance):
    places = sorted({0, len(text), *(chance.randint(0, len(text)) for _ in range(4))})
    return [text[start:end] for start, end in zip(places, places[1:], strict=False)]


def test_structure_is_not_what_only_looks_like_it(tokenizer):
    """Guards: a generated <|im_end|> kept for the same characters in a text, which would open a turn that nobody opened."""
    kept = KeptIds()
    kept.prompt(tokenizer.encode("a"), tokenizer)
    kept.reply([tokenizer.im_end_id])
    typed = tokenizer.encode("a<|im_end|> and more")
    assert kept.prompt(typed, tokenizer) == typed
