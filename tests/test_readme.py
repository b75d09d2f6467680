"""What the guides promise: every command in them is known, the README's run in order, and the notebook executes."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

import train_rlhf
from model import BPETokenizer, HaoAIConfig, SmartHaoAI
from train import config as settings

ROOT = Path(__file__).resolve().parent.parent
GUIDES = (
    "README",
    "docs/data",
    "docs/training",
    "docs/chat",
    "docs/memory",
    "docs/model",
    "docs/names",
    "docs/checkpoints",
    "docs/tokenizer",
    "docs/alignment",
)
ALONE = ("docs/alignment",)  # begins with a chat model of the reader's own: run by itself, from a small one
PAGES = [f"{guide}{language}.md" for guide in GUIDES for language in ("", ".zh")]
STAGES: dict[str, type[settings.StageConfig]] = {
    "train.train_tokenizer": settings.TokenizerStageConfig,
    "train.train_pretrain": settings.PretrainConfig,
    "train.train_sft": settings.SFTConfig,
    "train.train_lora": settings.LoRAStageConfig,
    "train.train_reward": settings.RewardStageConfig,
    "train.train_ppo": settings.PPOStageConfig,
    "train.train_dpo": settings.DPOStageConfig,
    "train.train_grpo": settings.GRPOStageConfig,
    "train.train_distill": settings.DistillStageConfig,
}
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
# What a program of the guides cannot run without.
NEEDS = {"tools.convert": ("gguf", "onnx"), "tools.parity": ("transformers",)}
# What makes a command of the guides small enough for a test; the words of a command line that come later win.
SMALL_RUN = ["train.max_steps=2", "train.batch_size=2", "train.eval_tokens=500"]
SMALL_ROLLOUTS = ["train.max_steps=2", "train.batch_size=4", "rollout.prompts=4", "rollout.max_new_tokens=8", "rollout.eval_prompts=2"]
FASTER = {
    "train_smart.py": ["--recipe", "sample", "--minutes", "2", "--per-kind", "4"],
    "train.train_tokenizer": ["tokenizer.vocab_size=600"],
    "train.train_pretrain": ["train.max_steps=5", "train.batch_size=2", "model.n_layer=2", "train.eval_tokens=500"],
    "train.train_sft": ["train.max_steps=5", "train.batch_size=2", "train.eval_tokens=500"],
    "train.train_lora": SMALL_RUN,
    "train.train_reward": SMALL_RUN,
    "train.train_dpo": SMALL_RUN,
    "train.train_distill": SMALL_RUN,
    "train.train_ppo": SMALL_ROLLOUTS,
    "train.train_grpo": [*SMALL_ROLLOUTS, "rollout.samples=2"],
    "train_rlhf.py": SMALL_ROLLOUTS,
    "tools.make_reasoning": ["--rows", "60", "--test-rows", "12"],
    "tools.reasoning_report": ["--limit", "2", "--device", "cpu"],
    "tools.reasoning_modes": ["--limit", "1", "--max-new-tokens", "60", "--device", "cpu"],
    "tools.alignment_report": ["--probes", "1", "--device", "cpu"],
    "tools.make_preferences": ["--limit", "24", "--temperature", "1.5", "--device", "cpu"],
    "tools.loss_parity": ["--trials", "1"],
    "tools.evaluate": ["--device", "cpu"],
    "tools.ablate": ["train.max_steps=4", "seeds=[0]", "baseline_lengths=[]", "time_rounds=1"],
    "chat.py": ["--max-new-tokens", "20"],
}


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of one language, as text."""
    return re.findall(rf"^```{language}\n(.*?)^```", read(page), flags=re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[str]:
    """The lines of all bash blocks, without comments."""
    lines = "\n".join(blocks(page, "bash")).splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def programs(line: str) -> list[list[str]]:
    """The programs of a line, each as [name, argument, ...]; `python -m X` and `python X.py` are named X and X.py."""
    parts: list[list[str]] = [[]]
    for word in shlex.split(line):
        if word in ("&&", "|"):
            parts.append([])
        else:
            parts[-1].append(word)
    return [part[2:] if part[:2] == ["python", "-m"] else part[1:] if part[0] == "python" else part for part in parts]


ALL_PROGRAMS = list(dict.fromkeys((page, *words) for page in PAGES for line in commands(page) for words in programs(line)))


@lru_cache(maxsize=32)
def help_page(program: str, subcommand: str | None) -> str:
    """What `program [subcommand] --help` prints."""
    if program.endswith(".py"):
        spec = importlib.util.spec_from_file_location(f"guide_{program[:-3]}", ROOT / program)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up there
        spec.loader.exec_module(module)
    else:
        package = (ROOT / program.replace(".", "/")).is_dir()
        module = importlib.import_module(f"{program}.__main__" if package else program)
    words = [program, *([subcommand] if subcommand else []), "--help"]
    before, sys.argv = sys.argv, words
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as ended:
            module.main()
    finally:
        sys.argv = before
    assert ended.value.code == 0
    return out.getvalue()


def test_there_are_commands_to_check() -> None:
    """Guards: tests that pass because the pattern finds no block."""
    assert len(commands("README.md")) >= 12 and len(ALL_PROGRAMS) >= 40


@pytest.mark.parametrize("guide", GUIDES)
def test_both_languages_hold_the_same_commands_and_code(guide: str) -> None:
    """Guards: a command that is corrected in one language only."""
    assert commands(f"{guide}.md") == commands(f"{guide}.zh.md")
    english, chinese = ([re.sub(r"\s*#.*", "", block) for block in blocks(page, "python")] for page in (f"{guide}.md", f"{guide}.zh.md"))
    assert english == chinese


def test_the_readme_begins_with_the_two_commands() -> None:
    """Guards: the two lines that a newcomer copies first changing unnoticed."""
    first = ['pip install -e ".[app]" && python train_smart.py', 'pip install -e ".[test]" && python -m pytest']
    assert commands("README.md")[:2] == first


@pytest.mark.parametrize("words", ALL_PROGRAMS, ids=lambda words: " ".join(words)[:80])
def test_every_command_is_known(words: tuple[str, ...]) -> None:
    """Guards: a renamed script, switch or setting that a guide still names."""
    _, program, *arguments = words
    if program in STAGES:
        if "--help" not in arguments:
            # A run.yaml is a file that a run will write: it is not there yet.
            arguments = [word for word in arguments if word != "--config" and not word.endswith("run.yaml")]
            settings.parse_command_line(STAGES[program], arguments)
    elif program == "train_rlhf.py":
        settings.parse_command_line(settings.RLHFConfig, train_rlhf.for_stages(arguments))
    elif program in ("pip", "printf", "pytest"):
        assert program != "pip" or arguments[:2] == ["install", "-e"]
    else:
        place = ROOT / (program if program.endswith(".py") else program.replace(".", "/"))
        assert any(file.is_file() for file in (place, place.with_suffix(".py"), place / "__main__.py")), f"there is no {program}"
        text = help_page(program, None)
        if program in ("tools.evaluate", "tools.convert") and not arguments[0].startswith("--"):
            assert arguments[0] in text
            text = help_page(program, arguments[0])
        for word in arguments:
            if word.startswith("--"):
                assert re.search(rf"{re.escape(word.partition('=')[0])}(?![\w-])", text), f"{program} has no {word}"


@pytest.mark.parametrize("page", PAGES)
def test_links_and_python_blocks_are_sound(page: str) -> None:
    """Guards: links to pages that were moved, snippets with a typing mistake."""
    for target in re.findall(r"\]\(([^)#:]+)\)", read(page)):
        assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"
    for block in blocks(page, "python"):
        compile(block, page, "exec")


def test_pip_extras_exist() -> None:
    """Guards: an extra that a guide installs and pyproject.toml does not have."""
    project = read("pyproject.toml")
    for page in PAGES:
        for extra in re.findall(r"\.\[(\w+)\]", read(page)):
            assert re.search(rf"^{extra} = \[", project, flags=re.MULTILINE), f"{page} names the extra {extra}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_hold_no_output(path: Path) -> None:
    """Guards: machine paths and stale results in a committed notebook."""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"] and cell["execution_count"] is None
            compile("".join(cell["source"]), path.name, "exec")


# ---------------------------------------------------------------- for real


def copy_checkout(place: Path) -> Path:
    """A copy of the files that version control knows or would take, with small data of one's own beside them."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs the repository and git")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode("utf-8").split("\0")):
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, place / name)
    sample = place / "training_data" / "pretrain" / "sample_data.jsonl"
    text = sample.read_text(encoding="utf-8").splitlines(keepends=True)
    (place / "corpus.jsonl").write_text("".join(text[:-40]), encoding="utf-8")
    (place / "valid.jsonl").write_text("".join(text[-40:]), encoding="utf-8")
    (place / "extra.txt").write_text("The fox slept.\n\n狐狸睡着了。\n", encoding="utf-8")
    (place / "tests.jsonl").write_text("".join(text[-40:]), encoding="utf-8")
    shutil.copyfile(place / "training_data" / "sft" / "sample_data.jsonl", place / "chats.jsonl")
    shutil.copyfile(place / "training_data" / "rlhf" / "preference_sample.jsonl", place / "pairs.jsonl")
    return place


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which nothing was trained yet."""
    return copy_checkout(tmp_path_factory.mktemp("checkout"))


def run(command: list[str], checkout: Path, folder: str = ".") -> subprocess.CompletedProcess[str]:
    """Run a command in a folder of the checkout, with the checkout's packages and this interpreter as `python`."""
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    environment = {
        **os.environ,
        "PATH": os.pathsep.join(folders),
        "PYTHONPATH": str(checkout),
        "PYTHONIOENCODING": "utf-8",
        "HAOAI_CACHE": str(checkout / "cache"),
        "XDG_STATE_HOME": str(checkout / "state"),
        "TMPDIR": str(checkout),
        "TEMP": str(checkout),  # the notebook writes to a temporary folder
        "OMP_NUM_THREADS": "1",  # threads of small products wait for each other on a busy machine, ten times the time
    }
    return subprocess.run(
        command,
        cwd=checkout / folder,
        env=environment,
        text=True,
        encoding="utf-8",
        check=False,
        capture_output=True,
        timeout=900,
        stdin=subprocess.DEVNULL,
    )


def scaled(line: str) -> str | None:
    """The same command, small; None when it installs or fetches something."""
    if "--recipe quick" in line or "--recipe core" in line:
        return None
    if line.startswith("pip "):
        line = line.partition(" && ")[2]
        if line in ("python -m pytest", "python -m tools.check"):
            return None
    program = programs(line)[-1][0]
    if any(importlib.util.find_spec(package) is None for package in NEEDS.get(program, ())):
        return None
    if "--help" in line:
        return line
    return " ".join([line, *FASTER.get(program, [])])


def run_guide(guide: str, checkout: Path) -> None:
    """Its commands in the order of the page, small, and then its Python blocks."""
    for line in commands(f"{guide}.md"):
        small = scaled(line)
        if small is not None:
            done = run(["bash", "-o", "pipefail", "-c", small], checkout)
            assert done.returncode == 0, f"{guide}: {small}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
            assert "Traceback" not in done.stderr
    for block in blocks(f"{guide}.md", "python"):
        if "transformers" in block and importlib.util.find_spec("transformers") is None:
            continue
        done = run([sys.executable, "-c", block], checkout)
        assert done.returncode == 0, f"{guide}:\n{block}\n{done.stderr[-4000:]}"


needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="the guides' commands are written for bash")


@pytest.mark.slow
@needs_bash
def test_the_guides_run_from_top_to_bottom(checkout: Path) -> None:
    """Guards: commands that are right one by one and do not work one after the other in a fresh checkout."""
    for guide in GUIDES:
        if guide not in ALONE:
            run_guide(guide, checkout)
    left = "report.md report.json sft/model.safetensors sft/loss.png sft/run.yaml sft/metrics.jsonl sft/README.md"
    for name in left.split():
        assert (checkout / "weight" / name).is_file(), f"the README names weight/{name}"


@pytest.mark.slow
@needs_bash
def test_the_alignment_guide_runs_by_itself(tmp_path: Path) -> None:
    """Guards: commands of the alignment guide that need more than a chat model in weight/sft and the reader's own files."""
    checkout = copy_checkout(tmp_path)
    rows = map(json.loads, (checkout / "chats.jsonl").read_text(encoding="utf-8").splitlines())
    tokenizer = BPETokenizer.train((turn["content"] for row in rows for turn in row["conversations"]), 500, progress=False)
    shape: dict[str, Any] = {
        "n_layer": 2,
        "n_head": 2,
        "n_kv_head": 1,
        "n_embd": 32,
        "intermediate_size": 64,
        "max_position_embeddings": 1024,
    }
    SmartHaoAI(HaoAIConfig(vocab_size=tokenizer.vocab_size, **shape)).save_pretrained(checkout / "weight" / "sft", tokenizer)
    for guide in ALONE:
        run_guide(guide, checkout)
    made = "lora_mine reward_mine rlhf/ppo dpo_mine kto_mine reasoning_mine reasoning_report reasoning_modes grpo_mine distill_mine"
    for name in made.split():
        assert (checkout / "weight" / name).is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_run(path: Path, checkout: Path) -> None:
    """Guards: a notebook that an API change has broken; its code cells run in one plain interpreter."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    done = run([sys.executable, "-c", code], checkout, "examples")
    assert done.returncode == 0, done.stderr[-4000:]
