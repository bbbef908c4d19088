"""What a training step needs beyond the permanent state: the engine's own step, run on the meta device and counted.

Nothing is computed and nothing allocated there, so that a batch of any size can be looked at; the code of the steps is
the one that trains. What is not seen is what single operations use within themselves (workspaces of convolutions).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ipfm.engine.averages import Decay
from ipfm.engine.config import Resolved, planned_settings
from ipfm.engine.data.real_images import BlankImages
from ipfm.engine.distributed.precision import DTYPES, apply_precision, halve_storage
from ipfm.engine.distributed.world import World
from ipfm.engine.memory.live import LiveBytes
from ipfm.engine.memory.state import Sharding
from ipfm.engine.objectives.base import Distillation, Role, StepContext
from ipfm.engine.objectives.ipfm import DistillConfig
from ipfm.engine.objectives.losses import add_noise, bind, denoising_objective
from ipfm.engine.objectives.phases import Phase, listening, mark
from ipfm.models import NetworkConfig, Precond, build_network
from ipfm.models.low_rank import low_rank_network
from ipfm.models.precond import unguided

META = torch.device("meta")
# Widths that stand for those of averages beside the first one.
STAND_INS = (0.05, 0.1, 0.15)


@dataclass(frozen=True)
class StepSettings:
    """What decides over the memory of a step."""

    network: NetworkConfig
    """The teacher's, as it is trained."""
    micro_batch: int
    sharding: Sharding
    phased: bool = False
    activation_checkpointing: bool = False
    keeps_gradients: bool = True
    """Gradients stay where they arise until the optimiser takes them. False: they are counted elsewhere, because they
    leave for their shard at once, or are there already from an earlier micro-batch."""
    config: Distillation = field(default_factory=DistillConfig)
    """What is distilled, and how; of no matter to a teacher's training."""
    held: int | None = None
    """Bytes that the steps keep beside those of the simulated micro-batch; below 0 where these are more. Default: what
    `config` says of a process's images."""

    def __post_init__(self) -> None:
        simulated = _all_that_matters(self.config, self.network, self.micro_batch, self.sharding)
        if self.held is None:
            of_all = self.config.held_bytes(self.network, -(-self.config.batch // self.sharding.ranks))
            # The simulation has those of a micro-batch by its own settings, which may be more.
            object.__setattr__(self, "held", of_all - simulated.held_bytes(self.network, self.micro_batch))
        # D changes no size: networks that differ in it alone share a simulation.
        object.__setattr__(self, "network", self.network.at(math.inf))
        object.__setattr__(self, "config", simulated)

    @classmethod
    def of(
        cls, settings: Resolved[Distillation], network: NetworkConfig, ranks: int, *, keeps_gradients: bool
    ) -> StepSettings:
        """Those of a step of a distillation on so many processes."""
        return cls(
            network,
            settings.micro_batch,
            Sharding.of(settings, ranks),
            settings.phased,
            settings.checkpointed,
            keeps_gradients,
            settings.config,
        )

    @property
    def resolved(self) -> Resolved[Distillation]:
        """What the steps themselves are told."""
        return self.config.laid_out(
            D=self.network.D,
            stage=self.sharding.stage,
            micro_batch=self.micro_batch,
            phased=self.phased,
            checkpointed=self.activation_checkpointing,
        )


def _all_that_matters(
    config: Distillation, network: NetworkConfig, micro_batch: int, sharding: Sharding
) -> Distillation:
    """One iteration on a micro-batch, in which what changes no size is as it is by default.

    What the rest of `StepSettings` says is as it says, or any value that goes with it.
    """
    return replace(
        config,
        # Of averages their number matters.
        **{**planned_settings(type(config)), "max_steps": 1, "ema": STAND_INS[: len(config.averages) - 1] or None},
        batch=micro_batch,
        micro_batch=None,
        zero=1,
        offload="none",
        precision=sharding.precision,
        teacher_storage=sharding.teacher_storage,
        backward="auto",
        activation_checkpointing="auto",
        cuda_graphs="off",
        dropout=network.dropout,
        # Labels of augmentation take memory, how often there are any does not matter.
        augment=0.5 if config.augment > 0 else 0.0,
    )


@functools.lru_cache(maxsize=256)
def simulate_distillation(settings: StepSettings) -> dict[Phase, int]:
    """Bytes above the permanent state at the peak of each phase of an iteration, without communication buckets."""
    resolved = settings.resolved
    objective = resolved.config.objective(settings.network)
    teacher = _meta_network(settings.network, settings, trained=False)
    context = StepContext(
        {
            role.name: _Trained(
                _trained_network(role, settings, teacher),
                settings,
                _meta_network(role.network, settings, trained=False) if role.followed else None,
            )
            for role in objective.roles
        },
        teacher,
        resolved,
        World(0, 1, META),
        real=BlankImages(settings.network, META) if resolved.config.takes_real_images else None,
    )
    with _peaks() as peaks:
        # What the steps hold beside the networks, such as those of a distance, is there in each phase.
        objective.steps(context).iteration(resolved.config.planned_step)
    return {phase: peak + (settings.held or 0) for phase, peak in peaks.items()}


@functools.lru_cache(maxsize=64)
def simulate_teacher(settings: StepSettings) -> dict[Phase, int]:
    """The same for a step of a teacher's training: the denoising loss and its optimiser."""
    net = _Trained(_meta_network(settings.network, settings, trained=True), settings)
    net.module.train()
    with _peaks() as peaks:
        mark("teacher: forward and backward")
        y = torch.empty(settings.micro_batch, *settings.network.image_shape, device=META)
        sigma = torch.empty(settings.micro_batch, device=META)
        index = torch.empty(settings.micro_batch, dtype=torch.int64, device=META)
        noisy = add_noise(y, sigma, math.inf, net.module, seed=0, stream=0, step=0, sample_index=index)
        result = denoising_objective(bind(net, None), y, noisy, sigma_data=0.5)
        net.backward(result.surrogate)
        mark("teacher: optimiser")
        net.step(lr=0.0)
    return peaks


@contextmanager
def _peaks() -> Iterator[dict[Phase, int]]:
    """The peak of each phase that is announced meanwhile."""
    peaks: dict[Phase, int] = {}
    current: list[Phase] = ["between steps"]
    with _efficient_attention(), LiveBytes() as live:

        def begin(phase: Phase) -> None:
            peaks[current[0]] = max(peaks.get(current[0], 0), live.peak)
            live.reset_peak()
            current[0] = phase

        with listening(begin):
            yield peaks
        begin("between steps")
        peaks.pop("between steps")


def _trained_network(role: Role, settings: StepSettings, teacher: Precond) -> Precond:
    if role.lora is None:
        return _meta_network(role.network, settings, trained=True)
    return _computing_as_set(low_rank_network(role.network, unguided(teacher), role.lora), settings, trained=True)


def _meta_network(network: NetworkConfig, settings: StepSettings, *, trained: bool) -> Precond:
    with META:
        net = build_network(network)
    return _computing_as_set(net, settings, trained=trained)


def _computing_as_set(net: Precond, settings: StepSettings, *, trained: bool) -> Precond:
    precision, storage = settings.sharding.precision, settings.sharding.teacher_storage
    net = apply_precision(net, precision)
    net.activation_checkpointing = settings.activation_checkpointing
    if trained:
        return net.to(DTYPES[precision])
    net.eval().requires_grad_(False)
    return halve_storage(net, precision) if storage == "half" else net


class _Trained:
    """A network in training without a DeepSpeed engine, and with the memory of one."""

    loss_scale = 1.0

    def __init__(self, module: Precond, settings: StepSettings, followed: Precond | None = None) -> None:
        self.module = module
        self.followed: Any = followed
        self._sharding = settings.sharding
        self._numbers = sum(p.numel() for p in module.parameters())
        if not settings.keeps_gradients:
            for p in module.parameters():
                p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

    def __call__(self, *args: Any, **keywords: Any) -> Tensor:
        return self.module(*args, **keywords)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, *, lr: float | Tensor, ema_decay: Decay | Tensor = 0.0, grad_scale: Tensor | None = None) -> Tensor:
        needed = torch.empty(self._sharding.update(self._numbers), dtype=torch.uint8, device=META)
        del needed
        for p in self.module.parameters():
            p.grad = None
        return torch.ones((), dtype=torch.bool, device=META)

    @contextmanager
    def frozen(self) -> Iterator[nn.Module]:
        self.module.requires_grad_(False)
        yield self.module
        self.module.requires_grad_(True)


@contextmanager
def _efficient_attention() -> Iterator[None]:
    """Attention on the meta device saves what the fused kernels of real devices save: no L x L logits."""
    real = F.scaled_dot_product_attention

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _SavedByAttention.apply(q, k, v) if q.is_meta else real(q, k, v)

    # Not by a TorchFunctionMode: none is active while a checkpointed block is computed again on the way back.
    F.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = real


class _SavedByAttention(torch.autograd.Function):
    """q, k, v (B, heads, L, d) -> a tensor like q; saves them, the result and a float32 number a query and head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:3], dtype=torch.float32, device=q.device))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor) -> Any:
        q, k, v, *_rest = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
