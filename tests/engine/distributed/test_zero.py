"""Networks under DeepSpeed ZeRO; what they compute is held in tests/engine/objectives/test_equivalence.py."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ipfm.engine.distributed import world
from ipfm.engine.distributed.zero import _sent_at_once
from ipfm.engine.runtime import launcher


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
