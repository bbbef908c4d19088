"""Ablations: what is held and what varies, runs that go on, runs that diverge, and what is reported."""

from __future__ import annotations

import csv
import json
import math
import shutil
import signal
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import idx_files
import numpy as np
import pytest
import tiny_inception
import torch
from PIL import Image

from ipfm.engine.distributed.world import World
from ipfm.engine.experiments.ablation import OF_THE_OBJECTIVE, AblationOptions, AblationPlan, arch_of
from ipfm.engine.experiments.ablation_numbers import read_found
from ipfm.engine.experiments.ablation_report import GROWTH, Curve, plot, sentence, table, write_csv
from ipfm.engine.experiments.ablation_runs import Run, shared_training, teacher_distance
from ipfm.engine.experiments.repeats import spread
from ipfm.engine.objectives.base import Distillation
from ipfm.engine.runtime.commandline import BadInput, parse_given
from ipfm.engine.runtime.errors import FolderInUse, Interrupted
from ipfm.engine.training.run_folder import folder_user
from ipfm.models import EDMPrecond, NetworkConfig, load_model, presets, save_model
from ipfm.recipes import (
    ablation_alpha,
    ablation_architecture,
    ablation_D,
    ablation_D_alpha,
    ablation_data,
    ablation_divergence,
    ablation_init,
    ablation_methods,
    ablation_pid,
    ablation_steps,
    ablation_student,
    ablation_weights,
)

ALL = {
    "D": ablation_D,
    "D-alpha": ablation_D_alpha,
    "alpha": ablation_alpha,
    "init": ablation_init,
    "architecture": ablation_architecture,
    "divergence": ablation_divergence,
    "steps": ablation_steps,
    "pid": ablation_pid,
    "weights": ablation_weights,
    "student": ablation_student,
    "methods": ablation_methods,
}
METHODS = ("ipfm", "real", "discriminator", "both", "second", "lora", "dmd", "cmt", "pid")
TWO = ("--quick", "--variants", "teacher", "half-width")


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In an empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two variants of one ablation, with a teacher that is trained for them."""
    out = tmp_path_factory.mktemp("ablation") / "init"
    ablation_init.main([*TWO, "--out", str(out)])
    return out


def rows(out: Path) -> list[dict[str, str]]:
    with open(out / "ablation.csv", newline="") as file:
        return list(csv.DictReader(file))


def plan_of(module: ModuleType, *arguments: str) -> AblationPlan:
    return module.ABLATION.plan(parse_given(arguments, default=module.ABLATION.defaults, prog="", description=""))


def curve(*distances: float, variant: str = "a", seed: int = 0) -> Curve:
    return Curve(variant, seed, 10, tuple((20 * i, value) for i, value in enumerate(distances)))


# -- real runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_leaves_numbers_picture_and_table(whole: Path) -> None:
    found = rows(whole)
    assert [(r["variant"], r["seed"], r["step"], r["kimg"], r["diverged"]) for r in found] == [
        (variant, "0", str(step), f"{step * 16 / 1000:g}", "0")
        for variant in ("teacher", "half-width")
        for step in (0, 2, 4)
    ]
    distances = [float(r["distance"]) for r in found]
    assert len(set(distances)) == 6 and min(distances) > 0
    with Image.open(whole / "ablation.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10
    text = (whole / "ablation.md").read_text()
    assert "| teacher |" in text and "| half-width |" in text and "ends lowest" in text
    # The teacher was trained once; the half-width generator has half its channels.
    assert [p.name for p in (whole / "teachers").iterdir()] == ["ddpmpp-D128"]
    channels = [load_model(whole / v / "seed0" / "generator").config.model_channels for v in ("teacher", "half-width")]
    assert channels == [16, 8]


@pytest.mark.distributed
def test_an_interrupted_ablation_goes_on(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal in the second run: the same command reads the first, makes the second, ends with the same numbers."""
    command = [*TWO, "--out", "again"]
    go = Run.go

    def stopped(run: Run, *arguments) -> None:
        if run.variant == "half-width":
            raise Interrupted(signal.SIGTERM)
        go(run, *arguments)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Run, "go", stopped)
        ablation_init.main(command)
    assert not Path("again/ablation.csv").exists()
    assert [run.state for run, _ in plan_of(ablation_init, *command).runs] == ["finished", "new"]
    before = {p: p.stat().st_mtime_ns for p in Path("again/teacher").rglob("*")}
    ablation_init.main(command)
    assert {p: p.stat().st_mtime_ns for p in Path("again/teacher").rglob("*")} == before
    assert rows(Path("again")) == rows(whole)
    # Longer: both continue from where they ended.
    ablation_init.main([*command, "--max-steps", "6"])
    assert [r["step"] for r in rows(Path("again"))] == ["0", "2", "4", "6"] * 2
    assert rows(Path("again"))[:3] == rows(whole)[:3]


@pytest.mark.distributed
def test_a_training_that_fails_has_diverged(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights of 1e30 make everything non-finite: shown, remembered, and no error."""
    given = ["--teacher", str(whole / "teachers" / "ddpmpp-D128" / "model")]
    hopeless = ["--quick", "--variants", "teacher", *given, "--lr", "1e30", "--max-bad-steps", "1", "--log-every", "1"]
    ablation_init.main([*hopeless, "--out", "gone"])
    assert "1 of 1" in capsys.readouterr().out
    found = rows(Path("gone"))
    assert (found[0]["diverged"], math.isfinite(float(found[0]["distance"]))) == ("0", True)
    assert (found[-1]["diverged"], found[-1]["distance"]) == ("1", "nan")
    ((run, _),) = plan_of(ablation_init, *hopeless, "--out", "gone").runs
    assert run.state == "diverged"
    before = {p: p.stat().st_mtime_ns for p in run.path.rglob("*")}
    ablation_init.main([*hopeless, "--out", "gone"])
    assert {p: p.stat().st_mtime_ns for p in run.path.rglob("*")} == before


@pytest.mark.distributed
def test_cifar_takes_its_teachers_and_the_fid(thin: dict[str, Path]) -> None:
    dim = tiny_inception.DIM
    np.savez("reference.npz", mu=np.zeros(dim), sigma=np.eye(dim))
    teachers = ["--teachers", f"D128={thin['D128']}", f"Dinf={thin['Dinf']}"]
    measure = ["--reference", "reference.npz", "--inception", str(tiny_inception.write(Path("inception.pt")))]
    ablation_D.main([
        "--data", "cifar", "--quick", "--batch", "4", "--max-steps", "2", "--eval-images", "16", "--augment", "0",
        "--variants", "D128", "Dinf", *teachers, *measure, "--out", "cifar",
    ])  # fmt: skip
    assert [(r["variant"], r["step"]) for r in rows(Path("cifar"))] == [
        ("D128", "0"), ("D128", "2"), ("Dinf", "0"), ("Dinf", "2"),
    ]  # fmt: skip
    assert "FID" in Path("cifar/ablation.md").read_text()


@pytest.fixture(scope="module")
def thin(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Untrained teachers of 32x32 images, ddpm++, at D = 128 and inf."""
    root = tmp_path_factory.mktemp("thin")
    torch.manual_seed(0)
    for D in (128.0, math.inf):
        network = NetworkConfig(
            img_resolution=32, img_channels=3, model_channels=8, channel_mult=(1, 1), num_blocks=1,
            attn_resolutions=(), dropout=0.1, D=D,
        )  # fmt: skip
        save_model(EDMPrecond(network), root / f"D{D:g}")
    return {f"D{D:g}": root / f"D{D:g}" for D in (128.0, math.inf)}


# -- clothes -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def clothes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A small set where Debian's would be, and small networks."""
    place = idx_files.write_idx(tmp_path / "debian")
    monkeypatch.setattr("ipfm.engine.experiments.fashion.DEBIAN", place)
    monkeypatch.setattr("ipfm.engine.training.loop.PICTURE_IMAGES", 2)
    small = replace(presets.get("ddpmpp"), img_resolution=28, img_channels=1, augment_dim=0, model_channels=4)
    small = replace(small, channel_mult=(1,), num_blocks=1, attn_resolutions=(), dropout=0.0)

    def network(arch: str, D: float, channels: int) -> NetworkConfig:
        return replace(small, D=D, model_channels=channels // 2)

    monkeypatch.setattr(ablation_data, "fashion_network", network)
    return place


FEW = ("--data", "fashion", "--quick", "--batch", "4", "--eval-images", "8", "--heun-steps", "1", "--max-steps", "2",
       "--teacher-steps", "1", "--zero", "0", "--backward", "joint", "--activation-checkpointing", "off")  # fmt: skip


@pytest.mark.distributed
def test_ablations_of_clothes_share_teachers_and_classifier(clothes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two ablations of one folder of teachers: each is trained and measured once; the verdicts stand in the results."""
    shared = ("--teachers-from", "teachers")
    both = ("--variants", "D128-alpha0.5", "D128-alpha1", "--out", "runs/both")
    ablation_D_alpha.main([*FEW, *shared, "--seeds", "0", "1", "2", *both])
    out, err = capsys.readouterr()
    # What decides is said before anything is measured.
    assert out.index("claim: alpha = 1 ends lower than alpha = 1/2, at D = 128") < out.index("teacher ddpmpp-D128")
    assert "compared by classifier" in err and "Made with --quick: the numbers mean nothing." in out
    text = Path("runs/both/ablation.md").read_text()
    assert "| alpha = 1 ends lower than alpha = 1/2, at D = 128 | " in text and "at D = inf" not in text
    assert len(Path("runs/both/claims.csv").read_text().splitlines()) == 2
    about = json.loads(Path("runs/both/ablation.json").read_text())
    assert about["data"] == "fashion" and about["features"].startswith("classifier ")
    before = {p: p.stat().st_mtime_ns for p in Path("teachers").rglob("*") if p.name != "run.lock"}
    assert {p.parent.name for p in before if p.name == "distance.json"} == {"ddpmpp-D128"}
    ablation_steps.main([*FEW, *shared, "--seeds", "0", "--variants", "K2", "--out", "runs/steps"])
    out, err = capsys.readouterr()
    after = {p: p.stat().st_mtime_ns for p in Path("teachers").rglob("*") if p.name != "run.lock"}
    # The sets of samples come to what is known of the teacher, whose training and distance stay as they are.
    new = {p.relative_to("teachers/ddpmpp-D128").as_posix() for p in after if after[p] != before.get(p) and p.is_file()}
    assert about["features"] in err and len(list(Path("runs").glob("classifier-*.safetensors"))) == 1
    assert new == {"sets.json"}
    assert "1 seed, 3 are needed; generators " in Path("runs/steps/ablation.md").read_text()
    places = ("teachers", "runs/steps/teachers", "runs/both/teachers")
    known = [json.loads((Path(place) / "ddpmpp-D128/distance.json").read_text()) for place in places]
    assert known[0] == known[1] == known[2] and known[0]["features"] == about["features"]
    sets = json.loads(Path("runs/steps/K2/seed0/sets.json").read_text())
    # The first set is that of the last evaluation.
    assert sets["frechet"][0] == pytest.approx(float(rows(Path("runs/steps"))[-1]["distance"]), rel=1e-4)
    assert len(set(sets["frechet"])) == 3
    # What was measured stands in two files, from which another machine judges the same.
    found = read_found(Path("runs/steps/ablation.csv"), Path("runs/steps/distances.csv"))["K2"]
    assert (found.teacher, found.sets) == (known[0]["frechet"], {0: sets["frechet"]})
    assert found.teacher_sets == json.loads(Path("teachers/ddpmpp-D128/sets.json").read_text())["frechet"]
    with pytest.raises(ValueError, match=r"distances\.csv has not the variants of .*, which are D128-alpha0\.5, "):
        read_found(Path("runs/both/ablation.csv"), Path("runs/steps/distances.csv"))
    # Nobody keeps the shared teacher: another command may come in while this one goes on.
    assert folder_user(Path("teachers/ddpmpp-D128")) is None
    with pytest.raises(BadInput, match=r"has 1 step and was distilled, --teacher-steps asks for 2"):
        ablation_steps.main([*FEW, *shared, "--teacher-steps", "2", "--out", "runs/other"])


def test_a_command_waits_for_the_teacher_that_another_one_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def lock(folder: Path) -> None:
        tried.append(folder)
        if len(tried) < 3:
            raise FolderInUse("in use by process 7")

    monkeypatch.setattr("ipfm.engine.experiments.ablation_runs.lock_folder", lock)
    with shared_training(tmp_path / "teacher", World(0, 1, torch.device("cpu"))):
        assert tried == [tmp_path / "teacher"] * 3


def test_a_distance_by_other_features_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared teacher keeps the one that was measured last; a file that does not say its features is trusted."""
    measured = []

    def evaluate(net, evaluation, world, *, D, steps):
        measured.append(evaluation.features.name)
        return SimpleNamespace(distance=float(len(measured)), name="Fréchet distance")

    monkeypatch.setattr("ipfm.engine.experiments.ablation_runs.evaluate_teacher", evaluate)
    monkeypatch.setattr("ipfm.engine.experiments.ablation_runs.replace", lambda evaluation, **_: evaluation)
    net, world = EDMPrecond(presets.get("digits", D=128.0)), World(0, 1, torch.device("cpu"))
    one, two = (SimpleNamespace(features=SimpleNamespace(name=name), images=8) for name in ("one", "two"))

    def distance(evaluation, own: str) -> float:
        return teacher_distance(net, tmp_path / own, evaluation, world, steps=1, shared=tmp_path / "shared")[0]

    assert [distance(one, "a"), distance(one, "b"), distance(two, "c"), distance(one, "a")] == [1.0, 1.0, 2.0, 1.0]
    assert measured == ["one", "two"]
    old = json.loads((tmp_path / "a" / "distance.json").read_text())
    del old["features"]
    (tmp_path / "a" / "distance.json").write_text(json.dumps(old))
    assert distance(two, "a") == 1.0 and measured == ["one", "two"]


def test_clothes_are_another_ablation_with_its_own_sizes(clothes: Path) -> None:
    options = [plan_of(module, "--data", "fashion").options for module in (ablation_D, ablation_steps)]
    found = [(o.max_steps, o.eval_every, o.teacher_steps, o.eval_images, o.lr_schedule) for o in options]
    assert found == [(600, 60, 5000, 2000, "linear")] * 2
    plan = plan_of(ablation_divergence, "--data", "fashion")
    assert plan.path == Path("runs/ablation-divergence-fashion")
    assert {(r.config.alpha, r.config.total_steps, r.config.batch) for r, _ in plan.runs} == {(1.2, 800, 64)}
    assert plan.options.lr_schedule == "constant" and plan.options.teacher_steps == 2000
    assert len(plan.runs) == 18 and {t.network.model_channels for t in plan.teachers.values()} == {8 // 2}
    assert [claim.source for claim in plan.claims] == ["arXiv 2509.22454, appendix B"]
    shared = plan_of(ablation_divergence, "--data", "fashion", "--teachers-from", "~/teachers").teachers
    assert {t.place.parent for t in shared.values()} == {Path("~/teachers").expanduser()}


def test_networks_of_clothes_are_those_of_their_recipe() -> None:
    for arch in ("ddpmpp", "ncsnpp", "adm"):
        network = ablation_data.fashion_network(arch, 128.0)
        assert (network.model_channels, ablation_data.fashion_network(arch, 128.0, 8).model_channels) == (16, 8)
        assert (arch_of(network), network.image_shape, network.D) == (arch, (1, 28, 28), 128.0)


# -- what is held, and what is refused ---------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "free"),
    [
        ("D", {"D"}),
        ("alpha", {"alpha"}),
        ("init", {"init", "width", "student_init"}),
        ("architecture", set()),
        ("steps", {"steps", "sigmas", "gradient"}),
        ("pid", {"D", "difference", "points"}),
        ("divergence", {"D"}),
        ("D-alpha", {"D", "alpha"}),
        ("weights", {"weight", "weight_power", "levels_generator"}),
        ("student", {"student_updates", "student_ema", "levels_student"}),
    ],
)
def test_nothing_else_varies(name: str, free: set[str]) -> None:
    """All runs of an ablation differ in its setting and the seed alone; every seed has every variant."""
    plan = plan_of(ALL[name], "--seeds", "3", "5")
    settings = [run.config.to_json() for run, _ in plan.runs]
    differing = {key for key in settings[0] if len({str(s[key]) for s in settings}) > 1}
    assert differing == free | {"seed"}
    labels = [variant.label for variant in ALL[name].ABLATION.variants]
    assert [(run.variant, run.config.seed) for run, _ in plan.runs] == [(v, s) for v in labels for s in (3, 5)]
    # The teachers differ in D, or in the architecture, or there is one.
    networks = [(teacher.network.D, arch_of(teacher.network)) for teacher in plan.teachers.values()]
    expected = {
        "D": [(D, "ddpmpp") for D in (8.0, 128.0, 2048.0, math.inf)],
        "alpha": [(128.0, "ncsnpp")],
        "init": [(128.0, "ddpmpp")],
        "architecture": [(128.0, "ncsnpp"), (128.0, "ddpmpp"), (128.0, "adm")],
        "steps": [(128.0, "ddpmpp")],
        "pid": [(math.inf, "ddpmpp"), (128.0, "ddpmpp")],
        "D-alpha": [(128.0, "ddpmpp"), (math.inf, "ddpmpp")],
        "weights": [(128.0, "ddpmpp")],
        "student": [(128.0, "ddpmpp")],
        "divergence": [(D, arch) for arch in ("ncsnpp", "ddpmpp") for D in (128.0, 2048.0, math.inf)],
    }
    assert networks == expected[name]
    assert len({str(t.training and t.training.to_json() | {"D": None}) for t in plan.teachers.values()}) == 1


@pytest.mark.quick
def test_methods_are_compared_at_equal_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by its own optimiser and average, everything that all have in common alike; real images are the data's."""
    plan = plan_of(ablation_methods, "--max-steps", "7", "--seeds", "1")
    labels = [f"D{D}-{method}" for D in ("128", "inf") for method in METHODS]
    assert plan.labels == labels
    common = [f.name for f in fields(Distillation) if f.name not in OF_THE_OBJECTIVE]
    shared = {str([getattr(run.config, name) for name in common if name != "D"]) for run, _ in plan.runs}
    assert len(shared) == 1 and {run.config.total_steps for run, _ in plan.runs} == {7}
    rates = {run.variant.partition("-")[2]: run.config.lr for run, _ in plan.runs}
    assert rates == dict.fromkeys(METHODS, 3e-4) | {"cmt": 1e-3, "pid": 1e-3}
    # A mid-training's rate falls to 0.
    assert {run.variant for run, _ in plan.runs if run.config.lr_at(6) < run.config.lr} == {"D128-cmt", "Dinf-cmt"}
    real = [run.variant for run, _ in plan.runs if run.real is not None]
    assert real == [label for label in labels if label.partition("-")[2] in ("real", "discriminator", "both", "second")]
    # Where nothing fits, what larger machines have made is read all the same.
    monkeypatch.setattr(
        "ipfm.engine.experiments.ablation.choose_layout", mock.Mock(side_effect=ValueError("too large"))
    )
    costs = plan._costs()
    assert (costs["Dinf-cmt"], costs["Dinf-ipfm"], costs["Dinf-real"]) == (("4", "-"), ("11", "-"), ("14", "-"))
    # Of real images the encoder alone is run.
    assert 11 < float(costs["Dinf-discriminator"][0]) < 12
    with pytest.raises(BadInput, match=r"lr was given, but it is what this ablation varies"):
        ablation_methods.main(["--lr", "1e-3"])


@pytest.mark.distributed
def test_a_second_stage_with_real_images_and_the_costs(whole: Path) -> None:
    """They are the digits, or those that --real-data names, which a folder that was begun with others refuses."""
    given = ["--teacher", str(whole / "teachers" / "ddpmpp-D128" / "model"), "--backward", "joint", "--zero", "0"]
    with pytest.raises(BadInput, match=r"D128-second begins with the generators of D128-ipfm: name it among --var"):
        ablation_methods.main(["--quick", "--variants", "D128-second", "D128-ipfm", "--out", "methods"])
    variants = ["--quick", "--variants", "D128-ipfm", "D128-second", "D128-cmt", "--out", "methods"]
    ablation_methods.main([*variants, *given])
    text = Path("methods/ablation.md").read_text()
    header, _, first, second, cmt, *_ = (line.split("|") for line in text.splitlines())
    column = {name.strip(): number for number, name in enumerate(header)}
    assert [line[column["passes"]].strip() for line in (first, second, cmt)] == ["11", "14", "4"]
    assert all(line[column["memory"]].strip().endswith("iB") for line in (first, second, cmt))
    record = json.loads(Path("methods/D128-second/seed0/config.json").read_text())
    assert record["start"]["stage"] is True and record["continues"]
    ends = {(r["variant"], r["step"]): r["distance"] for r in rows(Path("methods"))}
    assert float(ends["D128-second", "0"]) == pytest.approx(float(ends["D128-ipfm", "4"]), rel=1e-6)
    assert record["config"]["real_weights"] == [0.92, 0.94] and record["real_data"]["images"] == 1797
    png = np.random.default_rng(0).integers(0, 255, (3, 8, 8), dtype=np.uint8)
    Path("other").mkdir()
    for number, pixels in enumerate(png):
        Image.fromarray(pixels).save(f"other/{number}.png")
    with pytest.raises(BadInput, match="real"):
        ablation_methods.main([*variants, *given, "--real-data", "other"])


@pytest.mark.parametrize(
    ("name", "label", "settings"),
    [
        ("alpha", "alpha0", {"alpha": 0.0}),
        ("pid", "Dinf-first-N1000", {"points": 1000, "difference": "first"}),
        ("divergence", "ncsnpp-Dinf", {"alpha": 1.2}),
        ("student", "ema0.999", {"student_ema": 0.999, "student_updates": 1}),
    ],
)
def test_what_the_papers_vary_can_be_named(name: str, label: str, settings: dict[str, float]) -> None:
    """Further variants are run when they are named; the rest of the plan is as it was."""
    plan = plan_of(ALL[name], "--variants", label, "--seeds", "0")
    ((run, _),) = plan.runs
    assert run.variant == label and {key: getattr(run.config, key) for key in settings} == settings


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("D", ["--variants", "D7"], "variants must be different ones of D8 D128 D2048 Dinf, got D7"),
        ("D", ["--D", "64"], "D was given, but it is what this ablation varies: choose among --variants D8"),
        ("alpha", ["--alpha", "0.7"], "alpha was given, but it is what this ablation varies"),
        ("architecture", ["--arch", "adm"], "arch was given, but it is what this ablation varies"),
        ("alpha", ["--seeds", "1", "1"], "seeds must be different integers >= 0, at least one, got 1 1"),
        ("alpha", ["--seeds", "-1"], "seeds must be different integers >= 0"),
        ("D", ["--teacher", "model"], "these variants need one each: give --teachers D8=PATH D128=PATH"),
        (
            "D",
            ["--teachers", "D9=model"],
            "teachers takes one VARIANT=PATH for each of D8 D128 D2048 Dinf, got D9=model",
        ),
        ("init", ["--teacher", "missing"], "missing does not exist"),
        ("init", ["--reference", "x.npz", "--features", "pixels"], "--data digits compares with the digits themselves"),
        ("init", ["--out", "taken"], "taken is not empty and holds no ablation"),
        ("alpha", ["--data", "cifar"], "give a teacher for alpha0.5 alpha0.75 alpha1 alpha1.2 alpha1.5"),
        ("alpha", ["--data", "cifar", "--teacher-steps", "5"], "--data cifar trains no teacher"),
        ("alpha", ["--data", "mnist"], "--data must be one of cifar, digits, fashion, got"),
        ("alpha", ["--data", "fashion", "--images", "nowhere"], "nowhere does not exist"),
        ("D", ["--data", "fashion", "--reference", "x.npz", "--inception", "y"], "compares with its images themselves"),
        ("alpha", ["--images", "x"], "images was given, but it is for --data fashion, not digits"),
        ("alpha", ["--classifier", "x"], "classifier was given, but it is for --data fashion, not digits"),
        ("alpha", ["--data", "cifar", "--teachers-from", "x"], "teachers-from was given, but --data cifar trains no"),
        ("alpha", ["--batch", "0"], "batch must be an integer >= 1, got 0"),
    ],
)
def test_bad_input_is_one_line(name: str, arguments: list[str], message: str) -> None:
    Path("taken").mkdir()
    Path("taken/notes.txt").write_text("mine")
    with pytest.raises(BadInput) as refused:
        ALL[name].main(arguments)
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert [p.name for p in Path().iterdir()] == ["taken"]


def test_another_teacher_or_measure_is_refused(whole: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_model(EDMPrecond(presets.get("digits", D=128.0)), tmp_path / "model")
    with pytest.raises(BadInput, match="needs ncsnpp"):
        ablation_architecture.main(["--teachers", f"ncsnpp={tmp_path / 'model'}", "--variants", "ncsnpp"])
    with pytest.raises(BadInput, match="trained for D = 128, but D = 8"):
        ablation_D.main(["--teachers", f"D8={tmp_path / 'model'}", "--variants", "D8"])
    with pytest.raises(BadInput, match=r"belongs to another configuration .*teacher is"):
        ablation_init.main([*TWO, "--out", str(whole), "--teacher", str(tmp_path / "model")])
    with pytest.raises(BadInput, match=r"belongs to another ablation .eval_images is 64 there, 65 here"):
        ablation_init.main([*TWO, "--out", str(whole), "--eval-images", "65"])
    with pytest.raises(BadInput, match=r"metrics must have fid, which variants are compared by, got kid pr"):
        ablation_init.main([*TWO, "--out", str(whole), "--metrics", "kid", "pr"])
    with pytest.raises(BadInput, match=r"belongs to another ablation .ablation is init there, alpha here"):
        ablation_alpha.main(["--quick", "--out", str(whole)])


def test_a_teacher_whose_runs_have_begun_is_not_trained_on(whole: Path, tmp_path: Path) -> None:
    """The runs could not go on from another one."""
    shutil.copytree(whole, tmp_path / "init")
    given = parse_given(
        [*TWO, "--out", str(tmp_path / "init"), "--teacher-steps", "9"],
        default=ablation_init.ABLATION.defaults, prog="x", description="",
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"has 4 steps and was distilled, --teacher-steps asks for 9: give"):
        ablation_init.ABLATION.plan(given)


def test_an_ablation_that_was_begun_by_older_rules_ends_by_them(tmp_path: Path) -> None:
    command = ["--quick", "--variants", "teacher", "half-width", "--out", str(tmp_path / "init")]
    plan = plan_of(ablation_init, *command)
    run = plan.runs[0][0]
    record = {"format": 1, "kind": "distill", "objective": "ipfm", "config": run.config.to_json()}
    del record["config"]["rules"]
    (run.path / "checkpoints" / "step-0000002").mkdir(parents=True)
    (run.path / "config.json").write_text(json.dumps(record))
    (plan.path / "ablation.json").write_text(json.dumps(plan.record))
    kept, new = (run for run, _ in plan_of(ablation_init, *command).runs)
    assert (kept.config.rules, new.config.rules) == (2, 1)  # the first one's own folder says by which it goes on


def test_dry_run_lists_what_would_be_done(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Settings, memory and duration are those of every recipe's dry run.
    monkeypatch.setattr("ipfm.engine.experiments.ablation.describe", lambda config, *_, **__: f"alpha {config.alpha:g}")
    ablation_init.main(["--quick", "--seeds", "0", "4", "--out", str(whole), "--dry-run"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    runs = [line[:4] for line in lines if line[1:2] == ["seed"]]
    assert runs == [
        [v.label, "seed", str(seed), "finished" if seed == 0 and v.label in TWO else "new"]
        for v in ablation_init.ABLATION.variants
        for seed in (0, 4)
    ]
    ablation_D.main(["--data", "cifar", "--dry-run", "--out", "nowhere"])
    assert "published by their authors" in capsys.readouterr().out
    assert not Path("nowhere").exists()


def test_options_given_stand_beside_quick() -> None:
    options = plan_of(ablation_alpha, "--quick", "--max-steps", "7", "--seeds", "2", "3").options
    assert isinstance(options, AblationOptions)
    assert (options.max_steps, options.seeds, options.batch, options.arch) == (7, (2, 3), 16, "ncsnpp")


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("module", "variant", "nfe"), [(ablation_steps, "K4-low", 4), (ablation_pid, "Dinf-central-N35", 1)]
)
def test_other_generators_are_distilled_and_timed(module: ModuleType, variant: str, nfe: int) -> None:
    module.main(["--quick", "--variants", variant, "--out", "out"])
    name, evaluations, rate = (
        cell.strip() for cell in Path("out/ablation.md").read_text().splitlines()[2].split("|")[1:4]
    )
    assert (name, evaluations) == (variant, str(nfe)) and float(rate) > 0
    assert [r["step"] for r in rows(Path("out"))] == ["0", "2", "4"]


# -- curves ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("distances", "since"),
    [
        ((9.0, 2.0, 1.0), None),
        ((9.0, 1.0, 1.0 * GROWTH), None),
        ((9.0, 1.0, 1.001 * GROWTH), 40),
        ((9.0, 1.0, 20.0, 2.0), None),  # recovers
        ((9.0, 1.0, 20.0, 2.0, 8.0, 30.0), 80),
        ((1.0, 6.0, 7.0), 20),  # from the start on
        ((9.0, 2.0, math.nan), 40),
        ((9.0, math.inf, math.nan), 20),
        ((9.0, math.nan, 2.0), None),
        ((math.nan, math.nan), 0),
        ((), None),
    ],
)
def test_divergence_is_a_tail_beyond_the_best(distances: tuple[float, ...], since: int | None) -> None:
    assert curve(*distances).diverged == since


def test_table_and_sentence_say_what_was_measured(tmp_path: Path) -> None:
    a = [
        replace(curve(8.0, 2.0, 3.0, seed=0), nfe=4, images_per_second=20.0),
        replace(curve(8.0, 2.5, 5.0, seed=1), nfe=4, images_per_second=30.0),
    ]
    b = [curve(8.0, 1.0, 6.0, variant="b", seed=0), curve(8.0, 1.0, math.nan, variant="b", seed=1)]
    c = [curve(8.0, 4.5, 4.5, variant="c", seed=0), curve(8.0, 5.5, 5.5, variant="c", seed=1)]
    lines = table([*a, *b, *c], {"a": 0.5, "b": 0.5, "c": 0.25}).splitlines()
    found = "8.000 (8.000 to 8.000) | 2.250 (2.000 to 2.500) | 4.000 (3.000 to 5.000)"
    assert lines[2] == f"| a | 4 | 30.00 | 0.5000 | {found} | 0 of 2 |"
    assert lines[3].startswith("| b | 1 | - | 0.5000 |") and lines[3].endswith(
        "| 1.000 (1.000 to 1.000) | 6.000 (6.000 to 6.000) | 2 of 2, from step 40 |"
    )
    assert sentence([*a, *b, *c]) == (
        "a ends lowest (4.000), before c (5.000); the ranges of their seeds overlap; some run of b diverged."
    )
    far = [curve(8.0, 9.0, variant="c", seed=0), curve(8.0, 9.5, variant="c", seed=1)]
    assert "do not overlap" in sentence([*a, *far])
    assert sentence(b) == "In every variant some run diverged."
    write_csv([*a, *b], tmp_path / "ablation.csv")
    assert [r["diverged"] for r in rows(tmp_path)] == ["0"] * 6 + ["0", "0", "1"] * 2
    plot([*a, *b, *c], {"a": 0.5, "b": 0.5, "c": 0.25}, tmp_path / "ablation.png")
    with Image.open(tmp_path / "ablation.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10
    with pytest.raises(ValueError, match="no finite"):
        plot([curve(math.nan)], {}, tmp_path / "none.png")
    assert str(spread([math.nan])) == "-"
