"""--branch: a new run goes on from another run's checkpoint, with its settings but for those that are given."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import soak
import torch
from PIL import Image
from safetensors.torch import load_file

from ipfm.engine.commands.info import Info
from ipfm.engine.commands.report.facts import facts_of
from ipfm.engine.commands.report.reproduce import reproduce
from ipfm.engine.experiments.branch import _is_it
from ipfm.engine.experiments.recipe import Plan
from ipfm.engine.experiments.step_time import StepTime
from ipfm.engine.runtime.commandline import BadInput, parse_given
from ipfm.engine.training.checkpoint import checkpoints_in
from ipfm.engine.training.run_folder import release_folder
from ipfm.engine.training.run_state import read_run
from ipfm.models import EDMPrecond, NetworkConfig, save_model
from ipfm.recipes import ablation_alpha, digits_ipfm, digits_pid, distill_ipfm, train_teacher

SMALL = ["--max-steps", "4", "--batch", "4", "--heun-steps", "1", "--eval-images", "16", "--log-every", "1"]
SMALL += ["--checkpoint-every", "2", "--keep-checkpoints", "9", "--zero", "0", "--eps", "1e-3", "--seed", "7"]
SMALL += ["--backward", "joint", "--activation-checkpointing", "off", "--metrics", "fid", "pr"]
LEVEL = ["--sigma-init", "4"]


def first(*more: str) -> None:
    """The run that others branch from."""
    digits_ipfm.main([*SMALL, "--teacher", "model", "--lr", "1e-4", "--alpha", "1.1", *LEVEL, "--out", "run", *more])
    release_folder(Path("run"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, and a run of four steps of it, its images and metrics not the recipe's."""
    folder = tmp_path_factory.mktemp("runs")
    soak.make_teacher(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        first()
    return folder


@pytest.fixture
def here(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, which is the working directory."""
    shutil.copytree(runs, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def branch(*words: object, out: str = "new", main: Any = digits_ipfm.main) -> None:
    main([*map(str, words), *(["--out", out] if out else [])])
    release_folder(Path(out))


def plan(*words: object, recipe: Any = digits_ipfm.RECIPE) -> Plan:
    return recipe.plan(parse_given([*map(str, words)], default=recipe.defaults, prog="x", description=""))


def states(run: Path) -> dict[str, torch.Tensor]:
    files = sorted(checkpoints_in(run / "checkpoints")[0].glob("*.safetensors"))
    return {f"{file.name}/{key}": tensor for file in files for key, tensor in load_file(file).items()}


def equal(one: Path, other: Path) -> bool:
    mine, theirs = states(one), states(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def settings(run: str) -> dict[str, Any]:
    return json.loads(Path(run, "config.json").read_text())["config"]


def test_a_branch_with_nothing_changed_goes_on_as_the_run_itself_would(here: Path, capsys) -> None:
    branch("--branch", "run:2", "--max-steps", 6)
    said = capsys.readouterr().out
    assert "branch of run at step 2, with its settings but: max-steps is 4 there, 6 here\n" in said
    assert "continues run/step-0000002: 8 images seen, goes on at step 2 of 6\n" in said
    assert "  generator: generator of run/step-0000002, its average, its optimiser's moments and 2 steps\n" in said
    first("--max-steps", "6")
    assert equal(Path("new"), Path("run"))
    theirs, mine = settings("run"), settings("new")
    assert {name for name in mine if mine[name] != theirs[name]} == {"out"}
    record = read_run(Path("new"))
    assert [line["step"] for line in record.metrics] == [2, 3, 4, 5]
    assert [(point.step, point.images, point.metrics) for point in record.evaluations] == [(6, 16, ("fid", "pr"))]


def test_other_settings_are_said_at_the_start_in_info_in_the_report_and_in_its_command(here: Path, capsys) -> None:
    branch("--branch", "run", "--max-steps", 5, "--lr", 5e-5, "--noise.p-mean", -1)
    changed = "max-steps is 4 there, 5 here; lr is 0.0001 there, 5e-05 here; noise.p-mean is -1.2 there, -1 here"
    said = capsys.readouterr().out
    assert f"branch of run at step 4, with its settings but: {changed}\n" in said
    assert "  generator: its optimiser goes on with this run's settings (lr is 0.0001 there, 5e-05 here)\n" in said
    Info(model=Path("new")).run()
    text = capsys.readouterr().out
    assert f"run at step 4; {changed}" in text and "run/step-0000004, 16 images seen" in text
    facts = facts_of(read_run(Path("new")))
    assert f"It is a branch of run with its settings, but for these: {changed}." in facts.summary
    line = reproduce(read_run(Path("new"))).line
    assert line is not None
    words = shlex.split(line)
    assert words[:6] == ["deepspeed", "recipes/digits_ipfm.py", "--branch", "run:4", "--out", "new"]
    assert "--teacher" not in words and "--alpha" not in words and "--seed" not in words
    again = plan(*words[2:])
    assert again.config.to_json() | {"out": None} == settings("new") | {"out": None, "zero": None}  # type: ignore[attr-defined]


def test_the_same_command_goes_on_whatever_has_become_of_the_run(here: Path, capsys) -> None:
    words = ("--branch", "run", "--lr", 5e-5)
    branch(*words, "--max-steps", 6)
    # The run is longer by now, with other settings that may change, and has forgotten that checkpoint.
    first("--max-steps", "8", "--heun-steps", "2", "--keep-checkpoints", "1")
    assert not Path("run/checkpoints/step-0000004").exists()
    branch(*words, "--max-steps", 7)
    assert settings("new")["heun_steps"] == 1 and read_run(Path("new")).steps_done == 7
    assert "is gone: the run goes on from its checkpoint, and needs it no more" in capsys.readouterr().out
    with pytest.raises(BadInput, match="new is a branch of run at step 4, and run:8 was asked for: choose another"):
        branch("--branch", "run:8", "--lr", 5e-5, "--max-steps", 9)
    # It goes back within itself, but not to its own start, which the run has no more.
    branch(*words, "--max-steps", 7, "--from-step", 6)
    shutil.rmtree("run")
    branch(*words, "--max-steps", 8)
    assert read_run(Path("new")).state == "finished" and read_run(Path("new")).steps_done == 8
    with pytest.raises(BadInput, match="run has no checkpoint of step 4 any more: it has none; more --keep"):
        branch(*words, "--max-steps", 8, "--from-step", 0)
    # Another run of the same name is another run.
    save_model(untrained(128.0), here / "other")
    digits_ipfm.main([*SMALL, "--teacher", "other", "--max-steps", "2", "--out", "run"])
    release_folder(Path("run"))
    with pytest.raises(BadInput, match="new is a branch of another run, run at step 4, and run was asked for: choose"):
        branch(*words, "--max-steps", 8)


def test_another_batch_counts_steps_by_the_images_seen(here: Path, capsys) -> None:
    made = plan("--branch", "run", "--batch", 2, "--max-steps", 10, "--out", "new")
    lines = made.begins_with  # type: ignore[attr-defined]
    assert lines[1:3] == (
        "  steps count from the images seen: step 4 there is step 8 here",
        "continues run/step-0000004: 16 images seen, goes on at step 8 of 10",
    )
    message = refused("--branch", "run", "--batch", 2, "--max-steps", 8)
    assert "run is at step 4, 16 images, which are 8 steps of 2, and the branch is to end at step 8" in message
    assert message.endswith("or an earlier step, as --branch run:2")
    # Noise levels that followed from other settings follow from them again; the first level is the run's.
    made = plan("--branch", "run:2", "--steps", 2, "--out", "new")
    assert (made.config.sigmas, made.config.sigma_init) == ((4.0, 2.0), 4.0)  # type: ignore[attr-defined]
    made = plan("--branch", "run:2", "--sigma-init", 3, "--out", "new")
    assert made.config.sigmas == (3.0,)  # type: ignore[attr-defined]
    # A length in images takes the place of one in steps.
    made = plan("--branch", "run", "--kimg", 0.04, "--out", "new")
    assert (made.config.max_steps, made.config.total_steps) == (None, 10)  # type: ignore[attr-defined]


def refused(*words: object, main: Any = digits_ipfm.main, out: str = "new") -> str:
    with pytest.raises(BadInput) as caught:
        branch(*words, main=main, out=out)
    assert "\n" not in str(caught.value) and not Path("new").exists()
    return str(caught.value)


def test_what_cannot_be_branched_is_one_line_and_writes_nothing(here: Path) -> None:
    save_model(untrained(16.0), here / "D16")
    for words, said in (
        (["run"], "run is at step 4, and the branch is to end at step 4: give a larger --max-steps or --kimg, which"),
        (["run:4"], "count from the first run's start, or an earlier step, as --branch run:2"),
        (["run:3"], "run has no checkpoint of step 3: it has those of steps 2, 4"),
        (["run:"], "branch takes RUN or RUN:STEP, where STEP is a number, best or last, got 'run:'"),
        (["run:worst"], "where STEP is a number, best or last, got 'run:worst'"),
        (["nowhere"], "nowhere does not exist in "),
        (["nowhere:4"], "nowhere does not exist in "),
        (["model"], "model is no run folder: branch takes RUN or RUN:STEP; --continue-from goes on from other states"),
        (["run", "--continue-from", "run"], "continue-from was given, but branch says what the run begins with"),
        (["run", "--student-from", "run"], "student-from was given, but branch says"),
        (["run", "--init", "random"], "init was given, but branch says what the first weights are"),
        (
            ["run", "--from-step", 2],
            "from-step goes back in new, which has not begun: run:2 as --branch names",
        ),
        (["run", "--width", 0.5, "--max-steps", 9], "(model_channels is 8 there, 4 here): --width says how wide it is"),
        (["run", "--D", 64, "--max-steps", 9], "D"),
        (["run", "--teacher", "D16", "--max-steps", 9], "D"),
        (["run", "--lr", -1], "lr must be"),
    ):
        assert said in refused("--branch", *words), words
    assert "run was distilled by inverse Poisson flow matching, whose recipes branch it: this one is of physics" in (
        refused("--branch", "run", main=digits_pid.main)
    )
    assert "run is a distillation, which this recipe does not make" in refused(
        "--branch", "run", "--data", "x", main=train_teacher.main
    )
    assert "branch was given, but an ablation says itself what its runs begin with" in refused(
        "--branch", "run", main=ablation_alpha.main
    )
    assert "run is the run itself: give the branch another --out" in refused("--branch", "run", out="run")
    with pytest.raises(BadInput, match="--branch makes a run of its own: give its folder as --out"):
        digits_ipfm.main(["--branch", "run"])
    with pytest.raises(BadInput, match=r"other belongs to another configuration \(.*continues is nothing there, "):
        shutil.copytree("run", "other")
        branch("--branch", "run:2", "--max-steps", 9, out="other")


def test_a_branch_of_another_length_keeps_the_warm_ups_of_a_discriminator(here: Path) -> None:
    """As a run that is lengthened does: else the term would end at the branch, and begin anew some time later."""
    record = json.loads(Path("run/config.json").read_text())
    told = {"discriminator": "encoder", "discriminator_weights": [1.0, 2e-4], "discriminator_kimg": None}
    decided = {"discriminator_kimg": [0.0008, 0.0016]}
    text = json.dumps(record | {"config": record["config"] | told, "decided": decided})
    Path("run/config.json").write_text(text)
    words = ("--branch", "run:2", "--max-steps", 400, "--real-data", "own", "--out", "new")
    found: Any = plan(*words)
    assert found.config.starts == (0.0008, 0.0016) and found.config.total_steps == 400
    # It is still the run that was branched, whether it has recorded them then or since.
    for settings_then in (found.branch.settings, found.branch.settings | {"discriminator_kimg": None}):
        assert _is_it(json.loads(text), replace(found.branch, settings=settings_then), type(found.config))
    other = found.branch.settings | {"discriminator_kimg": [0.1, 0.2]}
    assert not _is_it(json.loads(text), replace(found.branch, settings=other), type(found.config))
    given = plan(*words, "--discriminator", "encoder", "--discriminator-kimg", 0, 1)
    assert given.config.starts == (0.0, 1.0)  # type: ignore[attr-defined]


def test_a_teacher_other_than_the_runs_or_none(here: Path) -> None:
    save_model(untrained(128.0), here / "other")
    words = ("--branch", "run", "--max-steps", 9)
    assert "run was distilled from another teacher than other: a branch has the run's; --continue-from run/" in refused(
        *words, "--teacher", "other"
    )
    Path("model").rename("moved")
    assert "the teacher of run, model, is not there: give it as --teacher, where it lies now" in refused(*words)
    assert plan(*words, "--teacher", "moved", "--out", "new").branch.step == 4  # type: ignore[attr-defined]


def untrained(D: float) -> EDMPrecond:
    torch.manual_seed(5)
    return EDMPrecond(NetworkConfig(
        img_resolution=8, img_channels=1, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(),
        dropout=0.0, D=D,
    ))  # fmt: skip


def test_a_damaged_checkpoint_is_named_or_the_one_before_it_taken(here: Path, capsys) -> None:
    Path("run/checkpoints/step-0000004/progress.json").write_text("{}")
    assert "the checkpoint of step 4 in run is damaged: it has those of steps 2, 4" in refused("--branch", "run:4")
    assert plan("--branch", "run", "--out", "new").branch.step == 2  # type: ignore[attr-defined]
    assert "skipping a damaged checkpoint" in capsys.readouterr().err


def test_words_and_checkpoints_stand_for_steps(here: Path) -> None:
    def step(*words: object) -> int:
        return plan("--branch", *words, "--max-steps", 9, "--out", "new").branch.step  # type: ignore[attr-defined]

    assert step("run:best") == step("run:last") == step("run/checkpoints/step-0000004") == 4
    assert step("run/checkpoints/step-0000002") == 2
    shutil.rmtree("run/checkpoints/step-0000004")
    message = refused("--branch", "run:best")
    assert message.startswith("the best of run, of step 4, has no checkpoint any more: it has those of steps 2; --cont")
    shutil.rmtree("run/checkpoints/step-0000002")
    assert refused("--branch", "run") == (
        "run has no checkpoint to branch from: --continue-from run/generator begins with its network"
    )


def test_a_run_that_trained_its_teacher_has_it_for_its_branches_in_other_recipes_too(here: Path) -> None:
    shutil.copytree("model", "run/teacher/model")
    record = json.loads(Path("run/config.json").read_text())
    record["config"]["teacher"] = None
    Path("run/config.json").write_text(json.dumps(record))
    made = plan("--branch", "run:2", "--out", "new", "--alpha", 1, recipe=distill_ipfm.RECIPE)
    assert made.options.teacher == Path("run/teacher/model") and made.config.alpha == 1  # type: ignore[attr-defined]
    others = made.config.to_json()  # type: ignore[attr-defined]
    there = record["config"]
    unlike = {name for name in others if others[name] != there[name]}
    assert unlike <= {"alpha", "teacher", "out", "zero"}
    # Nothing is measured where there is nothing to compare with.
    assert made.options.metrics == ("fid",)  # type: ignore[attr-defined]


def test_a_teachers_training_branches(here: Path, capsys) -> None:
    images = torch.randint(0, 256, (8, 8, 8, 3), dtype=torch.uint8).numpy()
    for index, image in enumerate(images):
        (here / "images").mkdir(exist_ok=True)
        Image.fromarray(image).save(here / "images" / f"{index}.png")
    network = ["--data", "images", "--model-channels", 8, "--channel-mult", 1, "--num-blocks", 1, "--xflip"]
    small = ["--batch", 4, "--zero", 0, "--heun-steps", 1, "--checkpoint-every", 2, "--keep-checkpoints", 9]
    branch(*network, *small, "--max-steps", 4, "--lr", 1e-3, out="first", main=train_teacher.main)
    words = ("--branch", "first:2", "--data", "images")
    branch(*words, "--max-steps", 6, main=train_teacher.main)
    said = capsys.readouterr().out
    assert "branch of first at step 2, with its settings but: max-steps is 4 there, 6 here\n" in said
    branch(*network, *small, "--max-steps", 6, "--lr", 1e-3, out="first", main=train_teacher.main)
    assert equal(Path("first"), Path("new"))
    line = reproduce(read_run(Path("new"))).line or ""
    assert "--branch first:2 --out new" in line and "--lr" not in line and "--model-channels" not in line
    continued = ("--continue-from", "first", "--data", "images", "--xflip", *small, "--lr", 1e-3)
    branch(*continued, "--max-steps", 8, out="third", main=train_teacher.main)
    # It goes on when the other one is gone.
    shutil.rmtree("first")
    branch(*words, "--max-steps", 7, main=train_teacher.main)
    assert read_run(Path("new")).steps_done == 7
    capsys.readouterr()
    # So does one that continues it; a dry run says how much that is.
    branch(*continued, "--max-steps", 9, "--dry-run", out="third", main=train_teacher.main)
    said = capsys.readouterr().out
    assert "third goes on at step 8 of 9: the durations are those of what is left\n" in said and "for 1 step (" in said
    branch(*continued, "--max-steps", 9, out="third", main=train_teacher.main)
    assert read_run(Path("third")).steps_done == 9
    assert "first is gone: the run goes on from its checkpoint, and needs it no more" in capsys.readouterr().out
    for other in (("--continue-from", "other"), ("--continue-from", "first", "--from-step", 0)):
        with pytest.raises(BadInput, match=f"{other[1]} does not exist"):
            branch(*continued[2:], *other, "--max-steps", 9, out="third", main=train_teacher.main)


def test_the_scale_of_fp16_losses_goes_on_too(here: Path) -> None:
    checkpoint = Path("run/checkpoints/step-0000004")
    scale = {"generator": {"scale": 1024.0}}
    progress = json.loads((checkpoint / "progress.json").read_text()) | {"loss_scale": scale}
    (checkpoint / "progress.json").write_text(json.dumps(progress))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["progress.json"] = hashlib.sha256((checkpoint / "progress.json").read_bytes()).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    networks = plan("--branch", "run", "--max-steps", 9, "--out", "new").start.networks  # type: ignore[attr-defined]
    assert (networks["generator"].loss_scale, networks["student"].loss_scale) == (scale["generator"], {})


def test_a_dry_run_says_what_going_back_puts_aside(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ipfm.engine.experiments.dry_run.step_time", lambda *_: StepTime(1.0))
    monkeypatch.setattr("ipfm.engine.experiments.dry_run.layout_table", lambda *_, **__: "layouts")
    first("--from-step", "2", "--dry-run")
    said = "steps 2 to 4 are put aside first, as a run of their own in run/set-aside\n"
    assert said in capsys.readouterr().out and not Path("run", "set-aside").exists()
    first("--dry-run")
    assert "put aside" not in capsys.readouterr().out


@pytest.mark.distributed
def test_two_processes_branch_a_run_of_one(here: Path) -> None:
    words = ["--branch", str(here / "run:2"), "--teacher", str(here / "model"), "--out", str(here / "new")]
    group = soak.Group([*words, "--lr", "5e-5"], "forked", here / "log", IPFM_TIMEOUT="20")
    try:
        assert group.wait(120) == [0, 0], group.output()
    finally:
        group.kill()
    record = read_run(here / "new")
    assert [line["step"] for line in record.metrics] == [2, 3] and record.starts[0]["processes"] == 2
    assert group.output().count("with its settings but: lr is 0.0001 there, 5e-05 here") == 1
    branch("--branch", "run:2", "--lr", "5e-5", out="alone")
    for line, other in zip(record.metrics, read_run(Path("alone")).metrics, strict=True):
        assert line["student_loss"] == pytest.approx(other["student_loss"], rel=1e-4)
