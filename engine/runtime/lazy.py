"""Names of a package that are loaded when they are asked for."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any


def loaded(package: str, homes: Mapping[str, tuple[str, ...]], name: str) -> Any:
    """What `package` has under `name`, for its `__getattr__`; it keeps it.

    Args:
        package: a package that is loaded, or is being loaded.
        homes: module within `ipfm.engine` -> the names that it defines.
        name: what is asked for.

    Raises:
        AttributeError: none of them defines it.
    """
    for home, names in homes.items():
        if name in names:
            value = getattr(import_module(f"ipfm.engine.{home}"), name)
            setattr(sys.modules[package], name, value)
            return value
    raise AttributeError(f"module {package!r} has no attribute {name!r}")
