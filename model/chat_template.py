"""The chat template: one Jinja source, compatible with Qwen3's ChatML, and the function that renders it.

`TEMPLATE_SOURCE` marks what the assistant says with {% generation %} ... {% endgeneration %}. `STORED_TEMPLATE`, written to
chat_template.jinja, is the same text without the marks, because plain Jinja and llama.cpp do not know them. Rendering for
training writes a random token that cannot stand in a text in place of each mark, and reads the spans from the result. Templates
of other models run in the same sandbox, with the names that transformers gives them; `model.chat_spans` finds the assistant's
words in those without marks.

What the format does: a system turn (with the tool list when there is one); user and assistant turns between <|im_start|> and
<|im_end|>; the last assistant turn carries its reasoning in <think>, empty when there is none; reasoning of turns before the
last user question is left out; tool results are wrapped in a user turn.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

_BEGIN, _END = "{% generation %}", "{% endgeneration %}"

# The English sentences about tools are part of the format: models and servers that speak it expect them to the letter.
TEMPLATE_SOURCE = r"""
{%- set leading_system = messages[0].content if messages and messages[0].role == 'system' else none %}
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if leading_system is not none %}{{- leading_system + '\n\n' }}{%- endif %}
    {{- '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' }}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' }}
    {%- for tool in tools %}{{- '\n' + (tool | tojson) }}{%- endfor %}
    {{- '\n</tools>\n\nFor each function call, return a json object with function name and arguments ' }}
    {{- 'within <tool_call></tool_call> XML tags:\n<tool_call>\n' }}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n' }}
{%- elif leading_system is not none %}
    {{- '<|im_start|>system\n' + leading_system + '<|im_end|>\n' }}
{%- endif %}
{%- set question = namespace(index=messages | length - 1, found=false) %}
{%- for message in messages | reverse %}
    {%- if not question.found and message.role == 'user' and message.content is string
           and not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set question.found = true %}
        {%- set question.index = messages | length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set said = message.content if message.content is string else '' %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + said + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set turn = namespace(thought='', said=said) %}
        {%- if message.reasoning_content is string %}
            {%- set turn.thought = message.reasoning_content %}
        {%- elif '</think>' in said %}
            {%- set turn.thought = said.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set turn.said = said.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}{% generation %}
        {%- if loop.index0 > question.index and (loop.last or turn.thought) %}
            {{- '<think>\n' + turn.thought.strip('\n') + '\n</think>\n\n' + turn.said.lstrip('\n') }}
        {%- else %}
            {{- turn.said }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- if turn.said or not loop.first %}{{- '\n' }}{%- endif %}
            {%- set function = call.function if call.function else call %}
            {{- '<tool_call>\n{"name": "' + function.name + '", "arguments": ' }}
            {{- function.arguments if function.arguments is string else function.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}{% endgeneration %}{{- '\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' + said + '\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}
""".strip("\n")

STORED_TEMPLATE = TEMPLATE_SOURCE.replace(_BEGIN, "").replace(_END, "")


def render_spans(
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    enable_thinking: bool | None = None,
    template: str = TEMPLATE_SOURCE,
    tokens: Mapping[str, str] | None = None,
) -> list[tuple[str, bool]]:
    """The conversation as pieces of text, each with whether it stands in a generation mark of the template.

    tokens: the names that a template may write itself ("bos_token", "eos_token", ...). Raises ValueError for unusable messages.
    """
    if not messages:
        raise ValueError("a conversation needs at least one message")
    mark = unguessable("\x02", "\x03")
    variables: dict[str, Any] = {**(tokens or {}), "messages": messages, "tools": tools, "documents": None}
    variables.update({"add_generation_prompt": add_generation_prompt, _MARK: mark})
    if enable_thinking is not None:
        variables["enable_thinking"] = enable_thinking
    try:
        text = _compiled(template).render(**variables)
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"the chat template cannot render this conversation: {error}") from error
    pieces = text.split(mark)
    return [(piece, index % 2 == 1) for index, piece in enumerate(pieces) if piece]


def unguessable(begin: str, end: str) -> str:
    """A mark that cannot stand in a text by chance or ill will: 16 random bytes as private-use characters, which JSON, filters such
    as `upper` and `trim`, and comparisons of a template leave alone."""
    return begin + "".join(chr(0xE000 + byte) for byte in secrets.token_bytes(16)) + end


_GENERATION = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")


def has_generation_marks(template: str) -> bool:
    """Whether a template says itself which words are the assistant's."""
    return _GENERATION.search(template) is not None


def without_generation_marks(template: str) -> str:
    """The same text for programs that do not know the marks: they become a block that is always there, since the whitespace beside
    a mark belongs to it."""
    return _GENERATION.sub(lambda mark: f"{mark[1]}{'endif' if mark[2] else 'if true'}{mark[3]}", template)


def turn_ending(template: str, tokens: Mapping[str, str]) -> str:
    """What a template writes behind the words of an assistant; "" when it refuses the smallest conversation."""
    words = f"words{secrets.token_hex(8)}"
    messages = [{"role": "user", "content": "words"}, {"role": "assistant", "content": words}]
    try:
        text = "".join(piece for piece, _ in render_spans(messages, template=template, tokens=tokens))
    except ValueError:
        return ""
    return text.rpartition(words)[2] if words in text else ""


_MARK = "generation_mark"
LARGEST_PRODUCT = 1_000_000  # characters or items that a template may make by repeating


class _GenerationMarks(Extension):
    """{% generation %} ... {% endgeneration %}, in any spelling of its whitespace: the block's text between two marks."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked", [nodes.ContextReference()]), [], [], body).set_lineno(line)

    def _marked(self, context: Context, caller: Callable[[], str]) -> str:
        mark = str(context.get(_MARK, ""))
        return mark + caller() + mark


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox keeps a template from the program's objects; this also from the machine's memory in one short product or power."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        repeated = next((len(one) for one in (left, right) if isinstance(one, (str, list, tuple))), 0)
        numbers = [abs(one) for one in (left, right) if isinstance(one, int)]
        too_large = any(number.bit_length() > 64 for number in numbers) or operator == "**" and max(numbers, default=0) > 1000
        if too_large or repeated * max(numbers, default=0) > LARGEST_PRODUCT:
            raise TemplateError(f"a result of {operator} is too large")
        return super().call_binop(context, operator, left, right)


@lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationMarks, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise TemplateError(message)
