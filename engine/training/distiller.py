"""Distillation: the teacher and the networks that an objective trains."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import cast

from torch import Tensor

from ipfm.engine.config import ZeroStage
from ipfm.engine.distributed.compilation import set_execution
from ipfm.engine.distributed.ema import EmaNetwork
from ipfm.engine.distributed.precision import apply_precision, halve_storage
from ipfm.engine.distributed.world import World, start_world
from ipfm.engine.distributed.zero import TrainedNetwork, shard_frozen
from ipfm.engine.evaluation.evaluation import Evaluation, evaluate_teacher
from ipfm.engine.evaluation.metrics import FrechetResult
from ipfm.engine.evaluation.results import (
    EvaluationHistory,
    EvaluationRow,
    plot_convergence,
    read_results,
    write_results,
)
from ipfm.engine.memory import MemoryPlan, choose_layout, device_budget, plan_layout
from ipfm.engine.memory.live import bytes_in_use
from ipfm.engine.objectives.base import Distillation, Role, StepContext
from ipfm.engine.objectives.initial_networks import starting_network, trained_config
from ipfm.engine.objectives.step_metrics import StepMetrics
from ipfm.engine.sampling.samplers import nfe
from ipfm.engine.training.resolve import allow_tf32, resolve
from ipfm.engine.training.run import run_training
from ipfm.engine.training.run_folder import teacher_facts
from ipfm.models import NetworkConfig, Precond


class Distiller:
    """Distils a teacher into a generator, by the objective that the settings stand for.

    `DistillConfig` is inverse Poisson flow matching [IPFM, algorithms 1 and 2] and SiD, see `DistillSteps`. No data is
    used. Every random number is a function of (seed, step, sample), so that the number of processes and the micro-batch
    do not change what is computed; dropout alone, if there is any, is drawn for a micro-batch as a whole.

    Args:
        config: settings; what they leave open (D, precision) is filled in, see `.config`, and what memory decides is
            chosen for this device: the ZeRO stage, `.micro_batch`, `.backward`, `.activation_checkpointing`.
        teacher: the frozen denoiser; it is copied.
        evaluation: what the generator's samples are measured against; None measures nothing.
        dataset: name of the teacher's data ("cifar10", …), under which published results are looked up.
        world: the run's processes; joined or started when None.

    Raises:
        ValueError: D contradicts the teacher, the batch does not divide among the processes, or memory does not
            suffice.
    """

    def __init__(
        self,
        config: Distillation,
        teacher: Precond,
        *,
        evaluation: Evaluation | None = None,
        dataset: str = "",
        world: World | None = None,
    ) -> None:
        self.world = world or start_world()
        device = self.world.device
        self.network = teacher.config
        self.config = resolve(config, teacher.config, device)
        trained = trained_config(self.network, self.config.dropout)
        self.micro_batch, self.backward, self.activation_checkpointing = self._lay_out(trained)
        config = self.config
        assert config.D is not None and config.zero is not None and config.precision != "auto"
        self.D = config.D
        self.evaluation = evaluation
        self.dataset = dataset
        self.rows: list[EvaluationRow] = []
        self.first_step = 0
        self.objective = config.objective(trained)
        self.title = self.objective.title
        allow_tf32(config.tf32)
        # The caller's teacher, where it lies on this device, is the caller's to release.
        self.other_bytes = bytes_in_use(device, without=teacher) if config.profile_memory else 0

        self._facts = teacher_facts(teacher)
        self.networks: dict[str, TrainedNetwork] = {}
        for role in self.objective.roles:
            net = starting_network(role.network, role.start, teacher, role.seed(config.seed)).to(device)
            if role.name == self.objective.generator:
                # As they are before the engine rounds them.
                buffers = {name: buffer.detach().clone() for name, buffer in net.named_buffers()}
            self.networks[role.name] = self._train(role, net)
        self.generator = self.networks[self.objective.generator]
        self.averaged = EmaNetwork(self.generator, self._exported(), buffers, config.precision, device)
        self.teacher = self._stored(teacher)
        for module in (self.teacher, *(net.module for net in self.networks.values())):
            net = cast(Precond, module)
            net.activation_checkpointing = self.activation_checkpointing
            set_execution(net, memory_format=config.memory_format, compiled=config.compile, device=device)
        self.steps = self.objective.steps(
            StepContext(self.networks, self.teacher, self.micro_batch, self.backward == "phased", self.world)
        )

    def _train(self, role: Role, net: Precond) -> TrainedNetwork:
        """The network of a role under its optimiser."""
        config = self.config
        assert config.zero is not None and config.precision != "auto"
        return TrainedNetwork(
            apply_precision(net, config.precision),
            world=self.world,
            lr=role.lr,
            betas=(role.beta1, 0.999),
            eps=config.eps,
            ema=role.averaged,
            rectified=role.rectified,
            stage=config.zero,
            precision=config.precision,
            offload=config.offload,
            clip_norm=config.clip_grad,
        )

    def _exported(self) -> NetworkConfig:
        """Architecture of the result; its dropout is the teacher's again, as a record, for it is used without any."""
        role = next(role for role in self.objective.roles if role.name == self.objective.generator)
        used = replace(role.network, dropout=self.network.dropout, label_dropout=self.network.label_dropout)
        return self.network if used == self.network else used

    def _stored(self, teacher: Precond) -> Precond:
        """The run's own copy of the teacher, kept as `teacher_storage` says."""
        config = self.config
        assert config.precision != "auto"
        net = apply_precision(copy.deepcopy(teacher).to(self.world.device), config.precision)
        net.eval().requires_grad_(False)
        if config.teacher_storage == "half":
            halve_storage(net, config.precision)
        elif config.teacher_storage == "sharded":
            shard_frozen(net, offload=config.offload)
        return net

    def iteration(self, step: int) -> StepMetrics:
        """One update of every network of the objective; `step` counts from 0."""
        self.averaged.release()
        return self.steps.iteration(step)

    # -- looking at it ----------------------------------------------------------------------------------------------

    def sample(self, first: int, count: int, *, seed: int) -> Tensor:
        """Images first..first + count - 1 of `seed` from the averaged generator as last refreshed."""
        return self.objective.sample(self.average, first, count, seed=seed)

    def refresh(self) -> None:
        """Bring the averaged generator up to date. Every process must call it."""
        self.averaged.refresh()

    @property
    def average(self) -> Precond:
        """The averaged generator of the last `refresh`; the next step frees it."""
        return self.averaged.net

    def evaluate(self) -> FrechetResult | None:
        """Fréchet distance of the averaged generator's samples; None without an evaluation."""
        return None if self.evaluation is None else self._measure(self.evaluation)

    def _measure(self, evaluation: Evaluation) -> FrechetResult:
        return evaluation.measure(lambda first, count: self.sample(first, count, seed=evaluation.seed), self.world)

    def picture(self, count: int, seed: int) -> Tensor:
        """`count` images from fixed latents."""
        return self.sample(0, count, seed=seed)

    # -- a whole run ------------------------------------------------------------------------------------------------

    def run(self, path: Path | str) -> Precond:
        """Distil in the run folder `path`, or continue there.

        Leaves the averaged generator in path/generator and, with an evaluation, the table of results (results.txt,
        results.json) and the curve of convergence (convergence.png). A finished run is only read again.

        Returns:
            The averaged generator, on the run's device, in eval mode.

        Raises:
            ValueError: the folder belongs to another run.
            TrainingFailed, Interrupted: from the loop.
        """
        config, path = self.config, Path(path)
        about = {
            "task": "generator",
            "dataset": self.dataset,
            **config.recorded(),
            "D": config.to_json()["D"],
            **self.objective.facts,
        }
        folder, progress = run_training(
            self,
            config,
            path,
            kind="distill",
            facts=self._facts,
            export="generator",
            about=about,
        )
        if self.evaluation is not None:
            self.rows = self._conclude(folder.path, self.evaluation, progress.last)
        return self.average

    def _lay_out(self, network: NetworkConfig) -> tuple[int, str, bool]:
        """(micro-batch, backward, activation checkpointing), and the ZeRO stage in `config`: as configured, or the
        cheapest that this device holds."""
        config = self.config
        _, micro = config.split(self.world.size)
        if None not in (config.micro_batch, config.zero) and "auto" not in (
            config.backward,
            config.activation_checkpointing,
        ):
            return micro, config.backward, config.activation_checkpointing == "on"
        plan = choose_layout(config, network, ranks=self.world.size, budget=device_budget(self.world.device)).plan
        self.config = replace(config, zero=cast(ZeroStage, plan.parts.stage))
        return plan.micro_batch, plan.backward, plan.activation_checkpointing

    def memory_plan(self) -> MemoryPlan:
        """The predicted memory of an iteration as it is laid out."""
        return plan_layout(
            replace(self.config, micro_batch=self.micro_batch),
            trained_config(self.network, self.config.dropout),
            ranks=self.world.size,
            phased=self.backward == "phased",
            activation_checkpointing=self.activation_checkpointing,
            budget=device_budget(self.world.device),
        )

    def _conclude(self, folder: Path, evaluation: Evaluation, last: FrechetResult | None) -> list[EvaluationRow]:
        """Write results.txt, results.json and convergence.png into the run folder; every process calls it.

        Args:
            folder: the run folder.
            evaluation: what samples are measured against.
            last: the generator's distance at the end; None when nothing was trained, then a table that is there stands.

        Returns:
            The rows of the table: teacher, generator.
        """
        known = read_results(folder)
        if known and last is None:
            return known
        teacher = evaluate_teacher(self.teacher, evaluation, self.world, D=self.D, steps=self.config.heun_steps)
        generator = last or self._measure(evaluation)
        # A published figure is an FID: nothing else compares with it.
        published = self.objective.published(self.dataset).get(self.D) if teacher.name == "FID" else None
        teachers = f"FID {published.teacher_fid:g}" if published and published.teacher_fid else None
        evaluations = self.objective.nfe
        rows = [
            _row("teacher", None, nfe(self.config.heun_steps, "heun"), teacher, teachers),
            _row("generator", evaluations, evaluations, generator, published and str(published)),
        ]
        if self.world.is_main:
            write_results(folder, rows)
            points = EvaluationHistory(folder).points
            plot_convergence(points, teacher.distance, folder / "convergence.png", self.title, teacher.name)
        self.world.barrier()
        return rows


def _row(label: str, steps: int | None, nfe: int, result: FrechetResult, paper: str | None) -> EvaluationRow:
    return EvaluationRow(
        label, steps, nfe, result.distance, result.images, result.images_per_second, paper, result.name
    )
