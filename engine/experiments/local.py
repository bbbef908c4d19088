"""A recipe whose data are at hand: it trains a small teacher on them, distils it, and measures against them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from ipfm.engine.config import TeacherConfig
from ipfm.engine.data.comparison import comparison_said
from ipfm.engine.data.dataset import ImageDataset
from ipfm.engine.distributed.device import run_device
from ipfm.engine.distributed.world import World
from ipfm.engine.evaluation.evaluation import Evaluation
from ipfm.engine.evaluation.metrics import Features, Metric, dataset_reference
from ipfm.engine.evaluation.metrics.features import Classifier
from ipfm.engine.evaluation.metrics.measures import measures_of
from ipfm.engine.evaluation.reference_data import ReferenceFile, make_reference
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
from ipfm.engine.experiments.real_data import read_real
from ipfm.engine.experiments.recipe import Plan, Recipe, say_if_settled
from ipfm.engine.experiments.starts import described_start, read_start
from ipfm.engine.objectives.base import Distillation
from ipfm.engine.runtime.commandline import Given, user_input
from ipfm.engine.runtime.launcher import is_first_process, launched_processes
from ipfm.engine.runtime.wording import counted
from ipfm.engine.training.checkpoint import checkpoints_in, step_of
from ipfm.engine.training.data_order import real_facts
from ipfm.engine.training.distiller import Distiller, remark_on_metrics
from ipfm.engine.training.monitor import COMPARISON_FILE
from ipfm.engine.training.resolve import complete, resolve_precision
from ipfm.engine.training.run_folder import (
    EXPORTS,
    as_begun,
    check_run_folder,
    claimed,
    exported_steps,
    is_settled,
    open_run_folder,
    teacher_facts,
)
from ipfm.engine.training.set_aside import go_back
from ipfm.engine.training.snapshots import best_said
from ipfm.engine.training.start import Branch, DistillationStart, start_facts
from ipfm.engine.training.teacher import TeacherTraining, training_facts
from ipfm.models import NetworkConfig, Precond, load_model
from ipfm.models.store import TENSOR_FILE

O = TypeVar("O", bound=DistillationOptions)
P = TypeVar("P", bound=DistillationOptions)


@dataclass(frozen=True)
class TrainAndDistilPlan(Plan):
    """See `Plan`. A teacher's training, unless there is one, and its distillation."""

    recipe: TrainAndDistil[Any]
    options: DistillationOptions
    config: Distillation
    network: NetworkConfig
    """The teacher's."""
    teacher: Precond | None
    """None where it is trained here, as `teaching` says."""
    teaching: TeacherConfig
    path: Path
    record: Mapping[str, Any]
    start: DistillationStart | None = None
    """What the distillation goes on from, unless it begins with the teacher."""
    branch: Branch | None = None
    """The run whose settings are the defaults."""
    real: ImageDataset | None = None
    """From which the student learns beside the generator's samples."""

    @property
    def begins_with(self) -> tuple[str, ...]:
        """Lines on what it goes on from."""
        return (*described_branch(self.branch, self.config), *described_start(self.start, self.config))

    def describe(self) -> str:
        """See `Plan.describe`."""
        teaching = None if self.teacher is not None else self.teaching
        notes, given = self.begins_with, self.options.distillation()
        first = 0 if self.start is None else self.start.first_step(self.config.batch)
        images = self.options.eval_images
        config = as_begun(self.config, self.record)
        return describe(
            config, self.network, self.path, notes, given=given, teaching=teaching, first=first, images=images
        )

    def show(self) -> bool:
        """See `Plan.show`."""
        if not say_if_settled(self.path, "distill", self.config):
            return False
        if is_first_process():
            rows = read_results(self.path)
            if self.teacher is None and not _has_weights(self.path / "teacher" / EXPORTS["teacher"]):
                print(f"the teacher that it was distilled from is not in {self.path}", file=sys.stderr)
            if remark := remark_on_metrics(self.path, self.options.metrics, rows):
                print(remark, file=sys.stderr)
            print(*(f"{line}\n" for line in self.begins_with), sep="", end="")
            self._print(rows)
        return True

    def _print(self, rows: list[EvaluationRow]) -> None:
        """What the run has left; `rows`: its table, which may be empty."""
        recipe, path = self.recipe, self.path
        if rows:
            print(f"\n{_named(rows)} {recipe.compared} against all {len(recipe.dataset)} {recipe.title}\n")
            print(results_table(rows))
        print(f"run folder: {path}   generator: {path / 'generator'}   curve: {path / 'convergence.png'}")
        if best := best_said(path, "distill"):
            print(best)
        if picture := comparison_said(path / COMPARISON_FILE):
            print(picture)

    def begin(self, world: World) -> Callable[[], None]:
        """See `Plan.begin`. The teacher is a part of the training."""
        check_agreed(self.branch, world)
        with claimed(self.path, self.record, self.config, write=world.is_main):
            go_back(self.path, "distill", self.config, world)
            open_run_folder(self.path, self.record, write=world.is_main)
        return partial(self._train, world)

    def _train(self, world: World) -> None:
        recipe, path, teacher, start = self.recipe, self.path, self.teacher, self.start
        config = replace(self.config, resume=True)  # the folder is this run's from here on
        with user_input():
            features = self._features(world)
        if teacher is None:
            if world.is_main and "teacher" in self.record and not (path / "teacher").exists():
                print(f"{path} was distilled from a teacher that is not in it: it is trained again", file=sys.stderr)
            teacher = recipe.teacher(self.teaching, self.network, path / "teacher", world)
        # Features that were made for it are those of a network, and of many images.
        sharing = None if features is None else world
        evaluation = recipe.evaluation(self.options.eval_images, self.options.metrics, features=features, world=sharing)
        with user_input():
            # A folder whose generator came from a teacher that has been trained further since is refused here.
            facts = {**teacher_facts(teacher), **start_facts(start), **real_facts(self.real)}
            check_run_folder(path, "distill", config, facts)
            distiller = Distiller(config, teacher, evaluation=evaluation, start=start, real=self.real, world=world)
        if world.is_main:
            say_if_settled(path, "distill", config)
            print(*(f"{line}\n" for line in self.begins_with), sep="", end="")
        distiller.run(path)
        if world.is_main:
            self._print(distiller.rows)

    def _features(self, world: World) -> Features | None:
        """What images are compared by, where it has to be made first: a part of what the run is."""
        if self.recipe.by_options is None:
            return None
        features = self.recipe.by_options.features(self.options, self.recipe.dataset, self.path, world)
        facts = {**start_facts(self.start), **real_facts(self.real), "features": features.name}
        record = check_run_folder(self.path, "distill", replace(self.config, resume=True), facts)
        open_run_folder(self.path, {**self.record, **record}, write=world.is_main)
        return features


def _has_weights(folder: Path) -> bool:
    return (folder / TENSOR_FILE).is_file()


def _named(rows: list[EvaluationRow]) -> str:
    """What a table has been measured of, for its title: "Fréchet distance, precision, recall"."""
    names = ", ".join(measure.called(rows[0].metric) for measure in measures_of(rows[0].metrics))
    return names[:1].upper() + names[1:]


def check_own_teacher(folder: Path, teaching: TeacherConfig, *, distilled: bool) -> None:
    """Whether the teacher that was trained for a run can be the one that is asked for now.

    Args:
        folder: of its training.
        teaching: settings of its training.
        distilled: a run has begun to distil it; then it is to stay as it is.

    Raises:
        ValueError: its training is longer; it would have to go on though it has been distilled; or there is its
            result and nothing to continue from.
    """
    wanted, exported = teaching.total_steps, exported_steps(folder, "teacher")
    saved = max(map(step_of, checkpoints_in(folder / "checkpoints")), default=None)
    if exported is not None and saved is None:
        raise ValueError(
            f"{folder} has a teacher, and no checkpoint of its training: give --teacher {folder / EXPORTS['teacher']} "
            "to take it as it is, or choose another --out"
        )
    longer = saved is not None and saved > wanted
    if longer or (distilled and exported is not None and exported < wanted):
        done = max(saved or 0, exported or 0)
        raise ValueError(
            f"the teacher in {folder} has {counted(done, 'step')}{' and was distilled' if distilled else ''}, "
            f"--teacher-steps asks for {wanted}: give --teacher-steps {done}, or choose another --out"
        )


@dataclass(frozen=True, kw_only=True)
class ByOptions(Generic[O]):
    """What the options of a recipe decide, where they name data, or what images are compared by."""

    data: Callable[[O], ImageDataset]
    """Options -> the data."""
    features: Callable[[O, ImageDataset, Path, World], Features]
    """(options, data, run folder, world) -> what images are compared by; it may be trained here. Every process calls
    it, once the run folder is the run's."""
    compared: Callable[[O], str]
    """Options -> `TrainAndDistil.compared`."""


@dataclass(frozen=True, kw_only=True)
class TrainAndDistil(Recipe[O], Generic[O]):
    """A teacher trained on data at hand, or given, and its distillation.

    `main` is the command line. Without one, `teacher` and `distil` do its two halves:

        world = start_world()
        network = recipe.network(recipe.base, recipe.D)
        teacher = recipe.teacher(recipe.teaching(recipe.base), network, Path("runs/teacher"), world)
        for alpha in (0.5, 1.0):
            config = replace(recipe.base.distillation(), alpha=alpha)
            rows = recipe.distil(teacher, config, Path(f"runs/alpha{alpha:g}"), world)
    """

    name: Callable[[O], str]
    """Options -> how the run folder's name begins."""
    title: str
    """The images' name for people, in the plural."""
    data: Callable[[], ImageDataset]
    """Makes the data."""
    by_options: ByOptions[O] | None = None
    """Data and features, where options name them; what stands here of them is then for a script."""
    network: Callable[[O, float], NetworkConfig]
    """(options, D) -> the network of the teacher that is trained."""
    features: Callable[[tuple[int, int, int]], Features]
    """(C, H, W) -> what images are compared by."""
    compared: str
    """Says so: "in pixel space"."""
    D: float
    """Auxiliary dimensions with neither --teacher nor --D."""
    base: O
    """Settings of the distillation; their class has the recipe's options."""
    training: TeacherConfig
    """Settings of the teacher's training, but for those that the options decide, see `teaching`."""

    def with_options(self, file: str, about: str | None, base: P) -> TrainAndDistil[P]:
        """The same data and teacher, distilled as the class of these options says."""
        return replace(cast(TrainAndDistil[Any], self), file=file, about=about or "", base=base)

    # -- without a command line -------------------------------------------------------------------------------------

    @cached_property
    def dataset(self) -> ImageDataset:
        """The data, made once."""
        return self.data()

    def teaching(self, options: O) -> TeacherConfig:
        """Settings of the teacher that is trained when none is given: those of the run, where the two share them."""
        batch = self.training.batch
        return replace(
            self.training,
            D=self.D if options.D is None else options.D,
            # At most that of the distillation, and one that divides what a process has of the teacher's batch.
            micro_batch=options.micro_batch and math.gcd(options.micro_batch, batch // launched_processes()),
            max_steps=options.teacher_steps,
            zero=options.zero,
            precision=options.precision,
            tf32=options.tf32,
            deterministic=options.deterministic,
            attention_backend=options.attention_backend,
            memory_format=options.memory_format,
            compile=options.compile,
            noise=options.noise,
            seed=options.seed,
            rules=options.rules,
            log_every=options.log_every,
            heun_steps=options.heun_steps,
            resume=options.resume,
        )

    def check_teaching(self, folder: Path, config: TeacherConfig, network: NetworkConfig, *, distilled: bool) -> None:
        """Whether `teacher` can train in `folder`, or take what is there; see `check_own_teacher`. Nothing is written.

        Raises:
            ValueError: it cannot; one line.
        """
        check_own_teacher(folder, config, distilled=distilled)
        check_run_folder(folder, "teacher", config, training_facts(config, network, self.dataset, None))

    def teacher(self, config: TeacherConfig, network: NetworkConfig, path: Path, world: World) -> Precond:
        """The averaged teacher; trained in the run folder `path`, or read from there.

        Raises:
            ValueError: settings, network and data do not fit each other, or the folder belongs to another run.
            TrainingFailed, Interrupted: from the run.
        """
        return TeacherTraining(config, network, self.dataset, world=world).run(path)

    def distil(
        self, teacher: Precond, config: Distillation, path: Path, world: World, *, images: int | None = None
    ) -> list[EvaluationRow]:
        """Distil `teacher` in the run folder `path`, or continue there.

        Args:
            teacher: makes images like the data.
            config: settings; real images that they ask for are the recipe's data.
            path: the run folder; the generator is left in path/generator.
            world: the run's processes, each of which calls it.
            images: drawn for each distance to the data; the base settings' when None.

        Returns:
            The table: the teacher's row, then the generator's.

        Raises:
            ValueError: the teacher makes other images, contradicts the settings, or the folder belongs to another run.
            TrainingFailed, Interrupted: from the run.
        """
        check_images(teacher.config, self.dataset.shape, f"the {self.title} are")
        real = self.dataset if complete(config, teacher.config, run_device()).takes_real_images else None
        distiller = Distiller(config, teacher, evaluation=self.evaluation(images), real=real, world=world)
        distiller.run(path)
        return distiller.rows

    def evaluation(
        self,
        images: int | None = None,
        metrics: Sequence[Metric] | None = None,
        *,
        features: Features | None = None,
        world: World | None = None,
    ) -> Evaluation:
        """These metrics of `images` samples, the base settings' when None, against all the data.

        Args:
            images: drawn for each distance.
            metrics: what is measured; the base settings' when None.
            features: what images are compared by; the recipe's `features` when None.
            world: processes that share the data's features out, on their devices; each computes all of them, where
                the data lie, when None.
        """
        count = self.base.eval_images if images is None else images
        chosen = self.base.metrics if metrics is None else tuple(metrics)
        features = self.features(self.dataset.shape) if features is None else features
        single = bool({"kid", "pr"} & set(chosen))
        if world is None:
            reference = dataset_reference(self.dataset, features, keep_features=single)
        else:
            file = ReferenceFile(Path(self.dataset.name), None, self.dataset)
            reference = make_reference(file, features, world, keep_features=single)
        return Evaluation(features, reference, images=count, metrics=chosen, data=self.dataset)

    def check_metrics(self, metrics: Sequence[Metric]) -> None:
        """Check that these can be measured as this recipe compares images.

        Raises:
            ValueError: the Inception score, which other features than Inception's do not give.
        """
        if "is" in metrics and not isinstance(self.features(self.dataset.shape), Classifier):
            raise ValueError(
                f"metrics must be among fid, kid, pr, got {' '.join(metrics)}: this recipe compares {self.compared}, "
                "without the Inception network that the Inception score needs"
            )

    # -- the command line -------------------------------------------------------------------------------------------

    @property
    def defaults(self) -> O:
        """See `Recipe.defaults`."""
        return self.base

    def plan(self, given: Given[O]) -> TrainAndDistilPlan:
        """See `Recipe.plan`."""
        return self.on_data_of(given.options)._plan(given)

    def on_data_of(self, options: O) -> TrainAndDistil[O]:
        """The same on the data that the options name, where they do.

        Raises:
            ValueError: data that cannot be used, or are not there.
        """
        by = self.by_options
        if by is None:
            return self
        data = by.data(options)
        title = self.title if data.name == self.title else "images"
        return replace(self, data=lambda: data, title=title, compared=by.compared(options))

    def _plan(self, given: Given[O]) -> TrainAndDistilPlan:
        given, branch = branched(given, self.base)
        options = given.options
        config = options.distillation()
        config.split(launched_processes())
        teacher = read_teacher(options)
        options.autoencoder(self.dataset.shape, run_device())  # refused: these are pictures
        network = (
            self.network(options, self.D if options.D is None else options.D) if teacher is None else teacher.config
        )
        options = counted_classes(options, network)
        config = options.distillation()
        path = options.out or run_name(self.name(options), config, network.D)
        config = complete(config, network, run_device())
        check_images(network, self.dataset.shape, f"the {self.title} are", any_size(self.file))
        if options.reference is not None:
            raise ValueError(f"reference was given, but this recipe compares with the {self.title} themselves")
        self.check_metrics(options.metrics)
        teaching = resolve_precision(self.teaching(options), run_device())
        teaching.split(launched_processes())
        start = read_start(options, config, teacher, path, branch)
        real = read_real(options, config, network, lambda: self.dataset)
        facts = {**teacher_facts(teacher), **start_facts(start), **real_facts(real)}
        record = check_run_folder(path, "distill", config, facts)
        if teacher is None and (path / "teacher").exists():
            self._check_own(path, config, teaching, network, distilled="teacher" in record)
        return TrainAndDistilPlan(self, options, config, network, teacher, teaching, path, record, start, branch, real)

    def _check_own(
        self, path: Path, config: Distillation, teaching: TeacherConfig, network: NetworkConfig, *, distilled: bool
    ) -> None:
        """Whether the teacher in the run folder is the one that is asked for, and that which has been distilled."""
        own, settled = path / "teacher", is_settled(path, "distill", config)
        # Of a finished run, which is only shown, what is left of its teacher may be little, or nothing.
        if not settled or checkpoints_in(own / "checkpoints"):
            self.check_teaching(own, teaching, network, distilled=distilled)
        if settled and _has_weights(own / EXPORTS["teacher"]):
            check_run_folder(path, "distill", config, teacher_facts(load_model(own / EXPORTS["teacher"])))
