"""Methods of distillation, a file each, and what they share: losses, LPIPS, first weights, published figures.

A file of this folder with a class of settings (`Distillation`) that has a `kind` is an objective of this project; no
list names it. Files of one's own outside are named by the user, see `own_files`. `OBJECTIVES` imports all of them, with
PyTorch, when it is first asked; `declared` reads in their source what the command line has to know without that.

The names in ``__all__`` are what a file of one's own is made of (docs/own-objective.md); they are kept.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, Literal

from ipfm.engine.objectives.own_files import load, own_files
from ipfm.engine.runtime.lazy import loaded

if TYPE_CHECKING:
    from ipfm.engine.config import setting
    from ipfm.engine.objectives.base import Distillation, Objective, Role, StepContext, Steps
    from ipfm.engine.objectives.checking import check_objective
    from ipfm.engine.objectives.initial_networks import generator_network, initial_weights
    from ipfm.engine.objectives.losses import (
        Noisy,
        add_noise,
        along,
        bind,
        denoising_objective,
        finite_samples,
        generator_gradient,
        held,
        per_sample,
    )
    from ipfm.engine.objectives.phases import mark
    from ipfm.engine.objectives.step_metrics import LossSum, StepMetrics
    from ipfm.engine.random_streams import ObjectiveStream, draw_labels, draw_number, seed_dropout
    from ipfm.engine.sampling.batches import sample_generator, sample_trajectory
    from ipfm.models.facts import GeneratorFacts

__all__ = [
    "DEFAULT",
    "OBJECTIVES",
    "Distillation",
    "LossSum",
    "Noisy",
    "Objective",
    "ObjectiveStream",
    "Role",
    "StepContext",
    "StepMetrics",
    "Steps",
    "add_noise",
    "along",
    "bind",
    "check_objective",
    "declared",
    "denoising_objective",
    "draw_labels",
    "draw_number",
    "finite_samples",
    "generator_gradient",
    "generator_network",
    "held",
    "initial_weights",
    "mark",
    "per_sample",
    "sample_generator",
    "sample_trajectory",
    "seed_dropout",
    "setting",
]

# Loaded when they are asked for: this package itself loads without PyTorch.
_HOMES = {
    "config": ("setting",),
    "objectives.base": ("Distillation", "Objective", "Role", "StepContext", "Steps"),
    "objectives.checking": ("check_objective",),
    "objectives.initial_networks": ("generator_network", "initial_weights"),
    "objectives.losses": (
        *("Noisy", "add_noise", "along", "bind", "denoising_objective", "finite_samples", "generator_gradient"),
        *("held", "per_sample"),
    ),
    "objectives.phases": ("mark",),
    "objectives.step_metrics": ("LossSum", "StepMetrics"),
    "random_streams": ("ObjectiveStream", "draw_labels", "draw_number", "seed_dropout"),
    "sampling.batches": ("sample_generator", "sample_trajectory"),
}


def __getattr__(name: str) -> Any:
    return loaded(__name__, _HOMES, name)


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
        classes = self._classes().values()
        return next((found for found in classes if _is_ours(found) and found.recognises(settings)), None)

    def of_generator(self, facts: GeneratorFacts) -> tuple[type[Distillation] | None, Mapping[str, Any]]:
        """The class of a stored generator's settings, and these.

        Args:
            facts: what it says of itself. A generator that was converted, or is old, may say alpha or its
                parametrisation and no settings.
        """
        settings = {**facts.to_json(), **facts.settings}
        return self.of(facts.objective, settings), settings

    def _classes(self) -> Mapping[str, type[Distillation]]:
        _import_ours()
        for path in own_files():
            load(path)
        from ipfm.engine.objectives.base import registered

        return registered()


OBJECTIVES = Registry()


@cache
def _import_ours() -> None:
    for module in iter_modules(__path__, f"{__name__}."):
        import_module(module.name)


def _is_ours(settings: type[Distillation]) -> bool:
    """Whether an objective is this project's: folders without a kind are older than all others."""
    return settings.__module__.startswith(f"{__name__}.")


@dataclass(frozen=True)
class Offered:
    """A setting that `ipfm plan` offers as an option, which may be left out."""

    type: Any
    help: str


@dataclass(frozen=True)
class _Class:
    """What a class hands on to those that are made from it."""

    offered: Mapping[str, Offered]
    annotations: Mapping[str, ast.expr]
    """Of its settings, by name."""


@dataclass(frozen=True)
class Declared:
    """What the source of an objective's settings says to `ipfm plan`, see `Distillation.planned`."""

    offered: Mapping[str, Offered]
    example: str


def declared(*, own: bool = True) -> Mapping[str, Declared]:
    """What the objectives declare by their kinds, read in their source: nothing is imported for it.

    Args:
        own: with the files of one's own, see `own_files`.

    Raises:
        ValueError: two of them have one kind, or a file of one's own cannot be read; one line.
    """
    found: dict[str, Declared] = {}
    classes: dict[str, _Class] = {}
    files = [Path(module.module_finder.path, f"{module.name}.py") for module in iter_modules(__path__)]  # type: ignore[union-attr]
    sources = {path: path.read_text(encoding="utf-8") for path in files}
    # Those with a kind, and those with settings that others are made from.
    sources = {path: s for path, s in sources.items() if re.search(_SETTINGS, s, re.M)}
    read = {path: dict(_kinds(sources[path], classes, path.name)) for path in _bases_first(sources)}
    every = [(path, read[path]) for path in sources]
    for path in own_files() if own else ():
        every.append((path, dict(_kinds(path.read_text(encoding="utf-8"), classes, str(path)))))
        if not every[-1][1]:
            raise ValueError(f'{path} has no objective: no class in it has a line such as kind: ClassVar[str] = "mine"')
    for path, said in every:
        for kind in said.keys() & found.keys():
            raise ValueError(f"two objectives have the kind {kind!r}, the second one in {path.name}")
        found |= said
    return found


_SETTINGS = r'^    kind: ClassVar\[str\] = "\w|^class \w+Config\('


def _bases_first(sources: Mapping[Path, str]) -> list[Path]:
    """The files of `sources` in another order: one from which another imports comes before it."""
    names = {path.stem: path for path in sources}
    order: list[Path] = []

    def take(path: Path) -> None:
        for name in re.findall(rf"^from {re.escape(__name__)}\.(\w+) import", sources[path], re.M):
            if name in names and names[name] not in order:
                take(names[name])
        if path not in order:
            order.append(path)

    for path in sources:
        take(path)
    return order


def _kinds(source: str, classes: dict[str, _Class], file: str) -> Iterator[tuple[str, Declared]]:
    """The kinds of a file with what they declare; what its classes hand on is added to `classes`."""
    try:
        body = ast.parse(source).body
    except SyntaxError as error:
        raise ValueError(f"{file}, line {error.lineno}: {error.msg}") from None
    for settings in body:
        if not isinstance(settings, ast.ClassDef):
            continue
        inherited: dict[str, Offered] = {}
        annotations: dict[str, ast.expr] = {}
        for base in settings.bases:
            if known := classes.get(ast.unparse(base).rpartition(".")[2]):
                inherited |= known.offered
                annotations |= known.annotations
        try:
            kind, offered, example = _declared(settings, annotations)
        except (ValueError, NameError, TypeError, SyntaxError) as error:
            raise ValueError(f"{file}, line {settings.lineno}: {settings.name}: {error}") from None
        classes[settings.name] = _Class(inherited | offered, annotations)
        if kind:
            yield kind, Declared(classes[settings.name].offered, example)


def _declared(settings: ast.ClassDef, annotations: dict[str, ast.expr]) -> tuple[str, dict[str, Offered], str]:
    """Kind, what `ipfm plan` offers of it, and the example, of a class; "" where it has none.

    Args:
        settings: the class.
        annotations: those that it inherits, to which its own are added.
    """
    fields: dict[str, ast.expr | None] = {}
    for line in settings.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            fields[line.target.id], annotations[line.target.id] = line.value, line.annotation
        elif isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            fields[line.targets[0].id] = line.value

    def constant(name: str, otherwise: Any) -> Any:
        value = fields.get(name)
        try:
            return otherwise if value is None else ast.literal_eval(value)
        except ValueError:
            raise ValueError(
                f"{name} must be written as a constant, as ipfm plan reads it without running it"
            ) from None

    offered = {}
    kind = constant("kind", "")
    for name, text in (constant("planned", {}) if kind else {}).items():
        if name not in annotations:
            raise ValueError(f"planned names {name}, which is no setting of this class")
        try:
            offered[name] = Offered(_evaluated(annotations[name]), text)
        except (NameError, TypeError):
            written = ast.unparse(annotations[name])
            raise ValueError(
                f"planned names {name}, whose annotation must be made of int, float, str, bool, tuple, None and "
                f"Literal, got {written}"
            ) from None
    return kind, offered, constant("plan_example", "") if kind else ""


def _evaluated(annotation: ast.expr) -> Any:
    """The type that an annotation of a setting stands for, made of numbers, str, bool, tuple and Literal."""
    names = {"__builtins__": {kind.__name__: kind for kind in (int, float, str, bool, tuple)}, "Literal": Literal}
    return eval(compile(ast.Expression(annotation), "annotation", "eval"), names)
