"""Images and teachers of any size: the rule of their settings, the walk from a folder of JPEGs, what is refused."""

from __future__ import annotations

import io
import json
import math
import shlex
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import official_files
import pytest
import tiny_inception
from PIL import Image

from ipfm.engine.commands.main import _main as ipfm
from ipfm.engine.commands.report.reproduce import reproduce, use
from ipfm.engine.config import free_settings
from ipfm.engine.experiments.defaults_by_size import (
    LARGEST_SIDE,
    MOST_PASSES,
    ROWS,
    SMALLEST_SIDE,
    Facts,
    by_size,
    default_arch,
    possible,
    row_of,
    teacher_settings,
)
from ipfm.engine.experiments.own_distil import facts_of, levels_of
from ipfm.engine.experiments.own_images import slug
from ipfm.engine.experiments.step_time import StepTime
from ipfm.engine.noise_levels import NoiseLevels
from ipfm.engine.runtime.commandline import BadInput, parse_given
from ipfm.engine.training.run_folder import _identity
from ipfm.engine.training.run_state import read_run
from ipfm.models import EDMPrecond, NetworkConfig, build_network, load_model, presets, save_model
from ipfm.recipes import cifar_ipfm, digits_ipfm, distill_ipfm, distill_pid, distill_sid, ffhq_teacher, train_teacher

DISTIL = {"ipfm": distill_ipfm, "sid": distill_sid, "pid": distill_pid}
ARCHS = {"ddpmpp": "cifar10-ddpmpp", "ncsnpp": "cifar10-ncsnpp", "adm": "imagenet64-adm-uncond"}
FULL = Facts((3, 64, 64), 60_000, 0, "ddpm++", gpu=True)
FIXTURE = Path(__file__).parents[1] / "fixtures" / "edm_ddpmpp_uncond.pkl"
# One step on a few images.
SHORT = ["--max-steps", "1", "--batch", "4", "--zero", "0", "--activation-checkpointing", "off", "--log-every", "1"]
SAMPLED = ["--eval-images", "8", "--heun-steps", "1", "--backward", "joint"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In an empty folder, with few images in pictures; nothing is timed or laid out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ipfm.engine.training.loop.PICTURE_IMAGES", 2)
    monkeypatch.setattr("ipfm.engine.experiments.dry_run.layout_table", lambda *_, **__: "layouts")
    monkeypatch.setattr("ipfm.engine.experiments.dry_run.step_time", lambda *_: StepTime(1.0))


def jpegs(folder: Path, count: int = 8) -> Path:
    """Pictures of odd sizes, in two folders."""
    rng = np.random.default_rng(0)
    for i in range(count):
        height, width = rng.integers(50, 90, 2)
        place = folder / f"{['cats', 'dogs'][i % 2]}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, 3) * np.linspace(0.3, 1, height)[:, None, None] * np.ones((1, width, 1))
        Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i}.jpg")
    return folder


def images(path: Path, side: int, count: int = 8, *, channels: int = 3, seed: int = 0, labels: int = 0) -> Path:
    """A folder of PNGs of this side."""
    path.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    shape = (side, side) if channels == 1 else (side, side, channels)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path / f"{i}.png")
    if labels:
        rows = [[f"{i}.png", i % labels] for i in range(count)]
        (path / "dataset.json").write_text(json.dumps({"labels": rows}))
    return path


def said(main, *arguments: object) -> str:
    """What a program of this project prints, in this process."""
    with redirect_stdout(io.StringIO()) as text:
        main([str(a) for a in arguments])
    return text.getvalue()


def tiny(side: int, **fields: object) -> NetworkConfig:
    return NetworkConfig(
        img_resolution=side, img_channels=3, model_channels=8, channel_mult=(1,), num_blocks=0, attn_resolutions=(),
    ) if not fields else replace(tiny(side), **fields)  # fmt: skip


def repeated(run: Path, module: ModuleType, **places: str) -> None:
    """The command that a report names for a run has its settings, and its network."""
    line = reproduce(read_run(run)).line
    assert line is not None and line.startswith(f"deepspeed recipes/{module.RECIPE.file}")
    words = [places.get(word, word) for word in shlex.split(line)[2:]]
    given = parse_given([*words, "--out", "again"], default=module.RECIPE.base, prog="", description="")
    plan, found = module.RECIPE.plan(given), json.loads((run / "config.json").read_text())
    free = free_settings(type(plan.config))
    assert _identity(plan.config.to_json(), free) == _identity(found["config"], free)
    if "network" in found:
        assert plan.record["network"] == found["network"]


# -- the rule ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "row"),
    [
        ({"shape": (1, 8, 8)}, "to-28"),
        ({"shape": (1, 28, 28)}, "to-28"),
        ({"shape": (3, 32, 32)}, "cifar"),
        ({"shape": (3, 40, 40), "images": 90}, "cifar"),
        ({"shape": (3, 48, 48)}, "ffhq"),
        ({"images": None}, "ffhq"),
        ({"images": 19_999}, "afhqv2"),
        ({"family": "ADM", "classes": 7, "images": 90}, "imagenet"),
        ({"family": "ADM"}, "ffhq"),
        ({"classes": 7}, "ffhq"),
        ({"shape": (3, 128, 128), "images": 90}, "from-96"),
        ({"gpu": False}, "small"),
        ({"gpu": False, "scale": "full"}, "ffhq"),
        ({"scale": "small"}, "small"),
    ],
)
def test_the_row_of_images(changes: dict, row: str) -> None:
    assert row_of(replace(FULL, **changes)).name == row


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        # EDM's of CIFAR-10, FFHQ, AFHQv2 and ImageNet, where the set is as large as theirs.
        (Facts((3, 32, 32), 50_000, 0, "ncsn++", True), (512, 200_000, 1e-3, 10_000, 0.13, 0.12)),
        (Facts((3, 64, 64), 70_000, 0, "ddpm++", True), (256, 200_000, 2e-4, 10_000, 0.05, 0.15)),
        (Facts((3, 64, 64), 15_803, 0, "ddpm++", True), (256, 200_000, 2e-4, 10_000, 0.25, 0.15)),
        (Facts((3, 64, 64), 1_281_167, 1000, "ADM", True), (4096, 2_500_000, 1e-4, 10_000, 0.1, 0)),
        # As many passes as AFHQv2's at most, and the rate grows over as much of the length.
        (Facts((3, 64, 64), 1000, 0, "ddpm++", True), (256, 12_700, 2e-4, 635, 0.25, 0.15)),
        (Facts((3, 32, 32), 1000, 0, "ncsn++", True), (512, 12_700, 1e-3, 635, 0.25, 0.12)),
    ],
)
def test_settings_of_teachers_are_edms_where_it_has_any(facts: Facts, expected: tuple[float, ...]) -> None:
    row = row_of(facts)
    settings, sources = teacher_settings(train_teacher.RECIPE.settings_of(row, facts.side), row, facts)
    found = {"lr_rampup_kimg": 10_000, **settings}
    names = ("batch", "kimg", "lr", "lr_rampup_kimg", "dropout", "augment")
    assert tuple(found[name] for name in names) == pytest.approx(expected)
    assert ("kimg" in sources) == (facts.images == 1000) and pytest.approx(12_656, abs=1) == MOST_PASSES


@pytest.mark.parametrize(
    ("side", "batch", "kimg", "images"), [(16, 32, 80, 1000), (64, 32, 80, 1000), (128, 8, 20, 250), (512, 4, 10, 100)]
)
def test_a_small_run_of_large_images_has_small_batches(side: int, batch: int, kimg: float, images: int) -> None:
    facts = Facts((3, side, side), 10, 0, "ddpm++", gpu=False)
    row = row_of(facts)
    found, _ = teacher_settings(train_teacher.RECIPE.settings_of(row, side), row, facts)
    assert (found["batch"], found["kimg"], found["eval_images"]) == (batch, kimg, images)
    assert found["kimg"] * 1000 / found["batch"] == 2500 and found["lr_rampup_kimg"] == kimg / 20


def test_networks_of_the_rule_are_the_published_ones_at_their_sizes() -> None:
    for side, arch, name in (
        (32, "ncsnpp", "cifar10-ncsnpp"), (32, "ddpmpp", "cifar10-ddpmpp"), (64, "ddpmpp", "ffhq64-ddpmpp"),
        (64, "ncsnpp", "ffhq64-ncsnpp"), (64, "adm", "imagenet64-adm-uncond"),
    ):  # fmt: skip
        start, published = presets.get(ARCHS[arch]), presets.get(name)
        found = by_size(start, replace(FULL, shape=(3, side, side), family=start.family))
        assert replace(found, dropout=0, use_fp16=False, augment_dim=0) == replace(
            published, dropout=0, use_fp16=False, augment_dim=0
        )
    assert (default_arch(32), default_arch(48), default_arch(28)) == ("ncsnpp", "ddpmpp", "ddpmpp")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("gpu", [True, False])
def test_every_size_that_is_possible_has_a_network(arch: str, gpu: bool) -> None:
    start = presets.get(ARCHS[arch])
    for side in filter(possible, range(SMALLEST_SIDE, LARGEST_SIDE + 1)):
        network = by_size(start, Facts((1, side, side), None, 0, start.family, gpu))
        innermost = side >> (len(network.channel_mult) - 1)
        assert innermost <= 32 and network.image_shape == (1, side, side)
        # Attention somewhere, unless the innermost level is too large for it.
        assert bool(network.attn_resolutions) == (innermost <= (32 if arch == "adm" else 16)), side


@pytest.mark.parametrize(
    ("side", "message"),
    [
        (
            1,
            "side 1: possible are 8 to 1024 pixels .* here 8, which ipfm dataset DATA NEW.zip --resolution 8",
        ),
        (45, "halved to at most 32, here 44 or 46, which ipfm dataset DATA NEW.zip --resolution 44 makes"),
        (66, "here 64 or 68"),
        (2000, "here 1024"),
    ],
)
def test_a_size_that_no_network_takes_says_which_are_possible(side: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        by_size(presets.get("cifar10-ddpmpp"), replace(FULL, shape=(3, side, side)))
    assert by_size(presets.get("cifar10-ddpmpp"), replace(FULL, shape=(3, side, side)), (1,)).img_resolution == side


@pytest.mark.parametrize(
    ("name", "network", "D", "expected"),
    [
        ("ipfm", "ffhq64-ddpmpp", 128.0, {"batch": 512, "lr": 1e-5, "alpha": 1.0, "kimg": 30_000, "augment": 0.15}),
        ("ipfm", "cifar10-ncsnpp", 128.0, {"batch": 256, "alpha": 1.0, "dropout": 0.0, "student_updates": 1}),
        ("ipfm", "imagenet64-adm", math.inf, {"batch": 8192, "lr": 4e-6, "alpha": 1.2, "ema_kimg": 2000}),
        ("sid", "cifar10-ddpmpp", math.inf, {"alpha": 1.2, "kimg": 500_000, "dropout": 0.13, "tf32": False}),
        ("sid", "cifar10-ddpmpp-cond", math.inf, {"kimg": 800_000}),
        # It diverged with ncsn++.
        ("sid", "cifar10-ncsnpp", math.inf, {"alpha": 1.0, "kimg": 500_000}),
        ("ipfm", "edm2-img64-m", 128.0, {"batch": 2048, "lr": 5e-5, "logvar": True, "dropout": 0.1, "kimg": 30_000}),
        ("ipfm", "edm2-img64-m", 128.0, {"noise": NoiseLevels(p_mean=-0.8, p_std=1.6)}),
        ("sid", "edm2-img512-xxl", math.inf, {"lr": 5e-5, "alpha": 1.0, "kimg": 100_000, "tf32": False}),
        ("sid", "edm2-img512-s", math.inf, {"noise": NoiseLevels(p_mean=-0.4, p_std=1.0), "dropout": 0.0}),
        ("pid", "edm2-img64-m", math.inf, {"batch": 2048, "lr": 1e-4}),
        ("pid", "cifar10-ddpmpp", math.inf, {"batch": 512, "lr": 2e-4, "distance": "l2", "lpips_side": None}),
        ("pid", "imagenet64-adm", math.inf, {"batch": 2048, "lr": 1e-4, "clip_grad": 1.0}),
    ],
)  # fmt: skip
def test_settings_of_distillations_are_those_of_the_papers_recipes(
    name: str, network: str, D: float, expected: dict
) -> None:
    recipe = DISTIL[name].RECIPE
    assert {n: getattr(recipe.full(presets.get(network, D=D), vars(recipe.base)), n) for n in expected} == expected


def test_the_rule_says_whose_settings_a_teacher_of_edm2_takes(tmp_path: Path) -> None:
    thin = replace(tiny(64), model_type="EDM2UNet", label_dim=3, img_channels=4, augment_dim=0, logvar_channels=0)
    save_model(build_network(thin), tmp_path / "m")
    arguments = ["--teacher", str(tmp_path / "m"), "--scale", "full", "--dry-run"]
    plan = distill_sid.RECIPE.plan(parse_given(arguments, default=distill_sid.RECIPE.base, prog="", description=""))
    assert (plan.config.logvar, plan.config.lr, plan.config.noise.p_mean) == (False, 5e-5, -0.4)
    text = "\n".join(plan.notes)
    assert "those of imagenet512_edm2_sid.py (ImageNet-512)" in text and "noise.p_mean -0.4" in text
    assert "logvar (off, as the teacher's file has no log-variance)" in text


def test_pid_takes_lpips_where_its_file_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ipfm.engine.objectives.pid.read_weights", lambda path: {})
    recipe = distill_pid.RECIPE
    expected = {"": ("l2", None), "--lpips a.pth": ("lpips", 244), "--distance lpips": ("lpips", 244)}
    for line, found in {**expected, "--lpips a.pth --lpips-side 224": ("lpips", 224)}.items():
        arguments = [*line.split(), "--scale", "full", "--dry-run"]
        config = recipe.plan(parse_given(arguments, default=recipe.base, prog="", description="")).config
        assert (config.distance, config.lpips_side) == found


def test_the_first_steps_of_pid_do_not_diverge(tmp_path: Path) -> None:
    save_model(official_files.randomize(build_network(tiny(32))), tmp_path / "m")

    def losses(*more: object) -> list[float]:
        out = f"run{len(more)}"
        said(distill_pid.main, "--teacher", "m", *SHORT, *SAMPLED, "--max-steps", 6, "--out", out, *more)
        lines = Path(out, "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["generator_loss"] or math.inf for line in lines]

    assert max(losses()) < 4 * losses("--distance", "l2")[0]
    free = losses("--clip-grad", "1e9", "--zero", "0")
    assert max(free) > 100 * free[0]


def test_levels_are_those_that_the_teacher_knows() -> None:
    assert levels_of(tiny(8)) == NoiseLevels()
    ve = levels_of(tiny(8, precond="VEPrecond", sigma_min=None, sigma_max=None))
    assert (ve.sigma_min, ve.sigma_max) == (0.02, 80.0)
    iddpm = tiny(8, precond="iDDPMPrecond", sigma_min=None, sigma_max=None)
    assert levels_of(iddpm).sigma_min == pytest.approx(0.0064223, rel=1e-4)
    assert levels_of(tiny(8, sigma_data=0.7, sigma_max=60.0)) == NoiseLevels(sigma_data=0.7, sigma_max=60.0)


# -- the walk ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "grey", "D", "shape"), [(48, False, 128.0, (3, 48, 48)), (16, True, math.inf, (1, 16, 16))]
)
def test_from_a_folder_of_jpegs_to_a_generator(side: int, grey: bool, D: float, shape: tuple[int, int, int]) -> None:
    """Two sizes, one with classes, by all three methods; the same commands again only read."""
    pictures = jpegs(Path("my pictures"))
    for picture in pictures.rglob("*.jpg") if grey else ():
        Image.open(picture).convert("L").save(picture)
    ipfm(["dataset", "my pictures", "pets.zip", "--resolution", str(side), "--crop", "center"])
    small = ["--model-channels", "8", "--num-blocks", "0", "--attention", "0"]
    labelled = ["--conditional"] if grey else []
    train = ["--data", "pets.zip", "--D", f"{D:g}", *labelled, *small]
    plan = said(train_teacher.main, *train, *SHORT, "--dry-run")
    assert f"settings by the rule of sizes for {'x'.join(map(str, shape))}, 8 images" in plan and "1 s a step" in plan
    assert not Path("runs").exists()
    told = said(train_teacher.main, *train, *SHORT, "--heun-steps", "1")
    teacher = Path(f"runs/pets-{side}{'-cond' * grey}-small-teacher-ddpmpp-D{D:g}")
    assert f"teacher: {teacher / 'model'}" in told and "where the settings come from" in told
    assert ("has labels, which are not used" in told) is not grey
    network = load_model(teacher / "model").config
    assert (network.image_shape, network.label_dim, network.D) == (shape, 2 * grey, D)
    for method, module in DISTIL.items():
        distil = ["--teacher", teacher, "--data", "pets.zip", *SHORT, *SAMPLED]
        told = said(module.main, *distil)
        assert "it is no FID" in told and "generator: " in told
        run = next(Path("runs").glob(f"distill_{method}-*"))
        # The teacher's folder names the run; its D is said once.
        middle = f"pets-{side}{'-cond' * grey}-small-teacher-ddpmpp-small"
        assert run.name.startswith(f"distill_{method}-{middle}-D{D:g}-")
        made = load_model(run / "generator")
        assert (made.config.image_shape, made.config.label_dim, made.config.D) == (shape, 2 * grey, D)
        assert made.facts is not None and made.facts.dataset == "pets.zip"
        names = Image.open(run / "comparison.png").text["Title"]
        assert "data" in names and "teacher" in names
        before = (run / "generator" / "model.safetensors").read_bytes()
        said(module.main, *distil)
        assert (run / "generator" / "model.safetensors").read_bytes() == before
        repeated(run, module, REFERENCE="pets.zip", TEACHER=str(teacher))
    repeated(teacher, train_teacher, DATA="pets.zip")
    assert dict(use(read_run(teacher), "x"))["Distil it"] == "deepspeed recipes/distill_ipfm.py --teacher x"
    ipfm(["sample", str(run / "generator"), "--n", "2", "--out", "some.png"])
    ipfm(["evaluate", str(run / "generator"), "--reference", "pets.zip", "--features", "blocks", "--images", "8"])
    ipfm(["report", str(run), "--out", "report.md"])
    assert "recipes/distill_pid.py --teacher" in Path("report.md").read_text()


def test_a_teacher_is_compared_with_the_images_that_it_is_trained_on() -> None:
    data = images(Path("d"), 8)
    train = ["--data", data, "--out", "t", *SHORT, "--heun-steps", "1", "--eval-images", "8"]
    network = ["--model-channels", "8", "--num-blocks", "0", "--attention", "0"]
    plan = said(train_teacher.main, *train, "--dry-run")
    assert "nothing is measured: --eval-every N compares samples with the data" in plan
    given = plan.partition("where the settings come from")[2]
    assert " kimg," not in given and "max_steps" in given.partition("  given: ")[2]
    for wish in (["--eval-every", "1"], ["--metrics", "kid", "fid"], ["--features", "pixels"]):
        assert "compared with d: " in said(train_teacher.main, *train, *wish, "--dry-run")
    told = said(train_teacher.main, *train, *network, "--metrics", "kid", "fid", "--eval-every", "1")
    assert "compared with d: kernel distance, Fréchet distance of means and deviations of blocks of pixels" in told
    assert "best: step 1, kernel distance " in told
    assert load_model(Path("t/model-best")).config.image_shape == (3, 8, 8)
    repeated(Path("t"), train_teacher, DATA="d")
    line = reproduce(read_run(Path("t"))).line
    assert line is not None and "--eval-images 8 --metrics kid fid" in line and "--inception" not in line
    # Of a folder that the user has named the settings say which recipe fits.
    distil = ["--teacher", "t", "--data", data, *SHORT, *SAMPLED]
    said(distill_pid.main, *distil, "--out", "mine")
    repeated(Path("mine"), distill_pid, REFERENCE="d", TEACHER="t")
    assert "this is one whose images and settings fit" in " ".join(reproduce(read_run(Path("mine"))).notes)


@pytest.mark.parametrize("method", DISTIL)
def test_a_teacher_in_edms_layout_at_a_size_of_no_other_recipe(method: str, tmp_path: Path) -> None:
    """The fixture that EDM's own code wrote, and a grey one of 40x40 with classes; without data nothing is measured."""
    net = official_files.randomize(EDMPrecond(tiny(40, img_channels=1, label_dim=3, augment_dim=9)))
    own = official_files.write_pickle(tmp_path / "network-snapshot-000100.pkl", official_files.edm_snapshot(net))
    fixture = [(FIXTURE, (3, 16, 16))] if method == "ipfm" else []
    for teacher, shape in (*fixture, (own, (1, 40, 40))):
        told = said(DISTIL[method].main, "--teacher", teacher, "--scale", "full", *SHORT, "--heun-steps", "1",
                    "--backward", "joint", "--out", teacher.stem)  # fmt: skip
        assert load_model(Path(teacher.stem) / "generator").config.image_shape == shape
        assert "nothing is measured: --data or --reference" in told
        assert ("those of cifar_" in told and "carried over from 32x32" in told) is (shape[1] == 40)


def test_an_fid_is_measured_with_inception(tmp_path: Path) -> None:
    save_model(official_files.randomize(build_network(tiny(8))), tmp_path / "m")
    inception = tiny_inception.write(tmp_path / "inception.pt")
    told = said(distill_ipfm.main, "--teacher", "m", "--data", images(Path("d"), 8), "--inception", inception, *SHORT,
                *SAMPLED)  # fmt: skip
    assert "compared with d: FID, of 8 images" in told and "FID" in told.partition("network    steps")[2]


# -- a run that goes on, and folders -----------------------------------------------------------------------------------


def test_a_training_goes_on_as_the_rule_had_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Longer, and by another number of images: what the rule would say now is not asked of the run that is there."""
    data = images(Path("set of mine"), 8)
    line = ["--data", data, *SHORT, "--model-channels", "8"]
    said(train_teacher.main, *line)
    told = said(train_teacher.main, *line, "--max-steps", "2")
    assert "was begun: lr_rampup_kimg 0.0002" in told
    folder = Path("runs/set-of-mine-8-small-teacher-ddpmpp-D128")
    assert json.loads((folder / "config.json").read_text())["config"]["max_steps"] == 2
    # Another set of the same name and number is another run.
    for old in data.iterdir():
        old.unlink()
    data.rmdir()
    images(data, 8, seed=1)
    with pytest.raises(BadInput, match=r"belongs to another configuration .pictures is"):
        train_teacher.main([str(a) for a in line])


def test_run_folders_are_called_by_the_data_and_the_teacher(tmp_path: Path) -> None:
    assert slug(Path("a b/My Cats!.zip"), "x") == "My-Cats"
    assert slug(Path("cifar-10-python.tar.gz"), "x") == "cifar-10-python"
    assert slug(Path("runs/cats-64/teacher/model"), "x") == "cats-64"
    assert slug(Path("network-snapshot-000100.pkl"), "x") == "network-snapshot-000100"
    assert slug(Path("..."), "x") == slug(None, "x") == "x"
    assert slug(Path("日本"), "x") == "日本"


def test_a_distillation_goes_on_as_the_rule_had_it(tmp_path: Path) -> None:
    """With --data, and by the settings for a GPU, it keeps those that it began with; what was given is compared."""
    save_model(official_files.randomize(build_network(tiny(8))), tmp_path / "m")
    line = ["--teacher", "m", *SHORT, *SAMPLED, "--out", "run"]
    said(distill_ipfm.main, *line)
    told = said(distill_ipfm.main, *line, "--max-steps", "2", "--scale", "full", "--data", images(Path("d"), 8))
    assert "as the run in run was begun: lr 0.0003, ema_kimg 10.0, ema_rampup 0.2; by the rule they would be" in told
    begun = json.loads(Path("run/config.json").read_text())["config"]
    assert (begun["lr"], begun["ema_rampup"], begun["max_steps"]) == (3e-4, 0.2, 2)
    said(distill_ipfm.main, *line, "--alpha", "0.5", "--out", "half")
    with pytest.raises(BadInput, match=r"alpha is 0.5 there, 1.0 here"):
        distill_ipfm.main([*line, "--out", "half"])


# -- what cannot be done -----------------------------------------------------------------------------------------------


def refused(module: ModuleType, *arguments: object) -> str:
    with pytest.raises(BadInput) as error:
        module.main([str(a) for a in arguments])
    assert "\n" not in str(error.value) and not Path("runs").exists()
    return str(error.value)


def test_what_cannot_be_trained_on() -> None:
    odd = images(Path("odd"), 45)
    assert "possible are 8 to 1024 pixels" in refused(train_teacher, "--data", odd)
    assert "images of side 45 cannot be halved 1 times" in refused(train_teacher, "--data", odd, "--channel-mult", 1, 2)
    assert "multiple of 4" in refused(train_teacher, "--data", odd, "--preset", "cifar10-ddpmpp")
    assert "has no class labels; ipfm dataset even NEW.zip takes the names of folders" in refused(
        train_teacher, "--data", images(Path("even"), 8), "--conditional"
    )
    Image.new("RGB", (9, 8)).save(odd / "0.png")
    assert "images must be square" in refused(train_teacher, "--data", odd)
    assert "--scale must be one of auto, full, small" in refused(train_teacher, "--scale", "big")
    assert "give --data" in refused(train_teacher)
    assert "3x45x45, FFHQ-64 is 3x64x64; train_teacher.py takes images of any size" in refused(
        ffhq_teacher, "--data", images(Path("o"), 45)
    )


def test_what_cannot_be_distilled(tmp_path: Path) -> None:
    for name, net in {"m": tiny(24), "ve": tiny(24, precond="VEPrecond", sigma_min=None, sigma_max=None)}.items():
        save_model(official_files.randomize(build_network(net)), tmp_path / name)
    assert "give --teacher" in refused(distill_sid)
    assert "3x24x24, CIFAR-10 is 3x32x32; distill_ipfm.py takes teachers of any size" in refused(
        cifar_ipfm, "--teacher", "m"
    )
    assert "digits are 1x8x8; distill_ipfm.py takes teachers of any size" in refused(digits_ipfm, "--teacher", "m")
    assert "was trained for D = inf, but D = 128 was asked for" in refused(distill_ipfm, "--teacher", "m", "--D", 128)
    assert "a trajectory needs a teacher with EDM's preconditioning" in refused(distill_pid, "--teacher", "ve")
    message = refused(distill_ipfm, "--teacher", "m", "--data", images(Path("grey"), 24, channels=1))
    assert (
        "grey has images 1x24x24, the teacher makes 3x24x24" in message
        and "--resolution 24 --channels 3 makes" in message
    )
    assert "--resolution 24 makes" in refused(distill_ipfm, "--teacher", "m", "--data", images(Path("big"), 32))
    assert "augment 0.1 needs a network with 9 augmentation labels" in refused(
        distill_ipfm, "--teacher", "m", "--augment", 0.1
    )
    assert "for images of any size have it, such as distill_ipfm.py" in refused(cifar_ipfm, "--scale", "full")
    assert "distillation takes no data; recipes for images" in refused(cifar_ipfm, "--data", "x")


def test_labels_that_are_not_the_teachers_are_left_out(tmp_path: Path) -> None:
    save_model(official_files.randomize(build_network(tiny(8, label_dim=3))), tmp_path / "m")
    line = ["--teacher", "m", *SHORT, *SAMPLED, "--dry-run", "--data"]
    assert "the images have no labels, the teacher takes 3" in said(distill_ipfm.main, *line, images(Path("a"), 8))
    told = said(distill_ipfm.main, *line, images(Path("b"), 8, labels=2))
    assert "the images have 2 classes, the teacher takes 3: compared without classes" in told
    assert "the teacher takes 3" not in said(distill_ipfm.main, *line, images(Path("c"), 8, labels=3))


def test_a_generator_is_no_teacher(tmp_path: Path) -> None:
    save_model(official_files.randomize(build_network(tiny(8))), tmp_path / "m")
    said(distill_ipfm.main, "--teacher", "m", *SHORT, "--heun-steps", "1", "--out", "run")
    for place in ("run", "run/generator"):
        with pytest.raises(BadInput, match="generator"):
            distill_ipfm.main(["--teacher", place, "--dry-run"])


def test_a_dry_run_without_files_says_what_it_takes_them_for() -> None:
    small = [*SHORT, "--dry-run"]
    told = said(train_teacher.main, *small, "--preset", "ffhq64-ddpmpp", "--model-channels", "8", "--num-blocks", "0")
    assert "without --data: images are taken to be 3x64x64" in told and "ipfm dataset FOLDER" in told
    told = said(distill_pid.main, *small, "--backward", "joint")
    assert "without --teacher: it is taken to be of the network cifar10-ddpmpp" in told and "Any teacher fits" in told


def test_every_row_says_whose_settings_it_has() -> None:
    for row in ROWS.values():
        taught = row.name in train_teacher.RECIPE.rows or train_teacher.RECIPE.settings_of(row, 32)
        assert row.whose and taught
        for module in DISTIL.values():
            assert row.name in module.RECIPE.rows or row.name in module.RECIPE.table
    facts = facts_of(tiny(8), None, "full")
    assert "3x8x8, ddpm++" in str(facts)
