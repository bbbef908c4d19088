"""The processes of a run, and a network trained under DeepSpeed ZeRO.

DeepSpeed is imported here alone, and only when a process group is started. Two rules keep several engines right
(wrong ones fail silently at some stages): an engine is called only for the network that is trained at that moment, and
every other use of a network goes through its plain module.
"""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ipfm.kernels import AdamEMA

Precision = Literal["fp32", "bf16"]

# Elements a reduction bucket holds: DeepSpeed's own default reserves 2 GB an engine.
BUCKET_ELEMENTS = 10_000_000


@dataclass(frozen=True)
class World:
    """The processes of a run: this one's rank, their number, and this one's device."""

    rank: int
    size: int
    device: torch.device
    launched: bool = False
    """A launcher started this process."""

    @property
    def first(self) -> bool:
        """True on the one process that prints and writes."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every process."""
        if self.size > 1:
            dist.barrier()

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """Largest value of `tensor` over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor


def start_world() -> World:
    """Join the processes that a launcher (`deepspeed`, torchrun) started, or be the only one.

    Nothing is compiled: DeepSpeed's CPU communication extension serves inference only and is switched off.
    """
    single = "RANK" not in os.environ
    if single:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
        os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        _share_cores(int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", size))))
    _deepspeed()
    if not dist.is_initialized():
        import deepspeed

        deepspeed.init_distributed("nccl" if cuda else "gloo", verbose=False)
    return World(rank=rank, size=size, device=device, launched=not single)


def stop_world() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


class TrainedNetwork:
    """A network with its optimiser under one DeepSpeed engine.

    Call the object for the forward pass of the network being trained; use `.module` for everything else.

    Args:
        module: the network; float32 parameters on the run's device.
        world: the run's processes.
        lr, betas, eps: Adam's settings.
        ema: keep an average of the weights, sharded like the rest of the optimiser's state.
        stage: ZeRO stage 0, 1 or 2.
        precision: "fp32", or "bf16" (parameters and gradients in bf16, masters, EMA and state in fp32; stage >= 1).

    Raises:
        ValueError: a stage that is not offered, or bf16 at stage 0.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        world: World,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        ema: bool,
        stage: int = 0,
        precision: Precision = "fp32",
    ) -> None:
        if stage not in (0, 1, 2):
            raise ValueError(f"the ZeRO stage must be 0, 1 or 2, got {stage}")
        if precision == "bf16" and stage == 0:
            raise ValueError("bf16 needs ZeRO stage 1 or 2 (fp32 master weights live in its optimiser), got stage 0")
        deepspeed = _deepspeed()
        self.world = world
        self.stage = stage
        parameters = [p for p in module.parameters() if p.requires_grad]
        exact = {name: p.detach().clone() for name, p in module.named_parameters()} if precision == "bf16" else {}
        self.optimizer = AdamEMA(parameters, lr=lr, betas=betas, eps=eps, ema=ema)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=self.optimizer,
                model_parameters=parameters,
                config=_engine_config(stage, precision),
            )
        self.module: nn.Module = self.engine.module
        # All state exists from the start, so that it can be saved, loaded and averaged before the first step.
        self.optimizer.create_state()
        if stage > 0:
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()
        if exact:
            # Masters are made from the rounded weights: put the exact ones in their place.
            for name, p in self.module.named_parameters():
                self._set(p, "weight", exact[name])
            self.optimizer.restart_ema()

    def __call__(self, *args: Any, **keywords: Any) -> Tensor:
        """Forward pass whose gradient this network's next `backward` takes."""
        return self.engine(*args, **keywords)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a scalar; averaged over the processes at the next `step`."""
        self.engine.backward(loss)

    def step(self, *, lr: float, ema_decay: float = 0.0, grad_scale: Tensor | None = None) -> Tensor:
        """Update the weights from the gradients since the last step.

        Args:
            lr: learning rate of this step.
            ema_decay: decay of the EMA in this step.
            grad_scale: 0-d tensor that multiplies the averaged gradient.

        Returns:
            0-d bool tensor on the device: False when a non-finite gradient made the step void.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.ema_decay = ema_decay
        self.optimizer.grad_scale = grad_scale
        self.engine.step()
        if not self.engine.was_step_applied() or self.optimizer.applied is None:
            return torch.zeros((), dtype=torch.bool, device=self.world.device)
        return self.optimizer.applied

    @contextmanager
    def frozen(self) -> Iterator[nn.Module]:
        """The plain module with its parameters frozen: no weight gradient is computed or stored meanwhile."""
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        for p in parameters:
            p.requires_grad_(False)
        try:
            yield self.module
        finally:
            for p in parameters:
                p.requires_grad_(True)

    # -- state, a parameter at a time, independent of stage and number of processes ---------------------------------

    @property
    def state_kinds(self) -> tuple[str, ...]:
        """What is kept for each parameter: "weight" and the optimiser's entries."""
        entries = next(iter(self.optimizer.state.values()))
        return ("weight", *(kind for kind in ("exp_avg", "exp_avg_sq", "ema") if kind in entries))

    def full(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's fp32 weight ("weight"), "exp_avg", "exp_avg_sq" or "ema", whole and by name.

        Every process must run through it: the shards are gathered on the way.
        """
        for name, p in self.module.named_parameters():
            yield name, self._get(p, kind)

    def load(self, kind: str, tensors: Mapping[str, Tensor]) -> None:
        """Set what `full` gives. Every process passes the same tensors.

        Raises:
            ValueError: a parameter is missing or has another shape.
        """
        for name, p in self.module.named_parameters():
            if name not in tensors:
                raise ValueError(f"{kind} of parameter {name} is missing")
            if tensors[name].shape != p.shape:
                raise ValueError(
                    f"{kind} of parameter {name} has shape {tuple(tensors[name].shape)}, expected {tuple(p.shape)}"
                )
            self._set(p, kind, tensors[name].to(p.device))

    @property
    def steps_applied(self) -> int:
        """Number of optimiser steps that changed the weights. Waits for the device."""
        assert self.optimizer.steps_applied is not None
        return int(self.optimizer.steps_applied)

    @steps_applied.setter
    def steps_applied(self, count: int) -> None:
        assert self.optimizer.steps_applied is not None
        self.optimizer.steps_applied.fill_(count)

    @torch.no_grad()
    def copy_ema_to(self, net: nn.Module) -> None:
        """Write the averaged weights into `net`, a network of the same architecture."""
        targets = dict(net.named_parameters())
        for name, tensor in self.full("ema"):
            targets[name].copy_(tensor)

    def _get(self, p: Tensor, kind: str) -> Tensor:
        if self.stage == 0:
            return p.detach() if kind == "weight" else self.optimizer.state[p][kind]
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        return safe_get_full_fp32_param(p) if kind == "weight" else safe_get_full_optimizer_state(p, kind)

    @torch.no_grad()
    def _set(self, p: Tensor, kind: str, value: Tensor) -> None:
        if kind == "weight":
            p.data.copy_(value)
        if self.stage == 0:
            if kind != "weight":
                self.optimizer.state[p][kind].copy_(value)
            return
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if kind == "weight":
            safe_set_full_fp32_param(p, value.float())
        else:
            safe_set_full_optimizer_state(p, value.float(), kind)


def _engine_config(stage: int, precision: Precision) -> dict[str, Any]:
    """DeepSpeed's settings; batch sizes only have to be present, since the trainer scales its losses itself."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # Every step() ends the accumulation: the trainer counts its micro-batches itself.
        "managed_gradient_accumulation": False,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # DeepSpeed's default clips to norm 1.
        "gradient_clipping": 0.0,
        "steps_per_print": 2**31,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
            "overlap_comm": False,
        },
    }
    if precision == "bf16":
        config["bf16"] = {"enabled": True}
    return config


def _deepspeed() -> Any:
    """Import DeepSpeed quietly, with its CPU communication extension (a 50 s compilation) switched off."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    import deepspeed.ops as ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.WARNING)
    return deepspeed


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _share_cores(local_size: int) -> None:
    """Divide this machine's cores among its processes, unless the user has set a number."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // max(1, local_size)))
