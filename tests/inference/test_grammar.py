"""Answers of a given form: whatever a model prefers, what it says parses and validates."""

from __future__ import annotations

import dataclasses
import json
import re
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inference.engine import Engine
from inference.grammar import Grammar, allowed_tokens
from inference.sampling import SamplingSettings, TokenHistory, process_logits
from inference.text import ReplyText
from model import BPETokenizer

pytest.importorskip("llguidance", reason="needs: pip install -e .[constrained]")

CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "size": {"enum": ["small", "大"]},
        "age": {"type": "integer", "maximum": 99},
    },
    "required": ["city", "size"],
    "additionalProperties": False,
}
SAMPLED = SamplingSettings(temperature=1.5, top_k=0, top_p=1.0, max_new_tokens=250)


def said(grammar, tokenizer, seed, prompt=(), most=250, end_ids=None):
    """What a model of random preferences answers: its text, whether it ended, its tokens."""
    generator = torch.Generator().manual_seed(seed)
    liked = 3 * torch.randn(tokenizer.vocab_size, generator=generator)
    matcher, text, ids = grammar.matcher(tokenizer, prompt, end_ids), ReplyText(tokenizer), []
    while len(ids) < most and not matcher.finished:
        logits = liked + 3 * torch.randn(tokenizer.vocab_size, generator=generator)
        ids.append(int(logits.masked_fill(~matcher.mask(), -torch.inf).argmax()))
        matcher.take(ids[-1])
        if ids[-1] not in tokenizer.stop_ids:
            text.push(ids[-1])
    text.finish()
    return text.text, matcher.finished, ids


def spell(matcher, tokenizer, text):
    for token in tokenizer.encode(text):
        assert matcher.mask()[token], (text, tokenizer.token_bytes(token))
        matcher.take(token)


TEXTS = st.text('abé你🙂"\\\n', max_size=4)
NUMBERS = st.integers(-50, 50)
LEAVES = st.one_of(
    st.builds(lambda most: {"type": "string", "maxLength": most}, st.integers(0, 5)),
    st.builds(lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size}, NUMBERS, st.integers(0, 50)),
    st.builds(lambda values: {"enum": values}, st.lists(TEXTS | NUMBERS | st.none() | st.booleans(), min_size=1, max_size=3)),
    st.builds(lambda value: {"const": value}, TEXTS | NUMBERS),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "string", "pattern": "^[a-c]{1,3}-[0-9]$"}]),
)


def nested(inner):
    def object_of(fields, optional):
        required = [name for index, name in enumerate(fields) if index not in optional]
        return {"type": "object", "properties": fields, "required": required, "additionalProperties": False}

    return st.one_of(
        st.builds(object_of, st.dictionaries(TEXTS, inner, max_size=3), st.sets(st.integers(0, 2))),
        st.builds(lambda item, most: {"type": "array", "items": item, "maxItems": most}, inner, st.integers(0, 3)),
        st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=2)),
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(schema=nested(st.recursive(LEAVES, nested, max_leaves=4)), seed=st.integers(0, 2**31))
def test_random_schemas_are_kept_by_random_models(schema, seed, model, tokenizer):
    """Guards: an end that comes too early, a token that is masked by another's bit, an answer that only nearly parses."""
    jsonschema = pytest.importorskip("jsonschema", reason="needs: pip install -e .[test]")
    sampling = dataclasses.replace(SAMPLED, grammar=Grammar.json_schema(schema), seed=seed)
    reply = Engine(model, tokenizer).generate([tokenizer.encode("JSON: ")], sampling)[0][0]
    if reply.finish_reason == "stop":
        jsonschema.validate(json.loads(reply.text), schema)
        assert reply.ids[-1] in tokenizer.stop_ids
    else:
        assert reply.finish_reason == "length" and len(reply.ids) > 200


def test_most_answers_end(tokenizer):
    """Guards: the test above, should no answer ever end: white space without a limit would do that."""
    ended = [said(Grammar.json_schema(CITY), tokenizer, seed)[1] for seed in range(10)]
    assert sum(ended) >= 8


@pytest.mark.parametrize("style", ["llama2", "llama3", "mistral"])
def test_imported_tokenizers(style, tmp_path):
    """Guards: another spelling of bytes and spaces, several end tokens, special tokens that count as text."""
    from imported_helpers import STYLES

    jsonschema = pytest.importorskip("jsonschema", reason="needs: pip install -e .[test]")
    tokenizer = BPETokenizer.from_pretrained(STYLES[style](tmp_path))
    if tokenizer.drops_first_space:  # the first word is written with a space that is not meant
        ids = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
        word = next(token for token in ids if token.isalpha() and len(token) > 1 and b" " + token in ids)
        matcher = Grammar.choice([word.decode()]).matcher(tokenizer)
        assert matcher.mask()[[ids[word], ids[b" " + word]]].all()
        matcher.take(ids[b" " + word])
        assert matcher.mask()[tokenizer.stop_ids].all()
    grammar, ended = Grammar.json_schema(CITY), 0
    for seed in range(6):
        text, finished, ids = said(grammar, tokenizer, seed)
        ended += finished
        if finished:
            jsonschema.validate(json.loads(text), CITY)
            assert ids[-1] in tokenizer.stop_ids and not set(ids[:-1]) & tokenizer.special_ids
    assert ended


def test_the_end_is_allowed_exactly_where_the_grammar_may_end(tokenizer):
    matcher = Grammar.regex("ab+").matcher(tokenizer)
    ends, letter = tokenizer.stop_ids, tokenizer.encode("b")[0]
    assert not matcher.mask()[ends].any()
    spell(matcher, tokenizer, "a")
    assert not matcher.mask()[ends].any()
    spell(matcher, tokenizer, "b")
    assert matcher.mask()[ends].all() and matcher.mask()[letter]
    branch = matcher.copy()
    matcher.take(ends[1])
    assert matcher.finished and not branch.finished
    spell(branch, tokenizer, "bb")
    whole = Grammar.choice(["你好"]).matcher(tokenizer)
    spell(whole, tokenizer, "你好")
    assert whole.mask().nonzero()[:, 0].tolist() == sorted(ends) and not whole.finished


def test_without_end_tokens_a_complete_answer_is_the_end(model, tokenizer):
    """Guards: eos_token_id=[] with nothing left to say, which would be sampling from nothing."""
    matcher = Grammar.choice(["hi"]).matcher(tokenizer, end_ids=[])
    spell(matcher, tokenizer, "hi")
    assert matcher.finished
    chosen = dataclasses.replace(SAMPLED, grammar=Grammar.choice(["hi", "你好"]), eos_token_id=[], n=4)
    replies = Engine(model, tokenizer).generate([[5, 6], [7, 8, 9]], chosen)
    assert all(reply.text in ("hi", "你好") and reply.finish_reason == "stop" for row in replies for reply in row)


def test_thinking_is_free_and_the_answer_begins_behind_it(tokenizer):
    """Guards: a grammar that begins in the thinking, a reply that ends in it, thinking within the answer."""
    grammar = Grammar.choice(["yes", "no"])
    opening, closing = tokenizer.token_id("<think>"), tokenizer.token_id("</think>")
    question = [{"role": "user", "content": "<think>?"}]
    begun = tokenizer.render(question, add_generation_prompt=True).ids
    may_think = grammar.matcher(tokenizer, begun)
    assert may_think.mask()[opening] and may_think.mask()[tokenizer.encode("y")[0]]
    may_think.take(opening)
    for matcher in (may_think, grammar.matcher(tokenizer, [*begun, opening])):
        spell(matcher, tokenizer, "any thing, 随便")
        assert not matcher.mask()[tokenizer.stop_ids].any()
        matcher.take(closing)
        assert not matcher.mask()[[opening, closing]].any()
        spell(matcher, tokenizer, "\n\nyes")
        assert matcher.mask()[tokenizer.stop_ids].all()
        assert not matcher.mask()[opening]
    closed = tokenizer.render(question, add_generation_prompt=True, enable_thinking=False).ids
    assert not grammar.matcher(tokenizer, closed).mask()[opening]
    assert not grammar.matcher(tokenizer).mask()[opening]


def test_a_vocabulary_with_turns_and_without_thinking(tokenizer, tmp_path):
    """Guards: ChatML models that never think, which then may say anything at the beginning of their turn."""
    tokenizer.save_pretrained(tmp_path)
    for file in tmp_path.iterdir():
        file.write_text(file.read_text(encoding="utf-8").replace("think>", "muse>"), encoding="utf-8")
    plain = BPETokenizer.from_pretrained(tmp_path)
    assert plain.token_id("<think>") is None and plain.token_id("<|im_start|>") is not None
    begun = plain.render([{"role": "user", "content": "?"}], add_generation_prompt=True).ids
    matcher = Grammar.choice(["yes"]).matcher(plain, begun)
    assert {plain.token_bytes(token) for token in matcher.mask().nonzero()[:, 0].tolist()} <= {b"y", b"ye", b"yes"}
    assert said(Grammar.choice(["yes", "no"]), plain, 3, begun)[0] in ("yes", "no")


def test_a_reply_that_thinks_answers_in_form(model, tokenizer):
    """Guards: text and reasoning of a constrained reply in one channel."""
    prompt = [*tokenizer.render([{"role": "user", "content": "?"}], add_generation_prompt=True).ids, tokenizer.token_id("<think>")]
    chosen = dataclasses.replace(
        SAMPLED, grammar=Grammar.choice(["yes", "no"]), seed=1, n=4, logit_bias={tokenizer.token_id("</think>"): 8}
    )
    for reply in Engine(model, tokenizer).generate([prompt], chosen)[0]:
        assert reply.finish_reason == "stop" and reply.text in ("yes", "no")


def test_a_cut_answer_says_so(model, tokenizer):
    """Guards: half a JSON text that is taken for a whole one."""
    cut = dataclasses.replace(SAMPLED, grammar=Grammar.json_schema(CITY), max_new_tokens=4)
    reply = Engine(model, tokenizer).generate([[5, 6]], cut)[0][0]
    assert reply.finish_reason == "length" and len(reply.ids) == 4
    with pytest.raises(ValueError):
        json.loads(reply.text)


def test_rows_of_a_batch_keep_their_own_place(model, tokenizer):
    """Guards: rows that share a matcher; and streams, which give what generate gives."""
    engine = Engine(model, tokenizer)
    words = dataclasses.replace(SAMPLED, grammar=Grammar.regex("(ab|ba){3,5}"), seed=3)
    together = engine.generate([[5, 6, 7], [9, 10], [20]], words)
    for prompt, (reply,) in zip([[5, 6, 7], [9, 10], [20]], together, strict=True):
        assert re.fullmatch("(ab|ba){3,5}", reply.text)
        assert reply.text == engine.generate([prompt], words)[0][0].text
        assert reply.text == "".join(piece.text for piece in engine.stream(prompt, dataclasses.replace(words, lookup=4)))


def test_nothing_but_the_grammar_is_chosen(tokenizer):
    """Guards: penalties or a minimum length that leave nothing, and then let everything through; ids that the tokenizer has not."""
    matcher = Grammar.choice(["hi"]).matcher(tokenizer)
    vocab = tokenizer.vocab_size + 5
    strict = SamplingSettings(temperature=0, no_repeat_ngram_size=1, min_new_tokens=9, logit_bias={3: 100})
    every = torch.arange(vocab)[None]
    allowed = allowed_tokens([matcher.mask(), None])
    logits = process_logits(torch.randn(2, vocab), TokenHistory(every.repeat(2, 1), None, vocab, 1), strict, tokenizer.stop_ids, allowed)
    permitted = matcher.mask().nonzero()[:, 0].tolist()
    assert (logits[0] > -torch.inf).nonzero()[:, 0].tolist() == permitted
    assert (logits[1] > -torch.inf).sum() == tokenizer.vocab_size
    assert allowed_tokens([None, None]) is None


def test_lark_and_any_json(tokenizer):
    spell(Grammar.lark('start: "(" start ")" | "x"').matcher(tokenizer), tokenizer, "((x))")
    matcher = Grammar.json().matcher(tokenizer)
    spell(matcher, tokenizer, json.dumps({"a": [1, None, {"b": "你"}]}, ensure_ascii=False))
    assert matcher.mask()[tokenizer.stop_ids].all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grammar.json_schema({"type": "objct"}), "JSON Schema.*objct"),
        (lambda: Grammar.json_schema({"type": "array", "uniqueItems": True}), "JSON Schema.*uniqueItems"),
        (lambda: Grammar.json_schema("[1"), "JSON object"),
        (lambda: Grammar.json_schema({"type": {1, 2}}), "JSON object"),
        (lambda: Grammar.regex("[a"), "regex"),
        (lambda: Grammar.lark("start: missing"), "Lark.*missing"),
        (lambda: Grammar.choice([]), "choice"),
        (lambda: Grammar.choice("abc"), "choice"),
        (lambda: Grammar.choice(["a", ""]), "choice"),
        (lambda: SamplingSettings(grammar={"type": "object"}), "grammar must be a Grammar.*dict"),
    ],
)
def test_what_is_no_grammar_is_explained(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_is_missing_is_named(monkeypatch, make_model):
    with pytest.raises(ValueError, match="tokenizer"):
        Engine(make_model()).generate([[1, 2]], SamplingSettings(grammar=Grammar.choice(["a"])))
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"\[constrained\]"):
        Grammar.choice(["a"])


def test_a_token_out_of_form_is_refused(tokenizer):
    """Guards: a matcher that goes on in silence from where its parser is lost."""
    with pytest.raises(ValueError, match="grammar"):
        Grammar.choice(["hi"]).matcher(tokenizer).take(tokenizer.encode("x")[0])
