"""Worker: the recipe of the digits, whose first process is killed while it puts aside what it goes back from."""

import os
import signal
from typing import Any

from ipfm.engine.experiments import run_command
from ipfm.engine.training import set_aside
from ipfm.recipes import digits_ipfm

usual = set_aside._copy


def killed(*paths: Any) -> None:
    if paths[1].name == "results.json":
        os.kill(os.getpid(), signal.SIGKILL)
    usual(*paths)


if __name__ == "__main__":
    set_aside._copy = killed  # type: ignore[assignment]
    run_command(digits_ipfm.__file__, digits_ipfm.main)
