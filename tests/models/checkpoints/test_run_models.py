"""A run folder in the place of a model: which of its networks is taken, what is said of it, how to have another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ipfm.models.atomic_files import previous_of
from ipfm.models.checkpoints.run_models import locate


def network(folder: Path, step: int | None, distance: float | None = None) -> Path:
    folder.mkdir(parents=True)
    extra = {"optimizer_steps": step} | ({} if distance is None else {"measured": {"distance": distance}})
    (folder / "config.json").write_text(json.dumps({"format": "ipfm-network", "extra": extra}))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def checkpoint(run: Path, step: int) -> Path:
    folder = run / "checkpoints" / f"step-{step:07d}"
    folder.mkdir(parents=True)
    for name in ("manifest.json", "progress.json"):
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A distillation without any network yet."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"kind": "distill"}')
    return tmp_path / "run"


def taken(path: Path, which: str | int | None = None) -> tuple[str, str]:
    found = locate(path, which)
    return found.path.name, found.said().replace(str(path), "RUN")


def test_the_result_is_taken_of_a_run_that_has_ended_and_another_best_is_named(run: Path) -> None:
    network(run / "generator", 700)
    checkpoint(run, 700)
    assert taken(run) == ("generator", "of RUN the generator at its end (step 700) is taken")
    network(run / "generator-best", 400, 0.31)
    said = "of RUN the generator at its end (step 700) is taken; --which best is its best generator (step 400, 0.31)"
    assert taken(run) == ("generator", said)
    assert taken(run, "best") == ("generator-best", "") and taken(run, "last") == ("generator", "")
    assert locate(run).said("which={!r}").endswith("; which='best' is its best generator (step 400, 0.31)")
    # The best is the last: there is nothing to choose.
    shutil.rmtree(run / "generator-best")
    network(run / "generator-best", 700, 0.3)
    assert taken(run)[1] == "of RUN the generator at its end (step 700) is taken"


def test_the_best_is_taken_of_a_run_that_has_not_ended_else_the_newest(run: Path) -> None:
    assert locate(run).path == run and locate(run).said() == ""
    checkpoint(run, 400)
    checkpoint(run, 600)
    said = "RUN has not ended: the generator in its newest checkpoint (step 600) is taken"
    assert taken(run) == ("step-0000600", said)
    network(run / "snapshots" / "step-0000800", 800)
    said = "RUN has not ended: its newest snapshot of the generator (step 800) is taken"
    assert taken(run) == ("step-0000800", said)
    network(run / "generator-best", 500, 0.25)
    said = "RUN has not ended: its best generator (step 500, 0.25) is taken"
    other = "; --which last is its newest snapshot of the generator (step 800)"
    assert taken(run) == ("generator-best", said + other)
    # An earlier end, of a run that was lengthened since.
    network(run / "generator", 300)
    said = "RUN goes on after the generator at its end (step 300): its best generator (step 500, 0.25) is taken"
    assert taken(run) == ("generator-best", said + other)


def test_a_step_is_asked_for(run: Path) -> None:
    network(run / "generator-best", 400, 0.3)
    network(run / "snapshots" / "step-0000500", 500)
    checkpoint(run, 600)
    assert [locate(run, step).path.name for step in (400, "500", 600)] == [
        "generator-best",
        "step-0000500",
        "step-0000600",
    ]
    assert locate(run / "checkpoints", 600).path == run / "checkpoints" / "step-0000600"
    assert locate(run / "snapshots").path == run / "snapshots" / "step-0000500"
    assert locate(run, "step-0000500") == locate(run, 500)
    (run / "checkpoints" / "latest").write_text("step-0000600\n")
    assert locate(run / "checkpoints" / "latest").path == run / "checkpoints" / "step-0000600"
    for place, which, said in (
        (run, "450", "has no network of step 450; it has those of steps 400, 500, 600"),
        (run / "snapshots", 600, "has no network of step 600; it has those of steps 500"),
        (run / "snapshots", "best", "has no best network, as its run has had no evaluation"),
        (run, "newest", "which must be best, last, a step or an average such as ema0.05, got 'newest'"),
        (run, -1, "which must be best, last, a step or an average such as ema0.05, got '-1'"),
        (run / "generator-best", "last", "and .*generator-best is no run folder: leave it out"),
        (run / "nothing", "last", "is no run folder: leave it out"),
    ):
        with pytest.raises(ValueError, match=said):
            locate(place, which)


def test_one_of_several_averages_is_asked_for(run: Path) -> None:
    """At its last step: the result where it is of that, else its own snapshot."""

    def of(average: str, folder: Path, step: int) -> Path:
        config = json.loads((network(folder, step) / "config.json").read_text())
        config["extra"]["average"] = average
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    of("ema0.05", run / "generator", 700)
    for step in (300, 700):
        of("ema500k", run / "snapshots" / f"step-{step:07d}", step)
        of("ema0.1", run / "snapshots" / "ema0.1" / f"step-{step:07d}", step)
    assert locate(run, "ema0.05").path == run / "generator"
    assert locate(run, "ema0.1").path == run / "snapshots" / "ema0.1" / "step-0000700"
    assert locate(run / "snapshots", "ema500k").path.name == "step-0000700"
    with pytest.raises(ValueError, match=r"average ema0\.2; it has those of ema0\.05, ema0\.1, ema5"):
        locate(run, "ema0.2")
    with pytest.raises(ValueError, match="no run folder: leave it out"):
        locate(run / "generator", "ema0.1")


def test_what_is_a_model_or_a_checkpoint_is_what_it_is(run: Path) -> None:
    for place in (network(run / "generator", 2), checkpoint(run, 2), run / "config.json", run / "nothing"):
        assert locate(place).path == place and locate(place).taken == ""


def test_a_best_that_is_being_replaced_is_found(run: Path) -> None:
    best = network(run / "generator-best", 400, 0.3)
    best.rename(previous_of(best))
    assert locate(run).path == best


def test_a_teacher_is_wanted(run: Path) -> None:
    network(run / "generator", 2)
    assert locate(run, teacher=True).path == run
    own = run / "teacher"
    network(own / "model", 9)
    (own / "config.json").write_text('{"kind": "teacher"}')
    found = locate(run, teacher=True)
    assert found.path == own / "model" and found.taken == f"of {own} the teacher at its end (step 9) is taken"
    network(own / "model-best", 5, 0.5)
    assert locate(own, "best", teacher=True).path == own / "model-best"


def test_damage_is_no_network(run: Path) -> None:
    network(run / "generator", 2)
    (run / "generator" / "config.json").write_text("{")
    checkpoint(run, 4)
    assert locate(run).path.name == "step-0000004"
    (run / "config.json").write_text("[" * 100_000)
    assert locate(run).path == run
