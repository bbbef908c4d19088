"""`ipfm new`: a file to begin with, for an objective or a weighting of one's own."""

from __future__ import annotations

import ast
import importlib.util
import keyword
import re
import shlex
import zlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ipfm.engine.objectives import declared
from ipfm.engine.objectives.own_files import VARIABLE
from ipfm.engine.runtime.commandline import user_input
from ipfm.engine.runtime.json_output import output

# What the templates are called in; the numbers of their random streams are OWN_STREAMS and those after it.
EXAMPLE, FIRST_STREAM = "example", 1000
# A block of streams for each name: two files seldom have one.
BLOCK, BLOCKS = 10, 6000


@dataclass(frozen=True, kw_only=True)
class New:
    """Write a file with an objective, or a weighting, of your own to begin with.

    It is a whole one that runs as it is: deepspeed NAME.py --teacher TEACHER. The other commands know it where
    IPFM_OBJECTIVES=NAME.py stands in their environment.

    Example: ipfm new objective mine

    Example: ipfm new weighting late --out ideas/late.py
    """

    what: Annotated[tyro.conf.Positional[Literal["objective", "weighting"]], tyro.conf.arg(metavar="WHAT")]
    """objective: networks, losses and steps of your own; weighting: IPFM with other weights or noise levels."""
    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")]
    """Its kind: letters, digits and underscores."""
    out: Path | None = None
    """The file, which must not exist. Default: NAME.py here."""
    json: bool = False
    """Print JSON: the file and its kind."""

    def run(self) -> None:
        """Write the file."""
        out = Path(f"{self.name}.py") if self.out is None else self.out
        with output(as_json=self.json) as write:
            with user_input():
                template = (files("ipfm.recipes") / "templates" / f"{self.what}.py").read_text(encoding="utf-8")
                self._check(out, template)
                text = called(template, self.name)
                try:
                    with out.open("x", encoding="utf-8") as file:
                        file.write(text)
                except FileExistsError:
                    raise ValueError(f"{out} exists: give another name, or --out") from None
                except FileNotFoundError:
                    raise ValueError(f"the folder {out.parent} does not exist: make it first") from None
            place = shlex.quote(str(out))
            lines = (
                f"{out}: {'an objective' if self.what == 'objective' else 'a weighting'} that runs as it is",
                f"train:  deepspeed {place} --teacher TEACHER",
                f"plan:   {VARIABLE}={place} ipfm plan --objective {self.name} --model TEACHER",
                "page:   docs/own-objective.md",
            )
            write({"out": out, "what": self.what, "kind": self.name}, "\n".join(lines))

    def _check(self, out: Path, template: str) -> None:
        """ValueError: the name, or the file, cannot be."""
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", self.name) or keyword.iskeyword(self.name):
            raise ValueError(
                f"NAME must be a word of letters, digits and underscores that begins with a letter and is none of "
                f"Python's own, got {self.name!r}"
            )
        if self.name in declared():
            raise ValueError(f"there is an objective {self.name}: choose another name")
        imported, made = _names(called(template, self.name))
        if shared := sorted(imported & made):
            raise ValueError(
                f"{self.name} would make a class {shared[0]}, a name that the file imports: choose another"
            )
        if out.suffix != ".py" or out.is_dir():
            raise ValueError(f"--out is the file, whose name ends in .py, got {out}")
        if importlib.util.find_spec(out.stem.partition(".")[0]) is not None and not out.exists():
            raise ValueError(f"{out} would hide the module {out.stem} from Python: choose another name, or --out")


def called(template: str, name: str) -> str:
    """The text of a template under another name, with random streams of its own.

    Args:
        template: the text.
        name: letters, digits and underscores.
    """
    first = FIRST_STREAM + zlib.crc32(name.encode()) % BLOCKS * BLOCK
    camel = "".join(part[:1].upper() + part[1:] for part in name.split("_"))
    text = re.sub(r"(?<= = )100\d$", lambda found: str(first + int(found[0]) - FIRST_STREAM), template, flags=re.M)
    return text.replace(EXAMPLE.capitalize(), camel).replace(EXAMPLE, name)


def _names(source: str) -> tuple[set[str], set[str]]:
    """The names that a file imports, and those of its classes."""
    body = ast.parse(source).body
    imports = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
    return (
        {alias.asname or alias.name for node in imports for alias in node.names},
        {node.name for node in body if isinstance(node, ast.ClassDef)},
    )
