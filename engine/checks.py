"""What the settings of a run are checked by.

Every check raises ValueError: one line that names the option, what was given and what is possible.
"""

from __future__ import annotations

import math


def check_start(init_name: str, init: str, width_name: str, width: float) -> None:
    """Check that a network can start like this at this width."""
    if init not in ("auto", "teacher", "random"):
        raise ValueError(f"{init_name} must be auto, teacher or random, got {init!r}")
    positive(width_name, width)
    if init == "teacher" and width != 1:
        raise ValueError(f"{init_name} teacher needs {width_name} 1, got {width:g}: give {init_name} random")


def check_D(D: float) -> None:
    """Check that D is a number in (0, inf]."""
    if not is_number(D) or not D > 0:
        raise ValueError(f"D must lie in (0, inf], got {D}")


def at_least(name: str, value: int, least: int) -> None:
    """Check that it is an integer >= least."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{option_name(name)} must be an integer >= {least}, got {value}")


def positive(name: str, value: float) -> None:
    """Check that it is a finite number > 0."""
    if not (is_number(value) and math.isfinite(value) and value > 0):
        raise ValueError(f"{option_name(name)} must be a finite number > 0, got {value}")


def not_negative(name: str, value: float) -> None:
    """Check that it is a finite number >= 0."""
    if not (is_number(value) and math.isfinite(value) and value >= 0):
        raise ValueError(f"{option_name(name)} must be a finite number >= 0, got {value}")


def share(name: str, value: float) -> None:
    """Check that it is a number in [0, 1)."""
    if not (is_number(value) and 0 <= value < 1):
        raise ValueError(f"{option_name(name)} must lie in [0, 1), got {value}")


def is_number(value: object) -> bool:
    """Whether it is an int or a float; not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def number(value: object) -> float:
    """A value of a JSON file as a number, "inf" among them; NaN for anything else."""
    if is_number(value):
        return float(value)  # type: ignore[arg-type]
    return math.inf if value == "inf" else math.nan


def option_name(name: str) -> str:
    """A field's name as the command line has it."""
    return name.replace("_", "-")
