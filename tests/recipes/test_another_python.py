"""A recipe started by a Python that has no ipfm, lacks a package or is too old: one line with the way on."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import launch
import pytest

SCRIPT = launch.ROOT / "recipes" / "digits_ipfm.py"


def bare(*words: str | Path, cwd: Path, **env: str) -> list[str]:
    """The lines on stderr of a Python that knows no packages (-S), which ends with code 2."""
    done = subprocess.run(
        [sys.executable, "-S", *map(str, words)], cwd=cwd, capture_output=True, text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1", **env},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    return done.stderr.splitlines()


@pytest.mark.parametrize("recipe", ["digits_ipfm.py", "cifar_teacher.py", "ablation_D.py"])
def test_outside_the_virtual_environment(recipe: str, tmp_path: Path) -> None:
    (line,) = bare(launch.ROOT / "recipes" / recipe, "--alpha", "1", cwd=tmp_path)
    assert line.startswith(f"{recipe}: error: this Python, {sys.executable}, has no package ipfm: ")


def test_as_a_module_of_the_checkout(tmp_path: Path) -> None:
    (line,) = bare("-m", "recipes.digits_ipfm", cwd=launch.ROOT)
    assert line.startswith(f"recipes.digits_ipfm: error: this Python, {sys.executable}, has no package ipfm: ")


def test_a_package_that_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "ipfm").mkdir()
    for folder in ("engine", "kernels", "models", "recipes"):
        (tmp_path / "ipfm" / folder).symlink_to(launch.ROOT / folder)
    (line,) = bare(SCRIPT, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert line.startswith(f"digits_ipfm.py: error: this Python, {sys.executable}, has no package torch: ")


@pytest.fixture
def stand_in() -> ModuleType:
    """The module that stands in for the package, imported under a name by which it does nothing."""
    spec = importlib.util.spec_from_file_location("stand_in", launch.ROOT / "recipes" / "ipfm.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_python_that_is_too_old_is_said_to_be(stand_in: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    old = SimpleNamespace(version_info=(3, 9, 18), version="3.9.18 (main)", executable="/usr/bin/python3")
    monkeypatch.setattr(stand_in, "sys", old)
    assert stand_in.why(ImportError("no")) == (
        "this Python, /usr/bin/python3, is version 3.9.18, and ipfm needs 3.11 or newer"
    )


def test_the_way_on_is_the_command_that_works(
    stand_in: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(stand_in, "HERE", str(tmp_path / "recipes"))
    monkeypatch.chdir(tmp_path)
    assert stand_in.way_on(["recipes/a.py"]) == "install what it needs, pip install -e . in a virtual environment"
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch(mode=0o755)
    assert stand_in.way_on(["recipes/a.py"]) == "start it as .venv/bin/python recipes/a.py"
    assert stand_in.way_on(["-m", "recipes.a"]) == "start it as .venv/bin/python -m recipes.a"


def test_any_other_error_of_an_import_keeps_its_traceback(stand_in: ModuleType) -> None:
    assert stand_in.why(ImportError("libcudart.so.12: cannot open shared object file")) is None


def test_in_a_folder_that_is_gone(tmp_path: Path) -> None:
    (gone := tmp_path / "gone").mkdir()
    done = subprocess.run(
        ["sh", "-c", 'rmdir "$PWD" && exec "$0" -S "$1"', sys.executable, str(SCRIPT)],
        cwd=gone, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "digits_ipfm.py: error: the current folder is gone: go to another one\n"


def test_too_little_memory_for_what_it_needs_is_said(stand_in: ModuleType) -> None:
    for error in (MemoryError(), ImportError("libtorch_cpu.so: failed to map segment from shared object")):
        assert stand_in.lacks_memory(error) and stand_in.why(error) is None
    assert not stand_in.lacks_memory(ImportError("libcudart.so.12: cannot open shared object file"))
