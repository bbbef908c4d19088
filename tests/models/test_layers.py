"""Convolution with resampling, normalisation, embeddings and initialisation, each against a plain formulation."""

import math

import pytest
import torch
from torch import Tensor

from ipfm.models.embeddings import FourierEmbedding, PositionalEmbedding
from ipfm.models.initialisation import Init
from ipfm.models.layers import Conv2d, GroupNorm, Linear, group_count


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def padded(x: Tensor, by: int) -> Tensor:
    out = x.new_zeros(*x.shape[:2], x.shape[2] + 2 * by, x.shape[3] + 2 * by)
    out[:, :, by : by + x.shape[2], by : by + x.shape[3]] = x
    return out


def naive_conv(x: Tensor, weight: Tensor, padding: int) -> Tensor:
    x, k = padded(x, padding), weight.shape[-1]
    rows, columns = x.shape[2] - k + 1, x.shape[3] - k + 1
    out = x.new_zeros(x.shape[0], weight.shape[0], rows, columns)
    for a in range(k):
        for b in range(k):
            out += torch.einsum("nchw,oc->nohw", x[:, :, a : a + rows, b : b + columns], weight[:, :, a, b])
    return out


def naive_down(x: Tensor, taps: list[float], padding: int) -> Tensor:
    """out[i, j] = Σ f[a]·f[b]·x[2i + a, 2j + b] / (Σf)²."""
    x, total = padded(x, padding), sum(taps) ** 2
    side = (x.shape[2] - len(taps)) // 2 + 1
    out = x.new_zeros(*x.shape[:2], side, side)
    for i in range(side):
        for j in range(side):
            for a, fa in enumerate(taps):
                for b, fb in enumerate(taps):
                    out[:, :, i, j] += fa * fb / total * x[:, :, 2 * i + a, 2 * j + b]
    return out


def naive_up(x: Tensor, taps: list[float], padding: int) -> Tensor:
    """Each pixel spreads 4·f[a]·f[b]/(Σf)² of itself to [2i + a, 2j + b]; then `padding` is cut from every side."""
    total, side = sum(taps) ** 2, 2 * (x.shape[2] - 1) + len(taps)
    out = x.new_zeros(*x.shape[:2], side, side)
    for i in range(x.shape[2]):
        for j in range(x.shape[3]):
            for a, fa in enumerate(taps):
                for b, fb in enumerate(taps):
                    out[:, :, 2 * i + a, 2 * j + b] += 4 * fa * fb / total * x[:, :, i, j]
    return out[:, :, padding : side - padding, padding : side - padding]


TAPS = {"box": [1, 1], "smooth": [1, 3, 3, 1], "lopsided": [1, 2], "long": [1, 2, 4, 5, 3, 1]}


@pytest.mark.pairs
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("taps", TAPS.values(), ids=TAPS.keys())
@pytest.mark.parametrize("kernel", [0, 1, 3])
@pytest.mark.parametrize("direction", ["up", "down", "fused-up", "fused-down"])
def test_resampling_convolution(direction, kernel, taps, memory_format):
    cin, cout = 3, 3 if kernel == 0 else 5
    up, down, fused = direction.endswith("up"), direction.endswith("down"), direction.startswith("fused")
    conv = Conv2d(
        cin, cout, kernel, up=up, down=down, resample_filter=taps, fused_resample=fused, init=Init(bias=1.0)
    ).double()
    x = rand(2, cin, 6, 6)
    w_pad, f_pad = kernel // 2, (len(taps) - 1) // 2
    if kernel == 0:
        expected = naive_up(x, taps, f_pad) if up else naive_down(x, taps, f_pad)
    else:
        weight, bias = conv.weight.detach(), conv.bias.detach()[None, :, None, None]
        if fused and up:
            expected = naive_conv(naive_up(x, taps, max(f_pad - w_pad, 0)), weight, max(w_pad - f_pad, 0))
        elif fused:
            expected = naive_down(naive_conv(x, weight, w_pad + f_pad), taps, 0)
        else:
            expected = naive_conv(naive_up(x, taps, f_pad) if up else naive_down(x, taps, f_pad), weight, w_pad)
        expected = expected + bias
    with torch.no_grad():
        got = conv(x.to(memory_format=memory_format))
    # The filter is a float32 tensor, also in checkpoints: taps that are not exact there err by its rounding.
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6 if taps in (TAPS["lopsided"],) else 1e-12)


@pytest.mark.parametrize("kernel", [1, 3])
def test_plain_convolution(kernel):
    conv = Conv2d(4, 6, kernel, init=Init(bias=1.0)).double()
    x = rand(2, 4, 5, 5)
    expected = naive_conv(x, conv.weight.detach(), kernel // 2) + conv.bias.detach()[None, :, None, None]
    torch.testing.assert_close(conv(x).detach(), expected, rtol=0, atol=1e-13)
    assert list(conv.state_dict()) == ["weight", "bias"]
    assert list(Conv2d(4, 6, kernel, bias=False).state_dict()) == ["weight"]


def test_resample_filter_buffer():
    conv = Conv2d(2, 2, 3, down=True, resample_filter=[1, 3, 3, 1])
    assert list(conv.state_dict()) == ["weight", "bias", "resample_filter"]
    f = torch.tensor([1.0, 3.0, 3.0, 1.0])
    assert torch.equal(conv.resample_filter, torch.outer(f, f)[None, None] / 64)
    pure = Conv2d(2, 2, 0, up=True)
    assert list(pure.state_dict()) == ["resample_filter"]
    assert torch.equal(pure.resample_filter, torch.full((1, 1, 2, 2), 0.25))


def test_another_filter_in_a_state_dict_is_refused():
    conv = Conv2d(2, 2, 0, down=True)
    state = {"resample_filter": torch.tensor([[[[0.5, 0.0], [0.5, 0.0]]]])}
    with pytest.raises(RuntimeError, match="not the one of the taps"):
        conv.load_state_dict(state)
    conv.load_state_dict({"resample_filter": torch.full((1, 1, 2, 2), 0.25)})


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"up": True, "down": True}, "either up or down"),
        ({"down": True, "resample_filter": [1, 2, 1]}, "even number of taps"),
        ({"down": True, "resample_filter": []}, "even number of taps"),
        ({"up": True, "resample_filter": [1, -1]}, "sum that is not zero"),
    ],
)
def test_impossible_convolutions(keywords, message):
    with pytest.raises(ValueError, match=message):
        Conv2d(3, 3, 3, **keywords)
    with pytest.raises(ValueError, match="kernel 0 keeps the channel count"):
        Conv2d(3, 4, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_parameters_follow_the_activation(dtype):
    """float32 masters, activations of another dtype: the result has the activation's, the gradients the masters'."""
    layers = [Linear(8, 8), Conv2d(8, 8, 3, down=True), GroupNorm(8)]
    inputs = [torch.ones(2, 8), torch.ones(2, 8, 4, 4), torch.randn(2, 8, 4, 4)]
    for layer, x in zip(layers, inputs, strict=True):
        y = layer(x.to(dtype))
        assert y.dtype == dtype
        y.float().sum().backward()
        assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in layer.parameters())


@pytest.mark.parametrize(("channels", "groups"), [(4, 1), (7, 1), (8, 2), (12, 3), (64, 16), (128, 32), (160, 32)])
def test_group_norm(channels, groups):
    norm = GroupNorm(channels, eps=1e-3).double()
    assert norm.num_groups == groups
    with torch.no_grad():
        norm.weight.copy_(rand(channels, seed=1))
        norm.bias.copy_(rand(channels, seed=2))
    x = 3 * rand(2, channels, 3, 5) + 7
    parts = x.reshape(2, groups, -1)
    mean = parts.mean(2, keepdim=True)
    variance = (parts - mean).square().mean(2, keepdim=True)
    expected = ((parts - mean) / (variance + 1e-3).sqrt()).reshape(x.shape)
    expected = expected * norm.weight.detach()[:, None, None] + norm.bias.detach()[:, None, None]
    torch.testing.assert_close(norm(x).detach(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("channels", [1, 3, 9, 144])
def test_group_norm_refuses_widths_it_cannot_divide(channels):
    with pytest.raises(ValueError, match=f"cannot divide {channels} channels"):
        group_count(channels)


def test_positional_embedding():
    t = torch.tensor([0.0, -1.3, 0.7], dtype=torch.float64)
    for endpoint, last in ((True, 3), (False, 4)):
        phase = t[:, None] * torch.tensor([1e4 ** (-i / last) for i in range(4)], dtype=torch.float64)
        got = PositionalEmbedding(8, endpoint=endpoint)(t)
        torch.testing.assert_close(got, torch.cat([phase.cos(), phase.sin()], 1), rtol=0, atol=1e-12)
    assert not PositionalEmbedding(8).state_dict()
    with pytest.raises(ValueError, match="even number of channels, at least 4, got 2"):
        PositionalEmbedding(2, endpoint=True)
    with pytest.raises(ValueError, match="even number of channels"):
        FourierEmbedding(7)


def test_fourier_embedding():
    torch.manual_seed(0)
    embedding = FourierEmbedding(4096)
    # 6 standard deviations of the variance of 2048 normals: a false alarm of 2e-9.
    assert embedding.freqs.square().mean().item() == pytest.approx(16**2, rel=6 * math.sqrt(2 / 2048))
    t = torch.tensor([0.3, -1.1])
    w = (2 * math.pi * embedding.freqs.double()).float()
    phase = t[:, None] * w
    torch.testing.assert_close(embedding(t), torch.cat([phase.cos(), phase.sin()], 1), rtol=0, atol=1e-4)
    assert not list(embedding.parameters())


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
def test_fourier_frequencies_survive_casts(cast):
    holder = torch.nn.Sequential(FourierEmbedding(64), torch.nn.Linear(4, 4))
    before, t = holder[0].freqs.clone(), torch.tensor([0.7])
    expected = holder[0](t)
    holder.to(cast)
    assert holder[1].weight.dtype == cast
    assert holder[0].freqs.dtype == torch.float32 and torch.equal(holder[0].freqs, before)
    assert torch.equal(holder[0](t), expected)
    assert holder[0](t.to(cast)).dtype == cast
    holder.to("meta")
    assert holder[0].freqs.device.type == "meta"


@pytest.mark.parametrize(
    ("mode", "variance", "bounded"),
    [
        ("xavier_uniform", 2 / (300 + 200), True),
        ("xavier_normal", 2 / (300 + 200), False),
        ("kaiming_uniform", 1 / 300, True),
        ("kaiming_normal", 1 / 300, False),
    ],
)
def test_initialisation_modes(mode, variance, bounded):
    torch.manual_seed(0)
    weight = Linear(300, 200, init=Init(mode)).weight
    # 6 standard deviations, of the variance that of a normal, which is the wider one: a false alarm of 2e-9 each.
    assert weight.mean().item() == pytest.approx(0, abs=6 * math.sqrt(variance / weight.numel()))
    assert weight.square().mean().item() == pytest.approx(variance, rel=6 * math.sqrt(2 / weight.numel()))
    # A uniform draw ends at √3 standard deviations; of 60 000 normal ones some go beyond 3.5 but for 1e-12.
    reach = weight.abs().max().item() / math.sqrt(variance)
    assert math.sqrt(3) * 0.99 < reach <= math.sqrt(3) + 1e-4 if bounded else reach > 3.5


def test_initialisation_of_convolutions_and_biases():
    torch.manual_seed(0)
    conv = Conv2d(40, 60, 3, init=Init("xavier_uniform", weight=0.5, bias=2.0))
    bound = math.sqrt(6 / (9 * 40 + 9 * 60))
    assert 0.99 * 0.5 * bound < conv.weight.abs().max().item() <= 0.5 * bound
    # 60 draws all stay below 3/4 of their bound with a probability of 3e-8.
    assert 0.75 * 2 * bound < conv.bias.abs().max().item() <= 2 * bound
    assert not Conv2d(4, 4, 3).bias.any() and not Linear(4, 4).bias.any()
    linear = Linear(50, 20_000, init=Init("kaiming_normal", bias=1.0))
    assert linear.bias.square().mean().item() == pytest.approx(1 / 50, rel=6 * math.sqrt(2 / 20_000))
    with pytest.raises(ValueError, match="'lecun' is unknown"):
        Linear(4, 4, init=Init("lecun"))
