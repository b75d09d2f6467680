"""How fast is it, beside others and beside what the machine can do? Every program takes turns with every other, in a process of its own.

    python -m tools.bench train   [--shape known] [--against plain transformers] [VARIANT ...]
    python -m tools.bench decode  [--batches 1 8 32] [--prompt 64] [--new 128] [--precision bf16 fp32] [--against transformers llama.cpp]
    python -m tools.bench prefill [--prompts 512 2048]
    python -m tools.bench experts                       # mixture of experts beside the dense model, sliding window beside full attention
    python -m tools.bench quality --train TEXT... --val TEXT...   # bits per byte after 10 minutes, and after a twentieth of that
    python -m tools.bench start                         # import, --help, first answer
    python -m tools.bench profile [--own train.compile=on]   # what a training step and a decoding step spend their time on
    python -m tools.bench gpu --out DIR                 # training at 0.1B and 0.4B and decoding on CUDA, all of it recorded

Of each row: tokens a second (median, smallest and largest of the rounds; a first round is not counted), the peak memory of its process,
and the share of what the machine itself can do, measured between the rounds: of the bf16 matrix product in training and prompts, of
reading memory in decoding. What is computed is compared with fp32: a row that is off by more than what is printed makes the exit status
1. Nothing but ratios within one run means much on a machine that is not idle. `... WHAT --help` has the options.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from train.config import UsageError
from train.program import run_main
from train.runtime import set_threads

TRAIN_PEERS = ("plain", "transformers")
DECODE_PEERS = ("transformers", "llama.cpp")
PRECISIONS = ("bf16", "fp32", "int8", "int4")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    train = commands.add_parser("train", help="tokens that carry loss, per second of training")
    train.add_argument(
        "variants",
        nargs="*",
        metavar="VARIANT",
        help="one more row of ours: words of train_pretrain, as train.optimizer=adamw,train.lr=1e-3",
    )
    train.add_argument("--batch", type=int, default=16, help="rows of the padded programs")
    train.add_argument("--row-length", type=int, default=340, help="length of their rows")
    train.add_argument("--seconds", type=float, default=3.0, help="a turn ends with the step that reaches this")
    decode = commands.add_parser("decode", help="new tokens per second")
    decode.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    decode.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    decode.add_argument("--new", type=int, default=128, help="new tokens of each reply")
    prefill = commands.add_parser("prefill", help="prompt tokens per second")
    prefill.add_argument("--prompts", type=int, nargs="+", default=[512, 2048], help="lengths of the prompt")
    experts = commands.add_parser("experts", help="what experts and windows cost per token, beside the dense, full model")
    experts.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096])
    experts.add_argument("--seconds", type=float, default=3.0)
    quality = commands.add_parser("quality", help="bits per byte of held-out text after so many minutes of training")
    quality.add_argument("variants", nargs="*", metavar="VARIANT", help="one more row of ours: words of train_pretrain, joined by commas")
    quality.add_argument("--train", nargs="+", required=True, metavar="FILE", help="text to learn from")
    quality.add_argument("--val", nargs="+", required=True, metavar="FILE", help="text that is not learned from")
    quality.add_argument("--tokenizer", metavar="DIR", help="default: one of 6400 tokens is trained from --train first")
    quality.add_argument("--minutes", type=float, nargs="+", default=[10.0, 0.5], help="budgets of ours")
    quality.add_argument("--peer-minutes", type=float, help="budget of the others (default: the first of ours)")
    quality.add_argument("--context", type=int, default=340, help="length of the windows that are scored")
    quality.add_argument("--limit-kb", type=int, default=400, help="how much of each --val file is scored")
    quality.add_argument("--against", nargs="*", default=["plain"], choices=("plain",), metavar="PEER")
    quality.add_argument("--out", default="weight/bench_quality", metavar="DIR", help="where the models and the token store go")
    start = commands.add_parser("start", help="seconds from the command to the first answer")
    start.add_argument("--modules", type=int, default=12, help="how many of the slowest imports are named")
    start.add_argument("--model", default=None, help="checkpoint for the first answer; default: random weights of --shape")
    start.add_argument("--only", nargs="+", metavar="NAME", help="only these, as named in the table")
    profile = commands.add_parser("profile", help="what the time of a training step and of a decoding step goes to")
    profile.add_argument("--steps", type=int, default=5, help="training steps that are recorded")
    profile.add_argument("--batches", type=int, nargs="*", default=[1, 32], help="replies that are decoded together")
    profile.add_argument("--precision", nargs="*", choices=PRECISIONS, default=["bf16", "int8"])
    profile.add_argument("--operations", type=int, default=12, help="how many single operations are named")
    gpu = commands.add_parser("gpu", help="everything that needs CUDA, recorded")
    gpu.add_argument("--out", default="weight/bench_gpu", metavar="DIR")
    gpu.add_argument("--device", default="cuda")
    gpu.add_argument("--shapes", nargs="+", default=["0.1b", "0.4b"])
    gpu.add_argument("--batch", type=int, default=16, help="rows of 1024 tokens in a training step")
    gpu.add_argument("--length", type=int, default=1024)
    gpu.add_argument("--seconds", type=float, default=5.0)
    for one in (train, experts, quality, profile):
        one.add_argument("--own", nargs="*", default=[], metavar="WORD", help="words of train_pretrain for all rows of ours")
    for one in (decode, prefill):
        one.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="rows of ours")
        one.add_argument("--seconds", type=float, default=1.0, help="a turn ends with the answer that reaches this")
        one.add_argument("--model", metavar="DIR", help="a checkpoint in place of --shape with random weights")
        one.add_argument("--batcher", action="store_true", help="one more row: as requests to a Batcher")
        one.add_argument("--compiled", action="store_true", help="more rows at batch 1: with compiled steps")
    for one, peers in ((train, TRAIN_PEERS), (decode, DECODE_PEERS), (prefill, DECODE_PEERS)):
        one.add_argument("--against", nargs="*", default=list(peers), choices=peers, metavar="PEER", help=f"of: {', '.join(peers)}")
    for one in commands.choices.values():
        shape = "mark" if one is quality else "known"
        one.add_argument("--shape", default=shape, help=f"known, mark, a preset, or fields: layers=8,width=512,... (default {shape})")
        one.add_argument("--rounds", type=int, default=3)
        one.add_argument("--threads", type=int, default=0, help="0: as torch decides")
        one.add_argument("--json", metavar="FILE", help="write all figures there, too")
    return parser


def main(argv: Sequence[str] | None = None, isolated: bool = True) -> int:
    """isolated=False runs the rows in threads of this process: for tests, whose rows are tiny."""
    words = list(sys.argv[1:] if argv is None else argv)
    options = make_parser().parse_args(words)
    for name, value in vars(options).items():
        smallest = min(value) if isinstance(value, list) and value and isinstance(value[0], int) else value
        if type(smallest) is int and smallest < 1 and name != "threads":
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1")
    set_threads(options.threads)
    from tools.benchmark import runs  # --help needs none of it

    with tempfile.TemporaryDirectory() as folder:
        return runs.RUNS[options.what](options, Path(folder), isolated, words)


if __name__ == "__main__":
    run_main(main)
