"""Triton's interpreter, without what it does over and over, which is most of what a small kernel takes.

For every launch, and again for every function that a kernel calls, it looks through all names of `triton.language` for
those that it replaces. Here they are looked for once in a process, and replaced once a launch. NumPy's name for a type
is looked up in a table that is made for each look.
"""

from __future__ import annotations

import inspect
from typing import Any


def hasten() -> None:
    """Called after TRITON_INTERPRET has been set; a second call, in a process that has been hastened, does nothing."""
    from triton import language
    from triton.runtime import interpreter

    if getattr(interpreter._patch_lang, "__module__", None) != interpreter.__name__:
        return
    look, scope_of, convert = interpreter._patch_lang, interpreter._LangPatchScope, interpreter._get_np_dtype
    # By the modules that a function sees, and what had been replaced before: owner, name and value of each replacement.
    known: dict[tuple[Any, ...], list[tuple[Any, str, Any]]] = {}
    # In this launch: the modules, and how to put back what was replaced for them.
    active: dict[tuple[str, ...], Any] = {}

    class Launch:
        """What a launch puts back at its end: also what its functions replaced, which Triton itself leaves."""

        def restore(self) -> None:
            while active:
                active.popitem()[1].restore()

    def replace(fn: Any) -> Launch:
        held = fn.__globals__.values()
        seen = tuple(lang.__name__ for lang in (language, language.core) if any(value is lang for value in held))
        if seen not in active:
            key = (seen, *active)
            if key in known:
                active[seen] = scope_of()
                for owner, name, value in known[key]:
                    active[seen].set_attr(owner, name, value)
            else:
                active[seen] = look(fn)
                changed = ((owner, name) for owner, name, _ in active[seen]._changes)
                known[key] = [(owner, name, inspect.getattr_static(owner, name)) for owner, name in changed]
        return Launch()

    # By the type's name, which tells all of it: types compare slowly.
    types: dict[str, Any] = {}

    def numpy_type(kind: Any) -> Any:
        found = types.get(kind.name)
        return types.setdefault(kind.name, convert(kind)) if found is None else found

    interpreter._patch_lang, interpreter._get_np_dtype = replace, numpy_type
