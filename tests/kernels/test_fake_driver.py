"""Launches under a driver without a GPU, in a process whose kernels are interpreted."""

import pytest
import torch
import triton
import triton.language as tl

from ipfm.kernels import group_norm_silu
from ipfm.kernels._dispatch import TRITON_DEVICES
from ipfm.kernels.bench.fake_driver import FakeKernel, fake_cuda

META = torch.device("meta")


@triton.jit(do_not_specialize=["seed"])
def scale_kernel(p_x, p_y, p_mask, count, stride, seed, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_y + o * stride, tl.load(p_x + o * stride, mask=o < count) * FACTOR + seed, mask=o < count)


def launch(grid=(1,), *, stride=3, seed=7, warps=1):
    x = torch.zeros(4, 16, device=META, dtype=torch.bfloat16)
    scale_kernel[grid](x, x, None, 48, stride, seed, FACTOR=0.5, BLOCK=64, num_warps=warps)


def test_a_launch_is_specialised_as_on_a_gpu_and_written_down():
    with fake_cuda() as launches:
        launch()
        launch(stride=1, warps=2)
        launch(seed=1)
    first, second, third = (call.variant for call in launches.calls)
    assert (first.name, first.warps) == ("scale_kernel", 1)
    types = dict(first.types)
    assert (types["p_x"], types["count"], types["stride"], types["seed"]) == ("*bf16", "i32", "i32", "i32")
    # What is None is a constant, and so is 1, but where it must not be.
    assert (types["p_mask"], first.constant("p_mask", 0)) == ("constexpr", None)
    assert (second.constant("stride"), second.warps) == (1, 2)
    assert third == first
    assert (first.constant("FACTOR"), first.constant("BLOCK")) == (0.5, 64)
    assert {"p_x", "p_y", "count"} <= set(first.aligned)
    assert not {"stride", "seed"} & set(first.aligned)
    call = launches.calls[0]
    assert (call.grid, call.bytes["p_x"]) == ((1, 1, 1), 128)
    assert call.numbers == {"count": 48, "stride": 3, "seed": 7, "BLOCK": 64}
    assert launches.variants == {first: 2, second: 1}
    assert launches.count == 3


def test_launches_that_are_not_recorded_are_counted_alone():
    with fake_cuda(recorded=False) as launches:
        launch()
        launch(stride=1)
    assert (launches.count, launches.calls) == (2, [])


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        pytest.param((0,), "grid", id="an empty grid"),
        pytest.param((1, 70_000), "grid", id="a grid with too many rows"),
        pytest.param((2**31,), "grid", id="a grid beyond 2**31"),
    ],
)
def test_what_the_true_launcher_would_refuse_is_refused(grid, said):
    with fake_cuda(), pytest.raises(ValueError, match=said):
        launch(grid)


def test_a_number_that_an_argument_cannot_hold_is_refused():
    with fake_cuda() as launches:
        launch()
        variant = launches.calls[0].variant
        values = [2**31 if name == "count" else None if kind[0] == "*" else 1 for name, kind in variant.types]
        with pytest.raises(ValueError, match="count is i32 and gets 2147483648"):
            FakeKernel(variant)[(1,)](*values)


def test_afterwards_everything_is_as_before():
    with fake_cuda():
        assert "meta" in TRITON_DEVICES
        with pytest.raises(RuntimeError, match="active already"), fake_cuda():
            pass
    assert {"cuda"} == TRITON_DEVICES
    x, ones, zeros = torch.randn(1, 4, 2, 2), torch.ones(4), torch.zeros(4)
    got = group_norm_silu(x, 1, ones, zeros, backend="triton")  # interpreted
    torch.testing.assert_close(got, group_norm_silu(x, 1, ones, zeros, backend="reference"))


def test_an_error_meanwhile_leaves_nothing_behind():
    with pytest.raises(KeyError), fake_cuda():
        raise KeyError
    assert {"cuda"} == TRITON_DEVICES
    with fake_cuda() as launches:
        pass
    assert launches.calls == []
