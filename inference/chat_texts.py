"""Everything that chat.py says, in Chinese and English."""

from __future__ import annotations

# Each entry is (Chinese, English).
TEXTS: dict[str, tuple[str, str]] = {
    "about": ("与训练好的模型对话。", "Talk to a trained model."),
    "opt_model": (
        "模型目录；默认取 weight/ 中最新完成的阶段",
        "model directory; default: the newest finished stage in weight/",
    ),
    "opt_system": ("系统提示词", "system text"),
    "opt_temperature": ("采样温度，0 为贪心", "sampling temperature, 0 is greedy"),
    "opt_top_k": ("只保留最可能的 k 个词元，0 为不限", "keep the k likeliest tokens, 0 keeps all"),
    "opt_top_p": ("核采样的概率 p", "probability p of nucleus sampling"),
    "opt_repetition": ("重复惩罚，1 为关闭", "repetition penalty, 1 is off"),
    "opt_max": ("一次回答最多生成的词元数", "most tokens of one answer"),
    "opt_seed": ("随机种子，相同则回答相同", "random seed; equal seeds give equal answers"),
    "opt_lang": ("界面语言", "language of the interface"),
    "opt_no_stream": ("回答完整后再显示", "show the answer only when it is complete"),
    "opt_thinking": (
        "思考：auto 由模型决定，on 总是，off 从不",
        "thinking: auto lets the model decide, on always, off never",
    ),
    "opt_steps": (
        "推理头的步数；默认与训练时相同",
        "latent steps of the reasoning head; default: as in training",
    ),
    "opt_halt": (
        "把握超过此值（0 到 1）的词元提前停止推理，0 为不提前",
        "a token that is surer than this (0 to 1) takes no more steps; 0: all take all",
    ),
    "opt_show": ("完整显示思考过程", "show the thinking in full"),
    "opt_device": ("设备，如 cpu、cuda、mps", "device, such as cpu, cuda, mps"),
    "opt_quantize": (
        "CPU 上更快的权重形式：auto 为 fp32 与 bf16 中较快者，int8、int4 占内存最少",
        "weights in a faster form on a CPU: auto is the faster of fp32 and bf16; int8 and int4 take the least memory",
    ),
    "opt_compile": (
        "CPU 上把每一步编译成一个整体（需要 C++ 编译器；首次启动慢半分钟），单个回复约快 1.6 倍",
        "on a CPU: compile a step as a whole (needs a C++ compiler; half a minute at the first start); a reply is about 1.6x as fast",
    ),
    "compiling": ("正在编译（首次约半分钟）……", "compiling (half a minute the first time) ..."),
    "opt_help": ("显示本说明并退出", "show this help and exit"),
    "found": ("使用 {path}（最新完成的阶段）", "using {path} (the newest finished stage)"),
    "base": (
        "这是预训练模型：它续写文字，还没有学过对话。",
        "This is a pretrained model: it continues text and has not learnt to chat yet.",
    ),
    "none": (
        (
            "weight/ 里还没有模型。先训练一个：python train_smart.py（全部阶段），或 python -m train.train_pretrain 再 "
            "python -m train.train_sft；已有模型请用 --model 目录。"
        ),
        (
            "there is no model in weight/ yet. Train one: python train_smart.py (all stages), or "
            "python -m train.train_pretrain, then python -m train.train_sft; name a model elsewhere with --model DIR."
        ),
    ),
    "ready": (
        "{path} · {size:.1f}M 参数 · {device}。输入 /help 查看命令。",
        "{path} · {size:.1f}M parameters · {device}. /help lists the commands.",
    ),
    "you": ("你> ", "You> "),
    "length": ("（到达长度上限，回答被截断）", "(the answer was cut off at the length limit)"),
    "stopped": ("（已停止；再按一次 Ctrl-C 退出）", "(stopped; press Ctrl-C again to quit)"),
    "again": ("（再按一次 Ctrl-C 退出，或输入 /quit）", "(press Ctrl-C again to quit, or type /quit)"),
    "dropped": (
        "（对话超出上下文，最早的 {count} 轮不再送给模型）",
        "(the conversation outgrew the context: the oldest {count} turns are no longer shown to the model)",
    ),
    "stream_on": ("逐字显示：开", "streaming: on"),
    "stream_off": ("逐字显示：关", "streaming: off"),
    "cleared": ("对话已清空。", "The conversation is cleared."),
    "bye": ("再见！", "Goodbye!"),
    "system_is": ("系统提示词：{text}", "system text: {text}"),
    "system_none": ("没有系统提示词。用 /system 文字 设置。", "There is no system text. Set one with /system TEXT."),
    "system_set": ("系统提示词已设置（/system clear 取消）。", "The system text is set (/system clear removes it)."),
    "system_off": ("系统提示词已取消。", "The system text is removed."),
    "thinking_is": ("思考：{value}（可选 auto、on、off）", "thinking: {value} (choose auto, on or off)"),
    "thinking_bad": ("/thinking 只接受 auto、on、off，而不是 {value}", "/thinking takes auto, on or off, not {value}"),
    "adapter_is": ("适配器：{name}（可选 {known}，或任意目录）", "adapter: {name} (choose {known}, or any folder)"),
    "adapter_missing": ("{reason}。可用的适配器：{known}", "{reason}. Known adapters: {known}"),
    "steps_all": ("推理步数：{steps}，不提前停止", "reasoning steps: {steps}, all taken"),
    "steps_halt": (
        "推理步数：最多 {steps}，把握超过 {halt:g} 时提前停止",
        "reasoning steps: at most {steps}, fewer once a token is surer than {halt:g}",
    ),
    "steps_none": (
        "这个模型没有推理头，没有推理步数可设（/thinking 是另一回事：用文字思考）。",
        "This model has no reasoning head, so there are no steps to set (/thinking is another thing: thinking in words).",
    ),
    "steps_bad": (
        "/steps 接受步数（1 或更大的整数），后面可加阈值（0 到 1，不含 1），而不是 {value}",
        "/steps takes a number of steps from 1 and, behind it, a threshold from 0 to below 1, not {value}",
    ),
    "saved": ("已保存 {count} 条消息到 {path}", "saved {count} messages to {path}"),
    "loaded": ("已载入 {count} 条消息：{path}", "loaded {count} messages from {path}"),
    "no_file": ("没有文件 {path}", "there is no file {path}"),
    "unknown": ("没有命令 {command}{nearest}。/help 列出全部命令。", "there is no command {command}{nearest}. /help lists them all."),
    "nearest": ("（是不是 {name}？）", " (did you mean {name}?)"),
    "file_missing": ("请写出文件或目录：{command} 名称", "name a file or folder: {command} NAME"),
    "thinking_now": ("思考中… {count} 字", "thinking… {count} characters"),
    "thought": ("（思考了 {count} 个字；/think 可显示）", "(thought for {count} characters; /think shows them)"),
    "voting": ("（生成 {votes} 个回答，取最多的一个…）", "(drawing {votes} answers; the most frequent one is taken…)"),
    "think_show": ("思考过程：完整显示", "the thinking is shown in full"),
    "think_fold": ("思考过程：折叠成一行", "the thinking is folded to one line"),
    "think_none": ("上一个回答没有思考。", "The last answer came without thinking."),
    "think_bad": ("/think 只接受 show、fold，而不是 {value}", "/think takes show or fold, not {value}"),
    "figures": ("{tokens} 个词元 · {rate:.1f} 词元/秒 · {seconds:.1f} 秒", "{tokens} tokens · {rate:.1f} tokens/s · {seconds:.1f} s"),
    "steps_used": ("平均每个词元 {mean:.1f} 个推理步，最多 {steps}", "a mean of {mean:.1f} reasoning steps a token, at most {steps}"),
    "confidence": ("把握 {share:.0%}", "confidence {share:.0%}"),
    "votes": ("得票：{votes}", "votes: {votes}"),
    "template_used": ("模板 {name}（{reason}）", "template {name} ({reason})"),
    "status_thinking_on": ("思考", "thinking"),
    "status_thinking_off": ("不思考", "no thinking"),
    "status_reasoning": ("推理 ×{votes}", "reasoning ×{votes}"),
    "status_memory": ("记忆 {profile}", "memory {profile}"),
    "status_template": ("模板 {name}", "template {name}"),
    "status_tools": ("{count} 个工具", "{count} tools"),
    "status_whole": ("不逐字", "answers whole"),
    "status_rate": ("{rate:.0f} 词元/秒", "{rate:.0f} tokens/s"),
    "set_bad": ("没有设置 {name}{nearest}。可选：{known}", "there is no setting {name}{nearest}. Known: {known}"),
    "retry_greedy": (
        "（温度为 0 时回答总是相同，这次用温度 {temperature:g}）",
        "(at temperature 0 the answer would be the same: this one is drawn at {temperature:g})",
    ),
    "undone": ("已撤回：{text}", "taken back: {text}"),
    "edit_missing": ("请写出新的问题：/edit 文字", "write the new question: /edit TEXT"),
    "feedback": ("谢谢！已写入 {files}", "Thank you! Written to {files}"),
    "answer_number": ("—— 回答 {number} ——", "—— answer {number} ——"),
    "compare_pick": ("哪个更好？1、2，或回车不选 > ", "which is better? 1, 2, or Enter for neither > "),
    "compare_same": ("两个回答相同，没有可记的。", "The two answers are the same: there is nothing to note."),
    "compare_calls": (
        "已留下您选的回答；两个回答的工具结果不同，因此没有记录。",
        "The one you picked stays; nothing is noted, since the tools told the two answers different things.",
    ),
    "compare_none": ("没有记录；第二个回答留在对话里。", "Nothing is noted; the second answer stays in the conversation."),
    "reasoning_on": (
        "推理：开（表决 {votes}，思考上限 {budget}，计算器 {calculator}）",
        "reasoning: on (votes {votes}, thinking budget {budget}, calculator {calculator})",
    ),
    "reasoning_off": ("推理：关", "reasoning: off"),
    "reasoning_bad": (
        "/reasoning 接受 on、off、votes N、budget N、calculator、steps 问题、picture 文件，而不是 {value}",
        "/reasoning takes on, off, votes N, budget N, calculator, steps QUESTION or picture FILE, not {value}",
    ),
    "reasoning_question": ("请写出问题：/reasoning steps 问题", "write the question: /reasoning steps QUESTION"),
    "reasoning_no_path": ("还没有分步求解：先用 /reasoning steps 问题", "nothing was solved in steps yet: /reasoning steps QUESTION"),
    "reasoning_picture": ("已画好：{path}", "drawn: {path}"),
    "solving": ("分步求解…", "solving step by step…"),
    "memory_on": ("记忆：开（{profile}，{file}）", "memory: on ({profile}, {file})"),
    "memory_off": (
        "记忆：关；不记也不查，已有的保留在 {file}（{profile}）",
        "memory: off; nothing is stored or recalled, {file} ({profile}) stays as it is",
    ),
    "memory_empty": ("没有记忆。", "Nothing is remembered."),
    "memory_forgot": ("已忘记第 {number} 条。", "memory {number} is forgotten"),
    "memory_profile": ("记忆档案：{name}（已有 {known}）", "memory profile: {name} (known: {known})"),
    "memory_sure": ("删除 {profile} 的全部记忆？", "erase all memories of {profile}?"),
    "yes_no": ("（是/否）", "(yes/no)"),
    "memory_erased": ("已删除 {count} 条记忆。", "{count} memories are erased"),
    "memory_exported": ("已导出 {count} 条记忆到 {path}", "{count} memories are written to {path}"),
    "memory_bad": (
        "/memory 接受 on、off、list、forget N、edit N 文字、profile 名称、erase、export 文件，而不是 {value}",
        "/memory takes on, off, list, forget N, edit N TEXT, profile NAME, erase or export FILE, not {value}",
    ),
    "template_is": ("模板：{name}", "template: {name}"),
    "template_off": ("模板：关", "template: off"),
    "template_bad": ("没有模板 {value}{nearest}。可选：{known}", "there is no template {value}{nearest}. Known: {known}"),
    "rag": ("检索还没有安装：/rag 目前不能使用。", "retrieval is not installed yet: /rag cannot be used for now"),
    "tools_on": ("工具：开（{names}）", "tools: on ({names})"),
    "tools_large": (
        "（工具的说明占 {tokens} 个词元，模型的上下文只有 {context}：留给对话的不多了）",
        "(the description of the tools takes {tokens} tokens of the model's context of {context}: little is left for the conversation)",
    ),
    "tools_off": ("工具：关（可用 {names}）", "tools: off (there are {names})"),
    "tools_too_large": (
        "工具的说明有 {tokens} 个词元，模型的上下文只有 {context}：这个模型用不了这些工具。",
        "the description of the tools has {tokens} tokens, the model's context only {context}: this model cannot be given them",
    ),
    "files_on": (
        "文件：{root}（/files do 要求，例如 /files do 按类型整理；改动前总会先问您）",
        "files: {root} (/files do REQUEST, such as /files do organize by type; you are asked before anything is changed)",
    ),
    "files_off": ("文件：关", "files: off"),
    "model_fixed": ("这里不能更换模型。", "the model cannot be changed here"),
    "help_head": ("命令：", "Commands:"),
    "help_foot": (
        """{bare}
单独成行时也可以不加斜杠。
换行：Alt-Enter、行尾写反斜杠，或把几行放在两个 \"\"\" 之间。
Tab 补全命令，↑ 找回输入过的内容。Ctrl-C 停止回答，连按两次退出；Ctrl-D 退出。""",
        """{bare}
also work without the slash, alone on a line.
A new line: Alt-Enter, a backslash at the end, or several lines between two \"\"\".
Tab completes commands, ↑ brings lines back.
Ctrl-C stops the answer, twice quits; Ctrl-D quits.""",
    ),
    "opt_prompt": ("只回答这一句就退出；- 表示整个标准输入", "answer this and leave; - is all of standard input"),
    "opt_json": ("每个回答输出一行 JSON", "one JSON object a line for each answer"),
    "opt_memory": ("打开记忆，存放在这个文件", "switch the memory on, kept in this file"),
    "opt_feedback": ("/good、/bad、/compare 的数据放在这个目录下", "folder below which /good, /bad and /compare write"),
    "opt_template": ("提示模板的名称，或 auto 自动选择", "name of a prompt template, or auto to choose one"),
    "opt_templates": ("自己的提示模板（YAML）", "prompt templates of your own (YAML)"),
    "opt_tools": ("让模型使用工具", "let the model use tools"),
    "opt_reasoning": ("推理：这么多次思考后表决", "reason: this many thoughts vote"),
}
