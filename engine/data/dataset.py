"""Images with labels, served in an order that is a pure function of (seed, step, sample index).

The order depends neither on the number of ranks nor on the micro-batch, and a resumed run has nothing to restore.
Images lie in memory, or in files that are decoded batch by batch; `ipfm.engine.data.open_dataset` opens either.
"""

import contextlib
import importlib.util
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ipfm.engine.random_streams import Stream
from ipfm.kernels import philox
from ipfm.models.autoencoder import ENCODED_CHANNELS, LATENT_CHANNELS, latents_of


class Batch(NamedTuple):
    """Some of the images, with their labels.

    Attributes:
        images: (B, C, H, W) float32 in [-1, 1]; latents have no such range.
        labels: (B, classes) float32: one-hot, or the vectors that the dataset holds; None without labels.
    """

    images: Tensor
    labels: Tensor | None


class ImageSource(Protocol):
    """N images that are not in memory, all of one shape."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W)."""

    @property
    def device(self) -> torch.device:
        """Where `read` puts the images."""

    def to(self, device: torch.device | str) -> "ImageSource":
        """The same images, read to `device`."""

    def read(self, indices: Tensor) -> Tensor:
        """Images `indices` (B,) int64 on the CPU: (B, C, H, W) uint8, or float32 of latents.

        Raises:
            ValueError: one line naming the bad file.
        """


@runtime_checkable
class LeavesOut(Protocol):
    """A source that reads another image where a file cannot be read."""

    def served(self, indices: Tensor) -> Tensor:
        """The numbers of the images that `read` gave for `indices` (B,)."""


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """N images (N, C, H, W) and, optionally, their labels.

    Args:
        images: uint8 or float32, or a source of uint8, or of float32 for latents.
        labels: (N,) integers from 0, the classes; or (N, K) floating-point vectors, which networks are given as they
            are.
        name: of the dataset, for messages.
        value_range: the values that stand for -1 and 1; (0, 255) for uint8 and (-1, 1) for float32 when None.
        classes: the width of a label; the largest class + 1, or K, when None.
        xflip: mirror each image with probability ½, drawn anew in every epoch, a function of (seed, position); EDM's
            datasets hold a mirrored copy of every image instead, so that an epoch is twice as long.
        remarks: what opening it said on stderr, for the JSON of commands.
        latents: the images are latents of an autoencoder: (N, 8, H, W) float32 are mean and deviation, of which every
            read draws a sample; (N, 4, H, W) are samples themselves. Either way an image is (4, H, W).

    Raises:
        ValueError: wrong shapes or dtypes, no images, values outside of the range, labels outside of the classes or not
            finite.
    """

    images: Tensor | ImageSource
    labels: Tensor | None = None
    name: str = "images"
    value_range: tuple[float, float] | None = None
    classes: int | None = None
    xflip: bool = False
    remarks: tuple[str, ...] = ()
    latents: bool = False
    _epochs: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self._check_images()
        self._check_labels()

    def _check_images(self) -> None:
        images, shape = self.images, tuple(self.images.shape)
        if len(shape) != 4 or 0 in shape:
            raise ValueError(f"{self.name}: images must have shape (N, C, H, W) with N > 0, got {shape}")
        if self.latents:
            self._check_latents(shape)
            return
        dtype = images.dtype if isinstance(images, Tensor) else torch.uint8
        if dtype not in (torch.uint8, torch.float32):
            raise ValueError(f"{self.name}: images must be uint8 or float32, got {dtype}")
        if self.value_range is None:
            object.__setattr__(self, "value_range", (0.0, 255.0) if dtype == torch.uint8 else (-1.0, 1.0))
        assert self.value_range is not None
        low, high = self.value_range
        if not low < high:
            raise ValueError(f"{self.name}: value_range must increase, got {self.value_range}")
        if dtype == torch.uint8 and low <= 0 and high >= 255:
            return
        if not isinstance(images, Tensor):
            raise ValueError(
                f"{self.name}: images in files have the values 0 to 255, got value_range {low:g} to {high:g}"
            )
        smallest, largest = images.min().item(), images.max().item()
        if not (low <= smallest and largest <= high):  # written so that NaN fails too
            raise ValueError(
                f"{self.name}: values must lie in [{low:g}, {high:g}], got {smallest:.7g} to {largest:.7g}"
            )

    def _check_latents(self, shape: tuple[int, ...]) -> None:
        if shape[1] not in (LATENT_CHANNELS, ENCODED_CHANNELS):
            raise ValueError(
                f"{self.name}: latents have {LATENT_CHANNELS} channels, or {ENCODED_CHANNELS} of mean and deviation, "
                f"got {shape[1]}"
            )
        if self.value_range is not None:
            raise ValueError(f"{self.name}: latents have no range of values, got value_range {self.value_range}")
        if self.xflip:
            raise ValueError(
                f"{self.name} holds latents, and a mirrored latent is not that of the mirrored picture: leave xflip "
                "out, or mirror the pictures before they are encoded"
            )
        if isinstance(self.images, Tensor) and (
            self.images.dtype != torch.float32 or not bool(self.images.isfinite().all())
        ):
            raise ValueError(f"{self.name}: latents must be finite float32")

    def _check_labels(self) -> None:
        labels, n = self.labels, len(self)
        if labels is None:
            if self.classes is not None:
                raise ValueError(f"{self.name}: {self.classes} classes were given without labels")
            return
        vectors = labels.ndim == 2 and labels.is_floating_point() and labels.shape[1] > 0
        numbers = labels.ndim == 1 and not labels.is_floating_point() and not labels.is_complex()
        if not (vectors or numbers) or len(labels) != n:
            raise ValueError(
                f"{self.name}: labels must be integers of shape ({n},) or floats of shape ({n}, K), "
                f"got {labels.dtype} {tuple(labels.shape)}"
            )
        if vectors:
            self._check_vectors(labels)
            return
        smallest, largest = int(labels.min()), int(labels.max())
        if self.classes is None:
            object.__setattr__(self, "classes", largest + 1)
        assert self.classes is not None
        if smallest < 0 or largest >= self.classes:
            raise ValueError(
                f"{self.name}: labels must lie in 0…{self.classes - 1}, got values from {smallest} to {largest}"
            )
        object.__setattr__(self, "labels", labels.to(self.device, torch.int64))

    def _check_vectors(self, labels: Tensor) -> None:
        width = labels.shape[1]
        if self.classes not in (None, width):
            raise ValueError(f"{self.name}: labels are {width} numbers wide, but {self.classes} classes were given")
        if not labels.isfinite().all():
            raise ValueError(f"{self.name}: labels must be finite numbers")
        object.__setattr__(self, "classes", width)
        object.__setattr__(self, "labels", labels.to(self.device, torch.float32))

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        _, channels, height, width = self.images.shape
        channels = LATENT_CHANNELS if self.latents else channels
        return channels, height, width

    @property
    def device(self) -> torch.device:
        """Where batches are made."""
        return self.images.device

    def to(self, device: torch.device | str) -> "ImageDataset":
        """The same dataset on `device`, where its batches are then made; images in files stay there."""
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, images=self.images.to(device), labels=labels)

    def take(self, first: int, count: int) -> Tensor:
        """Images first … first+count-1 as stored, (count, C, H, W) float32 in [-1, 1].

        Of latents that are stored as mean and deviation, one sample for each image, always the same one.

        Raises:
            ValueError: there are no such images.
        """
        if not (first >= 0 and count > 0 and first + count <= len(self)):
            raise ValueError(f"{self.name} has {len(self)} images, got first={first}, count={count}")
        return self.at(torch.arange(first, first + count))

    def at(self, numbers: Tensor) -> Tensor:
        """Images of these `numbers` (B,) int64 on the CPU, each in 0…N-1, as of `take`."""
        images = self.images
        stored = images[numbers.to(images.device)] if isinstance(images, Tensor) else images.read(numbers)
        return self._normalised(stored, numbers, seed=0, step=0)

    def batch(self, step: int, sample_index: Tensor, *, batch_size: int, seed: int) -> Batch:
        """The samples with the global indices `sample_index` (B,) int64 of the batch of `step`.

        Sample i of step s is number p = s·batch_size + i of the stream; epoch p // N is one random permutation of all
        N images, so that each image comes once an epoch. A batch may reach over the end of an epoch.

        Args:
            step: of the training, >= 0.
            sample_index: (B,) int64 in 0…batch_size-1. It may lie on a GPU: nothing is read back to the host (and its
                range is then not checked), but for images in files, whose numbers the host has to know.
            batch_size: of all ranks together, >= 1.
            seed: of the order, of the mirroring and of the samples of latents.

        Raises:
            ValueError: step < 0, batch_size < 1, indices of the wrong shape or dtype or out of their range.
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
        position = sample_index.to(self.device) + (start - first_epoch * len(self))
        chosen = torch.cat(orders)[position]
        stored = self.images
        found = stored[chosen] if isinstance(stored, Tensor) else stored.read(chosen.cpu())
        images = self._normalised(found, sample_index, seed=seed, step=step)
        if self.xflip:
            mirrored = torch.cat(flips)[position]
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        if isinstance(stored, LeavesOut):
            chosen = stored.served(chosen)
        labels = None if self.labels is None else self.labels[chosen]
        if labels is not None and labels.ndim == 1:
            assert self.classes is not None
            # F.one_hot would read the largest label back from the GPU.
            labels = (labels[:, None] == torch.arange(self.classes, device=self.device)).to(torch.float32)
        return Batch(images, labels)

    def _normalised(self, images: Tensor, index: Tensor, *, seed: int, step: int) -> Tensor:
        """Images as networks get them; of latents samples, whose noise is a function of seed, step and `index`."""
        if self.latents:
            images = images.to(torch.float32)
            if images.shape[1] == LATENT_CHANNELS:
                return images
            count, (channels, height, width) = len(images), self.shape
            noise = philox.normal(
                index.to(images.device), channels * height * width, seed=seed, stream=Stream.DATA_LATENT, step=step
            )
            return latents_of(images, noise.reshape(count, channels, height, width))
        assert self.value_range is not None
        low, high = self.value_range
        if (low, high) == (-1, 1):
            return images.to(torch.float32)
        return (images.to(torch.float32) - low) / ((high - low) / 2) - 1

    def _epoch(self, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Order (N,) int64 and mirror flags (N,) bool of an epoch, on the dataset's device; the last two are kept."""
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
            self._epochs[key] = (order.to(self.device), mirrored.to(self.device))
        return self._epochs[key]


def digits() -> ImageDataset:
    """The 1797 handwritten digits that scikit-learn carries: (1797, 1, 8, 8), 0…16 mapped to v/8 - 1, labels 0…9.

    Source: UCI "Optical Recognition of Handwritten Digits", test part.

    Raises:
        RuntimeError: scikit-learn is not installed.
    """
    table = _digits_table()
    images = torch.from_numpy(table[:, :64]).to(torch.float32).reshape(-1, 1, 8, 8)
    labels = torch.from_numpy(table[:, 64]).to(torch.int64)
    return ImageDataset(images / 8 - 1, labels, name="digits", classes=10)


def _digits_table() -> np.ndarray:
    """(1797, 65): 64 values and the label of each digit.

    Read from scikit-learn's file where it lies as expected, as importing scikit-learn takes most of a second.
    """
    spec = importlib.util.find_spec("sklearn")
    for folder in (spec and spec.submodule_search_locations) or ():
        with contextlib.suppress(OSError, EOFError, ValueError, zlib.error):
            path = Path(folder) / "datasets" / "data" / "digits.csv.gz"
            table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
            if table.shape == (1797, 65):
                return table
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise RuntimeError("the digits come with scikit-learn, which is missing: pip install scikit-learn") from error
    bunch = load_digits()
    return np.column_stack((bunch.data, bunch.target))
