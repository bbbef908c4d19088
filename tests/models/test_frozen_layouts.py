"""Frozen, depthwise and doubled convolutions in both memory formats, against PyTorch's own in float64.

On a GPU at the sizes of CIFAR-10's networks, where cuDNN chooses other kernels than for small ones.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ipfm.kernels.bench.measurement import error_units
from ipfm.models.frozen_ops import doubled_conv2d, frozen_conv2d, frozen_conv_transpose2d, mean_2x2, repeat_2x2


def _depthwise(x: Tensor, taps: Tensor) -> Tensor:
    return taps.to(x.dtype).expand(x.shape[1], 1, -1, -1)


TAPS = torch.outer(torch.tensor([1.0, 3, 3, 1]), torch.tensor([1.0, 3, 3, 1])) / 64

# name -> (ours, PyTorch's), functions of x, a weight (C, C, 3, 3) and the filter.
CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "frozen": (
        lambda x, w, f: frozen_conv2d(x, w, None, padding=1),
        lambda x, w, f: F.conv2d(x, w.to(x.dtype), padding=1),
    ),
    "frozen, halved by a depthwise filter": (
        lambda x, w, f: frozen_conv2d(x, _depthwise(x, f), stride=2, padding=1, groups=x.shape[1]),
        lambda x, w, f: F.conv2d(x, _depthwise(x, f), stride=2, padding=1, groups=x.shape[1]),
    ),
    "frozen, doubled by a depthwise filter": (
        lambda x, w, f: frozen_conv_transpose2d(x, _depthwise(x, 4 * f), stride=2, padding=1, groups=x.shape[1]),
        lambda x, w, f: F.conv_transpose2d(x, _depthwise(x, 4 * f), stride=2, padding=1, groups=x.shape[1]),
    ),
    "of a doubled image": (
        lambda x, w, f: doubled_conv2d(x, w),
        lambda x, w, f: F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), w.to(x.dtype), padding=1),
    ),
    "mean of squares": (lambda x, w, f: mean_2x2(x), lambda x, w, f: F.avg_pool2d(x, 2)),
    "repeated pixels": (
        lambda x, w, f: repeat_2x2(x),
        lambda x, w, f: F.interpolate(x, scale_factor=2, mode="nearest"),
    ),
}


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("name", CASES)
def test_equals_pytorchs(name: str, last: bool, trained: bool, device: torch.device) -> None:
    ours, plain = CASES[name]
    cuda = device.type == "cuda"
    images, channels, side = (16, 256, 32) if cuda else (2, 16, 8)
    generator = torch.Generator(device).manual_seed(0)
    form = torch.channels_last if last else torch.contiguous_format
    for dtype in (torch.float32, torch.bfloat16) if cuda else (torch.float32,):
        tf32 = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        try:
            x = torch.randn(images, channels, side, side, generator=generator, device=device).to(dtype)
            weight = torch.randn(channels, channels, 3, 3, generator=generator, device=device) / (3 * channels**0.5)
            taps = TAPS.to(device)
            results = []
            for function, kind in ((ours, dtype), (plain, dtype), (plain, torch.float64)):
                leaf = x.detach().to(kind).contiguous(memory_format=form).requires_grad_()
                own = weight.detach().to(kind).requires_grad_(trained and name == "of a doubled image")
                y = function(leaf, own, taps.to(kind))
                dy = torch.ones_like(y).cumsum(3) / y.shape[3]
                results.append([y, *torch.autograd.grad(y, [leaf, own] if own.requires_grad else [leaf], dy)])
        finally:
            torch.backends.cudnn.allow_tf32 = tf32
        assert [t.shape for t in results[0]] == [t.shape for t in results[1]]
        got, theirs = (error_units(result, results[2])[dtype] for result in results[:2])
        # As near to the truth as PyTorch's own, of which another order of the sums may have been luckier.
        assert got <= 4 * theirs + 4, (dtype, got, theirs)
