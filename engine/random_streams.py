"""Names of the random streams.

Every random number is a function of (seed, stream, step, sample index, element) [Salmon et al. 2011]; the stream keeps
uses apart that share the other four. The numbers are part of what a seed means: append, never renumber. `Stream` has
those that several files share, and an objective the rest of its own in a subclass of `ObjectiveStream`. Numbers from 28
on were never used: the next use takes the first that is free. Those from `OWN_STREAMS` to 65535 are left to objectives
outside of this project.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from ipfm.kernels import philox

# The first number that is no use of this project, and the one after the last: 16 bits of the generator's counter.
OWN_STREAMS, STREAM_LIMIT = 1000, 2**16


class Stream(IntEnum):
    """One entry a use of random numbers; the value is the `stream` argument of the kernels."""

    STUDENT_LATENT = 0
    STUDENT_SIGMA = 1
    STUDENT_NOISE = 2
    STUDENT_LABEL = 3
    STUDENT_DROPOUT = 4
    GENERATOR_LATENT = 5
    GENERATOR_SIGMA = 6
    GENERATOR_NOISE = 7
    GENERATOR_LABEL = 8
    GENERATOR_DROPOUT = 9
    TEACHER_SIGMA = 10
    TEACHER_NOISE = 11
    TEACHER_DROPOUT = 12
    SAMPLER_LATENT = 13
    SAMPLER_NOISE = 14
    SAMPLER_LABEL = 15
    TEACHER_AUGMENT = 16
    STUDENT_AUGMENT = 17
    SAMPLER_CHURN = 18
    SHAPES = 19
    STUDENT_LAST = 20
    GENERATOR_LAST = 21
    DATA_LATENT = 26
    REAL_AUGMENT = 27


class ObjectiveStream(IntEnum):
    """Streams of one objective, declared in its file.

    Two files outside of this project may have the same numbers, such as one and its copy: no run has both.

    Raises:
        ValueError: when a class is made with a number that `Stream` or another objective has, twice, or out of range.
    """

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        whose = f"{cls.__module__}.{cls.__qualname__}"
        if beyond := [int(stream) for stream in cls if not 0 <= stream < STREAM_LIMIT]:
            raise ValueError(f"the random streams {beyond} of {whose} must lie in [0, {STREAM_LIMIT - 1}]")
        if aliases := [name for name, stream in cls.__members__.items() if name != stream.name]:
            raise ValueError(
                f"the random stream {aliases[0]} of {whose} has the number of {cls[aliases[0]].name}: each use takes "
                "one of its own"
            )
        others: tuple[type[IntEnum], ...] = (Stream, *ObjectiveStream.__subclasses__())
        for other in others:
            if (other.__module__, other.__qualname__) == (cls.__module__, cls.__qualname__) or _apart(cls, other):
                continue
            if shared := {int(stream) for stream in cls} & {int(stream) for stream in other}:
                raise ValueError(
                    f"the random streams {sorted(shared)} of {whose} belong to "
                    f"{other.__module__}.{other.__qualname__}: take numbers that nobody has"
                )


def _apart(one: type[IntEnum], other: type[IntEnum]) -> bool:
    """Whether they are of two files outside of this project."""
    return one.__module__ != other.__module__ and not any(kind.__module__.startswith("ipfm.") for kind in (one, other))


def class_shares(counts: Sequence[int] | None, label_dim: int, device: torch.device | str = "cpu") -> Tensor | None:
    """Where classes end in (0, 1] that are drawn as often as `counts` say: (label_dim,) float32; None without counts.

    Args:
        counts: images of each class; None draws all classes alike.
        label_dim: number of classes.
        device: of the result.

    Raises:
        ValueError: not one count for each class, a negative one, or none above 0.
    """
    if not counts:
        return None
    if len(counts) != label_dim or min(counts) < 0 or max(counts) < 1:
        raise ValueError(
            f"class_counts must be {label_dim} numbers of images, one for each class of the teacher, got {len(counts)}"
            if len(counts) != label_dim
            else f"class_counts must be numbers of images, some above 0, got {min(counts)} to {max(counts)}"
        )
    ends = torch.tensor(counts, dtype=torch.float64).cumsum(0)
    return (ends / ends[-1]).to(device, torch.float32)


def draw_labels(
    label_dim: int,
    sample_index: Tensor,
    *,
    seed: int,
    stream: int,
    step: int | Tensor,
    shares: Tensor | None = None,
) -> Tensor | None:
    """One-hot class labels (B, label_dim) float32, uniform over the classes or by shares; None for label_dim = 0.

    Args:
        label_dim: number of classes, >= 0.
        sample_index: (B,) int64, the samples' global indices; the labels are on its device.
        seed: of the random numbers, as in `ipfm.kernels.philox.uniform`.
        stream: of the random numbers, likewise.
        step: of the random numbers, likewise.
        shares: (label_dim,) on the device of `sample_index`, from `class_shares`; None draws all classes alike.

    Raises:
        ValueError: a number out of its range.
    """
    if label_dim < 0:
        raise ValueError(f"the number of classes must be >= 0, got {label_dim}")
    if label_dim == 0:
        return None
    u = philox.uniform(sample_index, 1, seed=seed, stream=stream, step=step)[:, 0]
    if shares is not None:
        classes = (u[:, None] > shares[:-1]).sum(dim=1)
        return (classes[:, None] == torch.arange(label_dim, device=classes.device)).float()
    # u lies in (0, 1]: 1 belongs to the last class.
    classes = (u * label_dim).long().clamp_(max=label_dim - 1)
    # torch's one_hot would read the largest class back to the host.
    return (classes[:, None] == torch.arange(label_dim, device=classes.device)).float()


def draw_number(count: int, *, seed: int, stream: int, step: int) -> int:
    """A number of 0..count - 1, each as likely, known to the host: the same on every rank and device."""
    word = philox.host_word(seed=seed, stream=stream, step=step)
    return word * count >> 32


def seed_dropout(seed: int, stream: int, step: int, first_index: int) -> None:
    """Seed PyTorch's generators for the dropout of one forward pass, see `dropout_seed`; arguments as there."""
    torch.manual_seed(dropout_seed(seed, stream, step, first_index))


def dropout_seed(seed: int, stream: int, step: int, first_index: int) -> int:
    """What PyTorch's generators are seeded by for the dropout of one forward pass.

    The state depends on the position alone, so that a resumed run, and the second forward of a phased step, drop the
    same elements. PyTorch draws the mask of a micro-batch as a whole: unlike every other random number, which elements
    are dropped depends on how the batch is cut into micro-batches.

    Args:
        seed: of the run, in [0, 2^64).
        stream: what the pass is for.
        step: optimiser step, or one number a pass where a step has several.
        first_index: global index of the micro-batch's first sample.
    """
    words = (seed, int(stream), step, first_index)
    mixed = 0
    for word in words:
        # splitmix64 finaliser [Steele et al. 2014]: neighbouring positions give unrelated seeds.
        mixed = (mixed + word + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return mixed & 0x7FFFFFFFFFFFFFFF
