"""What an objective with a student may have otherwise than the method has it: weight, noise levels, average of S.

These are options for ablations. Nothing here is published as a setting of a whole run, so that no figure is printed
beside one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from ipfm.engine.checks import is_number, share
from ipfm.engine.objectives.level_laws import level_law
from ipfm.engine.objectives.loss_weights import check_weight, weight_in_words


class Varied(Protocol):
    """The settings, see `StudentConfig`."""

    @property
    def weight(self) -> str: ...

    @property
    def weight_power(self) -> float: ...

    @property
    def levels_generator(self) -> str | None: ...

    @property
    def levels_student(self) -> str | None: ...

    @property
    def student_ema(self) -> float | None: ...


def checked_laws(config: Varied) -> dict[str, str]:
    """Check the settings.

    Returns:
        Those that are laws of noise levels, in one spelling: "grid:0:0.8" for "grid:0:.8".

    Raises:
        ValueError: one is none that there is.
    """
    check_weight(config.weight, config.weight_power)
    if config.student_ema is not None:
        share("student-ema", config.student_ema)
    laws = {name: level_law(name.replace("_", "-"), getattr(config, name)) for name in _LAWS}
    return {name: str(law) for name, law in laws.items() if law is not None}


_LAWS = ("levels_generator", "levels_student")


def variation_name(config: Varied) -> str:
    """What tells runs apart, for the name of a run folder: "-score-levels-loguniform-emaS0.99"."""
    parts = [config.weight if config.weight != "sid" else ""]
    parts.append(f"sigma^{config.weight_power:g}".replace("^", "") if config.weight_power else "")
    parts.append(f"levels-{config.levels_generator}" if config.levels_generator else "")
    parts.append(f"student-{config.levels_student}" if config.levels_student else "")
    parts.append(f"emaS{config.student_ema:g}" if config.student_ema is not None else "")
    return "".join(f"-{part}" for part in parts if part).replace(":", "_")


def variation_rows(settings: Mapping[str, Any]) -> dict[str, str]:
    """What is otherwise, by what it is called in reports; of a folder's settings, any of which may be damaged."""
    rows = {"weight of the generator's loss": weight_in_words(settings)}
    for name, whose in (("levels_generator", "the generator's"), ("levels_student", "the student's")):
        given = settings.get(name)
        rows[f"noise levels of {whose} step"] = given if isinstance(given, str) else ""
    decay = settings.get("student_ema")
    rows["average of the student in the generator's step"] = f"decay {decay:g}" if is_number(decay) else ""
    return {name: words for name, words in rows.items() if words}


def variation_words(settings: Mapping[str, Any]) -> str:
    """The same within a sentence: ", weight of the generator's loss: 1 / sigma^2"; "" where nothing is otherwise."""
    return "".join(f", {name}: {words}" for name, words in variation_rows(settings).items())
