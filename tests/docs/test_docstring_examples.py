"""Examples in docstrings run as they are printed, each by itself, so that it imports all that it uses."""

from __future__ import annotations

import ast
import doctest
from collections.abc import Iterator
from pathlib import Path

import launch
import pytest

from ipfm.engine.runtime.launcher import stop_world

ROOMS = ("engine", "kernels", "models", "recipes")
SHOWN = {
    "AdamEMA",
    "Distiller",
    "denoising_loss",
    "generate",
    "group_norm_silu",
    "heun_sample",
    "ipfm_loss",
    "load_generator",
    "perturb",
    "residual_sum",
}


def examples(file: Path) -> Iterator[doctest.DocTest]:
    """Read from the text of a file: doctest's own search passes over functions that torch.no_grad wraps."""
    source = file.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)) if ">>> " in source else ():
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            text = ast.get_docstring(node) or ""
            found = doctest.DocTestParser().get_doctest(text, {}, node.name, str(file), node.lineno)
            if found.examples:
                yield found


FOUND = {
    str(file.relative_to(launch.ROOT)): tests
    for room in ROOMS
    for file in sorted((launch.ROOT / room).rglob("*.py"))
    if (tests := list(examples(file)))
}


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leaves the process group that a run starts, and the environment that it sets."""
    for name in ("LOCAL_RANK", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    stop_world()


@pytest.mark.parametrize("file", FOUND)
def test_examples_of(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    for test in FOUND[file]:
        result = doctest.DocTestRunner().run(test)
        assert result.failed == 0, capsys.readouterr().out
        assert result.attempted == len(test.examples)


def test_what_every_user_calls_has_an_example() -> None:
    assert {test.name for tests in FOUND.values() for test in tests} >= SHOWN
