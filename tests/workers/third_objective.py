"""A process that finds one more file among the objectives: a recipe for it, and what `ipfm` says of its run.

Argument, JSON: the folder with the file, a teacher, a folder to work in. Prints JSON: what each command printed.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

from ipfm.engine import objectives

folder, teacher, out = json.loads(sys.argv[1])
# As if the file lay in engine/objectives/ itself.
objectives.__path__.append(folder)

from ipfm.engine.commands.main import _main as ipfm  # noqa: E402
from ipfm.engine.experiments import recipe_options  # noqa: E402
from ipfm.engine.runtime.commandline import BadInput  # noqa: E402
from ipfm.recipes import digits_ipfm  # noqa: E402

settings = objectives.OBJECTIVES["regression"]
recipe = digits_ipfm.RECIPE.with_options(
    "digits_regression.py",
    "Digits by regression.",
    recipe_options(settings(batch=16, max_steps=4, lr=1e-2, log_every=1), eval_images=64),
)
run = Path(out) / "run"
commands: dict[str, tuple[object, list[str]]] = {
    "help": (recipe.main, ["--help"]),
    "refused": (recipe.main, ["--level", "0"]),
    "recipe": (recipe.main, ["--teacher", teacher, "--level", "1.5", "--heun-steps", "2", "--out", str(run)]),
    "plan --help": (ipfm, ["plan", "--help"]),
    "plan": (ipfm, ["plan", "--model", teacher, "--objective", "regression", "--level", "2", "--batch", "8"]),
    "plan --json": (ipfm, ["plan", "--model", teacher, "--objective", "regression", "--json"]),
    "plan of another": (ipfm, ["plan", "--model", teacher, "--level", "2"]),
    "info": (ipfm, ["info", str(run)]),
    "info --json": (ipfm, ["info", str(run), "--json"]),
    "info of the generator": (ipfm, ["info", str(run / "generator")]),
    "report --json": (ipfm, ["report", str(run), "--json"]),
    "report": (ipfm, ["report", str(run)]),
    "export": (ipfm, ["export", str(run / "generator"), str(Path(out) / "hub"), "--samples", "4", "--json"]),
}
said = {}
for name, (command, arguments) in commands.items():
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            command(arguments)  # type: ignore[operator]
        except SystemExit as stop:
            assert not stop.code, name
        except BadInput as error:
            print(error)
    said[name] = printed.getvalue()
print(json.dumps(said))
