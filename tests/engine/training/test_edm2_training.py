"""EDM2's architecture in training: a teacher on data, its distillation, and what is stored of both."""

import math
from dataclasses import replace
from typing import Any

import edm2_fixtures
import pytest
import torch

from ipfm.engine import DistillConfig, Distiller, TeacherConfig
from ipfm.engine.data.dataset import digits
from ipfm.engine.distributed.world import World
from ipfm.engine.runtime.commandline import BadInput, parse_given
from ipfm.engine.sampling.batches import sample_generator
from ipfm.engine.training.teacher import TeacherTraining
from ipfm.engine.training.transfer import transfer_from
from ipfm.models import build_network, load_model
from ipfm.models.forced_weight_norm import masters, under_the_rule
from ipfm.recipes import cifar_teacher, train_teacher

SMALL = replace(edm2_fixtures.SMALL, label_dim=10)
ALONE = World(0, 1, torch.device("cpu"))
PLACE: dict[str, Any] = {"zero": 0, "precision": "fp32", "heun_steps": 2}


def rows(net: torch.nn.Module) -> torch.Tensor:
    """The root mean square of every row of masters."""
    return torch.cat([master.flatten(1).square().mean(1).sqrt() for master in masters(net).values()])


@pytest.mark.parametrize("D", [math.inf, 128.0])
def test_a_teacher_is_trained_stored_and_distilled(tmp_path, D):
    network = replace(SMALL, D=D)
    settings = TeacherConfig(
        batch=8, max_steps=6, lr=0.02, lr_rampup_kimg=0, lr_decay_batches=3, beta2=0.99, checkpoint_every=3, **PLACE
    )
    training = TeacherTraining(settings, network, digits(), world=ALONE)
    before = {name: p.detach().clone() for name, p in training.net.module.named_parameters()}
    teacher = training.run(tmp_path / "teacher")
    assert training.net.optimizer.param_groups[0]["betas"] == (0.9, 0.99)
    assert training.net.rates["lr"] == pytest.approx(0.02 / math.sqrt(5 / 3))
    # Each has moved, the log-variance's too; gains and masters are those of the average in what is stored.
    assert all(not torch.equal(p, before[name]) for name, p in training.net.module.named_parameters())
    stored = load_model(tmp_path / "teacher" / "model")
    x, sigma, labels = torch.randn(3, 1, 8, 8), torch.tensor([0.2, 1.0, 9.0]), torch.eye(10)[:3]
    with torch.no_grad():
        assert torch.allclose(stored(x, sigma, labels), teacher(x, sigma, labels), atol=1e-5)
        assert torch.allclose(stored.logvar(sigma), teacher.logvar(sigma), atol=1e-6)
    assert (rows(stored) < 1.1).all() and (rows(stored) > 0.5).all()
    assert stored.config == replace(network, dropout=0.0)

    losses = {}
    for backward in ("joint", "phased") if D == 128 else ("phased",):
        config = DistillConfig(
            batch=4, micro_batch=2, max_steps=2, steps=2, logvar=True, lr=1e-3, backward=backward, **PLACE
        )
        distiller = Distiller(config, load_model(tmp_path / "teacher" / "model"), world=ALONE)
        losses[backward] = [distiller.iteration(step).sums["generator_loss"] for step in range(2)]
        assert under_the_rule(distiller.networks["student"].module, logvar=True)[-1] == "logvar_linear.weight"
    for both in losses.values():
        assert torch.allclose(torch.stack(both), torch.stack(losses["phased"]), rtol=1e-3, atol=1e-4)
    distiller.run(tmp_path / "distilled")
    generator = load_model(tmp_path / "distilled" / "generator")
    assert generator.config.logvar_channels == 0 and generator.D == D
    images = sample_generator(generator, 0, 2, D=D, sigmas=generator.facts.sigmas, seed=0)
    assert images.shape == (2, 1, 8, 8) and images.isfinite().all()


def test_a_network_of_other_classes_takes_masters_and_both_buffers_over():
    source = build_network(SMALL)
    with torch.no_grad():
        source.unet.out_gain.fill_(0.7)
    taken = transfer_from("source", source, replace(SMALL, label_dim=3))
    net = build_network(replace(SMALL, label_dim=3))
    taken.put_into(net)
    assert taken.fresh == ("unet.emb_label.weight",)
    for name, tensor in source.state_dict().items():
        if name not in taken.fresh:
            assert torch.allclose(net.state_dict()[name], tensor, rtol=1e-5), name
    assert torch.allclose(net.logvar(torch.tensor([0.3])), source.logvar(torch.tensor([0.3])), rtol=1e-4)


def planned(recipe: Any, *given: str) -> Any:
    return recipe.plan(parse_given([*given, "--dry-run"], default=recipe.defaults, prog="x", description=""))


def test_the_recipes_settings_are_edm2s():
    found = planned(train_teacher.RECIPE, "--arch", "edm2", "--D", "128", "--scale", "small")
    config, network = found.config, found.network
    assert network.family == "EDM2" and network.D == 128 and network.channel_mult_emb == max(network.channel_mult)
    assert (config.lr, config.beta2, config.augment, config.dropout) == (0.01, 0.99, 0.0, 0.0)
    assert (config.noise.p_mean, config.noise.p_std) == (-0.8, 1.6)
    # 35 000 of 524 288 batches, as the training is shorter.
    assert config.lr_decay_batches == pytest.approx(2500 * 35_000 / 524_288, rel=1e-2)
    assert any("noise levels of EDM2" in line for line in found.said)
    given = planned(train_teacher.RECIPE, "--arch", "edm2", "--noise.p-mean", "-0.4", "--lr", "0.02", "--D", "inf")
    assert (given.config.noise.p_mean, given.config.noise.p_std, given.config.lr) == (-0.4, 1.6, 0.02)
    cifar = planned(cifar_teacher.RECIPE, "--arch", "edm2")
    assert cifar.network.model_channels == 128 and cifar.config.beta2 == 0.99 and cifar.config.batch == 512
    assert planned(cifar_teacher.RECIPE).config.noise.p_mean == -1.2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["--augment", "0.1"],
            "an EDM2 network is not told of augmentations, and is trained without: give --augment 0",
        ),
        (["--precond", "vp"], "an EDM2UNet has EDM's preconditioning"),
        (["--lr-decay-batches", "-1"], "lr-decay-batches must be a finite number >= 0"),
        (["--beta2", "1"], "beta2 must lie in [0, 1)"),
    ],
)
def test_what_such_a_training_cannot_have_is_said_in_one_line(given, message):
    with pytest.raises((BadInput, ValueError)) as caught:
        planned(train_teacher.RECIPE, "--arch", "edm2", *given)
    assert message in str(caught.value) and "\n" not in str(caught.value)
