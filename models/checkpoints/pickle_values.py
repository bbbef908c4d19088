"""What an object of a pickle may be and cost, and how it is named in messages."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import TypeAlias

Table: TypeAlias = Mapping[tuple[str, str], object]
"""(module, name) of each global that is admitted, and what stands for it."""


@dataclass(frozen=True)
class Limits:
    """What one pickle may cost.

    Attributes:
        operations: instructions; each makes at most one object of some 100 bytes besides the file's text and bytes.
        depth: containers inside each other.
        text: bytes of one string.
    """

    operations: int = 1_000_000
    depth: int = 100
    text: int = 1 << 24


DEFAULT_LIMITS = Limits()


class Inert:
    """Base of the classes in a table: made without arguments, changed only through `set_state`."""

    def set_state(self, state: object) -> None:
        """Take what a pickle says about the object.

        Raises:
            ValueError: that is not allowed.
        """
        raise ValueError(f"{shown(type(self))} takes no state")

    def children(self) -> tuple[object, ...]:
        """What is inside, for the limit on nesting."""
        return ()


def check_depth(root: object, limit: int) -> None:
    """Check that containers nest no deeper than `limit`; what contains itself counts once.

    Raises:
        ValueError: they do.
    """
    seen: set[int] = set()
    level, depth = [root], 0
    while level:
        if depth > limit:
            raise ValueError(f"the pickle nests deeper than {limit} levels")
        inside: list[object] = []
        for item in level:
            kind = type(item)
            if kind in _PLAIN or id(item) in seen:
                continue
            seen.add(id(item))
            if isinstance(item, dict):
                inside += item.values()
            elif kind is list or kind is tuple:
                inside += item  # type: ignore[arg-type]
            elif isinstance(item, Inert):
                inside += item.children()
        level, depth = inside, depth + 1


def shown(value: object, width: int = 60) -> str:
    """`value` for a message: one line of printable ASCII of bounded length; of a container only its kind."""
    if isinstance(value, (str, bytes)):
        text = ascii(value[: width + 1])
    elif value is None or isinstance(value, (bool, int, float)):
        text = str(value)
    elif isinstance(value, (type, FunctionType)):
        text = value.__name__.strip("_")
    else:
        text = f"a {type(value).__name__}"
    return text if len(text) <= width else text[: width - 3] + "..."


def check_key(key: object) -> None:
    """Check that `key` is text, bytes or a small integer, whose hashes cost no time and do not collide.

    Raises:
        ValueError: it is something else.
    """
    if type(key) is str or type(key) is bytes or (type(key) is int and abs(key) < 1 << 32):
        return
    raise ValueError(f"{shown(key)} cannot be a key")


_PLAIN = frozenset({str, int, float, bool, type(None), bytes, memoryview, set, FunctionType})
