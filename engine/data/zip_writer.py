"""A data set written in the format of EDM's data sets.

    00000/img00000000.png …   uncompressed PNGs, 8-bit grey or RGB, square and all alike; five digits of eight a folder
    dataset.json              {"labels": [["00000/img00000000.png", 6], …]}, or {"labels": null}

or, in the format of EDM2's latents, 00000/img-mean-std-00000000.npy in the place of the PNGs;

all of it is stored, not deflated, so that an image is read by one copy. The same images give the same bytes.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from torch import Tensor

from ipfm.engine.data.image_files import LABEL_FILE
from ipfm.models.atomic_files import atomic_write


def image_name(index: int) -> str:
    """Name of image `index` in a data set's zip."""
    number = f"{index:08d}"
    return f"{number[:5]}/img{number}.png"


def latent_name(index: int) -> str:
    """Name of the latents of image `index` in a data set's zip."""
    number = f"{index:08d}"
    return f"{number[:5]}/img-mean-std-{number}.npy"


def encode_png(pixels: np.ndarray) -> bytes:
    """An uncompressed PNG of (C, H, W) uint8, C = 1 or 3."""
    from PIL import Image

    image = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=0, optimize=False)
    return buffer.getvalue()


def write_dataset_zip(
    path: Path, images: Iterable[bytes], labels: Tensor | None, name: Callable[[int], str] = image_name
) -> None:
    """Write `images`, in their order, and their labels to `path`; an existing file is replaced whole or not at all.

    Args:
        path: the zip.
        images: the files of the images; whatever they raise passes through.
        labels: (N,) integers, (N, K) floats or None.
        name: of the file of an image, by its number.

    Raises:
        ValueError: the images are fewer or more than the labels; nothing is left behind.
        OSError: the disk refuses; nothing is left behind.
    """
    with atomic_write(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as target:
        names = []
        for index, image in enumerate(images):
            names.append(name(index))
            _add(target, names[-1], image)
        if labels is not None and len(labels) != len(names):
            raise ValueError(f"{path}: {len(names)} images were given with {len(labels)} labels")
        pairs = None if labels is None else list(zip(names, labels.tolist(), strict=True))
        _add(target, LABEL_FILE, json.dumps({"labels": pairs}).encode())


def _add(target: zipfile.ZipFile, name: str, data: bytes) -> None:
    # The earliest date that a zip knows, and the usual permissions, in place of today's.
    info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    info.external_attr = 0o644 << 16
    info.create_system = 3
    target.writestr(info, data)
