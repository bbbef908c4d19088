"""`ipfm ema`: averages of other widths, of a run's snapshots and of EDM2's raw ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import official_files as of
import pytest
import torch
from edm2_fixtures import FIXTURES

from ipfm.engine import TeacherConfig
from ipfm.engine.averages import Average, Profile, combination
from ipfm.engine.commands.main import _main
from ipfm.engine.data.dataset import ImageDataset
from ipfm.engine.distributed.world import World
from ipfm.engine.runtime.commandline import run_command
from ipfm.engine.training.run_folder import release_folder
from ipfm.engine.training.teacher import TeacherTraining
from ipfm.models import EDMPrecond, NetworkConfig, load_model
from ipfm.models.store import read_config

ALONE = World(0, 1, torch.device("cpu"))
NETWORK = NetworkConfig(
    img_resolution=4, img_channels=1, model_channels=4, channel_mult=(1,), num_blocks=1, attn_resolutions=(), D=64.0
)
KEPT = (0.1, 0.2, 0.15)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A training that kept two averages, and beside them the one that is made of these."""
    folder = tmp_path_factory.mktemp("ema") / "run"
    torch.manual_seed(0)
    data = ImageDataset(torch.randint(0, 256, (8, 1, 4, 4), dtype=torch.uint8), None, name="noise")
    config = TeacherConfig(
        batch=2, max_steps=48, log_every=48, checkpoint_every=48, snapshot_every=3, keep_snapshots=0, heun_steps=1,
        zero=0, precision="fp32", ema_kimg=0, ema=KEPT, lr=1e-2, lr_rampup_kimg=0, D=64.0,
    )  # fmt: skip
    TeacherTraining(config, NETWORK, data, world=ALONE).run(folder)
    release_folder(folder)
    yield folder


def ipfm(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as stop:
        run_command("ipfm", _main, ["ema", *map(str, arguments)])
        raise SystemExit(0)
    return int(stop.value.code or 0)


def without(run: Path, average: str, tmp_path: Path) -> Path:
    """The run without the snapshots and checkpoints that have this average."""
    import shutil

    other = tmp_path / "run"
    shutil.copytree(run, other)
    shutil.rmtree(other / "snapshots" / average)
    shutil.rmtree(other / "checkpoints")
    return other


def test_what_is_made_is_the_average_that_was_kept(run: Path, tmp_path: Path, capsys: Any) -> None:
    place = without(run, "ema0.15", tmp_path)
    assert ipfm(place, "--std", 0.15, "--out", tmp_path / "made", "--json") == 0
    told = json.loads(capsys.readouterr().out)["made"][0]
    assert told["kimg"] == 0.096 and told["average"] == "ema0.15" and told["missed"] < 0.01
    assert len(told["of"]) == 32 and abs(sum(one["coefficient"] for one in told["of"]) - 1) < 1e-12
    made, kept = (load_model(p).state_dict() for p in (tmp_path / "made", run / "snapshots/ema0.15/step-0000048"))
    narrow = load_model(run / "snapshots/step-0000048").state_dict()
    off = max(float((made[name] - kept[name]).norm() / kept[name].norm()) for name in kept)
    apart = max(float((narrow[name] - kept[name]).norm() / kept[name].norm()) for name in kept)
    assert off < 0.02 and apart > 5 * off
    extra = read_config(tmp_path / "made").extra
    assert extra["average"] == "ema0.15" and extra["combined"]["std"] == 0.15 and extra["optimizer_steps"] == 48
    # And of what was kept it is that itself, from the checkpoint.
    assert ipfm(run, "--std", 0.15, "--out", tmp_path / "same") == 0
    same = load_model(tmp_path / "same").state_dict()
    assert all(torch.allclose(same[name], kept[name], rtol=1e-5, atol=1e-6) for name in kept)


def test_several_widths_at_an_earlier_time_in_one_pass(run: Path, tmp_path: Path, capsys: Any) -> None:
    assert ipfm(run, "--std", 0.12, 0.18, "--at", 0.048, "--out", tmp_path / "made") == 0
    assert "ema0.12 at 0.048 kimg, of 24 stored averages" in capsys.readouterr().out
    for std in (0.12, 0.18):
        found = read_config(tmp_path / "made" / f"ema{std}").extra["combined"]
        assert found["kimg"] == 0.048 and max(one["kimg"] for one in found["of"]) == 0.048


def test_what_is_there_is_listed(run: Path, capsys: Any) -> None:
    assert ipfm(run, "--json") == 0
    stored = json.loads(capsys.readouterr().out)["stored"]
    assert len(stored) == 48 and {one["std"] for one in stored} == set(KEPT)
    # The newest are those of the checkpoint, in fp32 whatever the snapshots are.
    assert [Path(one["path"]).parent.name for one in stored[-3:]] == ["checkpoints"] * 3


def test_raw_snapshots_of_edm2_are_combined(tmp_path: Path, capsys: Any) -> None:
    """As EDM2 names them; parameters by their coefficients, buffers from the last."""
    torch.manual_seed(0)
    nets, profiles = {}, []
    (tmp_path / "raw").mkdir()
    for kimg in (33554, 67108):
        for std in (0.05, 0.1):
            net = of.randomize(EDMPrecond(NETWORK))
            of.write_pickle(tmp_path / "raw" / f"network-snapshot-{kimg:07d}-{std:.3f}.pkl", {"ema": of.official(net)})
            profile = Profile(float((kimg * 1000 + 999) // 1024 * 1024), std)
            profiles.append(profile)
            nets[profile] = net.state_dict()
    assert profiles[-1].images == 64 * 2**20
    (tmp_path / "raw" / "training-state-0067108.pt").write_bytes(b"")
    assert ipfm(tmp_path / "raw", "--std", 0.075, "--at", 67108, "--D", 64, "--out", tmp_path / "made") == 0
    row = combination(profiles, Profile(profiles[-1].images, 0.075))
    made = load_model(tmp_path / "made")
    assert made.D == 64
    for name, _ in made.named_parameters():
        expected = sum(c * nets[p][name].double() for c, p in zip(row, profiles, strict=True))
        torch.testing.assert_close(made.state_dict()[name], expected.float(), rtol=0, atol=0)
    for name, buffer in made.named_buffers():
        assert torch.equal(buffer, nets[profiles[-1]][name])
    assert ipfm(tmp_path / "raw", "--std", 0.2, "--at", 33554, "--out", tmp_path / "wide") == 2
    assert "of the widths 0.05, 0.1 at 1 time: it would be off its profile by 60%" in capsys.readouterr().err


def test_what_edm2s_file_says_of_its_network_is_said_of_what_is_made_of_it(tmp_path: Path) -> None:
    """Its encoder above all; its average is the one that was made."""
    (tmp_path / "raw").mkdir()
    for std in (0.05, 0.1):
        shutil.copy(FIXTURES / "edm2_img_cond.pkl", tmp_path / "raw" / f"network-snapshot-0067108-{std:.3f}.pkl")
    assert ipfm(tmp_path / "raw", "--std", 0.075, "--out", tmp_path / "made") == 0
    name = "network-snapshot-0067108-0.100.pkl"
    source = {"file": name, "encoder": "pixel", "ema_std": "0.075", "kimg": "67108"}
    assert read_config(tmp_path / "made").extra["source"] == source


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--std", 0.3, "--out", "o"], "must be relative widths from 0.0001 to 0.2887 (below), got 0.3"),
        (
            ["--std", 0.01, "--out", "o"],
            "std 0.01 at 0.096 kimg cannot be made of the widths 0.1, 0.15, 0.2 at 16 times: its coefficients would",
        ),
        (["--std", 0.12, "--at", 7, "--out", "o"], "at must be a time of which an average is stored, got 7; in"),
        (["--std", 0.12], "std and out go together"),
        (["--out", "o"], "std and out go together"),
        (["--at", 3], "at is the time of the average"),
        (["--std", 0.12, 0.12, "--out", "o"], "std must be different widths"),
        (["--std", 0.12, "--out", "o.pkl"], "out must be a folder, got o.pkl"),
        (["--std", 0.12, "--out", "/dev/null/o"], "/dev/null/o cannot be written: /dev/null is no folder that takes"),
        (["--std", 0.12, "--D", 3, "--out", "o"], "says itself what it is"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_refused_in_a_line(
    run: Path, given: list[Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ipfm(run, *given) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_width_far_from_those_that_are_stored_is_said_to_be_rough(run: Path, tmp_path: Path, capsys: Any) -> None:
    assert ipfm(run, "--std", 0.05, "--out", tmp_path / "made", "--json") == 0
    out = json.loads(capsys.readouterr().out)
    assert "off its profile by" in out["remarks"][0] or "large coefficients" in out["remarks"][-1]


def test_folders_that_hold_no_such_averages(run: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "empty").mkdir()
    for place, said in (
        (tmp_path / "empty", "is no run, and has no raw snapshots of EDM2"),
        (tmp_path / "gone", "is no folder: give a run that was trained with --ema"),
    ):
        assert ipfm(place) == 2 and said in capsys.readouterr().err
    damaged = without(run, "ema0.15", tmp_path)
    path = damaged / "snapshots" / "step-0000003" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    assert ipfm(damaged, "--std", 0.12, "--out", tmp_path / "made") == 2
    assert "step-0000003/model.safetensors" in capsys.readouterr().err and not (tmp_path / "made").exists()


def test_coefficients_are_those_of_the_profiles() -> None:
    row = combination([Profile(10.0, 0.1), Profile(20.0, 0.1), Profile(20.0, 0.2)], Profile(20.0, 0.1))
    assert np.abs(row - [0, 1, 0]).max() < 1e-12 and Average(std=0.1).name == "ema0.1"
