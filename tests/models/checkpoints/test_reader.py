"""Checkpoints of EDM, PFGM++, SiD and their descendants: what is read, and what contradicts itself."""

import math
import os
import pickletools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import official_files as of
import pytest
import torch
from torch import nn

from ipfm.models import NetworkConfig, build_network, load_model
from ipfm.models.checkpoints.pickled_objects import Record, modules
from ipfm.models.checkpoints.reader import Checkpoint, ImportedNetwork, open_checkpoint, parse_checkpoint
from ipfm.models.teacher import build

FIXTURES = Path(__file__).parents[2] / "fixtures"
NAMES = ("edm_ddpmpp_uncond", "edm_ncsnpp_uncond")
SMALL = NetworkConfig(
    img_resolution=8,
    img_channels=1,
    model_channels=8,
    channel_mult=(1, 2),
    num_blocks=1,
    attn_resolutions=(4,),
    dropout=0.13,
)
NCSNPP = replace(
    SMALL,
    img_channels=3,
    label_dim=5,
    augment_dim=9,
    embedding_type="fourier",
    encoder_type="residual",
    channel_mult_noise=2,
    resample_filter=(1, 3, 3, 1),
    label_dropout=0.1,
    use_fp16=True,
)
SKIP = replace(SMALL, encoder_type="skip", decoder_type="skip", channel_mult=(1, 1, 2), channel_mult_emb=2)
ADM = NetworkConfig(
    img_resolution=8,
    img_channels=3,
    model_type="DhariwalUNet",
    label_dim=4,
    augment_dim=2,
    model_channels=32,
    channel_mult=(1, 2),
    num_blocks=1,
    attn_resolutions=(4,),
)
IDDPM = replace(ADM, precond="iDDPMPrecond", M=50, sigma_min=None, sigma_max=None)
CONFIGS = {
    "ddpmpp": SMALL,
    "ncsnpp": NCSNPP,
    "skip": SKIP,
    "adm": ADM,
    "adm-no-blocks": replace(ADM, num_blocks=0),
    "ncsnpp-no-blocks": replace(NCSNPP, num_blocks=0),
    "one-level": replace(SMALL, channel_mult=(1,), attn_resolutions=()),
    "edm-options": replace(SMALL, sigma_data=0.7, sigma_min=0.01, sigma_max=90.0),
    "vp": replace(SMALL, precond="VPPrecond", beta_d=15.0, epsilon_t=1e-4, sigma_min=None, sigma_max=None),
    "ve": replace(SMALL, precond="VEPrecond", sigma_min=0.03, sigma_max=50.0),
    "iddpm": IDDPM,
    "iddpm-song": replace(SMALL, precond="iDDPMPrecond", M=20, C_2=0.01, sigma_min=None, sigma_max=None),
}


def network(config: NetworkConfig, seed: int = 0) -> nn.Module:
    return of.randomize(build_network(config), seed)


def written(path: Path, root: Any, style: of.Style = of.NEW) -> Checkpoint:
    return open_checkpoint(of.write_pickle(path, root, style))


def assert_is(imported: ImportedNetwork, net: nn.Module) -> None:
    expected = net.state_dict()
    assert list(imported.weights) == list(expected)
    for name, tensor in imported.weights.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
    assert list(imported.parameters) == [name for name, _ in net.named_parameters()]


@pytest.mark.quick
@pytest.mark.parametrize("name", NAMES)
def test_recorded_checkpoints(name):
    """The files that EDM's own code wrote are the networks stored beside them, and compute what EDM's code computed."""
    checkpoint = open_checkpoint(FIXTURES / f"{name}.pkl")
    assert checkpoint.origin == "EDM network snapshot" and checkpoint.container == "pickle"
    assert list(checkpoint.networks) == ["ema"]
    imported, stored = checkpoint.read(), load_model(FIXTURES / name)
    assert (imported.key, imported.class_name, imported.D_source) == ("ema", "EDMPrecond", "assumed")
    assert imported.config == stored.config
    assert_is(imported, stored)
    net = build(imported)
    with np.load(FIXTURES / f"{name}.npz") as data, torch.no_grad():
        augment = torch.from_numpy(data["augment_labels"]) if "augment_labels" in data else None
        d = net(torch.from_numpy(data["x"]), torch.from_numpy(data["sigma"]), augment_labels=augment)
        assert float((d - torch.from_numpy(data["D"])).abs().max()) <= 1e-5


def globals_of(data: bytes) -> set[str]:
    names: set[str] = set()
    texts: list[str] = []
    memo: list[object] = []
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "STACK_GLOBAL":
            names.add(".".join(texts[-2:]))
        elif "UNICODE" in opcode.name:
            texts.append(argument)
        elif opcode.name == "MEMOIZE":
            memo.append(texts[-1] if texts else None)
        elif "BINGET" in opcode.name and isinstance(memo[argument], str):
            texts.append(memo[argument])
    return names


@pytest.mark.parametrize(("name", "style"), [(NAMES[0], of.NEW), (NAMES[1], of.OLD)], ids=NAMES)
def test_the_tests_writer_writes_what_was_recorded(name, style, tmp_path):
    """Same globals, same attributes of every part in the same order: what the other tests read is the real layout."""
    recorded = (FIXTURES / f"{name}.pkl").read_bytes()
    path = of.write_pickle(tmp_path / "a.pkl", of.edm_snapshot(load_model(FIXTURES / name), style, source=""), style)
    assert globals_of(path.read_bytes()) == globals_of(recorded)
    ours, theirs = (parse_checkpoint(data, where="x") for data in (path.read_bytes(), recorded))
    assert list(ours.entries) == list(theirs.entries)
    parts = [dict(modules(checkpoint.networks["ema"])) for checkpoint in (ours, theirs)]
    assert list(parts[0]) == list(parts[1])
    for path, part in parts[0].items():
        other = parts[1][path]
        assert part.class_name == other.class_name
        assert list(part.state) == list(other.state), path
        for key, value in part.state.items():
            if isinstance(value, dict):
                is_layer = key == "_init_kwargs" and path not in ("", "model")
                assert is_layer or set(value) == set(other.mapping(key)), (path, key)
            else:
                assert value == other.state[key], (path, key)


@pytest.mark.parametrize("style", [of.NEW, of.OLD], ids=["new", "old"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture(name, style, tmp_path):
    """With the constructor's arguments, and by shapes and attributes alone."""
    net = network(CONFIGS[name])
    expected = replace(CONFIGS[name], D=math.inf)
    for with_keywords in (True, False):
        root = of.edm_snapshot(net, style, with_keywords=with_keywords)
        imported = written(tmp_path / "a.pkl", root, style).read()
        assert imported.config == expected
        assert imported.class_name == CONFIGS[name].precond
        assert_is(imported, net)


def test_arguments_left_at_their_defaults(tmp_path):
    """A file does not state what its class has by default."""
    net = network(NetworkConfig(img_resolution=16, img_channels=1, model_channels=8, channel_mult=(1, 1)))
    root = of.edm_snapshot(net)
    arguments = root["ema"].meta["state"]["_init_kwargs"]
    assert not {"num_blocks", "attn_resolutions", "channel_mult_emb", "sigma_data"} & set(arguments)
    for name in ("dropout", "embedding_type", "encoder_type", "decoder_type", "resample_filter", "label_dim"):
        del arguments[name]
    assert written(tmp_path / "a.pkl", root).read().config == net.config
    del root["ema"].meta["state"]["_init_kwargs"]["model_type"]
    with pytest.raises(ValueError, match="model_type is stated as 'DhariwalUNet', but its tensors"):
        written(tmp_path / "b.pkl", root).read()
    root = of.edm_snapshot(network(replace(ADM, dropout=0.1)))
    for name in ("model_type", "use_fp16", "dropout"):
        del root["ema"].meta["state"]["_init_kwargs"][name]
    assert written(tmp_path / "c.pkl", root).read().config == replace(ADM, dropout=0.1)


LAYOUTS: dict[str, tuple[str, Callable[[nn.Module], dict[str, Any]], list[str], str]] = {
    "EDM network snapshot": ("pkl", of.edm_snapshot, ["ema"], "ema"),
    "network snapshot of EDM or SiD": ("pkl", lambda net: {"ema": of.official(net)}, ["ema"], "ema"),
    "EDM training state": ("pt", of.edm_state, ["net"], "net"),
    "PFGM++ training state": ("pt", lambda net: of.pfgmpp_state(net, net, step=7), ["ema", "net"], "ema"),
    "PFGM++ training state, pickled again": (
        "pkl",
        lambda net: of.pfgmpp_state(net, net, step=7),
        ["ema", "net"],
        "ema",
    ),
    "training state of SiD": ("pt", of.sid_state, list(of.IDMD[:3]), "G_ema"),
    "training state of pfgmpp-idmd": ("pt", lambda net: of.sid_state(net, of.IDMD), list(of.IDMD), "G_ema"),
    "snapshot of pfgmpp-distillation": (
        "pkl",
        of.distillation_snapshot,
        ["generator", "student", "ema_0_9900", "ema_0_9990", "ema_0_9950"],
        "ema_0_9990",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout, tmp_path):
    kind, make, names, chosen = LAYOUTS[layout]
    net = network(SMALL)
    write = of.write_pickle if kind == "pkl" else of.write_torch
    checkpoint = open_checkpoint(write(tmp_path / f"a.{kind}", make(net)))
    assert checkpoint.origin == layout
    assert checkpoint.container == ("pickle" if kind == "pkl" else "torch.save zip")
    assert list(checkpoint.networks) == names and checkpoint.choose() == chosen
    for i, name in enumerate(names):
        imported = checkpoint.read(name)
        assert imported.key == name and imported.config == SMALL
        # The writer adds i to the weights of network i of a distillation.
        assert_is(imported, of.shifted(net, i) if "generator" in names or "G" in names else net)
    generators = [name for name in names if checkpoint.is_generator(name)]
    assert generators == [
        name for name in names if name.startswith("G") or (name in names and "generator" in names and name != "student")
    ]


def test_all_containers_hold_the_same(tmp_path):
    net = network(NCSNPP)
    root = of.pfgmpp_state(net, of.shifted(net, 1), step=3, pfgmpp=True, D=128)
    read = [
        open_checkpoint(of.write_pickle(tmp_path / "a", root)),
        open_checkpoint(of.write_torch(tmp_path / "b", root)),
        open_checkpoint(of.write_torch(tmp_path / "c", root, of.OLD)),
        open_checkpoint(of.write_torch(tmp_path / "d", root, older_format=True)),
    ]
    assert [c.container for c in read] == ["pickle", "torch.save zip", "torch.save zip", "older torch.save"]
    for checkpoint in read:
        assert_is(checkpoint.read("net"), net)
        assert checkpoint.read("net").config == replace(NCSNPP, D=128)
        assert checkpoint.entries["step"] == 3


def test_choosing_a_network(tmp_path):
    net = network(SMALL)
    path = of.write_torch(tmp_path / "state.pt", of.sid_state(net, of.IDMD))
    checkpoint = open_checkpoint(path)
    with pytest.raises(ValueError) as caught:
        checkpoint.read("ema")
    listed = ", ".join(f"'{name}'" for name in of.IDMD)
    assert str(caught.value) == f"{path} has no network 'ema'; possible: {listed}"
    for names, chosen in ((("fake_score", "G"), "G"), (("net", "G"), "net"), (("x", "generator"), "generator")):
        assert written(tmp_path / "a.pkl", {name: of.official(net) for name in names}).choose() == chosen
    averages = {f"ema_0_{digits}": of.official(net) for digits in ("9999", "99", "999")}
    assert written(tmp_path / "a.pkl", averages).choose() == "ema_0_9999"
    with pytest.raises(ValueError, match=r"a.pkl has several networks; choose one: 'x', 'fake_score'"):
        written(tmp_path / "a.pkl", {"x": of.official(net), "fake_score": of.official(net)}).read()


@pytest.mark.parametrize("precond", ["EDMPrecond", "VEPrecond"])
def test_D_of_the_file(precond, tmp_path):
    net = network(replace(SMALL, precond=precond, sigma_min=None, sigma_max=None))
    finite = written(tmp_path / "a.pkl", of.edm_snapshot(net, pfgmpp=True, D=2048))
    for D in (None, 2048, 2048.0):
        imported = finite.read(D=D)
        assert (imported.config.D, imported.D_source) == (2048.0, "file")
    with pytest.raises(ValueError, match=r"a.pkl was trained for D = 2048, but D = inf was asked for"):
        finite.read(D=math.inf)
    infinite = written(tmp_path / "b.pkl", of.edm_snapshot(net, pfgmpp=False, D=128))
    assert (infinite.read().config.D, infinite.read().D_source) == (math.inf, "file")
    with pytest.raises(ValueError, match=r"b.pkl was trained for D = inf, but D = 128 was asked for"):
        infinite.read(D=128)
    silent = written(tmp_path / "c.pkl", of.edm_snapshot(net))
    assert (silent.read().config.D, silent.read().D_source) == (math.inf, "assumed")
    assert (silent.read(D=64).config.D, silent.read(D=64).D_source) == (64.0, "caller")
    for bad in (0, -1, math.nan):
        with pytest.raises(ValueError, match="D must be a number above 0"):
            silent.read(D=bad)


def test_D_that_the_file_states_twice(tmp_path):
    root = of.edm_snapshot(network(SMALL), pfgmpp=True, D=128)
    state = root["ema"].meta["state"]
    state["_init_kwargs"]["D"] = 64
    with pytest.raises(ValueError, match="network 'ema': it states two values of D: 64, 128"):
        written(tmp_path / "a.pkl", root).read()
    state["_init_kwargs"] |= {"D": 128, "pfgmpp": False}
    with pytest.raises(ValueError, match="it states two values of D: 128, inf"):
        written(tmp_path / "a.pkl", root).read()
    # Left at the class's default, D stands among the attributes only.
    state["_init_kwargs"] = {**state["_init_kwargs"], "pfgmpp": True}
    del state["_init_kwargs"]["D"]
    assert written(tmp_path / "a.pkl", root).read().config.D == 128


def test_training_only_settings_are_taken_as_they_are(tmp_path):
    """Dropout may be changed for a network in use; half precision is the attribute's, which is what computes."""
    root = of.edm_snapshot(network(SMALL).train(), changes={"": {"use_fp16": True}, "model": {"training": True}})
    imported = written(tmp_path / "a.pkl", root).read()
    assert imported.config == replace(SMALL, use_fp16=True)
    assert not build(imported).training


def test_half_precision_weights_are_widened(tmp_path):
    net = network(SMALL)
    for dtype in (torch.float16, torch.bfloat16):
        root = of.edm_snapshot(build_network(SMALL).to(dtype))
        weights = written(tmp_path / "a.pkl", root).read().weights
        assert all(tensor.dtype == torch.float32 for tensor in weights.values())
        name = "model.map_layer0.weight"
        assert torch.equal(
            weights[name].to(dtype),
            root["ema"]
            .meta["state"]["_modules"]["model"]
            .meta["state"]["_modules"]["map_layer0"]
            .meta["state"]["_parameters"]["weight"],
        )
    with pytest.raises(ValueError, match=r"model.map_layer0.weight is torch.float64; possible: float32"):
        written(tmp_path / "a.pkl", of.edm_snapshot(net.double())).read()


def test_tensors_that_share_a_storage_and_strides(tmp_path):
    """Views of one larger storage, channels last and transposed, come as the values they show."""
    net = network(SMALL)
    layer, conv = net.model.map_layer0, net.model.enc["8x8_conv"]
    pool = torch.zeros(1000)
    pool[10:266] = layer.weight.detach().t().flatten()
    pool[300:332] = layer.bias.detach()
    expected = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    layer.weight = nn.Parameter(pool[10:266].view(8, 32).t())
    layer.bias = nn.Parameter(pool[300:332])
    conv.weight = nn.Parameter(
        conv.weight.detach().repeat(1, 2, 1, 1)[:, :1].contiguous(memory_format=torch.channels_last)
    )
    for path in (
        of.write_torch(tmp_path / "a.pt", of.edm_state(net)),
        of.write_pickle(tmp_path / "a.pkl", of.edm_snapshot(net)),
    ):
        weights = open_checkpoint(path).read().weights
        assert all(
            torch.equal(weights[name], tensor) and weights[name].is_contiguous() for name, tensor in expected.items()
        )


def test_many_tensors_of_one_storage_cost_no_more_than_the_file(tmp_path):
    """Elements may be shared by views, but not multiplied: the copies would outgrow the file without bound."""
    config = replace(SMALL, num_blocks=40)
    net = network(config)
    shared: dict[tuple[int, ...], nn.Parameter] = {}
    for module in net.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                module._parameters[name] = shared.setdefault(tuple(p.shape), p)
    path = of.write_torch(tmp_path / "a.pt", {"net": of.official(net)})
    with pytest.raises(ValueError, match=r"network 'net': its tensors need more than the \d+ bytes of the file"):
        open_checkpoint(path).read()


def test_nothing_is_read_before_it_is_needed(tmp_path):
    """A damaged network does not keep another one of the file from being read."""
    net = network(SMALL)
    root = of.sid_state(net)
    part = root["fake_score"].meta["state"]["_modules"]["model"].meta["state"]["_modules"]["map_layer0"]
    part.meta["state"]["_parameters"]["bias"] = nn.Parameter(torch.full((32,), math.nan))
    checkpoint = open_checkpoint(of.write_torch(tmp_path / "a.pt", root))
    assert_is(checkpoint.read("G"), of.shifted(net, 1))
    with pytest.raises(
        ValueError, match=r"network 'fake_score': model.map_layer0.bias holds values that are not finite"
    ):
        checkpoint.read("fake_score")


def test_a_file_that_is_cut_short_after_it_was_opened(tmp_path):
    """Bytes behind the end of a mapped file end the process with SIGBUS."""
    checkpoint = open_checkpoint(of.write_pickle(tmp_path / "x.pkl", of.edm_snapshot(network(SMALL))))
    os.truncate(tmp_path / "x.pkl", 4096)
    with pytest.raises(ValueError, match="the file was cut short while it was read"):
        checkpoint.read()


def test_buffers_that_follow_from_the_architecture(tmp_path):
    net = network(IDDPM)
    net.u[3] *= 1.01
    with pytest.raises(ValueError, match="u holds other noise levels than those of M, C_1 and C_2"):
        written(tmp_path / "a.pkl", of.edm_snapshot(net)).read()
    net = network(SMALL)
    net.model.enc["4x4_down"].conv0.resample_filter[0, 0, 0, 0] = 0.26
    with pytest.raises(ValueError, match=r"4x4_down.conv0.resample_filter is not the filter of the taps \[1.0, 1.0\]"):
        written(tmp_path / "a.pkl", of.edm_snapshot(net)).read()


def test_other_objects_of_a_file_are_plain_records(tmp_path):
    root = of.edm_snapshot(network(SMALL))
    root["loss_fn"] = of.Official("EDMLoss", {"opts": of.EasyDict(sigma_min=0.002), "P_mean": -1.2})
    checkpoint = written(tmp_path / "a.pkl", root)
    loss = checkpoint.entries["loss_fn"]
    assert isinstance(loss, Record) and not loss.is_module
    assert loss.state["opts"] == {"sigma_min": 0.002}
    assert checkpoint.read().config == SMALL


def test_a_path_in_a_message_stays_on_one_line(tmp_path):
    path = tmp_path / "a\nb\x1b.pkl"
    path.write_bytes(b"text")
    for bad in (path, tmp_path / "none\n.pkl"):
        with pytest.raises(ValueError) as caught:
            open_checkpoint(bad)
        assert str(caught.value).isprintable()
