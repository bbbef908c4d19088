"""Launches under a driver without a GPU, in a process whose kernels are interpreted."""

import pytest
import torch
import triton.language as tl

from ipfm.kernels import group_norm_silu
from ipfm.kernels._dispatch import TRITON_DEVICES
from ipfm.kernels.bench.fake_driver import FakeKernel, fake_cuda
from ipfm.kernels.group_norm import group_norm_silu_kernel

META = torch.device("meta")


def launch(grid=(1,), **other):
    """The forward kernel itself."""
    f = torch.zeros(4, 4, 2, 2, device=META)
    numbers = {"HW": 4, "s_b": 16, "s_c": 4, "s_hw": 1, "s_pb": 0, "s_pc": 0, "num_warps": 1}
    flags = {"SCALED": False, "SILU": True, "RESIDENT": True, "EPS": 1e-5, "COMPUTE": tl.float32}
    sizes = {"GROUPS_ALL": 1, "CHANNELS": 4, "GROUPS": 1, "CP": 4, "BLOCK": 4}
    group_norm_silu_kernel[grid](f, f, f, f, f, f, f, f, **(numbers | flags | sizes | other))


def test_a_launch_is_specialised_as_on_a_gpu_and_written_down():
    with fake_cuda() as launches:
        launch()
        launch(s_b=48, num_warps=2)
    first, second = (call.variant for call in launches.calls)
    assert (first.module, first.name, first.warps) == ("ipfm.kernels.group_norm", "group_norm_silu_kernel", 1)
    assert first.fn is group_norm_silu_kernel
    types = dict(first.types)
    assert (types["p_x"], types["s_b"], types["s_hw"]) == ("*fp32", "i32", "constexpr")
    assert first.constant("s_hw") == 1
    assert first.constant("CHANNELS") == 4
    assert {"p_x", "s_b", "s_pb"} <= set(first.aligned)
    assert "s_c" not in first.aligned
    assert (second.warps, launches.calls[0].grid, launches.calls[0].bytes["p_x"]) == (2, (1, 1, 1), 256)
    assert launches.variants == {first: 1, second: 1}


@pytest.mark.parametrize(
    ("grid", "other", "said"),
    [
        pytest.param((0,), {}, "grid", id="an empty grid"),
        pytest.param((1, 70_000), {}, "grid", id="a grid with too many rows"),
        pytest.param((2**31,), {}, "grid", id="a grid beyond 2**31"),
    ],
)
def test_what_the_true_launcher_would_refuse_is_refused(grid, other, said):
    with fake_cuda(), pytest.raises(ValueError, match=said):
        launch(grid, **other)


def test_a_number_that_an_argument_cannot_hold_is_refused():
    with fake_cuda() as launches:
        launch()
        variant = launches.calls[0].variant
        values = [2**31 if name == "s_b" else None if kind[0] == "*" else 1 for name, kind in variant.types]
        with pytest.raises(ValueError, match="s_b is i32 and gets 2147483648"):
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
