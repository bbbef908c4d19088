"""An autoencoder of `diffusers` in a folder, small and with random weights: two pixels a side for each of a latent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

FACTOR = 2
NEEDED = "an autoencoder needs diffusers: pip install 'ipfm[latents]'"


def tiny_vae(folder: Path, seed: int = 0, **changes: object) -> Path:
    """Such a folder; the test is skipped where `diffusers` is not installed."""
    pytest.importorskip("diffusers", reason=NEEDED)
    from ipfm.models.autoencoder import _quiet

    with _quiet():
        from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    settings = {
        "block_out_channels": (4, 4),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 2,
        "sample_size": 16,
    }
    AutoencoderKL(**{**settings, **changes}).save_pretrained(folder)
    return folder


def old_names(folder: Path, *, two_dimensional: bool) -> None:
    """Rename its attention layers as diffusers before 0.17 did, as 1×1 convolutions or plain matrices, in a .bin."""
    file = folder / "diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    found = {}
    for name, value in load_file(file).items():
        for new, old in names.items():
            if f".attentions.0.{new}." in name:
                name = name.replace(f".{new}.", f".{old}.")
                if value.ndim == 2 and not two_dimensional:
                    value = value[:, :, None, None]
        found[name] = value
    file.unlink()
    torch.save(found, folder / "diffusion_pytorch_model.bin")


def change_config(folder: Path, **changes: object) -> None:
    """Other values in its config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder: Path, changed) -> None:
    """What `changed` makes of its weights, by name."""
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file(changed(load_file(file)), file)
