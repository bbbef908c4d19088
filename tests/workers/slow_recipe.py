"""Worker: the recipe of the digits with steps that take half a second, most of which is slept through."""

import time

from ipfm.engine.experiments import run_command
from ipfm.engine.objectives.step_metrics import StepMetrics
from ipfm.engine.training.distiller import Distiller
from ipfm.recipes import digits_ipfm

SECONDS = 0.5


def slowly(distiller: Distiller, step: int) -> StepMetrics:
    time.sleep(SECONDS)
    return distiller.steps.iteration(step)


if __name__ == "__main__":
    Distiller._step = slowly  # type: ignore[method-assign]
    run_command(digits_ipfm.__file__, digits_ipfm.main)
