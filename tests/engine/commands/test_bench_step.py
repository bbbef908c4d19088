"""The benchmark of a whole step: that plain PyTorch does the same mathematics there, and the table."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import launch
import prepared
import pytest
import torch
from torch import Tensor

from ipfm.engine import DistillConfig, PidConfig
from ipfm.engine.commands.bench import passes, plain_loop
from ipfm.engine.commands.bench import step as bench
from ipfm.engine.commands.bench.memory import bench_network
from ipfm.engine.commands.bench.plain_step import PlainConv2d, PlainDistillation, PlainGroupNorm
from ipfm.engine.commands.main import _main
from ipfm.engine.config import Resolved
from ipfm.engine.distributed.world import World
from ipfm.engine.experiments.step_time import PassesTime, passes_time
from ipfm.engine.objectives import OBJECTIVES
from ipfm.engine.objectives.base import Distillation, Passes
from ipfm.engine.random_streams import Stream
from ipfm.engine.runtime.commandline import run_command
from ipfm.engine.training.resolve import resolve
from ipfm.kernels import reference
from ipfm.models import NetworkConfig, build_network
from ipfm.models.layers import Conv2d, GroupNorm

NETWORK = NetworkConfig(
    img_resolution=8, img_channels=1, model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,),
    embedding_type="fourier", encoder_type="residual", channel_mult_noise=2, resample_filter=(1, 3, 3, 1), dropout=0.0,
    D=16.0,
)  # fmt: skip


class SameNoise(PlainDistillation):
    """Draws what the engine draws, in the order of a step."""

    step, drawn = 0, 0

    def _noisy(self, y: Tensor, sigma: Tensor) -> Tensor:
        streams = (Stream.STUDENT_LATENT, Stream.STUDENT_NOISE, Stream.GENERATOR_LATENT, Stream.GENERATOR_NOISE)
        stream = streams[self.drawn % 4]
        self.drawn += 1
        return reference.perturb(y, sigma, self.config.D, stream=stream, **self._position())

    def _denoising_sigma(self) -> Tensor:
        return self.config.noise.denoising(stream=Stream.STUDENT_SIGMA, **self._position())

    def _generator_sigma(self) -> Tensor:
        return self.config.noise.generator(stream=Stream.GENERATOR_SIGMA, **self._position())

    def _position(self) -> dict:
        return {"seed": self.config.seed, "step": self.step, "sample_index": torch.arange(self.config.batch)}


def test_plain_pytorch_does_the_same_mathematics() -> None:
    """Three iterations against the loop that the engine is compared with, from the same noise."""
    torch.manual_seed(0)
    teacher = build_network(NETWORK)
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.05 * torch.randn_like(p))
    # A large epsilon: with a small one Adam turns rounding into whole steps.
    config = DistillConfig(batch=4, max_steps=3, D=16.0, lr=1e-3, eps=1e-2, ema_kimg=0.05, alpha=1.2)
    expected = plain_loop.distill(teacher, config, 3)
    settings = resolve(config, NETWORK, World(0, 1, torch.device("cpu")))
    plain = SameNoise(settings, teacher, device=torch.device("cpu"))
    for step in range(3):
        plain.step = step
        plain.iteration(step)
    names = [name for name, _ in teacher.named_parameters()]
    pairs = (
        (dict(plain.student.named_parameters()), dict(expected.student.named_parameters())),
        (dict(plain.generator.named_parameters()), dict(expected.generator.named_parameters())),
        (dict(zip(names, plain.average, strict=True)), expected.ema),
    )
    for ours, theirs in pairs:
        for name in names:
            assert (ours[name] - theirs[name]).norm() <= 1e-5 * theirs[name].norm(), name
    moved = dict(expected.generator.named_parameters())
    assert max((moved[n] - p).norm() / p.norm() for n, p in teacher.named_parameters()) > 1e-3


def test_the_tuned_rival_computes_the_same_in_channels_last() -> None:
    torch.manual_seed(0)
    teacher = build_network(NETWORK)
    settings = resolve(DistillConfig(batch=4, D=16.0, lr=1e-3, eps=1e-2), NETWORK, World(0, 1, torch.device("cpu")))
    plain, tuned = (
        SameNoise(settings, teacher, device=torch.device("cpu"), channels_last=fast, fused_adam=fast)
        for fast in (False, True)
    )
    weights = [p for net in (tuned.teacher, tuned.student) for p in net.parameters() if p.dim() == 4]
    assert weights and all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    seen = []
    tuned.student.model.register_forward_hook(lambda _, given, out: seen.append(given[0]))
    for task in (plain, tuned):
        for step in range(2):
            task.step = step
            task.iteration(step)
    assert seen and all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)
    assert all(group["fused"] for adam in (tuned.student_adam, tuned.generator_adam) for group in adam.param_groups)
    for ours, theirs in zip(tuned.generator.parameters(), plain.generator.parameters(), strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_rivals_are_timed_beside_the_plainest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "ROUNDS_QUICK", 1)
    monkeypatch.setattr(bench, "stop_world", lambda: None)
    path = bench.run_step(tmp_path, NETWORK, batch=2, rivals=("tuned", "channels_last"), quick=True)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [r["step"] for r in rows] == ["plain", "plain tuned", "plain channels_last", "joint", "phased"]
    best = min(float(r["ms_50"]) for r in rows[:3])
    for row in rows:
        assert float(row["speed_over_best"]) == pytest.approx(best / float(row["ms_50"]))
        assert float(row["speed"]) == pytest.approx(float(rows[0]["ms_50"]) / float(row["ms_50"]))
    assert "| speed over the best plain |" in path.with_suffix(".md").read_text()
    assert bench.default_rivals(torch.device("cuda")) == ("plain", "tuned")
    assert bench.default_rivals(torch.device("cpu")) == ("plain",)
    assert bench.Variant("joint", "bf16", settings={"zero": 1}).name == "joint, zero 1"


def test_its_layers_are_pytorchs_own() -> None:
    settings = resolve(DistillConfig(batch=2, D=16.0), NETWORK, World(0, 1, torch.device("cpu")))
    plain = PlainDistillation(settings, build_network(NETWORK), device=torch.device("cpu"))
    for net in (plain.teacher, plain.student, plain.generator):
        kinds = {type(module) for module in net.modules()}
        assert {PlainGroupNorm, PlainConv2d} <= kinds and not {GroupNorm, Conv2d} & kinds


def test_the_table_of_the_command(tmp_path: Path) -> None:
    """Every row with its device, plain PyTorch being the measure."""
    out = tmp_path / "b c"
    options = ["--model", "digits", "--batch", "2", "--quick", "--precision", "bf16", "--out", out]
    done = prepared.run(launch.BIN / "ipfm", "bench", "--step", *options, env=launch.environment(), timeout=200)
    assert done.returncode == 0, done.stderr
    network = bench_network("digits")
    with (out / "step.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [f.name for f in dataclasses.fields(bench.StepTime)]
    assert [(r["step"], r["precision"]) for r in rows] == [(form, "bf16") for form in bench.FORMS]
    for row in rows:
        assert row["device"] and row["torch"] == torch.__version__ and row["compiled"] == "False"
        assert 0 < float(row["ms_20"]) <= float(row["ms_50"]) <= float(row["ms_80"])
        assert float(row["images_per_s"]) == pytest.approx(2e3 / float(row["ms_50"]))
        assert float(row["peak_mb"]) > 3 * 4 * sum(p.numel() for p in build_network(network).parameters()) / 2**20
        assert row["step"] != "plain" or float(row["speed"]) == 1
    assert done.stdout.startswith("One iteration of digits, 16 channels, batch 2, on ")
    assert str(out / "step.csv") in done.stdout


def test_the_table_of_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every objective, and both forms where they differ; each kind of pass is counted, and they add up."""

    def measured(form: Resolved[Distillation], *given: Any) -> PassesTime:
        # One of them in earnest: the others take as long.
        return passes_time(form, *given) if isinstance(form.config, PidConfig) else PassesTime(0.01, 0.1, 0.001)

    monkeypatch.setattr(passes, "passes_time", measured)
    table = passes.run_passes(tmp_path / "new", NETWORK, batch=16, quick=True, title="tiny")
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["objective"].partition(",")[0] for row in rows} == set(OBJECTIVES)
    found = {(row["objective"], row["form"]): float(row["passes"]) for row in rows}
    expected = {
        ("ipfm", "joint"): 11, ("ipfm", "phased"): 13, ("ipfm, real images", "joint"): 14, ("dmd", "joint"): 25,
        ("dmd, 1 student update", "joint"): 9, ("cmt", "joint"): 4, ("pid", "joint"): 7, ("pid", "phased"): 9,
    }  # fmt: skip
    assert expected.items() <= found.items() and ("dmd", "phased") not in found
    for row in rows:
        predicted = float(row["passes"]) * float(row["forward_ms"])
        assert float(row["predicted_ms"]) == pytest.approx(predicted) and float(row["optimisers_ms"]) > 0
        assert float(row["measured_by_predicted"]) == pytest.approx(float(row["measured_ms"]) / predicted)
    lines = table.with_suffix(".md").read_text().splitlines()
    assert len(lines) == 4 + len(rows) and lines[0].startswith("A step of tiny, 8 channels, batch 16, on ")
    # Other tests may have registered some, which say how many passes there are and no more.
    for kind, settings in ((k, s) for k, s in OBJECTIVES.items() if s.__module__.startswith("ipfm.")):
        for of in settings().objective(NETWORK).passes(phased=True).values():  # type: ignore[attr-defined]
            assert of.whole == of.forward + of.to_input + 2 * of.to_weights and of.forward, kind
    assert Passes(7, 2).in_words == "as much as 7 forward"


def test_passes_of_a_batch_that_is_no_whole_number_of_trajectories(tmp_path: Path, capsys) -> None:
    options = ["--model", "digits", "--batch", "10", "--out", str(tmp_path / "new")]
    with pytest.raises(SystemExit) as stop:
        run_command("ipfm", _main, ["bench", "--passes", *options])
    assert stop.value.code == 2 and not (tmp_path / "new").exists()
    assert "batch must be a multiple of points, whole trajectories, got batch 10" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--memory"], "memory and step exclude each other: give one of them"),
        (["--D", "0"], "D must lie in (0, inf], got 0.0"),
        (["--batch", "0"], "batch must be an integer >= 1, got 0"),
        (["--model", "digits", "--batch", "10" + "0" * 12], "a batch of 10,000,000,000,000 images needs at least "),
        (["--model", "unet"], "network preset 'unet' is unknown"),
        (["--precision", "fp8"], "--precision must be one of bf16, fp16, fp32, got 'fp8'"),
    ],
)
def test_refusals(options: list[str], message: str, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        run_command("ipfm", _main, ["bench", "--step", *options, "--out", str(tmp_path / "new")])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err and not (tmp_path / "new").exists()
