"""ipfm report: what it says of whole, unfinished and damaged runs, what it refuses, and that its commands are right."""

from __future__ import annotations

import base64
import errno
import fcntl
import io
import json
import math
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import regression
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from ipfm.engine.commands import pages
from ipfm.engine.commands.info import Info
from ipfm.engine.commands.main import _main
from ipfm.engine.commands.pages.picture import Picture, png
from ipfm.engine.commands.pages.theme import DARK, LIGHT
from ipfm.engine.commands.report import page, plots
from ipfm.engine.commands.report.facts import facts_of
from ipfm.engine.commands.report.page import target, write_page
from ipfm.engine.commands.report.pictures import samples
from ipfm.engine.commands.report.plots import limits, smooth
from ipfm.engine.commands.report.reproduce import reproduce
from ipfm.engine.commands.report.strip import averaged, grid_of, strip_of
from ipfm.engine.config import free_settings
from ipfm.engine.data.comparison import Panel, places, save_comparison
from ipfm.engine.data.image_grid import PADDING_GREY, image_grid, save_grid
from ipfm.engine.evaluation.results import EvaluationRow, forget_results, write_results
from ipfm.engine.memory.profile import MemoryProfiler
from ipfm.engine.objectives import base
from ipfm.engine.objectives.ipfm import DistillConfig
from ipfm.engine.runtime.commandline import Given, parse, run_command
from ipfm.engine.runtime.files import json_line
from ipfm.engine.runtime.wording import significant
from ipfm.engine.training import run_folder
from ipfm.engine.training.pace import Pace
from ipfm.engine.training.run_folder import _identity, check_run_folder, open_run_folder
from ipfm.engine.training.run_state import read_run
from ipfm.models import EDMPrecond, presets, save_model
from ipfm.recipes import (
    cifar_ipfm,
    cifar_pid,
    cifar_realuid,
    cifar_sid,
    cifar_teacher,
    digits_ipfm,
    digits_pid,
    ffhq_ipfm,
    imagenet64_edm2_sid,
    imagenet64_sid,
    imagenet512_edm2_ipfm,
    imagenet512_edm2_sid,
    shapes_ipfm,
)

VOID = {"meta", "img", "source", "br", "link"}


def ipfm(*arguments: object) -> None:
    run_command("ipfm", _main, [str(argument) for argument in arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 2) -> str:
    """The one line with which the exit code is explained."""
    with pytest.raises(SystemExit) as stop:
        ipfm(*arguments)
    said = capsys.readouterr()
    assert stop.value.code == code and said.out == "" and said.err.count("\n") == 1
    return said.err


class Page(HTMLParser):
    """Its text, and the pictures in it. AssertionError: tags that do not match, or anything from outside."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.pictures: list[Image.Image] = []
        self.alts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe")
        self.open += [] if tag in VOID else [tag]
        for name, value in attributes:
            if name in ("src", "srcset"):
                kind, _, data = (value or "").partition(",")
                assert kind == "data:image/png;base64"
                self.pictures.append(Image.open(io.BytesIO(base64.b64decode(data, validate=True))))
            self.alts += [value or ""] if name == "alt" else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += [] if "style" in self.open else data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)


def page_of(run: Path) -> Page:
    ipfm("report", run)
    return Page((run / "report.html").read_text())


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take a second a page: they are drawn where a test asks for `drawn`, and else a picture of one pixel."""
    if "drawn" not in request.fixturenames:
        pixel = Picture("a curve", png(Image.new("L", (1, 1))))
        monkeypatch.setattr(page, "curves", lambda record, facts, dark: {"losses": pixel} if facts.losses else {})


@pytest.fixture
def drawn() -> None:
    """See `undrawn`."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of the digits recipe in this process: its teacher too, and the memory of a step."""
    out = tmp_path_factory.mktemp("real") / "digits-D128-alpha1-K1"
    digits_ipfm.main(
        "--teacher-steps 2 --max-steps 6 --batch 16 --eval-every 3 --eval-images 64 --heun-steps 2 --log-every 1 "
        f"--checkpoint-every 6 --profile-memory 1 --eps 1e-3 --out {out}".split()
    )
    # This process goes on; its locks are not of these runs any more.
    for folder in (out, out / "teacher"):
        run_folder.release_folder(folder)
    return out


def make(run: Path, *, steps: int = 40, kind: str = "distill", **settings: Any) -> Path:
    """A run folder by hand, in the formats of real ones: 40 of 40 steps, evaluated at 20 and 40, no TensorBoard."""
    config = DistillConfig(
        **{"out": Path("/home/someone/secret/run"), "batch": 16, "max_steps": 40, "D": 128.0} | settings
    )
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"format": 1, "kind": kind, "config": config.to_json()}))
    lines = [
        json_line({"step": i, "generator_bad": 2.0 * (i == 3), "generator_loss": math.nan if i == 3 else 1.0 / (i + 1),
                   "student_bad": float(i in (3, 5)), "student_loss": 40.0})
        for i in range(steps)
    ]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    looks = [step for step in (20, 40) if step <= steps]
    torch.manual_seed(0)
    for step in looks:
        with open(run / "evaluations.jsonl", "a") as file:
            file.write(json_line({"step": step, "frechet": 20 / step, "images": 64, "seconds": 0.5}) + "\n")
        save_grid(torch.rand(64, 1, 8, 8) * 2 - 1, run / "samples" / f"step-{step:07d}.png")
    if steps == 40:
        write_results(
            run, [EvaluationRow("teacher", None, 35, 0.25, 64, 10.0), EvaluationRow("generator", 1, 1, 0.5, 64, 300.0)]
        )
        extra = {"task": "generator", "dataset": "", "D": 128.0, "sigmas": [2.5]}
        save_model(EDMPrecond(presets.get("digits", D=128.0)), run / "generator", extra=extra)
    return run


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_a_real_run_has_everything(finished: Path, drawn: None) -> None:
    found = page_of(finished)
    for word in ("Result", "Samples", "Losses", "Speed", "Memory of a step", "Settings", "finished",
                 "generator: backward", "6 steps of 16 images", "96 generated images", "None in 6 steps",
                 "for 2 steps on 1,797 images (digits)"):  # fmt: skip
        assert word in found.text, word
    assert "Not in this report" not in found.text
    assert str(finished.parent) not in (finished / "report.html").read_text()
    # Three plots, light and dark; teacher, generator and data; the last samples, and a few over time; the timeline.
    assert len(found.pictures) == 2 * 3 + 1 + 1 + 1 + 1 and len(found.alts) == 7 and all(found.alts)
    assert "side by side: teacher, 3 NFE, generator, 1 NFE, data" in found.alts
    assert "the same 4 latents after 3 and 6 steps" in found.alts and "Without data" not in found.text
    assert (finished / "report.html").stat().st_size < 2_000_000
    for picture in found.pictures:
        assert np.asarray(picture.convert("L")).std() > 5
    # Teacher's run, too.
    found = page_of(finished / "teacher")
    assert "Training of a teacher, D = 128" in found.text and "2 steps of 128 images" in found.text
    assert "first part of the distillation" in found.text and "model --n 64" in found.text
    assert "side by side: teacher, 3 NFE, data" in found.alts


@pytest.mark.distributed
def test_json_has_the_same_facts(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(finished.rglob("*"))
    ipfm("report", finished, "--json")
    facts = json.loads(capsys.readouterr().out)
    assert sorted(finished.rglob("*")) == before
    assert facts["results"] == json.loads((finished / "results.json").read_text())
    looks = [json.loads(line) for line in (finished / "evaluations.jsonl").read_text().splitlines()]
    assert facts["evaluations"] == looks
    assert facts["best"] == min(looks, key=lambda look: look["frechet"])
    losses = [json.loads(line)["student_loss"] for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert facts["losses"][1] == {"name": "student_loss", "first": losses[0], "last": losses[-1]}
    assert (facts["state"], facts["steps_done"], facts["images"], facts["D"]) == ("finished", 6, 96, 128.0)
    assert (facts["bad"], facts["bad_steps"], facts["missing"]) == ({"generator": 0, "student": 0}, 0, [])
    assert facts["images_per_second"] > 0 and {row["phase"] for row in facts["memory"]} > {"generator: teacher"}
    changed = {row["name"]: row["value"] for row in facts["settings"] if row["changed"]}
    assert changed["eps"] == "0.001" and changed["eval-every"] == "3" and "sigmas" not in changed
    assert str(finished.parent) not in json.dumps(facts)
    pictures = facts["pictures"]
    assert pictures["samples"] == [{"step": n, "file": f"samples/step-{n:07d}.png"} for n in (3, 6)]
    assert (pictures["over_time"], pictures["last"], pictures["memory"]) == ([3, 6], 6, "memory/timeline.png")
    assert (pictures["comparison"], pictures["comparison_has_data"]) == ("comparison.png", True)
    # So does ipfm info.
    Info(model=finished, json=True).run()
    known = json.loads(capsys.readouterr().out)
    assert known["comparison"] == str(finished / "comparison.png")
    assert [Path(one["path"]).relative_to(finished).as_posix() for one in known["pictures"]] == [
        one["file"] for one in pictures["samples"]
    ]
    Info(model=finished).run()
    shown = capsys.readouterr().out
    assert f"2 of steps 3 to 6: {finished / 'samples'}" in shown and "teacher, generator, data: " in shown


@pytest.mark.distributed
def test_the_command_of_a_real_run_makes_it_again(finished: Path) -> None:
    line = reproduce(read_run(finished)).line
    assert line is not None
    program, recipe, *options = shlex.split(line)
    assert (program, recipe) == ("deepspeed", "recipes/digits_ipfm.py")
    given = parse(type(digits_ipfm.RECIPE.base), options, default=digits_ipfm.RECIPE.base, prog="", description="")
    assert (given.teacher_steps, given.eval_images, given.eval_every) == (2, 64, 3)
    config = replace(given.distillation(), sigmas=given.levels)
    found = json.loads((finished / "config.json").read_text())["config"]
    free = free_settings(type(config))
    assert _identity(config.to_json(), free) == _identity(found, free) and config.total_steps == 6


def test_numbers_of_a_run(tmp_path: Path) -> None:
    """Counted: samples that were not finite, by network and by step; the mean of a loss at the end; words."""
    facts = facts_of(read_run(make(tmp_path / "run")))
    assert (facts.bad, facts.bad_steps) == ({"generator": 2, "student": 2}, 2)
    generator, student = facts.losses
    assert (generator.first, student.last) == (1.0, 40.0)
    assert generator.last == pytest.approx(sum(1 / i for i in range(37, 41)) / 4)
    assert "0.5000, beside 0.2500 of the teacher at 35 evaluations an image: 2.00 times" in facts.summary
    found = page_of(tmp_path / "run")
    assert "In 2 of 40 steps: 2 of the generator, 2 of the student." in found.text
    assert "someone" not in (tmp_path / "run" / "report.html").read_text()
    # The settings that differ come first, the others are folded.
    text = (tmp_path / "run" / "report.html").read_text()
    folded = text[text.index("<details>") : text.index("</details>")]
    assert "<td>batch</td>" not in folded and "<td>seed</td>" in folded and "<td>batch</td>" in text


def test_a_teacher_run_and_an_objective_of_others(tmp_path: Path) -> None:
    config = cifar_teacher.RECIPE.base.training().to_json() | {"D": "inf"}
    network = presets.get("cifar10-ncsnpp", D=math.inf)
    record = {"format": 1, "kind": "teacher", "config": config, "network": network.to_json(), "dataset": "cifar.zip",
              "images": 50_000, "xflip": True}  # fmt: skip
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "config.json").write_text(json.dumps(record))
    (tmp_path / "t" / "metrics.jsonl").write_text('{"step": 0, "teacher_loss": 3.0, "teacher_bad": 0.0}\n')
    facts = facts_of(read_run(tmp_path / "t"))
    assert facts.title == "Training of a teacher, D = ∞" and "50,000 images (cifar.zip)" in facts.summary
    assert facts.to_json()["D"] == "inf" and facts.state == "stopped" and facts.total_steps == 390_625
    assert "levels off" in facts.loss_reading
    run = make(tmp_path / "own")
    record = json.loads((run / "config.json").read_text())
    record["config"] = {"batch": 16, "max_steps": 40, "D": 64.0, "temperature": 3}
    (run / "config.json").write_text(json.dumps(record))
    facts = facts_of(read_run(run))
    assert (facts.title, facts.command.line, facts.loss_reading) == ("Distillation, D = 64", None, "")
    assert ("temperature", "3", None) in [(s.name, s.value, s.default) for s in facts.settings]
    page_of(run)


@pytest.mark.parametrize(
    ("module", "dataset", "options"),
    [
        (cifar_ipfm, "cifar10", "--D 2048 --alpha 0.5 --steps 4 --precision bf16"),
        (cifar_ipfm, "cifar10", "--D 128 --sigmas 2.5 0.7 --no-tf32 --max-steps 9 --noise.p-mean -1.1 --clip-grad 1"),
        (cifar_ipfm, "cifar10", "--D 128 --real-weights 0.92 0.96 --real-xflip"),
        (cifar_realuid, "cifar10", "--D inf"),
        (cifar_sid, "cifar10", "--D inf"),
        (cifar_pid, "cifar10", "--D inf --difference central --points 120"),
        (ffhq_ipfm, "ffhq64", "--D 128 --seed 3"),
        (imagenet64_sid, "imagenet-64-cond", "--D inf --lr 3e-6"),
        (imagenet512_edm2_sid, "imagenet-512-cond", "--D inf --size xxl --seed 3"),
        (imagenet512_edm2_ipfm, "imagenet-512-cond", "--D 128 --size m --no-logvar"),
        (imagenet64_edm2_sid, "imagenet-64-cond", "--D inf --size l --sigma-init 3"),
        (digits_ipfm, "", "--D 64 --student-updates 3 --kimg 2.5"),
        (digits_pid, "", "--D inf --max-steps 50"),
        (shapes_ipfm, "", "--D 128 --gradient last --steps 2"),
    ],
)
def test_commands_of_the_recipes(tmp_path: Path, module: Any, dataset: str, options: str) -> None:
    """From options to config.json to a command to options: the settings are the same, and so is the recipe."""
    recipe = module.RECIPE
    named = ["--size", options.split()[3]] if "--size" in options else []
    network = recipe.network(recipe.base, 128.0) if not dataset else presets.get(recipe.preset)
    network = presets.get(recipe.preset_of(named[1])) if named else network
    generator = replace(network, logvar_channels=0) if network.is_edm2 else network

    def settings(arguments: list[str], D: float) -> Any:
        base = recipe.base
        if hasattr(recipe, "variant"):
            read = parse(type(base), arguments, default=base, prog="", description="")
            base = recipe.varied(vars(read), replace(network, D=D))
        config = parse(type(recipe.base), arguments, default=base, prog="", description="").distillation()
        return replace(config, sigmas=config.levels) if isinstance(config, DistillConfig) else config

    config = settings(options.split(), float(options.split()[1]))
    # Of two recipes with the same settings the folder's name tells which it was.
    alike = dataset.startswith("imagenet")
    run = tmp_path / (f"{recipe.run_stem(network)}-D{config.D:g}" if alike else "results")
    (run / "generator").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"kind": "distill", "config": config.to_json()}))
    exported = {"network": replace(generator, D=config.D).to_json(), "extra": {"dataset": dataset}}
    (run / "generator" / "config.json").write_text(json.dumps(exported))
    line = reproduce(read_run(run)).line
    assert line is not None
    _, file, *arguments = shlex.split(line)
    assert file == f"recipes/{recipe.file}"
    given = [*named, "--teacher", "TEACHER"]
    assert arguments[: len(given)] == given
    again = settings(arguments[len(given) :], config.D)
    free = free_settings(type(config))
    assert _identity(again.to_json(), free) == _identity(config.to_json(), free)
    assert again.total_steps == config.total_steps


def test_the_command_of_a_teacher(tmp_path: Path) -> None:
    recipe, given = cifar_teacher.RECIPE, "--D 128 --arch ddpmpp --model-channels 64 --batch 64 --xflip"
    options = parse(type(recipe.base), given.split(), default=recipe.base, prog="", description="")
    network = recipe._network(recipe.settle(Given(options, frozenset()), None, None), None, None)
    config = replace(options.training(), D=128.0)
    record = {"kind": "teacher", "config": config.to_json(), "network": replace(network, dropout=0.13).to_json(),
              "dataset": "x.zip", "images": 5, "xflip": True}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(record))
    line = reproduce(read_run(tmp_path)).line
    assert line is not None
    assert line.startswith("deepspeed recipes/cifar_teacher.py --data DATA --arch ddpmpp --model-channels 64 --xflip")
    again = parse(type(recipe.base), shlex.split(line)[2:], default=recipe.base, prog="", description="")
    assert again.training() == config and again.xflip
    # One that is older than the rules of a run went by the first ones.
    del record["config"]["rules"]
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert reproduce(read_run(tmp_path)).line == f"{line} --rules 1"


# -- unfinished and damaged ones ---------------------------------------------------------------------------------------


def test_stopped_and_going_on(tmp_path: Path) -> None:
    run = make(tmp_path / "run", steps=25)
    found = page_of(run)
    assert "stopped before its end, at 25 of 40 steps" in found.text and "after 20 steps is 1.000" in found.text
    assert "No table beside the teacher" in found.text and "To use its network" not in found.text
    with open(run / "run.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert facts_of(read_run(run)).state == "going on"
        assert "It is going on, at 25 of 40 steps" in page_of(run).text
    assert facts_of(read_run(run)).state == "stopped"
    (run / "diverged.json").write_text('{"step": 25, "reason": "at /home/someone"}')
    assert "It diverged" in page_of(run).text
    # Only begun: there is a page all the same.
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.json").write_bytes((run / "config.json").read_bytes())
    found = page_of(tmp_path / "new")
    for word in ("No losses", "No distances", "No pictures", "No network", "0 of 40 steps"):
        assert word in found.text
    assert found.pictures == []


def damage(run: Path) -> Iterator[tuple[str, str]]:
    """(what the page says then), one after the other on the same folder."""
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "generator_lo')
    yield "40 steps of 16 images", ""
    (run / "metrics.jsonl").write_text("not json\n" + (run / "metrics.jsonl").read_text())
    yield "metrics.jsonl: 1 unreadable lines were left out", ""
    picture = run / "samples" / "step-0000040.png"
    picture.write_bytes(picture.read_bytes()[:300])
    yield "samples/step-0000040.png cannot be read", "After 20 steps"
    (run / "results.json").write_text('[{"label": "teacher"')
    yield "results.json cannot be read", "after 40 steps is 0.5000"
    (run / "results.json").write_text(
        '[{"label": "generator", "steps": 1, "nfe": null, "frechet": null, "images": "x", "images_per_second": 1}]'
    )
    yield "Results.json cannot be read", ""
    (run / "memory").mkdir()
    (run / "memory" / "memory.csv").write_text("phase,measured_bytes\nstate,many\n")
    (run / "memory" / "timeline.png").write_text("no picture")
    yield "Memory/memory.csv cannot be read", ""
    (run / "tensorboard").mkdir()
    (run / "tensorboard" / "events.out.tfevents.1.x").write_bytes(b"\x07" * 99)
    yield "No images/s", ""
    (run / "evaluations.jsonl").unlink()
    (run / "evaluations.jsonl").mkdir()
    yield "Evaluations.jsonl cannot be read: Is a directory", "have not been measured"
    (run / "generator" / "config.json").write_text("[]")
    yield "No network", ""
    (run / "config.json").write_text('{"format": 1, "kind": "distill", "config": {"batch": 1')
    yield "Config.json cannot be read as a run's settings", "an objective that is not recorded"


def test_damage_does_not_break_the_page(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    for number, said in enumerate(damage(run)):
        text = page_of(run).text
        for words in said:
            assert words.lower() in text.lower(), (number, words)


def test_values_of_the_wrong_kind_do_not_break_it_either(tmp_path: Path, drawn: None) -> None:
    """Each setting in turn is something else; then the numbers of the logs are."""
    run = make(tmp_path / "run")
    record = json.loads((run / "config.json").read_text())
    values = (None, "x", -1, [], {"a": 1}, [None], 1e400)
    for number, name in enumerate(record["config"]):
        for value in (values[number % 7], values[(number + 3) % 7]):
            (run / "config.json").write_text(json.dumps(record | {"config": record["config"] | {name: value}}))
            json.dumps(facts_of(read_run(run)).to_json(), allow_nan=False)
    (run / "metrics.jsonl").write_text(
        '{"step": 0, "generator_loss": "x", "generator_bad": null}\n{"step": 1, "generator_loss": [1]}\n'
    )
    (run / "evaluations.jsonl").write_text('{"step": 1, "frechet": "x", "images": {}}\n')
    facts = facts_of(read_run(run))
    assert facts.best is None and math.isnan(facts.losses[0].first) and facts.bad == {"generator": 0}
    assert "Losses" not in page_of(run).text.split()


def test_html_and_markdown_are_escaped(tmp_path: Path) -> None:
    run = make(tmp_path / "a <b> & *c* | `d`", teacher=Path("<script>alert(1)</script>|_x_"))
    text = (page_of(run), (run / "report.html").read_text())[1]
    assert "<script" not in text and "&lt;script&gt;" in text and "a &lt;b&gt; &amp; *c*" in text
    ipfm("report", run, "--out", tmp_path / "r.md")
    text = (tmp_path / "r.md").read_text()
    outside = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    assert "<script" not in outside and "<b>" not in outside
    (row,) = (line for line in text.splitlines() if line.startswith("| teacher | ") and "script" in line)
    assert row == r"| teacher | &#60;script&#62;alert(1)&#60;/script&#62;&#124;\_x\_ | not given |"


# -- files -------------------------------------------------------------------------------------------------------------


def test_markdown_has_its_pictures_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path / "run")
    for out, images in ((tmp_path / "docs" / "my run.md", None), (tmp_path / "docs" / "b.md", tmp_path / "pictures")):
        ipfm("report", run, "--out", out, *(["--images", images] if images else []))
        text = out.read_text()
        links = [out.parent / unquote(link) for link in re.findall(r"!\[[^\]]*\]\((\S+)\)", text)]
        assert len(links) == 1 + 1 + 1 and all(Image.open(link).format == "PNG" for link in links)
        folder = images or tmp_path / "docs" / "my run_files"
        assert sorted(link.resolve() for link in links) == sorted(folder.resolve().iterdir())
        assert "\n\n\n" not in text and "{{" not in text and "None" not in text.replace("None in", "")
        # Every table is one.
        for header, rule in re.findall(r"^(\|.*)\n(\|[-:|]+)$", text, re.MULTILINE):
            assert header.count("|") == rule.count("|")
        ipfm("report", run, "--out", out, *(["--images", images] if images else []))
        assert out.read_text().split("Made by")[0] == text.split("Made by")[0]
    assert capsys.readouterr().out.count("report: ") == 4
    foreign = tmp_path / "pictures" / "b-losses.png"
    save_grid(torch.zeros(1, 1, 8, 8), foreign)
    kept = foreign.read_bytes()
    assert "is no picture of a report" in refused(capsys, "report", run, "--out", out, "--images", images)
    assert foreign.read_bytes() == kept


def test_a_report_is_replaced_whole_and_nothing_else_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(tmp_path / "run")
    ipfm("report", run)
    before = (run / "report.html").read_bytes()
    capsys.readouterr()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "No space left" in refused(capsys, "report", run, code=1)
    assert (run / "report.html").read_bytes() == before and not list(run.glob(".*"))
    ipfm("report", run)
    capsys.readouterr()
    notes = tmp_path / "notes.html"
    notes.write_text("<html>mine</html>")
    assert "is no report of this command: choose another --out" in refused(capsys, "report", run, "--out", notes)
    assert notes.read_text() == "<html>mine</html>"
    assert "must end in .html or .md" in refused(capsys, "report", run, "--out", tmp_path / "a.pdf")
    ipfm("report", run, "--out", tmp_path / "A.MD")
    assert (tmp_path / "A.MD").is_file() and (tmp_path / "A_files").is_dir()
    capsys.readouterr()
    assert "images is for a Markdown page" in refused(capsys, "report", run, "--images", tmp_path)
    assert "is a file" in refused(capsys, "report", run, "--out", notes / "a.html")
    assert "leave out and images away" in refused(capsys, "report", run, "--json", "--out", tmp_path / "a.html")


def test_folders_that_are_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "ablation" / "alpha1").mkdir(parents=True)
    (tmp_path / "ablation" / "ablation.json").write_text("{}")
    assert "is not there: give the folder of a run" in refused(capsys, "report", tmp_path / "none")
    assert "is a file" in refused(capsys, "report", run / "config.json", "--out", tmp_path / "a.html")
    assert "is no run folder" in refused(capsys, "report", tmp_path / "empty")
    assert "`ipfm info` describes it" in refused(capsys, "report", run / "generator")
    assert "ablation.md" in refused(capsys, "report", tmp_path / "ablation")
    assert not list(tmp_path.rglob("report.html"))
    # One of its runs has a report, and no command of a recipe.
    made = reproduce(read_run(make(tmp_path / "ablation" / "alpha1" / "seed0")))
    assert made.line is None and "ablation.md" in made.notes[0]


# -- parts -------------------------------------------------------------------------------------------------------------


def test_images_per_second_from_the_times_of_the_losses(tmp_path: Path, drawn: None) -> None:
    """Losses every 2 steps: 4 s each, with an evaluation of 100 s at 4; then killed, and slower from step 6 on."""
    run = make(tmp_path / "run", log_every=2, eval_every=4, checkpoint_every=100)
    for part, times in enumerate(({1: 1000, 2: 1000, 3: 1004, 4: 1004, 5: 1108, 6: 1108, 7: 1112, 8: 1112},
                                  {7: 5000, 8: 5000, 9: 5016, 10: 5016, 11: 5024, 12: 5024})):  # fmt: skip
        with SummaryWriter(str(run / "tensorboard"), filename_suffix=f".{part}") as board:
            for step, time in times.items():
                board.add_scalar("generator_loss", 1.0, step, walltime=time)
                board.add_scalar("frechet", 1.0, step, walltime=time + 99)
    files = sorted((run / "tensorboard").iterdir())
    facts = facts_of(read_run(run))
    # 2 steps of 16 images in 4 s; those after steps 4 and 8 have an evaluation in them.
    assert facts.pace == ((4, 8.0), (8, 8.0), (12, 4.0))
    assert (facts.images_per_second, facts.logged_seconds) == (8.0, 112 + 24)
    assert "in 2 parts" in dict(facts.environment)["training, evaluations and checkpoints"]
    with open(files[1], "ab") as file:
        file.write(files[0].read_bytes()[:50])
    files[0].write_bytes(files[0].read_bytes()[:-7])
    assert facts_of(read_run(run)).pace == facts.pace
    assert "8.000" in page_of(run).alts[-1]


def test_a_clock_that_was_set_back_takes_no_time_away() -> None:
    pace = Pace((((10, 1000.0), (20, 400.0), (30, 410.0)), ((40, 500.0), (50, 520.0))))
    assert pace.seconds == 20
    assert pace.images_per_second(4, log_every=10, pauses=()) == [(30, 4.0), (50, 2.0)]


def test_smoothing_and_the_axis() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=300)
    values[[5, 6, 100]] = np.nan
    steps = np.arange(300)
    for at in (0, 3, 100, 150, 299):
        expected = np.nanmean(values[max(0, at - 5) : at + 6])
        assert smooth(steps, values).values[at] == pytest.approx(expected)
    assert np.isnan(smooth(steps, np.full(300, np.nan)).values).all()
    assert smooth(np.array([1]), np.array([7.0])).values == [7.0]
    assert limits(values, values) is None
    values[7] = 1e6
    ends = limits(values, smooth(steps, values * 0).values)
    assert ends is not None and -4 < ends[0] < -1.5 and 1.5 < ends[1] < 4


def strip_in(run: Path, out: Path) -> tuple[np.ndarray, list[list[str]]]:
    """The strip as a page in Markdown has it, with letters above, and their lines, column by column."""
    record = read_run(run)
    facts = facts_of(record)
    write_page(record, facts, target(out))
    grids = samples(record)
    assert grids.strip is not None
    with Image.open(out.parent / f"{out.stem}_files" / f"{out.stem}-samples-over-training.png") as picture:
        pixels = np.asarray(picture)
    assert f"![{grids.strip.shown.alt}]({out.stem}_files/{out.stem}-samples-over-training.png)" in out.read_text()
    # On white, dark letters in every column; below them the strip itself.
    above, below = np.split(pixels, [len(pixels) - len(grids.strip.pixels)])
    assert (above == 255).any() and all((part < 100).any() for part in np.array_split(above, len(grids.strip.steps), 1))
    assert np.array_equal(below, grids.strip.pixels)
    return below, page._labels(facts, grids.strip)


def test_samples_over_the_training_are_one_strip_of_the_same_latents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A column for each of at most seven moments, the first and the last among them: the first four of their images."""
    run = make(tmp_path / "run")
    torch.manual_seed(1)
    drawn = {step: torch.rand(64, 3, 8, 8) * 2 - 1 for step in (*range(1, 12), 20, 40)}
    for step, images in drawn.items():
        save_grid(images, run / "samples" / f"step-{step:07d}.png")
    strip, labels = strip_in(run, tmp_path / "a.md")
    steps = [1, 3, 5, 7, 9, 11, 40]
    assert labels == [[f"{n} step{'s' * (n > 1)}", f"{16 * n} images", "0.5000" if n == 40 else "-"] for n in steps]
    few = torch.stack([drawn[step][:4] for step in steps], 1).flatten(0, 1)
    assert np.array_equal(strip, image_grid(few, columns=7, scale=14))
    found = page_of(run)
    assert "the same 4 latents after 1, 3, 5, 7, 9, 11 and 40 steps" in found.alts
    assert "1 step 16 images - 3 steps 48 images -" in found.text and "40 steps 640 images 0.5000" in found.text
    assert "The same 4 latents over the training, a column a moment: steps, images trained on, Fréchet" in found.text
    # One that is damaged, or of other images, is left out.
    (run / "samples" / "step-0000003.png").write_bytes(b"no picture")
    save_grid(drawn[5][:5], run / "samples" / "step-0000005.png")
    assert "the same 4 latents after 1, 7, 9, 11 and 40 steps" in page_of(run).alts
    capsys.readouterr()
    ipfm("report", run, "--json")
    facts = json.loads(capsys.readouterr().out)
    assert facts["pictures"]["over_time"] == [1, 7, 9, 11, 40]
    assert "samples/step-0000003.png cannot be read." in facts["missing"]


@pytest.mark.parametrize(
    ("side", "shape"),
    # (pixels a side, of the strip of three columns and four rows)
    [(8, (4 * 112 + 3 * 14, 3 * 112 + 2 * 14)), (64, (4 * 128 + 6, 3 * 128 + 4)), (256, (4 * 128 + 6, 3 * 128 + 4))],
)
def test_a_strip_of_small_and_of_large_images_fits_on_a_page(side: int, shape: tuple[int, int]) -> None:
    moments = [torch.full((16, 3, side, side), value) for value in (-1.0, 0.0, 1.0)]
    moments[0][4:] = 1.0  # are not shown
    strip = strip_of(moments)
    assert strip.shape == (*shape, 3) and [strip[0, x, 0] for x in (0, shape[1] // 2, shape[1] - 1)] == [0, 128, 255]
    # Larger ones are averaged, over squares.
    if side == 256:
        moments[0][:, :, ::2] = 1.0
        assert (strip_of(moments)[:128, :128] == 128).all()
    images = torch.rand(64, 3, side, side) * 2 - 1
    times, grid = {8: 1, 64: 1, 256: 3}[side], grid_of(images)
    assert averaged(images) == times and grid.shape == (
        8 * 72 - 8 if side == 8 else 8 * (-(-side // times) + 2) - 2,
    ) * 2 + (3,)
    if side == 256:
        assert abs(int(grid[0, 0, 0]) - float(images[0, 0, :3, :3].mean() * 127.5 + 128)) <= 1
    many = strip_of([images[:2] for images in (*moments, *moments, moments[0])])
    assert many.shape[1] < 952


def test_a_run_with_one_picture_has_no_strip_and_one_without_data_says_so(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    (run / "samples" / "step-0000020.png").unlink()
    images = torch.zeros(16, 1, 8, 8)
    save_comparison([Panel("teacher, 35 NFE", images), Panel("generator, 1 NFE", images)], places((1, 8, 8), None),
                    run / "comparison.png")  # fmt: skip
    found = page_of(run)
    assert "samples after 40 steps" in found.alts and not [alt for alt in found.alts if "latents" in alt]
    assert "are of the same latent. Without data: the run had none at hand." in found.text
    # Of a picture that another program has written anew that is not known.
    with Image.open(run / "comparison.png") as picture:
        picture.load()
    picture.info.clear()
    picture.save(run / "comparison.png")
    found = page_of(run)
    assert "side by side: the networks" in found.alts and "Without data" not in found.text


def test_the_picture_of_the_end_is_on_the_page_and_said_where_it_is_damaged(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    images = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    where = places((1, 8, 8), None)
    whole = save_comparison([Panel("teacher, 35 NFE", images), Panel("data", -images)], where, run / "comparison.png")
    record = read_run(run)
    write_page(record, facts_of(record), target(tmp_path / "a.md"))
    assert "![side by side: teacher, 35 NFE, data](a_files/a-comparison.png)" in (tmp_path / "a.md").read_text()
    with Image.open(tmp_path / "a_files" / "a-comparison.png") as picture:
        assert np.array_equal(np.asarray(picture), whole)
    assert "side by side: teacher, 35 NFE, data" in page_of(run).alts
    (run / "comparison.png").write_bytes((run / "comparison.png").read_bytes()[:90])
    assert "comparison.png cannot be read." in page_of(run).text


def test_grids_of_an_older_run_are_taken_apart_where_they_were_put_together(tmp_path: Path) -> None:
    """Version 0.1.0 left one pixel between images, and said nothing of how they lie."""
    run = make(tmp_path / "run")
    tile = np.arange(64, dtype=np.uint8).reshape(8, 8)
    for step, brighter in ((20, 0), (40, 100)):
        old = np.full((8 * 9 - 1, 8 * 9 - 1), PADDING_GREY, dtype=np.uint8)
        for i in range(64):
            old[9 * (i // 8) :, 9 * (i % 8) :][:8, :8] = tile + i + brighter
        Image.fromarray(old).save(run / "samples" / f"step-{step:07d}.png")
    strip, _ = strip_in(run, tmp_path / "a.md")
    pixels = 14 * np.arange(8)
    for row in range(4):
        for column, brighter in enumerate((0, 100)):
            top, left = row * (112 + 14), column * (112 + 14)
            assert np.array_equal(strip[top + pixels[:, None], left + pixels, 0], tile + row + brighter)


def test_memory_as_the_profiler_writes_it(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    profiler = MemoryProfiler(torch.device("cpu"))
    from ipfm.engine.objectives.phases import mark

    with profiler.step():
        mark("generator: samples")
        held = torch.ones(300_000)
        mark("generator: backward")
        del held
    profiler.finish(run)
    assert read_run(run).memory == tuple(profiler.rows)
    found = page_of(run)
    assert "generator: backward" in found.text and "memory over a step, by phase" in found.alts


def test_an_objective_from_outside_is_described_in_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a process that does not know it."""
    config = regression.RegressionConfig(D=64.0, batch=16, max_steps=40, level=1.5, seed=3)
    run = tmp_path / "run"
    open_run_folder(run, check_run_folder(run, "distill", config, {}), write=True)
    (run / "metrics.jsonl").write_text('{"step": 0, "pupil_loss": 3.0}\n')
    monkeypatch.setattr(base, "_registered", {k: v for k, v in base._registered.items() if k != "regression"})
    facts = facts_of(read_run(run))
    assert facts.title == "Regression on the teacher's denoising, D = 64"
    assert facts.objective == "regression on the teacher's denoising at σ = 1.5"
    assert "makes an image in 1 network evaluation" in facts.summary
    assert facts.loss_reading == "pupil_loss is a squared error: it falls."
    assert not {"ema-kimg", "ema-rampup"} & {setting.name for setting in facts.settings}
    Info(model=run).run()
    shown = capsys.readouterr().out
    assert "regression on the teacher's denoising" in shown and "half-life" not in shown
    # What it says of itself is no part of what identifies the run.
    monkeypatch.setattr(regression.RegressionConfig, "method", "another name")
    assert check_run_folder(run, "distill", config, {})["about"]["info"] == "another name"


def test_the_curve_of_a_run_that_was_lengthened_keeps_the_teachers_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, drawn = make(tmp_path / "run"), []
    monkeypatch.setattr(plots, "draw_convergence", lambda axes, points, teacher, *_, **__: drawn.append(teacher))
    facts = facts_of(read_run(run))
    known = next(row.frechet for row in facts.results if row.label == "teacher")
    forget_results(run)
    record = read_run(run)
    facts = facts_of(record)
    assert facts.results == () and facts.teacher_distance == known and not record.problems
    plots.curves(record, facts, dark=False)
    assert drawn == [known]


def test_every_curve_of_what_was_measured_has_the_teachers_line(tmp_path: Path, drawn: None) -> None:
    """Dashed, at the teacher's number, named with it, on a light and on a dark page."""
    run = make(tmp_path / "run")
    teacher = {"frechet": 0.25, "kid": 0.002, "precision": 0.8, "recall": 0.5}
    others = {"kid": 0.01, "precision": 0.5, "recall": 0.25}
    about = {"metrics": ["fid", "kid", "pr"], "kid_std": 0.001, "kid_subset_size": 64, "pr_images": 64,
             "pr_real_images": 64, "images": 64}  # fmt: skip
    (run / "evaluations.jsonl").write_text(
        "".join(json_line({"step": n, "frechet": 20 / n, **others, **about}) + "\n" for n in (20, 40))
    )
    rows = [
        {"label": name, "steps": steps, "nfe": 1, "images_per_second": 1.0, **about, **values}
        for name, steps, values in (("teacher", None, teacher), ("generator", 1, {"frechet": 0.5, **others}))
    ]
    (run / "results.json").write_text(json.dumps(rows))
    record = read_run(run)
    facts = facts_of(record)
    assert facts.metrics == ("fid", "kid", "pr") and not record.problems
    for theme in (LIGHT, DARK):
        figure = plots._distance(plots._measured(facts), facts, theme)
        names = [axes.get_ylabel() for axes in figure.axes]
        assert len(names) == 4 and names[0] == "Fréchet distance"
        assert [axes.get_xlabel() for axes in figure.axes] == ["", "", "", "generator steps"]
        for axes, key in zip(figure.axes, teacher, strict=True):
            own, line = axes.lines[:2]
            assert list(own.get_ydata()) == ([1.0, 0.5] if key == "frechet" else [others[key]] * 2)
            assert line.get_linestyle() == "--" and set(line.get_ydata()) == {teacher[key]}
            assert line.get_color() == theme.faint and own.get_color() == theme.curves[0]
            texts = [text.get_text() for text in axes.get_legend().get_texts()]
            assert texts == ["generator", f"teacher {significant(teacher[key])}"]
    assert "Fréchet distance, kernel distance, precision, recall" in page_of(run).text


def contrast(one: str, other: str) -> float:
    """Of two colours #rrggbb, 1 to 21, as WCAG 2 defines it."""

    def light(colour: str) -> float:
        values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


def test_letters_and_curves_stand_out_on_a_light_and_on_a_dark_page() -> None:
    """WCAG's levels: 4.5 for text, 3 for what is drawn; plots are on the paper of their page."""
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    style = (Path(pages.__file__).parent / "style.css.j2").read_text()
    colours = [dict(re.findall(r"--(\w+): (#\w{6});", line)) for line in style.splitlines() if ":root" in line]
    for found, theme in zip(colours, (LIGHT, DARK), strict=False):
        assert found["paper"] == theme.paper and found["ink"] == theme.ink
        for words in (found["ink"], found["faint"], found["mark"], theme.ink, theme.faint):
            assert contrast(words, found["paper"]) >= 4.5 and contrast(found["ink"], found["soft"]) >= 4.5
        assert min(contrast(curve, theme.paper) for curve in theme.curves) >= 3


def test_images_that_were_not_finite_are_counted_below_the_table(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    write_results(run, [EvaluationRow("generator", 1, 1, 3.5, 1987, 9.0, left_out=13)])
    assert "13 further images of the generator were not finite and are left out." in page_of(run).text
