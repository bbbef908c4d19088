"""Geometric augmentation of training images, with the nine labels that tell a network what was done.

The pipeline is that of [EDM, appendix F.2 and table 6]: random flips, scalings, a rotation and a translation, which
together are one affine map, and a label vector of nine numbers that is zero for an image left as it was. The network
is conditioned on the labels, so that with zero labels it makes unaugmented images.

    label   transformation of the picture, in this order                       applied with probability
    0       x-flip, a fair coin                                                1
    1       y-flip, a fair coin                                                p
    2       w: enlarged by 2^(0.2 w), w ~ N(0, 1)                              p
    3, 4    cos w - 1, sin w: turned by -w (x to the right, y down), which     p
            is anticlockwise to the eye; w uniform on [-π, π]
    5, 6    w cos r, w sin r: enlarged by 2^(0.2 w) along (cos r, -sin r) (x   p
            to the right, y down: r is anticlockwise to the eye) and by the
            inverse across it, w ~ N(0, 1); r is uniform on [-π, π] or 0,
            with probability ½ each
    7, 8    w_x, w_y: moved by size/8 · w to the right and down, N(0, 1) each  p

An image is resampled as there: extended by reflection, upsampled by two with the low-pass of the wavelet sym6
[Daubechies 1992, section 8.3], read off with bilinear interpolation, downsampled with the same filter. Three choices
make the result a function of the sample alone and exact where it can be:

- The reflection always reaches size - 1 pixels out, the most that there is; zeros (grey) lie beyond. A margin that
  follows from the transforms of the whole batch gives other pixels to the same image in another batch.
- The flips, which come first, reorder the pixels. Through the filter, which is not quite symmetric, a flip would move
  the picture by 0.4 pixels and blur it.
- For the same reason the upsampled pixels lie where the filter puts them (its first moment, 5.098 taps in), not in the
  middle of its support (5.5), and a rotation turns about the middle of the image.

An image whose map is the identity comes back within 2.5e-5 up to 64x64 pixels, by the rounding of the coordinates.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ipfm.kernels import philox

AUGMENT_DIM = 9
"""Number of labels."""

SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
"""Low-pass of the orthonormal wavelet sym6: Σ h = √2, Σ h[k] h[k + 2m] = δ, six vanishing moments of (-1)^k h[k]."""

_CENTRE = sum(k * h for k, h in enumerate(SYM6)) / math.sqrt(2)
_SCALE_STEP = 0.2  # binary orders of magnitude, of both kinds of scaling
_SHIFT_STEP = 0.125  # of the size
SMALLEST_SIZE = 8
"""Side of the smallest images that can be augmented."""
_UNIFORMS = 14  # random numbers a sample
_WORKSPACE = 1 << 26  # upsampled pixels at a time; bounds the memory, changes no result


class Augmented(NamedTuple):
    """`images` (B, C, N, N) float32 and their `labels` (B, 9) float32."""

    images: Tensor
    labels: Tensor


class _Drawn(NamedTuple):
    """The numbers of the module's table, 0 where an effect is not applied; all (B,) float64."""

    x_flip: Tensor
    y_flip: Tensor
    scale: Tensor
    turn: Tensor
    stretch: Tensor
    axis: Tensor
    shift_x: Tensor
    shift_y: Tensor


class _Transform(NamedTuple):
    """What is done to each sample; all (B,).

    A point q of the result, in pixels from its middle, shows the point inverse · (q - shift · N) of the image, which is
    mirrored before where a flip is 1.
    """

    x_flip: Tensor
    y_flip: Tensor
    xx: Tensor
    xy: Tensor
    yx: Tensor
    yy: Tensor
    shift_x: Tensor
    shift_y: Tensor


@torch.no_grad()
def augment(
    images: Tensor,
    probability: float,
    *,
    seed: int,
    stream: int,
    step: int | Tensor,
    sample_index: Tensor,
    mirrored_stretch: bool = False,
) -> Augmented:
    """Augmented images and the labels that say how, see the module's table [EDM, table 6].

    Every random number is a function of (seed, stream, step, sample index), and an image's result depends on no other
    image: neither the batch nor the micro-batch nor the number of ranks changes it. Nothing is read back from a GPU.

    Args:
        images: (B, C, N, N) float32, N >= 8; usually in [-1, 1], which the filter may leave by a little.
        probability: p of each effect, in [0, 1]; x-flips are a fair coin for every p > 0. 0 returns `images` itself,
            whatever its shape and dtype.
        seed: of the random numbers, as in `ipfm.kernels.philox.uniform`.
        stream: of the random numbers, likewise.
        step: of the random numbers, likewise.
        sample_index: (B,) int64, the samples' global indices, on the device of `images`.
        mirrored_stretch: enlarge along (cos r, sin r) instead, against the labels, as version 0.1 did.

    Returns:
        Images and labels, without gradient. A sample with a non-finite value comes back as NaN throughout.

    Raises:
        ValueError: anything else.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"augment: probability must lie in [0, 1], got {probability}")
    if probability == 0:
        return Augmented(images, torch.zeros(len(images), AUGMENT_DIM, device=images.device))
    if images.ndim != 4 or images.shape[2] != images.shape[3] or images.shape[2] < SMALLEST_SIZE:
        raise ValueError(f"augment: images must have shape (B, C, N, N) with N >= 8, got {tuple(images.shape)}")
    if images.dtype != torch.float32:
        raise ValueError(f"augment: images must be float32, got {images.dtype}")
    if sample_index.shape != images.shape[:1] or sample_index.device != images.device:
        raise ValueError(
            f"augment: sample_index must have shape ({len(images)},) on {images.device}, "
            f"got {tuple(sample_index.shape)} on {sample_index.device}"
        )
    u = philox.uniform(sample_index, _UNIFORMS, seed=seed, stream=stream, step=step)
    drawn = _draw(u, probability)
    return Augmented(_warp(images, _transform(drawn, mirrored_stretch=mirrored_stretch)), _labels(drawn))


def _draw(u: Tensor, probability: float) -> _Drawn:
    """What is done to each sample, from uniform numbers `u` (B, 14) in (0, 1]."""
    # In float64: the last bits of its functions, which differ between devices and ends of a vector, round away.
    u = u.double()
    y_flips, scales, rotates, stretches, shifts = (u[:, :5] <= probability).double().unbind(1)
    x_flip, y_flip, tilted = (u[:, 5:8] <= 0.5).double().unbind(1)
    turn, axis = ((2 * u[:, 8:10] - 1) * math.pi).unbind(1)
    radius = (-2 * u[:, 10:12].log()).sqrt()  # Box-Muller
    angle = 2 * math.pi * u[:, 12:14]
    (scale, shift_x), (stretch, shift_y) = (radius * angle.cos()).unbind(1), (radius * angle.sin()).unbind(1)
    return _Drawn(
        x_flip,
        y_flip * y_flips,
        scale * scales,
        turn * rotates,
        stretch * stretches,
        axis * tilted,
        shift_x * shifts,
        shift_y * shifts,
    )


def _labels(drawn: _Drawn) -> Tensor:
    """(B, 9) float32."""
    turn, stretch, axis = drawn.turn, drawn.stretch, drawn.axis
    columns = (
        *(drawn.x_flip, drawn.y_flip, drawn.scale, turn.cos() - 1, turn.sin()),
        *(stretch * axis.cos(), stretch * axis.sin(), drawn.shift_x, drawn.shift_y),
    )
    return torch.stack(columns, 1).float()


def _transform(drawn: _Drawn, *, mirrored_stretch: bool = False) -> _Transform:
    """The maps, float32: the inverse of (stretch · rotation · scaling), read from right to left."""
    cos_turn, sin_turn, cos_axis, sin_axis = drawn.turn.cos(), drawn.turn.sin(), drawn.axis.cos(), drawn.axis.sin()
    if not mirrored_stretch:
        sin_axis = -sin_axis
    along = torch.exp2(-_SCALE_STEP * (drawn.scale + drawn.stretch))
    across = torch.exp2(-_SCALE_STEP * (drawn.scale - drawn.stretch))
    xx = along * cos_axis.square() + across * sin_axis.square()
    xy = (along - across) * cos_axis * sin_axis
    yy = along * sin_axis.square() + across * cos_axis.square()
    inverse = (
        cos_turn * xx - sin_turn * xy,
        cos_turn * xy - sin_turn * yy,
        sin_turn * xx + cos_turn * xy,
        sin_turn * xy + cos_turn * yy,
    )
    shift = (_SHIFT_STEP * drawn.shift_x, _SHIFT_STEP * drawn.shift_y)
    return _Transform(*torch.stack([drawn.x_flip, drawn.y_flip, *inverse, *shift]).float())


def _warp(images: Tensor, transform: _Transform) -> Tensor:
    """`images` (B, C, N, N) under their transforms; see the module's text."""
    x_flip, y_flip, finite = (
        mask[:, None, None, None]
        for mask in (transform.x_flip > 0, transform.y_flip > 0, images.isfinite().flatten(1).all(1))
    )
    images = torch.where(x_flip, images.flip(3), images)
    images = torch.where(y_flip, images.flip(2), images)
    grid = _sampling_grid(transform, images.shape[2])
    chunk = max(1, _WORKSPACE // (images.shape[1] * _upsampled_size(images.shape[2]) ** 2))
    warped = [_resample(*pair) for pair in zip(images.split(chunk), grid.split(chunk), strict=True)]
    return torch.where(finite, torch.cat(warped), math.nan)


def _upsampled_size(size: int) -> int:
    """Side of the upsampled source: the image, its margins, and what the filter adds."""
    return 2 * (3 * size - 2) + len(SYM6) - 2


def _sampling_grid(transform: _Transform, size: int) -> Tensor:
    """Where the pixels of the upsampled result lie in the upsampled source.

    (B, 2N+10, 2N+10, 2) in the units of `grid_sample`, where -1 and 1 are the outer edges.
    """
    n = torch.arange(2 * size + len(SYM6) - 2, device=transform.x_flip.device)
    q = (n - _CENTRE) / 2 - (size - 1) / 2
    xx, xy, yx, yy, shift_x, shift_y = (value[:, None, None] for value in transform[2:])
    shift_x, shift_y = size * shift_x, size * shift_y
    x, y = q[None, None, :] - shift_x, q[None, :, None] - shift_y
    # What the map adds to q, so that the identity adds exactly nothing to whole numbers.
    dx, dy = (xx - 1) * x + xy * y - shift_x, yx * x + (yy - 1) * y - shift_y
    index = torch.stack([2 * dx + n[None, None, :], 2 * dy + n[None, :, None]], -1) + 2 * (size - 1)
    return (2 * index + 1) / _upsampled_size(size) - 1


def _resample(images: Tensor, grid: Tensor) -> Tensor:
    """The images as read off at `grid`, same shape."""
    margin = images.shape[2] - 1
    x = _upsampled(F.pad(images, (margin, margin, 0, 0), mode="reflect"), 3)
    x = _upsampled(F.pad(x, (0, 0, margin, margin), mode="reflect"), 2)
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return _downsampled(_downsampled(x, 2), 3)


# Sums of shifted copies in place of convolutions: TF32 would cost four digits, and the choice of an algorithm by the
# batch's size would make the last bits depend on it.


def _upsampled(x: Tensor, dim: int) -> Tensor:
    """v[n] = √2 Σ_m h[n - 2m] x[m] along `dim`, for all n that are not zero: n values become 2n + 10."""
    taps = len(SYM6) // 2
    length = x.shape[dim] + taps - 1
    pads = [0, 0] * (3 - dim) + [taps - 1, taps - 1]
    x = F.pad(x, pads)
    phases = []
    for phase in (0, 1):
        total = torch.zeros_like(x.narrow(dim, 0, length))
        for k in range(taps):
            total.add_(x.narrow(dim, taps - 1 - k, length), alpha=math.sqrt(2) * SYM6[2 * k + phase])
        phases.append(total)
    return torch.stack(phases, dim + 1).flatten(dim, dim + 1)


def _downsampled(x: Tensor, dim: int) -> Tensor:
    """y[i] = Σ_k h[k] v[2i + k] / √2 along `dim`, the inverse of `_upsampled`: 2n + 10 values become n."""
    length = (x.shape[dim] - len(SYM6) + 2) // 2
    pairs = x.unflatten(dim, (-1, 2))
    total = torch.zeros_like(pairs.select(dim + 1, 0).narrow(dim, 0, length))
    for k, h in enumerate(SYM6):
        total.add_(pairs.select(dim + 1, k % 2).narrow(dim, k // 2, length), alpha=h / math.sqrt(2))
    return total
