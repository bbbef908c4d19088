"""Networks that a run keeps along the way: snapshots, and the best of its evaluations, whatever ends the run."""

from __future__ import annotations

import errno
import json
import math
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import soak
import torch
from soak import Group, settings, wait_until

from ipfm.engine.config import TeacherConfig
from ipfm.engine.data.dataset import ImageDataset
from ipfm.engine.distributed.world import World
from ipfm.engine.evaluation.evaluation import Evaluation
from ipfm.engine.evaluation.metrics import FrechetResult, PixelFeatures, Statistics
from ipfm.engine.evaluation.results import is_better
from ipfm.engine.objectives.ipfm import DistillConfig
from ipfm.engine.runtime.errors import Interrupted
from ipfm.engine.sampling.stored_model import sample_model
from ipfm.engine.training import disk, snapshots
from ipfm.engine.training.checkpoint_writer import CheckpointWriter
from ipfm.engine.training.disk import disk_use, missing_room
from ipfm.engine.training.distiller import Distiller
from ipfm.engine.training.run_folder import release_folder
from ipfm.engine.training.snapshots import read_best, read_snapshots, snapshot_path
from ipfm.engine.training.task import NotFinite
from ipfm.engine.training.teacher import TeacherTraining
from ipfm.models import NetworkConfig, Precond, build_network, load_model
from ipfm.models.atomic_files import previous_of
from ipfm.models.store import read_config

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
NETWORK = NetworkConfig(
    img_resolution=4, img_channels=1, model_channels=4, channel_mult=(1,), num_blocks=1, attn_resolutions=(), D=64.0
)
EVALUATION = Evaluation(PixelFeatures((1, 4, 4)), Statistics(torch.zeros(16), torch.eye(16)), images=16, batch=16)


@pytest.fixture(scope="module")
def teacher() -> Precond:
    torch.manual_seed(0)
    return build_network(NETWORK).eval()


@pytest.fixture
def made(teacher: Precond, tmp_path: Path) -> Iterator[Callable[..., Distiller]]:
    """Makes a distillation of two steps between evaluations, whose distances may be given by step."""

    def make(distances: dict[int, float] | None = None, **given: Any) -> Distiller:
        release_folder(tmp_path)
        chosen = {"batch": 2, "max_steps": 8, "eval_every": 2, "checkpoint_every": 4, "log_every": 1, "heun_steps": 1}
        config = DistillConfig(**{**chosen, "zero": 0, "precision": "fp32", "ema_kimg": 1e-3, "lr": 1e-3, **given})
        distiller = Distiller(config, teacher, evaluation=EVALUATION, world=ALONE)
        if distances is not None:
            steps = iter(distances.items())
            measured = lambda: FrechetResult(next(steps)[1], 16, 0.1, 160.0)  # noqa: E731
            distiller.evaluate = measured  # type: ignore[method-assign]
        return distiller

    yield make
    release_folder(tmp_path)


def blow_up(distiller: Distiller, step: int) -> None:
    """From this step on the learning rate is far too large."""
    network, count = distiller.generator, [0]
    usual = network.step

    def apply(*, lr: float, **more: Any) -> torch.Tensor:
        count[0] += 1
        return usual(lr=lr if count[0] <= step else 1e30, **more)

    network.step = apply  # type: ignore[method-assign]


def best_of(run: Path) -> tuple[int, float]:
    found = read_best(run, "distill")
    assert found is not None and found.path == run / "generator-best"
    return found.step, found.distance


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


def weights(model: Path) -> dict[str, torch.Tensor]:
    return load_model(model).state_dict()


def same(one: Path, other: Path) -> bool:
    mine, theirs = weights(one), weights(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


# -- the best ----------------------------------------------------------------------------------------------------------


def test_a_run_that_diverges_hands_over_its_best_generator(made, tmp_path: Path) -> None:
    distiller = made(max_steps=40, max_bad_steps=2)
    blow_up(distiller, 6)
    with pytest.raises(NotFinite, match=r"can be continued from .*; best: step \d, [\d.]+: \S+/generator-best$"):
        distiller.run(tmp_path)
    assert not (tmp_path / "generator").exists()
    best = read_best(tmp_path, "distill")
    assert best is not None and best.step <= 6 and best.drawn == 16
    distances = {line["step"]: line["frechet"] for line in evaluations(tmp_path)}
    finite = [value for value in distances.values() if value is not None]
    assert len(distances) > 3 and best.distance == min(finite) == distances[best.step]
    again = EVALUATION.measure(
        sample_model(best.path, CPU, heun_steps=1, seed=EVALUATION.seed).draw, ALONE, leave_out=True
    )
    assert again.distance == pytest.approx(best.distance, rel=1e-6)


@pytest.mark.parametrize("background", [False, True])
def test_the_best_is_replaced_by_a_smaller_distance_alone(made, tmp_path: Path, background: bool) -> None:
    """Not by an equal one, and not by one that is not finite."""
    found = {2: 0.5, 4: 0.3, 6: math.nan, 8: 0.3, 10: math.inf, 12: 0.4}
    made(found, max_steps=12, snapshot_every=4, async_checkpoints=background).run(tmp_path)
    assert best_of(tmp_path) == (4, 0.3)
    assert same(tmp_path / "generator-best", snapshot_path(tmp_path, 4))
    assert not same(tmp_path / "generator-best", tmp_path / "generator")
    facts = read_config(tmp_path / "generator-best").facts
    assert facts.measured == {"metric": "Fréchet distance", "distance": 0.3, "images": 16}
    assert facts.optimizer_steps == 4


def test_which_of_two_distances_is_better() -> None:
    assert is_better(0.3, None) and is_better(0.3, 0.4) and is_better(0.3, math.nan)
    assert not is_better(0.4, 0.3) and not is_better(0.3, 0.3)
    assert not any(is_better(value, than) for value in (math.nan, math.inf, -math.inf) for than in (None, 0.3))


def test_a_run_without_an_evaluation_keeps_no_best(teacher, tmp_path: Path) -> None:
    config = DistillConfig(batch=2, max_steps=2, zero=0, precision="fp32", eval_every=1)
    Distiller(config, teacher, world=ALONE).run(tmp_path)
    release_folder(tmp_path)
    assert read_best(tmp_path, "distill") is None and not list(tmp_path.glob("*-best"))


def test_an_interrupted_run_names_its_best_and_a_resumed_one_goes_on_from_it(made, tmp_path: Path) -> None:
    first = made({2: 0.5, 4: 0.3})
    usual = first.iteration
    first.iteration = lambda step: (signal.raise_signal(signal.SIGTERM) if step == 4 else None, usual(step))[1]  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match=r"state saved in \S+; best: step 4, 0\.3000: \S+/generator-best"):
        first.run(tmp_path)
    made({6: 0.4, 8: 0.35}).run(tmp_path)
    assert best_of(tmp_path) == (4, 0.3)
    # Lengthened: what is better later replaces it.
    made({10: 0.4, 12: 0.2}, max_steps=12).run(tmp_path)
    assert best_of(tmp_path) == (12, 0.2)
    assert same(tmp_path / "generator-best", tmp_path / "generator")


def test_going_back_forgets_the_best_and_the_snapshots_that_came_after(made, tmp_path: Path) -> None:
    """What was the best before is found again among the snapshots and checkpoints that are left."""
    made({2: 0.5, 4: 0.3, 6: 0.4, 8: 0.1}, snapshot_every=2).run(tmp_path)
    assert best_of(tmp_path) == (8, 0.1)
    made({6: 0.6, 8: 0.5}, from_step=4, snapshot_every=2).run(tmp_path)
    assert best_of(tmp_path) == (4, 0.3)
    assert [found.step for found in read_snapshots(tmp_path)] == [2, 4, 6, 8]
    made({2: 0.7, 4: 0.8, 6: 0.9, 8: 0.95}, from_step=0).run(tmp_path)
    assert best_of(tmp_path) == (2, 0.7) and read_snapshots(tmp_path) == ()


def test_a_kill_while_the_best_is_replaced_leaves_the_old_one_or_the_new_one(made, tmp_path: Path, monkeypatch) -> None:
    made({2: 0.5, 4: 0.3}, max_steps=4).run(tmp_path)
    best = tmp_path / "generator-best"
    # Between the two renames, and with half of another one beside it.
    best.rename(previous_of(best))
    (tmp_path / ".generator-best.partial").mkdir()
    assert best_of(tmp_path) == (4, 0.3)
    made({6: 0.4}, max_steps=6).run(tmp_path)
    assert best.is_dir() and best_of(tmp_path) == (4, 0.3)
    assert not list(tmp_path.glob(".generator-best*"))
    # After the second of them.
    shutil.copytree(best, previous_of(best))
    made({8: 0.4}).run(tmp_path)
    assert best_of(tmp_path) == (4, 0.3) and not list(tmp_path.glob(".generator-best*"))


def test_a_disk_that_refuses_the_best_is_a_warning_and_the_old_one_stays(made, tmp_path: Path, monkeypatch, capsys):
    usual = snapshots.Snapshots._write

    def refusing(self, path: Path, what: str, **more: Any) -> None:
        store = self._task.stored(1, {}, copy=True)

        def fails(folder: Path) -> None:
            store(folder.with_name("elsewhere"))
            raise OSError(errno.ENOSPC, "No space left on device")

        if "step 4" in what:
            self._at.store = fails
        usual(self, path, what, **more)

    monkeypatch.setattr(snapshots.Snapshots, "_write", refusing)
    made({2: 0.5, 4: 0.3, 6: 0.4, 8: 0.45}, snapshot_every=4).run(tmp_path)
    said = [line for line in capsys.readouterr().err.splitlines() if "cannot be written" in line]
    assert [line.split(" cannot")[0] for line in said] == [
        "warning: the best network, of step 4,",
        "warning: the snapshot of step 4",
    ]
    # 0.4 is the best of those that are there.
    assert best_of(tmp_path) == (6, 0.4) and [found.step for found in read_snapshots(tmp_path)] == [8]


def test_files_of_the_user_beside_a_kept_network_stay(made, tmp_path: Path, capsys) -> None:
    made({2: 0.5, 4: 0.3}, max_steps=4, snapshot_every=2).run(tmp_path)
    for folder in (tmp_path / "generator-best", snapshot_path(tmp_path, 4)):
        (folder / "notes.txt").write_text("mine")
    made({4: 0.4, 6: 0.1}, max_steps=6, from_step=0).run(tmp_path)
    assert (tmp_path / "generator-best" / "notes.txt").read_text() == "mine"
    assert read_best(tmp_path, "distill") is None and read_snapshots(tmp_path) == ()
    said = "cannot be written: .*generator-best holds 'notes.txt', which storing a network there would delete"
    assert len(re.findall(said, capsys.readouterr().err)) == 2


def test_a_best_that_is_a_link_to_another_disk_stays_one(made, tmp_path: Path) -> None:
    made({2: 0.5, 4: 0.3}, max_steps=4).run(tmp_path)
    best, elsewhere = tmp_path / "generator-best", tmp_path / "elsewhere" / "best"
    elsewhere.parent.mkdir()
    best.rename(elsewhere)
    best.symlink_to(elsewhere)
    made({2: 0.7, 4: 0.6}, max_steps=4, from_step=0).run(tmp_path)
    assert best.is_symlink() and best_of(tmp_path) == (4, 0.6)
    assert sorted(path.name for path in elsewhere.parent.iterdir()) == ["best"]


def test_a_distance_over_another_number_of_images_does_not_compete(made, tmp_path: Path, capsys) -> None:
    made({2: 0.5, 4: 0.3}, max_steps=4).run(tmp_path)
    distiller = made(max_steps=6)
    distiller.evaluate = lambda: FrechetResult(0.35, 32, 0.1, 1.0)
    distiller.run(tmp_path)
    assert best_of(tmp_path) == (6, 0.35)
    assert "(step 4, 0.3000: " in capsys.readouterr().err


def test_a_teachers_training_keeps_its_best_and_its_snapshots(tmp_path: Path) -> None:
    data = ImageDataset(torch.zeros(4, 1, 4, 4), name="none")
    config = TeacherConfig(
        batch=2, max_steps=4, eval_every=2, snapshot_every=2, keep_snapshots=1, zero=0, precision="fp32", heun_steps=1
    )
    TeacherTraining(config, NETWORK, data, evaluation=EVALUATION, world=ALONE).run(tmp_path)
    release_folder(tmp_path)
    best = read_best(tmp_path, "teacher")
    assert best is not None and best.path == tmp_path / "model-best"
    assert [found.path for found in read_snapshots(tmp_path)] == [tmp_path / "snapshots" / "step-0000004"]
    assert same(tmp_path / "snapshots" / "step-0000004", tmp_path / "model")
    assert same(tmp_path / "checkpoints" / "step-0000004", tmp_path / "model")


# -- snapshots ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "kept"), [(2, [5, 6]), (1, [6]), (0, [1, 2, 3, 4, 5, 6]), (10, [1, 2, 3, 4, 5, 6])])
def test_the_newest_snapshots_are_kept(made, tmp_path: Path, keep: int, kept: list[int]) -> None:
    distiller = made(max_steps=6, eval_every=0, snapshot_every=1, keep_snapshots=keep)
    distiller.run(tmp_path)
    found = read_snapshots(tmp_path)
    assert [one.step for one in found] == kept and sorted(p.name for p in (tmp_path / "snapshots").iterdir()) == [
        f"step-{step:07d}" for step in kept
    ]
    assert same(found[-1].path, tmp_path / "generator")
    last = read_config(found[-1].path)
    assert last.facts.measured["images"] == 16 and {**last.extra, "measured": {}} == {
        **read_config(tmp_path / "generator").extra,
        "measured": {},
    }


def test_a_checkpoint_comes_after_the_networks_that_were_kept_before(made, tmp_path: Path, monkeypatch) -> None:
    """Else a kill between the two would lose the network of a step that does not come again."""
    order: list[str] = []
    usual = CheckpointWriter._write

    def write(self: CheckpointWriter, step: int, gathered: Any, average: Any, after: Callable[[], None]) -> None:
        usual(self, step, gathered, average, lambda: (after(), order.append(f"checkpoint {step}"))[0])

    keep = snapshots.Snapshots._forget_old

    def kept(self: snapshots.Snapshots, newest: Path) -> None:
        order.append(f"snapshot {int(newest.name[5:])}")
        keep(self, newest)

    monkeypatch.setattr(CheckpointWriter, "_write", write)
    monkeypatch.setattr(snapshots.Snapshots, "_forget_old", kept)
    made(eval_every=0, snapshot_every=4, max_steps=8).run(tmp_path)
    assert order == ["snapshot 4", "checkpoint 4", "snapshot 8", "checkpoint 8"]


@pytest.mark.distributed
def test_the_best_survives_a_kill_and_the_run_that_goes_on(tmp_path: Path) -> None:
    """Two processes, first in stage 2, then in stage 3."""
    teacher, out = soak.make_teacher(tmp_path / "teacher"), tmp_path / "run"

    def begin(steps: int, zero: int) -> Group:
        options = {"zero": zero, "eval-every": 2, "checkpoint-every": 4, "snapshot-every": 2, "keep-snapshots": 3}
        return Group(settings(teacher, out, steps, **options), "forked", tmp_path / f"log{zero}")

    group = begin(2000, 2)
    try:
        wait_until(lambda: snapshot_path(out, 6).exists(), group)
    finally:
        group.kill()
    known = read_best(out, "distill")
    logged = {line["step"]: line["frechet"] for line in evaluations(out)}
    assert known is not None and known.distance == logged[known.step] == min(logged[step] for step in (2, 4, 6))
    before = weights(known.path)
    steps = soak.newest(out) + 2
    group = begin(steps, 3)
    try:
        assert group.wait(120) == [0, 0], group.output()
    finally:
        group.kill()
    best = read_best(out, "distill")
    assert best is not None and best.distance <= known.distance
    assert f"best: {best.in_words()}" in group.output()
    assert best != known or all(torch.equal(before[name], tensor) for name, tensor in weights(best.path).items())
    assert len(read_snapshots(out)) == 3 and same(snapshot_path(out, steps), out / "generator")


# -- the disk ----------------------------------------------------------------------------------------------------------


def test_what_a_run_takes_of_the_disk_is_said_and_bounds_what_it_takes(made, tmp_path: Path, capsys) -> None:
    distiller = made({step: 1 / step for step in range(2, 10, 2)}, snapshot_every=1, keep_snapshots=2)
    distiller.run(tmp_path)
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("disk: ")]
    assert said.startswith("disk: at most ") and "3 checkpoints of " in said and "2 snapshots, the best" in said
    count, kinds = distiller.generator.parameter_count, len(distiller.generator.state_kinds)
    others = [net for net in distiller.networks.values() if net is not distiller.generator]
    checkpoint = 4 * (count * kinds + sum(net.parameter_count * len(net.state_kinds) for net in others))
    use = disk_use(distiller.config, checkpoint=checkpoint, model=4 * count)
    # Headers and buffers are the rest.
    assert 0.5 * use.total < disk._taken(tmp_path) < use.total + 20_000 * 12


def test_a_disk_without_the_room_is_said_before_the_training(made, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: type("", (), {"free": 1000})())
    made(max_steps=1).run(tmp_path)
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert said.startswith(f"warning: {tmp_path} has 0.0 MiB free, and the run takes up to ")
    use = disk_use(DistillConfig(max_steps=100, snapshot_every=10, keep_snapshots=0), checkpoint=9, model=3)
    assert use.snapshots == 10 and use.total == 3 * 9 + 13 * 3
    assert missing_room(use, tmp_path / "new") is None
