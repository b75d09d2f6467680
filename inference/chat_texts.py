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
    "thinking_now": ("思考中…", "thinking…"),
    "thought": (
        "（思考了 {count} 个字符；--show-thinking 可显示）",
        "(thought for {count} characters; --show-thinking shows them)",
    ),
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
    "steps_used": (
        "（平均每个词元用了 {mean:.1f} 个推理步，最多 {steps}）",
        "(a mean of {mean:.1f} reasoning steps a token, at most {steps})",
    ),
    "steps_none": (
        "这个模型没有推理头，没有推理步数可设（/thinking 是另一回事：用文字思考）。",
        "This model has no reasoning head, so there are no steps to set (/thinking is another thing: thinking in words).",
    ),
    "steps_bad": (
        "/steps 接受步数（1 或更大的整数），后面可加阈值（0 到 1，不含 1），而不是 {value}",
        "/steps takes a number of steps from 1 and, behind it, a threshold from 0 to below 1, not {value}",
    ),
    "file_missing": ("请写出文件名：{command} 文件", "name a file: {command} FILE"),
    "saved": ("已保存 {count} 条消息到 {path}", "saved {count} messages to {path}"),
    "foreign": (
        "{path} 已存在且不是保存的对话，换一个名字吧",
        "{path} exists and is not a saved conversation; choose another name",
    ),
    "loaded": ("已载入 {count} 条消息：{path}", "loaded {count} messages from {path}"),
    "no_file": ("没有文件 {path}", "there is no file {path}"),
    "not_chat": ("{path} 不是保存的对话：{reason}", "{path} is not a saved conversation: {reason}"),
    "unknown": ("没有命令 {command}{nearest}。可用：{known}", "there is no command {command}{nearest}. Known: {known}"),
    "nearest": ("（是不是 {name}？）", " (did you mean {name}?)"),
    "help": (
        """命令（行首的 clear、quit、stream、help 单独成行时也可不加斜杠）：
  /help            显示本说明
  /stream          切换逐字显示
  /clear           清空对话
  /system [文字]   查看或设置系统提示词；/system clear 取消
  /thinking [模式] 查看或设置思考：auto、on、off
  /adapter [名称]  查看或切换 LoRA 适配器；/adapter off 只用模型本身
  /steps [N [P]]   查看或设置推理头的步数；把握超过 P 时提前停止（0 为不提前）
  /save 文件       保存对话（JSON）
  /load 文件       载入对话
  /quit            退出
换行：Alt-Enter，或行尾写反斜杠。Ctrl-C 停止回答，连按两次退出；Ctrl-D 退出。""",
        """Commands (clear, quit, stream and help also work without the slash, alone on a line):
  /help             show this
  /stream           switch streaming on or off
  /clear            forget the conversation
  /system [TEXT]    show or set the system text; /system clear removes it
  /thinking [MODE]  show or set thinking: auto, on, off
  /adapter [NAME]   show or switch the LoRA adapter; /adapter off: the model alone
  /steps [N [P]]    show or set the steps of the reasoning head; a token surer than P takes fewer (0: none does)
  /save FILE        save the conversation (JSON)
  /load FILE        continue a saved conversation
  /quit             leave
New line: Alt-Enter, or a backslash at the end. Ctrl-C stops the answer, twice quits; Ctrl-D quits.""",
    ),
}
