"""A training step gives the device work and reads nothing back from it, so that the host never waits."""

from __future__ import annotations

import json
from pathlib import Path

import launch
import pytest
import torch

from ipfm.engine.commands.bench.no_reading import ON_A_CPU_ALONE, NoReading, Reading


@pytest.mark.distributed
def test_a_step_reads_no_tensor(tmp_path: Path) -> None:
    """Real engines on two processes: ZeRO 0, 1, 2 in fp32, bf16; joint, phased; clipping, accumulation, dropout.

    Nor does DeepSpeed wait for the whole device: at any stage, ZeRO 3 and several student updates included.
    """
    launch.run_workers("steps_without_reading.py", 2, {"out": str(tmp_path / "found.json")})
    both = json.loads((tmp_path / "found.json").read_text())
    assert len(both["waits"]) == 6 and both["waits"] == {name: {} for name in both["waits"]}
    found = both["read"]
    assert len(found) == 4
    read = {name: [p for p in places if not p.startswith(ON_A_CPU_ALONE)] for name, places in found.items()}
    assert read == {name: [] for name in found}
    # The counting sees what there is to see.
    assert all(any(p.startswith(ON_A_CPU_ALONE[1]) for p in places) for places in found.values())


@pytest.mark.gpu
def test_a_step_waits_for_nothing_on_a_gpu(tmp_path: Path) -> None:
    launch.run_workers("steps_without_reading.py", 1, {"out": str(tmp_path / "found.json")}, gpu=True)
    for found, settings in zip(json.loads((tmp_path / "found.json").read_text()).values(), (4, 6), strict=True):
        assert found == {name: {} for name in found} and len(found) == settings


READINGS = {
    "item": lambda t: t.sum().item(),
    "float": lambda t: float(t[0]),
    "if": lambda t: 1 if t[0] > 0 else 2,
    "any": lambda t: any(t > 0),
    "tolist": lambda t: t.tolist(),
    "numpy": lambda t: t.numpy(),
    "mask": lambda t: t[t > 0],
    "write by mask": lambda t: t.clone().index_put_((t > 0,), torch.zeros(())),
    "nonzero": lambda t: t.nonzero(),
    "equal": lambda t: torch.equal(t, t),
    "allclose": lambda t: torch.allclose(t, t),
    "unique": lambda t: t.unique(),
}


@pytest.mark.parametrize("name", READINGS)
def test_what_counts_as_reading(name: str) -> None:
    tensor = torch.tensor([1.0, -1.0])
    with pytest.raises(Reading), NoReading():
        READINGS[name](tensor)
    with NoReading(count=True) as mode:
        READINGS[name](tensor)
    assert "objectives/test_no_host_sync.py <lambda>: " in next(iter(mode.found))


def test_what_does_not() -> None:
    tensor = torch.tensor([1.0, -1.0])
    with NoReading():
        torch.where(tensor > 0, tensor, 0.0).masked_fill(tensor < 0, 1.0)[1:].sum().clamp(min=torch.tensor(1.0))
        tensor[torch.tensor([1, 0])].cpu()
        assert len(tensor) == tensor.numel() == 2
