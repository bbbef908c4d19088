"""The tables "their option, ours": each of ours exists in the program that its table is about."""

import importlib
import re
import typing

import launch
import pytest

from ipfm.engine.commands import main
from ipfm.engine.runtime.parse_errors import _paths, _unrecognised

PAGE = (launch.ROOT / "docs" / "coming-from-edm.md").read_text(encoding="utf-8")
# Part of the page -> what its table maps to: a command of `ipfm`, or a recipe.
OURS = {
    "`train.py` of EDM and PFGM++": "train_teacher",
    "`generate.py` of EDM and PFGM++": "sample",
    "`sid_train.py`": "distill_sid",
    "`sid_generate.py`": "sample",
    "`dataset_tool.py` of EDM": "dataset",
    "`fid.py` of EDM and PFGM++": "evaluate",
}
# What nobody who knows these programs would look for in vain: of each some that matter.
LOOKED_FOR = {
    "`train.py` of EDM and PFGM++": "outdir data cond arch precond duration batch batch-gpu cbase cres lr ema dropout "
    "augment xflip fp16 ls bench cache workers desc nosubdir tick snap dump seed transfer resume dry-run "
    "pfgmpp aug_dim",
    "`generate.py` of EDM and PFGM++": "network outdir seeds subdirs class batch steps sigma_min sigma_max rho S_churn "
    "S_min S_max S_noise solver disc schedule scaling",
    "`sid_train.py`": "outdir data edm_model alpha tmax init_sigma lr glr duration batch batch-gpu metrics fp16 resume",
    "`sid_generate.py`": "network outdir seeds batch init_sigma",
    "`dataset_tool.py` of EDM": "source dest max-images transform resolution",
    "`fid.py` of EDM and PFGM++": "images ref num seed batch data dest",
}


def tables() -> dict[str, list[tuple[str, str]]]:
    """Heading -> rows (theirs, ours)."""
    parts = re.split(r"^## (.*)$", PAGE, flags=re.MULTILINE)[1:]
    return {
        heading: re.findall(r"^\| `--([\w-]+)` \| (.+) \|$", text, flags=re.MULTILINE)
        for heading, text in zip(parts[::2], parts[1::2], strict=True)
    }


def commands() -> dict[str, type]:
    return {named.name: kind for kind, named in map(typing.get_args, typing.get_args(main.Command))}


def options(program: str) -> set[str]:
    """The names of a program's options."""
    if program in commands():
        return set(_paths(commands()[program]))
    return set(_paths(type(importlib.import_module(f"ipfm.recipes.{program}").RECIPE.base)))


def test_each_official_program_has_its_table():
    assert set(tables()) == set(OURS)


@pytest.mark.parametrize("heading", OURS)
def test_every_option_of_ours_exists_and_every_one_of_theirs_has_a_row(heading: str):
    rows = tables()[heading]
    theirs = [name for name, _ in rows]
    assert len(set(theirs)) == len(theirs) and set(LOOKED_FOR[heading].split()) <= set(theirs)
    known = options(OURS[heading])
    for name, ours in rows:
        named = re.findall(r"(?<![\w-])--([a-zA-Z][\w.-]*)", ours)
        assert named or ours.startswith(("none: ", "the first argument", "the second argument")), name
        assert set(named) <= known, f"{name}: {sorted(set(named) - known)}"
        # Of an option without one of ours a reason is given.
        assert not ours.startswith("none") or len(ours) > len("none: ")


# Answered in other words.
OTHERWISE = {("network", "sample")}


@pytest.mark.parametrize("heading", OURS)
def test_their_name_typed_here_is_answered_with_ours_or_with_the_reason(heading: str):
    program = OURS[heading]
    for name, ours in tables()[heading]:
        if name.replace("_", "-") in options(program):
            continue
        typed = f"--{name}=1"
        if program in commands():
            line = _unrecognised([typed], main.Command, [program, typed], main._of_recipes)
        else:
            recipe = importlib.import_module(f"ipfm.recipes.{program}").RECIPE
            line = _unrecognised([typed], type(recipe.base), [typed], recipe.elsewhere)
        said, named = line.partition("; ")[2], re.findall(r"(?<![\w-])--[a-zA-Z][\w.-]*", ours)
        assert said != "--help lists all", name
        if named and not ours.startswith("none: ") and (name, program) not in OTHERWISE:
            assert any(option in said for option in named), f"{name}: {said}"


def test_a_table_that_rots_is_seen():
    assert "sigma-init" in options("distill_sid") and "noise.t-max" in options("distill_sid")
    assert "subdirs" in options("sample") and "no-such-option" not in options("sample")
