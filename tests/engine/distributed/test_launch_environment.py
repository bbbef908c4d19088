"""What the environment says of a run: variables of other programs, a network that is not there, shares of the cores."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.distributed as dist
import triton

from ipfm.engine.distributed import launch_environment
from ipfm.engine.distributed.device import run_device
from ipfm.engine.distributed.launch_environment import (
    answer_timeout,
    check_environment,
    environment_remarks,
    share_cores,
)
from ipfm.engine.distributed.world import start_world
from ipfm.engine.runtime import cores, launcher
from ipfm.engine.runtime.errors import Failed


@pytest.fixture(autouse=True)
def without_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    others = (
        "DS_ACCELERATOR",
        "IPFM_TIMEOUT",
        "IPFM_SILENCE",
        "IPFM_GRACE",
        "CUDA_VISIBLE_DEVICES",
        *launcher._UNJOINED,
    )
    for name in (*launcher.VARIABLES, *others):
        # Set first, so that what the call sets is undone at the end.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("IPFM_TIMEOUT", "10min", "IPFM_TIMEOUT must be a number of seconds > 0, got '10min'"),
        ("IPFM_TIMEOUT", "", "IPFM_TIMEOUT must be a number of seconds > 0, got ''"),
        ("IPFM_TIMEOUT", "nan", "IPFM_TIMEOUT must be a number of seconds > 0, got 'nan'"),
        ("IPFM_SILENCE", "0", "IPFM_SILENCE must be a number of seconds > 0, got '0'"),
        ("IPFM_GRACE", "30s", "IPFM_GRACE must be a number of seconds > 0, got '30s'"),
        ("DS_ACCELERATOR", "cuda", "DS_ACCELERATOR must be cpu on this machine, got 'cuda': unset it"),
        ("RANK", "", "RANK must be a whole number >= 0, got '': unset it, or start by a launcher"),
    ],
)
def test_variables_that_cannot_be(monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_environment()
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as error:
        check_environment()
    assert str(error.value) == message


def test_variables_that_cannot_be_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        with pytest.raises(ValueError, match=r"^TRITON_INTERPRET=1 computes every kernel in Python"):
            check_environment()
        triton.knobs.runtime.interpret = False
        check_environment()
        # What one process sees alone may be another GPU for each; of several each has the one of its place.
        monkeypatch.setenv("LOCAL_RANK", "2")
        check_environment()
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        with pytest.raises(ValueError, match=r"^LOCAL_RANK must be less than the number of GPUs, got 2 and 2: start"):
            check_environment()
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        with pytest.raises(ValueError, match=r"got 2 and 2 \(CUDA_VISIBLE_DEVICES=0,1\): start at most one process"):
            check_environment()


def test_a_gpu_is_left_alone_where_the_cpu_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By DS_ACCELERATOR, which `deepspeed` hands on, other than CUDA_VISIBLE_DEVICES; without a word."""
    (tmp_path / "0000:01:00.0").mkdir()
    monkeypatch.setattr(launch_environment, "_GPUS", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        check_environment()
    assert run_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert environment_remarks() == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("DS_ACCELERATOR", "xpu")
    with pytest.raises(ValueError, match=r"^DS_ACCELERATOR must be cuda or cpu on this machine, got 'xpu': unset it$"):
        check_environment()


@pytest.mark.parametrize(
    ("variables", "gpu", "said"),
    [
        ({}, False, ""),
        ({"CUDA_VISIBLE_DEVICES": "7"}, False, "CUDA_VISIBLE_DEVICES=7 names no GPU that can be used: "),
        ({"CUDA_VISIBLE_DEVICES": "all"}, True, "CUDA_VISIBLE_DEVICES=all names no GPU that can be used: "),
        ({"CUDA_VISIBLE_DEVICES": ""}, True, ""),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, True, ""),
        ({}, True, f"this machine has a GPU that cannot be used (torch {torch.__version__} "),
        # The deepspeed launcher sets it on a CPU too.
        ({"CUDA_VISIBLE_DEVICES": "0,1", "RANK": "0"}, False, ""),
        (
            {"CUDA_VISIBLE_DEVICES": "0,1", "RANK": "0"},
            True,
            "CUDA_VISIBLE_DEVICES=0,1 names no GPU that can be used: ",
        ),
    ],
)
def test_falling_back_to_the_cpu_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variables: dict[str, str], gpu: bool, said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(launch_environment, "_GPUS", tmp_path)
    if gpu:
        (tmp_path / "0000:01:00.0").mkdir()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    remarks = environment_remarks()
    assert len(remarks) == bool(said)
    assert all(remark.startswith(said) and remark.endswith(": computing on the CPU") for remark in remarks)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert environment_remarks() == []


@pytest.mark.parametrize(
    ("name", "program"),
    [("OMPI_COMM_WORLD_SIZE", "mpirun"), ("PMI_SIZE", "mpiexec")],
)
def test_processes_of_other_launchers_do_not_join(monkeypatch: pytest.MonkeyPatch, name: str, program: str) -> None:
    """Nor would they be refused: many runs may be started so, each with its own settings."""
    monkeypatch.setattr(launch_environment, "_no_gpu", lambda: [])
    for single in ("1", "", "x"):
        monkeypatch.setenv(name, single)
        assert environment_remarks() == []
    monkeypatch.setenv(name, "4")
    assert environment_remarks() == [
        f"{program} has started 4 processes ({name}), which do not join: each is a run of its own; start by deepspeed "
        "or torchrun for one run"
    ]
    monkeypatch.setenv("RANK", "0")
    assert environment_remarks() == []


@pytest.mark.parametrize(
    ("error", "named", "message"),
    [
        (
            "[enforce fail at device.cc:212] ifa != nullptr. Unable to find interface for: [127.0.0.1]", None,
            "no network interface is up, not even the loopback: bring it up (ip link set lo up), "
            "or name one that is by GLOO_SOCKET_IFNAME",
        ),
        (
            "[enforce fail at device.cc:98] rv != -1. Unable to find address for: eth7", "eth7",
            "GLOO_SOCKET_IFNAME='eth7' is no network interface of this machine: unset it, or name another "
            "(ip link lists them)",
        ),
        (
            "The server socket has failed to listen on any local network address. port: 29500", None,
            "port 29500 is in use: give another one (`deepspeed --master_port N`, `torchrun --master_port N`)",
        ),
    ],
)  # fmt: skip
def test_no_way_for_processes_to_meet(
    monkeypatch: pytest.MonkeyPatch, error: str, named: str | None, message: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(error)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)  # by a test before this one
    monkeypatch.setattr(dist, "init_process_group", fail)
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if named:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", named)
    with pytest.raises(Failed) as failure:
        start_world()
    assert str(failure.value) == message
    error = "a defect"
    with pytest.raises(RuntimeError, match=r"^a defect$"):
        start_world()


@pytest.mark.parametrize(
    ("machines", "given", "towards", "chosen"),
    [
        (2, None, {"node1": "10.0.0.5"}, "eth1"),
        (2, None, {"node1": "fd00::5"}, "eth1"),
        # The first machine itself, whose name is that of its loopback: the way out.
        (2, None, {"node1": "127.0.1.1", "192.0.2.1": "192.168.0.5"}, "eth0"),
        # Neither: only where a single interface is left.
        (2, None, {"node1": "127.0.1.1"}, ""),
        (2, "ib0", {"node1": "10.0.0.5"}, "ib0"),
        (1, None, {"node1": "10.0.0.5"}, ""),
    ],
)
def test_the_interface_between_machines_is_found(
    monkeypatch: pytest.MonkeyPatch, machines: int, given: str | None, towards: dict[str, str], chosen: str
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", given or "")
    if given is None:
        monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    for name, value in {"RANK": "0", "WORLD_SIZE": f"{machines}", "LOCAL_SIZE": "1", "MASTER_ADDR": "node1"}.items():
        monkeypatch.setenv(name, value)
    addresses = {"lo": ["127.0.0.1", "::1"], "eth0": ["192.168.0.5"], "eth1": ["10.0.0.5", "fd00::5%eth1"]}
    found = {
        name: [SimpleNamespace(family=socket.AF_INET6 if ":" in one else socket.AF_INET, address=one) for one in each]
        for name, each in addresses.items()
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    monkeypatch.setattr(psutil, "net_if_stats", lambda: dict.fromkeys(found, SimpleNamespace(isup=True)))
    monkeypatch.setattr(launch_environment, "_own_address", lambda host: towards.get(host, ""))
    launch_environment.choose_interface()
    assert os.environ.get("GLOO_SOCKET_IFNAME", "") == chosen
    del found["eth1"]
    if given is None and machines > 1 and "192.0.2.1" not in towards:
        monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
        launch_environment.choose_interface()
        assert os.environ["GLOO_SOCKET_IFNAME"] == "eth0"


# -- how long processes wait for each other ---------------------------------------------------------------------------


def test_processes_wait_as_long_as_they_are_told(monkeypatch) -> None:
    monkeypatch.delenv("IPFM_TIMEOUT", raising=False)
    assert answer_timeout().total_seconds() == 600
    for given, seconds in (("30", 30), ("0.5", 0.5), ("1e4", 10_000)):
        monkeypatch.setenv("IPFM_TIMEOUT", given)
        assert answer_timeout().total_seconds() == seconds


@pytest.mark.parametrize("given", ["soon", "", "0", "-1", "nan", "inf"])
def test_times_that_are_none(monkeypatch, given: str) -> None:
    monkeypatch.setenv("IPFM_TIMEOUT", given)
    with pytest.raises(ValueError, match=f"^IPFM_TIMEOUT must be a number of seconds > 0, got '{given}'$"):
        answer_timeout()


# -- cores -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("asked", "processes", "threads", "said"),
    [
        # (variables, processes on four cores, threads of each, what is said)
        ({}, 2, 2, ""),
        ({}, 8, 1, ""),
        ({"OMP_NUM_THREADS": 1}, 2, 1, ""),
        ({"OMP_NUM_THREADS": 2}, 2, 2, ""),
        (
            {"OMP_NUM_THREADS": 4}, 2, 2,
            "OMP_NUM_THREADS=4 would start 4 threads in each of 2 processes on 4 cores: 2 instead\n",
        ),
        (
            {"OMP_NUM_THREADS": 4, "MKL_NUM_THREADS": 4}, 4, 1,
            "OMP_NUM_THREADS=4 and MKL_NUM_THREADS=4 would start 4 threads in each of 4 processes on 4 cores: "
            "1 instead\n",
        ),
        (
            {"MKL_NUM_THREADS": 64}, 1, 4,
            "MKL_NUM_THREADS=64 would start 64 threads in each of 1 process on 4 cores: 4 instead\n",
        ),
    ],
)  # fmt: skip
def test_threads_are_no_more_than_cores(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    asked: dict[str, int],
    processes: int,
    threads: int,
    said: str,
) -> None:
    """As many as a process's share of them, or as few as the user says."""
    monkeypatch.setattr(launch_environment, "usable_cores", lambda: 4)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for speaks in (False, True):
        # What torch makes of the variables when it is imported.
        torch.set_num_threads(max(asked.values(), default=4))
        for name, value in asked.items():
            monkeypatch.setenv(name, str(value))
        share_cores(processes, speaks=speaks)
        assert torch.get_num_threads() == threads
        assert capsys.readouterr().err == (said if speaks else "")


@pytest.mark.parametrize(
    ("quota", "period", "expected"),
    [
        ("max", 100000, 8),
        (200000, 100000, 2),
        (250000, 100000, 2),
        (50000, 100000, 1),
        (-1, 100000, 8),
        (9900000, 1, 8),
    ],
)
def test_cores_of_a_container(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quota: object, period: int, expected: int
) -> None:
    """Of both generations of control groups; a file that is not there says nothing."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    nowhere = tmp_path / "nowhere"
    files = [tmp_path / name for name in ("cpu.max", "quota", "period")]
    for file, text in zip(files, (f"{quota} {period}", quota, period), strict=True):
        file.write_text(f"{text}\n")
    for new, old, usable in (
        (files[0], (nowhere, nowhere), expected),
        (nowhere, tuple(files[1:]), expected),
        (nowhere, (nowhere, nowhere), 8),
    ):
        monkeypatch.setattr(cores, "_QUOTA", new)
        monkeypatch.setattr(cores, "_QUOTA_V1", old)
        assert cores.usable_cores() == usable
