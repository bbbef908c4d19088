"""Layers of EDM2's U-Net, which preserve magnitudes: given activations of size 1 they return such (Karras et al. 2024).

Size is the root mean square. A linear layer has no bias, and each row of its weight a size of 1/√K, so that a sum over
K inputs has the size of one; sums, concatenations and SiLU are divided by what they would multiply the size by.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ipfm.models.forced_weight_norm import EPS, PlainWeight
from ipfm.models.frozen_ops import frozen_conv2d, frozen_conv_transpose2d, is_frozen, mean_2x2, repeat_2x2
from ipfm.models.layers import Float32Buffers, cast

SILU_SIZE = 0.596
"""Root mean square of silu(z) for a standard normal z."""


def normalised(x: Tensor, dim: int) -> Tensor:
    """x / (1e-4 + its root mean square over `dim`): of size 1 there; the norm is summed in at least float32.

    Args:
        x: of any floating dtype.
        dim: the axis.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=wide)
    return x / (EPS + norm * (1 / math.sqrt(x.shape[dim]))).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """silu(x) / 0.596."""
    return F.silu(x) / SILU_SIZE


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """((1 - t) a + t b) / √((1 - t)² + t²); a batch of 1 goes with any."""
    return torch.lerp(a, b, t) / math.hypot(1 - t, t)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """a and b (B, C, ...) joined over channels, so that they contribute as 1 - t to t, whatever their widths.

    a is multiplied by c (1 - t) / √Ca and b by c t / √Cb, with c = √((Ca + Cb) / ((1 - t)² + t²)).
    """
    wide, narrow = a.shape[1], b.shape[1]
    c = math.sqrt(wide + narrow) / math.hypot(1 - t, t)
    return torch.cat([a * (c * (1 - t) / math.sqrt(wide)), b * (c * t / math.sqrt(narrow))], dim=1)


class MPFourier(Float32Buffers):
    """√2 cos(t·freqs + phases), (N,) -> (N, channels), in the dtype of t; the random buffers are fixed.

    `freqs` and `phases` (channels,) contain the factor 2π and are part of a checkpoint. They stay float32 under every
    cast of the module.

    Args:
        channels: width of the result.
    """

    freqs: Tensor
    phases: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, t: Tensor) -> Tensor:
        angle = torch.outer(t, self.freqs.to(t.dtype)) + self.phases.to(t.dtype)
        return angle.cos() * math.sqrt(2)


class MPConv(PlainWeight):
    """A linear layer, x Wᵀ, or a convolution of stride 1 with zero padding; without bias.

    Args:
        in_channels: width of x.
        out_channels: width of the result.
        kernel: side of the kernel, odd; 0: a linear layer over the last axis.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__((out_channels, in_channels, kernel, kernel) if kernel else (out_channels, in_channels))
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel = kernel

    def forward(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        """W x, times `gain` (0-d) where one is given; in the dtype of x.

        Args:
            x: (N, in_channels), or (B, in_channels, H, W).
            gain: a learned factor.
        """
        if not self.kernel:
            out = F.linear(x, cast(self.weight, x))
        elif is_frozen(x, self.weight):
            out = frozen_conv2d(x, self.weight, padding=self.kernel // 2)
        else:
            out = F.conv2d(x, cast(self.weight, x), padding=self.kernel // 2)
        return out if gain is None else out * cast(gain, out)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel={self.kernel}"


def resample(x: Tensor, taps: Sequence[float], *, up: bool) -> Tensor:
    """x (B, C, H, W) at half or twice the resolution, by a filter f of even length as in `Conv2d`.

    Args:
        x: the images.
        taps: f; [1, 1] is the mean of each 2×2 square going down, and going up each pixel four times.
        up: twice the resolution, else half of it.
    """
    if len(taps) == 2 and taps[0] == taps[1]:
        return repeat_2x2(x) if up else mean_2x2(x)
    f = torch.tensor(taps, dtype=x.dtype, device=x.device) / sum(taps)
    channels, padding = x.shape[1], (len(taps) - 1) // 2
    kernel = torch.outer(f, f).expand(channels, 1, -1, -1)
    if up:
        return frozen_conv_transpose2d(x, 4 * kernel, stride=2, padding=padding, groups=channels)
    return frozen_conv2d(x, kernel, stride=2, padding=padding, groups=channels)
