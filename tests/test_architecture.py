"""Rules of the whole code base, read from its source: who imports whom, and what no file may contain."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDER = ["model", "inference", "train", "tools", "root scripts"]  # nothing imports what stands to its right
OUTSIDE = {"tests", "docs", "examples", "build", "dist", "weight", "training_data"}

FILES = sorted(
    path
    for path in ROOT.rglob("*.py")
    if path.relative_to(ROOT).parts[0] not in OUTSIDE
    and not any(part.startswith((".", "__pycache__")) for part in path.relative_to(ROOT).parts)
    and (len(path.relative_to(ROOT).parts) == 1 or path.relative_to(ROOT).parts[0] in ORDER)
)
PACKAGES = [folder for folder in ORDER if (ROOT / folder / "__init__.py").is_file()]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def layer_of(path: Path) -> int:
    top = path.relative_to(ROOT).parts[0]
    return ORDER.index(top) if top in ORDER else ORDER.index("root scripts")


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_modules(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or "."] if node.level == 0 else ["." * node.level + (node.module or "")]
    return []


def enclosing(tree: ast.Module, wanted: ast.AST) -> str:
    """Dotted names of the classes and functions around a node."""

    def find(node: ast.AST, path: list[str]) -> list[str] | None:
        if node is wanted:
            return path
        here = path + [node.name] if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) else path
        for child in ast.iter_child_nodes(node):
            found = find(child, here)
            if found is not None:
                return found
        return None

    return ".".join(find(tree, []) or [])


SCRIPTS = {path.stem for path in FILES if len(path.relative_to(ROOT).parts) == 1}
ALLOWED = (
    "model/transformer.py",
    "SmartHaoAI.generate",
)  # thin conveniences over inference, imported inside the method


def test_there_is_something_to_check() -> None:
    """Guards: rules that pass because they look in the wrong place."""
    assert "model" in PACKAGES and any(name_of(path) == "model/transformer.py" for path in FILES)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    """Guards: a model that cannot be loaded without the trainer; circles of imports."""
    tree = parse(path)
    wrong = []
    for node in ast.walk(tree):
        for module in imported_modules(node):
            top = module.split(".")[0]
            layer = ORDER.index(top) if top in PACKAGES else ORDER.index("root scripts") if top in SCRIPTS else -1
            is_script_to_script = layer == layer_of(path) == ORDER.index("root scripts")
            if module.startswith("."):
                wrong.append(f"line {node.lineno}: relative import {module}")
            elif layer > layer_of(path) and not is_script_to_script:
                place = enclosing(tree, node)
                if not (name_of(path) == ALLOWED[0] and place.startswith(ALLOWED[1]) and top == "inference"):
                    wrong.append(f"line {node.lineno}: imports {module}")
    assert not wrong, f"{name_of(path)}: {'; '.join(wrong)}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_unsafe_or_silent(path: Path) -> None:
    """Guards: code run from a downloaded file, errors nobody hears of, imports that depend on where a script stands."""
    wrong = []
    for node in ast.walk(parse(path)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            unsafe = {"pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"} & {m.split(".")[0] for m in imported_modules(node)}
            wrong += [f"line {node.lineno}: imports {name}" for name in unsafe]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in (
                "eval",
                "exec",
                "torch.load",
                "yaml.load",
                "yaml.load_all",
                "yaml.full_load",
                "yaml.unsafe_load",
                "shutil.unpack_archive",
                "jinja2.Environment",
                "jinja2.Template",
                "Environment",
                "Template",
                "warnings.filterwarnings",
                "warnings.simplefilter",
                "os.system",
            ) or any(keyword.arg == "shell" and getattr(keyword.value, "value", False) is True for keyword in node.keywords):
                wrong.append(f"line {node.lineno}: calls {called}")
            trusting = {("allow_pickle", True), ("trust_remote_code", True), ("weights_only", False)}
            given = {(keyword.arg, getattr(keyword.value, "value", None)) for keyword in node.keywords}
            wrong += [f"line {node.lineno}: {name}={value}" for name, value in trusting & given]
            if isinstance(node.func, ast.Attribute) and node.func.attr in ("extractall", "extract"):
                wrong.append(f"line {node.lineno}: unpacks an archive, whose members could leave their folder")
            if called in ("sys.path.insert", "sys.path.append", "sys.path.extend"):
                wrong.append(f"line {node.lineno}: edits sys.path")
        elif isinstance(node, (ast.Assign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            wrong += [f"line {node.lineno}: edits sys.path" for t in targets if ast.unparse(t).startswith("sys.path")]
        elif isinstance(node, ast.ExceptHandler):
            if node.type is None:
                wrong.append(f"line {node.lineno}: bare except")
            elif ast.unparse(node.type) in ("Exception", "BaseException") and all(isinstance(s, ast.Pass) for s in node.body):
                wrong.append(f"line {node.lineno}: swallows every error")
    assert not wrong, f"{name_of(path)}: {'; '.join(wrong)}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_text_files_name_their_encoding(path: Path) -> None:
    """Guards: Chinese text that is unreadable on Windows, where open() has another default."""
    wrong = []
    for node in ast.walk(parse(path)):
        if not isinstance(node, ast.Call) or any(keyword.arg in ("encoding", None) for keyword in node.keywords):
            continue
        function = node.func
        if isinstance(function, ast.Attribute) and function.attr in ("read_text", "write_text"):
            named = len(node.args) >= (1 if function.attr == "read_text" else 2)
            if not named:
                wrong.append(f"line {node.lineno}: {function.attr} without encoding")
        elif isinstance(function, ast.Name) and function.id == "open":
            given = [k.value for k in node.keywords if k.arg == "mode"] or node.args[1:2]
            mode = getattr(given[0], "value", "b") if given else "r"  # a mode that is computed is left to the reader
            if "b" not in str(mode):
                wrong.append(f"line {node.lineno}: open without encoding")
    assert not wrong, f"{name_of(path)}: {'; '.join(wrong)}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_module_says_what_it_is(path: Path) -> None:
    """Guards: a file that a reader has to guess at."""
    assert (ast.get_docstring(parse(path)) or "").strip(), f"{name_of(path)} has no docstring"


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_export_what_they_promise(package: str) -> None:
    """Guards: a name in __all__ that does not exist, or one that is imported and not listed."""
    module = importlib.import_module(package)
    exported = getattr(module, "__all__", [])
    assert len(exported) == len(set(exported)) and all(hasattr(module, name) for name in exported)
    tree = parse(ROOT / package / "__init__.py")
    lazy = [node for part in tree.body if isinstance(part, ast.If) for node in part.body]  # under TYPE_CHECKING
    imported = {alias.asname or alias.name for node in lazy if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imported or not exported
    assert imported <= set(exported), f"{package}/__init__.py imports names it does not list: {sorted(imported - set(exported))}"


def test_the_names_users_type() -> None:
    """Guards: a renamed class that every example imports."""
    import model

    for name in (
        "SmartHaoAI",
        "HaoAIConfig",
        "RotaryEmbedding",
        "SmartAttention",
        "SmartFeedForward",
        "SmartTransformerBlock",
        "RewardModel",
        "BPETokenizer",
    ):
        assert name in model.__all__
        assert getattr(model, name).__name__ == name


def test_the_model_needs_nothing_of_the_rest() -> None:
    """Guards: an import at the top of a module that the source check does not see (through another package)."""
    others = ("inference", "train", "tools", "transformers")
    code = f"import sys; from model import *; print([m for m in sys.modules if m.split('.')[0] in {others}])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_help_answers_without_importing_torch() -> None:
    """Guards: two seconds of waiting for `--help`, for a mistake on the command line, or for `import model`."""
    code = """
import runpy, sys
import inference, model
sys.argv = ["chat.py", "--help"]
try:
    runpy.run_path("chat.py", run_name="__main__")
except SystemExit as end:
    assert not end.code
assert "torch" not in sys.modules
assert "BPETokenizer" in dir(model) and "ChatSession" in dir(inference)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)


def test_a_model_is_read_without_the_compiler(tmp_path: Path) -> None:
    """Guards: seconds of waiting for the first answer, for what of torch gives start values to weights that are on the disk."""
    code = """
import sys
from model import HaoAIConfig, SmartHaoAI
shape = HaoAIConfig(vocab_size=400, n_layer=2, n_head=2, n_embd=32, intermediate_size=64, n_expert=2, use_reasoning=True)
SmartHaoAI(shape).save_pretrained(sys.argv[1])
SmartHaoAI.from_pretrained(sys.argv[1])
print([name for name in ("torch._dynamo", "sympy") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m")], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
