"""EDM2's reference statistics: a pickle of a plain dictionary of NumPy's arrays, read without running anything.

    {"num_images": 50000, "fid": {"mu": (2048,), "sigma": (2048, 2048)}, "fd_dinov2": {"mu": (1024,), "sigma": …}}

all of float64; the covariance divided by n - 1.
"""

from __future__ import annotations

from math import prod
from pathlib import Path

import numpy as np

from ipfm.models.checkpoints.containers import map_file
from ipfm.models.checkpoints.unpickler import Inert, Limits, Table, read_pickle, shown

ENTRIES = {"fid": "inception", "fd_dinov2": "dinov2"}
"""Entry -> name of the features here."""
_LIMITS = Limits(text=1 << 28)
_TYPES: dict[str, np.dtype] = {"f8": np.dtype("<f8"), "f4": np.dtype("<f4"), "i8": np.dtype("<i8")}
_NDARRAY = "numpy.ndarray"


def read_statistics(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """The arrays `mu` and `sigma` by the name of the features: "inception", "dinov2" or both.

    A dictionary with `mu` and `sigma` at its top is taken to be of Inception's.

    Raises:
        ValueError: it holds anything else; one line that names the file.
    """
    try:
        root = read_pickle(map_file(path), _GLOBALS, where=str(path), limits=_LIMITS)
    except ValueError as error:
        said = " ".join(str(error).removeprefix(f"{path}: ").split())
        if any(module in said for module in ("dnnlib", "torch_utils")):
            said = "of a network, it seems; --reference is a data set or statistics, such as img512.pkl"
        raise ValueError(f"{path} is a pickle of other things than statistics: {said}") from None
    found: dict[str, dict[str, np.ndarray]] = {}
    if isinstance(root, dict):
        entries = {"fid": root} if {"mu", "sigma"} <= set(root) else root
        for entry, features in ENTRIES.items():
            if entry in entries:
                found[features] = _arrays(entries[entry], f"{path}: {entry}")
    if not found:
        has = ", ".join(map(shown, list(root)[:4])) if isinstance(root, dict) else shown(root)
        raise ValueError(
            f"{path} is a pickle; statistics are an .npz with mu and sigma, or a .pkl with {' or '.join(ENTRIES)}, and "
            f"it holds {has or 'nothing'}"
        )
    return found


def _arrays(entry: object, where: str) -> dict[str, np.ndarray]:
    arrays = {}
    for name in ("mu", "sigma"):
        value = entry.get(name) if isinstance(entry, dict) else None
        if not isinstance(value, _Array) or value.values is None:
            raise ValueError(f"{where} has no array {name}: statistics are mu (dim,) and sigma (dim, dim)")
        arrays[name] = value.values
    return arrays


class _Dtype(Inert):
    """A NumPy type of plain numbers."""

    def __init__(self, code: str) -> None:
        self.code = code

    def set_state(self, state: object) -> None:
        if type(state) is not tuple or len(state) < 8 or state[1] != "<" or any(state[2:5]):
            raise ValueError("an array of other things than plain numbers")


class _Array(Inert):
    """A NumPy array; without values until its state is set."""

    def __init__(self) -> None:
        self.values: np.ndarray | None = None

    def set_state(self, state: object) -> None:
        if type(state) is not tuple or len(state) != 5:
            raise ValueError("an array is damaged")
        self.fill(*state[1:])

    def fill(self, shape: object, dtype: object, fortran: object, content: object) -> None:
        """Take what the pickle has of it."""
        if type(shape) is not tuple or len(shape) > 4 or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError("an array is damaged")
        if not isinstance(dtype, _Dtype) or type(fortran) is not bool or not isinstance(content, (bytes, memoryview)):
            raise ValueError("an array of other things than plain numbers")
        kind = _TYPES[dtype.code]
        if len(content) != prod(shape) * kind.itemsize:
            raise ValueError(f"an array of shape {shape} has {len(content)} bytes")
        self.values = np.frombuffer(content, kind).reshape(shape, order="F" if fortran else "C")


def _reconstruct(kind: object, shape: object, code: object) -> _Array:
    if kind != _NDARRAY:
        raise ValueError("an array of a foreign kind")
    return _Array()


def _from_buffer(content: object, dtype: object, shape: object, order: object) -> _Array:
    # An array of pickle's protocol 5.
    if order not in ("C", "F"):
        raise ValueError("an array is damaged")
    array = _Array()
    array.fill(shape, dtype, order == "F", content)
    return array


def _dtype(code: object, align: object, copy: object) -> _Dtype:
    if type(code) is not str or code not in _TYPES:
        raise ValueError(f"an array of the type {shown(code)}; possible: {', '.join(_TYPES)}")
    return _Dtype(code)


def _scalar(dtype: object, content: object) -> int | float:
    if not isinstance(dtype, _Dtype) or not isinstance(content, (bytes, memoryview)):
        raise ValueError("a number is damaged")
    kind = _TYPES[dtype.code]
    if len(content) != kind.itemsize:
        raise ValueError("a number is damaged")
    value: int | float = np.frombuffer(content, kind)[0].item()
    return value


def _encode(text: object, encoding: object) -> bytes:
    # How protocols below 3 hold byte strings.
    if type(text) is not str or encoding != "latin1":
        raise ValueError("a byte string is damaged")
    try:
        return text.encode("latin1")
    except UnicodeEncodeError:
        raise ValueError("a byte string is damaged") from None


_GLOBALS: Table = {
    **{
        (f"numpy.{core}.multiarray", name): kind
        for core in ("core", "_core")
        for name, kind in (("_reconstruct", _reconstruct), ("scalar", _scalar))
    },
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
}
