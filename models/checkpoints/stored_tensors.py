"""Tensors of a foreign file, read when they are needed and not before: elements, bounds, and torch's older format."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ipfm.models.checkpoints.pickle_values import DEFAULT_LIMITS, Limits, Table, shown
from ipfm.models.checkpoints.unpickler import RestrictedUnpickler

# What torch's storage classes stand for in a pickle.
STORAGES: Table = {
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "DoubleStorage"): torch.float64,
    ("torch", "HalfStorage"): torch.float16,
    ("torch", "BFloat16Storage"): torch.bfloat16,
    ("torch", "LongStorage"): torch.int64,
    ("torch", "IntStorage"): torch.int32,
    ("torch", "ByteStorage"): torch.uint8,
    ("torch", "BoolStorage"): torch.bool,
}
_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
_MAX_DIMENSIONS = 8
# A file of torch's older format begins with its magic number, pickled. In the blobs that plain pickles hold, so do all
# bytes up to the object itself, always the same.
LEGACY_START = b"\x80\x02\x8a\x0a" + _MAGIC.to_bytes(10, "little") + b"."
BLOB_START = LEGACY_START + (
    b"\x80\x02M\xe9\x03."
    b"\x80\x02}q\x00(X\x10\x00\x00\x00protocol_versionq\x01M\xe9\x03X\r\x00\x00\x00little_endianq\x02\x88"
    b"X\n\x00\x00\x00type_sizesq\x03}q\x04(X\x05\x00\x00\x00shortq\x05K\x02X\x03\x00\x00\x00intq\x06K\x04"
    b"X\x04\x00\x00\x00longq\x07K\x04uu."
)


@dataclass(frozen=True, eq=False)
class Storage:
    """`count` elements of one dtype; `read` gives their bytes, and raises ValueError where they are damaged."""

    dtype: torch.dtype
    count: int
    read: Callable[[], memoryview]

    def open(self) -> "Storage":
        """This storage."""
        return self


class Blob:
    """A storage within a plain pickle: a file of torch's older format in a byte string, looked into by `open`."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._storage: Storage | None = None

    def open(self) -> Storage:
        """The storage.

        Raises:
            ValueError: the bytes are not exactly one.
        """
        if self._storage is None:
            root = read_legacy(self._data, STORAGES, where="a stored tensor")
            if not isinstance(root, Storage):
                raise ValueError(f"a stored tensor holds {shown(root)} instead of its elements")
            self._storage = root
        return self._storage


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor of a file: where its elements lie. Made by `stored_tensor`, which checks the types."""

    storage: Storage | Blob
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def check(self) -> torch.dtype:
        """The dtype.

        Raises:
            ValueError: elements lie outside the storage or upon each other.
        """
        storage = self.storage.open()
        if self.numel == 0:
            return storage.dtype
        last = 0  # the furthest element of the axes seen so far
        for step, size in sorted(zip(self.stride, self.shape, strict=True)):
            if size > 1:
                if step <= last:
                    raise ValueError(f"elements overlap (shape {self.shape}, strides {self.stride})")
                last += (size - 1) * step
        if self.offset + last >= storage.count:
            raise ValueError(
                f"shape {self.shape}, strides {self.stride}, offset {self.offset} reach beyond the "
                f"{storage.count} elements that are stored"
            )
        return storage.dtype

    def load(self, *, widened: bool = False) -> Tensor:
        """A contiguous copy on the CPU, in the dtype of the file.

        Args:
            widened: float16 as float32, without a copy in float16.

        Raises:
            ValueError: as of `check`.
        """
        dtype = self.check()
        if self.numel == 0:
            return torch.empty(self.shape, dtype=torch.float32 if widened and dtype == torch.float16 else dtype)
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        width = 1 if dtype == torch.bool else dtype.itemsize
        content = self.storage.open().read()[width * self.offset : width * (self.offset + last + 1)]
        if widened and dtype == torch.float16:
            wide = np.frombuffer(content, "<f2").astype(np.float32)
            return torch.from_numpy(wide).as_strided(self.shape, self.stride).contiguous()
        raw = bytearray(content)
        if dtype == torch.bool:
            flat = torch.frombuffer(raw, dtype=torch.uint8).ne(0)
        else:
            flat = torch.frombuffer(raw, dtype=dtype)
        return flat.as_strided(self.shape, self.stride).contiguous()


def stored_tensor(storage: object, offset: object, shape: object, stride: object) -> StoredTensor:
    """A `StoredTensor` of what a pickle says.

    Raises:
        ValueError: these are not a storage and whole numbers.
    """
    if not isinstance(storage, (Storage, Blob)):
        raise ValueError(f"a tensor refers to {shown(storage)} instead of a storage")
    sizes = _whole_numbers(shape)
    steps = _whole_numbers(stride)
    if len(sizes) != len(steps):
        raise ValueError(f"a tensor has {len(sizes)} sizes but {len(steps)} strides")
    (start,) = _whole_numbers((offset,))
    return StoredTensor(storage, start, sizes, steps)


def storage_of(described: object, *, fields: int) -> tuple[torch.dtype, str, int]:
    """(dtype, key, element count) of a storage's persistent id, a tuple of `fields` parts.

    Raises:
        ValueError: any other id.
    """
    if not isinstance(described, tuple) or len(described) != fields:
        raise ValueError(f"a storage is described by {shown(described)} instead of {fields} parts")
    kind, dtype, key, location, count = described[:5]
    if kind != "storage" or type(key) is not str or type(location) is not str or any(described[5:]):
        raise ValueError("the description of a storage is damaged")
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"the class of a storage is {shown(dtype)}")
    (number,) = _whole_numbers((count,))
    return dtype, key, number


def read_legacy(data: memoryview, table: Table, *, where: str, limits: Limits = DEFAULT_LIMITS) -> object:
    """The object in a file of torch's older (not zip) format, its storages left where they are.

    Raises:
        ValueError: anything else.
    """
    storages: dict[str, Storage] = {}
    contents: dict[str, memoryview] = {}

    def storage(described: object) -> object:
        if isinstance(described, tuple) and len(described) == 4 and described[0] == "module":
            # This format adds the source text to a class of network parts, which an ordinary global names elsewhere.
            if not isinstance(described[1], type):
                raise ValueError(f"a class is {shown(described[1])}")
            return described[1]
        dtype, key, count = storage_of(described, fields=6)
        known = storages.setdefault(key, Storage(dtype, count, lambda: contents[key]))
        if (known.dtype, known.count) != (dtype, count):
            raise ValueError(f"storage {shown(key)} is described in two ways")
        return known

    reader = RestrictedUnpickler(data, table, where=where, persistent=storage, limits=limits)
    if data[: len(BLOB_START)] == BLOB_START:
        reader.position = len(BLOB_START)
    else:
        magic, version, system = reader.load(), reader.load(), reader.load()
        if magic != _MAGIC or version != _VERSION or not isinstance(system, dict):
            raise ValueError(f"{where}: no file of torch.save")
        if system.get("little_endian") is not True:
            raise ValueError(f"{where}: written on a big-endian machine")
    root, keys = reader.load(), reader.load()
    if type(keys) is not list or not all(type(key) is str for key in keys) or sorted(keys) != sorted(storages):
        raise ValueError(f"{where}: the list of storages is damaged")
    position = reader.position
    for key in keys:
        start = position + 8
        count = int.from_bytes(data[position:start], "little", signed=True)
        position = start + storages[key].count * storages[key].dtype.itemsize
        if count != storages[key].count or position > len(data):
            raise ValueError(f"{where}: storage {shown(key)} is truncated or damaged")
        contents[key] = data[start:position]
    if position != len(data):
        raise ValueError(f"{where}: {len(data) - position} bytes follow the last storage")
    return root


def _whole_numbers(values: object) -> tuple[int, ...]:
    if not isinstance(values, tuple) or len(values) > _MAX_DIMENSIONS:
        raise ValueError(f"{shown(values)} is no shape")
    for value in values:
        if type(value) is not int or not 0 <= value < 1 << 48:
            raise ValueError(f"{shown(value)} cannot be a size or a position")
    return values


def finite_float32(name: str, values: Tensor) -> Tensor:
    """A weight as networks hold it: float16 and bfloat16 are widened.

    Raises:
        ValueError: one line that begins with `name`: another dtype, or a value that is not finite.
    """
    if values.dtype in (torch.float16, torch.bfloat16):
        values = values.float()
    if values.dtype != torch.float32:
        raise ValueError(f"{name} is {values.dtype}; possible: float32, float16, bfloat16")
    if not torch.isfinite(values).all():
        raise ValueError(f"{name} holds values that are not finite")
    return values
