"""What a section of `ipfm doctor --full` has come to: read from the rows that it left, and its table."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ipfm.engine.commands.doctor.place import FAILED, LEFT_OUT, Row
from ipfm.engine.commands.doctor.sections import SECTIONS, Section
from ipfm.models.atomic_files import atomic_write

# The key of the last line of a section's rows.
END = "end"


@dataclass(frozen=True)
class Outcome:
    """What a section has come to."""

    section: Section
    rows: tuple[Row, ...]
    seconds: float
    reason: str = ""
    """Why it did not come to its end; "" where it did."""
    left_out: str = ""
    """What it left out, as its time was over."""

    @property
    def failures(self) -> list[str]:
        """A line for each fault."""
        found = [
            f"{_named(row)}{row['verdict']}" for row in self.rows if str(row.get("verdict", "")).startswith(FAILED)
        ]
        return [*found, *([f"{FAILED}: {self.reason}"] if self.reason else [])]

    @property
    def verdict(self) -> str:
        """In a few words."""
        if self.failures:
            return f"{len(self.failures)} {FAILED}"
        return f"ok; {LEFT_OUT}: {self.left_out}" if self.left_out else "ok"

    @property
    def columns(self) -> list[str]:
        """Of its table, the verdict last."""
        names = dict.fromkeys(name for row in self.rows for name in row if name != "verdict")
        return [*names, "verdict"]


def _named(row: Row) -> str:
    """The first cells of a row, before what is wrong with it."""
    cells = [str(value) for name, value in row.items() if name != "verdict" and value not in ("", None)][:3]
    return f"{', '.join(cells)}: " if cells else ""


def write_table(out: Path, section: Section) -> Outcome:
    """NAME.csv and NAME.md of the rows that a section has left."""
    outcome = read_outcome(out, section)
    assert outcome is not None
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, outcome.columns, restval="")
    writer.writeheader()
    writer.writerows({name: row.get(name) for name in outcome.columns} for row in outcome.rows)
    with atomic_write(out / f"{section.name}.csv") as file:
        file.write(text.getvalue().encode())
    with atomic_write(out / f"{section.name}.md") as file:
        file.write(f"{table(outcome)}\n".encode())
    return outcome


def table(outcome: Outcome) -> str:
    """In Markdown, under its title."""
    columns = outcome.columns
    lines = [f"## {outcome.section.title}", "", f"{outcome.verdict}, {outcome.seconds:.0f} s", ""]
    if outcome.reason:
        lines += [f"**{outcome.reason}**", ""]
    if outcome.rows:
        lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for row in outcome.rows:
            lines.append(f"| {' | '.join(_cell(row.get(name)) for name in columns)} |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return "" if value is None else str(value).replace("|", "/").replace("\n", " ")


def read_outcomes(out: Path) -> list[Outcome]:
    """What all sections that have been run in this folder have come to."""
    found = (read_outcome(out, section) for section in SECTIONS)
    return [outcome for outcome in found if outcome is not None]


def read_outcome(out: Path, section: Section) -> Outcome | None:
    """What a section has left there; None where it has not been run."""
    path = out / f"{section.name}.jsonl"
    if not path.is_file():
        return None
    lines = list(_lines(path))
    rows = tuple(line["row"] for line in lines if "row" in line)
    left_out = next((line[LEFT_OUT] for line in lines if LEFT_OUT in line), "")
    end = next((line[END] for line in lines if END in line), None)
    if end is None:
        return Outcome(section, rows, 0.0, "it was ended before it was done", left_out)
    return Outcome(section, rows, end["seconds"], end["reason"], left_out)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):  # cut off where its process was ended
            found = json.loads(line)
            if isinstance(found, dict):
                yield found


def facts(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """For JSON."""
    return [
        {
            **asdict(outcome.section),
            "seconds": outcome.seconds,
            "verdict": outcome.verdict,
            "failures": outcome.failures,
            "left_out": outcome.left_out,
            "rows": list(outcome.rows),
        }
        for outcome in outcomes
    ]
