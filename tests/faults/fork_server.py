"""Runs stages in children that inherit all imports: `python fork_server.py FAULTY_DISK`, where starting each anew costs seconds.

It says "ready" first. A line of standard input is a request {"module", "words", "output", "fault", "plots"}; the answers are two
lines, the child's number when it runs and its exit code when it has ended (negative: the signal). fault: folder, mode, number and log
for fault_arm() of faulty_disk.c, which is preloaded into this process; null arms nothing. plots: false hides matplotlib, which takes
half of so short a run.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import json
import os
import sys
import traceback
from typing import Any, NoReturn

import torch

from train.plotting import pyplot
from train.program import run_main

MODULES = ("tokenizer", "pretrain", "sft", "lora", "reward", "ppo", "dpo", "grpo", "distill")


def child(request: dict[str, Any], disk: ctypes.CDLL) -> NoReturn:
    """What `python -m module words` does, with its output in a file."""
    code = 70
    try:
        output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for stream, descriptor in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
            os.dup2(descriptor, stream)
        if request["fault"] is not None:
            folder, mode, number, log = request["fault"]
            disk.fault_arm(folder.encode(), mode.encode(), ctypes.c_long(number), log.encode())
        if not request["plots"]:
            sys.modules["matplotlib"] = None  # type: ignore[assignment]
        sys.argv = [request["module"], *request["words"]]
        try:
            run_main(importlib.import_module(request["module"]).main)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:  # this process must never come back into the server's loop; what run_main lets through is a bug to be shown
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def warm_up() -> None:
    """What a stage imports on its way: TensorBoard, what a random tensor on the meta device loads, the fonts of a plot."""
    with contextlib.suppress(ImportError):
        importlib.import_module("torch.utils.tensorboard")
    torch.empty(1, device="meta").normal_()
    plt = pyplot()
    if plt is not None:
        figure = plt.figure()
        figure.suptitle("-")
        figure.savefig(io.BytesIO())
        plt.close(figure)


def main() -> None:
    disk = ctypes.CDLL(sys.argv[1])
    for name in MODULES:
        importlib.import_module(f"train.train_{name}")
    warm_up()
    print("ready", flush=True)
    for line in os.fdopen(os.dup(0)):  # sys.stdin stays as the children need it: unread
        number = os.fork()
        if number == 0:
            child(json.loads(line), disk)
        print(number, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
