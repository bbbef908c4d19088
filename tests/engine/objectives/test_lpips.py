"""LPIPS against the formula of its paper written out in float64, and its weights from every kind of file."""

from __future__ import annotations

import collections
import importlib.util
import math
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hostile
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ipfm.engine.commands.bench.no_reading import NoReading
from ipfm.engine.objectives.lpips import Lpips, load_lpips, lpips_gradient
from ipfm.engine.objectives.lpips_weights import shapes
from ipfm.models.checkpoints.state_dicts import open_state_dict

# The layers of VGG-16 as torchvision numbers them, and as the package lpips cuts them.
SLICES = {1: (0, 2), 2: (5, 7), 3: (10, 12, 14), 4: (17, 19, 21), 5: (24, 26, 28)}
CHANNELS = {1: 64, 2: 128, 3: 256, 4: 512, 5: 512}
SCALING = {
    "scaling_layer.shift": torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1),
    "scaling_layer.scale": torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1),
}
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def weights() -> Weights:
    """Random ones by the published names, so that no level's features die or explode."""
    generator = torch.Generator().manual_seed(3)
    found: Weights = {}
    inside = 3
    for number, layers in SLICES.items():
        for layer in layers:
            shape = (CHANNELS[number], inside, 3, 3)
            found[f"net.slice{number}.{layer}.weight"] = (
                torch.randn(shape, generator=generator) * (9 * inside / 2) ** -0.5
            )
            found[f"net.slice{number}.{layer}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)
            inside = shape[0]
        found[f"lin{number - 1}.model.1.weight"] = torch.rand(1, inside, 1, 1, generator=generator)
    return found


@pytest.fixture(scope="module")
def lpips(weights: Weights) -> Lpips:
    return Lpips(weights)


@pytest.fixture(scope="module")
def exact(weights: Weights) -> Lpips:
    """The same in float64."""
    return Lpips({name: w.double() for name, w in weights.items()})


def naive(weights: Weights, x: Tensor, y: Tensor) -> Tensor:
    """Equation 1 of the paper, image by image; its w_l are the square roots of the stored weights."""
    distances = []
    for pair in zip(x.double(), y.double(), strict=True):
        f = torch.stack(pair).expand(-1, 3, -1, -1)
        shift, scale = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
        f = torch.stack([(f[:, c] - shift[c]) / scale[c] for c in range(3)], dim=1)
        total = torch.zeros((), dtype=torch.float64)
        for number, layers in SLICES.items():
            if number > 1:
                f = F.max_pool2d(f, kernel_size=2, stride=2)
            for layer in layers:
                stem = f"net.slice{number}.{layer}"
                f = F.relu(F.conv2d(f, weights[f"{stem}.weight"].double(), weights[f"{stem}.bias"].double(), padding=1))
            first, second = f / torch.linalg.vector_norm(f, dim=1, keepdim=True)
            w = weights[f"lin{number - 1}.model.1.weight"].double().sqrt().view(-1, 1, 1)
            total = total + torch.linalg.vector_norm(w * (first - second), dim=0).square().mean()
        distances.append(total)
    return torch.stack(distances)


def images(count: int, channels: int = 3, height: int = 16, width: int = 16, seed: int = 0) -> Tensor:
    shape = (count, channels, height, width)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


# -- the distance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 16, 16), (1, 19, 34)])
def test_the_formula_of_the_paper(
    weights: Weights, lpips: Lpips, exact: Lpips, channels: int, height: int, width: int
) -> None:
    x = images(2, channels, height, width).requires_grad_()
    y = images(2, channels, height, width, seed=1).requires_grad_()
    truth = naive(weights, x, y)
    slopes = torch.autograd.grad(truth.sum(), (x, y))
    assert truth.min() > 1e-2 and slopes[0].abs().mean() > 1e-5
    found = exact.distance(x, y)
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=0)  # the paper divides without an epsilon
    for got, slope in zip(torch.autograd.grad(found.sum(), (x, y)), slopes, strict=True):
        torch.testing.assert_close(got, slope, rtol=1e-7, atol=1e-12)
    loss, grad, valid = lpips_gradient(lpips, x.float(), y.float())
    assert loss.dtype == grad.dtype == torch.float32 and valid.all() and not loss.requires_grad
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), slopes[0], rtol=1e-3, atol=1e-3 * float(slopes[0].abs().mean()))


def test_the_gradient_is_that_of_the_value(exact: Lpips) -> None:
    x, y = images(1, 1), images(1, 1, seed=1)
    assert torch.autograd.gradcheck(exact, (x.requires_grad_(), y.requires_grad_()), fast_mode=True)


def test_features_that_are_all_zero_count_nothing(weights: Weights) -> None:
    """There the root of the squares has no slope: no NaN arises, not even one that the ReLU would stop."""
    x, y = images(2).float(), images(2, seed=1).float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slow
        with torch.autograd.detect_anomaly():
            dead = lpips_gradient(Lpips(weights | {"net.slice5.28.bias": torch.full((512,), -1e3)}), x, y)
    without = lpips_gradient(Lpips(weights | {"lin4.model.1.weight": torch.zeros(1, 512, 1, 1)}), x, y)
    assert dead.valid.all() and torch.equal(dead.loss, without.loss) and torch.equal(dead.grad, without.grad)


def test_resized_images(weights: Weights, lpips: Lpips) -> None:
    resizing = Lpips(weights, resize=20)
    for height, width in ((8, 40), (20, 20)):
        x, y = images(2, 3, height, width).float().requires_grad_(), images(2, 3, height, width, seed=1).float()
        expected = lpips.distance(
            F.interpolate(x, (20, 20), mode="bilinear", antialias=True),
            F.interpolate(y, (20, 20), mode="bilinear", antialias=True),
        )
        found = resizing.distance(x, y)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
        slope, truth = (torch.autograd.grad(value.sum(), x)[0] for value in (found, expected))
        torch.testing.assert_close(slope, truth, rtol=1e-3, atol=1e-3 * float(truth.abs().mean()))


def test_samples_that_are_not_finite_do_not_count(lpips: Lpips) -> None:
    x, target = images(4).float(), images(4, seed=1).float()
    alone = lpips_gradient(lpips, x[3:], target[3:])
    x[0, 2, 3, 4] = math.nan
    target[1, 0, 0, 0] = -math.inf
    x[2] = 1e38  # overflows on the way
    loss, grad, valid = lpips_gradient(lpips, x, target)
    assert valid.tolist() == [False, False, False, True]
    assert not loss[:3].any() and not grad[:3].any()
    torch.testing.assert_close(loss[3:], alone.loss)
    torch.testing.assert_close(grad[3:], alone.grad, rtol=1e-3, atol=1e-3 * float(alone.grad.abs().mean()))
    assert lpips.distance(x, target).isfinite().tolist() == [False, False, False, True]


def test_nothing_is_kept_for_the_target_and_nothing_is_read(lpips: Lpips) -> None:
    x, target = images(1).bfloat16(), images(1, seed=1).bfloat16()
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    def elements(target: Tensor) -> int:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            lpips_gradient(lpips, x, target)
        return sum(kept)

    x.requires_grad_()
    assert elements(target) == elements(target.clone().requires_grad_()) > 0
    with NoReading():
        result = lpips_gradient(lpips, x, target.requires_grad_())
    assert result.grad.dtype == torch.bfloat16 and result.loss.dtype == torch.float32
    assert target.grad is None and x.grad is None and not any(p.requires_grad for p in lpips.parameters())
    assert not lpips.training and lpips_gradient(lpips, x[:0], target[:0]).loss.shape == (0,)


def test_images_and_weights_that_do_not_fit(weights: Weights, lpips: Lpips) -> None:
    for x, y, message in (
        (images(2), images(3), "x and y must have one shape, got (2, 3, 16, 16) and (3, 3, 16, 16)"),
        (images(2, 2), images(2, 2), "images must be (B, 1 or 3, H, W) of a floating dtype, got (2, 2, 16, 16)"),
        (images(2)[0], images(2)[0], "images must be (B, 1 or 3, H, W) of a floating dtype, got (3, 16, 16)"),
        (images(2).long(), images(2).long(), "of a floating dtype, got (2, 3, 16, 16) torch.int64"),
        (images(2, 3, 15, 40), images(2, 3, 15, 40), "at least 16 pixels, got (2, 3, 15, 40)"),
    ):
        with pytest.raises(ValueError) as caught:
            lpips.distance(x, y)
        assert message in str(caught.value)
    with pytest.raises(ValueError, match="x and target must have one shape"):
        lpips_gradient(lpips, images(2), images(1))
    for resize in (0, 15):
        with pytest.raises(ValueError, match=f"resize must be None or at least 16 pixels, got {resize}"):
            Lpips(weights, resize=resize)
    with pytest.raises(ValueError, match=r"one floating dtype on one device, got .*float32 on cpu, .*float64 on cpu"):
        Lpips(weights | {"net.slice1.0.bias": weights["net.slice1.0.bias"].double()})
    with pytest.raises(ValueError, match=r"the state dict of LPIPS lacks lin0\.model\.1\.weight and 30 more"):
        Lpips({})


# -- its weights ------------------------------------------------------------------------------------------------------


class Stored:
    """Pickled as a call."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def old_parameter(tensor: Tensor) -> Stored:
    """A parameter as torch 0.1 and 0.2 pickle it."""
    layout = (tensor._typed_storage(), 0, tuple(tensor.shape), tensor.stride())
    return Stored(torch.nn.Parameter, (Stored(torch._utils._rebuild_tensor, layout),), (True, False, None))


def whole(weights: Weights) -> Weights:
    """What lpips.LPIPS(net="vgg").state_dict() holds: the linear layers are there twice."""
    state = collections.OrderedDict(SCALING | weights)
    state |= {f"lins.{level}.model.1.weight": weights[f"lin{level}.model.1.weight"] for level in range(5)}
    state._metadata = collections.OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    return state


def torchvision(weights: Weights) -> Weights:
    """The state dict of vgg16, its classifier smaller."""
    vgg = {name.split(".", 2)[2]: w for name, w in weights.items() if name.startswith("net.")}
    return {f"features.{name}": w for name, w in vgg.items()} | {"classifier.6.bias": torch.zeros(10)}


def linear(weights: Weights) -> Weights:
    return {name: w for name, w in weights.items() if name.startswith("lin")}


@pytest.fixture(scope="module")
def folder(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two published files, as torch 0.1 under Python 2 and torch 0.4 wrote them."""
    place = tmp_path_factory.mktemp("published")
    pairs = [[name, old_parameter(w)] for name, w in torchvision(weights).items()]
    older = Stored(collections.OrderedDict, (pairs,))
    torch.save(older, place / "vgg16-397923af.pth", _use_new_zipfile_serialization=False)
    state = collections.OrderedDict(linear(weights))
    state._metadata = collections.OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    torch.save(state, place / "vgg.pth", _use_new_zipfile_serialization=False)
    return place


def same(found: Lpips, expected: Lpips) -> bool:
    pairs = list(zip(found.state_dict().items(), expected.state_dict().items(), strict=True))
    return len(pairs) == 31 and all(a == b and torch.equal(v, w) for (a, v), (b, w) in pairs)


def test_weights_from_every_kind_of_file(weights: Weights, lpips: Lpips, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "lpips.pth"
    for older in (False, True):
        torch.save(whole(weights), path, _use_new_zipfile_serialization=not older)
        assert same(load_lpips(path), lpips)
    safetensors.torch.save_file(weights, path)  # what a file is, it says itself
    found = load_lpips(path, "cpu", resize=64)
    assert same(found, lpips) and found.resize == 64
    assert same(load_lpips(folder), lpips)


@pytest.fixture
def machine(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine with the package lpips, which must not be run, and the file that torchvision downloads."""
    package, hub = tmp_path / "site" / "lpips", tmp_path / "home" / "hub" / "checkpoints"
    (package / "weights" / "v0.1").mkdir(parents=True)
    hub.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('the package was run')\n")
    (package / "weights" / "v0.1" / "vgg.pth").symlink_to(folder / "vgg.pth")
    (hub / "vgg16-397923af.pth").symlink_to(folder / "vgg16-397923af.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.delitem(sys.modules, "lpips", raising=False)
    monkeypatch.syspath_prepend(str(package.parent))
    yield tmp_path
    assert "lpips" not in sys.modules


def test_weights_that_are_on_the_machine(lpips: Lpips, machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert same(load_lpips(None), lpips)
    (machine / "home" / "hub" / "checkpoints" / "vgg16-397923af.pth").unlink()
    with pytest.raises(ValueError, match=r"^no weights of LPIPS on this machine \(there is no .*vgg16-397923af.pth\)"):
        load_lpips(None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError) as caught:
        load_lpips(None)
    message = str(caught.value)
    assert "the Python package lpips with its file weights/v0.1/vgg.pth is not installed, and there is no" in message
    assert "give --lpips PATH; LPIPS can be read from the state dict" in message and message.isprintable()


class Vgg(nn.Module):
    """What the package lpips takes of torchvision, which has to match torch's own build and may not be there."""

    def __init__(self, **_: object) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inside = 3
        for number, convolutions in SLICES.items():
            layers += [nn.MaxPool2d(2, 2)] if number > 1 else []
            for _ in convolutions:
                layers += [nn.Conv2d(inside, CHANNELS[number], 3, padding=1), nn.ReLU(inplace=True)]
                inside = CHANNELS[number]
        self.features = nn.Sequential(*layers)


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package lpips."""
    if importlib.util.find_spec("lpips") is None:
        pytest.skip("needs the package lpips: pip install --no-deps lpips")
    models = types.ModuleType("torchvision.models")
    models.vgg16 = Vgg  # type: ignore[attr-defined]
    torchvision = types.ModuleType("torchvision")
    torchvision.models = models  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    before = set(sys.modules)
    yield importlib.import_module("lpips")
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "lpips":
            del sys.modules[name]


def test_the_published_weights_give_the_distances_of_the_packages_own_code(
    published: Any, weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real linear layers, v0.1, on random features: read from the package beside torchvision's file, and whole."""
    theirs = published.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    state = theirs.state_dict()
    theirs.load_state_dict(state | {name: w for name, w in weights.items() if name.startswith("net.")})
    # Calibrated ones, not as initialised.
    assert all(
        float(state[name].max()) > 0.1 and not torch.equal(state[name], weights[name]) for name in linear(weights)
    )
    hub = tmp_path / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    torch.save(torchvision(weights), hub / "vgg16-397923af.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    ours = load_lpips(None)
    x, y = (images(2, 3, 32, 48, seed=seed).float().requires_grad_(seed == 0) for seed in range(2))
    expected = theirs(x, y).flatten()
    (slope,) = torch.autograd.grad(expected.sum(), x)
    assert expected.min() > 1e-3
    loss, grad, valid = lpips_gradient(ours, x, y)
    assert valid.all()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(grad, slope, rtol=0, atol=1e-5 * float(slope.abs().max()))
    torch.save(theirs.state_dict(), tmp_path / "lpips-vgg.pth")
    assert same(load_lpips(tmp_path / "lpips-vgg.pth"), ours)


def test_files_that_are_something_else_are_named_in_one_line(folder: Path, tmp_path: Path) -> None:
    # One element, repeated, so that the files are small: of no tensor that is read.
    shaped = {name: torch.zeros(1).expand(shape) for name, shape in shapes().items()}
    sound = {name: torch.ones(shapes()[name]) for name in linear(shaped)}
    assert len(shaped) == 31 and set(SCALING) < set(whole(shaped))
    whole_files: dict[str, tuple[object, str]] = {
        "vgg": (
            torchvision(shaped),
            r"lacks lin0\.model\.1\.weight and 30 more and has the unknown features\.0\.weight",
        ),
        "short": ({k: w for k, w in shaped.items() if k != "net.slice5.28.bias"}, r"lacks net\.slice5\.28\.bias;"),
        "more": (shaped | {"lin5.model.1.weight": torch.ones(1)}, r"has the unknown lin5\.model\.1\.weight;"),
        "name": (shaped | {"\x1b[31m": torch.ones(1)}, r"has the unknown '\\x1b\[31m';"),
        "other": (shaped | {"lin0.model.1.weight": torch.ones(64)}, r"has shape \(64,\), expected \(1, 64, 1, 1\)"),
        "scaled": (shaped | {"scaling_layer.shift": torch.zeros(1, 3, 1, 1)}, r"scaling_layer.shift is not \(-0.03,"),
        "scale": (shaped | {"scaling_layer.scale": torch.ones(2)}, r"scaling_layer.scale is not \(0.458,"),
        "nan": (shaped | {"lin0.model.1.weight": torch.full((1, 64, 1, 1), math.nan)}, "values that are not finite"),
        "wide": (shaped | {"lin0.model.1.weight": torch.ones(1, 64, 1, 1).double()}, r"is torch.float64; possible"),
        "thin": (shaped | sound, "elements overlap"),
        "list": ([1, 2], "holds a list instead of named tensors"),
        "nested": ({"state_dict": shaped}, r"'state_dict' is a OrderedDict instead of a tensor|is a dict instead"),
        "number": (shaped | {"step": 7}, "'step' is 7 instead of a tensor"),
    }
    for name, (root, message) in whole_files.items():
        torch.save(root, tmp_path / f"{name}.pth")
        with pytest.raises(ValueError, match=message) as caught:
            load_lpips(tmp_path / f"{name}.pth")
        assert str(tmp_path / f"{name}.pth") in str(caught.value) and str(caught.value).isprintable()
        assert str(caught.value).endswith("weights/v0.1/vgg.pth of the package lpips")
    (tmp_path / "bad.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{ no header")
    empty, two, lone = tmp_path / "empty", tmp_path / "two", tmp_path / "lone"
    for place in (empty, two, lone):
        place.mkdir()
    for place, name in ((two, "vgg16-a.pth"), (two, "vgg16-b.pth"), (lone, "vgg16-a.pth")):
        (place / name).symlink_to(folder / "vgg16-397923af.pth")
    for path, message in (
        (tmp_path / "none.pth", "none.pth does not exist"),
        (tmp_path / "bad.safetensors", "is no safetensors file"),
        (empty, r"empty should hold one file vgg16-397923af\.pth, got no vgg16-\*\.pth"),
        (two, r"two should hold one file vgg16-397923af\.pth, got vgg16-a\.pth, vgg16-b\.pth"),
        (lone, r"lone has no vgg\.pth"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            load_lpips(path)
        assert str(path) in str(caught.value) and str(caught.value).isprintable()


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "file.pth"
    torch.save({"ema": torch.ones(1)}, path)
    assert open_state_dict(path).load("ema") == 1
    good = path.read_bytes()
    # Files that are merely large are test_fuzz's.
    corpus = [content for _, content in hostile.pickles(marker) if len(content) < 1 << 17]
    zips = [hostile.rewritten(good, data_pkl=content) for content in corpus[: 2 * len(hostile.DANGEROUS)]]
    others = [content for name, content in hostile.other_files() if name != "safetensors"]
    parameter = hostile.named("torch.nn.parameter", "Parameter")
    ordered = hostile.named("collections", "OrderedDict")
    odd = (
        parameter + b")R",
        parameter + b"K\x07\x85R",
        parameter + b"]\x85R}b",
        ordered + b")R}b",
        ordered + b")R}" + hostile.text("__class__") + parameter + b"sb",
        ordered + b"](](K\x01K\x02eea\x85R",
        ordered + b"]](]K\x02ea\x85R",
        hostile.named("torch._utils", "_rebuild_tensor") + b"(K\x01K\x00))tR",
    )
    corpus += zips + others + [hostile.in_snapshot(program) for program in odd]
    for content in corpus:
        path.write_bytes(content)
        with pytest.raises(ValueError) as caught:
            open_state_dict(path)
        assert str(path) in str(caught.value) and str(caught.value).isprintable()
    assert not marker.exists()
