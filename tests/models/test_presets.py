"""The presets: sizes, names and order of the published networks' tensors, and how they were trained."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ipfm.models import EDMPrecond, NetworkConfig, Precond, build_network, presets


def on_meta(name: str, **changes) -> Precond:
    with torch.device("meta"):
        return build_network(replace(presets.get(name), **changes))


BLOCK = ("norm0.weight", "norm0.bias", "conv0.weight", "conv0.bias", "affine.weight", "affine.bias")
BLOCK_END = ("norm1.weight", "norm1.bias", "conv1.weight", "conv1.bias")
SKIP = ("skip.weight", "skip.bias")
ATTENTION = ("norm2.weight", "norm2.bias", "qkv.weight", "qkv.bias", "proj.weight", "proj.bias")


def block_names(prefix: str, *, skip: bool | None = None, resample: bool = False, attention: bool = False) -> list[str]:
    """Names of a block's tensors; `skip` says whether its shortcut has a weight (None: as resampling needs)."""
    names = list(BLOCK)
    if resample:
        names.insert(4, "conv0.resample_filter")
    names += BLOCK_END
    if resample if skip is None else skip:
        names += SKIP
    if resample:
        names.append("skip.resample_filter")
    if attention:
        names += ATTENTION
    return [f"model.{prefix}.{name}" for name in names]


def cifar10_ncsnpp_names() -> list[str]:
    """The names of the conditional CIFAR-10 NCSN++ checkpoints, in the order of the files."""
    names = [
        "model.map_noise.freqs",
        "model.map_label.weight",
        "model.map_label.bias",
        "model.map_augment.weight",
        "model.map_layer0.weight",
        "model.map_layer0.bias",
        "model.map_layer1.weight",
        "model.map_layer1.bias",
        "model.enc.32x32_conv.weight",
        "model.enc.32x32_conv.bias",
    ]
    for side in (32, 16, 8):
        at = f"enc.{side}x{side}"
        if side < 32:
            names += block_names(f"{at}_down", resample=True)
            names += [f"model.{at}_aux_residual.{part}" for part in ("weight", "bias", "resample_filter")]
        for index in range(4):
            names += block_names(f"{at}_block{index}", skip=side == 32 and index == 0, attention=side == 16)
    for side in (8, 16, 32):
        at = f"dec.{side}x{side}"
        if side == 8:
            names += block_names(f"{at}_in0", attention=True) + block_names(f"{at}_in1")
        else:
            names += block_names(f"{at}_up", resample=True)
        for index in range(5):
            names += block_names(f"{at}_block{index}", skip=True, attention=side == 16 and index == 4)
    for part in ("norm", "conv"):
        names += [f"model.dec.32x32_aux_{part}.weight", f"model.dec.32x32_aux_{part}.bias"]
    return names


def test_state_dict_names_order_and_shapes_of_cifar10_ncsnpp():
    net = on_meta("cifar10-ncsnpp-cond")
    state = net.state_dict()
    expected = cifar10_ncsnpp_names()
    assert list(state) == expected
    assert len(expected) == 434
    buffers = [name for name in expected if name.endswith(("freqs", "resample_filter"))]
    assert [name for name, _ in net.named_parameters()] == [name for name in expected if name not in buffers]
    shapes = {
        "map_noise.freqs": (128,),
        "map_label.weight": (256, 10),
        "map_augment.weight": (256, 9),
        "map_layer0.weight": (512, 256),
        "enc.32x32_conv.weight": (128, 3, 3, 3),
        "enc.32x32_block0.conv0.weight": (256, 128, 3, 3),
        "enc.32x32_block0.affine.weight": (256, 512),
        "enc.32x32_block0.skip.weight": (256, 128, 1, 1),
        "enc.16x16_down.conv0.resample_filter": (1, 1, 4, 4),
        "enc.16x16_aux_residual.weight": (256, 3, 3, 3),
        "enc.8x8_aux_residual.weight": (256, 256, 3, 3),
        "enc.16x16_block0.qkv.weight": (768, 256, 1, 1),
        "dec.8x8_block0.norm0.weight": (512,),
        "dec.32x32_block4.norm0.weight": (384,),
        "dec.32x32_aux_conv.weight": (3, 256, 3, 3),
    }
    assert {name: tuple(state[f"model.{name}"].shape) for name in shapes} == shapes


def test_decoder_widths_at_64():
    net = on_meta("ffhq64-ddpmpp")
    widths = {name: block.in_channels for name, block in net.model.dec.named_children() if hasattr(block, "conv0")}
    assert {widths[f"{r}x{r}_block{i}"] for r in (8, 16) for i in range(5)} == {512}
    assert [widths[f"32x32_block{i}"] for i in range(5)] == [512, 512, 512, 512, 384]
    assert [widths[f"64x64_block{i}"] for i in range(5)] == [384, 256, 256, 256, 256]
    assert widths["64x64_up"] == 256


ADM_SIDES = {64: 192, 32: 384, 16: 576, 8: 768}


def imagenet64_adm_names() -> list[str]:
    """The names of the conditional ImageNet-64 ADM checkpoint, in the order of the file."""
    names = [f"model.map_layer{i}.{part}" for i in range(2) for part in ("weight", "bias")]
    names += ["model.map_label.weight", "model.enc.64x64_conv.weight", "model.enc.64x64_conv.bias"]
    for side in ADM_SIDES:
        at = f"enc.{side}x{side}"
        if side < 64:
            names += block_names(f"{at}_down", resample=True, skip=False)
        for index in range(3):
            # The down block keeps the width of the level above, so that the first block widens; 64x64_conv has 192.
            names += block_names(f"{at}_block{index}", skip=side < 64 and index == 0, attention=side < 64)
    for side in reversed(ADM_SIDES):
        at = f"dec.{side}x{side}"
        if side == 8:
            names += block_names(f"{at}_in0", attention=True) + block_names(f"{at}_in1")
        else:
            names += block_names(f"{at}_up", resample=True, skip=False)
        for index in range(4):
            names += block_names(f"{at}_block{index}", skip=True, attention=side < 64)
    return [*names, *(f"model.out_{layer}.{part}" for layer in ("norm", "conv") for part in ("weight", "bias"))]


def test_state_dict_names_order_and_shapes_of_imagenet64_adm():
    net = on_meta("imagenet64-adm")
    state = net.state_dict()
    expected = imagenet64_adm_names()
    assert list(state) == expected
    assert len(expected) == 553
    kept = [name for name in expected if not name.endswith("resample_filter")]
    assert [name for name, _ in net.named_parameters()] == kept
    shapes = {
        "map_layer0.weight": (768, 192),
        "map_layer1.weight": (768, 768),
        "map_label.weight": (768, 1000),
        "enc.64x64_conv.weight": (192, 3, 3, 3),
        "enc.64x64_block0.affine.weight": (384, 768),
        "enc.32x32_down.conv0.resample_filter": (1, 1, 2, 2),
        "enc.32x32_down.skip.resample_filter": (1, 1, 2, 2),
        "enc.32x32_block0.skip.weight": (384, 192, 1, 1),
        "enc.8x8_block0.qkv.weight": (2304, 768, 1, 1),
        "out_norm.weight": (192,),
        "out_norm.bias": (192,),
        "out_conv.weight": (3, 192, 3, 3),
        "out_conv.bias": (3,),
    }
    assert {name: tuple(state[f"model.{name}"].shape) for name in shapes} == shapes


def test_widths_and_heads_of_imagenet64_adm():
    net = on_meta("imagenet64-adm")
    inputs = {name: block.in_channels for name, block in net.model.dec.named_children()}
    assert [inputs[f"8x8_block{i}"] for i in range(4)] == [1536, 1536, 1536, 1344]
    assert [inputs[f"16x16_block{i}"] for i in range(4)] == [1344, 1152, 1152, 960]
    assert [inputs[f"32x32_block{i}"] for i in range(4)] == [960, 768, 768, 576]
    assert [inputs[f"64x64_block{i}"] for i in range(4)] == [576, 384, 384, 384]
    heads: dict[int, set[int]] = {side: set() for side in ADM_SIDES}
    for group in (net.model.enc, net.model.dec):
        for name, block in group.named_children():
            if "block" in name or name == "8x8_in0":
                heads[int(name.split("x")[0])].add(block.num_heads)
                assert block.out_channels == ADM_SIDES[int(name.split("x")[0])]
            elif name != "64x64_conv":
                assert block.num_heads == 0
    assert heads == {64: {0}, 32: {6}, 16: {9}, 8: {12}}


def test_where_the_cifar10_networks_attend():
    for name in ("cifar10-ddpmpp", "cifar10-ncsnpp"):
        inner = on_meta(name).model
        attending = {
            group: [entry for entry, block in part.named_children() if getattr(block, "num_heads", 0)]
            for group, part in (("enc", inner.enc), ("dec", inner.dec))
        }
        expected = {"enc": [f"16x16_block{i}" for i in range(4)], "dec": ["8x8_in0", "16x16_block4"]}
        assert attending == expected
        assert all(block.num_heads in (0, 1) for block in inner.blocks)


TABLE = [
    ("cifar10-ddpmpp", {}, 55_733_891, 32, 425, 42.38),
    ("cifar10-ddpmpp", {"augment_dim": 0}, 55_732_739, 32, 424, 42.38),
    ("cifar10-ddpmpp-cond", {}, 55_735_299, 32, 427, 42.38),
    ("cifar10-ncsnpp", {}, 56_397_827, 288, 432, 42.79),
    ("cifar10-ncsnpp-cond", {}, 56_400_643, 288, 434, 42.79),
    ("ffhq64-ddpmpp", {}, 61_805_571, 48, 553, 83.73),
    ("afhqv2-64-ddpmpp", {}, 61_805_571, 48, 553, 83.73),
    ("ffhq64-ncsnpp", {}, 62_761_091, 368, 563, 84.86),
    ("afhqv2-64-ncsnpp", {}, 62_761_091, 368, 563, 84.86),
    ("imagenet64-adm", {}, 295_899_267, 48, 553, 219.33),
    ("imagenet64-adm-uncond", {}, 295_131_267, 48, 552, 219.33),
]


@pytest.mark.parametrize(("name", "changes", "parameters", "buffers", "tensors", "gflop"), TABLE)
def test_size_of_the_published_networks(name, changes, parameters, buffers, tensors, gflop):
    net = on_meta(name, **changes)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert sum(b.numel() for b in net.buffers()) == buffers
    assert len(net.state_dict()) == tensors


@pytest.mark.parametrize(
    ("name", "gflop"), [(name, gflop) for name, changes, *_, gflop in TABLE if "cond" not in name and not changes]
)
@torch.no_grad()
def test_operations_of_the_published_networks(name, gflop):
    """Operations of one image.

    Where a convolution follows up-sampling ours saves three quarters of a 1x1 one, and of a 3x3 one five ninths where
    the up-sampling repeats pixels.
    """
    net = on_meta(name).eval()
    net.attention_backend = "math"
    x = torch.empty(1, 3, net.img_resolution, net.img_resolution, device="meta")
    with FlopCounterMode(display=False) as counter:
        net(x, torch.ones(1, device="meta"))
    saved = 0
    for entry, block in net.model.dec.named_children():
        pixels = int(entry.split("x")[0]) ** 2
        if entry.endswith("_up") and block.skip.weight is not None:
            saved += 3 / 4 * 2 * block.skip.weight.numel() * pixels
        if entry.endswith("_up") and "ncsnpp" not in name:
            saved += 5 / 9 * 2 * block.conv0.weight.numel() * pixels
    assert (counter.get_total_flops() + saved) / 1e9 == pytest.approx(gflop, rel=2e-4)


def test_training_facts():
    assert {name: presets.get(name).dropout for name in presets.names()} == {
        "cifar10-ddpmpp": 0.13,
        "cifar10-ddpmpp-cond": 0.13,
        "cifar10-ncsnpp": 0.13,
        "cifar10-ncsnpp-cond": 0.13,
        "ffhq64-ddpmpp": 0.05,
        "ffhq64-ncsnpp": 0.05,
        "afhqv2-64-ddpmpp": 0.25,
        "afhqv2-64-ncsnpp": 0.25,
        "imagenet64-adm": 0.10,
        "imagenet64-adm-uncond": 0.10,
        "digits": 0.0,
        **{f"edm2-img512-{size}{kind}": 0.0 for size in ("xs", "s") for kind in ("", "-uncond")},
        **{f"edm2-img512-{size}{kind}": 0.10 for size in ("m", "l", "xl", "xxl") for kind in ("", "-uncond")},
        **{f"edm2-img64-{size}{kind}": 0.0 for size in ("xs", "s") for kind in ("", "-uncond")},
        **{f"edm2-img64-{size}{kind}": 0.10 for size in ("m", "l", "xl") for kind in ("", "-uncond")},
    }
    for name in presets.names():
        network = presets.get(name)
        if name.startswith("edm2"):
            assert network.use_fp16 and network.label_dim == (0 if name.endswith("uncond") else 1000)
            assert network.img_channels == (4 if "img512" in name else 3) and network.img_resolution == 64
            continue
        assert network.precond == "EDMPrecond" and math.isinf(network.D)
        assert network.augment_dim == (9 if name.startswith(("cifar", "ffhq", "afhq")) else 0)
        assert network.label_dim == {"cifar10-ddpmpp-cond": 10, "cifar10-ncsnpp-cond": 10, "imagenet64-adm": 1000}.get(
            name, 0
        )
        assert network.use_fp16 == name.startswith("imagenet64")


def test_options_of_the_architectures():
    for name in ("cifar10-ncsnpp", "ffhq64-ncsnpp", "afhqv2-64-ncsnpp"):
        net = presets.get(name)
        assert (net.embedding_type, net.encoder_type, net.decoder_type) == ("fourier", "residual", "standard")
        assert (net.channel_mult_noise, net.resample_filter) == (2, (1, 3, 3, 1))
    for name in ("cifar10-ddpmpp", "ffhq64-ddpmpp", "afhqv2-64-ddpmpp"):
        net = presets.get(name)
        assert (net.embedding_type, net.encoder_type, net.decoder_type) == ("positional", "standard", "standard")
        assert (net.channel_mult_noise, net.resample_filter) == (1, (1, 1))
    adm = NetworkConfig(img_resolution=64, img_channels=3, label_dim=1000, model_type="DhariwalUNet", use_fp16=True)
    assert presets.get("imagenet64-adm") == adm


def test_get():
    assert presets.get("digits", D=128).D == 128
    digits = EDMPrecond(presets.get("digits"))
    assert (digits.img_channels, digits.img_resolution, digits.D) == (1, 8, math.inf)
    with pytest.raises(ValueError, match=r"'cifar' is unknown; possible: .*cifar10-ddpmpp, .*imagenet64-adm, .*digits"):
        presets.get("cifar")
