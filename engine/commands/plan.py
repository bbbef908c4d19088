"""`ipfm plan`: the memory of a distillation or of a teacher's training, predicted."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ipfm.engine.commandline import user_input
from ipfm.engine.config import DistillConfig, Offload, TeacherConfig, ZeroStage
from ipfm.models import NetworkConfig


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Predict the memory of a distillation on each process, by part and by phase of a step.

    With --gpu-memory: the largest micro-batch, and the cheapest form of the step that fits.

    Example: ipfm plan --model cifar10-ncsnpp --batch 256 --ranks 8 --zero 2 --precision bf16 --gpu-memory 24
    """

    model: str
    """Network preset (or ncsnpp, ddpmpp, adm), a model folder, or a checkpoint of EDM, PFGM++ or SiD."""
    batch: int = 256
    """Global batch."""
    ranks: int = 1
    """Number of processes."""
    micro_batch: int | None = None
    """Images one process handles at a time. Default: what --gpu-memory allows, else its whole share of the batch."""
    zero: ZeroStage | None = None
    """ZeRO stage. Default: the lowest that fits; at least 1 in bf16 and fp16."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the networks."""
    offload: Offload = "none"
    """What lives in the host's memory."""
    teacher_storage: Literal["auto", "fp32", "half", "sharded"] = "auto"
    """How the frozen teacher is kept."""
    backward: Literal["auto", "joint", "phased"] = "auto"
    """Form of the generator's step."""
    activation_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Compute activations again on the way back."""
    steps: int = 1
    """K: evaluations of the generator."""
    student_updates: int = 1
    """Student updates per generator update."""
    teacher_training: bool = False
    """Plan the training of a teacher instead."""
    gpu_memory: float | None = None
    """Memory of one GPU in GB."""
    json: bool = False
    """Print JSON, in bytes."""

    def run(self) -> None:
        """Print the plan."""
        from ipfm.engine.memory import choose, choose_training, gpu_budget

        with user_input():
            if self.ranks < 1:
                raise ValueError(f"ranks must be at least 1, got {self.ranks}")
            if self.gpu_memory is not None and not self.gpu_memory > 0:
                raise ValueError(f"gpu-memory must be > 0, got {self.gpu_memory}")
            network = read_network(self.model)
            budget = None if self.gpu_memory is None else gpu_budget(self.gpu_memory * 1e9)
            if self.teacher_training:
                plan = choose_training(self._training(), network, ranks=self.ranks, budget=budget)
                accumulation, cost = self.batch // self.ranks // plan.micro_batch, 1 + plan.activation_checkpointing / 3
            else:
                choice = choose(self._distillation(), network, ranks=self.ranks, budget=budget)
                plan, accumulation, cost = choice.plan, choice.accumulation, choice.relative_cost
        if self.json:
            facts = {"accumulation": accumulation, "relative_cost": cost, "state": plan.state, "peak": plan.peak}
            print(json.dumps(asdict(plan) | facts, indent=1))
            return
        print(plan)
        print(f"{'micro-batch x accumulation':<34}{f'{plan.micro_batch} x {accumulation}':>12}")
        print(f"{'ZeRO stage':<34}{plan.parts.stage:>12}")
        print(f"{'arithmetic, relative':<34}{cost:>12.2f}")

    def _training(self) -> TeacherConfig:
        return TeacherConfig(
            batch=self.batch,
            micro_batch=self.micro_batch,
            zero=self.zero,
            precision=self.precision,
            offload=self.offload,
            activation_checkpointing=self.activation_checkpointing,
        )

    def _distillation(self) -> DistillConfig:
        return DistillConfig(
            batch=self.batch,
            micro_batch=self.micro_batch,
            zero=self.zero,
            precision=self.precision,
            offload=self.offload,
            activation_checkpointing=self.activation_checkpointing,
            steps=self.steps,
            student_updates=self.student_updates,
            teacher_storage=self.teacher_storage,
            backward=self.backward,
        )


def read_network(model: str) -> NetworkConfig:
    """The architecture that `model` names: a preset, a family of presets, a model folder or a checkpoint.

    Raises:
        ValueError: there is none.
    """
    from ipfm.models import presets, read_config
    from ipfm.models.checkpoint_import import open_checkpoint

    path = Path(model)
    if path.is_file():
        return open_checkpoint(path).read().config
    return read_config(path).network if path.is_dir() else presets.get(presets.FAMILIES.get(model, model))
