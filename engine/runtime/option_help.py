"""How the parser shows options: no words of Python's types, no defaults that say nothing."""

from __future__ import annotations

import io
import math
import os
import re
import textwrap
import types
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO, Union, get_args, get_origin

from tyro.conf import arg
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)


def registry(*, none: bool = True) -> ConstructorRegistry:
    """Rules for `tyro.cli`.

    An option that may be left out is shown by the type of its values, and has no "(default: None)"; texts are
    paragraphs, whatever their lines are in the source.

    Args:
        none: the word None is read as what an option is that is left out.
    """
    rules = ConstructorRegistry()
    rules.primitive_rule(partial(_optional, none=none))
    # Types for which the parser's own rules, and those above, are being asked.
    asking: list[Any] = []

    @rules.primitive_rule
    def value(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        """A value that cannot be read is refused in other words, a path read as `local_path` says.

        tuple[X, ...] is shown as "X ...".
        """
        if info.type in asking:
            return None
        asking.append(info.type)
        try:
            spec = ConstructorRegistry.get_primitive_spec(info)
            if not isinstance(spec, PrimitiveConstructorSpec):
                return None
            if get_origin(info.type) is tuple and get_args(info.type)[1:] == (...,):
                each = PrimitiveTypeInfo.make(get_args(info.type)[0], info.markers)
                one = ConstructorRegistry.get_primitive_spec(each)
                if isinstance(one, PrimitiveConstructorSpec):
                    spec = replace(spec, metavar=f"{one.metavar} ...")
        finally:
            asking.pop()
        return replace(spec, instance_from_str=partial(_read, _of_paths(spec.instance_from_str, info.type), info.type))

    @rules.struct_rule
    def fields(info: StructTypeInfo) -> StructConstructorSpec | None:
        """What the parser's own rules say of a struct's fields, with other texts."""
        if info.type in asking:
            return None
        asking.append(info.type)
        try:
            spec = ConstructorRegistry.get_struct_spec(info)
        finally:
            asking.pop()
        if not isinstance(spec, StructConstructorSpec):
            return None
        return replace(spec, fields=tuple(map(_field, spec.fields)))

    return rules


class Unreadable(ValueError):
    """A value that is none of its option; the message is a line without the option's name."""


def local_path(text: str) -> Path:
    """The path that a user typed, its `~` replaced by the home folder, as a shell leaves it in `--out=~/runs`.

    Args:
        text: as typed.

    Raises:
        Unreadable: nothing, as an unset variable leaves, a URL, or the home folder of nobody.
    """
    if not text.strip():
        raise Unreadable("must name a path, got an empty text: is a variable not set?")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        raise Unreadable(f"must be a path on this machine, got {text}: download it first")
    if "\0" in text:
        raise Unreadable(f"must be a path, got {text!r}")
    # Not Path's own, to which ./~ is the home folder too.
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise Unreadable(f"begins with the home folder of a user who is not known here: {text}")
    return Path(expanded)


def _of_paths(read: Callable[[list[str]], Any], kind: Any) -> Callable[[list[str]], Any]:
    """`read`, or for a path, or several, or one beside words that are none, `local_path`."""
    if kind is Path:
        return lambda words: local_path(words[0])
    literals = [part for part in get_args(kind) if get_origin(part) is Literal]
    if literals and Path in get_args(kind):
        known = {word for literal in literals for word in get_args(literal)}
        return lambda words: words[0] if words[0] in known else local_path(words[0])
    # What tyro makes of several says nothing of the one that cannot be read.
    return (lambda words: tuple(map(local_path, words))) if kind == tuple[Path, ...] else read


def _read(read: Callable[[list[str]], Any], kind: Any, words: list[str]) -> Any:
    """What `read` makes of `words`.

    Raises:
        Unreadable: nothing, or no number that was meant: Python takes 1_000, and 1e400 for infinity.
    """
    numbers = get_args(kind)[0] if get_origin(kind) is tuple and get_args(kind)[1:] == (...,) else kind
    nouns = {int: "a whole number", float: "a number"}
    try:
        if numbers in nouns:
            for word in words:
                _check_number(word, numbers)
        return read(words)
    except Unreadable:
        raise
    except (ValueError, TypeError) as error:
        given = ", ".join(map(repr, words))
        if numbers not in nouns:
            raise Unreadable(f"cannot be read from {given}") from error
        noun = nouns[numbers] if numbers is kind else f"{nouns[numbers].removeprefix('a ')}s"
        if numbers is not kind:
            hint = ", separated by spaces" if any(mark in word for word in words for mark in ",;") else ""
            raise Unreadable(f"takes {noun}{hint}, got {given}") from error
        hint = next((hint for word in words if (hint := _as_number(word, numbers))), "")
        raise Unreadable(f"takes {noun}, got {given}{hint}") from error


_INFINITE = ("inf", "infinity")


def _check_number(word: str, kind: type) -> None:
    """Check that a text is a number as people write it: ASCII, one that is not rounded to 0 or infinity.

    Raises:
        Unreadable: it is too large or too small.
        ValueError: it is none.
    """
    if not word.isascii() or "_" in word or word != word.strip():
        raise ValueError(word)
    value = kind(word)
    if kind is not float:
        return
    if math.isinf(value) and word.lstrip("+-").lower() not in _INFINITE:
        raise Unreadable(f"is too large a number, got {word}; inf is infinity")
    if value == 0 and re.search("[1-9]", word.lower().partition("e")[0]):
        raise Unreadable(f"is too small a number, got {word}")


def _as_number(word: str, kind: type) -> str:
    """How a text that is none of these numbers is written, where that is plain: ": write 1000"."""
    text = unicodedata.normalize("NFKC", word).strip().replace("\u2212", "-")
    if re.fullmatch(r"[+-]?[0-9]{1,3}([_,' ][0-9]{3})+", text) and (kind is int or "," not in text):
        return f": write {re.sub('[^0-9+-]', '', text)}"
    if kind is float:
        text = text.replace(",", ".").replace("_", "")
        return f": write {text}" if text != word and re.fullmatch(r"[+-]?[0-9]*\.?[0-9]+(e[+-]?[0-9]+)?", text) else ""
    if re.fullmatch(r"[+-]?[0-9]{1,9}(\.[0-9]{1,9})?(e\+?[0-9]{1,2})?", text.lower()):
        value = float(text)
        return f": write {int(value)}" if text != word or value == int(value) else ""
    return ""


def _optional(info: PrimitiveTypeInfo, *, none: bool) -> PrimitiveConstructorSpec[Any] | None:
    """X | None, shown and read as X, and X | tuple[X, ...] as tuple[X, ...]; None is the word None.

    Of several values, as tuple[float, float] | None has them, None is said by leaving the option out alone.
    """
    if get_origin(info.type) not in (Union, types.UnionType):
        return None
    given = get_args(info.type)
    kinds = [kind for kind in given if kind is not type(None)]
    lists = [kind for kind in kinds if get_origin(kind) is tuple and get_args(kind)[1:] == (...,)]
    one = next((kind for kind in kinds if lists and kind is get_args(lists[0])[0]), None)
    kinds = [kind for kind in kinds if kind is not one]
    optional = type(None) in given
    if len(kinds) != 1 or (one is None and not optional):
        return None
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kinds[0], info.markers))
    several = get_origin(kinds[0]) is tuple and not lists
    if not isinstance(spec, PrimitiveConstructorSpec) or (spec.nargs != 1 and not lists and not several):
        return None
    inner = spec

    def is_one(value: Any) -> bool:
        if value is None or (one is not None and isinstance(value, (int, float))):
            return value is not None or optional
        return bool(inner.is_instance(value))

    def words_of(value: Any) -> list[str]:
        if value is None:
            return ["None"]
        return inner.str_from_instance((value,) if one is not None and not isinstance(value, tuple) else value)

    return replace(
        inner,
        instance_from_str=lambda words: None if optional and words == ["None"] else inner.instance_from_str(words),
        is_instance=is_one,
        str_from_instance=words_of,
        choices=inner.choices and (*inner.choices, *(["None"] if none and optional else [])),
    )


def _field(field: StructFieldSpec) -> StructFieldSpec:
    said = field.helptext
    text = said() if callable(said) else said
    shown: Any = field.type
    if field.default is None or field.default is False or field.default == ():
        shown = Annotated[shown, arg(help_behavior_hint="")]
    elif field.default is True:
        shown = Annotated[shown, arg(help_behavior_hint="(default: on)")]
    return replace(field, helptext=None if text is None else " ".join(text.split()), type=shown)


class Shown(io.StringIO):
    """Takes the place of `stream` while the parser prints its help, which it paints for a terminal alone."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The stream's."""
        return self._stream.encoding

    def isatty(self) -> bool:
        """The stream is a terminal."""
        return self._stream.isatty()

    def tidied(self, width: int) -> str:
        """What was printed, without empty rows in boxes, with paragraphs no wider than `width`."""
        rows: list[str] = []
        for row in self.getvalue().splitlines():
            plain = re.sub(r"\x1b\[[0-9;]*m", "", row)
            if re.fullmatch(r"[│|] +[│|]", plain) or (not plain and rows and not rows[-1]):
                continue
            # Only paragraphs are wider, and the parser does not paint them.
            rows += textwrap.wrap(row, width) if len(plain) > width else [row]
        return "\n".join(rows) + "\n"
