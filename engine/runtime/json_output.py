"""What a subcommand answers: text for people, or for machines one JSON object and nothing else on stdout."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Write = Callable[[Mapping[str, Any], str], None]


@contextlib.contextmanager
def output(*, as_json: bool) -> Iterator[Write]:
    """The block does the work and calls what it is given, once, with (the facts, the same as text).

    With `as_json` the facts are printed on stdout, and whatever else the block prints goes to stderr.
    """
    stdout = sys.stdout

    def write(facts: Mapping[str, Any], text: str) -> None:
        # ASCII: a machine's stdout may be of any encoding.
        said = json.dumps(plain(facts), indent=1, allow_nan=False) if as_json else text
        print(said, file=stdout)

    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield write


def plain(value: Any) -> Any:
    """`value` as JSON has it.

    Infinity, which JSON lacks, is the text "inf", NaN is null, paths are text, dataclasses objects.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value
