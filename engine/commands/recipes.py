"""The recipes by their names: this project's, and those in files of others.

Recipes are above the commands, and imported when they are asked for.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

from ipfm.engine.experiments.recipe import Recipe

_PACKAGE = "ipfm.recipes"


def project_recipes() -> Iterator[Recipe[Any]]:
    """Those of ipfm.recipes, by the names of their files; ablations, which are many runs, are none."""
    for module in iter_modules(import_module(_PACKAGE).__path__, f"{_PACKAGE}."):
        recipe = getattr(import_module(module.name), "RECIPE", None)
        if isinstance(recipe, Recipe):
            yield recipe


def is_recipe(name: str) -> bool:
    """Whether a text names a recipe: "cifar_ipfm", "cifar_ipfm.py", or the path of a Python file."""
    return name.endswith(".py") or ("/" not in name and name in _names())


def find_recipe(name: str) -> Recipe[Any]:
    """The recipe of this name, see `is_recipe`. A file outside this project is run for it.

    Raises:
        ValueError: there is none; the message lists the names.
    """
    path = Path(name).expanduser()
    folder = Path(import_module(_PACKAGE).__path__[0])
    stem = path.stem if name.endswith(".py") else name
    own = stem in _names() and (path.parent == Path() or not path.exists() or path.resolve().parent == folder.resolve())
    if not own and not path.is_file():
        known = ", ".join(recipe.file.removesuffix(".py") for recipe in project_recipes())
        raise ValueError(f"there is no recipe {name}; possible: {known}, or the file of another one")
    module = import_module(f"{_PACKAGE}.{stem}") if own else _module(path)
    recipe = getattr(module, "RECIPE", None)
    if isinstance(recipe, Recipe):
        return recipe
    several = "is an ablation, several runs: give the recipe of one, such as " if hasattr(module, "ABLATION") else ""
    raise ValueError(f"{name} {several or 'has no RECIPE; this project has such as '}cifar_ipfm or digits_ipfm")


def _names() -> set[str]:
    return {module.name for module in iter_modules(import_module(_PACKAGE).__path__)}


def _module(path: Path) -> ModuleType:
    """The file of a recipe, imported as it is where it is started: modules beside it are found.

    Raises:
        ValueError: it cannot be.
    """
    spec = importlib.util.spec_from_file_location(f"_recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))
    sys.modules[spec.name] = module  # dataclasses look for it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    return module
