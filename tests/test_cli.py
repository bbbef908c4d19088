"""The ipfm command: what it prints and writes, and what it refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import official_files
import pytest
import torch
from PIL import Image

from ipfm.engine import generate, heun_sample
from ipfm.engine.cli import _main
from ipfm.engine.commandline import run_command
from ipfm.engine.pictures import image_grid
from ipfm.models import EDMPrecond, load_model, load_teacher, presets, save_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher and a two-step generator at D = 128, with weights that are not at their start."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    net = EDMPrecond(presets.get("digits", D=128.0))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    save_model(net, root / "teacher", extra={"task": "teacher"})
    save_model(net, root / "generator", extra={"task": "generator", "sigmas": [2.5, 1.25]})
    save_model(net, root / "odd", extra={"task": "generator", "sigmas": [1.25, 2.5]})
    return root


def ipfm(*arguments: object) -> None:
    run_command("ipfm", _main, [str(argument) for argument in arguments])


def test_sample_draws_a_generator_at_its_own_D_and_levels(models: Path, tmp_path: Path) -> None:
    ipfm("sample", models / "generator", "--n", 5, "--seed", 7, "--batch", 2, "--out", tmp_path / "a.npz")
    images = np.load(tmp_path / "a.npz")["images"]
    assert (images.shape, images.dtype) == ((5, 8, 8, 1), np.uint8)
    net = load_model(models / "generator")
    expected = generate(net, 5, D=128.0, sigmas=(2.5, 1.25), seed=7)
    levels = (expected * 127.5 + 128).clamp(0, 255).to(torch.uint8)[:, 0].numpy()
    # The batch may move a value by rounding, and so a pixel across a level.
    assert np.abs(images[..., 0].astype(int) - levels).max() <= 1


def test_sample_draws_a_teacher_by_heun(models: Path, tmp_path: Path) -> None:
    ipfm("sample", models / "teacher", "--n", 4, "--heun-steps", 3, "--out", tmp_path / "a.png")
    expected = image_grid(heun_sample(load_model(models / "teacher"), 4, D=128.0, steps=3, seed=0))
    with Image.open(tmp_path / "a.png") as picture:
        assert np.array_equal(np.asarray(picture), expected)


def test_info_describes_a_model(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ipfm("info", models / "generator", "--json")
    facts = json.loads(capsys.readouterr().out)
    assert facts["network"]["D"] == 128.0
    assert facts["training"]["sigmas"] == [2.5, 1.25]
    assert facts["parameters"] == sum(p.numel() for p in load_model(models / "generator").parameters())
    ipfm("info", models / "generator")
    printed = capsys.readouterr().out
    assert f"parameters: {facts['parameters']:,}" in printed and "sigmas" in printed


FIXTURE = Path(__file__).parent / "fixtures" / "edm_ncsnpp_uncond.pkl"


def test_official_files_are_models_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ipfm("info", FIXTURE, "--json")
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"] == 48_899
    assert facts["file"] == {"format": "EDM network snapshot", "networks": "ema", "taken": "ema", "D from": "assumed"}
    assert (facts["network"]["D"], facts["network"]["encoder_type"]) == ("inf", "residual")

    ipfm("sample", FIXTURE, "--n", 3, "--heun-steps", 2, "--D", 64, "--out", tmp_path / "a.png")
    expected = image_grid(heun_sample(load_teacher(FIXTURE), 3, D=64.0, steps=2, seed=0))
    with Image.open(tmp_path / "a.png") as picture:
        assert np.array_equal(np.asarray(picture), expected)
    ipfm("plan", "--model", FIXTURE, "--batch", 4)
    assert "generator: backward" in capsys.readouterr().out


def test_a_training_state_is_described(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = official_files.randomize(EDMPrecond(presets.get("digits", D=64.0)))
    state = official_files.pfgmpp_state(net, net, step=2048, pfgmpp=True, D=64)
    path = official_files.write_torch(tmp_path / "training-state-000002.pt", state)
    ipfm("info", path, "--json")
    facts = json.loads(capsys.readouterr().out)
    assert facts["file"]["D from"] == "file" and facts["network"]["D"] == 64.0
    assert (facts["training"]["images seen"], facts["training"]["optimizer steps"]) == (2048, 3)


def test_a_generator_in_a_file_has_no_levels_to_sample_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = EDMPrecond(presets.get("digits"))
    path = official_files.write_torch(tmp_path / "training-state-000001.pt", official_files.sid_state(net))
    with pytest.raises(SystemExit):
        ipfm("sample", path, "--out", tmp_path / "a.png")
    assert "G_ema is a generator" in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()
    ipfm("convert", path, tmp_path / "model", "--sigmas", 2.5)
    ipfm("sample", tmp_path / "model", "--n", 2, "--out", tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()


def test_plan_chooses_by_the_memory_of_the_gpu(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = []
    for memory in (80, 4):
        ipfm("plan", "--model", "ncsnpp", "--batch", 16, "--micro-batch", 16, "--gpu-memory", memory, "--json")
        found = json.loads(capsys.readouterr().out)
        assert found["peak"] <= found["budget"] == int(0.85 * memory * 1e9)
        chosen.append((found["backward"], found["activation_checkpointing"], found["relative_cost"]))
    assert chosen == [("joint", False, 1.0), ("phased", False, pytest.approx(13 / 11))]
    ipfm("plan", "--model", models / "teacher", "--batch", 64)
    printed = capsys.readouterr().out
    assert "+ generator: backward" in printed and "64 x 1" in printed
    ipfm("plan", "--model", models / "teacher", "--batch", 64, "--teacher-training", "--zero", 3)
    assert "+ teacher: forward and backward" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "nowhere"], "nowhere does not exist"),
        (["sample", "MODELS/generator", "--out", "x.jpg"], "out must end in .png or .npz, got x.jpg"),
        (["sample", "MODELS/generator", "--n", "0"], "n must be at least 1, got 0"),
        (["sample", "MODELS/odd"], "holds no usable noise levels of a generator: sigmas must fall strictly"),
        (["sample"], "needs MODEL"),
        (["info", "MODELS"], "config.json"),
        (["plan", "--model", "imagenet"], "network preset 'imagenet' is unknown; possible: cifar10-ddpmpp"),
        (
            ["plan", "--model", "digits", "--ranks", "3"],
            "batch must be divisible by the number of processes, got 256 and 3",
        ),
        (["plan", "--model", "digits", "--precision", "bf16", "--zero", "0"], "bf16 needs"),
        (["plan", "--model", "digits", "--gpu-memory", "0.0001"], "but needs at least"),
        (["paint"], "paint"),
    ],
)
def test_bad_input_is_one_line(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    arguments: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        ipfm(*(argument.replace("MODELS", str(models)) for argument in arguments))
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert stop.value.code == 2 and line.startswith("ipfm: error: ") and message in line
    assert not list(tmp_path.iterdir())


def test_without_a_command_it_helps(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        ipfm()
    assert not stop.value.code
    assert "sample" in capsys.readouterr().out


def test_bench_measures_the_metrics(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ipfm("bench", "--metrics", "--quick", "--out", tmp_path)
    printed = capsys.readouterr().out
    rows = {row["metric"]: row for row in csv.DictReader((tmp_path / "metrics.csv").open())}
    assert set(rows) == {"FID", "FID of a set with itself", "KID", "Inception score", "precision and recall"}
    assert float(rows["FID of a set with itself"]["result"]) <= 1e-3 < float(rows["FID"]["result"])
    assert all(float(row["seconds"]) >= 0 and row["metric"] in printed for row in rows.values())
