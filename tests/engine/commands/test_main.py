"""The ipfm command: what it prints and writes, and what it refuses."""

from __future__ import annotations

import csv
import errno
import json
import re
from pathlib import Path
from typing import IO

import numpy as np
import official_files
import pytest
import torch
from PIL import Image

from ipfm.engine import generate, heun_sample
from ipfm.engine.commands.main import _main
from ipfm.engine.data.image_grid import image_grid, save_pngs
from ipfm.engine.evaluation.subject import SAMPLES_FILE
from ipfm.engine.memory.arithmetic import forward_flops
from ipfm.engine.runtime.commandline import run_command
from ipfm.engine.sampling.batches import sample_teacher
from ipfm.engine.sampling.samplers import Churn, trajectory_sample
from ipfm.engine.sampling.stored_model import sample_model
from ipfm.models import EDMPrecond, VEPrecond, load_model, load_teacher, presets, save_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """At D = 128, with weights that are not at their start: a teacher and a two-step generator; and small ones.

    These are a generator that knows its trajectory, of four classes, the same as a teacher, and a teacher that knows a
    range of levels.
    """
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    net = EDMPrecond(presets.get("digits", D=128.0))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    save_model(net, root / "teacher", extra={"task": "teacher"})
    save_model(net, root / "generator", extra={"task": "generator", "sigmas": [2.5, 1.25]})
    save_model(net, root / "odd", extra={"task": "generator", "sigmas": [1.25, 2.5]})
    small = {
        "img_resolution": 8, "img_channels": 3, "model_channels": 8, "channel_mult": (1,), "num_blocks": 1,
        "attn_resolutions": (), "dropout": 0.0, "D": 128.0,
    }  # fmt: skip
    classed = EDMPrecond(label_dim=4, **small)
    with torch.no_grad():
        for p in classed.parameters():
            p.add_(0.1 * torch.randn_like(p))
    save_model(classed, root / "classed", extra={"task": "teacher"})
    ends = {"sigma_max": 80.0, "sigma_min": 0.002}
    save_model(classed, root / "trajectory", extra={"task": "generator", "parametrisation": "trajectory", **ends})
    save_model(VEPrecond(**small), root / "ve", extra={"task": "teacher"})
    return root


def ipfm(*arguments: object) -> None:
    run_command("ipfm", _main, [str(argument) for argument in arguments])


@pytest.mark.quick
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


def levels_of(images: torch.Tensor) -> np.ndarray:
    """uint8 NHWC, as images are written."""
    return (images * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def close(found: np.ndarray, expected: torch.Tensor) -> bool:
    """The batch may move a value by rounding, and so a pixel across a level."""
    return found.shape == levels_of(expected).shape and np.abs(found.astype(int) - levels_of(expected)).max() <= 1


def test_a_teacher_is_sampled_as_in_training(models: Path) -> None:
    """Bit for bit, within what it knows; the first images of two seeds are those of each."""
    for name in ("teacher", "ve"):
        net = load_model(models / name)
        model = sample_model(models / name, torch.device("cpu"), heun_steps=3, seed=5)
        assert torch.equal(model.draw(2, 3), sample_teacher(net, 2, 3, D=128.0, steps=3, seed=5))
        assert model.nfe == 5
    model = sample_model(models / "classed", torch.device("cpu"), heun_steps=2, seed=(5, 9))
    of_each = [sample_teacher(load_model(models / "classed"), 0, 1, D=128.0, steps=2, seed=seed) for seed in (5, 9)]
    torch.testing.assert_close(model.draw(0, 2), torch.cat(of_each), rtol=1e-4, atol=1e-5)


def test_sample_draws_a_list_of_seeds_into_a_folder(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file for each seed, whatever the batch; what else lies there stays. A range without a folder: its index."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("kept")
    given = ("sample", models / "generator", "--batch", 3)
    ipfm(*given, "--seeds", "7,1-3", "--out", tmp_path / "a")
    said = capsys.readouterr().out
    assert re.fullmatch(rf"4 images, 2 network evaluations each, [\d.]+ images/s: {tmp_path / 'a'}\n", said)
    seeds = (7, 1, 2, 3)
    assert {file.name for file in (tmp_path / "a").iterdir()} == {
        "notes.txt", SAMPLES_FILE, *(f"{seed:06d}.png" for seed in seeds),
    }  # fmt: skip
    net = load_model(models / "generator")
    for seed in seeds:
        with Image.open(tmp_path / "a" / f"{seed:06d}.png") as picture:
            assert picture.mode == "L"
            expected = generate(net, 1, D=128.0, sigmas=(2.5, 1.25), seed=seed)
            assert close(np.asarray(picture)[None, :, :, None], expected)
    ipfm(*given, "--n", 4, "--seed", 7, "--out", tmp_path / "b" / "c")
    names = [SAMPLES_FILE, *(f"{i:06d}.png" for i in range(4))]
    assert [file.name for file in sorted((tmp_path / "b" / "c").iterdir())] == names
    first = (tmp_path / "b" / "c" / "000000.png").read_bytes()
    assert first == (tmp_path / "a" / "000007.png").read_bytes()


def test_a_disk_that_fills_leaves_whole_pictures(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save, saved = Image.Image.save, []

    def full(picture: Image.Image, file: IO[bytes], format: str) -> None:
        saved.append(picture)
        if len(saved) == 3:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(picture, file, format=format)

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(SystemExit) as stop:
        ipfm("sample", models / "generator", "--n", 4, "--out", tmp_path / "a")
    assert stop.value.code == 1 and "No space left on device" in capsys.readouterr().err
    assert [file.name for file in sorted((tmp_path / "a").iterdir())] == [SAMPLES_FILE, "000000.png", "000001.png"]
    with pytest.raises(ValueError, match=r"^images must have shape \(1, 1 or 3, H, W\), got \(2, 1, 4, 4\)$"):
        save_pngs(torch.zeros(2, 1, 4, 4), [tmp_path / "a.png"])


def test_sample_draws_a_trajectory_and_classes(models: Path, tmp_path: Path) -> None:
    """Classes in turn over the images, across batches; without them they are drawn."""
    net, out = load_model(models / "trajectory"), tmp_path / "a.npz"
    ipfm("sample", models / "trajectory", "--n", 5, "--batch", 3, "--classes", "2,0-1", "--out", out)
    labels = torch.eye(4)[[2, 0, 1, 2, 0]]
    assert close(np.load(out)["images"], trajectory_sample(net, 5, D=128.0, seed=0, class_labels=labels))
    ipfm("sample", models / "trajectory", "--seeds", "4,4", "--classes", "3,1", "--out", out)
    labels = torch.eye(4)[[3, 1]]
    assert close(np.load(out)["images"], trajectory_sample(net, 2, D=128.0, seed=[4, 4], class_labels=labels))
    ipfm("sample", models / "trajectory", "--n", 3, "--out", tmp_path / "folder")
    with Image.open(tmp_path / "folder" / "000001.png") as picture:
        drawn = sample_model(models / "trajectory", torch.device("cpu"), heun_steps=18, seed=0).draw(0, 3)
        assert picture.mode == "RGB" and close(np.asarray(picture)[None], drawn[1:2])


def test_sample_draws_a_teacher_with_other_samplers(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net, out = load_model(models / "teacher"), tmp_path / "a.npz"
    given = ("sample", models / "teacher", "--n", 3, "--out", out)
    ipfm(*given, "--solver", "euler", "--heun-steps", 4)
    assert close(np.load(out)["images"], heun_sample(net, 3, D=128.0, steps=4, seed=0, solver="euler"))
    ipfm(*given, "--sigmas", 60, 3, 0.2)
    assert close(np.load(out)["images"], heun_sample(net, 3, D=128.0, sigmas=(60.0, 3.0, 0.2), seed=0))
    ipfm(*given, "--heun-steps", 4, "--churn", 2, "--churn-min", 0.05, "--churn-max", 50, "--churn-noise", 1.003)
    churn = Churn(2.0, sigma_min=0.05, sigma_max=50.0, noise=1.003)
    assert close(np.load(out)["images"], heun_sample(net, 3, D=128.0, steps=4, seed=0, churn=churn))
    printed = [line.split(", ")[1] for line in capsys.readouterr().out.splitlines()]
    assert printed == [f"{nfe} network evaluations each" for nfe in (4, 5, 7)]


def test_info_describes_a_model(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ipfm("info", models / "generator", "--json")
    facts = json.loads(capsys.readouterr().out)
    assert facts["network"]["D"] == 128.0
    assert facts["training"]["sigmas"] == [2.5, 1.25]
    assert facts["parameters"] == sum(p.numel() for p in load_model(models / "generator").parameters())
    ipfm("info", models / "generator")
    printed = capsys.readouterr().out
    assert re.search(rf"^parameters +{facts['parameters']:,}$", printed, re.M)
    assert re.search(r"^architecture +ddpm\+\+", printed, re.M) and re.search(r"^sigmas +2.5, 1.25$", printed, re.M)


FIXTURE = Path(__file__).parents[2] / "fixtures" / "edm_ncsnpp_uncond.pkl"


def test_official_files_are_models_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ipfm("info", FIXTURE, "--json")
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"] == 48_899
    about = {"format": "EDM network snapshot", "networks": "ema", "taken": "ema", "D from": "assumed"}
    assert facts["file"] == {**about, "generator": None, "dtype": "float32"}
    assert (facts["network"]["D"], facts["network"]["encoder_type"]) == ("inf", "residual")

    ipfm("sample", FIXTURE, "--n", 3, "--heun-steps", 2, "--D", 64, "--out", tmp_path / "a.png")
    expected = image_grid(heun_sample(load_teacher(FIXTURE, D=64.0), 3, steps=2, seed=0))
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
        given = ["plan", "--model", "ncsnpp", "--batch", 16, "--micro-batch", 16, "--precision", "fp32"]
        ipfm(*given, "--gpu-memory", memory, "--json")
        found = json.loads(capsys.readouterr().out)
        assert found["peak"] <= found["budget"] == int(0.85 * memory * 1e9)
        chosen.append((found["backward"], found["activation_checkpointing"], found["relative_cost"]))
    assert chosen == [("joint", False, 1.0), ("phased", False, pytest.approx(13 / 11))]
    ipfm("plan", "--model", models / "teacher", "--batch", 64)
    printed = capsys.readouterr().out
    assert "+ generator: backward" in printed and "64 x 1" in printed
    ipfm("plan", "--model", models / "teacher", "--batch", 64, "--teacher-training", "--zero", 3)
    assert "+ teacher: forward and backward" in capsys.readouterr().out


def test_plan_of_pid_and_of_a_training(capsys: pytest.CaptureFixture[str]) -> None:
    """One network in training instead of two; what the distance holds is there too; nothing else needs to be given."""

    def planned(*arguments: object) -> dict:
        ipfm("plan", "--model", "digits", "--batch", 8, "--json", *arguments)
        return json.loads(capsys.readouterr().out)

    plans = {name: planned("--objective", name) for name in ("ipfm", "pid")}
    assert plans["ipfm"]["parts"]["weights"] == 2 * plans["pid"]["parts"]["weights"]
    assert set(plans["pid"]["phases"]) == {f"generator: {p}" for p in ("samples", "teacher", "backward", "optimiser")}
    lpips = planned("--objective", "pid", "--distance", "lpips", "--lpips-side", 32)
    vgg = 4 * 14_714_688
    assert lpips["phases"]["generator: optimiser"] - plans["pid"]["phases"]["generator: optimiser"] > 0.99 * vgg
    training = planned("--teacher-training")
    assert training["objective"] is None and training["backward"] == "" and training["relative_cost"] == 1.0


def test_plan_states_one_precision_which_is_that_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    """bf16 for GPUs that are asked for, as a run there and the table of a dry run have it."""

    def planned(*arguments: object) -> dict:
        ipfm("plan", "--model", "digits", "--batch", 8, "--json", *arguments)
        return json.loads(capsys.readouterr().out)

    given = {"--gpu-memory 24": "bf16", "--fits 24": "bf16", "--fits 24 --zero 0": "fp32", "": "fp32",
             "--precision fp32 --fits 24": "fp32", "--teacher-training --gpu-memory 24": "bf16"}  # fmt: skip
    assert {line: planned(*line.split())["precision"] for line in given} == given
    ipfm("plan", "--model", "digits", "--batch", 8, "--gpu-memory", 24)
    assert re.search(r"^precision +bf16$", capsys.readouterr().out, re.M)


def test_plan_says_what_a_step_computes_and_how_long_gpus_need(capsys: pytest.CaptureFixture[str]) -> None:
    flops = forward_flops(presets.get("digits"))
    for more, passes in (([], 11), (["--teacher-training"], 3), (["--backward", "phased"], 13)):
        given = ["plan", "--model", "digits", "--batch", 8, "--precision", "bf16", *more]
        ipfm(*given, "--json")
        found = json.loads(capsys.readouterr().out)
        assert found["flops"] == pytest.approx(flops * passes * 8)
        assert found["gpu_seconds"]["H100"] == pytest.approx(found["flops"] / (found["share_of_peak"] * 989.4e12))
        ipfm(*given)
        assert "GPU seconds a step at 30% of the peak (an assumption): RTX 4090 " in capsys.readouterr().out


def test_plan_of_several_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["plan", "--model", "digits", "--batch", 32, "--micro-batch", 16, "--ranks", 2, "--zero", 0]
    given += ["--fits", 24, 0.015, 0.0001]
    ipfm(*given, "--json")
    large, small, none = json.loads(capsys.readouterr().out)["gpus"]
    assert (large["micro_batch"], large["accumulation"], large["backward"], large["fits"]) == (16, 1, "joint", True)
    assert small["peak"] <= small["budget"] == int(0.85 * 0.015e9) < large["peak"] and small["relative_cost"] > 1
    assert (none["gpu_memory"], none["fits"]) == (0.0001, False) and "but needs at least" in none["reason"]
    ipfm(*given)
    title, head, *rows = capsys.readouterr().out.splitlines()
    assert "fp32, global batch 32" in title and head.split()[:2] == ["ranks", "GPU"]
    assert rows[0].split()[:6] == ["2", "24", "GB", "16", "x", "1"] and none["reason"] in rows[2]


def test_json_of_samples(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ipfm("sample", models / "generator", "--seeds", "7,1-2", "--out", tmp_path / "a", "--json")
    facts = json.loads(capsys.readouterr().out)
    assert facts["files"] == [str(tmp_path / "a" / f"{seed:06d}.png") for seed in (7, 1, 2)]
    assert all(Path(file).is_file() for file in facts["files"])
    assert (facts["nfe"], facts["sigmas"], facts["D"], facts["seeds"], facts["seed"]) == (
        2, [2.5, 1.25], 128.0, [7, 1, 2], None
    )  # fmt: skip
    assert facts["images"] / facts["seconds"] == pytest.approx(facts["images_per_second"])
    ipfm("sample", FIXTURE, "--n", 2, "--heun-steps", 3, "--out", tmp_path / "b.npz", "--json")
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["D"], facts["nfe"], facts["seed"], facts["files"]) == (
        "teacher", "inf", 5, 0, [str(tmp_path / "b.npz")]
    )  # fmt: skip
    assert (facts["sigmas"][0], facts["sigmas"][-1], len(facts["sigmas"])) == (80.0, pytest.approx(0.002), 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "nowhere"], "nowhere does not exist"),
        (
            ["sample", "MODELS/generator", "--out", "x.jpg"],
            "out must end in .png or .npz, or be a folder (no suffix), got x.jpg",
        ),
        (
            ["sample", "MODELS/generator", "--out", "MODELS/teacher/config.json/a"],
            "config.json is no folder that takes",
        ),
        (["sample", "MODELS/generator", "--seed", "-1"], "seed must lie in [0, 2^64), got -1"),
        (["sample", "MODELS/generator", "--seeds", "0,b"], "seeds must be whole numbers and ranges like 0,3,7-12"),
        (["sample", "MODELS/generator", "--seeds", "0", "--n", "1"], "seeds and n exclude each other"),
        (["sample", "MODELS/generator", "--seeds", "0", "--seed", "0"], "seeds and seed exclude each other"),
        (["sample", "MODELS/generator", "--seeds", "1,3,1", "--out", "a"], "seeds must differ where each names a file"),
        (["sample", "MODELS/generator", "--classes", "0"], "classes were given, but the network is unconditional"),
        (["sample", "MODELS/classed", "--classes", "0,4"], "classes must be from 0 to 3 for this network, got 4"),
        (["sample", "MODELS/classed", "--classes", "cat"], "classes must be whole numbers and ranges"),
        (
            ["sample", "MODELS/generator", "--heun-steps", "18", "--churn", "0"],
            "heun-steps, churn cannot be given: MODELS/generator is a generator, which has noise levels of its own",
        ),
        (["sample", "MODELS/trajectory", "--solver", "heun"], "solver cannot be given: "),
        (["sample", "MODELS/generator", "--sigmas", "2.5"], "sigmas cannot be given: "),
        (["sample", "MODELS/teacher", "--sigmas", "2", "3"], "sigmas must fall strictly, got 2, 3"),
        (
            ["sample", "MODELS/teacher", "--sigmas", "2", "--heun-steps", "1"],
            "sigmas and heun-steps exclude each other",
        ),
        (["sample", "MODELS/ve", "--sigmas", "80", "0.01"], "what the network knows, [0.02, 100], got 80, 0.01"),
        (["sample", "MODELS/teacher", "--solver", "rk4"], "euler, heun, got 'rk4'"),
        (["sample", "MODELS/teacher", "--churn", "-1"], "churn: amount must be a finite number >= 0, got -1.0"),
        (["sample", "MODELS/teacher", "--churn-noise", "1"], "churn-min, churn-max and churn-noise need churn"),
        (["sample", "MODELS/generator", "--n", "0"], "n must be at least 1, got 0"),
        (["sample", "MODELS/odd"], "holds no usable noise levels of a generator: sigmas must fall strictly"),
        (["sample"], "needs MODEL"),
        (["info", "MODELS"], "it holds the model folders 'classed', 'generator', 'odd' and 3 more: give one of them"),
        (["plan", "--model", "imagenet"], "network preset 'imagenet' is unknown; possible: edm2-img512-SIZE (xs, "),
        (
            ["plan", "--model", "digits", "--ranks", "3"],
            "batch must be divisible by the number of processes, got 256 and 3",
        ),
        (
            ["plan", "--model", "digits", "--precision", "bf16", "--zero", "0", "--ranks", "4"],
            "bf16 on 4 processes needs",
        ),
        (["plan", "--model", "digits", "--gpu-memory", "0.0001"], "but needs at least"),
        (["plan", "--model", "digits", "--gpu-memory", "0"], "gpu-memory must be a finite number > 0, got 0.0"),
        (["plan", "--model", "digits", "--fits", "8", "-1"], "fits must be a finite number > 0, got -1.0"),
        (["plan", "--model", "digits", "--fits", "8", "--gpu-memory", "8"], "gpu-memory and fits exclude each other"),
        (["plan", "--model", "digits", "--objective", "pid", "--steps", "2"], "the objective pid has no steps"),
        (["plan", "--model", "digits", "--lpips-side", "32"], "only the objective pid has lpips-side"),
        (["plan", "--model", "digits", "--objective", "ect", "--student", "lora"], "the objective ect has no student"),
        (["plan", "--model", "digits", "--rank", "4"], "rank 4 was given, but no network is lora: give generator lora"),
        (["plan", "--model", "digits", "--teacher-training", "--rank", "4"], "the training of a teacher has no rank"),
        (["plan", "--model", "digits", "--steps", "0"], "steps must be an integer >= 1, got 0"),
        (["plan", "--model", "digits", "--teacher-training", "--backward", "joint"], "of a teacher has no backward"),
        (
            ["plan", "--model", "digits", "--objective", "pid", "--distance", "lpips"],
            "distance lpips needs images of at least 16x16",
        ),
        (["completion", "tcsh"], "SHELL must be one of bash, fish, zsh, got 'tcsh'"),
        (["paint"], "unknown command paint; possible: sample, evaluate, "),
        (["sampel", "MODELS/teacher"], "unknown command sampel; perhaps you meant sample"),
        (["evaluate", "runs/nowhere", "--metrics", "is", "--inception", "x.pt"], "runs/nowhere does not exist in /"),
        (
            ["evaluate", "MODELS/teacher", "--reference", "none.npz", "--features", "pixels"],
            "none.npz does not exist in /",
        ),
        (["dataset", "none", "out.zip"], "none does not exist in /"),
        (["train"], "unknown command train; training is done by the recipes: deepspeed recipes/digits_ipfm.py"),
        (["version"], "unknown command version; ipfm --version says"),
        (
            ["--n", "4", "sample", "MODELS/teacher"],
            "--n is given before the command: options follow it, as in ipfm sample ... --n",
        ),
        (
            ["sample", "MODELS/generator", "--steps", "2"],
            "unknown option --steps; the number of steps is a generator's own; --heun-steps is for a teacher",
        ),
        (
            ["sample", "--network=MODELS/teacher", "--outdir=x", "--S_churn=40", "--disc=vp", "--class=3"],
            "; --network: the model comes first, without an option; --S_churn: it is --churn; --disc: the levels are "
            "EDM's own, by --rho, --sigma-min and --sigma-max, or those of --sigmas; perhaps you meant --out or "
            "--classes",
        ),
        (
            ["dataset", "--source=in", "--dest=x.zip", "--transform=center-crop-wide"],
            "; --source: the source comes first, without an option; --dest: the zip comes second, without an option; "
            "--transform: squares are made by --crop center, wide or adm",
        ),
        (["evaluate", "MODELS/teacher", "--ref=x.npz", "--num=9"], "perhaps you meant --reference or --images"),
        (["evaluate", "MODELS/teacher", "--fid"], "unknown option --fid; it is one of --metrics, as in --metrics fid"),
        (["sample", "MODELS/teacher", "--seeds", "1", "4-6", "8"], "argument 4-6; --seeds takes one word: 1,4-6,8"),
        (
            ["plan", "--model", "digits", "--lsg", "100", "--ls", "1"],
            "; --lsg: there is none such: Adam does not see a factor of the loss; --ls: there is none such: the loss",
        ),
        (["plan", "--model", "digits", "--solver", "heun"], "unknown option --solver; sample has it"),
        (["export", "MODELS/teacher", "--out", "x.onnx"], "unknown option --out; the file or folder to write is the "),
        (["convert", "x.pkl", "--out", "x"], "unknown option --out; the folder to write is the second name, OUT"),
        (["plan", "--model", "digits", "--alpha", "1"], "unknown option --alpha; recipes have it, such as "),
        (["plan", "digits"], "ipfm plan needs --model STR, as in --model digits"),
        (["sample", "MODELS/generator", "--D", "1e400"], "--D is too large a number, got 1e400; inf is infinity"),
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
    assert stop.value.code == 2 and line.startswith("ipfm: error: ")
    assert message.replace("MODELS", str(models)) in line
    assert not list(tmp_path.iterdir())


def test_without_a_command_it_helps(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        ipfm()
    assert not stop.value.code
    assert "sample" in capsys.readouterr().out


def test_bench_measures_the_metrics(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ipfm("bench", "--metrics", "--quick", "--out", tmp_path)
    printed = capsys.readouterr().out
    rows = {row["metric"]: row for row in csv.DictReader((tmp_path / "metrics.csv").open())}
    assert set(rows) == {"FID", "FID of a set with itself", "KID", "Inception score", "precision and recall"}
    assert float(rows["FID of a set with itself"]["result"]) <= 1e-3 < float(rows["FID"]["result"])
    assert all(float(row["seconds"]) >= 0 and row["metric"] in printed for row in rows.values())
    # The same table again, as JSON.
    monkeypatch.setattr("ipfm.engine.commands.bench.metrics.run_metrics", lambda out, quick: out / "metrics.csv")
    ipfm("bench", "--metrics", "--quick", "--out", tmp_path, "--json")
    (table,) = json.loads(capsys.readouterr().out)["tables"]
    assert table["file"] == str(tmp_path / "metrics.csv") and [row["metric"] for row in table["rows"]] == list(rows)
    assert all(isinstance(row["seconds"], float) and isinstance(row["images"], int) for row in table["rows"])
