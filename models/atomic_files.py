"""Files and folders that a crash leaves whole: written beside their place, synced to the disk, and renamed."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

# What file systems that cannot sync a folder answer; they order its entries themselves, or not at all.
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF}
# What a disk answers that has no room: full, quota, too large a file.
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def sync(path: Path) -> None:
    """Wait until the file's content, or the folder's entries, are on the disk.

    Raises:
        OSError: the disk refuses.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC or not path.is_dir():
            raise
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Make the folder and those above it, each synced into the one that holds it.

    Raises:
        OSError: it cannot be made.
    """
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


@contextlib.contextmanager
def _named(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """A disk without room says which file it had none for: the system does not, once a file is open.

    Nobody has asked for a `temporary` file, whose place is that of `path`.
    """
    try:
        yield
    except OSError as error:
        if (error.errno in NO_ROOM and error.filename is None) or error.filename == str(temporary):
            error.filename = str(path)
        raise


def write_durably(path: Path, payload: bytes) -> None:
    """Write a new file in place and sync it; for a folder that is renamed as a whole afterwards.

    Raises:
        OSError: the disk refuses.
    """
    with _named(path), path.open("wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def atomic_write(path: Path | str) -> Iterator[IO[bytes]]:
    """Open a temporary binary file beside `path` that replaces it when the block ends without an exception.

    A symbolic link stays one; what it leads to is replaced.

    Raises:
        OSError: the disk refuses; `path` is what it was.
    """
    path = Path(path)
    if path.is_symlink():
        path = path.resolve()
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _named(path, temporary), open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Make an empty folder beside `target` that replaces it when the block ends without an exception.

    The caller syncs the files that it writes there (`write_durably`). A reader finds the old folder or the new one,
    whole, whatever interrupts the writer: between two renames the old one lies at `previous_of(target)`. One process at
    a time may write to a target. A symbolic link stays one.

    Raises:
        OSError: the disk refuses; `target` is what it was.
    """
    target = target.resolve()
    partial, previous = target.with_name(f".{target.name}.partial"), previous_of(target)
    make_folder(target.parent)
    if not target.exists() and previous.exists():
        previous.rename(target)  # an earlier writer was stopped between its two renames
    for leftover in (partial, previous):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        sync(partial)
        if target.exists():
            target.rename(previous)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if not target.exists() and previous.exists():
            previous.rename(target)
        raise
    sync(target.parent)
    shutil.rmtree(previous, ignore_errors=True)


def previous_of(target: Path) -> Path:
    """Where `atomic_folder` has the old folder while the new one takes its place."""
    target = target.resolve()
    return target.with_name(f".{target.name}.previous")


def forget_unfinished(folder: Path, *, but: str = "") -> None:
    """Remove the temporary files of `atomic_write` that killed processes left in `folder` and below.

    No process may be writing there.

    Args:
        folder: the folder.
        but: name of a folder in it that is left alone.
    """
    for leftover in folder.rglob(".*.tmp"):
        if but and leftover.relative_to(folder).parts[0] == but:
            continue
        with contextlib.suppress(OSError):
            leftover.unlink()


def why(error: BaseException) -> str:
    """The reason in one line: the system's words where it gave any ("No space left on device")."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
