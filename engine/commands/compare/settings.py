"""What differs between runs: groups that are the same but for the seed, and a row for each setting that differs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import chain, takewhile
from typing import Any

from ipfm.engine.checks import option_name
from ipfm.engine.commands.compare.runs import ComparedRun, surroundings
from ipfm.engine.commands.report.facts import shown_setting
from ipfm.engine.commands.report.reproduce import paths, portable, settings_class
from ipfm.engine.config import FIRST_RULES, RunConfig, free_settings, place_settings
from ipfm.engine.objectives import OBJECTIVES
from ipfm.engine.objectives.base import Distillation

IDENTITY, LENGTH, PLACE, SURROUNDINGS = "what the run is", "length and measuring", "where and how", "surroundings"
KINDS = (IDENTITY, LENGTH, PLACE, SURROUNDINGS)
SEED = "seed"
LENGTHS = ("max_steps", "kimg")
# What config.json says of a run beside its settings, by what it is called.
FACTS = {
    "teacher": "teacher",
    "dataset": "data",
    "images": "images of the data",
    "pictures": "digest of the data",
    "xflip": "mirrored images",
    "network": "network",
    "continues": "goes on from",
    "transfers": "takes weights of",
}
NOT_RECORDED, NO_SUCH = "not recorded", "-"
# A label of settings has at most so many of them, and letters; one of folders' names at least so many.
MOST_NAMED, LONGEST, SHORTEST = 3, 44, 4


@dataclass(frozen=True)
class Group:
    """Runs that are the same but for the seed and the place where they were made."""

    label: str
    runs: tuple[ComparedRun, ...]

    @property
    def seeds(self) -> tuple[object, ...]:
        """The seeds in the order of the runs; "?" where one is not recorded."""
        return tuple(run.record.config.get(SEED, "?") for run in self.runs)

    @property
    def repeats(self) -> list[ComparedRun]:
        """The runs without copies of earlier ones, which would count one number twice."""
        found: list[ComparedRun] = []
        for run in self.runs:
            if not any(run.is_copy_of(other) for other in found):
                found.append(run)
        return found


@dataclass(frozen=True)
class DifferenceRow:
    """A setting, or a fact of the surroundings, that is not the same everywhere.

    Attributes:
        kind: one of `KINDS`.
        name: as the option is typed.
        of_runs: for each group, in order, a text for each of its runs.
    """

    kind: str
    name: str
    of_runs: tuple[tuple[str, ...], ...]

    @property
    def values(self) -> tuple[str, ...]:
        """A text for each group, in order: what its runs have, each once."""
        return tuple(", ".join(dict.fromkeys(texts)) for texts in self.of_runs)


def grouped(runs: Sequence[ComparedRun]) -> list[Group]:
    """The groups in the order of their first runs, each with a name of its own: of what differs, or of its run."""
    found: dict[str, list[ComparedRun]] = {}
    for run in runs:
        found.setdefault(_likeness(run), []).append(run)
    groups = [Group("", tuple(members)) for members in found.values()]
    return [Group(label, group.runs) for label, group in zip(_labels(groups), groups, strict=True)]


def differences(groups: Sequence[Group]) -> list[DifferenceRow]:
    """What differs, between the groups or within one: first what the run is, last the surroundings."""
    rows = []
    for kind, name in _names(groups):
        of_runs = tuple(tuple(_value(run, kind, name) for run in group.runs) for group in groups)
        if len(set(chain.from_iterable(of_runs))) > 1 and not _is_left_alone(groups, name, of_runs):
            shown = name if kind == SURROUNDINGS else FACTS.get(name, option_name(name))
            rows.append(DifferenceRow(kind, shown, of_runs))
    return rows


def _is_left_alone(groups: Sequence[Group], name: str, of_runs: Sequence[Sequence[str]]) -> bool:
    """Whether some kinds of these runs have no such setting, and the others have it at its default: no difference."""
    texts = list(chain.from_iterable(of_runs))
    if NO_SUCH not in texts:
        return False
    having = ((run, text) for run, text in zip(_runs(groups), texts, strict=True) if text != NO_SUCH)
    return all(name in (own := _defaults(run)) and text == shown_setting(own[name]) for run, text in having)


def _runs(groups: Sequence[Group]) -> list[ComparedRun]:
    return [run for group in groups for run in group.runs]


def _names(groups: Sequence[Group]) -> Iterator[tuple[str, str]]:
    """(kind, name) of all that can differ, by kind; each once."""
    runs = _runs(groups)
    found: dict[tuple[str, str], None] = {(IDENTITY, "kind"): None, (IDENTITY, "objective"): None}
    found |= {(IDENTITY, name): None for run in runs for name in FACTS if name in run.record.identity}
    for run in runs:
        found |= {(_kind_of(run, name), name): None for name in run.record.config if name != "out"}
        found |= {(SURROUNDINGS, name): None for name in surroundings(run)}
    known: set[str] = set()
    for kind in KINDS:
        for its, name in found:
            if its == kind and (kind == SURROUNDINGS or name not in known):
                known.add(name)
                yield kind, name


def _kind_of(run: ComparedRun, name: str) -> str:
    kind: type[RunConfig] = settings_class(run.record) or Distillation
    if name in place_settings(kind):
        return PLACE
    return LENGTH if name in free_settings(kind) else IDENTITY


def _value(run: ComparedRun, kind: str, name: str) -> str:
    """A setting or fact of a run for people."""
    record = run.record
    if kind == SURROUNDINGS:
        return surroundings(run).get(name, NOT_RECORDED)
    if name == "kind":
        return "a teacher's training" if record.kind == "teacher" else "a distillation"
    if name == "objective":
        return NO_SUCH if record.kind == "teacher" else str(record.identity.get("objective", _objective(run)))
    start = record.identity.get("start")
    if name in ("continues", "transfers") and isinstance(start, dict) and record.identity.get(name):
        # Its digest tells apart what has one name.
        return f"{start.get('source')} ({str(record.identity[name])[:8]})"
    if name in FACTS and (name != "teacher" or kind == IDENTITY):
        return _fact(record.identity.get(name))
    if name in _unused(run):
        return NO_SUCH
    if name in record.config:
        value = record.config[name]
        return shown_setting(portable(value) if name in paths(record) and isinstance(value, str) else value)
    return NOT_RECORDED if not record.config or name in _possible(run) else NO_SUCH


def _objective(run: ComparedRun) -> str:
    """Of a run that does not name it, as those of version 0.1."""
    kind = settings_class(run.record)
    return next((name for name, known in OBJECTIVES.items() if known is kind), NOT_RECORDED)


def _fact(value: object) -> str:
    if value is None:
        return NO_SUCH
    if isinstance(value, dict):
        named = [str(value[key]) for key in ("model_type", "model_channels", "num_blocks") if key in value]
        return " ".join(named)
    text = shown_setting(value)
    # Of a digest its beginning tells it apart.
    return text[:12] if len(text) == 64 else text


def _unused(run: ComparedRun) -> tuple[str, ...]:
    kind = settings_class(run.record)
    return tuple(run.record.about.get("unused", ()) if kind is None else getattr(kind, "unused", ()))


def _possible(run: ComparedRun) -> frozenset[str]:
    """The settings that a run of this kind has in this version, those within another under their full name."""
    kind = settings_class(run.record)
    if kind is None:
        return frozenset()
    own = frozenset(f.name for f in fields(kind))
    return own | frozenset(name for name in _defaults(run) if "." in name)


def _defaults(run: ComparedRun) -> dict[str, Any]:
    kind = settings_class(run.record)
    found = {} if kind is None else kind().to_json()
    return found | {f"noise.{name}": value for name, value in found.pop("noise", {}).items()}


def _likeness(run: ComparedRun) -> str:
    """The same text for runs that are the same but for seed and place; one whose settings are lost is like no other."""
    record = run.record
    if not record.config:
        return f"{record.path}"
    # A setting that is younger than the run is as it was before there was one.
    settings = {**_defaults(run), "rules": FIRST_RULES, **record.config}
    left_out = {SEED, *_unused(run), *LENGTHS}
    own = {name: value for name, value in settings.items() if name not in left_out and _kind_of(run, name) == IDENTITY}
    facts = {name: record.identity[name] for name in FACTS if record.identity.get(name) is not None}
    what = (record.kind, _value(run, IDENTITY, "objective"), record.total_steps, own, facts)
    return json.dumps(what, sort_keys=True, default=str)


def _labels(groups: Sequence[Group]) -> list[str]:
    """A name for each group: what differs in few words, else its run's, else a letter."""
    rows = [row for row in differences(groups) if row.kind == IDENTITY and row.name not in (SEED, "network")]
    rows += [row for row in differences(groups) if row.name in ("max-steps", "kimg")]
    rows = [row for row in rows if len(set(row.values)) > 1]
    columns = [[(row.name, row.values[at]) for row in rows if row.values[at] != NO_SUCH] for at in range(len(groups))]
    texts = [", ".join(_named(name, value) for name, value in column) for column in columns]
    tells = 0 < len(rows) <= MOST_NAMED and all(texts) and len(set(texts)) == len(groups)
    if tells and max(map(len, texts)) <= LONGEST:
        return texts
    shared = [_beginning([run.name for run in group.runs]) for group in groups]
    texts = [f"{name}*" if len(group.runs) > 1 else name for name, group in zip(shared, groups, strict=True)]
    unnamed = len(set(texts)) < len(groups)
    return [
        f"group {letter(number)}" if len(group.runs) > 1 and (unnamed or len(text) < SHORTEST) else text
        for number, (text, group) in enumerate(zip(texts, groups, strict=True))
    ]


def _beginning(names: Sequence[str]) -> str:
    """What all of the names begin with."""
    same = (len(set(letters)) == 1 for letters in zip(*names, strict=False))
    return names[0][: sum(takewhile(bool, same))]


def _named(name: str, value: str) -> str:
    return value if name in ("kind", "objective") else f"{name} {value}"


def letter(number: int) -> str:
    """A, B, ..., Z, AA, AB, ... for 0, 1, ..."""
    found = ""
    number += 1
    while number:
        number, digit = divmod(number - 1, 26)
        found = chr(ord("A") + digit) + found
    return found
