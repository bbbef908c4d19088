"""The log-variance of EDM2's loss: in a teacher's training, and as a weight in a distillation."""

import math
from dataclasses import replace

import edm2_fixtures
import pytest
import torch
from edm2_fixtures import network, recorded

from ipfm.engine import DistillConfig, PidConfig
from ipfm.engine.commands.bench import plain_rule
from ipfm.engine.config import TeacherConfig
from ipfm.engine.objectives.checking import check_objective
from ipfm.engine.objectives.initial_networks import starting_network
from ipfm.engine.objectives.losses import Noisy, bind, bind_with_logvar, denoising_objective
from ipfm.models import EDM2Precond, NetworkConfig, build_network

SMALL = replace(edm2_fixtures.SMALL, dropout=0.0)


def noisy_of(net: EDM2Precond, data) -> tuple[torch.Tensor, Noisy]:
    """The recorded batch, perturbed as recorded."""
    y = data["images"].double()
    sigma = (data["normal_sigma"].double() - 0.4).exp()
    x = y + sigma.view(-1, 1, 1, 1) * data["noise"].double()
    c_skip, c_out, c_in, _ = net.coefficients(sigma)
    return y, Noisy(x, c_in.view(-1, 1, 1, 1) * x, sigma, c_skip, c_out, c_in)


def test_the_loss_and_its_gradients_are_edm2s():
    """Against the recorded loss of each pixel, summed over a sample, and autograd through the formula."""
    net, data = network("edm2_latent_uncond", torch.float64), recorded("edm2_training")
    net.load_state_dict(
        {
            name: plain_rule.normalised(value) if value.ndim > 1 else value
            for name, value in edm2_fixtures.masters_in_file("edm2_latent_uncond").items()
        }
    )
    y, noisy = noisy_of(net, data)
    result = denoising_objective(bind_with_logvar(net, None), y, noisy, sigma_data=0.5)
    expected = data["loss_f64"].flatten(1).sum(1)
    assert torch.allclose(result.loss, expected, rtol=1e-11) and result.valid.all()
    found = torch.autograd.grad(result.surrogate, list(net.parameters()))
    sigma = noisy.sigma.view(-1, 1, 1, 1)
    u = net.logvar(sigma)
    loss = (sigma**2 + 0.25) / (sigma * 0.5) ** 2 / u.exp() * (net(noisy.x, sigma) - y) ** 2 + u
    for a, b in zip(found, torch.autograd.grad(loss.sum(), list(net.parameters())), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))


@pytest.mark.parametrize("weighting", [None, lambda sigma, weight: weight * sigma])
def test_a_sample_that_is_not_finite_moves_nothing(weighting):
    torch.manual_seed(0)
    net = build_network(SMALL)
    y, sigma = torch.randn(3, 1, 8, 8), torch.tensor([0.3, 1.0, 4.0])
    found = []
    for bad in (False, True):
        images = y.clone()
        if bad:
            images[1, 0, 0, 0] = math.nan
        keep = [0, 1, 2] if bad else [0, 2]
        c_skip, c_out, c_in, _ = net.coefficients(sigma[keep])
        x = images[keep] + 0.1
        noisy = Noisy(x, c_in.view(-1, 1, 1, 1) * x, sigma[keep], c_skip, c_out, c_in)
        result = denoising_objective(
            bind_with_logvar(net, torch.eye(3)[keep]), images[keep], noisy, sigma_data=0.5, weighting=weighting
        )
        assert result.valid.tolist() == ([True, False, True] if bad else [True, True])
        found.append((result.loss.sum(), torch.autograd.grad(result.surrogate, list(net.parameters()))))
    assert torch.allclose(found[0][0], found[1][0])
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_generator_has_no_log_variance_and_a_student_where_it_is_wanted():
    for config, student in ((DistillConfig(), 0), (DistillConfig(logvar=True), 128)):
        channels = {role.name: role.network.logvar_channels for role in config.objective(SMALL).roles}
        assert channels == {"student": student, "generator": 0}
    assert [role.network.logvar_channels for role in PidConfig(points=3).objective(SMALL).roles] == [0]
    teacher = build_network(SMALL)
    for role in DistillConfig(logvar=True).objective(SMALL).roles:
        net = starting_network(role.network, "teacher", teacher, 0)
        given, held = teacher.state_dict(), net.state_dict()
        assert all(torch.allclose(held[name], given[name], rtol=1e-6) for name in held)
        assert ("logvar_linear.weight" in held) == (role.name == "student")


@pytest.mark.parametrize("logvar", [False, True])
@pytest.mark.parametrize("D", [math.inf, 128.0])
def test_the_objective_trains_edm2_networks(logvar, D):
    torch.manual_seed(0)
    teacher = build_network(replace(SMALL, D=D)).requires_grad_(False).eval()
    with torch.no_grad():
        for name, p in teacher.named_parameters():
            if name.endswith("gain"):
                p.fill_(0.5)
    check_objective(DistillConfig(logvar=logvar, D=D, batch=4, micro_batch=2), teacher)


def test_a_teacher_without_log_variance_cannot_weigh_by_it():
    with pytest.raises(ValueError, match="logvar needs a teacher with a log-variance, its file has none"):
        DistillConfig(logvar=True).completed(replace(SMALL, logvar_channels=0))
    song = NetworkConfig(img_resolution=8, img_channels=1, model_channels=8, channel_mult=(1,), num_blocks=1)
    with pytest.raises(ValueError, match=r"which a network of ddpm\+\+ has not"):
        DistillConfig(logvar=True).completed(song)


@pytest.mark.parametrize("width", ["width", "student_width"])
def test_a_width_that_no_network_has_is_told_before_the_run(width):
    with pytest.raises(ValueError, match=r"width 0\.3 makes 2\.4 channels of 8: give a divisor"):
        DistillConfig(**{width: 0.3}).completed(SMALL)


def test_the_weight_of_the_generators_samples_is_that_of_the_students_uncertainty():
    from ipfm.engine.objectives.student_steps import DistillSteps

    student = build_network(SMALL)
    steps = DistillSteps.__new__(DistillSteps)
    steps.config, steps.student = DistillConfig(logvar=True), type("Trained", (), {"module": student})()
    sigma, weight = torch.tensor([0.5, 2.0]), torch.tensor([1.0, 3.0])
    got = steps._by_logvar(sigma, weight)
    assert torch.allclose(got, weight / student.logvar(sigma).exp()) and (got != weight).all()


def test_reports_and_folders_tell_such_a_distillation_apart():
    config = DistillConfig(logvar=True, D=2048.0)
    plain = replace(config, logvar=False)
    assert config.name() == "alpha1-K1-logvar" and plain.name() == "alpha1-K1"
    assert config.objective(SMALL).title == "distil D=2048 alpha=1 K=1 logvar"
    assert "weighting: e^-u, u the student's log-variance" in DistillConfig.info_words(config.to_json())
    assert "weighting" not in DistillConfig.info_words(plain.to_json())
    assert DistillConfig.figures("cifar10", plain.to_json()) and not DistillConfig.figures("cifar10", config.to_json())


def test_edm2s_learning_rates():
    """Those of the recorded training: ref_lr 0.02, ref_batches 1.5, ramp-up 16 images, batch 8."""
    config = TeacherConfig(batch=8, lr=0.02, lr_decay_batches=1.5, lr_rampup_kimg=0.016)
    assert [config.learning_rate(step) for step in range(4)] == pytest.approx(
        [0.0, 0.01, 0.02 / math.sqrt(16 / 12), 0.02 / math.sqrt(2)]
    )
    flat = TeacherConfig(batch=8, lr=0.02, lr_decay_batches=2, lr_rampup_kimg=0)
    assert [flat.learning_rate(step) for step in (0, 2, 8)] == pytest.approx([0.02, 0.02, 0.01])


def test_without_log_variance_the_loss_is_edms():
    net, data = network("edm2_latent_uncond", torch.float64), recorded("edm2_training")
    y, noisy = noisy_of(net, data)
    plain = denoising_objective(bind(net, None), y, noisy, sigma_data=0.5)
    with_u = denoising_objective(bind_with_logvar(net, None), y, noisy, sigma_data=0.5)
    u = net.logvar(noisy.sigma)
    assert torch.allclose(with_u.loss, plain.loss / u.exp() + y[0].numel() * u)
