"""Networks under DeepSpeed ZeRO; what they compute is held in tests/engine/objectives/test_equivalence.py."""

from __future__ import annotations

import copy
import importlib
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ipfm.engine import DistillConfig, Distiller
from ipfm.engine.commands.bench.equivalence import BASE, compared_teacher
from ipfm.engine.distributed import world
from ipfm.engine.distributed.zero import _sent_at_once
from ipfm.engine.runtime import launcher
from ipfm.engine.training import run
from ipfm.models.weight_order import by_channel


def test_deepspeeds_broadcast_is_its_own_again_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meanwhile weights, which it sends as bytes, are left out, and nothing else is."""
    sent: list[torch.dtype] = []

    def broadcast(tensor: Tensor, src: int, group: Any = None) -> str:
        sent.append(tensor.dtype)
        return "handle"

    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    comm = SimpleNamespace(broadcast=broadcast)
    with pytest.raises(KeyboardInterrupt), _sent_at_once(nn.Linear(2, 2), comm):
        assert comm.broadcast(torch.ones(4).view(torch.uint8), 0) is None
        assert comm.broadcast(torch.ones(1, dtype=torch.int64), src=0, group=None) == "handle"
        raise KeyboardInterrupt
    assert comm.broadcast is broadcast and sent == [torch.int64]


@pytest.mark.parametrize("gpu", [True, False])
def test_no_extension_of_deepspeeds_is_tried(
    gpu: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It would print a line on stdout for each that lacks a compiler of CUDA, in every process."""
    import deepspeed.ops
    from deepspeed.ops.op_builder import builder

    communication = importlib.import_module("deepspeed.comm.torch")

    def probe(*_: Any, **__: Any) -> bool:
        raise AssertionError("an extension was tried")

    monkeypatch.setattr(builder, "probe_is_compatible", probe)
    monkeypatch.delitem(vars(deepspeed.ops), "__compatible_ops__", raising=False)
    # Both kinds of machine have their own way to leave it out.
    own = None if gpu else SimpleNamespace(NAME="deepspeed_shm_comm")
    monkeypatch.setattr(communication, "get_accelerator", lambda: SimpleNamespace(create_op_builder=lambda _: own))
    monkeypatch.setattr(world, "uses_gpu", lambda: gpu)
    capfd.readouterr()  # of a first import, where this is the process's
    world.import_deepspeed()
    assert communication.build_shm_op() is None
    assert capfd.readouterr() == ("", "")
    monkeypatch.undo()
    world.import_deepspeed()


def test_a_world_with_sharded_weights_gives_pytorchs_linear_layer_back(monkeypatch: pytest.MonkeyPatch) -> None:
    world.import_deepspeed()
    sharding = sys.modules["deepspeed.runtime.zero.partition_parameters"]
    # What it prints it asks its process group about.
    monkeypatch.setattr(sharding, "print_rank_0", lambda *_, **__: None)
    own = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", own)
    for _ in range(2):
        sharding.InsertPostInitMethodToModuleSubClasses(enabled=False)._enable_mem_efficient_linear()
        assert torch.nn.functional.linear is sharding.zero3_linear_wrap
        launcher.stop_world()
        assert torch.nn.functional.linear is own
    # What somebody else has put there stays.
    monkeypatch.setattr(torch.nn.functional, "linear", print)
    launcher.stop_world()
    assert torch.nn.functional.linear is print


def test_weights_that_lie_in_the_order_of_the_activations_are_saved_and_loaded_as_they_are_meant(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Masters, moments and averages of a run at one stage go on at another, whose memory has another order."""
    monkeypatch.setattr(run, "orders_weights", lambda device: True)
    here = world.start_world()
    teacher = compared_teacher()
    try:
        settings = {**BASE, "precision": "bf16", "memory_format": "channels_last", "backward": "joint", "max_steps": 5}
        first, again, alone = (
            Distiller(DistillConfig(**settings, zero=stage), copy.deepcopy(teacher), world=here) for stage in (1, 2, 0)
        )
        net, meant = first.generator, dict(teacher.named_parameters())
        assert all(torch.equal(tensor, meant[name]) for name, tensor in net.full("weight"))
        stored = {name: p.float() for name, p in net.module.named_parameters()}
        moved = [name for name, p in stored.items() if not torch.equal(p, meant[name].bfloat16().float())]
        assert len(moved) > 10
        assert all(torch.equal(by_channel(stored[name]), meant[name].bfloat16().float()) for name in moved)
        first.iteration(0)
        for other in (again.generator, alone.generator):
            for kind in net.state_kinds:
                saved = {name: tensor.clone() for name, tensor in net.full(kind)}
                other.load(kind, saved)
                assert all(torch.equal(tensor, saved[name]) for name, tensor in other.full(kind)), kind
        # At stage 0 several processes have them so too; a network that follows is a plain one.
        settings |= {"precision": "fp32", "student_ema": 0.5, "zero": 0}
        both = Distiller(DistillConfig(**settings), copy.deepcopy(teacher), world=replace(here, size=2))
        student = both.networks["student"]
        assert any(not torch.equal(p, meant[name]) for name, p in student.module.named_parameters())
        assert all(torch.equal(p, meant[name]) for name, p in student.followed.named_parameters())
    finally:
        launcher.stop_world()
