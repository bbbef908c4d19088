"""Distillation as a plain PyTorch loop: one process, no DeepSpeed, no explicit gradients, kernels for random numbers.

Written apart from the engine, from the formulas alone; what the engine computes is compared with it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ipfm.engine import DistillConfig
from ipfm.engine.averages import Average
from ipfm.engine.data.augmentation import augment
from ipfm.engine.data.dataset import ImageDataset
from ipfm.engine.objectives.student_settings import StudentConfig
from ipfm.engine.random_streams import Stream, class_shares, draw_labels, draw_number, seed_dropout
from ipfm.kernels import philox, reference
from ipfm.models import Precond


@dataclass
class Plain:
    """Networks after the loop, and the losses of each step."""

    student: Precond
    generator: Precond
    ema: dict[str, Tensor]
    others: list[dict[str, Tensor]] = field(default_factory=list)
    """The averages beside the first one."""
    student_loss: list[float] = field(default_factory=list)
    generator_loss: list[float] = field(default_factory=list)


@dataclass
class Begun:
    """A distillation that has begun elsewhere: networks and average, states of torch's Adam, steps done."""

    student: Precond
    generator: Precond
    ema: Precond
    student_adam: dict
    generator_adam: dict
    step: int


def distill(
    teacher: Precond,
    config: StudentConfig,
    steps: int,
    begun: Begun | None = None,
    *,
    trained: Callable[[Precond], Precond] = lambda net: net,
    before_update: Callable[[Precond], object] = lambda net: None,
    real: ImageDataset | None = None,
) -> Plain:
    """`steps` iterations on the whole batch at once, gradients by autograd through everything.

    `begun`: go on from there. `trained`: the form in which a network is trained. `before_update`: called with it before
    the forward passes of each of its updates; of a generator that had none the student sees a copy with which it was
    called once. `real`: images of which the student learns too [RealUID], or by which its encoder is told what is real
    [SiDA].
    """
    teacher = copy.deepcopy(teacher).eval().requires_grad_(False)
    S, G = (
        trained(copy.deepcopy(net)).requires_grad_(True)
        for net in ((teacher, teacher) if begun is None else (begun.student, begun.generator))
    )
    for module in (*S.modules(), *G.modules()):
        if hasattr(module, "dropout"):
            module.dropout = config.dropout  # type: ignore[assignment]
    shown = copy.deepcopy(G)
    before_update(shown)
    start, *others = ({name: p.detach().clone() for name, p in G.named_parameters()} for _ in config.averages)
    run = Plain(S, G, start, others)
    # What the generator is trained by: the student, or its average.
    judge = S if config.student_ema is None else copy.deepcopy(S).requires_grad_(False).eval()
    student_adam = torch.optim.Adam(
        S.parameters(), lr=config.student_lr or config.lr, betas=(config.student_beta1, 0.999), eps=config.eps
    )
    generator_adam = torch.optim.Adam(
        G.parameters(), lr=config.lr, betas=(config.generator_beta1, 0.999), eps=config.eps
    )
    first = 0
    if begun is not None:
        first = begun.step
        # Every average goes on from the one that there is.
        run.ema, *run.others = (
            {name: p.detach().clone() for name, p in begun.ema.named_parameters()} for _ in config.averages
        )
        student_adam.load_state_dict(copy.deepcopy(begun.student_adam))
        generator_adam.load_state_dict(copy.deepcopy(begun.generator_adam))
    device = next(teacher.parameters()).device
    index = torch.arange(config.batch, device=device)
    D, levels, own, updates = teacher.D, config.levels, type(config), config.student_updates
    a, b = (1.0, 1.0) if real is None else config.weights
    omega, gamma = config.discriminator_weights or (1.0, 2e-4)

    # What the encoder's last block gave in the last forward pass of S.
    seen: list[Tensor] = []
    for net in {S, judge}:
        last = list(net.model.enc.values())[-1]
        last.register_forward_hook(lambda block, given, out: seen.__setitem__(slice(None), [out]))
    begins = [1000 * kimg for kimg in config.discriminator_kimg or (0, 0)]

    def crossed(real: bool) -> Tensor:
        """Mean binary cross entropy of each sample over the places of the last forward pass of S."""
        logits = seen[0].mean(1)
        return torch.nn.functional.binary_cross_entropy_with_logits(
            logits, torch.full_like(logits, real), reduction="none"
        ).mean((1, 2))

    def skipped(x: Tensor, sigma: Tensor) -> Tensor:
        return (0.25 / (sigma**2 + 0.25)).view(-1, 1, 1, 1) * x

    def noisy(y: Tensor, sigma: Tensor, stream: Stream, step: int) -> Tensor:
        noise: Tensor = reference.perturb(  # type: ignore[assignment]
            torch.zeros_like(y), sigma, D, seed=config.seed, stream=stream, step=step, sample_index=index
        )
        return y + noise

    def classes(stream: Stream, step: int) -> Tensor | None:
        shares = class_shares(config.class_counts, teacher.label_dim, device)
        return draw_labels(teacher.label_dim, index, seed=config.seed, stream=stream, step=step, shares=shares)

    def samples(
        net: Precond, stream: Stream, step: int, labels: Tensor | None, last: Stream, *, training: bool
    ) -> Tensor:
        y = torch.zeros(config.batch, *teacher.config.image_shape, device=device)
        ends = len(levels)
        if config.gradient == "last":
            ends = 1 + draw_number(len(levels), seed=config.seed, stream=last, step=step)
        for k, level in enumerate(levels[:ends]):
            if config.gradient == "last":
                y = y.detach()
            sigma = torch.full((config.batch,), level, device=device)
            x = noisy(y, sigma, stream, step * len(levels) + k)
            # Dropout acts in what is trained: nothing in the student's step, and the last evaluation alone where the
            # gradient passes through no other.
            net.train(training and (config.gradient == "all" or k == ends - 1))
            seed_dropout(config.seed, Stream.GENERATOR_DROPOUT, step * len(levels) + k, 0)
            y = net(x, sigma, labels)
        return y

    # Steps in which the student learns alone.
    alone = -int(-max(config.student_first_kimg * 1000, begins[0]) // config.batch)
    all_steps = config.total_steps if config.lr_schedule == "linear" else 0

    def rate(update: int, updates_in_all: int) -> float:
        share = min((update + 1) / config.lr_warmup, 1) if config.lr_warmup else 1.0
        if config.lr_schedule == "linear":
            share *= 1 + (config.lr_end - 1) * update / updates_in_all
        elif config.lr_decay_batches is not None and update > config.lr_decay_batches:
            share *= (config.lr_decay_batches / update) ** 0.5
        return share

    def descend(net: Precond, adam: torch.optim.Adam, loss: Tensor, lr: float) -> None:
        for group in adam.param_groups:
            group["lr"] = lr
        adam.zero_grad()
        loss.backward()
        if config.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(net.parameters(), config.clip_grad)
        adam.step()

    for step in range(first, first + steps):
        student_losses = []
        for update in range(updates):
            count = step * updates + update
            labels = classes(Stream.STUDENT_LABEL, count)
            truth = None if real is None else real.batch(count, index, batch_size=config.batch, seed=config.seed)
            if truth is not None:
                labels = truth.labels if teacher.label_dim else None
            with torch.no_grad():
                y = samples(shown, Stream.STUDENT_LATENT, count, labels, Stream.STUDENT_LAST, training=False)
            y, augment_labels = augment(
                y, config.augment, seed=config.seed, stream=Stream.STUDENT_AUGMENT, step=count, sample_index=index
            )
            n = philox.normal(index, 1, seed=config.seed, stream=Stream.STUDENT_SIGMA, step=count)[:, 0]
            sigma = torch.exp(-1.2 + 1.2 * n.double()).float()
            if own.student_sigma is not DistillConfig.student_sigma or config.levels_student:
                sigma = config.student_sigma(index, seed=config.seed, stream=Stream.STUDENT_SIGMA, step=count)
            x = noisy(y, sigma, Stream.STUDENT_NOISE, count)
            weight = config.student_weight(sigma, (sigma**2 + 0.25) / (sigma * 0.5) ** 2)
            seed_dropout(config.seed, Stream.STUDENT_DROPOUT, count, 0)
            before_update(S)
            target = y if truth is None else (1 - b / a) * skipped(x, sigma) + b / a * y
            losses = a * weight * (S.train()(x, sigma, labels, augment_labels) - target).square().sum((1, 2, 3))
            told = crossed(False) if config.discriminator else torch.zeros(())
            if truth is not None:
                y, augment_labels = augment(
                    truth.images, config.augment, seed=config.seed, stream=Stream.REAL_AUGMENT, step=count,
                    sample_index=index,
                )  # fmt: skip
                x = noisy(y, sigma, Stream.STUDENT_NOISE, count)
                stretch = (1 - b) / (1 - a) if a < 1 else 0.0
                target = (1 - stretch) * skipped(x, sigma) + stretch * y
                error = S(x, sigma, labels, augment_labels) - target
                losses = losses + (1 - a) * weight * error.square().sum((1, 2, 3))
                told = told + crossed(True) if config.discriminator else told
            denoising = losses.mean() + omega * weight.mean() * 0.5 * told.mean()
            descend(S, student_adam, denoising, (config.student_lr or config.lr) * rate(count, updates * all_steps))
            if config.student_ema is not None:
                with torch.no_grad():
                    for kept_p, p in zip(judge.parameters(), S.parameters(), strict=True):
                        kept_p.copy_(config.student_ema * kept_p + (1 - config.student_ema) * p)
            student_losses.append(losses.mean().item())
        run.student_loss.append(sum(student_losses) / len(student_losses))
        if step < alone:
            continue

        S.requires_grad_(False).eval()
        labels = classes(Stream.GENERATOR_LABEL, step)
        before_update(G)
        shown = G
        y = samples(G, Stream.GENERATOR_LATENT, step, labels, Stream.GENERATOR_LAST, training=True)
        u = philox.uniform(index, 1, seed=config.seed, stream=Stream.GENERATOR_SIGMA, step=step)[:, 0].double()
        sigma = (80 ** (1 / 7) + (1 - 0.8 * u) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        if own.generator_sigma is not DistillConfig.generator_sigma or config.levels_generator:
            sigma = config.generator_sigma(index, seed=config.seed, stream=Stream.GENERATOR_SIGMA, step=step)
        x = noisy(y, sigma.float(), Stream.GENERATOR_NOISE, step)
        t, s = teacher(x, sigma.float(), labels), judge(x, sigma.float(), labels)
        with torch.no_grad():
            weight = _weight(config, D, y, x, t, s, sigma)
            weight = config.generator_weight(sigma, weight)
        # Double precision here: the three squares nearly cancel while S is close to T.
        deceived = torch.zeros(())
        if config.discriminator and step * config.batch >= begins[1]:
            logits = seen[0].mean(1).clamp(-10, 10)
            deceived = (gamma * y[0].numel() * weight * torch.nn.functional.softplus(-logits).mean((1, 2))).mean()
        t, s, y = t.double(), s.double(), y.double()
        if real is not None:
            # a times the loss of the shifted target, of which the offset is a part.
            y = (1 - b / a) * skipped(x.double(), sigma.double()) + b / a * y
        if isinstance(config, DistillConfig):
            terms = a * ((t - y) ** 2 - (s - y) ** 2 - 2 * (config.alpha - 0.5) * (t - s) ** 2)
            losses = weight * terms.sum((1, 2, 3))
            loss = losses.mean() + deceived
            descend(G, generator_adam, loss, config.lr * rate(step - alone, all_steps - alone))
        else:
            # Distribution matching distillation: y is drawn to where the difference of the two denoisers leads it.
            lead = 2 * weight.view(-1, 1, 1, 1) * (s - t)
            losses = weight * ((s - t) ** 2).sum((1, 2, 3))
            towards = (y - lead).detach()
            half = 0.5 * (y - towards).square().sum((1, 2, 3)).mean() + deceived
            descend(G, generator_adam, half, config.lr * rate(step - alone, all_steps - alone))
        S.requires_grad_(True)
        run.generator_loss.append(losses.mean().item())

        for kept, average in zip((run.ema, *run.others), config.averages, strict=True):
            decay = _decay(average, step, config)
            for name, p in G.named_parameters():
                kept[name].mul_(decay).add_(p.detach(), alpha=1 - decay)
    return run


def _weight(config: StudentConfig, D: float, y: Tensor, x: Tensor, t: Tensor, s: Tensor, sigma: Tensor) -> Tensor:
    """lambda (B,) by the formulas of `ipfm.engine.objectives.loss_weights`."""
    N = y[0].numel()
    square_to_x, square_apart = ((a - b).square().sum((1, 2, 3)) for a, b in ((x, t), (t, s)))
    weights = {
        "sid": 1 / (y - t).abs().mean((1, 2, 3)).clamp(min=1e-5),
        "sigma": 1 / sigma**2,
        "edm": 1 / sigma**2 + 1 / 0.5**2,
        "score": (N + D) / (square_to_x + sigma**2 * D),
        "unsquared": 1 / (square_apart + 1e-6 * N) ** 0.5,
    }
    return weights[config.weight] * sigma**config.weight_power


def _decay(average: Average, step: int, config: StudentConfig) -> float:
    if average.std is not None:
        q = average.std**-2
        power = max(np.roots([1, 7, 16 - q, 12 - q]).real)
        return float((1 - config.batch / ((step + 1) * config.batch)) ** (power + 1))
    # Seen before this step; none yet in the first, after which the average is the weights.
    half_life = min((average.half_life or 0) * 1000, config.ema_rampup * step * config.batch)
    return 0.5 ** (config.batch / half_life) if half_life else 0.0
