"""A reader of pickles that runs nothing from them.

A pickle is a program for a small stack machine. Python's own unpickler imports and calls whatever the program names;
this one knows only the instructions that plain data and the checkpoints of the EDM family use, hands out nothing but
the entries of a table, and counts what it does. No name is imported, no attribute set, no method of a foreign object
called. Keys of dictionaries are text, byte strings and small integers, so that no crafted key costs time; no dictionary
gets one key twice; and nothing nests deeper than a limit.
"""

import codecs
from collections.abc import Callable

from ipfm.models.checkpoints.pickle_machine import INSTRUCTIONS, STOP, PickleMachine
from ipfm.models.checkpoints.pickle_values import DEFAULT_LIMITS, Inert, Limits, Table, check_depth, shown

__all__ = ["Inert", "Limits", "RestrictedUnpickler", "Table", "read_pickle", "shown"]


def read_pickle(
    data: bytes | memoryview,
    table: Table,
    *,
    where: str,
    persistent: Callable[[object], object] | None = None,
    encoding: str = "ASCII",
    limits: Limits = DEFAULT_LIMITS,
) -> object:
    """The one object that `data` holds.

    Args:
        data: the whole pickle, of any protocol, nothing after it.
        table: (module, name) of each global that is admitted, exactly as written, and what stands for it: a plain
            function, called with the arguments of the pickle (it must check them and raise ValueError); a subclass of
            `Inert`, made without arguments; or any value.
        where: the file, for messages.
        persistent: what a persistent id stands for; None admits no such id.
        encoding: of the strings of Python 2; "bytes" keeps them as bytes. Byte strings of Python 3 come as memoryview.
        limits: what the pickle may cost.

    Raises:
        ValueError: one line "where: ..." for anything not admitted, truncated, damaged, too deep or too large.
    """
    reader = RestrictedUnpickler(data, table, where=where, persistent=persistent, encoding=encoding, limits=limits)
    result = reader.load()
    if reader.position != len(data):
        raise ValueError(f"{where}: {len(data) - reader.position} bytes follow the end of the pickle")
    return result


class RestrictedUnpickler(PickleMachine):
    """Reader of the pickles that follow each other in `data`, one a call of `load`, from `position` on.

    Arguments as of `read_pickle`; the limit on operations is for all of them together.
    """

    def __init__(
        self,
        data: bytes | memoryview,
        table: Table,
        *,
        where: str,
        persistent: Callable[[object], object] | None = None,
        encoding: str = "ASCII",
        limits: Limits = DEFAULT_LIMITS,
        position: int = 0,
    ) -> None:
        if encoding != "bytes":
            codecs.lookup(encoding)
        super().__init__(memoryview(data), table, persistent, encoding, limits)
        self.position = position
        self._where = where
        self._left = limits.operations

    def load(self) -> object:
        """The object of the pickle at `position`, which moves behind it.

        Raises:
            ValueError: as of `read_pickle`.
        """
        self._stack, self._outer, self._memo = [], [], {}
        data, instructions = self._data, INSTRUCTIONS
        at = self.position
        try:
            while self._left > 0:
                self._left -= 1
                at = self.position
                code = data[at]
                self.position = at + 1
                if code == STOP:
                    return self._finish()
                instructions[code](self)
        except ValueError as error:
            raise ValueError(f"{self._where}: {error} (byte {at})") from None
        except (IndexError, KeyError):
            raise ValueError(f"{self._where}: the pickle is truncated or damaged at byte {at}") from None
        raise ValueError(f"{self._where}: the pickle has more than {self._limits.operations} instructions")

    def _finish(self) -> object:
        if self._outer or len(self._stack) != 1:
            raise ValueError("the pickle is damaged: it ends in the middle of an object")
        result = self._stack.pop()
        self._memo = {}
        check_depth(result, self._limits.depth)
        return result
