"""Training engine: the distillation loop, its objectives, samplers, checkpoints and metrics."""

import os
from typing import TYPE_CHECKING, Any

from ipfm.engine.runtime.lazy import loaded

if TYPE_CHECKING:
    from ipfm.engine.config import TeacherConfig
    from ipfm.engine.data.image_grid import save_grid
    from ipfm.engine.evaluation.evaluation import Evaluation
    from ipfm.engine.memory import plan_memory
    from ipfm.engine.noise_levels import NoiseLevels
    from ipfm.engine.objectives.ipfm import DistillConfig
    from ipfm.engine.objectives.pid import PidConfig
    from ipfm.engine.sampling.image_sampler import load_generator, load_sampler
    from ipfm.engine.sampling.samplers import generate, heun_sample, trajectory_sample
    from ipfm.engine.training.distiller import Distiller
    from ipfm.engine.training.teacher import TeacherTraining


# Threads that wait for each other should soon sleep: where another process wants a core too, threads that spin make the
# small networks of CPU runs some thirty times slower. It is read when torch is loaded, so it has to be set before that.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

# Of what torch's C++ says only errors: where processes do not meet it warns in some twenty lines of a stack, beside the
# line that says what is missing, and of every address without a name. It is read when torch is loaded, too.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


__all__ = [
    "DistillConfig",
    "Distiller",
    "Evaluation",
    "NoiseLevels",
    "PidConfig",
    "TeacherConfig",
    "TeacherTraining",
    "generate",
    "heun_sample",
    "load_generator",
    "load_sampler",
    "plan_memory",
    "save_grid",
    "trajectory_sample",
]

# Loaded when they are asked for: the command line is a part of this package, and answers without torch. The names are
# spelled out for type checkers: here alone an objective's settings are named outside its file and recipes.
_HOMES = {
    "config": ("TeacherConfig",),
    "data.image_grid": ("save_grid",),
    "evaluation.evaluation": ("Evaluation",),
    "memory": ("plan_memory",),
    "noise_levels": ("NoiseLevels",),
    "objectives.ipfm": ("DistillConfig",),
    "objectives.pid": ("PidConfig",),
    "sampling.image_sampler": ("load_generator", "load_sampler"),
    "sampling.samplers": ("generate", "heun_sample", "trajectory_sample"),
    "training.teacher": ("TeacherTraining",),
    "training.distiller": ("Distiller",),
}


def __getattr__(name: str) -> Any:
    return loaded(__name__, _HOMES, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
