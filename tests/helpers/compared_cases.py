"""Settings in which the engine is compared with the plain loop beside the grid of `equivalence`: all, and some of each.

`make equivalence` goes through all of them, on the network of the grid; `make test` through some of each setting, on
one of a level less.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import equivalence
import torch
from torch import Tensor

from ipfm.engine import DistillConfig
from ipfm.engine.commands.bench import plain_loop
from ipfm.engine.commands.bench.equivalence import NETWORK, Difference, difference, real_images
from ipfm.models import EDMPrecond, Precond, load_teacher, save_model

# The grid makes 20; of what is compared beside it every kind of step comes in two.
STEPS = 2
# At stage 3 biases and norms stay whole, which saves two thirds of the messages; the grid of `make equivalence` shards
# them too.
WHOLE = 500
BASE: dict[str, Any] = {**equivalence.BASE, "max_steps": STEPS}

SETTINGS: dict[str, dict[str, Any]] = {
    "k1": {},
    "k2": {"steps": 2},
    "last": {"steps": 3, "gradient": "last"},
    "augmented": {"augment": 0.5},
    "options": {
        "student_updates": 2,
        "student_lr": 5e-4,
        "generator_beta1": 0.9,
        "student_beta1": 0.5,
        "alpha": 1.2,
        "lr_warmup": 3,
        "lr_schedule": "linear",
        "lr_end": 0.1,
    },
    "clipped": {"clip_grad": 0.05, "lr_schedule": "rsqrt", "lr_decay_batches": 0.5},
    "varied": {
        "weight": "score",
        "weight_power": 0.5,
        "levels_generator": "lognormal:-0.4:1",
        "levels_student": "half",
        "student_ema": 0.6,
        "student_updates": 2,
    },
    "real": {"real_weights": (0.7, 0.8), "augment": 0.5, "student_updates": 2, "steps": 2, "alpha": 0.5},
    "told": {
        "discriminator": "encoder",
        "discriminator_weights": (1.0, 0.02),
        "discriminator_kimg": (0.0, 0.008),
        "augment": 0.5,
        "steps": 2,
    },
    "both": {
        "discriminator": "encoder",
        "discriminator_weights": (1.0, 0.02),
        "discriminator_kimg": (0.0, 0.0),
        "real_weights": (0.7, 0.8),
        "student_updates": 2,
    },
    # Masks are drawn for a micro-batch as a whole: on one process, at once, they are the plain loop's.
    "dropout": {"dropout": 0.3, "steps": 2},
    "droplast": {"dropout": 0.3, "steps": 3, "gradient": "last"},
}
# On two processes: setting, stage, backward, accumulation and further settings.
MORE: tuple[tuple[str, int, str, int, dict[str, Any]], ...] = (
    ("k2", 0, "phased", 2, {}),
    ("k2", 2, "joint", 2, {}),
    ("last", 1, "phased", 1, {}),
    ("augmented", 0, "phased", 1, {}),
    ("options", 3, "joint", 1, {}),
    ("clipped", 2, "phased", 2, {}),
    *(("varied", stage, ("joint", "phased")[stage % 2], 2 - stage // 3, {}) for stage in (0, 1, 3)),
    *(("real", stage, ("joint", "phased")[stage % 2], 2 - stage // 3, {}) for stage in (0, 1, 2, 3)),
    *(("told", stage, ("phased", "joint")[stage % 2], 2 - stage // 3, {}) for stage in (0, 1, 2, 3)),
    ("both", 2, "joint", 2, {}),
    ("k2", 3, "phased", 1, {"activation_checkpointing": "on"}),
    *(("k1", stage, "phased", 2 - stage // 3, {"offload": "optimizer"}) for stage in (1, 3)),
    ("k1", 3, "joint", 1, {"offload": "all", "teacher_storage": "sharded"}),
    ("k1", 0, "phased", 1, {"teacher_storage": "sharded"}),
)
# What of these `make equivalence` alone compares.
LEFT_TO_THE_TABLE = frozenset(
    {
        "k2-z0-phased-a2", "varied-z0-joint-a2", "real-z1-phased-a2", "real-z2-joint-a2", "real-z3-phased-a1",
        "told-z0-phased-a2", "told-z1-joint-a2", "k1-z3-phased-a1-offload=optimizer",
    }
)  # fmt: skip
DROPOUT = tuple(
    (setting, stage, backward, 1, {"activation_checkpointing": again})
    for setting, stage, backward, again in (
        ("dropout", 0, "joint", "off"), ("dropout", 0, "phased", "off"), ("dropout", 3, "phased", "on"),
        ("droplast", 0, "joint", "off"), ("droplast", 0, "phased", "off"),
    )
)  # fmt: skip


def _name(setting: str, stage: int, backward: str, parts: int, more: Mapping[str, Any]) -> str:
    return "-".join([setting, f"z{stage}", backward, f"a{parts}", *(f"{k}={v}" for k, v in more.items())])


def make_small_teacher(folder: Path) -> Path:
    """The network of the grid without its second level, as a model folder."""
    torch.manual_seed(0)
    net = EDMPrecond(replace(NETWORK, channel_mult=(1,), attn_resolutions=(8,)))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    save_model(net, folder / "small")
    return folder / "small"


def beside_the_grid(ranks: int) -> dict[str, dict[str, Any]]:
    """Every case of `ranks` processes, by a name that begins with its setting."""
    return {
        _name(setting, stage, backward, parts, more): {
            **BASE, **SETTINGS[setting], **more, "zero": stage, "backward": backward,
            "micro_batch": BASE["batch"] // ranks // parts,
        }
        for setting, stage, backward, parts, more in (DROPOUT if ranks == 1 else MORE)
    }  # fmt: skip


def as_on_a_gpu(ranks: int) -> dict[str, dict[str, Any]]:
    """For networks that are put together as on a GPU: every stage, by its name."""
    return {
        f"k1-z{stage}": {
            **BASE, "zero": stage, "backward": ("joint", "phased")[stage % 2], "micro_batch": BASE["batch"] // ranks,
            "activation_checkpointing": "on" if stage == 3 else "off", "memory_format": "channels_last",
        }
        for stage in equivalence.STAGES
    }  # fmt: skip


def by_the_plain_loop(net: Precond, settings: Collection[str] = SETTINGS.keys()) -> dict[str, plain_loop.Plain]:
    """What the plain loop makes of each of these settings."""
    return {
        name: plain_loop.distill(
            net,
            DistillConfig(**{**BASE, **setting}),
            STEPS,
            real=real_images() if {"real_weights", "discriminator"} & setting.keys() else None,
        )
        for name, setting in SETTINGS.items()
        if name in settings
    }


def check_steps(expected: plain_loop.Plain, found: Mapping[str, Tensor], name: str) -> Difference:
    """The losses of every step, and what is averaged; returns how far weights are apart, which the caller judges.

    Raises:
        AssertionError: the losses differ, or an average is there that should not be, or is not.
    """
    for which in ("student", "generator"):
        losses = torch.tensor(getattr(expected, f"{which}_loss")).double()
        torch.testing.assert_close(found[f"loss/{which}_loss"], losses, rtol=1e-4, atol=1e-4)
    # The student's average is the optimiser's where the generator is trained by it, and nowhere else.
    averages = any(key.startswith("student/ema/") for key in found)
    assert averages == name.startswith("varied"), f"{name}: averages of the student: {averages}"
    return difference(expected, found)


def table(folder: Path) -> float:
    """Print a row for each case, and return the largest difference of all.

    Raises:
        AssertionError: as `check_steps`.
    """
    print(f"\nThe same after {STEPS} steps in every further setting")
    print("| setting | ranks | put together as on a GPU | student | generator | EMA | |")
    print("|---|---|---|---|---|---|---|")
    teacher, worst = equivalence.make_teacher(folder), 0.0
    plain = by_the_plain_loop(load_teacher(teacher))
    for ranks in equivalence.RANKS:
        for on_gpu, cases in ((False, beside_the_grid(ranks)), (True, as_on_a_gpu(ranks))):
            results = equivalence.run(teacher, folder, ranks, cases, STEPS, whole=WHOLE, as_on_a_gpu=on_gpu)
            for name, found in results.items():
                row = check_steps(plain[name.partition("-")[0]], found, name)
                worst = max(worst, *row)
                cells = [name, str(ranks), "yes" if on_gpu else "no", *(f"{value:.1e}" for value in row)]
                verdict = "ok" if max(row) <= equivalence.LIMIT else "WRONG"
                print(f"| {' | '.join(cells)} | {verdict} |", flush=True)
    return worst
