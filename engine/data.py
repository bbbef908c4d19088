"""Images in memory, served in an order that is a pure function of (seed, step, sample index).

The order depends neither on the number of ranks nor on the micro-batch, and a resumed run has nothing to restore.
"""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Batch(NamedTuple):
    """`images` (B, C, H, W) float32 in [-1, 1]; `labels` (B, classes) float32 one-hot, None without labels."""

    images: Tensor
    labels: Tensor | None


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """N images (N, C, H, W) and, optionally, their classes.

    `images`: uint8 or float32. `value_range`: the values that stand for -1 and 1; (0, 255) for uint8 and (-1, 1) for
    float32 when None. `labels`: (N,) integers from 0. `classes`: how many there are; the largest label + 1 when None.
    `xflip`: mirror each image with probability ½, drawn anew in every epoch, a function of (seed, position).

    ValueError: wrong shapes or dtypes, no images, values outside of the range, labels outside of the classes.
    """

    images: Tensor
    labels: Tensor | None = None
    name: str = "images"
    value_range: tuple[float, float] | None = None
    classes: int | None = None
    xflip: bool = False
    _epochs: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.ndim != 4 or images.numel() == 0:
            raise ValueError(f"{self.name}: images must have shape (N, C, H, W) with N > 0, got {tuple(images.shape)}")
        if images.dtype not in (torch.uint8, torch.float32):
            raise ValueError(f"{self.name}: images must be uint8 or float32, got {images.dtype}")
        if self.value_range is None:
            object.__setattr__(self, "value_range", (0.0, 255.0) if images.dtype == torch.uint8 else (-1.0, 1.0))
        assert self.value_range is not None
        low, high = self.value_range
        if not low < high:
            raise ValueError(f"{self.name}: value_range must increase, got {self.value_range}")
        smallest, largest = images.min().item(), images.max().item()
        if not (low <= smallest and largest <= high):  # written so that NaN fails too
            raise ValueError(
                f"{self.name}: values must lie in [{low:g}, {high:g}], got {smallest:.7g} to {largest:.7g}"
            )

        if labels is None:
            if self.classes is not None:
                raise ValueError(f"{self.name}: {self.classes} classes were given without labels")
            return
        if labels.shape != (len(images),) or labels.is_floating_point() or labels.is_complex():
            raise ValueError(
                f"{self.name}: labels must be integers of shape ({len(images)},), "
                f"got {labels.dtype} {tuple(labels.shape)}"
            )
        smallest, largest = int(labels.min()), int(labels.max())
        if self.classes is None:
            object.__setattr__(self, "classes", largest + 1)
        assert self.classes is not None
        if smallest < 0 or largest >= self.classes:
            raise ValueError(
                f"{self.name}: labels must lie in 0…{self.classes - 1}, got values from {smallest} to {largest}"
            )
        object.__setattr__(self, "labels", labels.to(images.device, torch.int64))

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def to(self, device: torch.device | str) -> "ImageDataset":
        """The same dataset on `device`; batches are made where the images are."""
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, images=self.images.to(device), labels=labels)

    def take(self, first: int, count: int) -> Tensor:
        """Images first … first+count-1 as stored, (count, C, H, W) float32 in [-1, 1]. ValueError: out of range."""
        if not (first >= 0 and count > 0 and first + count <= len(self)):
            raise ValueError(f"{self.name} has {len(self)} images, got first={first}, count={count}")
        return self._normalised(self.images[first : first + count])

    def batch(self, step: int, sample_index: Tensor, *, batch_size: int, seed: int) -> Batch:
        """The samples with the global indices `sample_index` (B,) int64 of the batch of `step`.

        Sample i of step s is number p = s·batch_size + i of the stream; epoch p // N is one random permutation of all
        N images, so that each image comes once an epoch. A batch may reach over the end of an epoch. `sample_index`
        may lie on a GPU: nothing is read back to the host (and its range is then not checked).

        ValueError: step < 0, batch_size < 1, indices of the wrong shape or dtype or outside of 0…batch_size-1.
        """
        if step < 0 or batch_size < 1:
            raise ValueError(f"step must not be negative and batch_size positive, got {step} and {batch_size}")
        if sample_index.ndim != 1 or sample_index.dtype != torch.int64:
            raise ValueError(
                f"sample_index must be int64 of shape (B,), got {sample_index.dtype} {tuple(sample_index.shape)}"
            )
        if sample_index.device.type == "cpu" and sample_index.numel():
            low, high = int(sample_index.min()), int(sample_index.max())
            if low < 0 or high >= batch_size:
                raise ValueError(f"sample_index must lie in 0…{batch_size - 1}, got {low} to {high}")

        # The epochs that this step touches follow from host integers alone, whatever the indices are.
        start = step * batch_size
        first_epoch, last_epoch = start // len(self), (start + batch_size - 1) // len(self)
        orders, flips = zip(*(self._epoch(seed, epoch) for epoch in range(first_epoch, last_epoch + 1)), strict=True)
        position = sample_index.to(self.images.device) + (start - first_epoch * len(self))
        chosen = torch.cat(orders)[position]
        images = self._normalised(self.images[chosen])
        if self.xflip:
            mirrored = torch.cat(flips)[position]
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        labels = None
        if self.labels is not None and self.classes is not None:
            # F.one_hot would read the largest label back from the GPU.
            classes = torch.arange(self.classes, device=self.images.device)
            labels = (self.labels[chosen][:, None] == classes).to(torch.float32)
        return Batch(images, labels)

    def _normalised(self, images: Tensor) -> Tensor:
        assert self.value_range is not None
        low, high = self.value_range
        if (low, high) == (-1, 1):
            return images.to(torch.float32)
        return (images.to(torch.float32) - low) / ((high - low) / 2) - 1

    def _epoch(self, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Order (N,) int64 and mirror flags (N,) bool of an epoch, on the images' device; the last two are kept."""
        key = (seed, epoch)
        if key not in self._epochs:
            # Drawn on the CPU, whose generator gives the same numbers everywhere. It uses 32 bits of its seed; the
            # hash keeps (seed, epoch) and (seed + 1, epoch - 1) apart.
            state = np.random.SeedSequence((seed % 2**64, epoch)).generate_state(1)
            generator = torch.Generator().manual_seed(int(state[0]))
            order = torch.randperm(len(self), generator=generator)
            mirrored = torch.rand(len(self), generator=generator) < 0.5
            while len(self._epochs) >= 2:
                self._epochs.pop(next(iter(self._epochs)))
            self._epochs[key] = (order.to(self.images.device), mirrored.to(self.images.device))
        return self._epochs[key]


def digits() -> ImageDataset:
    """The 1797 handwritten digits that scikit-learn carries: (1797, 1, 8, 8), 0…16 mapped to v/8 - 1, labels 0…9.

    Source: UCI "Optical Recognition of Handwritten Digits", test part. RuntimeError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise RuntimeError("the digits come with scikit-learn, which is missing: pip install scikit-learn") from error
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).to(torch.float32).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    return ImageDataset(images / 8 - 1, labels, name="digits", classes=10)
