"""Shapes on the meta device: what is remembered is what PyTorch's own functions say."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ipfm.engine.memory import live as meta
from ipfm.engine.memory.simulate import StepSettings, simulate_distillation
from ipfm.engine.memory.state import Sharding
from ipfm.models import presets


class Comparing(TorchDispatchMode):
    """Compares what is remembered of each operation with what the operation itself returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        meta.meta_outputs(func, args, kwargs)
        short, out = meta.meta_outputs(func, args, kwargs), func(*args, **kwargs)
        if any(key[0] is func and known for key, known in meta._KNOWN.items()):
            for a, b in zip(tree_leaves(out), tree_leaves(short), strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)
            self.seen[str(func)] += 1
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("trained", [True, False])
def test_shapes_are_those_of_pytorch(dtype, layout, trained) -> None:
    with torch.device("meta"):
        x = torch.empty(4, 32, 6, 8, dtype=dtype).to(memory_format=layout).requires_grad_()
        weight, bias = (torch.empty(32, dtype=dtype, requires_grad=trained) for _ in range(2))
        mixed = [torch.empty(6, 1, dtype=dtype), torch.empty_like(x, dtype=torch.float64), 2.0]
    with Comparing() as comparing:
        y = F.group_norm(x, 8, weight, bias) + x
        for other in (y, y.flip(0), *mixed):
            (y + other).sum().backward(retain_graph=True)
            torch.add(y, other, alpha=2)
            (y.detach() * other).sum()
            (torch.ones_like(y, dtype=torch.int32) * other).sum()
        for plain in (torch.float32, torch.int64, torch.bool):
            for number in (3, 2.0, True, 1j):
                torch.ones_like(y, dtype=plain) * number
        F.group_norm(x, 8).sum().backward()
        for p, train in ((0.3, True), (0.0, True), (1.0, True), (0.3, False)):
            torch.native_dropout(y.detach().requires_grad_() + 1, p, train)[0].sum().backward()
        for gradient in (y.detach(), y.detach().contiguous(), y.detach().double()):
            inner = F.silu(x.detach())
            torch.ops.aten.silu_backward.grad_input(gradient, inner, grad_input=inner)
        for gradient in (y.detach(), y.detach().contiguous(), y.detach().double()):
            torch.ops.aten.silu_backward.default(gradient, x.detach())
        words = torch.ones_like(x, dtype=torch.int64)
        words.bitwise_xor_(words.flip(0)).bitwise_and_(7).mul_(words[:1])
        for place in (torch.empty_like(words), words.new_empty(x.shape), words.new_empty(0)):
            assert torch.bitwise_right_shift(words, 3, out=place) is place and place.shape == words.shape
        y.detach().mul_(x.detach()[:, :, :1, :1])
        for vectors in (x.detach()[:, :, 0, 0], x.detach()[:1, :, 0, 0], x.detach().flatten(1)[:, :32].t()[:4, :4]):
            width = vectors.shape[1]
            torch.addmm(weight[:width], vectors, vectors.new_empty(width, width))
    assert comparing.seen["aten.native_group_norm.default"] == 2
    assert comparing.seen["aten.native_group_norm_backward.default"] == 6
    assert comparing.seen["aten.add.Tensor"] > 6 and comparing.seen["aten.mul.Tensor"] >= 10
    assert comparing.seen["aten.silu.default"] == comparing.seen["aten.silu_backward.grad_input"] == 3
    assert comparing.seen["aten.native_dropout.default"] == 4 and comparing.seen["aten.native_dropout_backward.default"]
    assert comparing.seen["aten.addmm.default"] == 3
    assert comparing.seen["aten.silu_backward.default"] >= 3
    assert comparing.seen["aten.bitwise_xor_.Tensor"] == comparing.seen["aten.bitwise_and_.Scalar"] == 1
    assert comparing.seen["aten.mul_.Tensor"] == 2
    assert comparing.seen["aten.bitwise_right_shift.Tensor_Scalar_out"] == 3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_simulation_is_the_same_without_them(precision, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = StepSettings(presets.get("digits"), 4, Sharding(stage=1, precision=precision), phased=True)
    simulate_distillation.cache_clear()
    short = simulate_distillation(settings)
    simulate_distillation.cache_clear()
    assert simulate_distillation(settings) == short  # with everything remembered
    monkeypatch.setattr(meta, "meta_outputs", lambda func, args, kwargs: func(*args, **kwargs))
    simulate_distillation.cache_clear()
    assert simulate_distillation(settings) == short


def test_what_changes_a_shape_is_called_each_time() -> None:
    words, wide = (torch.ones(size, dtype=torch.int64, device="meta") for size in (5, 9))
    for given in (words, wide, words, wide):
        place = words.new_empty(0)
        meta.meta_outputs(torch.ops.aten.bitwise_right_shift.Tensor_Scalar_out, (given, 3), {"out": place})
        assert place.shape == given.shape
    for _ in range(2):
        turned = torch.empty(2, 3, device="meta")
        meta.meta_outputs(torch.ops.aten.t_.default, (turned,), {})
        assert turned.shape == (3, 2)


def test_equal_numbers_of_other_types_are_others() -> None:
    words = torch.ones(3, dtype=torch.int64, device="meta")
    times = torch.ops.aten.mul.Tensor
    for _ in range(2):
        for number, dtype in ((2, torch.int64), (2.0, torch.float32), (2 + 0j, torch.complex64)):
            assert meta.meta_outputs(times, (words, number), {}).dtype == dtype


def test_a_view_stays_one() -> None:
    x = torch.empty(4, 6, device="meta")
    for view in (torch.ops.aten.t.default, torch.ops.aten.detach.default, torch.ops.aten.alias.default):
        for _ in range(2):
            seen = meta.meta_outputs(view, (x,), {})
            assert seen.untyped_storage()._cdata == x.untyped_storage()._cdata


def test_real_tensors_are_computed() -> None:
    x = torch.randn(2, 8, 3, 3)
    assert torch.equal(meta.meta_outputs(torch.ops.aten.add.Tensor, (x, x), {}), 2 * x)
