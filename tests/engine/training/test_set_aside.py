"""Going back: what came after is put aside as a run of its own, whatever ends the process, and goes on from its end."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import launch
import pytest
import soak
import torch
from safetensors.torch import load_file

from ipfm.engine.commands.info import Info
from ipfm.engine.config import RunConfig, TeacherConfig
from ipfm.engine.data.dataset import ImageDataset
from ipfm.engine.distributed.world import World
from ipfm.engine.evaluation.evaluation import Evaluation
from ipfm.engine.evaluation.metrics import PixelFeatures, Statistics
from ipfm.engine.objectives.ipfm import DistillConfig
from ipfm.engine.runtime.errors import Failed
from ipfm.engine.training import set_aside
from ipfm.engine.training.checkpoint import checkpoints_in, forget_after, is_whole, step_of
from ipfm.engine.training.distiller import Distiller
from ipfm.engine.training.resolve import complete
from ipfm.engine.training.run_folder import check_run_folder, open_run_folder, release_folder
from ipfm.engine.training.run_state import read_run
from ipfm.engine.training.set_aside import SetAside, forgotten, go_back, read_set_aside
from ipfm.engine.training.teacher import TeacherTraining
from ipfm.models import NetworkConfig, Precond, build_network

ALONE = World(0, 1, torch.device("cpu"))
NETWORK = NetworkConfig(
    img_resolution=4, img_channels=1, model_channels=4, channel_mult=(1,), num_blocks=1, attn_resolutions=(), D=64.0
)
EVALUATION = Evaluation(PixelFeatures((1, 4, 4)), Statistics(torch.zeros(16), torch.eye(16)), images=16, batch=16)
SETTINGS: dict[str, Any] = {
    "batch": 2, "max_steps": 8, "eval_every": 2, "checkpoint_every": 2, "keep_checkpoints": 9, "snapshot_every": 2,
    "log_every": 1, "heun_steps": 1, "zero": 0, "precision": "fp32", "ema_kimg": 1e-3, "lr": 1e-3, "backward": "joint",
    "activation_checkpointing": "off",
}  # fmt: skip


@pytest.fixture(scope="module")
def teacher() -> Precond:
    torch.manual_seed(0)
    return build_network(NETWORK).eval()


@pytest.fixture(scope="module")
def finished(teacher: Precond, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps, with a checkpoint, a picture, a snapshot and an evaluation every second one."""
    path = tmp_path_factory.mktemp("finished") / "run"
    run(teacher, path)
    return path


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "run")


def settings(**given: Any) -> DistillConfig:
    """As a run folder has them."""
    return complete(DistillConfig(**{**SETTINGS, **given}), NETWORK, ALONE.device)


def run(teacher: Precond, path: Path, **given: Any) -> None:
    Distiller(DistillConfig(**{**SETTINGS, **given}), teacher, evaluation=EVALUATION, world=ALONE).run(path)
    release_folder(path)


def states(run: Path) -> dict[str, torch.Tensor]:
    """Weights, moments and averages of the newest checkpoint, and the network that was exported."""
    files = [*checkpoints_in(run / "checkpoints")[0].glob("*.safetensors"), run / "generator" / "model.safetensors"]
    return {f"{file.name}/{key}": value for file in files for key, value in load_file(file).items()}


def equal(one: Path, other: Path) -> bool:
    mine, theirs = states(one), states(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "run.lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def networks_in(run: Path) -> dict[str, list[int]]:
    """Steps of what the run has of a kind."""
    record = read_run(run, times=False)
    return {
        "checkpoints": sorted(map(step_of, checkpoints_in(run / "checkpoints"))),
        "snapshots": [one.step for one in record.snapshots],
        "pictures": [step for step, _ in record.pictures],
        "evaluations": [point.step for point in record.evaluations],
        "metrics": [line["step"] for line in record.metrics],
    }


def test_what_came_after_goes_on_from_its_own_end_as_if_nobody_had_gone_back(
    teacher: Precond, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(folder)
    run(teacher, folder, from_step=4, max_steps=6)
    aside = folder / "set-aside" / "step-0000008"
    assert f"put aside, steps 4 to 8: {aside}; --out {aside} goes on from its end" in capsys.readouterr().err
    assert {name: before[name] for name in before} == {name: contents(aside)[name] for name in before}
    assert read_set_aside(folder) == (SetAside(aside, 8, 4),)
    assert networks_in(folder)["checkpoints"] == networks_in(folder)["snapshots"] == [2, 4, 6]
    # It is a run: read as one, finished, with the settings that it was made with.
    record = read_run(aside)
    assert (record.state, record.steps_done, record.total_steps, record.problems) == ("finished", 8, 8, ())
    # It goes on elsewhere too, and neither of the two writes into what they share.
    kept = contents(folder)
    moved = aside.rename(tmp_path / "moved")
    run(teacher, moved, max_steps=10)
    after = contents(folder)
    assert after == {name: kept[name] for name in after} and len(kept) - len(after) == len(before) + 1
    run(teacher, tmp_path / "whole", max_steps=10)
    assert equal(moved, tmp_path / "whole")
    assert [len(set(steps)) for steps in networks_in(moved).values()] == [5, 5, 5, 5, 10]


def test_info_and_report_say_what_was_put_aside(
    folder: Path, capsys: pytest.CaptureFixture[str], teacher: Precond
) -> None:
    run(teacher, folder, from_step=4)
    run(teacher, folder, from_step=6)
    capsys.readouterr()
    Info(model=folder, json=True).run()
    said = json.loads(capsys.readouterr().out)["set_aside"]
    names = ("step-0000008", "step-0000008-2")
    assert said == [
        {"path": str(folder / "set-aside" / name), "step": 8, "from_step": back}
        for name, back in zip(names, (4, 6), strict=True)
    ]
    Info(model=folder).run()
    text = capsys.readouterr().out
    assert re.search(rf"\nset aside +steps 4 to 8: {folder}/set-aside/step-0000008\n +steps 6 to 8: \S+-2\n", text)


def test_the_run_itself_comes_out_as_it_was(teacher: Precond, finished: Path, folder: Path) -> None:
    run(teacher, folder, from_step=4)
    assert equal(finished, folder)


def test_killed_at_any_moment_nothing_is_lost_and_nothing_put_aside_twice(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child ends at each operation on the disk, of the putting aside and of the forgetting, one after the other."""
    config = settings(from_step=6, max_steps=6)
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    small = tmp_path / "small"
    for name in ("config.json", "metrics.jsonl", "checkpoints/step-0000006", "checkpoints/step-0000008", "generator"):
        copy = shutil.copytree if (finished / name).is_dir() else shutil.copyfile
        (small / name).parent.mkdir(exist_ok=True)
        copy(finished / name, small / name)
    before = contents(small)
    count, whole = 0, False
    while not whole:
        count += 1
        path = shutil.copytree(small, tmp_path / f"{count}")
        whole = in_a_child(lambda path=path: back(path, config), operation=count)
        found = read_set_aside(path)
        # All of the earlier run is in its folder, or in the one that is whole beside it.
        assert len(found) <= 1
        holds = contents(found[0].path if found else path)
        assert all(holds[name] == content for name, content in before.items())
        back(path, config)
        assert len(read_set_aside(path)) == 1 and not list((path / "set-aside").glob(".*"))
        holds = contents(path / "set-aside" / "step-0000008")
        assert all(holds[name] == content for name, content in before.items())
        assert [checkpoint.name for checkpoint in checkpoints_in(path / "checkpoints")] == ["step-0000006"]
    # What is left is not put aside a second time, and what comes anew is.
    back(path, config)
    assert len(read_set_aside(path)) == 1
    shutil.copytree(small / "checkpoints" / "step-0000008", path / "checkpoints" / "step-0000008")
    back(path, config)
    assert len(read_set_aside(path)) == 2
    assert count > 30


def back(path: Path, config: RunConfig) -> None:
    """What a start does in the folder until its first step, without a network."""
    record = check_run_folder(path, "distill", config, {})
    go_back(path, "distill", config, ALONE)
    open_run_folder(path, record, write=True)
    assert config.from_step is not None
    forget_after(path / "checkpoints", config.from_step)
    for leftover in (path / "checkpoints").glob(".partial-*"):
        shutil.rmtree(leftover)
    for model in (path / "generator", path / "generator-best", *(path / "snapshots").glob("step-*")):
        shutil.rmtree(model, ignore_errors=True)
    forgotten(path)
    release_folder(path)


OPERATIONS = {
    "mkdir", "os.mkdir", "os.link", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.truncate",
}  # fmt: skip


def in_a_child(work: Callable[[], None], *, operation: int) -> bool:
    """Do the work in a child, which ends before its n-th operation on the disk; whether it came to its end."""
    child = os.fork()
    if child == 0:
        left = [operation]

        def heard(event: str, args: tuple[Any, ...]) -> None:
            writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes or event in OPERATIONS:
                left[0] -= 1
                if left[0] == 0:
                    os._exit(9)

        try:
            sys.addaudithook(heard)
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 0


@pytest.mark.parametrize("from_step", [8, None])
def test_nothing_to_put_aside_writes_nothing(folder: Path, from_step: int | None) -> None:
    before = contents(folder)
    go_back(folder, "distill", settings(from_step=from_step), ALONE)
    release_folder(folder)
    assert contents(folder) == before and not (folder / "set-aside").exists()


def refuse(code: int) -> Callable[..., None]:
    def refused(*paths: object) -> None:
        raise OSError(code, os.strerror(code), str(paths[1]))

    return refused


def test_a_full_disk_ends_it_and_nothing_is_forgotten(
    teacher: Precond, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(folder)
    monkeypatch.setattr(set_aside.os, "link", refuse(errno.ENOSPC))
    with pytest.raises(
        Failed, match=r"what came after step 4 cannot be put aside in .* \(.*: No space left on device\): not"
    ):
        run(teacher, folder, from_step=4, max_steps=4)
    assert contents(folder) == before and not (folder / "set-aside").exists()
    release_folder(folder)


def test_where_the_disk_links_nothing_it_is_copied_if_there_is_room(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, config = contents(folder), settings(from_step=4)
    monkeypatch.setattr(set_aside.os, "link", refuse(errno.EPERM))
    usual = shutil.disk_usage
    monkeypatch.setattr(set_aside.shutil, "disk_usage", lambda path: usual(path)._replace(free=1000))
    with pytest.raises(Failed, match=r"\d MiB are to be copied, 0\.0 MiB are free\): nothing is forgotten"):
        go_back(folder, "distill", config, ALONE)
    assert contents(folder) == before
    monkeypatch.setattr(set_aside.shutil, "disk_usage", usual)
    go_back(folder, "distill", config, ALONE)
    release_folder(folder)
    assert re.search(r"not all of \S+ can be linked: \S+ MiB are copied to ", capsys.readouterr().err)
    (one,) = read_set_aside(folder)
    assert {name: contents(one.path)[name] for name in before} == before
    assert {path.stat().st_nlink for path in one.path.rglob("*") if path.is_file()} == {1}
    assert all(map(is_whole, checkpoints_in(one.path / "checkpoints")))


def test_checkpoints_on_another_disk_are_copied_and_the_rest_is_linked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.move(folder / "checkpoints", folder.parent / "elsewhere")
    (folder / "checkpoints").symlink_to(folder.parent / "elsewhere")
    usual = os.link

    def link(path: Path, place: Path) -> None:
        if "elsewhere" in path.parts:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        usual(path, place)

    monkeypatch.setattr(set_aside.os, "link", link)
    go_back(folder, "distill", settings(from_step=4), ALONE)
    release_folder(folder)
    (one,) = read_set_aside(folder)
    links = {path.relative_to(one.path): path.stat().st_nlink for path in one.path.rglob("*.safetensors")}
    assert {name.parts[0]: count for name, count in links.items()} == {
        "checkpoints": 1, "generator": 2, "generator-best": 2, "snapshots": 2
    }  # fmt: skip
    assert all(map(is_whole, checkpoints_in(one.path / "checkpoints")))


def test_files_of_others_stay_where_they_are(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / "generator" / "notes.txt").write_text("mine")
    go_back(folder, "distill", settings(from_step=4), ALONE)
    release_folder(folder)
    assert not list((folder / "set-aside").rglob("notes.txt"))


def test_a_run_that_goes_on_where_it_was_put_aside_keeps_its_unfinished_files(folder: Path) -> None:
    """A start in the folder above it removes what killed processes left, and nothing of a process that works there."""
    config = settings(from_step=4)
    go_back(folder, "distill", config, ALONE)
    theirs = folder / "set-aside" / "step-0000008" / ".results.json.17.tmp"
    own = folder / "samples" / ".step-0000002.png.17.tmp"
    for path in (theirs, own):
        path.write_bytes(b"")
    open_run_folder(folder, check_run_folder(folder, "distill", config, {}), write=True)
    release_folder(folder)
    assert theirs.exists() and not own.exists()


def test_a_teachers_training_goes_back_to_its_start(tmp_path: Path) -> None:
    data = ImageDataset(torch.randint(0, 256, (16, 1, 4, 4), dtype=torch.uint8))
    config = TeacherConfig(
        batch=4, max_steps=4, checkpoint_every=2, D=64.0, zero=0, precision="fp32", heun_steps=1, log_every=1
    )

    def train(path: Path, **given: Any) -> None:
        TeacherTraining(replace(config, **given), NETWORK, data, world=ALONE).run(path)
        release_folder(path)

    train(tmp_path / "run")
    before = contents(tmp_path / "run")
    train(tmp_path / "run", from_step=0, max_steps=2)
    (one,) = read_set_aside(tmp_path / "run")
    assert (one.step, one.from_step) == (4, 0)
    assert {name: contents(one.path)[name] for name in before} == before
    assert read_run(one.path).state == read_run(tmp_path / "run").state == "finished"
    train(one.path, max_steps=6)
    train(tmp_path / "whole", max_steps=6)
    here, there = (load_file(path / "model" / "model.safetensors") for path in (one.path, tmp_path / "whole"))
    assert all(torch.equal(here[name], there[name]) for name in there)


@pytest.mark.distributed
def test_two_processes_whose_first_is_killed_while_it_puts_aside(tmp_path: Path) -> None:
    teacher, out = soak.make_teacher(tmp_path / "teacher"), tmp_path / "run"

    def ended(*more: str, script: Path | str = soak.RECIPE) -> tuple[list[int], str]:
        words = [*soak.settings(teacher, out, 4, **{"keep-checkpoints": 9}), *more]
        group = soak.Group(words, "forked", tmp_path / "log", script=script, IPFM_TIMEOUT="8")
        try:
            return group.wait(120), group.output()
        finally:
            group.kill()

    assert ended()[0] == [0, 0]
    codes, said = ended("--from-step", "2", script=launch.ROOT / "tests" / "workers" / "killed_aside.py")
    assert codes[0] == -9 and codes[1] != 0, said
    assert read_set_aside(out) == () and soak.newest(out) == 4 and (out / "generator").exists()
    codes, said = ended("--from-step", "2")
    assert codes == [0, 0], said
    (one,) = read_set_aside(out)
    assert said.count(f"put aside, {one.in_words()}") == 1 and not list((out / "set-aside").glob(".*"))
    # The same steps again, on as many processes.
    assert soak.newest(one.path) == 4 and soak.differences(one.path, out) == []
