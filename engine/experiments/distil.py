"""A recipe that distils the teachers of a published data set: its settings, and the way from the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ipfm.engine.distributed.world import World, run_device
from ipfm.engine.evaluation.evaluation import Comparison
from ipfm.engine.evaluation.results import results_table
from ipfm.engine.experiments.dry_run import describe
from ipfm.engine.experiments.options import (
    DistillationOptions,
    check_images,
    read_teacher,
    run_name,
)
from ipfm.engine.experiments.recipe import Plan, Recipe, say_if_settled
from ipfm.engine.objectives.base import Distillation
from ipfm.engine.runtime.commandline import BadInput, Given
from ipfm.engine.runtime.launcher import launched_processes
from ipfm.engine.training.distiller import Distiller
from ipfm.engine.training.resolve import complete
from ipfm.engine.training.run_folder import check_run_folder, claimed, teacher_facts
from ipfm.models import NetworkConfig, Precond, presets


def same_for_every_D(base: DistillationOptions, D: float) -> DistillationOptions:
    """The settings of a recipe that has no variants."""
    return base


@dataclass(frozen=True)
class DistilPlan(Plan):
    """See `Plan`. A distillation with nothing left open but what memory decides."""

    recipe: DistilRecipe
    options: DistillationOptions
    config: Distillation
    network: NetworkConfig
    """The teacher's."""
    teacher: Precond | None
    """None in a dry run without one."""
    path: Path
    record: Mapping[str, Any]
    comparison: Comparison | None

    def describe(self) -> str:
        """See `Plan.describe`."""
        notes = self.recipe.notes(self.network, self.config)
        more = (self.recipe.help_with_teachers(),) if self.teacher is None else ()
        return describe(self.config, self.network, self.path, (*notes, *more), given=self.options.distillation())

    def begin(self, world: World) -> Callable[[], None]:
        """See `Plan.begin`."""
        assert self.teacher is not None
        path, notes = self.path, self.recipe.notes(self.network, self.config)
        evaluation = self.options.evaluation(self.comparison, world)
        # Published figures are those of unconditional networks.
        dataset = f"{self.recipe.dataset}-cond" if self.network.label_dim else self.recipe.dataset
        config = replace(self.config, resume=True)
        with claimed(path, self.record, self.config, write=world.is_main):
            distiller = Distiller(config, self.teacher, evaluation=evaluation, dataset=dataset, world=world)

        def train() -> None:
            if world.is_main:
                say_if_settled(path, "distill", config)
                print(*notes, sep="\n", end="\n" if notes else "")
            distiller.run(path)
            if world.is_main:
                if distiller.rows:
                    print(results_table(distiller.rows))
                print(f"generator: {path / 'generator'}")

        return train


@dataclass(frozen=True, kw_only=True)
class DistilRecipe(Recipe[DistillationOptions]):
    """Data-free distillation of the teachers of one data set."""

    dataset: str
    """Name under which published results are looked up; it also begins the run folder's name."""
    title: str
    """The data set's name for people."""
    shape: tuple[int, int, int]
    """(C, H, W) of its images."""
    preset: str
    """Network of a --dry-run without --teacher."""
    D: float
    """Auxiliary dimensions of a --dry-run with neither --teacher nor --D."""
    base: DistillationOptions
    """Settings, but for what a D changes; of the type of its objective's options."""
    variant: Callable[[Any, float], Any] = same_for_every_D
    """(base, D) -> the settings for this D."""
    settings_from: str = ""
    """Where the settings come from, if not from the paper of the method; printed with every run."""
    teachers: str
    """Which published checkpoints fit and where they are; how to train one."""

    @property
    def defaults(self) -> DistillationOptions:
        """See `Recipe.defaults`."""
        return self.base

    def plan(self, given: Given[DistillationOptions]) -> DistilPlan:
        """See `Recipe.plan`."""
        options = given.options
        if options.teacher_steps is not None:
            raise ValueError("teacher-steps was given, but this recipe trains no teacher")
        if options.teacher is None and not options.dry_run:
            raise BadInput("give --teacher; --dry-run works without one", self.help_with_teachers())
        teacher = read_teacher(options)
        network = self._network(options, teacher)
        # What the user gave stands; the rest comes from the variant for this teacher.
        options = given.over(self.settings_for(network))
        config = complete(options.distillation(), network, run_device())
        config.split(launched_processes())
        path = options.out or run_name(self.file.removesuffix(".py").removesuffix("_ipfm"), config, network.D)
        record = check_run_folder(path, "distill", config, teacher_facts(teacher))
        comparison = options.comparison(self.shape, run_device())
        return DistilPlan(self, options, config, network, teacher, path, record, comparison)

    def with_options(
        self,
        file: str,
        about: str | None,
        base: DistillationOptions,
        *,
        D: float,
        settings_of: str,
        preset: str | None = None,
    ) -> DistilRecipe:
        """The same data set with the settings, or by the objective, of another paper.

        Args:
            file: name of the recipe's file.
            about: what --help says first.
            base: settings, the same for every D.
            D: auxiliary dimensions of a --dry-run with neither --teacher nor --D.
            settings_of: whose settings they are, e.g. "SiD (arXiv 2404.04057)".
            preset: network of a --dry-run without --teacher; this recipe's when None.
        """
        return replace(
            self,
            file=file,
            about=about or "",
            base=base,
            variant=same_for_every_D,
            D=D,
            preset=preset or self.preset,
            settings_from=f"{self.title}: the settings of {settings_of}",
        )

    def settings_for(self, network: NetworkConfig) -> DistillationOptions:
        """The settings for a teacher: those for its D, without augmentation where it cannot be told of it."""
        options: DistillationOptions = self.variant(self.base, network.D)
        return options if network.augment_dim else replace(options, augment=0.0)

    def notes(self, network: NetworkConfig, config: Distillation) -> tuple[str, ...]:
        """What to know of these settings' standing, a line each."""
        lines: list[str] = []
        known = config.published(self.dataset)
        if self.settings_from:
            lines.append(self.settings_from)
        elif network.label_dim:
            lines.append(f"{self.title}: no result of this method is published for class-conditional networks")
        elif network.D not in known:
            summary = config.objective(network).summary
            possible = f"; published there: D = {', '.join(f'{D:g}' for D in known)}" if known else ""
            lines.append(f"{self.title}: no result is published for D = {network.D:g} {summary}{possible}")
        if self.base.augment > 0 and not network.augment_dim:
            lines.append(f"{self.title}: without augmentation, as the teacher takes no augmentation labels")
        return tuple(lines)

    def help_with_teachers(self) -> str:
        """Which published checkpoints fit, where they are, how to use, convert or train one."""
        C, H, W = self.shape
        return (
            f"Teachers that fit ({C}x{H}x{W}), published by their authors:\n{self.teachers}\n"
            f"Give such a file as it is:           {self.file} --teacher FILE [--D D where the file does not say it]\n"
            f"or make a model folder of it first:  ipfm convert FILE FOLDER [--D D]"
        )

    def _network(self, options: DistillationOptions, teacher: Precond | None) -> NetworkConfig:
        if teacher is None:
            return presets.get(self.preset, D=self.D if options.D is None else options.D)
        check_images(teacher.config, self.shape, f"{self.title} is")
        return teacher.config
