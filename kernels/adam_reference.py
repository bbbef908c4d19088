"""AdamEMA's step in PyTorch's operations: on a CPU torch's own fused Adam, elsewhere its foreach operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ipfm.kernels._dense import is_dense, same_order
from ipfm.kernels.adam_fused import Group, rho_inf
from ipfm.kernels.weight_rows import WeightRows, gradients_of_masters, write_plain

# Elements that the foreach form updates at a time: it bounds its temporaries, three of this size.
CHUNK = 2**24


def reference_step(
    groups: Sequence[Group],
    steps: Tensor,
    *,
    grad_scale: Tensor | None,
    clip_norm: float | None,
    ema_decay: Tensor | Sequence[float],
    sum_over_shards: Callable[[Tensor], object] | None,
    rows: Mapping[Tensor, WeightRows],
    cut_rows: int,
) -> Tensor:
    """As `FusedAdam.step`: update weights, state and `steps`, t, of parameters on one device. Overwrites gradients.

    Args:
        groups: the parameter groups that have gradients.
        steps: 0-d float64 tensor, t, changed in place.
        grad_scale: as in `AdamEMA`.
        clip_norm: as in `AdamEMA`.
        ema_decay: a decay for each average, numbers or a float64 tensor on the parameters' device.
        sum_over_shards: as in `AdamEMA`.
        rows: of the tensors with weights under the rule.
        cut_rows: rows that are cut, over all shards.

    Returns:
        0-d bool tensor: whether the step was applied.
    """
    under_the_rule = _under_the_rule(groups, rows, cut_rows, sum_over_shards) if rows else []
    grads = [grad for group in groups for grad in group.gradients]
    scale = torch.ones_like(steps) if grad_scale is None else grad_scale.to(steps)
    finite, scale = _judge(grads, scale, clip_norm, sum_over_shards)
    steps += finite
    # t = 0 only while every step so far was skipped, and then nothing is updated.
    t = steps.clamp(min=1)
    for masters, s in under_the_rule:
        masters.div_(torch.where(finite, s, torch.ones_like(s)))
    for group in groups:
        update = _update_by_torch if _torch_can(group) else _update
        update(group, scale, t, finite)
        dtype = group.columns[0][0].dtype
        for i, averages in enumerate(group.columns[3:]):
            share = (finite.double() * (1 - ema_decay[i])).to(dtype)
            torch._foreach_lerp_(averages, group.columns[0], [share] * len(averages))
    if rows:
        write_plain(rows, cut_rows, sum_over_shards)
    return finite


def _under_the_rule(
    groups: Sequence[Group],
    rows: Mapping[Tensor, WeightRows],
    cut_rows: int,
    sum_over_shards: Callable[[Tensor], object] | None,
) -> list[tuple[Tensor, Tensor]]:
    """Turn gradients of plain weights into those of their masters; see `gradients_of_masters` for the result."""
    masters, gradients = [], []
    for group in groups:
        for i, w in enumerate(group.columns[0]):
            if w in rows:
                if not same_order(group.gradients[i], w):
                    group.gradients[i] = torch.empty_like(w).copy_(group.gradients[i])
                masters.append(w.detach())
                gradients.append(group.gradients[i])
    own = [rows[w] for group in groups for w in group.columns[0] if w in rows]
    return gradients_of_masters(masters, gradients, own, cut_rows, sum_over_shards) if own else []


def _judge(
    grads: list[Tensor], scale: Tensor, clip_norm: float | None, sum_over_shards: Callable[[Tensor], object] | None
) -> tuple[Tensor, Tensor]:
    """0-d: whether the step can be taken, and the factor of the gradients, which brings them to `clip_norm` too."""
    filled = [grad for grad in grads if grad.numel()]
    found = torch.zeros(2, dtype=torch.float64, device=grads[0].device)
    if filled:
        # A square that overflows would leave v infinite for good; it makes the norm infinite.
        norms = torch.stack(torch._foreach_norm(filled))
        norms = norms * scale.to(norms)
        found[0] = ~torch.isfinite(norms * norms).all()
        found[1] = norms.double().square().sum()
    if sum_over_shards is not None:
        sum_over_shards(found)
    if clip_norm is None:
        return found[0] == 0, scale
    # A norm of 0 gives an infinite factor, of which 1 is taken.
    return (found[0] == 0) & torch.isfinite(found[1]), scale * (clip_norm / found[1].sqrt()).clamp(max=1.0)


def _torch_can(group: Group) -> bool:
    """Whether torch's fused Adam on a CPU takes the group: Adam, no division by 0, elements in one order in memory."""
    weights, *state = group.columns
    if weights[0].device.type != "cpu" or group.eps == 0 or group.rectified:
        return False
    if all(t.is_contiguous() for column in (weights, group.gradients, *state[:2]) for t in column):
        return True
    return all(is_dense(w) for w in weights) and all(
        same_order(t, w) for column in (group.gradients, *state[:2]) for t, w in zip(column, weights, strict=False)
    )


def _update_by_torch(group: Group, scale: Tensor, t: Tensor, finite: Tensor) -> None:
    weights, second, first, *_ = group.columns
    double = weights[0].dtype == torch.float64
    if double:
        # The factor that torch takes is a float32 one.
        torch._foreach_mul_(group.gradients, scale)
    torch._fused_adam_(
        weights,
        group.gradients,
        # At beta1 = 0 the first moment is the gradient, which may as well lie where it is.
        first or group.gradients,
        second,
        [],
        [t.float()] * len(weights),
        lr=group.lr,
        beta1=group.betas[0],
        beta2=group.betas[1],
        weight_decay=group.weight_decay,
        eps=group.eps,
        amsgrad=False,
        maximize=False,
        grad_scale=None if double else scale.reciprocal().float(),
        found_inf=(~finite).float(),
    )


def _update(group: Group, scale: Tensor, t: Tensor, finite: Tensor) -> None:
    beta1, beta2 = group.betas
    dtype = group.columns[0][0].dtype

    def unless_skipped(value: Tensor | float, otherwise: float) -> Tensor:
        return (otherwise + finite.to(torch.float64) * (value - otherwise)).to(dtype)

    torch._foreach_mul_(group.gradients, scale.to(dtype))
    skipped = ~finite
    for grad in group.gradients:
        grad.masked_fill_(skipped, 0)
    decay1, decay2 = unless_skipped(beta1, 1), unless_skipped(beta2, 1)
    correction = (1 - beta2**t).sqrt().to(dtype)
    rate = -group.lr / (1 - beta1**t)
    if group.rectified:
        factor = _rectification(t, beta2)
        plain = factor == 0
        rate = rate * torch.where(plain, 1.0, factor)
    rate = unless_skipped(rate, 0)
    columns = [column for column in (*group.columns[:3], group.gradients) if column]
    for weights, second, *rest in _chunks(columns):
        grads = rest[-1]
        if group.weight_decay:
            torch._foreach_add_(grads, torch._foreach_mul(weights, finite.to(dtype)), alpha=group.weight_decay)
        first = grads
        if beta1 > 0:
            first = rest[0]
            torch._foreach_mul_(first, decay1)
            torch._foreach_add_(first, grads, alpha=1 - beta1)
        torch._foreach_mul_(second, decay2)
        torch._foreach_addcmul_(second, grads, grads, value=1 - beta2)

        root = torch._foreach_sqrt(second)
        if not group.rectified:
            torch._foreach_div_(root, correction)
        torch._foreach_add_(root, group.eps)
        if group.rectified:
            for denominator in root:
                denominator.masked_fill_(plain, 1)
        # An element that never saw a gradient, or only ones whose squares vanish, divides by eps, which may be 0.
        update = torch._foreach_div(first, root) if group.eps else list(map(_ratio, first, root))
        torch._foreach_mul_(update, rate)
        torch._foreach_add_(weights, update)


def _rectification(t: Tensor, beta2: float) -> Tensor:
    """r_t sqrt(1 - beta2^t) of Rectified Adam [Liu et al. 2020, algorithm 2]: 0-d, 0 in a step without a denominator.

    Those are the steps with rho_t <= 5, where torch.optim.RAdam draws the line too; the paper has 4.
    """
    longest = rho_inf(beta2)
    rho = longest - 2 * t * beta2**t / (1 - beta2**t)
    square = (rho - 4) * (rho - 2) * longest / ((longest - 4) * (longest - 2) * rho)
    return torch.where(rho > 5, (square * (1 - beta2**t)).sqrt(), 0.0)


def _chunks(columns: list[list[Tensor]]) -> Iterator[list[list[Tensor]]]:
    """The columns, lists of tensors of the same shapes, in pieces of at most about `CHUNK` elements."""
    piece: list[list[Tensor]] = [[] for _ in columns]
    size = 0
    for row in zip(*columns, strict=True):
        # Whole rows, so that a piece keeps the strides of its tensor.
        length = len(row[0]) if row[0].ndim else 1
        rows = max(1, CHUNK * length // max(1, row[0].numel())) if row[0].numel() > CHUNK else length
        parts = zip(*(t.split(rows) if rows < length else (t,) for t in row), strict=True)
        for part in parts:
            if size and size + part[0].numel() > CHUNK:
                yield piece
                piece, size = [[] for _ in columns], 0
            for column, tensor in zip(piece, part, strict=True):
                column.append(tensor)
            size += part[0].numel()
    if size or piece[0]:
        yield piece


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator == 0, torch.zeros_like(numerator), numerator / denominator)
