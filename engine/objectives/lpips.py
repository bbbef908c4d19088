"""LPIPS, a distance of images in the features of VGG-16 [Zhang et al. 2018, arXiv 1801.03924], as a training loss."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ipfm.engine.checks import at_least
from ipfm.engine.objectives.losses import finite_samples, per_sample
from ipfm.engine.objectives.lpips_weights import (
    SCALE,
    SHIFT,
    Convolution,
    check_shapes,
    levels,
    lin_name,
    read_weights,
    shapes,
    vgg_names,
)
from ipfm.models import NetworkConfig

# Four poolings leave one pixel of it.
_SMALLEST_SIDE = 16
# Added to the length of a feature vector, as in the published distance.
_EPSILON = 1e-10


def check_distance(distance: str, lpips: Path | None, side: int | None) -> None:
    """Check the settings of an objective that measures by l2 or lpips.

    Args:
        distance: l2 or lpips.
        lpips: where its weights are, see `load_lpips`.
        side: that images are resized to first; None keeps them.

    Raises:
        ValueError: distance is neither, side is too small, or one of the others is given with l2; one line.
    """
    if distance not in ("l2", "lpips"):
        raise ValueError(f"distance must be l2 or lpips, got {distance!r}")
    if distance != "lpips" and not lpips is side is None:
        raise ValueError("lpips and lpips-side are settings of --distance lpips, got distance l2")
    if side is not None:
        at_least("lpips-side", side, _SMALLEST_SIDE)


def check_lpips_images(network: NetworkConfig, side: int | None) -> None:
    """Check that LPIPS can compare a network's images.

    Args:
        network: an architecture.
        side: that images are resized to first; None keeps them.

    Raises:
        ValueError: it cannot; one line.
    """
    if network.img_channels not in (1, 3):
        raise ValueError(f"distance lpips is for images of 1 or 3 channels, got {network.img_channels}")
    if side is None and network.img_resolution < _SMALLEST_SIDE:
        raise ValueError(
            f"distance lpips needs images of at least {_SMALLEST_SIDE}x{_SMALLEST_SIDE}, this network's have "
            f"side {network.img_resolution}: give --lpips-side 32"
        )


class Lpips(nn.Module):
    """LPIPS with VGG-16; frozen, in eval mode, nothing in it is random.

        d(x, y) = sum_l 1/(H_l W_l) sum_hw sum_c w_lc (f_lhwc(x)/|f_lhw(x)| - f_lhwc(y)/|f_lhw(y)|)^2     [eq. 1]

    f_l are the features before each of VGG's four poolings and at its end, after the ReLU; w_l >= 0 a linear layer's
    weights, the squares of the paper's. Images are shifted and scaled as in VGG's training first.

    Args:
        weights: by the names that lpips.LPIPS(net="vgg") gives them, see `lpips_weights.shapes`; they are taken over
            without copying, in one floating dtype, in which the distance is computed (on GPUs in TF32 where the run
            allows it).
        resize: side in pixels to which images are resized first, bilinearly; where they shrink, each pixel is a
            weighted mean of all that it covers (F.interpolate with antialias=True). None leaves them as they are.

    Raises:
        ValueError: weights of other names, shapes or several dtypes or devices; resize below 16.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, weights: Mapping[str, Tensor], *, resize: int | None = None) -> None:
        super().__init__()
        if resize is not None and resize < _SMALLEST_SIDE:
            raise ValueError(f"resize must be None or at least {_SMALLEST_SIDE} pixels, got {resize}")
        check_shapes("the state dict of LPIPS", {name: tuple(w.shape) for name, w in weights.items()}, shapes())
        weights = {name: w.detach() for name, w in weights.items()}
        kinds = {(w.dtype, w.device) for w in weights.values()}
        (dtype, device), *others = kinds
        if others or not dtype.is_floating_point:
            found = ", ".join(sorted(f"{d} on {place}" for d, place in kinds))
            raise ValueError(f"the weights of LPIPS must be of one floating dtype on one device, got {found}")
        self.resize = resize
        # Made without memory, as every value is given.
        with torch.device("meta"):
            self.vgg = nn.ModuleList(_vgg_level(level, parts) for level, parts in enumerate(levels()))
        state: dict[str, Tensor] = {}
        for level, parts in enumerate(levels()):
            for part in parts:
                weight, bias = vgg_names(level, part)
                state |= {
                    f"{level}.{part.number}.weight": weights[weight],
                    f"{level}.{part.number}.bias": weights[bias],
                }
        self.vgg.load_state_dict(state, assign=True)
        self.linear = nn.ParameterList(weights[lin_name(level)].flatten() for level in range(len(self.vgg)))
        for name, values in (("shift", SHIFT), ("scale", SCALE)):
            constant = torch.tensor(values, dtype=dtype, device=device).view(1, 3, 1, 1)
            self.register_buffer(name, constant, persistent=False)
        self.eval().requires_grad_(False)

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """LPIPS of each pair of images, differentiable in x and y.

        Features of an image that needs no gradient are kept for one level at a time.

        Args:
            x: (B, C, H, W), values in [-1, 1], on the device of the weights, of any floating dtype. C = 3, or 1, which
                counts as three equal channels. Sides of at least 16, or any with `resize`.
            y: images of x's shape, likewise.

        Returns:
            (B,) in the weights' dtype. A sample that is not finite spoils no other.

        Raises:
            ValueError: a shape or dtype that does not fit.
        """
        if x.shape != y.shape:
            raise ValueError(f"x and y must have one shape, got {tuple(x.shape)} and {tuple(y.shape)}")
        a, b = self._normalised(x), self._normalised(y)
        total = a.new_zeros(len(a))
        for part, weight in zip(self.vgg, self.linear, strict=True):
            a, b = part(a), part(b)
            total = total + ((_unit(a) - _unit(b)).square().mean((2, 3)) * weight).sum(1)
        return total

    forward = distance

    def _normalised(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point():
            raise ValueError(
                f"images must be (B, 1 or 3, H, W) of a floating dtype, got {tuple(images.shape)} {images.dtype}"
            )
        if self.resize is None and min(images.shape[2:]) < _SMALLEST_SIDE:
            raise ValueError(
                f"images must have sides of at least {_SMALLEST_SIDE} pixels, got {tuple(images.shape)}; resize them"
            )
        images = images.to(self.shift.dtype)
        if self.resize is not None:
            images = _resized(images, self.resize)
        return (images.expand(-1, 3, -1, -1) - self.shift) / self.scale


class LpipsGradient(NamedTuple):
    """LPIPS of a batch, and its gradient with respect to the prediction."""

    loss: Tensor
    """(B,) in the dtype of the weights, 0 where the sample does not count."""
    grad: Tensor
    """(B, C, H, W) in the prediction's dtype, 0 where the sample does not count."""
    valid: Tensor
    """(B,) bool: the sample counts."""


def lpips_gradient(lpips: Lpips, x: Tensor, target: Tensor) -> LpipsGradient:
    """d(x, target) and its gradient with respect to x, the target being constant: a loss of distillation [Tee et al.].

    A sample does not count when x or target, its distance or its gradient is not finite. Its loss and gradient are
    exactly 0. Reads no value on the host.

    Args:
        lpips: the distance.
        x: (B, C, H, W), as in `Lpips.distance`. Not recorded by autograd.
        target: of x's shape, likewise.

    Raises:
        ValueError: a shape or dtype that does not fit.
    """
    if x.shape != target.shape:
        raise ValueError(f"x and target must have one shape, got {tuple(x.shape)} and {tuple(target.shape)}")
    x, target = x.detach(), target.detach()
    bad = ~(finite_samples(x) & finite_samples(target))
    # Kept out of the network: 0 · inf would reach the gradient.
    prediction = x.to(lpips.shift.dtype).masked_fill(per_sample(bad, x), 0.0).requires_grad_()
    constant = target.masked_fill(per_sample(bad, x), 0.0)
    with torch.enable_grad():
        loss = lpips.distance(prediction, constant)
        (gradient,) = torch.autograd.grad(loss.sum(), prediction)
    gradient, loss = gradient.to(x.dtype), loss.detach()
    valid = ~bad & torch.isfinite(loss) & finite_samples(gradient)
    return LpipsGradient(loss.masked_fill(~valid, 0.0), gradient.masked_fill(per_sample(~valid, x), 0.0), valid)


def load_lpips(path: Path | str | None, device: torch.device | str = "cpu", *, resize: int | None = None) -> Lpips:
    """LPIPS with the published weights, in float32 on `device`. Nothing is downloaded and no code in a file is run.

    Args:
        path: the state dict of lpips.LPIPS(net="vgg"), or a folder with the two files that it is made of. None looks
            for these in the installed package lpips and in torch's hub folder. See `lpips_weights.read_weights`.
        device: of the weights; on PyTorch's meta device, which computes nothing, no file is read.
        resize: as in `Lpips`.

    Raises:
        ValueError: there are no such weights; one line that says what was found and what is possible.
    """
    if torch.device(device).type == "meta":
        weights = {name: torch.empty(size, device="meta") for name, size in shapes().items()}
    else:
        weights = read_weights(None if path is None else Path(path))
    return Lpips(weights, resize=resize).to(device)


@functools.lru_cache(maxsize=16)
def lpips_flops(shape: tuple[int, int, int], resize: int | None = None) -> int:
    """Floating-point operations of `lpips_gradient` for one pair of images (C, H, W) = `shape`.

    Those of convolutions and matrix products are counted, a multiplication and an addition each.
    """
    image = torch.empty(1, *shape, device="meta")
    with FlopCounterMode(display=False) as counter:
        lpips_gradient(load_lpips(None, "meta", resize=resize), image, image)
    return int(counter.get_total_flops())


def _vgg_level(level: int, parts: list[Convolution]) -> nn.Sequential:
    """The layers up to features `level` from those before, by torchvision's numbers."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if level:
        layers[str(parts[0].number - 1)] = nn.MaxPool2d(2)
    for part in parts:
        layers[str(part.number)] = nn.Conv2d(part.inside, part.outside, 3, padding=1)
        layers[str(part.number + 1)] = nn.ReLU(inplace=True)
    return nn.Sequential(layers)


def _unit(features: Tensor) -> Tensor:
    """(B, C, H, W) with each pixel's vector of channels divided by its length."""
    square = features.square().sum(1, keepdim=True)
    # Where all channels are 0 the root has no slope, and 0 / 0 would follow; the quotient is 0 whatever the divisor.
    length = torch.where(square > 0, square, 1.0).sqrt()
    return features / (length + _EPSILON)


def _resized(images: Tensor, side: int) -> Tensor:
    """(B, C, H, W) -> (B, C, side, side) as of F.interpolate(mode="bilinear", antialias=True).

    As a product of matrices: on a GPU the gradient of F.interpolate is summed in an order that changes.
    """
    down, across = (_resampling(size, side, images) for size in images.shape[2:])
    return down @ images @ across.T


def _resampling(size: int, side: int, like: Tensor) -> Tensor:
    """(side, size): what each pixel of a resized column takes from those of the column."""
    columns = torch.eye(size, dtype=like.dtype, device=like.device)[None, None]
    return F.interpolate(columns, (side, size), mode="bilinear", antialias=True)[0, 0]
