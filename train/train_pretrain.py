"""Pretraining: `python -m train.train_pretrain [--preset nano] [data.pretrain_file=corpus.jsonl] [train.max_steps=200]`."""

from __future__ import annotations

from collections.abc import Callable

from model.tokenizer import BPETokenizer
from model.transformer import SmartHaoAI
from train.config import PretrainConfig, parse_command_line
from train.program import run_main
from train.stage import run_lm_stage

SAMPLE_BEGINNINGS = ("从前，", "Once upon a time, ", "今天")


def pretrain(settings: PretrainConfig, log: Callable[[str], object] = print) -> int:
    """Learn from text, starting from random weights or settings.model_dir. Returns the exit status."""
    return run_lm_stage(settings, "pretrain", settings.data.pretrain_file, sample_continuations, log)


def sample_continuations(model: SmartHaoAI, tokenizer: BPETokenizer) -> list[tuple[str, str]]:
    """(beginning, continuation) pairs that show what the model has learned; what a very short context cannot hold is left out."""
    from inference import Engine, SamplingSettings

    encoded = {text: [*tokenizer.document_start(), *tokenizer.encode(text)] for text in SAMPLE_BEGINNINGS}
    prompts = {text: ids for text, ids in encoded.items() if len(ids) < model.config.max_position_embeddings}
    settings = SamplingSettings(max_new_tokens=60, temperature=0.7, top_p=0.9, seed=0, eos_token_id=tokenizer.document_end_id)
    answers = Engine(model, tokenizer).generate(list(prompts.values()), settings) if prompts else []
    return [(prompt, completions[0].text) for prompt, completions in zip(prompts, answers, strict=True)]


def main() -> int:
    return pretrain(parse_command_line(PretrainConfig))


if __name__ == "__main__":
    run_main(main, several=True)
