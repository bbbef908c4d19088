"""A network that was read from disk is sampled with what it was made with; others are refused unless asked for."""

import inspect
import math
from pathlib import Path

import numpy as np
import official_files as of
import pytest
import torch

from ipfm.engine import DistillConfig, Distiller, generate, heun_sample, trajectory_sample
from ipfm.engine.sampling.stored_model import sample_model
from ipfm.models import EDMPrecond, NetworkConfig, load_model, load_teacher, save_model

SMALL = NetworkConfig(
    img_resolution=8, img_channels=1, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(), D=128.0
)
FACTS = {
    "teacher": {"task": "teacher"},
    "generator": {"task": "generator", "sigmas": [2.5, 1.25]},
    "trajectory": {"task": "generator", "parametrisation": "trajectory", "sigma_max": 60.0, "sigma_min": 0.01},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Name -> a network read from a folder that says what it is; "classed": a generator of four classes."""
    root = tmp_path_factory.mktemp("models")
    for name, facts in FACTS.items():
        save_model(of.randomize(EDMPrecond(SMALL)), root / name, extra=facts)
    classed = NetworkConfig(**{**vars(SMALL), "label_dim": 4})
    save_model(of.randomize(EDMPrecond(classed)), root / "classed", extra=FACTS["generator"])
    return root


def drawn(folder):
    """The first three images, as `ipfm sample` draws them."""
    return sample_model(folder, torch.device("cpu"), heun_steps=3, seed=5).draw(0, 3)


@pytest.mark.quick
def test_a_loaded_model_is_sampled_with_its_own_D_levels_and_labels(models):
    nets = {name: load_model(models / name) for name in ("teacher", "generator", "trajectory", "classed")}
    assert torch.equal(generate(nets["generator"], 3, seed=5), drawn(models / "generator"))
    assert torch.equal(generate(nets["generator"], 3, D=128, sigmas=[2.5, 1.25], seed=5), drawn(models / "generator"))
    assert torch.equal(heun_sample(nets["teacher"], 3, steps=3, seed=5), drawn(models / "teacher"))
    assert torch.equal(trajectory_sample(nets["trajectory"], 3, seed=5), drawn(models / "trajectory"))
    assert torch.equal(generate(nets["classed"], 3, seed=5), drawn(models / "classed"))
    zeros = generate(nets["classed"], 3, seed=5, class_labels=torch.zeros(3, 4))
    assert not torch.allclose(zeros, drawn(models / "classed"))


def test_another_D_or_other_levels_are_refused_unless_asked_for(models):
    net, ends = load_model(models / "generator"), load_model(models / "trajectory")
    for sample, given, said in [
        (generate, {"D": 2048}, r"made for D = 128, got D = 2048: leave D out, or give override=True"),
        (generate, {"D": math.inf}, r"made for D = 128, got D = inf"),
        (generate, {"sigmas": (2.5,)}, r"made for sigmas 2.5, 1.25, got 2.5: leave them out, or give override=True"),
        (trajectory_sample, {"sigma_max": 80.0}, r"made for sigma_max = 60, got 80: leave it out, or give override"),
        (trajectory_sample, {"D": 1.0}, r"made for D = 128, got D = 1"),
    ]:
        network = net if sample is generate else ends
        with pytest.raises(ValueError, match=said):
            sample(network, 1, seed=0, **given)
        assert sample(network, 1, seed=0, override=True, **given).isfinite().all()


def test_a_network_is_drawn_from_as_what_it_is(models):
    generator, ends = load_model(models / "generator"), load_model(models / "trajectory")
    with pytest.raises(ValueError, match=r"is a generator, .* draw from it with generate, or give override=True"):
        heun_sample(generator, 1, steps=2, seed=0)
    with pytest.raises(ValueError, match=r"is a generator, .* draw from it with trajectory_sample"):
        heun_sample(ends, 1, steps=2, seed=0)
    with pytest.raises(ValueError, match="knows no trajectory: draw from it with generate"):
        trajectory_sample(generator, 1, seed=0)
    with pytest.raises(ValueError, match="knows trajectories: draw from it with trajectory_sample"):
        generate(ends, 1, sigmas=(2.5,), seed=0)
    assert heun_sample(generator, 1, steps=2, seed=0, override=True).isfinite().all()


def test_labels_for_a_network_without_classes_are_refused(models):
    with pytest.raises(ValueError, match="class_labels were given, but the network is unconditional: leave them out"):
        generate(load_model(models / "generator"), 2, seed=0, class_labels=torch.eye(4)[:2])


def test_a_network_that_was_not_read_from_disk_takes_what_it_is_given():
    net = EDMPrecond(SMALL).eval()
    assert net.facts is None
    assert torch.equal(generate(net, 2, sigmas=(2.5,), seed=0), generate(net, 2, D=128, sigmas=(2.5,), seed=0))
    assert generate(net, 2, D=2048, sigmas=(1.0,), seed=0).isfinite().all()
    with pytest.raises(ValueError, match="give sigmas, the noise levels of its evaluations"):
        generate(net, 2, seed=0)

    class Flat:
        img_channels, img_resolution = 1, 4

        def __call__(self, x, sigma, class_labels=None):
            return torch.zeros_like(x)

    with pytest.raises(ValueError, match="give D, the auxiliary dimensions of the prior"):
        heun_sample(Flat(), 1, steps=1, seed=0)


def test_a_D_that_is_assumed_leads_to_the_file(tmp_path):
    path = of.write_pickle(tmp_path / "a.pkl", of.edm_snapshot(of.randomize(EDMPrecond(SMALL))))
    with pytest.raises(ValueError, match="has D = inf, which is assumed, for its file says none: load it with the D"):
        heun_sample(load_teacher(path), 1, D=64, steps=1, seed=0)
    assert heun_sample(load_teacher(path, D=64), 1, D=64, steps=1, seed=0).isfinite().all()


def test_a_generator_in_memory_is_no_teacher(models):
    with pytest.raises(ValueError, match="the teacher given is a generator, which knows its own few noise levels"):
        Distiller(DistillConfig(batch=2, max_steps=1), load_model(models / "generator"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"sigmas": 2.5}, r"^sigmas must be a sequence of numbers, got 2\.5$"),
        ({"sigmas": "2.5"}, r"^sigmas must be a sequence of numbers, got '2\.5'$"),
        ({"sigmas": torch.tensor(2.5)}, r"^sigmas must be a sequence of numbers, got 2\.5$"),
        ({"D": "128"}, r"^D must be a number in \(0, inf\], got '128'$"),
        ({"D": (128,)}, r"^D must be a number in \(0, inf\], got \(128,\)$"),
        ({"seed": "0"}, r"^seed must be an integer in \[0, 2\^64\), or one for each image, got '0'$"),
        ({"n": 3.0}, r"^the number of images must be an integer >= 0, got 3\.0$"),
        ({"latents": [[0.0]]}, r"^latents must be a tensor, got list$"),
        ({"class_labels": 3}, r"^class_labels must be a tensor, got int; numbers of classes become rows by one_hot$"),
        ({"steps": "18"}, r"^the number of sampling steps must be an integer >= 1, got '18'$"),
        ({"churn": 40}, r"^churn must be a Churn, such as Churn\(amount=40\), got 40$"),
        ({"sigma_max": "80"}, r"^sigma_max must be a(?: finite)? number > 0, got '?80'?$"),
        (
            {"net": "runs/x"},
            r"^the samplers take a network, got the path 'runs/x': load it first, ",
        ),
        ({"net": Path("teacher.pkl")}, r"^the samplers take a network, got the path 'teacher\.pkl': load it first, "),
        ({"net": {}}, r"^the samplers take a network with img_channels and img_resolution, got dict$"),
        ({"net": EDMPrecond}, r"^the samplers take a network with .*, got the class EDMPrecond$"),
    ],
)
def test_numbers_tensors_and_paths_that_are_mistaken_for_each_other(models, given, said):
    """One line each, of every sampler that takes the argument."""
    usual = {"generator": (generate, {}), "teacher": (heun_sample, {"steps": 2}), "trajectory": (trajectory_sample, {})}
    tried = 0
    for name, (sample, more) in usual.items():
        if not given.keys() <= {*inspect.signature(sample).parameters}:
            continue
        arguments = {"net": load_model(models / name), "n": 3, "seed": 5, **more, **given}
        if {"sigmas", "steps"} <= arguments.keys():
            del arguments["steps"]
        with pytest.raises(ValueError, match=said):
            sample(**arguments)
        tried += 1
    assert tried


def test_arrays_and_tensors_are_sequences_too(models):
    net = load_model(models / "generator")
    for sigmas, seeds in ((torch.tensor([2.5, 1.25]), torch.tensor([5, 6])), (np.array([2.5, 1.25]), np.array([5, 6]))):
        assert torch.equal(
            generate(net, np.int64(2), sigmas=sigmas, seed=seeds), generate(net, 2, sigmas=(2.5, 1.25), seed=[5, 6])
        )
