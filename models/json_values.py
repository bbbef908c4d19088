"""Values of Python in JSON, which lacks infinite numbers: such a one becomes {"float": "inf"}."""

import math
from collections.abc import Mapping
from typing import Any


def to_json(value: Any, where: str) -> Any:
    """`value` in JSON.

    Args:
        value: dictionaries by text, sequences, numbers, texts, None.
        where: its name, for the message.

    Raises:
        ValueError: there is anything else in it.
    """
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{where}: keys must be strings, got {key!r}")
        return {key: to_json(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if value is None or isinstance(value, (str, bool, int)):
        return value
    raise ValueError(f"{where}: {type(value).__name__} is no JSON value")


def from_json(value: Any) -> Any:
    """What `to_json` was given, with lists for all sequences."""
    if isinstance(value, dict):
        if list(value) == ["float"] and value["float"] in ("inf", "-inf", "nan"):
            return float(value["float"])
        return {key: from_json(item) for key, item in value.items()}
    return [from_json(item) for item in value] if isinstance(value, list) else value
