"""The end of a distillation: its table and its curve, and what may go wrong with them after the training."""

from __future__ import annotations

import io
import json
import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ipfm.engine.data import comparison
from ipfm.engine.data.comparison import Panel
from ipfm.engine.data.dataset import ImageDataset
from ipfm.engine.distributed.world import World
from ipfm.engine.evaluation.evaluation import Evaluation
from ipfm.engine.evaluation.metrics import PixelFeatures, Statistics
from ipfm.engine.objectives.ipfm import DistillConfig
from ipfm.engine.runtime.errors import Interrupted, TrainingFailed
from ipfm.engine.sampling.batches import sample_teacher
from ipfm.engine.training import distiller, loop
from ipfm.engine.training import run as training_run
from ipfm.engine.training.distiller import Distiller
from ipfm.engine.training.pace import read_pace
from ipfm.models import NetworkConfig, build_network

ALONE = World(0, 1, torch.device("cpu"))
NETWORK = NetworkConfig(
    img_resolution=4, img_channels=1, model_channels=4, channel_mult=(1,), num_blocks=1, attn_resolutions=(), D=64.0
)


class Features(PixelFeatures):
    """Pixels; `fault` is what happens to them."""

    def __init__(self, fault: str = "") -> None:
        super().__init__((1, 4, 4))
        self.fault = fault

    def __call__(self, images: Tensor) -> Tensor:
        found = super().__call__(images)
        if self.fault == "error":
            raise RuntimeError("no cuDNN")
        if self.fault == "signal":
            signal.raise_signal(signal.SIGTERM)
        bad = {"some": torch.arange(len(found)) % 2 == 0, "all": torch.ones(len(found), dtype=torch.bool)}
        return torch.where(bad[self.fault][:, None], math.nan, found) if self.fault in bad else found


def run(path: Path, fault: str = "", data: ImageDataset | None = None, **settings: Any) -> Distiller:
    given = {"batch": 4, "max_steps": 1, "heun_steps": 1, "zero": 0, "precision": "fp32", **settings}
    config = DistillConfig(**given)
    evaluation = Evaluation(Features(fault), Statistics(torch.zeros(16), torch.eye(16)), images=16, batch=8, data=data)
    torch.manual_seed(0)
    made = Distiller(config, build_network(NETWORK).eval(), evaluation=evaluation, world=ALONE)
    made.run(path)
    return made


def test_a_table_that_cannot_be_measured_is_a_warning_and_measured_by_the_same_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tmp_path, "error").rows == []
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert shown == [
        "warning: the evaluation after step 1 failed: RuntimeError: no cuDNN",
        "warning: no table of results: RuntimeError: no cuDNN; the same command measures again",
    ]
    assert (tmp_path / "generator" / "config.json").exists() and not (tmp_path / "results.json").exists()
    with pytest.raises(Interrupted) as stopped:
        run(tmp_path, "signal")
    assert stopped.value.signum == signal.SIGTERM

    def no_plot(*_: object) -> None:
        raise ValueError("Key backend: no such thing")

    monkeypatch.setattr(distiller, "plot_convergence", no_plot)
    assert [row.label for row in run(tmp_path).rows] == ["teacher", "generator"]
    picture = tmp_path / "convergence.png"
    assert f"warning: no {picture}: Key backend: no such thing" in capsys.readouterr().err
    assert (tmp_path / "results.json").exists() and not picture.exists()


def test_teacher_and_generator_of_the_same_latents_and_data_are_left_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[list[Panel]] = []

    def kept(panels: list[Panel], *rest: Any) -> Any:
        drawn.append(panels)
        return comparison.save_comparison(panels, *rest)

    def no_font(*_: Any) -> None:
        raise RuntimeError("no font")

    def no_file(*_: Any) -> None:
        raise ValueError("a.png is damaged")

    monkeypatch.setattr(training_run, "save_comparison", kept)
    made = run(tmp_path)
    picture = tmp_path / "comparison.png"
    before = picture.read_bytes()
    (panels,) = drawn
    assert [panel.title for panel in panels] == ["teacher, 1 NFE", "generator, 1 NFE"]
    made.refresh()
    # The place of a latent, as in samples/.
    torch.testing.assert_close(panels[1].images, made.sample(0, 16, seed=loop.PICTURE_SEED))
    expected = sample_teacher(made.teacher, 0, 16, D=64.0, steps=1, seed=loop.PICTURE_SEED)
    torch.testing.assert_close(panels[0].images, expected)
    # Once for a run; anew where the run goes on.
    run(tmp_path)
    assert len(drawn) == 1 and picture.read_bytes() == before
    data = ImageDataset(torch.zeros(20, 1, 4, 4), name="black")
    run(tmp_path, data=data, max_steps=2)
    assert [panel.title for panel in drawn[1]][2:] == ["data"] and (drawn[1][2].images == 0).all()
    assert picture.read_bytes() != before
    # What fails is a warning, and drawn by the same command.
    picture.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(comparison, "side_by_side", no_font)
        run(tmp_path, max_steps=2)
    assert f"warning: no {picture}: RuntimeError: no font" in capsys.readouterr().err and not picture.exists()
    with monkeypatch.context() as patch:
        patch.setattr(ImageDataset, "take", no_file)
        run(tmp_path, data=data, max_steps=2)
    assert f"warning: {picture} is without data: a.png is damaged" in capsys.readouterr().err and picture.exists()


def test_tensorboard_has_the_settings_the_teachers_distance_and_the_end(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    run(tmp_path / "runs" / "digits-K1")
    read = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "runs")).Reload()
    assert list(read.Runs()) == ["digits-K1"]
    board = read.GetAccumulator("digits-K1")
    tags = set(board.Tags()["scalars"])
    assert tags == {
        "frechet", "teacher_frechet", "generator_loss", "student_loss", "generator_bad", "student_bad",
        "generator_lr", "student_lr", "generator_ema_decay", "images_per_second",
    }  # fmt: skip
    for tag in tags | {"samples", "comparison"}:
        # The usual reader drops what is said of a tag of no class.
        assert board.SummaryMetadata(tag).summary_description and board.SummaryMetadata(tag).data_class, tag
    assert "oscillates about zero" in board.SummaryMetadata("generator_loss").summary_description
    rows = json.loads((tmp_path / "runs" / "digits-K1" / "results.json").read_text())
    for tag, row in zip(("teacher_frechet", "frechet"), rows, strict=True):
        assert [(e.step, e.value) for e in board.Scalars(tag)] == [(1, pytest.approx(row["frechet"]))]
    assert board.Scalars("generator_lr")[0].value == pytest.approx(1e-5)
    # The pictures are those of the folder.
    for tag, name in (("comparison", "comparison.png"), ("samples", "samples/step-0000001.png")):
        (event,) = board.Images(tag)
        shown = Image.open(io.BytesIO(event.encoded_image_string))
        with Image.open(tmp_path / "runs" / "digits-K1" / name) as stored:
            assert event.step == 1 and np.array_equal(np.asarray(shown), np.asarray(stored))
    said = {t: HParamsPluginData.FromString(c) for t, c in board.PluginTagToContent("hparams").items()}
    start = said["_hparams_/session_start_info"].session_start_info.hparams
    assert (start["alpha"].number_value, start["lr"].number_value) == (1.0, 1e-5)
    # What may change from one part of a run to the next would not be true of all of it.
    assert "max_steps" not in start and "out" not in start and "noise.p_mean" in start
    metrics = [m.name.tag for m in said["_hparams_/experiment"].experiment.metric_infos]
    assert metrics[0] == "frechet" and "generator_loss" in metrics
    assert said["_hparams_/session_end_info"].session_end_info.status


def test_a_run_that_began_with_a_folder_for_tensorboard_goes_on_there(tmp_path: Path) -> None:
    run(tmp_path)
    former = tmp_path / "tensorboard"
    former.mkdir()
    for path in tmp_path.glob("events.out.tfevents.*"):
        path.rename(former / path.name)
    before = {path.name for path in former.iterdir()}
    run(tmp_path, max_steps=2)
    assert not list(tmp_path.glob("events.out.tfevents.*")) and before < {path.name for path in former.iterdir()}
    assert read_pace(tmp_path).parts


def test_a_network_that_cannot_be_stored_is_one_line_and_stored_by_the_same_command(tmp_path: Path) -> None:
    run(tmp_path / "other")
    (tmp_path / "other" / "generator").rename(tmp_path / "moved")
    (tmp_path / "other" / ".generator.partial").write_text("a file in the way of the folder")
    message = (
        r"^the network cannot be stored in .*generator \(File exists\); the state is saved: the same command stores"
    )
    with pytest.raises(TrainingFailed, match=message):
        run(tmp_path / "other")
    (tmp_path / "other" / ".generator.partial").unlink()
    assert [row.label for row in run(tmp_path / "other").rows] == ["teacher", "generator"]


@pytest.mark.parametrize(("fault", "finite"), [("some", 8), ("all", 0)])
def test_samples_that_are_not_finite_are_counted_and_the_run_ends_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str, finite: int
) -> None:
    rows = run(tmp_path, fault).rows
    assert [(row.images, row.left_out, math.isfinite(row.frechet)) for row in rows] == [
        (finite, 16 - finite, finite > 0)
    ] * 2
    (line,) = (tmp_path / "evaluations.jsonl").read_text().splitlines()
    assert json.loads(line)["left_out"] == 16 - finite and json.loads(line)["images"] == finite
    assert f"over {finite} of 16 images: {16 - finite} were not finite" in capsys.readouterr().err
    table = (tmp_path / "results.txt").read_text()
    assert f"generator: {16 - finite} of 16 images were not finite and are left out\n" in table
    assert (tmp_path / "convergence.png").exists() == (finite > 0)
    # The settings that it was made with stay, and nothing is measured anew.
    before = (tmp_path / "config.json").read_bytes()
    assert run(tmp_path, "error", eval_every=1).rows == [*rows] or math.isnan(rows[0].frechet)
    assert (tmp_path / "config.json").read_bytes() == before
