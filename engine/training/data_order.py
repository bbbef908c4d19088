"""The images of a training in their order, of which each process reads its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ipfm.engine.data.dataset import Batch, ImageDataset
from ipfm.engine.data.real_images import fitted
from ipfm.engine.distributed.agreement import attempt
from ipfm.engine.distributed.world import World
from ipfm.engine.objectives.base import Distillation
from ipfm.engine.training.run_folder import fingerprint
from ipfm.engine.training.task import StepFailed
from ipfm.models import NetworkConfig

# Images of a data set by which a run folder knows it again.
LOOKED_AT = 8


def real_images(config: Distillation, network: NetworkConfig, data: ImageDataset | None) -> ImageDataset | None:
    """The real images of a distillation as its teacher takes them; None where it takes none.

    Args:
        config: settings, completed for this teacher.
        network: the teacher's.
        data: as they were given.

    Raises:
        ValueError: they are missing, not asked for, or do not fit, see `fitted`.
    """
    weights = getattr(config, "real_weights", None)
    if not config.takes_real_images:
        # Weights of 1 and 1 are the way to leave them out.
        if data is not None and weights is None:
            if not hasattr(config, "discriminator"):
                raise ValueError(f"{config.method} takes no real images: leave those of {data.name} out")
            takes = "real_weights, such as (0.92, 0.94), or " * hasattr(config, "real_weights")
            raise ValueError(f'the real images of {data.name} were given without {takes}discriminator="encoder"')
        return None
    if data is None:
        told = getattr(config, "discriminator", None)
        if told is None and weights is None:
            raise ValueError(f"{config.method} needs real images, and none were given")
        asks = f"real_weights {weights}" if told is None else f"discriminator {told}"
        raise ValueError(f"{asks} was given without real images")
    return fitted(data, network, augment=config.augment, xflip=getattr(config, "real_xflip", False))


def real_facts(data: ImageDataset | None) -> dict[str, Any]:
    """What identifies a run by its real images, wherever they lie; nothing where there are none."""
    if data is None:
        return {}
    about = {"dataset": plain_place(data.name), "images": len(data), "xflip": data.xflip, **pictures(data)}
    return {"real_data": about}


class OrderedImages:
    """Batches of a data set that are a function of step and index alone, see `ImageDataset.batch` and `RealImages`.

    Args:
        dataset: on the device of the world.
        batch: images a step, over all processes.
        seed: of the order.
        world: the run's processes, each of which asks for as many batches.
    """

    def __init__(self, dataset: ImageDataset, *, batch: int, seed: int, world: World) -> None:
        self.dataset, self._batch, self._seed, self._world = dataset, batch, seed, world

    def batch(self, step: int, index: Tensor) -> Batch:
        """The images with these indices of the batch of `step`.

        Raises:
            StepFailed: files of some process cannot be read.
        """

        def read() -> Batch:
            return self.dataset.batch(step, index, batch_size=self._batch, seed=self._seed)

        # Images in memory cannot fail, and need no word between the processes.
        if self._world.size == 1 or isinstance(self.dataset.images, Tensor):
            return read()
        batch, reason = attempt(read, self._world.size)
        if batch is None:
            raise StepFailed(reason)
        return batch


def pictures(dataset: ImageDataset) -> dict[str, str]:
    """What tells two data sets of one name and number apart: some of their images, spread over them, and the labels.

    Nothing where one of these cannot be read: the training says so when it comes to it.
    """
    count, images = min(LOOKED_AT, len(dataset)), dataset.images
    places = torch.arange(count) * len(dataset) // count
    try:
        shown = {"images": images[places] if isinstance(images, Tensor) else images.read(places)}
    except (ValueError, OSError):
        return {}
    return {"pictures": fingerprint(shown if dataset.labels is None else shown | {"labels": dataset.labels})[:16]}


def plain_place(name: str) -> str:
    """A data set's name without the folders it lies in, which differ between machines."""
    return Path(name).name
