"""A recipe that trains a teacher: its settings, and the way from the command line to a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ipfm.engine.checks import option_name
from ipfm.engine.config import TeacherConfig
from ipfm.engine.data.comparison import comparison_said
from ipfm.engine.data.dataset import ImageDataset
from ipfm.engine.data.open_dataset import open_dataset
from ipfm.engine.distributed.device import run_device
from ipfm.engine.distributed.world import World
from ipfm.engine.evaluation.evaluation import Comparison
from ipfm.engine.evaluation.options import EvaluationOptions
from ipfm.engine.experiments.branch import branched, check_agreed, described_branch
from ipfm.engine.experiments.defaults_by_size import EDM2, EDM2_NOISE
from ipfm.engine.experiments.dry_run import describe_training
from ipfm.engine.experiments.network_options import NetworkOptions
from ipfm.engine.experiments.options import check_images
from ipfm.engine.experiments.recipe import Plan, Recipe, say_if_settled
from ipfm.engine.experiments.starts import begun_in, check_there, read_teacher_state
from ipfm.engine.experiments.starts import check_length as check_branch_length
from ipfm.engine.runtime.commandline import BadInput, Given
from ipfm.engine.runtime.files import read_json
from ipfm.engine.runtime.launcher import is_first_process, launched_processes
from ipfm.engine.runtime.wording import counted
from ipfm.engine.training.checkpoint import find_checkpoint
from ipfm.engine.training.monitor import COMPARISON_FILE
from ipfm.engine.training.resolve import complete_training, resolve_D
from ipfm.engine.training.run_folder import check_run_folder, claimed
from ipfm.engine.training.snapshots import best_said
from ipfm.engine.training.start import Branch, short_name
from ipfm.engine.training.teacher import TeacherTraining, check_augmentation, first_step, training_facts
from ipfm.engine.training.transfer import Transfer, transfer_from
from ipfm.models import NetworkConfig, presets
from ipfm.models.autoencoder import Autoencoder
from ipfm.models.checkpoints.training_state import TrainingState
from ipfm.models.teacher import load_network


@dataclass(frozen=True, kw_only=True)
class TeacherOptions(TeacherConfig, EvaluationOptions, NetworkOptions):
    """Options of every recipe that trains a teacher."""

    data: Path | None = None
    """Training images: a zip or folder (`ipfm dataset` makes a zip), or CIFAR-10's archive."""
    conditional: bool = False
    """Train with the data's class labels."""
    xflip: bool = False
    """Mirror images at random."""
    continue_from: Path | None = None
    """A training-state-*.pt of EDM or PFGM++, or the folder of another run: continue that training with its weights,
    EMA and optimiser state."""
    branch: Path | None = None
    """Go on from the checkpoint of another training, RUN or RUN:STEP, in --out, with its settings as the defaults.
    STEP: a number, best or last (the default)."""
    transfer: Path | None = None
    """A model folder or checkpoint whose weights the new network begins with, those that fit by name and shape: of
    another size, D or number of classes."""
    dry_run: bool = False
    """Print the resolved configuration and the expected duration, and stop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_evaluation()
        self.check_network()
        for name in self.names_network if self.continue_from is not None else ():
            raise ValueError(f"{option_name(name)} was given, but continue-from says what the network is: leave it out")
        if self.transfer is not None and self.continue_from is not None:
            raise ValueError("transfer was given, but continue-from says what the weights are: leave one of them out")
        if self.conditional and self.continue_from is not None:
            raise ValueError("conditional was given, but continue-from says what the network is: leave it out")

    def training(self) -> TeacherConfig:
        """The settings of the training alone."""
        return TeacherConfig(**{f.name: getattr(self, f.name) for f in fields(TeacherConfig)})


def precond_notes(network: NetworkConfig) -> list[str]:
    """What to know of a training by its preconditioning."""
    if network.precond == "EDMPrecond":
        return []
    named = network.precond.removesuffix("Precond")
    lines = [f"preconditioning, noise levels and loss weight of {named} (EDM, arXiv 2206.00364, table 1)"]
    if not math.isinf(network.D):
        lines.append(f"{named} at a finite D is this project's extension: no paper has results of it")
    return lines


@dataclass(frozen=True)
class Settled:
    """What a recipe decides of a training once its data are known."""

    options: TeacherOptions
    shape: tuple[int, int, int]
    """(C, H, W) of the images."""
    base: NetworkConfig
    """The network that the options change."""
    D: float
    """Auxiliary dimensions without --D."""
    name: str
    """Begins the run folder's name."""
    said: tuple[str, ...] = ()
    """What to know of the settings, a line each."""

    def place(self, D: float) -> Path:
        """The run folder of a teacher of this D."""
        options = self.options
        return options.out or Path("runs") / f"{self.name}-teacher-{named(options)}-D{D:g}"


@dataclass(frozen=True)
class TeacherPlan(Plan):
    """See `Plan`. A teacher's training with nothing left open but what memory decides."""

    recipe: TeacherRecipe
    options: TeacherOptions
    config: TeacherConfig
    network: NetworkConfig
    data: ImageDataset | None
    """None in a dry run without data."""
    state: TrainingState | None
    """A training that is continued."""
    path: Path
    record: Mapping[str, Any]
    comparison: Comparison | None
    transfer: Transfer | None = None
    """What a new network takes over."""
    branch: Branch | None = None
    """The run whose settings are the defaults."""

    @property
    def begins_with(self) -> list[str]:
        """Lines on what is continued, or taken over."""
        lines = list(described_branch(self.branch, self.config))
        if self.state is not None:
            source = f"{self.options.continue_from}" if self.branch is None else self.state.source
            lines += state_notes(self.state, source, self.config)
            gone = self.options.continue_from
            if self.branch is None and gone is not None and not gone.exists():
                lines.append(f"  {gone} is gone: the run goes on from its checkpoint, and needs it no more")
        return lines + ([] if self.transfer is None else list(self.transfer.words))

    said: tuple[str, ...] = ()
    """What to know of the settings, a line each."""
    autoencoder: Autoencoder | None = None
    """Of latents."""

    def describe(self) -> str:
        """See `Plan.describe`."""
        notes = self.begins_with
        notes += precond_notes(self.network)
        notes += [self.recipe.data] if self.data is None else [f"data: {self.data.name}, {len(self.data):,} images"]
        first = 0 if self.state is None else first_step(self.state, self.config)
        images = None if self.comparison is None else self.options.eval_images
        return describe_training(self.config, self.network, self.path, (*self.said, *notes), first=first, images=images)

    def show(self) -> bool:
        """See `Plan.show`."""
        if not say_if_settled(self.path, "teacher", self.config):
            return False
        if is_first_process():
            _print_result(self.path)
        return True

    def begin(self, world: World) -> Callable[[], None]:
        """See `Plan.begin`."""
        assert self.data is not None
        path, said = self.path, self.said
        evaluation = self.options.evaluation(self.comparison, world)
        config = replace(self.config, resume=True)
        check_agreed(self.branch, world)
        with claimed(path, self.record, self.config, write=world.is_main):
            training = TeacherTraining(
                config,
                self.network,
                self.data,
                evaluation=evaluation,
                autoencoder=self.autoencoder,
                start=self.state,
                transfer=self.transfer,
                world=world,
            )
        lines = self.begins_with

        def train() -> None:
            if world.is_main:
                say_if_settled(path, "teacher", config)
                print(*said, *lines, sep="\n", end="\n" if said or lines else "")
            training.run(path)
            if world.is_main:
                _print_result(path)

        return train


def _print_result(path: Path) -> None:
    """What the run in `path` has left."""
    print(f"teacher: {path / 'model'}")
    if best := best_said(path, "teacher"):
        print(best)
    if picture := comparison_said(path / COMPARISON_FILE):
        print(picture)


@dataclass(frozen=True, kw_only=True)
class TeacherRecipe(Recipe[TeacherOptions]):
    """Training of a PFGM++ or EDM teacher on one data set."""

    name: str
    """Begins the run folder's name."""
    title: str
    """The data set's name for people."""
    shape: tuple[int, int, int]
    """(C, H, W) of its images."""
    presets: Mapping[str, str]
    """Architecture -> name of the network preset."""
    D: float
    """Auxiliary dimensions when --D is not given."""
    base: TeacherOptions
    """Settings."""
    data: str
    """Where the data come from and how they are prepared."""

    @property
    def defaults(self) -> TeacherOptions:
        """See `Recipe.defaults`."""
        return self.base

    def plan(self, given: Given[TeacherOptions]) -> TeacherPlan:
        """See `Recipe.plan`."""
        given, branch = branched(given, self.base)
        options = given.options
        check_one_network(given)
        state = None if options.continue_from is None else self._state(options, options.continue_from, branch)
        if options.data is None and not options.dry_run:
            raise BadInput("give --data; --dry-run works without it", self.data)
        data = None
        if options.data is not None:
            data = open_dataset(
                options.data,
                labels=self._labelled(options, state),
                xflip=options.xflip,
                skip_unreadable=options.skip_unreadable,
                strict=options.strict,
            )
        settled = self.settle(given, data, state)
        options = settled.options
        network = self._network(settled, data, state)
        check_levels(given, network)
        config = complete_training(replace(options.training(), D=network.D), network, run_device())
        config.split(launched_processes())
        if data is not None:
            check_augmentation(config, data)
        if data is not None and data.shape != settled.shape:
            raise ValueError(
                f"{options.data} has images {times(data.shape)}, {self.title} is {times(settled.shape)}; "
                "train_teacher.py takes images of any size"
            )
        path = settled.place(network.D)
        check_branch_length(branch, config)
        if state is not None:
            check_length(state, str(options.continue_from), config)
        transfer = None if options.transfer is None else _transfer(options.transfer, network, path)
        record = check_run_folder(path, "teacher", config, training_facts(config, network, data, state, transfer))
        autoencoder = options.autoencoder(settled.shape, run_device())
        comparison = options.comparison(settled.shape, run_device(), autoencoder=autoencoder)
        return TeacherPlan(
            self,
            options,
            config,
            network,
            data,
            state,
            path,
            record,
            comparison,
            transfer,
            branch,
            settled.said,
            autoencoder,
        )

    def settle(self, given: Given[TeacherOptions], data: ImageDataset | None, state: TrainingState | None) -> Settled:
        """What the options and the recipe, or the data, decide; nothing is read.

        Args:
            given: the command line.
            data: the images; None in a dry run without.
            state: a training that is continued.

        Raises:
            ValueError: the data cannot be trained on.
        """
        base = presets.get(given.options.preset or self.presets[given.options.arch])
        options = given.options
        if base.is_edm2:
            options = given.over(replace(self.base, noise=replace(self.base.noise, **EDM2_NOISE), **EDM2))
        return Settled(options, self.shape, base, self.D, self.name)

    def _state(self, options: TeacherOptions, path: Path, branch: Branch | None) -> TrainingState:
        begun = not path.exists() and options.from_step != 0
        state = None
        if begun and options.out is not None:
            state = begun_in(options.out, path if branch is None else None)
        if state is None:
            check_there(branch)
            state = read_teacher_state(path, D=options.D)
            said = {} if branch is None else {"branch": branch.to_json()}
            state = replace(state, said=said)
        self.check_state(state)
        return state

    def check_state(self, state: TrainingState) -> None:
        """Check that a training that is continued is of such images.

        Raises:
            ValueError: it is not.
        """
        check_images(state.config, self.shape, f"{self.title} is", "train_teacher.py continues teachers of any size")

    def _labelled(self, options: TeacherOptions, state: TrainingState | None) -> bool:
        return options.conditional if state is None else state.config.label_dim > 0

    def _network(self, settled: Settled, data: ImageDataset | None, state: TrainingState | None) -> NetworkConfig:
        """The network that is trained: that of the state to continue, or the architecture asked for."""
        options = settled.options
        if state is not None:
            resolve_D(options.D, state.config)
            return state.config
        classes = data.classes if options.conditional and data is not None else 0
        if options.conditional and data is not None and not classes:
            source, latents = ("PICTURES", " --latents VAE_FOLDER") if data.latents else (options.data, "")
            raise ValueError(
                f"conditional was given, but {options.data} has no class labels; ipfm dataset {source} NEW.zip"
                f"{latents} takes the names of folders for them"
            )
        return options.network(
            settled.base,
            settled.shape,
            D=options.default_D(settled.D) if options.D is None else options.D,
            classes=classes or 0,
            augmented=options.augment > 0,
        )


def state_notes(state: TrainingState, source: str, config: TeacherConfig) -> list[str]:
    """Lines on a training that is continued; `source`: its file."""
    seen, step = state.images_seen, first_step(state, config)
    told = "the images that it has seen are not known" if seen is None else f"{seen:,} images seen"
    average = f"its average from {state.ema_from}"
    if state.ema is None:
        average = "no average, which starts from the weights"
        average += f" ({state.ema_from} is not there)" if state.ema_from else ""
    return [
        f"continues {Path(source).name}: {told}, goes on at step {step:,} of {config.total_steps:,}",
        f"  teacher: its weights, {average}, its optimiser's moments and {counted(f'{state.adam_steps:,}', 'step')}",
    ]


def check_length(state: TrainingState, source: str, config: TeacherConfig) -> None:
    """Check that a training that is continued does not end before it goes on; `source`: its file.

    Raises:
        ValueError: it does.
    """
    if (step := first_step(state, config)) >= config.total_steps:
        raise ValueError(
            f"{source} is at step {step:,} of {config.batch} images already, and the run is to end at step "
            f"{config.total_steps:,}: give a larger --kimg or --max-steps, which count from the first training's start"
        )


def _transfer(path: Path, network: NetworkConfig, folder: Path) -> Transfer:
    """What the network takes over; nothing more where the training in `folder` has begun, and the file is gone."""
    if not path.exists() and find_checkpoint(folder / "checkpoints") is not None:
        record = read_json(folder / "config.json") or {}
        facts: dict[str, Any] = {name: record[name] for name in ("transfers", "start") if name in record}
        if len(facts) == 2:
            return Transfer(short_name(path), {}, (), (), (), (0, 0), recorded=facts)
    return transfer_from(short_name(path), load_network(path), network)


def named(options: TeacherOptions) -> str:
    """The network of a run in its folder's name: "ncsnpp", or "ncsnpp-vp"."""
    precond = "" if options.precond == "edm" else f"-{options.precond}"
    return f"{options.preset or options.arch}{precond}"


def check_levels(given: Given[Any], network: NetworkConfig) -> None:
    """Check that no noise levels were given that the network's training makes no use of.

    Raises:
        ValueError: they were.
    """
    unused = sorted(given.names & {"noise.p_mean", "noise.p_std", "noise.sigma_data"})
    if unused and network.precond != "EDMPrecond":
        raise ValueError(
            f"{option_name(unused[0])} was given, but the noise levels of {network.precond} are its own: it is a "
            "setting of EDM's preconditioning"
        )


def check_one_network(given: Given[Any]) -> None:
    """Check that not both --preset and --arch were given.

    Raises:
        ValueError: they were.
    """
    if {"preset", "arch"} <= given.names and given.options.preset is not None:
        preset, arch = given.options.preset, given.options.arch
        raise ValueError(f"preset {preset} and arch {arch} were given: leave one of them out")


def times(shape: tuple[int, int, int]) -> str:
    """(C, H, W) for people: "3x32x32"."""
    return "x".join(map(str, shape))
