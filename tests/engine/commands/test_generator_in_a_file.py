"""Generators in files that hold an average alone: known by name and place, and drawn from as such when that is said."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import official_files as of
import pytest

from ipfm.engine import generate
from ipfm.engine.commands.main import _main
from ipfm.engine.runtime.commandline import run_command
from ipfm.models import NetworkConfig, build_network, load_model, load_teacher, save_model
from ipfm.models.checkpoints.reader import open_checkpoint
from ipfm.models.teacher import load_network

SMALL = NetworkConfig(
    img_resolution=8, img_channels=1, model_channels=8, channel_mult=(1, 1), num_blocks=1, attn_resolutions=()
)
SID = "network-snapshot-1.200000-403968.pkl"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same generator under names and in folders that tell, and in ones that do not."""
    root = tmp_path_factory.mktemp("files")
    net = of.randomize(build_network(SMALL))
    own = of.write_pickle(root / SID, {"ema": of.official(net)})
    for name in (f"sid-cifar10-{SID}", SID.replace(".pkl", " (1).pkl"), "network-snapshot-1.000000-1403968.pkl",
                 "G_ema990/network-snapshot-000250.pkl", "G_ema/mine.pkl", "run/network-snapshot-002500.pkl",
                 "run/G_emasomething/mine.pkl", "run/network-snapshot-1.2-403968.pkl"):  # fmt: skip
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / name).write_bytes(own.read_bytes())
    of.write_pickle(root / "G_ema" / "edm.pkl", of.edm_snapshot(net))
    of.write_torch(root / "state.pt", of.sid_state(net))
    (root / "link.pkl").symlink_to(root / "G_ema" / "mine.pkl")
    return root


def ipfm(*arguments: object) -> None:
    run_command("ipfm", _main, [str(argument) for argument in arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as stop:
        ipfm(*arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    return line


def test_name_and_place_tell(place, monkeypatch):
    name, folder = "by its name, which has SiD's alpha", "by its folder"
    tells = {
        SID: name, f"sid-cifar10-{SID}": name, SID.replace(".pkl", " (1).pkl"): name,
        "network-snapshot-1.000000-1403968.pkl": name, "G_ema990/network-snapshot-000250.pkl": f"{folder} G_ema990",
        "G_ema/mine.pkl": f"{folder} G_ema", "link.pkl": f"{folder} G_ema",
    }  # fmt: skip
    for file, why in tells.items():
        found = open_checkpoint(place / file)
        assert found.is_generator("ema") and (found.why_generator("ema") or "").startswith(why)
    monkeypatch.chdir(place / "G_ema")
    assert open_checkpoint(Path("mine.pkl")).is_generator("ema")
    for file in ("run/network-snapshot-002500.pkl", "run/G_emasomething/mine.pkl", "G_ema/edm.pkl",
                 "run/network-snapshot-1.2-403968.pkl"):  # fmt: skip
        assert not open_checkpoint(place / file).is_generator("ema")
    state = open_checkpoint(place / "state.pt")
    assert state.why_generator("G_ema") == "by its name in the file" and state.why_generator("fake_score") is None


def test_a_generator_is_not_drawn_from_as_a_teacher_unasked(place, tmp_path, capsys):
    real = tmp_path / "real.npz"
    np.savez(real, np.zeros((4, 8, 8, 1), np.uint8))
    evaluate = ("evaluate", "--features", "pixels", "--reference", real, "--images", 4)
    for file in (SID, "G_ema990/network-snapshot-000250.pkl", "state.pt"):
        for command in (("sample",), evaluate, ("export",)):
            model = place / file
            line = refused(capsys, command[0], model, *command[1:], *([tmp_path / "a.pkl"] * (command[0] == "export")))
            assert "is a generator, by its " in line and "whose noise levels the file does not hold" in line
            assert "give --generator, which draws in one step at 2.5, or at those of --sigmas; --teacher if" in line
        with pytest.raises(ValueError, match=r"is a generator \(.*known by its .*--teacher-anyway"):
            load_teacher(place / file)
    ipfm("info", place / SID, "--json")
    told = json.loads(capsys.readouterr().out)
    assert told["kind"] == "generator" and told["file"]["generator"].startswith("by its name")
    ipfm("info", place / SID)
    assert "generator, by its name, which has SiD's alpha" in capsys.readouterr().out
    ipfm("info", place / "run" / "network-snapshot-002500.pkl", "--json")
    told = json.loads(capsys.readouterr().out)
    assert told["kind"] == "teacher" and told["file"]["generator"] is None


def test_a_generator_is_drawn_from_in_one_step(place, tmp_path, capsys):
    """At 2.5 and D = inf, which is said; also where nothing tells but the option."""
    net = load_network(place / SID)
    for number, (given, D, sigmas, said) in enumerate([
        ((), math.inf, (2.5,), "is drawn from at sigma 2.5 and D = inf; --sigmas and --D say others"),
        (("--D", "128"), 128.0, (2.5,), "is drawn from at sigma 2.5; --sigmas says another"),
        (("--sigmas", "3"), math.inf, (3.0,), "is drawn from at D = inf; --D says another"),
        (("--sigmas", "2.5", "1.25", "--D", "64"), 64.0, (2.5, 1.25), None),
    ]):  # fmt: skip
        model = place / (SID, "run/network-snapshot-002500.pkl")[number % 2]
        out = tmp_path / f"{number}.npz"
        ipfm("sample", model, "--generator", *given, "--n", 3, "--out", out, "--json")
        told = json.loads(capsys.readouterr().out)
        assert told["kind"] == "generator" and told["nfe"] == len(sigmas) and told["sigmas"] == list(sigmas)
        assert told["remarks"] == ([] if said is None else [f"{model.name} {said}"])
        assert told["D"] == ("inf" if math.inf == D else D)
        images = generate(net, 3, D=D, sigmas=sigmas, seed=0, override=True)
        expected = ((images.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).numpy()
        assert np.abs(np.load(out)["images"] - expected).max() <= 1


def test_what_is_said_of_a_file_counts(place, tmp_path, capsys):
    real = tmp_path / "real.npz"
    np.savez(real, np.random.default_rng(0).integers(0, 255, (8, 8, 8, 1)).astype(np.uint8))
    evaluate = ("--features", "pixels", "--reference", real, "--images", 4, "--heun-steps", 2, "--json")
    ipfm("evaluate", place / SID, "--generator", *evaluate)
    told = json.loads(capsys.readouterr().out)
    assert (told["kind"], told["nfe"], told["D"]) == ("generator", 1, "inf")
    assert any("is drawn from at sigma 2.5 and D = inf" in remark for remark in told["remarks"])
    ipfm("evaluate", place / SID, "--teacher", *evaluate)
    told = json.loads(capsys.readouterr().out)
    assert (told["kind"], told["nfe"]) == ("teacher", 3)
    ipfm(
        "sample", place / SID, "--teacher", "--heun-steps", 2, "--sigma-max", 40, "--n", 2, "--out", tmp_path / "t.npz"
    )
    assert load_teacher(place / SID, anyway=True).facts is not None
    assert load_teacher(place / "state.pt", anyway=True, D=64).D == 64
    for file, given in ((SID, ("--generator",)), ("state.pt", ("--generator", "--D", 32))):
        capsys.readouterr()
        ipfm("export", place / file, tmp_path / "g.pkl", *given, "--sigmas", 2, "--json")
        remarks = json.loads(capsys.readouterr().out)["remarks"]
        assert (remarks[0] == f"{file} is drawn from at D = inf; --D says another") == (file == SID)
        back = load_network(tmp_path / "g.pkl")
        assert back.facts.sigmas == [2.0] and f"{back.D:g}" == ("32" if file == "state.pt" else "inf")
        # Which says itself what it is now; what the user says goes before.
        capsys.readouterr()
        for more, levels in (((), [2.0]), (("--generator",), [2.0]), (("--generator", "--sigmas", 3), [3.0])):
            ipfm("sample", tmp_path / "g.pkl", *more, "--n", 1, "--out", tmp_path / "x.npz", "--json")
            told = json.loads(capsys.readouterr().out)
            assert told["sigmas"] == levels and told["remarks"] == []
    ipfm("convert", place / SID, tmp_path / "teacher", "--teacher")
    assert load_teacher(tmp_path / "teacher").facts.task == "teacher"


def test_an_average_alone_under_nobodys_name_is_said_to_be_taken_for_a_teacher(place, tmp_path, capsys):
    given = ("--heun-steps", 2, "--n", 1, "--out", tmp_path / "a.npz", "--json")
    said = (
        "mine.pkl holds an average alone, as snapshots of SiD's generators do: it is taken for a teacher; give "
        "--generator if it is one"
    )
    for file, more, remarks in (
        ("run/G_emasomething/mine.pkl", (), [said]),
        ("run/G_emasomething/mine.pkl", ("--teacher",), []),
        ("run/network-snapshot-002500.pkl", (), []),
        ("G_ema/edm.pkl", (), []),
    ):
        ipfm("sample", place / file, *given, *more)
        told = json.loads(capsys.readouterr().out)
        assert (told["kind"], told["remarks"]) == ("teacher", remarks)
    ipfm("info", place / "run" / "G_emasomething" / "mine.pkl")
    assert "teacher, or a generator: nothing says which" in capsys.readouterr().out


def test_what_cannot_be_said(place, tmp_path, capsys):
    save_model(build_network(SMALL), tmp_path / "model", extra={"task": "teacher"})
    np.savez(tmp_path / "images.npz", np.zeros((4, 8, 8, 1), np.uint8))
    pixels = ("--features", "pixels", "--reference", tmp_path / "images.npz")
    out = ("--n", 1, "--out", tmp_path / "a.npz")
    wrong = {
        ("sample", place / SID, "--generator", "--teacher", *out): "generator and teacher exclude each other",
        ("sample", place / SID, "--generator", "--heun-steps", 3, *out): "heun-steps cannot be given",
        ("sample", place / SID, "--generator", "--sigmas", 1, 2, *out): "sigmas must fall strictly",
        ("sample", tmp_path / "model", "--generator", *out): "is a model folder, which says that it is a teacher",
        ("evaluate", place / SID, "--sigmas", 2.5, *pixels): "sigmas are a generator's: give --generator too",
        ("evaluate", tmp_path / "images.npz", "--generator", *pixels): "holds images, not a model",
        ("convert", place / SID, tmp_path / "b", "--generator", "--teacher"): "exclude each other",
        ("convert", place / SID, tmp_path / "b"): "it is known by its name, which has SiD's alpha",
        ("convert", place / SID, tmp_path / "b", "--teacher", "--sigmas", 2.5): "sigmas are a generator's",
        ("export", place / SID, tmp_path / "b.pkl", "--teacher", "--sigmas", 2.5): "sigmas are a generator's",
    }
    for arguments, words in wrong.items():
        assert words in refused(capsys, *arguments), arguments
    assert not (tmp_path / "b").exists() and not (tmp_path / "a.npz").exists()
    assert load_model(tmp_path / "model").config == SMALL
