"""Learning from preferences in one command: `python train_rlhf.py [data.preference_file=pairs.jsonl] [--resume]`.

Trains a reward model on pairs of answers (weight/reward), then improves the chat model's own answers by it with PPO (weight/ppo).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from train.config import FLAGS, PPOStageConfig, RewardStageConfig, RLHFConfig, UsageError, known_names, parse_command_line
from train.policy_stage import stage_prompts
from train.program import run_main
from train.stage import NEWEST, load_tokenizer, model_config, newest_model, open_out_dir, planned_adapter
from train.train_ppo import ppo
from train.train_reward import reward

FINISHED = "report.md"  # written at the end of a stage


def rlhf(settings: RLHFConfig, log: Callable[[str], object] = print) -> int:
    """Both stages in order. Returns the exit status of the first that did not end well, else 0."""
    first, second = settings.reward, settings.ppo
    same_start = first.model_dir == second.model_dir
    for stage in (first, second):
        for flag in FLAGS:
            setattr(stage, flag, getattr(settings, flag))
        if stage.model_dir == NEWEST:
            stage.model_dir = first.model_dir if same_start and stage is second else newest_model(stage)
        open_out_dir(stage)
    if Path(first.out_dir).resolve() == Path(second.out_dir).resolve():
        raise UsageError(f"reward.out_dir and ppo.out_dir are both {first.out_dir}: the second stage would replace the first one's result")
    # What is wrong with the second stage should not show after the first.
    tokenizer = load_tokenizer(second, log)
    planned_adapter(second, model_config(second, tokenizer))
    stage_prompts(second, tokenizer, log=lambda _: None)
    second.reward_model_dir = first.out_dir
    log(f"[1/2] reward model -> {first.out_dir}")
    if settings.resume and _finished(first.out_dir):
        log(f"{first.out_dir}: finished earlier, used as it is")
    else:
        status = reward(first, log)
        if status:
            return status
    if settings.dry_run and not _finished(first.out_dir):
        second.reward_model_dir = first.model_dir  # what it will begin as: the same size
    log(f"\n[2/2] PPO -> {second.out_dir}")
    if settings.resume and _finished(second.out_dir):
        log(f"{second.out_dir}: finished earlier")
        return 0
    return ppo(second, log)


def _finished(folder: str) -> bool:
    return (Path(folder) / FINISHED).is_file()


def for_stages(words: list[str]) -> list[str]:
    """Command-line words with every setting under the stage, or stages, that knows it."""
    stages = {"reward": RewardStageConfig(), "ppo": PPOStageConfig()}
    known = {stage: set(known_names(kind)) for stage, kind in stages.items()}
    expanded: list[str] = []
    for word in words:
        name, equals, value = word.partition("=")
        own = name.partition(".")[0]
        if not equals or name.startswith("-") or name in FLAGS or (own in stages and name not in known[own]):
            expanded.append(word)
        elif name == "out_dir":
            expanded += [f"{stage}.out_dir={Path(value) / stage}" for stage in stages]
        else:
            takers = [stage for stage in stages if name in known[stage] or own in known[stage]]
            takers = [stage for stage in takers if (stage, own) != ("reward", "lora")]  # it is trained as a whole
            expanded += [f"{stage}.{word}" for stage in takers] or [word]
    return expanded


def main() -> int:
    return rlhf(parse_command_line(RLHFConfig, for_stages(sys.argv[1:])))


if __name__ == "__main__":
    run_main(main, several=True)
