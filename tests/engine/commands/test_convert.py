"""ipfm convert: what it writes, what it says, and what it refuses."""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import official_edm2 as oe
import official_files as of
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ipfm.engine.commands.convert import Convert
from ipfm.engine.memory.live import LiveBytes
from ipfm.engine.runtime.commandline import BadInput, parse
from ipfm.engine.sampling.batches import sample_generator
from ipfm.engine.sampling.stored_model import sample_model
from ipfm.models import NetworkConfig, build_network, load_model, load_teacher, read_config

SMALL = NetworkConfig(
    img_resolution=8, img_channels=1, model_channels=8, channel_mult=(1, 1), num_blocks=1, label_dim=3, dropout=0.1
)


@pytest.fixture
def net() -> nn.Module:
    return of.randomize(build_network(SMALL))


def test_a_teacher(net, tmp_path, capsys):
    root = of.pfgmpp_state(of.shifted(net, 1), net, step=5, pfgmpp=True, D=2048)
    source = of.write_torch(tmp_path / "training-state-000001.pt", root)
    Convert(source=source, out=tmp_path / "teacher").run()
    stored = read_config(tmp_path / "teacher")
    assert stored.network == replace(SMALL, D=2048) and stored.dtype == torch.float32
    assert stored.extra == {
        "task": "teacher",
        "D": 2048.0,
        "source": {
            "file": "training-state-000001.pt",
            "format": "PFGM++ training state",
            "network": "ema",
            "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
            "D": "file",
        },
    }
    expected = net.state_dict()
    written = load_model(tmp_path / "teacher").state_dict()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert {name: value.strip() for name, value in lines.items()} == {
        "file": "PFGM++ training state (torch.save zip)",
        "networks": "ema, net",
        "taken": "ema",
        "architecture": "EDMPrecond, SongUNet, 1×8×8, 3 classes, 8 channels × (1, 1)",
        "D": "2048 (says the file)",
        "parameters": f"{sum(p.numel() for p in net.parameters()):,}",
        "written": str(tmp_path / "teacher"),
    }


def test_D_and_network_by_option(net, tmp_path, capsys):
    source = of.write_pickle(tmp_path / "a.pkl", {"ema": of.official(net), "net": of.official(of.shifted(net, 1))})
    Convert(source=source, out=tmp_path / "a").run()
    assert math.inf == read_config(tmp_path / "a").network.D
    assert "inf (assumed: neither the file nor --D says it)" in capsys.readouterr().out
    Convert(source=source, out=tmp_path / "a", json=True).run()
    told = json.loads(capsys.readouterr().out)
    assert (told["D"], told["task"], told["out"]) == ("inf", "teacher", str(tmp_path / "a"))
    assert told["networks"] == ["ema", "net"] and told["source"]["D"] == "assumed"
    assert told["parameters"] == sum(p.numel() for p in net.parameters())
    assert told["network"] == read_config(tmp_path / "a").network.to_json()
    Convert(source=source, out=tmp_path / "a", D=128, network="net").run()
    assert "128 (as given)" in capsys.readouterr().out
    facts = read_config(tmp_path / "a")
    assert facts.network.D == 128 and facts.extra["source"]["network"] == "net"
    assert torch.equal(load_teacher(tmp_path / "a").model.map_layer0.weight, net.model.map_layer0.weight + 1)


@pytest.mark.parametrize("kind", ["snapshot", "state"])
def test_a_generator_is_sampled_as_one(net, kind, tmp_path):
    """SiD's generator makes its images in one evaluation, at the noise level given."""
    if kind == "snapshot":
        source, options = of.write_pickle(tmp_path / "a.pkl", {"ema": of.official(net)}), {"generator": True}
    else:
        source, options = of.write_torch(tmp_path / "a.pt", of.sid_state(of.shifted(net, -2))), {}
    Convert(source=source, out=tmp_path / "g", sigmas=(2.5,), D=64, **options).run()
    extra = read_config(tmp_path / "g").extra
    assert (extra["task"], extra["sigmas"], extra["D"]) == ("generator", [2.5], 64.0)
    images = sample_model(tmp_path / "g", torch.device("cpu"), heun_steps=18, seed=3).draw(0, 4)
    net_written = load_model(tmp_path / "g")
    assert torch.equal(images, sample_generator(net_written, 0, 4, D=64.0, sigmas=(2.5,), seed=3))
    # The generator of the state is off by the writer's shift of -2 + 2: equal up to rounding.
    for p, q in zip(net_written.parameters(), net.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)


def test_bad_input_is_one_line_and_writes_nothing(net, tmp_path):
    source = of.write_torch(tmp_path / "a.pt", of.sid_state(net))
    snapshot = of.write_pickle(tmp_path / "a.pkl", of.edm_snapshot(net, pfgmpp=True, D=128))
    (tmp_path / "text").write_text("text")
    before = sorted(tmp_path.iterdir())

    def refused(message: str, file: Path, **options) -> None:
        with pytest.raises(BadInput, match=message) as caught:
            Convert(source=file, out=tmp_path / "out", **options).run()
        assert str(caught.value).isprintable()
        assert sorted(tmp_path.iterdir()) == before

    refused(r"a.pt: G_ema is a generator; give its noise levels with --sigmas \(2.5 for SiD's\)", source)
    refused(r"a.pkl: ema is a generator; give its noise levels with --sigmas [^;]*$", snapshot, generator=True)
    refused(r"sigmas are a generator's; give --generator if ema of .*a.pkl is one", snapshot, sigmas=(2.5,))
    refused(r"sigmas must fall strictly, got 1, 2", source, sigmas=(1.0, 2.0))
    refused(r"a.pt has no network 'ema'; possible: 'fake_score', 'G', 'G_ema'", source, network="ema")
    refused(r"a.pkl was trained for D = 128, but D = 64 was asked for", snapshot, D=64)
    refused(r"D must be a number above 0, or inf for diffusion, got -1", snapshot, D=-1)
    refused(r"none.pkl does not exist", tmp_path / "none.pkl")
    refused(r"text: neither a pickle nor a torch.save file: it begins with b'text'", tmp_path / "text")
    refused(r"is a folder; a checkpoint is a file", tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("kept")
    before = sorted(tmp_path.iterdir())
    refused(r"holds 'notes.txt', which storing a network there would delete", snapshot)


def test_the_command_line(tmp_path):
    command = parse(
        Convert, ["a.pkl", "out", "--D", "inf", "--network", "G", "--sigmas", "80", "2.5"], prog="ipfm", description=""
    )
    assert command == Convert(
        source=Path("a.pkl"), out=Path("out"), D=math.inf, network="G", sigmas=(80.0, 2.5)
    )  # fmt: skip
    with pytest.raises(BadInput, match="OUT"):
        parse(Convert, ["a.pkl"], prog="ipfm", description="")


def test_a_large_file_is_in_memory_once_and_its_weights_are_stored_as_they_are(tmp_path):
    """EDM2's weights of 16 bits, raised: no network is made of them, whose masters would be another copy."""
    official = oe.network(oe.Edm2(model_channels=32, channels_per_head=32))
    source = of.write_pickle(tmp_path / "edm2-img512-xs-2147483-0.135.pkl", oe.snapshot(official))
    expected = oe.tensors(official)
    with LiveBytes() as live:
        Convert(source=source, out=tmp_path / "teacher").run()
    raised = sum(tensor.nbytes for tensor in expected.values())
    # Once more is counted: of the network on the meta device, where nothing is allocated.
    assert raised > 1e6 and live.peak < 2.1 * raised
    written = load_file(tmp_path / "teacher" / "model.safetensors")
    assert all(torch.equal(written[name], value) for name, value in expected.items())
