"""Distillation: the teacher, the student and the generator, and the two steps that train the latter two."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import cast

from torch import Tensor

from ipfm.engine.averaged import Averaged
from ipfm.engine.config import DistillConfig, ZeroStage
from ipfm.engine.evaluation import Evaluation
from ipfm.engine.execution import execute_as
from ipfm.engine.measure import Measured
from ipfm.engine.memory import MemoryPlan, choose, device_budget, plan_memory
from ipfm.engine.memory.live import bytes_in_use
from ipfm.engine.metrics import FrechetResult
from ipfm.engine.networks import teacher_facts, trainable_copy, trained_config
from ipfm.engine.precision import apply_precision, halve_storage
from ipfm.engine.report import EvaluationRow
from ipfm.engine.resolve import allow_tf32, resolve
from ipfm.engine.results import conclude
from ipfm.engine.runs import execute
from ipfm.engine.sampling import sample_generator
from ipfm.engine.steps import DistillSteps
from ipfm.engine.world import World, start_world
from ipfm.engine.zero import TrainedNetwork, shard_frozen
from ipfm.models import Precond


class Distiller:
    """Inverse Poisson flow matching of a teacher into a K-step generator [IPFM, algorithms 1 and 2].

    One iteration is `student_updates` student steps, then one generator step:

        student step    y = G(z), detached, augmented if asked; x = perturb(y, sigma); S descends the denoising loss
        generator step  y = G(z); x = perturb(y, sigma); G descends L(T(x), S(x), y) of IPFM eq. 21

    Student and generator start from the teacher's weights. No data is used. Every random number is a function of
    (seed, step, sample), so that the number of processes and the micro-batch do not change what is computed; dropout
    alone, if there is any, is drawn for a micro-batch as a whole.

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
        config: DistillConfig,
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
        self.micro_batch, self.backward, self.activation_checkpointing = self._lay_out()
        config = self.config
        assert config.D is not None and config.zero is not None and config.precision != "auto"
        self.D = config.D
        self.evaluation = evaluation
        self.dataset = dataset
        self.rows: list[EvaluationRow] = []
        self.first_step = 0
        self.title = f"distil D={self.D:g} alpha={config.alpha:g} K={config.steps}"
        allow_tf32(config.tf32)
        # The caller's teacher, where it lies on this device, is the caller's to release.
        self.other_bytes = bytes_in_use(device, without=teacher) if config.profile_memory else 0

        self._facts = teacher_facts(teacher)
        self.student, self.generator = (
            TrainedNetwork(
                apply_precision(trainable_copy(teacher, config.dropout).to(device), config.precision),
                world=self.world,
                lr=lr,
                betas=(beta1, 0.999),
                eps=config.eps,
                ema=ema,
                stage=config.zero,
                precision=config.precision,
                offload=config.offload,
                clip_norm=config.clip_grad,
            )
            for lr, beta1, ema in (
                (config.student_lr or config.lr, config.student_beta1, False),
                (config.lr, config.generator_beta1, True),
            )
        )
        buffers = {name: buffer.detach().to(device, copy=True) for name, buffer in teacher.named_buffers()}
        self.averaged = Averaged(self.generator, teacher.config, buffers, config.precision, device)
        self.teacher = self._stored(teacher)
        self.networks = {"student": self.student, "generator": self.generator}
        for module in (self.teacher, self.student.module, self.generator.module):
            net = cast(Precond, module)
            net.activation_checkpointing = self.activation_checkpointing
            execute_as(net, memory_format=config.memory_format, compiled=config.compile, device=device)
        self.steps = DistillSteps(
            config,
            student=self.student,
            generator=self.generator,
            teacher=self.teacher,
            network=self.network,
            D=self.D,
            micro_batch=self.micro_batch,
            phased=self.backward == "phased",
            world=self.world,
        )

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

    def iteration(self, step: int) -> Measured:
        """`student_updates` student steps, then the generator step; `step` counts from 0."""
        self.averaged.release()
        return self.steps.iteration(step)

    # -- looking at it ----------------------------------------------------------------------------------------------

    def sample(self, first: int, count: int, *, seed: int) -> Tensor:
        """Images first..first + count - 1 of `seed` from the averaged generator as last refreshed."""
        return sample_generator(self.average, first, count, D=self.D, sigmas=self.config.levels, seed=seed)

    def refresh(self) -> None:
        """Bring the averaged generator up to date. Every process must call it."""
        self.averaged.refresh()

    @property
    def average(self) -> Precond:
        """The averaged generator of the last `refresh`; the next step frees it."""
        return self.averaged.net

    def evaluate(self) -> FrechetResult | None:
        """Fréchet distance of the averaged generator's samples; None without an evaluation."""
        evaluation = self.evaluation
        if evaluation is None:
            return None
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
            "D": config.to_json()["D"],
            "sigmas": list(config.levels),
            "alpha": config.alpha,
        }
        folder, progress = execute(
            self,
            config,
            path,
            kind="distill",
            facts=self._facts,
            export="generator",
            about=about,
        )
        if self.evaluation is not None:
            self.rows = conclude(self, folder.path, self.evaluation, progress.last)
        return self.average

    def _lay_out(self) -> tuple[int, str, bool]:
        """(micro-batch, backward, activation checkpointing), and the ZeRO stage in `config`: as configured, or the
        cheapest that this device holds."""
        config = self.config
        _, micro = config.split(self.world.size)
        if None not in (config.micro_batch, config.zero) and "auto" not in (
            config.backward,
            config.activation_checkpointing,
        ):
            return micro, config.backward, config.activation_checkpointing == "on"
        network = trained_config(self.network, config.dropout)
        plan = choose(config, network, ranks=self.world.size, budget=device_budget(self.world.device)).plan
        self.config = replace(config, zero=cast(ZeroStage, plan.parts.stage))
        return plan.micro_batch, plan.backward, plan.activation_checkpointing

    def memory_plan(self) -> MemoryPlan:
        """The predicted memory of an iteration as it is laid out."""
        config = self.config
        assert config.precision != "auto" and config.zero is not None
        return plan_memory(
            trained_config(self.network, config.dropout),
            micro_batch=self.micro_batch,
            ranks=self.world.size,
            stage=config.zero,
            precision=config.precision,
            offload=config.offload,
            teacher_storage=config.teacher_storage,
            student_beta1=config.student_beta1,
            generator_beta1=config.generator_beta1,
            backward=self.backward,
            activation_checkpointing="on" if self.activation_checkpointing else "off",
            steps=config.steps,
            augment=config.augment > 0,
            accumulates=self.micro_batch * self.world.size < config.batch,
            budget=device_budget(self.world.device),
        )
