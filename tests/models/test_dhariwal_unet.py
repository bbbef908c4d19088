"""DhariwalUNet against the network written out from its description in float64, and as a caller meets it."""

import copy
import math

import naive_unet
import pytest
import torch
from random_values import rand, randomise, value_and_gradient
from torch import Tensor

from ipfm.models import DhariwalUNet, EDMPrecond, NetworkConfig

SHAPE = {"img_resolution": 8, "in_channels": 2, "out_channels": 3, "label_dim": 5, "augment_dim": 4}
WIDE = {"model_channels": 64, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,)}
NARROW = {**WIDE, "model_channels": 16}


def build(**changes) -> DhariwalUNet:
    net = DhariwalUNet(**{**SHAPE, **NARROW, **changes}).double().eval()
    randomise(net)
    return net


@pytest.mark.parametrize("labels", [0, 1, 2], ids=["unlabelled", "class", "class+augment"])
@pytest.mark.parametrize(
    ("changes", "heads"),
    [
        (WIDE, [2, 2, 2, 2]),
        ({**WIDE, "model_channels": 128, "channel_mult": (1,), "attn_resolutions": (8,)}, [2, 2, 2, 2]),
        ({**WIDE, "channel_mult": (2, 1, 1), "attn_resolutions": (8, 2)}, [2, 1, 1, 1, 1, 2, 2]),
        (NARROW, []),
        ({**NARROW, "channel_mult_emb": 2, "num_blocks": 2, "channel_mult": (1, 3, 2)}, []),
        ({**NARROW, "num_blocks": 0, "channel_mult": (1, 3, 2)}, []),
        ({**WIDE, "num_blocks": 0, "channel_mult": (2, 1), "attn_resolutions": (8,)}, [2, 2]),
    ],
    ids=["two-heads", "one-level", "three-levels", "narrow", "two-blocks", "no-blocks", "no-blocks-heads"],
)
def test_against_the_description(changes, heads, labels):
    net, x = build(**changes), rand(2, 2, 8, 8, seed=1)
    assert [block.num_heads for block in net.blocks if block.num_heads] == heads
    given = [rand(2, seed=2), rand(2, 5, seed=3), rand(2, 4, seed=4)][: labels + 1]
    state = net.state_dict()
    got = value_and_gradient(net, x, *given)
    expected = value_and_gradient(lambda *inputs: naive_unet.dhariwal_unet(state, *inputs), x, *given)
    assert got[0].shape == (2, 3, 8, 8) and got[0].std() > 0.1
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_order_of_the_layers():
    names = list(dict.fromkeys(name.split(".")[0] for name in build().state_dict()))
    assert names == ["map_augment", "map_layer0", "map_layer1", "map_label", "enc", "dec", "out_norm", "out_conv"]
    net = build(label_dim=0, augment_dim=0)
    assert net.map_label is None and net.map_augment is None
    entries = ["8x8_conv", "8x8_block0", "4x4_down", "4x4_block0"]
    assert list(net.enc) == entries
    entries = ["4x4_in0", "4x4_in1", "4x4_block0", "4x4_block1", "8x8_up", "8x8_block0", "8x8_block1"]
    assert list(net.dec) == entries
    assert list(net.dec["8x8_up"].skip.state_dict()) == ["resample_filter"]


@torch.no_grad()
def test_labels():
    """A class label selects a column of map_label as it is; zeros and None are the same, as nothing has a bias."""
    net, x, t = build(), rand(2, 2, 8, 8, seed=1), rand(2, seed=2)
    seen: list[Tensor] = []
    net.map_label.register_forward_hook(lambda _, __, out: seen.append(out))
    net(x, t, torch.eye(5, dtype=torch.float64)[3:])
    torch.testing.assert_close(seen[0], net.map_label.weight.T[3:], rtol=0, atol=0)
    nothing = net(x, t)
    torch.testing.assert_close(net(x, t, torch.zeros(1, 5).double(), torch.zeros(2, 4).double()), nothing)
    assert (net(x, t, torch.eye(5).double()[:2]) - nothing).abs().max() > 0.01
    assert (net(x, t, None, torch.ones(2, 4).double()) - nothing).abs().max() > 0.01


@torch.no_grad()
def test_label_dropout_drops_whole_rows_in_training():
    torch.manual_seed(0)
    net = build(label_dropout=0.25)
    seen: list[Tensor] = []
    net.map_label.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x, t, labels = torch.zeros(400, 2, 8, 8), torch.zeros(1), torch.ones(400, 5)
    net.float()(x, t, labels)
    assert torch.equal(seen[0], labels)
    net.train()(x, t, labels)
    assert torch.equal(seen[1].amin(1), seen[1].amax(1)) and set(seen[1].unique().tolist()) == {0.0, 1.0}
    # 6 standard deviations of 400 draws: a false alarm of 2e-9.
    assert abs((seen[1][:, 0] == 0).float().mean() - 0.25) < 6 * math.sqrt(0.25 * 0.75 / 400)


@pytest.mark.parametrize("changes", [WIDE, NARROW], ids=["wide", "narrow"])
def test_channels_last_equals_contiguous(changes):
    net, x, t = build(**changes), rand(2, 2, 8, 8, seed=1), rand(2, seed=2)
    plain = value_and_gradient(net, x, t)
    other = copy.deepcopy(net).to(memory_format=torch.channels_last)
    got = value_and_gradient(other, x.to(memory_format=torch.channels_last), t)
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(got, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("dtype", "least", "most"), [(torch.bfloat16, 1e-3, 3e-2), (torch.float16, 1e-4, 4e-3)])
@pytest.mark.parametrize("backend", ["sdpa", "math"])
@torch.no_grad()
def test_half_precision_compute_is_close_to_float32(dtype, least, most, backend):
    """Only the convolutional path: noise, labels and the mapping network stay float32, and so do the weights."""
    net = EDMPrecond(
        img_resolution=8, img_channels=2, label_dim=5, augment_dim=4, model_type="DhariwalUNet", **WIDE
    ).eval()
    randomise(net)
    net.attention_backend = backend
    mapping: list[torch.dtype] = []
    for layer in (net.model.map_noise, net.model.map_augment, net.model.map_layer0, net.model.map_label):
        layer.register_forward_hook(lambda _, __, out: mapping.append(out.dtype))
    path: list[torch.dtype] = []
    for layer in (net.model.enc["8x8_conv"], net.model.dec["4x4_in0"], net.model.out_conv):
        layer.register_forward_hook(lambda _, __, out: path.append(out.dtype))
    inputs = (rand(4, 2, 8, 8, seed=1), torch.tensor([0.01, 0.5, 2, 80]), rand(4, 5, seed=3), rand(4, 4, seed=4))
    exact = net(*inputs)
    assert path == 3 * [torch.float32]
    net.compute_dtype = dtype
    got = net(*inputs)
    assert got.dtype == torch.float32 and path[3:] == 3 * [dtype] and mapping == 8 * [torch.float32]
    assert all(p.dtype == torch.float32 for p in net.parameters())
    error = (got - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert least < error < most


@torch.no_grad()
def test_float32_is_close_to_float64():
    net, inputs = build(**WIDE), (rand(2, 2, 8, 8, seed=1), rand(2, seed=2), rand(2, 5, seed=3), rand(2, 4, seed=4))
    exact = net(*inputs)
    single = net.float()(*(tensor.float() for tensor in inputs))
    assert (single - exact).abs().max() < 1e-5 * exact.abs().max()


def test_starting_values():
    """U/√fan_in for weights and biases; zeros at the ends of blocks and network and in map_augment; map_label normal.

    Of n uniform numbers all stay below 1 - 20/n of the bound with probability e⁻²⁰ = 2e-9; a mean square is off by 6
    standard deviations, each 0.3·bound²/√n for uniform and √(2/n) for normal numbers, with probability 2e-9.
    """
    torch.manual_seed(0)
    wide = {**WIDE, "model_channels": 128, "channel_mult": (1, 1), "label_dim": 5}
    net = DhariwalUNet(**{**SHAPE, **wide})
    fans = {name.rsplit(".", 1)[0]: p[0].numel() for name, p in net.named_parameters() if p.ndim > 1}
    zeros, seen = {"conv1", "proj", "out_conv", "map_augment"}, set()
    for name, p in net.named_parameters():
        owner, kind = name.rsplit(".", 1)
        layer, n = owner.split(".")[-1], p.numel()
        if "norm" in layer:
            assert (p == (1 if kind == "weight" else 0)).all(), name
        elif layer in zeros:
            assert not p.any(), name
        elif layer == "map_label":
            assert p.square().mean().item() == pytest.approx(1, rel=6 * math.sqrt(2 / n))
            assert abs(p.mean().item()) < 6 / math.sqrt(n) and p.abs().max() > 2
        else:
            bound = 1 / math.sqrt(fans[owner])
            assert (1 - 20 / n) * bound < p.abs().max().item() <= bound * (1 + 1e-6), name
            spread = 6 * 0.3 * bound**2 / math.sqrt(n)
            assert p.square().mean().item() == pytest.approx(bound**2 / 3, abs=spread), name
            assert abs(p.mean().item()) < 6 * bound / math.sqrt(3 * n), name
        seen.add(layer)
    layers = {"map_label", "map_layer0", "map_layer1", "8x8_conv", "conv0", "affine", "qkv", "skip"}
    assert seen == layers | zeros | {"norm0", "norm1", "norm2", "out_norm"}


@torch.no_grad()
def test_a_new_network_returns_zeros():
    net = EDMPrecond(img_resolution=8, img_channels=2, model_type="DhariwalUNet", **NARROW).eval()
    x = rand(2, 2, 8, 8, seed=1).float()
    assert not net.model(x, torch.zeros(1)).any()
    torch.testing.assert_close(net(x, 0.5), x / 2)


def test_defaults_are_those_of_the_class():
    with torch.device("meta"):
        default = DhariwalUNet(64, 3, 3)
        config = NetworkConfig(img_resolution=64, img_channels=3, model_type="DhariwalUNet")
        built = EDMPrecond(config).model
    assert built.layout == default.layout
    assert {name: t.shape for name, t in built.state_dict().items()} == {
        name: t.shape for name, t in default.state_dict().items()
    }
    assert default.layout.decoder[0].name == "8x8_in0" and default.map_layer0.weight.shape == (768, 192)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_channels": 224, "attn_resolutions": (8,)}, "8x8_block0: 3 attention heads do not divide 224 channels"),
        ({"model_channels": 160, "channel_mult": (1, 9)}, "4x4_block0: 22 attention heads do not divide 1440 channels"),
        ({"model_channels": 48, "channel_mult": (1, 3)}, "4x4_block0: GroupNorm cannot divide 144 channels"),
        ({"channel_mult": ()}, "channel_mult must name at least one level"),
        ({"img_resolution": 9}, "9 cannot be halved 1 times"),
        ({"model_channels": 5}, "even number of channels"),
    ],
)
def test_impossible_shapes(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)
    shape = {"img_resolution": 8, "img_channels": 2, "model_type": "DhariwalUNet", **NARROW}
    with pytest.raises(ValueError, match=message) as caught:
        NetworkConfig(**{**shape, **changes})
    assert "\n" not in str(caught.value)
