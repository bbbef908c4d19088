"""The recipes by their names: this project's, and those in files of others.

Recipes are above the commands, and imported when they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from ipfm.engine.experiments.recipe import Recipe
from ipfm.engine.objectives.own_files import load, own_files

_PACKAGE = "ipfm.recipes"


def project_recipes() -> Iterator[Recipe[Any]]:
    """Those of ipfm.recipes, and of files of one's own that the user has named.

    Ablations, which are many runs, are none.

    Raises:
        ValueError: a file of one's own cannot be read, see `own_files`.
    """
    ours = (module.name for module in iter_modules(import_module(_PACKAGE).__path__, f"{_PACKAGE}."))
    for module in (*map(import_module, ours), *map(load, own_files())):
        recipe = getattr(module, "RECIPE", None)
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
    module = import_module(f"{_PACKAGE}.{stem}") if own else load(path)
    recipe = getattr(module, "RECIPE", None)
    if isinstance(recipe, Recipe):
        return recipe
    several = "is an ablation, several runs: give the recipe of one, such as " if hasattr(module, "ABLATION") else ""
    raise ValueError(f"{name} {several or 'has no RECIPE; this project has such as '}cifar_ipfm or digits_ipfm")


def _names() -> set[str]:
    return {module.name for module in iter_modules(import_module(_PACKAGE).__path__)}
