"""Stands in for the package where a recipe is started as a file: Python looks for `ipfm` in the file's folder first.

It hands over to the package. Where that cannot be imported, because another Python than that of the virtual environment
was called, it says so in one line. A recipe that is imported, or started as a module, does without it.
"""

import os
import shlex
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
OLDEST = (3, 11)


def hand_over():
    """Import the package, in this module's place.

    Raises:
        SystemExit: with a line on stderr, where a recipe was started and it cannot be imported: code 2; 1 where memory
            does not suffice.
    """
    path = list(sys.path)
    if not has_folder() and how_started():
        # Libraries look for it when they are loaded.
        end("error: the current folder is gone: go to another one", 2)
    sys.path[:] = [folder for folder in path if os.path.abspath(folder or os.curdir) != HERE]
    if __name__ == "ipfm":
        del sys.modules["ipfm"]
    try:
        if sys.version_info < OLDEST:
            raise ImportError("Python is too old")
        import ipfm.engine.experiments  # noqa: F401
    except (ImportError, MemoryError) as error:
        started, reason = how_started(), why(error)
        if started and reason is not None:
            end(f"error: {reason}: {way_on(started)}", 2)
        if started and lacks_memory(error):
            text = " ".join(str(error).split())
            end(f"failed: there is not enough memory to load what it needs{f' ({text})' if text else ''}", 1)
        raise
    finally:
        sys.path[:] = path


def end(line, code):
    """End the program with a line on stderr."""
    sys.stderr.write(f"{os.path.basename(how_started()[-1])}: {line}\n")
    sys.exit(code)


def has_folder():
    """Whether the current folder exists."""
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def lacks_memory(error):
    """Whether an import failed for want of memory: `ulimit -v`, mostly."""
    return isinstance(error, MemoryError) or "failed to map segment" in str(error)


def how_started():
    """The words behind `python` that start this program, a recipe; none where it is another one."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script is None and sys.argv[:1] == ["-m"]:
        words = getattr(sys, "orig_argv", ["-m", "recipes"])
        return words[words.index("-m") :][:2]
    return sys.argv[:1] if script and os.path.dirname(os.path.abspath(script)) == HERE else []


def why(error):
    """What is wrong with this Python; None where that is another error."""
    called = f"this Python, {sys.executable},"
    if sys.version_info < OLDEST:
        return f"{called} is version {sys.version.split()[0]}, and ipfm needs 3.11 or newer"
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return None
    return f"{called} has no package {error.name.partition('.')[0]}"


def way_on(started):
    """How the recipe is started, or what is to be installed first."""
    root = os.path.dirname(HERE)
    python = os.path.join(root, ".venv", "bin", "python")
    if os.access(python, os.X_OK) and os.path.abspath(sys.prefix) != os.path.join(root, ".venv"):
        words = [os.path.relpath(python), *started]
        return f"start it as {' '.join(map(shlex.quote, words))}"
    return f"install what it needs, pip install -e {shlex.quote(os.path.relpath(root))} in a virtual environment"


if __name__ in ("ipfm", "recipes.ipfm"):
    hand_over()
