"""Training a teacher on data: the denoising loss with PFGM++ noise at any D."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ipfm.engine.config import TeacherConfig
from ipfm.engine.data.augmentation import augment
from ipfm.engine.data.dataset import ImageDataset
from ipfm.engine.distributed.pieces import CapturedPieces, Number, whole
from ipfm.engine.distributed.world import World, start_world
from ipfm.engine.distributed.zero import TrainedNetwork
from ipfm.engine.evaluation.evaluation import Evaluation
from ipfm.engine.memory import MemoryPlan, device_budget, plan_training
from ipfm.engine.noise_levels import training_sigmas, weight_sigma_data
from ipfm.engine.objectives.captured import pieces_of
from ipfm.engine.objectives.losses import add_noise, bind, bind_with_logvar, denoising_objective
from ipfm.engine.objectives.phases import mark
from ipfm.engine.objectives.step_metrics import LossSum, StepMetrics, measured_as
from ipfm.engine.random_streams import Stream, dropout_seed
from ipfm.engine.sampling.batches import sample_teacher
from ipfm.engine.sampling.samplers import nfe
from ipfm.engine.training.data_order import OrderedImages, pictures, plain_place
from ipfm.engine.training.loop import PICTURE_SEED
from ipfm.engine.training.resolve import resolve_training
from ipfm.engine.training.run import TrainingRun
from ipfm.engine.training.run_folder import fingerprint
from ipfm.engine.training.transfer import Transfer
from ipfm.models import NetworkConfig, Precond, build_network
from ipfm.models.autoencoder import Autoencoder
from ipfm.models.facts import TeacherFacts

if TYPE_CHECKING:
    from ipfm.models.checkpoints.training_state import TrainingState


class TeacherTraining(TrainingRun[TeacherConfig]):
    """Trains a denoiser on `dataset`: minimises E w(sigma) ||net(y + noise, sigma) - y||^2 with the noise of D.

    Noise levels and weight w are those of the network's preconditioning, EDM's, VP's or VE's, see `training_sigmas`. A
    network with a log-variance, EDM2's, learns it with the rest, see `denoising_objective`.

    Args:
        config: settings.
        network: architecture; its D must be that of `config`.
        dataset: images in the network's shape.
        evaluation: what the samples are measured against; None measures nothing.
        autoencoder: makes pictures of latents, see `TrainingRun`.
        start: a training elsewhere that this one continues: weights, EMA and optimiser state, and, as far as it is
            known, the number of images seen.
        transfer: weights of another network that a new one begins with.
        world: the run's processes; joined or started when None.

    Raises:
        ValueError: shapes or D do not fit each other, or the batch does not divide among the processes.
    """

    def __init__(
        self,
        config: TeacherConfig,
        network: NetworkConfig,
        dataset: ImageDataset,
        *,
        evaluation: Evaluation | None = None,
        autoencoder: Autoencoder | None = None,
        start: TrainingState | None = None,
        transfer: Transfer | None = None,
        world: World | None = None,
    ) -> None:
        _check_images(network, dataset)
        check_augmentation(config, dataset)
        world = world or start_world()
        settings = resolve_training(config, network, world)
        super().__init__(
            settings, world, title=f"teacher D={settings.D:g}", evaluation=evaluation, autoencoder=autoencoder
        )
        self.network = replace(network, dropout=config.dropout)
        self.local_batch, _ = config.split(world.size)
        self.dataset = dataset.to(world.device)
        self._images = OrderedImages(self.dataset, batch=config.batch, seed=config.seed, world=world)
        # What they say, and not their tensors, which are memory of their own.
        self._facts = training_facts(self.config, self.network, dataset, start, transfer)
        self._taken_over = {} if transfer is None else {"transfer": transfer.facts()["start"]}
        self._measure_other_bytes()
        self.net = self._in_training(start, transfer)
        self.networks = {"teacher": self.net}
        self.averaged = self._average_of(self.net, self.network)
        if start is not None:
            self._continue(start)
        self._begun = 0
        self._tally = LossSum("teacher", world, self.local_batch)
        self._offsets = torch.arange(self.micro_batch, device=world.device)
        self._pieces = pieces_of(
            self.settings,
            self.network,
            self.networks,
            world,
            tell=self._tell,
            # Of a graph the profiler would hear no phases.
            ready=lambda: self._begun > self.config.profile_memory,
        )
        self.captures = isinstance(self._pieces, CapturedPieces)

    def _in_training(self, start: TrainingState | None, transfer: Transfer | None) -> TrainedNetwork:
        """The network, new or as the training elsewhere left it, under its optimiser."""
        # Every process draws the same initial weights.
        torch.manual_seed(self.config.seed)
        net = build_network(self.network).to(self.world.device)
        if start is not None:
            net.load_state_dict(dict(start.weights))
        if transfer is not None:
            transfer.put_into(net)
        averages = self.config.average_names
        config = self.config
        return self._under_optimiser(net, lr=config.lr, beta1=config.beta1, beta2=config.beta2, ema=averages)

    def _continue(self, start: TrainingState) -> None:
        """Take over what the optimiser knew; the schedules go on from the images seen."""
        state: dict[str, Mapping[str, Tensor]] = {"exp_avg_sq": start.exp_avg_sq}
        if self.config.beta1 > 0:
            state["exp_avg"] = start.exp_avg
        for kind, average in zip(self.net.average_kinds, self.config.averages, strict=True):
            if (kept := start.average(average.std)) is not None:
                state[kind] = kept
        for kind, tensors in state.items():
            self.net.load(kind, tensors)
        self.net.steps_applied = start.adam_steps
        self.first_step = first_step(start, self.config)

    def _step(self, step: int) -> StepMetrics:
        """One update on the batch of `step`, counted from 0."""
        config = self.config
        self._begun += 1
        self.net.module.train()
        for first in self.world.micro_batches(config.batch, self.micro_batch):
            mark("teacher: forward and backward")
            batch = self._images.batch(step, torch.arange(first, first + self.micro_batch, device=self.world.device))
            images = self._pieces.placed("images", batch.images)
            labels = None
            if self.network.label_dim and batch.labels is not None:
                labels = self._pieces.placed("labels", batch.labels)
            seed = None
            if config.drops(self.network):
                seed = dropout_seed(config.seed, Stream.TEACHER_DROPOUT, step, first)
            work = partial(self._micro_step, images, labels)
            self._pieces.run(("the teacher's step",), work, seed, step=step, first=first)
        mark("teacher: optimiser")
        rates = {"lr": config.learning_rate(step), "ema_decay": config.ema_decay(step)}
        found = self._pieces.run(("the teacher's update",), self._update, **rates)
        assert found is not None
        return measured_as("teacher", found)

    def _micro_step(self, images: Tensor, labels: Tensor | None, numbers: Mapping[str, Number]) -> None:
        """Forward and backward of the micro-batch that begins with the sample "first", in the update "step"."""
        config, noise = self.config, self.config.noise
        step, index = whole(numbers["step"]), self._offsets + whole(numbers["first"])
        sigma = training_sigmas(self.network, noise, index, seed=config.seed, stream=Stream.TEACHER_SIGMA, step=step)
        y, augment_labels = augment(
            images,
            config.augment,
            seed=config.seed,
            stream=Stream.TEACHER_AUGMENT,
            step=step,
            sample_index=index,
            mirrored_stretch=config.mirrored_stretch,
        )
        noisy = add_noise(
            y,
            sigma,
            self.D,
            self.net.module,
            seed=config.seed,
            stream=Stream.TEACHER_NOISE,
            step=step,
            sample_index=index,
        )
        with_labels = bind_with_logvar if self.network.logvar_channels else bind
        result = denoising_objective(
            with_labels(self.net, labels, augment_labels),
            y,
            noisy,
            sigma_data=weight_sigma_data(self.network, noise),
        )
        self.net.backward(result.surrogate / self.local_batch)
        self._tally.add(result.loss, result.valid)

    def _update(self, numbers: Mapping[str, Any]) -> Tensor:
        """The optimiser's step, and what was measured since the last one."""
        return self._tally.taken(self.net.step(grad_scale=self._tally.grad_scale(self.config.batch), **numbers))

    def sample(self, first: int, count: int, *, seed: int) -> Tensor:
        """Images first..first + count - 1 of `seed` from the averaged network as last refreshed."""
        return sample_teacher(self.average, first, count, D=self.D, steps=self.config.heun_steps, seed=seed)

    def memory_plan(self) -> MemoryPlan:
        """The predicted memory of a step as it is laid out."""
        budget = device_budget(self.world.device)
        return plan_training(self.settings, self.network, ranks=self.world.size, budget=budget)

    def run(self, path: Path | str) -> Precond:
        """Train in the run folder `path`, or continue there; the averaged network, also saved as path/model.

        Leaves images of it beside the data's in path/comparison.png.
        """
        folder, progress = self._run(
            Path(path),
            kind="teacher",
            facts=self._facts,
            export="model",
            about=TeacherFacts(dataset=plain_place(self.dataset.name), others=self._taken_over),
        )
        self._finish(folder.path, progress.step)
        return self.average

    @property
    def _compared(self) -> tuple[Mapping[str, Callable[[int, int], Tensor]], ImageDataset | None]:
        def teacher(first: int, count: int) -> Tensor:
            return self.sample(first, count, seed=PICTURE_SEED)

        return {f"teacher, {nfe(self.config.heun_steps, 'heun')} NFE": teacher}, self.dataset


def _check_images(network: NetworkConfig, dataset: ImageDataset) -> None:
    """ValueError unless the network takes the data's images and classes."""
    if dataset.shape != network.image_shape:
        raise ValueError(f"the network takes images {network.image_shape}, {dataset.name} has {dataset.shape}")
    if network.label_dim not in (0, dataset.classes):
        raise ValueError(f"the network takes {network.label_dim} classes, {dataset.name} has {dataset.classes}")


def check_augmentation(config: TeacherConfig, dataset: ImageDataset) -> None:
    """Check that no augmentation is asked for of images that are latents.

    Raises:
        ValueError: it is.
    """
    if config.augment > 0 and dataset.latents:
        raise ValueError(
            f"augment was given, but {dataset.name} holds latents, which cannot be turned, stretched or mirrored as "
            "pictures are: leave it out"
        )


def first_step(start: TrainingState, config: TeacherConfig) -> int:
    """The step at which a training that began elsewhere goes on: by the images seen, else by its optimiser's count."""
    return start.adam_steps if start.images_seen is None else start.images_seen // config.batch


def training_facts(
    config: TeacherConfig,
    network: NetworkConfig,
    dataset: ImageDataset | None,
    start: TrainingState | None,
    transfer: Transfer | None = None,
) -> dict[str, Any]:
    """What identifies a training beside its settings; what the data say is left out while they are not known."""
    facts: dict[str, Any] = {"network": replace(network, dropout=config.dropout).to_json()}
    if dataset is not None:
        facts |= {"dataset": plain_place(dataset.name), "images": len(dataset), "xflip": dataset.xflip}
        facts |= pictures(dataset)
    # Said of a fresh training too: a folder of one must not go on where --continue-from is given, and ignore it.
    facts["continues"] = None if start is None else start.continues or fingerprint(start.weights)
    if start is not None and start.source:
        facts["start"] = {"source": start.source, "images_seen": start.images_seen, **start.said}
    return facts if transfer is None else {**facts, **transfer.facts()}
