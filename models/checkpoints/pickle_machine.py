"""The stack machine that a pickle is a program for, with the instructions that plain data and checkpoints use."""

import struct
from collections.abc import Callable
from types import FunctionType

from ipfm.models.checkpoints.pickle_values import Inert, Limits, Table, check_key, shown
from ipfm.models.checkpoints.recognise import what_global


class PickleMachine:
    """State and instructions; see `RestrictedUnpickler`, which runs them.

    For a damaged pickle an instruction raises ValueError, IndexError or KeyError, and nothing else.
    """

    def __init__(
        self,
        data: memoryview,
        table: Table,
        persistent: Callable[[object], object] | None,
        encoding: str,
        limits: Limits,
    ) -> None:
        self.position = 0
        self._data = data
        self._size = len(data)
        self._table = table
        self._persistent = persistent
        self._encoding = encoding
        self._limits = limits
        self._stack: list[object] = []
        self._outer: list[list[object]] = []
        self._memo: dict[int, object] = {}

    # -- pieces -----------------------------------------------------------------------------------------------------

    def _take(self, count: int) -> memoryview:
        start, end = self.position, self.position + count
        if end > self._size:
            raise ValueError(f"the pickle is truncated: {count} bytes should follow, {self._size - start} do")
        self.position = end
        return self._data[start:end]

    def _next(self) -> int:
        position = self.position
        self.position = position + 1
        return self._data[position]

    def _number(self, width: int, *, signed: bool = False) -> int:
        return int.from_bytes(self._take(width), "little", signed=signed)

    def _text(self, count: int) -> str:
        if count > self._limits.text:
            raise ValueError(f"a string of {count} bytes is longer than the limit of {self._limits.text}")
        try:
            return str(self._take(count), "utf-8")
        except UnicodeDecodeError:
            raise ValueError("a string is not UTF-8") from None

    def _line(self) -> str:
        start = self.position
        line, newline, _ = bytes(self._data[start : start + 256]).partition(b"\n")
        if not newline or not line.isascii():
            raise ValueError("the name of a global is damaged")
        self.position = start + len(line) + 1
        return line.decode("ascii")

    def _items(self) -> list[object]:
        """What was pushed since the last mark, which is taken off."""
        items, self._stack = self._stack, self._outer.pop()
        return items

    def _global(self, module: object, name: object) -> None:
        # Both checked to be text first: nothing else is ever hashed.
        if type(module) is not str or type(name) is not str:
            raise ValueError("the name of a global is damaged")
        found = self._table.get((module, name), _MISSING)
        if found is _MISSING:
            asked = shown(f"{module}.{name}")
            raise ValueError(f"the file asks for {asked}, which is not admitted{what_global(module, name)}")
        self._stack.append(found)

    def _remember(self, index: int) -> None:
        if index in self._memo or index > 2 * self._limits.operations:
            raise ValueError(f"the pickle is damaged: it stores number {index} twice or out of range")
        self._memo[index] = self._stack[-1]

    # -- instructions -----------------------------------------------------------------------------------------------

    def _proto(self) -> None:
        version = self._next()
        if version > 5:
            raise ValueError(f"the pickle is of protocol {version}; what can be read: up to 5")

    def _frame(self) -> None:
        length = self._number(8)
        if length > self._size - self.position:
            raise ValueError(f"the pickle is truncated: {length} bytes should follow")

    def _mark(self) -> None:
        if len(self._outer) >= self._limits.depth:
            raise ValueError(f"the pickle nests deeper than {self._limits.depth} levels")
        self._outer.append(self._stack)
        self._stack = []

    def _drop(self, what: object) -> None:
        """Nothing is done with what was taken off the stack."""

    def _memoize(self) -> None:
        memo = self._memo
        if (index := len(memo)) in memo:
            raise ValueError("the pickle is damaged: it mixes two ways of numbering")
        memo[index] = self._stack[-1]

    def _get_short(self) -> None:
        self._stack.append(self._memo[self._next()])

    def _get_long(self) -> None:
        self._stack.append(self._memo[self._number(4)])

    def _float(self) -> None:
        self._stack.append(struct.unpack(">d", self._take(8))[0])

    def _long(self) -> None:
        width = self._next()
        if width > 16:
            raise ValueError(f"an integer of {width} bytes is too large")
        self._stack.append(self._number(width, signed=True))

    def _python2_string(self, count: int) -> None:
        if count < 0:
            raise ValueError("the pickle is damaged: a string of negative length")
        raw = bytes(self._take(count))
        try:
            self._stack.append(raw if self._encoding == "bytes" else raw.decode(self._encoding))
        except UnicodeDecodeError:
            raise ValueError(f"a string is not {self._encoding}") from None

    def _empty_tuple(self) -> None:
        self._stack.append(())

    def _tuple(self) -> None:
        items = self._items()
        self._stack.append(tuple(items))

    def _tuple1(self) -> None:
        stack = self._stack
        stack[-1] = (stack[-1],)

    def _tuple_of(self, count: int) -> None:
        stack = self._stack
        if len(stack) < count:
            raise IndexError
        stack[-count:] = [tuple(stack[-count:])]

    def _append(self, items: list[object]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise ValueError(f"the pickle is damaged: it appends to {shown(target)}")
        target.extend(items)

    def _set_items(self, items: list[object]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict):
            raise ValueError(f"the pickle is damaged: it sets an item of {shown(target)}")
        if len(items) % 2:
            raise ValueError("the pickle is damaged: a key without a value")
        keys = items[::2]
        for key in keys:
            check_key(key)
        size = len(target) + len(keys)
        target.update(zip(keys, items[1::2], strict=True))
        if len(target) != size:
            raise ValueError("the pickle is damaged: a dictionary has one key twice")

    def _add_items(self) -> None:
        items = self._items()
        target = self._stack[-1]
        if type(target) is not set:
            raise ValueError(f"the pickle is damaged: it adds to {shown(target)}")
        for item in items:
            check_key(item)
        target.update(items)

    def _reduce(self) -> None:
        stack = self._stack
        arguments, function = stack.pop(), stack[-1]
        if type(function) is not FunctionType or type(arguments) is not tuple:
            raise ValueError(f"the pickle is damaged: it calls {shown(function)}")
        code = function.__code__
        least = code.co_argcount - len(function.__defaults__ or ())
        if not least <= len(arguments) <= code.co_argcount:
            raise ValueError(f"{shown(function)} is called with {len(arguments)} arguments")
        stack[-1] = function(*arguments)

    def _new(self) -> None:
        stack = self._stack
        arguments, kind = stack.pop(), stack[-1]
        if not isinstance(kind, type) or not issubclass(kind, Inert) or arguments != ():
            raise ValueError(f"the pickle is damaged: it makes an object of {shown(kind)}")
        stack[-1] = kind()

    def _build(self) -> None:
        stack = self._stack
        state, target = stack.pop(), stack[-1]
        if not isinstance(target, Inert):
            raise ValueError(f"the file sets the state of {shown(target)}, which is not admitted")
        target.set_state(state)

    def _persistent_id(self) -> None:
        if self._persistent is None:
            raise ValueError("the file refers to a persistent object, which a plain pickle cannot")
        self._stack[-1] = self._persistent(self._stack[-1])

    def _refuse(self) -> None:
        import pickletools

        code = chr(self._data[self.position - 1])
        name = next((opcode.name for opcode in pickletools.opcodes if opcode.code == code), ascii(code))
        raise ValueError(f"the pickle holds {name}, an instruction not admitted")


STOP = ord(".")
_MISSING = object()


def _push(value: object) -> Callable[[PickleMachine], None]:
    return lambda machine: machine._stack.append(value)


def _instructions() -> list[Callable[[PickleMachine], None]]:
    M = PickleMachine
    known: dict[bytes, Callable[[PickleMachine], None]] = {
        b"\x80": M._proto,
        b"\x95": M._frame,
        b"(": M._mark,
        # A dropped object: Python leaves one where an object contains itself.
        b"0": lambda m: m._drop(m._stack.pop()),
        b"1": lambda m: m._drop(m._items()),
        b"\x94": M._memoize,
        b"q": lambda m: m._remember(m._next()),
        b"r": lambda m: m._remember(m._number(4)),
        b"h": M._get_short,
        b"j": M._get_long,
        b"N": _push(None),
        b"\x88": _push(True),
        b"\x89": _push(False),
        b"K": lambda m: m._stack.append(m._next()),
        b"M": lambda m: m._stack.append(m._number(2)),
        b"J": lambda m: m._stack.append(m._number(4, signed=True)),
        b"\x8a": M._long,
        b"G": M._float,
        b"\x8c": lambda m: m._stack.append(m._text(m._next())),
        b"X": lambda m: m._stack.append(m._text(m._number(4))),
        b"\x8d": lambda m: m._stack.append(m._text(m._number(8))),
        b"C": lambda m: m._stack.append(m._take(m._next())),
        b"B": lambda m: m._stack.append(m._take(m._number(4))),
        b"\x8e": lambda m: m._stack.append(m._take(m._number(8))),
        b"\x96": lambda m: m._stack.append(m._take(m._number(8))),  # a bytearray
        b"U": lambda m: m._python2_string(m._next()),
        b"T": lambda m: m._python2_string(m._number(4, signed=True)),
        b")": M._empty_tuple,
        b"t": M._tuple,
        b"\x85": M._tuple1,
        b"\x86": lambda m: m._tuple_of(2),
        b"\x87": lambda m: m._tuple_of(3),
        b"]": lambda m: m._stack.append([]),
        b"}": lambda m: m._stack.append({}),
        b"\x8f": lambda m: m._stack.append(set()),
        b"a": lambda m: m._append([m._stack.pop()]),
        b"e": lambda m: m._append(m._items()),
        b"s": lambda m: m._set_items([m._stack.pop(-2), m._stack.pop()]),
        b"u": lambda m: m._set_items(m._items()),
        b"\x90": M._add_items,
        b"c": lambda m: m._global(m._line(), m._line()),
        b"\x93": lambda m: m._global(m._stack.pop(-2), m._stack.pop()),
        b"R": M._reduce,
        b"\x81": M._new,
        b"b": M._build,
        b"Q": M._persistent_id,
    }
    table: list[Callable[[PickleMachine], None]] = [M._refuse] * 256
    for code, instruction in known.items():
        table[code[0]] = instruction
    return table


INSTRUCTIONS = _instructions()
