"""`ipfm doctor`: what this machine is, which backends run and what is missing; with --full, whether it works."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ipfm.engine.runtime.commandline import user_input
from ipfm.engine.runtime.errors import Failed
from ipfm.engine.runtime.files import check_writable
from ipfm.engine.runtime.json_output import Write, output
from ipfm.engine.runtime.launcher import check_launch, forget_launch, is_launched, launched_processes, launched_rank

if TYPE_CHECKING:
    from ipfm.engine.commands.doctor.findings import Finding
    from ipfm.engine.commands.doctor.outcome import Outcome

Name = Literal[
    "environment", "kernels", "convolutions", "attention", "engine", "waiting", "time", "memory", "resume", "ranks"
]
OUT = Path("doctor")


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Say what this machine is, what runs on it and what is missing; with --full, try it.

    Example: ipfm doctor --full --out build/doctor

    --full takes at most ten minutes on one GPU. Each section writes a table, NAME.csv and NAME.md, all are on one page,
    doctor.html, and what fails ends no other. Without a GPU it tries what can be tried there.

    Exit code 1: something that a run needs is missing, or a section failed; a line names it and what to do.
    """

    full: bool = False
    """Try kernels, convolutions, attention, the engine, its waits, times and memory, resumption and two processes."""
    out: Path | None = None
    """With --full: folder for the tables. Default: doctor."""
    only: tuple[Name, ...] = ()
    """With --full: these sections alone; tables of others that are in the folder stay."""
    inception: Path | None = None
    """With --full: Inception network, for a distance of images by its features."""
    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        """Print what is found."""
        found = launch_findings()
        forget_launch()
        with user_input():
            self._check()
        with output(as_json=self.json) as write:
            bad = self._full(write) if self.full else self._findings(found, write)
        if bad:
            raise Failed(bad)

    def _check(self) -> None:
        """Check the options together.

        Raises:
            ValueError: some cannot be.
        """
        given = [name for name in ("out", "only", "inception") if getattr(self, name)]
        if given and not self.full:
            raise ValueError(f"{' and '.join(given)} go with --full: add it, or leave them out")
        if self.full:
            from ipfm.engine.commands.doctor.page_mark import check_place

            check_writable(self._out, self._out)
            check_place(self._out)
        if self.inception is not None and not self.inception.is_file():
            raise ValueError(f"inception {self.inception} is no file")

    @property
    def _out(self) -> Path:
        return OUT if self.out is None else self.out

    def _findings(self, of_the_launch: list[Finding], write: Write) -> str:
        """Print what is found; what is missing, in a line."""
        from ipfm.engine.commands.doctor.findings import in_words, missing, verdict

        found = sorted_by_topic([*findings(), *of_the_launch])
        facts = {
            "ok": not missing(found),
            "findings": found,
            "missing": [f"{f.name}: {f.value}" for f in missing(found)],
        }
        write(facts, in_words(found))
        return verdict(found) if missing(found) else ""

    def _full(self, write: Write) -> str:
        """Run the sections and print where their page is; what failed, in a line."""
        from ipfm.engine.commands.doctor.full import examine
        from ipfm.engine.commands.doctor.outcome import facts
        from ipfm.engine.commands.doctor.page_mark import PAGE
        from ipfm.engine.commands.doctor.sections import SECTIONS

        chosen = [section for section in SECTIONS if not self.only or section.name in self.only]
        with user_input():
            self._out.mkdir(parents=True, exist_ok=True)
        device = device_to_examine()
        outcomes = examine(self._out, chosen, device=device, inception=self.inception, done=_say)
        bad = [outcome.section.name for outcome in outcomes if outcome.failures]
        page = self._out / PAGE
        lines = [f"{o.section.name:<14}{o.verdict:<30}{o.seconds:6.0f} s".rstrip() for o in outcomes]
        lines += [f"  {line}" for outcome in outcomes for line in outcome.failures]
        answer = {"ok": not bad, "device": device, "page": page, "sections": facts(outcomes)}
        write(answer, "\n".join([*lines, f"{page}"]))
        return f"what fails: {', '.join(bad)}; {page} has all of it" if bad else ""


def _say(outcome: Outcome) -> None:
    """A line as each section ends."""
    print(f"{outcome.section.name}: {outcome.verdict}, {outcome.seconds:.0f} s", file=sys.stderr, flush=True)


def device_to_examine() -> str:
    """Where the sections compute: on the first GPU, or on the CPU."""
    try:
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"
    except Exception:  # a broken torch is what the first section speaks of
        return "cpu"


def launch_findings() -> list[Finding]:
    """What is left of a launcher in the environment, where it would end a run or make it a part of another."""
    from ipfm.engine.commands.doctor.findings import Finding

    topic, name = "what a run takes", "launcher"
    try:
        check_launch()
    except ValueError as error:
        return [Finding(topic, name, str(error), "missing")]
    if is_launched():
        place = f"process {launched_rank()} of {launched_processes()}, as the environment says"
        return [Finding(topic, name, place, "remark", "this is about one process by itself")]
    return []


def findings() -> list[Finding]:
    """What is found of this machine and its libraries."""
    from ipfm.engine.commands.doctor.findings import answers
    from ipfm.engine.commands.doctor.machine import checks
    from ipfm.engine.commands.doctor.probe import ask_all

    return sorted_by_topic([*answers(checks()), *ask_all()])


def sorted_by_topic(found: list[Finding]) -> list[Finding]:
    """The findings, those of a topic together, in the order in which the topics come up."""
    topics = list(dict.fromkeys(finding.topic for finding in found))
    return sorted(found, key=lambda finding: topics.index(finding.topic))
