"""The autoencoder of latents: what it computes, in which folders it is found, and what is refused in one line."""

import builtins
import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_vae import FACTOR, change_config, change_weights, old_names, tiny_vae

from ipfm.engine.memory import autoencoder
from ipfm.engine.memory.live import LiveBytes
from ipfm.models import presets
from ipfm.models.autoencoder import BIAS, SCALE, is_latent, latents_of, load_autoencoder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return tiny_vae(tmp_path_factory.mktemp("vae") / "vae")


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(made, tmp_path / "vae"))


def test_scale_and_bias_are_those_of_edm2():
    assert torch.allclose(SCALE.flatten(), torch.tensor([0.11990407, 0.10822511, 0.13477089, 0.15243903]), atol=1e-8)
    assert torch.allclose(BIAS.flatten(), torch.tensor([-0.69664264, -0.3517316, -0.01617251, 0.32774392]), atol=1e-7)


def test_a_sample_of_the_posterior():
    encoded = torch.cat([torch.full((1, 4, 2, 2), 3.0), torch.full((1, 4, 2, 2), 0.5)], 1)
    noise = torch.randn(1, 4, 2, 2)
    assert torch.allclose(latents_of(encoded, noise), (3 + 0.5 * noise) * SCALE + BIAS)


def test_pixels_are_encoded_as_values_of_0_to_1_and_decoded_by_truncation(made):
    from diffusers import AutoencoderKL

    net = AutoencoderKL.from_pretrained(made).eval()
    autoencoder = load_autoencoder(made)
    pixels = torch.randint(256, (9, 3, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        posterior = net.encode(pixels.float() / 255).latent_dist
        raw = torch.randn(9, 4, 4, 4)
        decoded = (net.decode(raw).sample.clamp(0, 1) * 255).to(torch.uint8)
    encoded = autoencoder.encode(pixels)
    assert torch.allclose(encoded, torch.cat([posterior.mean, posterior.std], 1), atol=1e-6)
    shown = autoencoder.decode(raw * SCALE + BIAS)
    levels = (shown * 127.5 + 128).clamp(0, 255).to(torch.uint8)  # as pixels of every image here
    assert shown.shape == (9, 3, 4 * FACTOR, 4 * FACTOR)
    # A value that rounding moves over the edge of a level is one level off.
    assert (levels.int() - decoded.int()).abs().max() <= 1
    assert (levels == decoded).float().mean() > 0.99


def test_a_plan_counts_the_published_autoencoder():
    """Its parameters, and what lives while pictures are decoded: with fused attention, as on a GPU."""
    from diffusers import AutoencoderKL

    down, up = ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4
    with torch.device("meta"):
        net = AutoencoderKL(3, 3, down, up, (128, 256, 512, 512), 2, norm_num_groups=32, sample_size=256)
    assert sum(p.numel() for p in net.parameters()) == autoencoder.PARAMETERS
    planned = autoencoder.autoencoder_bytes(presets.get("edm2-img512-xs"))
    assert planned is not None and planned.side == 8 * 64
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch, LiveBytes() as live:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, *_, **__: torch.empty_like(q))
        net.decode(torch.empty(planned.pictures, 4, 64, 64, device="meta"))
    assert live.peak == pytest.approx(planned.decoding, rel=1e-3)


def test_a_latent_that_is_not_finite_is_no_picture_and_harms_no_other(made):
    latents = torch.zeros(3, 4, 4, 4)
    latents[1, 2, 0, 0] = float("nan")
    shown = load_autoencoder(made).decode(latents)
    assert shown.isnan().flatten(1).all(1).tolist() == [False, True, False]
    assert shown.isnan().flatten(1).any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("two_dimensional", [True, False], ids=["matrices", "convolutions"])
def test_attention_layers_of_old_names_in_a_bin(made, folder, two_dimensional):
    old_names(folder, two_dimensional=two_dimensional)
    latents = torch.randn(2, 4, 4, 4)
    assert torch.equal(load_autoencoder(folder).decode(latents), load_autoencoder(made).decode(latents))


def test_a_pipeline_and_the_hubs_cache_hold_one(made, tmp_path):
    cache = tmp_path / "models--stabilityai--sd-vae-ft-mse"
    for place in (tmp_path / "pipeline" / "vae", cache / "snapshots" / "31f26fdeee1355a5c34592e401dd41e45d25a493"):
        shutil.copytree(made, place)
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    assert load_autoencoder(tmp_path / "pipeline").path.name == "vae"
    assert load_autoencoder(cache).factor == FACTOR
    shutil.copytree(made, cache / "snapshots" / "other")
    with pytest.raises(ValueError, match=r"has 2 snapshots: give one of them, such as .*31f26"):
        load_autoencoder(cache)


def test_shapes(made):
    autoencoder = load_autoencoder(made)
    assert is_latent((4, 8, 8))
    assert not is_latent((3, 8, 8))
    assert autoencoder.shape_of_pictures((4, 8, 8)) == (3, 16, 16)
    with pytest.raises(ValueError, match="the images are 3x8x8, not latents of 4 channels: leave it out"):
        autoencoder.shape_of_pictures((3, 8, 8))


def said(folder: Path) -> str:
    with pytest.raises(ValueError) as error:
        load_autoencoder(folder)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_folders_that_hold_none(tmp_path, folder):
    assert "does not exist" in said(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "has no config.json: a VAE is the folder of an AutoencoderKL" in said(tmp_path / "empty")
    assert "is a file: a VAE is" in said(folder / "config.json")
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "is no safetensors file" in said(folder)
    weights.unlink()
    assert "lacks the weights, diffusion_pytorch_model.safetensors or .bin" in said(folder)
    (folder / "config.json").write_text("{")
    assert "config.json cannot be read" in said(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "its config.json is of a 'UNet2DConditionModel'"),
        ({"_class_name": None}, "its config.json is of nothing of diffusers"),
        ({"latent_channels": 16}, "has latent_channels 16; a VAE here makes 4 channels of latents from pictures of 3"),
        ({"in_channels": 1}, "has in_channels 1"),
        ({"block_out_channels": "wide"}, "block_out_channels must be a list of widths"),
        ({"norm_num_groups": 3}, "describes no AutoencoderKL"),
        ({"layers_per_block": 2}, "lacks "),
        ({"block_out_channels": [8, 4]}, "its config.json wants"),
    ],
    ids=["a U-Net", "no class", "16 channels", "grey", "widths", "groups", "layers", "another width"],
)
def test_configurations_that_are_refused(folder, changes, words):
    change_config(folder, **changes)
    assert words in said(folder)


def test_an_autoencoder_of_other_latents_is_remarked_on(made, folder):
    """SDXL's has 4 channels too, and makes colours of no picture of EDM2's latents."""
    assert load_autoencoder(made).remarks == ()
    change_config(folder, scaling_factor=0.13025)
    (said,) = load_autoencoder(folder).remarks
    assert said.startswith(f"{folder} has scaling_factor 0.13025, sd-vae-ft-mse 0.18215: EDM2's latents are of that")
    change_config(folder, scaling_factor=None)
    assert len(load_autoencoder(folder).remarks) == 1


def test_weights_that_are_not_of_the_configuration(folder):
    change_weights(folder, lambda found: {**found, "first_stage_model.conv_in.weight": torch.zeros(1)})
    assert "has the unknown 'first_stage_model.conv_in.weight'" in said(folder)
    change_weights(folder, lambda found: {n: v * float("nan") for n, v in found.items() if "first" not in n})
    assert "not finite" in said(folder)


def test_a_model_folder_of_this_project_is_no_vae(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"network": {}}))
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    assert "is no VAE" in said(tmp_path / "model")


def test_without_diffusers_the_extra_is_named(made, monkeypatch):
    plain = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "diffusers":
            raise ModuleNotFoundError("No module named 'diffusers'", name="diffusers")
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    text = said(made)
    assert "pip install 'ipfm[latents]'" in text
