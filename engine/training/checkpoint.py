"""Checkpoints on disk: portable, checked, and never half-written.

A checkpoint is a folder `step-0000400` with one safetensors file a network, `progress.json`, `averaged.json` (which
average is in it, so that it can be taken for a model) and `manifest.json` with the SHA-256 of each: tensors only, one
entry a parameter and buffer, whatever the ZeRO stage and the number of processes. It is written beside its final place,
synced, and renamed; `latest` is replaced last. A folder that is incomplete or damaged is therefore never taken for a
checkpoint. Names in a run's checkpoints folder:

    step-0000400            a checkpoint
    .replaced-step-0000400  an older one of the same step, while the new one takes its place
    .partial-step-0000400   one that is being written, or removed
    latest                  name of the newest, for people: what counts is the newest one that is whole
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ipfm.engine.distributed.zero import TrainedNetwork
from ipfm.models.atomic_files import atomic_write, make_folder, sync, why, write_durably
from ipfm.models.store import AVERAGED_FILE

FORMAT = 1
# Kind of the entries that are no parameter's, such as the frequencies of an embedding; older checkpoints have none.
BUFFER = "buffer"


class DamagedCheckpoint(ValueError):
    """A checkpoint folder that is incomplete or does not match its manifest; the message names the file."""


class Draft:
    """A checkpoint in the making. One process at a time writes in a run's checkpoints folder.

    Args:
        folder: the run's checkpoints folder, made where it does not exist.
        step: number of steps done.

    Raises:
        OSError: from here and from every method: the disk is full or cannot be written. The checkpoints before it are
            untouched.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._folder, self._step = folder, step
        self.target = folder / f"step-{step:07d}"
        self._partial = folder / f".partial-{self.target.name}"
        self._steps_applied: dict[str, int] = {}
        self._loss_scale: dict[str, Mapping[str, float]] = {}
        self._manifest: dict[str, str] = {}
        make_folder(folder)
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir()

    def add(
        self, name: str, tensors: Mapping[str, Tensor], steps_applied: int, loss_scale: Mapping[str, float]
    ) -> None:
        """The state of a network: float32 tensors in the host's memory, by "kind/parameter", and its counters."""
        path = self._partial / f"{name}.safetensors"
        try:
            save_file(dict(tensors), path)
        except SafetensorError as error:
            # How safetensors tells that the disk refuses.
            raise OSError(str(error)) from error
        sync(path)
        self._manifest[path.name] = _sha256(path)
        self._steps_applied[name] = steps_applied
        if loss_scale:
            self._loss_scale[name] = loss_scale

    def say_average(self, about: Mapping[str, Any]) -> None:
        """Say which average this holds, see `describe_average`: a reader can take it for a model."""
        self._json(AVERAGED_FILE, about)

    def finish(self) -> Path:
        """Make it the newest checkpoint; its folder."""
        progress = {"format": FORMAT, "step": self._step, "steps_applied": self._steps_applied}
        self._json("progress.json", progress | ({"loss_scale": self._loss_scale} if self._loss_scale else {}))
        self._json("manifest.json", self._manifest)
        sync(self._partial)
        if self.target.exists():
            if is_whole(self.target):
                # At every moment one of the two has a name by which it is found.
                replaced = self._folder / f".replaced-{self.target.name}"
                shutil.rmtree(replaced, ignore_errors=True)
                os.replace(self.target, replaced)
            else:
                shutil.rmtree(self.target)
        os.replace(self._partial, self.target)
        sync(self._folder)
        with atomic_write(self._folder / "latest") as file:
            file.write(f"{self.target.name}\n".encode())
        return self.target

    def discard(self) -> None:
        """Remove what was written; never fails."""
        shutil.rmtree(self._partial, ignore_errors=True)

    def _json(self, name: str, value: Any) -> None:
        payload = (json.dumps(value, indent=1) + "\n").encode()
        write_durably(self._partial / name, payload)
        self._manifest[name] = hashlib.sha256(payload).hexdigest()


def checkpoints_in(folder: Path) -> list[Path]:
    """What may be a checkpoint in `folder`, newest first."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        named = re.fullmatch(r"(\.replaced-)?step-(\d+)", path.name)
        if named and path.is_dir():
            found.append((int(named[2]), named[1] is None, path))
    return [path for *_, path in sorted(found, reverse=True)]


def step_of(checkpoint: Path) -> int:
    """Steps done at a checkpoint, which its name says."""
    return int(checkpoint.name.rpartition("-")[2])


def forget_after(folder: Path, step: int) -> None:
    """Remove the checkpoints in `folder` of more than `step` steps.

    Raises:
        OSError: the disk refuses.
    """
    for path in checkpoints_in(folder):
        if step_of(path) > step:
            # Under another name first: half of a checkpoint is not to be met under its own.
            removed = folder / f".partial-{path.name}"
            shutil.rmtree(removed, ignore_errors=True)
            path.rename(removed)
            shutil.rmtree(removed, ignore_errors=True)


def find_checkpoint(folder: Path, step: int | None = None) -> Path | None:
    """The newest checkpoint in `folder` that is whole, or None. A damaged one is reported on stderr and skipped.

    Args:
        folder: the run's checkpoints folder.
        step: take the one of this step instead; None of step 0.
    """
    # By name rather than by `latest`: a folder renamed just before a crash is whole although `latest` is older.
    for path in checkpoints_in(folder):
        if step is not None and step_of(path) != step:
            continue
        try:
            verify_checkpoint(path)
        except DamagedCheckpoint as error:
            print(f"ipfm: skipping a damaged checkpoint: {error}", file=sys.stderr)
        else:
            return path
    return None


def is_whole(checkpoint: Path) -> bool:
    """Whether every file of the checkpoint is there and matches its manifest."""
    try:
        verify_checkpoint(checkpoint)
    except DamagedCheckpoint:
        return False
    return True


def verify_checkpoint(checkpoint: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        DamagedCheckpoint: a file is missing or differs.
    """
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        items = list(manifest.items())
    except (OSError, ValueError, AttributeError) as error:
        raise DamagedCheckpoint(f"{checkpoint / 'manifest.json'} cannot be read ({type(error).__name__})") from error
    if "progress.json" not in manifest:
        raise DamagedCheckpoint(f"{checkpoint / 'manifest.json'} does not list progress.json")
    for name, digest in items:
        path = checkpoint / name
        if not path.is_file():
            raise DamagedCheckpoint(f"{path} is missing")
        try:
            found = _sha256(path)
        except OSError as error:
            raise DamagedCheckpoint(f"{path} cannot be read ({why(error)})") from error
        if found != digest:
            raise DamagedCheckpoint(f"{path} does not match its checksum")


def check_format(checkpoint: Path) -> None:
    """Check that this version can read the checkpoint. One that cannot be read passes: it is damaged, not foreign.

    Raises:
        ValueError: another version wrote it.
    """
    try:
        found = json.loads((checkpoint / "progress.json").read_text()).get("format")
    except (OSError, ValueError, AttributeError):
        return
    if isinstance(found, int) and found != FORMAT:
        raise ValueError(_another_format(checkpoint, found))


def _another_format(checkpoint: Path, found: object) -> str:
    return f"{checkpoint} has checkpoint format {found}, this version reads {FORMAT}"


def load_checkpoint(checkpoint: Path, networks: Mapping[str, TrainedNetwork]) -> int:
    """Restore networks from a verified checkpoint, on any number of processes and any ZeRO stage.

    Returns:
        Number of steps done.

    Raises:
        ValueError: the checkpoint holds other networks or shapes.
    """
    try:
        progress = json.loads((checkpoint / "progress.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{checkpoint / 'progress.json'} cannot be read: {why(error)}") from error
    if progress.get("format") != FORMAT:
        raise ValueError(_another_format(checkpoint, progress.get("format")))
    for name, network in networks.items():
        path = checkpoint / f"{name}.safetensors"
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read as the state of network {name!r}: {error}") from error
        for kind in (*network.state_kinds, BUFFER):
            prefix = f"{kind}/"
            entries = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
            try:
                if kind == BUFFER:
                    network.load_buffers(entries)
                else:
                    network.load(kind, entries)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
        network.steps_applied = progress["steps_applied"][name]
        network.loss_scale_state = progress.get("loss_scale", {}).get(name, {})
    return int(progress["step"])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
