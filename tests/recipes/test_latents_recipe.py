"""Latents from end to end: pictures, their latents, a teacher of them, a generator, its pictures, a distance."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import official_edm2
import official_files
import pytest
import tiny_inception
import torch
from edm2_fixtures import FIXTURES
from PIL import Image
from tiny_vae import tiny_vae

from ipfm.engine.commands.main import _main
from ipfm.engine.commands.report.reproduce import reproduce
from ipfm.engine.data.image_grid import read_grid
from ipfm.engine.data.zip_writer import encode_png
from ipfm.engine.runtime.commandline import BadInput, run_command
from ipfm.engine.training.run_state import read_run
from ipfm.models import build_network, presets, save_model
from ipfm.recipes import distill_ipfm, imagenet64_edm2_ipfm, imagenet512_edm2_sid, train_teacher

COUNT, SIDE = 40, 16


def ipfm(*argv: object) -> int:
    try:
        run_command("ipfm", _main, [*map(str, argv)])
    except SystemExit as stop:
        return int(stop.code)
    return 0


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with vae, pictures.zip (of two classes), latents.zip and a run of a teacher and of a distillation."""
    root = tmp_path_factory.mktemp("latents")
    tiny_vae(root / "vae")
    random = np.random.default_rng(1)
    for index in range(COUNT):
        file = root / "pictures" / "ab"[index % 2] / f"{index:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode_png(random.integers(0, 256, (3, SIDE, SIDE), dtype=np.uint8)))
    assert not ipfm("dataset", root / "pictures", root / "pictures.zip")
    assert not ipfm("dataset", root / "pictures", root / "latents.zip", "--latents", root / "vae")
    common = ["--max-steps", "2", "--batch", "8", "--vae", str(root / "vae"), "--features", "blocks"]
    common += ["--eval-images", "20"]
    network = ["--model-channels", "8", "--channel-mult", "1", "--num-blocks", "1", "--conditional"]
    data = ["--data", str(root / "latents.zip")]
    train_teacher.main([*data, *network, *common, "--eval-every", "2", "--out", str(root / "teacher")])
    teacher = ["--teacher", str(root / "teacher" / "model"), "--data", str(root / "pictures.zip")]
    labels = ["--labels", str(root / "labels.json")]
    (root / "labels.json").write_text(json.dumps({"labels": [["a.png", 1], ["b.png", 1], ["c.png", 0]]}))
    distill_ipfm.main([*teacher, *common, *labels, "--out", str(root / "run")])
    return root


def test_grids_and_the_picture_of_the_end_show_pictures(place):
    for run, panels in (("teacher", 2), ("run", 3)):
        (grid,) = sorted((place / run / "samples").glob("*.png"))
        assert read_grid(grid).shape == (64, 3, SIDE, SIDE)
        with Image.open(place / run / "comparison.png") as picture:
            assert picture.info["Title"].count(",") + 1 >= panels
    rows = json.loads((place / "run" / "results.json").read_text())
    assert rows


def test_classes_are_drawn_as_often_as_the_labels_say(place, tmp_path, capsys):
    assert json.loads((place / "run" / "config.json").read_text())["config"]["class_counts"] == [1, 2]
    with pytest.raises(BadInput, match="has the class 5, the teacher knows 0 to 1"):
        (tmp_path / "dataset.json").write_text(json.dumps({"labels": [["a.png", 5]]}))
        teacher = ["--teacher", str(place / "teacher" / "model"), "--labels", str(tmp_path)]
        distill_ipfm.main([*teacher, "--dry-run"])


def test_an_autoencoder_of_other_latents_is_remarked_on(place, tmp_path, capsys):
    vae = shutil.copytree(place / "vae", tmp_path / "vae")
    config = json.loads((vae / "config.json").read_text()) | {"scaling_factor": 0.13025}
    (vae / "config.json").write_text(json.dumps(config))
    model = place / "run" / "generator"
    assert not ipfm("sample", model, "--n", 2, "--out", tmp_path / "x.npz", "--vae", vae, "--json")
    assert any("has scaling_factor 0.13025" in remark for remark in json.loads(capsys.readouterr().out)["remarks"])
    measured = ["--reference", place / "pictures.zip", "--features", "pixels", "--images", 4, "--json"]
    assert not ipfm("evaluate", model, *measured, "--vae", vae)
    assert any("has scaling_factor 0.13025" in remark for remark in json.loads(capsys.readouterr().out)["remarks"])


def test_latents_and_pictures_are_told_apart_where_a_teacher_takes_the_other(place):
    """And how to have what it takes: `ipfm dataset` makes no pictures of latents."""
    pixels = str(FIXTURES / "edm2_img_cond.pkl")
    for teacher, data, said in (
        (
            pixels,
            "latents.zip",
            "has latents 4x8x8, the teacher makes images 3x16x16: give the pictures",
        ),
        (place / "teacher" / "model", "pictures.zip", "the teacher makes latents 4x8x8: ipfm dataset .* --latents VAE"),
    ):
        with pytest.raises(BadInput, match=said):
            distill_ipfm.main(["--teacher", str(teacher), "--data", str(place / data), "--dry-run"])


def test_samples_are_pictures_or_latents(place, tmp_path, capsys):
    model, vae = place / "run" / "generator", place / "vae"
    assert not ipfm("sample", model, "--n", 6, "--out", tmp_path / "latents.npz")
    assert not ipfm("sample", model, "--n", 6, "--out", tmp_path / "pictures.npz", "--vae", vae)
    assert not ipfm("sample", model, "--n", 6, "--out", tmp_path / "grid.png", "--vae", vae)
    assert not ipfm("sample", model, "--n", 6, "--out", tmp_path / "folder", "--vae", vae, "--batch", 4)
    from ipfm.engine.data.image_grid import pixels
    from ipfm.models.autoencoder import load_autoencoder

    with np.load(tmp_path / "latents.npz") as found:
        latents = torch.from_numpy(found["latents"])
    assert latents.shape == (6, 4, SIDE // 2, SIDE // 2)
    expected = pixels(load_autoencoder(vae).decode(latents)).permute(0, 2, 3, 1).numpy()
    with np.load(tmp_path / "pictures.npz") as found:
        # The network may round otherwise from one batch to the next.
        assert np.abs(found["images"].astype(int) - expected).max() <= 1
    assert len(list((tmp_path / "folder").glob("*.png"))) == 6
    capsys.readouterr()
    assert ipfm("sample", model, "--out", tmp_path / "other.png") == 2
    said = capsys.readouterr().err
    assert "out must end in .npz for latents, which" in said and "--vae VAE_FOLDER makes pictures of them" in said
    # The folder has what made its images on record: without the autoencoder, or with another, they are others.
    tiny_vae(tmp_path / "other", seed=1)
    assert ipfm("sample", model, "--n", 6, "--out", tmp_path / "folder", "--vae", tmp_path / "other") == 2
    assert "with other vae" in capsys.readouterr().err


def test_evaluations_decode(place, tmp_path, capsys):
    model, vae = place / "run" / "generator", place / "vae"
    blocks = ("--features", "blocks", "--images", 30, "--json")
    found = {}
    assert not ipfm("sample", model, "--n", 30, "--seed", 0, "--out", tmp_path / "samples.npz")
    for name, subject, reference in (
        ("pictures", model, "pictures.zip"),
        ("latents", model, "latents.zip"),
        ("of samples", tmp_path / "samples.npz", "pictures.zip"),
    ):
        capsys.readouterr()
        assert not ipfm("evaluate", subject, "--reference", place / reference, "--vae", vae, *blocks)
        found[name] = json.loads(capsys.readouterr().out)["frechet"]
    assert found["of samples"] == pytest.approx(found["pictures"], rel=1e-3)
    assert found["latents"] != pytest.approx(found["pictures"], rel=1e-3)
    # Latents compare with latents by their own values.
    assert not ipfm("evaluate", model, "--reference", place / "latents.zip", *blocks)
    capsys.readouterr()
    for argv, words in (
        ((model, "--reference", place / "pictures.zip", *blocks), "are 3x16x16, those that are measured 4x8x8"),
        (
            (place / "pictures.zip", "--reference", place / "latents.zip", *blocks),
            "holds latents, and what",
        ),
        ((place / "pictures.zip", "--reference", place / "pictures.zip", "--vae", vae, *blocks), "leave it out"),
    ):
        assert ipfm("evaluate", *argv) == 2
        assert words in capsys.readouterr().err


def test_without_a_vae_a_run_says_what_its_grids_show(place, tmp_path, capsys):
    argv = ["--data", str(place / "latents.zip"), "--model-channels", "8", "--channel-mult", "1", "--num-blocks", "1"]
    train_teacher.main([*argv, "--max-steps", "1", "--batch", "4", "--out", str(tmp_path / "run"), "--dry-run"])
    said = capsys.readouterr().err
    assert "the samples are latents, whose channels grids show in grey, side by side: --vae VAE_FOLDER" in said


# -- recipes of EDM2's teachers ----------------------------------------------------------------------------------------

QUICK = [
    "--batch",
    "2",
    "--micro-batch",
    "2",
    "--zero",
    "0",
    "--backward",
    "joint",
    "--activation-checkpointing",
    "off",
]
QUICK += ["--precision", "fp32", "--heun-steps", "2", "--eval-images", "4"]


def edm2_file(path: Path, **changes: object) -> Path:
    """A thin file of EDM2's, as it is published; of latents."""
    arch = official_edm2.Edm2(img_resolution=64, label_dim=3, channel_mult=(1,), attn_resolutions=())
    net = official_edm2.network(replace(arch, **changes))
    official_files.write_pickle(path, official_edm2.snapshot(net))
    return path


def test_a_file_of_edm2_is_distilled_by_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An official file to a generator by one command, which the report has."""
    plain = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    vae = tiny_vae(tmp_path / "vae", block_out_channels=(4,), layers_per_block=1, **plain)
    run = tmp_path / "imagenet512_edm2_sid-4channels-Dinf-alpha1-K1-logvar"
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [["a.npy", 2], ["b.npy", 2], ["c.npy", 0]]}))
    both = {"mu": np.zeros(tiny_inception.DIM), "sigma": np.eye(tiny_inception.DIM)}
    official_files.write_pickle(tmp_path / "img512.pkl", {"num_images": 9, "fid": both})
    given = ["--teacher", str(edm2_file(tmp_path / "edm2-img512-s-2147483-0.130.pkl")), *QUICK, "--out", str(run)]
    given += ["--guide", str(edm2_file(tmp_path / "weak.pkl", label_dim=0)), "--guidance", "1.4", "--vae", str(vae)]
    given += ["--labels", str(tmp_path), "--reference", str(tmp_path / "img512.pkl")]
    given += ["--inception", str(tiny_inception.write(tmp_path / "inception.pt"))]
    imagenet512_edm2_sid.main([*given, "--max-steps", "1"])
    record = read_run(run)
    assert (record.config["class_counts"], record.config["logvar"], record.config["D"]) == ([1, 0, 2], True, "inf")
    grid = read_grid(max((run / "samples").glob("*.png")))
    assert grid.shape[1:] == (3, 64, 64)
    rows = json.loads((run / "results.json").read_text())
    assert "FID" in json.dumps(rows) and "published" not in (run / "results.txt").read_text()
    line = reproduce(record).line
    assert line is not None and line.startswith("deepspeed recipes/imagenet512_edm2_sid.py --teacher ")
    # What is this network's, the file's name says otherwise: no size of it is claimed.
    assert "--size" not in line and "--logvar" not in line and "--dropout" not in line
    capsys.readouterr()
    with pytest.raises(BadInput, match=r"of 4 channels, which is none of the sizes, and size s \(192 channels\)"):
        imagenet512_edm2_sid.main([*given, "--size", "s"])


def test_edm2_of_pixels_at_a_finite_D_and_on_from_there(tmp_path: Path) -> None:
    thin = replace(
        presets.get("edm2-img64-m", D=128.0), model_channels=4, channel_mult=(1,), num_blocks=1, attn_resolutions=(),
        label_dim=2,
    )  # fmt: skip
    save_model(build_network(thin), tmp_path / "model")
    given = ["--teacher", str(tmp_path / "model"), *QUICK, "--steps", "2", "--out", str(tmp_path / "run")]
    imagenet64_edm2_ipfm.main([*given, "--max-steps", "1", "--backward", "phased"])
    imagenet64_edm2_ipfm.main([*given, "--max-steps", "2"])
    record = read_run(tmp_path / "run")
    steps = [json.loads(row)["step"] for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1]
    assert (record.config["D"], record.config["steps"], record.config["noise.p_std"]) == (128.0, 2, 1.6)
    exported = json.loads((tmp_path / "run" / "generator" / "config.json").read_text())
    assert exported["network"]["D"] == 128.0 and exported["extra"]["dataset"] == "imagenet-64-cond"
    with pytest.raises(BadInput, match="D"):
        imagenet64_edm2_ipfm.main([*given, "--D", "64"])
