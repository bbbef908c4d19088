"""Where Triton keeps compiled kernels, on machines where its own place cannot be written."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import warnings

import triton

_looked = False


def usable_cache() -> None:
    """Lead Triton's cache (TRITON_CACHE_DIR, or a folder in HOME) to a temporary folder if it cannot be written.

    Triton ends with a PermissionError there. The temporary folder, of which a warning tells, goes with the process.
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
