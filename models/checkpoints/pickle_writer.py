"""Pickles of plain values, and of calls of functions that are known by name alone and need not exist here."""

import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any


@dataclass(frozen=True)
class Global:
    """Something of a module, by its name."""

    module: str
    name: str


@dataclass(frozen=True, eq=False)
class Call:
    """A function's result."""

    function: Global
    arguments: tuple[object, ...]


@dataclass(frozen=True, eq=False)
class Made:
    """An object of a class, made without arguments, and then its state."""

    kind: Global
    state: dict[str, object]


@dataclass(frozen=True, eq=False)
class Built:
    """A function's result, and then its state."""

    call: Call
    state: object


@dataclass(frozen=True, eq=False)
class Parts:
    """Bytes, in parts that are not put together."""

    parts: tuple[bytes | memoryview, ...]


def write_pickle(root: object, file: IO[bytes]) -> None:
    """Write a pickle of protocol 4.

    Args:
        root: None, booleans, numbers, texts, bytes, the classes of this module, and tuples, lists, dictionaries and
            empty ordered dictionaries and sets of them.
        file: an open binary file.

    Raises:
        TypeError: there is something else in it.
        OSError: the disk refuses.
    """
    file.write(pickle.PROTO + b"\x04")
    _Writer(file.write).write(root)
    file.write(pickle.STOP)


class _Writer:
    """Texts and names are written once; where they come again, they are referred to by the order of their writing."""

    def __init__(self, put: Callable[[bytes | memoryview], object]) -> None:
        self._put = put
        self._known: dict[str | Global, int] = {}

    def write(self, value: Any) -> None:
        kind = type(value)
        if value is None or kind is bool:
            self._put({None: pickle.NONE, True: pickle.NEWTRUE, False: pickle.NEWFALSE}[value])
        elif kind is str or kind is Global:
            self._write_shared(value)
        elif kind is int:
            self._put(pickle.BININT + struct.pack("<i", value) if -(1 << 31) <= value < 1 << 31 else _long(value))
        elif kind is float:
            self._put(pickle.BINFLOAT + struct.pack(">d", value))
        elif kind is tuple:
            self._put(pickle.MARK)
            for item in value:
                self.write(item)
            self._put(pickle.TUPLE)
        elif kind is list:
            self._put(pickle.EMPTY_LIST + pickle.MARK)
            for item in value:
                self.write(item)
            self._put(pickle.APPENDS)
        elif kind is dict:
            self._put(pickle.EMPTY_DICT + pickle.MARK)
            for key, item in value.items():
                self.write(key)
                self.write(item)
            self._put(pickle.SETITEMS)
        elif kind is set and not value:
            self._put(pickle.EMPTY_SET)
        elif kind is bytes:
            self._put(pickle.BINBYTES + struct.pack("<I", len(value)) + value)
        elif kind is OrderedDict and not value:
            self.write(Call(Global("collections", "OrderedDict"), ()))
        elif kind is Call:
            self.write(value.function)
            self.write(value.arguments)
            self._put(pickle.REDUCE)
        elif kind is Built:
            self.write(value.call)
            self.write(value.state)
            self._put(pickle.BUILD)
        elif kind is Made:
            self.write(value.kind)
            self._put(pickle.EMPTY_TUPLE + pickle.NEWOBJ)
            self.write(value.state)
            self._put(pickle.BUILD)
        elif kind is Parts:
            self._put(pickle.BINBYTES8 + struct.pack("<Q", sum(map(len, value.parts))))
            for part in value.parts:
                self._put(part)
        else:
            raise TypeError(f"{kind.__name__} cannot be written")

    def _write_shared(self, value: str | Global) -> None:
        if (number := self._known.get(value)) is not None:
            self._put(pickle.LONG_BINGET + struct.pack("<I", number))
            return
        if isinstance(value, Global):
            self.write(value.module)
            self.write(value.name)
            self._put(pickle.STACK_GLOBAL)
        else:
            text = value.encode()
            self._put(pickle.BINUNICODE + struct.pack("<I", len(text)) + text)
        self._known[value] = len(self._known)
        self._put(pickle.MEMOIZE)


def _long(value: int) -> bytes:
    width = value.bit_length() // 8 + 1
    return pickle.LONG1 + bytes([width]) + value.to_bytes(width, "little", signed=True)
