"""How the parser shows options: no words of Python's types, no defaults that say nothing."""

from __future__ import annotations

import io
import re
import textwrap
import types
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, TextIO, Union, get_args, get_origin

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
    """Rules for `tyro.cli`: an option that may be left out is shown by the type of its values, and has no "(default:
    None)"; texts are paragraphs, whatever their lines are in the source.

    Args:
        none: the word None is read as what an option is that is left out.
    """
    rules = ConstructorRegistry()
    asking: list[bool] = []

    def fields(info: StructTypeInfo) -> StructConstructorSpec | None:
        """What the parser's own rules say of a struct's fields, with other texts."""
        if asking:
            return None
        asking.append(True)
        try:
            spec = ConstructorRegistry.get_struct_spec(info)
        finally:
            asking.pop()
        if not isinstance(spec, StructConstructorSpec):
            return None
        return replace(spec, fields=tuple(map(_field, spec.fields)))

    rules.primitive_rule(partial(_optional, none=none))

    @rules.primitive_rule
    def several(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        """tuple[X, ...]: "X ..."."""
        if asking or get_origin(info.type) is not tuple or get_args(info.type)[1:] != (...,):
            return None
        asking.append(True)
        try:
            spec = ConstructorRegistry.get_primitive_spec(info)
            each = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(get_args(info.type)[0], info.markers))
        finally:
            asking.pop()
        if not (isinstance(spec, PrimitiveConstructorSpec) and isinstance(each, PrimitiveConstructorSpec)):
            return None
        return replace(spec, metavar=f"{each.metavar} ...")

    rules.struct_rule(fields)
    return rules


def _optional(info: PrimitiveTypeInfo, *, none: bool) -> PrimitiveConstructorSpec[Any] | None:
    """X | None, shown and read as X; None is the word None."""
    if get_origin(info.type) not in (Union, types.UnionType):
        return None
    kinds = [kind for kind in get_args(info.type) if kind is not type(None)]
    if len(kinds) != 1 or len(get_args(info.type)) != 2:
        return None
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kinds[0], info.markers))
    if not isinstance(spec, PrimitiveConstructorSpec) or spec.nargs != 1:
        return None
    inner = spec
    return replace(
        inner,
        instance_from_str=lambda words: None if words == ["None"] else inner.instance_from_str(words),
        is_instance=lambda value: value is None or inner.is_instance(value),
        str_from_instance=lambda value: ["None"] if value is None else inner.str_from_instance(value),
        choices=inner.choices and (*inner.choices, *(["None"] if none else [])),
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
