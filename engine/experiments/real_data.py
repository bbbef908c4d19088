"""The real images that --real-data names, for recipes that distil."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ipfm.engine.data.dataset import ImageDataset
from ipfm.engine.data.open_dataset import open_dataset
from ipfm.engine.evaluation.reference_data import is_npz, open_images
from ipfm.engine.experiments.options import DistillationOptions
from ipfm.engine.objectives.base import Distillation
from ipfm.engine.runtime.commandline import BadInput
from ipfm.engine.runtime.launcher import is_first_process
from ipfm.engine.runtime.wording import counted
from ipfm.engine.training.data_order import real_images
from ipfm.models import NetworkConfig
from ipfm.models.checkpoints.recognise import user_path

# The recipe's own images; a folder of this name is ./own.
OWN = Path("own")


def read_real(
    options: DistillationOptions,
    config: Distillation,
    network: NetworkConfig,
    own: Callable[[], ImageDataset | None] = lambda: None,
) -> ImageDataset | None:
    """The images that the student, or the generator, learns from, as the teacher takes them; None without any.

    Args:
        options: of a recipe.
        config: its settings, completed for the teacher.
        network: the teacher's.
        own: the images that the recipe has itself.

    Raises:
        ValueError: they are missing, cannot be read, or do not fit the teacher; in a dry run they may be missing.
    """
    path: Path | None = getattr(config, "real_data", None)
    if not config.takes_real_images:
        if getattr(config, "real_weights", None) is None:
            if path is not None:
                raise ValueError(f"real-data {path} is for a discriminator here: give --discriminator encoder too")
            if getattr(config, "real_xflip", False):
                raise ValueError("real-xflip was given without real-data")
        elif path is not None and is_first_process():
            with suppress(OSError):
                print(f"note: real-weights 1 1 leave the images of {path} out", file=sys.stderr)
        return None
    first, whole = config.first_whole_step, config.planned_step
    if getattr(config, "discriminator", None) is not None and config.total_steps <= whole and is_first_process():
        idle = config.total_steps <= first
        what, step = ("generator is trained", first) if idle else ("generator meets the discriminator", whole)
        starts = " ".join(f"{kimg:g}" for kimg in config.starts)  # type: ignore[attr-defined]
        with suppress(OSError):
            print(
                f"note: by discriminator-kimg {starts} the {what} from step {step:,} on; this run has "
                f"{counted(f'{config.total_steps:,}', 'step')}{', and its generator stays as it begins' * idle}",
                file=sys.stderr,
            )
    if path is None:
        if options.dry_run:
            return None
        # What asks for them; of an objective that is of images alone, the method.
        asks: str = getattr(config, "why_real_images", config.method)
        raise BadInput(f"{asks} needs the real images: give --real-data", "")
    return real_images(config, network, _opened(path, options, network, own))


def _opened(
    path: Path, options: DistillationOptions, network: NetworkConfig, own: Callable[[], ImageDataset | None]
) -> ImageDataset:
    if path != OWN:
        place = user_path(path)
        if is_npz(place):
            return open_images(path, skip_unreadable=options.skip_unreadable, strict=options.strict)
        labels = network.label_dim > 0
        return open_dataset(path, labels=labels, skip_unreadable=options.skip_unreadable, strict=options.strict)
    data = own()
    if data is None:
        raise ValueError("real-data own is for recipes that have images themselves, and this one has none: give a path")
    return data
