"""What recipes for images of one's own share: names of run folders, what a run in one was begun with, labels unused."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ipfm.engine.config import RunConfig, free_settings
from ipfm.engine.data.labels import read_labels
from ipfm.engine.data.mnist import mnist_part
from ipfm.engine.data.open_dataset import is_cifar, open_image_files
from ipfm.engine.evaluation.metrics.measures import DISTANCE, FID, measures_of
from ipfm.engine.evaluation.options import EvaluationOptions
from ipfm.engine.experiments.origins import Origin, described
from ipfm.engine.runtime.files import read_json
from ipfm.engine.runtime.wording import counted
from ipfm.models.checkpoints.recognise import user_path

# What files of data and models are called, which says nothing of them; and what every run calls its networks.
_SUFFIX = re.compile(r"(\.tar)?\.(gz|zip|tgz|npz|pkl|pt|pth|safetensors)$", re.IGNORECASE)
_ANYONES = ("model", "teacher", "generator")


def slug(path: Path | None, otherwise: str) -> str:
    """A name for a run folder from that of a file or folder: letters, digits, dots, hyphens and underscores.

    Args:
        path: of data or of a model; a model folder of a run is called by the run.
        otherwise: what it is called without a name.
    """
    if path is None:
        return otherwise
    place = user_path(path).absolute()
    while place.name in _ANYONES and place.parent != place:
        place = place.parent
    name = re.sub(r"[^\w.-]+", "-", _SUFFIX.sub("", place.name)).strip("-.")
    return name[:80] or otherwise


# Settings that follow from a run's length.
_LENGTHS = ("lr_rampup_kimg", "lr_decay_batches")


def begun_with(
    path: Path, chosen: RunConfig, base: RunConfig, given: Collection[str], rows: Collection[Mapping[str, Any]]
) -> dict[str, Any]:
    """The settings of the run in `path` that followed from the rule, where it has others now and none are given.

    The rule looks at things that may change between two parts of a run: its length, --data, the GPU.

    Args:
        path: the run folder.
        chosen: the settings by the rule and the command line, as it is now.
        base: those that no row of the rule sets.
        given: settings of the command line.
        rows: what each row sets.
    """
    begun = (read_json(path / "config.json") or {}).get("config")
    if not isinstance(begun, dict):
        return {}
    length = {"kimg", "max_steps"} & set(given) or begun.get("max_steps") is not None
    found = {}
    for name in dict.fromkeys(name for row in (*rows, dict.fromkeys(_LENGTHS)) for name in row if name in begun):
        # Another length may be asked for in two ways.
        if name in given or (name == "kimg" and length) or (name != "kimg" and name in free_settings(type(chosen))):
            continue
        possible = [row.get(name, getattr(base, name)) for row in rows]
        if begun[name] != getattr(chosen, name) and (begun[name] in possible or _any_length(name, begun[name])):
            found[name] = begun[name]
    return found


def values_of(settings: Mapping[str, Any]) -> str:
    """Settings with their values, a line for people."""
    shown = {n: f"{v:g}" if isinstance(v, float) else str(v) for n, v in settings.items() if v is not None}
    return "  " + ", ".join(f"{name} {value}" for name, value in shown.items())


def as_begun(path: Path, kept: Mapping[str, Any]) -> list[str]:
    """Says which settings are those of the run in `path`, in a line; none where nothing is `kept`."""
    begun = ", ".join(f"{name} {value}" for name, value in kept.items())
    return [f"as the run in {path} was begun: {begun}; by the rule they would be others now"] if kept else []


def _any_length(name: str, value: object) -> bool:
    """Of lengths the rule may have said any."""
    return name in ("kimg", *_LENGTHS) and isinstance(value, (int, float)) and value >= 0


def where_from(
    row: Mapping[str, Origin], values: Mapping[str, Any], more: Mapping[str, Origin], given: Collection[str]
) -> list[str]:
    """Lines that say where each setting of the rule comes from.

    Args:
        row: origins that the row's recipe names.
        values: what the rule sets.
        more: origins of what is not the row's.
        given: what the user gave, or a run was begun with.
    """
    named = {name: Origin("ours") for name in values} | dict(row) | dict(more)
    # One length, in steps or in images.
    named = {n: o for n, o in named.items() if n != "kimg" or "max_steps" not in given}
    shown = set(given) & {*named, "max_steps"}
    return described({n: o for n, o in named.items() if n in values or n in row}, shown)


def compared(options: EvaluationOptions, otherwise: str) -> list[str]:
    """Says what the run measures.

    Args:
        options: of the run.
        otherwise: what makes it measure, where it does not.
    """
    where, images = options.compared_with, counted(f"{options.eval_images:,}", "image")
    inception = options.compared_by == "inception"
    names = ", ".join(one.called(FID if inception else DISTANCE) for one in measures_of(options.metrics))
    if where is None and options.inception is not None:
        return [f"measured: {names}, of {images}"]
    if where is None:
        return [f"nothing is measured: {otherwise}"]
    if inception:
        return [f"compared with {where}: {names}, of {images}"]
    what = "pixels" if options.compared_by == "pixels" else "means and deviations of blocks of pixels"
    alone = "it is no FID, for which give --inception FILE, and compares runs on these images alone"
    if "fid" not in options.metrics:
        alone = "such numbers compare runs on these images alone; those of Inception's features need --inception FILE"
    return [f"compared with {where}: {names} of {what}, of {images}; {alone}"]


def has_labels(path: Path) -> bool:
    """Whether a data set has labels; one that cannot be told has none."""
    with contextlib.suppress(ValueError, OSError):
        place = user_path(path)
        if part := mnist_part(place):
            return part.has_labels
        return is_cifar(place) or read_labels(open_image_files(place)) is not None
    return False
