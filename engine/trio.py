"""Distillation: the teacher, the student and the generator, and the two steps that train the latter two."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ipfm.engine.augmentation import augment
from ipfm.engine.averaged import Averaged
from ipfm.engine.config import DistillConfig
from ipfm.engine.evaluation import Evaluation
from ipfm.engine.measure import Measured, Tally
from ipfm.engine.memory import device_budget, plan_memory
from ipfm.engine.memory.phases import mark
from ipfm.engine.metrics import FrechetResult
from ipfm.engine.networks import teacher_facts, trainable_copy, trained_config
from ipfm.engine.objectives import bind, denoising_objective, generator_gradient
from ipfm.engine.precision import apply_precision, halve_storage
from ipfm.engine.report import EvaluationRow
from ipfm.engine.resolve import allow_tf32, resolve
from ipfm.engine.results import conclude
from ipfm.engine.runs import execute
from ipfm.engine.sampling import sample_generator
from ipfm.engine.streams import Stream, draw_labels, seed_dropout
from ipfm.engine.world import World, start_world
from ipfm.engine.zero import TrainedNetwork, shard_frozen
from ipfm.kernels import perturb
from ipfm.models import Precond


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


class Distiller:
    """Inverse Poisson flow matching of a teacher into a K-step generator [IPFM, algorithms 1 and 2].

    One iteration is `student_updates` student steps, then one generator step:

        student step    y = G(z), detached, augmented if asked; x = perturb(y, sigma); S descends the denoising loss
        generator step  y = G(z); x = perturb(y, sigma); G descends L(T(x), S(x), y) of IPFM eq. 21

    Student and generator start from the teacher's weights. No data is used. Every random number is a function of
    (seed, step, sample), so that the number of processes and the micro-batch do not change what is computed; dropout
    alone, if there is any, is drawn for a micro-batch as a whole.

    Args:
        config: settings; what they leave open (D, precision, ZeRO stage) is filled in, see `.config`.
        teacher: the frozen denoiser; it is copied.
        evaluation: what the generator's samples are measured against; None measures nothing.
        dataset: name of the teacher's data ("cifar10", …), under which published results are looked up.
        world: the run's processes; joined or started when None.

    Raises:
        ValueError: D contradicts the teacher, or the batch does not divide among the processes.
    """

    def __init__(
        self,
        config: DistillConfig,
        teacher: Precond,
        *,
        evaluation: Evaluation | None = None,
        dataset: str = "",
        world: World | None = None,
    ) -> None:
        self.world = world or start_world()
        device = self.world.device
        self.config = config = resolve(config, teacher.config, device)
        assert config.D is not None and config.zero is not None and config.precision != "auto"
        self.D = config.D
        self.local_batch, self.micro_batch = config.split(self.world.size)
        self.evaluation = evaluation
        self.dataset = dataset
        self.rows: list[EvaluationRow] = []
        self.first_step = 0
        self.title = f"distil D={self.D:g} alpha={config.alpha:g} K={config.steps}"
        allow_tf32(config.tf32)

        self.network = teacher.config
        self._facts = teacher_facts(teacher)
        self.student, self.generator = (
            TrainedNetwork(
                apply_precision(trainable_copy(teacher, config.dropout).to(device), config.precision),
                world=self.world,
                lr=lr,
                betas=(beta1, 0.999),
                eps=config.eps,
                ema=ema,
                stage=config.zero,
                precision=config.precision,
                offload=config.offload,
                clip_norm=config.clip_grad,
            )
            for lr, beta1, ema in (
                (config.student_lr or config.lr, config.student_beta1, False),
                (config.lr, config.generator_beta1, True),
            )
        )
        buffers = {name: buffer.detach().to(device, copy=True) for name, buffer in teacher.named_buffers()}
        self.averaged = Averaged(self.generator, teacher.config, buffers, config.precision, device)
        self.teacher = self._stored(teacher)
        self.networks = {"student": self.student, "generator": self.generator}
        self.backward = config.backward if config.backward != "auto" else self._affordable_backward()

    def _stored(self, teacher: Precond) -> Precond:
        """The run's own copy of the teacher, kept as `teacher_storage` says."""
        config = self.config
        assert config.precision != "auto"
        net = apply_precision(copy.deepcopy(teacher).to(self.world.device), config.precision)
        net.eval().requires_grad_(False)
        if config.teacher_storage == "half":
            halve_storage(net, config.precision)
        elif config.teacher_storage == "sharded":
            shard_frozen(net, offload=config.offload)
        return net

    # -- the two steps ----------------------------------------------------------------------------------------------

    def iteration(self, step: int) -> Measured:
        """`student_updates` student steps, then the generator step; `step` counts from 0."""
        self.averaged.release()
        updates = self.config.student_updates
        measured = [self.student_step(step * updates + update) for update in range(updates)]
        return Measured.merged([*measured, self.generator_step(step)])

    def student_step(self, step: int) -> Measured:
        """One update of the student on fresh samples of the generator; `step` counts the student's updates from 0."""
        config, noise = self.config, self.config.noise
        tally = Tally("student", self.world)
        self.student.module.train()
        self.generator.module.train()
        for micro in self._micro_batches(Stream.STUDENT_LABEL, step):
            mark("student: samples")
            chain = self._chain(micro, Stream.STUDENT_LATENT, step)
            y = chain.marked(self._evaluate(config.steps - 1, chain.inputs[-1], micro, step))
            y, augment_labels = augment(
                y, config.augment, seed=config.seed, stream=Stream.STUDENT_AUGMENT, step=step, sample_index=micro.index
            )
            sigma = noise.denoising(micro.index, seed=config.seed, stream=Stream.STUDENT_SIGMA, step=step)
            x = self._perturb(y, sigma, Stream.STUDENT_NOISE, step, micro)
            self._seed_dropout(Stream.STUDENT_DROPOUT, step, micro)
            mark("student: forward and backward")
            student = bind(self.student, micro.labels, augment_labels)
            result = denoising_objective(student, y, x, sigma, sigma_data=noise.sigma_data)
            self.student.backward(result.surrogate / self.local_batch)
            tally.add(result.loss, result.valid)
        mark("student: optimiser")
        lr = config.student_lr or config.lr
        applied = self.student.step(lr=lr, grad_scale=tally.grad_scale(config.batch))
        return tally.measured(applied)

    def generator_step(self, step: int) -> Measured:
        """One update of the generator and its EMA; `step` counts from 0."""
        tally = Tally("generator", self.world)
        self.student.module.eval()
        self.generator.module.train()
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
        config, last, phased = self.config, self.config.steps - 1, self.backward == "phased"
        mark("generator: samples")
        chain = self._chain(micro, Stream.GENERATOR_LATENT, step)

        def forward(k: int) -> Tensor:
            self._seed_dropout(Stream.GENERATOR_DROPOUT, step * config.steps + k, micro)
            return self.generator(chain.inputs[k].requires_grad_(k > 0), self._level(k, micro), micro.labels)

        graph = None if phased else forward(last)
        y = self._evaluate(last, chain.inputs[last], micro, step) if graph is None else graph.detach()
        y = chain.marked(y)
        sigma = config.noise.generator(micro.index, seed=config.seed, stream=Stream.GENERATOR_SIGMA, step=step)
        x = self._perturb(y, sigma, Stream.GENERATOR_NOISE, step, micro)
        with self.student.frozen() as student:
            result = generator_gradient(
                bind(self.teacher, micro.labels),
                bind(student, micro.labels),
                y,
                x,
                sigma,
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
            self.generator.backward((y_k * gradient).sum())
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
        count, net = len(micro.index), self.network
        y = torch.zeros(count, net.img_channels, net.img_resolution, net.img_resolution, device=micro.index.device)
        finite = torch.ones(count, 1, 1, 1, dtype=torch.bool, device=micro.index.device)
        inputs: list[Tensor] = []
        for k in range(self.config.steps):
            # Each level of a sample has a step of the stream to itself.
            x = self._perturb(y, self._level(k, micro), stream, step * self.config.steps + k, micro)
            # At small D a latent may overflow: it must not meet the weights, not even under a zero gradient.
            ok = torch.isfinite(x).flatten(1).all(1).view(-1, 1, 1, 1)
            finite = finite & ok
            inputs.append(x.masked_fill(~ok, 0.0))
            if k + 1 < self.config.steps:
                y = self._evaluate(k, inputs[-1], micro, step)
        return Chain(inputs, finite)

    @torch.no_grad()
    def _evaluate(self, k: int, x: Tensor, micro: MicroBatch, step: int) -> Tensor:
        """y_k = G(x_k, sigma_k) through the plain module, with the dropout that the trained pass has too."""
        self._seed_dropout(Stream.GENERATOR_DROPOUT, step * self.config.steps + k, micro)
        return self.generator.module(x, self._level(k, micro), micro.labels)

    def _level(self, k: int, micro: MicroBatch) -> Tensor:
        return torch.full((len(micro.index),), self.config.levels[k], device=micro.index.device)

    def _perturb(self, y: Tensor, sigma: Tensor, stream: Stream, step: int, micro: MicroBatch) -> Tensor:
        x = perturb(y, sigma, self.D, seed=self.config.seed, stream=stream, step=step, sample_index=micro.index)
        assert isinstance(x, Tensor)
        return x

    def _seed_dropout(self, stream: Stream, step: int, micro: MicroBatch) -> None:
        if self.config.dropout > 0:
            seed_dropout(self.config.seed, stream, step, micro.first)

    def _micro_batches(self, label_stream: Stream, step: int) -> Iterator[MicroBatch]:
        """This process's samples of the global batch, a micro-batch at a time."""
        start = self.world.rank * self.local_batch
        for first in range(start, start + self.local_batch, self.micro_batch):
            index = torch.arange(first, first + self.micro_batch, device=self.world.device)
            labels = draw_labels(self.network.label_dim, index, seed=self.config.seed, stream=label_stream, step=step)
            yield MicroBatch(first, index, labels)

    # -- looking at it ----------------------------------------------------------------------------------------------

    def sample(self, first: int, count: int, *, seed: int) -> Tensor:
        """Images first..first + count - 1 of `seed` from the averaged generator as last refreshed."""
        return sample_generator(self.average, first, count, D=self.D, sigmas=self.config.levels, seed=seed)

    def refresh(self) -> None:
        """Bring the averaged generator up to date. Every process must call it."""
        self.averaged.refresh()

    @property
    def average(self) -> Precond:
        """The averaged generator of the last `refresh`; the next step frees it."""
        return self.averaged.net

    def evaluate(self) -> FrechetResult | None:
        """Fréchet distance of the averaged generator's samples; None without an evaluation."""
        evaluation = self.evaluation
        if evaluation is None:
            return None
        return evaluation.measure(lambda first, count: self.sample(first, count, seed=evaluation.seed), self.world)

    def picture(self, count: int, seed: int) -> Tensor:
        """`count` images from fixed latents."""
        return self.sample(0, count, seed=seed)

    # -- a whole run ------------------------------------------------------------------------------------------------

    def run(self, path: Path | str) -> Precond:
        """Distil in the run folder `path`, or continue there.

        Leaves the averaged generator in path/generator and, with an evaluation, the table of results (results.txt,
        results.json) and the curve of convergence (convergence.png). A finished run is only read again.

        Returns:
            The averaged generator, on the run's device, in eval mode.

        Raises:
            ValueError: the folder belongs to another run.
            TrainingFailed, Interrupted: from the loop.
        """
        config, path = self.config, Path(path)
        about = {
            "task": "generator",
            "dataset": self.dataset,
            "D": config.to_json()["D"],
            "sigmas": list(config.levels),
            "alpha": config.alpha,
        }
        folder, progress = execute(
            self,
            config,
            path,
            kind="distill",
            facts=self._facts,
            export="generator",
            about=about,
        )
        if self.evaluation is not None:
            self.rows = conclude(self, folder.path, self.evaluation, progress.last)
        return self.average

    def _affordable_backward(self) -> str:
        """ "joint" where this device's memory allows it, else "phased"."""
        config = self.config
        assert config.precision != "auto" and config.zero is not None
        plan = plan_memory(
            trained_config(self.network, config.dropout),
            micro_batch=self.micro_batch,
            ranks=self.world.size,
            stage=config.zero,
            precision=config.precision,
            student_beta1=config.student_beta1,
            generator_beta1=config.generator_beta1,
            budget=device_budget(self.world.device),
        )
        return plan.backward
