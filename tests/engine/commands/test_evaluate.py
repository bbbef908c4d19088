"""`ipfm evaluate`: what it prints for models and for images, and what it refuses."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_inception
import torch
from PIL import Image

from ipfm.engine import generate, heun_sample
from ipfm.engine.commands import evaluate as command
from ipfm.engine.commands.evaluate import Evaluate
from ipfm.engine.evaluation.metrics import FeatureMoments, frechet_distance
from ipfm.engine.evaluation.reference_data import open_reference
from ipfm.engine.evaluation.subject import SAMPLES_FILE, open_subject
from ipfm.engine.objectives.pid import PidConfig
from ipfm.engine.runtime import host_memory
from ipfm.engine.runtime.commandline import BadInput, parse
from ipfm.engine.sampling.stored_model import Schedule
from ipfm.models import EDMPrecond, load_model, load_teacher, presets, save_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher and generators at D = 128, images of their shape, statistics, and an Inception network."""
    root = tmp_path_factory.mktemp("evaluate")
    torch.manual_seed(0)
    net = EDMPrecond(presets.get("digits", D=128.0))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    about = {"dataset": "cifar10", "alpha": 1.0}
    save_model(net, root / "teacher", extra={"task": "teacher", "dataset": "cifar10"})
    save_model(net, root / "generator", extra={"task": "generator", "sigmas": [2.5, 1.25], **about})
    save_model(net, root / "plain", extra={"task": "generator", "sigmas": [2.5]})
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    np.savez(root / "real.npz", arr_0=pixels)
    flat = pixels.reshape(40, -1) / 127.5 - 1
    np.savez(root / "stats.npz", mu=flat.mean(0), sigma=np.cov(flat, rowvar=False))
    (root / "folder").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image[..., 0]).save(root / "folder" / f"{i:03d}.png")
    tiny_inception.write(root / "inception.pt")
    return root


@pytest.fixture
def options(root: Path) -> Evaluate:
    return Evaluate(
        model=root / "generator", reference=root / "stats.npz", features="pixels", images=30, batch=8, json=True
    )


def printed(capsys: pytest.CaptureFixture[str], options: Evaluate) -> dict:
    options.run()
    return json.loads(capsys.readouterr().out)


def distance(root: Path, images: torch.Tensor) -> float:
    """To the stored statistics, from moments of all images at once."""
    moments = FeatureMoments(64)
    moments.add(images.flatten(1))
    statistics = open_reference(root / "stats.npz").statistics
    assert statistics is not None
    return frechet_distance(moments, statistics)


def test_a_generator_is_sampled_at_its_own_D_and_levels(
    capsys: pytest.CaptureFixture[str], root: Path, options: Evaluate
) -> None:
    found = printed(capsys, replace(options, seed=7))
    assert (found["kind"], found["D"], found["nfe"], found["images"], found["seed"]) == ("generator", 128.0, 2, 30, 7)
    net = load_model(root / "generator")
    own = distance(root, generate(net, 30, D=128.0, sigmas=(2.5, 1.25), seed=7))
    gaussian = distance(root, generate(net, 30, D=math.inf, seed=7, override=True))
    assert found["frechet"] == pytest.approx(own, rel=1e-4)
    assert abs(own - gaussian) > 1e-3 * own  # more than the tolerance above


def test_a_teacher_is_sampled_by_heun(capsys: pytest.CaptureFixture[str], root: Path, options: Evaluate) -> None:
    found = printed(capsys, replace(options, model=root / "teacher", heun_steps=3))
    expected = heun_sample(load_model(root / "teacher"), 30, D=128.0, steps=3, seed=0)
    assert (found["kind"], found["nfe"]) == ("teacher", 5)
    assert found["frechet"] == pytest.approx(distance(root, expected), rel=1e-4)


def test_a_teacher_is_sampled_on_the_grid_that_is_asked_for(
    capsys: pytest.CaptureFixture[str], root: Path, options: Evaluate
) -> None:
    found = printed(capsys, replace(options, model=root / "teacher", heun_steps=3, rho=3.0, sigma_max=20.0))
    expected = heun_sample(load_model(root / "teacher"), 30, steps=3, seed=0, rho=3.0, sigma_max=20.0)
    assert found["frechet"] == pytest.approx(distance(root, expected), rel=1e-4)
    # The published figure is that of the usual grid.
    for schedule, known in ((Schedule(rho=7.0), True), (Schedule(sigma_min=0.01), False)):
        subject = open_subject(root / "teacher", CPU, heun_steps=18, seed=0, schedule=schedule)
        assert (subject.paper is not None) == known


def test_a_checkpoint_of_edm_is_a_teacher_at_the_D_that_is_given(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: Evaluate
) -> None:
    path = Path(__file__).parents[2] / "fixtures" / "edm_ncsnpp_uncond.pkl"
    config = load_teacher(path).config
    side, channels = config.img_resolution, config.img_channels
    np.savez(tmp_path / "real.npz", arr_0=np.zeros((5, side, side, channels), np.uint8))
    small = replace(options, model=path, reference=tmp_path / "real.npz", heun_steps=2, images=3)
    found = [printed(capsys, small), printed(capsys, replace(small, D=128.0))]
    assert [(one["kind"], one["D"], one["nfe"]) for one in found] == [("teacher", "inf", 3), ("teacher", 128.0, 3)]
    assert found[0]["frechet"] != found[1]["frechet"]


def test_repeats_take_the_next_images_and_the_smallest_counts(
    capsys: pytest.CaptureFixture[str], root: Path, options: Evaluate
) -> None:
    found = printed(capsys, replace(options, repeats=3))
    images = generate(load_model(root / "generator"), 90, D=128.0, sigmas=(2.5, 1.25), seed=0)
    expected = [distance(root, part) for part in images.split(30)]
    assert [run["distance"] for run in found["runs"]] == pytest.approx(expected, rel=1e-4)
    assert found["frechet"] == min(run["distance"] for run in found["runs"])
    replace(options, repeats=3, json=False).run()
    text = capsys.readouterr().out
    assert "3 x 30 images, seed 0" in text and "smallest Fréchet distance" in text


@pytest.mark.parametrize("kind", ["folder", "real.npz"])
@pytest.mark.parametrize("features", ["inception", "pixels"])
def test_images_are_at_no_distance_from_themselves(
    capsys: pytest.CaptureFixture[str], root: Path, kind: str, features: str
) -> None:
    found = printed(
        capsys,
        Evaluate(
            model=root / kind,
            reference=root / "folder",
            features="pixels" if features == "pixels" else "inception",
            inception=None if features == "pixels" else root / "inception.pt",
            metrics=("fid", "kid", "pr"),
            json=True,
        ),
    )
    assert 0 <= found["frechet"] < 1e-3 and found["images"] == 40
    assert (found["runs"][0]["precision"], found["runs"][0]["recall"]) == (1.0, 1.0)
    assert (found["kind"], found["D"], found["nfe"], found["seed"]) == ("images", None, None, None)


def test_a_part_of_the_images_is_drawn_at_random(
    capsys: pytest.CaptureFixture[str], root: Path, options: Evaluate
) -> None:
    found = [
        printed(capsys, replace(options, model=root / kind, seed=seed))
        for kind, seed in (("folder", 0), ("real.npz", 0), ("folder", 1))
    ]
    assert [one["images"] for one in found] == [30] * 3
    assert found[0]["frechet"] == pytest.approx(found[1]["frechet"], rel=1e-9)
    assert found[0]["frechet"] != pytest.approx(found[2]["frechet"], rel=1e-3)


def test_saved_statistics_stand_for_the_images(
    capsys: pytest.CaptureFixture[str], root: Path, tmp_path: Path, options: Evaluate
) -> None:
    first = printed(capsys, replace(options, reference=root / "folder", save_reference=tmp_path / "a" / "ref.npz"))
    again = printed(capsys, replace(options, reference=tmp_path / "a" / "ref.npz"))
    assert again["frechet"] == pytest.approx(first["frechet"], rel=1e-9)
    with np.load(tmp_path / "a" / "ref.npz") as kept, np.load(root / "stats.npz") as truth:
        np.testing.assert_allclose(kept["mu"], truth["mu"], atol=1e-6)
        np.testing.assert_allclose(kept["sigma"], truth["sigma"], atol=1e-6)


def test_the_text_says_what_was_measured(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    every = Evaluate(
        model=root / "generator",
        reference=root / "real.npz",
        inception=root / "inception.pt",
        metrics=("fid", "kid", "is", "pr"),
        images=20,
    )
    every.run()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"generator {root / 'generator'}, sampled at its own D = 128, 2 network evaluations an image"
    assert re.fullmatch(r"20 images, seed 0, \S+ s, \S+ images/s", lines[1])
    assert lines[2] == f"features: inception (12), reference: {root / 'real.npz'}"
    values = dict(re.split(r"  +", line, maxsplit=1) for line in lines[4:])
    assert list(values) == ["FID", "KID", "Inception score", "precision", "recall"]
    assert "±" in values["KID"] and "±" in values["Inception score"]
    assert all(math.isfinite(float(value.split()[0])) for value in values.values())
    Evaluate(model=root / "plain", inception=root / "inception.pt", metrics=("is",), images=20).run()
    text = capsys.readouterr().out
    assert "Inception score" in text and "FID" not in text and "1 network evaluation an image" in text


def test_published_figures_stand_beside_what_is_measured_as_they_were(
    capsys: pytest.CaptureFixture[str], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {
        kind: open_subject(root / kind, CPU, heun_steps=18, seed=0).paper for kind in ("generator", "teacher", "plain")
    }
    # These are networks for digits: what differs from the paper's stands beside its figure.
    differs = "; ncsn++ there, ddpm++ here; 128 channels there, 16 here; other levels or blocks there"
    assert found == {
        "generator": f"FID 2.12 (arXiv 2509.22454{differs}; its noise levels are not printed)",
        "teacher": f"FID 1.92 (arXiv 2509.22454{differs})",
        "plain": None,
    }
    fewer = open_subject(root / "teacher", CPU, heun_steps=17, seed=0).paper
    assert fewer == f"FID 1.92 (arXiv 2509.22454{differs}; 35 evaluations there, 33 here)"
    # A generator of physics informed distillation is known by the settings that were stored with it.
    net = EDMPrecond(presets.get("digits"))
    source = "Tee et al., Physics Informed Distillation; 128 channels there, 16 here; other levels or blocks there"
    known_figure = f"FID 3.68 ({source}; side before VGG 244 there, as it is here)"
    for difference, known in (("central", known_figure), ("first", None)):
        config = PidConfig(difference=difference, distance="lpips", points=250 if known else 100)
        facts = config.objective(net.config).facts
        stored = {"task": "generator", "dataset": "cifar10", **facts, "config": config.to_json()}
        save_model(net, tmp_path / difference, extra=stored)
        assert open_subject(tmp_path / difference, CPU, heun_steps=18, seed=0).paper == known
    monkeypatch.setattr(command, "PUBLISHED_IMAGES", 20)
    options = Evaluate(
        model=root / "generator", reference=root / "real.npz", inception=root / "inception.pt", json=True
    )
    assert printed(capsys, options)["paper"] == found["generator"]
    assert printed(capsys, replace(options, images=21))["paper"] is None
    pixels = replace(options, inception=None, features="pixels")
    assert printed(capsys, pixels)["paper"] is None
    replace(options, json=False).run()
    assert capsys.readouterr().out.splitlines()[-1].split(maxsplit=1) == ["paper", found["generator"]]


def test_options_as_they_are_typed(root: Path) -> None:
    typed = parse(
        Evaluate,
        [str(root / "generator"), "--reference", "a.npz", "--features", "pixels", "--metrics", "fid", "kid", "pr",
         "--repeats", "3", "--pr-images", "500", "--D", "inf"],
        prog="ipfm evaluate",
        description="",
    )  # fmt: skip
    assert typed == Evaluate(
        model=root / "generator", reference=Path("a.npz"), features="pixels", metrics=("fid", "kid", "pr"), repeats=3,
        pr_images=500, D=math.inf,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": "inception"}, "give --inception FILE (inception-2015-12-05.pt, a TorchScript file, is published"),
        ({"features": "inception"}, "or compare pixels with --features pixels"),
        ({"reference": None}, "give --reference, statistics (.npz) or real images"),
        ({"reference": "ROOT/none.npz"}, "none.npz does not exist"),
        ({"reference": "ROOT/inception.pt"}, "inception.pt"),
        ({"model": "ROOT/nowhere"}, "nowhere does not exist: give a model folder, a checkpoint, a data set"),
        ({"model": "ROOT/stats.npz"}, "stats.npz holds no images"),
        ({"model": "ROOT/inception.pt"}, "inception.pt"),
        ({"model": "ROOT/folder", "images": 41}, "images must be at most 40, as many as"),
        ({"model": "ROOT/folder", "repeats": 3}, "repeats must be 1 for images, got 3"),
        ({"model": "ROOT/folder", "D": 128.0}, "D was given, but"),
        ({"D": 64.0}, "128"),
        ({"model": "ROOT/folder", "sigma_min": 1.0, "rho": 7.0}, "sigma-min, rho were given, but"),
        ({"sigma_max": 20.0}, "sigma-max was given, but"),
        ({"rho": 0.0}, "rho must be a finite number > 0, got 0"),
        ({"images": 1}, "images must be at least 2, got 1"),
        ({"images": 10**10}, "images must be at most 1,000,000,000, got 10,000,000,000"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"heun_steps": 0}, "heun-steps must be at least 1, got 0"),
        ({"metrics": ("fid", "kid")}, "kid cannot be measured against a mean and covariance alone"),
        ({"metrics": ("fid", "is")}, "the Inception score needs class probabilities, which 'pixels' does not give"),
        ({"inception": "ROOT/inception.pt"}, "inception was given, but features is pixels"),
        ({"features": "inception", "inception": "ROOT/stats.npz"}, "stats.npz is no TorchScript network"),
        ({"features": "inception", "inception": "ROOT/inception.pt"}, "the reference has 64 features, 'inception'"),
        ({"save_reference": "ROOT/new.npz"}, "save-reference needs a --reference of images"),
        ({"save_reference": "ROOT/new.txt", "reference": "ROOT/folder"}, "save-reference must be a file that ends in"),
        ({"save_reference": "ROOT", "reference": "ROOT/folder"}, "save-reference must be a file that ends in"),
    ],
)
def test_bad_input_is_one_line(
    root: Path, options: Evaluate, capsys: pytest.CaptureFixture[str], changes: dict, message: str
) -> None:
    before = sorted(root.iterdir())
    given = {
        name: Path(value.replace("ROOT", str(root))) if isinstance(value, str) and "ROOT" in value else value
        for name, value in changes.items()
    }
    with pytest.raises(BadInput) as refused:
        replace(options, **given).run()
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert capsys.readouterr().out == "" and sorted(root.iterdir()) == before


def test_samples_that_are_not_finite_are_counted_and_refused_where_strict(
    capsys: pytest.CaptureFixture[str], root: Path, options: Evaluate, tmp_path: Path
) -> None:
    net = load_model(root / "plain")
    with torch.no_grad():
        next(net.parameters()).fill_(math.nan)
    save_model(net, tmp_path / "broken", extra={"task": "generator", "sigmas": [2.5]})
    with pytest.raises(BadInput, match="30 of 30 samples have non-finite features"):
        replace(options, model=tmp_path / "broken", strict=True).run()
    replace(options, model=tmp_path / "broken").run()
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["left_out"], found["frechet"]) == (0, 30, None)
    assert "30 of 30 images were not finite; --strict refuses them" in found["remarks"]
    replace(options, model=tmp_path / "broken", json=False, metrics=("fid", "kid"), reference=root / "real.npz").run()
    said = capsys.readouterr().out
    assert "Fréchet distance  not finite" in said and "kernel distance   not finite" in said


def test_references_and_images_are_read_as_training_data_are(
    capsys: pytest.CaptureFixture[str], root: Path, options: Evaluate, tmp_path: Path
) -> None:
    """What cannot be decoded, and what is left out: the same two options in each place where images are read."""
    shutil.copytree(root / "folder", tmp_path / "images")
    (tmp_path / "images" / "000.png").write_bytes(b"x")
    images = replace(options, images=None, reference=tmp_path / "images", model=root / "real.npz")
    for given in (images, replace(images, reference=root / "real.npz", model=tmp_path / "images")):
        with pytest.raises(BadInput, match=r"000\.png is no image"):
            given.run()
        found = printed(capsys, replace(given, skip_unreadable=True))
        assert found["images"] == 40 and any("000.png" in remark for remark in found["remarks"])
        (tmp_path / "images" / "x.xyz").write_bytes(b"x")
        with pytest.raises(BadInput, match=r"strict was given, and .*left out files .xyz: 1"):
            replace(given, strict=True).run()
        (tmp_path / "images" / "x.xyz").unlink()
        with pytest.raises(BadInput, match="give one of them"):
            replace(given, strict=True, skip_unreadable=True).run()


def test_images_that_cannot_be_compared_are_refused_before_anything_is_said(
    capsys: pytest.CaptureFixture[str], root: Path, options: Evaluate, tmp_path: Path
) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "large").mkdir()
    for name, side in (("one/a.png", 8), ("large/a.png", 16), ("large/b.png", 16)):
        Image.new("L", (side, side)).save(tmp_path / name)
    np.savez(tmp_path / "other.npz", mean=np.zeros(3), cov=np.eye(3))
    half = (root / "real.npz").read_bytes()
    (tmp_path / "half.npz").write_bytes(half[: len(half) // 2])
    np.save(tmp_path / "single.npy", np.zeros(3))
    for changes, message in {
        ("reference", tmp_path / "one"): "holds one image; a reference has at least two",
        ("reference", tmp_path / "large"): "are 1x16x16, those that are measured 1x8x8; pixels",
        ("reference", tmp_path / "other.npz"): "holds neither statistics (mu, sigma) nor images (arr_0), but mean, cov",
        ("reference", tmp_path / "half.npz"): "is no readable .npz: it is cut short or damaged",
        ("reference", tmp_path / "single.npy"): "it is a single array of NumPy",
        ("reference", root / "inception.pt"): "holds no images: it is a TorchScript program",
        ("reference", tmp_path / "one" / "a.png"): "it is a single image (PNG); give the folder that it lies in",
        ("model", tmp_path / "one" / "a.png"): "a.png is a single image (PNG); give the folder that it lies in",
        ("model", tmp_path / "one"): "holds one image; what is measured are at least two",
        ("model", root / "stats.npz"): "holds no images (arr_0), but statistics (mu, sigma), which are a reference",
    }.items():
        with pytest.raises(BadInput) as refused:
            replace(options, images=None, **dict([changes])).run()
        assert message in str(refused.value) and "\n" not in str(refused.value)
        assert capsys.readouterr().err == ""


def test_what_to_know_of_a_distance_is_said_and_in_json(
    capsys: pytest.CaptureFixture[str], root: Path, options: Evaluate, tmp_path: Path
) -> None:
    """Fewer images than features, of the reference too, and a reference of another size, which Inception hides."""

    def remarks(**changes: object) -> list[str]:
        replace(options, **changes).run()
        found = capsys.readouterr()
        said = json.loads(found.out)["remarks"]
        assert [line for line in found.err.splitlines() if "note" in line] == [f"ipfm: note: {text}" for text in said]
        return said

    singular = ", no more than the {} features: their covariance is singular, and the distance larger than that of many"
    assert remarks() == [f"30 images{singular.format(64)} images"]
    assert remarks(images=65) == []
    of_reference = remarks(images=65, reference=root / "real.npz")
    assert of_reference == [f"40 images of the reference{singular.format(64)} images"]
    with np.load(root / "real.npz") as arrays:
        np.savez(tmp_path / "large.npz", arr_0=arrays["arr_0"].repeat(2, axis=1).repeat(2, axis=2).repeat(3, axis=3))
    inception = {"features": "inception", "inception": root / "inception.pt", "images": 65}
    size = f"the images of {tmp_path}/large.npz are 3x16x16, those that are measured 1x8x8"
    assert remarks(reference=tmp_path / "large.npz", **inception) == [size]
    statistics = tmp_path / "cifar10-32x32.npz"
    np.savez(statistics, mu=np.zeros(12), sigma=np.eye(12))
    named = f"by its name {statistics} is of images 32x32, those that are measured are 1x8x8"
    assert remarks(reference=statistics, **inception) == [named]


def test_a_mixture_that_was_asked_for_is_said(
    capsys: pytest.CaptureFixture[str], root: Path, options: Evaluate, tmp_path: Path
) -> None:
    shutil.copytree(root / "folder", tmp_path / "mix")
    (tmp_path / "mix" / SAMPLES_FILE).write_text('{"mixed": true}')
    found = printed(capsys, replace(options, model=tmp_path / "mix", images=None))
    assert found["images"] == 40
    assert found["remarks"][0] == f"{tmp_path}/mix holds images of several models: they were put together with --add"


def test_what_is_left_out_of_images_is_said_and_in_json(
    capsys: pytest.CaptureFixture[str], root: Path, options: Evaluate, tmp_path: Path
) -> None:
    shutil.copytree(root / "folder", tmp_path / "some")
    (tmp_path / "some" / "x.xyz").write_bytes(b"x")
    replace(options, model=tmp_path / "some", images=None).run()
    said = capsys.readouterr()
    note = f"{tmp_path}/some: left out files .xyz: 1 (x.xyz)"
    assert said.err.count(note) == 1 and note in json.loads(said.out)["remarks"]


@pytest.mark.parametrize("name", ["stats.NPZ", "stats", "stats.dat"])
def test_statistics_are_told_by_content(root: Path, tmp_path: Path, name: str) -> None:
    shutil.copy(root / "stats.npz", tmp_path / name)
    assert open_reference(tmp_path / name).statistics is not None
    shutil.copy(root / "real.npz", tmp_path / name)
    assert open_subject(tmp_path / name, CPU, heun_steps=1, seed=0).available == 40


def test_a_batch_without_room_on_the_host_is_refused(options: Evaluate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 1 << 20)
    with pytest.raises(BadInput, match=r"a batch of 8,000,000 images needs .* 1\.91 GiB .*: give a smaller --batch"):
        replace(options, images=8_000_000, batch=8_000_000).run()
    # What the kernel distance keeps of them: 64 features each, in two places for a moment.
    several = replace(options, reference=options.model.parent / "folder", metrics=("kid",))
    with pytest.raises(
        BadInput, match=r"a comparison of 8,000,000 images needs .* 3\.83 GiB .*: give a smaller --imag"
    ):
        replace(several, images=8_000_000, batch=64).run()
