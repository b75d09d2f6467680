"""What this machine can do and what is wrong with the installation, with advice for each finding.

    python -m tools.doctor [--json] [--weight DIR] [--quick]

Findings are ok, note (something optional), warning (it works, but not as well as it could) or broken (something will fail). `--quick`
leaves out the self-test. Exit status: 0; 1 when something is broken.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import io
import json
import os
import platform
import re
import shutil
import statistics
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 10)
FEW_GIB = {"memory": 4, "disk": 5}
EXTRAS = {
    "app": "plots of the loss, colours and line editing in chat.py",
    "data": ".zst and .parquet files, traditional to simplified Chinese",
    "board": "TensorBoard",
    "export": "GGUF and ONNX files",
    "constrained": "answers that follow a JSON schema or grammar",
    "memory": "search in the memory of earlier conversations",
    "parity": "comparison with other libraries (tools.parity, tools.loss_parity)",
    "test": "the tests",
    "check": "linting and type checking (tools.check)",
    "audit": "looking the installed versions up in lists of known security holes",
}
"""What each optional extra of pyproject.toml is for."""
KNOWN_PROBLEMS = (
    # package, first and last release that has it (None: open), what happens, what to do
    ("torchao", None, None, "its 8-bit products on a CPU were slower than fp32", "nothing here uses it; it can stay"),
    ("deepspeed", None, None, "pins other packages and pulls CUDA builds", "keep it in an environment of its own"),
    ("optimum", None, None, "downgrades transformers", "keep it in an environment of its own"),
    ("xgrammar", None, None, "pulls CUDA builds of torch", "the extra constrained does the same; pip uninstall xgrammar"),
    ("rouge-score", None, None, "scores every Chinese text 0 without a tokenizer of your own", "use sacrebleu with tokenize='zh'"),
)
PROGRAM = "#include <Python.h>\n#include <vector>\nint main() { std::vector<int> v(3); return (int)v.size() - 3; }\n"
PRODUCT = 1024  # size of the measured products
SELF_TEST = (
    "model.preset=none model.n_layer=2 model.n_head=2 model.n_kv_head=1 model.n_embd=32 model.intermediate_size=64 "
    "tokenizer.vocab_size=400 data.max_length=64 train.max_steps=3 train.batch_size=2 train.eval_every=0 train.eval_tokens=200 "
    "train.checkpoint_minutes=0"
).split()


@dataclass(frozen=True)
class Finding:
    """One line of the report; `advice` is empty where there is nothing to do."""

    name: str
    status: str
    """ok, note, warning or broken"""
    value: str
    advice: str = ""


# ---------------------------------------------------------------- versions


def requirements(project: Path = ROOT / "pyproject.toml") -> dict[str, list[str]]:
    """{"": what every run needs, extra: what it adds}, as written in pyproject.toml (Python 3.10 has no parser for it)."""
    text = project.read_text(encoding="utf-8")
    core = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    optional = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    lists = {"": core[1] if core else "", **dict(re.findall(r"^(\w+) = \[(.*)\]$", optional, re.MULTILINE))}
    return {name: re.findall(r'"([^"]+)"', listed) for name, listed in lists.items()}


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version: 2.13.0+cpu -> (2, 13, 0)."""
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])


def misfit(requirement: str, installed: str | None = None) -> str | None:
    """Why a requirement such as "torch>=2.6,<2.14" is not met: "missing", "too old", "newer than tested"; None when it is, or does
    not concern this system. `installed` is looked up when not given."""
    wanted, _, condition = requirement.partition(";")
    system = re.search(r"sys_platform\s*(==|!=)\s*'([^']+)'", condition)
    if system and (sys.platform == system[2]) != (system[1] == "=="):
        return None
    name = re.match(r"[\w.-]+", wanted)
    assert name is not None
    found = installed or version_of(name[0])
    if found is None:
        return "missing"
    for sign, number in re.findall(r"(>=|<)\s*([\d.]+)", wanted):
        if sign == ">=" and release(found) < release(number):
            return "too old"
        if sign == "<" and release(found) >= release(number):
            return "newer than tested"
    return None


def version_of(package: str) -> str | None:
    """The installed version, None when it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_python() -> Iterator[Finding]:
    """The interpreter, and whether it writes UTF-8."""
    value = f"{platform.python_version()}, {8 * struct.calcsize('P')} bit, {platform.system()} {platform.machine()}"
    if sys.version_info < OLDEST_PYTHON or struct.calcsize("P") < 8:
        yield Finding("python", "broken", value, f"install a 64-bit Python {'.'.join(map(str, OLDEST_PYTHON))} or newer")
    else:
        yield Finding("python", "ok", value)
    if sys.getfilesystemencoding().lower() not in ("utf-8", "utf8"):
        advice = "set PYTHONUTF8=1, or files with Chinese names cannot be opened"
        yield Finding("encoding", "warning", f"names of files are {sys.getfilesystemencoding()}", advice)


def check_packages() -> Iterator[Finding]:
    """What no run can do without: there, importable, of a version that fits."""
    for requirement in requirements()[""]:
        package = re.split(r"[<>=]", requirement)[0]
        version, why = version_of(package), misfit(requirement)
        remedy = f'pip install "{requirement}"'
        if why == "missing":
            yield Finding(package, "broken", "missing", f"pip install -e . (or {remedy})")
            continue
        try:
            importlib.import_module({"pyyaml": "yaml"}.get(package, package))
        except Exception as error:  # a broken binary package fails in many ways
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            yield Finding(package, "broken", f"{version} does not start: {reason}", f"pip install --force-reinstall {remedy[12:]}")
            continue
        if why == "too old":
            yield Finding(package, "broken", f"{version} is too old", remedy)
        elif why:
            yield Finding(package, "warning", f"{version} is newer than what was tested", f"if something fails: {remedy}")
        else:
            yield Finding(package, "ok", str(version))


def check_known_problems(installed: Callable[[str], str | None] = version_of) -> Iterator[Finding]:
    """Installed versions that are known to make trouble."""
    for package, first, last, problem, advice in KNOWN_PROBLEMS:
        version = installed(package)
        if version is None or (first and release(version) < first) or (last and release(version) > last):
            continue
        yield Finding(package, "note", f"{version}: {problem}", advice)


def check_extras() -> Iterator[Finding]:
    """The optional parts: which are complete, and how to add the others."""
    for extra, listed in requirements().items():
        if not extra:
            continue
        wanted = [requirement for requirement in listed if not requirement.startswith("smarthaoai[")]
        lacking = {re.split(r"[<>=;\s]", r)[0]: why for r in wanted if (why := misfit(r))}
        purpose = EXTRAS.get(extra, "optional")
        if lacking:
            what = ", ".join(f"{name} {why}" for name, why in lacking.items())
            yield Finding(f"extra {extra}", "note", f"not complete ({what}); for {purpose}", f'pip install -e ".[{extra}]"')
        else:
            yield Finding(f"extra {extra}", "ok", purpose)


# ---------------------------------------------------------------- the machine


def check_device() -> Iterator[Finding]:
    """The torch build and where it computes."""
    import torch

    from model.device import find_device
    from train.runtime import describe_machine

    device = find_device()
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPU" + (" and MPS" if torch.backends.mps.is_built() else "")
    if torch.version.cuda and device.type == "cpu":
        advice = "on a machine without an NVIDIA card the CPU build is gigabytes smaller; with one, look at `nvidia-smi` (driver)"
        yield Finding("torch build", "warning", f"{built}, but no such device answers", advice)
    elif device.type == "cpu" and shutil.which("nvidia-smi"):
        yield Finding("torch build", "warning", f"{built}; there is an NVIDIA driver", "install a CUDA build of torch: see pytorch.org")
    else:
        yield Finding("torch build", "ok", built)
    yield Finding("device", "ok", f"{device.type}: {describe_machine(str(device))}")


def check_speed() -> Iterator[Finding]:
    """Matrix products in fp32 and half precision, measured: what `train.precision=auto` decides by, more or less."""
    import torch

    from model.device import find_device
    from train.runtime import WORTHWHILE, timed

    device = str(find_device())
    speeds: dict[str, float] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        try:
            left = torch.randn(PRODUCT, PRODUCT, device=device).to(dtype)
            work = lambda left=left: left @ left  # noqa: E731
            timed(work, device)
            speeds[name] = 2 * PRODUCT**3 / statistics.median(timed(work, device) for _ in range(7)) / 1e12
        except RuntimeError as error:
            yield Finding("precision", "note", f"{name} does not run on {device} ({str(error).splitlines()[0]})", "train.precision=fp32")
            return
    value = ", ".join(f"{name} {speed:.2f}" for name, speed in speeds.items()) + f" TFLOP/s (products of {PRODUCT} x {PRODUCT})"
    better = speeds["bf16"] >= WORTHWHILE * speeds["fp32"]
    yield Finding("precision", "ok", value, f"{'bf16' if better else 'fp32'} is faster here; train.precision=auto finds that out")


def usable_cores() -> int:
    """Cores this process may use: of the machine, of its affinity, of its container's share."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores


def check_threads() -> Iterator[Finding]:
    """Threads against cores."""
    import torch

    threads, cores = torch.get_num_threads(), usable_cores()
    setting = os.environ.get("OMP_NUM_THREADS")
    value = f"{threads} threads on {cores} usable cores" + (f" (OMP_NUM_THREADS={setting})" if setting else "")
    if threads > cores:
        yield Finding("threads", "warning", value, f"more threads than cores wait for each other: train.threads={cores}")
    elif threads == 1 < cores:
        yield Finding("threads", "warning", value, f"one core does all the work: unset OMP_NUM_THREADS, or train.threads={cores}")
    else:
        yield Finding("threads", "ok", value)


def check_room(weight: Path) -> Iterator[Finding]:
    """Memory, disk, and whether results can be written to `weight`."""
    from model.device import total_memory
    from model.files import atomic_directory

    memory = total_memory()
    if memory is not None:
        few = memory < FEW_GIB["memory"] * 2**30
        advice = "train small models, with a small train.batch_size and more train.accumulation_steps" if few else ""
        yield Finding("memory", "warning" if few else "ok", f"{memory / 2**30:.1f} GiB", advice)
    place = next(folder for folder in (weight, *weight.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    few = free < FEW_GIB["disk"] * 2**30
    advice = "checkpoints take 12 bytes a parameter each: make room, or keep fewer (train.keep_checkpoints)" if few else ""
    yield Finding("disk", "warning" if few else "ok", f"{free / 2**30:.1f} GiB free in {place.resolve()}", advice)
    made = not weight.exists()
    try:
        with atomic_directory(weight / ".doctor") as folder:
            (folder / "写.txt").write_text("可以", encoding="utf-8")
        shutil.rmtree(weight / ".doctor")
        yield Finding("writing", "ok", f"{weight} can be written to")
    except OSError as error:
        advice = "give yourself the right to write there, or choose another place with out_dir= and data.store_dir="
        yield Finding("writing", "broken", f"{weight} cannot be written to ({error.strerror or error})", advice)
    finally:
        if made:
            with contextlib.suppress(OSError):
                weight.rmdir()


def check_compiler() -> Iterator[Finding]:
    """The C++ compiler that torch.compile needs on a CPU: tried on a program with the headers that its kernels include."""
    chosen = os.environ.get("CXX")
    names = [chosen] if chosen else ["cl"] if os.name == "nt" else ["clang++", "g++"] if sys.platform == "darwin" else ["g++", "clang++"]
    compiler = next((path for name in names if (path := shutil.which(name))), None)
    only = "only torch.compile needs it; everything else runs without"
    if compiler is None:
        what = f"CXX={chosen} does not exist" if chosen else f"none found ({', '.join(names)})"
        remedy = (
            "unset CXX or name a compiler" if chosen else "install one (Debian, Ubuntu: apt install g++; macOS: xcode-select --install)"
        )
        yield Finding("C++ compiler", "warning", what, f"{remedy}; {only}")
        return
    if os.name == "nt":
        yield Finding("C++ compiler", "ok", compiler)
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(PROGRAM, encoding="utf-8")
        command = [compiler, "-fsyntax-only", "-I", sysconfig.get_paths()["include"], str(source)]
        try:
            result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60, check=False)
            wrong = (result.stderr.strip().splitlines() or ["?"])[0] if result.returncode else ""
        except (OSError, subprocess.TimeoutExpired) as error:
            wrong = str(error)
    if wrong:
        missing = "install Python's headers (Debian, Ubuntu: apt install python3-dev)" if "Python.h" in wrong else "try another with CXX="
        yield Finding("C++ compiler", "warning", f"{compiler} fails: {wrong[:160]}", f"{missing}; {only}")
    else:
        yield Finding("C++ compiler", "ok", compiler)


def check_working() -> Iterator[Finding]:
    """A model of a few thousand parameters: tokenizer, training, saving, loading, generating."""
    import torch

    from inference import Engine, SamplingSettings
    from model import BPETokenizer, SmartHaoAI
    from train.config import PretrainConfig, parse_command_line
    from train.train_pretrain import pretrain

    start = time.perf_counter()
    rows = [{"text": f"小猫第 {i} 次在窗边睡觉。The quick brown fox jumps over {i} lazy dogs."} for i in range(60)]
    step = "training"
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stderr(io.StringIO()):  # without the bar of the run
        folder = Path(name)
        (folder / "corpus.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        BPETokenizer.train((row["text"] for row in rows), 400, progress=False).save_pretrained(folder / "tokenizer")
        places = {"out_dir": "model", "data.pretrain_file": "corpus.jsonl", "data.store_dir": "store", "tokenizer_dir": "tokenizer"}
        words = [*SELF_TEST, *(f"{key}={(folder / value).as_posix()}" for key, value in places.items())]
        try:
            if pretrain(parse_command_line(PretrainConfig, words), log=lambda line: None):
                raise RuntimeError("training ended with an error")
            step = "loading"
            model, tokenizer = SmartHaoAI.from_pretrained(folder / "model"), BPETokenizer.from_pretrained(folder / "model")
            step = "saving"
            model.save_pretrained(folder / "again")
            again = SmartHaoAI.from_pretrained(folder / "again")
            ids = torch.tensor([tokenizer.encode(rows[0]["text"])])
            with torch.no_grad():
                difference = float((model(ids).logits - again(ids).logits).abs().max())
            if difference != 0:
                raise RuntimeError(f"logits differ by {difference:.3g} after saving and loading")
            step = "generating"
            settings = SamplingSettings(max_new_tokens=8, temperature=0)
            answers = [Engine(one, tokenizer).generate([ids[0].tolist()], settings)[0][0].ids for one in (model, again)]
            if answers[0] != answers[1]:
                raise RuntimeError("the same model generates differently after saving and loading")
        except Exception as error:  # whatever goes wrong on this machine is the finding
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            advice = "reinstall torch (pip install --force-reinstall torch); HAOAI_DEBUG=1 and a training command show the whole trace"
            yield Finding("self-test", "broken", f"{step} fails: {reason[:200]}", advice)
            return
    done = "3 steps trained, saved, loaded, generated; logits equal bit for bit"
    yield Finding("self-test", "ok", f"{done} ({time.perf_counter() - start:.1f} s)")


# ---------------------------------------------------------------- report


def examine(weight: Path, self_test: bool = True) -> list[Finding]:
    """All findings. What cannot be looked at because a package is missing is left out: that package is the finding."""
    findings = [*check_python(), *check_packages()]
    if any(finding.status == "broken" for finding in findings):
        return [*findings, *check_extras()]
    for check in (check_device, check_speed, check_threads, lambda: check_room(weight), check_compiler, check_known_problems):
        findings += check()
    findings += check_extras()
    return [*findings, *check_working()] if self_test else findings


def print_findings(findings: Sequence[Finding]) -> None:
    """The report for a reader."""
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{finding.status:<8} {finding.name:<{width}}  {finding.value}")
        if finding.advice:
            print(f"{'':<{width + 11}}-> {finding.advice}")
    counts = {status: sum(finding.status == status for finding in findings) for status in ("broken", "warning", "note")}
    words = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    print(f"\n{'something is broken' if counts['broken'] else 'healthy'}" + (f" ({words})" if words else ""))


def main(argv: Sequence[str] | None = None) -> int:
    """Looks at everything; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.doctor", description=(__doc__ or "").splitlines()[0], epilog="Exit: 0 healthy, 1 broken, 2 usage."
    )
    parser.add_argument("--json", action="store_true", help='print {"findings": [{"name", "status", "value", "advice"}]}')
    parser.add_argument("--weight", type=Path, default=Path("weight"), metavar="DIR", help="where results go (default: weight)")
    parser.add_argument("--quick", action="store_true", help="leave out the self-test")
    arguments = parser.parse_args(argv)
    findings = examine(arguments.weight, not arguments.quick)
    if arguments.json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings]}))
    else:
        print_findings(findings)
    return 1 if any(finding.status == "broken" for finding in findings) else 0


if __name__ == "__main__":
    for _stream in (sys.stdout, sys.stderr):  # train.runtime does this for the others, and needs torch
        _stream.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    raise SystemExit(main())
