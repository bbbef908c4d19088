"""Run folders of a run on several machines: whether they are one, and what a machine needs that has one of its own.

The first process writes. Where the machines share no disk, its folder is the run's; the others get a copy of what a
start reads: config.json, what is exported, and the newest checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ipfm.engine.distributed.agreement import together
from ipfm.engine.distributed.world import World
from ipfm.engine.runtime.errors import Failed
from ipfm.engine.runtime.launcher import local_rank, several_machines
from ipfm.engine.training.checkpoint import checkpoints_in, find_checkpoint, step_of
from ipfm.engine.training.run_folder import ABLATION_FILE, SET_ASIDE
from ipfm.models.atomic_files import atomic_write, why

# In a folder that is a copy of another machine's: which one's.
COPY_FILE = "copy.json"
# Bytes that are sent at once.
CHUNK = 2**26
# Bytes at either end of a large file by which two of one length are told apart.
_ENDS = 2**16


def own_host() -> str:
    """The name of this machine."""
    return socket.gethostname()


@dataclass(frozen=True)
class Contents:
    """What a start reads in a run folder.

    Attributes:
        files: digest of each, by its path within the folder.
        newest: steps of the newest checkpoint; -1 where there is none.
        size: bytes.
        copy: the folder is marked as a copy.
        free: there is nothing in its place, or an empty folder.
    """

    files: Mapping[str, str]
    newest: int
    size: int
    copy: bool
    free: bool


def contents(folder: Path, step: int | None = None, *, whole: bool = False) -> Contents:
    """What a start reads in the run folder `folder`, which need not exist.

    Args:
        folder: the run folder.
        step: the step that is gone back to.
        whole: the newest checkpoint that is whole, which takes the time to read it; else the newest by name.

    Raises:
        OSError: it cannot be read.
    """
    files = {str(path.relative_to(folder)): path for path in _needed(folder, step, whole=whole)}
    newest = max((step_of(checkpoint) for checkpoint in checkpoints_in(folder / "checkpoints")), default=-1)
    size = sum(path.stat().st_size for path in files.values())
    digests = {name: _digest(path) for name, path in files.items()}
    free = not any(folder.iterdir()) if folder.is_dir() else not folder.exists()
    return Contents(digests, newest, size, (folder / COPY_FILE).exists(), free)


def _needed(folder: Path, step: int | None, *, whole: bool) -> Iterator[Path]:
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in (SET_ASIDE, COPY_FILE):
            continue
        if path.name == "checkpoints":
            if whole:
                found = find_checkpoint(path, step)
            else:
                found = next((c for c in checkpoints_in(path) if step in (None, step_of(c))), None)
            yield from () if found is None else sorted(file for file in found.iterdir() if file.is_file())
        elif path.is_dir():
            # Snapshots, and the best network, are for people.
            if not re.fullmatch(r"step-\d+|.*-best|.*-step-\d+", path.name):
                yield from _needed(path, None, whole=whole)
        elif path.suffix in (".json", ".safetensors"):
            yield path


def _digest(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        read = file.read(_ENDS)
        if size > 2 * _ENDS:
            file.seek(-_ENDS, 2)
        read += file.read(_ENDS)
    return f"{size} {hashlib.sha256(read).hexdigest()}"


def newest_elsewhere(own: Contents, first: Contents) -> bool:
    """Whether a machine is further than the first one, whose folder would go on from an earlier step."""
    return own.newest > first.newest


def copy_from_first(path: Path, step: int | None, world: World, *, wanted: bool) -> int:
    """Send what a start reads from the first process's run folder to the machines that want it.

    Every process calls this; of those on a machine the first one writes, and the others wait.

    Args:
        path: the run folder, by the name that it has here.
        step: the step that is gone back to.
        world: the run's processes.
        wanted: this machine's folder differs from the first one's.

    Returns:
        Bytes of the copy.

    Raises:
        Failed: on every process: a disk refuses, on some machine.
    """
    found = together(lambda: list(contents(path, step, whole=True).files) if world.is_main else [], world.size)
    names, size = _send(path, found, world, wanted=wanted)
    host = world.broadcast_text(own_host())
    together(lambda: _mark(path, names, host) if _writes(world, wanted) else None, world.size)
    if world.is_main:
        (path / COPY_FILE).unlink(missing_ok=True)
    return size


def fetch(folder: Path, world: World) -> None:
    """Bring a folder of the first machine's run, such as a result, to those that do not share it.

    Every process calls this before it reads the folder.

    Raises:
        Failed: on every process: a disk refuses, on some machine.
    """
    if not several_machines():
        return
    wanted = bool(seen_elsewhere(folder))
    if not world.all_reduce_max_(torch.tensor(int(wanted), device=world.device)):
        return
    found = [path.name for path in sorted(folder.iterdir()) if path.is_file()] if world.is_main else []
    _send(folder, found, world, wanted=wanted)
    host = world.broadcast_text(own_host())
    together(lambda: _mark_new(folder, host) if _writes(world, wanted) else None, world.size)


def _mark_new(folder: Path, host: str) -> None:
    """Mark what `folder` was fetched into as a copy, if it holds no run otherwise."""
    root = next(known for known in _elsewhere if folder.resolve().is_relative_to(known))
    if not any((root / name).exists() for name in ("config.json", ABLATION_FILE)):
        _mark_copy(root, host)


def _writes(world: World, wanted: bool) -> bool:
    return wanted and not world.is_main and local_rank() in (0, None)


def _send(folder: Path, names: list[str], world: World, *, wanted: bool) -> tuple[list[str], int]:
    """Send files of the first process's folder, which it names; their names, and their bytes."""
    listed: list[Any] = [[(name, (folder / name).stat().st_size) for name in names]]
    dist.broadcast_object_list(listed, src=0, device=world.device)
    files: list[tuple[str, int]] = listed[0]
    for name, size in files:
        work = partial(_transfer, folder / name, size, world, writes=_writes(world, wanted))
        together(work, world.size)
    return [name for name, _ in files], sum(size for _, size in files)


def _transfer(path: Path, size: int, world: World, *, writes: bool) -> None:
    """Send one file. What goes wrong on a machine is raised once all of it has been sent."""
    with path.open("rb") if world.is_main else _nothing() as file:
        failed: OSError | None = None
        target = path.with_name(f".{path.name}.copy")
        try:
            if writes:
                path.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(b"")
        except OSError as error:
            failed = error
        for first in range(0, size, CHUNK):
            count = min(CHUNK, size - first)
            chunk = torch.empty(count, dtype=torch.uint8)
            if world.is_main:
                chunk = torch.frombuffer(bytearray(file.read(count)), dtype=torch.uint8)
            chunk = chunk.to(world.device)
            dist.broadcast(chunk, src=0)
            if writes and failed is None:
                try:
                    with target.open("ab") as out:
                        out.write(chunk.cpu().numpy().tobytes())
                except OSError as error:
                    failed = error
    if failed is not None:
        with suppress(OSError):
            target.unlink(missing_ok=True)
        raise Failed(f"{path} cannot be written on {own_host()} ({why(failed)}), where the run folder is not shared")
    if writes:
        target.replace(path)


class _nothing:
    """No file."""

    def __enter__(self) -> Any:
        return None

    def __exit__(self, *_: object) -> None:
        return None


def _mark(path: Path, names: list[str], host: str) -> None:
    """Mark a copy as such; checkpoints of earlier copies go, and those of a run that was this machine's own stay."""
    copied = (path / COPY_FILE).exists()
    own = not copied and any(
        not any(name.startswith(f"checkpoints/{checkpoint.name}/") for name in names)
        for checkpoint in checkpoints_in(path / "checkpoints")
    )
    if own:
        return
    if not path.is_dir():
        return
    _mark_copy(path, host)
    kept = {name.split("/")[1] for name in names if name.startswith("checkpoints/")}
    for checkpoint in checkpoints_in(path / "checkpoints") if kept else ():
        if checkpoint.name not in kept:
            shutil.rmtree(checkpoint, ignore_errors=True)


def _mark_copy(path: Path, host: str) -> None:
    with atomic_write(path / COPY_FILE) as file:
        file.write((json.dumps({"of": host}) + "\n").encode())


# Run folders that this process sees another one of than the first process, and the machine of that.
_elsewhere: dict[Path, str] = {}


def find_elsewhere(path: Path, world: World) -> tuple[str, list[str]]:
    """Look whether the first process's run folder `path`, which exists, is that of every machine.

    Every process calls this.

    Returns:
        The machine of the first process, and those that see another folder; none where all see one.
    """
    token = world.broadcast_text(f".seen-{secrets.token_hex(8)}")
    if world.is_main:
        with suppress(OSError):
            (path / token).touch()
    host = world.broadcast_text(own_host())
    sees = (path / token).exists()
    found: list[Any] = [None] * world.size
    dist.all_gather_object(found, (own_host(), sees))
    if world.is_main:
        with suppress(OSError):
            (path / token).unlink(missing_ok=True)
    # Where the first process cannot write it nobody sees it, and nothing is saved either.
    apart = sorted({name for name, it_sees in found if not it_sees}) if found[0][1] else []
    if apart and not sees:
        _elsewhere[path.resolve()] = host
    return host, apart


def seen_elsewhere(path: Path) -> str:
    """The machine whose folder the run folder `path` is, where this process sees another one; else ""."""
    resolved = path.resolve()
    return next((host for known, host in _elsewhere.items() if resolved.is_relative_to(known)), "")
