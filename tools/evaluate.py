"""Measure a checkpoint.

    python -m tools.evaluate bpb --model DIR --data FILE... [--context N] [--stride N] [--limit-kb N] [--json]
    python -m tools.evaluate probes --model DIR [--per-kind 50] [--show N] [--json]
    ... [--reasoning-steps N] [--reasoning-halt P]      # of a model with a reasoning head

bpb: bits per UTF-8 byte of held-out text, per file, comparable between tokenizers. probes: pass rates on held-out prompts of the
generated curriculum (greetings, identity, facts, sums, stories; zh and en), greedy answers.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from inference import Completion, Engine, SamplingSettings
from model.checkpoint import find_model
from model.tokenizer import BPETokenizer
from model.transformer import SmartHaoAI
from tools.curriculum import Probe, probes, score
from train.config import UsageError
from train.data_files import expand_paths
from train.formats import BadRows, as_text, read_samples
from train.metrics import BitsPerByte, bits_per_byte
from train.program import run_main
from train.runtime import device_name

PROBE_BATCH = 50
PROBE_TOKENS = 220


def load(folder: str, device: str = "auto", steps: int | None = None, halt: float | None = None) -> tuple[SmartHaoAI, BPETokenizer]:
    """A checkpoint's model and tokenizer, ready for inference; steps and halt as in `SmartHaoAI.set_reasoning`."""
    path = find_model(folder)
    model = SmartHaoAI.from_pretrained(path, device_name(device))
    model.set_reasoning(steps, halt)
    return model, BPETokenizer.from_pretrained(path)


def file_bits_per_byte(
    model: SmartHaoAI, tokenizer: BPETokenizer, file: Path, context: int, stride: int | None = None, limit_bytes: int | None = None
) -> BitsPerByte:
    """Bits per byte of one data file, of its first `limit_bytes` bytes of text when given. ValueError when it holds no text."""
    bad = BadRows()

    def texts() -> Iterator[str]:
        left = limit_bytes
        for _, text in tqdm(read_samples(file, bad, as_text), desc=file.name, unit="doc", leave=False, disable=None):
            data = text.encode("utf-8")
            if left is not None:
                data = data[:left]
                left -= len(data)
            if data:
                yield data.decode("utf-8", errors="ignore")
            if left is not None and left <= 0:
                return

    result = bits_per_byte(model, tokenizer, texts(), context, stride)
    bad.report(lambda line: print(line, file=sys.stderr))
    if not result.bytes:
        raise ValueError(f"{file} holds no text to measure")
    return result


def answer_probes(model: SmartHaoAI, tokenizer: BPETokenizer, per_kind: int = 50, seed: int = 0) -> list[tuple[Probe, str, str]]:
    """(probe, answer, reasoning) for every held-out prompt, answered greedily."""
    return [(probe, reply.text, reply.reasoning) for probe, reply in probe_replies(model, tokenizer, per_kind, seed)]


def probe_replies(
    model: SmartHaoAI, tokenizer: BPETokenizer, per_kind: int = 50, seed: int = 0, settings: SamplingSettings | None = None
) -> list[tuple[Probe, Completion]]:
    """The reply to every held-out prompt, in batches of like length; greedy when there are no settings."""
    asked = probes(seed, per_kind)
    prompts = [tokenizer.render(probe.messages, add_generation_prompt=True).ids for probe in asked]
    engine = Engine(model, tokenizer)
    settings = settings or SamplingSettings(max_new_tokens=PROBE_TOKENS, temperature=0.0)
    batches = engine.generate_many(prompts, settings, PROBE_BATCH)
    bar = tqdm(batches, "probes", -(-len(asked) // PROBE_BATCH), unit="batch", leave=False, disable=None)
    answers = {index: replies[0] for batch in bar for index, replies in batch}
    return [(probe, answers[index]) for index, probe in enumerate(asked)]


def probe_table(result: dict[str, Any]) -> str:
    """Pass rates as aligned text: a row per kind, a column per language."""
    lines = [f"{'held-out prompts':<18}{'zh':>22}{'en':>22}"]
    for kind in result["kinds"]:
        cells = [result["cells"][f"{kind}/{lang}"] for lang in ("zh", "en")]
        lines.append(f"{kind:<18}" + "".join(f"{c['passed']:>6}/{c['total']} ({c['low']:.0%}-{c['high']:.0%})".rjust(22) for c in cells))
    return "\n".join(lines)


def _bpb(args: argparse.Namespace) -> None:
    if args.context is not None and args.context < 1:
        raise UsageError(f"--context {args.context} must be at least 1")
    if args.limit_kb is not None and not 0.001 <= args.limit_kb < math.inf:
        raise UsageError(f"--limit-kb {args.limit_kb:g} must be a number of kB (10^3 bytes), at least 0.001")
    limit = None if args.limit_kb is None else int(args.limit_kb * 1000)
    model, tokenizer = load(args.model, args.device, args.reasoning_steps, args.reasoning_halt)
    context = args.context or model.config.max_position_embeddings
    rows = []
    for file in expand_paths(list(args.data)):
        result = file_bits_per_byte(model, tokenizer, file.path, context, args.stride, limit)
        rows.append({"file": str(file.path), "bytes": result.bytes, "tokens": result.tokens, "bpb": result.bpb})
        if not args.json:
            print(f"{result.bpb:8.4f} bits per byte  {result.bytes:>12,} bytes  {result.tokens:>10,} tokens  {file.path}")
    if args.json:
        print(json.dumps({"files": rows}, ensure_ascii=False))


def _probes(args: argparse.Namespace) -> None:
    if args.per_kind < 1:
        raise UsageError(f"--per-kind {args.per_kind} must be at least 1")
    model, tokenizer = load(args.model, args.device, args.reasoning_steps, args.reasoning_halt)
    answers = answer_probes(model, tokenizer, args.per_kind, args.seed)
    result = score(answers)
    if args.json:
        print(json.dumps(result, ensure_ascii=False))
        return
    print(probe_table(result))
    shown: dict[tuple[str, str, bool], int] = {}
    for probe, answer, reasoning in answers:
        key = (probe.kind, probe.lang, probe.check(answer, reasoning))
        shown[key] = shown.get(key, 0) + 1
        if shown[key] <= args.show:
            print(
                f"\n[{'pass' if key[2] else 'FAIL'} {probe.kind} {probe.lang}] {probe.prompt}\n  "
                + (f"({reasoning}) " if reasoning else "")
                + answer
            )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.evaluate", description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    bpb = commands.add_parser("bpb", help="bits per UTF-8 byte of text files")
    bpb.add_argument(
        "--data", required=True, nargs="+", metavar="FILE", help="data files, folders or globs, in any format that training reads"
    )
    bpb.add_argument("--context", type=int, help="window length in tokens (default: the model's context)")
    bpb.add_argument("--stride", type=int, help="tokens scored per window (default: the whole window)")
    bpb.add_argument("--limit-kb", type=float, help="only the first so many kB (10^3 bytes) of text of each file")
    ask = commands.add_parser("probes", help="pass rates on held-out prompts of the generated curriculum")
    ask.add_argument("--per-kind", type=int, default=50, help="prompts per kind and language (default 50)")
    ask.add_argument("--seed", type=int, default=0, help="which held-out prompts are drawn")
    ask.add_argument("--show", type=int, default=0, metavar="N", help="also print N passed and N failed answers of each kind")
    for command in (bpb, ask):
        command.add_argument("--model", required=True, metavar="DIR", help="checkpoint directory")
        command.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
        command.add_argument(
            "--reasoning-steps", type=int, metavar="N", help="latent steps of the reasoning head (default: as in training)"
        )
        command.add_argument(
            "--reasoning-halt", type=float, metavar="P", help="a token that is surer than P takes no more steps; 0: all take all"
        )
        command.add_argument("--json", action="store_true", help="one JSON object on standard output")
    args = parser.parse_args(argv)
    _bpb(args) if args.command == "bpb" else _probes(args)


if __name__ == "__main__":
    run_main(main)
