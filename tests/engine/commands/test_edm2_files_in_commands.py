"""Commands on the files of EDM2's family: info, convert, sample, and export --format edm, which writes one again."""

from __future__ import annotations

import json
import pickletools
from pathlib import Path

import numpy as np
import official_edm2 as e2
import official_files as of
import pytest
import torch

from ipfm.engine import load_sampler
from ipfm.engine.commands.export.model_card import Origin, model_card
from ipfm.engine.commands.export.network import open_network
from ipfm.engine.commands.main import _main
from ipfm.engine.runtime.commandline import run_command
from ipfm.models import load_model, load_teacher, read_config
from ipfm.models.checkpoints.class_source import class_source
from ipfm.models.checkpoints.named_networks import contents
from ipfm.models.checkpoints.reader import open_checkpoint
from ipfm.models.teacher import load_network

FIXTURES = Path(__file__).parents[2] / "fixtures"
LATENT, IMAGES = FIXTURES / "edm2_latent_uncond.pkl", FIXTURES / "edm2_img_cond.pkl"


def ipfm(*arguments: object) -> None:
    run_command("ipfm", _main, [str(argument) for argument in arguments])


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    capsys.readouterr()
    ipfm(*arguments, "--json")
    found: dict = json.loads(capsys.readouterr().out)
    return found


def lines(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, str]:
    capsys.readouterr()
    ipfm(*arguments)
    parted = [line.split("  ", 1) for line in capsys.readouterr().out.splitlines()]
    return {name: value.strip() for name, value in parted}


def test_info_of_a_snapshot(tmp_path, capsys):
    """What the file says, its name says, and how it is stored; as text and as JSON."""
    place = tmp_path / "network-snapshot-0134217-0.100.pkl"
    place.symlink_to(LATENT)
    found = told(capsys, "info", place)
    assert (found["kind"], found["architecture"], found["classes"]) == ("teacher", "EDM2", 0)
    assert found["file"] == {
        "format": "EDM2 network snapshot", "networks": "ema", "taken": "ema", "D from": "assumed", "generator": None,
        "dtype": "float16",
    }  # fmt: skip
    assert found["edm2"] == {
        "size": None, "encoder": "latent", "encoder_from": "file", "ema_std": 0.1, "kimg": 134217, "method": None,
        "published": None, "contradiction": None,
    }  # fmt: skip
    text = lines(capsys, "info", place)
    assert text["architecture"] == "EDM2, 4, 8 channels, 1 block a level"
    assert (text["takes"], text["average"]) == ("latents of 64x64 pixels", "EMA of width 0.1 at 134,217 kimg")
    assert text["format"] == "EDM2 network snapshot, float16" and "published" not in text
    assert lines(capsys, "info", IMAGES)["takes"] == "pixels"


def test_info_of_a_generator_and_of_a_training_state(tmp_path, capsys):
    made = of.write_pickle(tmp_path / "edm2_img512_s_sida_alpha1-117764.pkl", e2.generator(hooks="same"))
    text = lines(capsys, "info", made)
    assert text["kind"].startswith("generator, by its class EDM_2_Precond_Generator")
    assert text["published"] == "its name is a published network's, which it is not by its shape"
    assert text["trained"] == "117,764 kimg"
    net = e2.network(dtype=torch.float32)
    of.write_pickle(tmp_path / "network-snapshot-0000002-0.050.pkl", e2.snapshot(net))
    state = of.write_torch(tmp_path / "training-state-0000002.pt", e2.training_state(net))
    text = lines(capsys, "info", state)
    assert text["networks"] == "net, ema_0.050, ema_0.100; taken: ema_0.100"
    assert text["training"] == "3 steps, 2,048 images, lr 0.002"
    assert text["takes"] == "latents of 64x64 pixels, by its channels: no encoder is in the file"


@pytest.mark.parametrize("file", [LATENT, IMAGES], ids=["latent", "images"])
def test_convert_keeps_what_the_network_computes(file, tmp_path, capsys):
    found = told(capsys, "convert", file, tmp_path / "teacher")
    assert found["source"]["encoder"] == ("latent" if file is LATENT else "pixel")
    assert read_config(tmp_path / "teacher").network.to_json() == found["network"]
    own, back = load_teacher(file), load_model(tmp_path / "teacher")
    assert own.facts is not None and own.facts.source["encoder"] == found["source"]["encoder"]
    with np.load(file.with_suffix(".npz")) as data, torch.no_grad():
        x, sigma = torch.from_numpy(data["x"]), torch.from_numpy(data["sigma"])
        labels = torch.from_numpy(data["class_labels"]) if "class_labels" in data else None
        difference = (own(x, sigma, labels) - back(x, sigma, labels)).abs().max()
        assert float(difference) <= 2e-6 * np.abs(data["D"]).max()
        assert (
            float((back(x, sigma, labels) - torch.from_numpy(data["D"])).abs().max()) <= 4e-6 * np.abs(data["D"]).max()
        )
    assert "float16, raised to float32" in _text(capsys, "convert", file, tmp_path / "teacher")


def _text(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    ipfm(*arguments)
    return capsys.readouterr().out


def test_a_generator_is_converted_and_drawn_from(tmp_path, capsys):
    made = of.write_pickle(tmp_path / "network-snapshot-1.000000-000002.pkl", e2.generator(hooks="same"))
    with pytest.raises(SystemExit):
        ipfm("convert", made, tmp_path / "g")
    assert "give its noise levels with --sigmas (2.5 for SiD's)" in capsys.readouterr().err
    found = told(capsys, "convert", made, tmp_path / "g", "--sigmas", "2.5")
    assert (found["task"], found["sigmas"], found["source"]["kimg"]) == ("generator", [2.5], "2")
    net = load_model(tmp_path / "g")
    assert net.config.logvar_channels == 0 and not any("logvar" in name for name in net.state_dict())


@pytest.mark.parametrize("file", [LATENT, IMAGES], ids=["latent", "images"])
def test_a_snapshot_written_again_has_all_that_edm2_wrote(file, tmp_path, capsys):
    """Classes, attributes and arguments of every part; the encoder; no source but ours."""
    out = tmp_path / "again.pkl"
    found = told(capsys, "export", file, out)
    assert found["format"] == "edm" and found["difference"] <= found["limit"]
    theirs, ours = open_checkpoint(file), open_checkpoint(out)
    assert {*theirs.entries, "ipfm"} == {*ours.entries}
    assert theirs.entries["encoder"].class_name == ours.entries["encoder"].class_name
    assert ours.origin == "export of ipfm in EDM2's layout" and not ours.is_generator("ema")
    first, second = (contents(one.networks["ema"]).parts for one in (theirs, ours))
    assert list(first) == list(second)
    for path, record in first.items():
        again = second[path]
        assert again.class_name == record.class_name
        for key in set(record.state) - {"_parameters", "_buffers", "_modules", "_init_kwargs"}:
            assert again.state[key] == record.state[key], (path, key)
        if "_init_kwargs" in record.state:
            assert record.state["_init_kwargs"].items() <= again.state["_init_kwargs"].items(), path
    a, b = theirs.read(), ours.read()
    assert (a.config, list(a.weights), a.parameters) == (b.config, list(b.weights), b.parameters)
    for name, tensor in a.weights.items():
        assert torch.allclose(tensor, b.weights[name], rtol=3e-7, atol=0), name
    texts = {text for _, text, _ in pickletools.genops(out.read_bytes()) if isinstance(text, str) and "import" in text}
    encoder = ours.entries["encoder"].class_name
    assert texts == {class_source(("Block", "MPConv", "MPFourier", "Precond", "UNet")), class_source((encoder,))}


def test_a_model_of_latents_says_so_where_others_speak_of_pixels():
    """In Python and on its card, which names what decodes them."""
    network = open_network(LATENT, D=None)
    card = model_card(network, Origin(), program="denoiser.pt2", loader=None, grid=None)
    assert "[-1, 1]\n```\n\nLatents" not in card and "T.sample(16, seed=0)  # (16, 4, …) latents" in card
    assert "--out images.png --vae VAE_FOLDER" in card and ".decode(images)  # (16, 3, …) in [-1, 1]" in card
    assert "A denoiser of latents of 4×8×8 values" in card
    assert load_sampler(LATENT).value_range is None and load_sampler(IMAGES).value_range == (-1.0, 1.0)
    card = model_card(open_network(IMAGES, D=None), Origin(), program="denoiser.pt2", loader=None, grid=None)
    assert "--vae" not in card and "T.sample(16, seed=0)  # (16, 3, …) in [-1, 1]" in card


def test_a_teacher_of_finite_D_and_a_generator_written_again(tmp_path, capsys):
    ipfm("convert", LATENT, tmp_path / "t", "--D", "128")
    ipfm("export", tmp_path / "t", tmp_path / "t.pkl")
    assert load_teacher(tmp_path / "t.pkl").D == 128
    made = of.write_pickle(tmp_path / "g0.pkl", e2.generator())
    ipfm("convert", made, tmp_path / "g", "--sigmas", "2.5")
    ipfm("export", tmp_path / "g", tmp_path / "g.pkl")
    back = load_network(tmp_path / "g.pkl")
    assert list(back.facts.sigmas) == [2.5] and back.config.logvar_channels == 0
    with pytest.raises(ValueError, match="is a generator"):
        load_teacher(tmp_path / "g.pkl")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[: len(data) // 2], "the pickle is truncated"),
        (lambda data: data.replace(b"HalfStorage", b"HalfSt0rage"), "not admitted"),
        (lambda data: data.replace(b"StandardRGBEncoder", b"StandardRGBEncodes"), None),
        (lambda data: data.replace(b"emb_fourier", b"emb_fourieR"), "it lacks the tensor unet.emb_fourier.freqs"),
    ],
    ids=["half a file", "another storage", "an unknown encoder", "another name"],
)
def test_damage_is_one_line(damage, said, tmp_path, capsys):
    path = tmp_path / "a.pkl"
    path.write_bytes(damage(IMAGES.read_bytes()))
    if said is None:
        assert told(capsys, "info", path)["edm2"]["encoder_from"] == "channels"
        return
    with pytest.raises(SystemExit) as stop:
        ipfm("info", path)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and said in line and "a.pkl" in line
