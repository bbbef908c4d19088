"""The folder of a run: whose it is, its lock, and where a run continues."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ipfm.engine.checks import option_name
from ipfm.engine.config import (
    CURRENT_RULES,
    FIRST_RULES,
    RunConfig,
    TeacherConfig,
    added_settings,
    free_settings,
    place_settings,
)
from ipfm.engine.evaluation.results import read_results
from ipfm.engine.objectives import OBJECTIVES
from ipfm.engine.runtime.errors import FolderInUse
from ipfm.engine.runtime.files import read_json
from ipfm.engine.runtime.wording import counted
from ipfm.engine.training.checkpoint import check_format, checkpoints_in, is_whole, step_of
from ipfm.models import Precond
from ipfm.models.atomic_files import atomic_write, forget_unfinished
from ipfm.models.checkpoints.run_models import EXPORTS
from ipfm.models.store import TENSOR_FILE, in_the_way

FORMAT = 1
# In a run folder: what came after steps that the run went back to, each a run folder of its own.
SET_ASIDE = "set-aside"
# In the folder of an ablation, which holds its runs as VARIANT/seedN.
ABLATION_FILE = "ablation.json"
# Facts of a run that are digests, of which another one stands for:
_HASHED = {"teacher": "another network", "pictures": "another set of images"}
_DIGEST = re.compile(r"[0-9a-f]{16,64}")

C = TypeVar("C", bound=RunConfig)


@dataclass(frozen=True)
class RunFolder:
    """A run folder that belongs to this configuration."""

    path: Path
    record: Mapping[str, Any] | None = None
    """Its config.json, on the process that writes."""
    kind: str = "distill"
    """"distill" or "teacher"."""

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints lie."""
        return self.path / "checkpoints"

    def restore(self) -> bool:
        """Take the folder again if somebody has removed it under the run; whether that was so.

        Raises:
            ValueError: another process has taken it meanwhile.
            OSError: it cannot be written.
        """
        if self.record is None or (self.path / "config.json").exists():
            return False
        release_folder(self.path)
        lock_folder(self.path, patience=0)
        _write_record(self.path, self.record)
        return True


def check_run_folder(path: Path, kind: str, config: RunConfig, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Compare what is in `path` with this configuration: every setting that says it identifies a run, see `setting`.

    Nothing is written.

    Args:
        path: the run folder; it need not exist.
        kind: "distill" or "teacher".
        config: settings of the run.
        facts: what else identifies the run, such as the teacher's checksum; plain JSON values. One that is not known
            yet may be left out: it is then not compared, and stays as the folder has it.

    Returns:
        The content that the folder's config.json is to have: what it has, where the run is finished and only read. Its
        rules, and what is `decided`, are those that the folder's run began with.

    Raises:
        ValueError: `path` cannot be a folder or cannot be written; it holds another run, something that is no run,
            checkpoints of another version's format, more steps than the settings ask for, no checkpoint of the step to
            go back to, files that the exported network would replace, or any run with ``resume=False``. The message is
            one line and names each setting that differs.
        OSError: the folder cannot be read.
    """
    record = {"format": FORMAT, "kind": kind, **config.recorded(), "config": config.to_json(), **facts}
    if about := config.about():
        record["about"] = dict(about)
    if decided := config.decided:
        record["decided"] = dict(decided)
    try:
        path.resolve()
    except RuntimeError:
        raise ValueError(f"{path} is a link that leads back to itself: choose another --out") from None
    for place in (path, *path.parents):
        if place.exists() and not place.is_dir():
            raise ValueError(f"{place} is a file, the run folder {path} cannot be there: choose another --out")
    # Every process can tell beforehand, and before the networks are built, what would stop the first one. A finished
    # run is only read.
    places = (path / "checkpoints", next(p for p in (path, *path.absolute().parents) if p.exists()))
    for place in () if is_settled(path, kind, config, measured=False) else places:
        if place.exists() and not os.access(place, os.W_OK | os.X_OK):
            raise ValueError(f"{place} cannot be written: choose another --out")
    if not path.is_dir() or all(_is_leftover(entry) for entry in path.iterdir()):
        _check_steps(path, kind, config)
        return record
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} is not empty and holds no run (no config.json): choose another --out")
    if not config.resume:
        raise ValueError(f"{path} holds a run already and --no-resume was given: choose another --out")
    free = _free(config)
    try:
        found = _with_rules(json.loads((path / "config.json").read_text(encoding="utf-8")), path)
        found["config"] = {**added_settings(type(config)), **found["config"]}
        if found["config"]["rules"] == FIRST_RULES:
            record["config"]["rules"] = FIRST_RULES
        if checkpoints_in(path / "checkpoints") and (decided := _decided(found, config)):
            record["decided"] = decided
        differences = _differences(found, record, free)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path / 'config.json'} cannot be read as a run's configuration: choose another --out"
        ) from error
    if differences:
        raise ValueError(f"{path} belongs to another configuration ({'; '.join(differences)}): choose another --out")
    for checkpoint in checkpoints_in(path / "checkpoints"):
        try:
            check_format(checkpoint)
        except ValueError as error:
            raise ValueError(f"{error}: choose another --out") from None
    _check_steps(path, kind, config)
    if is_settled(path, kind, config):
        return {**record, **found, **facts}
    if reason := in_the_way(path / EXPORTS[kind]):
        raise ValueError(f"{reason}: move it away, or choose another --out")
    return {**found, **record}


def is_settled(path: Path, kind: str, config: RunConfig, *, measured: bool = True) -> bool:
    """Whether the folder's run has all the steps of these settings, and its result: it is only read.

    Args:
        path: the run folder.
        kind: "distill" or "teacher".
        config: the settings.
        measured: a distillation's table is a part of the result.
    """
    newest, result = max(_steps(path), default=None), exported_steps(path, kind)
    if config.from_step is not None or newest is None or not newest == result == _length(config):
        return False
    # What is damaged or has been deleted is made again.
    whole = (path / EXPORTS[kind] / TENSOR_FILE).is_file()
    return whole and (kind == "teacher" or not measured or bool(read_results(path)))


def settings_said(path: Path, config: RunConfig) -> str:
    """What of the settings that a finished run was made with differs from these, as far as its result may show it."""
    found = (read_json(path / "config.json") or {}).get("config")
    ours, places = config.to_json(), place_settings(type(config))
    if not isinstance(found, dict):
        return ""
    return "; ".join(
        f"{option_name(name)} is {_short(found[name])} there, {_short(value)} here"
        for name, value in ours.items()
        if name in found and name not in {*places, "rules"} and found[name] != value
    )


def _steps(path: Path) -> list[int]:
    """Steps done at the folder's checkpoints, rising."""
    return sorted({step_of(checkpoint) for checkpoint in checkpoints_in(path / "checkpoints")})


def exported_steps(path: Path, kind: str) -> int | None:
    """Steps done by the exported network; None where there is none, or it does not say."""
    extra = (read_json(path / EXPORTS[kind] / "config.json") or {}).get("extra")
    steps = extra.get("optimizer_steps") if isinstance(extra, dict) else None
    return steps if isinstance(steps, int) else None


def _length(config: RunConfig) -> int | None:
    return None if config.max_steps is None and config.kimg is None else config.total_steps


def _check_steps(path: Path, kind: str, config: RunConfig) -> None:
    """ValueError where the run in the folder is beyond the end of these settings, or cannot begin where they say."""
    steps, start, total = _steps(path), config.from_step, _length(config)
    known = ", ".join(map(str, steps))
    if start and start not in steps:
        has = f"it has those of steps {known}" if steps else "it has none"
        raise ValueError(f"{path} has no checkpoint of step {start}: {has}; or leave --from-step out")
    if start and not any(is_whole(c) for c in checkpoints_in(path / "checkpoints") if step_of(c) == start):
        raise ValueError(f"the checkpoint of step {start} in {path} is damaged: leave --from-step out")
    if total is None:
        return
    length = f"--max-steps {total}" if config.kimg is None else f"--kimg {config.kimg:g} ({total} steps)"
    reached = (steps[-1] if steps else 0) if start is None else start
    if reached > total:
        earlier = max((step for step in steps if step <= total), default=0)
        raise ValueError(
            f"{path} is at step {reached} already, beyond {length}: give at least {reached} steps, --from-step "
            f"{earlier} to go back and put aside what came after, or choose another --out"
        )
    exported = None if steps or start is not None else exported_steps(path, kind)
    if exported is not None:
        raise ValueError(
            f"{path} holds the result of {counted(exported, 'step')} and no checkpoint to continue from: give "
            "--from-step 0 to replace it, or choose another --out"
        )


@contextmanager
def claimed(path: Path, record: Mapping[str, Any], config: RunConfig, *, write: bool) -> Iterator[None]:
    """Keep others out of a folder that `check_run_folder` approved, while the run is made; nothing is recorded yet.

    It is checked again, for what others have done to it since. Where the block fails a new folder is let go.

    Args:
        path: the run folder, created where it does not exist.
        record: what `check_run_folder` returned.
        config: the settings that it was asked with.
        write: this process is the one that writes.

    Raises:
        ValueError: another process is using the folder and does not leave, or it holds another run by now.
        OSError: the folder cannot be written.
    """
    if not write:
        yield
        return
    lock_folder(path)
    try:
        known = ("format", "kind", "config", "about", "decided", *config.recorded())
        facts = {name: value for name, value in record.items() if name not in known}
        check_run_folder(path, record["kind"], config, facts)
        yield
    except BaseException:
        if all(entry.name == "run.lock" for entry in path.iterdir()):
            release_folder(path)
            with suppress(OSError):
                (path / "run.lock").unlink()
                path.rmdir()
        raise


def open_run_folder(path: Path, record: Mapping[str, Any], *, write: bool) -> RunFolder:
    """Take a folder that `check_run_folder` approved: lock it, write its config.json, remove what killed runs left.

    Args:
        path: the run folder, created where it does not exist.
        record: what `check_run_folder` returned.
        write: this process is the one that writes.

    Raises:
        ValueError: another process is using the folder and does not leave.
        OSError: the folder cannot be written.
    """
    if write:
        lock_folder(path)
        # A run that was put aside may go on there.
        forget_unfinished(path, but=SET_ASIDE)
        if read_json(path / "config.json") != record:
            _write_record(path, record)
    return RunFolder(path, record if write else None, record["kind"])


def _write_record(path: Path, record: Mapping[str, Any]) -> None:
    with atomic_write(path / "config.json") as file:
        file.write((json.dumps(record, indent=1) + "\n").encode())


def _with_rules(record: dict[str, Any], path: Path) -> dict[str, Any]:
    """A folder's record with the rules by which its run goes on; one that is older than the setting has the first."""
    begun = checkpoints_in(path / "checkpoints")
    return {**record, "config": {"rules": FIRST_RULES if begun else CURRENT_RULES, **record["config"]}}


def as_begun(config: C, record: Mapping[str, Any]) -> C:
    """`config` with what the run of this record, see `check_run_folder`, decided when it began, if anything."""
    return config.keeping(record.get("decided", {}))


def _decided(found: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """What the folder's run has decided; one that is older than the record, by the length that it has there.

    Raises:
        ValueError, TypeError: what it has there is nothing that can be decided.
    """
    if kept := found.get("decided"):
        config.keeping(kept)
        return dict(kept)
    length = {name: found["config"].get(name) for name in ("max_steps", "kimg")}
    with suppress(ValueError):  # settings that no run of that length can have: they differ, which is told
        return dict(replace(config, from_step=None, **length).decided)
    return {}


def _free(config: RunConfig) -> frozenset[str]:
    """Settings that may change: of this class, as it says; of others, whose runs the folder may hold, as those say."""
    kinds: tuple[type[RunConfig], ...] = (TeacherConfig, *OBJECTIVES.values())
    elsewhere = frozenset[str]().union(*map(free_settings, kinds))
    return free_settings(type(config)) | (elsewhere - {f.name for f in fields(config)})


def _differences(found: Mapping[str, Any], ours: Mapping[str, Any], free: frozenset[str]) -> list[str]:
    """What identifies the two runs and differs: "alpha is 1.0 there, 1.2 here"."""
    # A fact that one side does not know yet, such as a teacher still to be trained, is no difference.
    known = [name for name in ours if name in found and name not in ("config", "about", "start", "decided")]
    # A distillation that goes on from nothing else, and a teacher that takes nothing over, do not say so.
    name = {"distill": "continues", "teacher": "transfers"}[str(ours["kind"])]
    if ours["kind"] == found.get("kind") and name in ours.keys() | found.keys():
        ours, found = {name: "nothing", **ours}, {name: "nothing", **found}
        known = [*(other for other in known if other != name), name]
    nothing = frozenset[str]()
    theirs = _identity({name: found[name] for name in known}, nothing) | _identity(found["config"], free)
    mine = _identity({name: ours[name] for name in known}, nothing) | _identity(ours["config"], free)
    return [
        f"{name} is {_other(name, theirs)}{there} there, {here} here" + _since(name, mine.get(name), theirs)
        for name in mine | theirs
        if theirs.get(name) != mine.get(name)
        for there, here in [_told_apart(theirs.get(name), mine.get(name))]
    ]


def differing_facts(found: Mapping[str, Any], ours: Mapping[str, Any], here: str = "here") -> list[str]:
    """What two records have beside settings and differs: "teacher is another network, 12ab… there, 34cd… here"."""
    return [
        f"{name} is {_other(name, found)}{there} there, {own} {here}"
        for name in sorted(found.keys() & ours.keys() - {"format", "config", "about", "start", "decided"})
        if found[name] != ours[name]
        for there, own in [_told_apart(found[name], ours[name])]
    ]


def _other(name: str, theirs: Mapping[str, Any]) -> str:
    """What another digest says."""
    hashed = name in _HASHED and _DIGEST.fullmatch(str(theirs.get(name)))
    return f"{_HASHED[name]}, " if hashed else ""


def _since(name: str, now: object, theirs: Mapping[str, Any]) -> str:
    """What another number of images says: files of the data set have come or gone."""
    before = theirs.get("images")
    if name != "images" or not (isinstance(now, int) and isinstance(before, int)):
        return ""
    said = f"lacks {counted(before - now, 'file')}" if before > now else f"has {counted(now - before, 'new file')}"
    return f" (the data set {said} since the run began: put it back as it was to go on)"


def identity(config: RunConfig) -> dict[str, Any]:
    """The settings that identify a run, by name, as config.json has them; they are those of all its parts."""
    return _identity(config.to_json(), free_settings(type(config)))


def _identity(config: Mapping[str, Any], free: frozenset[str]) -> dict[str, Any]:
    """The settings, or facts, that identify a run; those within another one under their full name: noise.p_mean."""
    settings: dict[str, Any] = {}
    for name, value in config.items():
        if name in free:
            continue
        settings |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return settings


def _is_leftover(entry: Path) -> bool:
    """What a run that was killed while it wrote its first file leaves behind."""
    return entry.name == "run.lock" or (entry.name.startswith(".config.json.") and entry.name.endswith(".tmp"))


def _told_apart(one: Any, other: Any) -> tuple[str, str]:
    """Two values that differ; as JSON has them where they would read alike, as 16 and "16" in an edited file."""
    if all(isinstance(value, str) and _DIGEST.fullmatch(value) for value in (one, other)):
        return str(one)[:8], str(other)[:8]
    texts = _short(one), _short(other)
    return texts if texts[0] != texts[1] else (json.dumps(one), json.dumps(other))


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
    return text if len(text) <= 60 else text[:57] + "..."


# How long a start waits for the processes of an earlier one to leave the folder.
PATIENCE = 120.0


# Folder -> the descriptor of its lock; one is held until the process ends, and then nobody need close it.
_held: dict[Path, int] = {}


def lock_folder(path: Path, patience: float = PATIENCE) -> None:
    """Keep other runs out of the run folder `path` until this process ends; waits for one that is about to leave.

    Raises:
        FolderInUse: another process is still there after `patience` seconds; the message names it.
        OSError: the folder cannot be written.
    """
    path = path.resolve()
    if path in _held:
        return
    path.mkdir(parents=True, exist_ok=True)
    file = os.open(path / "run.lock", os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    try:
        _wait_for(file, path, patience)
        os.truncate(file, 0)
        os.write(file, f"{os.getpid()}\n".encode())
    except BaseException:
        os.close(file)
        raise
    _held[path] = file


def _wait_for(file: int, path: Path, patience: float) -> None:
    """Lock the file of the folder `path`. FolderInUse: another process still has it after `patience` seconds."""
    deadline, told = time.monotonic() + patience, False
    while not _locked(file):
        owner = _owner(file)
        if time.monotonic() > deadline:
            raise FolderInUse(f"{path} is in use by process {owner}: stop it, or choose another --out")
        if not told:
            print(f"{path} is in use by process {owner}: waiting for it to stop", file=sys.stderr, flush=True)
            told = True
        time.sleep(0.5)


def release_folder(path: Path) -> None:
    """Let others into the run folder `path` again."""
    file = _held.pop(path.resolve(), None)
    if file is not None:
        os.close(file)


def folder_user(path: Path) -> str | None:
    """The number of the process that uses the run folder `path` on this machine; None where nobody does."""
    try:
        with open(path / "run.lock") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _owner(file.fileno())
    except OSError:  # no lock to look at
        pass
    return None


def _owner(file: int) -> str:
    """The number of the process that a lock's file names."""
    return os.pread(file, 100, 0).decode(errors="replace").strip() or "unknown"


def _locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def teacher_facts(teacher: Precond | None) -> dict[str, str]:
    """What identifies a run by its teacher, wherever its files lie; nothing while there is none yet."""
    return {} if teacher is None else {"teacher": fingerprint(teacher.state_dict())}


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of weights and buffers by name: tells two networks apart wherever their files lie."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(name.encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
