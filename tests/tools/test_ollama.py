"""The Go template against the Jinja one; the reader of Go templates against Go itself, where there is one."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from model import BPETokenizer, HaoAIConfig, SmartHaoAI
from model.checkpoint import save_pretrained
from tools.convert.__main__ import main
from tools.convert.go_template import Struct, go_json, render_go
from tools.convert.ollama import (
    CONVERSATIONS,
    GO_TEMPLATE,
    PLAIN,
    PLAIN_CHATML,
    choose_template,
    first_difference,
    modelfile,
    ollama_values,
)

# What Ollama hands to templates, in its types.
GO_PROGRAM = """
package main

import ("bytes"; "encoding/json"; "os"; "text/template")

type Types []string
func (t Types) MarshalJSON() ([]byte, error) {
	if len(t) == 1 { return json.Marshal(t[0]) }
	return json.Marshal([]string(t))
}
func (t *Types) UnmarshalJSON(data []byte) error {
	var one string
	if json.Unmarshal(data, &one) == nil { *t = Types{one}; return nil }
	return json.Unmarshal(data, (*[]string)(t))
}
type Property struct {
	AnyOf []any `json:"anyOf,omitempty"`
	Type Types `json:"type,omitempty"`
	Items any `json:"items,omitempty"`
	Description string `json:"description,omitempty"`
	Enum []any `json:"enum,omitempty"`
}
type Parameters struct { Type string; Required []string; Properties map[string]Property }
type Function struct { Name, Description string; Parameters Parameters }
type Tool struct { Type string; Function Function }
type Called struct { Name string; Arguments map[string]any }
type Call struct { Function Called }
type Message struct { Role, Content, Thinking string; ToolCalls []Call }
type Case struct { System string; Messages []*Message; Tools []Tool; Think, IsThinkSet bool }

func main() {
	var input struct { Template string; Cases []Case }
	if err := json.NewDecoder(os.Stdin).Decode(&input); err != nil { panic(err) }
	asJSON := func(value any) string { text, _ := json.Marshal(value); return string(text) }
	form := template.Must(template.New("").Option("missingkey=zero").Funcs(template.FuncMap{"json": asJSON}).Parse(input.Template))
	var results []string
	for _, c := range input.Cases {
		var text bytes.Buffer
		values := map[string]any{"System": c.System, "Messages": c.Messages, "Tools": c.Tools, "Think": c.Think, "IsThinkSet": c.IsThinkSet}
		if err := form.Execute(&text, values); err != nil { panic(err) }
		results = append(results, text.String())
	}
	json.NewEncoder(os.Stdout).Encode(results)
}
"""

ODD_TOOL = {
    "type": "function",
    "function": {
        "name": "odd",
        "parameters": {
            "type": "object",
            "properties": {
                "tags": {"type": "array", "items": {"type": "string"}, "description": "a < b & c"},
                "maybe": {"type": ["string", "null"], "description": 'tab\tquote"中'},
                "any": {"anyOf": [{"type": "string"}]},
                "inner": {"type": "object"},
            },
        },
    },
}
ODD = [
    ([{"role": "user", "content": "<tool_response>文</tool_response>"}, {"role": "user", "content": "b"}], [ODD_TOOL], True),
    ([{"role": "tool", "content": "文" * 12}, {"role": "user", "content": "<tool_response>" + "文" * 9}], None, None),
]


def test_the_template_is_the_tokenizers_own(tiny_tokenizer: BPETokenizer) -> None:
    """Guards: a model that answers worse in Ollama because its prompt has another shape."""
    assert first_difference(GO_TEMPLATE, tiny_tokenizer, CONVERSATIONS) is None
    template, how = choose_template(tiny_tokenizer)
    assert template == GO_TEMPLATE and f"{len(CONVERSATIONS)} conversations" in how


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("</think>\n\n{{ end }}{{ .Content }}", "</think>\n{{ end }}{{ .Content }}"),
        ("(gt $i $question) ", ""),
        ("{{ end }}{{ $rest = true }}{{ json $name }}: {{ json $value }}", "{{ end }}{{ json $name }}: {{ json $value }}"),
        ('{{- if ne $previous "tool" }}<|im_start|>user{{ end }}', "<|im_start|>user"),
        ("{{ if and .IsThinkSet (not .Think) }}", "{{ if false }}"),
        ("{{ if eq $i 0 }}", "{{ if eq $i 9 }}"),
    ],
)
def test_the_table_finds_a_changed_template(old: str, new: str, tiny_tokenizer: BPETokenizer) -> None:
    """Guards: a table of conversations that misses a part of the format."""
    assert old in GO_TEMPLATE
    assert first_difference(GO_TEMPLATE.replace(old, new), tiny_tokenizer, CONVERSATIONS)


def test_ollama_finds_the_tags() -> None:
    """Guards: thinking and tool calls that Ollama shows as text: it infers their tags from the text around these fields."""
    thinking, calls = GO_TEMPLATE.split("{{ .Thinking }}"), GO_TEMPLATE.split("{{- if .ToolCalls }}")
    assert len(thinking) == len(calls) == 2
    assert thinking[0].endswith("}}<think>\n") and thinking[1].startswith("\n</think>\n\n{{ end }}")
    assert calls[1].split("}}", 2)[2].startswith("\n<tool_call>{{ else }}")
    assert '"""' not in GO_TEMPLATE


def test_merged_messages_arrive_as_ollama_sends_them() -> None:
    """Guards: a table that hands over messages as no program ever would."""
    values = ollama_values([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}, *[{"role": "tool", "content": "r"}] * 2])
    assert [(m["Role"], m["Content"]) for m in values["Messages"]] == [("user", "a\n\nb"), ("tool", "r"), ("tool", "r")]
    assert not values["IsThinkSet"] and ollama_values([], enable_thinking=False)["IsThinkSet"]


def _imported(tokenizer: BPETokenizer, template: str) -> BPETokenizer:
    return BPETokenizer(tokenizer.backend, template)


CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are kind.<|im_end|>\n{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("default", ["You are kind.", ""])
def test_a_plain_chatml_template_is_recognised(default: str, tiny_tokenizer: BPETokenizer) -> None:
    """Guards: imported models without a template, or without the system turn that theirs inserts."""
    source = CHATML if default else CHATML.replace("<|im_start|>system\nYou are kind.<|im_end|>\n", "")
    template, how = choose_template(_imported(tiny_tokenizer, source))
    assert template and "tools and thinking are not carried over" in how
    asked = [{"role": "user", "content": "Hi"}]
    opening = f"<|im_start|>system\n{default}<|im_end|>\n" if default else ""
    assert render_go(template, ollama_values(asked)) == opening + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_another_template_is_left_out_with_a_word(tiny_tokenizer: BPETokenizer, tmp_path: Path, tiny_config: HaoAIConfig) -> None:
    """Guards: a ChatML template for a model that never saw ChatML."""
    source = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    template, how = choose_template(_imported(tiny_tokenizer, source))
    assert template is None and "not ChatML" in how
    save_pretrained(SmartHaoAI(tiny_config), tmp_path, tiny_tokenizer)
    text = modelfile(tmp_path, tiny_tokenizer, template, how)
    assert "\nTEMPLATE" not in text and "# No TEMPLATE: the chat template is not ChatML" in text


def test_parameters_follow_the_checkpoint(tmp_path: Path, tiny_config: HaoAIConfig, tiny_tokenizer: BPETokenizer) -> None:
    """Guards: Ollama's own defaults (a repeat penalty above 1, a 4096-token context) where the checkpoint says otherwise."""
    save_pretrained(SmartHaoAI(tiny_config), tmp_path, tiny_tokenizer)
    file = tmp_path / "generation_config.json"
    lines = modelfile(tmp_path, tiny_tokenizer, GO_TEMPLATE, "").splitlines()
    wanted = {"stop": '"<|im_end|>"', "temperature": "0.7", "top_p": "0.9", "top_k": "40", "repeat_penalty": "1", "num_ctx": "256"}
    assert all(f"PARAMETER {name} {value}" in lines for name, value in wanted.items())
    file.write_text(json.dumps({"do_sample": False, "repetition_penalty": 1.3}), encoding="utf-8")
    lines = modelfile(tmp_path, tiny_tokenizer, GO_TEMPLATE, "").splitlines()
    assert "PARAMETER temperature 0" in lines and "PARAMETER repeat_penalty 1.3" in lines
    file.write_text("[", encoding="utf-8")
    with pytest.raises(ValueError, match="generation_config.json is not readable JSON"):
        modelfile(tmp_path, tiny_tokenizer, GO_TEMPLATE, "")


def test_export(tmp_path: Path, tiny_model: SmartHaoAI, tiny_tokenizer: BPETokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a folder that Ollama cannot create a model from; a changed template that the check does not see."""
    pytest.importorskip("gguf")
    from tools.convert.ollama import check_ollama

    save_pretrained(tiny_model, tmp_path / "sft", tiny_tokenizer)
    out = tmp_path / "out"
    main(["ollama", str(tmp_path / "sft"), str(out), "--dtype", "f32"])
    printed = capsys.readouterr().out
    assert f"ollama create NAME -f {out / 'Modelfile'}" in printed and "not run" in printed and ".tmp" not in printed
    text = (out / "Modelfile").read_text(encoding="utf-8")
    assert "\nFROM ./model.gguf\n" in text and f'TEMPLATE """{GO_TEMPLATE}"""' in text and (out / "model.gguf").is_file()
    (out / "Modelfile").write_text(text.replace("<|im_start|>assistant", "<|im_start|>model"), encoding="utf-8")
    with pytest.raises(ValueError, match="the template differs from the tokenizer's: .*model"):
        check_ollama(tmp_path / "sft", out)


# ------------------------------------------------------------------------------------- the reader of Go templates


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("a  {{- .X -}}  b", "a1b"),
        ("{{/* note */}}a{{ `}}` }}", "a}}"),
        ("{{ if eq .X 2 }}two{{ else if eq .X 1 }}one{{ else }}more{{ end }}", "one"),
        ("{{ range .L }}{{ . }},{{ else }}none{{ end }}", "5,6,"),
        ("{{ range .E }}{{ . }}{{ else }}none{{ end }}", "none"),
        ("{{ range $k, $v := .M }}{{ $k }}={{ $v }};{{ end }}", "a=1;b=2;"),
        ("{{ $a := 1 }}{{ if .X }}{{ $a = 2 }}{{ $b := 3 }}{{ end }}{{ $a }}", "2"),
        ("{{ $a := 1 }}{{ if .X }}{{ $a := 2 }}{{ end }}{{ $a }}", "1"),
        ("{{ len .S }} {{ slice .S 3 }} {{ slice .S 0 3 }}", "6 文 中"),
        ("{{ or .N .X }} {{ and .N (index .L 9) }}{{ (index .P 0).Name }}", "1 falseJo"),
        ("{{ if or (not .X) .S }}y{{ end }}{{ if and .S .E }}n{{ end }}", "y"),
        ("{{ json .M }}{{ json .S }}", '{"a":1,"b":2}"中文"'),
    ],
)
def test_the_reader_follows_go(template: str, expected: str) -> None:
    """Guards: a check of the template by rules that Go does not have."""
    values = {"X": 1, "L": [5, 6], "E": [], "M": {"b": 2, "a": 1}, "S": "中文", "N": False, "P": [Struct(Name="Jo")]}
    assert render_go(template, values) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ end }}",
        "{{ if .X }}",
        "{{ .X",
        "{{ nofunc 1 }}",
        "{{ $a }}",
        "{{ $a = 1 }}",
        "{{ .P.Nme }}",
        '{{ define "a" }}{{ end }}',
        "{{ .X | len }}",
    ],
)
def test_the_reader_refuses_the_rest(template: str) -> None:
    """Guards: a template with a typing error that the check passes and Ollama refuses."""
    with pytest.raises(ValueError, match="the Go template"):
        render_go(template, {"X": 1, "P": Struct(Name="Jo")})


def test_json_is_gos() -> None:
    """Guards: JSON written with Python's spaces and without Go's escapes."""
    assert go_json({"b": "<中>", "a": [1, None, True]}) == '{"a":[1,null,true],"b":"\\u003c中\\u003e"}'


@pytest.mark.parametrize("template", [GO_TEMPLATE, PLAIN_CHATML.replace("DEFAULT", '<|im_start|>system\n{{ "" }}')])
def test_go_itself_gives_the_same(template: str, tmp_path: Path) -> None:
    """Guards: a template that only our reader understands. Runs where Go is installed."""
    go = shutil.which("go")
    if go is None:
        pytest.skip("needs the Go tools")
    conversations: list[Any] = [*CONVERSATIONS, *ODD]
    values = [ollama_values(*conversation) for conversation in conversations]
    (tmp_path / "main.go").write_text(GO_PROGRAM, encoding="utf-8")
    given = json.dumps({"Template": template, "Cases": values})
    ran = subprocess.run([go, "run", "main.go"], cwd=tmp_path, input=given, capture_output=True, encoding="utf-8", timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == [render_go(template, value) for value in values]


def test_the_plain_part_of_the_table_is_plain() -> None:
    """Guards: an imported template judged by conversations with tools or thinking."""
    assert all(not tools and thinking is None for _, tools, thinking in CONVERSATIONS[:PLAIN])
    assert not any("reasoning_content" in message for messages, _, _ in CONVERSATIONS[:PLAIN] for message in messages)
