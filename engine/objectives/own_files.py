"""Objectives in files of one's own, outside this project: whoever starts a program names them, and nothing else does.

The environment variable IPFM_OBJECTIVES holds their paths, with colons between. No run folder, model or checkpoint
makes a file be read: what they say of an objective is text.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType

VARIABLE = "IPFM_OBJECTIVES"
# Files that are being run, the innermost last.
_being_read: list[Path] = []


def own_files() -> tuple[Path, ...]:
    """The files that the user has named.

    Raises:
        ValueError: one is missing, or no file of Python; one line.
    """
    files: list[Path] = []
    for named in os.environ.get(VARIABLE, "").split(os.pathsep):
        if not named.strip():
            continue
        path = Path(named.strip()).expanduser()
        if not path.is_file():
            kind = (
                "is a folder: name the file in it" if path.is_dir() else f"does not exist (looked for in {Path.cwd()})"
            )
            raise ValueError(f"{VARIABLE} names {path}, which {kind}")
        if path.suffix != ".py":
            raise ValueError(f"{VARIABLE} names {path}, which is no file of Python: its name must end in .py")
        if path.resolve() not in [other.resolve() for other in files]:
            files.append(path)
    return tuple(files)


def is_being_read() -> bool:
    """Whether a file of one's own is being run for what it defines, and not as the program."""
    return bool(_being_read)


def load(path: Path) -> ModuleType:
    """The module of a file that the user has named, which is run once; its folder is where it imports from too.

    Raises:
        ValueError: it cannot be run, or is called like another module; one line that names the file and the line.
    """
    name = path.stem
    for module in (sys.modules.get("__main__"), sys.modules.get(name)):
        if module is not None and _is_of(module, path):
            return module
    if name in sys.modules or (importlib.util.find_spec(name) is not None and not _is_on_path(name, path)):
        raise ValueError(f"{path} is called like the module {name} of Python, which it would hide: rename it")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    _being_read.append(path)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ValueError(_said(path, error)) from error
    finally:
        _being_read.pop()
    return module


def _is_of(module: ModuleType, path: Path) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve() == path.resolve()


def _is_on_path(name: str, path: Path) -> bool:
    """Whether an import of that name finds this very file."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve() == path.resolve()


def _said(path: Path, error: BaseException) -> str:
    """What went wrong where in the file, in a line."""
    if isinstance(error, SyntaxError) and error.filename is not None and Path(error.filename).name == path.name:
        return f"{path}, line {error.lineno}: {error.msg}"
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).resolve() == path.resolve()
    ]
    where = f"{path}, line {lines[-1]}" if lines else str(path)
    if isinstance(error, SystemExit):
        return f'{where}: the file runs, or ends, the program: that belongs under if __name__ == "__main__"'
    text = " ".join(str(error).split())
    # What this project says of it needs no name; other errors are known by theirs.
    return f"{where}: {text}" if isinstance(error, ValueError) else f"{where}: {type(error).__name__}: {text}"
