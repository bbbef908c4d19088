"""Inverse Poisson flow matching, and SiD, which is its case D = inf: what they train."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from ipfm.engine.averages import Decay
from ipfm.engine.checks import at_least, check_start, is_number, not_negative, number, positive, share
from ipfm.engine.config import InitialWeights, setting
from ipfm.engine.data.augmentation import Augmented, augment
from ipfm.engine.data.dataset import Batch
from ipfm.engine.distributed.pieces import Number, whole
from ipfm.engine.noise_levels import check_sigmas, few_step_sigmas
from ipfm.engine.objectives import discriminator
from ipfm.engine.objectives.base import TEACHER, Distillation, Passes, Role, StepContext, Trained, lora_title
from ipfm.engine.objectives.discriminator import Adversary, DiscriminatorWeights, Tapped
from ipfm.engine.objectives.initial_networks import generator_network, initial_weights
from ipfm.engine.objectives.level_laws import level_law, student_draw
from ipfm.engine.objectives.loss_weights import WeightName, chosen_weight
from ipfm.engine.objectives.losses import (
    GeneratorGradient,
    Noisy,
    PredictionWeighting,
    Raw,
    Weighting,
    add_noise,
    along,
    bind,
    bind_with_logvar,
    denoising_objective,
    finite_samples,
    generator_gradient,
    isolate,
    per_sample,
)
from ipfm.engine.objectives.phases import mark
from ipfm.engine.objectives.published import (
    PaperResult,
    discriminator_results,
    paper_results,
    real_data_results,
)
from ipfm.engine.objectives.real_data import NO_REAL_DATA, Half, RealWeights, decided, real_weights, weights_said
from ipfm.engine.objectives.step_metrics import FurtherSum, HalvesSum, LossSum, StepMetrics, measured_as
from ipfm.engine.objectives.variations import checked_laws, variation_name, variation_rows, variation_words
from ipfm.engine.random_streams import Stream, class_shares, draw_labels, draw_number, dropout_seed, seed_dropout
from ipfm.engine.runtime.wording import counted
from ipfm.engine.sampling.batches import sample_generator
from ipfm.kernels import perturb
from ipfm.models import EDM2Precond, NetworkConfig, Precond

if TYPE_CHECKING:
    from ipfm.engine.objectives.base import Objective


class InversePoissonFlowMatching:
    """See `Objective`; with a student, which learns to denoise the generator's samples.

    The generator learns to make the student agree with the teacher [IPFM eq. 21, regularised eq. 28; SiD eq. 23].

    Args:
        config: settings, D among them.
        network: the teacher's architecture, as it is trained.
    """

    def __init__(self, config: StudentConfig, network: NetworkConfig) -> None:
        self.config, self.network = config, network
        self.D = network.D if config.D is None else config.D
        weighting = type(config).weighting_words(replace(config, logvar=False).to_json())
        self.title = f"distil D={self.D:g} {config.title_word} K={config.steps}" + f" {weighting}" * bool(weighting)
        self.title += " logvar" * config.logvar + lora_title(config)
        self.title += "".join(f", {words}" for words in variation_rows(config.to_json()).values())
        self.summary = f"{config.summary_word} and {counted(config.steps, 'step')}"
        if config.weights != NO_REAL_DATA:
            self.title += f" real={config.weights.a:g},{config.weights.b:g}"
            self.summary += f", with real data by {config.weights}"
        if config.discriminator is not None:
            self.title += f" discriminator={config.discriminator}"
            self.summary += discriminator.words_of({"discriminator": config.discriminator})
        self.roles: tuple[Role, ...] = (
            Role(
                "student",
                generator_network(network, config.student_width, logvar=config.logvar),
                initial_weights(config.student_init, config.student_width),
                config.student_lr or config.lr,
                config.student_beta1,
                followed=config.student_ema is not None,
                lora=config.lora_of("student"),
            ),
            Role(
                "generator",
                generator_network(network, config.width),
                initial_weights(config.init, config.width),
                config.lr,
                config.generator_beta1,
                averaged=True,
                lora=config.lora_of("generator"),
            ),
        )
        self.generator = "generator"
        self.nfe = config.steps

    @property
    def facts(self) -> Mapping[str, Any]:
        """See `Objective.facts`."""
        return {"sigmas": list(self.config.levels), **self.config.further_facts}

    def steps(self, context: StepContext) -> DistillSteps:
        """See `Objective.steps`."""
        return DistillSteps(self.config, context, self.network)

    def forwards(self, *, phased: bool, checkpointed: bool) -> int:
        """See `Objective.forwards`."""
        return sum(of.whole + checkpointed * of.again for of in self.passes(phased=phased).values())

    def passes(self, *, phased: bool) -> Mapping[str, Passes]:
        """See `Objective.forwards`: of the student's updates, and of the generator's, in which all three take part."""
        updates, K = self.config.student_updates, self.config.steps
        through = K if self.config.gradient == "all" else 1
        both = self.config.weights != NO_REAL_DATA
        halves = updates * (1 + both)
        # Of real images the discriminator needs the encoder alone.
        encoder = updates if self.config.discriminator is not None and not both else 0
        # Each further evaluation of the generator costs a forward pass; in the generator's update, where the gradient
        # passes through it, one more, and a backward.
        samples, trained = K * updates, K + through - 1 + phased
        return {
            "student": Passes.of(halves + 1, to_input=1, to_weights=halves, encoder=3 * encoder, encoder_again=encoder),
            "generator": Passes.of(samples + trained, to_weights=through),
            TEACHER: Passes.of(1 + phased, to_input=1),
        }

    def passes_at_first(self) -> Mapping[str, Passes]:
        """`passes` of a step before `RunConfig.first_whole_step`: the student's updates alone."""
        updates, K = self.config.student_updates, self.config.steps
        both, told = self.config.weights != NO_REAL_DATA, self.config.discriminator is not None
        halves, encoder = updates * (1 + both), updates * (told and not both)
        student = Passes.of(halves, to_weights=halves, encoder=3 * encoder, encoder_again=encoder)
        return {"student": student, "generator": Passes.of(K * updates)}

    def sample(self, net: Precond, first: int, count: int, *, seed: int) -> Tensor:
        """See `Objective.sample`."""
        return sample_generator(net, first, count, D=self.D, sigmas=self.config.levels, seed=seed)


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


# Where the objectives of this project are.
_HERE = f"{__name__.rpartition('.')[0]}."


@dataclass(frozen=True, kw_only=True)
class StudentConfig(Distillation):
    """Settings of objectives whose student learns to denoise the samples of a K-step generator [IPFM, algorithm 1]."""

    passes_through: ClassVar[bool] = True
    """The generator's gradient passes through the teacher and the student. Where it does not, phased is joint."""

    steps: int = 1
    """K: network evaluations of the generator."""
    sigmas: tuple[float, ...] = setting((), memory=False)
    """Noise levels of the K evaluations, falling. Default: sigma_init (K - k + 1) / K, this project's choice for K > 1:
    the paper prints none."""
    sigma_init: float = setting(2.5, memory=False)
    """Noise level of the generator's input when --sigmas is not given."""
    gradient: Literal["all", "last"] = "all"
    """With several steps: all: the gradient passes through all of them; last: the chain ends after a number of steps
    drawn anew for each update, and the gradient passes through the last of these alone."""
    student_lr: float | None = setting(None, memory=False)
    """Learning rate of the student. Default: that of the generator."""
    generator_beta1: float = 0.0
    """Adam's first decay for the generator."""
    student_beta1: float = 0.0
    """Adam's first decay for the student."""
    student_updates: int = setting(1, memory=False)
    """Student updates per generator update."""
    student_first_kimg: float = setting(0.0, memory=False, added=True)
    """Thousands of images at the start for which the student alone is trained, part of the run's length; SiD²A has
    100."""
    student_init: InitialWeights = setting("auto", memory=False)
    """First weights of the student, as in --init."""
    student_width: float = 1.0
    """Channels of the student by those of the teacher."""
    student: Literal["full", "lora"] = setting("full", added=True)
    """How the student is trained, as in --generator."""

    student_ema: float | None = setting(None, added=True)
    """Train the generator against a moving average of the student of this decay an update of the student, such as
    0.99. Default: the student as it is."""
    weight: WeightName = setting("sid", added=True)
    """Weight of the generator's loss: sid, 1 / mean|T - y|; sigma, 1 / sigma^2; edm, 1 / c_out^2; score, 1 / sigma^2
    for finite D; unsquared, for a distance of T and S in the place of its square. See docs/objectives.md."""
    weight_power: float = setting(0.0, memory=False, added=True)
    """Multiply --weight by this power of sigma; 0.5 and 1 let high levels count for more."""
    levels_generator: str | None = setting(None, memory=False, added=True)
    """Law of the noise levels in the generator's step: grid:LOW:HIGH, rising:HIGH, lognormal:MEAN:STD,
    loguniform[:LOW:HIGH] or log-t:MEAN:SCALE:NU. Default: SiD's, grid:0:0.8."""
    levels_student: str | None = setting(None, memory=False, added=True)
    """The same in the student's step, or generator, the generator's law, or half, half of either. Default: EDM's,
    lognormal:-1.2:1.2."""
    logvar: bool = setting(False, added=True)
    """Weigh each noise level by e^-u in the losses of student and generator, u the student's log-variance, which it
    learns: of teachers that have one, EDM2's."""
    real_data: Path | None = setting(None, identity=False, place=True, memory=False, added=True)
    """Images from which the student learns beside the generator's: a folder, a zip, CIFAR-10's archive; own: those of
    the recipe itself. See docs/objectives.md."""
    real_xflip: bool = setting(False, memory=False, added=True)
    """Mirror real images at random."""
    discriminator: Literal["encoder"] | None = setting(None, added=True)
    """encoder: the student's encoder learns to tell the generator's images from those of --real-data, and the generator
    to deceive it (SiDA)."""
    discriminator_weights: tuple[float, float] | None = setting(None, memory=False, added=True)
    """Of a discriminator: factors of its loss in the student's and in the generator's. Default: SiDA's, 1 2e-4, of EDM2
    100 2e-4."""
    discriminator_kimg: tuple[float, float] | None = setting(None, memory=False, added=True)
    """With a discriminator: thousands of images before the generator is trained, and before it is told what the
    discriminator says. Default: 100 200, SiDA's, but at most 5 % and 10 % of the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("steps", self.steps, 1)
        if self.sigmas != ():
            levels = check_sigmas(self.sigmas)
            object.__setattr__(self, "sigmas", levels)
            # --sigmas alone fixes the number of steps; together with --steps the two have to agree.
            if self.steps not in (1, len(levels)):
                raise ValueError(f"steps and sigmas disagree: {self.steps} steps, {len(levels)} noise levels")
            object.__setattr__(self, "steps", len(levels))
        positive("sigma-init", self.sigma_init)
        for name, law in checked_laws(self).items():
            object.__setattr__(self, name, law)
        if not isinstance(self.logvar, bool):
            raise ValueError(f"logvar must be True or False, got {self.logvar!r}")
        if self.gradient not in ("all", "last"):
            raise ValueError(f"gradient must be all or last, got {self.gradient!r}")
        if self.student_lr is not None:
            positive("student-lr", self.student_lr)
        share("generator-beta1", self.generator_beta1)
        share("student-beta1", self.student_beta1)
        at_least("student-updates", self.student_updates, 1)
        if not isinstance(self.real_xflip, bool):
            raise ValueError(f"real-xflip must be True or False, got {self.real_xflip!r}")
        discriminator.check(self.discriminator, self.discriminator_weights, self.discriminator_kimg)
        weights = discriminator.discriminator_weights(self.discriminator_weights)
        object.__setattr__(self, "discriminator_weights", None if weights is None else tuple(weights))
        object.__setattr__(self, "discriminator_kimg", discriminator.discriminator_starts(self.discriminator_kimg))
        not_negative("student-first-kimg", self.student_first_kimg)
        long = self.max_steps is not None or self.kimg is not None
        alone = math.ceil(self.student_first_kimg * 1000 / self.batch)
        if alone and long and alone >= self.total_steps:
            raise ValueError(
                f"student-first-kimg {self.student_first_kimg:g} are {counted(f'{alone:,}', 'step')} of the run's "
                f"{self.total_steps:,}, which leave none for the generator: give a longer run"
            )
        check_start("student-init", self.student_init, "student-width", self.student_width)
        self._check_training("student", self.student, "student_init", "student_width")
        if self.student == "lora" and self.student_ema is not None:
            raise ValueError(
                "student-ema keeps a network of averaged weights beside the student, and with student lora there is "
                "none of its own: leave one of them out"
            )

    @property
    def low_rank_roles(self) -> tuple[str, ...]:
        """See `Distillation.low_rank_roles`."""
        return ("student",) * (self.student == "lora") + super().low_rank_roles

    # -- what an objective of this kind says ---------------------------------------------------------------------------

    @abstractmethod
    def gradient_of(
        self,
        teacher: Raw,
        student: Raw,
        y: Tensor,
        noisy: Noisy,
        *,
        phased: bool,
        rescale: bool,
        weighting: Weighting | PredictionWeighting | None,
        adversary: Adversary | None = None,
    ) -> GeneratorGradient:
        """dL/dy of the generator's loss on a micro-batch; arguments as in `losses.generator_gradient`.

        With a discriminator `adversary` has the student with its logits, and the gradient is with its term.
        """

    @property
    @abstractmethod
    def title_word(self) -> str:
        """What decides over it besides D and K, in lines of the log: "alpha=1"."""

    @property
    @abstractmethod
    def summary_word(self) -> str:
        """The same within a sentence: "at alpha = 1"."""

    @property
    def weights(self) -> RealWeights:
        """The weights (a, b) of the student's loss; (1, 1) without real images."""
        return NO_REAL_DATA

    @property
    def takes_real_images(self) -> bool:
        """See `Distillation.takes_real_images`."""
        return self.weights != NO_REAL_DATA or self.discriminator is not None

    @property
    def why_real_images(self) -> str:
        """The setting that asks for real images, for a message."""
        return f"real-weights {self.weights}" if self.discriminator is None else f"discriminator {self.discriminator}"

    @property
    def discriminates(self) -> DiscriminatorWeights | None:
        """The factors of a discriminator's terms; None without one."""
        if self.discriminator is None:
            return None
        return DiscriminatorWeights(*(self.discriminator_weights or discriminator.WEIGHTS))

    @property
    def starts(self) -> tuple[float, float]:
        """Thousands of images before the generator is trained, and before it meets a discriminator."""
        if self.discriminator_kimg is not None:
            return self.discriminator_kimg
        known = self.max_steps is not None or self.kimg is not None
        return discriminator.starts_by_default(self.total_steps * self.batch / 1000 if known else None)

    @property
    def further_facts(self) -> Mapping[str, Any]:
        """Plain JSON values that are stored with the result beside its noise levels."""
        return {}

    # -- what a weighting of one's own says otherwise ------------------------------------------------------------------

    def generator_weight(self, sigma: Tensor, weight: Tensor) -> Tensor:
        """The weight of each sample in the generator's loss, through which no gradient flows.

        A subclass with a kind of its own may return others; the tensor that was given, as it is, costs nothing.

        Args:
            sigma: (B,) float32: noise levels.
            weight: (B,) lambda = 1 / max(mean |T - y|, 1e-5); 0 where a sample does not count.

        Returns:
            (B,) the weights to take. A sample whose weight is not finite does not count.
        """
        return weight

    def student_weight(self, sigma: Tensor, weight: Tensor) -> Tensor:
        """The weight of each sample in the student's loss; see `generator_weight`.

        Args:
            sigma: (B,) float32: noise levels.
            weight: (B,) 1 / sigma_data^2 + 1 / sigma^2; 0 where a sample does not count.
        """
        return weight

    def generator_sigma(self, sample_index: Tensor, *, seed: int, stream: int, step: int | Tensor) -> Tensor:
        """sigma (B,) of the generator's step, by --levels-generator or `NoiseLevels.generator`.

        It is a function of the arguments alone.

        Args:
            sample_index: (B,) int64, the samples' global indices.
            seed: of the random numbers, as in `ipfm.kernels.philox.uniform`.
            stream: of the random numbers, likewise.
            step: of the random numbers, likewise.
        """
        law = level_law("levels-generator", self.levels_generator)
        if law is not None:
            return law.draw(self.noise, sample_index, seed=seed, stream=stream, step=step)
        return self.noise.generator(sample_index, seed=seed, stream=stream, step=step)

    def student_sigma(self, sample_index: Tensor, *, seed: int, stream: int, step: int | Tensor) -> Tensor:
        """sigma (B,) of the student's step, see `NoiseLevels.denoising` and --levels-student.

        Arguments as in `generator_sigma`.
        """
        draw = self.noise.denoising
        if self.levels_student in ("generator", "half"):
            draw = student_draw(self.levels_student, draw, self.generator_sigma)
        elif (law := level_law("levels-student", self.levels_student)) is not None:
            draw = partial(law.draw, self.noise)
        return draw(sample_index, seed=seed, stream=stream, step=step)

    @classmethod
    def weighting_words(cls, settings: Mapping[str, Any]) -> str:
        """What a subclass weighs otherwise, for reports: "1 / sigma^2"; its kind where it does not say.

        Args:
            settings: as JSON has them.
        """
        if settings.get("logvar") is True:
            return "e^-u, u the student's log-variance"
        kinds = (c.__dict__.get("kind") for c in cls.__mro__ if c.__module__.startswith(_HERE))
        ours = next((kind for kind in kinds if kind), "")
        return "" if cls.kind == ours else cls.kind

    # ------------------------------------------------------------------------------------------------------------------

    @property
    def capturable(self) -> bool:
        """See `RunConfig.capturable`: but for noise levels or weights of a file of one's own."""
        own = ("generator_sigma", "student_sigma", "generator_weight", "student_weight")
        return all(getattr(type(self), name) is getattr(StudentConfig, name) for name in own)

    @property
    def first_whole_step(self) -> int:
        """See `RunConfig.first_whole_step`: where the student has learned alone for long enough."""
        told = 0.0 if self.discriminator is None else self.starts[0]
        return math.ceil(max(self.student_first_kimg, told) * 1000 / self.batch)

    @property
    def planned_step(self) -> int:
        """See `RunConfig.planned_step`: where the generator meets a discriminator, if there is one."""
        told = 0 if self.discriminator is None else math.ceil(self.starts[1] * 1000 / self.batch)
        return max(self.first_whole_step, told)

    def student_lr_at(self, update: int) -> float:
        """The student's learning rate in its 0-based `update`."""
        return self.scheduled(self.student_lr or self.lr, update, times=self.student_updates)

    def changing_rates(self, step: int) -> Mapping[str, float]:
        """See `RunConfig.changing_rates`: of the student that of its last update in the step."""
        if not self.lr_changes:
            return {}
        return {"student_lr": self.student_lr_at((step + 1) * self.student_updates - 1), **super().changing_rates(step)}

    def seeds_once(self, *, phased: bool) -> bool:
        """See `RunConfig.seeds_once`: where one evaluation of the generator is trained, and made once."""
        again = phased and self.passes_through
        return not again and not self.samples_have_dropout and (self.steps == 1 or self.gradient == "last")

    @property
    def levels(self) -> tuple[float, ...]:
        """The generator's noise levels, resolved."""
        return self.sigmas or few_step_sigmas(self.steps, self.sigma_init)

    def completed(self, network: NetworkConfig) -> Self:
        """See `Distillation.completed`: with the noise levels."""
        if self.logvar and not network.logvar_channels:
            why = "its file has none" if network.is_edm2 else f"which a network of {network.family} has not"
            raise ValueError(f"logvar needs a teacher with a log-variance, {why}: leave it out")
        for width in (self.width, self.student_width):
            generator_network(network, width)
        told_apart = discriminator.decided(self.discriminator, self.discriminator_weights, network)
        return replace(self, sigmas=self.levels, **told_apart)

    @classmethod
    def nfe_of(cls, settings: Mapping[str, Any]) -> int | None:
        """See `Distillation.nfe_of`."""
        return settings.get("steps")

    @classmethod
    def implied(cls, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """See `Distillation.implied`: the noise levels."""
        steps, level = settings.get("steps"), number(settings.get("sigma_init"))
        if isinstance(steps, int) and steps > 0 and 0 < level < math.inf:
            return {"sigmas": list(few_step_sigmas(steps, level))}
        return {}

    @classmethod
    def _weighting(cls, settings: Mapping[str, Any]) -> str:
        words = cls.weighting_words(settings)
        return (f", weighting: {words}" if words else "") + variation_words(settings)

    @classmethod
    def _as_published(cls, settings: Mapping[str, Any]) -> bool:
        """Whether nothing is otherwise for which no figure is published."""
        return settings.get("logvar") is not True and not variation_rows(settings)


# What the loss kernel takes.
ALPHA_LIMIT = 1e6


@dataclass(frozen=True, kw_only=True)
class DistillConfig(StudentConfig):
    """Distillation of a teacher into a K-step generator by inverse Poisson flow matching [IPFM, algorithm 1]."""

    kind: ClassVar[str] = "ipfm"
    planned: ClassVar[Mapping[str, str]] = {
        "steps": "K: evaluations of the generator. Default: 1.",
        "student_updates": "Student updates per generator update. Default: the objective's, 1 or 5.",
        "real_weights": "Of IPFM: with real images in the student's loss, such as 0.92 0.94.",
        "discriminator": "Of IPFM and DMD: encoder, with SiDA's term.",
    }
    plan_example: ClassVar[str] = "ipfm plan --model cifar_ipfm --gpus 1 8 --price A100=1.5 H100=2.5"
    method: ClassVar[str] = "inverse Poisson flow matching"
    measured: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "": {},
        "real images": {"real_weights": (0.92, 0.94)},
        "discriminator": {"discriminator": "encoder"},
    }
    readings: ClassVar[Mapping[str, str]] = {
        "generator_loss": "generator_loss is a difference of two denoising losses: it oscillates about zero and says "
        "little; watch the distance.",
        "student_loss": "student_loss is a denoising loss: it falls, then follows the generator.",
    }

    alpha: float = setting(1.0, memory=False)
    """Regularisation, in SiD's convention: 0.5 is the pure IPFM objective, 1.0 the paper's recommendation."""
    real_weights: tuple[float, float] | None = setting(None, added=True)
    """a b: the share of the generator's samples in the student's loss, and the factor of their targets. Default with
    --real-data: 0.92 0.94, with classes 0.98 0.96 (RealUID's); 1 1 is without real images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.alpha) and abs(self.alpha) <= ALPHA_LIMIT):
            raise ValueError(f"alpha must be a number in [-{ALPHA_LIMIT:g}, {ALPHA_LIMIT:g}], got {self.alpha}")
        weights = real_weights(self.real_weights)
        object.__setattr__(self, "real_weights", None if weights is None else tuple(weights))

    @property
    def weights(self) -> RealWeights:
        """The weights (a, b) of the student's loss; (1, 1) without real images."""
        return NO_REAL_DATA if self.real_weights is None else RealWeights(*self.real_weights)

    def gradient_of(
        self,
        teacher: Raw,
        student: Raw,
        y: Tensor,
        noisy: Noisy,
        *,
        phased: bool,
        rescale: bool,
        weighting: Weighting | PredictionWeighting | None,
        adversary: Adversary | None = None,
    ) -> GeneratorGradient:
        """See `StudentConfig.gradient_of` [IPFM, eq. 28]."""
        return generator_gradient(
            teacher,
            student if adversary is None else adversary.student,
            y,
            noisy,
            alpha=self.alpha,
            phased=phased,
            rescale=rescale,
            weighting=weighting,
            real_weights=self.weights,
            beside=None if adversary is None else adversary.beside,
        )

    @property
    def title_word(self) -> str:
        """See `StudentConfig.title_word`."""
        return f"alpha={self.alpha:g}"

    @property
    def summary_word(self) -> str:
        """See `StudentConfig.summary_word`."""
        return f"at alpha = {self.alpha:g}"

    @property
    def further_facts(self) -> Mapping[str, Any]:
        """See `StudentConfig.further_facts`."""
        return {"alpha": self.alpha}

    def completed(self, network: NetworkConfig) -> Self:
        """See `Distillation.completed`: with the noise levels, and the weights of real images where there are any."""
        # Beside a discriminator, which needs images itself, the term is one that is asked for.
        images = self.real_data is not None and self.discriminator is None
        weights = decided(real_weights(self.real_weights), network, images=images)
        return replace(super().completed(network), real_weights=weights)

    def objective(self, network: NetworkConfig) -> Objective:
        """See `Distillation.objective`."""
        return InversePoissonFlowMatching(self, network)

    def name(self) -> str:
        """See `Distillation.name`."""
        # Before the teacher is known, the weights by default are not.
        real = "-real" if self.real_weights is None and self.real_data is not None else ""
        real = f"-real{self.weights.a:g}-{self.weights.b:g}" if self.weights != NO_REAL_DATA else real
        told = "" if self.discriminator is None else f"-{self.discriminator}"
        real = "" if told and self.weights == NO_REAL_DATA else real
        return f"alpha{self.alpha:g}-K{self.steps}" + "-logvar" * self.logvar + real + told + variation_name(self)

    @classmethod
    def recognises(cls, settings: Mapping[str, Any]) -> bool:
        """See `Distillation.recognises`."""
        return "alpha" in settings

    @classmethod
    def figures(cls, dataset: str, settings: Mapping[str, Any]) -> Mapping[float, PaperResult]:
        """See `Distillation.figures`: none for another weighting."""
        if cls.kind != DistillConfig.kind or not cls._as_published(settings):
            return {}
        steps, weights = settings.get("steps"), weights_said(settings)
        if settings.get("discriminator") is not None:
            return {} if weights else discriminator_results(dataset, number(settings.get("alpha")), steps)
        if weights is not None:
            return real_data_results(dataset, (weights.a, weights.b), steps)
        return paper_results(dataset, number(settings.get("alpha")), steps) if isinstance(steps, int) else {}

    @classmethod
    def report_title(cls, settings: Mapping[str, Any], at: str) -> str:
        """See `Distillation.report_title`."""
        return f"Distillation{at}, α = {number(settings.get('alpha')):g}, {counted(settings.get('steps'), 'step')}"

    @classmethod
    def report_words(cls, settings: Mapping[str, Any]) -> str:
        """See `Distillation.report_words`."""
        alpha = number(settings.get("alpha"))
        pure = ", the pure objective" if alpha == 0.5 else ""
        case = ", which at D = ∞ is SiD" if number(settings.get("D")) == math.inf else ""
        return f"{cls.method}{case} (α = {alpha:g}{pure}){cls._weighting(settings)}{cls._real(settings)}"

    @classmethod
    def info_words(cls, settings: Mapping[str, Any]) -> str:
        """See `Distillation.info_words`."""
        steps = counted(settings.get("steps", 1), "step")
        words = f"{cls._weighting(settings)}{cls._real(settings)}"
        return f"{cls.method}, alpha = {number(settings.get('alpha')):g}, {steps}{words}"

    @classmethod
    def card_words(cls) -> str:
        """See `Distillation.card_words`."""
        return f"{cls.method} ([arXiv 2509.22454](https://arxiv.org/abs/2509.22454))"

    @classmethod
    def card_rows(cls, settings: Mapping[str, Any]) -> Mapping[str, object]:
        """See `Distillation.card_rows`."""
        return {
            "α (0.5 is the pure objective)": settings.get("alpha"),
            "weighting": cls.weighting_words(settings) or None,
            "real data in the student's loss, a and b": weights_said(settings),
            "discriminator": settings.get("discriminator"),
            **variation_rows(settings),
        }

    @staticmethod
    def _real(settings: Mapping[str, Any]) -> str:
        weights = weights_said(settings)
        real = "" if weights is None else f", with real data by {weights}"
        return real + discriminator.words_of(settings)
