"""What was found of this machine, one fact at a time. Nothing is imported for it that could fail to load."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "remark", "missing"]
# How a fact is marked in text.
MARKS: dict[str, str] = {"ok": " ", "remark": "-", "missing": "!"}


@dataclass(frozen=True)
class Finding:
    """A fact of this machine."""

    topic: str
    """What it belongs to: "machine", "GPU", "libraries", …"""
    name: str
    value: str
    state: State = "ok"
    """missing: a run needs it; remark: a run goes on without it, or some options do not."""
    remedy: str = ""
    """What to do, where there is something to be done."""


@dataclass(frozen=True)
class Check:
    """A question that takes one call to answer; where the call fails, this is what is said."""

    topic: str
    name: str
    ask: Callable[[], Iterable[Finding]]
    needed: bool = True
    """A run needs what is looked at: a failure is "missing", not a "remark"."""
    remedy: str = ""
    """What to do then."""

    def failed(self, reason: str) -> Finding:
        """What is said where the question could not be answered."""
        state: State = "missing" if self.needed else "remark"
        return Finding(self.topic, self.name, f"cannot be looked at: {reason}", state, self.remedy)


def answers(checks: Iterable[Check]) -> Iterator[Finding]:
    """What the checks find, in their order; one that fails is a finding itself."""
    for check in checks:
        try:
            yield from check.ask()
        except Exception as error:  # whatever it is, the others are asked too
            yield check.failed(one_line(error))


def one_line(error: BaseException) -> str:
    """The kind of an error and the first of what it says, in one line."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said}"[:300] if said else type(error).__name__


def missing(findings: Sequence[Finding]) -> list[Finding]:
    """Those that a run needs."""
    return [finding for finding in findings if finding.state == "missing"]


def in_words(findings: Sequence[Finding]) -> str:
    """The findings by topic, each with its remedy below it; the last line is what they come to."""
    width = max((len(finding.name) for finding in findings), default=0) + 2
    lines = []
    for topic in dict.fromkeys(finding.topic for finding in findings):
        lines += ["", topic]
        for finding in findings:
            if finding.topic == topic:
                lines.append(f"{MARKS[finding.state]} {finding.name:<{width}}{finding.value}".rstrip())
                lines += [f"  {'':<{width}}{finding.remedy}"] if finding.remedy else []
    lines += ["", verdict(findings)]
    return "\n".join(lines[1:])


def verdict(findings: Sequence[Finding]) -> str:
    """What the findings come to, in a line."""
    needed = missing(findings)
    if not needed:
        return "everything that a run needs is here"
    return f"a run needs what is missing (!): {', '.join(finding.name for finding in needed)}"
