"""Files that hold many images each, and lie in one folder: what they have in common, and which of them are taken."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from ipfm.engine.data.image_files import LeftOut

_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}


@runtime_checkable
class HoldsLabels(Protocol):
    """Image files that have labels of their own, not those of a dataset.json."""

    @property
    def label_source(self) -> str:
        """Where they come from, for people; and where there are none, why."""

    def stored_labels(self) -> list[object] | None:
        """The labels of `names` in their order; None where no image has one.

        Raises:
            ValueError: some have one and others none; or they cannot be read.
        """


class Chosen(NamedTuple):
    """The shards of one part of a set."""

    names: list[str]
    others: dict[str, list[str]]
    """Those of the other parts that were not asked for, by their name."""

    def leave_out_others(self, left_out: LeftOut, kind: str) -> None:
        """Count those of the other parts as left out; `kind`: what they are, in the plural."""
        for part, names in self.others.items():
            left_out.add(f"{kind} of the part {part}", names)


def part_of(name: str) -> str | None:
    """The part of a set that a shard's name, with its folders, speaks of: train, validation, test; None for none."""
    folders, _, file = name.rpartition("/")
    for word in (*reversed(folders.split("/")), *re.split(r"[-_.]", file)):
        if part := _WORDS.get(word.lower()):
            return part
    return None


def choose(where: str, names: Sequence[str], split: str | None) -> Chosen:
    """The shards that are taken: those of `split`; without one the training set's, or all where they say nothing.

    Args:
        where: the folder, for messages.
        names: of the shards.
        split: as in `ipfm.engine.data.open_dataset.open_dataset`.

    Raises:
        ValueError: there is no such part, or there are several and none is for training.
    """
    parts: dict[str | None, list[str]] = {}
    for name in sorted(names):
        parts.setdefault(part_of(name), []).append(name)
    known = ", ".join(sorted(part for part in parts if part is not None))
    if split is not None:
        wanted = _WORDS.get(split.lower(), split)
        if wanted not in parts:
            raise ValueError(f"{where} has no part {split}: it has {known or 'none by name'}")
        return Chosen(parts[wanted], {})
    if len(parts) == 1:
        return Chosen(next(iter(parts.values())), {})
    if "train" not in parts:
        raise ValueError(f"{where} has the parts {known}: ipfm dataset --split says which to take")
    return Chosen(parts["train"], {part or "without a name": files for part, files in parts.items() if part != "train"})
