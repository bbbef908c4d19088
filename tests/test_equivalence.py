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
    "augmented": {"augment": 0.5},
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
    for setting in ("k2", "options", "augmented"):
        for stage, backward in ((0, "phased"), (2, "joint")):
            cases[f"{setting}-z{stage}-{backward}-a1"] = {
                **BASE, **SETTINGS[setting], "zero": stage, "backward": backward,
            }  # fmt: skip
    for stage in (1, 2):
        cases[f"bf16-z{stage}"] = {**BASE, "zero": stage, "precision": "bf16"}
    return cases


NAMES = [name for name in _cases(1) if not name.startswith("bf16")]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small conditional NCSN++ with attention, a Fourier buffer and weights that matter everywhere; D = 16."""
    torch.manual_seed(0)
    net = EDMPrecond(
        NetworkConfig(
            img_resolution=8, img_channels=1, model_channels=8, channel_mult=(1, 2), num_blocks=1,
            attn_resolutions=(4,), embedding_type="fourier", encoder_type="residual", channel_mult_noise=2,
            resample_filter=(1, 3, 3, 1), dropout=0.0, label_dim=3, augment_dim=9, D=16.0,
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
    cases += [{**case, "name": f"{case['name']}-start", "steps": 0} for case in cases if "bf16" in case["name"]]
    launch.run_workers("distill_steps.py", ranks, {"teacher": str(teacher), "out": str(out), "cases": cases})
    return {case["name"]: load_file(out / f"{case['name']}-{ranks}.safetensors") for case in cases}


@pytest.mark.distributed
@pytest.mark.parametrize("name", NAMES)
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


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [1, 2])
def test_bf16_keeps_exact_masters_and_follows_fp32(results, plain, teacher: Path, stage: int) -> None:
    """Masters start from the fp32 weights, not from rounded ones; four steps stay near those in fp32."""
    start = dict(load_teacher(teacher).named_parameters())
    for name, p in start.items():
        for key in (f"student/weight/{name}", f"generator/weight/{name}", f"generator/ema/{name}"):
            assert torch.equal(results[f"bf16-z{stage}-start"][key], p), key
    found, expected = results[f"bf16-z{stage}"], plain["k1"]
    for which, net in (("student", expected.student), ("generator", expected.generator)):
        moved = sum((p - start[n]).square().sum() for n, p in net.named_parameters()).sqrt()
        apart = sum((found[f"{which}/weight/{n}"] - p).square().sum() for n, p in net.named_parameters()).sqrt()
        assert 0 < apart < 0.2 * moved, f"{which}: {apart:.2e} apart after moving {moved:.2e}"
        torch.testing.assert_close(
            found[f"loss/{which}_loss"], torch.tensor(getattr(expected, f"{which}_loss")).double(), rtol=0.05, atol=0.2
        )


def _close(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], prefix: str) -> None:
    """Relative to the network's largest change: 1e-5."""
    for name, tensor in expected.items():
        difference = (found[prefix + name] - tensor.detach()).norm()
        assert difference <= 1e-5 * tensor.norm() + 1e-7, f"{prefix}{name}: {difference:.2e} of {tensor.norm():.2e}"
