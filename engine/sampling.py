"""Sampling from a model folder with its own D and noise levels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ipfm.engine.noise_levels import check_sigmas
from ipfm.engine.samplers import generate
from ipfm.engine.streams import Stream, draw_labels
from ipfm.engine.teacher_training import sample_teacher
from ipfm.models import EDMPrecond, load_teacher, read_config


def sample_model(folder: Path, device: torch.device, *, heun_steps: int, seed: int) -> Callable[[int, int], Tensor]:
    """A function (first index, count) -> images (count, C, H, W) in [-1, 1] of the model in `folder`.

    A generator is evaluated at the noise levels stored with it, a teacher sampled by Heun's method; both at their own
    D.

    Raises:
        ValueError: there is no such model, or its stored noise levels are unusable.
    """
    net = load_teacher(folder).to(device)
    facts = read_config(folder).extra
    if facts.get("task") != "generator":
        return lambda first, count: sample_teacher(net, first, count, D=net.D, steps=heun_steps, seed=seed)
    try:
        sigmas = check_sigmas(tuple(facts["sigmas"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'} holds no usable noise levels of a generator: {error}") from error

    return lambda first, count: sample_generator(net, first, count, D=net.D, sigmas=sigmas, seed=seed)


def sample_generator(
    net: EDMPrecond, first: int, count: int, *, D: float, sigmas: tuple[float, ...], seed: int
) -> Tensor:
    """Images first..first + count - 1 of `seed` from a generator, on its device; labels are drawn."""
    index = torch.arange(first, first + count, device=next(net.parameters()).device)
    labels = draw_labels(net.label_dim, index, seed=seed, stream=Stream.SAMPLER_LABEL, step=0)
    return generate(net, count, D=D, sigmas=sigmas, seed=seed, class_labels=labels, first_index=first)
