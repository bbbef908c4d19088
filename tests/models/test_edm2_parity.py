"""EDM2's network against outputs, losses and gradients recorded from the official code."""

import edm2_fixtures
import pytest
import torch
from edm2_fixtures import gradient_of_master, network, recorded
from torch import Tensor

from ipfm.engine.commands.bench.plain_rule import with_rule_in_forward
from ipfm.models.forced_weight_norm import normalised_rows, under_the_rule

NAMES = tuple(edm2_fixtures.CONFIGS)


def apart(got: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    assert got.shape == expected.shape
    return float((got.detach().double() - expected).abs().max() / expected.abs().max())


@pytest.mark.quick
@pytest.mark.parametrize("backend", ["auto", "math"])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2e-6), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_recorded_outputs(name, dtype, most, backend):
    net, data = network(name, dtype), recorded(name)
    net.attention_backend = backend
    x, sigma, labels = data["x"], data["sigma"], data.get("class_labels")
    d = net(x, sigma, labels)
    assert d.dtype == dtype
    assert apart(d, data["D_f64"]) <= most
    if dtype == torch.float32:
        assert apart(d, data["D"].double()) <= most
    one = data["sigma_scalar"]
    for given in (one, one.reshape(1), float(one)):
        assert apart(net(x, given, labels), data["D_sigma_scalar_f64"]) <= most
    assert apart(net.logvar(sigma), data["logvar_f64"]) <= most
    if labels is not None:
        assert apart(net(x, sigma), data["D_no_label_f64"]) <= most
    x, sigma = x.to(dtype), sigma.to(dtype)
    c_in = (0.25 + sigma**2).rsqrt()[:, None, None, None]
    labels = None if labels is None else labels.to(dtype)
    assert apart(net.model(c_in * x, sigma.log() / 4, labels), data["F_f64"]) <= most


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_activations_that_reach_the_clamp(name):
    net, data = network(name, torch.float64), recorded(name)
    net.get_parameter(str(data["clip_name"])).fill_(data["clip_value"])
    reached = []
    for block in net.model.blocks:
        block.register_forward_hook(lambda _, __, out: reached.append(bool((out.abs() == 256).any())))
    assert apart(net(data["x"], data["sigma"], data.get("class_labels")), data["D_clip_f64"]) <= 1e-12
    assert any(reached)


def loss_of(net, data) -> Tensor:
    """EDM2's loss a pixel at the fixture's noise levels; P_mean = -0.4, P_std = 1."""
    y, noise = data["images"].double(), data["noise"].double()
    sigma = (data["normal_sigma"].double() - 0.4).exp().view(-1, 1, 1, 1)
    u = net.logvar(sigma)
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    return weight / u.exp() * (net(y + sigma * noise, sigma) - y) ** 2 + u


def flat(tensors) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def gradients_of_masters(net, masters: dict[str, Tensor]) -> Tensor:
    """All parameters' gradients, those of plain weights turned into those of their masters."""
    ruled = under_the_rule(net, logvar=True)
    return flat(
        gradient_of_master(masters[name], p.grad) if name in ruled else p.grad for name, p in net.named_parameters()
    )


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_the_plain_weights_gradients_are_those_of_the_rule_in_the_forward_pass(training):
    """In training the masters are normalised before the forward pass, in evaluation mode they are as the file's."""
    data = recorded("edm2_training")
    masters = edm2_fixtures.masters_in_file("edm2_latent_uncond")
    net = network("edm2_latent_uncond", torch.float64).train(training)
    ruled = under_the_rule(net, logvar=True)
    if training:
        masters |= {name: normalised_rows(masters[name]) for name in ruled}
        net.load_state_dict(masters)
    loss = loss_of(net, data)
    (loss.sum() / len(loss)).backward()
    if training:
        assert apart(loss, data["loss_f64"]) <= 1e-12
        after = flat(masters[name] for name, _ in net.named_parameters())
        assert apart(after, data["weights_after_f64"]) <= 1e-12
        assert apart(flat(net.state_dict()[name] for name, _ in net.named_parameters()), after) <= 1e-12
    expected = data["grads_train_f64" if training else "grads_eval_f64"]
    assert apart(gradients_of_masters(net, masters), expected) <= 1e-12


def test_the_tests_own_rule_in_the_forward_pass_is_the_recorded_one():
    """What other tests compare with is itself held to the official code."""
    data = recorded("edm2_training")
    net = network("edm2_latent_uncond", torch.float64)
    net.load_state_dict(edm2_fixtures.masters_in_file("edm2_latent_uncond"))
    with_rule_in_forward(net)
    for training in (False, True):
        net.train(training).zero_grad()
        loss = loss_of(net, data)
        (loss.sum() / len(loss)).backward()
        expected = data["grads_train_f64" if training else "grads_eval_f64"]
        assert apart(flat(p.grad for p in net.parameters()), expected) <= 1e-12
    assert apart(loss, data["loss_f64"]) <= 1e-12
    assert apart(flat(net.parameters()), data["weights_after_f64"]) <= 1e-12
