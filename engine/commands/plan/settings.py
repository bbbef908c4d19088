"""Whose settings a plan is of: those of a recipe, of the recipe that fits a network, or an objective's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from ipfm.engine.checks import option_name
from ipfm.engine.commands.recipes import project_recipes
from ipfm.engine.config import RunConfig, TeacherConfig
from ipfm.engine.experiments.distil import DistilRecipe
from ipfm.engine.experiments.local import TrainAndDistil
from ipfm.engine.experiments.options import any_size, check_images
from ipfm.engine.experiments.origins import SOURCES, Origin
from ipfm.engine.experiments.own_distil import OwnDistilRecipe
from ipfm.engine.experiments.own_teacher import FROM_EDM, OwnTeacherRecipe
from ipfm.engine.experiments.recipe import Recipe
from ipfm.engine.experiments.teacher import TeacherRecipe
from ipfm.engine.objectives.base import Distillation
from ipfm.models import NetworkConfig, presets


@dataclass(frozen=True)
class Planned:
    """What is planned."""

    config: Distillation | TeacherConfig
    """Settings; the precision may be "auto", and the length not set."""
    network: NetworkConfig
    """The teacher's, or of the teacher that is trained."""
    recipe: Recipe[Any] | None = None
    """Whose settings these are, but for those that were given."""
    origin: Origin | None = None
    """Where the recipe has its length from; None where that is not known, or it is given."""
    length_given: bool = False
    """The length is none of the recipe's."""
    eval_images: int | None = None
    """Images of an evaluation; None where nothing is known of one."""
    always_evaluated: bool = False
    """There is an evaluation whatever is given."""
    teaching: tuple[TeacherConfig, NetworkConfig] | None = None
    """Settings and network of the teacher that the recipe trains before."""

    @property
    def source(self) -> str:
        """Where the length comes from, in words."""
        if self.recipe is None or self.length_given:
            return "given"
        if self.origin is None:
            return f"of {self.recipe.file}"
        remark = f": {self.origin.remark}" if self.origin.remark else ""
        said = SOURCES[self.origin.source].removesuffix(", as are all others")
        return f"of {self.recipe.file}, {said}{remark}"


def of_recipe(
    recipe: Recipe[Any],
    given: Mapping[str, Any],
    *,
    network: NetworkConfig | None = None,
    training: bool = False,
    size: str | None = None,
) -> Planned:
    """The settings of a recipe.

    Args:
        recipe: the recipe.
        given: settings by name that stand instead of its own.
        network: of the teacher, or to train; the recipe's own when None.
        training: the training of its teacher is asked for.
        size: of the teacher, of a recipe that is for several.

    Raises:
        ValueError: it has none of these settings, trains no teacher, or cannot do with this network.
    """
    if size is not None and not isinstance(recipe, DistilRecipe):
        raise ValueError(f"size {size} was given, but {recipe.file} has none: leave it out")
    if isinstance(recipe, TeacherRecipe):
        return _of_training(recipe, given, network)
    if isinstance(recipe, TrainAndDistil):
        return _of_both(recipe, given, network, training=training)
    if not isinstance(recipe, DistilRecipe):
        raise ValueError(f"{recipe.file} is no recipe that distils or trains a teacher")
    if training:
        raise ValueError(f"{recipe.file} trains no teacher; {', '.join(_that_train())} do")
    preset = recipe.preset_of(size)
    if network is None:
        network = presets.get(preset, D=recipe.D)
    else:
        recipe.check_network(network, size)
    values = {**vars(recipe.base), **given}
    if isinstance(recipe, OwnDistilRecipe):
        options = recipe.full(network, values)
    else:
        options = recipe.settings_for(network, values)
    config = _with(options.distillation(), given, recipe.file)
    origin, given_length = _origin(recipe, config, given), _length_given(given)
    return Planned(config, network, recipe, origin, given_length, options.eval_images)


def fitting_recipe(name: str, objective: str) -> Recipe[Any] | None:
    """The recipe whose settings are those of a distillation, where none is named.

    Args:
        name: of the preset, which a recipe of a published data set may have; another text for other networks.
        objective: kind of the objective.

    Returns:
        The preset's, of several the one that is named after the objective; else the one for teachers of any size. None
        for an objective without recipes.
    """
    preset = presets.FAMILIES.get(name, name)
    found = [r for r in project_recipes() if isinstance(r, DistilRecipe) and r.base.kind == objective]
    own = [r for r in found if isinstance(r, OwnDistilRecipe)]
    named = sorted(
        (r for r in found if r not in own and preset in r.presets),
        key=lambda r: not r.file.endswith(f"_{objective}.py"),
    )
    # Of the two for any size that share an objective, too.
    return next(iter([*named, *sorted(own, key=lambda r: not r.file.endswith(f"_{objective}.py"))]), None)


def fitting_training(name: str) -> Recipe[Any] | None:
    """The same of the training of a teacher."""
    preset = presets.FAMILIES.get(name, name)
    found = [r for r in project_recipes() if isinstance(r, TeacherRecipe)]
    own = [r for r in found if isinstance(r, OwnTeacherRecipe)]
    named = [
        r for r in found if r not in own and preset in r.presets.values() and presets.get(preset).image_shape == r.shape
    ]
    return next(iter([*named, *own]), None)


def _of_training(recipe: TeacherRecipe, given: Mapping[str, Any], network: NetworkConfig | None) -> Planned:
    options = recipe.base
    if network is not None and not isinstance(recipe, OwnTeacherRecipe):
        check_images(network, recipe.shape, f"{recipe.title} is", "train_teacher.py takes images of any size")
    if isinstance(recipe, OwnTeacherRecipe):
        start = network or presets.get(recipe.presets[options.arch])
        base, options = recipe.full(start, None)
        network = network or base
    elif network is None:
        base = presets.get(recipe.presets[options.arch])
        augmented = options.augment > 0
        network = options.network(base, recipe.shape, D=recipe.D, classes=0, augmented=augmented)
    config = _with(options.training(), given, recipe.file)
    origin = None if _length_given(given) or config.kimg is None else FROM_EDM["kimg"]
    # A row of the rule that is this project's own has another length than EDM's.
    origin = origin if config.kimg in {r.base.kimg for r in _published_trainings()} else None
    return Planned(config, network, recipe, origin, _length_given(given), options.eval_images)


def _of_both(
    recipe: TrainAndDistil[Any], given: Mapping[str, Any], network: NetworkConfig | None, *, training: bool
) -> Planned:
    own, made = network is None, recipe.network(recipe.base, recipe.D)
    network = network or made
    check_images(network, made.image_shape, f"the {recipe.title} are", any_size(recipe.file))
    teaching = recipe.teaching(recipe.base)
    if training:
        return Planned(_with(teaching, given, recipe.file), network, recipe, length_given=_length_given(given))
    config = _with(recipe.base.distillation(), given, recipe.file)
    return Planned(
        config,
        network,
        recipe,
        length_given=_length_given(given),
        eval_images=recipe.base.eval_images,
        always_evaluated=True,
        teaching=(teaching, network) if own else None,
    )


def _with(config: Any, given: Mapping[str, Any], file: str) -> Any:
    """The settings with those that were given."""
    names = {f.name for f in fields(config)}
    for name in given:
        if name not in names:
            raise ValueError(f"{file} has no {option_name(name)}: leave it out")
    # Of the two lengths the one that is given counts.
    without = {"kimg": None, "max_steps": None} if _length_given(given) else {}
    return replace(config, **{**without, **given})


def _length_given(given: Mapping[str, Any]) -> bool:
    return "kimg" in given or "max_steps" in given


def _origin(recipe: DistilRecipe, config: RunConfig, given: Mapping[str, Any]) -> Origin | None:
    """Where a length comes from."""
    if _length_given(given):
        return None
    if isinstance(recipe, OwnDistilRecipe):
        # That of the row's recipe, where it is one's, and by the same method.
        same = [row for row in recipe.rows.values() if row.base.kind == recipe.base.kind]
        rows = (row for row in same if row.base.kimg == config.kimg)
        return next((row.origins["kimg"] for row in rows if "kimg" in row.origins), None)
    return recipe.origins.get("kimg")


def _that_train() -> Iterator[str]:
    yield from (recipe.file for recipe in project_recipes() if isinstance(recipe, (TeacherRecipe, TrainAndDistil)))


def _published_trainings() -> Iterator[TeacherRecipe]:
    for recipe in project_recipes():
        if isinstance(recipe, TeacherRecipe) and not isinstance(recipe, OwnTeacherRecipe):
            yield recipe
