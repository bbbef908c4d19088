"""A model in three lines of Python, from wherever it is stored: the images are those of `ipfm sample`."""

from __future__ import annotations

import json
import math
import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import official_files as of
import pytest
import torch
from torch.nn.functional import one_hot

from ipfm.engine import load_generator, load_sampler, save_grid
from ipfm.engine.commands.main import _main as ipfm
from ipfm.engine.data.image_grid import pixels
from ipfm.engine.sampling import image_sampler, memory_format, stored_model
from ipfm.models import EDMPrecond, NetworkConfig, build_network, save_model

SMALL = NetworkConfig(
    model_type="SongUNet", img_resolution=4, img_channels=1, model_channels=4, channel_mult=(1,), num_blocks=1,
    attn_resolutions=(), D=128.0,
)  # fmt: skip
LEVELS = {"one": [2.5], "four": [2.5, 1.875, 1.25, 0.625]}
ENDS = {"parametrisation": "trajectory", "sigma_max": 60.0, "sigma_min": 0.01}
SID = "network-snapshot-1.200000-403968.pkl"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models by what they are: "one", "four", "classed" (four steps, three classes), "trajectory", "teacher"."""
    root = tmp_path_factory.mktemp("models")
    about: dict[str, dict[str, object]] = {
        **{name: {"sigmas": levels, "objective": "ipfm", "optimizer_steps": 7} for name, levels in LEVELS.items()},
        "classed": {"sigmas": LEVELS["four"], "dataset": "digits"},
        "trajectory": ENDS,
    }
    for seed, (name, facts) in enumerate(about.items()):
        net = of.randomize(EDMPrecond(replace(SMALL, label_dim=3 if name == "classed" else 0)), seed)
        save_model(net, root / name, extra={"task": "generator", **facts})
        # A run that has ended, and the same model in EDM's layout.
        save_model(net, root / "runs" / name / "generator", extra={"task": "generator", **facts})
        (root / "runs" / name / "config.json").write_text(json.dumps({"kind": "distill"}))
        if name != "trajectory":
            ipfm(["export", str(root / name), str(root / f"{name}.pkl")])
    save_model(of.randomize(EDMPrecond(SMALL)), root / "teacher", extra={"task": "teacher"})
    of.write_pickle(root / SID, {"ema": of.official(of.randomize(EDMPrecond(replace(SMALL, D=math.inf))))})
    return root


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sampled(model: Path, *arguments: object) -> np.ndarray:
    """Images of `ipfm sample`, uint8 NHWC."""
    ipfm(["sample", str(model), "--out", "x.npz", *map(str, arguments)])
    with np.load("x.npz") as file:
        return file["images"]


def levels(images: torch.Tensor) -> np.ndarray:
    return pixels(images).permute(0, 2, 3, 1).numpy()


@pytest.mark.quick
@pytest.mark.filterwarnings("ignore:of .* the generator at its end")
@pytest.mark.parametrize(
    ("kind", "form"),
    [
        (kind, form)
        for kind in ("one", "four", "classed", "trajectory")
        for form in ("{}", "runs/{}", "runs/{}/generator", "{}.pkl")
        if (kind, form) != ("trajectory", "{}.pkl")  # EDM's layout holds denoisers alone
    ],
)
def test_three_lines_from_another_folder_draw_what_the_command_does(place, elsewhere, kind, form):
    G = load_generator(place / form.format(kind))
    images = G.sample(64, seed=3)
    assert images.shape == (64, 1, 4, 4) and images.dtype == torch.float32
    assert np.array_equal(levels(images), sampled(place / form.format(kind), "--n", 64, "--seed", 3))
    seeds = [9, 0, 9]
    assert np.array_equal(levels(G.sample(seed=seeds)), sampled(place / form.format(kind), "--seeds", "9,0,9"))
    if kind == "classed":
        turns = sampled(place / form.format(kind), "--n", 5, "--classes", "2,0")
        assert np.array_equal(levels(G.sample(5, class_labels=[2, 0])), turns)


@pytest.mark.parametrize("kind", ["one", "classed"])
def test_an_exported_hub_folder_draws_as_its_model(place, elsewhere, kind):
    """Of a network as it is and, as both have the same files, of several steps and classes."""
    ipfm(["export", str(place / kind), "hub", "--samples", "0"])
    assert torch.equal(load_generator("hub").sample(6, seed=1), load_generator(place / kind).sample(6, seed=1))
    card = Path("hub/README.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", card, re.S) if "load_generator" in block]
    found: dict[str, torch.Tensor] = {}
    exec(code.replace('load_generator(".")', 'load_generator("hub")'), found)
    assert torch.equal(found["images"], load_generator(place / kind).sample(16, seed=0))


def test_a_snapshot_of_sid_needs_its_claim(place, elsewhere):
    with pytest.raises(
        ValueError, match=r"is a generator, .*: give generator=True, which draws in one step at 2.5"
    ) as e:
        load_generator(place / SID)
    assert "--" not in str(e.value)
    with pytest.warns(UserWarning, match=r"is drawn from at sigma 2.5 and D = inf; sigmas and D say others$"):
        G = load_generator(place / SID, generator=True)
    assert np.array_equal(levels(G.sample(3)), sampled(place / SID, "--generator", "--n", 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        G = load_generator(place / SID, generator=True, sigmas=[2.0, 1.0], D=math.inf)
    assert (G.sigmas, G.nfe, G.D) == ((2.0, 1.0), 2, math.inf)


def test_it_says_what_it_is(place):
    G = load_generator(place / "four", device="cpu")
    assert repr(G) == (
        "<generator: 1x4x4; unconditional; D = 128; 4 evaluations at sigma 2.5, 1.875, 1.25, 0.625; ipfm; 7 steps; cpu>"
    )
    assert (G.kind, G.D, G.sigmas, G.nfe) == ("generator", 128.0, tuple(LEVELS["four"]), 4)
    assert (G.classes, G.image_shape, G.value_range) == (0, (1, 4, 4), (-1.0, 1.0))
    assert (G.objective, G.steps_trained, G.dataset, G.path) == ("ipfm", 7, None, place / "four")
    assert (G.device.type, G.dtype, G.facts.D) == ("cpu", torch.float32, None)
    assert not any(p.requires_grad for p in G.network.parameters()) and not G.network.training
    classed = load_generator(place / "classed", device="cpu")
    assert repr(classed).startswith("<generator: 1x4x4 digits; 3 classes; D = 128; ") and classed.classes == 3
    assert load_generator(place / "trajectory").sigmas == (60.0, 0.01)
    T = load_sampler(place / "teacher", steps=3)
    assert repr(T).startswith("<teacher: 1x4x4; unconditional; D = 128; 5 evaluations at sigma 80 to 0.002")
    assert (T.kind, T.objective, T.nfe) == ("teacher", None, 5)


def test_images_are_the_same_in_pieces_and_in_batches(place):
    G = load_generator(place / "classed")
    whole = G.sample(7, seed=5)
    torch.testing.assert_close(G.sample(7, seed=5, batch=3), whole, rtol=1e-4, atol=1e-5)
    pieces = torch.cat([G.sample(4, seed=5), G.sample(3, seed=5, first_index=4)])
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-5)
    in_turn = torch.cat([G.sample(4, class_labels=[0, 1, 2]), G.sample(3, class_labels=[0, 1, 2], first_index=4)])
    torch.testing.assert_close(in_turn, G.sample(7, class_labels=[0, 1, 2]), rtol=1e-4, atol=1e-5)
    assert G.sample(0).shape == (0, 1, 4, 4)


@pytest.mark.parametrize("kind", ["one", "four", "classed", "trajectory", "teacher"])
def test_drawn_latents_are_those_that_sample_draws(place, kind):
    G = load_sampler(place / kind)
    latents = G.draw_latents(4, seed=5)
    assert torch.equal(G.sample(latents=latents, seed=5), G.sample(4, seed=5))
    assert torch.equal(G.draw_latents(seed=[5, 5])[1:], latents[:1])
    assert torch.equal(G.draw_latents(2, 5, first_index=2), latents[2:])
    # x at the highest level: nothing is scaled.
    assert latents.std() / G.sigmas[0] == pytest.approx(1, abs=0.4)
    halves = G.sample(4, seed=5, latents=latents.double(), batch=3)
    torch.testing.assert_close(halves, G.sample(4, seed=5), rtol=1e-4, atol=1e-5)


def test_latents_of_unit_spread_are_remarked_on(place):
    """As other programs' generators take them."""
    wide = torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for name in ("one", "teacher"):
        G = load_sampler(place / name)
        with pytest.warns(
            UserWarning, match=rf"latents have a spread of .* starts from x at sigma {G.sigmas[0]:g}: "
        ) as said:
            G.sample(latents=wide)
        assert said[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            G.sample(latents=wide * G.sigmas[0])
            G.sample(latents=G.draw_latents(200))


def test_labels_are_numbers_or_rows(place):
    G = load_generator(place / "classed")
    ones = G.sample(4, class_labels=1)
    rows = one_hot(torch.ones(4, dtype=torch.int64), 3)
    for same in (
        torch.tensor(1),
        [1],
        np.array([1, 1, 1, 1]),
        np.int64(1),
        rows,
        rows.float(),
        rows[:1],
        rows.tolist(),
    ):
        assert torch.equal(G.sample(4, class_labels=same), ones)
    assert torch.equal(G.sample(3, class_labels=range(3)), G.sample(3, class_labels=torch.eye(3)))
    assert not torch.allclose(G.sample(4, class_labels=2), ones)
    # Drawn by the seed.
    assert torch.equal(G.sample(4), G.sample(4, seed=0)) and not torch.equal(G.sample(4), ones)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"class_labels": 3}, "class_labels must be from 0 to 2 for this network, got 3"),
        ({"class_labels": [0, -1]}, "class_labels must be from 0 to 2 for this network, got -1"),
        ({"class_labels": []}, "class_labels must be whole numbers of classes, or rows (4, 3), got []"),
        ({"class_labels": [0, 1, 2, 0, 1]}, "class_labels must be at most one for each of 4 images, got 5"),
        ({"class_labels": torch.zeros(4)}, "must be whole numbers of classes, or rows (4, 3), got a tensor (4,)"),
        ({"class_labels": True}, "class_labels must be whole numbers of classes, or rows (4, 3), got True"),
        ({"class_labels": "cat"}, "class_labels must be whole numbers of classes, or rows (4, 3), got 'cat'"),
        ({"class_labels": torch.zeros(4, 5)}, "rows of class_labels must have shape (4, 3), got (4, 5)"),
        ({"class_labels": torch.full((4, 3), math.nan)}, "rows of class_labels must be finite"),
        ({"latents": torch.zeros(4, 1, 4, 5)}, "latents must have shape (4, 1, 4, 4), got (4, 1, 4, 5)"),
        ({"latents": np.zeros((4, 1, 4, 4))}, "latents must be a tensor of floating point numbers, got ndarray"),
        ({"latents": torch.zeros(4, 1, 4, 4).long()}, "latents must be a tensor of floating point numbers, got torch"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
        ({"seed": 1 << 64}, "seed must lie in [0, 2^64), got"),
        ({"seed": "7"}, "seed must be an integer >= 0, got '7'"),
        ({"seed": [1, 2]}, "seed must be one number or one for each of 4 images, got 2"),
        ({"seed": [1, 2, 3, 4], "first_index": 1}, "first_index is for one seed: of a list, each makes its first"),
        ({"n": 2.0}, "n must be an integer >= 0, got 2.0"),
        ({"n": None}, "give n, the number of images"),
        ({"n": 10**13}, "an array of 10,000,000,000,000 images needs at least"),
        ({"batch": 0}, "batch must be an integer >= 1, got 0"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_drawn_is_said_in_a_line(place, given, said):
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        load_generator(place / "classed", device="cpu").sample(**{"n": 4, **given})
    assert "\n" not in str(error.value)


def test_labels_of_an_unconditional_generator_are_refused(place):
    G = load_generator(place / "one")
    for labels in (0, torch.zeros(2, 3)):
        with pytest.raises(ValueError, match="class_labels were given, but the network is unconditional: leave them"):
            G.sample(2, class_labels=labels)


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        (
            "teacher",
            {},
            "is a teacher: load_sampler draws from it by Heun's method, and load_teacher gives the network",
        ),
        ("nowhere", {}, "does not exist"),
        ("one", {"which": "best"}, "which chooses among the networks of a run"),
        ("one", {"D": 2.0}, "was trained for D = 128, but D = 2 was asked for"),
        ("one", {"generator": True}, "is a model folder, which says that it is a generator"),
        ("one", {"sigmas": [1.0]}, "sigmas cannot be given: .* is a generator, which has levels of its own"),
        ("one", {"sigmas": [1.0, 2.0]}, "sigmas must fall strictly, got 1, 2"),
        ("one", {"device": "gpu"}, 'device must be one of torch\'s, such as "cpu" or "cuda:0", got \'gpu\''),
        ("one", {"device": "cuda:99"}, r"device must be one that there is: torch sees \d+ GPUs, got cuda:99"),
        ("one", {"dtype": "bf16"}, "dtype must be a floating one of torch's, such as torch.bfloat16, got 'bf16'"),
    ],
    ids=["teacher", "nowhere", "which", "D", "claim", "sigmas", "rising", "device", "no-such-gpu", "dtype"],
)
def test_what_cannot_be_loaded_is_said_in_a_line(place, name, given, said):
    with pytest.raises(ValueError, match=said) as error:
        load_generator(place / name, **given)
    assert "\n" not in str(error.value) and "--" not in str(error.value)


def test_a_program_beside_the_model_is_told_from_it(place, elsewhere):
    ipfm(["export", str(place / "one"), "g.pt2"])
    with pytest.raises(ValueError, match=r"it is a program of torch.export, a .pt2: give the model folder that it"):
        load_generator("g.pt2")


def test_a_loaded_network_or_nothing_is_no_path(place):
    for given, kind in ((None, "NoneType"), (build_network(SMALL), "EDMPrecond")):
        with pytest.raises(ValueError, match=f"path must be that of a model or a run, got {kind}"):
            load_generator(given)


def test_a_teacher_is_drawn_from_as_by_the_command(place, elsewhere):
    T = load_sampler(place / "teacher", steps=3)
    assert np.array_equal(
        levels(T.sample(5, seed=2)), sampled(place / "teacher", "--n", 5, "--seed", 2, "--heun-steps", 3)
    )
    T = load_sampler(place / "teacher", sigmas=[10, 1], solver="euler")
    found = sampled(place / "teacher", "--n", 2, "--sigmas", 10, 1, "--solver", "euler")
    assert np.array_equal(levels(T.sample(2)), found) and T.nfe == 2
    for given, said in (
        ({"steps": 2, "sigmas": [1.0]}, "sigmas and steps exclude each other"),
        ({"generator": True, "teacher": True}, "generator and teacher exclude each other"),
        ({"steps": 0}, "must be an integer >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=said):
            load_sampler(place / "teacher", **given)
    with pytest.raises(ValueError, match=r"steps cannot be given: .* is a generator"):
        load_sampler(place / "one", steps=18)


def test_a_run_is_found_by_tilde_and_by_which(place, elsewhere, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    with pytest.warns(UserWarning, match="the generator at its end .* is taken") as said:
        G = load_generator("~/runs/one")
    assert said[0].filename == __file__ and G.path == place / "runs" / "one" / "generator"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_generator("~/runs/one", which="last").path == G.path


def test_it_moves_and_computes_in_another_dtype(place, monkeypatch):
    G = load_generator(place / "one", device="cpu", dtype=torch.bfloat16)
    assert G.dtype == torch.bfloat16
    rough, exact = G.sample(4), load_generator(place / "one", device="cpu").sample(4)
    assert rough.dtype == torch.float32 and 0 < (rough - exact).abs().max() < 0.1 * exact.abs().max()
    assert G.to("cpu") is G and G.device == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert image_sampler._device(None) == torch.device("cuda")


def test_models_are_drawn_from_in_the_memory_format_of_their_device(place, elsewhere, monkeypatch):
    """As on a GPU, channels_last: the same images, by `ipfm sample` and from Python."""
    expected = sampled(place / "four", "--n", 5, "--seed", 2)
    assert not load_generator(place / "four", device="cpu")._net.channels_last
    on_gpu = []

    def as_on_a_gpu(net, memory_format, device):
        on_gpu.append((memory_format, device))
        memory_format_of(net, memory_format, torch.device("cuda"))
        assert net.channels_last

    memory_format_of = memory_format.set_memory_format
    for module in (stored_model, image_sampler):
        monkeypatch.setattr(module, "set_memory_format", as_on_a_gpu)
    found, G = sampled(place / "four", "--n", 5, "--seed", 2), load_generator(place / "four", device="cpu")
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert np.abs(levels(G.to("cpu").sample(5, seed=2)).astype(int) - expected).max() <= 1
    assert on_gpu == [("auto", torch.device("cpu"))] * 3


@pytest.mark.gpu
def test_a_gpu_draws_the_same_images(place):
    for kind in ("one", "four", "classed"):
        G = load_generator(place / kind)
        assert G.device.type == "cuda"
        images, path = G.sample(4, seed=1), G.interpolate(1, 2, n=5, class_labels=1 if kind == "classed" else None)
        assert images.is_cuda and path.is_cuda
        G.to("cpu")
        torch.testing.assert_close(images.cpu(), G.sample(4, seed=1), rtol=1e-2, atol=1e-2)
        path_there = G.interpolate(1, 2, n=5, class_labels=1 if kind == "classed" else None)
        torch.testing.assert_close(path.cpu(), path_there, rtol=1e-2, atol=1e-2)


def test_images_are_saved_in_a_grid(place, elsewhere):
    save_grid(load_generator(place / "one").sample(4), "digits.png")
    assert Path("digits.png").read_bytes().startswith(b"\x89PNG")
