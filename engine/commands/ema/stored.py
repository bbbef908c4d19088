"""The power-function averages that a run, or a folder of EDM2's raw snapshots, has stored along the training."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ipfm.engine.averages import Average, Profile
from ipfm.engine.training.checkpoint import checkpoints_in
from ipfm.engine.training.snapshots import all_snapshots_in
from ipfm.models import NetworkConfig
from ipfm.models.checkpoints.recognise import run_kind
from ipfm.models.checkpoints.run_models import EXPORTS
from ipfm.models.facts import TeacherFacts
from ipfm.models.store import CONFIG_FILE, StoredConfig, opened, read_config

Tensors = tuple[tuple[str, ...], Callable[[str], Tensor]]
"""Names of a network's tensors, and what reads one."""

_RAW = re.compile(r".*-(\d{7,10})-(0\.\d{3})\.pkl")


@dataclass(frozen=True)
class StoredAverage:
    """An average in a file, none of whose tensors is in memory.

    Attributes:
        profile: its images and its relative width.
        where: the file or folder, for messages.
        network: its architecture.
        facts: what is to be said of a network made of it.
        tensors: opens it.
    """

    profile: Profile
    where: Path
    network: NetworkConfig
    facts: Mapping[str, Any]
    tensors: Callable[[], AbstractContextManager[Tensors]]


def stored_averages(place: Path, D: float | None) -> list[StoredAverage]:
    """What lies in `place`, in the order of (images, width).

    Args:
        place: a run folder, or a folder of EDM2's raw snapshots.
        D: auxiliary dimensions that these are of, whose files do not say it; None is diffusion.

    Raises:
        ValueError: it is neither, it has no power-function average, or a file cannot be read; one line.
    """
    if not place.is_dir():
        raise ValueError(
            f"{place} is no folder: give a run that was trained with --ema, or a folder of EDM2's raw snapshots "
            "(network-snapshot-0001048-0.050.pkl, …)"
        )
    kind = run_kind(place)
    if kind is None:
        found = list(_raw_snapshots(place, D))
        if not found:
            raise ValueError(
                f"{place} is no run, and has no raw snapshots of EDM2 (network-snapshot-0001048-0.050.pkl, …)"
            )
    else:
        if D is not None:
            raise ValueError(f"D cannot be given: {place} says itself what it is")
        found = list(_of_run(place, kind))
        if not found:
            raise ValueError(
                f"{place} has stored no power-function average: train with --ema 0.05 0.10 and --snapshot-every"
            )
    # A checkpoint has in fp32 what a snapshot may have in fp16: the later one stays.
    distinct = {one.profile: one for one in found}
    ordered = [distinct[profile] for profile in sorted(distinct)]
    for other in ordered[1:]:
        if other.network != ordered[0].network:
            raise ValueError(f"{other.where} is a network of another architecture than {ordered[0].where}")
    return ordered


def _raw_snapshots(folder: Path, D: float | None) -> Iterator[StoredAverage]:
    from ipfm.models.checkpoints.reader import open_checkpoint

    for path in sorted(folder.iterdir()):
        if not (named := _RAW.fullmatch(path.name)) or not path.is_file():
            continue
        # What the name says is rounded down; training counts in blocks of 1024 images.
        images = (int(named[1]) * 1000 + 999) // 1024 * 1024
        checkpoint = open_checkpoint(path)
        network = checkpoint.stream(D=D)

        @contextmanager
        def tensors(found: Any = network) -> Iterator[Tensors]:
            yield found.names, found.load

        source = {"file": path.name, **checkpoint.source_facts(network)}
        facts = TeacherFacts(D=network.config.D, source=source).to_json()
        yield StoredAverage(Profile(float(images), float(named[2])), path, network.config, facts, tensors)


def _of_run(run: Path, kind: str) -> Iterator[StoredAverage]:
    """The averages in the run's snapshots, its result, its best network, and its checkpoints."""
    exported = run / EXPORTS[kind]
    models = (exported.with_name(f"{exported.name}-best"), exported)
    for path in (*all_snapshots_in(run), *(path for path in models if (path / CONFIG_FILE).is_file())):
        stored = read_config(path)
        yield from _known(stored, path, stored.extra.get("average"))
    for path in reversed(checkpoints_in(run / "checkpoints")):
        stored = read_config(path)
        if not stored.averages:
            yield from _known(stored, path, None)
        for name, beginning in stored.averages.items():
            yield from _known(replace(stored, average=beginning), path, name)


def _known(stored: StoredConfig, path: Path, name: Any) -> Iterator[StoredAverage]:
    """The average, if it is by a power; `name`: which of several it is."""
    settings, steps = stored.facts.settings, stored.facts.optimizer_steps
    widths, batch = settings.get("ema"), settings.get("batch")
    if not isinstance(widths, list) or not isinstance(batch, int) or not steps:
        return
    known = {Average(std=float(std)).name: float(std) for std in widths}
    # Where there is one average alone its name is not said.
    std = known.get(name) if name is not None else next(iter(known.values()))
    if std is not None:
        profile = Profile(float(steps * batch), std)
        yield StoredAverage(profile, path, stored.network, stored.extra, lambda: opened(stored))
