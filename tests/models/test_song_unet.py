"""SongUNet with every encoder, decoder and filter, against the network written out from its description in float64."""

import math

import naive_unet
import pytest
import torch
from random_values import rand, randomise, value_and_gradient

from ipfm.models import SongUNet


def build(**changes) -> SongUNet:
    shape = {"img_resolution": 8, "in_channels": 2, "out_channels": 3, "model_channels": 8, "channel_mult": (1, 2, 1)}
    labels = {"label_dim": 3, "augment_dim": 4, "num_blocks": 1, "attn_resolutions": (4,)}
    torch.manual_seed(0)
    net = SongUNet(**{**shape, **labels, **changes}).double().eval()
    randomise(net)
    return net


def assert_same_function(net: SongUNet, config: naive_unet.Song, with_labels: bool = True) -> None:
    state, x = net.state_dict(), rand(2, 2, 8, 8, seed=1)
    labels = [rand(2, seed=2)]
    if with_labels:
        labels += [rand(2, 3, seed=3), rand(2, 4, seed=4)]
    got = value_and_gradient(net, x, *labels)
    expected = value_and_gradient(lambda *inputs: naive_unet.song_unet(state, config, *inputs), x, *labels)
    assert got[0].shape == (2, 3, 8, 8) and got[0].std() > 0.1
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)], ids=["box", "smooth"])
@pytest.mark.parametrize("encoder", ["standard", "skip", "residual"])
@pytest.mark.parametrize("decoder", ["standard", "skip"])
def test_every_encoder_and_decoder(encoder, decoder, taps):
    """Three levels, so that the auxiliary paths run twice."""
    net = build(encoder_type=encoder, decoder_type=decoder, resample_filter=taps)
    assert_same_function(net, naive_unet.Song(8, taps))
    aux = [name for name in (*net.enc, *net.dec) if "aux" in name]
    downs = {"standard": [], "skip": ["4x4_aux_down", "4x4_aux_skip", "2x2_aux_down", "2x2_aux_skip"]}
    downs["residual"] = ["4x4_aux_residual", "2x2_aux_residual"]
    ups = ["8x8_aux_norm", "8x8_aux_conv"]
    if decoder == "skip":
        ups = ["2x2_aux_norm", "2x2_aux_conv", "4x4_aux_up", "4x4_aux_norm", "4x4_aux_conv", "8x8_aux_up", *ups]
    assert aux == downs[encoder] + ups


@pytest.mark.parametrize(
    ("changes", "config"),
    [
        ({"embedding_type": "fourier", "channel_mult_noise": 2}, naive_unet.Song(16, fourier=True)),
        ({"channel_mult": (2, 1), "channel_mult_emb": 1, "num_blocks": 2}, naive_unet.Song(8)),
        ({"channel_mult": (2, 1, 3), "num_blocks": 0}, naive_unet.Song(8)),
        ({"channel_mult": (3,), "attn_resolutions": (8,)}, naive_unet.Song(8)),
        ({"model_channels": 64, "channel_mult": (1, 1), "attn_resolutions": (8, 4)}, naive_unet.Song(64)),
    ],
    ids=["fourier", "two-blocks", "no-blocks", "one-level", "64-channels"],
)
def test_other_shapes(changes, config):
    assert_same_function(build(**changes), config)


def test_without_labels():
    """None adds nothing: neither the row of a label nor the bias that comes with it."""
    assert_same_function(build(), naive_unet.Song(8), with_labels=False)
    plain = build(label_dim=0, augment_dim=0)
    assert plain.map_label is None and plain.map_augment is None
    assert_same_function(plain, naive_unet.Song(8), with_labels=False)


def test_starting_values():
    """xavier_uniform throughout; the last convolution of a block and of the network 1e-5 of that, qkv √0.2 of it.

    Bounds are those of a uniform draw of n numbers. All stay below 1 - 20/n of the bound with probability e⁻²⁰ = 2e-9,
    and the mean square is beyond 6 standard deviations, 0.3·bound²/√n each, with probability 2e-9.
    """
    torch.manual_seed(0)
    shape = {"label_dim": 10, "augment_dim": 9, "model_channels": 32, "channel_mult": (1, 1), "num_blocks": 1}
    net = SongUNet(8, 3, 3, encoder_type="residual", attn_resolutions=(4,), **shape)
    kinds = {"conv1": 1e-5, "proj": 1e-5, "8x8_aux_conv": 1e-5, "qkv": math.sqrt(0.2)}
    seen = set()
    for name, p in net.named_parameters():
        layer = name.split(".")[-2]
        if name.endswith("bias"):
            assert not p.any(), name
        elif "norm" in layer:
            assert (p == 1).all(), name
        else:
            seen.add(layer)
            fans = (p.shape[0] + p.shape[1]) * (p[0, 0].numel() if p.ndim == 4 else 1)
            bound, n = kinds.get(layer, 1) * math.sqrt(6 / fans), p.numel()
            assert (1 - 20 / n) * bound < p.abs().max().item() <= bound * (1 + 1e-6), name
            spread = 6 * 0.3 * bound**2 / math.sqrt(n)
            assert p.square().mean().item() == pytest.approx(bound**2 / 3, abs=spread), name
    layers = {"map_label", "map_augment", "map_layer0", "map_layer1", "8x8_conv", "4x4_aux_residual", "8x8_aux_conv"}
    assert seen == layers | {"conv0", "affine", "conv1", "skip", "qkv", "proj"}
