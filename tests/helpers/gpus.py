"""Which tests may use this machine's GPUs: those marked `gpu`, where `pytest -m gpu` asks for them, and no others.

All others compute what they compute on a machine without one, in this process and in those that it starts.
"""

from __future__ import annotations

import os

from _pytest.mark.expression import Expression

# Programs remark on a CUDA_VISIBLE_DEVICES that names no GPU, unless it is empty. DeepSpeed's launcher sets that
# variable anew for what it starts, and hands DS_ACCELERATOR on.
HIDDEN = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
# How a test that is skipped can be run.
ASKING = "needs a CUDA device, which only `pytest -m gpu` (make test-gpu) lets tests use"


def asked(marks: str) -> bool:
    """Whether what is given to `-m` asks for tests that are marked `gpu`, by name."""
    if not marks:
        return False
    chosen = Expression.compile(marks)
    return chosen.evaluate(lambda name, **_: name == "gpu") and not chosen.evaluate(lambda name, **_: False)


def hide() -> None:
    """Hide GPUs from this process and from what it starts; before anything asks torch for them."""
    os.environ["CUDA_VISIBLE_DEVICES"] = HIDDEN["CUDA_VISIBLE_DEVICES"]
