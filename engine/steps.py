"""The two steps of a distillation: the student's and the generator's, for any number of generator evaluations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ipfm.engine.augmentation import augment
from ipfm.engine.config import DistillConfig
from ipfm.engine.measure import Measured, Tally
from ipfm.engine.memory.phases import mark
from ipfm.engine.objectives import Noisy, add_noise, along, bind, denoising_objective, generator_gradient
from ipfm.engine.streams import Stream, draw_labels, seed_dropout
from ipfm.engine.world import World
from ipfm.kernels import perturb
from ipfm.models import NetworkConfig, Precond


class Trained(Protocol):
    """What the steps need of a network in training: see `TrainedNetwork`."""

    @property
    def module(self) -> nn.Module: ...

    @property
    def loss_scale(self) -> float: ...

    def __call__(self, *args: Any, **keywords: Any) -> Tensor: ...

    def backward(self, loss: Tensor) -> None: ...

    def step(self, *, lr: float, ema_decay: float = 0.0, grad_scale: Tensor | None = None) -> Tensor: ...

    def frozen(self) -> AbstractContextManager[nn.Module]: ...


@dataclass(frozen=True)
class MicroBatch:
    """Samples that one process handles at a time."""

    first: int
    """Index of the first sample within the global batch."""
    index: Tensor
    """(B,) int64: indices within the global batch."""
    labels: Tensor | None
    """(B, label_dim) one-hot, or None for an unconditional network."""


class Chain(NamedTuple):
    """Inputs of a generator's evaluations, without graphs."""

    inputs: list[Tensor]
    """x_1..x_K, each (B, C, H, W)."""
    finite: Tensor
    """(B, 1, 1, 1) bool: no perturbation of the sample overflowed."""

    def marked(self, y: Tensor) -> Tensor:
        """y (B, C, H, W) with NaN for the samples that overflowed, which the losses leave out."""
        return y.masked_fill(~self.finite, float("nan"))


class DistillSteps:
    """The steps of `Distiller`, on networks that somebody else made: real ones, or those of a plan on the meta device.

    Args:
        config: settings with nothing left open.
        student, generator: the networks in training.
        teacher: the frozen denoiser.
        network: architecture of all three.
        D: auxiliary dimensions.
        micro_batch: images this process handles at a time; divides its share of the batch.
        phased: one network's activations at a time.
        world: the run's processes.
    """

    def __init__(
        self,
        config: DistillConfig,
        *,
        student: Trained,
        generator: Trained,
        teacher: Precond,
        network: NetworkConfig,
        D: float,
        micro_batch: int,
        phased: bool,
        world: World,
    ) -> None:
        self.config = config
        self.student, self.generator, self.teacher = student, generator, teacher
        self.network, self.D = network, D
        self.local_batch, self.micro_batch = config.batch // world.size, micro_batch
        self.phased = phased
        self.world = world
        # What every micro-batch starts from; nothing writes to it.
        shape = (micro_batch, network.img_channels, network.img_resolution, network.img_resolution)
        self._zeros = torch.zeros(shape, device=world.device)
        self._levels = [torch.full((micro_batch,), level, device=world.device) for level in config.levels]
        self._offsets = torch.arange(micro_batch, device=world.device)

    def iteration(self, step: int) -> Measured:
        """`student_updates` student steps, then the generator step; `step` counts from 0."""
        updates = self.config.student_updates
        measured = [self.student_step(step * updates + update) for update in range(updates)]
        return Measured.merged([*measured, self.generator_step(step)])

    def student_step(self, step: int) -> Measured:
        """One update of the student on fresh samples of the generator; `step` counts the student's updates from 0."""
        config, noise = self.config, self.config.noise
        tally = Tally("student", self.world)
        self._set_mode(self.student.module, training=True)
        self._set_mode(self.generator.module, training=True)
        for micro in self._micro_batches(Stream.STUDENT_LABEL, step):
            mark("student: samples")
            chain = self._chain(micro, Stream.STUDENT_LATENT, step)
            y = chain.marked(self._evaluate(config.steps - 1, chain.inputs[-1], micro, step))
            y, augment_labels = augment(
                y, config.augment, seed=config.seed, stream=Stream.STUDENT_AUGMENT, step=step, sample_index=micro.index
            )
            sigma = noise.denoising(micro.index, seed=config.seed, stream=Stream.STUDENT_SIGMA, step=step)
            noisy = self._add_noise(y, sigma, Stream.STUDENT_NOISE, step, micro)
            self._seed_dropout(Stream.STUDENT_DROPOUT, step, micro)
            mark("student: forward and backward")
            student = bind(self.student, micro.labels, augment_labels)
            result = denoising_objective(student, y, noisy, sigma_data=noise.sigma_data)
            self.student.backward(result.surrogate / self.local_batch)
            tally.add(result.loss, result.valid)
        mark("student: optimiser")
        lr = config.student_lr or config.lr
        applied = self.student.step(lr=lr, grad_scale=tally.grad_scale(config.batch))
        return tally.measured(applied)

    def generator_step(self, step: int) -> Measured:
        """One update of the generator and its EMA; `step` counts from 0."""
        tally = Tally("generator", self.world)
        self._set_mode(self.student.module, training=False)
        self._set_mode(self.generator.module, training=True)
        for micro in self._micro_batches(Stream.GENERATOR_LABEL, step):
            tally.add(*self._generator_micro_step(step, micro))
        mark("generator: optimiser")
        applied = self.generator.step(
            lr=self.config.lr,
            ema_decay=self.config.ema_decay(step),
            grad_scale=tally.grad_scale(self.config.batch),
        )
        return tally.measured(applied)

    def _generator_micro_step(self, step: int, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """Forward and backward of one micro-batch: loss (B,) and valid (B,).

        Joint keeps the graph of the last evaluation of G while T and S are differentiated; phased runs it once more
        afterwards. Every earlier evaluation is run once more in both, so that memory does not grow with K.
        """
        config, last, phased = self.config, self.config.steps - 1, self.phased
        mark("generator: samples")
        chain = self._chain(micro, Stream.GENERATOR_LATENT, step)

        def forward(k: int) -> Tensor:
            self._seed_dropout(Stream.GENERATOR_DROPOUT, step * config.steps + k, micro)
            return self.generator(chain.inputs[k].requires_grad_(k > 0), self._levels[k], micro.labels)

        graph = None if phased else forward(last)
        y = self._evaluate(last, chain.inputs[last], micro, step) if graph is None else graph.detach()
        y = chain.marked(y)
        sigma = config.noise.generator(micro.index, seed=config.seed, stream=Stream.GENERATOR_SIGMA, step=step)
        noisy = self._add_noise(y, sigma, Stream.GENERATOR_NOISE, step, micro)
        with self.student.frozen() as student:
            result = generator_gradient(
                bind(self.teacher, micro.labels),
                bind(student, micro.labels),
                y,
                noisy,
                alpha=config.alpha,
                phased=phased,
                rescale=config.precision == "fp16",
            )

        mark("generator: backward")
        gradient = result.gradient / self.local_batch
        for k in range(last, -1, -1):
            y_k = graph if k == last and graph is not None else forward(k)
            graph = None
            scale = self.generator.loss_scale
            self.generator.backward(along(y_k, gradient))
            del y_k
            if k > 0:
                # x_k = y_{k-1} + noise: its gradient is that of the evaluation before it.
                arrived = chain.inputs[k].grad
                assert arrived is not None
                gradient = arrived / scale
        return result.loss, result.valid

    # -- the generator's samples ------------------------------------------------------------------------------------

    @torch.no_grad()
    def _chain(self, micro: MicroBatch, stream: Stream, step: int) -> Chain:
        """x_1 ~ p_{r_1}(. | 0), x_{k+1} ~ p_{r_{k+1}}(. | G(x_k, sigma_k)) [IPFM, algorithm 2]."""
        y, finite = self._zeros, None
        inputs: list[Tensor] = []
        for k in range(self.config.steps):
            # Each level of a sample has a step of the stream to itself.
            x = self._perturb(y, self._levels[k], stream, step * self.config.steps + k, micro)
            # At small D a latent may overflow: it must not meet the weights, not even under a zero gradient.
            ok = torch.isfinite(x).flatten(1).all(1).view(-1, 1, 1, 1)
            finite = ok if finite is None else finite & ok
            inputs.append(x.masked_fill(~ok, 0.0))
            if k + 1 < self.config.steps:
                y = self._evaluate(k, inputs[-1], micro, step)
        assert finite is not None
        return Chain(inputs, finite)

    @torch.no_grad()
    def _evaluate(self, k: int, x: Tensor, micro: MicroBatch, step: int) -> Tensor:
        """y_k = G(x_k, sigma_k) through the plain module, with the dropout that the trained pass has too."""
        self._seed_dropout(Stream.GENERATOR_DROPOUT, step * self.config.steps + k, micro)
        return self.generator.module(x, self._levels[k], micro.labels)

    def _perturb(self, y: Tensor, sigma: Tensor, stream: Stream, step: int, micro: MicroBatch) -> Tensor:
        x = perturb(y, sigma, self.D, seed=self.config.seed, stream=stream, step=step, sample_index=micro.index)
        assert isinstance(x, Tensor)
        return x

    def _add_noise(self, y: Tensor, sigma: Tensor, stream: Stream, step: int, micro: MicroBatch) -> Noisy:
        position = {"seed": self.config.seed, "stream": stream, "step": step}
        return add_noise(y, sigma, self.D, self.teacher, **position, sample_index=micro.index)

    def _set_mode(self, module: nn.Module, *, training: bool) -> None:
        # A walk over all modules, and without dropout in vain.
        if module.training != training and (self.config.dropout > 0 or self.network.label_dropout > 0):
            module.train(training)

    def _seed_dropout(self, stream: Stream, step: int, micro: MicroBatch) -> None:
        if self.config.dropout > 0:
            seed_dropout(self.config.seed, stream, step, micro.first)

    def _micro_batches(self, label_stream: Stream, step: int) -> Iterator[MicroBatch]:
        """This process's samples of the global batch, a micro-batch at a time."""
        start = self.world.rank * self.local_batch
        for first in range(start, start + self.local_batch, self.micro_batch):
            index = self._offsets + first
            labels = draw_labels(self.network.label_dim, index, seed=self.config.seed, stream=label_stream, step=step)
            yield MicroBatch(first, index, labels)
