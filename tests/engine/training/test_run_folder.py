"""Whose a run folder is: continued by the same configuration, refused to another, untouched by the check."""

import hashlib
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest

from ipfm.engine.config import TeacherConfig, free_settings
from ipfm.engine.evaluation.results import EvaluationRow, write_results
from ipfm.engine.noise_levels import NoiseLevels
from ipfm.engine.objectives.ipfm import DistillConfig
from ipfm.engine.objectives.pid import PidConfig
from ipfm.engine.training.run_folder import (
    check_run_folder,
    claimed,
    folder_user,
    is_settled,
    open_run_folder,
    release_folder,
    settings_said,
)

CONFIG = DistillConfig(D=128.0, batch=8, max_steps=10, sigmas=(2.5, 1.25), seed=3)
FACTS = {"teacher": "ab12"}


def start(path: Path, config=CONFIG, kind="distill", facts=FACTS) -> None:
    open_run_folder(path, check_run_folder(path, kind, config, facts), write=True)


def contents(path: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in path.rglob("*")}


def refused(path: Path, config=CONFIG, kind="distill", facts=FACTS) -> str:
    """The message, one line; nothing was written."""
    before = contents(path)
    with pytest.raises(ValueError) as error:
        check_run_folder(path, kind, config, facts)
    assert contents(path) == before
    message = str(error.value)
    assert "\n" not in message and message.endswith("choose another --out")
    return message


def test_a_new_folder(tmp_path):
    path = tmp_path / "runs" / "a"
    record = check_run_folder(path, "distill", CONFIG, FACTS)
    assert not path.exists() and not path.parent.exists()
    assert record == {
        "format": 1, "kind": "distill", "objective": "ipfm", "config": CONFIG.to_json(), "teacher": "ab12"
    }  # fmt: skip
    folder = open_run_folder(path, record, write=True)
    assert folder.path == path and folder.checkpoints == path / "checkpoints"
    assert json.loads((path / "config.json").read_text()) == record
    assert sorted(contents(path)) == ["config.json", "run.lock"]


def test_an_empty_folder_is_new(tmp_path):
    start(tmp_path)
    assert (tmp_path / "config.json").is_file()


def test_what_a_killed_start_leaves_is_new(tmp_path):
    (tmp_path / ".config.json.4711.tmp").write_bytes(b"{")
    start(tmp_path)
    assert (tmp_path / "config.json").is_file()


def test_what_killed_writers_leave_is_removed(tmp_path):
    start(tmp_path)
    leftovers = [tmp_path / ".results.json.11.tmp", tmp_path / "checkpoints" / ".latest.4711.tmp"]
    for leftover in leftovers:
        leftover.parent.mkdir(exist_ok=True)
        leftover.write_bytes(b"half")
    open_run_folder(tmp_path, check_run_folder(tmp_path, "distill", CONFIG, FACTS), write=False)
    assert all(leftover.exists() for leftover in leftovers)
    start(tmp_path)
    assert not any(leftover.exists() for leftover in leftovers)


@pytest.mark.parametrize("there", ["", "runs", "runs/a", "runs/a/checkpoints"])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_done(tmp_path, monkeypatch, there):
    path, closed = tmp_path / "runs" / "a", tmp_path / there
    if there.startswith("runs/a"):
        start(path)
        (path / "checkpoints").mkdir()
    closed.mkdir(parents=True, exist_ok=True)
    closed.chmod(0o555)
    if os.access(closed, os.W_OK):  # root may write everywhere: let the system say what it tells others
        access = os.access
        monkeypatch.setattr(os, "access", lambda p, mode: access(p, mode) and Path(p).stat().st_mode & 0o200 > 0)
    try:
        with pytest.raises(ValueError) as error:
            check_run_folder(path, "distill", CONFIG, FACTS)
    finally:
        closed.chmod(0o755)
    assert str(error.value) == f"{closed} cannot be written: choose another --out"


def test_other_processes_write_nothing(tmp_path):
    folder = open_run_folder(tmp_path / "a", check_run_folder(tmp_path / "a", "distill", CONFIG, FACTS), write=False)
    assert folder.path == tmp_path / "a" and not (tmp_path / "a").exists()


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, D=math.inf), TeacherConfig(max_steps=3)])
def test_the_same_configuration_continues(tmp_path, config):
    start(tmp_path, config)
    before = contents(tmp_path)
    start(tmp_path, config)
    assert contents(tmp_path) == before


CHANGED = {
    "init": "random",
    "width": 0.5,
    "student_init": "random",
    "student_width": 0.5,
    "gradient": "last",
    "batch": 16,
    "lr": 2e-5,
    "eps": 1e-6,
    "dropout": 0.1,
    "augment": 0.12,
    "ema_kimg": 1.0,
    "ema_rampup": 0.1,
    "precision": "fp32",
    "seed": 4,
    "rules": 1,
    "D": 64.0,
    "alpha": 1.2,
    "sigmas": (2.5, 1.0),
    "sigma_init": 2.0,
    "student_lr": 1e-4,
    "generator_beta1": 0.9,
    "student_beta1": 0.9,
    "student_updates": 2,
    "clip_grad": 1.0,
    "ema": (0.1,),
    "guidance": 1.4,
    "logvar": True,
    "weight": "sigma",
    "weight_power": 0.5,
    "levels_generator": "loguniform",
    "levels_student": "half",
    "student_ema": 0.99,
    "class_counts": (1, 2),
    "real_weights": (0.92, 0.94),
    "real_xflip": True,
    "lr_schedule": "linear",
    "lr_warmup": 5,
    "student_first_kimg": 0.01,
    "discriminator": "encoder",
    "generator": "lora",
    "student": "lora",
}
# Of a discriminator, which a run has or has not.
OF_A_DISCRIMINATOR = {"discriminator_weights": (1.0, 1e-3), "discriminator_kimg": (1.0, 2.0)}
FREELY = {
    "out": Path("elsewhere"),
    "micro_batch": 4,
    "max_steps": 20,
    "zero": 1,
    "tf32": False,
    "log_every": 1,
    "eval_every": 5,
    "checkpoint_every": 7,
    "keep_checkpoints": 5,
    "snapshot_every": 5,
    "keep_snapshots": 5,
    "max_bad_steps": 1,
    "backward": "phased",
    "teacher": Path("moved"),
    "real_data": Path("moved"),
    "heun_steps": 40,
    "activation_checkpointing": "on",
    "async_checkpoints": False,
    "profile_memory": 3,
    "teacher_storage": "sharded",
    "compile": True,
    "memory_format": "channels_last",
    "cuda_graphs": "off",
    "attention_backend": "sdpa",
    "deterministic": True,
    "from_step": 0,
    "export_ema": "ema500k",
    "snapshot_precision": "fp16",
}


def test_every_setting_is_of_one_kind():
    """A new setting has to be put on one of the two lists."""
    # Tested on their own below; a guide goes with a guidance, see test_guided_teacher.py, and the last two with a
    # schedule of learning rates; ranks go with a network that has any, see test_lora.py.
    elsewhere = {"kimg", "resume", "steps", "noise", "offload", "guide", "lr_end", "lr_decay_batches"}
    elsewhere |= {"rank", "lora_alpha", *OF_A_DISCRIMINATOR}
    assert set(CHANGED) | set(FREELY) | elsewhere == set(CONFIG.to_json())
    free = free_settings(DistillConfig) | free_settings(PidConfig)
    assert set(FREELY) | {"kimg", "resume", "offload", "lpips", "guide"} == free


@pytest.mark.parametrize("name", CHANGED)
def test_a_setting_that_identifies_the_run(tmp_path, name):
    start(tmp_path)
    other = replace(CONFIG, **{name: CHANGED[name]})
    there, here = (json.dumps(c.to_json()[name]).strip('"') for c in (CONFIG, other))
    assert refused(tmp_path, other) == (
        f"{tmp_path} belongs to another configuration ({name} is {there} there, {here} here): choose another --out"
    )


@pytest.mark.parametrize("name", OF_A_DISCRIMINATOR)
def test_a_setting_of_a_discriminator_identifies_the_run(tmp_path, name):
    told = replace(CONFIG, discriminator="encoder", discriminator_weights=(2.0, 1e-3), discriminator_kimg=(1.0, 3.0))
    start(tmp_path, told)
    assert f"({name} is [" in refused(tmp_path, replace(told, **{name: OF_A_DISCRIMINATOR[name]}))


@pytest.mark.parametrize("now, said", [(7, "lacks 1 file"), (10, "has 2 new files")])
def test_files_of_the_data_set_that_came_or_went_since_the_run_began(tmp_path, now, said):
    config, facts = TeacherConfig(batch=2, max_steps=2), {"dataset": "set", "images": 8}
    start(tmp_path, config, "teacher", facts)
    with pytest.raises(ValueError) as refused:
        check_run_folder(tmp_path, "teacher", config, facts | {"images": now})
    assert f"images is 8 there, {now} here (the data set {said} since the run began: put it back" in str(refused.value)


@pytest.mark.parametrize("name", FREELY)
def test_a_setting_that_may_change(tmp_path, name):
    start(tmp_path)
    other = replace(CONFIG, **{name: FREELY[name]})
    assert other != CONFIG
    start(tmp_path, other)
    assert json.loads((tmp_path / "config.json").read_text())["config"] == other.to_json()


def rules_of(path: Path, **changes: object) -> object:
    """Those by which a run of these settings would go on in the folder."""
    return check_run_folder(path, "distill", replace(CONFIG, **changes), FACTS)["config"]["rules"]


def test_a_run_goes_on_by_the_rules_that_it_began_with(tmp_path):
    start(tmp_path / "new")
    start(tmp_path / "first", replace(CONFIG, rules=1))
    assert [rules_of(tmp_path / name) for name in ("none", "new", "first")] == [2, 2, 1]
    assert "(rules is 2 there, 1 here)" in refused(tmp_path / "new", replace(CONFIG, rules=1))


def test_a_run_older_than_the_rules_goes_on_by_the_first_ones(tmp_path):
    start(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    del record["config"]["rules"]
    (tmp_path / "config.json").write_text(json.dumps(record))
    # Nothing was done by them yet: it starts anew.
    assert rules_of(tmp_path) == 2
    (tmp_path / "checkpoints" / "step-0000004").mkdir(parents=True)
    assert rules_of(tmp_path) == rules_of(tmp_path, rules=1) == 1
    start(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["config"] == CONFIG.to_json() | {"rules": 1}


def test_rules_of_a_later_version_are_refused(tmp_path):
    start(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    for other in (3, "two", None):
        record["config"]["rules"] = other
        (tmp_path / "config.json").write_text(json.dumps(record))
        assert f"(rules is {json.dumps(other).strip(chr(34))} there, 2 here)" in refused(tmp_path)


def advance(path: Path, *steps: int, exported: int | None = None, measured: bool = True) -> None:
    """Checkpoints of a run in `path`, and its result."""
    for step in steps:
        checkpoint = path / "checkpoints" / f"step-{step:07d}"
        checkpoint.mkdir(parents=True)
        progress = json.dumps({"format": 1, "step": step}).encode()
        (checkpoint / "progress.json").write_bytes(progress)
        (checkpoint / "manifest.json").write_text(json.dumps({"progress.json": hashlib.sha256(progress).hexdigest()}))
    if exported is not None:
        (path / "generator").mkdir()
        (path / "generator" / "config.json").write_text(json.dumps({"extra": {"optimizer_steps": exported}}))
        (path / "generator" / "model.safetensors").write_bytes(b"")
        write_results(path, [EvaluationRow("generator", 1, 1, 2.0, 16, 1.0)]) if measured else None


@pytest.mark.parametrize("exported", [None, 150])
@pytest.mark.parametrize(
    ("length", "said"),
    [({"max_steps": 120}, "--max-steps 120"), ({"max_steps": None, "kimg": 0.96}, "--kimg 0.96 (120 steps)")],
)
def test_fewer_steps_than_the_run_has_are_refused_before_anything_is_written(tmp_path, exported, length, said):
    start(tmp_path, replace(CONFIG, max_steps=300))
    advance(tmp_path, 100, 150, exported=exported)
    assert refused(tmp_path, replace(CONFIG, **length)) == (
        f"{tmp_path} is at step 150 already, beyond {said}: give at least 150 steps, --from-step 100 to go back and "
        "put aside what came after, or choose another --out"
    )
    start(tmp_path, replace(CONFIG, **length, from_step=100))


def test_a_run_without_an_earlier_checkpoint_can_go_back_to_its_start(tmp_path):
    start(tmp_path, replace(CONFIG, max_steps=300))
    advance(tmp_path, 150)
    assert "give at least 150 steps, --from-step 0 to go back" in refused(tmp_path, replace(CONFIG, max_steps=120))
    start(tmp_path, replace(CONFIG, max_steps=120, from_step=0))


@pytest.mark.parametrize(("steps", "has"), [((), "it has none"), ((100, 150), "it has those of steps 100, 150")])
def test_a_step_that_has_no_checkpoint_cannot_be_gone_back_to(tmp_path, steps, has):
    if steps:
        start(tmp_path, replace(CONFIG, max_steps=300))
        advance(tmp_path, *steps)
    before = contents(tmp_path)
    with pytest.raises(ValueError) as error:
        check_run_folder(tmp_path, "distill", replace(CONFIG, max_steps=300, from_step=120), FACTS)
    assert str(error.value) == f"{tmp_path} has no checkpoint of step 120: {has}; or leave --from-step out"
    assert contents(tmp_path) == before


def test_a_damaged_checkpoint_cannot_be_gone_back_to(tmp_path):
    start(tmp_path, replace(CONFIG, max_steps=300))
    advance(tmp_path, 100, 150)
    (tmp_path / "checkpoints" / "step-0000100" / "progress.json").write_text("{}")
    with pytest.raises(ValueError, match=r"the checkpoint of step 100 in .* is damaged: leave --from-step out"):
        check_run_folder(tmp_path, "distill", replace(CONFIG, max_steps=300, from_step=100), FACTS)


def test_a_result_whose_checkpoints_were_deleted_is_not_overwritten(tmp_path):
    start(tmp_path)
    advance(tmp_path, exported=10)
    message = refused(tmp_path)
    assert message.startswith(f"{tmp_path} holds the result of 10 steps and no checkpoint to continue from")
    start(tmp_path, replace(CONFIG, from_step=0))


def test_the_settings_of_a_finished_run_stay_those_that_it_was_made_with(tmp_path):
    start(tmp_path)
    advance(tmp_path, 10, exported=10)
    before = contents(tmp_path)
    other = replace(CONFIG, heun_steps=40, eval_every=3, max_steps=None, kimg=0.08)
    start(tmp_path, other)
    assert contents(tmp_path) == before and is_settled(tmp_path, "distill", other)
    assert settings_said(tmp_path, other) == (
        "max-steps is 10 there, null here; kimg is null there, 0.08 here; heun-steps is 18 there, 40 here"
    )
    assert settings_said(tmp_path, CONFIG) == ""
    start(tmp_path, replace(CONFIG, max_steps=20))
    assert json.loads((tmp_path / "config.json").read_text())["config"]["max_steps"] == 20


def test_another_run_that_came_first_keeps_its_settings(tmp_path):
    """Two starts at once, of other settings, that both found the folder empty."""
    path = tmp_path / "run"
    ours = check_run_folder(path, "distill", CONFIG, FACTS)
    start(path, replace(CONFIG, alpha=1.2))
    before = contents(path)
    with pytest.raises(ValueError, match=r"alpha is 1\.2 there, 1\.0 here"), claimed(path, ours, CONFIG, write=True):
        pass
    assert contents(path) == before
    release_folder(path)


def test_a_run_that_cannot_be_made_leaves_no_folder(tmp_path):
    path = tmp_path / "runs" / "a"
    with (
        pytest.raises(ValueError, match="memory does not suffice"),
        claimed(path, check_run_folder(path, "distill", CONFIG, FACTS), CONFIG, write=True),
    ):
        assert folder_user(path) == str(os.getpid())
        raise ValueError("memory does not suffice")
    assert not path.exists()
    start(path)


def test_where_the_state_lives_may_change(tmp_path):
    start(tmp_path)
    start(tmp_path, replace(CONFIG, zero=2, offload="optimizer"))


def test_the_length_may_be_given_in_images(tmp_path):
    start(tmp_path)
    start(tmp_path, replace(CONFIG, max_steps=None, kimg=2.0))


def test_steps_and_noise_levels(tmp_path):
    start(tmp_path)
    message = refused(tmp_path, replace(CONFIG, steps=1, sigmas=(2.5,)))
    assert "steps is 2 there, 1 here" in message and "sigmas is [2.5, 1.25] there, [2.5] here" in message
    message = refused(tmp_path, replace(CONFIG, noise=NoiseLevels(p_mean=-1.0)))
    assert "(noise.p_mean is -1.2 there, -1.0 here)" in message


def test_facts(tmp_path):
    start(tmp_path)
    message = refused(tmp_path, facts={"teacher": "cd34"})
    assert "(teacher is ab12 there, cd34 here)" in message
    message = refused(tmp_path, facts={"teacher": "f" * 64})
    assert f"teacher is ab12 there, {'f' * 57}... here" in message
    assert "(kind is distill there, teacher here)" in refused(tmp_path, kind="teacher")


@pytest.mark.parametrize(("name", "what"), [("teacher", "another network"), ("pictures", "another set of images")])
def test_another_digest_is_said_in_words_and_shortened(tmp_path, name, what):
    start(tmp_path, facts={name: "0a" * 32})
    message = refused(tmp_path, facts={name: "f" * 64})
    assert f"({name} is {what}, 0a0a0a0a there, ffffffff here)" in message


def test_a_fact_that_is_not_known_yet(tmp_path):
    """It may be left out on either side; the folder keeps it, so that another one is still refused afterwards."""
    start(tmp_path, facts={})
    start(tmp_path)
    start(tmp_path, facts={})
    assert json.loads((tmp_path / "config.json").read_text())["teacher"] == "ab12"
    assert "(teacher is ab12 there, cd34 here)" in refused(tmp_path, facts={"teacher": "cd34"})


def test_another_format(tmp_path):
    start(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**record, "format": 2}))
    assert "(format is 2 there, 1 here)" in refused(tmp_path)


def test_a_setting_that_one_side_does_not_have(tmp_path):
    start(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    del record["config"]["alpha"]
    record["config"]["flavour"] = "sour"
    (tmp_path / "config.json").write_text(json.dumps(record))
    message = refused(tmp_path)
    assert "alpha is null there, 1.0 here" in message and "flavour is sour there, null here" in message


def test_a_folder_that_holds_something_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("important")
    message = refused(tmp_path)
    assert message == f"{tmp_path} is not empty and holds no run (no config.json): choose another --out"


def test_a_folder_in_place_of_the_file(tmp_path):
    (tmp_path / "config.json").mkdir()
    assert "holds no run (no config.json)" in refused(tmp_path)


def test_a_file_in_place_of_the_folder(tmp_path):
    file = tmp_path / "notes"
    file.write_text("important")
    for path in (file, file / "run", file / "runs" / "a"):
        with pytest.raises(ValueError) as error:
            check_run_folder(path, "distill", CONFIG, FACTS)
        assert str(error.value) == f"{file} is a file, the run folder {path} cannot be there: choose another --out"
    assert file.read_text() == "important"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe\x00", b"[]", b"3", b"null", b'"x"', b"{}", b'{"config": 3}', b'{"config": []}'],
    ids=repr,
)
def test_an_unreadable_configuration(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    message = refused(tmp_path)
    expected = f"{tmp_path / 'config.json'} cannot be read as a run's configuration: choose another --out"
    assert message == expected


def test_no_resume(tmp_path):
    config = replace(CONFIG, resume=False)
    start(tmp_path / "new", config)
    message = refused(tmp_path / "new", config)
    assert message == f"{tmp_path / 'new'} holds a run already and --no-resume was given: choose another --out"
    start(tmp_path / "new")


@pytest.mark.parametrize("kind", ["distill", "teacher"])
@pytest.mark.parametrize("entry", ["README.md", None])
def test_files_that_the_result_would_replace_are_told_before_a_run_begins(tmp_path, kind, entry):
    config = CONFIG if kind == "distill" else TeacherConfig(batch=8, max_steps=10)
    export = tmp_path / {"distill": "generator", "teacher": "model"}[kind]
    start(tmp_path, config, kind)
    if entry is None:
        export.write_text("")
        reason = "is a file; a network is stored as a folder"
    else:
        export.mkdir()
        (export / entry).write_text("mine")
        reason = f"holds '{entry}', which storing a network there would delete"
    assert refused(tmp_path, config, kind) == f"{export} {reason}: move it away, or choose another --out"


def test_files_beside_the_result_of_a_finished_run_are_no_hindrance(tmp_path):
    start(tmp_path)
    advance(tmp_path, 10, exported=10)
    (tmp_path / "generator" / "README.md").write_text("mine")
    start(tmp_path)
    assert "holds 'README.md'" in refused(tmp_path, replace(CONFIG, max_steps=20))


def test_a_number_that_was_edited_to_a_text_is_told_apart(tmp_path):
    start(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    record["config"]["batch"] = "8"
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert '(batch is "8" there, 8 here)' in refused(tmp_path)


def test_a_folder_that_is_a_link_to_itself_is_refused(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises((ValueError, OSError)) as error:
        start(tmp_path / "loop")
    assert "\n" not in str(error.value) and "loop" in str(error.value)
