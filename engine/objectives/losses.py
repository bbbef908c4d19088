"""The two objectives of inverse Poisson flow matching, and the gradient that the generator needs.

Functions of plain networks and tensors: no optimiser, no process group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ipfm.engine.objectives.phases import mark
from ipfm.kernels import denoising_loss, ipfm_loss, perturb
from ipfm.kernels.reference import LossWeight
from ipfm.models import Precond

# A network with its labels bound: (c_in x (B, C, H, W) in its compute dtype, sigma (B,)) -> its raw output F.
Raw = Callable[[Tensor, Tensor], Tensor]
# A weighting of one's own: (sigma (B,), the method's weight (B,), 0 where a sample does not count) -> the weight to
# take instead, (B,), through which no gradient flows. The very tensor that it was given changes nothing.
Weighting = Callable[[Tensor, Tensor], Tensor]


# The same of a network that gives its log-variance too: -> (F, u (B,)).
RawWithLogvar = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
# The same of a network that gives the logits of its encoder, last: -> (F, logits (B, H, W)), or (F, u, logits).
RawWithLogits = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
# Another output of the student with its cotangent, of the weight lambda (B,): what is passed back beside F's.
Beside = Callable[[Tensor], tuple[Tensor, Tensor]]


def bind(net: Callable[..., Tensor], labels: Tensor | None, augment_labels: Tensor | None = None) -> Raw:
    """The network's raw output as a function of (scaled, sigma), with these class and augmentation labels."""
    return lambda scaled, sigma: net(scaled, sigma, labels, augment_labels, raw=True)


def bind_with_logvar(
    net: Callable[..., Any], labels: Tensor | None, augment_labels: Tensor | None = None
) -> RawWithLogvar:
    """As `bind`, with the log-variance: one call, as an engine of a sharded network wants it."""
    return lambda scaled, sigma: net(scaled, sigma, labels, augment_labels, raw=True, return_logvar=True)


class Noisy(NamedTuple):
    """A perturbed sample, as the losses and as the networks take it; the denoised one is c_skip x + c_out F(scaled)."""

    x: Tensor
    """(B, C, H, W)."""
    scaled: Tensor
    """(B, C, H, W): c_in x, in the networks' compute dtype."""
    sigma: Tensor
    """(B,) noise levels."""
    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    """(B,) each, of the networks' preconditioning."""


@runtime_checkable
class PredictionWeighting(Protocol):
    """A weighting that looks at the predictions too, where the generator is trained."""

    def among(self, noisy: Noisy, teacher: Tensor, student: Tensor) -> Weighting:
        """The weighting of these samples, by the raw outputs (B, C, H, W) at them."""
        ...


class OnePass(NamedTuple):
    """A weight of the generator's loss as `ipfm_loss` takes it; see there."""

    weight: LossWeight = "sid"
    factor: Tensor | None = None
    sigma: Tensor | None = None
    D: float = math.inf


@runtime_checkable
class KernelWeighting(Protocol):
    """A weighting that the kernel of the generator's loss may know."""

    def in_one_pass(self, noisy: Noisy) -> OnePass | None:
        """The weight of these samples as the kernel takes it; None where it does not know it."""
        ...


def add_noise(
    y: Tensor,
    sigma: Tensor,
    D: float,
    net: Precond,
    *,
    seed: int,
    stream: int,
    step: int | Tensor,
    sample_index: Tensor,
) -> Noisy:
    """x ~ p_r(x | y), r = sigma sqrt(D), ready for `net` and networks of its kind; arguments as in `perturb`."""
    c_skip, c_out, c_in, _ = net.coefficients(sigma.to(net.wide_dtype))
    x, scaled = perturb(
        y,
        sigma,
        D,
        seed=seed,
        stream=stream,
        step=step,
        sample_index=sample_index,
        c_in=c_in,
        out_dtype=net.input_dtype,
    )
    return Noisy(x, scaled, sigma, c_skip, c_out, c_in)


class DenoisingResult(NamedTuple):
    """Outcome of one objective on a micro-batch."""

    surrogate: Tensor
    """0-d: its gradient with respect to the network's parameters is that of the loss summed over the samples."""
    loss: Tensor
    """(B,) loss per sample, 0 where the sample does not count."""
    valid: Tensor
    """(B,) bool: the sample counts."""


class GeneratorGradient(NamedTuple):
    """dL/dy of the generator objective on a micro-batch."""

    gradient: Tensor
    """(B, C, H, W): 0 where the sample does not count."""
    loss: Tensor
    """(B,) loss per sample, weight included, 0 where the sample does not count."""
    weight: Tensor
    """(B,) the weight lambda, 0 where the sample does not count."""
    valid: Tensor
    """(B,) bool: the sample counts."""


def denoising_objective(
    net: Raw | RawWithLogvar,
    y: Tensor,
    noisy: Noisy,
    *,
    sigma_data: float,
    weighting: Weighting | None = None,
    share: float = 1.0,
    stretch: float = 1.0,
) -> DenoisingResult:
    """w(sigma) ||D(x, sigma) - y||^2, summed over elements [Karras et al. 2022, table 1]: teacher and student.

    w = 1 / sigma_data^2 + 1 / sigma^2: EDM's weight, and at sigma_data = inf that of VP and VE.

    Of a network that gives its log-variance, see `bind_with_logvar`, the loss of an element is w / e^u (D - y)^2 + u
    [Karras et al. 2024, eq. 21]: it is least where u is the logarithm of the loss without it, so that each noise level
    counts alike.

    Samples with a non-finite x are kept out of the network: a NaN activation would reach the weights even under a
    zero gradient. One with a non-finite y does not count either.

    Args:
        net: the network that is trained.
        y: (B, C, H, W) clean samples, without a graph.
        noisy: their perturbation, without a graph.
        sigma_data: standard deviation of the data; inf: see above.
        weighting: what to take instead of w; None takes w. A sample whose weight is not finite does not count.
        share: factor of the loss, where this is one part of several.
        stretch: c_skip x + stretch (y - c_skip x) is the target instead of y, see `ipfm.engine.objectives.real_data`.

    Raises:
        ValueError: a shape, dtype or number that does not fit.
    """
    noisy = isolate(noisy)
    given = net(noisy.scaled, noisy.sigma)
    raw, u = given if isinstance(given, tuple) else (given, None)
    out = held(raw)
    result = denoising_loss(
        out.detach(),
        y,
        noisy.sigma,
        sigma_data=sigma_data,
        x=noisy.x,
        c_skip=noisy.c_skip,
        c_out=noisy.c_out,
        share=share,
        stretch=stretch,
    )
    grad, loss, valid = result.grad, result.loss, result.valid
    if weighting is not None:
        usual = (1 / sigma_data**2 + 1 / noisy.sigma.to(loss.dtype).square()).masked_fill(~valid, 0.0)
        own = reweighted(weighting, noisy, None, usual)
        if own is not None:
            grad = (grad * per_sample(own.factor, grad)).to(grad.dtype)
            loss = loss * own.factor
            valid = valid & torch.isfinite(loss) & finite_samples(grad)
            grad, loss = grad.masked_fill(per_sample(~valid, grad), 0.0), loss.masked_fill(~valid, 0.0)
    if u is None:
        return DenoisingResult(along(out, grad), loss, valid)
    return _with_logvar(out, u, grad, loss, valid, share)


def _with_logvar(
    out: Tensor, u: Tensor, grad: Tensor, loss: Tensor, valid: Tensor, share: float = 1.0
) -> DenoisingResult:
    """The objective with a log-variance: what is without one, with gradient and loss a sample, by e^-u, plus n u.

    Args:
        out: (B, ...) the network's output.
        u: its log-variances, of B elements.
        grad: (B, ...) with respect to `out`.
        loss: (B,).
        valid: (B,) bool.
        share: factor of n u.
    """
    elements, known = share * out[0].numel(), u.detach().reshape(-1).to(loss.dtype)
    weighted = loss * (-known).exp()
    grad = (grad * per_sample((-known).exp(), grad)).to(grad.dtype)
    valid = valid & torch.isfinite(weighted) & finite_samples(grad)
    grad = grad.masked_fill(per_sample(~valid, grad), 0.0)
    slope = (elements - weighted).masked_fill(~valid, 0.0).to(u.dtype).view_as(u)
    total = (weighted + elements * known).masked_fill(~valid, 0.0)
    return DenoisingResult(along(out, grad) + along(u, slope), total, valid)


def generator_gradient(
    teacher: Raw,
    student: Raw,
    y: Tensor,
    noisy: Noisy,
    *,
    alpha: float,
    phased: bool,
    rescale: bool = False,
    weighting: Weighting | PredictionWeighting | None = None,
    real_weights: tuple[float, float] = (1.0, 1.0),
    beside: Beside | None = None,
) -> GeneratorGradient:
    """dL/dy = partial_y L + J_S^T partial_S L + J_T^T partial_T L for the L of IPFM eq. 28.

    x = y + noise, so the Jacobians with respect to x are those with respect to y. The parameters of both networks
    should be frozen; they get no gradient in any case. Joint: both networks' activations live together. Phased: the
    teacher is run once more, so that one network's activations live at a time. The result is the same.

    A sample counts when y, x, both predictions, its loss and its gradient are finite.

    Args:
        teacher: a network without randomness (in eval mode).
        student: another one, of the same preconditioning.
        y: (B, C, H, W) generated samples, without a graph.
        noisy: their perturbation, without a graph.
        alpha: in SiD's convention; 0.5 is the pure objective.
        phased: see above.
        rescale: multiply each sample's gradient by a power of two on its way through the networks and divide by it
            afterwards, so that fp16 holds it.
        weighting: what to take instead of the weight lambda; None takes lambda. A sample whose weight is not finite
            does not count.
        real_weights: (a, b) where the student has learned from real images too, see
            `ipfm.engine.objectives.real_data`.
        beside: another term of the loss, which passes back through the student by an output of its own, see
            `ipfm.engine.objectives.discriminator`; the loss that is returned is without it.

    Raises:
        ValueError: a shape, dtype or number that does not fit.
    """
    noisy = isolate(noisy)
    sigma = noisy.sigma
    known = weighting.in_one_pass(noisy) if isinstance(weighting, KernelWeighting) else None
    chosen = known or OnePass()
    mark("generator: student")
    with torch.enable_grad():
        scaled = noisy.scaled.detach().requires_grad_()
        if phased:
            with torch.no_grad():
                t = held(teacher(scaled, sigma))
        else:
            t = held(teacher(scaled, sigma))
        s = held(student(scaled, sigma))
        result = ipfm_loss(
            t.detach(),
            s.detach(),
            y,
            alpha=alpha,
            x=noisy.x,
            c_skip=noisy.c_skip,
            c_out=noisy.c_out,
            real_weights=real_weights,
            weight=chosen.weight,
            factor=chosen.factor,
            sigma=chosen.sigma,
            D=chosen.D,
        )
        own = reweighted(weighting if known is None else None, noisy, (t, s), result.weight)
        c_in = per_sample(noisy.c_in, y)
        outs: tuple[Tensor, ...] = (s,)
        pulls: tuple[Tensor, ...] = (result.ds,)
        if beside is not None:
            # One pass back through the student, however many of its outputs the loss has.
            outs, pulls = zip((s, result.ds), beside(result.weight), strict=True)
        del s
        if phased or rescale or scaled.dtype.itemsize < 4:
            # The student's graph is freed first; in the phased form the teacher's does not exist before that.
            gradient = result.dy + c_in * vjp(outs, scaled, pulls, rescale)
            del outs
            mark("generator: teacher")
            if phased:
                t = held(teacher(scaled, sigma))
            gradient = gradient + c_in * vjp((t,), scaled, (result.dt,), rescale)
        else:
            # At once, where the sum is not rounded to 16 bits: two passes have more to begin and to end.
            (both,) = torch.autograd.grad((*outs, t), scaled, (*pulls, result.dt))
            gradient = result.dy + c_in * both
            mark("generator: teacher")
    loss, weight, valid = result.loss, result.weight, result.valid
    if own is not None:
        # Samples do not mix on the way through the networks: at its end one product does for all three parts.
        gradient, loss, weight = gradient * per_sample(own.factor, gradient), loss * own.factor, own.weight
        valid = valid & torch.isfinite(loss)
    # A network that overflows on a sample, forward or backward, sends NaN to that sample's own pixels: cut off there.
    valid = valid & finite_samples(gradient)
    gradient = gradient.masked_fill(per_sample(~valid, y), 0.0)
    return GeneratorGradient(gradient, loss.masked_fill(~valid, 0.0), weight.masked_fill(~valid, 0.0), valid)


class Reweighted(NamedTuple):
    """What a weighting of one's own makes of the samples of a micro-batch."""

    weight: Tensor
    """(B,), 0 where the sample does not count."""
    factor: Tensor
    """(B,) by the method's weight."""


@torch.no_grad()
def reweighted(
    weighting: Weighting | PredictionWeighting | None,
    noisy: Noisy,
    predictions: tuple[Tensor, Tensor] | None,
    usual: Tensor,
) -> Reweighted | None:
    """The weights by `weighting` instead of `usual`, (B,); None where it leaves them as they are.

    Args:
        weighting: None leaves them.
        noisy: the samples.
        predictions: raw outputs of teacher and student at them, where the generator is trained.
        usual: the method's weight, 0 where a sample does not count.

    Raises:
        ValueError: it returns something else than a number a sample.
    """
    if weighting is None:
        return None
    if predictions is not None and isinstance(weighting, PredictionWeighting):
        weighting = weighting.among(noisy, *(p.detach() for p in predictions))
    assert callable(weighting)
    own = weighting(noisy.sigma, usual)
    if own is usual:
        return None
    if not isinstance(own, Tensor) or own.shape != usual.shape:
        got = f"a tensor of shape {tuple(own.shape)}" if isinstance(own, Tensor) else type(own).__name__
        raise ValueError(f"a weighting must return a number a sample, of shape {tuple(usual.shape)}, got {got}")
    counted = usual > 0
    weight = own.to(usual.dtype).masked_fill(~counted, 0.0)
    return Reweighted(weight, weight / usual.masked_fill(~counted, 1.0))


def isolate(noisy: Noisy) -> Noisy:
    """Keep samples whose input is not finite out of the networks.

    The input becomes 0, and c_skip NaN, which the losses count out. The other samples are as they were.
    """
    bad = ~finite_samples(noisy.scaled)
    return noisy._replace(
        scaled=noisy.scaled.masked_fill(per_sample(bad, noisy.scaled), 0.0),
        c_skip=noisy.c_skip.masked_fill(bad, float("nan")),
    )


def along(out: Tensor, gradient: Tensor) -> Tensor:
    """0-d, of the value 0, whose gradient with respect to `out` is `gradient`, of its shape and dtype."""
    result: Tensor = _Along.apply(out, gradient)
    return result


class _Along(torch.autograd.Function):
    """(out * gradient).sum() without the passes over the data that make its value."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return out.new_zeros((), dtype=torch.promote_types(out.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, *factor: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * factor[0], None


def held(out: Tensor) -> Tensor:
    """A raw output in a dtype that holds its gradient before the loss scale has multiplied it: fp16 does not."""
    return out.float() if out.dtype == torch.float16 else out


def vjp(outs: Sequence[Tensor], x: Tensor, cotangents: Sequence[Tensor], rescale: bool) -> Tensor:
    """The sum of J^T cotangent over the outputs of x, all (B, ...).

    With `rescale` by way of a largest element in [16, 32) per sample, of all cotangents together.
    """
    if not rescale:
        return torch.autograd.grad(outs, x, cotangents)[0]
    # Samples do not mix, so that each may have a factor of its own; a power of two rounds nothing.
    largest = [one.flatten(1).abs().amax(1) for one in cotangents]
    _, exponent = torch.frexp(torch.stack(largest).amax(0) if len(largest) > 1 else largest[0])
    shift = (5 - exponent).clamp(-100, 100)
    scaled = [torch.ldexp(one, per_sample(shift, one)) for one in cotangents]
    return torch.ldexp(torch.autograd.grad(outs, x, scaled)[0].float(), -per_sample(shift, x))


def finite_samples(tensor: Tensor) -> Tensor:
    """(B,) bool: every element of the sample is finite."""
    return torch.isfinite(tensor).flatten(1).all(1)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """(B,) values as a column that meets each sample of `like`, (B, ...)."""
    return values.view(-1, *[1] * (like.ndim - 1))
