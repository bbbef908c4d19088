"""Distillation: the teacher and the networks that an objective trains."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ipfm.engine.data.dataset import ImageDataset
from ipfm.engine.distributed.agreement import attempt
from ipfm.engine.distributed.pieces import CapturedPieces
from ipfm.engine.distributed.precision import apply_precision, halve_storage
from ipfm.engine.distributed.signals import StopRequested, catching_signals
from ipfm.engine.distributed.world import World, start_world
from ipfm.engine.distributed.zero import TrainedNetwork, shard_frozen
from ipfm.engine.evaluation.evaluation import Evaluation, evaluate_teacher
from ipfm.engine.evaluation.metrics import FrechetResult, Metric
from ipfm.engine.evaluation.metrics.measures import FID, measures_of
from ipfm.engine.evaluation.results import (
    Curve,
    EvaluationHistory,
    EvaluationRow,
    plot_convergence,
    read_results,
    write_results,
)
from ipfm.engine.memory import MemoryPlan, device_budget, plan_layout
from ipfm.engine.objectives.base import Distillation, Role, StepContext, check_objective_says
from ipfm.engine.objectives.captured import pieces_of
from ipfm.engine.objectives.initial_networks import starting_network, trained_config
from ipfm.engine.objectives.step_metrics import StepMetrics
from ipfm.engine.runtime.errors import Interrupted, described
from ipfm.engine.runtime.launcher import Launcher
from ipfm.engine.sampling.batches import sample_teacher
from ipfm.engine.sampling.samplers import nfe
from ipfm.engine.training.data_order import OrderedImages, real_facts, real_images
from ipfm.engine.training.loop import PICTURE_SEED
from ipfm.engine.training.resolve import resolve
from ipfm.engine.training.run import TrainingRun
from ipfm.engine.training.run_folder import teacher_facts
from ipfm.engine.training.start import DistillationStart, NetworkStart, start_facts
from ipfm.models import NetworkConfig, Precond
from ipfm.models.autoencoder import Autoencoder
from ipfm.models.facts import TeacherFacts, read_facts
from ipfm.models.teacher import check_teacher


class Distiller(TrainingRun[Distillation]):
    """Distils a teacher into a generator, by the objective that the settings stand for.

    `DistillConfig` is inverse Poisson flow matching [IPFM, algorithm 1] and SiD, see `DistillSteps`. No data is
    used, but for real images that are asked for. Every random number is a function of (seed, step, sample), so that the
    number of processes and the micro-batch do not change what is computed; dropout alone, if there is any, is drawn for
    a micro-batch as a whole.

    Args:
        config: settings; what they leave open (D, precision) is filled in, see `.config`, and what memory decides is
            chosen for this device: the ZeRO stage, `.micro_batch`, `.backward`, `.activation_checkpointing`.
        teacher: the frozen denoiser; it is copied.
        evaluation: what the generator's samples are measured against; None measures nothing.
        autoencoder: makes pictures of latents, see `TrainingRun`.
        dataset: name of the teacher's data ("cifar10", …), under which published results are looked up; that which the
            teacher's own file says where it is empty.
        start: what the networks begin with where they go on from another training; None begins with the teacher, as
            the settings say.
        real: images like the teacher's, where the settings ask for some (`real_weights`).
        world: the run's processes; joined or started when None.

    Raises:
        ValueError: D contradicts the teacher, `start` or `real` does not fit it, the batch does not divide among the
            processes, or memory does not suffice.

    Example:
        >>> from ipfm.engine import DistillConfig, Distiller
        >>> from ipfm.models import NetworkConfig, build_network
        >>> network = NetworkConfig(
        ...     img_resolution=8, img_channels=1, model_channels=8, channel_mult=(1,), num_blocks=1, D=128.0
        ... )
        >>> teacher = build_network(network).eval().requires_grad_(False)  # or load_teacher(path)
        >>> distiller = Distiller(DistillConfig(batch=4, max_steps=1), teacher)
        >>> losses = distiller.iteration(0).sums  # `distiller.run(folder)` is a whole run
        >>> sorted(losses)
        ['generator_loss', 'student_loss']
        >>> distiller.refresh()
        >>> distiller.sample(0, 2, seed=0).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        config: Distillation,
        teacher: Precond,
        *,
        evaluation: Evaluation | None = None,
        autoencoder: Autoencoder | None = None,
        dataset: str = "",
        start: DistillationStart | None = None,
        real: ImageDataset | None = None,
        world: World | None = None,
    ) -> None:
        check_teacher(teacher)
        world = world or start_world()
        settings = resolve(config, teacher.config, world)
        known = teacher.facts.dataset if isinstance(teacher.facts, TeacherFacts) else None
        self.network, self.dataset = teacher.config, dataset or known or ""
        self._begun = 0
        self._as_trained = trained_config(self.network, config.dropout)
        self.objective = settings.config.objective(self._as_trained)
        check_objective_says(self.objective, settings.config.low_rank_roles)
        real = real_images(settings.config, self.network, real)
        self._real = None if real is None else _ordered(real, settings.config, world)
        self.rows: list[EvaluationRow] = []
        super().__init__(settings, world, title=self.objective.title, evaluation=evaluation, autoencoder=autoencoder)
        # The caller's teacher, where it lies on this device, is the caller's to release.
        self._measure_other_bytes(without=teacher)
        self._facts = {**teacher_facts(teacher), **start_facts(start), **real_facts(real)}
        if start is not None:
            start.check(self.objective.roles)
            self.first_step = start.first_step(self.config.batch)
        begun = {} if start is None else start.networks
        self.teacher = self._execute_as_set(self._stored(teacher))
        self.networks = {r.name: self._in_training(r, teacher, begun.get(r.name)) for r in self.objective.roles}
        self.generator = self.networks[self.objective.generator]
        self.averaged = self._average_of(self.generator, self._exported())
        self._make_steps()

    @property
    def backward(self) -> str:
        """The form of the step: "joint" or "phased"."""
        return "phased" if self.settings.phased else "joint"

    def _in_training(self, role: Role, teacher: Precond, start: NetworkStart | None) -> TrainedNetwork:
        """The network of a role, as it starts, under its optimiser."""
        seed = role.seed(self.config.seed)
        # Factors are on the run's own teacher, as it is stored.
        source = teacher if role.lora is None else self.teacher
        net = starting_network(role.network, role.start, source, seed, lora=role.lora).to(self.world.device)
        if start is not None:
            start.put_into(net)
        trained = self._under_optimiser(
            net,
            lr=role.lr,
            beta1=role.beta1,
            ema=role.kept(self.config.average_names),
            rectified=role.rectified,
            followed=role.followed,
        )
        if start is not None:
            start.take_on(trained)
        return trained

    def _exported(self) -> NetworkConfig:
        """Architecture of the result; its dropout is the teacher's again, as a record, for it is used without any."""
        role = next(role for role in self.objective.roles if role.name == self.objective.generator)
        used = replace(role.network, dropout=self.network.dropout, label_dropout=self.network.label_dropout)
        return self.network if used == self.network else used

    def _stored(self, teacher: Precond) -> Precond:
        """The run's own copy of the teacher, kept as `teacher_storage` says."""
        settings = self.settings
        net = apply_precision(copy.deepcopy(teacher).to(self.world.device), settings.precision)
        net.eval().requires_grad_(False)
        if settings.teacher_storage == "half":
            halve_storage(net, settings.precision)
        elif settings.teacher_storage == "sharded":
            shard_frozen(net, offload=self.config.offload)
        return net

    @property
    def _profiled_until(self) -> int:
        """Steps of this process after which none is profiled."""
        profiled = self.config.profile_memory
        return profiled + self.config.planned_step if profiled else 0

    def _step(self, step: int) -> StepMetrics:
        self._begun += 1
        return self.steps.iteration(step)

    def _go_by(self, config: Distillation) -> None:
        super()._go_by(config)
        self.objective = self.config.objective(self._as_trained)
        self._make_steps()

    def _make_steps(self) -> None:
        """The objective's steps, and what runs their pieces."""
        pieces = pieces_of(
            self.settings,
            self._as_trained,
            self.networks,
            self.world,
            tell=self._tell,
            # Of a graph the profiler would hear no phases.
            ready=lambda: self._begun > self._profiled_until,
        )
        self.captures = isinstance(pieces, CapturedPieces)
        self.steps = self.objective.steps(
            StepContext(self.networks, self.teacher, self.settings, self.world, pieces, self._real)
        )

    def sample(self, first: int, count: int, *, seed: int) -> Tensor:
        """Images first..first + count - 1 of `seed` from the averaged generator as last refreshed."""
        return self.objective.sample(self.average, first, count, seed=seed)

    def memory_plan(self) -> MemoryPlan:
        """The predicted memory of an iteration as it is laid out."""
        budget = device_budget(self.world.device)
        return plan_layout(self.settings, self._as_trained, ranks=self.world.size, budget=budget)

    # -- a whole run ------------------------------------------------------------------------------------------------

    def run(self, path: Path | str) -> Precond:
        """Distil in the run folder `path`, or continue there.

        Leaves the averaged generator in path/generator, images of it beside the teacher's and the data's
        (comparison.png) and, with an evaluation, the table of results (results.txt, results.json) and the curve of
        convergence (convergence.png). A finished run is only read again.

        Returns:
            The averaged generator, on the run's device, in eval mode.

        Raises:
            ValueError: the folder belongs to another run.
            TrainingFailed, Interrupted: from the loop.
        """
        own = {"task": "generator", "dataset": self.dataset, **self.config.recorded(), "D": self.config.to_json()["D"]}
        outside = self.config.about()
        about = read_facts({**own, **self.objective.facts, **({"about": dict(outside)} if outside else {})})
        folder, progress = self._run(Path(path), kind="distill", facts=self._facts, export="generator", about=about)
        if self.evaluation is not None:
            with catching_signals(Launcher(self.world.launched)):
                try:
                    self.rows = self._conclude(folder.path, self.evaluation, progress.last, progress.averages)
                except StopRequested as asked:
                    raise Interrupted(asked.signum, folder.path) from None
        self._finish(folder.path, progress.step)
        self.average.facts = about
        return self.average

    @property
    def _compared(self) -> tuple[Mapping[str, Callable[[int, int], Tensor]], ImageDataset | None]:
        steps = self.config.heun_steps

        def teacher(first: int, count: int) -> Tensor:
            return sample_teacher(self.teacher, first, count, D=self.D, steps=steps, seed=PICTURE_SEED)

        def generator(first: int, count: int) -> Tensor:
            return self.sample(first, count, seed=PICTURE_SEED)

        networks = {
            f"teacher, {self._teacher_nfe} NFE": teacher,
            f"generator, {self.objective.nfe} NFE": generator,
        }
        return networks, None if self.evaluation is None else self.evaluation.data

    @property
    def _teacher_nfe(self) -> int:
        """Network evaluations of an image of the teacher, those of its guide included."""
        return nfe(self.config.heun_steps, "heun") * (1 if self.network.guide is None else 2)

    def _conclude(
        self,
        folder: Path,
        evaluation: Evaluation,
        last: FrechetResult | None,
        averages: Mapping[str, FrechetResult],
    ) -> list[EvaluationRow]:
        """Write results.txt, results.json and convergence.png into the run folder; every process calls it.

        Args:
            folder: the run folder.
            evaluation: what samples are measured against.
            last: what was measured of the generator at the end; None when nothing was trained, then a table that is
                there stands.
            averages: what was measured of each of several averages, one of which is the generator.

        Returns:
            The rows of the table: teacher, generator, averages; none, and a warning, where they cannot be measured.
        """
        known = read_results(folder)
        if known and last is None:
            if self.world.is_main and (remark := remark_on_metrics(folder, evaluation.metrics, known)):
                print(remark, file=sys.stderr)
            return known
        teacher, reason = attempt(
            lambda: evaluate_teacher(self.teacher, evaluation, self.world, D=self.D, steps=self.config.heun_steps),
            self.world.size,
        )
        generator = last
        if last is None and not reason:
            generator, reason = attempt(lambda: self._measure(evaluation), self.world.size)
        if teacher is None or generator is None:
            self._warn(f"no table of results: {reason}; the same command measures again")
            return []
        # A published figure is an FID: nothing else compares with it.
        settings = self.config.to_json()
        comparable = teacher.name == FID and "fid" in evaluation.metrics
        published = self.config.figure(self.dataset, settings, self.network) if comparable else None
        evaluations, heun = self.objective.nfe, self._teacher_nfe
        rows = [
            _row("teacher", None, heun, teacher, published and published.teacher(self.network, heun)),
            _row("generator", evaluations, evaluations, generator, published and str(published)),
            *(_row(name, evaluations, evaluations, found, None) for name, found in averages.items()),
        ]
        if self.world.is_main:
            self._write(folder, rows, teacher)
        self.world.barrier()
        return rows

    def _write(self, folder: Path, rows: list[EvaluationRow], teacher: FrechetResult) -> None:
        """The table and the curve, on the first process; what cannot be written is a warning."""
        try:
            write_results(folder, rows)
        except OSError as error:
            self._warn(f"the table of results cannot be written: {described(error)}")
        picture = folder / "convergence.png"
        try:
            history = EvaluationHistory(folder)
            first, *others = (
                Curve(history.points_of(measure.key), teacher.values[measure.key], measure.called(teacher.name))
                for measure in measures_of(teacher.metrics)
            )
            measure = measures_of(teacher.metrics)[0]
            others += [
                Curve(history.points_of(measure.key, name), teacher.values[measure.key], f"{first.name}, {name}")
                for name in history.averages
            ]
            plot_convergence(first.points, first.teacher, picture, self.title, first.name, others)
        except Exception as error:
            self._warn(f"no {picture}: {described(error)}")


def remark_on_metrics(folder: Path, metrics: Sequence[Metric], known: Sequence[EvaluationRow]) -> str:
    """A line where more is asked for than the table of a finished run has, which stands; else ""."""
    missing = [metric for metric in dict.fromkeys(metrics) if known and metric not in known[-1].metrics]
    if not missing:
        return ""
    return (
        f"ipfm: {folder} is finished, and its table has no {', '.join(missing)}: "
        f"ipfm evaluate {folder / 'generator'} --metrics {' '.join(missing)} ... measures it"
    )


def _ordered(data: ImageDataset, config: Distillation, world: World) -> OrderedImages:
    return OrderedImages(data.to(world.device), batch=config.batch, seed=config.seed, world=world)


def _row(label: str, steps: int | None, nfe: int, result: FrechetResult, paper: str | None) -> EvaluationRow:
    return EvaluationRow(
        label,
        steps,
        nfe,
        result.distance,
        result.images,
        result.images_per_second,
        paper,
        result.name,
        result.left_out,
        **result.others,
    )
