"""Networks under DeepSpeed ZeRO; what they compute is held in tests/engine/objectives/test_equivalence.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ipfm.engine.distributed.zero import _sent_at_once


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
