"""`ipfm plan`: what to rent for a recipe, a preset or a teacher, against the arithmetic written out."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from counted import counted_flops

from ipfm.engine.commands.main import _main
from ipfm.engine.commands.plan import rent, settings
from ipfm.engine.commands.plan.command import Plan as Command
from ipfm.engine.commands.recipes import project_recipes
from ipfm.engine.experiments import dry_run
from ipfm.engine.experiments.gpu_costs import Run
from ipfm.engine.memory import gpu_budget
from ipfm.engine.memory.arithmetic import GPUS, encoder_flops, forward_flops
from ipfm.engine.memory.state import factor_count, parameter_count
from ipfm.engine.objectives.initial_networks import trained_config
from ipfm.engine.objectives.ipfm import InversePoissonFlowMatching
from ipfm.engine.runtime.commandline import run_command
from ipfm.models import build_network, presets, save_model
from ipfm.models.low_rank import Lora
from ipfm.recipes import cifar_ipfm, cifar_sid, cifar_teacher, digits_ipfm, distill_ipfm

KINDS = [gpu.name for gpu in GPUS]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "model"
    save_model(build_network(presets.get("digits", D=128.0)), folder, extra={"task": "teacher"})
    return folder


def plan(*arguments: object) -> None:
    run_command("ipfm", _main, ["plan", *map(str, arguments)])


@pytest.fixture
def planned(capsys: pytest.CaptureFixture[str]) -> Any:
    def asked(*arguments: object) -> dict[str, Any]:
        plan("--json", "--model", *arguments)
        return json.loads(capsys.readouterr().out)

    return asked


def rows_of(found: dict[str, Any], gpu: str) -> dict[int, dict[str, Any]]:
    return {row["gpus"]: row for row in found["rows"] if row["gpu"] == gpu}


def test_a_guide_is_in_the_bytes_and_the_arithmetic_of_its_teacher(
    teacher: Path, planned: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever D the two have, which changes no size."""
    alone = planned(teacher, "--batch", 8)
    guided = planned(teacher, "--batch", 8, "--guide", "digits")
    assert guided["guide"] == "digits" and "guide" not in alone
    assert guided["parts"]["teacher"] == 2 * alone["parts"]["teacher"]
    assert guided["parts"]["weights"] == alone["parts"]["weights"] and guided["flops"] > alone["flops"]
    plan("--model", teacher, "--guide", "digits", "--gpus", 1, "--kimg", 1, "--batch", 8, "--backward", "joint")
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("guided by "))
    assert f"{parameter_count(presets.get('digits')):,} parameters" in line


def test_latents_are_planned_with_the_autoencoder_that_shows_them(
    tmp_path: Path, planned: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    small = replace(presets.get("digits"), img_channels=4, img_resolution=16)
    save_model(build_network(small), tmp_path / "latent")
    found = planned(tmp_path / "latent", "--batch", 4, "--gpu-memory", 24)
    beside = found["autoencoder"]
    assert beside["side"] == 128 and beside["weights"] == 334_615_452
    assert beside["peak"] == beside["weights"] + max(found["peak"], found["state"] + beside["decoding"])
    plan("--model", tmp_path / "latent", "--batch", 4, "--gpu-memory", 0.5)
    assert ", TOO SMALL" in capsys.readouterr().out.splitlines()[-1]
    plan("--model", tmp_path / "latent", "--batch", 4, "--fits", 0.5, 24)
    assert "too much for GPUs of 0.5 GB" in capsys.readouterr().out.splitlines()[-1]
    assert "autoencoder" not in planned("digits", "--batch", 4)


def test_a_discriminator_is_in_the_passes_of_both_objectives_that_have_one(planned: Any) -> None:
    """Three of the encoder for each update of the student; two more where nothing passes back through the student."""
    given = ("--batch", 8, "--student-updates", 1)
    share = encoder_flops(presets.get("digits")) / forward_flops(presets.get("digits"))
    for objective, passes, more in (("ipfm", 11, 3), ("dmd", 9, 5)):
        alone, told = (
            planned("digits", "--objective", objective, *given, *of)["flops"]
            for of in ((), ("--discriminator", "encoder"))
        )
        assert told / alone == pytest.approx(1 + more * share / passes)


def test_factors_on_the_teachers_weights_are_planned(planned: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Whichever network has them, of a preset and in place of a recipe's own; weights are counted once."""
    network = presets.get("digits")
    n, factors = parameter_count(network), factor_count(network, Lora(4, 4.0))
    given = ("--batch", 8, "--precision", "fp32", "--backward", "joint")
    for networks, trained in (("student", factors + n), ("generator", n + factors), ("both", 2 * factors)):
        asked = [f"--{name}" for name in ("student", "generator") if networks in (name, "both")]
        lora = [word for option in asked for word in (option, "lora")]
        found = planned("digits", *given, *lora, "--rank", 4)
        assert found["low_rank"] == {"networks": [option[2:] for option in asked], "rank": 4}
        assert found["parts"]["weights"] == 4 * trained and found["parts"]["teacher"] == 4 * n
    assert "low_rank" not in planned("digits", *given)
    assert planned("digits", "--objective", "pid", *given, "--generator", "lora")["low_rank"]["rank"] == 8
    plan("--model", "digits_ipfm", "--ranks", 1, *given, "--student", "lora", "--rank", 3)
    assert capsys.readouterr().out.startswith("student of rank 3 on the teacher's weights\nteacher ")
    plan("--model", "digits", *given, "--fits", 8, "--generator", "lora")
    assert capsys.readouterr().out.splitlines()[-1] == "generator of rank 8 on the teacher's weights"


@pytest.mark.quick
def test_hours_are_the_arithmetic_of_the_published_run(planned: Any) -> None:
    """CIFAR-10's run written out: 30 million images in steps of 256, 11 forward passes of each, at 30 % of 989.4e12."""
    found = planned("cifar_ipfm", "--gpus", 8)
    with torch.no_grad(), torch.device("meta"):
        net = build_network(presets.get("cifar10-ncsnpp")).eval()
        forward = counted_flops(lambda: net(torch.empty(1, 3, 32, 32), torch.empty(1)))
    steps = math.ceil(30_000_000 / 256)
    assert (found["steps"], found["batch"], found["precision"]) == (117_188, 256, "bf16") and steps == 117_188
    assert "printed in the method's paper: a budget of 30k generator samples" in found["length"]
    assert found["forward_flops"] == forward and forward == pytest.approx(42.67e9, rel=1e-3)
    seconds = 11 * forward * 256 * steps / (0.3 * 989.4e12)
    assert seconds / 3600 == pytest.approx(13.2, rel=0.01)
    row = rows_of(found, "H100")[8]
    assert row["gpu_seconds"] == pytest.approx(seconds) and row["wall_seconds"] == pytest.approx(seconds / 8)
    assert (row["micro_batch"], row["accumulation"], row["backward"], row["stage"]) == (32, 1, "joint", 1)
    # An A100 has 312e12; evaluations are passes alone: 35 of the teacher and one of the generator.
    assert rows_of(found, "A100")[8]["gpu_seconds"] == pytest.approx(seconds * 989.4 / 312)
    assert found["evaluation"]["flops"] == forward * 10_000 * (35 + 1)
    # bf16 weights of two networks, fp32 masters, second moments of both and one average, an eighth each.
    n = parameter_count(presets.get("cifar10-ncsnpp"))
    eighth = 4 * -(-n // 8)
    parts = row["parts"]
    assert (parts["weights"], parts["moments"], parts["ema"]) == (2 * 2 * n + 2 * eighth, 2 * eighth, eighth)
    assert sum(parts.values()) == row["peak"] <= row["budget"] == gpu_budget(80e9)
    assert row["sent"] == 2 * (2 * 2 * n) * 7 // 8
    # Checkpoints of two networks, one of which is averaged; of three such files, one is in the making.
    assert found["disk"]["checkpoint"] == row["host"]["checkpoint"] == 4 * n * (2 + 3)
    assert found["disk"]["total"] == 3 * 4 * n * 5 + 3 * 4 * n
    assert row["host"]["start"] == 8 * 2 * 4 * n and row["host"]["total"] == row["host"]["start"]


def test_the_table_fits_a_terminal_and_has_a_row_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    plan("--model", "digits_ipfm", "--price", "A100=1.5", "h100=2")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    head = next(number for number, line in enumerate(lines) if line.startswith("GPUs "))
    columns = lines[head].split()
    parts = ["teach", "train", "grads", "Adam", "EMA", "act.", "peak", "host", "disk"]
    assert columns[0] == "GPUs" and columns[-9:] == parts
    rows = lines[head + 1 : lines.index("", head)]
    assert [row[:12].strip() for row in rows] == [f"{count} x {kind}" for kind in KINDS for count in (1, 2, 4, 8)]
    legend = "\n".join(lines[head:])
    for column in {"micro x acc", "GPU h", "hours", "price", "form", "ZeRO", *parts}:
        assert re.search(rf"\b{re.escape(column)}:|; {column}$", legend, re.M), column
    text = "\n".join(lines)
    assert "its teacher is trained before, 900 steps of 128 images" in text
    assert "evaluation: 2,000 images of the teacher, 35 passes an image, and 6 times the generator, 1" in text
    assert "300 steps, 19.2 kimg, of digits_ipfm.py" in text and "30% of" not in text
    assert "e-0" not in text and rows[0].split()[9:12] == ["<0.001", "<0.001", "-"]
    # The H100 has 3.17 times the speed for 1.33 times the price.
    assert any(
        line.startswith("cheapest at these prices: 1 x H100, <0.001 for <0.001 hours; more GPUs") for line in lines
    )


def test_prices_share_and_length_are_those_that_were_given(planned: Any) -> None:
    usual = rows_of(planned("digits_ipfm", "--gpus", 1, 2), "H100")
    given = ("digits_ipfm", "--gpus", 1, 2, "--share", 0.15, "--max-steps", 30, "--batch", 128)
    found = planned(*given, "--price", "3", "A100=1.5", "rtx4090=0")
    assert (found["steps"], found["kimg"], found["length"]) == (30, 3.84, "given")
    row = rows_of(found, "H100")
    # A tenth of the steps, of twice the images, at half the speed.
    assert row[1]["gpu_seconds"] == pytest.approx(0.4 * usual[1]["gpu_seconds"])
    assert row[2]["wall_seconds"] == pytest.approx(row[1]["wall_seconds"] / 2)
    for name, price in (("H100", 3), ("H200", 3), ("A100", 1.5), ("RTX 4090", 0)):
        cost = rows_of(found, name)[1]
        assert cost["price"] == pytest.approx(price * cost["gpu_seconds"] / 3600)
    assert usual[1]["price"] is None
    assert found["cheapest"] == {"gpu": "RTX 4090", "gpus": 1}
    assert planned("digits_ipfm", "--gpus", 1)["cheapest"] is None


def test_what_cannot_be_says_why(
    planned: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = planned("digits_ipfm", "--gpus", 1, 3)
    three = rows_of(found, "A100")[3]
    assert not three["fits"] and "batch must be divisible by the number of processes, got 64 and 3" in three["reason"]
    plan("--model", "digits_ipfm", "--gpus", 3)
    assert "3 x A100     not possible: batch must be divisible" in capsys.readouterr().out
    small = replace(GPUS[0], memory=0.001)
    monkeypatch.setattr(rent, "GPUS", (small, *GPUS[1:]))
    form = ("--micro-batch", 64, "--backward", "joint", "--activation-checkpointing", "off")
    tight = planned("digits_ipfm", "--gpus", 1, *form)["rows"]
    assert [row["fits"] for row in tight] == [False, True, True, True]
    assert "a process may use 0.8 MiB, but needs at least" in tight[0]["reason"]


def test_offload_moves_the_optimiser_to_the_host(planned: Any) -> None:
    rows = rows_of(planned("digits_ipfm", "--gpus", 2, 8, 16), "A100")
    there = rows[2]
    # A node has up to eight.
    assert rows[16]["host"]["start"] == rows[8]["host"]["start"] == 4 * there["host"]["start"]
    here = rows_of(planned("digits_ipfm", "--gpus", 2, "--offload", "optimizer", "--zero", 2), "A100")[2]
    n = parameter_count(presets.get("digits"))
    assert here["parts"]["moments"] == here["parts"]["ema"] == 0 and there["host"]["offloaded"] == 0
    # Masters, three values of the optimisers, two buffers of gradients of each network.
    assert here["host"]["offloaded"] >= 2 * (4 * (2 + 3) * (n // 2))
    assert here["host"]["total"] == here["host"]["offloaded"] + max(here["host"]["start"], here["host"]["checkpoint"])


def test_precision_and_peak_go_together(planned: Any) -> None:
    flops = {gpu.name: gpu for gpu in GPUS}["A100"]
    for given, peak, of in (((), flops.half, "bf16"), (("--zero", "0"), flops.tf32, "TF32")):
        found = planned("digits_ipfm", "--gpus", 1, *given)
        assert (found["peak_flops"]["A100"], found["peak_of"]) == (peak * 1e12, of)
    # SiD computes without TF32.
    sid = settings.of_recipe(cifar_sid.RECIPE, {"precision": "fp32", "batch": 8})
    facts = rent.RentTable("sid", replace(sid, network=presets.get("digits")), (1,), 0.3, {}).facts()
    assert (facts["peak_flops"]["A100"], facts["peak_of"]) == (flops.single * 1e12, "fp32")


def test_a_dry_run_has_the_hours_and_the_disk_of_the_plan(planned: Any) -> None:
    steps = 3_000_000  # less takes less than the thousandth of an hour that is shown
    found = planned("digits_ipfm", "--gpus", 1, "--max-steps", steps)
    base = replace(digits_ipfm.RECIPE.base.distillation(), max_steps=steps)
    run = Run(base, trained_config(presets.get("digits"), base.dropout))
    (line,) = dry_run._on_gpus(run, 0)
    hours = dict(re.findall(r"(RTX 4090|A100|H100|H200) ([\d.e-]+)", line.partition("(an assumption)")[2]))
    assert {name: float(value) for name, value in hours.items()} == {
        row["gpu"]: float(f"{row['gpu_seconds'] / 3600:.3g}") for row in found["rows"]
    }
    assert "at 30% of the bf16 peak" in line and run.disk.total == found["disk"]["total"]


@pytest.mark.parametrize(
    "name",
    ["digits_ipfm", "digits_ipfm.py", "recipes/digits_ipfm.py", digits_ipfm.__file__],
    ids=["name", "file", "path", "whole path"],
)
def test_a_recipe_is_known_by_its_name_and_its_file(name: str, planned: Any) -> None:
    found = planned(name, "--gpus", 1)
    base = digits_ipfm.RECIPE.base
    assert (found["recipe"], found["batch"], found["steps"]) == ("digits_ipfm.py", base.batch, base.max_steps)


def test_a_recipe_of_ones_own_is_planned_from_its_file(tmp_path: Path, planned: Any) -> None:
    (tmp_path / "lengths.py").write_text("STEPS = 77\n")
    (tmp_path / "mine.py").write_text(
        "from dataclasses import replace\n"
        "from lengths import STEPS\n"
        "from ipfm.recipes.digits_ipfm import RECIPE as digits\n"
        "RECIPE = digits.with_options('mine.py', 'Mine.', replace(digits.base, max_steps=STEPS))\n"
    )
    found = planned(tmp_path / "mine.py", "--gpus", 1)
    assert (found["recipe"], found["steps"]) == ("mine.py", 77)


def test_a_recipe_beside_one_gpus_memory_is_planned_as_a_preset_is(planned: Any) -> None:
    found = planned("digits_ipfm", "--gpu-memory", 24)
    assert (found["batch"], found["precision"], found["objective"]) == (64, "bf16", "ipfm") and "rows" not in found
    assert planned("digits_ipfm", "--ranks", 2)["micro_batch"] == 32
    training = planned("digits_ipfm", "--teacher-training", "--fits", 24)
    assert (training["batch"], training["objective"]) == (128, None) and training["gpus"][0]["fits"]


def test_a_teacher_is_planned_with_the_recipe_for_its_size(teacher: Path, planned: Any) -> None:
    found = planned(teacher, "--gpus", 1)
    assert found["recipe"] == "distill_ipfm.py" and found["model"] == str(teacher) and found["steps"]
    assert planned(teacher, "--gpus", 1, "--objective", "pid")["recipe"] == "distill_pid.py"
    other = planned(teacher, "--recipe", "digits_pid", "--gpus", 1)
    assert (other["recipe"], other["objective"], other["steps"]) == ("digits_pid.py", "pid", 600)
    assert other["forward_flops"] == found["forward_flops"] and other["teacher_training"] is None
    assert planned(teacher, "--teacher-training", "--gpus", 1)["recipe"] == "train_teacher.py"


@pytest.mark.parametrize(
    ("preset", "objective", "recipe"),
    [("cifar10-ncsnpp", "ipfm", "cifar_ipfm.py"), ("ddpmpp", "pid", "cifar_pid.py"),
     ("adm", "ipfm", "imagenet64_ipfm.py"), ("ffhq64-ddpmpp", "ipfm", "ffhq_ipfm.py"),
     ("cifar10-ncsnpp-cond", "ipfm", "distill_ipfm.py"), ("digits", "pid", "distill_pid.py")],
)  # fmt: skip
def test_a_preset_has_the_settings_of_the_recipe_of_its_data(preset: str, objective: str, recipe: str) -> None:
    found = settings.fitting_recipe(preset, objective)
    assert found is not None and found.file == recipe


def test_a_recipe_for_several_sizes_is_planned_for_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The network is that of --size, the settings those of the recipe for it, and a preset finds the recipe."""
    found: list[Any] = []
    monkeypatch.setattr(Command, "_rent", lambda self, planned, write: found.append(planned))
    plan("--model", "imagenet512_edm2_sid", "--size", "xxl", "--gpus", 8)
    plan("--model", "imagenet64_edm2_ipfm")
    assert [one.network for one in found] == [presets.get("edm2-img512-xxl"), presets.get("edm2-img64-s")]
    assert [(one.config.kimg, one.config.dropout, one.config.logvar) for one in found] == [
        (100_000, 0.1, True), (30_000, 0, True),
    ]  # fmt: skip
    assert found[0].source == (
        "of imagenet512_edm2_sid.py, of SiD, arXiv 2404.04057, and of its script: 200 Mimg, 100 for size XXL"
    )
    for preset in ("edm2-img512-xl", "edm2-img64-s"):
        recipe = settings.fitting_recipe(preset, "ipfm")
        assert (
            recipe is not None
            and recipe.file == f"{preset[5:].rpartition('-')[0].replace('img', 'imagenet')}_edm2_ipfm.py"
        )
    for model, message, *more in (
        ("imagenet64_edm2_sid", "size xxl: ImageNet-64 has no such teacher; possible: s, m, l, xl"),
        ("cifar_ipfm", "size xxl was given, but cifar_ipfm.py is for one network: leave it out"),
        ("digits_ipfm", "size xxl was given, but digits_ipfm.py has none: leave it out"),
        ("digits", "size was given without a recipe that has sizes, such as imagenet512_edm2_ipfm", "--ranks", 2),
    ):
        with pytest.raises(SystemExit):
            plan("--model", model, "--size", "xxl", *more)
        assert capsys.readouterr().err == f"ipfm: error: {message}\n"


def test_a_length_is_of_no_paper_where_the_method_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe of one's own may have the lengths of those of this project."""
    recipe = distill_ipfm.RECIPE
    assert "a budget of 30k generator samples" in settings.of_recipe(recipe, {}).source
    monkeypatch.setattr(type(recipe.base), "kind", "mine")
    assert settings.of_recipe(recipe, {}).source == "of distill_ipfm.py"


def test_every_recipe_can_be_planned_and_says_where_its_length_is_from() -> None:
    recipes = list(project_recipes())
    assert len(recipes) > 15
    for recipe in recipes:
        found = settings.of_recipe(recipe, {})
        assert found.config.total_steps >= 1 and found.source.startswith(f"of {recipe.file}"), recipe.file
        assert rent.as_trained(found.config, found.network).img_resolution >= 8


def test_a_preset_of_a_teacher_too() -> None:
    names = {"ncsnpp": "cifar_teacher.py", "ffhq64-ncsnpp": "ffhq_teacher.py", "digits": "train_teacher.py"}
    found = {preset: settings.fitting_training(preset) for preset in names}
    assert {preset: recipe and recipe.file for preset, recipe in found.items()} == names


def test_the_training_of_a_teacher_has_three_passes_of_an_image(planned: Any) -> None:
    found = planned("digits_ipfm", "--teacher-training", "--gpus", 1)
    training = digits_ipfm.RECIPE.training
    flops = 3 * found["forward_flops"] * training.batch
    assert (found["steps"], found["step_flops"], found["objective"]) == (900, flops, None)
    distilled = planned("digits_ipfm", "--gpus", 1)
    assert distilled["teacher_training"]["flops"] == flops * 900
    parts = rows_of(found, "H200")[1]["parts"]
    n = parameter_count(presets.get("digits"))
    # bf16 and fp32 weights, two moments, an average.
    assert (parts["teacher"], parts["weights"], parts["moments"], parts["ema"]) == (0, 6 * n, 8 * n, 4 * n)


def test_a_recipe_of_a_teacher_has_its_published_length() -> None:
    found = settings.of_recipe(cifar_teacher.RECIPE, {})
    assert found.config.total_steps == math.ceil(200e6 / 512) and "of EDM, arXiv 2206.00364" in found.source
    assert found.network.img_resolution == 32 and found.network.augment_dim
    shorter = settings.of_recipe(cifar_teacher.RECIPE, {"kimg": 512.0})
    assert (shorter.config.total_steps, shorter.source) == (1000, "given")


def test_settings_that_were_given_choose_the_variant_of_a_recipe() -> None:
    """The authors' script has two student updates without regularisation at one D; alpha is no option of the plan."""
    given = settings.of_recipe(cifar_ipfm.RECIPE, {"steps": 2, "batch": 512}).config
    assert (given.steps, given.student_updates, given.total_steps) == (2, 1, math.ceil(30e6 / 512))


def test_an_objective_without_recipes_has_no_published_length(
    monkeypatch: pytest.MonkeyPatch, planned: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(settings, "project_recipes", lambda: iter(()))
    found = planned("digits", "--gpus", 1)
    assert (found["length"], found["evaluation"], found["recipe"]) == (None, None, None)
    # 1000 thousand images.
    assert found["steps"] == math.ceil(1e6 / 256)
    plan("--model", "digits", "--gpus", 1)
    assert (
        "no length is published: hours are those of 1,000 kimg; give --kimg or --max-steps" in capsys.readouterr().out
    )
    assert planned("digits", "--gpus", 1, "--kimg", 2)["length"] == "given"


def test_a_narrower_generator_is_counted_by_its_width() -> None:
    base = digits_ipfm.RECIPE.base.distillation()
    narrow, wide = (Run(replace(base, width=width), presets.get("digits")) for width in (0.5, 1.0))
    assert wide.forwards == 11 and 8 < narrow.forwards < 9.5 and narrow.remark == ""
    assert narrow.evaluation_flops(100) < wide.evaluation_flops(100)


def test_a_narrower_generator_of_an_objective_that_says_passes_of_no_network_is_counted_as_wide_as_its_teacher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(InversePoissonFlowMatching, "passes")
    monkeypatch.setattr(InversePoissonFlowMatching, "forwards", lambda self, **_: 11)
    base = replace(digits_ipfm.RECIPE.base.distillation(), width=0.5)
    run = Run(base, presets.get("digits"))
    (line,) = dry_run._on_gpus(run, 0)
    assert line.endswith("; a network of another width is counted as wide as the teacher")
    planned = settings.Planned(base, presets.get("digits"))
    assert run.remark in rent.RentTable("x", planned, (1,), 0.3, {}).text()
    assert Run(replace(base, width=1.0), presets.get("digits")).remark == ""


def test_long_plans_say_how_far_they_are(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(rent, "PAUSE", 0.0)
    plan("--model", "digits_ipfm", "--gpus", 1, 2, "--json")
    out, err = capsys.readouterr()
    assert json.loads(out)["rows"] and "6/6" in err.splitlines()[-1] and err.startswith("plan: ")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("cifar-ipfm", "network preset 'cifar-ipfm' is unknown; possible: edm2-img512-SIZE (xs, "),
        ("cifar_ipf", "; or a recipe, such as cifar_ipfm"),
        ("digits_ipm.py", "there is no recipe digits_ipm.py; possible: afhqv2_ipfm, "),
        ("digits --recipe ddpmpp", "there is no recipe ddpmpp; possible: "),
        ("ablation_alpha", "ablation_alpha is an ablation, several runs: give the recipe of one, such as "),
        ("ablation_data", "ablation_data has no RECIPE"),
        ("digits --recipe cifar_ipfm", "the teacher makes images 1x8x8, CIFAR-10 is 3x32x32; distill_ipfm.py takes"),
        (
            "ncsnpp --recipe digits_ipfm",
            "the teacher makes images 3x32x32, the digits are 1x8x8; distill_ipfm.py takes",
        ),
        ("digits --recipe cifar_teacher", "CIFAR-10 is 3x32x32; train_teacher.py takes images of any size"),
        ("digits_ipfm --recipe cifar_ipfm", "model is a recipe, digits_ipfm, and recipe was given too"),
        ("digits_ipfm --objective pid", "objective pid was given, but digits_ipfm.py distils by ipfm: leave it out"),
        ("cifar_teacher --objective ipfm", "objective ipfm was given, but cifar_teacher.py trains a teacher"),
        ("digits_pid --student-updates 2", "the objective pid has no student-updates: leave it out"),
        ("digits_pid --discriminator encoder", "the objective pid has no discriminator: leave it out"),
        ("digits --teacher-training --steps 2", "the training of a teacher has no steps: leave it out"),
        ("digits_ipfm --lpips-side 32", "only the objective pid has lpips-side: leave it out"),
        ("cifar_teacher --backward joint", "cifar_teacher.py has no backward: leave it out"),
        ("cifar_ipfm --teacher-training", "cifar_ipfm.py trains no teacher; cifar_teacher.py, "),
        ("edm2-img512-s --guide cifar10-ncsnpp", "the guide must have the network's pixels a side, 64, got 32"),
        ("edm2-img512-s --vae x", "unknown option --vae; what it adds is said wherever the images are latents"),
        ("digits --guide digitz", "network preset 'digitz' is unknown; possible: "),
        ("cifar_teacher --guide digits", "the training of a teacher has no guide: leave it out"),
        ("digits --batch 0", "batch must be an integer >= 1, got 0"),
        ("digits_ipfm --batch 0", "batch must be an integer >= 1, got 0"),
        ("digits --gpus 0", "gpus must be at least 1, got 0"),
        ("digits --gpus 1 --share 0", "share must be in (0, 1], a share of a GPU's peak, got 0"),
        ("digits --share 35", "share must be in (0, 1], a share of a GPU's peak, got 35"),
        ("digits --price cheap", "price must be a number >= 0, or one of a GPU as in A100=1.5, got cheap"),
        ("digits --price V100=2", "price is of RTX 4090, A100, H100, H200, got V100=2"),
        ("digits --price A100=-2", "price must be a number >= 0, or one of a GPU as in A100=1.5, got A100=-2"),
        ("digits --gpus 2 --ranks 2", "ranks was given, but gpus is of the table of what to rent"),
        ("digits --kimg 5 --gpu-memory 24", "gpu-memory was given, but kimg is of the table of what to rent"),
        ("digits --kimg 5 --max-steps 3", "max-steps and kimg exclude each other"),
        ("digits --ranks 8 --batch 8 --precision bf16 --zero 0", "bf16 on 8 processes needs zero 1, 2 or 3"),
    ],
)
def test_what_cannot_be_planned_is_one_line(arguments: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        plan("--model", *arguments.split())
    out, err = capsys.readouterr()
    assert (stop.value.code == 2 and out == "" and line in err.replace("--", "")) or line in err
    assert len(err.strip().splitlines()) == 1


def test_a_recipe_file_that_fails_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.py").write_text("import not_there\n")
    (tmp_path / "none.py").write_text("A = 1\n")
    for name, line in (("bad.py", "bad.py, line 1: ModuleNotFoundError: No module named 'not_there'"),
                       ("none.py", "has no RECIPE")):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            plan("--model", tmp_path / name)
        assert stop.value.code == 2 and line in capsys.readouterr().err
