"""Frozen layers, and normalisation with SiLU, against PyTorch's operations: values, gradients, and what is kept."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import launch
import pytest
import torch
from kept import ARCHITECTURES, build, keeping, kept_bytes
from random_values import rand, randomise
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ipfm.kernels.group_norm_reference import group_norm_silu
from ipfm.models.blocks import QKVProjection, UNetBlock
from ipfm.models.frozen_ops import (
    doubled_conv2d,
    frozen_conv2d,
    frozen_conv_transpose2d,
    frozen_linear,
    mean_2x2,
    repeat_2x2,
)
from ipfm.models.initialisation import Init
from ipfm.models.layers import Conv2d, GroupNorm

pytestmark = pytest.mark.usefixtures("nothing_is_small")
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


@pytest.fixture
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The little tensors of these tests are treated as large ones are."""
    monkeypatch.setattr("ipfm.kernels.group_norm_reference.SMALL", 0)
    monkeypatch.setattr("ipfm.models.frozen_ops.SMALL", 0)


def assert_same(
    got: Callable[..., Tensor], expected: Callable[..., Tensor], x: Tensor, *, rounded: bool = False
) -> None:
    """Equal values, bit for bit or to rounding, and equal gradients with respect to x, to rounding."""
    mine, theirs = (x.detach().requires_grad_() for _ in range(2))
    a, b = got(mine), expected(theirs)
    assert a.dtype == b.dtype
    eps = torch.finfo(x.dtype).eps
    torch.testing.assert_close(a, b, rtol=4 * eps if rounded else 0, atol=4 * eps if rounded else 0)
    g = rand(*a.shape, seed=8).to(a.dtype)
    (da,), (db,) = torch.autograd.grad(a, mine, g), torch.autograd.grad(b, theirs, g)
    limit = 1e-12 if x.dtype == torch.float64 else 16 * torch.finfo(x.dtype).eps * float(db.abs().max())
    torch.testing.assert_close(da, db, rtol=0, atol=limit)


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "groups", "side"),
    [
        (3, 1, 1, 1, 6), (1, 1, 0, 1, 6), (3, 1, 2, 1, 5), (4, 2, 1, 4, 6), (4, 2, 1, 2, 7), (2, 2, 0, 4, 7),
        (3, 3, 1, 1, 7),
    ],
)  # fmt: skip
def test_convolutions(kernel, stride, padding, groups, side, memory_format, dtype):
    """float32 weights, cast to the activation's dtype; strides that leave rows out are among the cases."""
    x = rand(2, 4, side, side, seed=0).to(dtype, memory_format=memory_format)
    weight, bias = rand(8, 4 // groups, kernel, kernel, seed=1), rand(8, seed=2)
    up, up_bias = rand(4, 8 // groups, kernel, kernel, seed=3), rand(8, seed=4)
    if dtype != torch.float64:
        weight, bias, up, up_bias = weight.float(), bias.float(), up.float(), up_bias.float()
    how = {"stride": stride, "padding": padding, "groups": groups}
    for mine, plain, w, b in (
        (frozen_conv2d, F.conv2d, weight, bias),
        (frozen_conv_transpose2d, F.conv_transpose2d, up, up_bias),
    ):
        for given in (b, None):
            cast = None if given is None else given.to(dtype)
            expected = partial(plain, weight=w.to(dtype), bias=cast, **how)
            assert_same(partial(mine, weight=w, bias=given, **how), expected, x)
            run = partial(mine, x.detach().requires_grad_(), w, given, **how)
            assert kept_bytes(run, w) == 0


def test_linear_and_mean():
    x, weight, bias = rand(2, 5, 6, seed=0), rand(6, 4, seed=1), rand(4, seed=2)
    assert_same(
        partial(frozen_linear, weight=weight, bias=bias, arrange=torch.t),
        partial(F.linear, weight=weight.t(), bias=bias),
        x,
    )
    assert kept_bytes(lambda: frozen_linear(x.requires_grad_(), weight, arrange=torch.t), weight) == 0
    for sides in ((4, 6), (5, 4), (4, 7)):
        assert_same(mean_2x2, partial(F.avg_pool2d, kernel_size=2), rand(2, 3, *sides, seed=3), rounded=True)
    even = rand(2, 3, 4, 6, seed=3).requires_grad_()
    for function in (mean_2x2, repeat_2x2):
        assert kept_bytes(partial(function, even)) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS.keys())
def test_squares_of_pixels(memory_format, dtype):
    """Mean and repetition, and the gradients of both, are PyTorch's pooling and interpolation, whatever walks."""
    for sides in ((4, 6), (2, 2), (6, 10)):
        x = rand(2, 3, *sides, seed=3).to(dtype, memory_format=memory_format)
        assert_same(mean_2x2, partial(F.avg_pool2d, kernel_size=2), x, rounded=True)
        assert_same(repeat_2x2, partial(F.interpolate, scale_factor=2, mode="nearest"), x)
        for function in (mean_2x2, repeat_2x2):
            assert function(x).is_contiguous(memory_format=memory_format)


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_convolution_of_repeated_pixels(kernel, memory_format, dtype, no_worse):
    """That of the larger image, which is never made; trained and frozen; the gradients of weight and bias too."""
    x = rand(2, 4, 5, 3, seed=0).to(dtype, memory_format=memory_format)
    weight, bias = rand(6, 4, kernel, kernel, seed=1), rand(6, seed=2)

    def written_out(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        large = F.interpolate(x, scale_factor=2, mode="nearest")
        return F.conv2d(large, weight.to(x.dtype), bias.to(x.dtype), padding=kernel // 2)

    def run(function: Callable[..., Tensor], wanted: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = [tensor.detach().requires_grad_(i < wanted) for i, tensor in enumerate(tensors)]
        y = function(*given)
        return y.detach(), *torch.autograd.grad(y, given[:wanted], rand(*y.shape, seed=5).to(y.dtype))

    exact = run(written_out, 3, x.double(), weight, bias)
    for wanted in (1, 3):
        given = (x, weight.to(dtype), bias.to(dtype))
        mine, theirs = run(doubled_conv2d, wanted, *given), run(written_out, wanted, *given)
        assert [a.dtype for a in mine] == [dtype] * (1 + wanted)
        for a, b, truth in zip(mine, theirs, exact, strict=False):
            no_worse(a, b, truth)
    assert kept_bytes(partial(doubled_conv2d, x.detach().requires_grad_(), weight, bias), weight) == 0


def test_they_can_be_differentiated_twice():
    """Linear functions with constant weights: nothing is missing from the gradient of their gradients."""
    x, weight = rand(1, 2, 4, 4, seed=0).requires_grad_(), rand(2, 2, 3, 3, seed=1)
    for function in (
        partial(frozen_conv2d, weight=weight, stride=2, padding=1),
        partial(frozen_conv_transpose2d, weight=weight, stride=2, padding=1),
        partial(doubled_conv2d, weight=weight),
        mean_2x2,
        repeat_2x2,
        lambda x: frozen_linear(x, weight[:, 0].flatten(1).t()[:4], arrange=torch.t),
    ):
        assert torch.autograd.gradgradcheck(lambda x, f=function: f(x).square(), x)


def test_a_weight_may_leave_the_memory_between_the_passes():
    """What ZeRO 3 does: the parameter's data is put away after its use, and in another place at the next one."""
    x = rand(2, 4, 6, 6, seed=0).float().requires_grad_()
    layers = Conv2d(4, 6, 3, init=Init(bias=1.0)), Conv2d(4, 6, 3, up=True, init=Init(bias=1.0))
    for layer in (*layers, QKVProjection(4, num_heads=2, init=Init(bias=1.0))):
        layer.requires_grad_(False)

        def gradient(layer: nn.Module, kept: Tensor, *, put_away: bool) -> Tensor:
            y = layer(x)
            y = y if isinstance(y, Tensor) else torch.stack(y).square()
            if put_away:
                layer.weight.data = torch.empty(0)
                layer.weight.data = kept.clone()
            return torch.autograd.grad(y, x, torch.ones_like(y))[0]

        kept = layer.weight.detach().clone()
        assert torch.equal(gradient(layer, kept, put_away=False), gradient(layer, kept, put_away=True))


@pytest.mark.pairs
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)], ids=["box", "smooth"])
@pytest.mark.parametrize("direction", ["plain", "up", "down", "fused-up", "fused-down"])
@pytest.mark.parametrize("kernel", [0, 1, 3])
def test_frozen_convolution_layers(kernel, direction, taps, memory_format):
    """The gradient with respect to x is that of the same layer in training, and nothing of x is kept."""
    up, down = direction.endswith("up"), direction.endswith("down")
    conv = Conv2d(
        4,
        6 if kernel else 4,
        kernel,
        up=up,
        down=down,
        resample_filter=taps,
        fused_resample=direction.startswith("fused"),
        init=Init(bias=1.0),
    ).double()
    x = rand(2, 4, 6, 6, seed=0).contiguous(memory_format=memory_format)

    def gradient(frozen: bool) -> tuple[Tensor, Tensor, int]:
        conv.requires_grad_(not frozen)
        inside = x.detach().requires_grad_()
        with keeping(*conv.parameters()) as kept:
            y = conv(inside)
        sizes = [tensor.untyped_storage().nbytes() for tensor in kept]
        large = sum(size for size in sizes if size > 16 * 8)  # the resampling filter's
        y = y if y.requires_grad else y * inside
        return y.detach(), torch.autograd.grad(y, inside, rand(*y.shape, seed=5))[0], large

    (value, dx, large), (expected, dx_expected, trained) = gradient(True), gradient(False)
    assert torch.equal(value, expected)
    torch.testing.assert_close(dx, dx_expected, rtol=0, atol=1e-12)
    assert large == 0
    assert trained > 0 or kernel == 0


def test_what_is_trained_gets_its_gradient():
    """A bias alone, a weight alone: the layer is not frozen then."""
    for trained in ("weight", "bias"):
        conv, x = Conv2d(3, 4, 3).double(), rand(2, 3, 5, 5, seed=0).requires_grad_()
        conv.requires_grad_(False)
        getattr(conv, trained).requires_grad_(True)
        conv(x).square().sum().backward()
        expected = conv(x.detach()).square().sum()
        (direct,) = torch.autograd.grad(expected, getattr(conv, trained))
        assert torch.equal(getattr(conv, trained).grad, direct) and direct.abs().max() > 0
        assert x.grad is not None
    assert Conv2d(3, 4, 3).requires_grad_(False)(torch.ones(1, 3, 4, 4)).grad_fn is None


# -- normalisation and SiLU -------------------------------------------------------------------------------------------


def written_out(x, groups, weight, bias, *, scale, shift, eps) -> Tensor:
    y = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(y if scale is None else torch.addcmul(shift, y, scale + 1))


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("rows", [None, 1, 3], ids=["plain", "one-row", "adaptive"])
def test_norm_and_silu(rows, memory_format, dtype):
    x = rand(3, 8, 5, 4, seed=0).to(dtype, memory_format=memory_format)
    tensors = [x, rand(8, seed=1).to(dtype), rand(8, seed=2).to(dtype)]
    if rows:
        tensors += [rand(rows, 8, 1, 1, seed=seed).to(dtype) for seed in (3, 4)]

    def gradients(function: Callable[..., Tensor], wanted: int) -> tuple[Tensor, ...]:
        inputs = [tensor.detach().requires_grad_(i < wanted) for i, tensor in enumerate(tensors)]
        scale, shift = inputs[3:] or (None, None)
        y = function(*inputs[:1], 2, *inputs[1:3], scale=scale, shift=shift, eps=1e-3)
        return y, *torch.autograd.grad(y, inputs[:wanted], rand(*x.shape, seed=5).to(dtype))

    for wanted in (1, len(tensors)):  # frozen, trained
        for a, b in zip(gradients(group_norm_silu, wanted), gradients(written_out, wanted), strict=True):
            assert a.dtype == b.dtype
            limit = 0.0 if dtype == torch.bfloat16 else 16 * torch.finfo(dtype).eps * b.detach().abs().max().item()
            torch.testing.assert_close(a, b, rtol=0, atol=limit)
            assert a.abs().max() > 0


@pytest.mark.parametrize("trained", [False, True])
def test_norm_and_silu_keep_their_input_alone(trained):
    norm, x = GroupNorm(8).requires_grad_(trained), rand(3, 8, 16, 16, seed=0).float().requires_grad_()
    rows = rand(3, 16, seed=1).float()[:, :, None, None].requires_grad_(trained)
    scale, shift = rows.chunk(2, dim=1)
    own = (*norm.parameters(), rows)
    for run in (partial(norm, x, silu=True), partial(norm, x, silu=True, scale=scale, shift=shift)):
        assert kept_bytes(run, *own) == x.nbytes + 2 * 4 * 3 * norm.num_groups
    assert kept_bytes(lambda: F.silu(norm(x)), *own) > 2 * x.nbytes
    # Whoever needs no gradient keeps nothing.
    with torch.no_grad():
        assert kept_bytes(partial(norm, x, silu=True), *own) == 0
    assert norm.requires_grad_(False)(x.detach(), silu=True).grad_fn is None


def test_small_tensors_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be kept, and the frozen ones too, unless a weight is cast or gathered: that is kept nowhere."""
    monkeypatch.setattr("ipfm.kernels.group_norm_reference.SMALL", 3 * 8 * 16 * 16)
    monkeypatch.setattr("ipfm.models.frozen_ops.SMALL", 3 * 8 * 16 * 16)
    norm, conv = GroupNorm(8).requires_grad_(False), Conv2d(8, 8, 3).requires_grad_(False)
    small, large = (rand(n, 8, 16, 16, seed=0).float().requires_grad_() for n in (3, 4))
    statistics = 2 * 4 * norm.num_groups
    assert kept_bytes(partial(norm, small, silu=True), *norm.parameters()) == 2 * small.nbytes + 3 * statistics
    assert kept_bytes(partial(norm, large, silu=True), *norm.parameters()) == large.nbytes + 4 * statistics
    with torch.device("meta"):
        empty = torch.empty_like(small, device="meta").requires_grad_()
        there = GroupNorm(8).requires_grad_(False)
    assert kept_bytes(partial(there, empty, silu=True), *there.parameters()) == 2 * small.nbytes + 3 * statistics
    assert kept_bytes(partial(conv, small), *conv.parameters()) == small.nbytes
    assert kept_bytes(partial(conv, large), *conv.parameters()) == 0
    assert kept_bytes(partial(conv, small.bfloat16()), *conv.parameters()) == 0
    conv.weight.ds_id = 0
    assert kept_bytes(partial(conv, small), *conv.parameters()) == 0


def test_norm_and_silu_have_no_second_derivative():
    norm, x = GroupNorm(4), rand(1, 4, 3, 3, seed=0).float().requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(norm(x, silu=True).sum(), x, create_graph=True)


def test_scale_and_shift_go_together():
    norm, x, row = GroupNorm(4), torch.ones(1, 4, 2, 2), torch.ones(1, 4, 1, 1)
    with pytest.raises(ValueError, match="got scale alone"):
        norm(x, silu=True, scale=row)
    with pytest.raises(ValueError, match="got shift alone"):
        norm(x, silu=True, shift=row)
    with pytest.raises(ValueError, match="got silu=False"):
        norm(x, scale=row, shift=row)


# -- whole networks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("changes", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_frozen_networks(changes, memory_format):
    net, sigma = build(**changes).eval().double().to(memory_format=memory_format), torch.tensor([0.3, 4.0])
    labels = (torch.eye(3)[:2], torch.ones(2, 4))

    def gradient(frozen: bool) -> tuple[Tensor, Tensor, int]:
        net.requires_grad_(not frozen)
        x = rand(2, 2, 8, 8, seed=1).contiguous(memory_format=memory_format).requires_grad_()
        with keeping(*net.parameters(), *net.buffers()) as kept:
            y = net(x, sigma, *labels)
        size = sum(tensor.untyped_storage().nbytes() for tensor in kept)
        return y.detach(), torch.autograd.grad(y, x, rand(*y.shape, seed=2))[0], size

    (value, dx, frozen), (expected, dx_expected, trained) = gradient(True), gradient(False)
    assert torch.equal(value, expected)
    torch.testing.assert_close(dx, dx_expected, rtol=0, atol=1e-12 * float(dx_expected.abs().max()))
    assert frozen < 0.6 * trained


@pytest.mark.parametrize("changes", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_a_frozen_network_keeps_activations_alone(changes):
    """bfloat16 over float32 weights: no cast of a weight is kept, so that twice the images need twice the bytes."""
    with torch.device("meta"):
        net = build(**changes).eval().requires_grad_(False)
    net.compute_dtype = torch.bfloat16

    def size(batch: int) -> int:
        x = torch.empty(batch, 2, 8, 8, device="meta").requires_grad_()
        return kept_bytes(lambda: net(x, torch.ones(batch, device="meta")), *net.parameters(), *net.buffers())

    first, second = size(4) - size(2), size(8) - size(4)
    assert second == 2 * first > 0
    weights = sum(p.numel() for p in net.parameters())
    # What does not grow with the batch: casts of the norms' vectors and of the resampling filters.
    assert size(2) - first < 2 * 2 * sum(p.numel() for p in net.parameters() if p.ndim == 1) + 4096 < weights


def test_a_compiled_block():
    """Compilation may cut the graph where it likes; without a C++ compiler only its tracing can be tested."""
    torch.manual_seed(0)
    for options in ({"adaptive_scale": True}, {"adaptive_scale": False, "resample_filter": (1, 3, 3, 1)}):
        block = UNetBlock(8, 8, 6, down=True, attention=True, num_heads=2, **options).requires_grad_(False)
        randomise(block)
        emb, compiled = torch.randn(2, 6), torch.compile(block, backend="aot_eager")
        results = []
        for run in (block, compiled):
            x = rand(2, 8, 4, 4, seed=1).float().requires_grad_()
            y = run(x, emb)
            results.append((y.detach(), *torch.autograd.grad(y.square().sum(), x)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_sharded_weights_leave_the_memory(tmp_path: Path):
    """ZeRO 3 on two processes: the gradient of the whole network, and no gathered weight is kept for it."""
    launch.run_workers("frozen_shards.py", 2, {"out": str(tmp_path)})
    gradients = load_file(tmp_path / "gradients.safetensors")
    facts = json.loads((tmp_path / "facts.json").read_text())
    for name, limit in (("fp32", 1e-6), ("bf16", 2e-2)):
        truth = gradients["whole-fp32"]
        for where in ("whole", "sharded"):
            plain, again = gradients[f"{where}-{name}"], gradients[f"{where}-{name}-checkpointed"]
            assert torch.equal(plain, again)
            assert (plain - truth).norm() < limit * truth.norm()
        for case in (name, f"{name}-checkpointed"):
            assert facts[f"sharded-{case}"]["present"] == 0
            # A little for DeepSpeed's own books.
            assert facts[f"sharded-{case}"]["kept"] <= facts[f"whole-{case}"]["kept"] + facts["weights"] // 50
    for case in ("", "-checkpointed"):
        # Casts of gathered weights would come on top of the activations, which are half as large.
        narrow, wide = (facts[f"sharded-{name}{case}"]["kept"] for name in ("bf16", "fp32"))
        assert narrow < 0.6 * wide < 0.4 * facts["weights"]
