"""The text that a program of EDM, EDM2, PFGM++ or SiD runs for a record: it finds the classes among its own files.

Where those programs keep their classes is known to nobody but them; that their package `torch_utils` stands beside the
others is known from the records.
"""

from collections.abc import Iterable

_TEXT = """\
# Finds classes among the files of the program that runs this.
import importlib, pathlib, sys
import torch_utils.persistence
def module_with(names):
    for module in list(sys.modules.values()):
        if all(name in getattr(module, "__dict__", ()) for name in names):
            return module
    root = pathlib.Path(torch_utils.persistence.__file__).parent.parent
    for path in sorted(file for depth in ("*.py", "*/*.py", "*/*/*.py") for file in root.glob(depth)):
        text = path.read_text(encoding="utf-8", errors="ignore")
        if all("class " + name + "(" in text for name in names):
            return importlib.import_module(".".join(path.relative_to(root).with_suffix("").parts))
    raise ImportError("no file in " + str(root) + " has the classes " + ", ".join(names))
names = {names}
found = vars(module_with(names))
globals().update((name, found[name]) for name in names)
"""


def class_source(names: Iterable[str]) -> str:
    """The text for records of these classes, which one file of the program has together.

    It raises an ImportError there that names the classes where no file of the program has them.

    Args:
        names: names of the classes.
    """
    return _TEXT.format(names=sorted(names))
