"""EDM2's rule for weights as the paper writes it down, within the forward pass, for the plain loop.

A layer holds the master M and computes with n(M)/√K, K elements a row, and M is overwritten by n(M) in training
(Karras et al. 2024, section 2.3): autograd goes through the division. The engine does neither, see
`ipfm.models.forced_weight_norm`, and is compared with this.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ipfm.engine.commands.bench import plain_loop
from ipfm.engine.data.dataset import ImageDataset
from ipfm.engine.objectives.student_settings import StudentConfig
from ipfm.models import EDM2Precond, NetworkConfig, Precond, build_network
from ipfm.models.edm2_layers import MPConv
from ipfm.models.forced_weight_norm import masters

EDM2 = NetworkConfig(
    img_resolution=8, img_channels=1, label_dim=3, model_type="EDM2UNet", model_channels=8, channel_mult=(1, 2),
    num_blocks=1, attn_resolutions=(4,), channels_per_head=8, logvar_channels=0, D=16.0,
)  # fmt: skip


def normalised(master: Tensor) -> Tensor:
    """n(M), written out: each row over 1e-4 + its root mean square."""
    norm = master.flatten(1).norm(dim=1).view(-1, *[1] * (master.ndim - 1))
    return master / (1e-4 + norm / math.sqrt(master[0].numel()))


class RuleInForward(nn.Module):
    """A layer as the reference has it: it holds the master, overwrites it in training, and normalises at each use.

    Args:
        layer: one of a network of EDM2.
        master: its master; copied.
    """

    def __init__(self, layer: MPConv, master: Tensor) -> None:
        super().__init__()
        self.kernel, self.in_channels = layer.kernel, layer.in_channels
        self.num_heads = int(getattr(layer, "num_heads", 0))
        self.weight = nn.Parameter(master.clone())
        self.overwrites = True

    def forward(self, x: Tensor, gain: Tensor | float | None = None) -> Tensor:
        """As `ipfm.models.edm2_layers.MPConv` and the layers made of it."""
        if self.training and self.overwrites:
            with torch.no_grad():
                self.weight.copy_(normalised(self.weight))
        weight = normalised(self.weight) * ((1 if gain is None else gain) / math.sqrt(self.weight[0].numel()))
        weight = weight.to(x.dtype)
        out = F.conv2d(x, weight, padding=self.kernel // 2) if self.kernel else F.linear(x, weight)
        if self.num_heads:
            # (head, channel, q|k|v) of a pixel, which the network takes as (q|k|v, head, channel) of a token.
            out = out.flatten(2).unflatten(1, (self.num_heads, -1, 3)).permute(0, 4, 3, 1, 2).flatten(2)
        return out


def with_rule_in_forward(net: EDM2Precond) -> EDM2Precond:
    """The network, each of whose layers becomes one of `RuleInForward`; its parameters are the masters, in order."""
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, MPConv):
                setattr(parent, name, RuleInForward(child, child.master().detach()))
    return net


def compared_edm2_teacher() -> Precond:
    """A small conditional network of EDM2 whose masters have rows of different sizes, and gains that matter; D = 16."""
    torch.manual_seed(0)
    net = build_network(EDM2)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if not p.ndim:
                p.fill_(0.5 if "emb" in name else 1.0)
    scaled = {n: m * torch.rand(len(m), *[1] * (m.ndim - 1)).exp() for n, m in masters(net).items()}
    net.load_state_dict(scaled, strict=False)
    return net


def distill_edm2(
    teacher: Precond, config: StudentConfig, steps: int, real: ImageDataset | None = None
) -> plain_loop.Plain:
    """`plain_loop.distill` of such a teacher: the rule in the forward pass, masters normalised once an update."""
    return plain_loop.distill(teacher, config, steps, trained=in_forward, before_update=normalise_once, real=real)


def in_forward(net: Precond) -> Precond:
    """A network of EDM2 in the form in which `distill_edm2` trains it."""
    assert isinstance(net, EDM2Precond)
    inner = with_rule_in_forward(net)
    for layer in inner.modules():
        if isinstance(layer, RuleInForward):
            # Twice before one backward pass would fail: the first pass needs what the second overwrites.
            layer.overwrites = False
    return inner


@torch.no_grad()
def normalise_once(net: Precond) -> None:
    """What the rule does to masters before a forward pass."""
    for layer in net.modules():
        if isinstance(layer, RuleInForward):
            layer.weight.copy_(normalised(layer.weight))
