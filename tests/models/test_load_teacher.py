"""load_teacher: every kind of file gives a frozen network, and the same one."""

import math
import os
from pathlib import Path

import official_files as of
import pytest
import torch

from ipfm.models import EDMPrecond, NetworkConfig, build_network, load_model, load_teacher, presets, save_model
from ipfm.models.teacher import load_network

FIXTURES = Path(__file__).parents[1] / "fixtures"
SMALL = NetworkConfig(
    img_resolution=8, img_channels=1, model_channels=8, channel_mult=(1, 1), num_blocks=1, dropout=0.1, D=128
)


@pytest.fixture
def net() -> EDMPrecond:
    made = of.randomize(build_network(SMALL))
    assert isinstance(made, EDMPrecond)
    return made


@pytest.fixture
def stored(net, tmp_path) -> Path:
    save_model(net, tmp_path / "net", extra={"alpha": 1.0})
    return tmp_path / "net"


def test_a_folder_is_frozen_and_its_D_is_checked(stored):
    for D in (None, 128, 128.0):
        teacher = load_teacher(stored, D=D)
        assert not teacher.training and teacher.config.D == 128
        assert not any(p.requires_grad for p in teacher.parameters())
    with pytest.raises(ValueError, match=r"net was trained for D = 128, but D = inf was asked for"):
        load_teacher(stored, D=math.inf)
    for bad in (0, -3, math.nan):
        with pytest.raises(ValueError, match="D must be a number above 0"):
            load_teacher(stored, D=bad)
    with pytest.raises(ValueError, match=r"net holds one network, from which none can be chosen, but 'ema' was"):
        load_teacher(stored, network="ema")


def test_every_file_gives_the_same_frozen_network(net, stored, tmp_path):
    root = of.pfgmpp_state(of.shifted(net, 1).train(), net.train(), step=1, pfgmpp=True, D=128)
    files = [
        stored,
        str(of.write_pickle(tmp_path / "a.pkl", root)),
        of.write_torch(tmp_path / "a.pt", root),
        of.write_torch(tmp_path / "b.pt", root, of.OLD, older_format=True),
    ]
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    results = []
    for file in files:
        teacher = load_teacher(file, D=128)
        assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
        assert teacher.config == SMALL
        assert {p.device.type for p in teacher.parameters()} == {"cpu"}
        results.append(teacher(x, 1.5))
        with pytest.raises(ValueError, match="was trained for D = 128, but D = 64 was asked for"):
            load_teacher(file, D=64)
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_teacher_owns_its_weights(net, tmp_path):
    """The file may be replaced, and the weights changed, once it is read."""
    path = of.write_pickle(tmp_path / "a.pkl", of.edm_snapshot(net))
    teacher = load_teacher(path)
    path.write_bytes(b"")
    with torch.no_grad():
        for p, q in zip(teacher.parameters(), net.parameters(), strict=True):
            assert torch.equal(p, q)
            p.zero_()


def test_choosing_a_network_and_D(net, tmp_path):
    path = of.write_torch(tmp_path / "a.pt", of.sid_state(net))
    assert load_network(path, D=2048).D == 2048 and math.inf == load_network(path).D
    averaged, trained = load_network(path), load_network(path, network="G")
    expected = of.shifted(net, 1).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained.state_dict().items())
    assert not torch.equal(averaged.model.map_layer0.weight, trained.model.map_layer0.weight)
    with pytest.raises(ValueError, match=r"a.pt has no network 'ema'; possible: 'fake_score', 'G', 'G_ema'"):
        load_teacher(path, network="ema")


@pytest.mark.parametrize("name", ["edm_ddpmpp_uncond", "edm_ncsnpp_uncond"])
def test_a_recorded_checkpoint_equals_its_folder(name):
    checkpoint, folder = load_teacher(FIXTURES / f"{name}.pkl"), load_teacher(FIXTURES / name)
    assert checkpoint.config == folder.config
    expected = folder.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in checkpoint.state_dict().items())


def test_what_is_no_network(stored, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere does not exist; what can be read"):
        load_teacher(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"is no model: it holds the model folder 'net': give that"):
        load_teacher(tmp_path)
    (tmp_path / "teacher.pkl").write_bytes(b"\x80\x04N.")
    with pytest.raises(
        ValueError, match=r"teacher.pkl holds None instead of named networks; what can be read: a check"
    ):
        load_teacher(tmp_path / "teacher.pkl")
    (stored / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"net has no model.safetensors"):
        load_teacher(stored)
    with pytest.raises(ValueError, match=r"config.json: neither a pickle nor a torch.save file: it is a JSON text"):
        load_teacher(stored / "config.json")


def test_paths_are_read_as_a_shell_reads_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    net = EDMPrecond(presets.get("digits", D=128.0))
    save_model(net, "~/net")
    assert sorted(os.listdir(tmp_path)) == ["net"]
    assert load_teacher("~/net").config == load_model("~/net").config == net.config
    for load in (load_teacher, load_model):
        with pytest.raises(ValueError, match="a path is empty"):
            load("")
    with pytest.raises(ValueError, match=r"config\.json is a file; .*; load_teacher and load_network read checkpoints"):
        load_model("~/net/config.json")
