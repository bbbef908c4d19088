"""Where Triton keeps compiled kernels: a place that can be written, without what a crash has left empty."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import warnings

import triton

# Files of an entry that are never empty.
_COMPILED = (".so", ".cubin", ".ptx", ".json", ".hsaco", ".ttir", ".ttgir", ".llir")
_looked = False


def usable_cache() -> None:
    """Lead Triton's cache (TRITON_CACHE_DIR, or a folder in HOME) to a temporary folder if it cannot be written.

    Triton ends with a PermissionError there. The temporary folder, of which a warning tells, goes with the process.
    Entries with an empty file, which a machine that stopped or a full disk leaves, are removed with a warning: they
    would end every later process at the same kernel.
    """
    global _looked
    if _looked:
        return
    _looked = True
    folder = triton.knobs.cache.dir
    try:
        os.makedirs(folder, exist_ok=True)
        reason = "" if os.access(folder, os.W_OK | os.X_OK) else "no permission"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        triton.knobs.cache.dir = tempfile.mkdtemp(prefix="triton-")
        atexit.register(shutil.rmtree, triton.knobs.cache.dir, ignore_errors=True)
        warnings.warn(
            f"Triton cannot keep compiled kernels in {folder} ({reason}): every process compiles them anew, unless "
            "TRITON_CACHE_DIR names a folder that can be written",
            stacklevel=2,
        )
    elif broken := _broken_entries(folder):
        for entry in broken:
            shutil.rmtree(entry, ignore_errors=True)
        entries = f"{len(broken)} broken entr{'y' if len(broken) == 1 else 'ies'}"
        warnings.warn(f"removed {entries} of Triton's cache {folder}", stacklevel=2)


def _broken_entries(folder: str) -> list[str]:
    """Entries of a cache with an empty file. Triton renames its files when they are whole, so none is in the making."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                with os.scandir(entry.path) as files:
                    if any(f.name.endswith(_COMPILED) and not f.stat().st_size for f in files):
                        found.append(entry.path)
            except OSError:  # no folder, or gone since
                continue
    return found
