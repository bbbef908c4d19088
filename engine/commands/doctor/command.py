"""`ipfm doctor`: what this machine is, which backends run, and whether what a run needs is here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ipfm.engine.runtime.errors import Failed
from ipfm.engine.runtime.json_output import output

if TYPE_CHECKING:
    from ipfm.engine.commands.doctor.findings import Finding


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Say what this machine is, what runs on it and what is missing.

    Example: ipfm doctor --json

    Exit code 1: something that a run needs is missing; a line names it and what to do.
    """

    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        """Print what is found."""
        from ipfm.engine.commands.doctor.findings import in_words, missing, verdict

        with output(as_json=self.json) as write:
            found = findings()
            facts = {
                "ok": not missing(found),
                "findings": found,
                "missing": [f"{f.name}: {f.value}" for f in missing(found)],
            }
            write(facts, in_words(found))
        if missing(found):
            raise Failed(verdict(found))


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
