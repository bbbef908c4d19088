"""The engine against a plain PyTorch loop: every ZeRO stage, one and two processes, joint and phased, accumulated."""

from __future__ import annotations

from pathlib import Path

import launch
import plain_loop
import pytest
import torch
from safetensors.torch import load_file

from ipfm.engine import DistillConfig
from ipfm.models import EDMPrecond, NetworkConfig, load_teacher, save_model

STEPS = 4
# A large epsilon: with a small one Adam turns the rounding noise of near-zero gradients into whole steps.
BASE = {"batch": 8, "max_steps": STEPS, "lr": 1e-3, "eps": 1e-3, "ema_kimg": 0.05, "alpha": 1.0, "seed": 3}

SETTINGS = {
    "k1": {},
    "k2": {"steps": 2},
    "options": {"student_updates": 2, "student_lr": 5e-4, "generator_beta1": 0.9, "student_beta1": 0.5, "alpha": 1.2},
}


def _cases(ranks: int) -> dict[str, dict]:
    cases = {}
    for stage in (0, 1, 2):
        for backward in ("joint", "phased"):
            for accumulation in (1, 2):
                micro = BASE["batch"] // ranks // accumulation
                cases[f"k1-z{stage}-{backward}-a{accumulation}"] = {
                    **BASE, "zero": stage, "backward": backward, "micro_batch": micro,
                }  # fmt: skip
    for setting in ("k2", "options"):
        for stage, backward in ((0, "phased"), (2, "joint")):
            cases[f"{setting}-z{stage}-{backward}-a1"] = {
                **BASE, **SETTINGS[setting], "zero": stage, "backward": backward,
            }  # fmt: skip
    return cases


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small NCSN++ with attention, a Fourier buffer and weights that matter everywhere; D = 16."""
    torch.manual_seed(0)
    net = EDMPrecond(
        NetworkConfig(
            img_resolution=8, img_channels=1, model_channels=8, channel_mult=(1, 2), num_blocks=1,
            attn_resolutions=(4,), embedding_type="fourier", encoder_type="residual", channel_mult_noise=2,
            resample_filter=(1, 3, 3, 1), dropout=0.0, D=16.0,
        )
    )  # fmt: skip
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    folder = tmp_path_factory.mktemp("teacher") / "model"
    save_model(net, folder)
    return folder


@pytest.fixture(scope="module")
def plain(teacher: Path) -> dict[str, plain_loop.Plain]:
    net = load_teacher(teacher)
    return {
        name: plain_loop.distill(net, DistillConfig(**{**BASE, **setting}), STEPS) for name, setting in SETTINGS.items()
    }


@pytest.fixture(scope="module", params=[1, 2], ids=["1-process", "2-processes"])
def results(request: pytest.FixtureRequest, teacher: Path, tmp_path_factory: pytest.TempPathFactory):
    ranks, out = request.param, tmp_path_factory.mktemp("out")
    cases = [{"name": name, "steps": STEPS, "config": config} for name, config in _cases(ranks).items()]
    launch.run_workers("distill_steps.py", ranks, {"teacher": str(teacher), "out": str(out), "cases": cases})
    return {name: load_file(out / f"{name}-{ranks}.safetensors") for name in _cases(ranks)}


@pytest.mark.distributed
@pytest.mark.parametrize("name", list(_cases(1)))
def test_equals_the_plain_loop(results, plain, name: str) -> None:
    expected, found = plain[name.split("-")[0]], results[name]
    networks = {"student": expected.student, "generator": expected.generator}
    for which, net in networks.items():
        _close(dict(net.named_parameters()), found, f"{which}/weight/")
    _close(expected.ema, found, "generator/ema/")
    for which in networks:
        torch.testing.assert_close(
            found[f"loss/{which}_loss"], torch.tensor(getattr(expected, f"{which}_loss")).double(), rtol=1e-4, atol=1e-4
        )
    assert not any(key.startswith("student/ema/") for key in found)


@pytest.mark.distributed
def test_joint_and_phased_agree(results) -> None:
    for stage in (0, 1, 2):
        joint, phased = results[f"k1-z{stage}-joint-a1"], results[f"k1-z{stage}-phased-a1"]
        for key in joint:
            torch.testing.assert_close(phased[key], joint[key], rtol=1e-5, atol=2e-7)


def _close(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], prefix: str) -> None:
    """Relative to the network's largest change: 1e-5."""
    for name, tensor in expected.items():
        difference = (found[prefix + name] - tensor.detach()).norm()
        assert difference <= 1e-5 * tensor.norm() + 1e-7, f"{prefix}{name}: {difference:.2e} of {tensor.norm():.2e}"
