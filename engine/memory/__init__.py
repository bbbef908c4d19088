"""The memory of a run: predicted before it, measured in it."""

from ipfm.engine.memory.budget import device_budget, gpu_budget
from ipfm.engine.memory.choose import Layout, choose_layout, choose_training, plan_layout, plan_training
from ipfm.engine.memory.fits import LayoutOnGpu, fits, layout_of
from ipfm.engine.memory.plan import MemoryPlan, plan_memory, plan_teacher_training

__all__ = [
    "Layout",
    "LayoutOnGpu",
    "MemoryPlan",
    "choose_layout",
    "choose_training",
    "device_budget",
    "fits",
    "gpu_budget",
    "layout_of",
    "plan_layout",
    "plan_memory",
    "plan_teacher_training",
    "plan_training",
]
