"""What every objective has to keep, tried on a small teacher: for the tests of one of one's own."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ipfm.engine.averages import Decay
from ipfm.engine.data.real_images import BlankImages
from ipfm.engine.distributed.world import World
from ipfm.engine.objectives.base import Distillation, StepContext, check_objective_says
from ipfm.engine.objectives.initial_networks import starting_network, trained_config
from ipfm.models import Precond, build_network
from ipfm.models.low_rank import low_rank_network
from ipfm.models.precond import unguided

# Name of a role -> parameter -> gradient of the mean loss, of the updates of an iteration one after the other.
Gradients = Mapping[str, list[dict[str, Tensor]]]


class PlainNetwork:
    """A network in training without an optimiser, see `Trained`: an update keeps its gradient and changes nothing."""

    loss_scale = 1.0

    def __init__(self, module: Precond) -> None:
        self.module = module
        self.followed = copy.deepcopy(module).eval().requires_grad_(False)
        self.updates: list[dict[str, Tensor]] = []

    def __call__(self, *args: Any, **keywords: Any) -> Tensor:
        result: Tensor = self.module(*args, **keywords)
        return result

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, *, lr: float | Tensor, ema_decay: Decay | Tensor = 0.0, grad_scale: Tensor | None = None) -> Tensor:
        scale = 1.0 if grad_scale is None else grad_scale
        named = [(name, p) for name, p in self.module.named_parameters() if p.grad is not None]
        self.updates.append({name: p.grad * scale for name, p in named if p.grad is not None})
        self.module.zero_grad(set_to_none=True)
        return torch.ones((), dtype=torch.bool)

    @contextmanager
    def frozen(self) -> Iterator[nn.Module]:
        self.module.requires_grad_(False)
        yield self.module
        self.module.requires_grad_(True)


def check_objective(config: Distillation, teacher: Precond) -> Gradients:
    """Check an objective on one process of the CPU, by iterations of which none changes a weight.

    That an iteration is a function of its number alone, and micro-batches change nothing; that every network is
    updated, by a gradient that is finite and not 0; that what is stored with the result can be, and samples are images;
    that no tensor is read, which would make a GPU wait and a memory plan fail.

    Args:
        config: settings, with an even batch; dropout leaves micro-batches unchecked, as its masks depend on them.
        teacher: a small denoiser on the CPU. The networks that are trained begin a little away from its weights.

    Returns:
        The gradients of iteration 0, to be compared with those of the same loss by autograd.

    Raises:
        ValueError: one does not hold; a line that says which, and what is usually the reason.

    Example:
        >>> import torch
        >>> from ipfm.engine import DistillConfig
        >>> from ipfm.engine.objectives import check_objective
        >>> from ipfm.models import NetworkConfig, build_network
        >>> _ = torch.manual_seed(0)
        >>> network = NetworkConfig(
        ...     img_resolution=8, img_channels=1, model_channels=8, channel_mult=(1,), num_blocks=1, D=128.0
        ... )
        >>> gradients = check_objective(DistillConfig(batch=4), build_network(network))
        >>> {name: len(updates) for name, updates in gradients.items()}
        {'student': 1, 'generator': 1}
    """
    if config.batch % 2:
        raise ValueError(f"batch must be even, to be tried in two halves, got {config.batch}")
    config = replace(config, D=teacher.D, precision="fp32", zero=0, max_steps=10, kimg=None).completed(teacher.config)
    first, again = (_Trial(config, teacher, config.batch) for _ in range(2))
    # Those before it need not update every network.
    begin = config.planned_step
    losses = first.iterate(begin)
    _check_updates(first)
    if not _equal(losses, again.iterate(begin)):
        raise ValueError(
            "iteration 0 gives another loss or gradient the second time: a number is drawn by PyTorch's own "
            "generators; take perturb, philox, draw_labels, and seed_dropout before a network with dropout"
        )
    if not _equal(first.iterate(begin + 1), _Trial(config, teacher, config.batch).iterate(begin + 1)):
        raise ValueError(
            "iteration 1 depends on iteration 0 by more than the weights: what the steps keep between iterations is "
            "lost when a run goes on; make it of the step's number"
        )
    if config.dropout == 0 and not _equal(losses, _Trial(config, teacher, config.batch // 2).iterate(begin), rtol=1e-3):
        raise ValueError(
            "two micro-batches give another loss or gradient than the whole batch: divide each gradient by "
            "config.batch // world.size, draw by the index in the global batch, and take it as the mean over samples"
        )
    _check_result(again)
    _check_without_values(config, teacher)
    return {name: net.updates for name, net in again.networks.items()}


class _Trial:
    """An objective's steps on fresh networks."""

    def __init__(self, config: Distillation, teacher: Precond, micro_batch: int) -> None:
        trained = trained_config(teacher.config, config.dropout)
        self.objective = config.objective(trained)
        frozen = copy.deepcopy(teacher).eval().requires_grad_(False)
        self.networks = {
            role.name: PlainNetwork(
                _apart(starting_network(role.network, role.start, frozen, 0, lora=role.lora), role.seed(0))
            )
            for role in self.objective.roles
        }
        settings = config.laid_out(D=teacher.D, stage=0, micro_batch=micro_batch, phased=False, checkpointed=False)
        cpu = torch.device("cpu")
        real = BlankImages(teacher.config, cpu) if config.takes_real_images else None
        self.steps = self.objective.steps(StepContext(self.networks, frozen, settings, World(0, 1, cpu), real=real))

    def iterate(self, step: int) -> dict[str, Tensor]:
        """One iteration: sums of losses, and the gradients of each network, by name."""
        for net in self.networks.values():
            net.updates = []
        made = self.steps.iteration(step)
        return {**{name: value.float() for name, value in made.sums.items()}, **self._flat()}

    def _flat(self) -> dict[str, Tensor]:
        return {
            f"{name}, update {number}": torch.cat([g.flatten() for g in update.values()] or [torch.zeros(1)])
            for name, net in self.networks.items()
            for number, update in enumerate(net.updates)
        }


def _apart(net: Precond, seed: int) -> Precond:
    """The network a little away from its first weights, where gradients that cancel between two like ones do not."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return net


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor], *, rtol: float = 0.0) -> bool:
    """Whether they have the same names and values; `rtol`: by the largest one of each."""
    return one.keys() == other.keys() and all(
        a.shape == other[name].shape and bool((a - other[name]).abs().max() <= rtol * a.abs().max())
        for name, a in one.items()
    )


def _check_updates(trial: _Trial) -> None:
    for name, net in trial.networks.items():
        if not net.updates:
            raise ValueError(f"the network {name} is updated by no call of step: leave its role out, or update it")
        for update in net.updates:
            values = [g for g in update.values() if g is not None]
            if not values or not all(bool(torch.isfinite(g).all()) for g in values):
                raise ValueError(f"the gradient of the network {name} is {'not finite' if values else 'missing'}")
            if not any(bool(g.any()) for g in values):
                raise ValueError(f"the gradient of the network {name} is 0 everywhere: is its output detached?")


def _check_without_values(config: Distillation, teacher: Precond) -> None:
    """An iteration where nothing has a value, as plans make it: what reads one, or is made elsewhere, fails."""
    meta = torch.device("meta")
    trained = trained_config(teacher.config, config.dropout)
    objective = config.objective(trained)
    with meta:
        frozen = build_network(trained).eval().requires_grad_(False)
        networks = {
            role.name: PlainNetwork(
                build_network(role.network)
                if role.lora is None
                else low_rank_network(role.network, unguided(frozen), role.lora)
            )
            for role in objective.roles
        }
    settings = config.laid_out(D=teacher.D, stage=0, micro_batch=config.batch, phased=True, checkpointed=False)
    try:
        real = BlankImages(trained, meta) if config.takes_real_images else None
        steps = objective.steps(StepContext(networks, frozen, settings, World(0, 1, meta), real=real))
        steps.iteration(config.planned_step)
    except (RuntimeError, NotImplementedError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(
            f"iteration 0 fails on the meta device, where plans are made: {why}: read no tensor (item, float, if), and "
            "make tensors on world.device"
        ) from error


def _check_result(trial: _Trial) -> None:
    objective = trial.objective
    check_objective_says(objective)
    module = trial.networks[objective.generator].module.eval()
    with torch.no_grad():
        images = objective.sample(module, 0, 2, seed=0)
    wanted = (2, *module.config.image_shape)
    if tuple(images.shape) != wanted:
        raise ValueError(f"sample must return images of shape {wanted}, got {tuple(images.shape)}")
