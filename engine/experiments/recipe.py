"""From a recipe's command line to its run: the one order in which recipes of every kind do it.

Everything that can be checked is checked before the first process group, folder or step: `Recipe.plan`. A dry run
prints the plan. A run is started by every process together, `Plan.begin`, and then trains.
"""

from __future__ import annotations

import dataclasses
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from ipfm.engine.checks import option_name
from ipfm.engine.config import RunConfig, TeacherConfig
from ipfm.engine.distributed.determinism import prepare_determinism
from ipfm.engine.distributed.launch_environment import check_environment, environment_remarks
from ipfm.engine.distributed.world import World, start_world
from ipfm.engine.experiments.machines import plan_on_machines, say_where_saved, tell
from ipfm.engine.objectives import OBJECTIVES
from ipfm.engine.objectives.own_files import is_being_read
from ipfm.engine.runtime.commandline import BadInput, Given, parse_given, user_input
from ipfm.engine.runtime.launcher import is_first_process, join_slurm, several_machines
from ipfm.engine.runtime.remarks import Remarks
from ipfm.engine.runtime.wording import counted
from ipfm.engine.training.run_folder import is_settled, settings_said

O = TypeVar("O")

# Options that are looked for in recipes, and the command of `ipfm` that has them.
OF_COMMANDS = {
    **dict.fromkeys(("gpu-memory", "fits", "ranks", "gpus", "share", "price"), "plan"),
    **dict.fromkeys(("n", "classes", "solver", "churn"), "sample"),
    **dict.fromkeys(("metrics", "repeats", "save-reference"), "evaluate"),
    **dict.fromkeys(("format", "samples"), "export"),
}
OF_LAUNCHERS = (
    *("num-gpus", "num-accelerators", "num-nodes", "include", "exclude", "hostfile", "master-port", "master-addr"),
    *("nproc-per-node", "nnodes", "node-rank", "rdzv-endpoint", "module"),
)
OF_ANY_SIZE = ("data", "scale")
OF_TEACHERS = (
    *("arch", "preset", "precond", "model-channels", "channel-mult", "num-blocks", "attention"),
    *("conditional", "xflip", "cond", "cbase", "cres", "transfer"),
)
OF_DISTILLATIONS = ("continue-at-kimg", "student-from")
OF_SIZES = ("size",)
OF_ABLATIONS = ("variants", "seeds", "teachers", "teachers-from", "quick")


def _options(settings: type[RunConfig]) -> set[str]:
    """Names of the options that these settings are."""
    return {option_name(f.name) for f in dataclasses.fields(settings)}


def _inherited(settings: type[RunConfig]) -> set[str]:
    """Those that an objective has from another one, of which it is a variant."""
    kinds = [kind for kind in settings.__mro__[1:] if kind in OBJECTIVES.values()]
    return set[str]().union(*map(_options, kinds))


class Plan(ABC):
    """What a command line asks for, checked as far as that goes before the first step."""

    options: Any
    """Options of the recipe, with a field `dry_run`."""
    path: Path
    """The run folder."""
    record: Mapping[str, Any]
    """The content that its config.json is to have."""

    @abstractmethod
    def describe(self) -> str:
        """What a dry run prints."""

    def show(self) -> bool:
        """Where the run is finished, print its result, on the first process; nothing is written.

        Returns:
            Whether that is so, and there is nothing to begin.
        """
        return False

    @abstractmethod
    def begin(self, world: World) -> Callable[[], None]:
        """Take the run's folder and make what is trained; every process calls it.

        Returns:
            The training, up to what is printed at its end. It holds on to nothing of the plan that it has a copy of.

        Raises:
            ValueError: what only shows here, such as a folder that another run has taken since.
        """


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC, Generic[O]):
    """A recipe; its file ends in `main = RECIPE.main`."""

    file: str
    """Name of the recipe's file, for messages."""
    about: str
    """What --help says first."""

    def help_text(self) -> str:
        """What --help says before the options."""
        return self.about

    @property
    @abstractmethod
    def defaults(self) -> O:
        """The options as --help shows them; their class says which there are."""

    @abstractmethod
    def plan(self, given: Given[O]) -> Plan:
        """What is to be done, and with which settings; nothing is written.

        Args:
            given: the command line.

        Raises:
            ValueError, BadInput: an option, a file or a folder that cannot be used; one line.
        """

    def elsewhere(self, name: str) -> str | None:
        """Where an option is one that this recipe does not have, for messages: in `ipfm`, or in other recipes."""
        if name in OF_LAUNCHERS:
            return "it is the launcher's, and stands before the recipe"
        if name in OF_COMMANDS:
            return f"ipfm {OF_COMMANDS[name]} has it"
        if name in _options(TeacherConfig) or name in OF_TEACHERS:
            return "recipes that train a teacher have it, such as train_teacher.py"
        if name in OF_ANY_SIZE:
            return "recipes for images of any size have it, such as distill_ipfm.py and train_teacher.py"
        if name in OF_DISTILLATIONS:
            return "recipes that distil have it"
        if name in OF_SIZES:
            return "recipes for EDM2's networks have it, such as imagenet512_edm2_ipfm.py"
        if name in OF_ABLATIONS:
            return "ablations have it, such as ablation_D.py"
        kinds = [kind for kind, settings in OBJECTIVES.items() if name in _options(settings) - _inherited(settings)]
        if not kinds:
            return None
        return f"recipes that distil by the objective{'s' * (len(kinds) > 1)} {' and '.join(sorted(kinds))} have it"

    def main(self, argv: Sequence[str]) -> None:
        """Run the recipe with these arguments, see `run_recipe`."""
        run_recipe(self, argv)


def say_if_settled(path: Path, kind: str, config: RunConfig, *, measured: bool = True) -> bool:
    """A line on stderr where the run folder has its result already, which is only read: whose result is shown.

    Args:
        path: the run folder.
        kind: "distill" or "teacher".
        config: the settings.
        measured: a table is a part of the result.

    Returns:
        Whether it has.
    """
    if not is_settled(path, kind, config, measured=measured):
        return False
    if not is_first_process():
        return True
    other = settings_said(path, config)
    print(
        f"{path} is finished: this is its result after {counted(f'{config.total_steps:,}', 'step')}, nothing is "
        f"trained or measured again{f'; it was made with other settings ({other})' if other else ''}",
        file=sys.stderr,
    )
    return True


def run_recipe(recipe: Recipe[Any], argv: Sequence[str]) -> None:
    """Run a recipe.

    Args:
        recipe: of any kind.
        argv: arguments without the program's name.

    Raises:
        BadInput: an option, a file, the run folder or the environment cannot be used; nothing was written.
        SystemExit: --help was asked for, and printed.
        TrainingFailed, Interrupted: from the run.
    """
    if is_being_read():
        sys.exit("a file that is read for what it defines starts no run")  # see `ipfm.engine.objectives.own_files`
    with user_input():
        join_slurm()
        len(OBJECTIVES)  # what is wrong with a file of one's own is said first
        given = _read(recipe, argv)
        check_environment()
        _prepare(given.options)
        if is_first_process():
            remarks = Remarks(recipe.file)
            for remark in environment_remarks():
                remarks.add(remark)
        apart = several_machines() and not given.options.dry_run
        alone = None if apart else recipe.plan(given)
    met = _met_on_machines(recipe, given) if alone is None else _met(alone)
    if met is None:
        return
    plan, world = met
    # Nobody changes the folder before all have looked at it.
    world.barrier()
    with user_input():
        train = plan.begin(world)
    if apart:
        say_where_saved(plan.path, world)
    # A teacher that was read is memory of its own.
    del alone, met, plan
    train()


def _read(recipe: Recipe[Any], argv: Sequence[str]) -> Given[Any]:
    """The command line. What is wrong with that of one machine is told to the others."""
    try:
        return parse_given(
            argv, default=recipe.defaults, prog=recipe.file, description=recipe.help_text(), elsewhere=recipe.elsewhere
        )
    except BadInput as error:
        with suppress(ValueError):
            check_environment()
            if several_machines():
                tell(error)
        raise


def _met(plan: Plan) -> tuple[Plan, World] | None:
    """The plan and its processes; None where it is only shown, or its result."""
    if plan.options.dry_run:
        if is_first_process():
            print(plan.describe())
        return None
    if plan.show():
        return None
    with user_input():
        _prepare(plan.options)  # a branch may have it from its run
        return plan, start_world()


def _met_on_machines(recipe: Recipe[Any], given: Given[Any]) -> tuple[Plan, World] | None:
    """The same on several machines: each has files and a folder of its own, and they meet to see whether they agree."""

    def make() -> Plan:
        plan = recipe.plan(given)
        _prepare(plan.options)
        return plan

    return plan_on_machines(make, given.options)


def _prepare(options: Any) -> None:
    """Do what has to be done before a device and the processes' communication start."""
    if getattr(options, "deterministic", False):
        prepare_determinism()
