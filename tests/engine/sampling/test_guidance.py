"""Guided sampling: against a problem with a closed solution, by command, and what cannot guide what."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import official_files as of
import pytest
import torch
from torch import Tensor

from ipfm.engine.commands.main import _main
from ipfm.engine.random_streams import Stream, draw_labels
from ipfm.engine.runtime.commandline import run_command
from ipfm.engine.sampling.samplers import Churn, heun_sample
from ipfm.models import EDMPrecond, NetworkConfig, load_model, save_model

SMALL = NetworkConfig(
    img_resolution=8, img_channels=1, label_dim=3, model_channels=8, channel_mult=(1,), num_blocks=1,
    attn_resolutions=(), D=128.0,
)  # fmt: skip


class Gaussian:
    """The exact denoiser of data ~ N(0, spread^2), elementwise; notes the labels that it is given."""

    img_channels, img_resolution = 1, 2

    def __init__(self, spread: float, label_dim: int = 0) -> None:
        self.spread, self.label_dim = spread, label_dim
        self.labels: list[Tensor | None] = []

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        self.labels.append(class_labels)
        gain = self.spread**2 / (self.spread**2 + sigma**2)
        return x * gain[:, None, None, None].to(x.dtype)


class Never:
    """A denoiser that must not be asked."""

    img_channels, img_resolution = 1, 2

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        raise AssertionError


def flow(spread: float, high: float, low: float) -> float:
    """x(low) / x(high) along the ODE of data ~ N(0, spread^2)."""
    return math.sqrt((spread**2 + low**2) / (spread**2 + high**2))


@pytest.mark.quick
@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.4, 3.0])
def test_guided_flow_has_its_closed_solution(guidance: float) -> None:
    """The logarithm of the flow is linear in the denoiser: the guided one is the product of powers of both."""
    latents = 80 * torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    net, weak = Gaussian(0.5), Gaussian(0.8)
    low = 1e-4
    images = heun_sample(
        net, 3, D=math.inf, steps=800, seed=0, latents=latents, sigma_min=low, guide=weak, guidance=guidance
    )
    expected = flow(0.5, 80, low) ** guidance * flow(0.8, 80, low) ** (1 - guidance)
    torch.testing.assert_close(images.double(), latents * expected, rtol=2e-4, atol=0)


@pytest.mark.quick
def test_each_evaluation_asks_both_and_a_factor_of_1_the_network_alone() -> None:
    net, weak = Gaussian(0.5), Gaussian(0.8)
    churn = Churn(amount=2.0)
    heun_sample(net, 2, D=math.inf, steps=4, seed=0, churn=churn, guide=weak, guidance=2.0)
    assert len(net.labels) == len(weak.labels) == 7
    alone = heun_sample(net, 2, D=128.0, steps=4, seed=0)
    assert torch.equal(heun_sample(net, 2, D=128.0, steps=4, seed=0, guide=Never(), guidance=1), alone)


@pytest.mark.quick
@pytest.mark.parametrize(("classes", "told"), [(3, True), (0, False)])
def test_a_guide_is_told_the_classes_that_it_knows(classes: int, told: bool) -> None:
    net, weak = Gaussian(0.5, 3), Gaussian(0.8, classes)
    labels = torch.eye(3)
    heun_sample(net, 3, D=math.inf, steps=2, seed=0, class_labels=labels, guide=weak, guidance=1.5)
    assert all(given is labels for given in net.labels)
    assert all((given is labels) if told else (given is None) for given in weak.labels)


@pytest.mark.quick
def test_what_cannot_guide_is_refused() -> None:
    def said(guide: object, guidance: object, net: object = None) -> str:
        with pytest.raises(ValueError) as error:
            heun_sample(net or EDMPrecond(SMALL), 1, steps=2, seed=0, guide=guide, guidance=guidance)  # type: ignore[arg-type]
        return str(error.value)

    fits = EDMPrecond(SMALL)
    assert said(fits, None) == "a guide was given without guidance: give its factor, such as 1.4"
    assert said(None, 1.4) == "guidance 1.4 was given without a guide: give the network that guides, too"
    for factor in (-0.1, math.inf, math.nan, True, "2"):
        assert said(fits, factor) == f"guidance must be a finite number >= 0 (1 is without), got {factor!r}"
    assert said("runs/weak", 1.4).startswith("the samplers take a network, got the path 'runs/weak'")
    assert said(EDMPrecond(replace(SMALL, img_channels=3)), 2.0) == (
        "the guide must make images like the network's, with 1 channels, got 3"
    )
    assert said(EDMPrecond(replace(SMALL, D=math.inf)), 2.0) == "the guide must have the network's D, 128, got inf"
    assert (
        said(EDMPrecond(replace(SMALL, label_dim=2)), 2.0)
        == "the guide must know the network's 3 classes or none, got 2"
    )


# -- by command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for seed, (name, extra, config) in enumerate(
        [
            ("teacher", {"task": "teacher"}, SMALL),
            ("weak", {"task": "teacher"}, replace(SMALL, label_dim=0)),
            ("generator", {"task": "generator", "sigmas": [2.5]}, SMALL),
            ("wide", {"task": "teacher"}, replace(SMALL, img_resolution=16)),
        ]
    ):
        save_model(of.randomize(EDMPrecond(config), seed), root / name, extra=extra)
    return root


def ipfm(*arguments: object) -> int:
    try:
        run_command("ipfm", _main, [*map(str, arguments)])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_samples_are_guided_by_command(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--guide", models / "weak", "--guidance", "1.4", "--heun-steps", 3, "--n", 3)
    assert ipfm("sample", models / "teacher", *options, "--out", tmp_path / "x.npz", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["nfe"], facts["guidance"], Path(facts["guide"]).name) == (10, 1.4, "weak")
    labels = draw_labels(3, torch.arange(3), seed=0, stream=Stream.SAMPLER_LABEL, step=0)
    expected = heun_sample(
        load_model(models / "teacher"), 3, steps=3, seed=0, class_labels=labels, guide=load_model(models / "weak"),
        guidance=1.4,
    )  # fmt: skip
    images = (expected.clamp(-1, 1) * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    found = np.load(tmp_path / "x.npz")["images"].astype(int)
    assert np.abs(found - images.numpy().astype(int)).max() <= 1
    # A factor of 1 draws what the teacher alone draws, in as many evaluations.
    for more in ((*options[:3], 1, *options[4:]), options[4:]):
        assert ipfm("sample", models / "teacher", *more, "--out", tmp_path / "one.npz", "--json") == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["nfe"] == 5
        alone = np.load(tmp_path / "one.npz")["images"]
        assert not np.array_equal(alone, found)


def test_guided_images_are_not_mixed_with_others(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = (models / "teacher", "--heun-steps", 2, "--n", 2, "--out", tmp_path / "folder")
    assert ipfm("sample", *common) == 0
    assert ipfm("sample", *common, "--guide", models / "weak", "--guidance", 2) == 2
    assert "of this model with other" in (said := capsys.readouterr().err) and "guidance" in said


def test_a_guided_teacher_is_measured(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "real.npz", arr_0=np.random.default_rng(0).integers(0, 256, (9, 8, 8, 1), np.uint8))
    common = ("--reference", tmp_path / "real.npz", "--features", "pixels", "--images", 9, "--heun-steps", 2, "--json")
    found = []
    for more in ((), ("--guide", models / "weak", "--guidance", 3)):
        assert ipfm("evaluate", models / "teacher", *common, *more) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert [one["nfe"] for one in found] == [3, 6] and found[0]["frechet"] != found[1]["frechet"]
    assert found[1]["guidance"] == 3.0


@pytest.mark.parametrize("command", ["sample", "evaluate"])
@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("teacher", "--guide weak", "without guidance: give its factor too, such as --guidance 1.4"),
        ("teacher", "--guidance 1.4", "was given without a guide: give the network that guides as --guide"),
        ("teacher", "--guide weak --guidance -1", "guidance must be a finite number >= 0 (1 is without), got -1.0"),
        ("teacher", "--guide wide --guidance 2", "images like the network's, with 8 pixels a side, got 16"),
        ("teacher", "--guide generator --guidance 2", "is a generator, which knows its own few noise levels alone"),
        ("teacher", "--guide nowhere --guidance 2", "nowhere"),
        ("generator", "--guide weak --guidance 2", "is a generator, which has noise levels of its own"),
    ],
    ids=["no-factor", "no-guide", "negative", "other-images", "a-generator", "nowhere", "of-a-generator"],
)
def test_a_wrong_guide_is_one_line(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, model: str, options: str, said: str
) -> None:
    given = [word if word.startswith("--") or not word.isalpha() else str(models / word) for word in options.split()]
    np.savez(tmp_path / "real.npz", arr_0=np.zeros((4, 8, 8, 1), np.uint8))
    where = ["--out", tmp_path / "x.png"]
    if command == "evaluate":
        where = ["--reference", tmp_path / "real.npz", "--features", "pixels", "--images", 2]
    assert ipfm(command, models / model, *given, *where) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and not (tmp_path / "x.png").exists()
