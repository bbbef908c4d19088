"""Two processes: the same numbers as one, and what is said, how soon, when one of them is killed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from subprocess import Popen
from typing import Any

import torch

from ipfm.engine.commands.bench.short_run import ShortRun, start, wait
from ipfm.engine.commands.doctor.place import LEFT_OUT, Place, Row, failed, judged, tried
from ipfm.engine.commands.doctor.sections.resume import last_line, weights

STEPS, KILLED_AT, EVERY = 6, 4, 3
# Two processes add in another order than one.
CLOSE, CLOSE_GPU = 1e-5, 1e-3
# In seconds, from the death of one process to the end of the other.
SOON = 30.0
SAID = "another process of this run has ended or does not answer"


def rows(place: Place) -> Iterator[Row]:
    """A row for the numbers, one for the death."""
    several = place.cuda and torch.cuda.device_count() > 1
    device = "cuda" if several else "cpu"
    about: Row = {"processes": 2, "by": "NCCL" if several else "gloo, on the CPU"}
    # Side by side, as far as they do not wait for each other.
    one, two = (_begin(place, name, device, ranks) for name, ranks in (("one", 1), ("two", 2)))
    yield tried(about | {"case": "one is killed"}, lambda: _one_killed(place, device))
    yield tried(about | {"case": "as one process"}, lambda: _as_one(place, one, two, device))


def _run(**more: Any) -> ShortRun:
    return ShortRun({"checkpoint_every": EVERY, "zero": 2, "precision": "fp32", "micro_batch": 4}, STEPS, **more)


def _begin(place: Place, name: str, device: str, ranks: int) -> list[Popen[bytes]]:
    return start(place.folder / name, _run(), place.folder / "log.txt", ranks=ranks, device=device)


def _as_one(place: Place, alone: list[Popen[bytes]], together: list[Popen[bytes]], device: str) -> Row:
    one, two, log = (place.folder / name for name in ("one", "two", "log.txt"))
    codes = [*wait(alone, place.left), *wait(together, place.left)]
    if any(codes) or None in codes:
        if place.over():
            return {"verdict": f"{LEFT_OUT}: {place.seconds:.0f} s are over"}
        return {"verdict": failed(f"the processes ended with {codes}: {last_line(log)}")}
    ours, theirs = weights(two / "generator"), weights(one / "generator")
    off = max(float((ours[key] - theirs[key]).norm() / (theirs[key].norm() + 1e-12)) for key in theirs)
    limit = CLOSE_GPU if device == "cuda" else CLOSE
    return {
        "largest difference": f"{off:.1e}",
        "verdict": judged(off <= limit, f"differs by {off:.1e}, allowed are {limit:g}"),
    }


def _one_killed(place: Place, device: str) -> Row:
    log, died = place.folder / "killed.txt", place.folder / "died"
    for file in (log, died):
        file.unlink(missing_ok=True)
    run = _run(dies=1, at=KILLED_AT, events=str(died))
    folder = place.folder / "killed"
    processes = start(folder, run, log, ranks=2, device=device)
    (left, dead) = wait(processes, place.left)
    ended = time.time()
    took = ended - float(died.read_text()) if died.is_file() else float("nan")
    said = next((line for line in log.read_text(errors="replace").splitlines() if SAID in line), "")
    right = dead == -9 and left == 1 and bool(said) and took < SOON
    row: Row = {"exit codes": f"{left}, {dead}", "seconds": round(took, 1), "said": said[:200]}
    if not right and place.over():
        return row | {"verdict": f"{LEFT_OUT}: {place.seconds:.0f} s are over"}
    if not right:
        return row | {"verdict": failed(f"exit codes {left} and {dead}, {took:.0f} s; {said or last_line(log)}")}
    (code,) = wait(start(folder, _run(), log, device=device), place.left)
    if code is None and place.over():
        return row | {"verdict": f"{LEFT_OUT}: {place.seconds:.0f} s are over"}
    return row | {"then": "resumed on one", "verdict": judged(code == 0, f"resumed on one it ended with {code}")}
