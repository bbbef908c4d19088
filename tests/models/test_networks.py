"""SongUNet and EDMPrecond as a caller meets them: shapes, dtypes, labels, modes, memory formats."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from random_values import randomise
from torch import Tensor

from ipfm.models import EDMPrecond, NetworkConfig

SMALL = NetworkConfig(
    img_resolution=8,
    img_channels=2,
    label_dim=3,
    augment_dim=4,
    model_channels=8,
    channel_mult=(1, 2),
    num_blocks=1,
    attn_resolutions=(4,),
    dropout=0.0,
)
NCSN = {"embedding_type": "fourier", "encoder_type": "residual", "resample_filter": (1, 3, 3, 1)}


def build(**changes) -> EDMPrecond:
    """A small network with random values everywhere."""
    net = EDMPrecond(replace(SMALL, **changes))
    randomise(net)
    return net.eval()


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 2, 8, 8, generator=torch.Generator().manual_seed(1))


SIGMA = torch.tensor([0.1, 1.0, 7.0])
LABELS = torch.eye(3)


@torch.no_grad()
def test_preconditioning():
    """D = c_skip·x + c_out·F with table 1 of Karras et al. (2022), in an independent spelling."""
    net, x = build(sigma_data=0.7).double(), images().double()
    s = SIGMA.double()[:, None, None, None]
    total = s**2 + 0.7**2
    raw = net.model(x / total.sqrt(), 0.25 * SIGMA.double().log(), LABELS.double())
    expected = x * 0.7**2 / total + s * 0.7 / total.sqrt() * raw
    torch.testing.assert_close(net(x, SIGMA.double(), LABELS), expected, rtol=0, atol=1e-12)
    assert net.round_sigma(0.3) == 0.3 and net.round_sigma(SIGMA) is SIGMA


@torch.no_grad()
def test_dtypes_of_the_result():
    net = build()
    for x in (images(), images().double(), images().bfloat16()):
        for compute in (None, torch.bfloat16, torch.float64):
            net.compute_dtype = compute
            assert net(x, SIGMA.to(x.dtype)).dtype == torch.float32
    net.compute_dtype = None
    net.double()
    for x in (images(), images().double()):
        assert net(x, SIGMA).dtype == torch.float64


@pytest.mark.parametrize(("dtype", "least", "most"), [(torch.bfloat16, 1e-4, 2e-2), (torch.float16, 1e-5, 2e-3)])
@pytest.mark.parametrize("backend", ["sdpa", "math"])
@pytest.mark.parametrize("changes", [{}, NCSN], ids=["ddpmpp", "ncsnpp"])
@torch.no_grad()
def test_half_precision_compute_is_close_to_float32(changes, backend, dtype, least, most):
    net, seen = build(**changes), {}
    net.model.map_noise.register_forward_hook(lambda _, __, out: seen.update(noise=out.dtype))
    net.model.map_layer1.register_forward_hook(lambda _, __, out: seen.update(mapping=out.dtype))
    net.model.enc["8x8_conv"].register_forward_hook(lambda _, __, out: seen.update(path=out.dtype))
    exact = net(images(), SIGMA, LABELS)
    assert seen == {"noise": torch.float32, "mapping": torch.float32, "path": torch.float32}
    net.compute_dtype = dtype
    net.attention_backend = backend
    got = net(images(), SIGMA, LABELS)
    assert seen == {"noise": torch.float32, "mapping": torch.float32, "path": dtype}
    assert got.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in net.parameters())
    error = (got - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert least < error < most
    net.compute_dtype, net.attention_backend = None, "auto"
    assert torch.equal(net(images(), SIGMA, LABELS), exact)


def test_half_precision_gradients_belong_to_the_float32_masters():
    net, grads = build(), []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        net.compute_dtype = dtype
        loss = net(images(), SIGMA, LABELS, torch.ones(3, 4)).square().sum()
        grads.append(torch.autograd.grad(loss, list(net.parameters())))
    exact, *halves = grads
    size = sum(g.square().sum() for g in exact).sqrt()
    for half, most in zip(halves, (5e-2, 5e-3), strict=True):
        assert all(g.dtype == torch.float32 for g in half)
        error = sum((a - b).square().sum() for a, b in zip(half, exact, strict=True)).sqrt()
        assert most / 1000 < error / size < most


@torch.no_grad()
def test_low_precision_weights_keep_the_noise_embedding():
    """bfloat16 parameters: the frequencies stay float32 and the mapping network computes in float32."""
    net = build(**NCSN)
    freqs, exact = net.model.map_noise.freqs.clone(), net(images(), SIGMA, LABELS)
    net.to(torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in net.parameters())
    assert torch.equal(net.model.map_noise.freqs, freqs) and net.model.map_noise.freqs.dtype == torch.float32
    got = net(images(), SIGMA, LABELS)
    assert got.dtype == torch.float32
    assert (got - exact).square().mean().sqrt() < 2e-2 * exact.square().mean().sqrt()


def test_compute_dtype_is_checked():
    net = EDMPrecond(SMALL)
    with pytest.raises(ValueError, match=r"compute_dtype must be None, torch.float16, .* got torch.int8"):
        net.compute_dtype = torch.int8
    with pytest.raises(ValueError, match="got 'bf16'"):
        net.compute_dtype = "bf16"


@torch.no_grad()
def test_use_fp16_changes_nothing_on_a_cpu():
    assert torch.equal(build(use_fp16=True)(images(), SIGMA), build()(images(), SIGMA))


@pytest.mark.gpu
@torch.no_grad()
def test_use_fp16_on_cuda():
    net, seen = build(use_fp16=True).cuda(), []
    net.model.enc["8x8_conv"].register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    got = net(images().cuda(), SIGMA.cuda(), LABELS.cuda())
    assert seen == [torch.float16] and got.dtype == torch.float32
    torch.testing.assert_close(got.cpu(), build()(images(), SIGMA, LABELS), rtol=0, atol=3e-2)


@pytest.mark.parametrize("changes", [{}, NCSN, {"encoder_type": "skip", "decoder_type": "skip"}])
def test_channels_last_equals_contiguous(changes):
    net = build(**changes).double()
    x = images().double()

    def run(net: EDMPrecond, x: Tensor) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        y = net(x, SIGMA, LABELS)
        return y, *torch.autograd.grad(y.square().sum(), [x, *net.parameters()], allow_unused=True)

    plain = run(net, x)
    last = run(copy.deepcopy(net).to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last))
    assert last[0].is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(plain, last, strict=True):
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
        assert (a is None) == (b is None)


@torch.no_grad()
def test_sigma_and_label_shapes():
    net, x = build(), images()
    sigmas = (2.0, torch.tensor(2.0), torch.tensor([2.0]), torch.full((3,), 2.0))
    alike = [net(x, sigma, LABELS[:1]) for sigma in sigmas]
    for other in alike[1:]:
        torch.testing.assert_close(alike[0], other, rtol=0, atol=1e-6)
    torch.testing.assert_close(net(x, SIGMA), net(x, SIGMA, torch.zeros(3, 3)), rtol=0, atol=1e-6)
    assert (net(x, SIGMA) - net(x, SIGMA, LABELS)).abs().max() > 0.01
    nothing = net(x, SIGMA, LABELS, torch.zeros(3, 4))
    torch.testing.assert_close(net(x, SIGMA, LABELS), nothing, rtol=0, atol=1e-6)
    assert (net(x, SIGMA, LABELS, torch.ones(3, 4)) - nothing).abs().max() > 0.01
    # Each sample for itself: labels and noise levels are not mixed up over the batch.
    for i in range(3):
        one = net(x[i : i + 1], SIGMA[i], LABELS[i : i + 1])
        torch.testing.assert_close(one[0], net(x, SIGMA, LABELS)[i], rtol=0, atol=1e-5)


@torch.no_grad()
def test_labels_enter_scaled_by_the_root_of_their_width():
    net = build().double()
    seen: list[Tensor] = []
    net.model.map_label.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    net(images(), SIGMA, LABELS)
    torch.testing.assert_close(seen[0], LABELS.double() * math.sqrt(3), rtol=0, atol=1e-15)


@torch.no_grad()
def test_unconditional_network_ignores_labels():
    net = build(label_dim=0, augment_dim=0)
    assert net.model.map_label is None and net.model.map_augment is None
    assert torch.equal(net(images(), SIGMA), net(images(), SIGMA, LABELS, torch.ones(3, 9)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 1, 8, 8), SIGMA), r"x must have shape \(B, 2, 8, 8\), got \(3, 1, 8, 8\)"),
        ((torch.zeros(3, 2, 8, 4), SIGMA), r"got \(3, 2, 8, 4\)"),
        ((torch.zeros(2, 8, 8), SIGMA), r"got \(2, 8, 8\)"),
        ((images(), torch.ones(2)), r"sigma must have one element or 3, one an image, in any shape, got \(2,\)"),
        ((images(), torch.ones(3, 2, 8, 8)), r"got \(3, 2, 8, 8\)"),
        ((images(), torch.ones(0)), r"got \(0,\)"),
        ((images()[:1], torch.ones(0)), r"got \(0,\)"),
        ((images(), 0.0), "sigma must be above 0, got 0.0"),
        ((images(), -1), "sigma must be above 0, got -1"),
        ((images(), [1.0, 2.0, 3.0]), "sigma must be a number or a tensor, got list"),
        ((images(), None), "sigma must be a number or a tensor, got NoneType"),
        ((images(), SIGMA, torch.zeros(3, 4)), r"class_labels must have shape \(3, 3\), got \(3, 4\)"),
        ((images(), SIGMA, torch.zeros(2, 3)), r"got \(2, 3\)"),
        ((images(), SIGMA, torch.zeros(4)), r"got \(4,\)"),
        ((images(), SIGMA, torch.tensor(1.0)), r"got \(\)"),
        ((images(), SIGMA, torch.tensor([0, 2, 1])), r"got \(3,\); numbers of classes become rows by one_hot"),
        ((images(), SIGMA, torch.tensor([0, 2])), r"got \(2,\); numbers of classes become rows by one_hot"),
        ((images(), SIGMA, None, torch.zeros(3, 9)), r"augment_labels must have shape \(3, 4\), got \(3, 9\)"),
    ],
)
def test_wrong_inputs_are_one_clear_line(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        EDMPrecond(SMALL)(*arguments)
    assert "\n" not in str(caught.value)


def test_ways_to_construct():
    net = EDMPrecond(img_resolution=8, img_channels=1, model_channels=8, channel_mult=[1, 1], num_blocks=1, D=64)
    assert net.config == NetworkConfig(
        img_resolution=8, img_channels=1, model_channels=8, channel_mult=(1, 1), num_blocks=1, D=64.0
    )
    assert (net.D, net.sigma_min, net.sigma_max, net.sigma_data) == (64, 0, math.inf, 0.5)
    assert (net.img_channels, net.img_resolution, net.label_dim) == (1, 8, 0)
    with pytest.raises(ValueError, match=r"got both \(keywords dropout\)"):
        EDMPrecond(SMALL, dropout=0.1)
    with pytest.raises(ValueError, match="got dict"):
        EDMPrecond({"img_resolution": 8})


def test_dropout_and_label_dropout_act_only_in_training():
    for changes in ({"dropout": 0.3}, {"label_dropout": 0.5}):
        net, labels = build(**changes), LABELS.repeat(8, 1)
        x, sigma = images(24), torch.ones(24)
        torch.manual_seed(0)
        assert torch.equal(net(x, sigma, labels), net(x, sigma, labels))
        net.train()
        assert not torch.equal(net(x, sigma, labels), net(x, sigma, labels))


@torch.no_grad()
def test_label_dropout_drops_whole_rows():
    torch.manual_seed(0)
    net = build(label_dropout=0.25).train()
    seen: list[Tensor] = []
    net.model.map_label.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    labels = torch.ones(400, 3)
    net.model(torch.zeros(400, 2, 8, 8), torch.zeros(1), labels)
    rows = seen[0] / math.sqrt(3)
    assert torch.equal(rows.amin(1), rows.amax(1))
    torch.testing.assert_close(rows, rows.round())
    # 6 standard deviations of 400 draws: a false alarm of 2e-9.
    assert abs((rows[:, 0] == 0).float().mean() - 0.25) < 6 * math.sqrt(0.25 * 0.75 / 400)
