"""EDM2's network: sizes, configuration, magnitudes, plain weights and masters."""

import copy
import math
from dataclasses import replace

import edm2_fixtures
import pytest
import torch
from edm2_fixtures import SMALL, gradient_of_master, network

from ipfm.kernels import mp_cat_silu, pixel_norm_silu
from ipfm.models import (
    EDM2Precond,
    EDMPrecond,
    NetworkConfig,
    build_network,
    edm2_unet,
    load_model,
    presets,
    save_model,
)
from ipfm.models.edm2_layers import MPConv, mp_silu, mp_sum, resample
from ipfm.models.forced_weight_norm import (
    masters,
    normalised_rows,
    plain_weight,
    under_the_rule,
)
from ipfm.models.layers import Conv2d

COUNTS = {
    "edm2-img512-xs": 124_713_253,
    "edm2-img512-s": 280_212_837,
    "edm2-img512-m": 497_807_781,
    "edm2-img512-l": 777_498_085,
    "edm2-img512-xl": 1_119_283_749,
    "edm2-img512-xxl": 1_523_164_773,
    "edm2-img512-xs-uncond": 124_201_253,
    "edm2-img512-s-uncond": 279_444_837,
    "edm2-img512-m-uncond": 496_783_781,
    "edm2-img512-l-uncond": 776_218_085,
    "edm2-img512-xl-uncond": 1_117_747_749,
    "edm2-img512-xxl-uncond": 1_521_372_773,
    "edm2-img64-xs": 124_710_949,
    "edm2-img64-s": 280_209_381,
    "edm2-img64-m": 497_803_173,
    "edm2-img64-l": 777_492_325,
    "edm2-img64-xl": 1_119_276_837,
}


def random(config: NetworkConfig = SMALL, seed: int = 0) -> EDM2Precond:
    """A network whose gains are not zero, so that every parameter matters."""
    torch.manual_seed(seed)
    net = build_network(config)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith("gain"):
                p.normal_()
    return net.eval()


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes(name):
    config = presets.get(name)
    with torch.device("meta"):
        net = build_network(config)
    assert sum(p.numel() for p in net.parameters()) == COUNTS[name]
    labels = config.label_dim > 0
    assert len(list(net.parameters())) == 198 + labels and len(net.state_dict()) == 202 + labels
    assert sum(b.numel() for b in net.buffers()) == 2 * config.model_channels + 256
    assert sum(block.num_heads > 0 for block in net.model.blocks) == 15 and len(list(net.model.blocks)) == 36
    rows = sum(net.get_parameter(name).shape[0] for name in under_the_rule(net, logvar=True))
    if name == "edm2-img512-s":
        assert rows == 105_413
    if name == "edm2-img64-s":
        assert rows == 105_412


def test_the_configuration_comes_back_from_json():
    config = replace(SMALL, clip_act=math.inf, res_balance=0.25, logvar_channels=0, D=128.0)
    said = config.to_json()
    assert said["clip_act"] == "inf" and "label_dropout" not in said and "augment_dim" not in said
    assert NetworkConfig.from_json(said) == config
    assert SMALL.channel_mult_emb == 2 and SMALL.family == "EDM2"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precond": "VPPrecond", "sigma_max": None, "sigma_min": None}, "EDM's preconditioning"),
        ({"augment_dim": 9}, "augment_dim is no option of EDMPrecond with EDM2UNet, got 9"),
        ({"label_dropout": 0.1}, "label_dropout is no option"),
        ({"encoder_type": "residual"}, "encoder_type is no option"),
        ({"res_balance": 1.5}, "res_balance must be at least 0 and at most 1, got 1.5"),
        ({"clip_act": 0}, "clip_act must be a number above 0, or inf, got 0"),
        ({"logvar_channels": -1}, "logvar_channels must be a whole number of at least 0, got -1"),
        ({"channels_per_head": 3}, "attention heads do not divide"),
        ({"channel_mult": ()}, "at least one level"),
    ],
)
def test_options_that_make_no_such_network(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        replace(SMALL, **changes)
    assert "\n" not in str(caught.value)


def test_options_of_edm2_are_refused_for_other_networks():
    for name, value in (("clip_act", 1.0), ("logvar_channels", 128), ("channels_per_head", 32)):
        with pytest.raises(
            ValueError, match=f"{name} is no option of EDMPrecond with SongUNet, .* belongs to EDM2UNet"
        ):
            NetworkConfig(img_resolution=8, img_channels=1, **{name: value})
    with pytest.raises(ValueError, match="an EDM2UNet is built into an EDM2Precond, not into EDMPrecond"):
        EDMPrecond(SMALL)
    with pytest.raises(ValueError, match="the configuration is one of SongUNet"):
        EDM2Precond(NetworkConfig(img_resolution=8, img_channels=1))


def test_a_network_without_log_variance_says_so():
    net = build_network(replace(SMALL, logvar_channels=0))
    assert net.logvar_linear is None and not any("logvar" in name for name in net.state_dict())
    with pytest.raises(ValueError, match="has no log-variance: its logvar_channels are 0"):
        net.logvar(torch.ones(2))


@torch.no_grad()
def test_operations_keep_the_size_of_what_they_are_given():
    torch.manual_seed(0)
    a, b = torch.randn(2, 48, 16, 16), torch.randn(2, 96, 16, 16)
    layer = MPConv(48, 64, 3)
    sizes = {
        "silu": mp_silu(a),
        "sum": mp_sum(a, torch.randn_like(a), 0.3),
        "cat": mp_cat_silu(a, b, 0.5)[0],
        "conv": layer(a)[..., 1:-1, 1:-1],
        "norm": pixel_norm_silu(7 * a)[0],
    }
    for name, out in sizes.items():
        assert out.square().mean().sqrt().item() == pytest.approx(1, rel=0.03), name
    joined, _ = mp_cat_silu(a, b, 0.5)
    halves = joined[:, :48].square().sum(), joined[:, 48:].square().sum()
    assert (halves[0] / halves[1]).item() == pytest.approx(1, rel=0.03)


@pytest.mark.parametrize("up", [True, False])
def test_other_filters_resample_as_in_the_older_networks(up):
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for taps in ((1, 1), (1, 3, 3, 1)):
        older = Conv2d(3, 3, 0, up=up, down=not up, resample_filter=taps)
        assert torch.allclose(resample(x, taps, up=up), older(x), atol=1e-6)


def _differentiated(net, side):
    """The output and the gradients of the image and of all parameters but the log-variance's."""
    torch.manual_seed(5)
    x = torch.randn(1, 1, side, side, dtype=torch.float64, requires_grad=True)
    y = net(x, torch.tensor([0.3], dtype=torch.float64))
    weights = [p for name, p in net.named_parameters() if "logvar" not in name]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *weights])]


def test_on_a_gpu_the_kernels_compute_the_same(monkeypatch):
    """Value and all gradients, in float64, where some activations are clamped."""
    net = random(replace(SMALL, img_resolution=4, label_dim=0, attn_resolutions=(2,), clip_act=1.5)).double()
    net.channels_last = True
    wanted = _differentiated(net, 4)
    monkeypatch.setattr(edm2_unet, "triton_serves", lambda x: True)
    for got, want in zip(_differentiated(net, 4), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_what_the_kernels_drop_is_dropped_in_a_checkpointed_block_again(monkeypatch):
    one_level = replace(SMALL, img_resolution=2, channel_mult=(1,), attn_resolutions=(2,), label_dim=0, dropout=0.5)
    net = random(one_level).double().train()
    monkeypatch.setattr(edm2_unet, "triton_serves", lambda x: True)
    dropped = _differentiated(net, 2)
    net.activation_checkpointing = True
    assert all(map(torch.equal, _differentiated(net, 2), dropped))
    monkeypatch.undo()
    assert not torch.allclose(_differentiated(net.eval(), 2)[0], dropped[0])


def test_the_gradient_of_a_master_is_autograds():
    master = torch.randn(5, 3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    master[0] *= 1e-3
    master[1] *= 1e-6
    master.requires_grad_()
    gradient = torch.randn_like(master)
    (expected,) = torch.autograd.grad(plain_weight(master), master, gradient)
    assert torch.allclose(gradient_of_master(master.detach(), gradient), expected, rtol=1e-10)
    assert torch.isfinite(gradient_of_master(torch.zeros(2, 4), torch.ones(2, 4))).all()


@torch.no_grad()
def test_state_dicts_hold_masters_and_parameters_plain_weights():
    net = network("edm2_img_cond", torch.float64)
    held = edm2_fixtures.masters_in_file("edm2_img_cond")
    stored = net.state_dict()
    assert list(stored) == list(held)
    for name, master in held.items():
        assert torch.allclose(stored[name], master.to(stored[name].dtype), rtol=1e-14)
    for name in under_the_rule(net, logvar=True):
        assert torch.equal(net.get_parameter(name), plain_weight(held[name]))
        assert torch.equal(masters(net)[name], stored[name])
    assert "logvar_linear.weight" not in under_the_rule(net)
    # A copy by state dict is the same network, not one that was normalised twice.
    twin = build_network(net.config).double()
    twin.load_state_dict(stored)
    for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-13), name
    twin.load_state_dict({name: 3 * value for name, value in held.items()}, strict=False)
    assert torch.allclose(twin.state_dict()["unet.out_conv.weight"], 3 * held["unet.out_conv.weight"], rtol=1e-13)


@torch.no_grad()
def test_masters_survive_casts_copies_and_the_way_to_disk(tmp_path):
    net = network("edm2_latent_uncond", torch.float32)
    held = edm2_fixtures.masters_in_file("edm2_latent_uncond")
    x, sigma = torch.randn(2, 4, 8, 8), torch.tensor([0.5, 3.0])
    save_model(net, tmp_path / "model")
    back = load_model(tmp_path / "model")
    assert back.config == net.config and isinstance(back, EDM2Precond)
    assert torch.allclose(back(x, sigma), net(x, sigma), atol=1e-5)
    narrow = copy.deepcopy(net).to(torch.bfloat16)
    assert narrow.unet.out_conv.weight.dtype == torch.bfloat16 and narrow.unet.out_conv.row_scale.dtype.itemsize >= 4
    assert narrow(x, sigma).dtype == torch.float32
    for name, value in held.items():
        assert torch.allclose(back.state_dict()[name], value.float(), rtol=1e-6), name
        if value.ndim > 1:
            assert torch.allclose(narrow.state_dict()[name].double(), value, rtol=2e-2), name


def test_assigned_weights_are_not_written_to():
    given = {name: value.float() for name, value in edm2_fixtures.masters_in_file("edm2_latent_uncond").items()}
    before = copy.deepcopy(given)
    with torch.device("meta"):
        net = build_network(edm2_fixtures.CONFIGS["edm2_latent_uncond"])
    net.load_state_dict(given, assign=True)
    assert all(torch.equal(given[name], before[name]) for name in given)
    expected = plain_weight(before["unet.out_conv.weight"])
    assert torch.equal(net.unet.out_conv.weight, expected)
    assert torch.allclose(net.state_dict()["unet.out_conv.weight"], before["unet.out_conv.weight"], rtol=1e-6)


@pytest.mark.parametrize(("dtype", "least", "most"), [(torch.bfloat16, 1e-4, 4e-2), (torch.float16, 1e-5, 5e-3)])
@torch.no_grad()
def test_only_images_are_computed_in_16_bits(dtype, least, most):
    net, seen = network("edm2_img_cond", torch.float32), {}
    data = edm2_fixtures.recorded("edm2_img_cond")
    net.unet.emb_noise.register_forward_hook(lambda _, __, out: seen.update(noise=out.dtype))
    net.unet.emb_label.register_forward_hook(lambda _, __, out: seen.update(label=out.dtype))
    net.unet.enc["16x16_block0"].emb_linear.register_forward_hook(lambda _, __, out: seen.update(emb=out.dtype))
    net.unet.enc["16x16_conv"].register_forward_hook(lambda _, __, out: seen.update(path=out.dtype))
    net.compute_dtype = dtype
    got = net(data["x"], data["sigma"], data["class_labels"])
    wide = torch.float32
    assert seen == {"noise": wide, "label": wide, "emb": wide, "path": dtype} and got.dtype == wide
    assert net.logvar(data["sigma"]).dtype == wide
    error = (got - data["D"]).square().mean().sqrt() / data["D"].square().mean().sqrt()
    assert least < error < most


@pytest.mark.parametrize("frozen", [False, True])
def test_checkpointed_activations_give_the_same_gradients(frozen):
    net = random(replace(SMALL, dropout=0.2)).train().requires_grad_(not frozen)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(2)).requires_grad_()
    sources = [x] if frozen else [x, *(p for n, p in net.named_parameters() if "logvar" not in n)]
    found = []
    for on in (False, True):
        net.activation_checkpointing = on
        torch.manual_seed(3)
        found.append(torch.autograd.grad(net(x, torch.tensor([0.3, 4.0]), torch.eye(3)[:2]).square().sum(), sources))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*found, strict=True))


def test_rows_are_normalised_once():
    master = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    size = math.sqrt(12.5)
    assert (
        torch.allclose(normalised_rows(master)[0], master[0] / (size + 1e-4)) and not normalised_rows(master)[1].any()
    )
    assert normalised_rows(master.half()).dtype == torch.float32
