"""Write a checkpoint for other programs, read a GGUF file as one, or merge an adapter into one; then run the result and say how far it is
from the original.

    python -m tools.convert hf     weight/sft out_dir    --dtype bf16     # transformers
    python -m tools.convert gguf   weight/sft model.gguf --dtype q8_0     # llama.cpp, LM Studio
    python -m tools.convert ollama weight/sft out_dir    --dtype q8_0     # model.gguf and Modelfile
    python -m tools.convert onnx   weight/sft out_dir                     # onnxruntime, transformers.js
    python -m tools.convert import-gguf model.gguf out_dir --dtype bf16
    python -m tools.convert merge-lora weight/lora out_dir                # an adapter and its base as one checkpoint

Status 1 and a message when the result differs: token ids, or (for f32) log-probabilities by more than 1e-3 nats. The files stay.
"""

from __future__ import annotations

import argparse
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from model.checkpoint import CONFIG_FILE, MAX_SHARD_BYTES, find_model
from tools.convert.compare import Comparison
from train.config import UsageError
from train.program import run_main

LARGEST_DIFFERENCE = 1e-3  # nats, where nothing was rounded
UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
EXPORT_EXTRA, PARITY_EXTRA = 'pip install -e ".[export]"', 'pip install -e ".[parity]"'
_GGUF_DTYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")


@dataclass
class Format:
    """What the command line knows of one subcommand."""

    help: str
    dtypes: tuple[str, ...]
    default: str
    folder: bool
    """OUT is a folder (onnx: unless it ends in .onnx)."""
    runtime: str
    """Who runs the result for the check."""
    install: str
    """How to get that program."""


FORMATS = {
    "hf": Format("a folder for transformers", ("f32", "bf16", "f16"), "f32", True, "transformers", PARITY_EXTRA),
    "gguf": Format("a file for llama.cpp, LM Studio and others", _GGUF_DTYPES, "f16", False, "llama.cpp", PARITY_EXTRA),
    "onnx": Format(
        "a folder (or, where OUT ends in .onnx, a file) for onnxruntime", ("f32", "f16"), "f32", True, "onnxruntime", EXPORT_EXTRA
    ),
    "ollama": Format("a folder with model.gguf and Modelfile", _GGUF_DTYPES, "f16", True, "llama.cpp", PARITY_EXTRA),
    "merge-lora": Format("a checkpoint folder from an adapter and its base", ("f32", "bf16", "f16"), "f32", True, "this program", ""),
    "import-gguf": Format("a checkpoint folder from a GGUF file", ("f32", "bf16", "f16"), "f32", True, "llama.cpp", PARITY_EXTRA),
}


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    kind = FORMATS[args.command]
    if args.dtype not in kind.dtypes:
        raise UsageError(f"--dtype {args.dtype} is not available for {args.command}; choose one of: {', '.join(kind.dtypes)}")
    source = _source(args.source, args.command)
    out = Path(args.out)
    _refuse_existing(args.command, source, out, args.overwrite)
    _converter(args)(source, out)
    print(f"{out}: {_size(out) / 2**20:.1f} MiB")
    if args.no_check:
        print("not checked (--no-check)")
        return
    comparison = _check(args.command, source, out)
    if comparison is None:
        print(f"not checked: {kind.runtime} is not installed; to run what was written: {kind.install}")
    else:
        print(f"checked: {comparison.line()}")
        if args.command == "import-gguf" and not _is_plain(source):
            print(
                "note: llama.cpp rounds the activations, too, where it multiplies by quantised weights, so it differs from exact "
                "arithmetic on the same weights; exported from the folder as f32, the two can be compared exactly"
            )
    if args.command == "ollama":
        print(_about_ollama(out))
    if comparison is not None:
        _refuse_difference(comparison, _is_exact(args.command, args.dtype, source), out)


def _parser() -> argparse.ArgumentParser:
    description, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m tools.convert", description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, kind in FORMATS.items():
        command = commands.add_parser(name, help=kind.help, description=kind.help)
        if name == "import-gguf":
            command.add_argument("source", metavar="FILE", help="the GGUF file")
        else:
            kind_of_folder = "folder of the adapter" if name == "merge-lora" else "checkpoint folder"
            command.add_argument("source", metavar="DIR", help=f"{kind_of_folder}, or a hub name")
        command.add_argument("out", metavar="DIR" if name == "import-gguf" else "OUT", help="what to write")
        command.add_argument("--dtype", default=kind.default, help=f"{', '.join(kind.dtypes)} (default {kind.default})")
        command.add_argument("--no-check", action="store_true", help="do not run the result afterwards")
        command.add_argument("--overwrite", action="store_true", help="replace what stands at OUT")
        if name == "hf":
            command.add_argument(
                "--max-shard-size",
                type=_bytes,
                default=MAX_SHARD_BYTES,
                metavar="SIZE",
                help="weights above this go to several files: 500MB, 2GB (10^9), 4GiB (2^30, default)",
            )
    return parser


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if not found or found[2] not in UNITS or float(found[1]) * UNITS[found[2]] < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write it like 500MB, 2GB or 4GiB")
    return int(float(found[1]) * UNITS[found[2]])


def _source(name: str, command: str) -> Path:
    if command != "import-gguf":
        return find_model(name)
    if not Path(name).is_file():
        raise FileNotFoundError(f"there is no file {name}")
    return Path(name)


def _refuse_existing(command: str, source: Path, out: Path, overwrite: bool) -> None:
    """UsageError when OUT must not be written to."""
    is_folder = FORMATS[command].folder and not (command == "onnx" and out.suffix == ".onnx")
    if out.resolve() in (source.resolve(), *source.resolve().parents):
        raise UsageError(f"OUT={out} is the original, or a folder around it; name another place")
    if out.resolve() == Path.cwd().resolve():
        raise UsageError(f"OUT={out} is the current folder, which cannot be replaced from inside; name another")
    if not out.exists() or (is_folder and out.is_dir() and not any(out.iterdir())):
        return
    if out.is_dir() != is_folder:
        raise UsageError(f"OUT={out} is a {'folder' if out.is_dir() else 'file'}; {command} writes a {'folder' if is_folder else 'file'}")
    if not overwrite:
        raise UsageError(f"OUT={out} exists; name another, or add --overwrite to replace it")
    # A folder is replaced as a whole: only one that holds a model is taken for an earlier result.
    if is_folder and not any((out / name).is_file() for name in (CONFIG_FILE, "Modelfile")):
        raise UsageError(f"OUT={out} holds no model; --overwrite replaces the results of earlier conversions only")


def _converter(args: argparse.Namespace) -> Callable[[Path, Path], object]:
    """The subcommand's work: (source, out). The modules are imported here, so that each format needs its own packages only."""
    if args.command == "hf":
        from tools.convert.hf_export import export_hf

        return lambda source, out: export_hf(source, out, args.dtype, args.max_shard_size)
    if args.command == "gguf":
        from tools.convert.gguf_export import export_gguf

        return lambda source, out: export_gguf(source, out, args.dtype)
    if args.command == "onnx":
        from tools.convert.onnx_export import export_onnx

        return lambda source, out: export_onnx(source, out, args.dtype)
    if args.command == "ollama":
        from tools.convert.ollama import export_ollama

        return lambda source, out: export_ollama(source, out, args.dtype)
    if args.command == "merge-lora":
        from tools.convert.merge_lora import merge_lora

        return lambda source, out: merge_lora(source, out, args.dtype)
    from tools.convert.gguf_import import import_gguf

    return lambda source, out: import_gguf(source, out, args.dtype, overwrite=args.overwrite)


def _check(command: str, source: Path, out: Path) -> Comparison | None:
    if command == "hf":
        from tools.convert.hf_export import check_hf

        return check_hf(source, out)
    if command == "onnx":
        from tools.convert.onnx_export import check_onnx

        return check_onnx(source, out)
    if command == "ollama":
        from tools.convert.ollama import check_ollama

        return check_ollama(source, out)
    if command == "merge-lora":
        from tools.convert.merge_lora import check_merged

        return check_merged(source, out)
    from tools.convert.gguf_check import check_gguf

    return check_gguf(out, source) if command == "import-gguf" else check_gguf(source, out)


def _is_exact(command: str, dtype: str, source: Path) -> bool:
    """Whether nothing was rounded, so that log-probabilities must agree."""
    if command != "import-gguf":
        return dtype == "f32"
    return dtype == "f32" and _is_plain(source)


def _is_plain(gguf: Path) -> bool:
    """Whether a GGUF file holds F32 alone."""
    from tools.convert.gguf_file import GGUFFile

    return all(tensor.kind.name == "F32" for tensor in GGUFFile(gguf).tensors.values())


def _about_ollama(out: Path) -> str:
    create = f"ollama create NAME -f {out / 'Modelfile'}"
    if shutil.which("ollama") is None:
        return f"not run: Ollama is not installed. There: {create}"
    return f"not run in Ollama itself; next: {create}"


def _refuse_difference(comparison: Comparison, exact: bool, out: Path) -> None:
    """ValueError when the check shows another model than the original."""
    wrong = []
    if comparison.same_ids is False:
        wrong.append("token ids differ")
    if comparison.same_template is False:
        wrong.append("the chat template gives another text")
    if exact and not comparison.largest <= LARGEST_DIFFERENCE:  # also for NaN
        wrong.append(f"log-probabilities differ by {comparison.largest:.2e} nats (allowed: {LARGEST_DIFFERENCE})")
    if exact and comparison.same_greedy is False:
        wrong.append("greedy decoding differs")
    if math.isnan(comparison.largest) and not exact:
        wrong.append("log-probabilities are not numbers")
    if wrong:
        raise ValueError(f"the check of {out} failed: {', '.join(wrong)}; what was written stays there for a look, do not use it")


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size


if __name__ == "__main__":
    run_main(main)
