"""Settings as resolved: nothing is open in them, and what takes them narrows nothing."""

from __future__ import annotations

import ast
import dataclasses
import json
import typing
from dataclasses import dataclass, replace
from pathlib import Path

import launch
import pytest
import torch

from ipfm.engine.config import (
    Precision,
    Resolved,
    RunConfig,
    TeacherConfig,
    TeacherStorage,
    ZeroStage,
    free_settings,
    place_settings,
    planned_settings,
    setting,
)
from ipfm.engine.distributed.world import World
from ipfm.engine.memory.simulate import StepSettings
from ipfm.engine.memory.state import Sharding
from ipfm.engine.objectives.ipfm import DistillConfig
from ipfm.engine.objectives.pid import PidConfig
from ipfm.engine.training.distiller import Distiller
from ipfm.engine.training.resolve import complete, resolve, resolve_training
from ipfm.engine.training.run_folder import check_run_folder
from ipfm.models import NetworkConfig, build_network
from ipfm.models.facts import TeacherFacts

NETWORK = NetworkConfig(
    img_resolution=8, img_channels=1, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(), D=16.0
)
ALONE = World(0, 1, torch.device("cpu"))
OPEN = {"batch": 8, "max_steps": 1}
FIXED = {**OPEN, "micro_batch": 4, "zero": 0, "precision": "fp32"}


def assert_decided(settings: Resolved[RunConfig]) -> None:
    assert type(settings.D) is float and settings.D == 16.0
    assert settings.precision in typing.get_args(Precision)
    assert settings.stage in typing.get_args(ZeroStage) and settings.config.zero == settings.stage
    assert type(settings.micro_batch) is int and 8 % settings.micro_batch == 0
    assert type(settings.phased) is bool and type(settings.checkpointed) is bool
    assert settings.teacher_storage in typing.get_args(TeacherStorage)
    assert (settings.config.D, settings.config.precision) == (settings.D, settings.precision)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (OPEN, (8, False, False)),
        ({**FIXED, "backward": "joint", "activation_checkpointing": "off"}, (4, False, False)),
        ({**FIXED, "backward": "phased", "activation_checkpointing": "on"}, (4, True, True)),
        ({**OPEN, "precision": "bf16", "backward": "phased"}, (8, True, False)),
    ],
    ids=["auto", "joint", "phased", "bf16"],
)
@pytest.mark.parametrize("kind", [DistillConfig, PidConfig])
def test_a_distillation_with_nothing_open(kind, given, expected):
    config = kind(**given)
    settings = resolve(config, NETWORK, ALONE)
    assert_decided(settings)
    assert (settings.micro_batch, settings.phased, settings.checkpointed) == expected
    assert settings.teacher_storage == ("half" if settings.precision == "bf16" else "fp32")
    # What a run folder records: the layout stays as it was given, but for the stage.
    assert settings.config == replace(complete(config, NETWORK, ALONE.device), zero=settings.stage)
    layout = ("micro_batch", "backward", "activation_checkpointing")
    assert all(getattr(settings.config, name) == getattr(config, name) for name in layout)
    # Resolving what is resolved changes nothing.
    assert resolve(settings.config, NETWORK, ALONE) == settings


@pytest.mark.parametrize("given", [OPEN, {**FIXED, "activation_checkpointing": "on"}], ids=["auto", "fixed"])
def test_a_training_with_nothing_open(given):
    settings = resolve_training(TeacherConfig(**given), NETWORK, ALONE)
    assert_decided(settings)
    assert not settings.phased and settings.teacher_storage == "fp32"
    assert (settings.micro_batch, settings.checkpointed) == ((8, False) if given is OPEN else (4, True))


def test_what_is_resolved_goes_together():
    config = DistillConfig(**OPEN, offload="all", zero=3, precision="bf16")
    with pytest.raises(ValueError, match=r"^offload all needs zero 3, .*, got 0$"):
        config.laid_out(D=16.0, stage=0, micro_batch=8, phased=False, checkpointed=False)
    # 16 bits at stage 0 are a single process's.
    for precision in ("bf16", "fp16"):
        config = DistillConfig(**OPEN, precision=precision, zero=0)
        assert config.split(1) == (8, 8)
        with pytest.raises(
            ValueError, match=rf"^precision {precision} on 2 processes needs zero 1, 2 or 3, .*, got 0$"
        ):
            config.split(2)
    with pytest.raises(ValueError, match=r"^precision is still auto: it must be decided for a device first$"):
        DistillConfig(**OPEN).laid_out(D=16.0, stage=0, micro_batch=8, phased=False, checkpointed=False)


ROOMS = ("training", "distributed", "memory", "objectives")
SETTINGS = {
    field.name for kind in (DistillConfig, PidConfig, TeacherConfig, Resolved) for field in dataclasses.fields(kind)
}


@pytest.mark.parametrize("room", ROOMS)
def test_no_setting_is_narrowed(room):
    """No cast, and no assertion about a setting, where settings are resolved."""
    found = []
    for path in sorted((launch.ROOT / "engine" / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("cast", "typing.cast"):
                found.append(f"{where} cast")
            if isinstance(node, ast.Assert):
                names = {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)}
                names |= {n.attr for n in ast.walk(node.test) if isinstance(n, ast.Attribute)}
                found += [f"{where} assert {name}" for name in sorted(names & (SETTINGS | {"config", "settings"}))]
    assert found == []


# -- what a setting says of itself -------------------------------------------------------------------------------------

# As they stood in lists of names far away from the settings.
FREE = {
    "out", "micro_batch", "max_steps", "kimg", "zero", "tf32", "log_every", "eval_every", "checkpoint_every",
    "keep_checkpoints", "max_bad_steps", "resume", "backward", "teacher", "heun_steps", "offload",
    "activation_checkpointing", "async_checkpoints", "profile_memory", "teacher_storage", "compile", "memory_format",
    "lpips", "from_step", "snapshot_every", "keep_snapshots", "deterministic", "attention_backend",
    "cuda_graphs", "export_ema", "snapshot_precision", "guide", "real_data",
}  # fmt: skip
PLACE = FREE - {"max_steps", "kimg", "heun_steps", "tf32", "export_ema"}
KINDS = (DistillConfig, PidConfig, TeacherConfig)


@pytest.mark.parametrize("kind", KINDS)
def test_a_setting_is_of_the_kind_that_it_was(kind):
    names = {field.name for field in dataclasses.fields(kind)}
    assert free_settings(kind) == FREE & names
    assert place_settings(kind) == PLACE & names
    assert set().union(*(free_settings(k) for k in KINDS)) == FREE


def test_settings_that_change_no_size():
    """As plans have always taken them; the cautious case is a setting that does."""
    assert planned_settings(PidConfig)["points"] == 2
    base = StepSettings(NETWORK, 4, Sharding()).config
    same = DistillConfig(
        alpha=0.5, sigma_init=3.0, student_lr=1.0, student_updates=2, lr=1.0, seed=7, kimg=1.0, eps=1.0, ema_kimg=1.0,
        clip_grad=1.0, tf32=False, log_every=1, D=8.0, teacher=Path("there"), compile=True, heun_steps=3,
    )  # fmt: skip
    assert StepSettings(NETWORK, 4, Sharding(), config=same).config == base
    for changes in (
        {"steps": 2}, {"width": 0.5}, {"student_width": 0.5}, {"generator_beta1": 0.9}, {"augment": 0.1},
        {"ema": (0.05,)}, {"student": "lora"}, {"student": "lora", "rank": 4},
    ):  # fmt: skip
        other = StepSettings(NETWORK, 4, Sharding(), config=DistillConfig(**changes)).config
        assert other != base, changes


@dataclass(frozen=True, kw_only=True)
class NewConfig(RunConfig):
    """Settings of somebody who adds two and writes no other line."""

    strength: float = 1.0
    cache: Path | None = setting(None, identity=False, place=True, memory=False)


def test_a_new_setting_is_a_part_of_the_identity(tmp_path):
    config = NewConfig(**OPEN)
    (tmp_path / "config.json").write_text(json.dumps(check_run_folder(tmp_path / "new", "distill", config, {})))
    check_run_folder(tmp_path, "distill", replace(config, cache=tmp_path), {})
    with pytest.raises(ValueError, match=r"\(strength is 1\.0 there, 2\.0 here\): choose another --out$"):
        check_run_folder(tmp_path, "distill", replace(config, strength=2.0), {})
    assert "strength" not in planned_settings(NewConfig) and "cache" in planned_settings(NewConfig)


def test_attention_that_cannot_serve_is_refused(monkeypatch: pytest.MonkeyPatch):
    """Before anything is begun, for a distillation and for a teacher; asked for each width of the network's heads."""
    served = {(torch.device("cpu"), torch.float32, 128): None}
    attending = replace(NETWORK, model_channels=128, attn_resolutions=(8,))
    for config, decide in ((DistillConfig, resolve), (TeacherConfig, resolve_training)):
        asked = config(**OPEN, attention_backend="xformers")
        with pytest.raises(ValueError) as error:
            decide(asked, attending, ALONE)
        assert str(error.value) == (
            "attention-backend xformers cannot run here: it needs CUDA tensors, got cpu: give auto or sdpa"
        )
        with monkeypatch.context() as patched:
            patched.setattr("ipfm.engine.training.resolve.xformers_obstacle", lambda *kind: served[kind])
            decide(asked, attending, ALONE)
    for other in ("compile", "deterministic"):
        with pytest.raises(ValueError, match=f"^attention-backend xformers does not go with {other}, "):
            DistillConfig(attention_backend="xformers", **{other: True})


def test_the_name_of_the_data_is_the_teachers_where_none_is_given():
    net = build_network(NETWORK).eval().requires_grad_(False)
    config = DistillConfig(**OPEN)
    assert Distiller(config, net, world=ALONE).dataset == ""
    net.facts = TeacherFacts(dataset="few")
    assert Distiller(config, net, world=ALONE).dataset == "few"
    assert Distiller(config, net, dataset="many", world=ALONE).dataset == "many"
