"""What takes part in a conversation: kept ids, memory, templates, tools, reasoning; and a conversation in a file."""

import json

import pytest
from test_session import Scripted, make_session

from inference import ChatSession, SamplingSettings
from inference.feedback import Feedback
from inference.memory import ConversationMemory
from inference.reply import Reasoning
from inference.toolbox import Tool, default_tools


class Fed:
    """Counts the tokens that each prompt made the model read, and keeps the prompts."""

    def __init__(self, session, monkeypatch):
        self.counts, self.prompts = [], []
        prefill, stream = session.engine.prefill, session.engine.stream

        def counted(ids, mask, cache):
            self.counts.append(ids.numel())
            return prefill(ids, mask, cache)

        def told(ids, *rest):
            self.prompts.append(session.tokenizer.decode(ids, skip_special_tokens=False))
            return stream(ids, *rest)

        monkeypatch.setattr(session.engine, "prefill", counted)
        monkeypatch.setattr(session.engine, "stream", told)


def letters(tokenizer, text):
    """Ids that spell a text letter by letter, as its encoding never would."""
    ids = [token for letter in text for token in tokenizer.encode(letter)]
    assert ids != tokenizer.encode(text) and tokenizer.decode(ids) == text
    return ids


@pytest.mark.parametrize(
    ("thinking", "said", "again", "opening"),
    [
        (None, "", "", ""),
        (False, "", "{answer}<|im_end|>", "<think>\n\n</think>\n\n"),
        (True, "hm\n</think>\n\n", "{answer}<|im_end|>", "<think>\n"),
    ],
)
def test_a_second_turn_prefills_exactly_the_new_tokens(thinking, said, again, opening, model, tokenizer, monkeypatch):
    """Guards: a reply whose text is encoded anew, so that its keys and values are lost. Where the template leaves out the thinking of
    earlier turns (or closes it before it begins), what is reused ends before it."""
    chat = make_session(model, tokenizer, max_new_tokens=60)
    chat.enable_thinking = thinking
    ending = tokenizer.encode("<|im_end|>", parse_special=True)
    own = [*tokenizer.encode(said, parse_special=True), *letters(tokenizer, "Hello today"), *ending]
    Scripted(chat, tokenizer, monkeypatch, own, f"{said}fine<|im_end|>", f"{said}good<|im_end|>")
    fed = Fed(chat, monkeypatch)
    assert chat.chat("你好") == "Hello today" and chat.chat("and now?") == "fine"
    asked = f"\n<|im_start|>user\nand now?<|im_end|>\n<|im_start|>assistant\n{opening}"
    new = (again.format(answer="Hello today") or "<|im_end|>") + asked
    assert fed.counts[1] == len(tokenizer.encode(new, parse_special=True))
    assert chat.last.reused_tokens == chat.last.prompt_tokens - fed.counts[1]
    assert chat.chat("And?") == "good"  # and so it goes on
    assert fed.counts[2] < chat.last.prompt_tokens // 2


def test_ids_are_kept_only_as_far_as_the_text_is_the_same(model, tokenizer, monkeypatch):
    """Guards: words of a message that was taken back, or of a reply that was cut off, in the next prompt."""
    chat = make_session(model, tokenizer, max_new_tokens=60)
    ids = letters(tokenizer, "Hello today and more")
    Scripted(chat, tokenizer, monkeypatch, ids, *["fine<|im_end|>"] * 4)
    fed = Fed(chat, monkeypatch)
    stream = chat.stream("one")
    said = "".join(next(stream) for _ in range(5))
    stream.close()
    chat.chat("two")
    question = "<|im_end|>\n<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n"
    prompt = f"<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n{said}{question}"
    assert fed.prompts[1] == prompt
    chat.undo()
    chat.chat("three")
    assert fed.prompts[2] == prompt.replace("two", "three")
    chat.messages[1]["content"] = "Bye"  # a user of the library may write what they like
    chat.chat("four")
    assert "assistant\nBye<|im_end|>" in fed.prompts[3] and said not in fed.prompts[3]
    chat.reset()
    chat.chat("five")
    assert fed.prompts[4] == "<|im_start|>user\nfive<|im_end|>\n<|im_start|>assistant\n"


def test_a_users_text_is_no_structure_even_when_a_reply_was(model, tokenizer, monkeypatch):
    """Guards: structural tokens that a model made up being taken for the same characters typed by a user, or the other way round."""
    chat = make_session(model, tokenizer, max_new_tokens=60)
    Scripted(chat, tokenizer, monkeypatch, "a<|im_start|>b<|im_end|>", "fine<|im_end|>")
    assert chat.chat("x") == "ab"
    chat.messages[-1]["content"] = "a<|im_start|>b"
    chat.chat("y")
    assert chat._kept.ids.count(tokenizer.im_start_id) == 4  # of four turns; the one in the text is characters


def test_memory_goes_into_the_last_user_turn(model, tokenizer, monkeypatch):
    """Guards: remembered text in `messages` or in an earlier turn (the beginning of the prompt would change), and a memory that is
    not told what was said, or keeps what was taken back."""
    chat = make_session(model, tokenizer, max_new_tokens=60)
    Scripted(chat, tokenizer, monkeypatch, *["fine<|im_end|>"] * 5)
    fed = Fed(chat, monkeypatch)
    chat.memory = ConversationMemory(":memory:")
    chat.chat("My dog is called Biscuit.")
    assert {(entry.role, entry.text) for entry in chat.memory.list()} == {("user", "My dog is called Biscuit."), ("assistant", "fine")}
    chat.reset()
    chat.chat("What is my dog called?")
    assert fed.prompts[-1].count("Biscuit") == 1 and fed.prompts[-1].startswith("<|im_start|>user\n")
    assert chat.messages[0]["content"] == "What is my dog called?"
    chat.chat("Hello!")
    assert "Biscuit" not in fed.prompts[-1]
    before = len(chat.memory.list())
    chat.chat("My cat is called Cookie.")
    chat.undo()
    assert "Cookie" not in str(chat.memory.list()) and len(chat.memory.list()) >= before - 1
    chat.memory = None
    chat.chat("My bird is called Tweety.")
    assert "Biscuit" not in fed.prompts[-1]


def test_a_template_is_used_once_and_named(model, tokenizer, monkeypatch):
    """Guards: template text that stays in the conversation, and a choice that is not told."""
    chat = make_session(model, tokenizer, max_new_tokens=60)
    Scripted(chat, tokenizer, monkeypatch, *["fine<|im_end|>"] * 3)
    fed = Fed(chat, monkeypatch)
    chat.template = next(name for name in chat.prompts.templates if name != "chat")
    chat.chat("Hello there")
    typed = "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n"
    assert fed.prompts[0] != typed and "Hello there" in fed.prompts[0] and chat.last.template == chat.template and chat.last.reason
    chat.template = "auto"
    chat.chat("Hello!")
    assert chat.last.template == "chat" and fed.prompts[1].startswith(typed)
    chat.template = None
    chat.chat("Hello!")
    assert chat.last.template == ""
    chat.template = "no such"
    with pytest.raises(ValueError, match="no such"):
        chat.chat("Hello!")
    assert len(chat.messages) == 6


def test_what_is_added_gives_way_to_what_the_user_says(model, tokenizer):
    """Guards: a long question that is refused only because of what memory added to it."""
    chat = make_session(model, tokenizer)
    chat.memory = ConversationMemory(":memory:")
    for number in range(20):
        chat.memory.add("user", f"My favourite colour number {number} is a deep shade of blue.")
    question = "What is my favourite colour? " + "a " * 200
    plain = make_session(model, tokenizer)
    assert chat.chat(question) == plain.chat(question) and chat.last.prompt_tokens == plain.last.prompt_tokens


CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "6*7"}}\n</tool_call><|im_end|>'


def test_tools_are_called_until_there_is_an_answer(make_model, tokenizer, monkeypatch):
    """Guards: a call shown to the user as text, a result that does not reach the model, and a second prompt that is read from the start."""
    chat = make_session(make_model(tokenizer, max_position_embeddings=4096), tokenizer, max_new_tokens=80)
    chat.tools = default_tools()
    Scripted(chat, tokenizer, monkeypatch, "Let me see. " + CALL, "It is 42.<|im_end|>")
    fed = Fed(chat, monkeypatch)
    events = list(chat.stream_events("6*7?"))
    assert "".join(words for channel, words in events if channel == "answer").split() == ["Let", "me", "see.", "It", "is", "42."]
    assert [words for channel, words in events if channel == "tool"] == ['calculator({"expression": "6*7"}) → 42']
    assert [message["role"] for message in chat.messages] == ["user", "assistant", "tool", "assistant"]
    assert chat.messages[1]["tool_calls"][0]["function"] == {"name": "calculator", "arguments": {"expression": "6*7"}}
    assert chat.last.text == "It is 42." and chat.messages[2]["content"] == "42"
    result = "<|im_end|>\n<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert fed.prompts[1].endswith(result) and "calculator" in fed.prompts[0]
    chat.undo()
    assert chat.messages == []


def test_tools_that_never_end_are_ended(make_model, tokenizer, monkeypatch):
    """Guards: a model that calls for ever; a failing tool that ends the conversation."""
    chat = make_session(make_model(tokenizer, max_position_embeddings=4096), tokenizer, max_new_tokens=80)
    chat.tools = default_tools()
    chat.tools.remove("calculator")
    chat.tools.add(Tool("calculator", "fails", {"type": "object"}, lambda expression: 1 / 0))
    Scripted(chat, tokenizer, monkeypatch, *[CALL] * 20)
    assert chat.chat("6*7?") == ""
    results = [message["content"] for message in chat.messages if message["role"] == "tool"]
    assert 1 < len(results) < 10 and "failed" in results[0] and "no more tool calls" in results[-1]
    assert chat.messages[-1]["role"] == "assistant" and "tool_calls" not in chat.messages[-1]


def test_reasoning_streams_or_votes(make_model, tokenizer, monkeypatch):
    """Guards: a budget that is not obeyed in a chat; votes that are not told; a greedy session whose votes would all be the same."""
    chat = make_session(make_model(tokenizer, max_position_embeddings=1024), tokenizer, max_new_tokens=80)
    chat.reasoning = Reasoning(budget=5)
    Scripted(chat, tokenizer, monkeypatch, tokenizer.encode("a b c d e f g h i j k l m n o p q r s t u v w x y z " * 4))
    list(chat.stream_events("why?"))
    assert chat.last.reasoning and len(tokenizer.encode(chat.last.reasoning)) <= 8 and chat.last.text
    monkeypatch.undo()
    chat.reasoning = Reasoning(votes=3)
    chat.chat("how many?")
    assert sum(chat.last.votes.values()) <= 3 and 0 <= chat.last.confidence <= 1 and chat.messages[-1]["role"] == "assistant"
    chat.reasoning = None
    chat.chat("and now?")
    assert chat.last.confidence is None


def test_a_retry_is_another_answer(model, tokenizer):
    """Guards: /retry at temperature 0 or with a seed giving the same answer for ever."""
    for settings in ({}, {"temperature": 1.0, "seed": 5}):
        chat = make_session(model, tokenizer, **settings)
        with pytest.raises(ValueError, match="say something"):
            chat.retry()
        first = chat.chat("你好")
        others = {"".join(words for _, words in chat.retry()) for _ in range(4)}
        assert len(chat.messages) == 2 and others != {first} and len(others) > 1
        assert chat.undo() == "你好" and chat.messages == []
        assert chat.chat("你好") == first


def test_a_session_that_searches(model, tokenizer):
    """Guards: /retry, votes and /summary of a session with beams, which must draw, or wait for the whole reply."""
    chat = make_session(model, tokenizer, num_beams=3, length_penalty=0.5)
    first = chat.chat("你好")
    assert {"".join(words for _, words in chat.retry()) for _ in range(3)} != {first}
    assert "".join(chat.summary()) and chat.settings.num_beams == 3
    chat.reasoning = Reasoning(votes=3)
    chat.chat("and now?")
    assert sum(chat.last.votes.values()) <= 3


def test_a_conversation_is_saved_with_all_that_is_on(model, tokenizer, tmp_path):
    """Guards: settings and switches that are lost with the file, and files of earlier versions that cannot be read any more."""
    chat = make_session(model, tokenizer, top_k=7)
    chat.system, chat.enable_thinking, chat.template = "Be kind.", False, "auto"
    chat.tools, chat.reasoning = default_tools(), Reasoning(votes=3, budget=9)
    chat.messages = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "您好"}]
    assert chat.save(tmp_path / "a.json") == 3
    other = ChatSession(model, tokenizer)
    assert other.load(tmp_path / "a.json") == 3
    assert (other.system, other.messages, other.settings) == (chat.system, chat.messages, chat.settings)
    assert (other.enable_thinking, other.template, other.reasoning) == (False, "auto", Reasoning(votes=3, budget=9))
    assert other.tools is not None and other.memory is None
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"messages": chat.messages}), encoding="utf-8")
    other.load(old)
    assert other.system == "" and other.settings.top_k == 7 and other.template == "auto"
    old.write_text(json.dumps({"messages": chat.messages, "settings": {"top_k": 3, "of_a_later_version": 1}}), encoding="utf-8")
    other.load(old)
    assert other.settings == SamplingSettings(top_k=3)
    for wrong in ("[]", "{}", "no", '{"messages": 1}', '{"messages": [], "settings": {"top_k": -1}}', '{"messages": [], "settings": 3}'):
        old.write_text(wrong, encoding="utf-8")
        for act in (other.load, other.save):
            with pytest.raises(ValueError, match="old.json is not a saved conversation"):
                act(old)
        assert old.read_text(encoding="utf-8") == wrong


def test_a_conversation_goes_on_with_another_model(model, make_model, tokenizer):
    """Guards: switches and messages that are lost when the model is changed."""
    chat = make_session(model, tokenizer)
    chat.system, chat.template, chat.memory = "Be kind.", "auto", ConversationMemory(":memory:")
    chat.chat("你好")
    other = make_session(make_model(tokenizer, seed=4), tokenizer, top_k=3)
    other.take_over(chat)
    assert (other.system, other.messages, other.template, other.memory) == (chat.system, chat.messages, "auto", chat.memory)
    assert other.settings.top_k == 3 and isinstance(other.chat("and now?"), str)


def test_a_summary_does_not_become_part_of_the_conversation(model, tokenizer, monkeypatch):
    """Guards: a summary that the model later takes for something that was said."""
    chat = make_session(model, tokenizer, max_new_tokens=60)
    with pytest.raises(ValueError, match="nothing to summarise"):
        chat.summary()
    Scripted(chat, tokenizer, monkeypatch, "fine<|im_end|>", "We said hello.<|im_end|>", "good<|im_end|>")
    fed = Fed(chat, monkeypatch)
    chat.chat("你好")
    assert "".join(chat.summary()) == "We said hello." and "总结" in fed.prompts[1]
    chat.chat("and?")
    assert len(chat.messages) == 4 and "总结" not in fed.prompts[2]


def test_feedback_about_an_answer_with_tools(make_model, tokenizer, monkeypatch, tmp_path):
    """Guards: rows of a conversation with calls that no reader of training data understands."""
    from train.formats import recognise

    chat = make_session(make_model(tokenizer, max_position_embeddings=4096), tokenizer, max_new_tokens=80)
    chat.tools = default_tools()
    Scripted(chat, tokenizer, monkeypatch, CALL, "It is 42.<|im_end|>")
    chat.chat("6*7?")
    file = Feedback(tmp_path).good(*chat.prompt_of_answer())[0]
    sample = recognise(json.loads(file.read_text(encoding="utf-8")))
    assert [message["role"] for message in sample.messages] == ["user", "assistant", "tool", "assistant"]
    assert tokenizer.render(sample.messages).answer_end
