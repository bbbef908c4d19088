"""Where each setting of a recipe comes from: the paper, what was published beside it, another paper, or here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

Source = Literal["paper", "script", "SiD", "EDM", "EDM2", "ours"]

SOURCES: Mapping[Source, str] = {
    "paper": "printed in the method's paper",
    "script": "of the script that its authors published beside it",
    "SiD": "of SiD, arXiv 2404.04057, and of its script",
    "EDM": "of EDM, arXiv 2206.00364, and of its script",
    "EDM2": "of EDM2, arXiv 2312.02696, and of its script",
    "ours": "this project's choice, as are all others",
}


@dataclass(frozen=True)
class Origin:
    """Where a setting's value comes from."""

    source: Source
    remark: str = ""
    """What to know of it."""


def origins(source: Source, *settings: str, **remarked: str) -> dict[str, Origin]:
    """Settings of one source, by name; `remarked`: setting -> what to know of it."""
    return {name: Origin(source) for name in settings} | {n: Origin(source, remark) for n, remark in remarked.items()}


def described(found: Mapping[str, Origin], given: Collection[str] = ()) -> list[str]:
    """A line for each source with its settings and remarks.

    Args:
        found: setting -> origin.
        given: those that the user gave, or that a run was begun with.
    """
    lines = ["where the settings come from"]
    for source, words in SOURCES.items():
        named = [
            f"{name} ({origin.remark})" if origin.remark else name
            for name, origin in found.items()
            if origin.source == source and name not in given
        ]
        if named or source == "ours":
            lines.append(f"  {words}: {', '.join(named)}" if named else f"  {words}")
    if given:
        lines.append(f"  given: {', '.join(sorted(given))}")
    return lines
