"""What a run takes of the disk at most, said before it begins: checkpoints, snapshots, the best network, the result."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from ipfm.engine.config import RunConfig
from ipfm.engine.runtime.wording import counted, size
from ipfm.engine.training.run_folder import SET_ASIDE


@dataclass(frozen=True)
class DiskUse:
    """Bytes that a run writes, at most; pictures and logs are not counted.

    Attributes:
        checkpoint: of one checkpoint.
        checkpoints: how many are there at a time, with the one that is being written.
        model: of one exported network.
        snapshots: how many are kept along the way.
        snapshot: bytes of one of those.
    """

    checkpoint: int
    checkpoints: int
    model: int
    snapshots: int
    snapshot: int

    @property
    def total(self) -> int:
        """Of all together: the result, the best, the snapshots, and one network more while it is written."""
        return self.checkpoint * self.checkpoints + self.snapshot * self.snapshots + self.model * 3

    def in_words(self) -> str:
        """As in "11.0 MiB for 3 checkpoints of 3.4 MiB, 10 snapshots, the best and the result of 1.0 MiB each"."""
        other = f" of {size(self.snapshot)}" if self.snapshot != self.model else ""
        kept = f", {counted(self.snapshots, 'snapshot')}{other}, the best" if self.snapshots else ", the best"
        checkpoints = f"{counted(self.checkpoints, 'checkpoint')} of {size(self.checkpoint)}"
        return f"at most {size(self.total)} for {checkpoints}{kept} and the result of {size(self.model)} each"


def disk_use(config: RunConfig, *, checkpoint: int, model: int) -> DiskUse:
    """What a run with these settings takes.

    Args:
        config: settings of the run.
        checkpoint: bytes of a checkpoint.
        model: bytes of an exported network.
    """
    taken = config.total_steps // config.snapshot_every if config.snapshot_every else 0
    kept = taken if config.keep_snapshots == 0 else min(taken, config.keep_snapshots)
    snapshot = model // 2 if config.snapshot_precision == "fp16" else model
    return DiskUse(checkpoint, config.keep_checkpoints + 1, model, kept * len(config.averages), snapshot)


def missing_room(use: DiskUse, run: Path) -> str | None:
    """A line where the disk of the run folder, which need not exist, has not the room that is still to be taken."""
    place = next(place for place in (run.absolute(), *run.absolute().parents) if place.exists())
    try:
        free = shutil.disk_usage(place).free
    except OSError:
        return None
    still = use.total - _taken(run)
    if still <= free:
        return None
    return (
        f"{place} has {size(free)} free, and the run takes up to {size(still)} more: it may end where a checkpoint "
        "cannot be written; --keep-checkpoints and --keep-snapshots bound it"
    )


def _taken(run: Path) -> int:
    """Bytes of the networks and checkpoints that are in the run folder already."""
    total = 0
    for folder, folders, names in os.walk(run):
        # The run of a teacher within this one has room of its own, and so have those that were put aside.
        folders[:] = [name for name in folders if name not in ("teacher", SET_ASIDE)]
        for name in names:
            if name.endswith(".safetensors"):
                try:
                    total += os.stat(os.path.join(folder, name)).st_size
                except OSError:  # removed meanwhile
                    continue
    return total
