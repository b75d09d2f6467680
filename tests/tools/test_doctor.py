"""tools.doctor: a healthy environment is called healthy, and each fault is found, with what to do about it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tools import doctor
from tools.doctor import EXTRAS, Finding


def findings_of(check: object) -> dict[str, Finding]:
    return {finding.name: finding for finding in check}  # type: ignore[attr-defined]


def test_a_healthy_environment(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Guards: false alarms, a self-test that does not run, output that is not one JSON object, files left behind."""
    status = doctor.main(["--json", "--weight", str(tmp_path / "权重")])
    report = json.loads(capfd.readouterr().out)
    assert list(report) == ["findings"] and all(set(row) == {"name", "status", "value", "advice"} for row in report["findings"])
    by_name = {row["name"]: row for row in report["findings"]}
    assert status == 0 and not [row for row in report["findings"] if row["status"] == "broken"]
    assert {"python", "torch", "device", "precision", "threads", "memory", "disk", "writing", "C++ compiler", "self-test"} <= set(by_name)
    assert "equal bit for bit" in by_name["self-test"]["value"]
    assert all(row["advice"] for row in report["findings"] if row["status"] in ("warning", "broken"))
    assert list(tmp_path.iterdir()) == []


def test_requirements_are_those_of_the_project() -> None:
    """Guards: an extra without a word on its purpose; a list in pyproject.toml written so that it is not found."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((doctor.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = doctor.requirements()
    assert found[""] == project["dependencies"]
    assert {name: listed for name, listed in found.items() if name} == project["optional-dependencies"]
    assert set(EXTRAS) == set(project["optional-dependencies"])


@pytest.mark.parametrize(
    ("requirement", "installed", "expected"),
    [
        ("torch>=2.6,<2.14", "2.13.0+cpu", None),
        ("torch>=2.6,<2.14", "2.5.1", "too old"),
        ("torch>=2.6,<2.14", "2.14.0", "newer than tested"),
        ("torch>=2.6,<2.14", "2.6.0rc1", None),
        ("no-such-package-here>=1", None, "missing"),
        ("pexpect>=4.9; sys_platform != 'no-such-system'", "4.8", "too old"),
        ("pexpect>=4.9; sys_platform == 'no-such-system'", "4.8", None),
    ],
)
def test_versions_are_compared_by_number(requirement: str, installed: str | None, expected: str | None) -> None:
    """Guards: 2.9 above 2.13 as texts are; a package that another system needs asked for here."""
    assert doctor.misfit(requirement, installed) == expected


def test_a_wrong_torch_and_a_missing_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards: a doctor that dies of what it should find."""
    real = doctor.version_of
    monkeypatch.setattr(doctor, "version_of", lambda name: {"torch": "1.13.0", "tqdm": None, "zstandard": None}.get(name, real(name)))
    assert doctor.main(["--weight", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "torch" in shown and "1.13.0 is too old" in shown and 'pip install "torch>=2.6' in shown
    assert "zstandard missing" in shown and 'pip install -e ".[data]"' in shown and "something is broken" in shown
    monkeypatch.setattr(doctor, "version_of", lambda name: {"torch": "9.0"}.get(name, real(name)))
    assert findings_of(doctor.check_packages())["torch"].status == "warning"


def test_a_package_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: an installed package with a broken library called fine."""
    monkeypatch.setitem(sys.modules, "safetensors", None)  # import fails
    found = findings_of(doctor.check_packages())["safetensors"]
    assert found.status == "broken" and "does not start" in found.value and "--force-reinstall" in found.advice


def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: hours of training that end with a permission error. Root may write anywhere: the system's refusal is put in its place."""
    (tmp_path / "weight").write_text("a file stands where the folder should be", encoding="utf-8")
    assert findings_of(doctor.check_room(tmp_path / "weight"))["writing"].status == "broken"

    def refuse(*names: object) -> None:
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr(os, "replace", refuse)
    found = findings_of(doctor.check_room(tmp_path / "other"))["writing"]
    assert found.status == "broken" and os.strerror(30) in found.value and "out_dir=" in found.advice
    monkeypatch.undo()
    assert findings_of(doctor.check_room(tmp_path / "new" / "deep"))["writing"].status == "ok"


def test_compilers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Guards: a compiler that is named but not there, or there but useless, first noticed in the middle of a run."""
    monkeypatch.setenv("CXX", "/nonexistent")
    missing = findings_of(doctor.check_compiler())["C++ compiler"]
    assert missing.status == "warning" and "/nonexistent" in missing.value and "unset CXX" in missing.advice
    if os.name == "nt":
        return
    useless = tmp_path / "c++"
    useless.write_text("#!/bin/sh\necho 'probe.cpp:1:10: fatal error: Python.h: No such file' >&2\nexit 1\n", encoding="utf-8")
    useless.chmod(0o755)
    monkeypatch.setenv("CXX", str(useless))
    found = findings_of(doctor.check_compiler())["C++ compiler"]
    assert found.status == "warning" and "python3-dev" in found.advice


def test_threads_and_known_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: one thread on many cores, found by nobody; a list of problems that is never looked at."""
    monkeypatch.setattr(doctor, "usable_cores", lambda: 8)
    assert findings_of(doctor.check_threads())["threads"].status == "warning"  # the tests run with one
    monkeypatch.setattr(doctor, "usable_cores", lambda: 1)
    assert findings_of(doctor.check_threads())["threads"].status == "ok"
    assert [f.name for f in doctor.check_known_problems(lambda name: "9.9" if name == "deepspeed" else None)] == ["deepspeed"]


def test_a_model_that_changes_when_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a self-test that passes whatever comes back from the disk."""
    from model import SmartHaoAI

    real = SmartHaoAI.from_pretrained.__func__  # type: ignore[attr-defined]

    def damaged(kind: type[SmartHaoAI], path: Path) -> SmartHaoAI:
        model = real(kind, path)
        if path.name == "again":
            next(model.parameters()).data[:, 0] += 1
        return model

    monkeypatch.setattr(SmartHaoAI, "from_pretrained", classmethod(damaged))
    (found,) = doctor.check_working()
    assert found.status == "broken" and "logits differ" in found.value and found.advice
