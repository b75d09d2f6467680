"""Preference optimisation: `python -m train.train_dpo [dpo.loss=dpo|ipo|simpo|orpo|kto] [dpo.beta=0.1] [data.preference_file=pairs.jsonl]`.

The model learns which of two answers is preferred, held to the model that it starts from. dpo and ipo compare a pair, kto judges
answers one by one; their reference log-probabilities are computed once. simpo and orpo need no reference.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.transformer import SmartHaoAI
from train import losses
from train.config import DPO_BETAS, DPOConfig, DPOStageConfig, parse_command_line
from train.data import Batch
from train.log_probs import completion_log_probs
from train.losses import Term
from train.metrics import METRICS_FILE, held_out_terms, read_jsonl
from train.pairs import pair_metrics, pair_source, share_right
from train.program import run_main
from train.reference import reference_log_probs
from train.runtime import Precision, device_name
from train.stage import begin, held_out_store, make_model, print_estimate, print_plan, run_stage
from train.statistics import wilson
from train.store import open_store
from train.train_sft import sample_answers

WITHOUT_REFERENCE = ("simpo", "orpo")
OF_MEANS = ("ipo", "simpo", "orpo")  # losses of log-probabilities per token


def dpo(settings: DPOStageConfig, log: Callable[[str], object] = print) -> int:
    """Preference optimisation of settings.model_dir. Returns the exit status."""
    tokenizer, config = begin(settings, log)
    kind = "judged" if settings.dpo.loss == "kto" else "preference"
    share = 0.0 if settings.data.val_file else None
    store = open_store(settings.data.preference_file, tokenizer, kind, settings.data, log, val_share=share)
    source = pair_source(store, settings, tokenizer.pad_token_id, log=log)
    print_plan(settings, config, source, store.summary(), log)
    references: dict[str, Tensor] = {}

    def loss_of(part: str) -> Callable[[torch.nn.Module, Batch], list[Term]]:
        return lambda model, batch: preference_terms(model, batch, settings.dpo, references.get(part))

    if settings.dry_run:
        print_estimate(settings, make_model(settings, config), source, loss_of("train"), tokenizer, log)
        return 0
    model = make_model(settings, config)
    held_out = held_out_store(settings, store, tokenizer, log)
    measured = None if held_out is None else pair_source(held_out[0], settings, tokenizer.pad_token_id, held_out[1])
    batches = [] if measured is None else measured.first_batches(settings.train.eval_tokens)
    device = device_name(settings.train.device)

    def prepare(model: SmartHaoAI, precision: Precision) -> None:
        if settings.dpo.loss in WITHOUT_REFERENCE:
            return
        references["train"] = reference_log_probs(model, source, precision, log=log)
        if measured is not None:
            references["held out"] = reference_log_probs(model, measured, precision, training=False, log=log)

    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        return held_out_terms(model, batches, loss_of("held out"), device)

    def facts() -> dict[str, Any]:
        found = {"preference loss": f"{settings.dpo.loss}, beta {beta_of(settings.dpo):g}"}
        if batches:
            pairs = round(sum(batch.weights["pairs"] for batch in batches))
            rows = read_jsonl(Path(settings.out_dir) / METRICS_FILE)
            last = next(row["val_accuracy"] for row in reversed(rows) if row.get("val_accuracy") is not None)
            low, high = wilson(round(last * pairs), pairs)
            found["held-out accuracy, 95% interval"] = f"{low:.3f} to {high:.3f} ({pairs:,} {'answers' if kind == 'judged' else 'pairs'})"
        return found

    return run_stage(
        settings,
        tokenizer,
        model,
        source,
        loss_of("train"),
        evaluate if batches else None,
        sample_answers,
        data=store.origin(),
        prepare=prepare,
        facts=facts,
        log=log,
    )


def preference_terms(model: torch.nn.Module, batch: Batch, dpo: DPOConfig, reference: Tensor | None) -> list[Term]:
    """The loss of a batch of `train.pairs`, summed over its pairs (kto: answers), and what is logged beside it.

    reference (documents,): log-probability of each answer under the reference; None: the model is its own, as before the first step.
    accuracy: share of pairs whose chosen answer has the higher reward, ties count half. margin: chosen - rejected reward; rewards
    are beta times the log-ratio to the reference (simpo, orpo: beta times the mean log-probability). drift: by how many nats a
    token the answers' log-probabilities have left the reference's, either way.
    """
    beta, found = beta_of(dpo), completion_log_probs(model, batch.inputs)
    sums, lengths = found.sums(), found.lengths().clamp(min=1)
    ref = sums.detach() if reference is None else reference[batch.extra["documents"].cpu()].to(sums.device)
    shift = (sums - ref).detach()
    if dpo.loss == "kto":
        terms = _judged_terms(sums, ref, batch.extra["wanted"], beta, dpo)
        shift = shift[::2]
    else:
        values, ref_values = (sums / lengths, ref / lengths) if dpo.loss in OF_MEANS else (sums, ref)
        terms = _pair_terms(values, ref_values, beta, dpo)
        if dpo.nll_coef and dpo.loss != "orpo":  # which has it
            # Iterative reasoning preference optimisation (Pang et al., 2024).
            terms.append(Term("nll_loss", -dpo.nll_coef * (sums / lengths)[::2].sum(), "pairs"))
    if dpo.loss not in WITHOUT_REFERENCE:
        terms.append(Term("drift", shift.abs().sum(), "tokens", metric=True))
    if found.aux_loss is not None:
        terms.append(Term("aux_loss", found.aux_loss, "micro_batches"))
    return terms


def beta_of(dpo: DPOConfig) -> float:
    return dpo.beta or DPO_BETAS[dpo.loss]


def _pair_terms(values: Tensor, ref: Tensor, beta: float, dpo: DPOConfig) -> list[Term]:
    """values, ref (S,): sums of log-probabilities, or means, as the loss wants them."""
    chosen, rejected, ref_chosen, ref_rejected = values[::2], values[1::2], ref[::2], ref[1::2]
    if dpo.loss == "dpo":
        each = losses.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, dpo.label_smoothing)
    elif dpo.loss == "ipo":
        each = losses.ipo_loss(chosen, rejected, ref_chosen, ref_rejected, beta)
    elif dpo.loss == "simpo":
        each = losses.simpo_loss(chosen, rejected, beta, dpo.gamma, dpo.label_smoothing)
    else:
        each = losses.orpo_loss(chosen, rejected, beta)
    rewards = beta * (values.detach() if dpo.loss in WITHOUT_REFERENCE else (values - ref).detach())
    return [Term("loss", each.sum(), "pairs"), *pair_metrics(rewards)]


def _judged_terms(sums: Tensor, ref: Tensor, wanted: Tensor, beta: float, dpo: DPOConfig) -> list[Term]:
    """Answers stand at even places; behind each, the one to another prompt, on which the drift from the reference is estimated."""
    kl = losses.kto_kl(sums[1::2], ref[1::2])
    each = losses.kto_loss(sums[::2], ref[::2], wanted, kl, beta, dpo.wanted_weight, dpo.unwanted_weight)
    rewards = beta * (sums - ref).detach()[::2]
    right = share_right(torch.where(wanted, 1.0, -1.0) * (rewards - beta * kl))
    return [
        Term("loss", each.sum(), "pairs"),
        Term("accuracy", right.sum(), "pairs", metric=True),
        Term("chosen_reward", rewards[wanted].sum(), "wanted", metric=True),
        Term("rejected_reward", rewards[~wanted].sum(), "unwanted", metric=True),
        Term("kl", kl, "micro_batches", metric=True),
    ]


def main() -> int:
    return dpo(parse_command_line(DPOStageConfig))


if __name__ == "__main__":
    run_main(main, several=True)
