"""The two objectives of inverse Poisson flow matching, and the gradient that the generator needs.

Functions of plain networks and tensors: no optimiser, no process group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ipfm.kernels import denoising_loss, ipfm_loss

# A denoiser with its labels bound: (x (B, C, H, W), sigma (B,)) -> (B, C, H, W).
Denoise = Callable[[Tensor, Tensor], Tensor]


class Objective(NamedTuple):
    """Outcome of one objective on a micro-batch."""

    surrogate: Tensor
    """Scalar whose gradient with respect to the trained network's parameters is the summed loss's."""
    loss: Tensor
    """(B,) loss per sample, 0 where the sample does not count."""
    valid: Tensor
    """(B,) bool: the sample counts."""


class GeneratorGradient(NamedTuple):
    """dL/dy of the generator objective on a micro-batch."""

    gradient: Tensor
    """(B, C, H, W): 0 where the sample does not count."""
    loss: Tensor
    """(B,) loss per sample, weight included."""
    weight: Tensor
    """(B,) the weight lambda."""
    valid: Tensor
    """(B,) bool: the sample counts."""


def denoising_objective(net: Denoise, y: Tensor, x: Tensor, sigma: Tensor, *, sigma_data: float) -> Objective:
    """w(sigma) ||net(x, sigma) - y||^2, summed over elements [Karras et al. 2022, table 1]: teacher and student.

    Samples with a non-finite y or x are kept out of the network: a NaN activation would reach the weights even
    under a zero gradient.
    """
    y, x = isolate(y, x)
    pred = net(x, sigma)
    result = denoising_loss(pred.detach(), y, sigma, sigma_data=sigma_data)
    surrogate = (pred * result.grad).sum()
    return Objective(surrogate, result.loss, result.valid)


def generator_gradient(
    teacher: Denoise, student: Denoise, y: Tensor, x: Tensor, sigma: Tensor, *, alpha: float, phased: bool
) -> GeneratorGradient:
    """dL/dy = partial_y L + J_S^T partial_S L + J_T^T partial_T L for L of IPFM eq. 21 with SiD's regularisation.

    x = y + noise, so the Jacobians with respect to x are those with respect to y. The parameters of both networks
    should be frozen. Joint: both networks' activations live together. Phased: the teacher is run once more, so that
    one network's activations live at a time. The result is the same.

    Args:
        teacher, student: denoisers.
        y: (B, C, H, W) generated samples, detached.
        x: their perturbation at sigma, detached.
        sigma: (B,).
        alpha: in SiD's convention.
        phased: see above.
    """
    y, x = isolate(y, x)
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
        gradient = result.dy + torch.autograd.grad(s, x_leaf, result.ds.to(s.dtype))[0]
        del s
        if phased:
            t = teacher(x_leaf, sigma)
        gradient = gradient + torch.autograd.grad(t, x_leaf, result.dt.to(t.dtype))[0]
    # A network that overflowed on a sample sends NaN back to that sample's own pixels: cut it off there.
    gradient = gradient.masked_fill(~result.valid.view(-1, *[1] * (y.ndim - 1)), 0.0)
    return GeneratorGradient(gradient, result.loss, result.weight, result.valid)


def isolate(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Keep samples with a non-finite x or y out of the networks: x becomes 0 and y NaN, which the losses count out."""
    finite = (torch.isfinite(x) & torch.isfinite(y)).flatten(1).all(1)
    mask = finite.view(-1, *[1] * (x.ndim - 1))
    return y.masked_fill(~mask, float("nan")), x.masked_fill(~mask, 0.0)
