"""Layers of EDM2's U-Net, which preserve magnitudes: given activations of size 1 they return such (Karras et al. 2024).

Size is the root mean square. A linear layer has no bias, and each row of its weight a size of 1/√K, so that a sum over
K inputs has the size of one; sums, concatenations and SiLU are divided by what they would multiply the size by.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ipfm.kernels.mp_silu import SILU_SIZE
from ipfm.models.forced_weight_norm import PlainWeight
from ipfm.models.frozen_ops import (
    frozen_conv2d,
    frozen_conv_transpose2d,
    frozen_linear,
    is_frozen,
    mean_2x2,
    repeat_2x2,
)
from ipfm.models.layers import Float32Buffers, cast
from ipfm.models.weight_order import weight_of


def mp_silu(x: Tensor) -> Tensor:
    """silu(x) / 0.596."""
    return F.silu(x) / SILU_SIZE


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """((1 - t) a + t b) / √((1 - t)² + t²); a batch of 1 goes with any."""
    return torch.lerp(a, b, t) / math.hypot(1 - t, t)


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
        freqs, phases = torch.empty(channels), torch.empty(channels)
        if not freqs.is_meta:  # which has no values, and where arithmetic takes long
            freqs, phases = 2 * math.pi * torch.randn(channels), 2 * math.pi * torch.rand(channels)
        self.register_buffer("freqs", freqs)
        self.register_buffer("phases", phases)

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
        weight = weight_of(self)
        if not self.kernel:
            out = F.linear(x, cast(weight, x))
        elif is_frozen(x, weight):
            out = frozen_conv2d(x, weight, padding=self.kernel // 2)
        else:
            out = F.conv2d(x, cast(weight, x), padding=self.kernel // 2)
        return out if gain is None else out * cast(gain, out)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel={self.kernel}"


class MPQKVProjection(MPConv):
    """The 1×1 convolution of an attention layer: x (B, C, H, W) -> (B, H·W, 3·C), channels as (q|k|v, head, channel).

    Checkpoints hold the output channels as (head, channel of the head, q|k|v), the last running fastest; as in
    `QKVProjection` the rows of the weight are put in order, not the activation.

    Args:
        channels: C.
        num_heads: attention heads, a divisor of C.
    """

    def __init__(self, channels: int, *, num_heads: int) -> None:
        super().__init__(channels, 3 * channels, 1)
        self.num_heads = num_heads

    def forward(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        """The tokens' queries, keys and values, in the dtype of x.

        Args:
            x: (B, C, H, W).
            gain: a learned factor.
        """
        tokens, weight = x.flatten(2).transpose(1, 2), weight_of(self)
        if is_frozen(x, weight):
            out = frozen_linear(tokens, weight, arrange=self._arranged)
        else:
            out = F.linear(tokens, self._arranged(cast(weight, x)))
        return out if gain is None else out * cast(gain, out)

    def _arranged(self, rows: Tensor) -> Tensor:
        """(3·C, C, 1, 1) in the order of checkpoints -> (3·C, C) in the order of use."""
        return rows.view(self.num_heads, -1, 3, self.in_channels).permute(2, 0, 1, 3).reshape(self.out_channels, -1)


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
