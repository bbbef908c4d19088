"""Fewer attributes for Triton's interpreter to look at."""

import inspect
import types
from typing import Any

import torch
import triton.language as tl
from triton.runtime import interpreter


def _builtins(owner: Any, names: dict[int, tuple[Any, list[str]]] = {}) -> list[tuple[str, Any]]:  # noqa: B006
    """The members that the interpreter replaces; which they are is asked once, before it has replaced them."""
    if id(owner) not in names:
        members = inspect.getmembers(owner)
        names[id(owner)] = owner, [name for name, member in members if tl.core.is_builtin(member)]
    return [(name, getattr(owner, name)) for name in names[id(owner)][1]]


if not torch.cuda.is_available():
    # At every call of a function it goes through all of triton.language, a third of its time where tensors are small.
    interpreter.inspect = types.SimpleNamespace(**{**vars(inspect), "getmembers": _builtins})
