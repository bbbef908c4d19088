"""Crash-safe, portable checkpoints: tensors only, one entry a parameter, whatever the ZeRO stage and process count.

A checkpoint is a folder `step-0000400` with one safetensors file a network, `progress.json`, and `manifest.json` with
the SHA-256 of each. It is written beside its final place, synced, and renamed; `latest` is replaced last. A folder that
is incomplete or damaged is therefore never taken for a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ipfm.engine.files import atomic_write
from ipfm.engine.zero import TrainedNetwork, World

FORMAT = 1


class DamagedCheckpoint(ValueError):
    """A checkpoint folder that is incomplete or does not match its manifest; the message names the file."""


def save_checkpoint(
    folder: Path, step: int, networks: Mapping[str, TrainedNetwork], world: World, *, keep: int = 2
) -> Path:
    """Write `folder`/step-…: `step` optimiser steps are done. Every process calls it; the first one writes.

    Args:
        folder: the run's checkpoints folder.
        step: number of steps done.
        networks: what is saved: weights, optimiser state, EMA and step count of each.
        world: the run's processes.
        keep: number of checkpoints that stay, newest first.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: the disk is full or not writable; the checkpoints before it are untouched.
    """
    target = folder / f"step-{step:07d}"
    partial = folder / f".partial-{target.name}"
    if world.first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    progress: dict[str, Any] = {"format": FORMAT, "step": step, "steps_applied": {}}
    manifest: dict[str, str] = {}
    for name, network in networks.items():
        tensors = _gather(network, world)
        progress["steps_applied"][name] = network.steps_applied
        if world.first:
            path = partial / f"{name}.safetensors"
            save_file(tensors, path)
            _sync(path)
            manifest[path.name] = _sha256(path)
    if world.first:
        _write_json(partial / "progress.json", progress)
        manifest["progress.json"] = _sha256(partial / "progress.json")
        _write_json(partial / "manifest.json", manifest)
        _sync(partial)
        if target.exists():
            shutil.rmtree(target)
        os.replace(partial, target)
        with atomic_write(folder / "latest") as file:
            file.write(f"{target.name}\n".encode())
        _forget_old(folder, keep)
    world.barrier()
    return target


def find_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` that is whole, or None. A damaged one is reported on stderr and skipped."""
    # By name rather than by `latest`: a folder renamed just before a crash is whole although `latest` is older.
    for name in sorted((p.name for p in folder.glob("step-*") if p.is_dir()), reverse=True):
        try:
            verify_checkpoint(folder / name)
        except DamagedCheckpoint as error:
            print(f"ipfm: skipping a damaged checkpoint: {error}", file=sys.stderr)
        else:
            return folder / name
    return None


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
        if _sha256(path) != digest:
            raise DamagedCheckpoint(f"{path} does not match its checksum")


def load_checkpoint(checkpoint: Path, networks: Mapping[str, TrainedNetwork]) -> int:
    """Restore networks from a verified checkpoint, on any number of processes and any ZeRO stage.

    Returns:
        Number of steps done.

    Raises:
        ValueError: the checkpoint holds other networks or shapes.
    """
    progress = json.loads((checkpoint / "progress.json").read_text())
    if progress.get("format") != FORMAT:
        raise ValueError(f"{checkpoint} has checkpoint format {progress.get('format')}, this version reads {FORMAT}")
    for name, network in networks.items():
        path = checkpoint / f"{name}.safetensors"
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read as the state of network {name!r}: {error}") from error
        for kind in network.state_kinds:
            prefix = f"{kind}/"
            entries = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
            try:
                network.load(kind, entries)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
        network.steps_applied = progress["steps_applied"][name]
    return int(progress["step"])


def _gather(network: TrainedNetwork, world: World) -> dict[str, Tensor]:
    tensors = {}
    for kind in network.state_kinds:
        for name, tensor in network.full(kind):
            if world.first:
                tensors[f"{kind}/{name}"] = tensor.detach().to("cpu", torch.float32).contiguous().clone()
    return tensors


def _forget_old(folder: Path, keep: int) -> None:
    for old in sorted(folder.glob("step-*"), reverse=True)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    for partial in folder.glob(".partial-step-*"):
        shutil.rmtree(partial, ignore_errors=True)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
