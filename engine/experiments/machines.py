"""The plan of a run on several machines: each has been given a command, files and a run folder, which have to agree.

The processes meet before anything is begun. What keeps one of them from the run they all know, and end by one line
each, instead of waiting for it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

import torch.distributed as dist

from ipfm.engine.checks import option_name
from ipfm.engine.distributed.agreement import together
from ipfm.engine.distributed.launch_environment import answer_timeout
from ipfm.engine.distributed.world import World, start_world
from ipfm.engine.runtime.commandline import BAD_INPUT, BadInput, user_input
from ipfm.engine.runtime.launcher import is_first_here, is_first_process
from ipfm.engine.runtime.versions import PACKAGES, installed
from ipfm.engine.training.machine_folders import (
    Contents,
    contents,
    copy_from_first,
    find_elsewhere,
    newest_elsewhere,
    own_host,
)
from ipfm.engine.training.run_folder import differing_facts

# Seconds for which a process that has said what is wrong already waits for the others, to tell them.
TELLING = 9.0


class Planned(Protocol):
    """What a plan says of itself."""

    @property
    def options(self) -> Any:
        """Options of the recipe."""

    @property
    def path(self) -> Path:
        """The run folder."""

    @property
    def record(self) -> Mapping[str, Any]:
        """The content of its config.json."""

    def show(self) -> bool:
        """Print the result of a finished run; whether it is finished."""


P = TypeVar("P", bound=Planned)


@dataclass(frozen=True)
class _Outcome:
    """What became of a process's plan."""

    host: str
    fault: str = ""
    path: str = ""
    step: int | None = None
    final: bool = False
    """It does not depend on the run folder."""


def plan_on_machines(make: Callable[[], P], options: Any) -> tuple[P, World] | None:
    """Plan on every process, meet, and see that the plans are one.

    Args:
        make: makes the plan of this process; it is called again where the run folder has become another one.
        options: of the recipe, as they were given.

    Returns:
        The plan and the processes; None where the run is finished, and its result has been shown.

    Raises:
        BadInput: on every process: some machine's command, files or folder cannot be used, or are not those of the
            first one; the line says which.
        Failed: the processes do not meet, or a disk refuses the copy of a run folder.
    """
    plan, fault = _tried(make)
    if fault is not None and is_first_process():
        tell(fault)
    with user_input():
        world = start_world()
    own = _outcome(plan, fault, options)
    outcomes: list[Any] = [None] * world.size
    dist.all_gather_object(outcomes, own)
    first: _Outcome = outcomes[0]
    _check(outcomes, fault, but_for_folders=True)
    # A finished run is only read, and nobody needs a copy of it.
    if world.broadcast_text("shown" if world.is_main and plan is not None and plan.show() else ""):
        return None
    path, step = Path(own.path or first.path), first.step
    plan, fault = _with_the_folder_of_the_first(make, plan, fault, path, step, world)
    faults: list[Any] = [None] * world.size
    dist.all_gather_object(faults, _outcome(plan, fault, options))
    _check(faults, fault)
    assert plan is not None
    _check_alike(plan, world)
    return plan, world


def say_where_saved(path: Path, world: World) -> None:
    """One line on what is saved where, if the machines do not share the run folder `path`. Every process calls it."""
    host, apart = find_elsewhere(path, world)
    if apart and world.is_main:
        print(
            f"{path} is not shared: everything is saved in that of {host} (process 0); {' and '.join(apart)} "
            f"{'gets' if len(apart) == 1 else 'get'} a copy of the newest checkpoint at each start",
            file=sys.stderr,
        )


def _tried(make: Callable[[], P]) -> tuple[P | None, BadInput | None]:
    """The plan, or what is wrong with the input of this process."""
    try:
        return make(), None
    except BadInput as error:
        return None, error
    except (ValueError, OSError) as error:
        return None, BadInput(str(error))


def _outcome(plan: Planned | None, fault: BadInput | None, options: Any) -> _Outcome:
    path = getattr(options, "out", None) if plan is None else plan.path
    return _Outcome(
        own_host(), "" if fault is None else str(fault), f"{path or ''}", getattr(options, "from_step", None)
    )


def _check(outcomes: list[_Outcome], own: BadInput | None, *, but_for_folders: bool = False) -> None:
    """BadInput, on every process, where one has a fault; on a machine with the same fault, in its own words."""
    for rank, outcome in enumerate(outcomes):
        if outcome.fault and (rank == 0 or outcome.final or not but_for_folders):
            if own is not None and str(own) == outcome.fault:
                raise own
            raise BadInput(f"process {rank} on {outcome.host}: {outcome.fault}")


def tell(fault: BadInput) -> NoReturn:
    """Say what is wrong with this process's input, tell the others of it, who wait, and end.

    Raises:
        SystemExit: as `run_command` does for this error.
    """
    if is_first_here():
        print(f"{Path(sys.argv[0]).name}: error: {fault}", file=sys.stderr, flush=True)
        if fault.details:
            print(fault.details, file=sys.stderr, flush=True)
    with suppress(RuntimeError, ValueError):
        os.environ["IPFM_TIMEOUT"] = f"{min(TELLING, answer_timeout().total_seconds()):g}"
        world = start_world()
        dist.all_gather_object([None] * world.size, _Outcome(own_host(), str(fault), final=True))
    sys.exit(BAD_INPUT)


def _with_the_folder_of_the_first(
    make: Callable[[], P], plan: P | None, fault: BadInput | None, path: Path, step: int | None, world: World
) -> tuple[P | None, BadInput | None]:
    """The plan of this process once its machine has what the first one's run folder holds."""
    found = together(lambda: contents(path, step), world.size)
    states: list[Any] = [None] * world.size
    dist.all_gather_object(states, (own_host(), found, fault is None))
    host, there, _ = states[0]
    for rank, (name, here, _) in enumerate(states):
        if newest_elsewhere(here, there):
            at = f"at step {there.newest}" if there.newest >= 0 else "without a checkpoint"
            raise BadInput(
                f"{path} of {name} (process {rank}) is at step {here.newest}, and that of {host}, where the run would "
                f"go on, {at}: start with {name} as the first machine, or move its folder away"
            )
    lacking = [name for name, here, planned in states if _lacks(here, there, planned)]
    if not lacking:
        return plan, fault
    wanted = _lacks(found, there, fault is None)
    size = copy_from_first(path, step, world, wanted=wanted)
    if world.is_main:
        which = there.newest if step is None else step
        what = "what a start reads" if which <= 0 else f"its checkpoint of step {which}"
        print(
            f"{path} of {' and '.join(dict.fromkeys(lacking))} lacks what that of {host} has: got a copy of {what} "
            f"({size / 2**20:.1f} MiB)",
            file=sys.stderr,
        )
    return _tried(make) if wanted else (plan, fault)


def _lacks(here: Contents, there: Contents, planned: bool) -> bool:
    """Whether a machine's folder has to become as the first one's, and may: it is a copy, the same run's, or new."""
    differs = any(here.files.get(name) != digest for name, digest in there.files.items())
    return differs and (planned or here.copy or here.free)


def _check_alike(plan: Planned, world: World) -> None:
    """BadInput, on every process: some machine has other versions, or was given another command, than the first."""
    own = (own_host(), _versions(), _chosen(plan), dict(plan.record))
    alike: list[Any] = [None] * world.size
    dist.all_gather_object(alike, own)
    host, versions, chosen, record = alike[0]
    for rank, (name, its_versions, its_chosen, its_record) in enumerate(alike):
        if others := [f"{what} {its_versions[what]}, {versions[what]} on {host}" for what in versions
                      if its_versions[what] != versions[what]]:  # fmt: skip
            raise BadInput(f"process {rank} on {name} has {'; '.join(others)}: install the same on every machine")
        differing = [
            f"{option_name(option)} is {its_chosen.get(option)} there, {value} on {host}"
            for option, value in chosen.items()
            if its_chosen.get(option) != value
        ] or differing_facts(its_record, record, f"on {host}")
        if differing:
            raise BadInput(
                f"process {rank} on {name} was started otherwise ({'; '.join(differing)}): give every machine the same "
                "command and the same files"
            )


def _versions() -> dict[str, str]:
    """What has to be the same on every machine; of this project its sources too."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for folder in ("engine", "kernels", "models", "recipes"):
        for file in sorted((root / folder).rglob("*.py")):
            digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    found = {package: installed(package) for package in PACKAGES if package != "triton"}
    return found | {"ipfm": f"{found['ipfm']} ({digest.hexdigest()[:8]})"}


def _chosen(plan: Planned) -> dict[str, str]:
    """The options, but for those that name places, which may have other names on each machine."""
    options = plan.options
    return {
        f.name: f"{getattr(options, f.name)}"
        for f in dataclasses.fields(options)
        if not _names_place(getattr(options, f.name))
    }


def _names_place(value: Any) -> bool:
    return isinstance(value, Path) or (isinstance(value, str) and os.sep in value)
