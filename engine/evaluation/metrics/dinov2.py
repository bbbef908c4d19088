"""Features of DINOv2, by which FD-DINOv2 compares images [Stein et al., arXiv 2306.04675], from a local file.

Pictures are resized to 224x224 and normalised as ImageNet's; the features are the output for the class token of the
vision transformer [Oquab et al., arXiv 2304.07193], ViT-L/14 without registers for published figures.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ipfm.engine.evaluation.metrics.features import is_program, last_line, levels, load_script
from ipfm.models.checkpoints.recognise import missing
from ipfm.models.checkpoints.state_dicts import StateDict, open_state_dict
from ipfm.models.full_float32 import full_float32

NAME = "dinov2"
WHERE_TO_GET_DINOV2 = (
    "dinov2_vitl14_pretrain.pth, the weights that Meta publishes with DINOv2, or a TorchScript network of images "
    "(B, 3, 224, 224), normalised, that gives (B, dim)"
)
SIDE = 224
# Of ImageNet's pictures, in [0, 1].
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HEAD_WIDTH = 64
_EPS = 1e-6
# Added to the number of patches before the position embedding is scaled to it, as in Hugging Face's transformers 4.41,
# whose figures of the published weights these are to be.
_OFFSET = 0.1


class DinoFeatures:
    """Features of DINOv2. It computes in float32, without TF32.

    Args:
        path: a TorchScript network, or the published weights (.pth, or the same names in .safetensors).
        device: where the network runs; images are taken from any device.

    Raises:
        ValueError: there is no such file, or it is neither; one line.
    """

    name = NAME

    def __init__(self, path: Path | str, device: torch.device | str = "cpu") -> None:
        self.path, self.device = Path(path), torch.device(device)
        self._net: Callable[[Tensor], Tensor]
        if not self.path.is_file():
            said = f"{self.path} is no file" if self.path.exists() else missing(self.path)
            raise ValueError(f"{said}: {WHERE_TO_GET_DINOV2}")
        if is_program(self.path):
            self._net = load_script(self.path, self.device, WHERE_TO_GET_DINOV2)
        else:
            self._net = VisionTransformer(open_state_dict(self.path), self.device)
        try:
            with torch.no_grad():
                found = self._net(torch.zeros(2, 3, SIDE, SIDE, device=self.device))
        except (RuntimeError, TypeError, ValueError, torch.jit.Error) as error:
            raise ValueError(
                f"{self.path} does not take images (B, 3, {SIDE}, {SIDE}): {last_line(error)}; {WHERE_TO_GET_DINOV2}"
            ) from None
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != 2 or not found.is_floating_point():
            raise ValueError(f"{self.path} gives no features (B, dim): {WHERE_TO_GET_DINOV2}")
        self.dim: int = found.shape[1]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """(B, 1 or 3, H, W) in [-1, 1] to (B, dim); a grey image counts as one of three equal channels.

        As in `InceptionFeatures` images become 8-bit pixels first, and one that is not finite has NaN as its features.

        Raises:
            ValueError: images of another shape.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images must have shape (B, 1 or 3, H, W), got {tuple(images.shape)}")
        images = images.detach().to(self.device, torch.float32)
        pixels = levels(images).expand(-1, 3, -1, -1).float()
        mean, std = (torch.tensor(values, device=self.device)[:, None, None] for values in (_MEAN, _STD))
        with full_float32():
            resized = F.interpolate(pixels, size=(SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False)
            found = self._net((resized / 255 - mean) / std)
        finite = torch.isfinite(images).flatten(start_dim=1).all(dim=1)
        return torch.where(finite[:, None], found, torch.nan)


class VisionTransformer:
    """The class token's output of DINOv2's vision transformer, of any width and depth.

    Args:
        stored: the weights, by the names of the published files.
        device: where it computes.

    Raises:
        ValueError: other tensors; one line that names the file.
    """

    def __init__(self, stored: StateDict, device: torch.device) -> None:
        if "register_tokens" in stored.shapes:
            raise ValueError(f"{stored.where} is a DINOv2 with registers; FD-DINOv2 is of one without")
        shape = stored.shapes.get("patch_embed.proj.weight", ())
        if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3] or SIDE % shape[2] or shape[0] % _HEAD_WIDTH:
            raise ValueError(f"{stored.where} holds no DINOv2: {WHERE_TO_GET_DINOV2}")
        dim, _, self._patch, _ = shape
        named = (re.match(r"blocks\.(\d{1,4})\.", name) for name in stored.shapes)
        self._depth = 1 + max((int(found[1]) for found in named if found), default=-1)
        self._heads = dim // _HEAD_WIDTH
        weights = {name: self._load(stored, name, shape) for name, shape in self._shapes(stored, dim).items()}
        self._weights = {name: value.to(device) for name, value in weights.items()}
        self._weights["pos_embed"] = _scaled(self._weights["pos_embed"], SIDE // self._patch)

    def _shapes(self, stored: StateDict, dim: int) -> Mapping[str, tuple[int, ...]]:
        hidden = (stored.shapes.get("blocks.0.mlp.fc1.bias") or (0,))[0]
        places = (stored.shapes.get("pos_embed") or (0, 0))[1]
        if self._depth < 1 or math.isqrt(max(0, places - 1)) ** 2 != places - 1:
            raise ValueError(f"{stored.where} holds no DINOv2: {WHERE_TO_GET_DINOV2}")
        found: dict[str, tuple[int, ...]] = {
            "cls_token": (1, 1, dim),
            "pos_embed": (1, places, dim),
            "patch_embed.proj.weight": (dim, 3, self._patch, self._patch),
            "patch_embed.proj.bias": (dim,),
            "norm.weight": (dim,),
            "norm.bias": (dim,),
        }
        linear = {
            "attn.qkv": (3 * dim, dim),
            "attn.proj": (dim, dim),
            "mlp.fc1": (hidden, dim),
            "mlp.fc2": (dim, hidden),
        }
        for block in range(self._depth):
            for name, (outside, inside) in linear.items():
                found[f"blocks.{block}.{name}.weight"] = (outside, inside)
                found[f"blocks.{block}.{name}.bias"] = (outside,)
            for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
                found[f"blocks.{block}.{name}"] = (dim,)
        return found

    def _load(self, stored: StateDict, name: str, shape: tuple[int, ...]) -> Tensor:
        if stored.shapes.get(name) != shape:
            has = f"{name} of shape {stored.shapes[name]}" if name in stored.shapes else f"no {name}"
            raise ValueError(f"{stored.where} has {has}, expected {shape}: {WHERE_TO_GET_DINOV2}")
        return stored.load(name)

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, 224, 224), normalised, to (B, dim)."""
        w = self._weights
        x = F.conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=self._patch)
        x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1) + w["pos_embed"]
        for block in range(self._depth):
            x = x + w[f"blocks.{block}.ls1.gamma"] * self._attention(self._norm(x, f"blocks.{block}.norm1"), block)
            y = self._linear(self._norm(x, f"blocks.{block}.norm2"), f"blocks.{block}.mlp.fc1")
            x = x + w[f"blocks.{block}.ls2.gamma"] * self._linear(F.gelu(y), f"blocks.{block}.mlp.fc2")
        return self._norm(x[:, 0], "norm")

    def _attention(self, x: Tensor, block: int) -> Tensor:
        qkv = self._linear(x, f"blocks.{block}.attn.qkv").unflatten(2, (3, self._heads, _HEAD_WIDTH))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self._linear(mixed, f"blocks.{block}.attn.proj")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self._weights[f"{name}.weight"], self._weights[f"{name}.bias"], _EPS)


def _scaled(places: Tensor, patches: int) -> Tensor:
    """The position embedding (1, 1 + n², dim) for `patches` a side in the place of n."""
    first, others = places[:, :1], places[:, 1:]
    side = math.isqrt(others.shape[1])
    if side == patches:
        return places
    grid = others.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    factor = (patches + _OFFSET) / side
    scaled = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic", align_corners=False)
    return torch.cat([first, scaled.flatten(2).transpose(1, 2)], 1)
