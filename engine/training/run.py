"""A run, from its folder to its exported network: what distilling a teacher and training one have in common."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ipfm.engine.checks import option_name
from ipfm.engine.config import Resolved, RunConfig, place_settings
from ipfm.engine.data.comparison import IMAGES_OF_CLASSES, Panel, examples, places, save_comparison
from ipfm.engine.data.dataset import ImageDataset
from ipfm.engine.data.latents import decoded
from ipfm.engine.distributed.agreement import attempt
from ipfm.engine.distributed.compilation import set_execution
from ipfm.engine.distributed.determinism import compute_deterministically
from ipfm.engine.distributed.ema import EmaNetwork
from ipfm.engine.distributed.precision import allow_tf32, apply_precision
from ipfm.engine.distributed.signals import StopRequested, catching_signals, check_stop
from ipfm.engine.distributed.world import World
from ipfm.engine.distributed.zero import BETA2, TrainedNetwork
from ipfm.engine.evaluation.evaluation import Evaluation
from ipfm.engine.evaluation.metrics import FrechetResult, Metric
from ipfm.engine.evaluation.results import EvaluationHistory, best_average
from ipfm.engine.memory import MemoryPlan
from ipfm.engine.memory.live import bytes_in_use
from ipfm.engine.memory.state import parameter_count
from ipfm.engine.objectives.step_metrics import StepMetrics
from ipfm.engine.random_streams import Stream, draw_labels
from ipfm.engine.runtime.errors import Interrupted, TrainingFailed, described
from ipfm.engine.runtime.launcher import Launcher
from ipfm.engine.sampling.memory_format import is_channels_last
from ipfm.engine.training.board import conclude
from ipfm.engine.training.disk import disk_use, missing_room
from ipfm.engine.training.loop import PICTURE_SEED, Progress, train
from ipfm.engine.training.monitor import COMPARISON_FILE
from ipfm.engine.training.run_folder import RunFolder, as_begun, check_run_folder, is_settled, open_run_folder
from ipfm.engine.training.set_aside import go_back
from ipfm.models import NetworkConfig, Precond, build_network, save_model
from ipfm.models.atomic_files import why
from ipfm.models.autoencoder import Autoencoder
from ipfm.models.facts import ModelFacts, TeacherFacts
from ipfm.models.layers import lay_out_weights, orders_weights
from ipfm.models.store import describe_average, in_the_way

C = TypeVar("C", bound=RunConfig)
# Of the picture at the end: small, for a signal to be noticed between two batches.
IMAGES_AT_ONCE = 16
# Of how a run is made, what a stored network says too: whoever repeats it wants to know.
COMPUTED = frozenset({"compile", "cuda_graphs", "deterministic"})


class TrainingRun(ABC, Generic[C]):
    """Networks in training, the average of one of them, and how it is looked at.

    A kind of run says its networks, by `_under_optimiser` and `_average_of`, its `_step` and its `sample`.

    Args:
        settings: the run's settings, with nothing left open.
        world: the run's processes.
        title: in lines of the log.
        evaluation: what samples are measured against; None measures nothing.
        autoencoder: makes pictures of the networks' images, which are latents; None shows them as they are.
    """

    networks: Mapping[str, TrainedNetwork]
    """What is trained, by name."""
    averaged: EmaNetwork
    """The average of the network that is the result."""

    def __init__(
        self,
        settings: Resolved[C],
        world: World,
        *,
        title: str,
        evaluation: Evaluation | None,
        autoencoder: Autoencoder | None = None,
    ) -> None:
        self.settings, self.world, self.title, self.evaluation = settings, world, title, evaluation
        self.autoencoder = autoencoder
        self.config, self.D, self.micro_batch = settings.config, settings.D, settings.micro_batch
        self.first_step = 0
        self.other_bytes = 0
        self.captures = False
        """The steps are captured in CUDA graphs."""
        self._about: ModelFacts = TeacherFacts()
        # The settings as they were before a run folder had its say.
        self._given: C | None = None
        allow_tf32(self.config.tf32)
        if self.config.deterministic:
            compute_deterministically()

    @property
    def activation_checkpointing(self) -> bool:
        """The networks' activations are computed again on the way back."""
        return self.settings.checkpointed

    # -- what a kind of run says ------------------------------------------------------------------------------------

    @abstractmethod
    def _step(self, step: int) -> StepMetrics:
        """One update of every network; `step` counts from 0."""

    @abstractmethod
    def sample(self, first: int, count: int, *, seed: int) -> Tensor:
        """Images first..first + count - 1 of `seed` from the averaged network as last refreshed."""

    @abstractmethod
    def memory_plan(self) -> MemoryPlan:
        """The predicted memory of a step as it is laid out."""

    # -- making the networks ----------------------------------------------------------------------------------------

    def _measure_other_bytes(self, *, without: nn.Module | None = None) -> None:
        """Take what lies on the device now, but for `without`, for no part of the training; only if it is profiled."""
        if self.config.profile_memory:
            self.other_bytes = bytes_in_use(self.world.device, without=without)

    def _under_optimiser(
        self,
        net: Precond,
        *,
        lr: float,
        beta1: float,
        beta2: float = BETA2,
        ema: Sequence[str],
        rectified: bool = False,
        followed: bool = False,
    ) -> TrainedNetwork:
        """`net`, which lies on the run's device, with its optimiser, computing as the settings say."""
        alone = self.settings.stage == 0 and self.world.size == 1
        last = is_channels_last(self.config.memory_format, self.world.device)
        if alone and last:
            # Before the optimiser, whose state follows the weights.
            lay_out_weights(net)
        trained = TrainedNetwork(
            apply_precision(net, self.settings.precision),
            self.settings,
            world=self.world,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            ema=ema,
            rectified=rectified,
            followed=followed,
            by_pixel=last and orders_weights(self.world.device),
        )
        self._execute_as_set(trained.module)
        if followed:
            self._execute_as_set(trained.followed)
        return trained

    def _execute_as_set(self, net: Precond) -> Precond:
        """`net` with the run's activation checkpointing, attention, memory format and compilation."""
        net.activation_checkpointing = self.settings.checkpointed
        config = self.config
        net.attention_backend = config.attention_backend
        set_execution(net, memory_format=config.memory_format, compiled=config.compile, device=self.world.device)
        return net

    def _average_of(self, trained: TrainedNetwork, network: NetworkConfig) -> EmaNetwork:
        """The average that `trained` keeps, as a network of the architecture `network`."""
        precision, device = self.settings.precision, self.world.device
        return EmaNetwork(trained, network, trained.exact_buffers, precision, device, self._execute_as_set)

    # -- training, and looking at the average -----------------------------------------------------------------------

    def iteration(self, step: int) -> StepMetrics:
        """One update of every network; `step` counts from 0. Frees the averaged network."""
        self.averaged.release()
        return self._step(step)

    def refresh(self, which: str | None = None) -> None:
        """Bring the averaged network up to date. Every process must call it.

        Args:
            which: which of several averages it is of, by its name; None takes the first one.
        """
        self.averaged.refresh(which)

    @property
    def average(self) -> Precond:
        """The averaged network of the last `refresh`; the next step frees it."""
        return self.averaged.net

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What is measured, the one that decides first; nothing without an evaluation."""
        return () if self.evaluation is None else self.evaluation.metrics

    def evaluate(self) -> FrechetResult | None:
        """The metrics of the averaged network's samples; None without an evaluation."""
        return None if self.evaluation is None else self._measure(self.evaluation)

    def _measure(self, evaluation: Evaluation) -> FrechetResult:
        seed = evaluation.seed
        return evaluation.measure(lambda first, count: self.sample(first, count, seed=seed), self.world, leave_out=True)

    def average_said(self, step: int) -> Mapping[str, Any] | None:
        """See `Task.average_said`."""
        name, trained = next((name, net) for name, net in self.networks.items() if net is self.averaged.trained)
        said = self._said(self._about, step, {}, average=trained.averages[0])
        kinds = dict(zip(trained.averages, trained.average_kinds, strict=True))
        return describe_average(self.averaged.network, name, said, kinds if len(kinds) > 1 else {})

    def stored(
        self, step: int, measured: Mapping[str, Any], *, copy: bool, halved: bool = False
    ) -> Callable[[Path], None]:
        """See `Task.stored`."""
        extra = self._said(self._about, step, measured, average=self.averaged.shown)
        net = self.average
        if not (copy or halved):
            return lambda folder: save_model(net, folder, extra=extra)
        with torch.device("meta"):
            form = build_network(net.config)
        own = net.state_dict()
        like = form.half().state_dict() if halved else own
        state = {name: tensor.detach().to("cpu", like[name].dtype, copy=True) for name, tensor in own.items()}
        return lambda folder: save_model(form, folder, extra=extra, state=state)

    def picture(self, count: int, seed: int) -> Tensor:
        """`count` images from fixed latents, (count, C, H, W) in [-1, 1]; of others than the first process as drawn."""
        return self._shown(self.sample(0, count, seed=seed))

    def _shown(self, images: Tensor) -> Tensor:
        """Pictures of images that are latents, on the first process, which alone shows them."""
        if self.autoencoder is None or not self.world.is_main:
            return images
        return self.autoencoder.decode(images)

    # -- a whole run ------------------------------------------------------------------------------------------------

    def _run(
        self, path: Path, *, kind: str, facts: Mapping[str, Any], export: str, about: ModelFacts
    ) -> tuple[RunFolder, Progress]:
        """Train in the run folder `path`, or continue there, and export the averaged network.

        Args:
            path: the run folder.
            kind: "distill" or "teacher".
            facts: what identifies the run besides its settings.
            export: name of the exported model's folder within the run folder.
            about: what the exported model says of itself, but for its settings and the number of steps.

        Returns:
            The folder, and where the loop ended.

        Raises:
            ValueError: the folder belongs to another run.
            TrainingFailed, Interrupted: from the loop.
        """
        record = check_run_folder(path, kind, self._given or self.config, facts)
        before = self.config
        begun = as_begun(replace(before, rules=record["config"]["rules"]), record)
        if begun != before:
            self._given = self._given or before
            self._go_by(begun)
            if self.world.is_main and begun.rules != before.rules:
                print(f"ipfm: {path} goes on by rules {self.config.rules}, as it began; see --rules", file=sys.stderr)
        # A result that lies among files of others stays as it is.
        kept = is_settled(path, kind, self.config) and in_the_way(path / export)
        # Every process has looked before the first one writes.
        self.world.barrier()
        go_back(path, kind, self.config, self.world)
        folder = open_run_folder(path, record, write=self.world.is_main)
        self.world.barrier()
        self._about = about
        if self.world.is_main and not kept and not is_settled(path, kind, self.config):
            self._say_disk_use(path)
            self._say_what_acts_on_nothing()
        progress = train(self, self.config, folder)
        which = self._exported_average(path)
        if kept:
            self.refresh(which)
        else:
            self.export(path / export, about=about, steps=progress.step, which=which)
        return folder, progress

    def _say_what_acts_on_nothing(self) -> None:
        """A line for settings of snapshots that were given where none are kept."""
        default = {f.name: f.default for f in fields(RunConfig)}
        names = ("keep_snapshots", "snapshot_precision")
        given = [name for name in names if getattr(self.config, name) != default[name]]
        if given and not self.config.snapshot_every:
            options = " and ".join(f"--{option_name(name)}" for name in given)
            self._tell(f"{options} {'acts' if len(given) == 1 else 'act'} on nothing without --snapshot-every")

    def _exported_average(self, path: Path) -> str:
        """The average that the settings name, else the best of the run's last evaluation, else the first."""
        names, wanted = self.config.average_names, self.config.export_ema
        if wanted != "best" or len(names) == 1:
            return names[0] if wanted == "best" else wanted
        best = ""
        if self.world.is_main:
            lines = EvaluationHistory(path).lines
            best = best_average(lines[-1] if lines else {}, names, next(iter(self.metrics), "fid"))
        return self.world.broadcast_text(best) or names[0]

    def _say_disk_use(self, path: Path) -> None:
        counts = [net.parameter_count for net in self.networks.values()]
        kinds = [len(net.state_kinds) for net in self.networks.values()]
        checkpoint = 4 * sum(count * kept for count, kept in zip(counts, kinds, strict=True))
        # What is exported is whole, also where factors alone are trained.
        model = max(parameter_count(self.averaged.network), *counts)
        use = disk_use(self.config, checkpoint=checkpoint, model=4 * model)
        with suppress(OSError):
            print(f"disk: {use.in_words()}", file=sys.stderr)
        if (lacking := missing_room(use, path)) is not None:
            self._warn(lacking)

    @property
    @abstractmethod
    def _compared(self) -> tuple[Mapping[str, Callable[[int, int], Tensor]], ImageDataset | None]:
        """Networks by their titles, as what draws images first..first + count - 1 of PICTURE_SEED; and the data."""

    def _finish(self, folder: Path, step: int) -> None:
        """Leave the picture of the end in the run folder, unless it is there, and the end in TensorBoard.

        Every process calls it, after `export`. What fails is a warning.

        Raises:
            Interrupted: a signal came.
        """
        path = folder / COMPARISON_FILE
        if not self.world.broadcast_text("" if path.exists() else "missing"):
            return
        with catching_signals(Launcher(self.world.launched)):
            try:
                picture, reason = attempt(lambda: self._compare(path), self.world.size)
            except StopRequested as asked:
                raise Interrupted(asked.signum, folder) from None
        if reason:
            self._warn(f"no {path}: {reason}")
        if self.world.is_main:
            try:
                conclude(folder, step, picture)
            except Exception as error:
                self._warn(f"the end is not in TensorBoard: {described(error)}")

    def _compare(self, path: Path) -> np.ndarray | None:
        """Draw the networks' images and the data's side by side: the picture, on the first process."""
        networks, data = self._compared
        network = self.averaged.network
        index = torch.arange(IMAGES_OF_CLASSES)
        labels = draw_labels(network.label_dim, index, seed=PICTURE_SEED, stream=Stream.SAMPLER_LABEL, step=0)
        shape = network.image_shape
        if self.autoencoder is not None:
            shape = self.autoencoder.shape_of_pictures(shape)
        where = places(shape, labels)
        panels = []
        for title, draw in networks.items():
            drawn = []
            for first in range(0, where.drawn, IMAGES_AT_ONCE):
                check_stop(self.world)
                images = draw(first, min(IMAGES_AT_ONCE, where.drawn - first))
                drawn.append(self._shown(images).float().cpu())
            panels.append(Panel(title, where.shown(torch.cat(drawn))))
        if not self.world.is_main:
            return None
        if data is not None:
            try:
                if self.autoencoder is not None and data.latents:
                    data = decoded(data, self.autoencoder)
                panels.append(Panel("data", examples(data, where)))
            except Exception as error:
                self._warn(f"{path} is without data: {described(error)}")
        return save_comparison(panels, where, path)

    def _warn(self, text: str) -> None:
        if self.world.is_main:
            with suppress(OSError):
                print(f"warning: {text}", file=sys.stderr)

    def _tell(self, text: str) -> None:
        if self.world.is_main:
            with suppress(OSError):
                print(f"ipfm: {text}", file=sys.stderr)

    def _go_by(self, config: C) -> None:
        """Compute by these settings from now on: with the rules, and what is decided, of the run in the folder."""
        self.config = config
        self.settings = replace(self.settings, config=self.config)

    def export(self, folder: Path, *, about: ModelFacts, steps: int, which: str | None = None) -> None:
        """Store the averaged network, with the settings that it owes its weights to. Every process calls it.

        Args:
            folder: where the model is stored; what is there is replaced.
            about: what it says of itself, but for these settings and steps.
            steps: number of optimiser steps done.
            which: which of several averages it is of; None takes the first one.

        Raises:
            TrainingFailed: on every process: the disk refuses.
        """
        self.refresh(which)
        said = self._said(about, steps, {}, average=self.averaged.shown)
        reason = ""
        if self.world.is_main:
            try:
                save_model(self.average, folder, extra=said)
            except (OSError, ValueError) as error:
                reason = why(error)
        if reason := self.world.broadcast_text(reason):
            raise TrainingFailed(
                f"the network cannot be stored in {folder} ({reason}); the state is saved: the same command stores it"
            )

    def _said(self, about: ModelFacts, steps: int, measured: Mapping[str, Any], *, average: str) -> dict[str, Any]:
        """What a stored network says of itself: `about`, the settings that it owes its weights to, the steps done.

        Where there are several averages also which one it is.
        """
        places = (place_settings(type(self.config)) - COMPUTED) | set(getattr(self.config, "unused", ()))
        settings = {name: value for name, value in self.config.to_json().items() if name not in places}
        which = {"average": average} if len(self.config.averages) > 1 else {}
        return replace(about, optimizer_steps=steps, settings=settings, measured=measured).to_json() | which
