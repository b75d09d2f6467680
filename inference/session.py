"""ChatSession: a conversation with a trained model.

chat = ChatSession.from_pretrained("weight/sft", temperature=0.7)
print(chat.chat("你好"))
for piece in chat.stream("讲个故事"): print(piece, end="")
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from inference.conversations import Conversation, check_messages, read_conversation, write_conversation
from inference.engine import Engine, Piece, PromptCache
from inference.fitting import fit_prompt
from inference.kept_ids import KeptIds
from inference.loading import Adapters, load_stage
from inference.memory import ConversationMemory
from inference.reasoning import generate_with_reasoning
from inference.reply import Event, Reasoning, Reply
from inference.sampling import SamplingSettings
from inference.text import THINK_OPEN, special_id, visible_length
from inference.thinking import guided
from inference.tool_rounds import with_tools
from inference.toolbox import OPEN, Toolbox, default_tools, spoken
from inference.turn_memory import TurnMemory
from model.tokenizer import BPETokenizer
from model.transformer import SmartHaoAI

if TYPE_CHECKING:
    from inference.prompts import SmartPromptEngineer

RETRY_TEMPERATURE = 0.8
AUTO = "auto"
EXTRA_SHARE = 4
"""At most one part in so many of the context is for what memory and templates add."""
SUMMARY = (
    "请用几句话总结我们到目前为止的对话。",
    "Summarise our conversation so far in a few sentences.",
)


class ChatSession:
    """Remembers a conversation and continues it.

    `messages` holds everything said ({"role", "content", "reasoning_content"?, "tool_calls"?}); the system text is in `system` alone.
    `enable_thinking`: None lets the model decide, True opens the thinking, False skips it. `settings` may be changed
    between turns. When the conversation outgrows the model's context, its oldest turns are no longer shown to the
    model; they stay in `messages`, and `dropped_turns` counts them.

    Off until set, and free to change between turns: `memory`, `template` ("auto" or a name of `prompts`), `tools`, `reasoning`. What
    memory and template add goes into the last user turn that the model sees; `messages` keeps what the user typed.
    """

    def __init__(
        self,
        model: SmartHaoAI,
        tokenizer: BPETokenizer,
        system: str = "",
        enable_thinking: bool | None = None,
        settings: SamplingSettings | None = None,
    ) -> None:
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {model.config.vocab_size}: they do "
                "not belong together; use the tokenizer that was saved with the model"
            )
        self.model = model
        self.engine = Engine(model, tokenizer)
        self.tokenizer = tokenizer
        self.system = system
        self.enable_thinking = enable_thinking
        self.settings = settings or SamplingSettings()
        self.memory: ConversationMemory | None = None
        self._prompts: SmartPromptEngineer | None = None
        self.template: str | None = None
        self.tools: Toolbox | None = None
        self.reasoning: Reasoning | None = None
        self.messages: list[dict[str, Any]] = []
        self.dropped_turns = 0
        self.last: Reply | None = None
        self._adapters = Adapters(model)
        self._cache, self._kept = PromptCache(), KeptIds()
        self._asked = ("", "")  # the last question, and as the model sees it
        self._attempt = 0  # how often the last question was answered before
        self._remembered = TurnMemory()

    @property
    def prompts(self) -> SmartPromptEngineer:
        """Whose templates are used; may be set to one with templates of the user's own."""
        from inference.prompts import SmartPromptEngineer

        self._prompts = self._prompts or SmartPromptEngineer()
        return self._prompts

    @prompts.setter
    def prompts(self, engineer: SmartPromptEngineer) -> None:
        self._prompts = engineer

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        system: str = "",
        enable_thinking: bool | None = None,
        reasoning_steps: int | None = None,
        reasoning_halt: float | None = None,
        quantize: str = "none",
        **settings: Any,
    ) -> ChatSession:
        """Load a finished stage. settings are fields of SamplingSettings; those not given come from
        generation_config.json, then from the defaults. device None takes the GPU when there is one.

        reasoning_steps, reasoning_halt: as in `SmartHaoAI.set_reasoning`, which may be called between turns, too. Raises ValueError for
        a model without a reasoning head. quantize ("auto", "bf16", "int8", "int4"): faster on a CPU, see `inference.quantized`."""
        loaded = load_stage(path, device, dtype, settings, quantize)
        loaded.model.set_reasoning(reasoning_steps, reasoning_halt)
        session = cls(loaded.model, loaded.tokenizer, system, enable_thinking, loaded.settings)
        if loaded.adapter is not None:
            session.use_adapter(loaded.adapter)
        return session

    def use_adapter(self, path: str | Path | None) -> None:
        """Go on with the LoRA adapter in a folder, ours or PEFT's, in this conversation; None: with the model alone.

        An adapter is read once; to switch back and forth costs nothing. FileNotFoundError, or ValueError when it was made for another base.
        """
        self._adapters.use(path)
        self._cache.clear()  # keys and values of what answered before

    @property
    def adapter(self) -> str | None:
        """Folder of the LoRA adapter that answers; None: the model as it was loaded."""
        return self._adapters.current

    # ---------------------------------------------------------------- asking

    def chat(self, text: str) -> str:
        """The answer to `text`, whole. Raises ValueError when the text alone is too long for the model's context."""
        return "".join(self.stream(text))

    def stream(self, text: str) -> Iterator[str]:
        """The answer to `text`, piece by piece, without the thinking. What was yielded before a break is remembered."""
        return (words for channel, words in self.stream_events(text) if channel == "answer")

    def stream_events(self, text: str) -> Iterator[Event]:
        """The reply as ("reasoning", piece), ("answer", piece) and, where tools are on, ("tool", a call and its result)."""
        if not text.strip():
            raise ValueError("the message is empty: say something")
        if self._questions() and not _is_answer(self.messages[-1]):
            self.undo()  # a question that was broken off before anything was said in reply
        self.messages.append({"role": "user", "content": text})
        self._attempt = 0
        try:
            return self._ask()
        except ValueError:
            self.messages.pop()
            raise

    def retry(self) -> Iterator[Event]:
        """Another answer to the last question, in place of the one that was given: drawn with another seed, and never greedy."""
        question = self._last_question()
        self._remembered.forget(self.memory, len(self._questions()))
        answer = self.messages[question + 1 :]
        del self.messages[question + 1 :]
        self._attempt += 1
        try:
            return self._ask()
        except ValueError:
            self.messages += answer
            raise

    def undo(self) -> str:
        """Take back the last question and its answer; returns the question. Raises ValueError when there is none."""
        question = self._last_question()
        text = str(self.messages[question]["content"])
        self._remembered.forget(self.memory, len(self._questions()))
        del self.messages[question:]
        self.dropped_turns = max(0, min(self.dropped_turns, len(self._questions()) - 1))
        return text

    def summary(self) -> Iterator[str]:
        """The model's summary of the conversation, piece by piece; it does not become part of it. ValueError when nothing was said."""
        if not self.messages:
            raise ValueError("there is nothing to summarise yet: say something first")
        said = "".join(str(message["content"]) for message in self.messages if message["role"] == "user")
        chinese = any("\u4e00" <= character <= "\u9fff" for character in said)
        prompt = self._fit([*self.messages, {"role": "user", "content": SUMMARY[0 if chinese else 1]}])[2]
        return (piece.text for piece in self._pieces(prompt, self.settings) if piece.channel == "answer")

    def prompt_of_answer(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The conversation up to the last answer, system text included, and that answer's message. ValueError when there is none."""
        if not self.messages or not _is_answer(self.messages[-1]):
            raise ValueError("there is no answer yet: say something first")
        return [*self._system(), *self.messages[:-1]], self.messages[-1]

    # ---------------------------------------------------------------- the conversation as a whole

    def reset(self) -> None:
        """Forget the conversation; system text, settings, and what the memory holds stay."""
        self.messages = []
        self.dropped_turns = self._attempt = 0
        self.last = None
        self._remembered.clear()
        self._cache.clear()
        self._kept.clear()

    def load_messages(self, messages: Any) -> None:
        """Continue a saved conversation; a leading system message becomes `system`. Raises ValueError naming a bad
        entry."""
        check_messages(messages)
        self.reset()
        first_is_system = bool(messages) and messages[0]["role"] == "system"
        self.system = messages[0]["content"] if first_is_system else ""
        self.messages = [dict(message) for message in messages[first_is_system:]]

    def take_over(self, other: ChatSession) -> None:
        """Go on with the conversation of another session and all that is on there; the sampling settings are this model's own."""
        self.load_messages([*other._system(), *other.messages])
        self.enable_thinking, self.memory, self._prompts = other.enable_thinking, other.memory, other._prompts
        self.template, self.tools, self.reasoning = other.template, other.tools, other.reasoning
        self._remembered = other._remembered

    def save(self, path: str | Path) -> int:
        """Write messages, settings and what is on as JSON, a row that the SFT stage reads; returns the number of messages.
        Raises ValueError when the file exists and is something else."""
        on = {
            "thinking": self.enable_thinking,
            "memory": self.memory is not None,
            "template": self.template,
            "tools": self.tools is not None,
            "reasoning": self.reasoning,
        }
        messages = [*self._system(), *self.messages]
        write_conversation(Path(path), Conversation(messages, self.settings, on))
        return len(messages)

    def load(self, path: str | Path, memory: ConversationMemory | None = None) -> int:
        """Go on with a saved conversation, its settings and what was on; an older file changes the messages only.

        memory: the one to switch on where it was on and none is now. Returns the number of messages. Raises FileNotFoundError, or
        ValueError for a file that is no conversation.
        """
        saved = read_conversation(Path(path))
        self.load_messages(saved.messages)
        self.settings = saved.settings or self.settings
        if saved.on:
            on = saved.on.get
            self.enable_thinking, self.template, self.reasoning = on("thinking"), on("template"), on("reasoning")
            self.memory = (self.memory or memory) if on("memory") else None
            self.tools = (self.tools or default_tools(self.memory)) if on("tools") else None
        return len(saved.messages)

    # ---------------------------------------------------------------- one reply

    def _ask(self) -> Iterator[Event]:
        """Answer the last user turn."""
        text = str(self.messages[self._last_question()]["content"])
        reply = Reply()
        self._asked = (text, self._enriched(text, reply))
        return self._reply(self._prompt(), reply, text)

    def _enriched(self, text: str, reply: Reply) -> str:
        """A question with what memory and template add to it."""
        budget = self.engine.context // EXTRA_SHARE

        def count(words: str) -> int:
            return len(self.tokenizer.encode(words))

        seen = [str(message["content"]) for message in self.messages[self._questions()[self.dropped_turns] : -1]]
        known = "" if self.memory is None else self.memory.context(text, budget, count, shown=seen)
        if self.template is None:
            return "\n\n".join(filter(None, (known, text)))
        name = None if self.template == AUTO else self.template
        prompt = self.prompts.build(text, name, [known] if known else [], budget + count(text), count)
        reply.template, reply.reason = prompt.template, prompt.reason
        return "\n\n".join(filter(None, (prompt.system, prompt.user)))

    def _reply(self, prompt: list[int], reply: Reply, question: str) -> Iterator[Event]:
        started = time.perf_counter()
        self.last = reply
        reply.prompt_tokens = len(prompt)
        try:
            yield from self._answered(prompt, reply, started)
        finally:
            reply.seconds = time.perf_counter() - started
            if self.memory is not None and self.messages:
                answer = str(self.messages[-1]["content"]) if _is_answer(self.messages[-1]) else ""
                self._remembered.add(self.memory, len(self._questions()), question, answer)

    def _answered(self, first: list[int], reply: Reply, started: float) -> Iterator[Event]:
        prompts = [first]

        def one_reply(message: dict[str, Any]) -> Generator[Event, None, str]:
            prompt = prompts.pop() if prompts else self._prompt()
            if self.reasoning is not None and self.reasoning.votes > 1:
                yield from self._voted(self.reasoning, message, reply)
            else:
                yield from self._streamed(prompt, message, reply, started)
            reply.text, written = message["content"], reply.text
            return written

        return with_tools(one_reply, self.messages, lambda: self.tools)

    def _streamed(self, prompt: list[int], message: dict[str, Any], reply: Reply, started: float) -> Iterator[Event]:
        reply.text, reply.finish_reason, reply.prompt_tokens = "", "interrupted", len(prompt)
        thought, shown = "", 0
        settings, how = self._drawn_settings(), self.reasoning
        if how is not None:
            settings = guided(settings, self.engine, prompt, how.budget, how.calculator)
        for piece in self._pieces(prompt, settings):
            self._kept.reply(piece.ids)
            if not reply.completion_tokens:
                reply.first_seconds = time.perf_counter() - started
            reply.completion_tokens += len(piece.ids)
            reply.reused_tokens = self._cache.reused
            reply.reasoning_steps += piece.reasoning_steps
            reply.finish_reason = piece.finish_reason or reply.finish_reason
            words = piece.text
            if piece.channel == "answer":
                reply.text += piece.text
                message["content"] = reply.text
                if self.tools is not None:  # a call is not for the user's eyes
                    message["content"] = spoken(reply.text)[0]
                    end = visible_length(reply.text, OPEN, ended=piece.finish_reason is not None)
                    words, shown = reply.text[shown:end], max(shown, end)
            elif piece.text:
                thought += piece.text
                reply.reasoning += piece.text
                message["reasoning_content"] = thought
            # The message is kept up to date at every piece: whoever breaks off finds it as far as it came.
            if (piece.text or piece.finish_reason) and self.messages and self.messages[-1]["role"] != "assistant":
                self.messages.append(message)
            reply.seconds = time.perf_counter() - started
            if words:
                yield piece.channel, words

    def _pieces(self, prompt: list[int], settings: SamplingSettings) -> Iterator[Piece]:
        if settings.num_beams == 1:
            return self.engine.stream(prompt, settings, self._cache)
        self._cache.reused = 0
        found = self.engine.generate([prompt], dataclasses.replace(settings, n=1))[0][0]  # beams know their reply at the end only
        answer = Piece(found.text, "answer", found.ids, found.finish_reason, reasoning_steps=found.reasoning_steps)
        return iter([Piece(found.reasoning, "reasoning", []), answer])

    def _voted(self, how: Reasoning, message: dict[str, Any], reply: Reply) -> Iterator[Event]:
        """Several lines of thought are gone through at once and then vote, so the answer comes whole."""
        settings = self._drawn_settings()
        result = generate_with_reasoning(
            self.engine,
            self._fit(self._shown())[1],
            samples=how.votes,
            thinking=self._thinks(),
            budget=how.budget,
            calculator=how.calculator,
            settings=_sampled(settings),
            tools=None if self.tools is None else self.tools.schemas(),
        )
        reply.text, reply.reasoning, reply.finish_reason = result.answer, result.thinking, result.finish_reason
        reply.confidence, reply.votes = result.confidence, {vote.result: vote.count for vote in result.votes}
        reply.prompt_tokens, reply.reused_tokens = result.prompt_tokens, 0
        reply.completion_tokens += result.completion_tokens
        message["content"] = result.answer if self.tools is None else spoken(result.answer)[0]
        if result.thinking:
            message["reasoning_content"] = result.thinking
            yield "reasoning", result.thinking
        self.messages.append(message)
        if message["content"]:
            yield "answer", message["content"]

    def _thinks(self) -> bool | None:
        """Whether the prompt opens the thinking (True), skips it, or leaves it to the model: reasoning is thinking, where it can be."""
        if self.reasoning is None or self.enable_thinking is not None:
            return self.enable_thinking
        return True if special_id(self.tokenizer, THINK_OPEN) is not None else None

    def _drawn_settings(self) -> SamplingSettings:
        """The settings; for a further answer to the same question those that give another one."""
        settings = self.settings
        if not self._attempt:
            return settings
        seed = None if settings.seed is None else (settings.seed + self._attempt) % 2**63
        return dataclasses.replace(_sampled(settings), seed=seed)

    # ---------------------------------------------------------------- the prompt

    def _prompt(self) -> list[int]:
        try:
            self.dropped_turns, _, ids = self._fit(self._shown())
        except ValueError:
            if self._asked[0] == self._asked[1]:
                raise
            self._asked = ("", "")  # what the user says goes before what was added to it
            self.dropped_turns, _, ids = self._fit(self._shown())
        return self._kept.prompt(ids, self.tokenizer)

    def _fit(self, messages: list[dict[str, Any]]) -> tuple[int, list[dict[str, Any]], list[int]]:
        """As `fit_prompt`: turns dropped, messages, ids."""
        tools = None if self.tools is None else self.tools.schemas()
        shape = (self.engine.context, self.settings.max_new_tokens)
        return fit_prompt(self.tokenizer, self._system(), messages, self.dropped_turns, *shape, self._thinks(), tools)

    def _shown(self) -> list[dict[str, Any]]:
        """The messages as the model sees them."""
        question = self._last_question()
        typed, shown = self._asked
        if self.messages[question]["content"] != typed:
            return self.messages
        return [*self.messages[:question], {"role": "user", "content": shown}, *self.messages[question + 1 :]]

    def _system(self) -> list[dict[str, Any]]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _questions(self) -> list[int]:
        return [index for index, message in enumerate(self.messages) if message["role"] == "user"]

    def _last_question(self) -> int:
        questions = self._questions()
        if not questions:
            raise ValueError("nothing was asked yet: say something first")
        return questions[-1]


def _sampled(settings: SamplingSettings) -> SamplingSettings:
    """The settings for answers that are to differ: neither greedy nor searched."""
    temperature = settings.temperature or RETRY_TEMPERATURE
    return dataclasses.replace(settings, temperature=temperature, num_beams=1, length_penalty=1.0, early_stopping=False)


def _is_answer(message: dict[str, Any]) -> bool:
    return message["role"] == "assistant" and not message.get("tool_calls")
