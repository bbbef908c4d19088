"""Which runs are compared, and what they are called."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ipfm.engine.commands.pages.target import has_mark
from ipfm.engine.training.run_folder import ABLATION_FILE, SET_ASIDE
from ipfm.engine.training.run_state import is_damaged_run, is_run, read_run
from ipfm.engine.training.set_aside import read_set_aside
from ipfm.models.store import CONFIG_FILE

# How a page of ours is known, when it is to be replaced or stands among runs.
MARK = "a comparison of runs, by ipfm compare"


def selected(given: Sequence[Path]) -> list[Path]:
    """The run folders that are meant: an ablation's stands for its runs, a folder of runs for those in it.

    Args:
        given: folders, as they were typed.

    Raises:
        ValueError: one is no such folder, a run is there twice, or fewer than two are there; the message is one line.
    """
    # What an earlier call has written is among them where a shell wrote out `runs/*`.
    found = [run for path in given if not has_mark(path, MARK) for run in _runs_at(path)]
    known: dict[Path, Path] = {}
    for run in found:
        other = known.setdefault(run.resolve(), run)
        if other is not run:
            as_other = "" if other == run else f", as {other} too"
            raise ValueError(f"{run} is there twice{as_other}: give each run once")
    if not found:
        raise ValueError("give two or more run folders, or a folder of runs")
    if len(found) == 1:
        aside = read_set_aside(found[0])
        more = f", such as {aside[-1].path}, which it put aside" if aside else ""
        raise ValueError(
            f"{found[0]} is one run: give two or more to compare{more}, or use `ipfm report` for a page about it"
        )
    return found


def names_of(runs: Sequence[Path]) -> list[str]:
    """What each is called: the fewest last parts of the folders' paths that tell all of them apart.

    What a run has put aside is called by the run too.
    """
    parts = [run.resolve().parts for run in runs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-depth - 2 * (one[-2:-1] == (SET_ASIDE,)) :]) for one in parts]
        if len(set(names)) == len(names):
            break
    return names


def _runs_at(path: Path) -> list[Path]:
    """The runs that a folder stands for."""
    if (path / ABLATION_FILE).is_file():
        if not (runs := _of_ablation(path)):
            raise ValueError(f"{path} is the folder of an ablation that has no runs yet")
        return runs
    if is_run(path) or is_damaged_run(path) or not path.is_dir():
        return [path]
    runs = [run for folder in _folders(path) for run in _here(folder)]
    if not runs and not (path / CONFIG_FILE).exists():
        raise ValueError(f"{path} is no run folder and none is in it: give the folders that a recipe's --out named")
    if not runs:
        read_run(path)  # which says what it is instead
    return runs


def _here(folder: Path) -> list[Path]:
    if (folder / ABLATION_FILE).is_file():
        return _of_ablation(folder)
    return [folder] if is_run(folder) or is_damaged_run(folder) else []


def _of_ablation(path: Path) -> list[Path]:
    """VARIANT/seedN; the teachers beside them are no runs of it."""
    variants = [folder for folder in _folders(path) if folder.name != "teachers"]
    return [run for variant in variants for run in _folders(variant) if is_run(run) or is_damaged_run(run)]


def _folders(path: Path) -> list[Path]:
    """The folders in a folder by name, numbers in it by their size."""

    def natural(folder: Path) -> list[tuple[bool, int, str]]:
        return [
            (not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", folder.name)
        ]

    return sorted((one for one in path.iterdir() if one.is_dir() and not one.name.startswith(".")), key=natural)
