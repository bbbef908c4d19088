"""Latents in the format of EDM2's data sets: an array of NumPy for each picture, mean and deviation of its posterior.

    00000/img-mean-std-00000000.npy …   (8, h, w) float32, the mean's four channels first
    dataset.json                        labels, as of images

in a zip or a folder. A picture's latent is drawn anew at every read, see `ipfm.engine.data.dataset.ImageDataset`.
"""

from __future__ import annotations

import io
import math
import os
import threading
from dataclasses import dataclass, replace
from typing import IO, ClassVar

import numpy as np
import torch
from torch import Tensor

from ipfm.engine.data.dataset import ImageDataset
from ipfm.engine.data.decoding import GO_ON, DecodedImages
from ipfm.engine.data.image_files import ARRAY, ImageFiles, printable
from ipfm.engine.data.image_grid import pixels
from ipfm.models.autoencoder import ENCODED_CHANNELS, LATENT_CHANNELS, Autoencoder

_WANTED = f"latents are ({ENCODED_CHANNELS}, h, w) float32, mean and deviation (ipfm dataset --latents makes them)"
# Python 3.11 parses in one thread at a time: several end in a SystemError now and then, and a header is parsed.
_PARSING = threading.Lock()


def are_latents(files: ImageFiles) -> bool:
    """Whether a set's files are latents, and no images."""
    return os.path.splitext(files.names[0])[1].lower() == ARRAY


def encode_latents(encoded: np.ndarray) -> bytes:
    """The file of (8, h, w) float32, mean and deviation."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(encoded, dtype=np.float32), allow_pickle=False)
    return buffer.getvalue()


def read_shape(files: ImageFiles, name: str) -> tuple[int, int, int]:
    """(8, h, w) of a file, by its header.

    Raises:
        ValueError: it holds no latents; one line that names it.
    """
    with files.open(name) as file:
        return _header(file, files.where(name))[0]


def read_encoded(files: ImageFiles, name: str, shape: tuple[int, int, int]) -> np.ndarray:
    """Mean and deviation of a picture, (8, h, w) float32.

    Raises:
        ValueError: it is not of this shape, damaged, or not finite; one line that names it.
    """
    where = files.where(name)
    with files.open(name) as file:
        found, dtype, fortran = _header(file, where)
        if found != shape:
            raise ValueError(f"{where} holds latents {_times(found)}, the data set's first {_times(shape)}")
        size = math.prod(shape) * dtype.itemsize
        data = file.read(size + 1)
    if len(data) != size:
        raise ValueError(f"{where} is {'shorter' if len(data) < size else 'longer'} than its header says{GO_ON}")
    values = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C").astype(np.float32)
    if not np.isfinite(values).all() or (values[ENCODED_CHANNELS // 2 :] < 0).any():
        raise ValueError(f"{where} holds numbers that are not finite, or negative deviations; {_WANTED}{GO_ON}")
    return values


def _header(file: IO[bytes], where: str) -> tuple[tuple[int, int, int], np.dtype, bool]:
    """(shape, dtype, whether it is stored by columns) of latents."""
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        with _PARSING:
            shape, fortran, dtype = read(file)
    except (ValueError, OSError, EOFError, TypeError, SyntaxError, RecursionError) as error:
        said = printable(" ".join(str(error).split())[:120])
        raise ValueError(f"{where} is no array of NumPy that can be read: {said}; {_WANTED}{GO_ON}") from None
    if len(shape) != 3 or shape[0] != ENCODED_CHANNELS or 0 in shape or dtype not in (np.float32, np.float16):
        # All others of such a set are so too: there is nothing to go on with.
        drawn = len(shape) == 3 and shape[0] == LATENT_CHANNELS
        said = f"; {LATENT_CHANNELS} channels are a mean alone, or latents that were drawn already" if drawn else GO_ON
        raise ValueError(f"{where} is an array {tuple(shape)} of {printable(str(dtype))[:60]}; {_WANTED}{said}")
    if shape[1] != shape[2]:
        raise ValueError(f"{where} holds latents {shape[1]}x{shape[2]}, but they must be square{GO_ON}")
    return shape, dtype, fortran


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


@dataclass(frozen=True, eq=False)
class EncodedImages(DecodedImages):
    """The same source of latents: (N, 8, h, w) float32, mean and deviation."""

    dtype: ClassVar[type[np.generic]] = np.float32

    def one(self, name: str) -> np.ndarray:
        """See `DecodedImages.one`."""
        return read_encoded(self.files, name, self.size)


@dataclass(frozen=True, eq=False)
class DecodedLatents:
    """An `ipfm.engine.data.dataset.ImageSource` of the pictures of latents, which are decoded when they are asked for.

    Args:
        latents: data set of latents.
        autoencoder: what decodes them.
        device: where `read` puts the pictures.
    """

    latents: ImageDataset
    autoencoder: Autoencoder
    device: torch.device = torch.device("cpu")  # noqa: RUF009  immutable

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, 3, H, W)."""
        return (len(self.latents), *self.autoencoder.shape_of_pictures(self.latents.shape))

    def to(self, device: torch.device | str) -> DecodedLatents:
        """The same pictures, read to `device`."""
        return replace(self, device=torch.device(device))

    def read(self, indices: Tensor) -> Tensor:
        """Pictures `indices` (B,) int64 on the CPU: (B, 3, H, W) uint8."""
        return pixels(self.autoencoder.decode(self.latents.at(indices))).to(self.device)


def decoded(data: ImageDataset, autoencoder: Autoencoder) -> ImageDataset:
    """The pictures of a data set of latents, with its labels; each of one sample, always the same one."""
    source = DecodedLatents(data, autoencoder)
    return ImageDataset(source, data.labels, data.name, classes=data.classes, remarks=data.remarks)
