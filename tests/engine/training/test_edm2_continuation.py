"""Trainings of EDM2, and distillations of SiDA, that began elsewhere and go on here from their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import official_edm2 as e2
import official_files as of
import torch

from ipfm.engine import DistillConfig, Distiller, TeacherConfig, TeacherTraining
from ipfm.engine.data.dataset import digits
from ipfm.engine.distributed.world import World
from ipfm.engine.experiments.options import options_for
from ipfm.engine.experiments.starts import read_start, read_teacher_state
from ipfm.engine.training.resolve import complete
from ipfm.models import load_teacher

CPU = torch.device("cpu")
ARCH = e2.Edm2(img_channels=1, label_dim=10)


def snapshot(folder: Path, net: of.Official) -> Path:
    return of.write_pickle(folder / "network-snapshot-0000002-0.100.pkl", e2.snapshot(net, latent=False))


def test_a_teachers_training_goes_on(tmp_path: Path) -> None:
    """From the masters, moments, steps, average and images of the file."""
    net = e2.network(ARCH, dtype=torch.float32)
    snapshot(tmp_path, net)
    root = e2.training_state(net, images=2048)
    state = read_teacher_state(of.write_torch(tmp_path / "training-state-0000002.pt", root))
    config = TeacherConfig(batch=8, max_steps=300, lr=1e-3, precision="fp32", ema=(0.05, 0.10))
    training = TeacherTraining(config, state.config, digits(), start=state, world=World(0, 1, CPU))
    assert (training.first_step, training.net.steps_applied) == (256, 3)
    # By half-life from the widest; of the others each from that of its width.
    averages = dict(zip(training.net.averages, training.net.average_kinds, strict=True))
    moments = {"exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
    expected_averages = {averages["ema0.05"]: state.averages[0.05], averages["ema0.1"]: state.averages[0.1]}
    first = {training.net.average_kinds[0]: state.averages[0.1]} if len(averages) == 3 else {}
    assert state.averages[0.05]["unet.out_gain"] != state.averages[0.1]["unet.out_gain"]
    for kind, expected in {**moments, **first, **expected_averages}.items():
        for name, tensor in training.net.full(kind):
            assert torch.equal(tensor, expected[name]), (kind, name)
    masters = e2.tensors(net)
    for name, tensor in training.net.full("weight"):
        assert torch.allclose(tensor, masters[name], rtol=1e-6, atol=1e-6), name
    sums = training.iteration(256).sums
    assert all(torch.isfinite(value) for value in sums.values())


def test_a_distillation_of_sida_goes_on(tmp_path: Path) -> None:
    """Its generator has no log-variance, which nobody asks a generator for; the student has one, or begins with one."""
    place = snapshot(tmp_path, e2.network(ARCH))
    teacher = load_teacher(place)
    base: dict[str, Any] = {
        "batch": 8,
        "max_steps": 1000,
        "zero": 0,
        "D": teacher.D,
        "eps": 1e-6,
        "precision": "fp32",
        "logvar": True,
    }
    config = DistillConfig(**base)
    for logvar in (True, False):
        path = of.write_torch(tmp_path / "training-state-000004.pt", e2.sida_state(ARCH, logvar=logvar))
        options = options_for(DistillConfig)(**base, continue_from=path)
        start = read_start(options, complete(config, teacher.config, CPU), teacher)
        assert start is not None and start.images_seen == 4000
        distiller = Distiller(config, teacher, start=start, world=World(0, 1, CPU))
        made = e2.tensors(e2.network(ARCH, kind="EDM_2_Precond_Generator", dtype=torch.float16, seed=2))
        for name, tensor in distiller.generator.full("weight"):
            if name in made:
                assert torch.allclose(tensor, made[name], rtol=1e-6, atol=1e-6), name
        moments = dict(distiller.networks["student"].full("exp_avg_sq"))
        assert float(moments["unet.out_conv.weight"].max()) > 0
        assert bool(moments["logvar_linear.weight"].max() > 0) == logvar
        assert distiller.first_step == 500 and distiller.generator.steps_applied == 3
        assert all(torch.isfinite(value) for value in distiller.iteration(500).sums.values())
