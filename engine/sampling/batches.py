"""Images first..first + count - 1 of a seed, from a teacher, a generator or a network of trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ipfm.engine.noise_levels import NoiseLevels
from ipfm.engine.random_streams import Stream, draw_labels
from ipfm.engine.sampling.samplers import generate, heun_sample, trajectory_sample, usual_range
from ipfm.engine.sampling.seeds import SampleNoise, Seeds
from ipfm.models import Precond


class Sampler(Protocol):
    """A sampler with its network and levels bound."""

    def __call__(
        self,
        n: int,
        *,
        seed: Seeds,
        class_labels: Tensor | None,
        first_index: int,
        latents: Tensor | None = None,
    ) -> Tensor: ...


def sample_generator(net: Precond, first: int, count: int, *, D: float, sigmas: tuple[float, ...], seed: int) -> Tensor:
    """Images first..first + count - 1 of `seed` from a generator, on its device; labels are drawn.

    Args:
        net: generator.
        first: index of the first image, >= 0.
        count: number of images.
        D: auxiliary dimensions that the generator was trained for.
        sigmas: its noise levels.
        seed: of latents and labels.

    Returns:
        (count, C, H, W) float32, about [-1, 1].
    """
    return draw_images(partial(generate, net, D=D, sigmas=sigmas), net, first, count, seed=seed)


def sample_trajectory(net: Precond, first: int, count: int, *, D: float, noise: NoiseLevels, seed: int) -> Tensor:
    """The same from a network of trajectories, from their start at noise.sigma_max to noise.sigma_min."""
    sampler = partial(trajectory_sample, net, D=D, sigma_max=noise.sigma_max, sigma_min=noise.sigma_min)
    return draw_images(sampler, net, first, count, seed=seed)


def draw_images(
    sampler: Sampler,
    net: Precond,
    first: int,
    count: int,
    *,
    seed: Seeds,
    classes: Sequence[int] | None = None,
    labels: Tensor | None = None,
    latents: Tensor | None = None,
) -> Tensor:
    """Images first..first + count - 1 of one seed, or of a list of seeds, on the network's device.

    Args:
        sampler: makes images of the labels and the seed that it is given.
        net: the sampler's network, which says how wide labels are.
        first: index of the first image; of a list of seeds, of the first seed.
        count: number of images.
        seed: one seed, or a list with one for each image.
        classes: the images' classes, which are repeated where there are fewer than images; drawn when None.
        labels: (count, label_dim) rows of these images, in place of classes.
        latents: (count, C, H, W), where the sampler starts for them; drawn when None.

    Returns:
        (count, C, H, W) float32, about [-1, 1].
    """
    device = next(net.parameters()).device
    start = first
    if isinstance(seed, Sequence):
        seed, start = seed[first : first + count], 0
    if labels is None and classes is None:
        labels = SampleNoise.of(count, seed, start, device).labels(net.label_dim)
    elif classes is not None:
        wanted = torch.tensor([classes[i % len(classes)] for i in range(first, first + count)], device=device)
        labels = (wanted[:, None] == torch.arange(net.label_dim, device=device)).float()
    return sampler(count, seed=seed, class_labels=labels, first_index=start, latents=latents)


def sample_teacher(net: Precond, first: int, count: int, *, D: float, steps: int, seed: int) -> Tensor:
    """The same from a teacher by Heun's method, on `usual_range`."""
    index = torch.arange(first, first + count, device=next(net.parameters()).device)
    labels = draw_labels(net.label_dim, index, seed=seed, stream=Stream.SAMPLER_LABEL, step=0)
    low, high = usual_range(net)
    return heun_sample(
        net,
        count,
        D=D,
        steps=steps,
        seed=seed,
        class_labels=labels,
        sigma_min=low,
        sigma_max=high,
        first_index=first,
    )
