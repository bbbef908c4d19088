"""What recipes refuse, and what --dry-run says: one line, exit code 2, nothing written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import launch
import official_files
import prepared
import pytest
import torch

from ipfm.engine.experiments.step_time import StepTime
from ipfm.engine.runtime.commandline import run_command
from ipfm.models import EDMPrecond, NetworkConfig, load_model, presets, save_model
from ipfm.recipes import cifar_ipfm, cifar_teacher, digits_ipfm

RECIPES = {"digits": digits_ipfm, "cifar": cifar_ipfm}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Untrained teachers: the digits network at D = 128, a thin CIFAR network at D = 2048."""
    root = tmp_path_factory.mktemp("models")
    thin = NetworkConfig(
        img_resolution=32, img_channels=3, model_channels=8, channel_mult=(1, 1), num_blocks=1, attn_resolutions=(),
        dropout=0.1, D=2048.0,
    )  # fmt: skip
    torch.manual_seed(0)
    for name, network in {"digits": presets.get("digits", D=128.0), "cifar": thin}.items():
        save_model(EDMPrecond(network), root / name)
    return {name: root / name for name in ("digits", "cifar")}


def refused(capsys: pytest.CaptureFixture[str], recipe: str, *arguments: str) -> str:
    """The one line on stderr with which the recipe refuses `arguments`."""
    with pytest.raises(SystemExit) as stop:
        run_command(f"{recipe}_ipfm.py", RECIPES[recipe].main, list(arguments))
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith(f"{recipe}_ipfm.py: error: ")
    return line.removeprefix(f"{recipe}_ipfm.py: error: ")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning-rate", "1"], "unknown option --learning-rate"),
        (["--alpa", "1"], "perhaps you meant --alpha"),
        (["--dry-run", "--gpu-memory", "24"], "unknown option --gpu-memory; ipfm plan has it"),
        (["--dry-run", "--gpus", "8"], "unknown option --gpus; ipfm plan has it"),
        (["--n", "64"], "unknown option --n; ipfm sample has it"),
        (["--num_gpus", "2"], "unknown option --num_gpus; it is the launcher's, and stands before the recipe"),
        (["--batch-size", "2"], "unknown option --batch-size; perhaps you meant --batch"),
        (["--network=x.pkl", "--outdir=y"], "perhaps you meant --teacher or --out"),
        (["--xflip"], "unknown option --xflip; recipes that train a teacher have it, such as train_teacher.py"),
        (["--distance", "l2"], "unknown option --distance; recipes that distil by the objectives cmt and pid have it"),
        (["--variants", "D8"], "unknown option --variants; ablations have it, such as ablation_D.py"),
        (["--teacher", "missing/model"], "missing/model does not exist in /"),
        (["--D", "0"], "D must lie in (0, inf], got 0.0"),
        (["--D", "-1"], "D must lie in (0, inf], got -1.0"),
        (["--D", "nan"], "D must lie in (0, inf], got nan"),
        (["--D", "many"], "--D takes a number, got 'many'"),
        (["--alpha", "inf"], "alpha must be a number in [-1e+06, 1e+06], got inf"),
        (["--alpha", "nan"], "alpha must be a number in [-1e+06, 1e+06], got nan"),
        (["--batch", "0"], "batch must be an integer >= 1, got 0"),
        (["--batch", "128", "--micro-batch", "48"], "micro-batch must divide the 128 images"),
        (["--lr", "-1"], "lr must be a finite number > 0, got -1.0"),
        (["--sigmas", "1.0", "2.0"], "sigmas must fall strictly, got 1, 2"),
        (["--kimg", "3", "--max-steps", "5"], "max-steps and kimg exclude each other, got 5 and 3.0"),
        (["--offload", "optimizer", "--zero", "0"], "offload optimizer needs zero 1, 2 or 3"),
        (["--zero", "5"], "5"),
        (["--eval-images", "1"], "eval-images must be at least 2, got 1"),
        (["--eval-images", "10000000000"], "eval-images must be at most 1,000,000,000, got 10,000,000,000"),
        (["--teacher-steps", "0"], "teacher-steps must be at least 1, got 0"),
        (
            ["--metrics", "fid,kid"],
            "--metrics must be one of fid, is, kid, pr, got 'fid,kid'; give them apart: fid kid",
        ),
        (
            ["--metrics", "fid", "is"],
            "metrics must be among fid, kid, pr, got fid is: this recipe compares in pixel space",
        ),
        (["--metrics", "pr", "--eval-images", "3"], "precision and recall need at least 4 images"),
    ],
)
def test_bad_options(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, "digits", *arguments)
    assert not list(tmp_path.iterdir())


def test_batch_that_the_processes_cannot_share(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    assert refused(capsys, "digits") == "batch must be divisible by the number of processes, got 64 and 3"
    assert not list(tmp_path.iterdir())


def test_teachers_that_do_not_fit(capsys: pytest.CaptureFixture[str], models: dict[str, Path], tmp_path: Path) -> None:
    digits, cifar = str(models["digits"]), str(models["cifar"])
    out = ("--out", str(tmp_path / "run"))
    assert "was trained for D = 128, but D = 64 was asked for" in refused(
        capsys, "digits", "--teacher", digits, "--D", "64", *out
    )
    assert "makes images 3x32x32, the digits are 1x8x8" in refused(capsys, "digits", "--teacher", cifar, *out)
    assert "makes images 1x8x8, CIFAR-10 is 3x32x32" in refused(capsys, "cifar", "--teacher", digits, *out)
    assert "this recipe trains no teacher" in refused(capsys, "cifar", "--teacher", cifar, "--teacher-steps", "9", *out)
    with pytest.raises(SystemExit) as stop:
        run_command("cifar_ipfm.py", cifar_ipfm.main, out)
    line, *details = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line == "cifar_ipfm.py: error: give --teacher; --dry-run works without one"
    assert details[0].startswith("Teachers that fit (3x32x32)")
    assert not (tmp_path / "run").exists()


def test_a_generator_by_its_folder_is_a_teacher_where_that_is_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    network = EDMPrecond(replace(presets.get("digits"), img_channels=2, model_channels=8, channel_mult=(1,)))
    (tmp_path / "G_ema").mkdir()
    file = official_files.write_pickle(tmp_path / "G_ema" / "net.pkl", {"ema": official_files.official(network)})
    given = ("--teacher", str(file), "--out", str(tmp_path / "run"))
    line = refused(capsys, "digits", *given)
    assert "ema is a generator" in line and "known by its folder G_ema" in line and "--teacher-anyway" in line
    assert refused(capsys, "digits", *given, "--teacher-anyway").startswith("the teacher makes images 2x8x8")
    assert "give --teacher too" in refused(capsys, "digits", "--teacher-anyway")
    assert not (tmp_path / "run").exists()


def test_run_folders_of_others_stay_untouched(
    capsys: pytest.CaptureFixture[str], models: dict[str, Path], tmp_path: Path
) -> None:
    teacher = ("--teacher", str(models["digits"]))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    assert "holds no run" in refused(capsys, "digits", *teacher, "--out", str(foreign))
    assert [p.name for p in foreign.iterdir()] == ["thesis.tex"]

    other = tmp_path / "other"
    other.mkdir()
    done = prepared.run(
        launch.ROOT / "recipes" / "digits_ipfm.py", *teacher, "--out", other, "--max-steps", 1, "--batch", 8,
        "--eval-images", 8, "--heun-steps", 1, env=launch.environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "generator" in done.stdout
    before = {p: p.read_bytes() for p in other.rglob("*") if p.is_file()}
    line = refused(capsys, "digits", *teacher, "--out", str(other), "--alpha", "1.2", "--batch", "8")
    assert "belongs to another configuration (alpha is 1.0 there, 1.2 here)" in line
    torch.manual_seed(1)
    save_model(EDMPrecond(presets.get("digits", D=128.0)), tmp_path / "another")
    line = refused(capsys, "digits", "--teacher", str(tmp_path / "another"), "--out", str(other), "--batch", "8")
    assert "belongs to another configuration (teacher is " in line
    assert "--no-resume was given" in refused(
        capsys, "digits", *teacher, "--out", str(other), "--batch", "8", "--no-resume"
    )
    a_file = other / "config.json"
    assert "is a file" in refused(capsys, "digits", *teacher, "--out", str(a_file))
    assert before == {p: p.read_bytes() for p in other.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("recipe", "arguments", "expected"),
    [
        ("digits", [], ["D                    128", "max_steps            300", "1x8x8"]),
        ("cifar", ["--D", "2048"], ["student_updates      1", "56,397,827 parameters", "lr                   1e-05"]),
        (
            "cifar",
            ["--D", "inf", "--steps", "4"],
            ["student_updates      1", "sigmas               2.5, 1.875, 1.25, 0.625"],
        ),
        ("cifar", ["--D", "64"], ["no result is published for D = 64"]),
    ],
)
def test_dry_run_prints_the_plan_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recipe: str,
    arguments: list[str], expected: list[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ipfm.engine.experiments.dry_run.step_time", lambda *_: StepTime(0.001))
    if recipe != "digits":  # test_fits has the tables of large networks
        monkeypatch.setattr("ipfm.engine.experiments.dry_run.layout_table", lambda *_, **__: "layouts on GPUs")
    run_command(f"{recipe}_ipfm.py", RECIPES[recipe].main, [*arguments, "--dry-run"])
    printed = capsys.readouterr().out
    for part in [*expected, "configuration", "memory of one process", "expected duration", "layouts on GPUs"]:
        assert part in printed
    assert not list(tmp_path.iterdir())


def test_a_dry_run_shows_how_far_it_is_and_says_what_a_gpu_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes 0.25 s, of which 300 are 75 s; what trains the teacher is said too.

    So are evaluations: every 50 steps 2000 images, a pass each, and the same of the teacher of 35.
    """
    monkeypatch.setattr("ipfm.engine.experiments.dry_run.step_time", lambda *_: StepTime(0.25, pass_seconds=0.001))
    monkeypatch.setattr("ipfm.engine.experiments.dry_run.PAUSE", 0.0)
    run_command("digits_ipfm.py", digits_ipfm.main, ["--dry-run"])
    printed = capsys.readouterr()
    assert "expected duration on this CPU: 75 s for 300 steps (0.25 s a step, measured; evaluations" in printed.out
    passes = "student 2 forward, 1 back to the image, 1 to the weights; generator 2 forward, 1 to the weights; teacher "
    assert f"passes of an image in a step: {passes}1 forward, 1 back to the image: 11 forward passes" in printed.out
    assert "by its passes a step takes 0.704 s: 11 times 0.064 s, which a forward pass of 64 images" in printed.out
    evaluations = "evaluations on top of it: 82 s for 2,000 images of the teacher, 35 passes an image, and 6 times the "
    assert f"{evaluations}generator, 1; features left out" in printed.out
    assert "training of the teacher, before it: expected duration on this CPU: 4 min for 900 steps" in printed.out
    assert "GPU hours at 30% of the bf16 peak (an assumption): RTX 4090 " in printed.out
    assert "layouts on GPUs, bf16, global batch 64" in printed.out
    # 180,193 parameters: three numbers each of the generator (weight, second moment, EMA), two of the student.
    assert "disk: at most 12.4 MiB for 3 checkpoints of 3.4 MiB, the best and the result of 0.7 MiB each" in printed.out
    lines = printed.err.splitlines()
    assert len(lines) > 3 and all(line.startswith("dry run: ") for line in lines) and "11/11" in lines[-1]


def test_a_teachers_dry_run_shows_how_far_it_is_and_what_was_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ipfm.engine.experiments.dry_run.step_time", lambda *_: StepTime(2.0, forward_of=4))
    monkeypatch.setattr("ipfm.engine.experiments.dry_run.PAUSE", 0.0)
    run_command("cifar_teacher.py", cifar_teacher.main, ["--dry-run", "--model-channels", "8", "--num-blocks", "0"])
    printed = capsys.readouterr()
    assert "(2 s a step, reckoned from a forward pass of 4 images, which was measured; evaluations and" in printed.out
    assert "evaluations on top" not in printed.out  # without --reference
    lines = printed.err.splitlines()
    assert len(lines) == 3 and all(line.startswith("dry run: ") for line in lines) and "3/3" in lines[-1]


@pytest.mark.distributed
def test_cifar_trains_from_a_model_folder(models: dict[str, Path], tmp_path: Path) -> None:
    """End to end at reduced width: the paper's one student update; the teacher's dropout is not carried over."""
    done = prepared.run(
        launch.ROOT / "recipes" / "cifar_ipfm.py", "--teacher", models["cifar"], "--out", tmp_path / "run",
        "--max-steps", 2, "--batch", 4, "--log-every", 1, "--backward", "phased", env=launch.environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    net = load_model(tmp_path / "run" / "generator")
    assert (net.D, net.img_resolution) == (2048.0, 32)
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert (config["student_updates"], config["dropout"], config["D"]) == (1, 0.0, 2048.0)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert str(tmp_path / "run" / "generator") in done.stdout
