"""Tasks of srun as the processes of one run, from Slurm's variables alone."""

from __future__ import annotations

import os

import pytest

from ipfm.engine.runtime import launcher, slurm

# What srun says to the second task of the second of two machines; the job's other variables stand beside these.
TASK = {
    "SLURM_PROCID": "5", "SLURM_NTASKS": "7", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_JOB_NODELIST": "gpu[03-04]", "SLURM_STEP_TASKS_PER_NODE": "4,3",
}  # fmt: skip


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*launcher.VARIABLES, launcher._JOINED, "ENVIRONMENT", *os.environ):
        if name in launcher.VARIABLES or name.startswith(("SLURM_", "IPFM_JOINED")) or name == "ENVIRONMENT":
            # Set first, so that what the call sets is undone at the end.
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)


def set_to(monkeypatch: pytest.MonkeyPatch, changes: dict[str, str | None]) -> None:
    for name, value in (TASK | changes).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)


PLACE = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "7", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "gpu03"}


@pytest.mark.quick
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, PLACE | {"MASTER_PORT": "12000"}),
        ({"SLURM_JOB_ID": "81234", "SLURM_STEP_ID": "2"}, PLACE | {"MASTER_PORT": "31746"}),
        # What a job's script sets for other programs stands, but for the number of processes.
        (
            {"MASTER_ADDR": "10.0.0.3", "MASTER_PORT": "29500", "WORLD_SIZE": "9"},
            PLACE | {"MASTER_ADDR": "10.0.0.3", "MASTER_PORT": "29500"},
        ),
        # A step of fewer tasks than the job, on another machine first.
        (
            {"SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NODELIST": "gpu07,gpu09", "SLURM_STEP_TASKS_PER_NODE": "3(x2)"},
            PLACE | {"WORLD_SIZE": "6", "MASTER_ADDR": "gpu07", "MASTER_PORT": "12000"},
        ),
        (
            {"SLURM_STEP_TASKS_PER_NODE": None, "SLURM_NTASKS_PER_NODE": "4"},
            PLACE | {"LOCAL_WORLD_SIZE": "4", "MASTER_PORT": "12000"},
        ),
        # A single task, the script of a job, and the shell of `salloc`, are each alone.
        ({"SLURM_NTASKS": "1"}, {}),
        ({"SLURM_STEP_NUM_TASKS": "1"}, {}),
        ({"ENVIRONMENT": "BATCH", "SLURM_PROCID": "0"}, {}),
        ({"SLURM_PROCID": None}, {}),
        # Under torchrun, which srun has started once a machine.
        ({"RANK": "11"}, {"RANK": "11"}),
    ],
)  # fmt: skip
def test_tasks_of_srun_are_one_run(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str | None], expected: dict[str, str]
) -> None:
    set_to(monkeypatch, changes)
    launcher.join_slurm()
    found = {name: os.environ[name] for name in launcher.VARIABLES if name in os.environ}
    assert found == expected
    assert launcher.is_launched() is bool(expected)
    if len(expected) > 1:
        assert launcher.several_machines() and not launcher.on_first_machine()
        place = f"{expected['MASTER_ADDR']}:{expected['MASTER_PORT']}"
        assert launcher.launch_remarks() == [
            f"{expected['WORLD_SIZE']} tasks of srun are one run, which meets at {place}"
        ]
    # A second look changes nothing; a command that is a single process has no part in it.
    launcher.join_slurm()
    launcher.forget_launch()
    launcher.join_slurm()
    assert not launcher.is_launched()


def test_a_script_of_a_job_is_no_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm tells it the number of a first task, and it would wait for the others for ever."""
    set_to(monkeypatch, {"ENVIRONMENT": "BATCH", "SLURM_PROCID": "0"})
    assert launcher.launch_remarks() == [
        "the job has 7 tasks, of which this command is none (SLURM_NTASKS): one process; start it by srun for one run "
        "of all of them"
    ]
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert launcher.launch_remarks() == []


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"), ("gpu[03-05,9],login", "gpu03"), ("gpu[7,9-11]", "gpu7"), ("a,b", "a"),
        ("rack[2-3]n[04-05,7]x,b", "rack2n04x"), ("", ""),
    ],
)  # fmt: skip
def test_the_first_of_a_list_of_machines(nodes: str, first: str) -> None:
    assert slurm.first_host(nodes) == first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"SLURM_LOCALID": None},
            "SLURM_LOCALID must be a whole number >= 0, got '': start by srun, or unset SLURM_PROCID for one process",
        ),
        (
            {"SLURM_PROCID": "x"},
            "SLURM_PROCID must be a whole number >= 0, got 'x': start by srun, or unset SLURM_PROCID for one process",
        ),
        (
            {"SLURM_JOB_NODELIST": None},
            "srun has started 7 tasks and does not say on which machines (SLURM_JOB_NODELIST): give the first one's "
            "name as MASTER_ADDR",
        ),
    ],
)
def test_what_slurm_does_not_say(monkeypatch: pytest.MonkeyPatch, changes: dict[str, str | None], message: str) -> None:
    set_to(monkeypatch, changes)
    with pytest.raises(ValueError) as error:
        launcher.join_slurm()
    assert str(error.value) == message
