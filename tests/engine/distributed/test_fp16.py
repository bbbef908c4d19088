"""The loss scale of fp16: what is its fault, and what is not."""

from __future__ import annotations

import math

import launch
import pytest
import torch

STAGES = (2, 3)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[list]]:
    """What tests/workers/loss_scale.py saw at each stage of ZeRO."""
    out = tmp_path_factory.mktemp("loss_scale") / "found.pt"
    launch.run_workers("loss_scale.py", 2, {"out": str(out), "stages": STAGES})
    return torch.load(out)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", STAGES)
def test_an_overflow_lowers_the_scale_and_is_not_counted(stage: int, found: dict[int, list[list]]) -> None:
    """On one of two processes; both leave out the step. NaN is counted once the scale has fallen to 1."""
    overflow, fine, *bad, after = found[stage]
    assert overflow == [300.0, 256.0, 128.0, True, False]
    assert fine == [1.0, 128.0, 128.0, True, True]
    scales = [128.0, 64.0, 32.0, 16.0, 8.0, 4.0, 2.0, 1.0, 1.0]
    for (factor, scale, lower, counted_good, moved), expected in zip(bad, scales, strict=True):
        assert math.isnan(factor) and not moved
        assert (scale, lower) == (expected, max(1.0, expected / 2))
        assert counted_good == (scale > 1.0)
    assert after == [1.0, 1.0, 1.0, True, True]
