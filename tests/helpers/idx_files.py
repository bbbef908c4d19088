"""Small sets in MNIST's format: random pictures of a few classes that a classifier can tell."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np


def write_idx(
    folder: Path, *, train: int = 40, test: int = 12, side: int = 28, classes: int = 10, seed: int = 0
) -> Path:
    """The four files of a set in `folder`, packed; class k is a bright row at height k among noise."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for part, count in (("train", train), ("t10k", test)):
        labels = np.arange(count, dtype=np.uint8) % classes
        pixels = rng.integers(0, 60, (count, side, side), dtype=np.uint8)
        pixels[np.arange(count), labels * 2 + 2] = 250
        images = struct.pack(">IIII", 0x803, *pixels.shape) + pixels.tobytes()
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images, 1))
        about = struct.pack(">II", 0x801, count) + labels.tobytes()
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(about, 1))
    return folder
