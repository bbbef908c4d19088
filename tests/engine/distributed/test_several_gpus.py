"""What needs two GPUs: work on the second one, and two processes under NCCL of which one is killed.

The second has a form for two processes on the CPU, under gloo.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import launch
import prepared
import pytest
import soak
import torch

from ipfm.engine import DistillConfig, Distiller
from ipfm.engine.distributed.world import World
from ipfm.models import NetworkConfig, build_network

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
NETWORK = NetworkConfig(
    img_resolution=8, img_channels=3, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(),
    dropout=0.0, D=16.0,
)  # fmt: skip


@pytest.mark.parametrize(
    "place", ["cpu", pytest.param("cuda:1", marks=[pytest.mark.gpu, two_gpus])], ids=["cpu", "second GPU"]
)
def test_a_training_stays_on_its_device_whichever_is_current(place: str) -> None:
    """Every tensor of it, and with it every launch: on the second GPU while the first one is current."""
    device = torch.device(place)
    torch.manual_seed(0)
    config = DistillConfig(
        batch=4, micro_batch=4, max_steps=2, zero=0, precision="fp32", backward="joint", activation_checkpointing="off"
    )
    distiller = Distiller(config, build_network(NETWORK), world=World(0, 1, device))
    losses = [distiller.iteration(step).sums for step in range(2)]
    distiller.refresh()
    images = distiller.sample(0, 2, seed=0)
    found = [images, *(t for loss in losses for t in loss.values())]
    for trained in distiller.networks.values():
        found += [
            *trained.module.parameters(),
            *(t for state in trained.optimizer.state.values() for t in state.values()),
        ]
    assert {t.device for t in found if isinstance(t, torch.Tensor)} == {device}
    assert all(torch.isfinite(t).all() for t in found)
    if device.type == "cuda":
        assert torch.cuda.current_device() == 0
        assert torch.cuda.memory_allocated(0) == 0


@pytest.mark.distributed
@pytest.mark.parametrize(
    "backend", ["gloo", pytest.param("nccl", marks=[pytest.mark.gpu, two_gpus])], ids=["gloo", "nccl"]
)
def test_one_of_two_processes_is_killed_and_one_alone_goes_on(tmp_path: Path, backend: str) -> None:
    teacher, out, log = soak.make_teacher(tmp_path / "teacher"), tmp_path / "run", tmp_path / "log"
    gpus = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0,1"), "DS_ACCELERATOR": "cuda"}
    variables = gpus if backend == "nccl" else {}
    launcher = "hand" if backend == "nccl" else "forked"
    arguments = soak.settings(teacher, out, 100_000)
    group = soak.Group(arguments, launcher, log, **variables)
    try:
        soak.wait_until(lambda: soak.newest(out) >= 2, group)
        group.started[1].send_signal(signal.SIGKILL)
        codes = group.wait(60)
    finally:
        group.kill()
    assert codes == [1, -signal.SIGKILL], group.output()
    lines = [line for line in group.output().splitlines() if line.startswith("digits_ipfm.py: ")]
    assert lines and "another process of this run has ended or does not answer" in lines[-1], group.output()
    reached = soak.newest(out)
    command = [sys.executable, soak.RECIPE, *soak.settings(teacher, out, reached + 2)]
    if backend == "nccl":
        done = subprocess.run(
            command, env=launch.environment(gpu=True), capture_output=True, text=True, timeout=300, check=False
        )
    else:
        done = prepared.run(soak.RECIPE, *command[2:], env=launch.environment())
    assert done.returncode == 0, done.stderr
    assert f"continuing at step {reached}" in done.stderr
    assert soak.newest(out) == reached + 2
