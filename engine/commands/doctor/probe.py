"""Questions to libraries in processes of their own: one that crashes or hangs takes nothing with it.

python -m ipfm.engine.commands.doctor.probe GROUP FIRST PARENT
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ipfm.engine.commands.doctor.findings import Check, Finding, answers
from ipfm.engine.commands.doctor.libraries import groups
from ipfm.engine.runtime.parent import end_with

# Seconds that a group of questions gets: a first `import torch` from a slow disk takes many.
PATIENCE = 120.0


def ask_all(patience: float = PATIENCE) -> list[Finding]:
    """What the libraries say, in the order of `groups`; as many processes at a time as there are groups."""
    asked = groups()
    with ThreadPoolExecutor(len(asked)) as pool:
        found = pool.map(lambda name: list(ask(name, asked[name], patience)), asked)
        return [finding for group in found for finding in group]


def ask(group: str, checks: list[Check], patience: float = PATIENCE) -> Iterator[Finding]:
    """What a group of questions finds. After one at which the process ends, another process goes on behind it."""
    first = 0
    deadline = time.monotonic() + patience
    while first < len(checks):
        lines, reason = _answers_of_process(group, first, max(1.0, deadline - time.monotonic()))
        for line in lines:
            if "begun" in line:
                first = line["begun"]
            else:
                yield Finding(**line)
        if not reason:
            return
        yield checks[first].failed(reason)
        first += 1
        if time.monotonic() > deadline:
            for check in checks[first:]:
                yield check.failed(f"not asked within {patience:.0f} s")
            return


def _answers_of_process(group: str, first: int, patience: float) -> tuple[list[Mapping[str, Any]], str]:
    """What a process has said, and why it did not come to its end; "" where it did."""
    command = [sys.executable, "-m", "ipfm.engine.commands.doctor.probe", group, str(first), str(os.getpid())]
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as complaints:
        try:
            # A session of its own: what it starts goes with it.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=said, stderr=complaints, start_new_session=True
            )
        except OSError as error:
            return [], f"no process can be started: {error.strerror}"
        try:
            code = process.wait(patience)
            reason = "" if code == 0 else _ended(code)
        except subprocess.TimeoutExpired:
            reason = f"no answer within {patience:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said.seek(0)
        complaints.seek(0)
        lines = list(_lines(said.read()))
        if reason and (last := complaints.read().decode(errors="replace").strip().splitlines()):
            reason = f"{reason}: {' '.join(last[-1].split())[:200]}"
    return lines, reason


def _ended(code: int) -> str:
    if code < 0:
        try:
            return f"it ended by {signal.Signals(-code).name}"
        except ValueError:
            return f"it ended by signal {-code}"
    return f"it ended with {code}"


def _lines(said: bytes) -> Iterator[Mapping[str, Any]]:
    for line in said.splitlines():
        # Whatever else a library prints there.
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict):
                yield found


def main(group: str, first: str, parent: str) -> None:
    """Answer the questions of a group from number `first` on, a line of JSON each; say before each that it is asked.

    It ends with the process `parent` that asks.
    """
    end_with(int(parent))
    # Libraries print what they like: the answers have the standard output for themselves.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for number, check in enumerate(groups()[group]):
        if number >= int(first):
            print(json.dumps({"begun": number}), file=answer, flush=True)
            for finding in answers([check]):
                print(json.dumps(dataclasses.asdict(finding)), file=answer, flush=True)
    answer.flush()
    # What a broken library does at the end is no answer.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
