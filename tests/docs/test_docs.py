"""The pages for users: links, anchors, options, commands, quoted messages and made tables agree with the project."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import json
import math
import pkgutil
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import get_args
from xml.etree import ElementTree

import launch
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ipfm.engine import objectives
from ipfm.engine.commands import main as cli
from ipfm.engine.experiments import out_of_law
from ipfm.engine.experiments.ablation_numbers import write_distances
from ipfm.engine.experiments.ablation_report import Curve, write_csv
from ipfm.engine.experiments.claims import Found
from ipfm.engine.experiments.out_of_law import Measured
from ipfm.models import EDMPrecond, presets, save_model

ROOT = launch.ROOT
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(DOCS.rglob("*.md")),
    *sorted((ROOT / "release").glob("*.md")),
]
# Executed on stand-ins from beginning to end, as the page says.
WALKS = tuple(DOCS / f"{name}.md" for name in ("getting-started", "distil-a-checkpoint", "your-own-pictures"))
# Where the host of a repository shows its continuous integration, as seen from the README.
ACTIONS = "../../actions/workflows/"
RECIPES = sorted(
    p.name for p in (ROOT / "recipes").glob("*.py") if p.name not in ("__init__.py", "ablation_data.py", "ipfm.py")
)
# Options of other programs; each must be in use, so that none stays by mistake.
FOREIGN = {
    "deepspeed": {
        "--num_accelerators",
        "--hostfile",
        "--include",
        "--master_port",
        "--module",
        "--no_ssh",
        "--node_rank",
        "--master_addr",
    },
    "pip": {"--no-deps"},
    "ipfm": {"--version"},
    "torchrun": {
        *("--nnodes", "--nproc_per_node", "--rdzv_backend", "--rdzv_endpoint"),
        *("--node_rank", "--master_addr", "--master_port"),
    },
    "Slurm": {"--signal", "--requeue", "--gpus-per-task", "--nodes", "--ntasks-per-node"},
    "make_tables.py": {"--check"},
    "tensorboard": {"--logdir"},
    "mine.py": {"--teacher"},
    "generate.py of PFGM++": {"--use_pickle", "--aug_dim"},
}
PROGRAMS = ("deepspeed", "torchrun", "python", "ipfm", "make", "pip", ".venv/bin/pytest")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


# -- reading pages ---------------------------------------------------------------------------------------------------


@cache
def blocks(page: Path) -> list[str]:
    """The lines of indented and fenced blocks, those that end in a backslash with what follows."""
    found, fenced = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            found.append(line.strip())
    return "\n".join(found).replace("\\\n", "").splitlines()


@cache
def prose(page: Path) -> str:
    """The page without its blocks."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return "\n".join(line for line in text.splitlines() if not line.startswith("    "))


def slugs(page: Path) -> set[str]:
    """The anchors of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.*)$", prose(page), flags=re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


def commands(page: Path) -> Iterator[list[str]]:
    for line in blocks(page):
        words = shlex.split(line, comments=True) if line.startswith(PROGRAMS) else []
        if words and words[0] in PROGRAMS:
            yield words


# -- what the project has --------------------------------------------------------------------------------------------


def options_of(kind: type) -> set[str]:
    names = {f.name.replace("_", "-") for f in dataclasses.fields(kind)}
    switches = {f.name.replace("_", "-") for f in dataclasses.fields(kind) if f.type in ("bool", bool)}
    return {f"--{name}" for name in names} | {f"--no-{name}" for name in switches} | {"--help"}


@cache
def recipe_options() -> dict[str, set[str]]:
    found = {}
    for name in RECIPES:
        module = importlib.import_module(f"ipfm.recipes.{name.removesuffix('.py')}")
        recipe = module.RECIPE if hasattr(module, "RECIPE") else module.ABLATION
        recipe = getattr(recipe, "digits", recipe)
        found[name] = options_of(type(recipe.base))
    return found


@cache
def command_options() -> dict[str, set[str]]:
    kinds = [get_args(member)[:2] for member in get_args(cli.Command)]
    return {named.name: options_of(kind) for kind, named in kinds}


def made_by(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look for their module there
    spec.loader.exec_module(module)
    return module


# -- the tests -------------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("https://", "http://")):
            continue
        if target.startswith(ACTIONS):
            target = f".github/workflows/{target.removeprefix(ACTIONS).removesuffix('/badge.svg')}"
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.is_relative_to(ROOT), f"{target} is outside the project"
        assert there.exists(), f"{target} does not exist"
        assert not anchor or anchor in slugs(there), f"{target}: no such heading; {sorted(slugs(there))}"


@pages
def test_files_and_tests_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"(?<![\w./])((?:engine|kernels|models|recipes|tests|docs)/[\w/]+\.\w+)", text):
        assert (ROOT / name).exists(), name
    for name, wanted in re.findall(r"(tests/[\w/]+\.py) -k (\w+)", text):
        tests = re.findall(r"^def (test_\w+)", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert any(wanted in test for test in tests), f"{name} -k {wanted}"


@pages
def test_import_names_exist(page: Path) -> None:
    for name in re.findall(r"(?<![\w./])ipfm(?:\.[A-Za-z]\w*)+", page.read_text(encoding="utf-8")):
        if name not in ("ipfm.fish",):  # a file of shell completion
            assert pkgutil.resolve_name(name) is not None, name


@pages
def test_no_path_outside_the_project(page: Path) -> None:
    text = re.sub(r"https?://\S+", "", page.read_text(encoding="utf-8")).replace("/dev/shm", "")  # Linux has it
    assert re.findall(r"(?<![\w.…>)\]~/])/[a-z]\w*/[\w./]+", text) == []


@pages
def test_options_exist(page: Path) -> None:
    known = set().union(*recipe_options().values(), *command_options().values(), *FOREIGN.values())
    # Text that shows what a mistake looks like.
    mistakes = {"--alhpa"}
    text = page.read_text(encoding="utf-8")
    # The first column has others' options; test_coming_from_edm.py reads ours.
    if page.name == "coming-from-edm.md":
        text = re.sub(r"^\| `--[\w-]+` \|", "|", text, flags=re.MULTILINE)
    named = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", text))
    assert named - known - mistakes == set()


@pages
def test_commands_take_their_options(page: Path) -> None:
    for words in commands(page):
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        if words[0] == "make":
            targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
            assert {*words[1:]} <= targets, words
            continue
        given -= FOREIGN.get(words[0], set())
        script = next((Path(word).name for word in words[1:] if word.endswith((".py", "/ipfm"))), words[0])
        if script == "ipfm" and words[0] != "pip":  # which installs a folder of this name
            (at,) = (i for i, word in enumerate(words) if Path(word).name == "ipfm")
            command = words[at + 1]
            allowed = {"--help"} if command == "--help" else command_options()[command]
        else:
            allowed = recipe_options().get(script, FOREIGN.get(script, set()))
        assert given <= allowed, f"{' '.join(words)}: {sorted(given - allowed)}"


def test_no_foreign_option_is_kept_in_vain() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in [*PAGES, DOCS / "make_tables.py"])
    for option in set().union(*FOREIGN.values()):
        assert option in text, option


def test_what_needs_more_than_a_cpu_says_so() -> None:
    """Outside of a dry run: several GPUs, a published checkpoint, somebody's data; files that a package downloads."""
    needs = re.compile(r"\.(pkl|pt|pth|npz|zip|gz)\b|--hostfile|--nnodes|--num_accelerators 8")
    for page in PAGES[1:]:
        for line in blocks(page):
            # What an export writes is not needed.
            found = needs.search(re.sub(r"^(ipfm export \S+) \S+", r"\1", line))
            if line.startswith(PROGRAMS) and found and "--dry-run" not in line and page not in WALKS:
                assert line.endswith(("# GPU", "# files", "# network")), f"{page.name}: {line}"


def test_the_index_has_every_page() -> None:
    index = prose(DOCS / "README.md")
    named = {target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", index)}
    assert {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} - named == {"README.md"}


def test_every_file_is_reached_from_the_index() -> None:
    """By links and pictures from page to page; scripts by their names."""
    reached, waiting = set(), [DOCS / "README.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        targets = {target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", prose(page))} - {""}
        there = {(page.parent / target).resolve() for target in targets if "://" not in target}
        there |= {DOCS / name for name in re.findall(r"`(?:docs/)?(\w+\.py)`", prose(page))}
        waiting += [path for path in there - reached if path.suffix == ".md" and path.is_file()]
        reached |= there
    files = {path for path in DOCS.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert sorted(str(path.relative_to(DOCS)) for path in files - reached) == []


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    first = "\n".join(lines[:30])
    for shown in ("make demo", "git clone", "deepspeed recipes/cifar_ipfm.py", "](docs/images/", "**Status.**"):
        assert shown in first, f"{shown} is not in the first screen"


def test_the_picture_of_the_readme_shows_the_digits() -> None:
    """Its digits are those of the grids; letters are drawn as the machine draws them."""
    draw = made_by("draw_digits")
    with Image.open(draw.PICTURE) as stored:
        again = draw.picture()
        assert stored.size == again.size
        ground = (stored.width - draw.BETWEEN) // 2
        for left in (0, ground + draw.BETWEEN):
            box = (left, draw.TOP, left + ground, stored.height - draw.BOTTOM)
            assert stored.crop(box).tobytes() == again.crop(box).tobytes()


@pytest.fixture
def clothes(tmp_path: Path) -> Path:
    """What `ipfm evaluate` and `ipfm sample` leave of three of the eight networks."""
    random = np.random.default_rng(0)
    common = {"features_name": "classifier ab", "reference": "data", "images": 2000, "seed": 0}
    for name, D, nfe in (("teacher-D128", 128.0, 35), ("K1-D128", 128.0, 1), ("K1-Dinf", "inf", 1)):
        runs = [{"distance": nfe + i, "images": 2000, "seconds": 0.5 * (i + 1)} for i in range(3)]
        (tmp_path / f"{name}.json").write_text(json.dumps({"D": D, "nfe": nfe, "runs": runs, **common}))
        np.savez(tmp_path / f"{name}.npz", images=random.integers(0, 256, (12, 28, 28, 1), dtype=np.uint8))
    return tmp_path


def test_the_picture_and_the_table_of_clothes_are_made_of_what_was_measured(
    clothes: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = made_by("draw_fashion")
    for place in ("PICTURE", "NUMBERS"):
        monkeypatch.setattr(draw, place, clothes / getattr(draw, place).name)
    monkeypatch.setattr(sys, "argv", ["draw_fashion.py", str(clothes)])
    draw.main()
    out, err = capsys.readouterr()
    assert out.splitlines() == draw.table(draw.read(draw.NUMBERS)) and err.count("missing: left out\n") == 5
    assert "| teacher | 35 | 36.00 (35.00 to 37.00) | 2000 | – | – |" in out
    assert "| generator, K = 1 | 1 | 2.000 (1.000 to 3.000) | 2000 | 2.000 (1.000 to 3.000) | 2000 |" in out
    rows = {"teacher-D128": 0, "K1-D128": 1, "K1-Dinf": 2}
    with Image.open(draw.PICTURE) as picture:
        for name, row in rows.items():
            top = draw.MARGIN // 2 + draw.HEAD * (1 + name.endswith("inf")) + draw.CELL * row
            place, images = draw.LEFT + 11 * draw.CELL, np.load(clothes / f"{name}.npz")["images"]
            shown = picture.crop((place, top, place + 56, top + 56)).resize((28, 28), Image.Resampling.NEAREST)
            assert (np.asarray(shown) == images[11]).all(), name


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("K1-D128", {"features_name": "classifier cd"}, "but the networks before it have"),
        ("K1-Dinf", {"D": 128.0}, "is of D = 128.0"),
    ],
)
def test_what_cannot_be_compared_is_no_row(clothes: Path, name: str, change: dict[str, object], said: str) -> None:
    draw, path = made_by("draw_fashion"), clothes / f"{name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(draw.Wrong, match=said):
        draw.measured(clothes)


def an_ablation(folder: Path, name: str, runs: Mapping[str, Sequence[float]]) -> dict[str, Found]:
    """What an ablation leaves, three seeds of each variant, each a little worse than the one before."""
    found = {}
    for variant, distances in runs.items():
        curves = [
            Curve(variant, seed, 64, tuple((60 * i, value * (1 + seed / 50)) for i, value in enumerate(distances)))
            for seed in range(3)
        ]
        sets = {seed: [curve.last] * 3 for seed, curve in enumerate(curves)} if name == "steps" else {}
        found[variant] = Found(curves, 6.5, sets, [6.5, 6.5, 6.75] if sets else [])
    (folder / next(iter(runs)) / "seed0").mkdir(parents=True)
    (folder / next(iter(runs)) / "seed0" / "config.json").write_text('{"config": {"lr": 0.0005}}')
    (folder / next(iter(runs)) / "seed0" / "environment.jsonl").write_text('{"torch": "2.13.0"}\n')
    (folder / "ablation.json").write_text(json.dumps({"ablation": name, "data": "fashion"}))
    write_csv([curve for its in found.values() for curve in its.curves], folder / "ablation.csv")
    write_distances(found, folder / "distances.csv")
    return found


def test_the_curves_and_verdicts_on_claims_are_made_again_of_what_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = made_by("draw_claims")
    monkeypatch.setattr(draw, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(draw, "IMAGES", tmp_path)
    few = an_ablation(tmp_path / "few", "steps", {"K2": [90.0, 9.0, 7.0], "K4": [50.0, 8.0, 6.5]})
    lost = {"D128-alpha1": [90.0, 30.0, math.nan], "D128-alpha0.5": [90.0, 20.0, 10.0]}
    an_ablation(tmp_path / "lost", "D-alpha", lost)
    out_of_law.write_csv(
        [Measured(D, seed, 1.0, 1.0, 2.0 + seed + D, 0.25) for D in (8.0, 16.0) for seed in range(3)],
        tmp_path / "out-of-law.csv",
    )
    monkeypatch.setattr(sys, "argv", ["x", *(str(tmp_path / name) for name in ("few", "lost", "."))])
    draw.main()
    assert draw.kept()["steps"] == few
    printed = capsys.readouterr().out.split("\n\n")
    assert "| K2 | 6.500 | 7.140 (7.000 to 7.280) | 7.140 (7.000 to 7.280) | 0 of 3 |" in printed[1]
    assert "| D128-alpha1 | 6.500 | 30.60 (30.00 to 31.20) | - | 3 of 3, from step 120 |" in printed[0]
    verdicts = {row.split(" | ")[0]: row.split(" | ")[1:] for row in printed[2].splitlines()}
    assert verdicts["| a generator of K = 2 evaluations reaches its teacher"][0] == "refuted"
    assert verdicts["| a generator of K = 4 evaluations reaches its teacher"][0] == "confirmed"
    assert verdicts["| alpha = 1 ends lower than alpha = 1/2, at D = 128"][0] == "refuted"  # it diverged
    (robust,) = (row for claim, row in verdicts.items() if "robust" in claim)
    assert robust[0] == "confirmed" and len(verdicts) == 2 + 5
    assert draw.middle(draw.kept()["D-alpha"]["D128-alpha1"]) == [(0, 90 * 1.02), (60, 30 * 1.02)]
    about = json.loads((draw.KEPT / "D-alpha.json").read_text())
    assert (about["data"], about["settings"]["lr"], about["environment"]["torch"]) == ("fashion", 0.0005, "2.13.0")
    for name in ("steps", "D-alpha"):
        with Image.open(tmp_path / f"claims-{name}.png") as picture:
            assert np.asarray(picture.convert("L")).std() > 10
    an_ablation(tmp_path / "other", "steps", {"K1": [90.0, 9.0]})
    with pytest.raises(ValueError, match=r"other has none of the variants that are drawn: K2, K4$"):
        draw.keep(tmp_path / "other")
    (tmp_path / "few" / "distances.csv").unlink()
    with pytest.raises(ValueError, match=r"has no distances\.csv: give its command again, which then only reads"):
        draw.keep(tmp_path / "few")


def test_what_the_page_shows_of_claims_and_clothes_is_what_is_kept() -> None:
    """Its numbers, as soon as they are here."""
    draw = made_by("draw_claims")
    text = (DOCS / "results.md").read_text(encoding="utf-8")
    shown = {f"claims-{name}.png" for name in draw.kept()}
    assert shown == {path.name for path in draw.IMAGES.glob("claims-*.png")}
    assert shown == set(re.findall(r"images/(claims-.*?\.png)", text))
    assert "\n".join(draw.table() if draw.verdicts() else []) in text
    for name, found in draw.kept().items():
        assert "\n".join(draw.distances(found)) in text, name
    draw = made_by("draw_fashion")
    assert draw.NUMBERS.exists() == draw.PICTURE.exists() == (f"images/{draw.PICTURE.name}" in text)
    if draw.NUMBERS.exists():
        for page in (DOCS / "results.md", ROOT / "README.md"):
            assert "\n".join(draw.table(draw.read(draw.NUMBERS))) in page.read_text(encoding="utf-8"), page.name
        assert draw.PICTURE.stat().st_size < 200_000


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which a small generator and a file of a classifier were kept."""
    keep = made_by("keep_model")
    monkeypatch.setattr(keep, "FOLDER", tmp_path / "release")
    torch.manual_seed(0)
    net = EDMPrecond(replace(presets.get("digits", D=128.0), model_channels=4, channel_mult=(1,)))
    facts = {"task": "generator", "optimizer_steps": 600, "config": {"batch": 64, "lr": 0.0005, "alpha": 1.0}}
    save_model(net, tmp_path / "model", extra=facts)
    measured = {"kind": "generator", "D": 128.0, "nfe": 1, "images": 2000, "features_name": "classifier ab"}
    runs = [{"distance": float(i)} for i in (7, 8, 9)]
    (tmp_path / "measured.json").write_text(json.dumps({**measured, "runs": runs}))
    save_file({"x": torch.zeros(2)}, tmp_path / "classifier-ab.safetensors")
    given = ["clothes-K1", str(tmp_path / "model"), str(tmp_path / "measured.json"), "--command", "make fashion"]
    monkeypatch.setattr(sys, "argv", ["x", *given, "--classifier", str(tmp_path / "classifier-ab.safetensors")])
    for _ in range(2):  # the second time in the place of the first
        keep.main()
    return tmp_path / "release"


def test_a_model_is_kept_with_what_it_is(release: Path) -> None:
    keep, text = made_by("keep_model"), (release / "README.md").read_text(encoding="utf-8")
    assert keep.check(release) == []
    assert re.findall(r"^## (.*)", text, flags=re.MULTILINE) == ["clothes-K1", "classifier-ab"]
    for row in (
        f"| sha256 | `{json.loads((release / 'clothes-K1' / 'config.json').read_text())['sha256']}` |",
        "| what | generator, ddpm++, 4 channels, ",
        "| trained | 600 steps of 64 generated images, lr 0.0005, alpha 1.0 |",
        "| command | `make fashion` |",
        "| Fréchet distance | 8.000 (7.000 to 9.000), 3 sets of 2,000 images, classifier ab |",
    ):
        assert row in text, row


def test_a_teacher_is_kept_with_the_distance_of_its_ablation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = made_by("keep_model")
    monkeypatch.setattr(keep, "FOLDER", tmp_path / "release")
    net = EDMPrecond(replace(presets.get("digits", D=math.inf), model_channels=4, channel_mult=(1,)))
    config = {"batch": 64, "precision": "bf16"}
    facts = {"task": "teacher", "dataset": "clothes", "optimizer_steps": 9, "config": config}
    save_model(net, tmp_path / "model", extra=facts)
    measured = {"teacher": "ab", "images": 2000, "heun_steps": 18, "features": "classifier ab", "frechet": 7.5}
    (tmp_path / "distance.json").write_text(json.dumps(measured))
    keep.keep("clothes", tmp_path / "model", tmp_path / "distance.json", "make fashion")
    text = (tmp_path / "release" / "README.md").read_text(encoding="utf-8")
    assert "| trained | 9 steps of 64 clothes, precision bf16 |" in text and "| D | ∞ |" in text
    assert "| Fréchet distance | 7.500, 1 set of 2,000 images, classifier ab |" in text
    # Measured again where it lies, it is read before its folder is replaced.
    kept = tmp_path / "release" / "clothes"
    keep.keep("clothes", kept, tmp_path / "distance.json", "make fashion")
    assert keep.check(kept.parent) == [] and (kept.parent / "README.md").read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("clothes", {"kind": "generator"}, r"is of a generator of D = inf, .*model is another model"),
        ("clothes", {"D": 128.0}, r"is of a teacher of D = 128\.0, .*model is another model"),
        ("clothes", {"runs": [{"left_out": 8}]}, r"holds no distance"),
        ("clothes", {"nfe": "left out"}, r"is no measurement of a model: it has no nfe"),
        ("..", {}, r"NAME must be letters, digits, dots and dashes, a letter or digit first, got '\.\.'"),
    ],
)
def test_what_is_refused_leaves_what_is_kept(
    name: str, change: dict[str, object], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = made_by("keep_model")
    monkeypatch.setattr(keep, "FOLDER", tmp_path / "release")
    net = EDMPrecond(replace(presets.get("digits", D=math.inf), model_channels=4, channel_mult=(1,)))
    save_model(net, tmp_path / "model", extra={"task": "teacher"})
    (tmp_path / "release" / "clothes").mkdir(parents=True)
    (tmp_path / "release" / "clothes" / "mine").write_text("kept")
    facts = {"kind": "teacher", "D": "inf", "nfe": 35, "images": 8, "features": "pixels", "runs": [{"distance": 7.5}]}
    measured = {key: value for key, value in (facts | change).items() if value != "left out"}
    (tmp_path / "measured.json").write_text(json.dumps(measured))
    with pytest.raises(keep.Refused, match=said):
        keep.keep(name, tmp_path / "model", tmp_path / "measured.json", "make fashion")
    assert (tmp_path / "release" / "clothes" / "mine").read_text() == "kept"


def test_what_a_release_should_not_hold_is_named(release: Path) -> None:
    keep = made_by("keep_model")
    weights, page = release / "clothes-K1" / "model.safetensors", release / "README.md"
    page.write_text(page.read_text().replace(f"`{keep.digest(weights)}`", f"`{keep.digest(page)}`"))
    (release / "notes.txt").write_text("mine")
    (release / "classifier-ab.safetensors").unlink()
    assert keep.check(release) == [
        "clothes-K1/model.safetensors is not in README.md, or with another checksum",
        "notes.txt is no part of a model",
        "classifier-ab.safetensors is missing",
    ]
    weights.write_bytes(weights.read_bytes()[:-4] + b"0000")
    assert any("model.safetensors" in line for line in keep.check(release)[3:])


def test_the_models_of_the_repository_are_what_is_told_of_them() -> None:
    """As soon as there are any."""
    found = made_by("keep_model")
    assert not found.FOLDER.exists() or (found.check(found.FOLDER) == [] and list(found.FOLDER.glob("*/config.json")))


def test_the_version_is_cited_and_its_changes_are_told() -> None:
    (version,) = re.findall(r'version="(.*?)"', (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## [{version}]\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_workflow_runs_what_a_change_has_to_pass() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert "- run: .ci/run\n" in workflow and 'python-version: "3.11"' in workflow


def test_drawings_are_well_formed() -> None:
    drawings = list((DOCS / "images").glob("*.svg"))
    assert drawings
    for path in drawings:
        assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"


# -- messages --------------------------------------------------------------------------------------------------------


@cache
def sources() -> list[re.Pattern[str]]:
    """What the program can print: each string of its sources, with anything in place of values."""
    found = []
    for folder in ("engine", "models", "kernels", "recipes"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                parts = node.values if isinstance(node, ast.JoinedStr) else [node]
                texts = [part.value if isinstance(part, ast.Constant) else None for part in parts]
                fixed = "".join(text for text in texts if isinstance(text, str))
                if len(fixed) >= 15 and " " in fixed:
                    found.append(re.compile("".join("(.*)" if t is None else re.escape(str(t)) for t in texts)))
    return found


def quoted() -> list[str]:
    """The messages of troubleshooting.md: in blocks, and in the first columns of its tables."""
    page = DOCS / "troubleshooting.md"
    shown = [line for line in blocks(page) if not line.startswith(PROGRAMS) or line.startswith("ipfm:")]
    return shown + re.findall(r"^\| `(.*?)` \|", prose(page), flags=re.MULTILINE)


def test_messages_are_those_of_the_program() -> None:
    messages = quoted()
    assert len(messages) > 15
    assert [text for text in messages if not any(source.search(text) for source in sources())] == []


def test_a_message_of_nobody_is_seen() -> None:
    assert not any(source.search("… error: the flux capacitor is empty: fill it") for source in sources())


# -- tables ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def make_tables() -> ModuleType:
    return made_by("make_tables")


def on_page(make_tables: ModuleType, page: str, name: str) -> list[str]:
    return make_tables.table((DOCS / page).read_text(encoding="utf-8"), name)


def test_tables_of_the_recipes(make_tables: ModuleType) -> None:
    for name, make in make_tables.PAGES["recipes.md"].items():
        assert on_page(make_tables, "recipes.md", name) == make(), f"{name}: run docs/make_tables.py"


def test_what_is_expected_of_a_gpu(make_tables: ModuleType) -> None:
    """The smaller batch is counted here. A version that moves somewhat less is not held to the page at once."""
    for name in make_tables.PAGES["gpu.md"]:
        assert len(on_page(make_tables, "gpu.md", name)) > 2
    operations = on_page(make_tables, "gpu.md", "operations on an H100")
    assert operations == make_tables.expected_operations(), "run docs/make_tables.py 'operations on an H100'"
    page, counted = on_page(make_tables, "gpu.md", "a step on an H100"), make_tables.expectation((32,))
    assert page[:2] == counted[:2]
    written, found = ([float(number) for number in re.findall(r"[\d.]+", row)] for row in (page[-1], counted[-1]))
    assert written[:2] == pytest.approx(found[:2], rel=0.01), "run docs/make_tables.py 'a step on an H100'"
    assert written == pytest.approx(found, rel=0.5), "run docs/make_tables.py 'a step on an H100'"


def test_the_table_of_random_streams(make_tables: ModuleType) -> None:
    """The numbers are those of the registry: a new stream of this project is on the page, or this fails."""
    rows = make_tables.PAGES["own-objective.md"]["random streams"]()
    assert on_page(make_tables, "own-objective.md", "random streams") == rows, "run docs/make_tables.py random streams"


def test_names_that_a_file_of_ones_own_is_made_of() -> None:
    """The page has every name that is kept, and nothing else of the package."""
    text = (DOCS / "own-objective.md").read_text(encoding="utf-8")
    surface = text.partition("## What it is made of")[2].partition("Beside it")[0]
    known = {*objectives.__all__} - {"DEFAULT", "OBJECTIVES", "declared"}
    assert set(re.findall(r"`(\w+)`", surface)) == known
    assert all(getattr(objectives, name).__doc__ for name in known)


def test_some_rows_of_what_fits(make_tables: ModuleType) -> None:
    """The cheap rows, those of the digits, and one cell of a large network; all of it takes minutes."""
    digits = [case for case in make_tables.CASES if case.preset == "digits"]
    for precision in ("bf16", "fp32"):
        rows = on_page(make_tables, "memory-and-speed.md", f"layouts in {precision}")
        assert len(rows) == 2 + len(make_tables.CASES) * len(make_tables.PROCESSES)
        assert [row for row in rows if "`digits`" in row] == make_tables.layouts(precision, digits)[2:]
    rows = on_page(make_tables, "memory-and-speed.md", "largest micro-batch")
    assert [row for row in rows if "`digits`" in row] == make_tables.largest(cases=digits)[2:]
    (cifar,) = [case for case in make_tables.CASES if case.preset == "cifar10-ncsnpp"]
    found = make_tables.layout(cifar, "bf16", 8, 24)
    rows = on_page(make_tables, "memory-and-speed.md", "layouts in bf16")
    (row,) = [row for row in rows if row.startswith("| `cifar10-ncsnpp` | 256 | 8 |")]
    assert row.split(" | ")[3] == found
    hours = on_page(make_tables, "memory-and-speed.md", "GPU hours")
    recipe = make_tables.RENTED[0]
    assert hours[:3] == make_tables.gpu_hours([recipe]) and recipe.file == "cifar_ipfm.py"
    assert len(hours) == 2 + len(make_tables.RENTED)
