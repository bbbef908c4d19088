"""Which device a process takes, on machines with GPUs that are pretended."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import launch
import pytest
import torch
import torch.distributed as dist

from ipfm.engine.distributed import world as worlds
from ipfm.engine.distributed.device import check_own_gpus, run_device
from ipfm.engine.runtime import launcher

Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Pretends a number of visible GPUs and the variables of a process on that machine."""

    def pretend(gpus: int, **variables: str) -> None:
        for name in (*launcher.VARIABLES, *launcher._PLACES, "DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"):
            # Set first, so that what is set meanwhile is undone at the end.
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(launcher, "_replaced", {})
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)

    return pretend


@pytest.mark.quick
@pytest.mark.parametrize(
    ("gpus", "variables", "device"),
    [
        (0, {}, "cpu"),
        (0, {"RANK": "3", "LOCAL_RANK": "3"}, "cpu"),
        (8, {}, "cuda:0"),
        (8, {"DS_ACCELERATOR": "cpu"}, "cpu"),
        (8, {"RANK": "11", "LOCAL_RANK": "3"}, "cuda:3"),
        # By itself it says which GPU one process takes.
        (8, {"LOCAL_RANK": "3"}, "cuda:3"),
        # `export RANK=$SLURM_PROCID` and the like, under srun, mpirun, and from a script of one's own.
        (4, {"RANK": "6", "SLURM_LOCALID": "2"}, "cuda:2"),
        (4, {"RANK": "6", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, "cuda:1"),
        (4, {"RANK": "6"}, "cuda:2"),
        (4, {"RANK": "6", "LOCAL_RANK": "3", "SLURM_LOCALID": "2"}, "cuda:3"),
        (4, {"RANK": "6", "SLURM_LOCALID": ""}, "cuda:2"),
        # A script within a job starts one process of no launch.
        (4, {"SLURM_LOCALID": "2"}, "cuda:0"),
        # `srun --gpus-per-task 1` shows each task its own.
        (1, {"RANK": "3", "LOCAL_RANK": "3"}, "cuda:0"),
        (1, {"RANK": "3", "SLURM_LOCALID": "3"}, "cuda:0"),
        (1, {"RANK": "3"}, "cuda:0"),
    ],
)  # fmt: skip
def test_the_gpu_of_a_place(machine: Machine, gpus: int, variables: dict[str, str], device: str) -> None:
    machine(gpus, **variables)
    assert run_device() == torch.device(device)


@pytest.mark.parametrize("name", ["LOCAL_RANK", "SLURM_LOCALID"])
def test_more_processes_than_gpus(machine: Machine, name: str) -> None:
    machine(2, RANK="6", CUDA_VISIBLE_DEVICES="0,1", **{name: "2"})
    with pytest.raises(ValueError) as error:
        run_device()
    assert str(error.value) == (
        f"{name} must be less than the number of GPUs, got 2 and 2 (CUDA_VISIBLE_DEVICES=0,1): "
        "start at most one process for each GPU of a machine"
    )


@pytest.mark.parametrize(
    ("gpus", "variables", "told", "place"),
    [
        (4, {"LOCAL_RANK": "3"}, "3", 3),
        (1, {"LOCAL_RANK": "3"}, "0", 3),
        (4, {"SLURM_LOCALID": "1"}, "1", 1),
        (1, {"SLURM_LOCALID": "1"}, "0", 1),
        (2, {}, "1", 1),
    ],
)
def test_deepspeed_is_told_the_gpu_and_the_place_is_kept(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, gpus: int, variables: dict[str, str], told: str, place: int
) -> None:
    """It takes LOCAL_RANK for the index of a GPU: one that is not there, where each process sees a single one."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    group = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    machine(gpus, **group, **variables)
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(worlds, "import_deepspeed", lambda: None)
    monkeypatch.setattr(worlds, "_watch_peers", lambda rank, size: None)
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=4)
    try:
        for _ in range(2):
            world = worlds.start_world()
            assert (str(world.device), world.rank, launcher.local_rank()) == (f"cuda:{told}", 3, place)
    finally:
        dist.destroy_process_group()
    assert chosen == [torch.device("cuda", int(told))] * 2
    assert worlds.run_device() == world.device
    assert os.environ["LOCAL_RANK"] == told


def test_a_group_of_the_callers_own_has_a_gpu_each(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made without a launcher: by torch.multiprocessing, or in a notebook."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    machine(4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(worlds, "import_deepspeed", lambda: None)
    monkeypatch.setattr(worlds, "_watch_peers", lambda rank, size: None)
    dist.init_process_group("fake", store=FakeStore(), rank=2, world_size=3)
    try:
        assert worlds.start_world().device == run_device() == torch.device("cuda", 2)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("gpus", "said"),
    [
        (["a", "b", "c"], ""),
        (["a", "b", "a"], "processes 0 and 2 have the same GPU (a) (CUDA_VISIBLE_DEVICES=0): start at most one process "
                          "for each GPU of a machine"),
    ],
)  # fmt: skip
def test_two_processes_with_one_gpu_hear_of_it(monkeypatch: pytest.MonkeyPatch, gpus: list[str], said: str) -> None:
    """All of them, and twice too: NCCL would have them wait for each other."""
    found = {torch.device("cuda", place): gpu for place, gpu in enumerate(gpus)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=found[device]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    store = dist.HashStore()

    def check(rank: int) -> str:
        try:
            check_own_gpus(torch.device("cuda", rank), store, rank, len(gpus))
        except ValueError as error:
            return str(error)
        return ""

    for _ in range(2):
        with ThreadPoolExecutor(len(gpus)) as threads:
            assert list(threads.map(check, range(len(gpus)))) == [said] * len(gpus)


def test_the_device_is_decided_in_one_place() -> None:
    """Who asks torch for GPUs otherwise: to say that one cannot be used, to read its counters, and `load_generator`.

    And the doctor, which says what there is.
    """
    engine = launch.ROOT / "engine"
    asked = {"is_available", "device_count", "current_device", "set_device", "is_bf16_supported"}
    asking = {
        file.relative_to(engine).as_posix()
        for file in engine.rglob("*.py")
        if "doctor" not in file.parts
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in asked and ast.unparse(node.value) == "torch.cuda"
    }
    assert asking == {
        "distributed/device.py", "distributed/launch_environment.py", "distributed/world.py",
        "sampling/image_sampler.py", "training/monitor.py",
    }  # fmt: skip
