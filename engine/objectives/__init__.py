"""Methods of distillation, a file each, and what they share: losses, LPIPS, first weights, published figures.

A file of this folder with a class of settings (`Distillation`) that has a `kind` is an objective of this project; no
list names it. `OBJECTIVES` imports these files, with PyTorch, when it is first asked; `declared` reads in their source
what the command line has to know without that.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from ipfm.engine.objectives.base import Distillation
    from ipfm.models.facts import GeneratorFacts

# The objective where none is named.
DEFAULT = "ipfm"


class Registry(Mapping[str, "type[Distillation]"]):
    """The settings class of each objective by its kind."""

    def __getitem__(self, kind: str) -> type[Distillation]:
        return self._classes()[kind]

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes())

    def __len__(self) -> int:
        return len(self._classes())

    def of(self, kind: object, settings: Mapping[str, Any]) -> type[Distillation] | None:
        """The class of the settings that a folder holds.

        Args:
            kind: what the folder says, None for one that is older than the key.
            settings: its settings as JSON has them; they decide where it does not say.

        Returns:
            None for an objective that is not known here, and for settings of no distillation.
        """
        if kind is not None:
            return self.get(kind) if isinstance(kind, str) else None
        return next((found for found in self.values() if _is_ours(found) and found.recognises(settings)), None)

    def of_generator(self, facts: GeneratorFacts) -> tuple[type[Distillation] | None, Mapping[str, Any]]:
        """The class of a stored generator's settings, and these.

        Args:
            facts: what it says of itself. A generator that was converted, or is old, may say alpha or its
                parametrisation and no settings.
        """
        settings = {**facts.to_json(), **facts.settings}
        return self.of(facts.objective, settings), settings

    def _classes(self) -> Mapping[str, type[Distillation]]:
        for module in iter_modules(__path__, f"{__name__}."):
            import_module(module.name)
        from ipfm.engine.objectives.base import registered

        return registered()


OBJECTIVES = Registry()


def _is_ours(settings: type[Distillation]) -> bool:
    """Whether an objective is this project's: folders without a kind are older than all others."""
    return settings.__module__.startswith(f"{__name__}.")


@dataclass(frozen=True)
class Offered:
    """A setting that `ipfm plan` offers as an option, which may be left out."""

    type: Any
    help: str


@dataclass(frozen=True)
class Declared:
    """What the source of an objective's settings says to `ipfm plan`, see `Distillation.planned`."""

    offered: Mapping[str, Offered]
    example: str


def declared() -> Mapping[str, Declared]:
    """What the objectives declare by their kinds, read in their source: nothing is imported for it.

    Raises:
        ValueError: two of them have one kind.
    """
    found: dict[str, Declared] = {}
    for module in iter_modules(__path__):
        source = Path(module.module_finder.path, f"{module.name}.py").read_text(encoding="utf-8")  # type: ignore[union-attr]
        if not re.search(r'^    kind: ClassVar\[str\] = "\w', source, re.M):
            continue
        for settings in ast.parse(source).body:
            if isinstance(settings, ast.ClassDef):
                for kind, said in _declared(settings):
                    if kind in found:
                        raise ValueError(f"two objectives have the kind {kind!r}, the second one in {module.name}.py")
                    found[kind] = said
    return found


def _declared(settings: ast.ClassDef) -> Iterator[tuple[str, Declared]]:
    fields = {
        line.target.id: line
        for line in settings.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    }

    def constant(name: str, otherwise: Any) -> Any:
        value = fields[name].value if name in fields else None
        return otherwise if value is None else ast.literal_eval(value)

    if kind := constant("kind", ""):
        offered = {
            name: Offered(_evaluated(fields[name].annotation), text) for name, text in constant("planned", {}).items()
        }
        yield kind, Declared(offered, constant("plan_example", ""))


def _evaluated(annotation: ast.expr) -> Any:
    """The type that an annotation of a setting stands for, made of numbers, str, bool and Literal."""
    names = {"__builtins__": {kind.__name__: kind for kind in (int, float, str, bool)}, "Literal": Literal}
    return eval(compile(ast.Expression(annotation), "annotation", "eval"), names)
