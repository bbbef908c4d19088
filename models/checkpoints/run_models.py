"""Which network of a run is meant, where its folder stands in the place of a model.

A run folder holds several: its result, the best of its evaluations, snapshots, and the averages in its checkpoints. Of
a run that has ended the result is taken; of one that goes on, was stopped or diverged the best, else the newest.
Nothing is loaded here: names, and config.json of each, are looked at.
"""

import math
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ipfm.models.atomic_files import previous_of
from ipfm.models.checkpoints.recognise import is_checkpoint, read_object, run_kind, user_path

EXPORTS = {"distill": "generator", "teacher": "model"}
"""The folder of the exported network of each kind of run."""
_WORDS = {"distill": "generator", "teacher": "teacher"}
_TENSOR_FILE = "model.safetensors"
_AVERAGE = re.compile(r"ema[\d.k]*")
"""The name of one of several averages of the weights."""


@dataclass(frozen=True)
class Located:
    """Where a network lies: a file, a model folder, or a checkpoint, of which it is the average.

    Attributes:
        path: the place.
        taken: what was taken of a run, in a line; "" where the path says it itself.
        other: what else the run has, in a word for `which` and in words; "" where there is nothing else.
    """

    path: Path
    taken: str = ""
    other: tuple[str, str] = ("", "")

    def said(self, option: str = "--which {}") -> str:
        """The line about a run: what was taken, and how to have the other; "" where there is nothing to say.

        Args:
            option: how another is asked for.
        """
        which, words = self.other
        return f"{self.taken}; {option.format(which)} is {words}" if self.taken and which else self.taken


@dataclass(frozen=True)
class _Kept:
    """A network of a run: its result, the best of its evaluations, a snapshot, or the average in a checkpoint."""

    role: Literal["result", "best", "snapshot", "checkpoint"]
    path: Path
    step: int | None
    distance: float = math.nan

    def words(self, noun: str) -> str:
        """Which it is: "its best generator (step 400, 0.31)"."""
        names = {
            "result": f"the {noun} at its end",
            "best": f"its best {noun}",
            "snapshot": f"its newest snapshot of the {noun}",
            "checkpoint": f"the {noun} in its newest checkpoint",
        }
        said = [] if self.step is None else [f"step {self.step}"]
        said += [f"{self.distance:.4g}"] if math.isfinite(self.distance) else []
        return names[self.role] + (f" ({', '.join(said)})" if said else "")


def locate(path: str | os.PathLike[str], which: str | int | None = None, *, teacher: bool = False) -> Located:
    """Where the network is that `path` means. Nothing is refused but a choice that there is not.

    Args:
        path: a file, a model folder or a checkpoint, which are what they are; or a run folder, or its folder of
            snapshots or checkpoints.
        which: of a run: "best", "last", a step, or one of several averages by its name, such as "ema0.05", at its last
            step. None takes the result of a run that has ended, else the best, else the newest.
        teacher: a teacher is wanted: of a distillation, the one that it trained.

    Raises:
        ValueError: the run has no such network, or `which` is given for what is no run; one line.
    """
    place = user_path(path)
    try:
        run, folders = _run_of(place)
    except RuntimeError:  # a link that leads back to itself
        run, folders = None, ()
    chosen = None if which is None else str(which)
    if chosen is not None and chosen not in ("best", "last") and not _AVERAGE.fullmatch(chosen):
        step = re.fullmatch(r"(?:step-)?(\d{1,12})", chosen)
        if step is None:
            raise ValueError(f"which must be best, last, a step or an average such as ema0.05, got {chosen!r}")
        chosen = step[1]
    if run is None:
        place = _latest(place)
        if chosen is not None:
            raise ValueError(f"which chooses among the networks of a run, and {place} is no run folder: leave it out")
        return Located(place)
    kind = run_kind(run)
    if teacher and kind == "distill":
        own = run / "teacher"
        if run_kind(own) is not None:
            found = locate(own, chosen)
            return Located(found.path, found.taken or f"the teacher of {run} is taken, {found.path}", found.other)
        if chosen is None and _is_model(own / "model"):
            return Located(own / "model", f"the teacher of {run} is taken, {own / 'model'}")
        return Located(place)
    kept = list(_networks(run, kind or "distill", folders))
    if chosen is not None and _AVERAGE.fullmatch(chosen):
        return Located(_of_average(place, run, kept, folders, chosen).path)
    if chosen is not None:
        return Located(_asked_for(place, kept, chosen).path)
    return _usual(place, kept, _WORDS[kind or "distill"], whole="" in folders) if kept else Located(place)


def _asked_for(place: Path, kept: list[_Kept], which: str) -> _Kept:
    """The network of `kept` that `which` names. ValueError: there is none."""
    if which == "best":
        found = next((one for one in kept if one.role == "best"), None)
        lacks = "no best network, as its run has had no evaluation with a finite distance"
    elif which == "last":
        found, lacks = _newest(kept), "no network yet"
    else:
        found, lacks = next((one for one in kept if one.step == int(which)), None), f"no network of step {which}"
    if found is None:
        raise ValueError(f"{place} has {lacks}{_has(kept)}")
    return found


def _of_average(place: Path, run: Path, kept: list[_Kept], folders: tuple[str, ...], name: str) -> _Kept:
    """The newest network that is of the average `name`. ValueError: there is none."""
    if "snapshots" in folders:
        above = _folder(run / "snapshots", _AVERAGE)
        kept = [*kept, *(_Kept("snapshot", p, _step_of(p)) for at in above for p in filter(_is_model, _steps(at)))]
    named: dict[str, list[_Kept]] = {}
    for one in kept:
        if one.role != "checkpoint" and isinstance(average := _extra(one.path).get("average"), str):
            named.setdefault(average, []).append(one)
    found = _newest(named.get(name, []))
    if found is not None:
        return found
    has = f"; it has those of {', '.join(sorted(named))}" if named else ""
    raise ValueError(
        f"{place} has no network of the average {name}{has}: with --snapshot-every a run keeps all, and ipfm ema makes "
        "others of them and of its checkpoints"
    )


def _usual(place: Path, kept: list[_Kept], noun: str, *, whole: bool) -> Located:
    """What is taken of `kept` unless another one is asked for; `whole`: it is all that the run has."""
    newest = _newest(kept)
    assert newest is not None
    result = next((one for one in kept if one.role == "result"), None)
    best = next((one for one in kept if one.role == "best"), None)
    if result is not None and (result.step is None or result.step == newest.step):
        taken, said = result, f"of {place} "
    else:
        taken = best or newest
        state = "has not ended" if result is None else f"goes on after {result.words(noun)}"
        said = f"{place} {state}: " if whole else f"of {place} "
    said += f"{taken.words(noun)} is taken"
    others = {"best": best, "last": newest}
    other = next(((n, o) for n, o in others.items() if o is not None and o.step != taken.step), None)
    return Located(taken.path, said, ("", "") if other is None else (other[0], other[1].words(noun)))


def _newest(kept: list[_Kept]) -> _Kept | None:
    """That of the most steps; of several of them the first, and a result that does not say its steps."""
    return max(kept, key=lambda one: (one.step is None, one.step or 0), default=None)


def _has(kept: list[_Kept]) -> str:
    steps = sorted({one.step for one in kept if one.step is not None})
    shown = ", ".join(map(str, steps[-12:]))
    return f"; it has those of steps {'… ' if len(steps) > 12 else ''}{shown}" if steps else ""


def _run_of(place: Path) -> tuple[Path | None, tuple[str, ...]]:
    """The run whose folder, folder of snapshots or of checkpoints `place` is, and which of its folders are meant."""
    if not place.is_dir() or is_checkpoint(place) or _is_model(place):
        return None, ()
    if run_kind(place) is not None:
        return place, ("", "snapshots", "checkpoints")
    above = place.resolve().parent
    if place.resolve().name in ("snapshots", "checkpoints") and run_kind(above) is not None:
        return place.parent if place.parent.resolve() == above else above, (place.resolve().name,)
    return None, ()


def _latest(place: Path) -> Path:
    """The checkpoint that a run's file `latest` names; another path is what it is."""
    if place.name == "latest" and place.is_file():
        with suppress(OSError, UnicodeDecodeError):
            named = place.with_name(place.read_text(encoding="utf-8")[:100].strip())
            return named if re.fullmatch(r"step-\d+", named.name) and is_checkpoint(named) else place
    return place


def _networks(run: Path, kind: str, folders: tuple[str, ...]) -> Iterator[_Kept]:
    """The networks in these folders of the run: first its result, then its best, then the others, newest first."""
    if "" in folders:
        result = run / EXPORTS[kind]
        if _is_model(result):
            yield _Kept("result", result, *_said(result))
        best = result.with_name(f"{result.name}-best")
        if _is_model(best):
            yield _Kept("best", best, *_said(best))
    if "snapshots" in folders:
        for folder in filter(_is_model, _steps(run / "snapshots")):
            yield _Kept("snapshot", folder, _step_of(folder), _said(folder)[1])
    if "checkpoints" in folders:
        for folder in filter(is_checkpoint, _steps(run / "checkpoints")):
            yield _Kept("checkpoint", folder, _step_of(folder))


def _steps(folder: Path) -> list[Path]:
    """The folders step-… in a folder, the newest first."""
    return sorted(_folder(folder, re.compile(r"step-\d+")), key=_step_of, reverse=True)


def _folder(folder: Path, names: re.Pattern[str]) -> list[Path]:
    """What in a folder has such a name; nothing of one that cannot be read."""
    try:
        return [path for path in folder.iterdir() if names.fullmatch(path.name)]
    except OSError:
        return []


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _is_model(folder: Path) -> bool:
    """Whether there is a model folder, or its stand-in while it is replaced."""
    there = folder if folder.exists() else previous_of(folder)
    return (there / _TENSOR_FILE).is_file() and str(_config(there).get("format", "")).startswith("ipfm-network")


def _said(folder: Path) -> tuple[int | None, float]:
    """Steps done and the distance of a model folder, as far as it says them and it is what was gone by."""
    extra = _extra(folder)
    step, measured = extra.get("optimizer_steps"), extra.get("measured")
    distance = measured.get("distance") if isinstance(measured, dict) else None
    asked = measured.get("metrics") if isinstance(measured, dict) else None
    if isinstance(asked, list) and asked[:1] != ["fid"]:
        distance = None
    number = float(distance) if isinstance(distance, (int, float)) else math.nan
    return step if isinstance(step, int) else None, number


def _extra(folder: Path) -> dict[str, Any]:
    extra = _config(folder if folder.exists() else previous_of(folder)).get("extra")
    return extra if isinstance(extra, dict) else {}


def _config(folder: Path) -> dict[str, Any]:
    return read_object(folder / "config.json")
