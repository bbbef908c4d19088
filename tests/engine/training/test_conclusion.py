"""The end of a distillation: its table and its curve, and what may go wrong with them after the training."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ipfm.engine.distributed.world import World
from ipfm.engine.evaluation.evaluation import Evaluation
from ipfm.engine.evaluation.metrics import PixelFeatures, Statistics
from ipfm.engine.objectives.ipfm import DistillConfig
from ipfm.engine.runtime.errors import Interrupted, TrainingFailed
from ipfm.engine.training import distiller
from ipfm.engine.training.distiller import Distiller
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


def run(path: Path, fault: str = "", **settings: object) -> Distiller:
    config = DistillConfig(batch=4, max_steps=1, heun_steps=1, zero=0, precision="fp32", **settings)
    evaluation = Evaluation(Features(fault), Statistics(torch.zeros(16), torch.eye(16)), images=16, batch=8)
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
