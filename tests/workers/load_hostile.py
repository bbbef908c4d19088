"""Loads every file of a list as a checkpoint, with little memory, and reports what happened and what was attempted.

An audit hook sees every import, call of exec, start of a process, opening of a file for writing and connection that
Python code or the interpreter attempts while a file is loaded.
"""

import encodings.cp437  # noqa: F401  of zip files; these two are imported when first needed
import json
import os
import pickletools  # noqa: F401  names of instructions in messages
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # imported by operations of PyTorch when first needed
from fuzz_checkpoints import limit_memory

from ipfm.models import load_teacher

WATCHED = {"import", "exec", "compile", "marshal.loads", "pickle.find_class", "ctypes.dlopen", "sys.addaudithook"}
FAMILIES = ("os.", "subprocess.", "socket.", "shutil.", "tempfile.", "urllib.", "webbrowser.", "pty.", "ftplib.")
HARMLESS = {"os.listdir", "os.scandir", "os.putenv"}


def main(files: list[str], good: str) -> None:
    load_teacher(good)  # whatever is imported late is imported now
    attempts: list[str] = []
    active = False

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if not active or event in HARMLESS:
            return
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in WATCHED or event.startswith(FAMILIES) or writes:
            attempts.append(f"{event} {arguments[:2]!r}"[:200])

    sys.addaudithook(watch)
    torch.set_num_threads(1)
    limit_memory()
    report = {}
    for file in files:
        attempts.clear()
        begun = time.process_time()
        active = True
        try:
            load_teacher(file)
            outcome = "loaded"
        except ValueError as error:
            outcome = f"ValueError: {error}"
        except BaseException as error:
            outcome = f"wrong: {type(error).__name__}: {error}"
        active = False
        report[file] = {"outcome": outcome, "attempts": list(attempts), "seconds": time.process_time() - begun}
    print(json.dumps(report))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2])
