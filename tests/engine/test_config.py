"""Settings: what is refused and how, derived values, JSON; and what a device and a network decide of them."""

import dataclasses
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ipfm.engine.averages import Average
from ipfm.engine.checks import check_D
from ipfm.engine.config import RunConfig, TeacherConfig
from ipfm.engine.distributed.precision import apply_precision
from ipfm.engine.noise_levels import NoiseLevels
from ipfm.engine.objectives.ipfm import DistillConfig
from ipfm.engine.training.resolve import complete, resolve_D, resolve_precision
from ipfm.models import EDMPrecond, NetworkConfig, presets

NAN, INF = math.nan, math.inf
CPU = torch.device("cpu")

# setting -> (what the message says of it, impossible values)
INTEGERS = {
    **dict.fromkeys(
        (
            "batch", "micro_batch", "max_steps", "log_every", "checkpoint_every", "keep_checkpoints", "max_bad_steps",
            "heun_steps", "steps", "student_updates", "rank",
        ),
        ("must be an integer >= 1", (0, -1, 1.0, 2.5, "3", True)),
    ),
    **dict.fromkeys(
        ("eval_every", "seed", "snapshot_every", "keep_snapshots", "lr_warmup"),
        ("must be an integer >= 0", (-1, 0.0, "0", False)),
    ),
}  # fmt: skip
REALS = {
    **dict.fromkeys(
        ("kimg", "lr", "ema_kimg", "ema_rampup", "sigma_init", "student_lr", "width", "student_width", "lora_alpha"),
        ("must be a finite number > 0", (0, -1.0, INF, NAN, "1", True)),
    ),
    **dict.fromkeys(
        ("eps", "lr_rampup_kimg", "student_first_kimg"), ("must be a finite number >= 0", (-1e-9, INF, NAN, "1"))
    ),
    **dict.fromkeys(
        ("dropout", "beta1", "beta2", "generator_beta1", "student_beta1"),
        ("must lie in [0, 1)", (-0.1, 1, 1.5, NAN, "0")),
    ),
    **dict.fromkeys(("augment", "lr_end"), ("must lie in [0, 1]", (-0.1, 1.01, NAN, "0", True))),
    "alpha": ("must be a number in [-1e+06, 1e+06]", (NAN, INF, -INF, 2e6, "1", True)),
    "D": ("must lie in (0, inf]", (0, -1.0, NAN, "128", True, -INF)),
}
CHOICES = {
    "zero": ("must be one of the stages 0, 1, 2, 3", (4, -1, "2", True)),
    "precision": ("must be auto, fp32, bf16 or fp16", ("fp8", 16)),
    "offload": ("must be none, optimizer or all", ("cpu", None)),
    "activation_checkpointing": ("must be auto, on or off", ("yes", True)),
    "teacher_storage": ("must be auto, fp32, half or sharded", ("bf16", None)),
    "clip_grad": ("must be a finite number > 0", (0, -1.0, INF, NAN, True)),
    "guidance": ("must be a finite number >= 0", (-1e-9, INF, NAN, True)),
    "async_checkpoints": ("must be True or False", (1, None)),
    **dict.fromkeys(("profile_memory", "from_step"), ("must be an integer >= 0", (-1, 1.5, True))),
    "backward": ("must be auto, joint or phased", ("both", None)),
    "tf32": ("must be True or False", (1, "no")),
    "deterministic": ("must be True or False", (1, "no")),
    "attention_backend": ("must be auto, sdpa or xformers", ("math", 1)),
    "rules": ("must be 1 or 2", (0, 3, "2", 1.0, True, None)),
    "compile": ("must be True or False", (1, "no")),
    "memory_format": ("must be auto, contiguous or channels_last", ("nhwc", None)),
    "cuda_graphs": ("must be auto, on or off", ("yes", None, True)),
    "resume": ("must be True or False", (0, None)),
    **dict.fromkeys(("logvar", "real_xflip"), ("must be True or False", (1, "yes"))),
    "lr_schedule": ("must be constant, linear or rsqrt", ("cosine", None)),
    "gradient": ("must be all or last", ("first", None)),
    "weight": ("must be sid, sigma, edm, score or unsquared", ("SiD", None, 1)),
    "weight_power": ("must be a number in [-4, 4]", (4.1, NAN, "1", True)),
    "student_ema": ("must lie in [0, 1)", (-0.1, 1, NAN, "0.99")),
    "levels_generator": (
        "must be grid:LOW:HIGH, rising:HIGH, lognormal:MEAN:STD, loguniform[:LOW:HIGH] or log-t:MEAN:SCALE:NU",
        ("half", "generator", "grid", "grid:0:0.8:1", "lognormal:a:1", "lognormal:nan:1", "", 1, 0.8),
    ),
    "levels_student": (
        "must be generator, half, grid:LOW:HIGH, rising:HIGH, lognormal:MEAN:STD, loguniform[:LOW:HIGH] or "
        "log-t:MEAN:SCALE:NU",
        ("edm", "loguniform:1", True),
    ),
    "init": ("must be auto, teacher or random", ("zero", None)),
    "student_init": ("must be auto, teacher or random", ("zero", True)),
    **dict.fromkeys(("generator", "student"), ("must be full or lora", ("peft", None, True))),
    "export_ema": ("must be best or one of ema500k", ("ema0.1", None, 1)),
    "snapshot_precision": ("must be fp32 or fp16", ("bf16", None)),
}
CASES = [
    (name, says, value)
    for table in (INTEGERS, REALS, CHOICES)
    for name, (says, values) in table.items()
    for value in values
]


def owner(name: str) -> type[RunConfig]:
    distills = name in {f.name for f in dataclasses.fields(DistillConfig)}
    return DistillConfig if distills else TeacherConfig


@pytest.mark.parametrize(("name", "says", "value"), CASES)
def test_a_refusal_names_setting_and_value(name, says, value):
    with pytest.raises(ValueError) as error:
        owner(name)(**{name: value})
    words = (
        "precision", "backward", "tf32", "resume", "offload", "activation_checkpointing", "teacher_storage",
        "async_checkpoints", "compile", "deterministic", "attention_backend", "memory_format", "gradient", "init",
        "student_init", "rules", "cuda_graphs", "export_ema", "snapshot_precision", "logvar", "real_xflip",
        "weight", "levels_generator", "levels_student", "lr_schedule",
        "generator", "student",
    )  # fmt: skip
    shown = repr(value) if name in words else str(value)
    assert str(error.value) == f"{name.replace('_', '-')} {says}, got {shown}"


def test_every_setting_is_checked():
    """What has no impossible value, or is checked in a test of its own, is named here."""
    free = {
        "out",
        "teacher",
        "guide",
        "noise",
        "sigmas",
        "ema",
        "class_counts",
        "real_data",
        "real_weights",
        "lr_decay_batches",
        "discriminator",
        "discriminator_weights",
        "discriminator_kimg",
    }
    names = {f.name for kind in (DistillConfig, TeacherConfig) for f in dataclasses.fields(kind)}
    assert names == free | {name for name, *_ in CASES}


@pytest.mark.parametrize(
    ("name", "value"), [("D", 0), ("D", NAN), ("beta1", 1.0), ("heun_steps", 0), ("lr_decay_batches", -1.0)]
)
def test_teacher_settings_of_the_same_name(name, value):
    with pytest.raises(ValueError, match=f"^{name.replace('_', '-')} must .*, got {value}$"):
        TeacherConfig(**{name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": 3, "kimg": 2.0}, "max-steps and kimg exclude each other, got 3 and 2.0"),
        ({"max_steps": 10**9}, "max-steps must be at most 100,000,000 optimiser steps, got 1000000000"),
        ({"kimg": 1e308, "batch": 1}, "kimg must be at most 100,000,000 optimiser steps, got 1e+308"),
        ({"lr_end": 0.5}, "lr-end is a setting of lr-schedule linear, got lr-schedule constant"),
        ({"lr_schedule": "rsqrt"}, "lr-schedule rsqrt needs lr-decay-batches, the updates before the rate falls"),
        ({"lr_decay_batches": 9}, "lr-decay-batches is a setting of lr-schedule rsqrt, got lr-schedule constant"),
        ({"lr_decay_batches": 0, "lr_schedule": "rsqrt"}, "lr-decay-batches must be a finite number > 0, got 0"),
        ({"seed": 2**64}, f"seed must be below 2^64, got {2**64}"),
        ({"offload": "optimizer"}, "offload optimizer needs zero 1, 2 or 3, got none"),
        ({"offload": "optimizer", "zero": 0}, "offload optimizer needs zero 1, 2 or 3, got 0"),
        ({"offload": "all", "zero": 2}, "offload all needs zero 3, which shards the weights, got 2"),
        (
            {"teacher_storage": "half", "precision": "fp32"},
            "teacher-storage half needs precision bf16 or fp16: in fp32 it would round the teacher's weights",
        ),
        ({"noise": {"rho": 7}}, "noise must be NoiseLevels, got {'rho': 7}"),
        ({"sigmas": (1.0, 2.0)}, "sigmas must fall strictly, got 1, 2"),
        (
            {"class_counts": (0, 0)},
            "class-counts must be numbers of images, none negative and not all 0, got 0, 0",
        ),
        (
            {"class_counts": (3, -1, 2.5)},
            "class-counts must be numbers of images, none negative and not all 0, got 3, -1, 2.5",
        ),
        (
            {"student": "lora", "student_ema": 0.99},
            "student-ema keeps a network of averaged weights beside the student, and with student lora there is none "
            "of its own: leave one of them out",
        ),
        ({"rank": 4}, "rank 4 was given, but no network is lora: give generator lora, or student lora"),
        ({"lora_alpha": 4.0}, "lora-alpha 4 was given, but no network is lora: give generator lora, or student lora"),
        (
            {"generator": "lora", "width": 0.5},
            "generator lora has the teacher's weights and so its width: leave width 0.5 out",
        ),
        (
            {"student": "lora", "student_width": 2.0},
            "student lora has the teacher's weights and so its width: leave student-width 2 out",
        ),
        (
            {"student": "lora", "student_init": "random"},
            "student lora begins as the teacher: leave student-init random out",
        ),
        (
            {"student": "lora", "teacher_storage": "sharded"},
            "student lora computes with the teacher's weights, which teacher-storage sharded takes away between two "
            "uses: give fp32 or half",
        ),
        ({"sigmas": "2.5"}, "sigmas must be a sequence of numbers, got '2.5'"),
        ({"steps": 3, "sigmas": (2.5, 1.0)}, "steps and sigmas disagree: 3 steps, 2 noise levels"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(ValueError) as error:
        DistillConfig(**settings)
    assert str(error.value) == message


def test_the_ends_of_the_ranges_are_possible():
    DistillConfig(batch=1, max_steps=10**8, eps=0.0, dropout=0.0, seed=2**64 - 1, alpha=0, D=INF, zero=2)
    DistillConfig(zero=3, offload="all", precision="fp16", teacher_storage="sharded", clip_grad=1e-9, profile_memory=0)
    DistillConfig(D=1, precision="bf16", zero=1, generator_beta1=0.999, eval_every=0, kimg=1e-9)
    TeacherConfig(D=0.5, beta1=0.0, lr_rampup_kimg=0.0)
    for D in (1, 0.001, 2048.0, INF):
        check_D(D)


# -- derived values ----------------------------------------------------------------------------------------------------


def test_length():
    assert DistillConfig(max_steps=7).total_steps == 7
    assert DistillConfig(kimg=1.0, batch=256).total_steps == 4  # 3.9 batches
    assert DistillConfig(kimg=1.024, batch=256).total_steps == 4
    assert DistillConfig(kimg=1e-6, batch=256).total_steps == 1
    with pytest.raises(ValueError, match=r"^the length of the run is not set: give max-steps or kimg$"):
        _ = DistillConfig().total_steps


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "expected"),
    [(256, None, 1, (256, 256)), (256, 32, 8, (32, 32)), (96, 8, 4, (24, 8)), (8, None, 8, (1, 1)), (5, 5, 1, (5, 5))],
)
def test_split(batch, micro, ranks, expected):
    assert DistillConfig(batch=batch, micro_batch=micro).split(ranks) == expected


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "message"),
    [
        (256, None, 3, "batch must be divisible by the number of processes, got 256 and 3"),
        (256, 24, 4, "micro-batch must divide the 64 images of a process (batch 256, 4 processes), got 24"),
        (256, 512, 1, "micro-batch must divide the 256 images of a process (batch 256, 1 processes), got 512"),
        (256, None, 0, "the number of processes must be an integer >= 1, got 0"),
    ],
)
def test_a_batch_that_does_not_divide(batch, micro, ranks, message):
    with pytest.raises(ValueError) as error:
        DistillConfig(batch=batch, micro_batch=micro).split(ranks)
    assert str(error.value) == message


def test_ema_decay():
    """beta = 0.5^(batch / min(half-life, 0.05 · images seen before this step)), in images."""
    config = DistillConfig(batch=100, ema_kimg=10.0, ema_rampup=0.05)
    assert config.ema_decay(0) == 0
    assert config.ema_decay(1) == pytest.approx(0.5 ** (1 / 0.05))
    assert config.ema_decay(10) == pytest.approx(0.5 ** (100 / 50))
    assert config.ema_decay(1999) == pytest.approx(0.5 ** (100 / 9995))
    # As version 0.1 counted, whose runs go on so.
    first = replace(config, rules=1)
    assert [first.ema_decay(step) for step in range(3000)] == [config.ema_decay(step + 1) for step in range(3000)]
    # From 10 000 / 0.05 = 200 000 images on, 2000 steps, the half-life holds: half is forgotten in 100 steps.
    assert config.ema_decay(2000) == config.ema_decay(10**6) == 0.5 ** (1 / 100)
    assert config.ema_decay(10**6) ** 100 == pytest.approx(0.5)


def test_learning_rate_ramp():
    config = TeacherConfig(batch=100, lr=1e-3, lr_rampup_kimg=1.0)
    assert [config.learning_rate(step) for step in (0, 4, 9, 10, 999)] == pytest.approx([1e-4, 5e-4, 1e-3, 1e-3, 1e-3])
    flat = TeacherConfig(batch=100, lr=1e-3, lr_rampup_kimg=0.0)
    assert [flat.learning_rate(step) for step in (0, 1)] == [1e-3, 1e-3]


def test_steps_and_sigmas_agree():
    assert DistillConfig().levels == (2.5,) and DistillConfig().sigmas == ()
    assert DistillConfig(steps=4).levels == (2.5, 1.875, 1.25, 0.625)
    assert DistillConfig(steps=2, sigma_init=10.0).levels == (10.0, 5.0)
    given = DistillConfig(sigmas=(3, 1, 0.5))
    assert given.levels == given.sigmas == (3.0, 1.0, 0.5) and given.steps == 3
    assert DistillConfig(sigmas=[3, 1], steps=2).levels == (3.0, 1.0)
    assert replace(given, seed=1).steps == 3  # a copy agrees with itself
    resolved = replace(DistillConfig(steps=2), sigmas=DistillConfig(steps=2).levels)
    assert (resolved.steps, resolved.levels) == (2, (2.5, 1.25))


# -- JSON --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        DistillConfig(D=INF, sigmas=(2.5, 0.1), out=Path("runs/a"), teacher=Path("t"), lr=0.1 + 0.2, max_steps=3),
        TeacherConfig(noise=NoiseLevels(p_mean=-1 / 3)),
        DistillConfig(),
    ],
    ids=["distill", "teacher", "default"],
)
def test_json(config):
    """Valid JSON, exact, with every setting; infinity is a string."""
    record = config.to_json()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert list(record) == [f.name for f in dataclasses.fields(config)]
    again = {name: math.inf if value == "inf" else value for name, value in record.items()}
    again["noise"] = NoiseLevels(**record["noise"])
    for name in ("out", "teacher"):
        again |= {name: Path(again[name])} if again.get(name) else {}
    if "sigmas" in again:
        again["sigmas"] = tuple(again["sigmas"])
    assert type(config)(**again) == config


def test_json_values():
    record = DistillConfig(D=INF, sigmas=(2.5, 1.0), out=Path("runs/a")).to_json()
    assert (record["D"], record["sigmas"], record["out"], record["kimg"]) == ("inf", [2.5, 1.0], "runs/a", None)
    assert record["noise"]["sigma_max"] == 80.0 and "ALTERNATIVES" not in record


def test_a_configuration_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DistillConfig().batch = 3  # type: ignore[misc]


# -- what a network and a device decide --------------------------------------------------------------------------------

DIGITS = presets.get("digits", D=128.0)


def test_D_of_a_run():
    assert resolve_D(None, DIGITS) == 128.0 and resolve_D(128, DIGITS) == 128.0
    assert resolve_D(INF, presets.get("digits")) == INF
    with pytest.raises(
        ValueError, match=r"^D 64 was given, but the network was trained for D 128: leave D out or match it$"
    ):
        resolve_D(64.0, DIGITS)


@pytest.mark.parametrize(
    ("precision", "zero", "expected"),
    [
        ("auto", None, ("fp32", None)),
        ("auto", 2, ("fp32", 2)),
        ("fp32", None, ("fp32", None)),
        ("fp32", 1, ("fp32", 1)),
        ("bf16", None, ("bf16", None)),
        ("bf16", 2, ("bf16", 2)),
    ],
)
def test_precision_on_a_cpu(precision, zero, expected):
    config = resolve_precision(DistillConfig(precision=precision, zero=zero), CPU)
    assert (config.precision, config.zero) == expected


@pytest.mark.parametrize(("zero", "expected"), [(None, ("bf16", None)), (0, ("fp32", 0)), (2, ("bf16", 2))])
@pytest.mark.parametrize("capable", [True, False])
def test_precision_on_a_gpu(zero, expected, capable, monkeypatch):
    """Turing emulates bf16, which torch counts as support and which nobody wants unasked."""
    device = torch.device("cuda", 1)
    capabilities = {device: (8, 0) if capable else (7, 5)}
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    config = resolve_precision(DistillConfig(zero=zero), device)
    assert (config.precision, config.zero) == (expected if capable else ("fp32", zero))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"img_resolution": 8}, "augment 0.12 needs a network with 9 augmentation labels, this one has 0"),
        ({"img_resolution": 4, "augment_dim": 9}, "augment 0.12 needs images of at least 8x8"),
    ],
)
def test_a_network_that_cannot_be_told_of_augmentation(network, message):
    config = NetworkConfig(img_channels=1, model_channels=8, channel_mult=(1,), num_blocks=1, **network)
    with pytest.raises(ValueError, match=message):
        complete(DistillConfig(augment=0.12), config, torch.device("cpu"))
    assert complete(DistillConfig(), config, torch.device("cpu")).augment == 0


def test_complete_leaves_open_what_memory_decides():
    config = complete(DistillConfig(steps=2), DIGITS, CPU)
    assert (config.D, config.sigmas, config.precision, config.zero) == (128.0, (2.5, 1.25), "fp32", None)
    assert (config.micro_batch, config.backward, config.activation_checkpointing) == (None, "auto", "auto")
    assert complete(config, DIGITS, CPU) == config
    with pytest.raises(ValueError, match="D 64 was given"):
        complete(DistillConfig(D=64.0), DIGITS, CPU)


def test_apply_precision():
    net = EDMPrecond(DIGITS)
    assert apply_precision(net, "bf16").compute_dtype == torch.bfloat16
    assert net.model.map_layer0.weight.dtype == torch.float32
    assert apply_precision(net, "fp32").compute_dtype == torch.float32


def test_several_averages():
    config = TeacherConfig(batch=100, ema_kimg=(500, 2000.0), ema=(0.05, 0.1), ema_rampup=1.0)
    assert config.average_names == ("ema500k", "ema2000k", "ema0.05", "ema0.1")
    assert config.to_json()["ema_kimg"] == [500, 2000.0] and config.to_json()["ema"] == [0.05, 0.1]
    decays = config.ema_decay(10**6)
    assert decays[:2] == (0.5 ** (1 / 5000), 0.5 ** (1 / 20000))
    assert decays[2:] == tuple(Average(std=s).decay(10**6, 100, rampup=1, seen=0) for s in (0.05, 0.1))
    assert config.ema_decay(0) == (0, 0, 0, 0)
    # One half-life is the number that it was before there were several.
    assert TeacherConfig(ema_kimg=(500.0,)).to_json() == TeacherConfig().to_json()
    alone = TeacherConfig(ema_kimg=0, ema=(0.1,))
    assert alone.average_names == ("ema0.1",) and isinstance(alone.ema_decay(3), float)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ema": (0.3,)}, "ema must be relative widths from 0.0001 to 0.2887 (below), got 0.3"),
        ({"ema": ("a",)}, "ema must be relative widths from 0.0001 to 0.2887 (below), got a"),
        ({"ema": ()}, "ema needs a value"),
        ({"ema_kimg": ()}, "ema-kimg needs a value"),
        ({"ema": (0.1, 0.1)}, "ema must be different averages, got (0.1, 0.1)"),
        ({"ema_kimg": (5.0, 5)}, "ema-kimg must be different averages, got (5.0, 5)"),
        ({"ema_kimg": (5.0, 0)}, "ema-kimg must be a finite number > 0, got 0"),
        (
            {"ema_kimg": (1, 2, 3), "ema": (0.1, 0.2)},
            "ema and ema-kimg must be at most 4 averages together, got ema1k, ema2k, ema3k, ema0.1, ema0.2",
        ),
        ({"ema": (0.1,), "export_ema": "ema0.2"}, "export-ema must be best or one of ema500k, ema0.1, got 'ema0.2'"),
    ],
)
def test_averages_that_cannot_be_kept(given, said):
    with pytest.raises(ValueError) as error:
        TeacherConfig(**given)
    assert str(error.value) == said
