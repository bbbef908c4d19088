"""`ipfm doctor --full`: the sections one after the other, each in a process of its own, and the page of all of them.

A section's rows are written as they come (NAME.jsonl). When it ends, or is ended, its table is made of them (NAME.csv,
NAME.md), and the page anew: what was found is there, whatever happens to the rest.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from ipfm.engine.commands.doctor.outcome import END, Outcome, read_outcomes, write_table
from ipfm.engine.commands.doctor.page import write_page
from ipfm.engine.commands.doctor.sections import SECTIONS, Section
from ipfm.engine.runtime.launcher import VARIABLES

# Of a section's time: what it may begin within. The rest is for what has begun, and for its start.
SOFT = 0.8
# Where there is no GPU, the same takes longer.
ON_A_CPU = 3.0


def examine(
    out: Path,
    sections: Sequence[Section] = SECTIONS,
    *,
    device: str,
    inception: Path | None = None,
    quick: bool = False,
    done: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Run sections and write their tables and the page.

    Args:
        out: folder; tables of other sections that are there stay, and are on the page.
        sections: which.
        device: "cuda" or "cpu".
        inception: Inception network for an FID.
        quick: the smallest sizes, for tests.
        done: called as each section ends.

    Returns:
        What the sections that were run have come to.

    Raises:
        OSError: the disk refuses.
    """
    outcomes = []
    with _ended_in_order():
        for section in sections:
            try:
                run_section(section, out, device=device, inception=inception, quick=quick)
            finally:  # Ctrl-C and SIGTERM too
                outcomes.append(write_table(out, section))
                write_page(out, read_outcomes(out))
            done(outcomes[-1])
    return outcomes


@contextlib.contextmanager
def _ended_in_order() -> Iterator[None]:
    """Let SIGTERM and SIGHUP, which end a process at once, leave no section behind that computes on.

    They become an exit with the code of a shell, 128 + the signal's number, after a line on stderr.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        for each in before:  # another one changes nothing any more
            signal.signal(each, signal.SIG_IGN)
        print(f"ipfm: stopped by {signal.Signals(number).name}", file=sys.stderr, flush=True)
        raise SystemExit(128 + number)

    # What is ignored stays so: nohup.
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)}
    before = {each: handler for each, handler in before.items() if handler == signal.SIG_DFL}
    for each in before:
        signal.signal(each, leave)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def run_section(section: Section, out: Path, *, device: str, inception: Path | None, quick: bool) -> None:
    """Run a section in a process; what it says is in NAME.log, its rows in NAME.jsonl."""
    rows, work = out / f"{section.name}.jsonl", out / "work" / section.name
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    rows.write_text("")
    limit = section.seconds * (1.0 if device.startswith("cuda") else ON_A_CPU)
    place = {
        "device": device, "folder": str(work), "seconds": SOFT * limit, "quick": quick,
        "inception": None if inception is None else str(inception.resolve()),
    }  # fmt: skip
    module, parent = f"{__package__}.section", str(os.getpid())
    command = [sys.executable, "-m", module, section.name, json.dumps(place), str(rows), parent]
    own = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    began = time.monotonic()
    with open(out / f"{section.name}.log", "wb") as log:
        process = subprocess.Popen(
            command, env=own, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # With all that it has started.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    end = {"seconds": round(time.monotonic() - began, 1), "reason": _reason(code, limit, out / f"{section.name}.log")}
    with rows.open("a") as file:
        file.write(f"\n{json.dumps({END: end})}\n")
    shutil.rmtree(work, ignore_errors=True)


def _reason(code: int | None, limit: float, log: Path) -> str:
    """Why a process did not come to its end; "" where it did."""
    if code == 0:
        return ""
    if code is None:
        return f"not at its end after {limit:.0f} s, which are all that it has"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else str(code)
    lines = log.read_text(errors="replace").strip().splitlines()
    said = f": {' '.join(lines[-1].split())[:300]}" if lines else ""
    return f"its process ended with {name}{said}"
