"""All sections on one page: doctor.html, and doctor.md."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ipfm.engine.commands.doctor.outcome import Outcome, table
from ipfm.engine.commands.doctor.page_mark import MARK, PAGE
from ipfm.engine.commands.pages import templates
from ipfm.engine.commands.pages.target import Target
from ipfm.models.atomic_files import atomic_write

HERE = Path(__file__).parent


def write_page(out: Path, outcomes: Sequence[Outcome]) -> Path:
    """Write doctor.html and doctor.md into `out`.

    Raises:
        OSError: the disk refuses.
    """
    content = {"mark": MARK, "machine": machine(outcomes), "when": _now(), "sections": [_shown(o) for o in outcomes]}
    templates.write_page(Target(out / PAGE), HERE, content, {})
    lines = [f"# ipfm doctor: {content['machine']}", "", f"<!-- {MARK} -->", "", f"{content['when']}.", ""]
    lines += ["| section | | seconds |", "|---|---|---|"]
    lines += [f"| {o.section.title} | {o.verdict} | {o.seconds:.0f} |" for o in outcomes]
    with atomic_write(out / "doctor.md") as file:
        file.write("\n".join([*lines, "", *(f"{table(outcome)}\n" for outcome in outcomes)]).encode())
    return out / PAGE


def machine(outcomes: Sequence[Outcome]) -> str:
    """The first GPU, or that there is none."""
    for outcome in outcomes:
        for row in outcome.rows:
            if row.get("what") == "cuda:0":
                return str(row.get("found")).partition(",")[0]
    return "a machine without a GPU" if any(o.section.name == "environment" for o in outcomes) else "a machine"


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"


def _shown(outcome: Outcome) -> dict[str, Any]:
    """A section as the template speaks of it."""
    columns = outcome.columns
    return {
        "name": outcome.section.name,
        "title": outcome.section.title,
        "verdict": outcome.verdict,
        "seconds": f"{outcome.seconds:.0f}",
        "reason": outcome.reason,
        "failed": bool(outcome.failures),
        "columns": columns,
        "rows": [["" if row.get(name) is None else row.get(name) for name in columns] for row in outcome.rows],
    }
