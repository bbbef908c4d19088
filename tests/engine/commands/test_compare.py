"""`ipfm compare`: which runs, groups and spreads, what does not compare, pages; numbers equal to the runs' own."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from ipfm.engine import DistillConfig, TeacherConfig
from ipfm.engine.commands.compare import plots
from ipfm.engine.commands.compare.facts import Comparison, comparison
from ipfm.engine.commands.compare.runs import read_runs, training_seconds
from ipfm.engine.commands.compare.selection import names_of, selected
from ipfm.engine.commands.compare.tables import results
from ipfm.engine.commands.main import _main
from ipfm.engine.commands.pages.picture import Picture, png
from ipfm.engine.data.image_grid import save_grid
from ipfm.engine.evaluation.results import EvaluationRow, write_results
from ipfm.engine.runtime.commandline import run_command
from ipfm.engine.training.pace import Pace
from ipfm.engine.training.run_state import EvaluationPoint
from ipfm.models import NetworkConfig

FIXTURE = Path(__file__).parents[2] / "fixtures" / "version-0.1.0"
TEACHER = "ab" * 32
CONFIG = DistillConfig(max_steps=40, batch=8, D=16.0, eval_every=10, checkpoint_every=40, precision="fp32", zero=0)
NETWORK = NetworkConfig(img_resolution=8, img_channels=1, model_channels=8, channel_mult=(1,), num_blocks=1, D=16.0)
VALUES = {10: 7.0, 20: 6.0, 30: 5.0, 40: 5.5}


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves take a second a page: they are drawn where a test asks for `drawn`, and else a picture of one pixel."""
    if "drawn" not in request.fixturenames:
        pixel = Picture("curves", png(Image.new("L", (1, 1))))
        monkeypatch.setattr(plots, "curves", lambda found, dark: {"curves": pixel})


@pytest.fixture
def drawn() -> None:
    """See `undrawn`."""


def run_folder(
    path: Path,
    values: Mapping[int, float] = VALUES,
    *,
    teacher: str = TEACHER,
    images: int = 64,
    name: str | None = None,
    finished: bool = True,
    teacher_distance: float = 3.0,
    facts: Mapping[str, Any] | None = None,
    network: NetworkConfig = NETWORK,
    **settings: Any,
) -> Path:
    """What a distillation leaves, without its weights."""
    path.mkdir(parents=True)
    config = replace(CONFIG, **settings)
    record = {"format": 1, "kind": "distill", "objective": "ipfm", "config": config.to_json(), "teacher": teacher}
    (path / "config.json").write_text(json.dumps({**record, **(facts or {})}))
    metric = {} if name is None else {"name": name}
    lines = [
        {"step": step, "frechet": value if math.isfinite(value) else None, "images": images, "seconds": 0.1, **metric}
        for step, value in values.items()
    ]
    (path / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = max(values, default=0)
    losses = [{"step": step, "student_loss": 2.0, "generator_loss": 1 / (step + 1)} for step in range(done)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in losses))
    if finished:
        (path / "generator").mkdir()
        extra = {"task": "generator", "optimizer_steps": done}
        model = {"format": "ipfm-network", "version": 1, "network": network.to_json(), "extra": extra}
        (path / "generator" / "config.json").write_text(json.dumps(model))
        called = name or "Fréchet distance"
        write_results(
            path,
            [
                EvaluationRow("teacher", None, 35, teacher_distance, images, 10.0, metric=called),
                EvaluationRow("generator", 1, 1, values[done], images, 100.0, metric=called),
            ],
        )
    return path


def two_groups(tmp_path: Path) -> list[Path]:
    """Three seeds of two values of alpha; the second is better for each seed, by less than the seeds differ."""
    runs = []
    for alpha, better in ((1.0, 0.0), (0.5, 0.1)):
        for seed, shift in enumerate((0.0, 1.0, 3.0)):
            values = {step: value + shift - better - 0.01 * seed * better for step, value in VALUES.items()}
            runs.append(run_folder(tmp_path / "runs" / f"a{alpha:g}-s{seed}", values, alpha=alpha, seed=seed))
    return runs


def compared(*paths: Path) -> Comparison:
    return comparison(read_runs(selected(paths)))


def ipfm(*arguments: object) -> None:
    run_command("ipfm", _main, [str(argument) for argument in arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which exit code 2 is explained."""
    with pytest.raises(SystemExit) as stop:
        ipfm(*arguments)
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == "" and said.err.count("\n") == 1
    return said.err


def in_json(capsys: pytest.CaptureFixture[str], command: str, *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    ipfm(command, *arguments, "--json")
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_numbers_are_those_of_the_runs_own_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [*two_groups(tmp_path)[::2], *(FIXTURE / name for name in ("ipfm", "pid"))]
    found = in_json(capsys, "compare", *runs)
    assert [one["run"] for one in found["runs"]] == [run.name for run in runs]
    for run, one in zip(runs, found["runs"], strict=True):
        own = in_json(capsys, "report", run)
        for key in ("state", "steps_done", "batch", "images", "results", "teacher_values", "best"):
            assert one[key] == own[key], key
        for key in ("images_per_second", "logged_seconds"):
            assert one[key] == own[key], key
        lines = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
        further = {"trained_images", "trained_seconds"}
        assert [{k: v for k, v in e.items() if k not in further} for e in one["evaluations"]] == lines
        assert [e["trained_images"] for e in one["evaluations"]] == [line["step"] * own["batch"] for line in lines]
        last = json.loads((run / "results.json").read_text())[-1]
        assert one["last"]["frechet"] == last["frechet"] and one["nfe"] == last["nfe"]


def test_three_seeds_and_two_alphas_have_spread_and_a_paired_difference(tmp_path: Path) -> None:
    found = compared(*two_groups(tmp_path))
    assert [(group.label, group.seeds) for group in found.groups] == [("alpha 1", (0, 1, 2)), ("alpha 0.5", (0, 1, 2))]
    (one,) = found.sets
    assert one.common.images == 320 and one.common.exact
    numbers = {(n.group, n.at): n.spread for n in one.numbers}
    assert numbers["alpha 1", "equal images"].mean == pytest.approx((5.5 + 6.5 + 8.5) / 3)
    assert numbers["alpha 1", "best"].deviation == pytest.approx(scipy.stats.tstd([5.0, 6.0, 8.0]))
    (difference, _) = one.differences
    assert difference.at == "equal images" and difference.found.pairs == 3
    assert difference.found.mean == pytest.approx((0.1 + 0.101 + 0.102) / 3) and difference.found.low > 0
    ranking, paired, chosen = one.sentences
    assert ranking.startswith("After 320 images alpha 0.5 has the smallest mean Fréchet distance")
    assert "3 seeds" in paired and "does not hold 0" in paired and "chosen by Fréchet distance" in chosen
    assert not found.remarks and [row.name for row in found.differences] == ["seed", "alpha"]


def test_seeds_that_contradict_each_other_do_not_tell_groups_apart(tmp_path: Path) -> None:
    for alpha, values in ((1.0, (5.0, 6.0)), (0.5, (5.5, 5.4))):
        for seed, value in enumerate(values):
            run_folder(tmp_path / f"{alpha}-{seed}", {40: value}, alpha=alpha, seed=seed)
    (one,) = compared(tmp_path).sets
    assert "holds 0: these runs do not tell the two apart" in one.sentences[1]


def test_groups_of_other_seeds_are_paired_by_those_that_both_have(tmp_path: Path) -> None:
    """Two seeds beside one of them: the mean of the two is another seed's merit too."""
    for seed, value in ((0, 5.0), (1, 4.0)):
        run_folder(tmp_path / f"a{seed}", {40: value}, seed=seed)
    run_folder(tmp_path / "b0", {40: 4.75}, alpha=0.5)
    (one,) = compared(tmp_path).sets
    ranking, paired, seeds, _ = one.sentences
    assert "alpha 1 has the smallest mean" in ranking and "4.500 over 2 runs" in ranking
    assert paired == "They share one seed: there alpha 1 minus alpha 0.5 is 0.2500, which says little."
    assert seeds.startswith("They have other seeds (0, 1 and 0)")


def test_one_run_each_says_little(tmp_path: Path) -> None:
    found = compared(run_folder(tmp_path / "a"), run_folder(tmp_path / "b", {40: 5.4}, alpha=0.5))
    (one,) = found.sets
    assert one.sentences[0] == (
        "After 320 images alpha 0.5 has the smallest Fréchet distance, 5.400, before alpha 1, 5.500."
    )
    assert one.sentences[-1].startswith("One run each says little") and "0.06" in one.sentences[-1]
    assert one.differences == () and [row.name for row in found.differences] == ["alpha"]


def test_that_one_is_deterministic_is_where_and_how(tmp_path: Path) -> None:
    found = compared(run_folder(tmp_path / "a"), run_folder(tmp_path / "b", deterministic=True))
    assert [(row.kind, row.name, row.values) for row in found.differences] == [
        ("where and how", "deterministic", ("off, on",))
    ]


def test_of_other_lengths_the_largest_common_number_of_images_decides(tmp_path: Path) -> None:
    short = run_folder(tmp_path / "short", {10: 6.0, 20: 4.9}, max_steps=20)
    found = compared(short, run_folder(tmp_path / "long"))
    (one,) = found.sets
    assert one.common.images == 160 and one.common.points["long"].frechet == 6.0
    assert [group.label for group in found.groups] == ["max-steps 20", "max-steps 40"]
    assert one.sentences[0].startswith("After 160 images max-steps 20 has the smallest")
    assert "different lengths (20, 40 steps)" in found.remarks[0]


def test_where_no_number_of_images_is_common_each_is_taken_at_its_last_before(tmp_path: Path) -> None:
    found = compared(run_folder(tmp_path / "a"), run_folder(tmp_path / "b", {7: 6.5, 21: 5.2, 40: 4.0}, batch=16))
    (one,) = found.sets
    assert (one.common.images, one.common.exact) == (320, False)
    assert {name: point.step for name, point in one.common.points.items()} == {"a": 40, "b": 7}
    assert any("no number of images" in sentence for sentence in one.sentences)


def test_a_branch_is_compared_with_those_that_came_as_far(tmp_path: Path) -> None:
    start = {"source": "whole/step-0000040", "images_seen": 320, "networks": ["generator", "student"]}
    facts = {"continues": "cd" * 32, "start": start}
    run_folder(tmp_path / "whole")
    for name, lr, value in (("b1", 1e-4, 5.0), ("b2", 2e-4, 4.5)):
        run_folder(tmp_path / name, {50: 5.2, 60: value}, lr=lr, max_steps=60, facts=facts)
    found = compared(tmp_path)
    (one,) = found.sets
    assert one.common.images == 480 and set(one.common.points) == {"b1", "b2"}
    assert one.sentences[0] == "After 480 images b2 has the smallest Fréchet distance, 4.500, before b1, 5.000."
    assert one.sentences[1] == "After 480 images whole was not measured."
    assert any(r.startswith("b1 went on from whole/step-0000040 after 320 images, which its") for r in found.remarks)
    values = {row.name: row.values for row in found.differences}
    assert values["goes on from"] == (*["whole/step-0000040 (cdcdcdcd)"] * 2, "-")


def test_runs_that_were_never_measured_after_as_many_images_are_compared_by_their_best(tmp_path: Path) -> None:
    found = compared(run_folder(tmp_path / "a"), run_folder(tmp_path / "b", {60: 4.5}, max_steps=60))
    (one,) = found.sets
    assert one.common.images is None and one.sentences[0].startswith("By its best evaluation max-steps 60")
    assert one.sentences[1].startswith("There is no number of images after which two of them")


def test_repeats_of_one_seed_count_by_their_mean_and_copies_are_named(tmp_path: Path) -> None:
    first = run_folder(tmp_path / "a0", {40: 5.0})
    # Made again, which takes another time.
    again = shutil.copytree(first, tmp_path / "copy") / "evaluations.jsonl"
    again.write_text(again.read_text().replace('"seconds": 0.1', '"seconds": 0.2'))
    run_folder(tmp_path / "a1", {40: 6.0}, seed=1)
    run_folder(tmp_path / "b0", {40: 4.0}, alpha=0.5)
    run_folder(tmp_path / "b1", {40: 5.5}, alpha=0.5, seed=1)
    found = compared(tmp_path)
    said = "a0 and copy have the same seed and the very same numbers: they may be copies of one run, and count once in"
    assert f"{said} a group." in found.remarks
    (spread,) = [n.spread for n in found.sets[0].numbers if n.at == "best" and n.group == "alpha 1"]
    assert (spread.n, spread.mean) == (2, 5.5)
    assert any("share a seed" in remark for remark in found.remarks)
    paired = found.sets[0].differences[0].found
    assert paired.pairs == 2 and paired.mean == pytest.approx((1.0 + 0.5) / 2)


# -- what must not be mixed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"images": 128}, "evaluations of 64 and of 128 images"),
        ({"name": "FID"}, "Fréchet distance and FID: other features"),
        ({"teacher_distance": 12.0}, "the same teacher's distance is 3 in one and 12 in the other"),
        ({"network": replace(NETWORK, img_resolution=16)}, "images of 1x8x8 and of 1x16x16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_runs_measured_otherwise_are_not_ranked(tmp_path: Path, other: dict[str, Any], reason: str) -> None:
    found = compared(run_folder(tmp_path / "a"), run_folder(tmp_path / "b", **other, alpha=0.5))
    assert [one.name for one in found.sets] == ["A", "B"]
    assert reason in found.remarks[0] and "are not ranked" in found.remarks[0]
    assert all(one.sentences == () or "has the" not in one.sentences[0] for one in found.sets)


def test_runs_of_other_data_are_not_ranked(tmp_path: Path) -> None:
    runs = []
    for name, checksum in (("digits", "aa" * 32), ("shapes", "bb" * 32)):
        run = run_folder(tmp_path / name, teacher=checksum)
        (run / "teacher").mkdir()
        about = {"format": 1, "kind": "teacher", "config": TeacherConfig(max_steps=1).to_json(), "dataset": name}
        (run / "teacher" / "config.json").write_text(json.dumps(about))
        runs.append(run)
    # It was given the teacher that the first has trained.
    runs.append(run_folder(tmp_path / "given", teacher="aa" * 32, alpha=0.5))
    found = compared(*runs)
    assert [[run.name for run in one.runs] for one in found.sets] == [["digits", "given"], ["shapes"]]
    assert "data: digits and shapes" in found.remarks[0]


def test_that_nobody_knows_of_two_teachers_data_is_said(tmp_path: Path) -> None:
    found = compared(run_folder(tmp_path / "a"), run_folder(tmp_path / "b", teacher="cd" * 32))
    assert len(found.sets) == 1 and "do not say of all teachers what they were trained on" in found.remarks[0]


def test_a_teachers_training_is_not_ranked_with_a_distillation(tmp_path: Path) -> None:
    found = compared(FIXTURE / "ipfm", FIXTURE / "teacher")
    assert "one is a distillation" in found.remarks[0] or "one is a teacher's training" in found.remarks[0]
    assert [row.values for row in found.differences if row.name == "kind"] == [
        ("a distillation", "a teacher's training")
    ]


def test_an_unfinished_a_diverged_and_an_unmeasured_run_are_taken_as_far_as_they_go(tmp_path: Path) -> None:
    whole = run_folder(tmp_path / "whole")
    stopped = run_folder(tmp_path / "stopped", {10: 6.9, 20: 5.8}, alpha=0.5, finished=False)
    diverged = run_folder(tmp_path / "diverged", {10: math.nan}, alpha=1.2, finished=False)
    (diverged / "diverged.json").write_text('{"step": 12, "reason": "too many"}')
    empty = run_folder(tmp_path / "empty", {}, alpha=1.1, finished=False)
    found = compared(whole, stopped, diverged, empty)
    remarks = "\n".join(found.remarks)
    assert "stopped is unfinished, at step 20 of 40: its numbers are those so far." in remarks
    assert "diverged diverged at step 12" in remarks and "empty was never measured." in remarks
    (one,) = found.sets
    assert one.common.images == 160 and set(one.common.points) == {"whole", "stopped"}
    assert one.sentences[0].startswith("After 160 images alpha 0.5 has the smallest")
    row = next(run for run in found.to_json()["runs"] if run["run"] == "diverged")
    assert row["best"] is None and row["state"] == "diverged" and row["at_equal_images"] is None


def test_a_run_of_version_0_1_says_what_it_does_not_record(tmp_path: Path) -> None:
    older = json.loads((FIXTURE / "ipfm" / "config.json").read_text())
    settings = {
        name: value for name, value in older["config"].items() if name not in ("noise", "out", "sigmas", "teacher")
    }
    younger = run_folder(
        tmp_path / "new", {2: 41.0, 4: 40.0}, teacher=older["teacher"], teacher_distance=43.51805778260548,
        **settings, sigmas=(2.5, 1.25),
    )  # fmt: skip
    found = compared(FIXTURE / "ipfm", younger)
    rows = {row.name: row.values for row in found.differences}
    assert rows["rules"] == ("not recorded", "2") and rows["snapshot-every"] == ("not recorded", "0")
    assert "objective" not in rows and "alpha" not in rows and len(found.sets) == 1


def test_a_damaged_run_is_named_and_does_not_end_the_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    good, bad = run_folder(tmp_path / "runs" / "good"), run_folder(tmp_path / "runs" / "bad", alpha=0.5)
    (bad / "config.json").write_text("{")
    (bad / "evaluations.jsonl").write_bytes(b'{"step": 10, "frechet": 7.0}\n\xff\xfe not a line\n')
    (good / "results.json").write_text("[")
    ipfm("compare", "runs")
    said = capsys.readouterr().out
    assert "bad: config.json cannot be read as a run's settings." in said
    assert "good: results.json cannot be read." in said
    assert (tmp_path / "compare.html").is_file()


# -- which runs --------------------------------------------------------------------------------------------------------


def test_a_folder_of_runs_and_an_ablation_stand_for_their_runs(tmp_path: Path) -> None:
    for seed in (10, 2):
        run_folder(tmp_path / "ablation" / "a" / f"seed{seed}", seed=seed)
    (tmp_path / "ablation" / "ablation.json").write_text('{"ablation": "alpha", "features": "pixels"}')
    run_folder(tmp_path / "ablation" / "teachers" / "ddpmpp-D16")
    other = run_folder(tmp_path / "other")
    (tmp_path / "notes").mkdir()
    runs = selected([tmp_path / "ablation"])
    assert [run.name for run in runs] == ["seed2", "seed10"]
    assert selected([tmp_path]) == [*runs, other] and names_of([*runs, other])[-1].endswith("other")
    assert names_of([tmp_path / "x" / "seed0", tmp_path / "y" / "seed0"]) == ["x/seed0", "y/seed0"]
    aside = tmp_path / "x" / "set-aside" / "step-0000060"
    assert names_of([tmp_path / "x", aside]) == ["x", "x/set-aside/step-0000060"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "give two or more run folders"),
        (("a",), "a is one run: give two or more to compare"),
        (("a", "./a"), "a is there twice"),
        ((".", "a"), "a is there twice"),
        (("a", "a/generator"), "a/generator is a model folder"),
        (("a", "nowhere"), "nowhere is not there"),
        (("a", "nothing"), "nothing is no run folder and none is in it"),
        (("a", "a/config.json"), "a/config.json is a file"),
        (("a", "b", "--out", "x.pdf"), "out must end in .html or .md, got x.pdf"),
        (("a", "b", "--out", "a/config.json"), "out must end in"),
        (("a", "b", "--out", "mine.html"), "mine.html is there and is no comparison of this command"),
        (("a", "b", "--csv", "mine.html"), "mine.html is there and is no table of this command"),
        (("a", "b", "--picture", "mine.png"), "mine.png is there and is no picture of this command"),
        (("a", "b", "--picture", "x.jpg"), "picture must end in .png, got x.jpg"),
        (("a", "b", "--csv", "mine.html/x.csv"), "mine.html is a file"),
        (("a", "b", "--json", "--images", "x"), "images is for a Markdown page"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_compared_is_refused_in_a_line_before_anything_is_written(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    given: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    run_folder(tmp_path / "a")
    run_folder(tmp_path / "b", alpha=0.5)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "mine.html").write_text("my own")
    Image.new("L", (2, 2)).save(tmp_path / "mine.png")
    before = sorted(tmp_path.rglob("*"))
    assert said in refused(capsys, "compare", *given)
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "mine.html").read_text() == "my own"


# -- what is written ---------------------------------------------------------------------------------------------------


def with_pictures(run: Path, seed: int = 0) -> None:
    """A grid after the last step, and the times of the steps."""
    (run / "samples").mkdir()
    noise = np.random.default_rng(seed).uniform(-1, 1, (64, 1, 8, 8)).astype(np.float32)
    import torch

    save_grid(torch.from_numpy(noise), run / "samples" / "step-0000040.png")
    with SummaryWriter(str(run)) as board:
        for step in range(1, 41):
            board.add_scalar("train/student_loss", 2.0, step, walltime=1e9 + step * (1 + seed))


def test_page_picture_and_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, drawn: None
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = two_groups(tmp_path)
    for seed, run in enumerate(runs):
        with_pictures(run, seed)
    ipfm("compare", "runs", "--csv", "runs.csv", "--picture", "curves.png")
    said = capsys.readouterr().out
    assert "After 320 images alpha 0.5 has the smallest" in said
    assert said.endswith("page: compare.html\ncurves: curves.png\nruns: runs.csv\nevaluations: runs-evaluations.csv\n")
    text = (tmp_path / "compare.html").read_text()
    assert (
        text.count("data:image/png;base64,") == 2 * 2 + len(runs) and "http" not in text and str(tmp_path) not in text
    )
    assert "Images in the same place are of the same latent" in text and "alpha 0.5 minus alpha 1" in text
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 1000
    rows = list(csv.DictReader((tmp_path / "runs.csv").open()))
    assert [row["run"] for row in rows] == [run.name for run in sorted(runs)] and rows[0]["setting alpha"] == "0.5"
    evaluations = list(csv.DictReader((tmp_path / "runs-evaluations.csv").open()))
    own = [json.loads(line) for line in (runs[0] / "evaluations.jsonl").read_text().splitlines()]
    ours = [row for row in evaluations if row["run"] == runs[0].name]
    assert [(int(r["step"]), float(r["frechet"]), int(r["images"])) for r in ours] == [
        (line["step"], line["frechet"], 8 * line["step"]) for line in own
    ]
    assert [float(row["training_seconds"]) for row in ours] == [9.0, 19.0, 29.0, 39.0]
    # All of it again, over what is there.
    monkeypatch.setattr(plots, "curves", lambda found, dark: {"curves": Picture("x", png(Image.new("L", (1, 1))))})
    ipfm("compare", *runs, "--csv", "runs.csv", "--picture", "curves.png")


def test_a_page_in_markdown_has_its_pictures_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [run_folder(tmp_path / "a|b"), run_folder(tmp_path / "c", alpha=0.5, D=32.0)]
    for seed, run in enumerate(runs):
        with_pictures(run, seed)
    ipfm("report", *runs, "--out", "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "| a&#124;b | alpha 1, D 16" in text.replace("D 16, alpha 1", "alpha 1, D 16") and "\n\n\n" not in text
    assert "not of the same latents: D differs (16 and 32)" in text
    assert {path.name for path in (tmp_path / "page_files").iterdir()} >= {"page-curves.png", "page-samples-2.png"}
    shutil.rmtree(tmp_path / "page_files")
    (tmp_path / "page_files").mkdir()
    (tmp_path / "page_files" / "page-curves.png").write_bytes(b"mine")
    assert "no picture of a report" in refused_after(capsys, "compare", *runs, "--out", "page.md")


def refused_after(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """As `refused`, where the tables are printed before."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        ipfm(*arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_a_damaged_picture_is_left_out_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, alpha in (("a", 1.0), ("b", 0.5)):
        run = run_folder(tmp_path / name, alpha=alpha)
        with_pictures(run)
        (run / "samples" / "step-0000041.png").write_bytes(b"\x89PNG no more")
    ipfm("compare", "a", "b", "--out", "x.html")
    text = (tmp_path / "x.html").read_text()
    assert "samples/step-0000041.png of a cannot be read." in text and "a (alpha 1), after 40 steps" in text


def test_a_run_without_a_number_still_has_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, drawn: None
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        run_folder(tmp_path / name, {}, finished=False)
    ipfm("compare", "a", "b", "--picture", "x.png")
    assert "a was never measured." in capsys.readouterr().out
    assert (tmp_path / "compare.html").is_file() and not (tmp_path / "x.png").exists()


def test_a_page_of_an_earlier_comparison_among_the_runs_is_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_folder(tmp_path / "a")
    run_folder(tmp_path / "b", alpha=0.5)
    for _ in range(2):
        ipfm("compare", *sorted(path.name for path in tmp_path.iterdir()))
    assert capsys.readouterr().out.count("page: compare.html") == 2


def test_different_numbers_of_processes_within_a_group_are_said(tmp_path: Path) -> None:
    for seed, processes in enumerate((1, 2)):
        run = run_folder(tmp_path / f"s{seed}", seed=seed)
        start = {"step": 0, "processes": processes, "device": "CPU (x86_64)", "torch": "2.13.0"}
        (run / "environment.jsonl").write_text(json.dumps(start) + "\n")
    found = compared(tmp_path)
    assert len(found.groups) == 1 and [row.name for row in found.differences] == ["seed", "processes"]
    assert found.remarks == (
        "Runs of group A were made by different numbers of processes (1, 2), which moves results too.",
    )


def test_a_line_of_the_table_has_the_settings_of_its_own_run(tmp_path: Path) -> None:
    for seed in range(2):
        run_folder(tmp_path / f"s{seed}", seed=seed, micro_batch=4 * (seed + 1))
    ipfm("compare", tmp_path, "--csv", tmp_path / "runs.csv", "--out", tmp_path / "page.md")
    rows = list(csv.DictReader((tmp_path / "runs.csv").open()))
    assert [(row["run"], row["group"], row["setting micro-batch"]) for row in rows] == [
        ("s0", "group A", "4"),
        ("s1", "group A", "8"),
    ]


def test_settings_that_another_kind_of_run_lacks_differ_where_they_are_no_default(tmp_path: Path) -> None:
    pid = FIXTURE / "pid"
    rows = {row.name for row in compared(FIXTURE / "ipfm", pid).differences}
    assert {"objective", "sigmas", "points"} <= rows and not rows & {"alpha", "student-lr", "student-init", "beta1"}
    rows = {row.name for row in compared(run_folder(tmp_path / "half", alpha=0.5), pid).differences}
    assert "alpha" in rows


def test_of_runs_without_a_number_nothing_is_said_about_chance(tmp_path: Path) -> None:
    found = compared(
        run_folder(tmp_path / "a", {}, finished=False), run_folder(tmp_path / "b", {}, finished=False, lr=1)
    )
    assert found.sentences == [] and "a was never measured." in found.remarks


def test_lengths_differ_among_runs_whose_numbers_compare(tmp_path: Path) -> None:
    runs = [run_folder(tmp_path / "a"), run_folder(tmp_path / "b", alpha=0.5)]
    other = run_folder(tmp_path / "c", {10: 7.0}, images=128, max_steps=10)
    assert not any("different lengths" in remark for remark in compared(*runs, other).remarks)
    longer = run_folder(tmp_path / "d", {**VALUES, 50: 4.0}, max_steps=50, alpha=0.5)
    assert (
        "The runs of set A have different lengths (40, 50 steps): see the numbers at equal images."
        in compared(*runs, other, longer).remarks
    )


def test_of_one_run_what_it_has_put_aside_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_folder(tmp_path / "a")
    run_folder(run / "set-aside" / "step-0000040")
    said = refused(capsys, "compare", run)
    assert f"such as {run}/set-aside/step-0000040, which it put aside, or use `ipfm report`" in said
    assert len(compared(run, run / "set-aside" / "step-0000040").runs) == 2


def test_time_counts_the_parts_of_a_run_and_not_what_lies_between() -> None:
    pace = Pace((((10, 100.0), (20, 110.0), (30, 120.0)), ((30, 1000.0), (40, 1010.0))))
    assert training_seconds(pace, [5, 10, 15, 30, 40, 45, 90]) == {10: 0.0, 15: 5.0, 30: 20.0, 40: 30.0, 45: 30.0}
    assert training_seconds(Pace(), [5]) == {}


def test_a_far_teacher_does_not_squeeze_the_curves() -> None:
    assert plots._is_near(4.0, [5.0, 6.0]) and plots._is_near(0.2, [0.5, 4.0])
    assert not plots._is_near(244.0, [5.1, 6.8]) and plots._is_near(5.0, [5.0])


def test_a_legend_of_many_groups_has_as_many_rows_as_it_needs() -> None:
    assert plots._legend_columns(["alpha 0.5"] * 12) == 8 and plots._legend_columns(["a", "b"]) == 2
    assert plots._legend_columns(["x" * 200, "y"]) == 1


def test_points_without_an_evaluation_at_the_end_have_the_tables_line(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "a")
    (run / "evaluations.jsonl").write_text("")
    found = compared(run, run_folder(tmp_path / "b"))
    assert found.runs[0].points == (EvaluationPoint(40, 5.5, 64, None),) and found.sets[0].common.images == 320


def test_runs_of_an_ablation_have_the_line_of_the_teacher_that_it_measured(tmp_path: Path) -> None:
    for variant, alpha in (("a", 1.0), ("b", 0.5)):
        run = run_folder(tmp_path / "ablation" / variant / "seed0", alpha=alpha)
        (run / "results.json").unlink()
    (tmp_path / "ablation" / "ablation.json").write_text('{"ablation": "alpha", "features": "pixels"}')
    measured = {"teacher": TEACHER, "images": 64, "heun_steps": 3, "frechet": 2.5, "name": "Fréchet distance"}
    (tmp_path / "ablation" / "teachers" / "ddpmpp").mkdir(parents=True)
    (tmp_path / "ablation" / "teachers" / "ddpmpp" / "distance.json").write_text(json.dumps(measured))
    found = compared(tmp_path / "ablation")
    assert [run.teacher_values for run in found.runs] == [{"frechet": 2.5}] * 2
    rows = results(found, found.sets[0])
    assert [row[0] for row in rows] == ["run", "a/seed0", "b/seed0", "teacher"] and rows[-1][5:7] == ["5", "2.500"]


def test_runs_that_measured_more_and_less_of_a_teacher_share_its_line(tmp_path: Path) -> None:
    less, more = run_folder(tmp_path / "less"), run_folder(tmp_path / "more", alpha=0.5)
    lines = [json.loads(line) for line in (more / "evaluations.jsonl").read_text().splitlines()]
    lines = [{**line, "metrics": ["fid", "kid"], "kid": 0.5, "kid_std": 0.1} for line in lines]
    (more / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    both: dict[str, Any] = {"metrics": ("fid", "kid"), "kid_std": 0.1}
    write_results(
        more,
        [
            EvaluationRow("teacher", None, 35, 3.0, 64, 10.0, kid=0.25, **both),
            EvaluationRow("generator", 1, 1, 5.5, 64, 100.0, kid=0.5, **both),
        ],
    )
    found = compared(less, more)
    heading, first, _, teacher = results(found, found.sets[0])
    assert dict(zip(heading, first, strict=True))["kernel distance"] == "-"
    assert teacher[0] == "teacher" and teacher[6:8] == ["3.000", "0.2500 ± 0.1000"]
    assert found.sets[0].chosen_by() == "Fréchet distance" and "best kernel distance" not in heading


def test_averages_that_were_measured_beside_the_exported_one_are_said(tmp_path: Path) -> None:
    one, other = run_folder(tmp_path / "one"), run_folder(tmp_path / "other")
    lines = [json.loads(line) for line in (one / "evaluations.jsonl").read_text().splitlines()]
    for line in lines:
        line["averages"] = {"ema0.05": {"frechet": line["frechet"]}, "ema0.1": {"frechet": line["frechet"] + 1}}
    (one / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = compared(one, other)
    last = lines[-1]["frechet"]
    (said,) = [sentence for sentence in found.sentences if "averages" in sentence]
    words = f"ema0.05 {last:.3f}, ema0.1 {last + 1:.3f}; the tables have the one that is exported."
    assert said == f"one was measured by each of its averages, at its last evaluation {words}"
    ours, theirs = found.to_json()["runs"]
    assert [point["step"] for point in ours["averages"]["ema0.1"]] == [line["step"] for line in lines]
    assert theirs["averages"] == {}


def test_equal_numbers_are_said_to_be_equal(tmp_path: Path) -> None:
    found = compared(run_folder(tmp_path / "a"), run_folder(tmp_path / "b", alpha=0.5))
    assert found.sentences[0] == "After 320 images alpha 1 and alpha 0.5 have the same Fréchet distance, 5.500."


def test_what_holds_for_several_sets_is_said_once(tmp_path: Path) -> None:
    for name, images in (("a", 64), ("b", 64), ("c", 128), ("d", 128)):
        value = 5.0 if name in "ad" else 5.5
        run_folder(tmp_path / name, {40: value}, images=images, alpha=1.0 if name in "ac" else 0.5)
    found = compared(tmp_path)
    assert [one.name for one in found.sets] == ["A", "B"] and sum(
        "One run each" in text for text in found.sentences
    ) == 1
    assert found.sentences[0].startswith("Set A: After 320 images") and found.sentences[1].startswith("Set B: ")
