"""What Slurm tells the tasks of `srun`, as the variables by which the processes of a run find each other."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

# Ports from which a job takes its own: below those that systems give to clients.
_FIRST_PORT, _PORTS = 12_000, 20_000


def tasks() -> int | None:
    """Number of tasks of the step that this process is one of; None where it is none, or alone."""
    if not os.environ.get("SLURM_PROCID"):
        return None
    given = os.environ.get("SLURM_STEP_NUM_TASKS") or (None if _is_script() else os.environ.get("SLURM_NTASKS"))
    return int(given) if given and re.fullmatch(r"[0-9]{1,9}", given) and int(given) > 1 else None


def tasks_of_script() -> int | None:
    """Number of tasks of the job whose script this process is a part of, and not of any task; None elsewhere."""
    given = os.environ.get("SLURM_NTASKS", "")
    return int(given) if _is_script() and re.fullmatch(r"[0-9]{1,9}", given) and int(given) > 1 else None


def _is_script() -> bool:
    """Slurm gives the script of a job the number of a first task too."""
    return os.environ.get("ENVIRONMENT") == "BATCH" and not os.environ.get("SLURM_STEP_ID")


class Task(NamedTuple):
    """A task of srun among those of its step."""

    rank: int
    local_rank: int
    size: int
    local_size: int | None
    """None where Slurm does not say it."""
    host: str
    """The step's first machine; "" where Slurm does not say it."""
    port: int
    """One that the step has for itself, in all probability."""


def own_task() -> Task | None:
    """The task that this process is; None where it is none, or alone.

    Raises:
        ValueError: a number is missing or none.
    """
    size = tasks()
    if size is None:
        return None
    rank, local = (_number(name) for name in ("SLURM_PROCID", "SLURM_LOCALID"))
    host = first_host(_given("SLURM_STEP_NODELIST") or _given("SLURM_JOB_NODELIST"))
    job, step = (int(found) if found.isdigit() else 0 for found in map(_given, ("SLURM_JOB_ID", "SLURM_STEP_ID")))
    return Task(rank, local, size, _tasks_here(), host, _FIRST_PORT + (16 * job + step) % _PORTS)


def first_host(nodes: str) -> str:
    """The first machine of a list as Slurm writes it: "gpu[03-05,9],login" begins with gpu03."""
    found = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert found is not None
    return re.sub(r"\[([^-,\]]*)[^\]]*\]", r"\1", found[0]).strip()


def _tasks_here() -> int | None:
    """Number of tasks on this machine: of "4(x2),3" the entry of its number."""
    counts: list[int] = []
    for count, _, times in re.findall(r"(\d+)(\(x(\d+)\))?", _given("SLURM_STEP_TASKS_PER_NODE")):
        counts += [int(count)] * min(int(times or 1), 100_000)
    number = _given("SLURM_NODEID")
    if number.isdigit() and int(number) < len(counts):
        return counts[int(number)]
    each = _given("SLURM_NTASKS_PER_NODE")
    return int(each) if each.isdigit() and int(each) > _number("SLURM_LOCALID") else None


def _number(name: str) -> int:
    given = _given(name)
    if not re.fullmatch(r"[0-9]{1,9}", given):
        raise ValueError(
            f"{name} must be a whole number >= 0, got {given!r}: start by srun, or unset SLURM_PROCID for one process"
        )
    return int(given)


def _given(name: str) -> str:
    return os.environ.get(name, "")
