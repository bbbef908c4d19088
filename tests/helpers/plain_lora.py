"""Low-rank factors on frozen weights apart from the engine: autograd through W + s B A, each network with a W."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ipfm.engine import DistillConfig, Distiller
from ipfm.engine.commands.bench import plain_loop, plain_rule
from ipfm.kernels.adam import ema_entries
from ipfm.models import EDM2Precond, Precond
from ipfm.models.edm2_layers import MPConv
from ipfm.models.forced_weight_norm import under_the_rule
from ipfm.models.layers import Conv2d, Linear

# Settings of both networks with factors, and their s.
BOTH = {"student": "lora", "generator": "lora", "rank": 3, "lora_alpha": 6.0}
SCALE = 2.0
# Of a network's movement, not of its weights: factors begin at 0 and move by little.
LIMIT = 1e-4
# Of the weights, of a network without factors, which moves by little too.
ROUNDING = 5e-7


def with_factors(first: Mapping[str, Tensor], scale: float) -> Callable[[Precond], Precond]:
    """What gives a network factors, which alone are parameters then.

    Args:
        first: the factors at first, by name: "LAYER.lora_A" (r, ...), "LAYER.lora_B" (rows, r, ...).
        scale: s.
    """

    def trained(net: Precond) -> Precond:
        for path, layer in net.named_modules():
            for name, p in list(layer.named_parameters(recurse=False)):
                del layer._parameters[name]
                if name == "weight" and isinstance(layer, Conv2d | Linear | MPConv):
                    layer.lora_A = nn.Parameter(first[f"{path}.lora_A"].clone())
                    layer.lora_B = nn.Parameter(first[f"{path}.lora_B"].clone())
                    layer.register_buffer("W", p.detach(), persistent=False)
                    layer.register_forward_pre_hook(_sum(scale, rows_of_size_1=isinstance(layer, MPConv)))
                    layer.weight = p.detach()
                else:
                    layer.register_buffer(name, p.detach())
        return net

    return trained


def _sum(scale: float, *, rows_of_size_1: bool) -> Callable[[nn.Module, object], None]:
    def before(layer: nn.Module, _: object) -> None:
        a, b, w = layer.lora_A, layer.lora_B, layer.W
        rows = w.flatten(1) + scale * torch.einsum("or,rc->oc", b.flatten(1), a.flatten(1))
        if rows_of_size_1:
            rows = rows / (1e-4 + rows.square().sum(1, keepdim=True).sqrt())
        layer.weight = rows.view(w.shape)

    return before


def plain(
    config: DistillConfig, teacher: Precond, first: Mapping[str, Mapping[str, Tensor]], steps: int
) -> plain_loop.Plain:
    """The plain loop, with these factors at first where a network has any."""
    forms = [with_factors(first[role], SCALE) for role in ("student", "generator")]
    lora = iter(config.lora_of(role) is not None for role in ("student", "generator"))
    order = iter(forms)

    def trained(net: Precond) -> Precond:
        form = next(order)
        if next(lora):
            return form(net)
        return plain_rule.in_forward(net) if isinstance(net, EDM2Precond) else net

    return plain_loop.distill(teacher, config, steps, trained=trained, before_update=plain_rule.normalise_once)


def weights_of(run: Distiller) -> dict[str, dict[str, Tensor]]:
    """Of each network; masters as the rule leaves them before an update, so that it is no part of what a step moves."""
    return {
        role: {
            n: plain_rule.normalised(p) if n in under_the_rule(net.module) else p.clone() for n, p in net.full("weight")
        }
        for role, net in run.networks.items()
    }


def same(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], first: Mapping[str, Tensor]) -> bool:
    """Whether they differ by no more than `LIMIT` of how far the expected are from the start, and `ROUNDING`."""

    def size(of: Mapping[str, Tensor] | None) -> float:
        away = [p.detach() - (0 if of is None else of[n]) for n, p in expected.items()]
        return float(torch.stack([d.square().sum() for d in away]).sum().sqrt())

    return size(found) <= LIMIT * size(first) + ROUNDING * size(None)


def check_equals(
    expected: plain_loop.Plain,
    tensors: Mapping[str, Tensor],
    losses: Mapping[str, Tensor],
    first: Mapping[str, Mapping[str, Tensor]],
) -> None:
    kept = dict(zip(ema_entries(2), (expected.ema, *expected.others), strict=True))
    pairs = {"student/weight": dict(expected.student.named_parameters())}
    pairs |= {"generator/weight": dict(expected.generator.named_parameters())}
    pairs |= {f"generator/{kind}": average for kind, average in kept.items()}
    for key, those in pairs.items():
        found = {name: tensors[f"{key}/{name}"] for name in those}
        assert same(those, found, first[key.partition("/")[0]]), key
    for which in ("student", "generator"):
        named = torch.tensor(getattr(expected, f"{which}_loss")).double()
        torch.testing.assert_close(losses[f"{which}_loss"], named, rtol=1e-4, atol=1e-4)
