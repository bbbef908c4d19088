"""The memory of a run: predicted before it, measured in it."""

from ipfm.engine.memory.plan import USABLE, MemoryPlan, counting_saved_bytes, device_budget, plan_memory

__all__ = ["USABLE", "MemoryPlan", "counting_saved_bytes", "device_budget", "plan_memory"]
