"""A folder for Ollama: model.gguf and a Modelfile whose TEMPLATE gives the tokenizer's own chat format.

`ollama create NAME -f OUT/Modelfile`, then `ollama run NAME`. Ollama itself is not run here: the template is executed on a table of
conversations by `tools.convert.go_template` and must give what the tokenizer renders, to the letter.

What Ollama's variables cannot say (the renderer and the template differ there):
- messages of one role in a row arrive merged with an empty line between them (tool results excepted);
- a conversation that ends with the assistant is continued: the turn stays open, there is no end mark;
- thinking written as <think> inside `content` stays where it is; line ends around `thinking` and `content` are kept as sent;
- keys of tool arguments and names of a tool's parameters come in alphabetical order, lists and objects inside them without spaces,
  `<`, `>` and `&` in JSON as \\u003c; of a tool's schema only what Ollama's types hold: type, description, enum, required;
- enable_thinking: false is .IsThinkSet with .Think off; true and "not said" are the same, as in our renderer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from inference.loading import preset_settings
from inference.sampling import SamplingSettings
from model.checkpoint import find_model, load_config
from model.files import atomic_directory, atomic_write_text
from model.tokenizer import BPETokenizer
from tools.convert.compare import Comparison
from tools.convert.go_template import Struct, render_go

LARGEST_CONTEXT = 8192  # Ollama reserves the memory of the whole context at once; a user may ask for more
SAMPLING = {  # our name -> Ollama's
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
MODEL_FILE, MODELFILE = "model.gguf", "Modelfile"

# Ollama finds the tags of thinking and tool calls by looking into the template: the text that surrounds {{ .Thinking }} in its branch,
# and the first text under {{ if .ToolCalls }}. Both must stay as they are.
GO_TEMPLATE = r"""
{{- $system := "" }}{{ $leads := false }}{{ $other := false }}{{ $asked := false }}{{ $question := 0 }}
{{- range $i, $_ := .Messages }}
  {{- if eq .Role "system" }}{{ $other = true }}{{ if eq $i 0 }}{{ $leads = true }}{{ $system = .Content }}{{ end }}
  {{- else if eq .Role "user" }}
    {{- $handed := and (ge (len .Content) 31) (eq (slice .Content 0 15) "<tool_response>")
        (eq (slice .Content (len (slice .Content 16))) "</tool_response>") }}
    {{- if not $handed }}{{ $asked = true }}{{ $question = $i }}{{ end }}
  {{- end }}
{{- end }}
{{- if and .System (not $other) }}{{ $leads = true }}{{ $system = .System }}{{ end }}
{{- if .Tools }}<|im_start|>system
{{ if $leads }}{{ $system }}

{{ end }}# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{{- range .Tools }}
{"type": {{ json .Type }}, "function": {"name": {{ json .Function.Name }}
  {{- if .Function.Description }}, "description": {{ json .Function.Description }}{{ end -}}
  , "parameters": {"type": {{ json .Function.Parameters.Type }}, "properties": {{ "{" }}
  {{- $rest := false }}
  {{- range $name, $property := .Function.Parameters.Properties }}
    {{- if $rest }}, {{ end }}{{ $rest = true }}{{ json $name }}: {{ if or (not .Type) .Items (eq (json .Type) `"object"`) }}
      {{- json . }}
    {{- else -}}
      {"type": {{ json .Type }}{{ if .Description }}, "description": {{ json .Description }}{{ end }}{{ if .Enum }}, "enum": [
      {{- range $j, $choice := .Enum }}{{ if $j }}, {{ end }}{{ json $choice }}{{ end }}]{{ end }}{{ "}" }}
    {{- end }}
  {{- end }}{{ "}" }}
  {{- if .Function.Parameters.Required }}, "required": [
    {{- range $j, $name := .Function.Parameters.Required }}{{ if $j }}, {{ end }}{{ json $name }}{{ end }}]
  {{- end }}{{ "}}}" }}
{{- end }}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
{{ else if $leads }}<|im_start|>system
{{ $system }}<|im_end|>
{{ end }}
{{- $previous := "" }}
{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}
{{- if or (eq .Role "user") (and (eq .Role "system") (gt $i 0)) }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ else if eq .Role "assistant" }}<|im_start|>assistant
{{ if and $asked (gt $i $question) (or $last .Thinking) }}<think>
{{ .Thinking }}
</think>

{{ end }}{{ .Content }}
{{- $said := .Content }}
{{- if .ToolCalls }}
  {{- range $j, $_ := .ToolCalls }}{{ if or $said $j }}
<tool_call>{{ else }}<tool_call>{{ end }}
{"name": "{{ .Function.Name }}", "arguments": {{ "{" }}
    {{- $rest := false }}
    {{- range $name, $value := .Function.Arguments }}{{ if $rest }}, {{ end }}{{ $rest = true }}{{ json $name }}: {{ json $value }}{{ end }}
    {{- "}}" }}
</tool_call>
  {{- end }}
{{- end }}
{{- if not $last }}<|im_end|>
{{ end }}
{{- else if eq .Role "tool" }}
{{- if ne $previous "tool" }}<|im_start|>user{{ end }}
<tool_response>
{{ .Content }}
</tool_response>
{{- if or $last (ne (index (slice $.Messages $i) 1).Role "tool") }}<|im_end|>
{{ end }}
{{- end }}
{{- $previous = .Role }}
{{- end }}
{{- if ne $previous "assistant" }}<|im_start|>assistant
{{ if and .IsThinkSet (not .Think) }}<think>

</think>

{{ end }}{{ end -}}
""".strip("\n")

# ChatML without tools and thinking; DEFAULT is the system turn that the template inserts by itself.
PLAIN_CHATML = r"""
{{- $system := "" }}{{ $leads := false }}{{ $other := false }}{{ $previous := "" }}
{{- range $i, $_ := .Messages }}{{ if eq .Role "system" }}{{ $other = true }}{{ if eq $i 0 }}{{ $leads = true }}{{ end }}{{ end }}{{ end }}
{{- if and .System (not $other) }}<|im_start|>system
{{ .System }}<|im_end|>
{{ else if not $leads }}DEFAULT{{ end }}
{{- range $i, $_ := .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}{{ if or (ne .Role "assistant") (gt (len (slice $.Messages $i)) 1) }}<|im_end|>
{{ end }}{{ $previous = .Role }}{{ end }}
{{- if ne $previous "assistant" }}<|im_start|>assistant
{{ end -}}
""".strip("\n")

_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": '查询天气 "now"',
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "城市"},
                "unit": {"type": "string", "enum": ["C", "F"]},
            },
            "required": ["city"],
        },
    },
}
_CALL = {"function": {"name": "weather", "arguments": {"city": '上海 "浦东"', "days": 2}}}
_ASK, _AGAIN = {"role": "user", "content": "北京今天热吗？"}, {"role": "user", "content": "And tomorrow?\n\nBe brief."}
_SYSTEM = {"role": "system", "content": "你是一个助手。\nBe kind."}
_SAID = {"role": "assistant", "content": "不热。"}
_THOUGHT = {"role": "assistant", "content": "不热。", "reasoning_content": "查一查\n\n25 度"}
_CALLS = {"role": "assistant", "content": "", "reasoning_content": "call it", "tool_calls": [_CALL, _CALL]}
_RESULT = {"role": "tool", "content": '{"temp": 25}'}
_HANDED = {"role": "user", "content": "<tool_response>\n25\n</tool_response>"}

# (messages, tools, enable_thinking): plain ones first; `PLAIN` of them use neither tools nor thinking.
CONVERSATIONS: tuple[tuple[list[dict[str, Any]], list[dict[str, Any]] | None, bool | None], ...] = (
    ([_ASK], None, None),
    ([_SYSTEM, _ASK], None, None),
    ([{"role": "system", "content": ""}, _ASK], None, None),
    ([_ASK, _SAID, _AGAIN], None, None),
    ([_SYSTEM, _ASK, _SAID, _AGAIN, _SAID, _ASK], None, None),
    ([_ASK, _SAID, {"role": "system", "content": "late"}, _AGAIN], None, None),
    ([_ASK, _SAID], None, None),
    ([_ASK, _THOUGHT], None, None),
    ([_ASK, _THOUGHT, _AGAIN], None, None),
    ([_ASK, _SAID, _AGAIN, _THOUGHT], None, None),
    ([_SAID], None, None),
    ([_ASK], None, False),
    ([_ASK], None, True),
    ([_ASK], [_TOOL], None),
    ([_SYSTEM, _ASK], [_TOOL, _TOOL], False),
    ([_ASK, _CALLS, _RESULT], [_TOOL], None),
    ([_ASK, _CALLS, _RESULT, _RESULT, {"role": "assistant", "content": "25 度。"}], [_TOOL], None),
    ([_ASK, {**_CALLS, "content": "看看"}, _RESULT, _THOUGHT, _AGAIN, _CALLS, _RESULT, _RESULT], [_TOOL], None),
    ([_ASK, _THOUGHT, _HANDED], None, None),
    ([_SYSTEM, _ASK, _CALLS, _HANDED, _THOUGHT, _HANDED], None, None),
)
PLAIN = 7


def export_ollama(folder: str | Path, out_dir: str | Path, dtype: str = "f16", log: Callable[[str], None] = print) -> Path:
    """Write OUT/model.gguf and OUT/Modelfile (a folder that stands there is replaced). ValueError where the model cannot be a GGUF."""
    from tools.convert.gguf_export import export_gguf

    folder, out_dir = find_model(folder), Path(out_dir)
    tokenizer = BPETokenizer.from_pretrained(folder)
    template, reason = choose_template(tokenizer)
    with atomic_directory(out_dir) as partial:
        export_gguf(folder, partial / MODEL_FILE, dtype, lambda text: log(text.replace(str(partial), str(out_dir))))
        atomic_write_text(partial / MODELFILE, modelfile(folder, tokenizer, template, reason))
    log(f"{out_dir / MODELFILE}: {reason}")
    return out_dir


def check_ollama(folder: str | Path, out_dir: str | Path) -> Comparison | None:
    """The GGUF of an Ollama folder against the checkpoint (None: llama.cpp is not installed) and the Modelfile's template, read back,
    against the tokenizer. ValueError names the first conversation where the template differs."""
    from tools.convert.gguf_check import check_gguf

    folder, out_dir = find_model(folder), Path(out_dir)
    text = (out_dir / MODELFILE).read_text(encoding="utf-8")
    if '\nTEMPLATE """' in text:
        tokenizer = BPETokenizer.from_pretrained(folder)
        template = text.split('\nTEMPLATE """')[1].split('"""')[0]
        own = template == GO_TEMPLATE
        different = first_difference(template, tokenizer, CONVERSATIONS if own else CONVERSATIONS[:PLAIN])
        if different:
            raise ValueError(f"{out_dir / MODELFILE}: the template differs from the tokenizer's: {different}")
    return check_gguf(folder, out_dir / MODEL_FILE)


def choose_template(tokenizer: BPETokenizer) -> tuple[str | None, str]:
    """The Go template that renders as the tokenizer does, and a sentence on how that is known; None where there is none."""
    if first_difference(GO_TEMPLATE, tokenizer, CONVERSATIONS) is None:
        return GO_TEMPLATE, f"the template gives the tokenizer's text on {len(CONVERSATIONS)} conversations (Go template read by this tool)"
    plain = _plain_template(tokenizer)
    if plain and first_difference(plain, tokenizer, CONVERSATIONS[:PLAIN]) is None:
        return plain, f"the template gives the tokenizer's text on {PLAIN} conversations; tools and thinking are not carried over"
    return None, "the chat template is not ChatML and was not translated: Ollama goes by the template inside model.gguf, if it knows it"


def first_difference(template: str, tokenizer: BPETokenizer, conversations: Any) -> str | None:
    """Where a Go template does not give the tokenizer's text; None: nowhere."""
    for messages, tools, enable_thinking in conversations:
        continues = messages[-1]["role"] == "assistant"
        try:
            expected = tokenizer.render(messages, tools, add_generation_prompt=not continues, enable_thinking=enable_thinking).text
        except ValueError as error:
            return f"the tokenizer's template refuses {json.dumps(messages, ensure_ascii=False)}: {error}"
        if continues:
            expected = expected.removesuffix("\n").removesuffix("<|im_end|>")
        given = render_go(template, ollama_values(messages, tools, enable_thinking))
        if given != expected:
            return f"{json.dumps(messages, ensure_ascii=False)} gives {given!r}, not {expected!r}"
    return None


def _plain_template(tokenizer: BPETokenizer) -> str | None:
    """PLAIN_CHATML with the system turn that the tokenizer's template inserts; None when it is no ChatML."""
    turn = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    try:
        text = tokenizer.render([{"role": "user", "content": "Hi"}], add_generation_prompt=True).text
    except ValueError:
        return None
    default = text.removesuffix(turn)
    if default == text or "{{" in default or '"""' in default:
        return None
    # An empty text, so that no white space of the default is trimmed with that of the actions beside it.
    return PLAIN_CHATML.replace("DEFAULT", default + '{{ "" }}')


def ollama_values(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, enable_thinking: bool | None = None
) -> dict[str, Any]:
    """What Ollama hands to a template for these messages: its types, its merging of neighbours."""
    merged: list[Struct] = []
    for message in messages:
        if merged and merged[-1]["Role"] == message["role"] != "tool":
            merged[-1]["Content"] += "\n\n" + message["content"]
            continue
        calls = [
            Struct(Function=Struct(Name=call["function"]["name"], Arguments=call["function"]["arguments"]))
            for call in message.get("tool_calls") or []
        ]
        merged.append(
            Struct(
                Role=message["role"], Content=message.get("content") or "", Thinking=message.get("reasoning_content") or "", ToolCalls=calls
            )
        )
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    return {
        "System": system,
        "Messages": merged,
        "Tools": [_tool_struct(tool) for tool in tools or []],
        "Response": "",
        "Think": bool(enable_thinking),
        "IsThinkSet": enable_thinking is not None,
    }


def _tool_struct(tool: dict[str, Any]) -> Struct:
    function = tool["function"]
    parameters = function.get("parameters") or {}
    properties = {
        name: Struct(
            AnyOf=item.get("anyOf"),
            Type=item.get("type") or [],
            Items=item.get("items"),
            Description=item.get("description", ""),
            Enum=item.get("enum") or [],
        )
        for name, item in (parameters.get("properties") or {}).items()
    }
    schema = Struct(Type=parameters.get("type", ""), Required=parameters.get("required") or [], Properties=properties)
    return Struct(
        Type=tool.get("type", ""), Function=Struct(Name=function["name"], Description=function.get("description", ""), Parameters=schema)
    )


def modelfile(folder: Path, tokenizer: BPETokenizer, template: str | None, reason: str) -> str:
    """The Modelfile's text; sampling as a ChatSession on `folder` would use it."""
    from tools.convert.gguf_names import exported_context

    config = load_config(folder)
    settings = {**asdict(SamplingSettings()), **preset_settings(folder)}
    lines = ["# ollama create NAME -f Modelfile; the template needs Ollama 0.9 or newer", f"FROM ./{MODEL_FILE}", ""]
    if template is None:
        lines.append(f"# No TEMPLATE: {reason}.")
    else:
        lines.append(f'TEMPLATE """{template}"""')
    lines.append("")
    lines += [f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in stop_texts(tokenizer)]
    lines += [f"PARAMETER {theirs} {settings[ours]:g}" for ours, theirs in SAMPLING.items()]
    lines.append("PARAMETER repeat_last_n -1")  # ours counts the whole context
    lines.append(f"PARAMETER num_ctx {min(exported_context(config), LARGEST_CONTEXT)}")
    return "\n".join(lines) + "\n"


def stop_texts(tokenizer: BPETokenizer) -> list[str]:
    """The tokens that end a reply, as text, each once."""
    names = [tokenizer.backend.id_to_token(token_id) for token_id in tokenizer.stop_ids]
    return list(dict.fromkeys(name for name in names if name))


__all__ = ["CONVERSATIONS", "GO_TEMPLATE", "check_ollama", "choose_template", "export_ollama", "modelfile", "ollama_values", "stop_texts"]
