"""Real images beside a generator's: what steps ask for them, and what of a data set fits a network."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from ipfm.engine.data.dataset import Batch, ImageDataset
from ipfm.models import NetworkConfig


class RealImages(Protocol):
    """Where steps get real images from."""

    def batch(self, step: int, index: Tensor) -> Batch:
        """The images with the indices `index` (B,) int64 of the batch of `step`, as the network takes them."""
        ...


class BlankImages:
    """Grey images of no class, for plans and timings, which look at no value.

    Args:
        network: that takes them.
        device: where they are made.
    """

    def __init__(self, network: NetworkConfig, device: torch.device) -> None:
        self._shape, self._classes, self._device = network.image_shape, network.label_dim, device

    def batch(self, step: int, index: Tensor) -> Batch:
        """See `RealImages.batch`."""
        images = torch.zeros(len(index), *self._shape, device=self._device)
        return Batch(images, torch.zeros(len(index), self._classes, device=self._device) if self._classes else None)


def fitted(data: ImageDataset, network: NetworkConfig, *, augment: float, xflip: bool = False) -> ImageDataset:
    """The data as `network` takes them: with its classes, or without any.

    Args:
        data: real images.
        network: a teacher's architecture.
        augment: probability of their augmentation.
        xflip: mirror them at random, also where the data set itself does not.

    Raises:
        ValueError: images of another shape, classes that are not the network's, or latents that are to be augmented or
            mirrored; one line.
    """
    if data.shape != network.image_shape:
        here, there = ("x".join(map(str, shape)) for shape in (data.shape, network.image_shape))
        channels, side = network.img_channels, network.img_resolution
        other = f" --channels {channels}" if data.shape[0] != channels and channels in (1, 3) else ""
        raise ValueError(
            f"real-data must be images like the teacher's: {data.name} has {here}, the teacher makes {there}: ipfm "
            f"dataset {data.name} NEW.zip --resolution {side}{other} makes some of its kind"
        )
    if augment > 0 and data.latents:
        raise ValueError(
            f"augment was given, but {data.name} holds latents, which cannot be turned, stretched or mirrored as "
            "pictures are: leave it out"
        )
    data = replace(data, xflip=data.xflip or xflip)
    if not network.label_dim:
        return replace(data, labels=None, classes=None)
    if data.labels is None:
        raise ValueError(f"real-data {data.name} has no labels, and the teacher takes {network.label_dim} classes")
    known = data.classes or 0
    # Of a part of the classes there may be no image.
    if known > network.label_dim or (known < network.label_dim and data.labels.ndim > 1):
        raise ValueError(f"real-data {data.name} has {known} classes, the teacher takes {network.label_dim}")
    return replace(data, classes=network.label_dim)
