"""Streaming text: whole characters, stop strings cut off, thinking apart."""

import pytest

from inference.text import ReplyText, starts_in_reasoning


def byte_tokens(tokenizer, text):
    """Ids of single bytes: the hardest way to receive a text."""
    table = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    return [table[bytes([byte])] for byte in text.encode()]


@pytest.mark.parametrize("text", ["你好，世界", "👨‍👩‍👧 family", "é à ü", "mixed 中 🎉 end"])
def test_no_piece_holds_half_a_character(tokenizer, text):
    """A character of several tokens must not show as U+FFFD on its way."""
    reply = ReplyText(tokenizer)
    pieces = [words for token in byte_tokens(tokenizer, text) for _, words in reply.push(token)]
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    assert len(pieces) == len(text)


def test_a_character_cut_off_by_the_end_is_dropped(tokenizer):
    reply = ReplyText(tokenizer)
    for token in byte_tokens(tokenizer, "好好")[:-1]:
        reply.push(token)
    reply.finish()
    assert reply.text == "好"


def test_bytes_that_are_no_text_do_not_block_the_stream(tokenizer):
    table = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    reply = ReplyText(tokenizer)
    for token in [table[b"\xff"], table[b"a"]]:
        reply.push(token)
    assert reply.text == "\ufffda"


def test_stop_string_across_tokens_is_never_shown(tokenizer):
    reply = ReplyText(tokenizer, stop=["STOP"])
    shown = []
    for token in byte_tokens(tokenizer, "ab STO no STOP tail"):
        shown += [words for _, words in reply.push(token)]
    assert reply.stopped and "".join(shown) == "ab STO no " == reply.text


def test_a_beginning_of_a_stop_string_is_released_at_the_end(tokenizer):
    reply = ReplyText(tokenizer, stop=["STOP", "\n\nUser"])
    for token in byte_tokens(tokenizer, "the ST"):
        reply.push(token)
    assert reply.text == "the " and reply.finish() == [("answer", "ST")] and reply.text == "the ST"


def test_thinking_is_separated_and_its_line_ends_dropped(tokenizer):
    ids = tokenizer.encode("<think>\nfirst\n\nsecond\n</think>\n\nanswer<|im_end|>", parse_special=True)
    reply = ReplyText(tokenizer, stop=["first"])  # a stop string inside the thinking does not end the reply
    segments = [segment for token in ids for segment in reply.push(token)] + reply.finish()
    assert (reply.reasoning, reply.text) == ("first\n\nsecond", "answer")
    assert "".join(words for channel, words in segments if channel == "answer") == "answer"


def test_where_a_reply_starts(tokenizer):
    """The open <think> of a prompt makes the reply begin with thinking; a closed or an earlier one does not."""
    for text, expected in [
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("<think><|im_start|>assistant\n", False),
        ("plain", False),
    ]:
        assert starts_in_reasoning(tokenizer, tokenizer.encode(text, parse_special=True)) is expected


def test_ids_beyond_the_tokenizer_stand_for_nothing(tokenizer):
    """Models with a padded vocabulary can choose an id that the tokenizer does not know."""
    assert ReplyText(tokenizer).push(tokenizer.vocab_size + 5) == []
