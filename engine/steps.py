"""The two steps of a distillation: the student's and the generator's, for any number of generator evaluations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ipfm.engine.augmentation import augment
from ipfm.engine.config import DistillConfig
from ipfm.engine.measure import Measured, Tally
from ipfm.engine.memory.phases import mark
from ipfm.engine.objective import Setting
from ipfm.engine.objectives import (
    Noisy,
    add_noise,
    along,
    bind,
    denoising_objective,
    finite_samples,
    generator_gradient,
    per_sample,
)
from ipfm.engine.streams import Stream, draw_labels, draw_number, seed_dropout
from ipfm.kernels import perturb
from ipfm.models import NetworkConfig


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
    """The steps of inverse Poisson flow matching [IPFM, algorithms 1 and 2].

    One iteration is `student_updates` student steps, then one generator step:

        student step    y = G(z), detached, augmented if asked; x = perturb(y, sigma); S descends the denoising loss
        generator step  y = G(z); x = perturb(y, sigma); G descends L(T(x), S(x), y) of IPFM eq. 21

    Args:
        config: settings with nothing left open but what memory decides.
        setting: the networks "student" and "generator", and where they run.
        network: the teacher's architecture, as it is trained.
    """

    def __init__(self, config: DistillConfig, setting: Setting, network: NetworkConfig) -> None:
        assert config.D is not None
        self.config, self.D = config, config.D
        self.student, self.generator = setting.trained["student"], setting.trained["generator"]
        self.teacher, self.network, self.phased = setting.teacher, network, setting.phased
        self.world = world = setting.world
        self.micro_batch = micro_batch = setting.micro_batch
        self.local_batch = config.batch // world.size
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
            last = self._last(Stream.STUDENT_LAST, step)
            chain = self._chain(micro, Stream.STUDENT_LATENT, step, last)
            y = chain.marked(self._evaluate(last, chain.inputs[-1], micro, step))
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
        afterwards. Every earlier evaluation that the gradient reaches is run once more in both, so that memory does not
        grow with K.
        """
        config, phased = self.config, self.phased
        last = self._last(Stream.GENERATOR_LAST, step)
        first = 0 if config.gradient == "all" else last
        mark("generator: samples")
        chain = self._chain(micro, Stream.GENERATOR_LATENT, step, last)

        def forward(k: int) -> Tensor:
            self._seed_dropout(Stream.GENERATOR_DROPOUT, step * config.steps + k, micro)
            return self.generator(chain.inputs[k].requires_grad_(k > first), self._levels[k], micro.labels)

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
        for k in range(last, first - 1, -1):
            y_k = graph if k == last and graph is not None else forward(k)
            graph = None
            scale = self.generator.loss_scale
            self.generator.backward(along(y_k, gradient))
            del y_k
            if k > first:
                # x_k = y_{k-1} + noise: its gradient is that of the evaluation before it.
                arrived = chain.inputs[k].grad
                assert arrived is not None
                gradient = arrived / scale
        return result.loss, result.valid

    # -- the generator's samples ------------------------------------------------------------------------------------

    def _last(self, stream: Stream, step: int) -> int:
        """The evaluation that ends the chain of this update, counted from 0: the last one, or one drawn for the whole
        batch, as in the backward simulation of DMD2 [Yin et al. 2024, section 4.5]."""
        if self.config.gradient == "all":
            return self.config.steps - 1
        return draw_number(self.config.steps, seed=self.config.seed, stream=stream, step=step)

    @torch.no_grad()
    def _chain(self, micro: MicroBatch, stream: Stream, step: int, last: int) -> Chain:
        """x_1 ~ p_{r_1}(. | 0), x_{k+1} ~ p_{r_{k+1}}(. | G(x_k, sigma_k)) [IPFM, algorithm 2], up to k = `last`."""
        y, finite = self._zeros, None
        inputs: list[Tensor] = []
        for k in range(last + 1):
            # Each level of a sample has a step of the stream to itself.
            x = self._perturb(y, self._levels[k], stream, step * self.config.steps + k, micro)
            # At small D a latent may overflow: it must not meet the weights, not even under a zero gradient.
            ok = per_sample(finite_samples(x), x)
            finite = ok if finite is None else finite & ok
            inputs.append(x.masked_fill(~ok, 0.0))
            if k < last:
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
        for first in self.world.micro_batches(self.config.batch, self.micro_batch):
            index = self._offsets + first
            labels = draw_labels(self.network.label_dim, index, seed=self.config.seed, stream=label_stream, step=step)
            yield MicroBatch(first, index, labels)
