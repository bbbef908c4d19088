"""The house: its rooms, which may know which, and what each says of itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import launch
import pytest

FOLDERS = ("kernels", "models", "engine", "recipes")
ROOMS = {
    "runtime", "data", "sampling", "distributed", "objectives", "evaluation", "memory", "training", "experiments",
    "commands",
}  # fmt: skip


@cache
def modules() -> dict[str, Path]:
    """Every module of the project by its import name."""
    found = {}
    for folder in FOLDERS:
        for path in sorted((launch.ROOT / folder).rglob("*.py")):
            parts = path.relative_to(launch.ROOT).with_suffix("").parts
            found[".".join(("ipfm", *(parts[:-1] if parts[-1] == "__init__" else parts)))] = path
    return found


def imports(name: str) -> Iterator[tuple[str, str]]:
    """What a file imports of this project: at its top, within functions, and for types; the module and the name."""
    for node in ast.walk(ast.parse(modules()[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.startswith("ipfm"))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            if (node.module or "").split(".")[0] == "ipfm":
                yield from ((node.module or "", alias.name) for alias in node.names)


def edges(name: str) -> set[str]:
    """The modules that a module's imports name."""
    found = set()
    for module, imported in imports(name):
        deeper = f"{module}.{imported}"
        found.add(deeper if deeper in modules() else module)
    return found & modules().keys() - {name}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Nodes that lead back to themselves, in order; empty where there are none."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node not in done:
            for other in sorted(graph.get(node, ())):
                if found := walk(other, [*path, node]):
                    return found
            done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := walk(node, []))), [])


@pytest.mark.quick
def test_no_circle_of_any_kind() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"] and not circle({"a": {"b"}, "b": set()})
    graph = {name: edges(name) for name in modules()}
    assert len(graph) > 150 and sum(map(len, graph.values())) > len(graph)
    assert circle(graph) == []


def test_an_import_goes_down() -> None:
    """The contract of pyproject.toml."""
    checked = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
        cwd=launch.ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout
    assert "an import goes down KEPT" in checked.stdout and "1 kept, 0 broken" in checked.stdout


def test_every_room_has_a_quick_test() -> None:
    """`make quick` says something of each."""
    tests = launch.ROOT / "tests"
    quick = {path.parent for path in tests.rglob("test_*.py") if "@pytest.mark.quick" in path.read_text("utf-8")}
    rooms = {f"engine/{room}" for room in ROOMS} | {"kernels", "models", "models/checkpoints", "recipes", "docs"}
    assert {folder.relative_to(tests).as_posix() for folder in quick - {tests}} >= rooms


@pytest.mark.quick
def test_six_files_and_ten_rooms() -> None:
    entries = [path for path in (launch.ROOT / "engine").iterdir() if path.name != "__pycache__"]
    assert {path.name for path in entries if path.is_dir()} == ROOMS
    assert {path.stem for path in entries if path.is_file()} == {
        "__init__", "averages", "checks", "config", "noise_levels", "random_streams",
    }  # fmt: skip


@pytest.mark.quick
def test_every_folder_says_in_a_sentence_what_it_is() -> None:
    folders = {path.parent for path in modules().values()}
    for folder in sorted(folders):
        # What `python -m ipfm` runs is alone in its folder: with an __init__.py it would be that of `ipfm`.
        alone = [path.name for path in folder.glob("*.py")] == ["__main__.py"]
        file = folder / ("__main__.py" if alone else "__init__.py")
        said = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        sentence = said.partition("\n\n")[0]
        assert sentence.endswith(".") and ". " not in sentence and "\n" not in sentence, f"{folder}: {sentence!r}"


@pytest.mark.quick
def test_private_names_stay_in_their_file() -> None:
    for name in modules():
        for module, imported in imports(name):
            private = [part for part in (*module.split("."), imported) if part.startswith("_") and part != "__init__"]
            elsewhere = module.startswith(("ipfm.engine", "ipfm.models")) and module != name
            assert not (private and elsewhere), f"{name} imports {imported} of {module}"


# What importing the kernels brings along, but for what PyTorch, Triton and Python themselves have brought.
ALONG = """
import sys
import torch, triton, numpy
before = set(sys.modules)
import ipfm.kernels
new = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(*sorted(new - {"torch", "triton", "numpy"}))
print(*sorted({"torch._dynamo", "torch._inductor", "ipfm.engine", "ipfm.models"} & set(sys.modules)))
"""


def test_the_kernels_bring_nothing_along() -> None:
    done = subprocess.run([sys.executable, "-c", ALONG], env=launch.environment(), capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("ipfm\n\n", 0), done.stderr


# The rooms that load without PyTorch, each module of runtime, and the help of the command.
LIGHT = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
from ipfm.engine.commands.main import main
sys.argv = ["ipfm", "--help"]
try:
    main()
except SystemExit as stop:
    assert not stop.code
print("heavy:", *sorted({"torch", "triton", "deepspeed", "numpy", "scipy", "matplotlib"} & set(sys.modules)))
"""


@pytest.mark.quick
def test_runtime_and_help_load_without_torch() -> None:
    runtime = [name for name in modules() if name.startswith("ipfm.engine.runtime")]
    assert len(runtime) > 5
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, *runtime], env=launch.environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ipfm") and done.stdout.endswith("\nheavy:\n")
