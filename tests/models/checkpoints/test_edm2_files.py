"""Files of EDM2, DDO, SiD and SiDA: what is read of each kind, what contradicts itself, what is known of them."""

import math
import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import official_edm2 as e2
import official_files as of
import pytest
import torch
from official_edm2 import Edm2

from ipfm.models import load_teacher
from ipfm.models.checkpoints.distillation_state import read_distillation_state
from ipfm.models.checkpoints.published import SIZES, published
from ipfm.models.checkpoints.reader import Checkpoint, ImportedNetwork, open_checkpoint
from ipfm.models.checkpoints.training_state import read_training_state
from ipfm.models.config import NetworkConfig
from ipfm.models.teacher import build, load_from_checkpoint

FIXTURES = Path(__file__).parents[2] / "fixtures"
LATENT = Edm2()
IMAGES = Edm2(
    img_resolution=16, img_channels=3, label_dim=5, channel_mult=(1, 2, 3), attn_resolutions=(8, 4), dropout=0.1
)
OTHER = replace(
    LATENT,
    channel_mult=(2, 3),
    channel_mult_noise=3,
    channel_mult_emb=5,
    num_blocks=2,
    more={"label_balance": 0.4, "concat_balance": 0.6, "clip_act": 100, "sigma_data": 0.7},
)
# Attributes that the keywords of OTHER come with.
OTHER_PARTS = {"": {"sigma_data": 0.7}, "unet": {"label_balance": 0.4, "concat_balance": 0.6}}
ARCHITECTURES = {"latent": LATENT, "images": IMAGES, "wide": replace(LATENT, model_channels=64, channels_per_head=64)}


def snapshot(path: Path, net: of.Official, style: of.Style = of.NEW, **options: object) -> Checkpoint:
    return open_checkpoint(of.write_pickle(path, e2.snapshot(net, **options), style))  # type: ignore[arg-type]


def assert_is(imported: ImportedNetwork, net: of.Official) -> None:
    expected = e2.tensors(net)
    assert list(imported.weights) == list(expected)
    for name, tensor in imported.weights.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, expected[name]), name
    assert list(imported.parameters) == e2.parameters(net)


@pytest.mark.quick
@pytest.mark.parametrize("name", ["edm2_img_cond", "edm2_latent_uncond"])
def test_recorded_snapshots(name):
    """The files that EDM2's own code wrote compute what that code computed of their values raised to float32."""
    checkpoint = open_checkpoint(FIXTURES / f"{name}.pkl")
    assert (checkpoint.origin, checkpoint.choose(), checkpoint.container) == ("EDM2 network snapshot", "ema", "pickle")
    imported = checkpoint.read()
    assert (imported.class_name, imported.dtypes, imported.config.logvar_channels) == ("Precond", "float16", 128)
    known = checkpoint.published(imported)
    assert (known.encoder, known.encoder_from) == ("latent" if "latent" in name else "pixel", "file")
    net = build(imported)
    assert not imported.weights  # each was let go of as the network took it
    with np.load(FIXTURES / f"{name}.npz") as data, torch.no_grad():
        labels = torch.from_numpy(data["class_labels"]) if "class_labels" in data else None
        d = net(torch.from_numpy(data["x"]), torch.from_numpy(data["sigma"]), labels)
        assert float((d - torch.from_numpy(data["D"])).abs().max() / np.abs(data["D"]).max()) <= 2e-6


@pytest.mark.parametrize("style", [of.NEW, of.OLD], ids=["new", "old"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_snapshots_with_and_without_arguments_and_encoder(name, style, tmp_path):
    net = e2.network(ARCHITECTURES[name], style=style)
    first = snapshot(tmp_path / "a.pkl", net, style).read()
    assert_is(first, net)
    bare = e2.network(ARCHITECTURES[name], style=style, with_keywords=False)
    second = snapshot(tmp_path / "b.pkl", bare, style, latent=None).read()
    assert_is(second, net)
    assert second.config == first.config and first.config.dropout == ARCHITECTURES[name].dropout
    assert (first.config.use_fp16, first.config.channels_per_head) == (True, ARCHITECTURES[name].channels_per_head)


def test_arguments_that_no_shape_shows(tmp_path):
    """Widths that are no multiples of the first, other balances, another clamp; with and without arguments."""
    blocks = _blocks(e2.network(OTHER))
    parts = {**OTHER_PARTS, **{path: {"clip_act": 100} for path in blocks}}
    for with_keywords in (True, False):
        net = e2.network(OTHER, changes=parts, with_keywords=with_keywords)
        config = snapshot(tmp_path / "a.pkl", net).read().config
        assert (config.clip_act, config.label_balance, config.concat_balance, config.sigma_data) == (100, 0.4, 0.6, 0.7)
        assert [config.model_channels * factor for factor in config.channel_mult] == [8, 12]
        assert (config.model_channels * config.channel_mult_noise, config.channel_mult_emb) == (12, 5)
    unclamped = {path: {"clip_act": None} for path in blocks}
    net = e2.network(replace(OTHER, more={}), with_keywords=False, changes=unclamped)
    assert snapshot(tmp_path / "a.pkl", net).read().config.clip_act == math.inf


def _blocks(net: of.Official) -> list[str]:
    return [name.removesuffix(".emb_gain") for name in e2.tensors(net) if name.endswith(".emb_gain")]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_that_has_instructions_in_bytes(protocol, tmp_path):
    net = e2.network()
    path = of.write_pickle(tmp_path / "a.pkl", e2.snapshot(net), protocol=protocol)
    assert_is(open_checkpoint(path).read(), net)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_of_other_dtypes_as_ddos_may_be(dtype, tmp_path):
    net = e2.network(replace(IMAGES, use_fp16=False), dtype=dtype)
    checkpoint = snapshot(tmp_path / "edm2-img64-s-ddo.pkl", net)
    imported = checkpoint.read()
    assert_is(imported, net)
    assert (imported.dtypes, imported.config.use_fp16) == (str(dtype).removeprefix("torch."), False)
    assert checkpoint.published(imported).method == "DDO" and not checkpoint.is_generator("ema")


def test_missing_flags_and_more_attributes(tmp_path):
    """What is not known changes nothing; what is known and absent has its default."""
    more = {"": {"force_fp32": True, "name": "x"}, "unet": {"use_gan": False}, "unet.enc.8x8_block0": {"seed": 3}}
    net = e2.network(changes=more, flags={"force_normalization": True, "use_gan": False})
    for key in ("use_fp16", "sigma_data"):
        net.meta["state"].pop(key)
    net.meta["state"]["_init_kwargs"].pop("use_fp16")
    assert_is(imported := snapshot(tmp_path / "a.pkl", net).read(), net)
    assert imported.config.use_fp16 and imported.config.sigma_data == 0.5


@pytest.mark.parametrize("hooks", ["", "same", "twin", "copy"])
def test_generators_of_sid_and_sida_with_their_hooks(hooks, tmp_path):
    """Layers that contain themselves: nothing behind a hook is looked at, and the weights are those of the layer."""
    root = e2.generator(IMAGES, hooks=hooks)
    path = of.write_pickle(tmp_path / "network-snapshot-1.000000-115716.pkl", root)
    assert (b"getattr" in path.read_bytes()) == bool(hooks)
    checkpoint = open_checkpoint(path)
    assert checkpoint.origin == "network snapshot of SiD or SiDA for EDM2"
    imported = checkpoint.read()
    assert_is(imported, root["ema"])
    assert imported.config.logvar_channels == 0 and imported.config.use_fp16
    assert checkpoint.why_generator("ema") == "by its class EDM_2_Precond_Generator"
    with pytest.raises(ValueError, match=r"ema is a generator .network snapshot of SiD or SiDA for EDM2."):
        load_teacher(path)
    net = load_from_checkpoint(checkpoint)
    assert torch.isfinite(net(torch.zeros(1, 3, 16, 16), 2.5)).all()


def test_a_method_of_anything_else_is_refused(tmp_path):
    layer = of.Official("MPConv", {"a": 1})
    for call, asked in (
        (of.Call(getattr, layer, "__class__"), "the attribute '__class__' of a Record"),
        (of.Call(getattr, "text", e2.HOOK), f"the attribute '{e2.HOOK}' of 'text'"),
        (of.Call(getattr, of.Call(getattr, layer, e2.HOOK), e2.HOOK), f"the attribute '{e2.HOOK}' of a Hook"),
        (of.Call(getattr, layer, e2.HOOK, None), "getattr"),
    ):
        root = e2.generator()
        root["ema"].meta["state"]["_forward_pre_hooks"] = {0: call}
        with pytest.raises(ValueError, match=r"a\.pkl: ") as refused:
            open_checkpoint(of.write_pickle(tmp_path / "a.pkl", root))
        assert asked in str(refused.value) or "arguments" in str(refused.value)


# -- training states --------------------------------------------------------------------------------------------------


def test_a_training_state_with_its_averages(tmp_path):
    """Weights, moments, images seen, and every average under its width; the architecture by the snapshot beside it."""
    net = e2.network(IMAGES, dtype=torch.float32)
    of.write_pickle(tmp_path / "network-snapshot-0000002-0.100.pkl", e2.snapshot(net))
    root = e2.training_state(net, images=2560)
    path = of.write_torch(tmp_path / "training-state-0000002.pt", root)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = read_training_state(path)
    expected, adam = e2.tensors(net), root["optimizer"]
    assert {name: torch.equal(value, expected[name]) for name, value in state.weights.items()} == dict.fromkeys(
        expected, True
    )
    for index, name in enumerate(e2.parameters(net)):
        assert torch.equal(state.exp_avg[name], adam["state"][index]["exp_avg"])
        assert torch.equal(state.exp_avg_sq[name], adam["state"][index]["exp_avg_sq"])
    assert (state.images_seen, state.adam_steps, state.lr, state.betas) == (2560, 3, 0.002, (0.9, 0.99))
    assert list(state.averages) == [0.05, 0.1] and state.ema is state.averages[0.1]
    for i, average in enumerate(state.averages.values()):
        assert torch.equal(average["unet.out_gain"], expected["unet.out_gain"] + 0.01 * (i + 1))
    assert state.config.channels_per_head == 4 and state.config.dropout == 0.1


def test_a_training_state_alone_goes_by_its_shapes(tmp_path):
    arch = ARCHITECTURES["wide"]
    root = e2.training_state(e2.network(arch, dtype=torch.float32), stds=(0.1, 0.05, 0.0755))
    path = of.write_torch(tmp_path / "training-state-0000002.pt", root)
    checkpoint = open_checkpoint(path)
    assert checkpoint.origin == "EDM2 training state"
    assert list(checkpoint.networks) == ["net", "ema_0.100", "ema_0.050", "ema_0.0755"]
    assert checkpoint.choose() == "ema_0.100"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = checkpoint.read("ema_0.0755")
    assert (found.config.channels_per_head, found.config.model_channels, found.config.channel_mult) == (64, 64, (1, 2))
    assert checkpoint.published(found).to_json() | {"encoder": 0} == {
        "size": None, "encoder": 0, "encoder_from": "channels", "ema_std": 0.0755, "kimg": 2, "method": None,
        "published": None, "contradiction": None,
    }  # fmt: skip
    # Narrower heads than the published networks' show nowhere.
    narrow = of.write_torch(tmp_path / "training-state-0000003.pt", e2.training_state(e2.network()))
    with pytest.warns(UserWarning, match="does not say how wide its attention heads are: 8 channels are assumed"):
        assert open_checkpoint(narrow).read().config.channels_per_head == 8


def test_half_of_a_training_state(tmp_path):
    net = e2.network()
    whole = e2.training_state(net)
    half = {
        "without its optimiser": ({k: v for k, v in whole.items() if k != "optimizer"}, "no training state of a teach"),
        "fewer averages": (whole | {"ema": {"stds": [0.05, 0.1], "emas": whole["ema"]["emas"][:1]}}, "as many widths"),
        "no widths": (whole | {"ema": {"emas": whole["ema"]["emas"]}}, "as many widths"),
        "two of one width": (whole | {"ema": {**whole["ema"], "stds": [0.1, 0.1]}}, "average of width 0.1 is damaged"),
        "a width of text": (whole | {"ema": {**whole["ema"], "stds": [0.1, "x"]}}, "average of width 'x' is damaged"),
        "an average of another network": (
            whole | {"ema": {"stds": [0.1], "emas": [e2.state_dict(e2.network(IMAGES))]}},
            "ema_0.100 is not the average of net: they differ",
        ),
        "weights without a gain": (
            whole | {"net": {k: v for k, v in whole["net"].items() if k != "unet.out_gain"}},
            "it lacks the tensor unet.out_gain",
        ),
        "images of text": (whole | {"state": {"cur_nimg": "many"}}, "the number of images seen, is 'many'"),
        "moments of others": (
            whole | {"optimizer": e2.adam(e2.network(IMAGES))},
            "is not that of the network's",
        ),
    }
    for name, (root, said) in half.items():
        path = of.write_torch(tmp_path / f"{name}.pt", root)
        with pytest.raises(ValueError, match=said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read_training_state(path)
    bare = {k: v for k, v in whole.items() if k != "ema"}
    with pytest.warns(UserWarning, match="attention heads"):
        assert read_training_state(of.write_torch(tmp_path / "a.pt", bare)).ema is None


def test_a_training_state_of_sida(tmp_path):
    """Three state dicts in fp16, a student with and without a log-variance, a generator without."""
    of.write_pickle(tmp_path / "network-snapshot-1.000000-000300.pkl", e2.generator(LATENT))
    for logvar in (True, False):
        path = of.write_torch(tmp_path / "training-state-000300.pt", e2.sida_state(LATENT, logvar=logvar))
        checkpoint = open_checkpoint(path)
        assert checkpoint.origin == "training state of SiD or SiDA for EDM2"
        assert checkpoint.choose() == "G_ema_state" and checkpoint.is_generator("G_state")
        assert not checkpoint.is_generator("fake_score_state")
        state = read_distillation_state(path)
        assert (state.images_seen, state.average_key) == (300_000, "G_ema_state")
        assert (state.generator.config.logvar_channels, state.student.config.logvar_channels) == (0, 128 * logvar)
        assert state.generator.config.channels_per_head == 4
        expected = e2.tensors(e2.network(LATENT, kind="EDM_2_Precond_Generator", seed=2))
        assert all(torch.equal(value, expected[name]) for name, value in state.generator.weights.items())
        assert state.student.adam is not None and state.student.adam.betas == (0, 0.999)
        assert state.student.adam.exp_avg.keys() == {name for name in state.student.weights if not _is_buffer(name)}


def _is_buffer(name: str) -> bool:
    return name.endswith(("freqs", "phases"))


def test_a_state_dict_alone(tmp_path):
    """What torch.save(net.state_dict()) writes is a network too, as its shapes say nearly all."""
    net = e2.network(ARCHITECTURES["wide"], dtype=torch.float32)
    checkpoint = open_checkpoint(of.write_torch(tmp_path / "a.pt", e2.state_dict(net)))
    assert checkpoint.origin == "weights of EDM2's networks" and list(checkpoint.networks) == ["net"]
    assert_is(checkpoint.read(), net)
    for prefix in ("module.", "_orig_mod."):
        wrapped = {"model": {prefix + name: tensor for name, tensor in e2.tensors(net).items()}}
        assert_is(open_checkpoint(of.write_torch(tmp_path / "b.pt", wrapped)).read("model"), net)


# -- what contradicts itself ------------------------------------------------------------------------------------------


ATTRIBUTES = {
    "balance of a sum": ("unet.enc.4x4_block0", {"res_balance": 0.5}, "res_balance of 'unet.enc.4x4_block0' is 0.5"),
    "balance of attention": ("unet.dec.4x4_in0", {"attn_balance": 0.5}, "attn_balance of 'unet.dec.4x4_in0' is 0.5"),
    "a clamp": ("unet.dec.8x8_block1", {"clip_act": 255}, "clip_act of 'unet.dec.8x8_block1' is 255"),
    "no clamp": ("unet.dec.8x8_block1", {"clip_act": None}, "clip_act of 'unet.dec.8x8_block1' is inf"),
    "flavor": ("unet.enc.8x8_block0", {"flavor": "dec"}, "flavor of 'unet.enc.8x8_block0' is 'dec'"),
    "direction": ("unet.enc.4x4_down", {"resample_mode": "keep"}, "resample_mode of 'unet.enc.4x4_down' is 'keep'"),
    "filter": ("unet.enc.4x4_down", {"resample_filter": [1, 3, 3, 1]}, "resample_filter of 'unet.enc.4x4_down' is"),
    "heads": ("unet.enc.4x4_block0", {"num_heads": 1}, "num_heads of 'unet.enc.4x4_block0' is 1"),
    "balance of labels": ("unet", {"label_balance": 0.3}, "label_balance of 'unet' is 0.3"),
    "text for a balance": ("unet", {"concat_balance": "0.5"}, "concat_balance of 'unet' is '0.5'"),
    "sigma_data": ("", {"sigma_data": 1.0}, "sigma_data of the network is 1.0"),
    "rows": ("unet.out_conv", {"out_channels": 5}, "out_channels of 'unet.out_conv' is 5"),
}
KEYWORDS = {
    "width": ({"model_channels": 8}, "the widths of its levels is stated as '.8, 16.', but its tensors say '.4, 8.'"),
    "blocks": ({"num_blocks": 3}, "num_blocks is stated as '3', but its tensors say '1'"),
    "labels": ({"label_dim": 7}, "label_dim is stated as '7', but its tensors say '0'"),
    "a name nobody knows": ({"exec": "import os"}, "the argument 'exec' of a network is unknown"),
    "10^9 channels": ({"model_channels": 10**9}, "the widths of its levels"),
    "levels without end": ({"channel_mult": [1] * 100_000}, "channel_mult is no short list"),
    "text for a number": ({"num_blocks": "1"}, "num_blocks is '1'"),
    "a fraction": ({"channel_mult_emb": 2.5}, "channel_mult_emb must be a whole number"),
    "narrower heads": ({"channels_per_head": 2}, "num_heads of 'unet.enc.4x4_block0' is 2, but its arch"),
    "attention nowhere": ({"attn_resolutions": []}, "it has an unknown tensor 'unet.enc.4x4_block0.attn_qkv.weight'"),
    "a balance beyond 1": ({"res_balance": 1.5}, "res_balance must be"),
}


def contradictions() -> dict[str, tuple[of.Official, str]]:
    cases = {name: (e2.network(changes={path: changes}), said) for name, (path, changes, said) in ATTRIBUTES.items()}
    for name, (changes, said) in KEYWORDS.items():
        net = e2.network()
        net.meta["state"]["_init_kwargs"].update(changes)
        cases[name] = net, said
    return cases


def test_networks_that_contradict_themselves(tmp_path):
    for name, (net, said) in contradictions().items():
        with pytest.raises(ValueError, match=r"a\.pkl: network 'ema': ") as refused:
            snapshot(tmp_path / "a.pkl", net).read()
        assert re.search(said, str(refused.value)), (name, str(refused.value))


def test_files_of_another_kind_say_what_they_are(tmp_path):
    other = of.Official("Precond", {**of._bookkeeping(of.NEW, training=False), "_init_args": (), "_init_kwargs": {}})
    foreign = {"net": {"other.unet.out_conv.weight": torch.zeros(1)}}
    for root, said in (
        ({"ema": other}, "its tensors are not those of a U-Net of EDM2"),
        (e2.snapshot(other), "its tensors are not those of a U-Net of EDM2"),
        (foreign, "holds weights alone under 'net' .a state dict: 'other.unet.out_conv.weight'"),
        ({"encoder": e2.encoder(True)}, "no network, only 'encoder'"),
        ({"fid": {"mu": np.zeros(3), "sigma": np.zeros((3, 3))}}, "arrays of NumPy, such as a reference's"),
    ):
        with pytest.raises(ValueError, match=said):
            open_checkpoint(of.write_pickle(tmp_path / "a.pkl", root)).read()


# -- what is known of them --------------------------------------------------------------------------------------------


def network_of(size: str, channels: int = 4, classes: int = 1000, logvar: int = 128) -> NetworkConfig:
    width = next(width for width, name in SIZES.items() if name == size)
    return NetworkConfig(
        model_type="EDM2UNet",
        img_resolution=64,
        img_channels=channels,
        label_dim=classes,
        model_channels=width,
        logvar_channels=logvar,
    )


@pytest.mark.parametrize(
    ("config", "file", "size", "std", "kimg", "name"),
    [
        (network_of("S"), "edm2-img512-s-2147483-0.130.pkl", "S", 0.13, 2147483, "edm2-img512-s-2147483-0.130.pkl"),
        (network_of("XXL"), "big.pkl", "XXL", None, None, "edm2-img512-xxl-*-*.pkl"),
        (
            network_of("XS", classes=0), "edm2-img512-xs-uncond-2147483-0.045.pkl",
            "XS", 0.045, 2147483, "edm2-img512-xs-uncond-2147483-0.045.pkl",
        ),
        (
            network_of("L", 3), "network-snapshot-0671088-0.100.pkl",
            "L", 0.1, 671088, "edm2-img64-l-0671088-0.100.pkl",
        ),
        (network_of("L"), "edm2-img512-l-ddo.pkl", "L", None, None, "edm2-img512-l-ddo.pkl"),
        (network_of("XXS"), "a (1).pkl", "XXS", None, None, "edm2-img512-xxs-*-*.pkl"),
        (replace(network_of("S"), img_resolution=32), "a.pkl", "S", None, None, None),
        (replace(network_of("S"), num_blocks=2), "a.pkl", None, None, None, None),
    ],
)  # fmt: skip
def test_size_and_published_file(config, file, size, std, kimg, name):
    known = published(config, {}, Path(file))
    assert (known.size, known.std, known.kimg, known.name, known.contradiction) == (size, std, kimg, name, "")
    assert known.encoder == ("latent" if config.img_channels == 4 else "pixel")


def test_published_generators():
    config = network_of("XS", logvar=0)
    for file, kimg, method, name in (
        ("edm2_img512_xs_sid_alpha1-249360.pkl", 249360, "SiD", "edm2_img512_xs_sid_alpha1-249360.pkl"),
        ("edm2_img512_xs_sid2a_alpha1-028674.pkl", 28674, "SiD2A", "edm2_img512_xs_sid2a_alpha1-028674.pkl"),
        ("network-snapshot-1.000000-166410.pkl", 166410, None, "edm2_img512_xs_*_alpha1-166410.pkl"),
    ):
        known = published(config, {}, Path(file), generator=True)
        assert (known.kimg, known.method, known.name) == (kimg, method, name)


def test_names_that_are_not_the_networks():
    for config, file, said in (
        (network_of("M"), "edm2-img512-s-2147483-0.130.pkl", "its name says size S, its widths are those of M"),
        (network_of("S", classes=0), "edm2-img512-s-2147483-0.130.pkl", "says conditional, and it is unconditional"),
        (network_of("S", 3), "edm2-img512-s-2147483-0.130.pkl", "its name says img512, and its images have 3 channels"),
        (replace(network_of("S"), num_blocks=1), "edm2-img512-s-2147483-0.130.pkl", "which it is not by its shape"),
    ):
        assert said in published(config, {}, Path(file)).contradiction
