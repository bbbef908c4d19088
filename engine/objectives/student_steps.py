"""The steps of methods with a student: it denoises the samples of a K-step generator, which learns from it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ipfm.engine.averages import Decay
from ipfm.engine.data.augmentation import Augmented, augment
from ipfm.engine.data.dataset import Batch
from ipfm.engine.distributed.pieces import Number, whole
from ipfm.engine.objectives import discriminator
from ipfm.engine.objectives.base import StepContext, Trained
from ipfm.engine.objectives.discriminator import Adversary, Tapped
from ipfm.engine.objectives.loss_weights import chosen_weight
from ipfm.engine.objectives.losses import (
    Noisy,
    PredictionWeighting,
    Weighting,
    add_noise,
    along,
    bind,
    bind_with_logvar,
    denoising_objective,
    finite_samples,
    isolate,
    per_sample,
)
from ipfm.engine.objectives.phases import mark
from ipfm.engine.objectives.real_data import NO_REAL_DATA, Half
from ipfm.engine.objectives.step_metrics import FurtherSum, HalvesSum, LossSum, StepMetrics, measured_as
from ipfm.engine.objectives.student_settings import StudentConfig
from ipfm.engine.random_streams import Stream, class_shares, draw_labels, draw_number, dropout_seed, seed_dropout
from ipfm.kernels import perturb
from ipfm.models import EDM2Precond, NetworkConfig


@dataclass(frozen=True)
class MicroBatch:
    """Samples that one process handles at a time."""

    first: int | Tensor
    """Index of the first sample within the global batch."""
    index: Tensor
    """(B,) int64: indices within the global batch."""
    labels: Tensor | None
    """(B, label_dim) one-hot, or None for an unconditional network."""


class Judging(NamedTuple):
    """How the discriminator is trained on a micro-batch."""

    real: bool
    """What it should say."""
    factor: Tensor
    """(B,) of the binary cross entropy."""


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
    """The steps of inverse Poisson flow matching [IPFM, algorithm 1], on generators of several steps [algorithm 2].

    One iteration is `student_updates` student steps, then one generator step:

        student step    y = G(z), detached, augmented if asked; x = perturb(y, sigma); S descends the denoising loss
        generator step  y = G(z); x = perturb(y, sigma); G descends L(T(x), S(x), y) [IPFM, eq. 28]

    With a discriminator the student's encoder learns to tell noisy samples from real images, and the generator to
    deceive it, see `ipfm.engine.objectives.discriminator`: at first the student alone is trained.

    With real weights the student descends the denoising loss of real images too, in turn, of as many, by the same noise
    and levels and of the same classes, see `ipfm.engine.objectives.real_data`: those of the generator's samples are
    then those of the images.

    Dropout acts in the network that is being trained, and there alone: in S in its step, and in every evaluation of G
    that the gradient passes through in G's. The student's images are made without it.

    Args:
        config: settings with nothing left open but what memory decides.
        context: the networks "student" and "generator", and where they run.
        network: the teacher's architecture, as it is trained.
    """

    def __init__(self, config: StudentConfig, context: StepContext, network: NetworkConfig) -> None:
        self.config, self.settings, self.D = config, context.settings, context.settings.D
        self.student, self.generator = context.trained["student"], context.trained["generator"]
        self.teacher, self.network = context.teacher, network
        self.world = world = context.world
        self.micro_batch = micro_batch = context.micro_batch
        self.local_batch = config.batch // world.size
        self._pieces = context.pieces
        self._real = context.real if config.takes_real_images else None
        if config.takes_real_images and self._real is None:
            raise ValueError(f"{config.why_real_images} was given without real images")
        self._tallies = {name: LossSum(name, world, self.local_batch) for name in ("student", "generator")}
        if self._real is not None:
            self._tallies["student"] = HalvesSum("student", world, self.local_batch, config.weights.a)
        self._judges = config.discriminates
        self._further: dict[str, FurtherSum] = {}
        if self._judges is not None:
            self._further = {
                "student": FurtherSum("discriminator", world),
                "generator": FurtherSum("adversarial", world),
            }
            self._every = torch.arange(config.batch, device=world.device)
        # What every micro-batch starts from; nothing writes to it.
        self._zeros = torch.zeros(micro_batch, *network.image_shape, device=world.device)
        self._levels = [torch.full((micro_batch,), level, device=world.device) for level in config.levels]
        self._offsets = torch.arange(micro_batch, device=world.device)
        self._shares = class_shares(config.class_counts, network.label_dim, world.device)
        # The method's own weights are the kernels' business: nothing is computed for them beside.
        own = type(config)
        weighs_student = own.student_weight is not StudentConfig.student_weight
        weighs_generator = own.generator_weight is not StudentConfig.generator_weight
        self._student_weighting = config.student_weight if weighs_student else None
        self._generator_weighting: Weighting | PredictionWeighting | None = (
            config.generator_weight if weighs_generator else None
        )
        if config.logvar:
            self._generator_weighting = self._by_logvar
        self._generator_weighting = chosen_weight(config.weight, config.weight_power, self.D, self._generator_weighting)

    def iteration(self, step: int) -> StepMetrics:
        """`student_updates` student steps, then the generator step but in the first ones; `step` counts from 0."""
        updates = self.config.student_updates
        measured = [self.student_step(step * updates + update) for update in range(updates)]
        if step < self.config.first_whole_step:
            return StepMetrics.merged(measured)
        return StepMetrics.merged([*measured, self.generator_step(step)])

    def student_step(self, step: int) -> StepMetrics:
        """One update of the student on fresh samples of the generator; `step` counts the student's updates from 0."""
        config = self.config
        self._set_mode(self.student.module, training=True)
        self._set_mode(self.generator.module, training=config.samples_have_dropout)
        last = self._last(Stream.STUDENT_LAST, step)
        for first in self.world.micro_batches(config.batch, self.micro_batch):
            self._pieces.run(
                ("the student's step", last),
                partial(self._student_micro_step, last, self._real_batch(step, first)),
                self._dropout_seed(Stream.STUDENT_DROPOUT, step, first),
                step=step,
                first=first,
            )
        rates = {} if config.student_ema is None else {"ema_decay": config.student_ema}
        further = self._further.get("student")
        return self._update("student", self.student, further, lr=config.student_lr_at(step), **rates)

    def _real_batch(self, step: int, first: int) -> Batch | None:
        """Real images of the student's update `step`, the sample `first` and those after it, where pieces read them."""
        if self._real is None:
            return None
        mark("student: samples")
        found = self._real.batch(step, self._offsets + first)
        labels = None if found.labels is None else self._pieces.placed("real labels", found.labels)
        return Batch(self._pieces.placed("real images", found.images), labels)

    def _student_micro_step(self, last: int, real: Batch | None, numbers: Mapping[str, Number]) -> None:
        """Forward and backward of the micro-batch that begins with the sample "first", in the update "step".

        The samples of the generator first, then the real images, if there are any: one graph at a time.
        """
        config = self.config
        step, micro = whole(numbers["step"]), self._micro(Stream.STUDENT_LABEL, numbers, real)
        mark("student: samples")
        chain = self._chain(micro, Stream.STUDENT_LATENT, step, last)
        y = chain.marked(self._evaluate(last, chain.inputs[-1], micro, step))
        y, augment_labels = self._augmented(y, Stream.STUDENT_AUGMENT, step, micro)
        sigma, judged = self._student_levels(step, micro)
        tally, weights = self._tallies["student"], config.weights
        noisy = self._add_noise(y, sigma, Stream.STUDENT_NOISE, step, micro)
        self._seed_dropout(Stream.STUDENT_DROPOUT, step, micro)
        mark("student: forward and backward")
        tally.add(*self._denoise(y, noisy, micro.labels, augment_labels, weights.generated, judged))
        if real is None:
            return
        assert isinstance(tally, HalvesSum)
        mark("student: forward and backward, real")
        # By the same noise [RealUID; SiDA]; its dropout goes on from where that of the samples has ended.
        y, augment_labels = self._augmented(real.images, Stream.REAL_AUGMENT, step, micro)
        noisy = self._add_noise(y, sigma, Stream.STUDENT_NOISE, step, micro)
        judged = None if judged is None else judged._replace(real=True)
        if judged is not None and weights == NO_REAL_DATA:
            tally.add_other(*self._tell_apart(y, noisy, micro.labels, augment_labels, judged))
        else:
            tally.add_other(*self._denoise(y, noisy, micro.labels, augment_labels, weights.real, judged))

    def _student_levels(self, step: int | Tensor, micro: MicroBatch) -> tuple[Tensor, Judging | None]:
        """sigma (B,), and how the discriminator is trained at these levels, if there is one."""
        config = self.config
        draw = partial(config.student_sigma, seed=config.seed, stream=Stream.STUDENT_SIGMA, step=step)
        if self._judges is None:
            return draw(micro.index).float(), None
        # By the mean weight of the whole batch, which every process knows.
        every = draw(self._every).float()
        weight = 1 / config.noise.sigma_data**2 + 1 / every.square()
        if self._student_weighting is not None:
            weight = self._student_weighting(every, weight)
            # Such a sample does not count in the denoising loss either.
            weight = weight.masked_fill(~torch.isfinite(weight), 0.0)
        sigma = every[micro.index]
        factor = (0.5 * self._judges.student * weight.double().mean()).float().expand(len(sigma))
        if config.logvar:
            # Each level counts as in the denoising loss; the log-variance is that of the latter alone.
            factor = factor * self._inverse_variance(self.student.module, sigma)
        return sigma, Judging(False, factor)

    def _augmented(self, y: Tensor, stream: Stream, step: int | Tensor, micro: MicroBatch) -> Augmented:
        """Images (B, C, H, W) as the student learns to denoise them, and the labels that say what was done to them."""
        config = self.config
        return augment(
            y,
            config.augment,
            seed=config.seed,
            stream=stream,
            step=step,
            sample_index=micro.index,
            mirrored_stretch=config.mirrored_stretch,
        )

    def _denoise(
        self,
        y: Tensor,
        noisy: Noisy,
        labels: Tensor | None,
        augment_labels: Tensor,
        half: Half,
        judged: Judging | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The student's denoising loss on `y`, a half of the whole or all of it, forward and backward.

        With `judged` the discriminator's is passed back in the same pass.

        Returns:
            The denoising loss (B,) of each sample, and whether it counts.
        """
        with_labels = bind_with_logvar if self.config.logvar else bind
        net = with_labels(self.student, labels, augment_labels)
        tapped = None
        if judged is not None:
            net = tapped = Tapped(with_labels(partial(self.student, logits="too"), labels, augment_labels))
        result = denoising_objective(
            net,
            y,
            noisy,
            sigma_data=self.config.noise.sigma_data,
            weighting=self._student_weighting,
            share=half.share,
            stretch=half.stretch,
        )
        surrogate = result.surrogate
        if judged is not None and tapped is not None:
            surrogate = surrogate + self._told_apart(tapped.taken(), result.valid, judged)
        self.student.backward(surrogate / self.local_batch)
        return result.loss, result.valid

    def _tell_apart(
        self, y: Tensor, noisy: Noisy, labels: Tensor | None, augment_labels: Tensor, judged: Judging
    ) -> tuple[Tensor, Tensor]:
        """The discriminator's loss alone on `y`, forward and backward through the encoder.

        Returns:
            0 for each sample, as of the denoising loss, and whether it counts.
        """
        noisy = isolate(noisy)
        valid = torch.isfinite(noisy.c_skip) & finite_samples(y)
        logits = self.student(noisy.scaled, noisy.sigma, labels, augment_labels, raw=True, logits="alone")
        self.student.backward(self._told_apart(logits, valid, judged) / self.local_batch)
        return torch.zeros_like(noisy.sigma), valid

    def _told_apart(self, logits: Tensor, valid: Tensor, judged: Judging) -> Tensor:
        """0-d: its gradient is that of the discriminator's loss of the samples that count; measures the loss."""
        found = discriminator.told_apart(logits.detach(), real=judged.real)
        counted = valid & torch.isfinite(found.loss)
        self._further["student"].add(found.loss, counted, 0.5)
        slope = (found.slope * per_sample(judged.factor, found.slope)).to(logits.dtype)
        return along(logits, slope.masked_fill(per_sample(~counted, slope), 0.0))

    def generator_step(self, step: int) -> StepMetrics:
        """One update of the generator and its EMA; `step` counts from 0."""
        self._set_mode(self.student.module, training=False)
        last, deceives = self._last(Stream.GENERATOR_LAST, step), self._deceives(step)
        for first in self.world.micro_batches(self.config.batch, self.micro_batch):
            self._pieces.run(
                ("the generator's step", last, deceives),
                partial(self._generator_micro_step, last, deceives),
                self._dropout_seed(Stream.GENERATOR_DROPOUT, step * self.config.steps + last, first),
                step=step,
                first=first,
            )
        rates = {"lr": self.config.lr_at(step), "ema_decay": self.config.ema_decay(step)}
        return self._update("generator", self.generator, self._further["generator"] if deceives else None, **rates)

    def _deceives(self, step: int) -> bool:
        """Whether the generator meets the discriminator in this step."""
        return self._judges is not None and self._judges.generator > 0 and step >= self.config.planned_step

    def _update(self, name: str, network: Trained, further: FurtherSum | None, **rates: Decay) -> StepMetrics:
        """The optimiser's step of the network `name`, and what was measured since the last one."""
        tally = self._tallies[name]

        def update(numbers: Mapping[str, Any]) -> Tensor:
            applied = network.step(grad_scale=tally.grad_scale(self.config.batch), **numbers)
            found = tally.taken(applied)
            return found if further is None else torch.cat([found, further.taken()])

        # Of a replayed piece nothing is heard: this is said outside of it.
        mark(f"{name}: optimiser")
        found = self._pieces.run((f"the {name}'s update", further is not None), update, **rates)
        assert found is not None
        return measured_as(name, found, "" if further is None else further.name)

    def _generator_micro_step(self, last: int, deceives: bool, numbers: Mapping[str, Number]) -> None:
        """Forward and backward of one micro-batch, as of `_student_micro_step`.

        Joint keeps the graph of the last evaluation of G while T and S are differentiated; phased runs it once more
        afterwards. Every earlier evaluation that the gradient reaches is run once more in both, so that memory does not
        grow with K.
        """
        config, phased = self.config, self.settings.phased and self.config.passes_through
        step, micro = whole(numbers["step"]), self._micro(Stream.GENERATOR_LABEL, numbers)
        first = 0 if config.gradient == "all" else last
        mark("generator: samples")
        # Evaluations that the gradient does not reach make the input of the others, as sampling does.
        self._set_mode(self.generator.module, training=first == 0 or config.samples_have_dropout)
        chain = self._chain(micro, Stream.GENERATOR_LATENT, step, last)
        self._set_mode(self.generator.module, training=True)

        def forward(k: int) -> Tensor:
            self._seed_dropout(Stream.GENERATOR_DROPOUT, step * config.steps + k, micro)
            return self.generator(chain.inputs[k].requires_grad_(k > first), self._levels[k], micro.labels)

        graph = None if phased else forward(last)
        y = self._evaluate(last, chain.inputs[last], micro, step) if graph is None else graph.detach()
        y = chain.marked(y)
        sigma = config.generator_sigma(micro.index, seed=config.seed, stream=Stream.GENERATOR_SIGMA, step=step).float()
        noisy = self._add_noise(y, sigma, Stream.GENERATOR_NOISE, step, micro)
        with self._judge() as student:
            adversary = self._adversary(student, micro.labels, y[0].numel()) if deceives else None
            result = config.gradient_of(
                bind(self.teacher, micro.labels),
                bind(student, micro.labels),
                y,
                noisy,
                phased=phased,
                rescale=self.settings.precision == "fp16",
                weighting=self._generator_weighting,
                **({} if adversary is None else {"adversary": adversary}),
            )
        if adversary is not None and adversary.loss is not None:
            self._further["generator"].add(adversary.loss, result.valid)

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
        self._tallies["generator"].add(result.loss, result.valid)

    def _judge(self) -> AbstractContextManager[nn.Module]:
        """The student that the generator is trained by, frozen: as it is, or its average."""
        return self.student.frozen() if self.config.student_ema is None else nullcontext(self.student.followed)

    def _adversary(self, student: nn.Module, labels: Tensor | None, elements: int) -> Adversary:
        assert self._judges is not None
        too, alone = (bind(partial(student, logits=which), labels) for which in ("too", "alone"))
        return Adversary(too, alone, self._judges.generator * elements)  # type: ignore[arg-type]

    # -- the generator's samples ------------------------------------------------------------------------------------

    def _last(self, stream: Stream, step: int) -> int:
        """The evaluation that ends the chain of this update, counted from 0.

        The last one, or one drawn for the whole batch, as in the backward simulation of DMD2 [Yin et al. 2024, section
        4.5].
        """
        if self.config.gradient == "all":
            return self.config.steps - 1
        return draw_number(self.config.steps, seed=self.config.seed, stream=stream, step=step)

    @torch.no_grad()
    def _chain(self, micro: MicroBatch, stream: Stream, step: int | Tensor, last: int) -> Chain:
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
    def _evaluate(self, k: int, x: Tensor, micro: MicroBatch, step: int | Tensor) -> Tensor:
        """y_k = G(x_k, sigma_k) through the plain module; in training mode with the dropout of the trained pass."""
        self._seed_dropout(Stream.GENERATOR_DROPOUT, step * self.config.steps + k, micro)
        return self.generator.module(x, self._levels[k], micro.labels)

    def _perturb(self, y: Tensor, sigma: Tensor, stream: Stream, step: int | Tensor, micro: MicroBatch) -> Tensor:
        x = perturb(y, sigma, self.D, seed=self.config.seed, stream=stream, step=step, sample_index=micro.index)
        assert isinstance(x, Tensor)
        return x

    def _add_noise(self, y: Tensor, sigma: Tensor, stream: Stream, step: int | Tensor, micro: MicroBatch) -> Noisy:
        seed = self.config.seed
        return add_noise(y, sigma, self.D, self.teacher, seed=seed, stream=stream, step=step, sample_index=micro.index)

    def _by_logvar(self, sigma: Tensor, weight: Tensor) -> Tensor:
        """The generator's weight by e^-u, u the student's log-variance: it knows sigma alone, and no gradient flows."""
        net = self.student.module if self.config.student_ema is None else self.student.followed
        inverse = self._inverse_variance(net, sigma)
        return self.config.generator_weight(sigma, weight) * inverse.to(weight.dtype)

    @staticmethod
    @torch.no_grad()
    def _inverse_variance(net: nn.Module, sigma: Tensor) -> Tensor:
        """e^-u (B,), u the student's log-variance."""
        assert isinstance(net, EDM2Precond)
        return net.logvar(sigma).neg().exp()

    def _set_mode(self, module: nn.Module, *, training: bool) -> None:
        # A walk over all modules, and without dropout in vain.
        if module.training != training and (self.config.dropout > 0 or self.network.label_dropout > 0):
            module.train(training)

    def _dropout_seed(self, stream: Stream, step: int, first: int) -> int | None:
        """What a piece begins with; None without dropout."""
        return dropout_seed(self.config.seed, stream, step, first) if self.config.dropout > 0 else None

    def _seed_dropout(self, stream: Stream, step: int | Tensor, micro: MicroBatch) -> None:
        # Where the numbers are tensors the piece has begun with its one seed, see `StudentConfig.seeds_once`.
        if self.config.dropout > 0 and not isinstance(step, Tensor) and not isinstance(micro.first, Tensor):
            seed_dropout(self.config.seed, stream, step, micro.first)

    def _micro(self, label_stream: Stream, numbers: Mapping[str, Number], real: Batch | None = None) -> MicroBatch:
        """The micro-batch that begins with the sample "first" of the global batch, in the update "step".

        With real images beside, it has their labels, so that both have one law.
        """
        step, first = whole(numbers["step"]), whole(numbers["first"])
        index = self._offsets + first
        if real is not None:
            return MicroBatch(first, index, real.labels)
        labels = draw_labels(
            self.network.label_dim, index, seed=self.config.seed, stream=label_stream, step=step, shares=self._shares
        )
        return MicroBatch(first, index, labels)
