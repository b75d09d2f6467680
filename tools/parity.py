"""Does a checkpoint mean the same here and in transformers? Small random models of every architecture, compared in both directions.

    python -m tools.parity [--json] [--seed N] [--only mixtral ...]

One row a case: the largest difference of a logit over the largest logit when transformers reads our files and when we read its
files, greedy continuations, decoding with the cache against the whole sequence at once, and the number of parameters. The exit status
is 1 when a row exceeds its limit. Seeds are fresh unless given, and printed.

Routers choose, and choices between equals are not reproducible: where two experts of a token lie within 1e-5 of each other (or, for
greedy continuations, two tokens within the limit), the next seed is taken. Needs the extra `parity`.
"""

from __future__ import annotations

import argparse
import json
import secrets
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import HaoAIConfig, SmartHaoAI
from model.cache import KVCache
from model.checkpoint import model_type
from model.feedforward import MixtureOfExperts
from train.program import run_main

DENSE_LIMIT, EXPERTS_LIMIT = 1e-5, 2e-5
TIE = 1e-5  # router probabilities closer than this are a tie
TRIES = 20
TOKENS, PROMPT, NEW_TOKENS = 40, 6, 26
WINDOW = 5

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "n_layer": 4,
    "n_head": 4,
    "n_kv_head": 2,
    "n_embd": 32,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
THEIR_SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
EXPERTS: dict[str, Any] = {"n_expert": 5, "n_expert_per_token": 2, "moe_intermediate_size": 20}
QWEN3_EXPERTS: dict[str, Any] = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "norm_topk_prob": True}
MIXTRAL_EXPERTS: dict[str, Any] = {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 20, "sliding_window": None}
LINEAR = {"rope_type": "linear", "factor": 3.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@dataclass(frozen=True)
class Case:
    """One kind of model, in our words and, independently, in those of transformers."""

    architecture: str
    ours: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)

    @property
    def limit(self) -> float:
        """Largest difference that is still equal, as a share of the largest logit."""
        return EXPERTS_LIMIT if self.ours.get("n_expert") else DENSE_LIMIT

    def config(self) -> HaoAIConfig:
        return HaoAIConfig(**{**SHAPE, **self.ours})


def _rope(name: str, scaling: dict[str, Any]) -> tuple[str, Case]:
    return name, Case("llama", {"qk_norm": False, "rope_scaling": scaling}, {"rope_parameters": {**scaling, "rope_theta": 1e4}} | TIED)


TIED: dict[str, Any] = {"tie_word_embeddings": True}
UNTIED: dict[str, Any] = {"tie_word_embeddings": False}
ALL_WINDOWS: dict[str, Any] = {"use_sliding_window": True, "window_size": WINDOW, "window_pattern": "S"}
CASES: dict[str, Case] = {
    "llama": Case("llama", {"qk_norm": False}, TIED),
    "llama untied": Case("llama", {"qk_norm": False, **UNTIED}, UNTIED),
    "qwen2": Case("qwen2", {"qk_norm": False, "attention_bias": True}, TIED),
    "qwen3": Case("qwen3", {}, TIED),
    "qwen3 windows": Case(
        "qwen3",
        {**ALL_WINDOWS, "window_pattern": "SSL"},
        {
            **TIED,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "mistral": Case("mistral", {"qk_norm": False, **ALL_WINDOWS, **UNTIED}, {**UNTIED, "sliding_window": WINDOW}),
    "mixtral": Case("mixtral", {"qk_norm": False, **EXPERTS, **UNTIED, "rope_theta": 1e6}, {**MIXTRAL_EXPERTS, **UNTIED}),
    "mixtral windows": Case(
        "mixtral",
        {"qk_norm": False, **EXPERTS, **ALL_WINDOWS},
        {**MIXTRAL_EXPERTS, **TIED, "sliding_window": WINDOW, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "qwen3_moe": Case("qwen3_moe", EXPERTS, {**QWEN3_EXPERTS, **TIED}),
    "qwen3_moe raw weights": Case("qwen3_moe", {**EXPERTS, "norm_topk_prob": False}, {**QWEN3_EXPERTS, **TIED, "norm_topk_prob": False}),
    "qwen3_moe some dense": Case("qwen3_moe", {**EXPERTS, "moe_pattern": "DE"}, {**QWEN3_EXPERTS, **TIED, "decoder_sparse_step": 2}),
    "qwen3_moe windows": Case(
        "qwen3_moe",
        {**EXPERTS, **ALL_WINDOWS, **UNTIED},
        {**QWEN3_EXPERTS, **UNTIED, "use_sliding_window": True, "sliding_window": WINDOW},
    ),
    **dict(_rope(f"rope {scaling['rope_type']}", scaling) for scaling in (LINEAR, LLAMA3, YARN)),
}


@dataclass
class Row:
    """What one case showed. Differences are shares of the largest logit."""

    case: str
    architecture: str
    seed: int
    to_transformers: float
    from_transformers: float
    cached: float
    """Our own decoding, token by token, against one forward pass."""
    greedy: bool
    parameters: bool
    limit: float

    @property
    def ok(self) -> bool:
        return max(self.to_transformers, self.from_transformers, self.cached) <= self.limit and self.greedy and self.parameters


class _TieError(Exception):
    """A choice between equals: the seed says nothing."""


def compare(name: str, seed: int) -> Row:
    """Run one of `CASES`. Ties are avoided by counting `seed` up; ValueError when that does not help."""
    for attempt in range(seed, seed + TRIES):
        try:
            return _compare(name, attempt)
        except _TieError:
            continue
    raise ValueError(f"{name}: every seed from {seed} to {seed + TRIES - 1} gave a tie; take another --seed")


@torch.inference_mode()
def _compare(name: str, seed: int) -> Row:
    case = CASES[name]
    torch.manual_seed(seed)
    ours = SmartHaoAI(case.config()).eval()
    randomise(ours)
    theirs = new_theirs(case)
    randomise(theirs)
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(Path(folder, "ours"))
        theirs.save_pretrained(Path(folder, "theirs"))
        ours_there, theirs_here = load_theirs(Path(folder, "ours")), SmartHaoAI.from_pretrained(Path(folder, "theirs"))
    ids = torch.randint(ours.config.vocab_size, (2, TOKENS))
    for model in (ours, theirs_here):
        if router_gap(model, ids) < TIE:
            raise _TieError
    counts = [(ours, ours_there), (theirs_here, theirs)]
    return Row(
        name,
        model_type(ours.config),
        seed,
        to_transformers=difference(ours_there(ids).logits, ours(ids).logits),
        from_transformers=difference(theirs(ids).logits, theirs_here(ids).logits),
        cached=max(difference(cached_logits(model, ids), model(ids).logits) for model in (ours, theirs_here)),
        greedy=all(_same_greedy(here, there, ids[:, :PROMPT], case.limit) for here, there in counts),
        parameters=all(here.num_parameters() == sum(p.numel() for p in there.parameters()) for here, there in counts)
        and type(ours_there) is type(theirs),
        limit=case.limit,
    )


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Weights under which every part matters: large, norms and biases uneven, routers decisive."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.5, 1.5)
        elif name.endswith((".bias", ".gate.weight")):
            parameter.normal_(std=0.5)
        else:
            parameter.normal_(std=0.15)


def new_theirs(case: Case) -> Any:
    """A model that transformers made from its own configuration, without us."""
    transformers = import_transformers()
    config = transformers.AutoConfig.for_model(case.architecture, **{**THEIR_SHAPE, **in_their_words(case.theirs)})
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()


def major_version() -> int:
    """Of the installed transformers."""
    return int(import_transformers().__version__.split(".")[0])


def in_their_words(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of a configuration for the installed version: before transformers 5, `rope_parameters` had other names."""
    if major_version() >= 5 or "rope_parameters" not in fields:
        return fields
    rope = dict(fields["rope_parameters"])
    old = {"rope_theta": rope.pop("rope_theta"), "rope_scaling": None if rope["rope_type"] == "default" else rope}
    return {**{name: value for name, value in fields.items() if name != "rope_parameters"}, **old}


def load_theirs(folder: Path) -> Any:
    """A model directory, read by transformers."""
    transformers = import_transformers()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


def import_transformers() -> Any:
    """The package, quiet. Raises ValueError that names the extra when it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise ValueError('the comparison needs transformers: pip install -e ".[parity]"') from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def difference(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest logit; nan counts as infinite."""
    share = (actual - expected).abs().max() / expected.abs().max()
    return float(share.nan_to_num(float("inf")))


def cached_logits(model: SmartHaoAI, ids: Tensor) -> Tensor:
    """Logits (B, T, V) of ids (B, T): a piece first, then token by token."""
    cache = KVCache(model.config, len(ids), ids.shape[1])
    pieces = [ids[:, :PROMPT], *ids[:, PROMPT:].split(1, dim=1)]
    return torch.cat([model(piece, cache=cache).logits for piece in pieces], dim=1)


def router_gap(model: SmartHaoAI, ids: Tensor) -> float:
    """How close a router came to another choice: the least gap between the last chosen expert's probability and the next one's."""
    gaps: list[float] = []

    def measure(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(layer, MixtureOfExperts)
        ranked = F.linear(inputs[0], layer.gate.weight).softmax(-1).sort(dim=-1, descending=True).values
        gaps.append(float((ranked[..., layer.k - 1] - ranked[..., layer.k]).min()) if layer.k < layer.n_expert else 1.0)

    handles = [layer.register_forward_pre_hook(measure) for layer in model.expert_layers]
    model(ids)
    for handle in handles:
        handle.remove()
    return min(gaps, default=1.0)


def _same_greedy(ours: SmartHaoAI, theirs: Any, prompt: Tensor, limit: float) -> bool:
    """Whether both continue prompt (B, T) alike. A difference where the best tokens tie raises _TieError."""
    actual = ours.generate(prompt, max_new_tokens=NEW_TOKENS, temperature=0)
    expected = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    if torch.equal(actual, expected):
        return True
    if actual.shape == expected.shape:
        row, first = (actual != expected).nonzero()[0].tolist()
        logits = ours(actual[row : row + 1, :first]).logits[0, -1]
        best, second = logits.topk(2).values.tolist()
        if best - second < limit * float(logits.abs().max()) or router_gap(ours, actual[row : row + 1, :first]) < TIE:
            raise _TieError
    return False


def table(rows: list[Row]) -> str:
    """The rows, aligned, for people."""
    words = {True: "equal", False: "DIFFERENT"}
    lines: list[tuple[str, ...]] = [
        ("case", "architecture", "ours -> transformers", "transformers -> ours", "cached", "greedy", "parameters", "limit", "")
    ]
    for row in rows:
        shares = [f"{share:.1e}" for share in (row.to_transformers, row.from_transformers, row.cached)]
        verdict = "ok" if row.ok else f"FAILED (seed {row.seed})"
        lines.append((row.case, row.architecture, *shares, words[row.greedy], words[row.parameters], f"{row.limit:.0e}", verdict))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.parity", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, help="of the first case (default: a fresh one)")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="cases whose name contains one of these words")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    args = parser.parse_args(argv)
    names = [name for name in CASES if not args.only or any(word in name for word in args.only)]
    if not names:
        raise ValueError(f"--only {' '.join(args.only)} fits no case; known: {', '.join(CASES)}")
    versions = {"torch": torch.__version__, "transformers": import_transformers().__version__}
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    rows = [compare(name, seed + index * TRIES) for index, name in enumerate(names)]
    ok = all(row.ok for row in rows)
    if args.json:
        shown = [{**asdict(row), "ok": row.ok} for row in rows]
        print(json.dumps({"seed": seed, "versions": versions, "ok": ok, "rows": shown}, ensure_ascii=False))
    else:
        print(table(rows))
        print(f"seed {seed}; " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    return 0 if ok else 1


if __name__ == "__main__":
    run_main(main)
