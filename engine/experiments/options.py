"""What every recipe shares: its options, the teacher that they name, and the name of a run."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ipfm.engine.checks import not_negative, option_name, positive
from ipfm.engine.config import InitialWeights
from ipfm.engine.evaluation.options import EvaluationOptions
from ipfm.engine.objectives.base import Distillation, lora_name
from ipfm.engine.random_streams import class_shares
from ipfm.engine.runtime.launcher import is_first_process
from ipfm.models import NetworkConfig, Precond, guided, load_teacher
from ipfm.models.checkpoints.run_models import locate

O = TypeVar("O", bound="DistillationOptions")


@dataclass(frozen=True, kw_only=True)
class DistillationOptions(Distillation, EvaluationOptions):
    """Options of every recipe that distils, beside those of its objective; `options_for` puts the two together."""

    ELSEWHERE: ClassVar[Mapping[str, str]] = {
        "data": "distillation takes no data; recipes for images of any size have it, to compare with, such as "
        "distill_ipfm.py; --real-data lets the student of IPFM and SiD learn from some",
        "transfer": "--continue-from takes a generator's weights; recipes that train a teacher have it",
    }

    init: InitialWeights | Path = "auto"  # type: ignore[assignment]
    """First weights of the generator: the teacher's, or random ones; auto is the teacher's, but random at another
    width. Or those of another run: its folder, whose average is taken as ipfm sample does, a model folder or a
    checkpoint file; with fresh optimisers and averages, from step 0, a second stage."""
    teacher_steps: int | None = None
    """Training steps of the teacher, in a recipe that trains one when --teacher is not given."""
    labels: Path | None = None
    """Draw the classes as often as they are in this dataset.json (.zip, folder, data set with labels), of which no
    image is read. Default: all alike."""
    continue_from: Path | None = None
    """Go on from there, in a run folder of its own: a training-state-*.pt of SiD or pfgmpp-idmd, a run folder or
    checkpoint (weights, averages, optimisers, images seen), or a generator alone."""
    branch: Path | None = None
    """Go on from a run's checkpoint, RUN or RUN:STEP, in --out: its settings are the defaults, its networks, averages
    and optimisers are taken. STEP: a number, best or last (the default)."""
    student_from: Path | None = None
    """First weights of the student: a model folder, a file with a fake_score, or a run folder. Beside a generator in
    --continue-from, or alone."""
    continue_at_kimg: float | None = None
    """Thousands of images that --continue-from has seen, where its name does not say it: the schedules go on there."""
    continue_average: str | None = None
    """Which average of the generator in --continue-from's file is gone on with, such as G_ema990. Default: G_ema, or
    the slowest."""
    teacher_anyway: bool = False
    """Take the network of --teacher also where the name or the folder of its file says that it is a generator."""
    dry_run: bool = False
    """Print the resolved configuration, the memory plan and the expected duration, and stop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_evaluation()
        if self.teacher_steps is not None and self.teacher_steps < 1:
            raise ValueError(f"teacher-steps must be at least 1, got {self.teacher_steps}")
        if self.labels is not None and self.class_counts:
            raise ValueError("labels and class-counts exclude each other: give one of them")
        if self.teacher_anyway and self.teacher is None:
            raise ValueError("teacher-anyway is for the file of a teacher: give --teacher too")
        if self.continue_average is not None and self.continue_from is None:
            raise ValueError("continue-average was given without continue-from")
        if self.continue_at_kimg is not None:
            not_negative("continue-at-kimg", self.continue_at_kimg)
            if self.continue_from is None:
                raise ValueError("continue-at-kimg was given without continue-from")
        self._check_other_starts()

    @property
    def init_from(self) -> Path | None:
        """What --init names, where that is no word: the generator begins with its weights."""
        return self.init if isinstance(self.init, Path) else None

    def _check_first_weights(self) -> None:
        if self.init_from is None:
            super()._check_first_weights()
        else:
            positive("width", self.width)

    def _check_other_starts(self) -> None:
        for option, init in (("continue_from", "init"), ("student_from", "student_init")):
            if getattr(self, option) is not None and getattr(self, init, "auto") != "auto":
                raise ValueError(
                    f"{option_name(init)} was given, but {option_name(option)} says what the first weights are"
                )

    @classmethod
    def settings_class(cls) -> type[Distillation]:
        """The class of the objective's settings alone."""
        return next(c for c in cls.__mro__ if issubclass(c, Distillation) and not issubclass(c, EvaluationOptions))

    def distillation(self) -> Distillation:
        """The settings of the distillation alone."""
        kind = self.settings_class()
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(kind)}
        # Which network it is, is a fact of the run, as of one that goes on from another.
        return kind(**values | ({} if self.init_from is None else {"init": "auto"}))


def counted_classes(options: O, network: NetworkConfig) -> O:
    """The options with the classes counted of which --labels names the place.

    Args:
        options: of a recipe.
        network: the teacher's.

    Raises:
        ValueError: no labels there that fit, counts of other classes, or a teacher that takes none.
    """
    from ipfm.engine.data.class_counts import class_counts

    if options.labels is None and not options.class_counts:
        return options
    if not network.label_dim:
        given = "class-counts" if options.labels is None else "labels"
        raise ValueError(f"{given} was given, but the teacher takes no classes: leave it out")
    counts = options.class_counts if options.labels is None else class_counts(options.labels, network.label_dim)
    class_shares(counts, network.label_dim)
    return dataclasses.replace(options, labels=None, class_counts=counts)


def options_for(settings: type[Distillation], shared: type[Any] = DistillationOptions) -> type[Any]:
    """The options of recipes that distil by an objective: its settings, and those that its recipes share.

    Args:
        settings: the class of the objective's settings, e.g. `DistillConfig`.
        shared: the other options, `DistillationOptions` or a class made from it.

    Returns:
        A dataclass made from both, the same one for the same arguments.
    """
    return _options_class(settings, shared)  # type: ignore[arg-type]


@functools.cache
def _options_class(settings: type[Distillation], shared: type[Any]) -> type[Any]:
    name = settings.__name__.removesuffix("Config") + shared.__name__.removeprefix("Distillation")
    members: dict[str, Any] = {"__doc__": settings.__doc__, "__module__": settings.__module__}
    # A default of the objective's own: those of all objectives are among `shared` too, which comes first.
    common, hints = {f.name: f for f in dataclasses.fields(shared)}, {}
    for f in dataclasses.fields(settings):
        other = common.get(f.name)
        if other is not None and (f.default, f.default_factory) != (other.default, other.default_factory):
            members[f.name] = dataclasses.field(default=f.default, metadata=f.metadata)
            hints[f.name] = f.type
    members["__annotations__"] = hints
    return dataclass(frozen=True, kw_only=True)(type(name, (shared, settings), members))


def recipe_options(
    settings: Distillation,
    shared: type[Any] = DistillationOptions,
    *,
    eval_images: int = EvaluationOptions.eval_images,
    teacher_steps: int | None = None,
) -> DistillationOptions:
    """The options of a recipe whose defaults are these settings.

    Args:
        settings: of an objective.
        shared: the other options, see `options_for`.
        eval_images: images drawn for each distance.
        teacher_steps: training steps of the teacher, in a recipe that trains one.
    """
    values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    options: DistillationOptions = options_for(type(settings), shared)(
        **values, eval_images=eval_images, teacher_steps=teacher_steps
    )
    return options


def ema_kimg(decay: float, batch: int) -> float:
    """The half-life, in thousands of images, of a moving average with this decay a step."""
    return batch * math.log(0.5) / math.log(decay) / 1000


def read_teacher(options: DistillationOptions) -> Precond | None:
    """The teacher that --teacher names, its D checked against --D, guided by --guide; None without --teacher.

    Raises:
        ValueError: there is no such model, it cannot be read, D contradicts it, or the guide does not go with it.
    """
    if options.guidance is not None and options.guide is None:
        raise ValueError(f"guidance {options.guidance:g} was given without a guide: give the network that guides, too")
    if options.teacher is None:
        if options.guide is not None:
            raise ValueError(f"guide {options.guide} was given without the teacher that it guides: give --teacher too")
        return None
    taken = locate(options.teacher, teacher=True)
    if taken.taken and is_first_process():
        with suppress(OSError):
            print(f"note: {taken.taken}; name another network's folder as --teacher", file=sys.stderr)
    teacher = load_teacher(taken.path, D=options.D, anyway=options.teacher_anyway)
    if options.guide is None:
        return teacher
    assert options.guidance is not None  # checked with the settings
    return guided(teacher, load_teacher(locate(options.guide, teacher=True).path), options.guidance)


def check_images(network: NetworkConfig, shape: tuple[int, int, int], whose: str, way_on: str = "") -> None:
    """Check that the network makes images (C, H, W) = `shape`.

    Args:
        network: of a teacher.
        shape: what is wanted.
        whose: such as "CIFAR-10 is", names them in the message.
        way_on: ends the message.

    Raises:
        ValueError: it makes others.
    """
    if network.image_shape != shape:
        side = network.img_resolution
        raise ValueError(
            f"the teacher makes images {network.img_channels}x{side}x{side}, {whose} {'x'.join(map(str, shape))}"
            + (f"; {way_on}" if way_on else "")
        )


def any_size(file: str) -> str:
    """Names the recipe of the same method for teachers of any size, the end of a message.

    Args:
        file: of a recipe for one data set, such as cifar_sid.py.
    """
    return f"distill_{file.rpartition('_')[2]} takes teachers of any size"


def run_name(recipe: str, config: Distillation, D: float) -> Path:
    """Default run folder: runs/<recipe>-D<D>-<what the settings say>, e.g. runs/cifar-D2048-alpha1-K1."""
    return Path("runs") / f"{recipe}-D{D:g}-{config.name()}{lora_name(config)}"
