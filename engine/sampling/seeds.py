"""Which images are drawn: some of one seed, or one of each of several seeds; and the random numbers of either."""

from __future__ import annotations

import numbers
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ipfm.engine.random_streams import Stream, draw_labels
from ipfm.engine.sampling.interpolation import Between, between
from ipfm.kernels import perturb

SEED_LIMIT = 1 << 64
# Numbers that a list on the command line may hold: a range costs nothing to type.
MOST_NUMBERS = 10_000_000

Seeds = int | Sequence[int | Between]
"""One seed, whose images are counted by their index, or for each image a seed, or a place between two."""


@dataclass(frozen=True, eq=False)
class SampleNoise:
    """The random numbers of a batch of images, each image's a function of its seed and index alone.

    A call of the kernels draws for one seed, the network is called for the whole batch: so several seeds cost as many
    calls of the kernels, and no more evaluations.
    """

    parts: tuple[tuple[int | Between, Tensor], ...]
    """(seed, the images' indices (B_i,) int64) one after the other; the batch is B = sum of B_i images."""

    @classmethod
    def of(cls, n: int, seed: Seeds, first_index: int, device: torch.device) -> SampleNoise:
        """Images first_index..first_index + n - 1 of one seed, or image first_index of each of n seeds.

        Seeds are a sequence, an array or a tensor.

        Raises:
            ValueError: a number out of its range, or not n seeds.
        """
        check_whole("the number of images", n, least=0)
        check_whole("the index of the first image", first_index, least=0)
        n, first_index = int(n), int(first_index)
        seed = seed.tolist() if hasattr(seed, "tolist") else seed
        if isinstance(seed, (str, bytes)):
            raise ValueError(f"seed must be an integer in [0, 2^64), or one for each image, got {seed!r}")
        if not isinstance(seed, Sequence):
            return cls(((seed, torch.arange(first_index, first_index + n, device=device)),))
        if len(seed) != n:
            raise ValueError(f"seed must be one number or one for each of {n} images, got {len(seed)}")
        index = torch.full((1,), first_index, device=device)
        return cls(tuple((each, index) for each in seed) or ((0, index[:0]),))

    def perturb(self, y: Tensor, sigma: Tensor, D: float, *, stream: Stream, step: int) -> Tensor:
        """x ~ p_r(. | y) at r = sigma sqrt(D) [Xu et al. 2023, eq. 4]: y (B, C, H, W), sigma (B,), as `perturb`.

        Between two seeds the noise is between theirs, and of the same law: see `ipfm.engine.sampling.interpolation`.
        """
        sizes = [len(index) for _, index in self.parts]
        found = []
        for (seed, index), rows, levels in zip(self.parts, y.split(sizes), sigma.split(sizes), strict=True):
            given: dict[str, Any] = {"stream": stream, "step": step, "sample_index": index}
            if isinstance(seed, Between):
                nothing = torch.zeros_like(rows)
                first, last = (perturb(nothing, levels, D, seed=end, **given) for end in (seed.first, seed.last))
                found.append((rows + between(first, last, seed.share, levels, D)).to(rows.dtype))
            else:
                found.append(perturb(rows, levels, D, seed=seed, **given))
        return _joined(found)

    def labels(self, label_dim: int) -> Tensor | None:
        """One-hot class labels (B, label_dim) float32, uniform over the classes; None for label_dim = 0.

        Raises:
            ValueError: an image between two seeds that draw different classes.
        """
        drawn = [_labels(seed, index, label_dim) for seed, index in self.parts]
        found = [labels for labels in drawn if labels is not None]
        return _joined(found) if found else None


def read_numbers(name: str, text: str) -> tuple[int, ...]:
    """Whole numbers >= 0 and ranges of them, ends included, in the order given: "0,3,7-9" is 0, 3, 7, 8, 9.

    `name` begins the messages.

    Raises:
        ValueError: anything else, a range that falls, or more than MOST_NUMBERS numbers.
    """
    numbers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r" *([0-9]{1,20}) *(?:- *([0-9]{1,20}) *)?", part)
        if found is None:
            # Of thousands of numbers, the one that is none.
            got = repr(text) if len(text) <= 60 else f"{part.strip()[:60]!r} among them"
            raise ValueError(f"{name} must be whole numbers and ranges like 0,3,7-12, got {got}")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            raise ValueError(f"{name}: a range must rise, got {part.strip()}")
        if len(numbers) + last - first >= MOST_NUMBERS:
            raise ValueError(f"{name} must be at most {MOST_NUMBERS:,} numbers, got more")
        numbers.extend(range(first, last + 1))
    return tuple(numbers)


def check_between(seed: Seeds, label_dim: int) -> None:
    """Check, before any work, that images between two seeds have a class: that which both draw.

    Args:
        seed: one seed, or what each image is of.
        label_dim: number of classes; 0: there are none.

    Raises:
        ValueError: two draw different ones.
    """
    if label_dim and isinstance(seed, Sequence):
        between_two = [one for one in seed if isinstance(one, Between)]
        SampleNoise.of(len(between_two), between_two, 0, torch.device("cpu")).labels(label_dim)


def check_whole(name: str, value: object, *, least: int) -> None:
    """Check that a value is a whole number, at least `least`.

    Raises:
        ValueError: it is not; `name` begins the message.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")


def check_seeds(name: str, seeds: Sequence[int]) -> None:
    """Check that all are in [0, 2^64).

    Raises:
        ValueError: one is not; `name` begins the message.
    """
    for seed in seeds:
        if not 0 <= seed < SEED_LIMIT:
            raise ValueError(f"{name} must lie in [0, 2^64), got {seed}")


def _labels(seed: int | Between, index: Tensor, label_dim: int) -> Tensor | None:
    if isinstance(seed, Between):
        return _common(seed, *(_labels(end, index, label_dim) for end in (seed.first, seed.last)))
    return draw_labels(label_dim, index, seed=seed, stream=Stream.SAMPLER_LABEL, step=0)


def _common(seed: Between, first: Tensor | None, last: Tensor | None) -> Tensor | None:
    """The labels of both ends. ValueError: they differ."""
    if first is None or last is None or torch.equal(first, last):
        return first
    a, b = (int(labels[0].argmax()) for labels in (first, last))
    raise ValueError(
        f"the seeds {seed.first} and {seed.last} draw the classes {a} and {b}, and the network knows nothing between: "
        "give one class for all images, by --classes or class_labels"
    )


def _joined(rows: list[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(rows)
