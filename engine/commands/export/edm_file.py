"""Export to EDM's layout: one pickle that the programs of EDM, EDM2, PFGM++ and SiD load as it is."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ipfm.engine.commands.export.comparison import ExportFailed, largest_difference
from ipfm.engine.commands.export.functions import Denoising, OneStep
from ipfm.engine.commands.export.network import ExportedNetwork
from ipfm.engine.runtime.wording import counted
from ipfm.models import Precond
from ipfm.models.atomic_files import atomic_write
from ipfm.models.checkpoints.edm_layout import write_network
from ipfm.models.checkpoints.reader import open_checkpoint
from ipfm.models.teacher import load_from_checkpoint

# What PFGM++'s generate.py looks for with --use_pickle=1.
_PFGMPP_NAME = re.compile(r"training-state-\d{6}\.pkl")


def check_edm(network: ExportedNetwork) -> None:
    """Check that the layout has a class for what the network computes.

    Raises:
        ValueError: it has none.
    """
    if not isinstance(network.function, (OneStep, Denoising)):
        raise ValueError(
            "the format edm holds denoisers, and this generator is none: its image is the end of a trajectory; take "
            "onnx, torch or huggingface"
        )


def export_edm(network: ExportedNetwork, path: Path) -> float:
    """Write the network to the file `path`, replaced whole or not at all: its weights, in float32, and its facts.

    Returns:
        The largest difference between what is read from the file and the network, see `largest_difference`.

    Raises:
        ExportFailed: something else is read; `path` is what it was.
        OSError: the disk refuses.
    """
    with atomic_write(path) as file:
        write_network(network.net, file, network.about)
        file.flush()
        try:
            back = load_from_checkpoint(open_checkpoint(Path(file.name)))
        except ValueError as error:
            raise ExportFailed(f"what was written cannot be read again: {error}") from error
        if (back.D, back.config.precond) != (network.net.D, network.net.config.precond):
            raise ExportFailed(f"D = {back.D:g} is read from what was written for D = {network.net.D:g}")
        return largest_difference(network, _Run(network, back))


def remarks_of(network: ExportedNetwork, path: Path) -> list[str]:
    """What the layout, or a program that reads it, does not know of the network, a line each."""
    said, D = [], network.net.D
    if network.is_generator and isinstance(network.levels, tuple):
        levels = ", ".join(f"{sigma:g}" for sigma in network.levels)
        steps = len(network.levels)
        if steps == 1:
            said.append(f"the noise level {levels} is no part of the layout: give it to sid_generate.py as init_sigma")
        else:
            said.append(
                f"the noise levels {levels} are no part of the layout: sid_generate.py draws in one step, and this "
                f"generator takes {counted(steps, 'evaluation')}"
            )
        if math.isfinite(D):
            said.append(
                f"D = {D:g} is in the file, but EDM's and SiD's programs draw Gaussian latents, right for D = inf "
                "alone; pfgmpp-idmd's take D as an option"
            )
    elif math.isfinite(D) and network.net.config.is_edm2:
        said.append(f"D = {D:g} is in the file, but EDM2's generate_images.py draws Gaussian latents")
    elif math.isfinite(D):
        said.append(
            f"D = {D:g} is in the file, but EDM's generate.py draws Gaussian latents; PFGM++'s draws those of "
            f"--aug_dim {D:g}"
        )
        if not _PFGMPP_NAME.fullmatch(path.name):
            said.append("PFGM++'s generate.py --use_pickle=1 looks for names like training-state-000000.pkl")
    if any(p.dtype != torch.float32 for p in network.net.parameters()):
        said.append("the weights are stored in float32, as all of the layout are")
    return said


def is_exported(path: Path) -> bool:
    """Whether the file is one that `export_edm` wrote."""
    try:
        return open_checkpoint(path).facts is not None
    except (ValueError, OSError):
        return False


def inputs_of(network: ExportedNetwork) -> tuple[str, ...]:
    """The arguments of the network in the file."""
    return ("x", "sigma", "class_labels") if network.net.label_dim else ("x", "sigma")


class _Run:
    """What `network.function` computes, by another network."""

    def __init__(self, network: ExportedNetwork, net: Precond) -> None:
        function = network.function
        self._function = OneStep(net, function.sigma) if isinstance(function, OneStep) else Denoising(net)

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        out: Tensor = self._function(**inputs)
        return out
