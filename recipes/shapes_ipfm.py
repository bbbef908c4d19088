"""Coloured shapes, 32x32, drawn from a seed: trains a teacher of any architecture on them and distils it to one step.

    deepspeed recipes/shapes_ipfm.py
    deepspeed recipes/shapes_ipfm.py --arch adm --channels 32 --conditional
    deepspeed recipes/shapes_ipfm.py --arch ncsnpp --full --dry-run

The data are 20 000 images of one to three discs, squares, triangles, rings, crosses and bars; the class of an image is
the kind of the shape in front. Nothing is downloaded. The networks are those of CIFAR-10 (ddpmpp, ncsnpp) and ImageNet
(adm), made so small that two CPU cores need some twenty minutes; --full takes them as they were published.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ipfm.engine import DistillConfig, TeacherConfig
from ipfm.engine.data.shapes import KINDS, shapes
from ipfm.engine.evaluation.metrics import BlockFeatures
from ipfm.engine.experiments import DistillationOptions, TrainAndDistil, run_command
from ipfm.models import NetworkConfig, presets

SIDE = 32
SMALL_CHANNELS = 16
PRESETS = {"ncsnpp": "cifar10-ncsnpp", "ddpmpp": "cifar10-ddpmpp", "adm": "imagenet64-adm-uncond"}


@dataclass(frozen=True, kw_only=True)
class ShapesOptions(DistillationOptions, DistillConfig):
    """Options of this recipe."""

    arch: Literal["ncsnpp", "ddpmpp", "adm"] = "ncsnpp"
    """Architecture of the teacher that is trained: NCSN++, DDPM++ or ADM."""
    channels: int | None = None
    """Its base width. Default: 16, or with --full that of the published network, 128 (adm: 192)."""
    full: bool = False
    """Train the published network, with all its levels and blocks; otherwise one block of each resolution."""
    conditional: bool = False
    """Train it with labels: the kind of the shape in front."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels is not None and self.channels < 1:
            raise ValueError(f"channels must be at least 1, got {self.channels}")
        for name in ("arch", "channels", "full", "conditional"):
            if self.teacher is not None and getattr(self, name) != getattr(ShapesOptions, name):
                raise ValueError(f"{name} was given, but the teacher says what the network is")


def network(options: ShapesOptions, D: float) -> NetworkConfig:
    """The teacher's network: that of the architecture's preset for these images, or a small one like it."""
    published = presets.get(PRESETS[options.arch], D=D)
    published = replace(published, img_resolution=SIDE, augment_dim=0)
    chosen = (
        published
        if options.full
        else replace(published, model_channels=SMALL_CHANNELS, channel_mult=(1, 2, 2), num_blocks=1)
    )
    return replace(
        chosen,
        model_channels=options.channels or chosen.model_channels,
        label_dim=len(KINDS) if options.conditional else 0,
    )


def name(options: ShapesOptions) -> str:
    """How the run folder's name begins: what is distilled, as far as the options say it."""
    if options.teacher is not None:
        return "shapes"
    width = options.channels or ("" if options.full else SMALL_CHANNELS)
    return f"shapes-{options.arch}{width}{'-full' * options.full}{'-cond' * options.conditional}"


RECIPE = TrainAndDistil(
    file="shapes_ipfm.py",
    about=__doc__ or "",
    name=name,
    title="shapes",
    data=lambda: shapes(20_000, side=SIDE),
    network=network,
    features=BlockFeatures,
    compared="of the means and deviations of 4x4 blocks of pixels",
    D=128.0,
    base=ShapesOptions(
        batch=64,
        max_steps=300,
        lr=3e-4,
        ema_kimg=10.0,
        ema_rampup=0.2,
        alpha=1.0,
        eval_every=50,
        eval_images=1000,
        checkpoint_every=100,
        heun_steps=9,
        teacher_steps=2400,
    ),
    training=TeacherConfig(batch=32, lr=2e-3, lr_rampup_kimg=6.4, ema_kimg=10.0, checkpoint_every=500),
)

main = RECIPE.main

if __name__ == "__main__":
    run_command(__file__, main)
