"""What EDM2's training program stores of the parts of a network beside their tensors, and of its encoder.

Attributes and arguments of the classes are those of Karras et al. (2024); so are the means and deviations by which
latents are scaled.
"""

import math
from typing import Any

import numpy as np
from torch import nn

from ipfm.models.checkpoints.class_source import class_source
from ipfm.models.checkpoints.pickle_writer import Built, Call, Global
from ipfm.models.config import NetworkConfig
from ipfm.models.edm2_layers import MPConv, MPFourier
from ipfm.models.edm2_unet import EDM2Block, EDM2UNet
from ipfm.models.precond import EDM2Precond, Precond

OPTIONAL = ("conv_skip", "attn_qkv", "attn_proj", "emb_label", "logvar_fourier", "logvar_linear")
"""Parts that are None where a network does without; they are no modules then."""
_CLASSES: dict[type[nn.Module], str] = {
    EDM2Precond: "Precond",
    EDM2UNet: "UNet",
    EDM2Block: "Block",
    MPConv: "MPConv",
    MPFourier: "MPFourier",
}
_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "Precond": (),
    "UNet": ("label_balance", "concat_balance"),
    "Block": ("out_channels", "num_heads", "dropout", "res_balance", "attn_balance"),
    "MPConv": ("out_channels",),
    "MPFourier": (),
}
_SIZES = ("img_resolution", "img_channels", "label_dim", "use_fp16", "sigma_data")
_UNET = (
    *("model_channels", "channel_mult", "channel_mult_noise", "channel_mult_emb", "num_blocks", "attn_resolutions"),
    *("channels_per_head", "label_balance", "concat_balance", "dropout", "res_balance", "attn_balance"),
)
# Of the latents that the published encoder returns, by channel.
_LATENT_MEAN = (5.81, 3.25, 0.12, -2.15)
_LATENT_STD = (4.17, 4.62, 3.71, 3.28)


def class_name(module: nn.Module) -> str | None:
    """What EDM2 calls the class of a part; None of a part that it has not."""
    return next((name for kind, name in _CLASSES.items() if isinstance(module, kind)), None)


def attributes(module: nn.Module) -> dict[str, object]:
    """What an object of the class has besides its tensors and parts."""
    if isinstance(module, Precond):
        return {name: getattr(module.config, name) for name in _SIZES}
    found: dict[str, object] = {name: getattr(module, name) for name in _ATTRIBUTES[class_name(module) or ""]}
    return {**found, **_ways(module)} if isinstance(module, EDM2Block) else found


def arguments(module: nn.Module, config: NetworkConfig) -> tuple[tuple[int, ...], dict[str, object]]:
    """Arguments by which the class makes such an object: those without names, and the others."""
    if isinstance(module, Precond):
        return (), {**_architecture(config), **{name: getattr(config, name) for name in _SIZES}}
    if isinstance(module, EDM2UNet):
        sizes = {name: getattr(config, name) for name in _SIZES[:3]}
        return (), {**_architecture(config), **sizes}
    if isinstance(module, EDM2Block):
        own = {name: getattr(module, name) for name in ("dropout", "res_balance", "attn_balance")}
        given = {"attention": module.num_heads > 0, "channels_per_head": config.channels_per_head, **own}
        return (module.in_channels, module.out_channels, module.emb_channels), {**_ways(module), **given}
    if isinstance(module, MPConv):
        side = module.kernel
        return (module.in_channels, module.out_channels), {"kernel": [side, side] if side else []}
    assert isinstance(module, MPFourier)
    return (module.freqs.numel(),), {}


def encoder(net: Precond) -> Call:
    """The object that turns images into what the network takes: latents where it has 4 channels, else pixels."""
    said = {} if net.facts is None else net.facts.source
    latent = said.get("encoder", "latent" if net.img_channels == 4 else "pixel") == "latent"
    state: dict[str, object] = {"_init_args": (), "_init_kwargs": {}}
    if latent:
        scale = np.float32(0.5) / np.array(_LATENT_STD, np.float32)
        bias = -np.array(_LATENT_MEAN, np.float32) * scale
        state |= {"vae_name": "stabilityai/sd-vae-ft-mse", "scale": _array(scale), "bias": _array(bias)}
        state |= {"batch_size": 8, "_vae": None}
    name = "StabilityVAEEncoder" if latent else "StandardRGBEncoder"
    meta = {"type": "class", "version": 6, "module_src": class_source((name,)), "class_name": name, "state": state}
    return Call(Global("torch_utils.persistence", "_reconstruct_persistent_obj"), (meta,))


def _ways(block: EDM2Block) -> dict[str, object]:
    clip = block.clip_act
    return {
        "flavor": "enc" if block.encoder else "dec",
        "resample_mode": "up" if block.up else "down" if block.down else "keep",
        "resample_filter": [_whole(tap) for tap in block.resample_filter],
        "clip_act": None if math.isinf(clip) else _whole(clip),
    }


def _architecture(config: NetworkConfig) -> dict[str, object]:
    found = {name: getattr(config, name) for name in _UNET}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}
    clip = None if math.isinf(config.clip_act) else _whole(config.clip_act)
    return {**plain, "resample_filter": [_whole(tap) for tap in config.resample_filter], "clip_act": clip}


def _whole(number: float) -> float:
    return int(number) if number == int(number) else number


def _array(values: "np.ndarray[Any, np.dtype[np.float32]]") -> Built:
    """An array as NumPy pickles it; of versions before 2 too, which have its module under the older name."""
    dtype = Built(Call(Global("numpy", "dtype"), ("f4", False, True)), (3, "<", None, None, None, -1, -1, 0))
    made = Call(Global("numpy.core.multiarray", "_reconstruct"), (Global("numpy", "ndarray"), (0,), b"b"))
    return Built(made, (1, (len(values),), dtype, False, values.astype("<f4").tobytes()))
