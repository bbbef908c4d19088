"""Several metrics at each evaluation of a run: in its files, its table, its curves, TensorBoard, info and report."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_inception
import torch

from ipfm.engine.commands.evaluate import Evaluate
from ipfm.engine.commands.info import Info
from ipfm.engine.commands.report.facts import facts_of
from ipfm.engine.commands.report.page import target, write_page
from ipfm.engine.distributed.world import World
from ipfm.engine.evaluation.evaluation import Evaluation, open_comparison
from ipfm.engine.evaluation.metrics import FrechetResult, Metric
from ipfm.engine.evaluation.metrics.measures import best_of, measures_of, merit
from ipfm.engine.evaluation.options import EvaluationOptions
from ipfm.engine.evaluation.results import EvaluationHistory, EvaluationRow, read_results, results_table
from ipfm.engine.objectives.ipfm import DistillConfig
from ipfm.engine.training.distiller import Distiller
from ipfm.engine.training.run_folder import release_folder
from ipfm.engine.training.run_state import read_run
from ipfm.engine.training.snapshots import KeptModel, read_best
from ipfm.models import NetworkConfig, build_network
from ipfm.models.checkpoints.run_models import locate
from ipfm.models.store import read_config

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
NETWORK = NetworkConfig(
    img_resolution=4, img_channels=1, model_channels=4, channel_mult=(1,), num_blocks=1, attn_resolutions=(), D=64.0
)
EVERY: tuple[Metric, ...] = ("kid", "fid", "is", "pr")
KID, *_ = measures_of(EVERY)
NUMBERS = {"frechet", "kid", "inception_score", "precision", "recall"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An Inception network and real images, these alone and as statistics."""
    root = tmp_path_factory.mktemp("files")
    tiny_inception.write(root / "net.pt")
    np.savez(root / "real.npz", arr_0=np.random.default_rng(0).integers(0, 256, (24, 4, 4, 1), dtype=np.uint8))
    np.savez(root / "three.npz", arr_0=np.zeros((3, 4, 4, 1), dtype=np.uint8))
    np.savez(root / "stats.npz", mu=np.zeros(tiny_inception.DIM), sigma=np.eye(tiny_inception.DIM))
    return root


def evaluation(files: Path, metrics: tuple[Metric, ...], images: int = 16) -> Evaluation:
    found = open_comparison(files / "real.npz", (1, 4, 4), CPU, inception=files / "net.pt", metrics=metrics)
    return found.evaluation(ALONE, images=images, batch=8)


def run(path: Path, files: Path, metrics: tuple[Metric, ...], **settings: Any) -> Distiller:
    given = {"batch": 4, "max_steps": 2, "eval_every": 1, "heun_steps": 1, "zero": 0, "precision": "fp32", **settings}
    torch.manual_seed(0)
    made = Distiller(
        DistillConfig(**given),
        build_network(NETWORK).eval(),
        evaluation=evaluation(files, metrics),
        dataset="cifar10",
        world=ALONE,
    )
    made.run(path)
    return made


@pytest.fixture(scope="module")
def finished(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, list[Any]]]:
    """A run with every metric; what it said on stderr, and the figures that it drew."""
    from matplotlib.figure import Figure

    drawn: list[Any] = []
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        save = Figure.savefig
        patch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
        patch.setattr("ipfm.engine.training.monitor.tqdm.write", lambda text, **_: said.append(text))
        path = tmp_path_factory.mktemp("runs") / "run"
        run(path, files, EVERY)
    yield path, "\n".join(said), drawn


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "evaluations.jsonl").read_text().splitlines()]


def answered(capsys: pytest.CaptureFixture[str], command: Any) -> dict[str, Any]:
    command.run()
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_run_measures_what_evaluate_measures_of_its_generator(
    finished: tuple[Path, str, list[Any]], files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, said, _ = finished
    first, last = lines(path)
    assert (first["step"], last["step"]) == (1, 2) and last["metrics"] == list(EVERY) and last["name"] == "FID"
    assert last.keys() > NUMBERS and (last["kid_subset_size"], last["pr_images"], last["pr_real_images"]) == (8, 16, 24)
    of_generator = Evaluate(
        model=path / "generator",
        reference=files / "real.npz",
        inception=files / "net.pt",
        metrics=EVERY,
        images=16,
        batch=5,
        seed=10_000,
        json=True,
    )
    (found,) = answered(capsys, of_generator)["runs"]
    for name in (NUMBERS | {"kid_std", "inception_score_std"}) - {"frechet"}:
        assert last[name] == pytest.approx(found[name], rel=1e-5), name
    assert last["frechet"] == pytest.approx(found["distance"], rel=1e-5)
    # Said where the numbers are, and once.
    assert "step 2: KID " in said and f"FID {last['frechet']:.4f}" in said and "Inception score" in said
    assert said.count("KID: over subsets of 8 images, half of the smaller set, instead of 1,000") == 1
    assert said.count("precision and recall: 16 samples, 24 real images, k = 3, Inception's features") == 1


def test_the_table_has_a_column_for_each_metric_and_the_teachers_numbers(
    finished: tuple[Path, str, list[Any]], files: Path
) -> None:
    path, _, _ = finished
    teacher, generator = read_results(path)
    header, _, *rows = (path / "results.txt").read_text().splitlines()
    columns = ["network", "steps", "NFE", "KID", "FID", "Inception score", "precision", "recall", "images", "images/s"]
    assert re.split(r"\s\s+", header) == columns
    assert teacher.values.keys() == generator.values.keys() == NUMBERS and teacher.kid != generator.kid
    assert rows[1].split()[:2] == ["generator", "1"] and generator.shown(KID) in rows[1]
    assert rows[2].startswith("KID: over subsets of 8 images") and rows[3].startswith("precision and recall: 16")
    last = lines(path)[-1]
    assert {name: generator.values[name] for name in NUMBERS} == {name: last[name] for name in NUMBERS}
    saved = json.loads((path / "results.json").read_text())[0]
    assert (saved["label"], saved["kid"], saved["metrics"]) == ("teacher", teacher.kid, list(EVERY))


def test_the_curves_have_a_panel_for_each_number_with_the_teachers_line(
    finished: tuple[Path, str, list[Any]],
) -> None:
    path, _, (figure, *_) = finished
    teacher, _ = read_results(path)
    names = ["KID", "FID", "Inception score", "precision", "recall"]
    assert [axes.get_ylabel() for axes in figure.axes] == names
    for axes, value in zip(figure.axes, teacher.values.values(), strict=True):
        dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
        assert [set(line.get_ydata()) for line in dashed] == [{value}]


def test_tensorboard_describes_every_number(finished: tuple[Path, str, list[Any]]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    path, _, _ = finished
    board = EventAccumulator(str(path)).Reload()
    for name in NUMBERS:
        for tag in (name, f"teacher_{name}"):
            assert [event.step for event in board.Scalars(tag)] == [1, 2], tag
            assert len(board.SummaryMetadata(tag).summary_description) > 20, tag
        assert board.Scalars(name)[1].value == pytest.approx(lines(path)[1][name], rel=1e-6)
    said = {t: HParamsPluginData.FromString(c) for t, c in board.PluginTagToContent("hparams").items()}
    infos = [m.name.tag for m in said["_hparams_/experiment"].experiment.metric_infos]
    assert infos[:4] == ["kid", "teacher_kid", "frechet", "teacher_frechet"] and "recall" in infos
    (event,) = board.Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    assert [c.title for c in layout.category[0].chart] == ["kid", "frechet", "inception_score", "precision", "recall"]


def test_info_and_report_say_every_number(
    finished: tuple[Path, str, list[Any]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path, _, _ = finished
    facts = answered(capsys, Info(model=path, json=True))
    assert (facts["metrics"], facts["metric"]) == (list(EVERY), "FID") and facts["evaluations"] == lines(path)
    assert facts["best_evaluation"] == min(lines(path), key=lambda line: float(line["kid"]))
    Info(model=path).run()
    text = capsys.readouterr().out
    for name in ("KID", "FID", "Inception score", "precision", "recall"):
        assert f"\n{name} " in text, name
    record = read_run(path)
    found = facts_of(record)
    saved = json.loads(json.dumps(found.to_json()))
    assert saved["evaluations"] == lines(path) and saved["results"] == json.loads((path / "results.json").read_text())
    assert saved["teacher_values"].keys() == NUMBERS
    assert "The FID of the generator's samples is" in found.summary and "Of the same samples: KID" in found.summary
    assert "(teacher: " in found.summary and "Published" not in found.summary
    write_page(record, found, target(tmp_path / "page.md"))
    page = (tmp_path / "page.md").read_text()
    assert "| NFE | KID | FID | Inception score | precision | recall | images |" in page
    assert "KID: over subsets of 8 images" in page and "## KID, FID, Inception score, precision, recall" in page
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ipfm.engine.commands.report.page.curves", lambda *_, **__: {})
        write_page(record, found, target(tmp_path / "page.html"))
    assert '<th class="n">precision</th>' in (tmp_path / "page.html").read_text()


def test_a_run_that_goes_on_with_other_metrics_keeps_what_was_measured(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, files, ("fid",), max_steps=1)
    assert "metrics" not in lines(tmp_path)[0]
    run(tmp_path, files, ("kid",), max_steps=2)
    first, last = lines(tmp_path)
    assert "frechet" in first and "kid" not in first and "frechet" not in last and last["metrics"] == ["kid"]
    history = EvaluationHistory(tmp_path)
    assert [step for step, _ in history.points] == [1] and [step for step, _ in history.points_of("kid")] == [2]
    record = read_run(tmp_path)
    assert record.measured == ("kid", "fid") and record.best_evaluation is not None and record.best_evaluation.step == 2
    assert [row.metrics for row in record.results] == [("kid",), ("kid",)] and record.teacher_distance is None
    assert "KID" in (tmp_path / "results.txt").read_text() and "FID" not in (tmp_path / "results.txt").read_text()
    assert "The KID of the generator's samples" in facts_of(record).summary
    capsys.readouterr()
    # A finished run is only read, and says what its table lacks.
    assert [row.metrics for row in run(tmp_path, files, ("kid", "pr"), max_steps=2).rows] == [("kid",), ("kid",)]
    said = capsys.readouterr().err
    assert f"its table has no pr: ipfm evaluate {tmp_path / 'generator'} --metrics pr ... measures it" in said


def test_the_best_by_another_metric_is_another_one(tmp_path: Path) -> None:
    numbers: list[dict[str, Any]] = [
        {"frechet": 3.0, "kid": 0.2, "precision": 0.9, "recall": 0.1},
        {"frechet": 2.0, "kid": -0.1, "precision": 0.5, "recall": 0.5},
        {"frechet": 1.0, "kid": 0.1, "precision": 0.0, "recall": 0.0},
        {"frechet": None, "kid": None, "precision": None, "recall": None},
    ]

    def best(*metrics: Metric) -> int:
        folder = tmp_path / "-".join(metrics)
        history = EvaluationHistory(folder, 0)
        history.add(1, 0.5)  # by a version that knew the distance alone
        for step, found in enumerate(numbers, start=2):
            history.add(step, found["frechet"], metrics=list(metrics), **{k: found[k] for k in found if k != "frechet"})
        (folder / "config.json").write_text(json.dumps({"kind": "distill", "config": {}}))
        chosen = read_run(folder, times=False).best_evaluation
        assert chosen is not None
        return chosen.step

    assert (best("fid", "kid"), best("kid", "fid"), best("pr", "fid")) == (1, 3, 3)
    assert merit("pr", {"precision": 0.9, "recall": 0.1}) == pytest.approx(0.18) and merit("is", {}) != 0
    assert merit("pr", {"precision": 0.0, "recall": 0.0}) == 0 and math.isnan(merit("pr", {"precision": 1.0}))
    assert merit("is", {"inception_score": 9.0}) > merit("is", {"inception_score": 8.0})
    rows = [EvaluationRow("a", 1, 1, 2.0, 9, 1.0), EvaluationRow("b", 1, 1, 2.0, 9, 1.0)]
    assert best_of(rows, "fid") == rows[0] and best_of(rows, "kid") is None


def test_the_best_network_is_that_of_the_first_metric_also_of_a_run_that_goes_on_with_another(
    tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    monkeypatch.setattr("ipfm.engine.training.monitor.tqdm.write", lambda text, **_: said.append(text))
    measured = {1: (1.0, 0.3), 2: (2.0, -0.1), 3: (3.0, 0.2), 4: (0.5, 0.4), 5: (4.0, 0.05), 6: (5.0, -0.2)}

    def go_on(metrics: tuple[Metric, ...], steps: int, **settings: Any) -> KeptModel | None:
        release_folder(tmp_path)
        given = {"batch": 2, "max_steps": steps, "eval_every": 1, "checkpoint_every": 1, "zero": 0, "heun_steps": 1}
        config = DistillConfig(**{**given, "precision": "fp32", "snapshot_every": 1, **settings})
        torch.manual_seed(0)
        made = Distiller(config, build_network(NETWORK).eval(), evaluation=evaluation(files, metrics), world=ALONE)
        at: list[int] = []
        monkeypatch.setattr(made, "iteration", lambda step, usual=made.iteration: (at.append(step + 1), usual(step))[1])

        def found() -> FrechetResult:
            frechet, kid = measured[at[-1]]
            asked: dict[str, Any] = {"kid": kid, "kid_std": 0.1} if "kid" in metrics else {}
            return FrechetResult(
                frechet if "fid" in metrics else math.nan, 16, 0.1, 1.0, "FID", metrics=metrics, **asked
            )

        monkeypatch.setattr(made, "evaluate", found)
        made.run(tmp_path)
        release_folder(tmp_path)
        return read_best(tmp_path, "distill")

    def of(best: KeptModel | None) -> tuple[int, str, str]:
        assert best is not None
        return best.step, best.chosen_by, best.number

    assert of(go_on(("kid", "fid"), 2)) == (2, "kid", "KID -0.1000")
    facts = read_config(tmp_path / "generator-best").facts
    assert facts.measured["metrics"] == ["kid", "fid"] and (facts.measured["kid"], facts.measured["distance"]) == (
        -0.1,
        2,
    )
    Info(model=tmp_path / "generator-best").run()
    assert "KID -0.1000, FID 2.000 over 16 images" in capsys.readouterr().out
    # The best by the other metric is among the snapshots.
    assert of(go_on(("fid",), 3)) == (1, "fid", "1.000")
    assert "the best was chosen by kid (step 2, KID -0.1000: " in "\n".join(said)
    assert "is chosen by fid from here on, among the evaluations that have it" in "\n".join(said)
    assert of(go_on(("fid",), 4)) == (4, "fid", "0.5000")
    # Step 4 has no KID; back to it, step 2 is the best of those that have it.
    assert of(go_on(("kid",), 5, keep_snapshots=9)) == (2, "kid", "KID -0.1000")
    assert "distance" in read_config(tmp_path / "generator-best").facts.measured
    assert locate(tmp_path).other == ("best", "its best generator (step 2)")
    best = go_on(("kid",), 6)
    assert of(best) == (6, "kid", "KID -0.2000") and best is not None and math.isnan(best.distance)
    assert json.loads((tmp_path / "generator-best" / "config.json").read_text())["extra"]["measured"]["kid"] == -0.2


def test_rows_of_other_metrics_share_a_table() -> None:
    rows = [
        EvaluationRow("teacher", None, 35, 2.0, 100, 9.0, metric="FID"),
        EvaluationRow("generator", 1, 1, math.nan, 100, 9.0, metric="FID", metrics=("kid",), kid=0.5, kid_std=0.1),
    ]
    header, _, teacher, generator = results_table(rows).splitlines()
    assert header.split() == ["network", "steps", "NFE", "FID", "KID", "images", "images/s"]
    assert teacher.split()[3:5] == ["2.000", "-"] and generator.split()[3:7] == ["-", "0.5000", "±", "0.1000"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"metrics": ("kid",)}, "metrics kid was given without reference: there is nothing to compare with"),
        ({"metrics": ("is",)}, "metrics is needs --inception FILE"),
        ({"metrics": ()}, "metrics must be among fid, kid, is, pr, got none"),
        ({"metrics": ("pr",), "eval_images": 3}, "precision and recall need at least 4 images"),
        (
            {"metrics": ("fid", "kid"), "reference": "stats.npz", "inception": "net.pt"},
            "kid cannot be measured against",
        ),
        ({"metrics": ("is",), "reference": "real.npz", "features": "pixels"}, "the Inception score needs class prob"),
        (
            {"metrics": ("pr",), "reference": "three.npz", "features": "pixels"},
            "at least 4 images, real ones too, got 3",
        ),
        ({"metrics": ("fid", "is"), "inception": "net.pt"}, "inception was given without reference"),
        (
            {"metrics": ("kid",), "reference": "real.npz", "features": "pixels", "eval_images": 10**9},
            "a comparison of 1,000,000,000 images",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_with_the_options(files: Path, given: dict[str, Any], message: str) -> None:
    places = {name: files / given[name] for name in ("reference", "inception") if name in given}
    options = EvaluationOptions(**{**given, **places})

    def opened() -> None:
        options.check_evaluation()
        options.comparison((1, 4, 4), CPU)

    with pytest.raises(ValueError, match=message):
        opened()


def test_the_inception_score_alone_needs_no_reference(files: Path) -> None:
    options = EvaluationOptions(metrics=("is",), inception=files / "net.pt", eval_images=10)
    options.check_evaluation()
    made = options.evaluation(options.comparison((1, 4, 4), CPU), ALONE)
    assert made is not None
    found = made.measure(
        lambda first, count: torch.linspace(-1, 1, 160).view(10, 1, 4, 4)[first : first + count], ALONE
    )
    assert found.inception_score is not None and math.isnan(found.distance) and found.in_words().startswith("Inception")


def test_what_to_know_of_a_runs_distance_is_said_at_its_start(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = EvaluationOptions(reference=files / "real.npz", inception=files / "net.pt", eval_images=10)
    given.comparison((1, 8, 8), CPU)
    said = capsys.readouterr().err
    assert "note: 10 images, no more than the 12 features: their covariance is singular" in said
    assert "real.npz are 1x4x4, those that are measured 1x8x8" in said
