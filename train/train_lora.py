"""Fine-tuning by a LoRA adapter: `python -m train.train_lora [data.sft_file=chats.jsonl] [model_dir=weight/sft] [lora.r=16]`.

The same data, loss and loop as SFT; what learns is a small adapter (model/lora.py) beside the frozen checkpoint. weight/lora then holds
PEFT's files and stands for the whole model: chat with it, evaluate or export it, or write it out with `tools.convert merge-lora`.
"""

from __future__ import annotations

from collections.abc import Callable

from train.config import LoRAStageConfig, parse_command_line
from train.program import run_main
from train.stage import run_lm_stage
from train.train_sft import sample_answers


def lora(settings: LoRAStageConfig, log: Callable[[str], object] = print) -> int:
    """Train an adapter for settings.model_dir on conversations. Returns the exit status."""
    return run_lm_stage(settings, "sft", settings.data.sft_file, sample_answers, log)


def main() -> int:
    return lora(parse_command_line(LoRAStageConfig))


if __name__ == "__main__":
    run_main(main, several=True)
