"""Distillation: `python -m train.train_distill [teacher_dir=weight/sft] [model.preset=nano] [distill.top_k=32]`.

A student learns, beside the data's own tokens, what a larger model of the same vocabulary finds likely at each of them. With
teacher_dir=none it learns from the texts alone: answers and thinking that any teacher wrote (`--preset traces`).
"""

from __future__ import annotations

from model.checkpoint import find_model, load_config
from model.config import HaoAIConfig
from model.tokenizer import BPETokenizer
from model.transformer import SmartHaoAI
from train.config import DistillStageConfig, UsageError, parse_command_line
from train.data import BatchSource, make_source
from train.distillation import CachedTeacher, Teacher, WeightedStructure, cache_folder, distillation_loss, shared_vocabulary, structure_ids
from train.loop import LossFunction
from train.losses import lm_loss
from train.program import run_main
from train.stage import (
    NEWEST,
    Log,
    begin,
    make_model,
    newest_model,
    next_token_evaluation,
    print_estimate,
    print_plan,
    run_stage,
)
from train.store import open_store
from train.train_pretrain import sample_continuations
from train.train_sft import sample_answers


def distill(settings: DistillStageConfig, log: Log = print) -> int:
    """Train a student (settings.model_dir, or a new model) on settings.teacher_dir's distributions. Returns the exit status."""
    if settings.teacher_dir == NEWEST:
        settings.teacher_dir = newest_model(settings, "teacher_dir")
    if settings.tokenizer_dir is None and settings.model_dir is None and settings.teacher_dir is not None:
        settings.tokenizer_dir = str(find_model(settings.teacher_dir))
    tokenizer, config = begin(settings, log)
    loss_fn: LossFunction = lm_loss if settings.teacher_dir is None else teacher_loss(settings, config, tokenizer, log)
    kind = settings.distill.data
    spec = settings.data.sft_file if kind == "sft" else settings.data.pretrain_file
    store = open_store(spec, tokenizer, kind, settings.data, log, val_share=0.0 if settings.data.val_file else None)
    source: BatchSource = make_source(store, settings, tokenizer.pad_token_id, log=log)
    if settings.distill.structure_weight != 1:
        source = WeightedStructure(source, structure_ids(tokenizer), settings.distill.structure_weight)
    beside = settings.teacher_dir if not settings.distill.top_k else None  # a cache needs it only for what is new
    frozen = 0 if beside is None else load_config(find_model(beside)).account().parameters
    print_plan(settings, config, source, store.summary(), log, frozen=frozen)
    if settings.dry_run:
        print_estimate(settings, make_model(settings, config), source, loss_fn, tokenizer, log)
        return 0
    model = make_model(settings, config)
    evaluate = next_token_evaluation(settings, store, tokenizer, log)
    sample = sample_answers if kind == "sft" else sample_continuations
    facts = {"teacher": settings.teacher_dir or "the texts alone"}
    return run_stage(settings, tokenizer, model, source, loss_fn, evaluate, sample, data=store.origin(), facts=lambda: facts, log=log)


def teacher_loss(settings: DistillStageConfig, student: HaoAIConfig, tokenizer: BPETokenizer, log: Log = print) -> LossFunction:
    """The loss against settings.teacher_dir, which is loaded now, or with distill.top_k when the cache lacks a document.

    Raises ValueError for a teacher of another vocabulary, UsageError for one whose context is too short.
    """
    assert settings.teacher_dir is not None
    folder, options = find_model(settings.teacher_dir), settings.distill
    shape = load_config(folder)
    shared_vocabulary(tokenizer, folder)
    if settings.data.max_length > shape.max_position_embeddings:
        raise UsageError(
            f"data.max_length={settings.data.max_length} exceeds the context of the teacher {folder}, {shape.max_position_embeddings}"
        )
    size = min(student.vocab_size, shape.vocab_size)
    if options.top_k >= size:
        raise UsageError(f"distill.top_k={options.top_k} must be smaller than the vocabulary of {size}")
    log(f"teacher {folder}: {shape.account().parameters:,} parameters; {options.kind}, {options.alpha:.0%} of the loss")

    def load() -> Teacher:
        return Teacher(SmartHaoAI.from_pretrained(folder), size, options.temperature)

    if not options.top_k:
        return distillation_loss(options, load())
    cache = CachedTeacher(
        cache_folder(settings.data.store_dir, folder, size, options.temperature, options.top_k),
        load,
        size,
        options.temperature,
        options.top_k,
    )
    log(f"its {options.top_k} most probable tokens are kept in {cache.folder}: {len(cache):,} documents so far")
    return distillation_loss(options, cache)


def main() -> int:
    return distill(parse_command_line(DistillStageConfig))


if __name__ == "__main__":
    run_main(main, several=True)
