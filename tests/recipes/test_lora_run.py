"""A run whose networks are factors on the teacher's weights: gone on with, described, reported, exported, sampled."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ipfm.engine import generate
from ipfm.engine.commands.main import _main
from ipfm.engine.experiments.step_time import StepTime
from ipfm.engine.runtime.commandline import run_command
from ipfm.engine.training.checkpoint import find_checkpoint
from ipfm.models import load_model
from ipfm.models.low_rank import Lora, low_rank_network
from ipfm.recipes import digits_ipfm

SHORT = [
    "--teacher-steps", "2", "--batch", "8", "--eval-images", "8", "--heun-steps", "1", "--eval-every", "0", "--zero",
    "0", "--backward", "joint", "--activation-checkpointing", "off", "--eps", "1e-3", "--lr", "1e-2",
    "--student", "lora", "--generator", "lora", "--rank", "2", "--lora-alpha", "3",
]  # fmt: skip
WORDS = "student and generator of rank 2 on the teacher's weights, lora-alpha 3"


def ipfm(*arguments: object) -> None:
    run_command("ipfm", _main, [*map(str, arguments)])


@pytest.mark.thorough
def test_a_run_from_its_start_to_an_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ipfm.engine.training.loop.PICTURE_IMAGES", 2)
    monkeypatch.setattr("ipfm.engine.experiments.dry_run.step_time", lambda *_: StepTime(0.001))
    monkeypatch.setattr("ipfm.engine.experiments.dry_run.layout_table", lambda *_, **__: "layouts")
    run = Path("runs/a")
    for steps in ("2", "3"):
        digits_ipfm.main(["--out", str(run), *SHORT, "--max-steps", steps])
    stored = load_file(run / "generator/model.safetensors")

    # An ordinary network, which computes what the averaged factors do on the teacher's weights.
    teacher, net = load_model(run / "teacher/model"), load_model(run / "generator")
    assert set(stored) == set(teacher.state_dict()) and not any("lora" in name for name in stored)
    low = low_rank_network(teacher.config, teacher.requires_grad_(False), Lora(2, 3.0)).eval()
    checkpoint = find_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    factors = load_file(checkpoint / "generator.safetensors")
    kind = next(key for key in ("ema", "ema0") if any(name.startswith(f"{key}/") for name in factors))
    averaged = {name.removeprefix(f"{kind}/"): t for name, t in factors.items() if name.startswith(f"{kind}/")}
    assert len(averaged) == len(list(low.parameters()))
    low.load_state_dict(averaged, strict=False)
    facts = {"D": 128.0, "sigmas": [2.5], "seed": 3}
    images = [generate(one, 2, **facts) for one in (net, low, teacher)]
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-5)
    assert float((images[0] - images[2]).abs().max()) > 1e-3

    capsys.readouterr()
    ipfm("info", run)
    assert WORDS in " ".join(capsys.readouterr().out.split())
    ipfm("report", run)
    capsys.readouterr()
    assert WORDS in html.unescape(re.sub(r"\s+", " ", (run / "report.html").read_text()))
    ipfm("export", run, "hub", "--samples", "0")
    assert all(torch.equal(t, stored[name]) for name, t in load_file("hub/model.safetensors").items())
