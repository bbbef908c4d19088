"""What came after a step that a run goes back to, put aside as a run folder of its own: nothing of it is lost.

    RUN/set-aside/step-0000300/           the run as it was at its step 300
    RUN/set-aside/.partial-step-0000300/  one in the making; the next start removes it

It is written beside its place, synced and renamed, before anything of the run is forgotten. From then on the going back
is decided: a mark within it says so until the run has forgotten what is put aside, so that a start after a kill does
not put the same aside twice. What the run never writes into again (tensors, pictures, TensorBoard's files) is linked
and takes no room; where the disk knows no such links it is copied, as the logs always are. Nothing in it depends on its
place: it can be moved.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ipfm.engine.config import RunConfig
from ipfm.engine.distributed.agreement import together
from ipfm.engine.distributed.world import World
from ipfm.engine.runtime.errors import Failed, described
from ipfm.engine.runtime.files import read_json
from ipfm.engine.runtime.wording import size
from ipfm.engine.training.board import FILES as BOARD_FILES
from ipfm.engine.training.board import FORMER as BOARD_FOLDER
from ipfm.engine.training.checkpoint import checkpoints_in, step_of
from ipfm.engine.training.run_folder import SET_ASIDE, exported_steps, lock_folder
from ipfm.engine.training.snapshots import all_snapshots_in, best_path, read_best, read_snapshots
from ipfm.models.atomic_files import make_folder, previous_of, sync, write_durably
from ipfm.models.checkpoints.run_models import EXPORTS
from ipfm.models.store import CONFIG_FILE, TENSOR_FILE

# What a run leaves in its folder, beside folders.
_FILES = (
    "config.json", "metrics.jsonl", "evaluations.jsonl", "environment.jsonl", "results.json", "results.txt",
    "teacher-results.json", "diverged.json", "traceback*.txt", "comparison.png", "convergence.png",
)  # fmt: skip
# In a run that was put aside: the step that was gone back to, as long as the run has not forgotten what came after.
_UNDONE = ".going-back"
_ABOUT = "set-aside.json"
_DRAFT = ".partial-"
# What a disk answers that makes no links.
_NO_LINKS = {errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_COPIED_AT_ONCE = 2**24


@dataclass(frozen=True)
class SetAside:
    """A run that was put aside, as its folder says.

    Attributes:
        path: its folder, that of a run.
        step: how far it was.
        from_step: the step that the other run went back to; None where that cannot be read.
    """

    path: Path
    step: int
    from_step: int | None

    def in_words(self) -> str:
        """As in "steps 100 to 300: runs/x/set-aside/step-0000300"."""
        steps = f"up to step {self.step}" if self.from_step is None else f"steps {self.from_step} to {self.step}"
        return f"{steps}: {self.path}"


def read_set_aside(run: Path) -> tuple[SetAside, ...]:
    """What the run `run` has put aside, by its steps."""
    found = []
    for path in (run / SET_ASIDE).iterdir() if (run / SET_ASIDE).is_dir() else ():
        named = re.fullmatch(r"step-(\d+)(?:-(\d+))?", path.name)
        if named and (path / CONFIG_FILE).is_file():
            back = (read_json(path / _ABOUT) or {}).get("from_step")
            one = SetAside(path, int(named[1]), back if isinstance(back, int) else None)
            found.append((one.step, int(named[2] or 1), one))
    return tuple(one for *_, one in sorted(found, key=lambda entry: entry[:2]))


def go_back(run: Path, kind: str, config: RunConfig, world: World) -> None:
    """Where the settings go back to an earlier step, put aside what came after it. Every process calls it.

    It comes before the folder's record is written anew; what is put aside has the earlier one.

    Args:
        run: a run folder that `check_run_folder` approved; it need not exist.
        kind: "distill" or "teacher".
        config: the settings.
        world: the run's processes, of which the first one writes.

    Raises:
        Failed: on every process: it cannot be put aside; nothing of the run has been touched.
        ValueError: likewise, another process is using the folder.
    """

    def work() -> None:
        if not world.is_main or not (run / "config.json").is_file():
            return
        drafts = list((run / SET_ASIDE).glob(f"{_DRAFT}*"))
        if not drafts and config.from_step is None:
            return
        lock_folder(run)
        for draft in drafts:
            _discard(draft)
        if config.from_step is not None:
            _put_aside(run, kind, config.from_step)

    together(work, world.size)


def forgotten(run: Path) -> tuple[SetAside, ...]:
    """Note that the run has forgotten what it has put aside, or goes on without: what comes now is new.

    Returns:
        What it had put aside and not forgotten before.

    Raises:
        OSError: the disk refuses.
    """
    undone = tuple(one for one in read_set_aside(run) if (one.path / _UNDONE).exists())
    for one in undone:
        (one.path / _UNDONE).unlink()
    return undone


def newest_step(run: Path, kind: str) -> int:
    """The last step of which the run has a network: a checkpoint, a snapshot, the best or the result; 0 without any."""
    steps = [step_of(path) for path in checkpoints_in(run / "checkpoints")]
    steps += [one.step for one in read_snapshots(run)]
    best, exported = read_best(run, kind), exported_steps(run, kind)
    return max([0, *steps, *([] if best is None else [best.step]), *([] if exported is None else [exported])])


def _put_aside(run: Path, kind: str, step: int) -> None:
    newest = newest_step(run, kind)
    if newest <= step or any(_undone(one.path) == step for one in read_set_aside(run)):
        return
    target = _free_name(run / SET_ASIDE, newest)
    try:
        _write(run, kind, target, {"step": newest, "from_step": step})
    except OSError as error:
        _remove_empty(run / SET_ASIDE)
        raise Failed(
            f"what came after step {step} cannot be put aside in {target} ({described(error)}): nothing is "
            f"forgotten, and {run} is as it was"
        ) from error


def _undone(path: Path) -> int | None:
    try:
        return int((path / _UNDONE).read_text())
    except (OSError, ValueError):
        return None


def _free_name(folder: Path, step: int) -> Path:
    path, count = folder / f"step-{step:07d}", 1
    while path.exists():
        count += 1
        path = folder / f"step-{step:07d}-{count}"
    return path


def _write(run: Path, kind: str, target: Path, about: dict[str, int]) -> None:
    """Make the run folder `target` of all that the run `run` has."""
    draft = target.with_name(f"{_DRAFT}{target.name}")
    make_folder(target.parent)
    try:
        draft.mkdir()
        files = list(_files_of(run, kind))
        linked = _linked(files, draft)
        copied = [path for path, name in files if name not in linked]
        needed = sum(path.stat().st_size for path in copied)
        if needed > (free := shutil.disk_usage(draft).free):
            raise OSError(errno.ENOSPC, f"{size(needed)} are to be copied, {size(free)} are free", str(target))
        if any(_is_final(name) and name not in linked for _, name in files):
            with suppress(OSError):
                print(f"not all of {run} can be linked: {size(needed)} are copied to {target}", file=sys.stderr)
        folders = {draft}
        for path, name in files:
            place = draft / name
            place.parent.mkdir(parents=True, exist_ok=True)
            folders |= {folder for folder in place.parents if folder.is_relative_to(draft)}
            if not (name in linked and _link(path, place)):
                _copy(path, place)
        write_durably(draft / _ABOUT, (json.dumps(about) + "\n").encode())
        write_durably(draft / _UNDONE, f"{about['from_step']}\n".encode())
        for folder in folders:
            sync(folder)
        draft.rename(target)
    except BaseException:
        _discard(draft)
        raise
    sync(target.parent)


def _files_of(run: Path, kind: str) -> Iterator[tuple[Path, Path]]:
    """(file, its name in the run folder) of all that makes the run; no file of others, and nothing half-written."""
    for pattern in (*_FILES, BOARD_FILES):
        yield from _found(run, pattern, Path())
    # Of a folder that was being replaced when a process was killed the earlier one stands in.
    checkpoints = {path.name.removeprefix(".replaced-"): path for path in reversed(checkpoints_in(run / "checkpoints"))}
    for name, path in checkpoints.items():
        yield from _found(path, "*", Path("checkpoints", name))
    for model in (run / EXPORTS[kind], best_path(run, kind), *all_snapshots_in(run)):
        for pattern in (CONFIG_FILE, TENSOR_FILE):
            yield from _found(model if model.exists() else previous_of(model), pattern, model.relative_to(run))
    for folder, pattern in (("checkpoints", "latest"), ("samples", "step-*.png"), ("memory", "*")):
        yield from _found(run / folder, pattern, Path(folder))
    yield from _found(run / BOARD_FOLDER, BOARD_FILES, Path(BOARD_FOLDER))
    if kind != "teacher" and (run / "teacher" / CONFIG_FILE).is_file():
        yield from ((path, "teacher" / name) for path, name in _files_of(run / "teacher", "teacher"))


def _found(folder: Path, pattern: str, name: Path) -> Iterator[tuple[Path, Path]]:
    """The files of a folder, which is to have this name."""
    for path in sorted(folder.glob(pattern)):
        if path.is_file() and not path.name.startswith("."):
            yield path, name / path.name


def _is_final(name: Path) -> bool:
    """Whether a file of this name in a run folder is never written into again: another one takes its place."""
    picture = name.suffix == ".png" and name.parent.name == "samples"
    return name.suffix == ".safetensors" or picture or name.match(BOARD_FILES)


def _linked(files: list[tuple[Path, Path]], draft: Path) -> set[Path]:
    """Names of the files that can be linked into `draft`: a folder of the run may lie on another disk."""
    tried, final = draft / ".link", [(path, name) for path, name in files if _is_final(name)]
    can = {}
    for folder, path in {name.parts[0]: path for path, name in final}.items():
        can[folder] = _link(path, tried)
        tried.unlink(missing_ok=True)
    return {name for _, name in final if can[name.parts[0]]}


def _link(path: Path, place: Path) -> bool:
    """Make `place` another name of the file; whether the disk can."""
    try:
        os.link(path.resolve(), place)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return False
    return True


def _copy(path: Path, place: Path) -> None:
    with path.open("rb") as source, place.open("wb") as copy:
        shutil.copyfileobj(source, copy, _COPIED_AT_ONCE)
        copy.flush()
        os.fsync(copy.fileno())


def _discard(draft: Path) -> None:
    shutil.rmtree(draft, ignore_errors=True)
    _remove_empty(draft.parent)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
