"""EDM2's reference statistics in a pickle, and the features of FD-DINOv2."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from edm2_fixtures import FIXTURES
from torch import nn

from ipfm.engine.distributed.world import World
from ipfm.engine.evaluation.evaluation import open_comparison
from ipfm.engine.evaluation.metrics.dinov2 import DinoFeatures, VisionTransformer
from ipfm.engine.evaluation.reference_data import open_reference, save_statistics
from ipfm.engine.evaluation.statistics_pickle import read_statistics
from ipfm.models.checkpoints.state_dicts import open_state_dict


def statistics(dim: int, seed: int = 0) -> dict[str, np.ndarray]:
    rows = np.random.default_rng(seed).normal(size=(4 * dim, dim))
    return {"mu": rows.mean(0), "sigma": np.cov(rows.T)}


def stored(place: Path, content: object, protocol: int = 4) -> Path:
    place.write_bytes(pickle.dumps(content, protocol=protocol))
    return place


# -- the pickle --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_both_statistics_of_a_file(tmp_path, protocol):
    fid, dino = statistics(6), statistics(4, seed=1)
    path = stored(tmp_path / "img512.pkl", {"num_images": 50_000, "fid": fid, "fd_dinov2": dino}, protocol)
    for features, own in (("inception", fid), ("dinov2", dino)):
        found = open_reference(path, features=features)
        assert (found.features, found.images) == (features, None)
        assert np.array_equal(found.statistics.mean.numpy(), own["mu"])
        assert np.array_equal(found.statistics.covariance.numpy(), own["sigma"])
    with pytest.raises(ValueError, match="holds statistics of the features dinov2 and inception, not of pixels"):
        open_reference(path, features="pixels")


def test_arrays_by_columns_numbers_of_numpy_and_a_plain_dictionary(tmp_path):
    own = statistics(5)
    content = {"num_images": np.int64(3), "fid": {**own, "sigma": np.asfortranarray(own["sigma"])}}
    assert np.array_equal(read_statistics(stored(tmp_path / "a.pkl", content))["inception"]["sigma"], own["sigma"])
    assert set(read_statistics(stored(tmp_path / "b.pkl", own))) == {"inception"}


class Evil:
    def __reduce__(self):
        return (Path("/tmp/never").touch, ())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (Evil(), "is a pickle of other things than statistics"),
        ({"fid": Evil()}, "is a pickle of other things than statistics"),
        ({"ema": 1}, "or a .pkl with fid or fd_dinov2, and it holds 'ema'"),
        ([1], "is a pickle; statistics are an .npz with mu and sigma, or a .pkl"),
        ({"fid": {"mu": np.zeros(3)}}, "fid has no array sigma"),
        ({"fid": {"mu": [0.0], "sigma": [[1.0]]}}, "fid has no array mu"),
        ({"fid": {"mu": np.zeros(3, complex), "sigma": np.eye(3)}}, "an array of the type 'c16'"),
        ({"fid": {"mu": np.array([None]), "sigma": np.eye(1)}}, "an array of the type 'O8'"),
        ({"fid": {"mu": np.zeros(3), "sigma": np.full((3, 3), np.nan)}}, "have non-finite entries"),
        ({"fid": {"mu": np.zeros(3), "sigma": np.eye(4)}}, "must be a mean"),
    ],
    ids=["program", "program inside", "network", "list", "half", "lists", "complex", "objects", "NaN", "shapes"],
)
def test_what_is_refused_runs_nothing_and_is_named(tmp_path, content, words):
    path = stored(tmp_path / "x.pkl", content)
    with pytest.raises(ValueError, match=words) as error:
        open_reference(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_network_in_the_place_of_statistics_is_called_one():
    with pytest.raises(ValueError, match=r"statistics: of a network, it seems; --reference is a"):
        open_reference(FIXTURES / "edm2_img_cond.pkl")


def test_a_file_that_is_cut(tmp_path):
    path = stored(tmp_path / "x.pkl", {"fid": statistics(6)})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is a pickle of other things than statistics"):
        open_reference(path)


# -- the features ------------------------------------------------------------------------------------------------------


class Script(nn.Module):
    """Means of the normalised picture's channels, and one of a corner."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.mean(dim=(2, 3)), x[:, :1, 0, 0]], 1)


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("dino") / "dino.pt"
    torch.jit.script(Script()).save(str(path))
    return path


def test_pictures_are_resized_and_normalised(script):
    features = DinoFeatures(script)
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    images[2, 0, 0, 0] = torch.nan
    pixels = (images[:2] * 127.5 + 128).clamp(0, 255).to(torch.uint8).float()
    large = F.interpolate(pixels, size=(224, 224), mode="bicubic", antialias=True)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (large / 255 - mean[:, None, None]) / std[:, None, None]
    found = features(images)
    assert (features.name, features.dim) == ("dinov2", 4)
    assert torch.allclose(found[:2], Script()(expected), atol=1e-5)
    assert found[2].isnan().all()
    grey = images[:2, :1]
    assert torch.allclose(features(grey), features(grey.expand(-1, 3, -1, -1)))


WIDTH, BLOCKS, PATCH = 64, 2, 56  # four patches a side


def weights(seed: int = 0, patches: int = 4) -> dict[str, torch.Tensor]:
    """By the names of the published file, of one with two blocks."""
    made = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=made) * 0.2

    found = {
        "cls_token": normal(1, 1, WIDTH),
        "pos_embed": normal(1, 1 + patches**2, WIDTH),
        "mask_token": normal(1, WIDTH),
        "patch_embed.proj.weight": normal(WIDTH, 3, PATCH, PATCH) / PATCH,
        "patch_embed.proj.bias": normal(WIDTH),
        "norm.weight": 1 + normal(WIDTH),
        "norm.bias": normal(WIDTH),
    }
    linear = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH)}
    linear |= {"mlp.fc1": (4 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 4 * WIDTH)}
    for block in range(BLOCKS):
        for name, shape in linear.items():
            found[f"blocks.{block}.{name}.weight"] = normal(*shape)
            found[f"blocks.{block}.{name}.bias"] = normal(shape[0])
        for name in ("norm1", "norm2"):
            found[f"blocks.{block}.{name}.weight"] = 1 + normal(WIDTH)
            found[f"blocks.{block}.{name}.bias"] = normal(WIDTH)
        for name in ("ls1", "ls2"):
            found[f"blocks.{block}.{name}.gamma"] = torch.ones(WIDTH)
    return found


def saved(place: Path, content: dict[str, torch.Tensor]) -> Path:
    torch.save(content, place)
    return place


def test_the_transformer_is_pytorchs_with_its_norms_first(tmp_path):
    """PyTorch's layer has no layer scale, which is 1 here; and then 0.5, by halving the projections."""
    own = weights()
    x = torch.randn(2, 3, 224, 224)
    patches = F.conv2d(x, own["patch_embed.proj.weight"], own["patch_embed.proj.bias"], stride=PATCH)
    y = torch.cat([own["cls_token"].expand(2, -1, -1), patches.flatten(2).transpose(1, 2)], 1) + own["pos_embed"]
    for block in range(BLOCKS):
        layer = nn.TransformerEncoderLayer(
            WIDTH, 1, 4 * WIDTH, 0.0, "gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
        )
        names = {
            "self_attn.in_proj_weight": "attn.qkv.weight", "self_attn.in_proj_bias": "attn.qkv.bias",
            "self_attn.out_proj.weight": "attn.proj.weight", "self_attn.out_proj.bias": "attn.proj.bias",
            "linear1.weight": "mlp.fc1.weight", "linear1.bias": "mlp.fc1.bias",
            "linear2.weight": "mlp.fc2.weight", "linear2.bias": "mlp.fc2.bias",
            **{f"{name}.{kind}": f"{name}.{kind}" for name in ("norm1", "norm2") for kind in ("weight", "bias")},
        }  # fmt: skip
        layer.load_state_dict({theirs: own[f"blocks.{block}.{ours}"] for theirs, ours in names.items()})
        y = layer(y)
    expected = F.layer_norm(y[:, 0], (WIDTH,), own["norm.weight"], own["norm.bias"], 1e-6)
    plain = VisionTransformer(open_state_dict(saved(tmp_path / "a.pth", own)), torch.device("cpu"))(x)
    assert torch.allclose(plain, expected, atol=1e-4)
    halved = {name: value / 2 if "attn.proj" in name or "mlp.fc2" in name else value for name, value in own.items()}
    scaled = {name: value / 2 if "gamma" in name else value for name, value in own.items()}
    files = (saved(tmp_path / "b.pth", halved), saved(tmp_path / "c.pth", scaled))
    a, b = (VisionTransformer(open_state_dict(file), torch.device("cpu"))(x) for file in files)
    assert torch.allclose(a, b, atol=1e-4)


def test_the_position_embedding_of_larger_pictures_is_scaled(tmp_path):
    """As published, of 37 patches a side for pictures of 518; here of 9 for those of 504."""
    features = DinoFeatures(saved(tmp_path / "a.pth", weights(patches=9)))
    assert features.dim == WIDTH
    assert features(torch.zeros(2, 3, 8, 8)).isfinite().all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: {**found, "register_tokens": torch.zeros(1, 4, WIDTH)}, "is a DINOv2 with registers"),
        (lambda found: {"fc.weight": torch.zeros(2, 2)}, "holds no DINOv2"),
        (lambda found: {**found, "pos_embed": torch.zeros(1, 8, WIDTH)}, "holds no DINOv2"),
        (lambda found: {n: v for n, v in found.items() if n != "norm.bias"}, "has no norm.bias, expected"),
        (lambda found: {**found, "norm.bias": torch.zeros(3)}, r"has norm.bias of shape \(3,\), expected \(64,\)"),
    ],
    ids=["registers", "other", "places", "half", "shape"],
)
def test_weights_that_are_refused(tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        DinoFeatures(saved(tmp_path / "x.pth", change(weights())))


def test_files_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"does not exist.*: dinov2_vitl14_pretrain\.pth"):
        DinoFeatures(tmp_path / "x.pth")
    (tmp_path / "x.pth").write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"x\.pth"):
        DinoFeatures(tmp_path / "x.pth")
    torch.jit.script(nn.Flatten()).save(str(tmp_path / "flat.pt"))
    assert DinoFeatures(tmp_path / "flat.pt").dim == 3 * 224 * 224
    torch.jit.script(nn.Linear(3, 3)).save(str(tmp_path / "linear.pt"))
    with pytest.raises(ValueError, match=r"linear\.pt does not take images"):
        DinoFeatures(tmp_path / "linear.pt")


# -- together ----------------------------------------------------------------------------------------------------------


def test_a_distance_of_dinos_features_to_the_file(script, tmp_path):
    images = torch.rand(40, 3, 8, 8) * 2 - 1
    rows = DinoFeatures(script)(images).double()
    own = {"mu": rows.mean(0).numpy(), "sigma": rows.T.cov().numpy()}
    path = stored(tmp_path / "img64.pkl", {"num_images": 40, "fd_dinov2": own})
    cpu, shape = torch.device("cpu"), (3, 8, 8)
    comparison = open_comparison(path, shape, cpu, features="dinov2", dinov2=script)
    world = World(0, 1, cpu)
    evaluation = comparison.evaluation(world, images=40, batch=16)
    found = evaluation.measure(lambda first, count: images[first : first + count], world)
    assert found.name == "FD-DINOv2"
    assert found.distance == pytest.approx(0, abs=1e-6)
    assert found.in_words().startswith("FD-DINOv2 ")
    # Statistics say whose they are, or are taken for Inception's.
    save_statistics(tmp_path / "own.npz", evaluation.statistics, "dinov2")
    open_comparison(tmp_path / "own.npz", shape, cpu, features="dinov2", dinov2=script)
    np.savez(tmp_path / "edm.npz", **own)
    with pytest.raises(ValueError, match="does not say that its statistics are of dinov2"):
        open_comparison(tmp_path / "edm.npz", shape, cpu, features="dinov2", dinov2=script)
    with pytest.raises(ValueError, match="holds statistics of the features dinov2, not of inception"):
        open_reference(path)
    with pytest.raises(ValueError, match="features dinov2 needs --dinov2 FILE alone"):
        open_comparison(path, shape, cpu, features="dinov2")
    with pytest.raises(ValueError, match="dinov2 was given, but features is pixels"):
        open_comparison(path, shape, cpu, features="pixels", dinov2=script)
