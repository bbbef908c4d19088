"""A recipe that distils the teachers of a published data set: its settings, and the way from the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ipfm.engine.config import added_settings
from ipfm.engine.data.comparison import comparison_said
from ipfm.engine.data.dataset import ImageDataset
from ipfm.engine.distributed.device import run_device
from ipfm.engine.distributed.world import World
from ipfm.engine.evaluation.evaluation import Comparison
from ipfm.engine.evaluation.results import EvaluationRow, read_results, results_table
from ipfm.engine.experiments.branch import branched, check_agreed, described_branch
from ipfm.engine.experiments.dry_run import describe
from ipfm.engine.experiments.options import (
    DistillationOptions,
    any_size,
    check_images,
    counted_classes,
    read_teacher,
    run_name,
)
from ipfm.engine.experiments.origins import Origin, described
from ipfm.engine.experiments.real_data import read_real
from ipfm.engine.experiments.recipe import Plan, Recipe, say_if_settled
from ipfm.engine.experiments.starts import described_start, read_start
from ipfm.engine.objectives.base import Distillation
from ipfm.engine.runtime.commandline import BadInput, Given
from ipfm.engine.runtime.files import read_json
from ipfm.engine.runtime.launcher import is_first_process, launched_processes
from ipfm.engine.training.data_order import real_facts
from ipfm.engine.training.distiller import Distiller, remark_on_metrics
from ipfm.engine.training.monitor import COMPARISON_FILE
from ipfm.engine.training.resolve import complete
from ipfm.engine.training.run_folder import as_begun, check_run_folder, claimed, teacher_facts
from ipfm.engine.training.snapshots import best_said
from ipfm.engine.training.start import Branch, DistillationStart, start_facts
from ipfm.models import NetworkConfig, Precond, presets
from ipfm.models.autoencoder import Autoencoder

# (settings by name, the teacher's network) -> what the recipe sets otherwise then.
Variation = Callable[[Mapping[str, Any], NetworkConfig], Mapping[str, Any]]


def no_variant(settings: Mapping[str, Any], network: NetworkConfig) -> Mapping[str, Any]:
    """A recipe whose settings are the same for every teacher."""
    return {}


@dataclass(frozen=True)
class SettledDistillation:
    """What a recipe decides of a distillation once its teacher is known."""

    options: DistillationOptions
    path: Path
    """The run folder."""
    dataset: str
    """Name of the teacher's data, which the result records and under which figures are looked up."""
    kept: Mapping[str, Any] = field(default_factory=dict)
    """Settings that the run in the folder was begun with, and the recipe has otherwise now."""
    said: tuple[str, ...] = ()
    """What to know of the settings, where that is not the same for every teacher, a line each."""
    data: ImageDataset | None = None
    """Images that the samples stand beside."""


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
    chosen: frozenset[str]
    """Settings that were given on the command line."""
    settled: SettledDistillation
    start: DistillationStart | None = None
    """What it goes on from, unless it begins with the teacher."""
    branch: Branch | None = None
    """The run whose settings are the defaults."""
    autoencoder: Autoencoder | None = None
    """Of latents."""
    real: ImageDataset | None = None
    """From which the student learns beside the generator's samples."""

    @property
    def kept(self) -> Mapping[str, Any]:
        """Settings that the run in the folder was begun with, and the recipe has otherwise now."""
        return self.settled.kept

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know of the settings, a line each."""
        kept = ", ".join(f"{name} {value}" for name, value in self.kept.items())
        lines = (f"as the run in {self.path} was begun: {kept}; the recipe itself is another now",) if kept else ()
        said = (*self.settled.said, *self.recipe.notes(self.network, self.config))
        begins_with = (*described_branch(self.branch, self.config), *described_start(self.start, self.config))
        return (*said, *lines, *begins_with)

    def describe(self) -> str:
        """See `Plan.describe`."""
        more = (self.recipe.help_with_teachers(),) if self.teacher is None else ()
        own = self.settled.said  # which say where their settings come from
        origins = () if own else described(self.recipe.origins, self.chosen | self.kept.keys())
        notes, given = (*origins, *self.notes, *more), self.options.distillation()
        first = 0 if self.start is None else self.start.first_step(self.config.batch)
        images = None if self.comparison is None else self.options.eval_images
        config = as_begun(self.config, self.record)
        return describe(config, self.network, self.path, notes, given=given, first=first, images=images)

    def show(self) -> bool:
        """See `Plan.show`."""
        if not say_if_settled(self.path, "distill", self.config, measured=self.comparison is not None):
            return False
        if is_first_process():
            rows = read_results(self.path)
            if remark := remark_on_metrics(self.path, self.options.metrics, rows):
                print(remark, file=sys.stderr)
            print(*self.notes, sep="\n", end="\n" if self.notes else "")
            _print_result(self.path, rows)
        return True

    def begin(self, world: World) -> Callable[[], None]:
        """See `Plan.begin`."""
        assert self.teacher is not None
        path, notes = self.path, self.notes
        evaluation = self.options.evaluation(self.comparison, world)
        if evaluation is not None and self.settled.data is not None:
            evaluation = replace(evaluation, data=self.settled.data)
        config, dataset = replace(self.config, resume=True), self.settled.dataset
        check_agreed(self.branch, world)
        with claimed(path, self.record, self.config, write=world.is_main):
            distiller = Distiller(
                config,
                self.teacher,
                evaluation=evaluation,
                autoencoder=self.autoencoder,
                dataset=dataset,
                start=self.start,
                real=self.real,
                world=world,
            )

        def train() -> None:
            if world.is_main:
                say_if_settled(path, "distill", config)
                print(*notes, sep="\n", end="\n" if notes else "")
            distiller.run(path)
            if world.is_main:
                _print_result(path, distiller.rows)

        return train


def _print_result(path: Path, rows: list[EvaluationRow]) -> None:
    """What the run in `path` has left; `rows`: its table, which may be empty."""
    if rows:
        print(results_table(rows))
    print(f"generator: {path / 'generator'}")
    if best := best_said(path, "distill"):
        print(best)
    if picture := comparison_said(path / COMPARISON_FILE):
        print(picture)


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
    """Settings, but for those of a variant; of the type of its objective's options."""
    variant: Variation = no_variant
    """What is set otherwise for some teachers, or beside other settings, where it is not given."""
    origins: Mapping[str, Origin] = field(default_factory=dict)
    """Where the settings come from, by name; those that are not named are this project's."""
    formerly: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Name of a setting -> its values in earlier versions of the recipe, which a run that was begun with them keeps."""
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
        given, branch = branched(given, self.base)
        options = given.options
        if options.teacher_steps is not None:
            raise ValueError("teacher-steps was given, but this recipe trains no teacher")
        if options.teacher is None and not options.dry_run:
            raise BadInput(f"{self.wanted(options)}; --dry-run works without one", self.help_with_teachers())
        teacher = read_teacher(options)
        network = self._network(options, teacher)
        settled = self.settle(given, network, teacher)
        options, path = counted_classes(settled.options, network), settled.path
        config = complete(options.distillation(), network, run_device())
        config.split(launched_processes())
        start = read_start(options, config, teacher, path, branch)
        real = read_real(options, config, network, lambda: settled.data)
        facts = {**teacher_facts(teacher), **start_facts(start), **real_facts(real)}
        record = check_run_folder(path, "distill", config, facts)
        compared = settled.data if options.reference is None else None
        autoencoder = options.autoencoder(network.image_shape, run_device())
        comparison = options.comparison(network.image_shape, run_device(), images=compared, autoencoder=autoencoder)
        chosen = given.names & self.origins.keys()
        return DistilPlan(
            self,
            options,
            config,
            network,
            teacher,
            path,
            record,
            comparison,
            chosen,
            settled,
            start,
            branch,
            autoencoder,
            real,
        )

    def settle(
        self, given: Given[DistillationOptions], network: NetworkConfig, teacher: Precond | None
    ) -> SettledDistillation:
        """What the recipe decides for this teacher; nothing is written.

        What the user gave stands; the rest comes from the variant for this teacher, or from the run that is there.

        Args:
            given: the command line.
            network: the teacher's.
            teacher: None in a dry run without one.

        Raises:
            ValueError: what is given cannot be used.
        """
        options = given.over(self.settings_for(network, vars(given.options)))
        path = options.out or run_name(self.run_stem(network), options.distillation(), network.D)
        kept = self._as_begun(path, options, given.names)
        return SettledDistillation(replace(options, **kept), path, self.figures_of(network), kept)

    def with_options(
        self,
        file: str,
        about: str | None,
        base: DistillationOptions,
        *,
        D: float,
        settings_of: str,
        preset: str | None = None,
        variant: Variation = no_variant,
        origins: Mapping[str, Origin] | None = None,
        formerly: Mapping[str, tuple[Any, ...]] | None = None,
    ) -> DistilRecipe:
        """The same data set with the settings, or by the objective, of another paper.

        Args:
            file: name of the recipe's file.
            about: what --help says first.
            base: settings, but for those of a variant.
            D: auxiliary dimensions of a --dry-run with neither --teacher nor --D.
            settings_of: whose settings they are, e.g. "SiD (arXiv 2404.04057)".
            preset: network of a --dry-run without --teacher; this recipe's when None.
            variant: see `variant`.
            origins: see `origins`.
            formerly: see `formerly`.
        """
        return replace(
            self,
            file=file,
            about=about or "",
            base=base,
            variant=variant,
            origins=origins or {},
            formerly=formerly or {},
            D=D,
            preset=preset or self.preset,
            settings_from=f"{self.title}: the settings of {settings_of}",
        )

    def help_text(self) -> str:
        """See `Recipe.help_text`: with the origins of the settings."""
        return "\n".join((self.about.rstrip(), "", *described(self.origins))) if self.origins else self.about

    def settings_for(self, network: NetworkConfig, settings: Mapping[str, Any]) -> DistillationOptions:
        """The recipe's settings for a teacher, beside those that were given.

        Without augmentation where the teacher cannot be told of it.

        Args:
            network: the teacher's.
            settings: by name, as they are given or by default.
        """
        options = self.varied(settings, network)
        return options if network.augment_dim else replace(options, augment=0.0)

    def varied(self, settings: Mapping[str, Any], network: NetworkConfig) -> DistillationOptions:
        """The recipe's settings beside these ones, for teachers of this architecture.

        Args:
            settings: by name, as they are or as JSON has them.
            network: the teacher's.
        """
        return replace(self.base, **self.variant(settings, network))

    # -- what recipes of several networks have otherwise, see `SizedDistilRecipe` -------------------------------------

    @property
    def presets(self) -> tuple[str, ...]:
        """The networks whose settings these are."""
        return (self.preset,)

    def preset_of(self, size: str | None) -> str:
        """The network of a --dry-run without --teacher.

        Args:
            size: as --size names it.

        Raises:
            ValueError: there is none of this size.
        """
        if size is not None:
            raise ValueError(f"size {size} was given, but {self.file} is for one network: leave it out")
        return self.preset

    def check_network(self, network: NetworkConfig, size: str | None = None) -> None:
        """Check that a teacher fits.

        Args:
            network: the teacher's.
            size: as --size names it.

        Raises:
            ValueError: it makes other images, or is another network than was asked for.
        """
        check_images(network, self.shape, f"{self.title} is", any_size(self.file))

    def wanted(self, options: DistillationOptions) -> str:
        """What to give where the teacher is missing."""
        return "give --teacher"

    def run_stem(self, network: NetworkConfig) -> str:
        """How the names of its run folders begin, up to "-D"."""
        return self.file.removesuffix(".py").removesuffix("_ipfm")

    def names(self, folder: str) -> bool:
        """Whether the name of a run folder is one that this recipe gives."""
        return folder.startswith(f"{self.file.removesuffix('.py').removesuffix('_ipfm')}-D")

    def size_options(self, network: NetworkConfig) -> list[str]:
        """The options that name this network."""
        return []

    # ------------------------------------------------------------------------------------------------------------------

    def _as_begun(self, path: Path, options: DistillationOptions, given: frozenset[str]) -> dict[str, Any]:
        """What the run in `path` has of an earlier version of this recipe, where nothing else is given."""
        begun = (read_json(path / "config.json") or {}).get("config")
        if not isinstance(begun, dict):
            return {}
        begun = {**added_settings(options.settings_class()), **begun}
        found = {n: begun[n] for n, values in self.formerly.items() if n in begun and begun[n] in values}
        # Another length may be asked for in two ways.
        if {"kimg", "max_steps"} & given or begun.get("max_steps") is not None:
            found.pop("kimg", None)
        return {name: value for name, value in found.items() if name not in given}

    def figures_of(self, network: NetworkConfig) -> str:
        """The name under which the figures of such teachers are published: those of unconditional ones are apart."""
        return f"{self.dataset}-cond" if network.label_dim else self.dataset

    def notes(self, network: NetworkConfig, config: Distillation) -> tuple[str, ...]:
        """What to know of these settings' standing, a line each."""
        lines: list[str] = []
        dataset = self.figures_of(network)
        known = config.published(dataset)
        figure = config.figure(dataset, config.to_json(), network)
        if self.settings_from:
            lines.append(self.settings_from)
        if figure is not None:
            lines.append(f"{self.title}: published is {figure}")
        elif self.settings_from:
            pass
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
        size: str | None = getattr(options, "size", None)
        preset = self.preset_of(size)
        if teacher is None:
            return presets.get(preset, D=self.D if options.D is None else options.D)
        self.check_network(teacher.config, size)
        return teacher.config
