"""Write reasoning tasks to train and to test on: made, solved and checked by program.

    python -m tools.make_reasoning OUT_DIR [--rows 20000] [--style latent|think|both]

Problems of n steps, in Chinese and English, by kind:

    sums        What is 3 + 4 - 2?                                                    5
    variables   x = 3, y = x + 2, z = y - x. What is z?                               2
    order       Tom is taller than Mia. Ben is shorter than Mia. Who is the tallest?  Tom
    parity      The lamp is on. Press the switch 3 times, then 4 times. On or off?    off
    counting    red, blue, red, red. How many are red?                                3
    stories     Tom has 3 apples. Tom gets 4 more. Tom loses 2. How many are left?    5

OUT_DIR gets four files of rows {"messages", "kind", "steps", "lang", "answer", "template"}:

    train.jsonl             1 to 4 steps
    valid.jsonl             the same, other problems
    held_templates.jsonl    other problems, in wordings that train.jsonl never uses
    longer.jsonl            5 to 7 steps

A problem that a test file asks is in train.jsonl in no wording, no language and for no seed: a fixed hash of the problem decides.
Styles: latent gives the answer alone; think writes the steps before it (reasoning_content), both does so in half of the rows.
A second program reads every question and works it out again, and follows every step, before a row is written.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from tools.reasoning_tasks import KINDS, SPLITS, STYLES, make_dataset
from tools.reasoning_tasks.wordings import LANGUAGES
from train.program import run_main


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.make_reasoning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="OUT_DIR", help="folder of the files; files of the same names are replaced")
    parser.add_argument("--rows", type=int, default=20_000, help="rows of train.jsonl (default 20000)")
    parser.add_argument("--test-rows", type=int, default=1_200, help="rows of each of the other files (default 1200)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same files")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), metavar="KIND", help=f"default: {' '.join(KINDS)}")
    parser.add_argument("--lang", nargs="+", default=list(LANGUAGES), metavar="LANG", help="zh, en (default: both)")
    parser.add_argument("--style", default="latent", help=" | ".join(STYLES))
    args = parser.parse_args(argv)
    made = make_dataset(Path(args.folder), args.rows, args.test_rows, args.seed, args.kinds, args.lang, args.style)
    print(f"{args.folder}: reasoning tasks, seed {args.seed}, style {args.style}")
    print(f"  {'rows':<12}" + "".join(f"{split:>16}" for split in SPLITS))
    counts = {split: Counter(row["kind"] for row in rows) for split, rows in made.items()}
    for kind in args.kinds:
        print(f"  {kind:<12}" + "".join(f"{counts[split][kind]:>16,}" for split in SPLITS))
    print(f"  {'all':<12}" + "".join(f"{len(made[split]):>16,}" for split in SPLITS))
    for split in ("train", "held_templates", "longer"):
        print(f"{split}:")
        shown: set[str] = set()
        for number, row in enumerate(made[split]):
            lang = args.lang[len(shown) % len(args.lang)]  # the languages in turn
            if row["kind"] not in shown and row["lang"] == lang and number < 100:
                shown.add(row["kind"])
                asked, reply = row["messages"]
                steps = f" ({reply['reasoning_content']})" if "reasoning_content" in reply else ""
                print(f"  {asked['content']}{steps} -> {reply['content']}")


if __name__ == "__main__":
    run_main(main)
