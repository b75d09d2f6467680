"""Supervised fine-tuning: `python -m train.train_sft [data.sft_file=chats.jsonl] [model_dir=weight/pretrain]`.

The same loop and loss as pretraining; only the assistant's words carry labels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from model.tokenizer import BPETokenizer
from model.transformer import SmartHaoAI
from train.config import SFTConfig, parse_command_line
from train.program import run_main
from train.stage import run_lm_stage

if TYPE_CHECKING:
    from inference.engine import Completion

SAMPLE_QUESTIONS = ("你好！", "Who are you?", "3 + 5 = ?", "给我讲个故事。")


def sft(settings: SFTConfig, log: Callable[[str], object] = print) -> int:
    """Fine-tune settings.model_dir on conversations. Returns the exit status."""
    return run_lm_stage(settings, "sft", settings.data.sft_file, sample_answers, log)


def sample_answers(model: SmartHaoAI, tokenizer: BPETokenizer) -> list[tuple[str, str]]:
    """(question, answer) pairs, thinking included, greedy; questions that a very short context cannot hold are left out."""
    from inference import Engine, SamplingSettings

    def spoken(completion: Completion) -> str:
        return (f"({completion.reasoning.strip()}) " if completion.reasoning.strip() else "") + completion.text

    rendered = {q: tokenizer.render([{"role": "user", "content": q}], add_generation_prompt=True).ids for q in SAMPLE_QUESTIONS}
    prompts = {q: ids for q, ids in rendered.items() if len(ids) < model.config.max_position_embeddings}
    settings = SamplingSettings(max_new_tokens=120, temperature=0.0)
    answers = Engine(model, tokenizer).generate(list(prompts.values()), settings) if prompts else []
    return [(question, spoken(completions[0])) for question, completions in zip(prompts, answers, strict=True)]


def main() -> int:
    return sft(parse_command_line(SFTConfig))


if __name__ == "__main__":
    run_main(main, several=True)
