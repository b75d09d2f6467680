"""The reward model: `python -m train.train_reward [data.preference_file=pairs.jsonl] [model_dir=weight/sft]`.

The trunk of a chat model with a score for a head learns which of two answers is preferred (Bradley and Terry, 1952; Ouyang et al.,
2022). What it is worth on held-out pairs stands in report.md and reward.png.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from model.reward import RewardModel
from train.config import RewardModelConfig, RewardStageConfig, parse_command_line
from train.data import Batch
from train.losses import Term, reward_loss
from train.metrics import held_out_terms
from train.pairs import pair_metrics, pair_source
from train.program import run_main
from train.reward_report import plot_reward, reward_facts, score_pairs
from train.runtime import device_name, only_for_show
from train.stage import Log, begin, held_out_store, make_model, print_estimate, print_plan, run_stage
from train.store import open_store


def reward(settings: RewardStageConfig, log: Log = print) -> int:
    """Train a reward model from settings.model_dir on preference pairs. Returns the exit status."""
    tokenizer, config = begin(settings, log)
    share = 0.0 if settings.data.val_file else None
    store = open_store(settings.data.preference_file, tokenizer, "preference", settings.data, log, val_share=share)
    source = pair_source(store, settings, tokenizer.pad_token_id, log=log)
    loss = partial(reward_terms, settings=settings.reward)
    print_plan(settings, config, source, store.summary(), log)
    if settings.dry_run:
        print_estimate(settings, make_model(settings, config, RewardModel), source, loss, tokenizer, log)
        return 0
    model = make_model(settings, config, RewardModel)
    held_out = held_out_store(settings, store, tokenizer, log)
    if held_out is None:
        return run_stage(settings, tokenizer, model, source, loss, data=store.origin(), log=log)
    device = device_name(settings.train.device)
    held_out_source = pair_source(held_out[0], settings, tokenizer.pad_token_id, held_out[1])
    batches = held_out_source.first_batches(settings.train.eval_tokens)

    def facts() -> dict[str, Any]:
        pairs = score_pairs(model, held_out_source.one_pass(), device)
        with only_for_show("reward.png"):
            plot_reward(pairs, Path(settings.out_dir) / "reward.png", settings.out_dir)
        found = reward_facts(pairs)
        for name, value in found.items():
            log(f"  {name}: {value}")
        return found

    return run_stage(
        settings,
        tokenizer,
        model,
        source,
        loss,
        lambda model: held_out_terms(model, batches, loss, device),
        data=store.origin(),
        facts=facts,
        log=log,
    )


def reward_terms(model: torch.nn.Module, batch: Batch, settings: RewardModelConfig) -> list[Term]:
    """The pairwise loss of a batch of `train.pairs`, summed over its pairs, and what is logged beside it."""
    assert isinstance(model, RewardModel)
    scores = model(batch.inputs["input_ids"], segment_ids=batch.inputs["segment_ids"])
    losses = reward_loss(scores[::2], scores[1::2], settings.margin_coef * batch.extra["margins"], settings.centre_coef)
    terms = [Term("loss", losses.sum(), "pairs"), *pair_metrics(scores)]
    aux_loss = model.take_aux_loss()
    if aux_loss is not None:
        terms.append(Term("aux_loss", aux_loss, "micro_batches"))
    return terms


def main() -> int:
    return reward(parse_command_line(RewardStageConfig))


if __name__ == "__main__":
    run_main(main, several=True)
