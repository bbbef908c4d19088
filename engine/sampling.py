"""Sampling from a stored model with its own D and noise levels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ipfm.engine.noise_levels import check_sigmas
from ipfm.engine.samplers import generate
from ipfm.engine.streams import Stream, draw_labels
from ipfm.engine.teacher_training import sample_teacher
from ipfm.models import NetworkConfig, Precond, load_teacher, read_config
from ipfm.models.checkpoint_import import open_checkpoint


class SampledModel(NamedTuple):
    """A stored model, ready to be sampled."""

    draw: Callable[[int, int], Tensor]
    """(first index, count) -> images (count, C, H, W) in [-1, 1] on the device asked for."""
    network: NetworkConfig
    """Its architecture and D."""
    facts: Mapping[str, Any]
    """What its folder says beside the weights; nothing of a checkpoint."""


def sample_model(
    path: Path, device: torch.device, *, heun_steps: int, seed: int, D: float | None = None
) -> SampledModel:
    """The model at `path`, to be drawn from.

    A generator is evaluated at the noise levels stored with it, a teacher sampled by Heun's method; both at their own
    D.

    Args:
        path: a model folder, or a teacher's checkpoint of EDM, PFGM++ or SiD.
        device: where images are drawn.
        heun_steps: of a teacher's sampler.
        seed: of the images.
        D: auxiliary dimensions, for a checkpoint that does not say them.

    Raises:
        ValueError: there is no such model, D contradicts it, its stored noise levels are unusable, or it is a generator
            in a file, which cannot hold noise levels.
    """
    net = load_denoiser(path, D=D).to(device)
    facts = {} if path.is_file() else read_config(path).extra
    if facts.get("task") != "generator":
        return SampledModel(
            lambda first, count: sample_teacher(net, first, count, D=net.D, steps=heun_steps, seed=seed),
            net.config,
            facts,
        )
    try:
        sigmas = check_sigmas(tuple(facts["sigmas"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path / 'config.json'} holds no usable noise levels of a generator: {error}") from error

    return SampledModel(
        lambda first, count: sample_generator(net, first, count, D=net.D, sigmas=sigmas, seed=seed), net.config, facts
    )


def load_denoiser(path: Path, *, D: float | None) -> Precond:
    """The network at `path`, as `load_teacher`; a generator in a checkpoint is a ValueError that says what to do."""
    if path.is_file():
        checkpoint = open_checkpoint(path)
        name = checkpoint.choose()
        if checkpoint.is_generator(name):
            raise ValueError(
                f"{checkpoint.where}: {name} is a generator, whose noise levels the file does not hold: make a model "
                "folder of it with ipfm convert FILE FOLDER --sigmas 2.5"
            )
    return load_teacher(path, D=D)


def sample_generator(net: Precond, first: int, count: int, *, D: float, sigmas: tuple[float, ...], seed: int) -> Tensor:
    """Images first..first + count - 1 of `seed` from a generator, on its device; labels are drawn."""
    index = torch.arange(first, first + count, device=next(net.parameters()).device)
    labels = draw_labels(net.label_dim, index, seed=seed, stream=Stream.SAMPLER_LABEL, step=0)
    return generate(net, count, D=D, sigmas=sigmas, seed=seed, class_labels=labels, first_index=first)
