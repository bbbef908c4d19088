"""The same distillation in plain PyTorch, as one would write it down from the papers: what the engine is timed against.

Autograd through everything, torch's Adam, torch's generators, its own layers one after the other. Nothing of the
engine or of the kernels is used but the networks' structure.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ipfm.engine.config import Resolved
from ipfm.engine.distributed.precision import apply_precision
from ipfm.engine.objectives.initial_networks import trainable_copy
from ipfm.engine.objectives.ipfm import DistillConfig
from ipfm.models import Precond
from ipfm.models.blocks import UNetBlock
from ipfm.models.layers import Affine, Conv2d, GroupNorm, Linear


class PlainGroupNorm(GroupNorm):
    """PyTorch's normalisation, then scale and shift, then SiLU."""

    def forward(
        self,
        x: Tensor,
        *,
        silu: bool = False,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        addend: Tensor | None = None,
        branching: bool = False,  # never: a plain layer is not asked for it
        affine: Affine | None = None,  # nor for this
    ) -> Tensor:
        if addend is not None:
            x = x + addend.to(x.dtype)[..., None, None]
        x = F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        if scale is not None and shift is not None:
            x = torch.addcmul(shift.to(x.dtype), x, scale.to(x.dtype) + 1)
        return F.silu(x) if silu else x


class PlainLinear(Linear):
    """Each block's own product with the embedding."""


class PlainConv2d(Conv2d):
    """PyTorch's convolutions, the resampling filter as a depthwise one."""

    def _convolve(self, x: Tensor, bias: Tensor | None, padding: int) -> Tensor:
        assert self.weight is not None
        return F.conv2d(x, self.weight.to(x.dtype), None if bias is None else bias.to(x.dtype), padding=padding)

    def _convolve_doubled(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._convolve(self._double(x), bias, self.w_pad)

    def _halve(self, x: Tensor, padding: int | None = None) -> Tensor:
        padding = self.f_pad if padding is None else padding
        return F.conv2d(x, self._depthwise(x), stride=2, padding=padding, groups=x.shape[1])

    def _double(self, x: Tensor, padding: int | None = None) -> Tensor:
        padding = self.f_pad if padding is None else padding
        return F.conv_transpose2d(x, self._depthwise(x, 4), stride=2, padding=padding, groups=x.shape[1])


class PlainBlock(UNetBlock):
    """The sum of a residual, then its factor."""

    def _joined(self, x: Tensor, h: Tensor, *biases: Tensor | None) -> Tensor:
        # (The plain convolutions have added their biases.)
        total = x + h
        return total if self.skip_scale == 1 else total.mul_(self.skip_scale)


_PLAIN = {GroupNorm: PlainGroupNorm, Conv2d: PlainConv2d, Linear: PlainLinear, UNetBlock: PlainBlock}


def plain_layers(net: Precond) -> Precond:
    """`net` with every layer made of PyTorch's operations alone; its weights stay."""
    for module in net.modules():
        if type(module) in _PLAIN:
            module.__class__ = _PLAIN[type(module)]
    net.attention_backend = "sdpa"
    return net


class PlainDistillation:
    """One-step distillation on one device, the whole batch at once [IPFM, algorithm 1, with SiD's regularisation].

    Args:
        settings: batch, alpha, noise levels, learning rates, Adam's and the EMA's settings; K is 1. The precision is
            the arithmetic of the convolutions; weights are fp32.
        teacher: the denoiser; copied.
        device: where it runs.
        channels_last: weights and activations lie with the channels of a pixel side by side.
        fused_adam: torch's Adam as one kernel, where the device has it.
    """

    def __init__(
        self,
        settings: Resolved[DistillConfig],
        teacher: Precond,
        *,
        device: torch.device,
        channels_last: bool = False,
        fused_adam: bool = False,
    ) -> None:
        config = self.config = settings.config
        self.D, self.device = settings.D, device

        def prepared(net: Precond) -> Precond:
            net = plain_layers(apply_precision(net.to(device), settings.precision))
            net.channels_last = channels_last
            # Its own layers take the weights as they lie: this is `model.to(memory_format=torch.channels_last)`.
            return net.to(memory_format=torch.channels_last) if channels_last else net  # type: ignore[call-overload]

        self.teacher = prepared(copy.deepcopy(teacher)).eval().requires_grad_(False)
        self.student, self.generator = (prepared(trainable_copy(teacher, config.dropout)) for _ in range(2))
        self.average = [p.detach().clone() for p in self.generator.parameters()]
        self.student_adam, self.generator_adam = (
            torch.optim.Adam(net.parameters(), lr=lr, betas=(beta1, 0.999), eps=config.eps, fused=fused_adam or None)
            for net, lr, beta1 in (
                (self.student, config.student_lr or config.lr, config.student_beta1),
                (self.generator, config.lr, config.generator_beta1),
            )
        )
        self.zeros = torch.zeros(config.batch, *teacher.config.image_shape, device=device)
        self.level = torch.full((config.batch,), config.levels[0], device=device)

    def iteration(self, step: int) -> None:
        """A student step, then a generator step and the EMA."""
        config, noise = self.config, self.config.noise
        self.student.train()
        self.generator.eval()
        with torch.no_grad():
            y = self.generator(self._noisy(self.zeros, self.level), self.level)
        sigma = self._denoising_sigma()
        weight = (sigma**2 + noise.sigma_data**2) / (sigma * noise.sigma_data) ** 2
        errors = (self.student(self._noisy(y, sigma), sigma) - y).square().sum((1, 2, 3))
        self._descend(self.student_adam, (weight * errors).mean())

        self.student.eval().requires_grad_(False)
        self.generator.train()
        y = self.generator(self._noisy(self.zeros, self.level), self.level)
        sigma = self._generator_sigma()
        x = self._noisy(y, sigma)
        t, s = self.teacher(x, sigma), self.student(x, sigma)
        weight = 1 / (t - y).detach().abs().mean((1, 2, 3)).clamp(min=1e-5)
        terms = (t - y) ** 2 - (s - y) ** 2 - 2 * (config.alpha - 0.5) * (t - s) ** 2
        self._descend(self.generator_adam, (weight * terms.sum((1, 2, 3))).mean())
        self.student.requires_grad_(True)
        weights = [p.detach() for p in self.generator.parameters()]
        seen = step * config.batch
        decay = config.averages[0].decay(step, config.batch, rampup=config.ema_rampup, seen=seen)
        torch._foreach_lerp_(self.average, weights, 1 - decay)

    def _denoising_sigma(self) -> Tensor:
        noise = self.config.noise
        return (torch.randn(self.config.batch, device=self.device) * noise.p_std + noise.p_mean).exp()

    def _generator_sigma(self) -> Tensor:
        noise = self.config.noise
        return noise.at(torch.rand(self.config.batch, device=self.device) * (noise.t_max / 1000))

    def _noisy(self, y: Tensor, sigma: Tensor) -> Tensor:
        """x = y + sigma g / sqrt(K / D), K = 2 Gamma(D / 2) [PFGM++, Xu et al. 2023, eq. 4]."""
        if not math.isinf(self.D):
            sigma = sigma / (torch._standard_gamma(torch.full_like(sigma, self.D / 2)) * (2 / self.D)).sqrt()
        return y + sigma.view(-1, 1, 1, 1) * torch.randn_like(y)

    @staticmethod
    def _descend(adam: torch.optim.Adam, loss: Tensor) -> None:
        adam.zero_grad()
        loss.backward()
        adam.step()
