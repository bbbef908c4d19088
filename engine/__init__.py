"""Training engine: the distillation loop, its objectives, samplers, checkpoints and metrics."""

import os

# Threads that wait for each other should soon sleep: where another process wants a core too, threads that spin make the
# small networks of CPU runs some thirty times slower. It is read when torch is loaded, so it has to be set before that.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

from ipfm.engine.config import DistillConfig, TeacherConfig
from ipfm.engine.evaluation import Evaluation
from ipfm.engine.memory import plan_memory
from ipfm.engine.noise_levels import NoiseLevels
from ipfm.engine.pid import PidConfig
from ipfm.engine.samplers import generate, heun_sample, trajectory_sample
from ipfm.engine.teacher_training import TeacherTraining
from ipfm.engine.trio import Distiller

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
    "plan_memory",
    "trajectory_sample",
]
