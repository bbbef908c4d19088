"""The networks of EDM2's fixtures, and the gradient of a master as the specification has it."""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ipfm.models import EDM2Precond, NetworkConfig, build_network
from ipfm.models.checkpoints.containers import map_file, read_container
from ipfm.models.checkpoints.pickle_values import DEFAULT_LIMITS, Inert
from ipfm.models.checkpoints.pickled_objects import GLOBALS, Record, modules, own_tensors
from ipfm.models.forced_weight_norm import row_scale

FIXTURES = Path(__file__).parents[1] / "fixtures"
# A network that is no fixture's, for everything else.
SMALL = NetworkConfig(
    img_resolution=8,
    img_channels=1,
    label_dim=3,
    model_type="EDM2UNet",
    model_channels=8,
    channel_mult=(1, 2),
    num_blocks=1,
    attn_resolutions=(4,),
    channels_per_head=8,
)
CONFIGS = {
    "edm2_img_cond": NetworkConfig(
        img_resolution=16,
        img_channels=3,
        label_dim=10,
        use_fp16=True,
        model_type="EDM2UNet",
        model_channels=4,
        channel_mult=(1, 2, 3),
        num_blocks=1,
        attn_resolutions=(8, 4),
        channels_per_head=4,
        dropout=0.1,
    ),
    "edm2_latent_uncond": NetworkConfig(
        img_resolution=8,
        img_channels=4,
        use_fp16=True,
        model_type="EDM2UNet",
        model_channels=4,
        channel_mult=(1, 2),
        num_blocks=1,
        attn_resolutions=(4,),
        channels_per_head=4,
        dropout=0.0,
    ),
}


class _Array(Inert):
    """What the encoder of a latent file holds: not looked at."""

    def set_state(self, state: object) -> None:
        """Nothing is kept."""


def _array(kind: object, shape: object, code: object) -> _Array:
    return _Array()


def recorded(name: str) -> dict[str, Tensor]:
    """The arrays of a fixture; text stays NumPy's."""
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return {
            key: value if value.dtype.kind == "U" else torch.from_numpy(np.array(value))
            for key, value in arrays.items()
        }


def masters_in_file(name: str) -> dict[str, Tensor]:
    """The state dict of a fixture's network as it is in the file, raised to float64."""
    table = {("numpy.core.multiarray", "_reconstruct"): _array, ("numpy", "ndarray"): "ndarray", **GLOBALS}
    path = FIXTURES / f"{name}.pkl"
    root = read_container(map_file(path), table, where=name, limits=DEFAULT_LIMITS).root
    assert isinstance(root, dict) and isinstance(root["ema"], Record)
    found: dict[str, Tensor] = {}
    for place, record in modules(root["ema"]):
        for tensors in own_tensors(record):
            found |= {f"{place}.{key}".strip("."): tensor.load().double() for key, tensor in tensors.items()}
    return found


def network(name: str, dtype: torch.dtype) -> EDM2Precond:
    """A fixture's network with plain weights, in eval mode."""
    net = build_network(CONFIGS[name]).to(dtype)
    net.load_state_dict(masters_in_file(name))
    assert isinstance(net, EDM2Precond)
    return net.eval()


def gradient_of_master(master: Tensor, gradient: Tensor) -> Tensor:
    """dL/dM of dL/dW, W = `plain_weight(M)`, as the specification has it for M that is normalised once.

    With r the root mean square of a row of K elements and s = 1e-4 + r: (G/s - M ⟨M, G⟩ / (K r s²)) / √K.
    """
    rows, given = master.flatten(1), gradient.flatten(1)
    elements = rows.shape[1]
    scale, size = row_scale(master)[:, None], rows.norm(dim=1, keepdim=True) / math.sqrt(elements)
    inner = (rows * given).sum(1, keepdim=True)
    # A row of zeros has no direction that could be suppressed.
    radial = torch.where(size > 0, inner / (elements * size * scale.square()), 0.0)
    return ((given / scale - rows * radial) / math.sqrt(elements)).view_as(master)
