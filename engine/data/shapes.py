"""Coloured shapes on a plain background, drawn from a seed: a data set of which every factor is known.

An image holds one to three shapes, each with a kind, colour, size, place and rotation, all within the picture. The one
in front hides what lies behind it; its kind is the image's label.

Image i of a seed is the same however many are drawn: its factors are a function of (seed, i), and the pixels follow
from them by operations that round in one way alone, which is why rotations are whole degrees, read from a table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ipfm.engine.data.dataset import ImageDataset
from ipfm.engine.random_streams import Stream
from ipfm.kernels import philox

KINDS = ("disc", "square", "triangle", "ring", "cross", "bar")
COLOURS = {
    "red": (230, 40, 40),
    "orange": (250, 140, 20),
    "yellow": (250, 230, 50),
    "green": (50, 200, 70),
    "cyan": (60, 220, 230),
    "blue": (70, 110, 255),
    "magenta": (230, 80, 220),
    "white": (245, 245, 245),
}
SLOTS = 3
"""Most shapes in an image."""
SIZES = (0.14, 0.28)
"""Smallest and largest radius of the circle around a shape, in sides of the picture."""
DARKEST, BRIGHTEST = 0.0, 100.0
"""Range of the background's red, green and blue, of 255."""
SMALLEST_SIDE = 16
"""Pixels below which the kinds cannot be told apart."""

# Images drawn at a time: their pixels stay in the processor's cache.
_CHUNK = 64
# Uniform numbers of an image: the order of the colours, the background, how many shapes; then each slot's.
_COMMON = len(COLOURS) + 4
_OF_A_SLOT = 5


@dataclass(frozen=True, eq=False)
class Factors:
    """What N images show. Slots count from the front; those from `number` on are not drawn.

    Attributes:
        number: (N,) int64, shapes in the image, 1 … SLOTS, all equally often.
        kind: (N, SLOTS) int64, into KINDS, uniform.
        colour: (N, SLOTS) int64, into COLOURS, uniform, all different within an image.
        size: (N, SLOTS) float32, radius in pixels of the circle around the shape, uniform within SIZES.
        centre: (N, SLOTS, 2) float32, x and y in pixels from the upper left corner, uniform where the shape fits.
        rotation: (N, SLOTS) int64, degrees clockwise, 0 … 359, uniform.
        background: (N, 3) float32, red, green and blue, uniform in [DARKEST, BRIGHTEST].
    """

    number: Tensor
    kind: Tensor
    colour: Tensor
    size: Tensor
    centre: Tensor
    rotation: Tensor
    background: Tensor

    def __len__(self) -> int:
        return len(self.number)

    def take(self, first: int, count: int) -> Factors:
        """The factors of images first … first + count - 1, or of as many as there are."""
        return Factors(**{f.name: getattr(self, f.name)[first : first + count] for f in fields(self)})


def shapes(count: int = 20_000, *, side: int = 32, seed: int = 0) -> ImageDataset:
    """`count` images (3, side, side) uint8 with labels: the kind of the shape in front, into KINDS.

    Args:
        count: images, at least 1; the first ones of the seed, so that fewer are the beginning of more.
        side: of the pictures in pixels, at least 16.
        seed: in [0, 2^64).

    Raises:
        ValueError: an argument out of its range.
    """
    factors = draw_factors(count, side=side, seed=seed)
    name = f"shapes, seed {seed}"
    return ImageDataset(draw(factors, side=side), factors.kind[:, 0].clone(), name=name, classes=len(KINDS))


def draw_factors(count: int = 20_000, *, side: int = 32, seed: int = 0) -> Factors:
    """What the images of `shapes` with the same arguments show."""
    _check("count", count, 1, 2**31)
    _check("side", side, SMALLEST_SIDE, 2**15)
    _check("seed", seed, 0, 2**64)
    u = philox.uniform(
        torch.arange(count), _COMMON + SLOTS * _OF_A_SLOT, seed=seed, stream=Stream.SHAPES, step=0, backend="reference"
    )
    order, background, number, slots = u.split((len(COLOURS), 3, 1, SLOTS * _OF_A_SLOT), dim=1)
    kind, size, x, y, rotation = slots.view(count, SLOTS, _OF_A_SLOT).unbind(2)
    low, high = (share * side for share in SIZES)
    size = size * (high - low) + low
    # From `size` to `side - size`.
    room = side - size * 2
    return Factors(
        number=_choice(number[:, 0], SLOTS) + 1,
        kind=_choice(kind, len(KINDS)),
        colour=order.argsort(dim=1, stable=True)[:, :SLOTS],
        size=size,
        centre=torch.stack((x * room + size, y * room + size), dim=2),
        rotation=_choice(rotation, 360),
        background=background * (BRIGHTEST - DARKEST) + DARKEST,
    )


def draw(factors: Factors, *, side: int = 32) -> Tensor:
    """The images (N, 3, side, side) uint8, RGB, that show `factors`; an edge pixel mixes what it lies between."""
    images = torch.empty(len(factors), 3, side, side, dtype=torch.uint8)
    for first in range(0, len(factors), _CHUNK):
        images[first : first + _CHUNK] = _draw(factors.take(first, _CHUNK), side)
    return images


def _draw(factors: Factors, side: int) -> Tensor:
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    image = factors.background[:, :, None, None].expand(-1, -1, side, side).contiguous()
    for slot in reversed(range(SLOTS)):
        covered = _coverage(factors, slot, side)[:, None]
        image += (palette[factors.colour[:, slot], :, None, None] - image) * covered
    return image.round_().to(torch.uint8)


def _coverage(factors: Factors, slot: int, side: int) -> Tensor:
    """(N, side, side) in [0, 1]: the share of each pixel that the slot's shape covers.

    It is taken from the signed distance of the pixel's middle to the shape's edge.
    """
    covered = torch.zeros(len(factors), side, side)
    middle = torch.arange(side) + 0.5
    for kind in range(len(KINDS)):
        (chosen,) = torch.where((factors.kind[:, slot] == kind) & (factors.number > slot))
        centre, radius = factors.centre[chosen, slot, :, None, None], factors.size[chosen, slot, None, None]
        turn = factors.rotation[chosen, slot]
        cosine, sine = _COSINE[turn][:, None, None], _SINE[turn][:, None, None]
        x, y = middle - centre[:, 0], middle[:, None] - centre[:, 1]
        distance = _distance(KINDS[kind], x * cosine + y * sine, y * cosine - x * sine, radius)
        covered[chosen] = distance.neg_().add_(0.5).clamp_(0, 1)
    return covered


def _distance(kind: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Signed distance to the edge, negative inside; beyond a corner that to the nearest edge's line, which is shorter.

    x, y (n, side, side): places relative to the centre, in pixels; radius (n, 1, 1): of the circle around the shape.
    """
    if kind == "disc":
        return (x * x + y * y).sqrt_() - radius
    if kind == "ring":
        # Half as wide inside as outside.
        return ((x * x + y * y).sqrt_() - radius * 0.75).abs_() - radius * 0.25
    if kind == "triangle":
        # Equilateral: three lines at half the radius, with normals 120 degrees apart.
        slant = x.abs() * math.sqrt(0.75) - y * 0.5
        return torch.maximum(slant, y) - radius * 0.5
    x, y = x.abs(), y.abs()
    if kind == "square":
        return torch.maximum(x, y) - radius * math.sqrt(0.5)
    # Three times as long as wide: the corners lie on the circle.
    half_width = radius * math.sqrt(0.1)
    bar = torch.maximum(x - half_width * 3, y - half_width)
    if kind == "bar":
        return bar
    return torch.minimum(bar, torch.maximum(x - half_width, y - half_width * 3))


def _choice(u: Tensor, count: int) -> Tensor:
    """Whole numbers 0 … count - 1, all equally likely, from uniform numbers in (0, 1]."""
    return (u * count).long().clamp_(max=count - 1)


def _check(name: str, value: int, least: int, limit: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < limit:
        raise ValueError(f"{name} must be an integer in [{least}, {limit}), got {value!r}")


_COSINE, _SINE = (
    torch.tensor([turned(math.radians(degree)) for degree in range(360)], dtype=torch.float32)
    for turned in (math.cos, math.sin)
)
