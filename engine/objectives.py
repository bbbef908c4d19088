"""The two objectives of inverse Poisson flow matching, and the gradient that the generator needs.

Functions of plain networks and tensors: no optimiser, no process group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ipfm.engine.memory.phases import mark
from ipfm.kernels import denoising_loss, ipfm_loss

# A denoiser with its labels bound: (x (B, C, H, W), sigma (B,)) -> (B, C, H, W).
Denoise = Callable[[Tensor, Tensor], Tensor]


def bind(net: Callable[..., Tensor], labels: Tensor | None, augment_labels: Tensor | None = None) -> Denoise:
    """The network as a function of (x, sigma), with these class and augmentation labels."""
    return lambda x, sigma: net(x, sigma, labels, augment_labels)


class Objective(NamedTuple):
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


def denoising_objective(net: Denoise, y: Tensor, x: Tensor, sigma: Tensor, *, sigma_data: float) -> Objective:
    """w(sigma) ||net(x, sigma) - y||^2, summed over elements [Karras et al. 2022, table 1]: teacher and student.

    Samples with a non-finite y or x are kept out of the network: a NaN activation would reach the weights even
    under a zero gradient.

    Args:
        net: the denoiser that is trained.
        y: (B, C, H, W) clean samples, in the dtype of the network's result, without a graph.
        x: (B, C, H, W) their perturbation at sigma, without a graph.
        sigma: (B,) noise levels, float32 or float64.
        sigma_data: standard deviation of the data.

    Raises:
        ValueError: a shape, dtype or number that does not fit.
    """
    y, x = isolate(y, x)
    pred = net(x, sigma)
    result = denoising_loss(pred.detach(), y, sigma, sigma_data=sigma_data)
    surrogate = (pred * result.grad).sum()
    return Objective(surrogate, result.loss, result.valid)


def generator_gradient(
    teacher: Denoise,
    student: Denoise,
    y: Tensor,
    x: Tensor,
    sigma: Tensor,
    *,
    alpha: float,
    phased: bool,
    rescale: bool = False,
) -> GeneratorGradient:
    """dL/dy = partial_y L + J_S^T partial_S L + J_T^T partial_T L for L of IPFM eq. 21 with SiD's regularisation.

    x = y + noise, so the Jacobians with respect to x are those with respect to y. The parameters of both networks
    should be frozen; they get no gradient in any case. Joint: both networks' activations live together. Phased: the
    teacher is run once more, so that one network's activations live at a time. The result is the same.

    A sample counts when y, x, both predictions, its loss and its gradient are finite.

    Args:
        teacher, student: denoisers without randomness (in eval mode).
        y: (B, C, H, W) generated samples, in the dtype of the networks' results, without a graph.
        x: (B, C, H, W) their perturbation at sigma, without a graph.
        sigma: (B,) noise levels, float32 or float64.
        alpha: in SiD's convention; 0.5 is the pure objective.
        phased: see above.
        rescale: multiply each sample's gradient by a power of two on its way through the networks and divide by it
            afterwards, so that fp16 holds it.

    Raises:
        ValueError: a shape, dtype or number that does not fit.
    """
    y, x = isolate(y, x)
    mark("generator: student")
    with torch.enable_grad():
        x_leaf = x.detach().requires_grad_()
        if phased:
            with torch.no_grad():
                t = teacher(x, sigma)
        else:
            t = teacher(x_leaf, sigma)
        s = student(x_leaf, sigma)
        result = ipfm_loss(t.detach(), s.detach(), y, alpha=alpha)
        # The student's graph is freed first; in the phased form the teacher's does not exist before that.
        gradient = result.dy + _vjp(s, x_leaf, result.ds, rescale)
        del s
        mark("generator: teacher")
        if phased:
            t = teacher(x_leaf, sigma)
        gradient = gradient + _vjp(t, x_leaf, result.dt, rescale)
    # A network that overflows on a sample, forward or backward, sends NaN to that sample's own pixels: cut off there.
    valid = result.valid & _finite_samples(gradient)
    gradient = gradient.masked_fill(_per_sample(~valid, y), 0.0)
    return GeneratorGradient(
        gradient, result.loss.masked_fill(~valid, 0.0), result.weight.masked_fill(~valid, 0.0), valid
    )


def isolate(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Keep samples with a non-finite x or y out of the networks: x becomes 0 and y NaN, which the losses count out.

    y, x: (B, ...), one shape. Returns copies; the other samples are as they were.
    """
    bad = _per_sample(~(_finite_samples(x) & _finite_samples(y)), x)
    return y.masked_fill(bad, float("nan")), x.masked_fill(bad, 0.0)


def _vjp(out: Tensor, x: Tensor, cotangent: Tensor, rescale: bool) -> Tensor:
    """J^T cotangent for out(x), all (B, ...); with `rescale` by way of a largest element in [16, 32) per sample."""
    cotangent = cotangent.to(out.dtype)
    if not rescale:
        return torch.autograd.grad(out, x, cotangent)[0]
    # Samples do not mix, so that each may have a factor of its own; a power of two rounds nothing.
    _, exponent = torch.frexp(cotangent.flatten(1).abs().amax(1))
    shift = _per_sample((5 - exponent).clamp(-100, 100), cotangent)
    return torch.ldexp(torch.autograd.grad(out, x, torch.ldexp(cotangent, shift))[0], -shift)


def _finite_samples(tensor: Tensor) -> Tensor:
    """(B,) bool: every element of the sample is finite."""
    return torch.isfinite(tensor).flatten(1).all(1)


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))
