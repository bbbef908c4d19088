"""The published recipes: their settings beside those of the papers, what they say, and a run from end to end."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from ipfm.engine.experiments import TeacherOptions
from ipfm.engine.experiments.distil import DistilPlan
from ipfm.engine.experiments.network_options import NetworkOptions, network_differences
from ipfm.engine.experiments.step_time import StepTime
from ipfm.engine.memory.choose import Layout, choose_layout
from ipfm.engine.objectives.base import Distillation
from ipfm.engine.objectives.published import PAPER_RESULTS
from ipfm.engine.runtime.commandline import BadInput, parse_given
from ipfm.engine.training.resolve import complete
from ipfm.models import EDMPrecond, NetworkConfig, build_network, presets, save_model
from ipfm.models.checkpoints.published import published
from ipfm.recipes import (
    afhqv2_ipfm,
    afhqv2_sid,
    afhqv2_sida,
    cifar_ipfm,
    cifar_pid,
    cifar_realuid,
    cifar_sid,
    cifar_sida,
    cifar_teacher,
    ffhq_ipfm,
    ffhq_sid,
    ffhq_sida,
    ffhq_teacher,
    imagenet64_edm2_ipfm,
    imagenet64_edm2_sid,
    imagenet64_ipfm,
    imagenet64_pid,
    imagenet64_sid,
    imagenet64_sida,
    imagenet512_edm2_ipfm,
    imagenet512_edm2_sid,
)

DISTIL = {
    "cifar": cifar_ipfm, "ffhq": ffhq_ipfm, "afhqv2": afhqv2_ipfm, "imagenet64": imagenet64_ipfm,
    "cifar SiD": cifar_sid, "ffhq SiD": ffhq_sid, "afhqv2 SiD": afhqv2_sid, "imagenet64 SiD": imagenet64_sid,
}  # fmt: skip
PID = {"cifar": cifar_pid, "imagenet64": imagenet64_pid}
TEACH = {"cifar": cifar_teacher, "ffhq": ffhq_teacher}

# recipe -> (lr, beta1 of student and generator, alpha, batch, dropout, augment, EMA half-life in kimg, Heun steps,
# Adam's epsilon, length in kimg)
PUBLISHED = {
    "cifar": (1e-5, 0.0, 0.0, 1.0, 256, 0.0, 0.12, 500, 18, 1e-8, 30_000),
    "ffhq": (1e-5, 0.0, 0.9, 1.0, 512, 0.05, 0.15, 500, 40, 1e-6, 30_000),
    "afhqv2": (5e-6, 0.0, 0.0, 1.0, 512, 0.05, 0.15, 500, 40, 1e-6, 30_000),
    "imagenet64": (4e-6, 0.0, 0.0, 1.2, 8192, 0.1, 0.0, 2000, 40, 1e-6, 30_000),
    "cifar SiD": (1e-5, 0.0, 0.0, 1.2, 256, 0.13, 0.12, 500, 18, 1e-8, 500_000),
    "ffhq SiD": (1e-5, 0.0, 0.9, 1.2, 512, 0.05, 0.15, 500, 40, 1e-6, 500_000),
    "afhqv2 SiD": (5e-6, 0.0, 0.0, 1.0, 512, 0.05, 0.15, 500, 40, 1e-6, 500_000),
    "imagenet64 SiD": (4e-6, 0.0, 0.0, 1.2, 8192, 0.1, 0.0, 2000, 40, 1e-6, 1_000_000),
}


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In an empty folder, without timing full-size networks or laying them out (test_fits does)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ipfm.engine.experiments.dry_run.step_time", lambda *_: StepTime(0.001))
    monkeypatch.setattr("ipfm.engine.experiments.dry_run.layout_table", lambda *_, **__: "layouts")


@pytest.fixture
def thin_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory plan of a thin network: those of full size take half a minute each (test_recipe_input has one)."""

    def thin(config: Distillation, network: NetworkConfig, *, ranks: int, budget: int | None) -> Layout:
        network = replace(network, model_channels=32, channel_mult=(1,), num_blocks=1, attn_resolutions=())
        return choose_layout(config, network, ranks=ranks, budget=budget)

    monkeypatch.setattr("ipfm.engine.experiments.dry_run.choose_layout", thin)


def dry(capsys: pytest.CaptureFixture[str], module, *arguments: str) -> dict[str, str]:
    """The settings that --dry-run prints, by name, and the whole text as "text"."""
    module.main([*arguments, "--dry-run"])
    text = capsys.readouterr().out
    lines = [line.split(None, 1) for line in text.splitlines() if line.startswith("  ") and len(line.split()) > 1]
    return dict(lines) | {"text": text}


@pytest.mark.usefixtures("thin_plan")
@pytest.mark.parametrize("recipe", PUBLISHED)
def test_settings_are_those_of_the_papers(capsys: pytest.CaptureFixture[str], tmp_path: Path, recipe: str) -> None:
    # Nothing is left open for memory to decide, which takes longer for the large networks.
    said = dry(capsys, DISTIL[recipe], "--micro-batch", "16", "--zero", "1", "--backward", "phased")
    lr, student_beta1, generator_beta1, alpha, batch, dropout, augment, ema, heun, eps, kimg = PUBLISHED[recipe]
    expected = {
        "lr": lr, "student_beta1": student_beta1, "generator_beta1": generator_beta1, "alpha": alpha, "batch": batch,
        "dropout": dropout, "augment": augment, "ema_kimg": ema, "heun_steps": heun, "ema_rampup": 0.05,
        "sigmas": 2.5, "eps": eps, "max_steps": math.ceil(kimg * 1000 / batch),
    }  # fmt: skip
    assert {name: float(said[name]) for name in expected} == pytest.approx(expected)
    # SiD computes without TF32.
    assert said["tf32"] == str("SiD" not in recipe)
    assert not list(tmp_path.iterdir())


def test_sid_is_diffusion(capsys: pytest.CaptureFixture[str]) -> None:
    said = dry(capsys, cifar_sid)
    assert said["D"] == "inf" and said["out"] == "runs/cifar_sid-Dinf-alpha1.2-K1"
    assert "the settings of SiD (arXiv 2404.04057)" in said["text"] and "55,733,891" in said["text"]  # ddpm++


@pytest.mark.usefixtures("thin_plan")
def test_settings_of_realuid(capsys: pytest.CaptureFixture[str]) -> None:
    """Five sixths of 500 000 updates are the student's; the average forgets by 0.999 in each of the generator's."""
    said = dry(capsys, cifar_realuid, "--micro-batch", "16", "--zero", "1", "--backward", "phased")
    numbers = {"lr": 3e-5, "alpha": 0.5, "batch": 256, "dropout": 0, "augment": 0, "clip_grad": 1, "student_updates": 5}
    assert {name: float(said[name]) for name in numbers} == numbers
    assert (said["student_init"], said["real_xflip"], said["real_weights"]) == ("random", "True", "0.92, 0.94")
    assert 6 * int(said["max_steps"]) == pytest.approx(500_000, rel=1e-4)
    assert 0.5 ** (256 / (1000 * float(said["ema_kimg"]))) == pytest.approx(0.999, abs=1e-6)
    assert "published is FID 2.23 (arXiv 2509.22459; a smaller flow matching network there)" in said["text"]
    assert said["out"] == "runs/cifar_realuid-Dinf-alpha0.5-K1-real0.92-0.94"
    settings = cifar_realuid.RECIPE.varied({}, presets.get("cifar10-ncsnpp-cond"))
    assert settings.real_weights == (0.98, 0.96)
    second = cifar_realuid.RECIPE.varied({"init": Path("runs/first")}, presets.get("cifar10-ncsnpp"))
    assert (second.real_weights, second.lr, second.student_init) == ((0.92, 0.86), 1e-5, "auto")
    assert (said["lr_warmup"], second.lr_warmup) == ("500", 0)
    assert 6 * second.kimg / 0.256 == pytest.approx(100_000, rel=1e-3)
    with pytest.raises(BadInput, match=r"^give --teacher"):
        cifar_realuid.main([])


@pytest.mark.usefixtures("thin_plan")
@pytest.mark.parametrize(("recipe", "lr", "batch"), [("cifar", 2e-4, 512), ("imagenet64", 1e-4, 2048)])
def test_settings_of_pid(capsys: pytest.CaptureFixture[str], recipe: str, lr: float, batch: int) -> None:
    said = dry(capsys, PID[recipe], "--distance", "l2", "--micro-batch", "4")
    assert (float(said["lr"]), int(said["batch"]), int(said["points"])) == (lr, batch, 250)
    # 0.99995 in every step: the ramp ends with the first one.
    assert 0.5 ** (batch / (1000 * float(said["ema_kimg"]))) == pytest.approx(0.99995, abs=1e-9)
    assert float(said["ema_rampup"]) == 1e6 and float(said["dropout"]) == 0
    steps = {"cifar": 800_000, "imagenet64": 400_000}[recipe]
    assert (int(said["max_steps"]), said["lpips_side"]) == (steps, "default")
    with pytest.raises(BadInput, match="LPIPS"):
        PID[recipe].main(["--dry-run"])


@pytest.mark.parametrize(("recipe", "clip"), [("cifar", None), ("imagenet64", 1.0)])
def test_pid_resizes_images_before_vgg_and_clips_as_its_paper_does(
    monkeypatch: pytest.MonkeyPatch, recipe: str, clip: float | None
) -> None:
    monkeypatch.setattr("ipfm.engine.objectives.pid.read_weights", lambda path: {})
    base = PID[recipe].RECIPE.defaults
    sides = {}
    for line in ("", "--distance lpips", "--lpips-side 224", "--lpips-side None", "--distance l2"):
        given = parse_given([*line.split(), "--dry-run"], default=base, prog="", description="")
        config = PID[recipe].RECIPE.plan(given).config
        sides[line] = config.lpips_side
        assert config.clip_grad == clip
    assert list(sides.values()) == [244, 244, 224, None, None]


@pytest.mark.usefixtures("thin_plan")
@pytest.mark.parametrize("recipe", [*DISTIL, "PID cifar", "PID imagenet64"])
def test_each_setting_says_where_it_comes_from(capsys: pytest.CaptureFixture[str], recipe: str) -> None:
    """Whatever a recipe sets has an origin, which --help and a dry run print; what is given is the user's."""
    module = PID[recipe[4:]] if recipe.startswith("PID") else DISTIL[recipe]
    origins, base = module.RECIPE.origins, module.RECIPE.base
    settings = base.distillation()
    plain, known = type(settings)(), {f.name for f in fields(settings)}
    logs = {"heun_steps", "log_every"}
    assert {name for name in known if getattr(settings, name) != getattr(plain, name)} - logs <= origins.keys() <= known
    with pytest.raises(SystemExit):
        module.main(["--help"])
    text = capsys.readouterr().out
    assert ("where the settings come from" in text and "printed in the method's paper" in text) or "of SiD" in text
    said = dry(capsys, module, "--lr", "0.5", *(["--distance", "l2"] if "PID" in recipe else []))["text"]
    assert "  given: " in said and "lr" in said.partition("  given: ")[2].partition("\n")[0].split(", ")


def test_a_run_begun_with_an_older_recipe_goes_on_as_it_was_begun(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Two student updates and 100 000 kimg were the recipe's at D = 2048; what was the user's is still compared."""
    network = replace(presets.get("cifar10-ncsnpp", D=2048.0), model_channels=8, channel_mult=(1,), num_blocks=1)
    save_model(EDMPrecond(network), tmp_path / "model")
    begun = {**cifar_ipfm.BASE.to_json(), "student_updates": 2, "kimg": 100_000.0, "D": 2048.0, "sigmas": [2.5]}
    begun |= {"precision": "fp32", "teacher_storage": "fp32"}
    run = tmp_path / "runs" / "cifar-D2048-alpha1-K1"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"format": 1, "kind": "distill", "objective": "ipfm", "config": begun}))
    layout = ["--teacher", str(tmp_path / "model"), "--micro-batch", "16", "--zero", "0", "--backward", "joint"]
    said = dry(capsys, cifar_ipfm, *layout)
    assert (said["student_updates"], said["max_steps"]) == ("2", "390625")
    assert "was begun: kimg 100000.0, student_updates 2; the recipe itself is another now" in said["text"]
    assert dry(capsys, cifar_ipfm, *layout, "--max-steps", "400000")["max_steps"] == "400000"
    with pytest.raises(BadInput, match="student_updates is 2 there, 1 here"):
        cifar_ipfm.main([*layout, "--student-updates", "1", "--dry-run"])
    with pytest.raises(BadInput, match="batch is 256 there, 128 here"):
        cifar_ipfm.main([*layout, "--batch", "128", "--dry-run"])
    # Elsewhere the recipe is what it is now; what cannot be read is refused as before.
    assert dry(capsys, cifar_ipfm, *layout, "--out", "new")["max_steps"] == "117188"
    for damaged in ('{"config": ["kimg"]}', '{"config": "kimg"}', "[]", "{"):
        (run / "config.json").write_text(damaged)
        with pytest.raises(BadInput, match="cannot be read as a run's configuration"):
            cifar_ipfm.main([*layout, "--dry-run"])


@pytest.mark.usefixtures("thin_plan")
@pytest.mark.parametrize(
    ("recipe", "fid"), [("cifar", 1.923), ("ffhq", 1.55), ("afhqv2", 1.628), ("imagenet64", 1.524)]
)
def test_sid_has_its_published_figure(capsys: pytest.CaptureFixture[str], recipe: str, fid: float) -> None:
    said = dry(capsys, DISTIL[f"{recipe} SiD"])
    assert f"published is FID {fid:g} (arXiv 2404.04057)" in said["text"]


# Data set -> figure and length in kimg.
SIDA = {
    "cifar10": (cifar_sida, 1.499, 300_000),
    "ffhq64": (ffhq_sida, 1.04, 200_000),
    "afhqv264": (afhqv2_sida, 1.276, 200_000),
    "imagenet64cond": (imagenet64_sida, 1.11, 300_000),
}


@pytest.mark.parametrize("dataset", SIDA)
def test_settings_of_sida(dataset: str) -> None:
    """Those of SiD's recipe, but for the discriminator, alpha = 1, the generator's first decay and the length."""
    recipe, fid, kimg = SIDA[dataset]
    base = recipe.RECIPE.base.distillation()
    sid = DISTIL[f"{recipe.RECIPE.file.removesuffix('_sida.py')} SiD"].RECIPE.base.distillation()
    told = {"discriminator": "encoder", "discriminator_weights": (1.0, 2e-4), "discriminator_kimg": (100.0, 200.0)}
    assert base == replace(sid, alpha=1.0, generator_beta1=0.0, kimg=kimg, **told)
    network = presets.get(recipe.RECIPE.preset)
    settings = complete(base, network, torch.device("cpu")).to_json()
    figure = base.figure(dataset, settings, network)
    assert figure is not None and (figure.fid, figure.source) == (fid, "arXiv 2410.14919")
    assert figure.differs == ("the best of SiDA and SiD²A there, which begins with SiD's generator",)


@pytest.mark.usefixtures("thin_plan")
def test_sida_needs_images(capsys: pytest.CaptureFixture[str]) -> None:
    said = dry(capsys, cifar_sida, "--micro-batch", "16", "--zero", "1", "--backward", "phased")
    assert said["out"] == "runs/cifar_sida-Dinf-alpha1-K1-encoder" and "published is FID 1.499" in said["text"]
    with pytest.raises(BadInput, match=r"^give --teacher"):
        cifar_sida.main([])


def test_conditional_networks_of_cifar_are_trained_longer_in_sid() -> None:
    networks = (presets.get("cifar10-ddpmpp-cond"), presets.get("cifar10-ddpmpp"))
    assert [cifar_sid.RECIPE.varied({}, network).kimg for network in networks] == [800_000, 500_000]


@pytest.mark.usefixtures("thin_plan")
@pytest.mark.parametrize("setting", PAPER_RESULTS)
def test_every_published_setting_is_recognised(capsys: pytest.CaptureFixture[str], setting) -> None:
    recipe = {"cifar10": "cifar", "ffhq64": "ffhq"}[setting.dataset]
    said = dry(
        capsys, DISTIL[recipe], "--D", f"{setting.D:g}", "--alpha", f"{setting.alpha:g}", "--steps", str(setting.steps)
    )
    assert float(said["D"]) == setting.D
    # One in the paper; two in the run without regularisation of the script that was published beside it.
    alone = (recipe, setting.D, setting.alpha, setting.steps) == ("cifar", 2048, 0.5, 1)
    assert int(said["student_updates"]) == (2 if alone else 1)
    # With the paper's network and one step nothing differs; the paper does not print the levels of several.
    unsaid = "" if setting.steps == 1 else "; its noise levels are not printed"
    assert f"published is FID {PAPER_RESULTS[setting].fid:g} (arXiv 2509.22454{unsaid})" in said["text"]
    assert len(said["sigmas"].split(", ")) == setting.steps
    assert "no result" not in said["text"]


@pytest.mark.usefixtures("thin_plan")
def test_what_was_never_published_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    line = "CIFAR-10: no result is published for D = 64 at alpha = 1 and 1 step; published there: D = 128, 2048, inf"
    assert line in dry(capsys, cifar_ipfm, "--D", "64")["text"]
    assert (
        "no result is published for D = 128 at alpha = 1.2"
        in dry(capsys, cifar_ipfm, "--alpha", "1.2", "--D", "128")["text"]
    )
    assert (
        "D = 2048 at alpha = 1 and 2 steps; published there: D = 128, inf"
        in dry(capsys, ffhq_ipfm, "--D", "2048", "--steps", "2")["text"]
    )
    for module in (afhqv2_ipfm, imagenet64_ipfm):
        text = dry(capsys, module)["text"]
        assert "carried over from SiD" in text and "no result of this method is published for this data set" in text


def test_what_a_teacher_lacks_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    net = EDMPrecond(
        img_resolution=32, img_channels=3, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(),
        label_dim=10, D=128.0,
    )  # fmt: skip
    save_model(net, tmp_path / "model")
    said = dry(capsys, cifar_ipfm, "--teacher", str(tmp_path / "model"))
    assert "no result of this method is published for class-conditional networks" in said["text"]
    assert "without augmentation, as the teacher takes no augmentation labels" in said["text"]
    assert float(said["augment"]) == 0
    with pytest.raises(BadInput, match=r"augment 0.12 needs a network with 9 augmentation labels"):
        cifar_ipfm.main(["--teacher", str(tmp_path / "model"), "--augment", "0.12", "--dry-run"])


@pytest.mark.usefixtures("thin_plan")
@pytest.mark.parametrize("recipe", DISTIL)
def test_without_a_teacher_it_says_which_fit(capsys: pytest.CaptureFixture[str], tmp_path: Path, recipe: str) -> None:
    with pytest.raises(BadInput) as error:
        DISTIL[recipe].main([])
    assert str(error.value) == "give --teacher; --dry-run works without one"
    for part in ("README of", "NVlabs/edm", "ipfm convert FILE FOLDER", ".pkl"):
        assert part in error.value.details
    assert error.value.details in dry(capsys, DISTIL[recipe])["text"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("recipe", TEACH)
def test_teacher_recipes(capsys: pytest.CaptureFixture[str], tmp_path: Path, recipe: str) -> None:
    with pytest.raises(BadInput, match="give --data") as error:
        TEACH[recipe].main([])
    assert "as its authors publish it" in error.value.details and "ipfm dataset" in error.value.details
    said = dry(capsys, TEACH[recipe], "--D", "inf", "--arch", "ddpmpp")
    expected = {"cifar": (512, 1e-3, 0.13, 0.12), "ffhq": (256, 2e-4, 0.05, 0.15)}[recipe]
    assert tuple(float(said[name]) for name in ("batch", "lr", "dropout", "augment")) == expected
    assert (said["D"], float(said["beta1"]), float(said["lr_rampup_kimg"])) == ("inf", 0.9, 10_000)
    assert {"cifar": "55,733,891", "ffhq": "61,805,571"}[recipe] in said["text"]
    # Without augmentation the network has no layer for its labels.
    assert {"cifar": "55,732,739", "ffhq": "61,804,419"}[recipe] in dry(
        capsys, TEACH[recipe], "--arch", "ddpmpp", "--augment", "0"
    )["text"]
    assert not list(tmp_path.iterdir())


def test_teachers_of_other_architectures(capsys: pytest.CaptureFixture[str]) -> None:
    """ADM, own widths, levels and attention, and a preset of another size, fitted to the recipe's images."""
    small = ["--num-blocks", "1", "--model-channels", "8"]
    said = dry(capsys, cifar_teacher, "--arch", "adm", "--channel-mult", "8", "16", "--attention", "0", *small)
    assert said["out"] == "runs/cifar-teacher-adm-D2048"
    assert "DhariwalUNet, 3x32x32, " in said["text"]
    said = dry(capsys, ffhq_teacher, "--preset", "imagenet64-adm", *small, "--channel-mult", "8", "--attention", "64")
    assert said["out"] == "runs/ffhq-teacher-imagenet64-adm-D128"
    assert "DhariwalUNet, 3x64x64, " in said["text"]
    network = TeacherOptions(channel_mult=(1, 2), attention=(16,), model_channels=16).network(
        presets.get("afhqv2-64-ncsnpp"), (1, 32, 32), D=4.0, classes=3, augmented=True
    )
    assert (network.image_shape, network.label_dim, network.augment_dim, network.D) == ((1, 32, 32), 3, 9, 4.0)
    assert (network.channel_mult, network.attn_resolutions, network.num_blocks) == ((1, 2), (16,), 4)
    plain = presets.get("cifar10-ncsnpp")
    assert network_differences(replace(plain, channel_mult=(1, 2), attn_resolutions=()), plain) == [
        "--channel-mult", "1", "2", "--attention", "0",
    ]  # fmt: skip
    assert network_differences(presets.get("ffhq64-ncsnpp"), plain) is None
    edm2 = presets.get("edm2-img64-s")
    assert network_differences(replace(edm2, channels_per_head=32), edm2) == ["--channels-per-head", "32"]


def test_a_small_edm2_has_attention_by_its_own_width_of_heads() -> None:
    base, shape = presets.get("edm2-img64-s"), (3, 16, 16)
    options = NetworkOptions(arch="edm2", model_channels=8, channel_mult=(1, 2), channels_per_head=8)
    network = options.network(base, shape, D=math.inf, classes=0, augmented=False)
    assert network.channels_per_head == 8
    with pytest.raises(ValueError, match=r"^channels-per-head is for --arch edm2: the others have heads of their own$"):
        options.network(presets.get("cifar10-ncsnpp"), shape, D=math.inf, classes=0, augmented=False)
    with pytest.raises(ValueError, match=r"^channels-per-head must be at least 1, got 0$"):
        NetworkOptions(channels_per_head=0).check_network()


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (cifar_ipfm, ["--inception", "x.pt", "--dry-run"], "inception was given without reference"),
        (cifar_ipfm, ["--reference", "x.npz", "--dry-run"], "inception-2015-12-05.pt"),
        (cifar_ipfm, ["--augment", "1.5"], "--augment must lie in [0, 1], got 1.5"),
        (cifar_teacher, ["--arch", "unet"], "--arch must be one of adm, ddpmpp, edm2, ncsnpp"),
        (cifar_teacher, ["--attention", "7", "--dry-run"], "attention 7 is no level of this network"),
        (cifar_teacher, ["--attention", "0", "16"], "--attention 0 means none, got it beside others"),
        (cifar_teacher, ["--channel-mult", "1", "0"], "--channel-mult must be at least 1, got 0"),
        (cifar_teacher, ["--channel-mult", *"1222222", "--dry-run"], "multiple of 64, which ipfm dataset --resolution"),
        (cifar_teacher, ["--preset", "vgg", "--dry-run"], "network preset 'vgg' is unknown; possible: edm2-img512-"),
        (cifar_teacher, ["--preset", "adm", "--arch", "adm", "--dry-run"], "leave one of them out"),
        (cifar_teacher, ["--continue-from", "x.pt", "--preset", "adm"], "--preset was given, but continue-from"),
        (cifar_teacher, ["--model-channels", "0"], "--model-channels must be at least 1, got 0"),
        (cifar_teacher, ["--data", "nowhere.zip"], "nowhere.zip"),
        (cifar_teacher, ["--continue-from", "nowhere.pt"], "nowhere.pt"),
        (cifar_teacher, ["--continue-from", "x.pt", "--num-blocks", "2"], "--num-blocks was given, but continue-from"),
        (imagenet64_edm2_ipfm, ["--size", "xxl"], "size xxl: ImageNet-64 has no such teacher; possible: s, m, l, xl"),
        (imagenet512_edm2_ipfm, ["--size", "huge"], "--size must be one of l, m, s, xl, xs, xxl"),
        (cifar_ipfm, ["--size", "xs"], "recipes for EDM2's networks have it, such as imagenet512_edm2_ipfm.py"),
        (cifar_teacher, ["--continue-from", "x.pt", "--conditional"], "--conditional was given, but continue-from"),
    ],
)  # fmt: skip
def test_bad_options(tmp_path: Path, module, arguments: list[str], message: str) -> None:
    with pytest.raises(BadInput) as error:
        module.main(arguments)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


# -- EDM2's networks, in several sizes ---------------------------------------------------------------------------------

EDM2 = {
    "512 IPFM": imagenet512_edm2_ipfm, "512 SiD": imagenet512_edm2_sid, "64 IPFM": imagenet64_edm2_ipfm,
    "64 SiD": imagenet64_edm2_sid,
}  # fmt: skip


def planned(module, *arguments: str) -> DistilPlan:
    """What a recipe would do with these options; `dry` prints it, which takes longer."""
    given = parse_given([*arguments, "--dry-run"], default=module.RECIPE.defaults, prog="", description="")
    return module.RECIPE.plan(given)


@pytest.mark.parametrize(
    ("recipe", "size", "dropout", "kimg"),
    [
        ("512 IPFM", "xs", 0, 30_000), ("512 IPFM", "m", 0.1, 30_000), ("512 SiD", "s", 0, 200_000),
        ("512 SiD", "xl", 0.1, 200_000), ("512 SiD", "xxl", 0.1, 100_000), ("64 IPFM", "s", 0, 30_000),
        ("64 SiD", "l", 0.1, 200_000),
    ],
)  # fmt: skip
def test_settings_for_edm2_are_those_of_sid_by_size(recipe: str, size: str, dropout: float, kimg: int) -> None:
    plan = planned(EDM2[recipe], "--size", size)
    expected = {
        "lr": 5e-5, "student_lr": None, "student_beta1": 0, "generator_beta1": 0, "alpha": 1, "batch": 2048,
        "dropout": dropout, "augment": 0, "ema_kimg": 2000, "ema_rampup": 0.05, "heun_steps": 32, "sigmas": (2.5,),
        "eps": 1e-6, "kimg": kimg, "logvar": True, "tf32": "SiD" not in recipe, "student_updates": 1,
    }  # fmt: skip
    assert {name: getattr(plan.config, name) for name in expected} == expected
    # As the teachers' were: of latents SiD's too, of pixels EDM2's.
    noise = plan.config.noise
    assert (noise.p_mean, noise.p_std, noise.t_max) == ((-0.4, 1, 800) if "512" in recipe else (-0.8, 1.6, 800))
    assert plan.network == presets.get(f"edm2-img{recipe[:3].strip()}-{size}")
    stem = EDM2[recipe].RECIPE.file.removesuffix(".py").removesuffix("_ipfm")
    assert str(plan.path) == f"runs/{stem}-{size}-Dinf-alpha1-K1-logvar"
    assert [m.RECIPE.file for m in (*EDM2.values(), *DISTIL.values()) if m.RECIPE.names(plan.path.name)] == [
        EDM2[recipe].RECIPE.file
    ]
    # No FID of either method is published for these networks; another method's is none of theirs.
    assert not any("FID" in note and "no FID" not in note for note in plan.notes) and "EDM2's" in plan.notes[0]


@pytest.mark.parametrize("recipe", EDM2)
def test_each_setting_for_edm2_says_where_it_comes_from(capsys: pytest.CaptureFixture[str], recipe: str) -> None:
    origins, settings = EDM2[recipe].RECIPE.origins, EDM2[recipe].RECIPE.base.distillation()
    plain, known = type(settings)(), {f.name for f in fields(settings)}
    others = {name for name in known if getattr(settings, name) != getattr(plain, name)}
    assert others - {"heun_steps", "log_every"} <= origins.keys() <= known
    assert origins["noise"].source == ("SiD" if "512" in recipe else "EDM2")
    with pytest.raises(SystemExit):
        EDM2[recipe].main(["--help"])
    said = capsys.readouterr().out
    assert "where the settings come from" in said and "of SiD, arXiv 2404.04057" in said and "--size" in said


@pytest.mark.parametrize("recipe", EDM2)
def test_each_size_names_its_network_and_its_published_file(recipe: str) -> None:
    sized = EDM2[recipe].RECIPE
    for name, size in sized.sizes.items():
        network = presets.get(size.preset)
        kimg, std = re.fullmatch(rf"{size.preset}-(\d{{7}})-(0\.\d{{3}})\.pkl", size.teacher).groups()
        known = published(network, {}, Path(size.teacher))
        assert (known.size, known.kimg, known.std) == (name.upper(), int(kimg), float(std))
        assert (known.name, known.contradiction) == (size.teacher, "")
        assert network.image_shape == sized.shape and sized.size_of(network) == name
    assert [*sized.sizes] == [*("xs", "s", "m", "l", "xl", "xxl")][slice(None) if "512" in recipe else slice(1, 5)]
    with pytest.raises(BadInput, match=rf"^give --teacher, for size s the file {sized.sizes['s'].teacher}; ") as error:
        EDM2[recipe].main(["--size", "s"])
    assert all(size.teacher in error.value.details for size in sized.sizes.values())
    assert "README of NVlabs/edm2" in error.value.details and "--preset edm2-img" in error.value.details
    with pytest.raises(BadInput, match=r"^edm2-.*\.pkl is not there: download it first$") as missing:
        EDM2[recipe].main(["--teacher", sized.sizes["s"].teacher])
    assert missing.value.details == error.value.details


def edm2_teacher(folder: Path, preset: str, **changes: object) -> list[str]:
    """The options that name a thin teacher of this preset's images."""
    thin = {"model_channels": 4, "channel_mult": (1,), "num_blocks": 1, "attn_resolutions": (), "channels_per_head": 4}
    save_model(build_network(replace(presets.get(preset), **{**thin, **changes})), folder)
    return ["--teacher", str(folder), "--micro-batch", "4", "--zero", "0", "--backward", "joint"]


def test_the_teacher_decides_its_size_and_another_one_is_refused(tmp_path: Path) -> None:
    module = imagenet512_edm2_sid
    own = edm2_teacher(tmp_path / "own", "edm2-img512-xs", logvar_channels=0)
    with pytest.raises(BadInput) as error:
        module.main([*own, "--size", "m", "--dry-run"])
    assert str(error.value) == (
        "the teacher is a network of 4 channels, which is none of the sizes, and size m (256 channels) was given: "
        "leave size out, or give edm2-img512-m-2147483-0.100.pkl as --teacher"
    )
    with pytest.raises(ValueError, match="of 128 channels, which is size xs, and size s"):
        module.RECIPE.check_network(presets.get("edm2-img512-xs"), "s")
    plan = planned(module, *own)
    # A file without a log-variance has no weights by it.
    assert (plan.config.logvar, plan.config.dropout) == (False, 0.0)
    assert plan.notes[-1].endswith("without weights by the log-variance, as the teacher's file has none")
    assert str(plan.path) == "runs/imagenet512_edm2_sid-4channels-Dinf-alpha1-K1"
    for options, message in (
        (["--logvar"], "logvar needs a teacher with a log-variance, its file has none: leave it out"),
        (["--guide", "x"], "guid"),
    ):
        with pytest.raises(BadInput, match=message):
            module.main([*own, *options, "--dry-run"])
    pixels = edm2_teacher(tmp_path / "pixels", "edm2-img64-s")
    with pytest.raises(BadInput, match=r"makes images 3x64x64, the latents of ImageNet-512 are 4x64x64; distill_sid"):
        module.main([*pixels, "--dry-run"])
    adm = replace(presets.get("imagenet64-adm"), model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=())
    save_model(EDMPrecond(adm), tmp_path / "adm")
    with pytest.raises(BadInput, match=r"is a network of ADM, imagenet64_edm2_sid\.py is for EDM2's; distill_sid"):
        imagenet64_edm2_sid.main(["--teacher", str(tmp_path / "adm"), "--dry-run"])
