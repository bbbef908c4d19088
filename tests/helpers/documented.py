"""What README.md, CONTRIBUTING.md and docs/ tell their reader to type: shell commands, and blocks of Python."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import launch

# A line of a block that begins with one of these is a command; any other line is output, a table, a file.
PROGRAMS = ("deepspeed", "ipfm", "make", "pip", "pytest", "python", "python3", "tensorboard", "torchrun")
SHELLS = ("bash", "console", "sh", "shell")
_FENCE = re.compile(r"\s*(`{3,}|~{3,})\s*([\w+-]*)")
_HEADING = re.compile(r"#+ +(.*)")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")


@dataclass(frozen=True)
class Block:
    """A code block of a page, without its indentation."""

    page: str
    line: int
    """Of its first line of code."""
    language: str
    """As the fence says it; "" where it says nothing or there is no fence."""
    lines: tuple[str, ...]
    heading: str
    """The nearest one above it."""

    @property
    def code(self) -> str:
        return "\n".join(self.lines) + "\n"


@dataclass(frozen=True)
class Command:
    """A command line of a page; lines that end in a backslash are joined."""

    page: str
    line: int
    text: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def words(self) -> list[str]:
        """What the shell would start: without variables in front, comment, and the folder that the program lies in."""
        words = shlex.split(self.text, comments=True)
        while _ASSIGNMENT.match(words[0]):
            del words[0]
        return [PurePosixPath(words[0]).name, *words[1:]]

    @property
    def comment(self) -> str:
        for found in re.finditer(r"(?:^|\s)#", self.text):
            try:
                shlex.split(self.text[: found.start()])
            except ValueError:  # within quotes
                continue
            return self.text[found.start() :].strip()
        return ""

    @property
    def marked(self) -> bool:
        """Whether its comment says that it needs a GPU."""
        return re.search(r"\bGPUs?\b", self.comment) is not None


def pages() -> list[Path]:
    """The README, the guide for contributors and every page of docs/."""
    return [launch.ROOT / "README.md", launch.ROOT / "CONTRIBUTING.md", *sorted((launch.ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """The fenced and the indented code blocks of a Markdown file, in order."""
    return list(_blocks(str(page.relative_to(launch.ROOT)), page.read_text(encoding="utf-8").splitlines()))


def _blocks(name: str, lines: list[str]) -> Iterator[Block]:
    at, before, heading = 0, "", ""
    while at < len(lines):
        start = at
        if fence := _FENCE.match(lines[at]):
            at = start = at + 1
            while at < len(lines) and not lines[at].strip().startswith(fence[1]):
                at += 1
            yield _block(name, start, fence[2].lower(), lines[start:at], heading)
        elif lines[at].startswith("    ") and not before.strip():
            while at < len(lines) and (lines[at].startswith("    ") or not lines[at].strip()):
                at += 1
            yield _block(name, start, "", lines[start:at], heading)
            at -= 1
        elif found := _HEADING.match(lines[at]):
            heading = found[1]
        before = lines[at] if at < len(lines) else ""
        at += 1


def _block(name: str, start: int, language: str, lines: list[str], heading: str) -> Block:
    code = textwrap.dedent("\n".join(lines)).rstrip("\n").split("\n")
    return Block(name, start + 1, language, tuple(code), heading)


def commands(page: Path) -> list[Command]:
    """The shell commands of a page, in order."""
    return [command for block in blocks(page) for command in block_commands(block)]


def block_commands(block: Block) -> Iterator[Command]:
    """The shell commands of a block.

    Raises:
        ValueError: a block that says that it is shell code has another line than commands and comments.
    """
    if block.language not in ("", *SHELLS):
        return
    waiting = ""
    for number, line in enumerate(block.lines, block.line):
        if not waiting:
            start, line = number, line.removeprefix("$ ")
        waiting += line.strip()
        if waiting.endswith("\\"):
            waiting = waiting.removesuffix("\\")
            continue
        if is_command(waiting):
            yield Command(block.page, start, waiting)
        elif block.language in ("bash", "sh", "shell") and waiting and not waiting.startswith("#"):
            raise ValueError(
                f"{block.page}:{start}: {waiting!r} begins with none of {', '.join(PROGRAMS)}: write it as output "
                "(a fence without `sh`), or teach tests/helpers/documented.py the program"
            )
        waiting = ""


def is_command(line: str) -> bool:
    """Whether a line of a block is a command: a program above, perhaps with its folder and variables in front."""
    words = line.split()
    while words and _ASSIGNMENT.match(words[0]):
        del words[0]
    return bool(words) and (words[0] in PROGRAMS or words[0].startswith(".venv/bin/"))


def python_blocks(page: Path) -> list[Block]:
    """The blocks of Python of a page, in order."""
    return [block for block in blocks(page) if block.language in ("py", "python")]
