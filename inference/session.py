"""ChatSession: a conversation with a trained model.

chat = ChatSession.from_pretrained("weight/sft", temperature=0.7)
print(chat.chat("你好"))
for piece in chat.stream("讲个故事"): print(piece, end="")
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from inference.engine import Engine, PromptCache
from inference.sampling import SamplingSettings
from inference.text import THINK_OPEN, Channel, special_id, starts_in_reasoning
from model.adapter_files import adapter_base, is_adapter, load_adapter
from model.checkpoint import GENERATION_FILE, find_model
from model.device import find_device
from model.lora import Adapter, use_adapter
from model.tokenizer import BPETokenizer
from model.transformer import SmartHaoAI

ROLES = ("system", "user", "assistant", "tool")
SMALLEST_ROOM = 16
# What a checkpoint's generation_config.json may preset.
PRESETTABLE = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size")


@dataclass
class Reply:
    """The last answer and what it took."""

    text: str = ""
    reasoning: str = ""
    finish_reason: str = "interrupted"
    """"stop", "length" (max_new_tokens or the context is used up), or "interrupted"."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    reused_tokens: int = 0
    """Prompt tokens whose keys and values were still there from the turn before."""
    reasoning_steps: int = 0
    """Steps of the reasoning head that the reply took, over all its tokens, where halting is on; 0 where it is not."""


class ChatSession:
    """Remembers a conversation and continues it.

    `messages` holds everything said ({"role", "content", "reasoning_content"?}); the system text is in `system` alone.
    `enable_thinking`: None lets the model decide, True opens the thinking, False skips it. `settings` may be changed
    between turns. When the conversation outgrows the model's context, its oldest turns are no longer shown to the
    model; they stay in `messages`, and `dropped_turns` counts them.
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
        self.messages: list[dict[str, Any]] = []
        self.dropped_turns = 0
        self.last: Reply | None = None
        self.adapter: str | None = None
        """Folder of the LoRA adapter that answers; None: the model as it was loaded."""
        self._adapters: dict[str, Adapter] = {}
        self._cache = PromptCache()

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
        **settings: Any,
    ) -> ChatSession:
        """Load a finished stage. settings are fields of SamplingSettings; those not given come from
        generation_config.json, then from the defaults. device None takes the GPU when there is one.

        reasoning_steps, reasoning_halt: as in `SmartHaoAI.set_reasoning`, which may be called between turns, too. Raises ValueError for
        a model without a reasoning head."""
        known = [field.name for field in dataclasses.fields(SamplingSettings)]
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise TypeError(f"ChatSession has no setting {', '.join(unknown)}; it knows {', '.join(known)}")
        folder = find_model(path)
        sampling = SamplingSettings(**{**preset_settings(folder), **settings})
        # An adapter stays apart from its base, so that the session can go on with another or with none.
        base = adapter_base(folder) if is_adapter(folder) else folder
        model = SmartHaoAI.from_pretrained(base, device=find_device(device), dtype=dtype)
        model.eval()
        has_tokenizer = (folder / "tokenizer.json").is_file()  # some adapters come without
        model.set_reasoning(reasoning_steps, reasoning_halt)
        session = cls(model, BPETokenizer.from_pretrained(folder if has_tokenizer else base), system, enable_thinking, sampling)
        if base is not folder:
            session.use_adapter(folder)
        return session

    def use_adapter(self, path: str | Path | None) -> None:
        """Go on with the LoRA adapter in a folder, ours or PEFT's, in this conversation; None: with the model alone.

        An adapter is read once; to switch back and forth costs nothing. FileNotFoundError, or ValueError when it was made for another base.
        """
        model = self.engine.model
        assert isinstance(model, SmartHaoAI)
        if path is None:
            use_adapter(model, None)
        else:
            folder = find_model(path)
            key = str(folder.resolve())
            if key in self._adapters:
                use_adapter(model, self._adapters[key])
            else:
                self._adapters[key] = load_adapter(model, folder)
        self.adapter = None if path is None else Path(path).as_posix()
        self._cache.clear()  # keys and values of what answered before

    def chat(self, text: str) -> str:
        """The answer to `text`, whole. Raises ValueError when the text alone is too long for the model's context."""
        return "".join(self.stream(text))

    def stream(self, text: str) -> Iterator[str]:
        """The answer to `text`, piece by piece, without the thinking. What was yielded before a break is remembered."""
        return (words for channel, words in self.stream_events(text) if channel == "answer")

    def stream_events(self, text: str) -> Iterator[tuple[Channel, str]]:
        """The reply as ("reasoning", piece) and ("answer", piece)."""
        if not text.strip():
            raise ValueError("the message is empty: say something")
        if self.messages and self.messages[-1]["role"] == "user":
            self.messages.pop()  # a question that was broken off before anything was said in reply
        self.messages.append({"role": "user", "content": text})
        try:
            prompt = self._fitting_prompt()
        except ValueError:
            self.messages.pop()
            raise
        return self._reply(prompt)

    def reset(self) -> None:
        """Forget the conversation; system text and settings stay."""
        self.messages = []
        self.dropped_turns = 0
        self.last = None
        self._cache.clear()

    def load_messages(self, messages: Any) -> None:
        """Continue a saved conversation; a leading system message becomes `system`. Raises ValueError naming a bad
        entry."""
        if not isinstance(messages, list):
            raise ValueError(f"a conversation is a list of messages, got {type(messages).__name__}")
        for number, message in enumerate(messages, start=1):
            if not isinstance(message, dict) or message.get("role") not in ROLES:
                raise ValueError(f"message {number} needs a role, one of {', '.join(ROLES)}")
            if not isinstance(message.get("content"), str):
                raise ValueError(f"message {number} ({message['role']}) needs a content text")
        self.reset()
        first_is_system = bool(messages) and messages[0]["role"] == "system"
        self.system = messages[0]["content"] if first_is_system else ""
        self.messages = [dict(message) for message in messages[first_is_system:]]

    def _reply(self, prompt: list[int]) -> Iterator[tuple[Channel, str]]:
        started = time.perf_counter()
        reply = self.last = Reply(prompt_tokens=len(prompt))
        message: dict[str, Any] = {"role": "assistant", "content": ""}
        pieces = self.engine.stream(prompt, self.settings, self._cache)
        try:
            for piece in pieces:
                reply.completion_tokens += len(piece.ids)
                reply.reused_tokens = self._cache.reused
                if piece.ids and self.engine.steps_used is not None:
                    reply.reasoning_steps += int(self.engine.steps_used[0, -1])
                reply.finish_reason = piece.finish_reason or reply.finish_reason
                if piece.channel == "answer":
                    reply.text += piece.text
                    message["content"] = reply.text
                elif piece.text:
                    reply.reasoning += piece.text
                    message["reasoning_content"] = reply.reasoning
                # The message is kept up to date at every piece: whoever breaks off finds it as far as it came.
                if (piece.text or piece.finish_reason) and self.messages and self.messages[-1]["role"] != "assistant":
                    self.messages.append(message)
                reply.seconds = time.perf_counter() - started
                if piece.text:
                    yield piece.channel, piece.text
        finally:
            reply.seconds = time.perf_counter() - started

    def _fitting_prompt(self) -> list[int]:
        """Token ids of the conversation, without the oldest turns when all of it leaves too little room for the
        answer."""
        context = self.engine.context
        room = min(self.settings.max_new_tokens, context // 2)
        starts = [index for index, message in enumerate(self.messages) if message["role"] == "user"]
        for dropped in range(min(self.dropped_turns, len(starts) - 1), len(starts)):
            prompt = self._render(self.messages[starts[dropped] if dropped else 0 :])
            last_turn = dropped == len(starts) - 1
            if len(prompt) + (min(room, SMALLEST_ROOM) if last_turn else room) <= context:
                self.dropped_turns = dropped
                return prompt
        raise ValueError(
            f"the message is too long: with the system text it has {len(prompt)} tokens, the model's context holds "
            f"{context} and {min(room, SMALLEST_ROOM)} are kept for the answer; shorten it"
        )

    def _render(self, messages: list[dict[str, Any]]) -> list[int]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        rendered = self.tokenizer.render(system + messages, add_generation_prompt=True, enable_thinking=self.enable_thinking)
        if not self.enable_thinking:
            return rendered.ids
        if special_id(self.tokenizer, THINK_OPEN) is None:
            raise ValueError(
                f"thinking was asked for, but this model's vocabulary has no {THINK_OPEN} token: it was not trained to think apart; "
                "leave enable_thinking at None"
            )
        if starts_in_reasoning(self.tokenizer, rendered.ids):  # some templates open the thinking themselves
            return rendered.ids
        return [*rendered.ids, *self.tokenizer.encode(THINK_OPEN + "\n", parse_special=True)]


def preset_settings(path: Path) -> dict[str, Any]:
    """What the generation_config.json in `path` presets of SamplingSettings. ValueError when it is not a JSON object."""
    file = path / GENERATION_FILE
    if not file.is_file():
        return {}
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(stored, dict):
        raise ValueError(f"{file} must hold a JSON object, not {type(stored).__name__}")
    preset = {name: stored[name] for name in PRESETTABLE if stored.get(name) is not None}
    # transformers then takes the likeliest token, whatever the temperature. A file that does not say it (there: greedy too) was
    # mostly written without a thought to sampling, as of a base model: our own defaults serve a conversation better.
    if stored.get("do_sample") is False:
        preset["temperature"] = 0.0
    return preset
