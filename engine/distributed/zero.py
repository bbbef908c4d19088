"""Networks under DeepSpeed ZeRO: trained ones with their optimiser, and a frozen one that is sharded.

Two rules keep several engines right (wrong ones fail silently at some stages): an engine is called only for the network
that is trained at that moment, and every other use of a network goes through its plain module.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from ipfm.engine.averages import Decay
from ipfm.engine.config import Offload, Precision, Resolved, RunConfig, ZeroStage, check_sharding
from ipfm.engine.distributed.device import uses_gpu
from ipfm.engine.distributed.normalised_weights import NormalisedWeights
from ipfm.engine.distributed.precision import DTYPES, halve_storage
from ipfm.engine.distributed.single_process import (
    FIRST_SCALE,
    LEAST_SCALE,
    SCALE_WINDOW,
    LossScale,
    MasterEngine,
    UnshardedEngine,
    rounded,
)
from ipfm.engine.distributed.world import World, import_deepspeed
from ipfm.kernels import AdamEMA
from ipfm.kernels.adam import ema_entries
from ipfm.models import Precond
from ipfm.models.low_rank import is_low_rank, merge_into
from ipfm.models.weight_order import by_channel, keep_by_pixel
from ipfm.models.weight_order import by_pixel as to_by_pixel

# Elements a reduction bucket holds: DeepSpeed's own default reserves 2 GB an engine.
BUCKET_ELEMENTS = 10_000_000
# Smaller parameters are not sharded at stage 3: gathering them would cost more time than they cost memory.
PERSISTENT_ELEMENTS = 10_000
# Elements of several parameters that are gathered in one message: a network may have hundreds of small ones.
GATHERED_ELEMENTS = 1_000_000
# Adam's second decay.
BETA2 = 0.999


class TrainedNetwork:
    """A network with its optimiser under one DeepSpeed engine, or by itself: one process at stage 0 shares nothing.

    Call the object for the forward pass of the network being trained; use `.module` for everything else.

    Args:
        module: the network; float32 parameters on the run's device.
        settings: those of the run. Its stage: 0 replicates, 1 shards the optimiser's state, 2 gradients too, 3 weights
            too. Its precision: in bf16 and fp16 parameters and gradients have 16 bits, masters, EMA and state 32, and
            fp16 has a loss scale that adapts itself; at stage 0 on one process alone. Offload, Adam's epsilon and the
            gradient's largest norm.
        world: the run's processes.
        lr: learning rate before the first step.
        beta1: Adam's first decay; 0 needs no first moment.
        ema: names of the averages of the weights to keep, sharded like the rest of the optimiser's state; True keeps
            one without a name.
        rectified: Rectified Adam in place of Adam.
        beta2: Adam's second decay.
        followed: keep a network with the first of the averages at any time, `followed`; otherwise averages exist in the
            optimiser's state alone.
        logvar: the forward passes that are trained give the log-variance too, of a network that has one; what they
            leave out is not normalised.
        by_pixel: where DeepSpeed has the weights, in flat buffers at stages 1 and 2, they lie in the order of
            channels_last activations; not at stage 3, which hands them out anew at each use.

    A network with forced weight normalisation (EDM2) has plain weights in its parameters at any time, and masters in
    the optimiser's state, which `full` and `load` mean by "weight" and of which the EMA is: see `AdamEMA`.

    Raises:
        ValueError: 16 bits at stage 0 on several processes.
    """

    def __init__(
        self,
        module: Precond,
        settings: Resolved[RunConfig],
        *,
        world: World,
        lr: float,
        beta1: float,
        ema: bool | Sequence[str],
        rectified: bool = False,
        beta2: float = BETA2,
        followed: bool = False,
        logvar: bool = True,
        by_pixel: bool = False,
    ) -> None:
        config, stage, precision = settings.config, settings.stage, settings.precision
        check_sharding(stage, precision, config.offload, world.size)
        self.world = world
        self.stage = stage
        self.precision = precision
        self.averages = ("ema",) * ema if isinstance(ema, bool) else tuple(ema)
        """Names of the averages."""
        self._rates: dict[str, float | Tensor] = {}
        # Made before the engine rounds or shards the weights.
        self._followed = _frozen_copy(module, precision) if followed else None
        # As they are before the engine rounds them.
        self.exact_buffers = {n: buffer.detach().clone() for n, buffer in module.named_buffers()}
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._rule = NormalisedWeights(module, logvar=logvar)
        alone = stage == 0 and world.size == 1
        exact: dict[str, Tensor] = {}
        self._masters: dict[nn.Parameter, Tensor] = {}
        self._scale = LossScale(world.device) if alone and precision == "fp16" else None
        if precision != "fp32":
            if alone:
                self._masters = rounded(module, DTYPES[precision])
            else:
                exact = {n: p.detach().cpu().clone() for n, p in module.named_parameters()}
        self._by_pixel = keep_by_pixel(module) if by_pixel and not alone and stage < 3 else frozenset()
        if precision == "fp32" and stage == 0:
            self._masters = {p: p.detach().clone() for p in self._rule.used}
        ordered = _by_alignment(self._parameters) if self._rule.used and stage > 0 else self._parameters
        self.optimizer = AdamEMA(
            [self._masters.get(p, p) for p in ordered],
            lr=lr,
            betas=(beta1, beta2),
            eps=config.eps,
            rectified=rectified,
            ema=len(self.averages),
            clip_norm=config.clip_grad,
        )
        if stage > 0 and world.size > 1:
            self.optimizer.sum_over_shards = self._sum_over_shards
        self.engine: Any
        if alone and self._masters:
            self.engine = MasterEngine(module, self.optimizer, self._masters, self._scale, self._rule.used)
        elif alone:
            self.engine = UnshardedEngine(module, self.optimizer)
        else:
            self.engine = _initialize(stage, precision, config.offload, module, self.optimizer)
        self.module: Precond = self.engine.module
        self._create_state()
        if self._rule.used:
            self._rule.begin(stage, self.engine, self.optimizer, self._masters, world)
        if precision == "fp16" and self._scale is None:
            # NaN that no scale explains is counted and reported like any other, not raised in the middle of a step.
            self.engine.optimizer.loss_scaler.raise_error_at_min_scale = False
        if exact:
            # Masters are made from the rounded weights: put the exact ones in their place.
            self.load("weight", exact)
            self.optimizer.restart_ema()
        self._follow()

    def __call__(self, *args: Any, **keywords: Any) -> Tensor:
        """Forward pass whose gradient this network's next `backward` takes."""
        return self.engine(*args, **keywords)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a scalar; averaged over the processes at the next `step`.

        Gradients of other tensors than the weights arrive multiplied by `loss_scale`.
        """
        self.engine.backward(loss)

    @property
    def loss_scale(self) -> float | Tensor:
        """What `backward` multiplies its loss by: 1 but in fp16. A 0-d tensor on one process at stage 0 in fp16."""
        if self._scale is not None:
            return self._scale.value
        return float(self.engine.optimizer.loss_scale) if self.precision == "fp16" else 1.0

    @property
    def rates(self) -> dict[str, float]:
        """Learning rate ("lr") and decay of the average ("ema_decay") of the last step; empty before it.

        Of several averages it is "ema_decay_" and the name.
        """
        return {name: float(rate) for name, rate in self._rates.items()}

    def step(self, *, lr: float | Tensor, ema_decay: Decay | Tensor = 0.0, grad_scale: Tensor | None = None) -> Tensor:
        """Update the weights from the gradients since the last step.

        Args:
            lr: learning rate of this step; as a tensor 0-d float64, which a replayed graph reads anew.
            ema_decay: decay of the average in this step, likewise; of several averages one for all, or one of each,
                1-d as a tensor.
            grad_scale: 0-d tensor that multiplies the averaged gradient.

        Returns:
            0-d bool tensor on the device: False when a non-finite gradient made the step void. In fp16 a loss scale
            that was too large, and is smaller now, is no such reason.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.ema_decay = ema_decay
        self._rates = {"lr": lr, **self._decays_by_name(ema_decay)}
        self.optimizer.grad_scale = grad_scale
        if self._scale is not None:
            to_blame = self._scale.value > 1
            self.engine.step()
            self._follow()
            applied = self.optimizer.applied
            assert applied is not None
            return applied | to_blame
        # Known on the host here.
        expected = self.precision == "fp16" and float(self.loss_scale) > 1.0
        with self._rule.stepping():
            self.engine.step()
        self._follow()
        if not self.engine.was_step_applied() or self.optimizer.applied is None:
            return torch.full((), expected, dtype=torch.bool, device=self.world.device)
        return self.optimizer.applied.to(self.world.device)

    def _decays_by_name(self, given: Decay | Tensor) -> dict[str, float | Tensor]:
        several = isinstance(given, tuple) or (isinstance(given, Tensor) and given.ndim > 0)
        decays = given if several else (given,) * len(self.averages)
        names = [f"ema_decay_{name}" for name in self.averages] if len(self.averages) > 1 else ["ema_decay"]
        return dict(zip(names, decays, strict=False))  # type: ignore[arg-type]

    @contextmanager
    def frozen(self) -> Iterator[Precond]:
        """The plain module with its parameters frozen: no weight gradient is computed or stored meanwhile."""
        for p in self._parameters:
            p.requires_grad_(False)
        try:
            yield self.module
        finally:
            for p in self._parameters:
                p.requires_grad_(True)

    # -- state, some parameters at a time, independent of stage and number of processes -----------------------------

    @property
    def state_kinds(self) -> tuple[str, ...]:
        """What is kept for each parameter: "weight" and the optimiser's entries."""
        entries = next(iter(self.optimizer.state.values()))
        return ("weight", *(kind for kind in ("exp_avg", "exp_avg_sq") if kind in entries), *self.average_kinds)

    @property
    def average_kinds(self) -> tuple[str, ...]:
        """The entries among `state_kinds` that are averages, in the order of their names."""
        return tuple(ema_entries(len(self.averages)))

    @property
    def parameter_count(self) -> int:
        """Numbers among the parameters, whole."""
        return sum(self._shape(p).numel() for p in self.module.parameters())

    def full(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's fp32 weight ("weight"), "exp_avg", "exp_avg_sq" or an average, whole and by name.

        Every process must run through it: the shards are gathered on the way.
        """
        if self.stage == 0:
            for name, p in self.module.named_parameters():
                master = self._masters.get(p, p)
                yield name, self._meant(p, master.detach() if kind == "weight" else self.optimizer.state[master][kind])
            return
        gather = self._gather_partitions if self.stage == 3 else self._gather_fragments
        names: list[str] = []
        parameters: list[Any] = []
        elements = 0
        for name, p in self.module.named_parameters():
            size = self._shape(p).numel()
            if parameters and elements + size > GATHERED_ELEMENTS:
                yield from zip(names, map(self._meant, parameters, gather(parameters, kind)), strict=True)
                names, parameters, elements = [], [], 0
            names.append(name)
            parameters.append(p)
            elements += size
        yield from zip(names, map(self._meant, parameters, gather(parameters, kind)), strict=True)

    def load(self, kind: str, tensors: Mapping[str, Tensor]) -> None:
        """Set what `full` gives. Every process passes the same tensors.

        Raises:
            ValueError: a parameter is missing or has another shape.
        """
        for name, p in self.module.named_parameters():
            if name not in tensors:
                raise ValueError(f"{kind} of parameter {name} is missing")
            shape = self._shape(p)
            if tensors[name].shape != shape:
                raise ValueError(
                    f"{kind} of parameter {name} has shape {tuple(tensors[name].shape)}, expected {tuple(shape)}"
                )
            value = tensors[name].to(self.world.device)
            self._set(p, kind, to_by_pixel(value) if p in self._by_pixel else value)
        if kind == "weight" and self._rule.used:
            self._rule.refresh()
        if kind in self.average_kinds:
            self._follow()

    @torch.no_grad()
    def load_buffers(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the buffers that are among `tensors`, by name; the others stay.

        Raises:
            ValueError: one has another shape.
        """
        for name, buffer in self.module.named_buffers():
            if name not in tensors:
                continue
            if tensors[name].shape != buffer.shape:
                raise ValueError(
                    f"buffer {name} has shape {tuple(tensors[name].shape)}, expected {tuple(buffer.shape)}"
                )
            for target in (buffer, self.exact_buffers[name]):
                target.copy_(tensors[name])

    @property
    def steps_applied(self) -> int:
        """Number of optimiser steps that changed the weights. Waits for the device."""
        assert self.optimizer.steps_applied is not None
        return int(self.optimizer.steps_applied)

    @steps_applied.setter
    def steps_applied(self, count: int) -> None:
        assert self.optimizer.steps_applied is not None
        self.optimizer.steps_applied.fill_(count)

    @property
    def loss_scale_state(self) -> dict[str, float]:
        """What the loss scale of fp16 remembers; empty otherwise."""
        if self._scale is not None:
            return self._scale.state
        if self.precision != "fp16":
            return {}
        scaler = self.engine.optimizer.loss_scaler
        return {"scale": scaler.cur_scale, "steps": scaler.cur_iter, "last_overflow": scaler.last_overflow_iter}

    @loss_scale_state.setter
    def loss_scale_state(self, state: Mapping[str, float]) -> None:
        if self._scale is not None and state:
            self._scale.state = state
        elif self.precision == "fp16" and state:
            scaler = self.engine.optimizer.loss_scaler
            scaler.cur_scale = state["scale"]
            scaler.cur_iter, scaler.last_overflow_iter = int(state["steps"]), int(state["last_overflow"])

    @torch.no_grad()
    def copy_ema_to(self, net: nn.Module, which: str | None = None) -> None:
        """Write averaged weights into `net`, a plain network of the same architecture; averaged factors merged.

        Args:
            net: the network.
            which: name of the average; None takes the first one.
        """
        kind = self.average_kinds[0 if which is None else self.averages.index(which)]
        if is_low_rank(self.module):
            merge_into(net, self.module, dict(self.full(kind)))
            return
        targets, modules = dict(net.named_parameters()), dict(net.named_modules())
        for name, tensor in self.full(kind):
            # Of a layer with plain weights it is the average of the masters.
            layer = modules[name.rpartition(".")[0]]
            set_weight = getattr(layer, "set_master", targets[name].copy_)
            set_weight(tensor)

    @property
    def followed(self) -> Precond:
        """A network with the first average as it is now: frozen, in eval mode.

        Raises:
            RuntimeError: none is kept.
        """
        if self._followed is None:
            raise RuntimeError("no network follows this one")
        return self._followed

    @torch.no_grad()
    def _follow(self) -> None:
        """Bring `followed` up to date; every process calls it."""
        net = self._followed
        if net is None:
            return
        if self.stage > 0 or self._rule.used or self._by_pixel:
            self.copy_ema_to(net)
            return
        kind = self.average_kinds[0]
        averages = [self.optimizer.state[self._masters.get(p, p)][kind] for p in self.module.parameters()]
        torch._foreach_copy_(list(net.parameters()), averages)

    # -- what differs between the stages ----------------------------------------------------------------------------

    def _create_state(self) -> None:
        """All state exists from the start, so that it can be saved, loaded and averaged before the first step."""
        if self.stage == 3:
            # The optimiser's groups are filled during its step alone; there is one flat partition a group.
            groups, flat = self.optimizer.param_groups, self.engine.optimizer.fp32_partitioned_groups_flat
            assert len(groups) == len(flat)
            for group, partition in zip(groups, flat, strict=True):
                group["params"] = [partition]
            self.optimizer.create_state()
            for group in groups:
                group["params"] = []
            return
        self.optimizer.create_state()
        if self.stage > 0:
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _sum_over_shards(self, tensor: Tensor) -> None:
        # A shard in the host's memory is summed on the device, where the processes can talk.
        tensor.copy_(self.world.all_reduce_sum_(tensor.to(self.world.device)))

    def _meant(self, p: nn.Parameter, stored: Tensor) -> Tensor:
        """What a tensor of p's shape means that is stored as p is."""
        return by_channel(stored) if p in self._by_pixel else stored

    def _shape(self, p: Tensor) -> torch.Size:
        return p.ds_shape if self.stage == 3 else p.shape  # type: ignore[attr-defined]

    @torch.no_grad()
    def _gather_fragments(self, parameters: Sequence[Any], kind: str) -> list[Tensor]:
        """Stages 1 and 2: each process has some elements of some parameters, which sum up over zeros elsewhere."""
        sizes = [p.numel() for p in parameters]
        flat = torch.zeros(sum(sizes), device=self.world.device)
        for p, whole in zip(parameters, flat.split(sizes), strict=True):
            if (mapping := p._hp_mapping) is not None:
                place = mapping.lp_fragment_address
                fragment = mapping.get_hp_fragment(None if kind == "weight" else kind)
                whole[place.start : place.start + place.numel].copy_(fragment)
        self.world.all_reduce_sum_(flat)
        return [whole.clone().view(p.shape) for p, whole in zip(parameters, flat.split(sizes), strict=True)]

    @torch.no_grad()
    def _gather_partitions(self, parameters: Sequence[Any], kind: str) -> list[Tensor]:
        """Stage 3: each process has a part of every parameter, the last one's padded."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        parts = [
            safe_get_local_fp32_param(p) if kind == "weight" else safe_get_local_optimizer_state(p, kind)
            for p in parameters
        ]
        gathered = self.world.all_gather(torch.cat(parts)).split([part.numel() for part in parts], dim=1)
        return [
            whole.reshape(-1)[: p.ds_numel].clone().view(p.ds_shape)
            for p, whole in zip(parameters, gathered, strict=True)
        ]

    @torch.no_grad()
    def _set(self, p: Tensor, kind: str, value: Tensor) -> None:
        if self.stage == 3:
            self._set_shard(p, kind, value.float())
            return
        if kind == "weight":
            p.data.copy_(value)
        if self.stage == 0:
            master = self._masters.get(p, p)  # type: ignore[call-overload]
            (master if kind == "weight" else self.optimizer.state[master][kind]).data.copy_(value)
            return
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if kind == "weight":
            safe_set_full_fp32_param(p, value.float())
        else:
            safe_set_full_optimizer_state(p, value.float(), kind)

    def _set_shard(self, p: Any, kind: str, value: Tensor) -> None:
        """Stage 3: this process's part of `value`. DeepSpeed's own setters want it whole and without padding."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        size = p.ds_tensor.numel()
        padded = value.new_zeros(size * self.world.size)
        padded[: value.numel()] = value.flatten()
        shard = padded.narrow(0, size * self.world.rank, size)
        if kind != "weight":
            safe_set_local_optimizer_state(p, shard, kind)
            return
        safe_set_local_fp32_param(p, shard)
        p.ds_tensor.data.copy_(shard)
        if p.numel() == value.numel():
            # A small parameter that every process keeps whole.
            p.data.copy_(value)


def shard_frozen(module: Precond, *, offload: Offload = "none") -> Precond:
    """Distribute a frozen network's fp32 weights over the processes (ZeRO 3); its modules gather theirs at each use.

    Args:
        module: the network, on the run's device; its parameters are replaced.
        offload: "all" keeps the shards in the host's memory.

    Returns:
        The same module.
    """
    sharded: Precond = _initialize(3, "fp32", offload, module).module
    return sharded


def _frozen_copy(module: Precond, precision: Precision) -> Precond:
    """Another network that computes as `module`, kept as a frozen one in this precision is."""
    net = copy.deepcopy(module).eval().requires_grad_(False)
    return halve_storage(net, precision) if precision != "fp32" else net


def _by_alignment(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """First those of which 16 bytes of float32 are a divisor, in their order.

    In a flat tensor they then begin where 16 bytes do, for kernels that walk their rows; after a gain they would not.
    """
    return sorted(parameters, key=lambda p: p.numel() % 4 != 0)


def _initialize(
    stage: ZeroStage, precision: Precision, offload: Offload, module: Precond, optimizer: AdamEMA | None = None
) -> Any:
    """DeepSpeed's engine for the network, with its optimiser where it is trained."""
    deepspeed = import_deepspeed()
    trained: dict[str, Any] = {}
    if optimizer is not None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        trained = {"optimizer": optimizer, "model_parameters": parameters}
    scalars = _scalars_taken(module, stage, deepspeed.DeepSpeedEngine)
    with warnings.catch_warnings(), _sent_at_once(module, deepspeed.comm), scalars:
        warnings.simplefilter("ignore")
        engine, *_ = deepspeed.initialize(model=module, config=_engine_config(stage, precision, offload), **trained)
    for group in getattr(engine.optimizer, "round_robin_bit16_meta", []):
        # Stages 1 and 2 give the parameters these shapes after each step.
        shapes = [p.shape for p in engine.optimizer.round_robin_bit16_groups[0]]
        group[:] = [meta.view(shape) for meta, shape in zip(group, shapes, strict=True)]
    return engine


@contextmanager
def _sent_at_once(module: nn.Module, comm: Any) -> Iterator[None]:
    """Give every process the first one's weights in a few messages, and none of the hundreds that DeepSpeed sends.

    It has no setting for that: while the block lasts, its own broadcasts of weights, which it sends as bytes, are left
    out. Whatever else it may broadcast goes its way.

    Args:
        module: whose weights are sent.
        comm: DeepSpeed's module `deepspeed.comm`, by which it finds `broadcast`.
    """
    if dist.get_world_size() > 1:
        weights = [p.data for p in module.parameters()]
        dist._broadcast_coalesced(distributed_c10d._get_default_group(), weights, 4 * BUCKET_ELEMENTS, 0)
    one_by_one = comm.broadcast

    def but_for_weights(tensor: Tensor, *more: Any, **keywords: Any) -> Any:
        return None if tensor.dtype == torch.uint8 else one_by_one(tensor, *more, **keywords)

    comm.broadcast = but_for_weights
    try:
        yield
    finally:
        comm.broadcast = one_by_one


@contextmanager
def _scalars_taken(module: nn.Module, stage: ZeroStage, engine: Any) -> Iterator[None]:
    """Have DeepSpeed take parameters without a dimension, which it could not send as bytes: they have one meanwhile.

    Below stage 3 that is while it sends them. Afterwards its hooks make what accumulates a parameter's gradient, for
    the shape that it has then, and a cast of it in a forward pass would be refused a gradient of another.

    Args:
        module: the network that the block gives to DeepSpeed.
        stage: of ZeRO.
        engine: DeepSpeed's class of engines.
    """
    send = engine._broadcast_model

    def send_with_a_dimension(self: Any) -> None:
        with _with_a_dimension(module):
            send(self)

    if stage == 3:
        with _with_a_dimension(module):
            yield
        return
    engine._broadcast_model = send_with_a_dimension
    try:
        yield
    finally:
        engine._broadcast_model = send


@contextmanager
def _with_a_dimension(module: nn.Module) -> Iterator[None]:
    scalars: list[Any] = [p for p in module.parameters() if p.ndim == 0]
    for p in scalars:
        p.data = p.data.view(1)
    try:
        yield
    finally:
        for p in scalars:
            if hasattr(p, "ds_shape"):
                p.ds_shape = torch.Size()
            if p.numel():
                p.data = p.data.view(())


def _engine_config(stage: ZeroStage, precision: Precision, offload: Offload) -> dict[str, Any]:
    """DeepSpeed's settings; batch sizes only have to be present, since the trainer scales its losses itself."""
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
        "overlap_comm": False,
    }
    if stage == 3:
        # Weights are released as soon as they were used: by default DeepSpeed keeps up to 1e9 of them gathered.
        zero |= {
            "stage3_max_reuse_distance": 0,
            "stage3_max_live_parameters": 0,
            "stage3_prefetch_bucket_size": 0,
            # One flat tensor, however large: AdamEMA takes a step once.
            "sub_group_size": 2**62,
            "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS,
        }
    elif stage > 0 and precision != "fp16" and offload == "none":
        # AdamEMA judges the gradients on the device; DeepSpeed's own look at their norm would have the host wait.
        zero["compute_grad_norm"] = False
    pinned = uses_gpu()
    if offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
    if offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": pinned}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # Every step() ends the accumulation: the trainer counts its micro-batches itself.
        "managed_gradient_accumulation": False,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # DeepSpeed's default clips to norm 1; AdamEMA clips, the same way at every stage.
        "gradient_clipping": 0.0,
        "steps_per_print": 2**31,
        # It would wait for the device at each forward pass and step, to count samples that the trainer counts itself.
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": zero,
    }
    if precision == "bf16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": False}
    if precision == "fp16":
        config["fp16"] = {
            "enabled": True,
            "loss_scale": 0,
            "initial_scale_power": FIRST_SCALE.bit_length() - 1,
            "loss_scale_window": SCALE_WINDOW,
            "hysteresis": 1,
            "min_loss_scale": LEAST_SCALE,
        }
    return config
