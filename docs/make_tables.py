"""Writes tables of the pages: the recipes' settings, published figures, and how GPUs are filled, by the project's plan.

    python docs/make_tables.py                       # all, in place: some minutes on one core
    python docs/make_tables.py settings published    # these alone
    python docs/make_tables.py --check               # exit code 1 and the lines that differ; nothing is written

A table stands between two comments, `<!-- table: NAME -->` and `<!-- end of table -->`.
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ipfm.engine.commands.doctor.expected import MEMORY_TB, OPERATIONS, step_expectation
from ipfm.engine.commands.plan.rent import as_trained
from ipfm.engine.commands.plan.settings import of_recipe
from ipfm.engine.config import Precision, RunConfig
from ipfm.engine.experiments import DistilRecipe
from ipfm.engine.experiments.defaults_by_size import ROWS, Facts, by_size, default_arch
from ipfm.engine.experiments.gpu_costs import Run
from ipfm.engine.experiments.origins import SOURCES
from ipfm.engine.experiments.recipe import Recipe
from ipfm.engine.memory import Layout, choose_layout, gpu_budget, plan_memory
from ipfm.engine.memory.arithmetic import GPUS as KINDS_OF_GPUS
from ipfm.engine.memory.arithmetic import flops_in_words, gpu_seconds
from ipfm.engine.memory.state import parameter_count
from ipfm.engine.objectives import OBJECTIVES
from ipfm.engine.objectives.base import Distillation
from ipfm.engine.objectives.initial_networks import trained_config
from ipfm.engine.objectives.published import PAPER_RESULTS, PaperSetting, paper_result
from ipfm.engine.random_streams import OWN_STREAMS, STREAM_LIMIT, ObjectiveStream, Stream
from ipfm.engine.runtime.wording import three_digits
from ipfm.models import presets
from ipfm.recipes import (
    afhqv2_ipfm,
    afhqv2_sid,
    afhqv2_sida,
    cifar_cmt,
    cifar_ect,
    cifar_ipfm,
    cifar_pid,
    cifar_realuid,
    cifar_sid,
    cifar_sida,
    cifar_teacher,
    digits_ipfm,
    digits_pid,
    distill_cmt,
    distill_ect,
    distill_ipfm,
    distill_pid,
    distill_sid,
    fashion_ipfm,
    ffhq_ipfm,
    ffhq_sid,
    ffhq_sida,
    ffhq_teacher,
    imagenet64_edm2_ipfm,
    imagenet64_edm2_sid,
    imagenet64_ipfm,
    imagenet64_pid,
    imagenet64_sid,
    imagenet64_sida,
    imagenet512_edm2_ipfm,
    imagenet512_edm2_sid,
    shapes_ipfm,
    train_teacher,
)

FOLDER = Path(__file__).parent
RENTED = tuple(
    module.RECIPE
    for module in (cifar_ipfm, ffhq_ipfm, afhqv2_ipfm, imagenet64_ipfm, cifar_sid, ffhq_sid, afhqv2_sid, imagenet64_sid,
                   imagenet512_edm2_ipfm, imagenet64_edm2_ipfm, imagenet512_edm2_sid, imagenet64_edm2_sid,
                   cifar_realuid, cifar_sida, ffhq_sida, afhqv2_sida, imagenet64_sida, cifar_pid, imagenet64_pid,
                   cifar_cmt, cifar_ect, cifar_teacher, ffhq_teacher)
)  # fmt: skip
GPUS = (24, 48, 80, 141)
PROCESSES = (1, 8)


@dataclass(frozen=True)
class Case:
    """A recipe's settings on the network of a preset."""

    preset: str
    recipe: str
    config: Distillation

    def choice(self, precision: Precision, processes: int, gpu: float, **form: Any) -> Layout | None:
        """The layout on so many GPUs of `gpu` GB; None where nothing fits. `form`: what is not left open."""
        config = replace(self.config, precision=precision, **form)
        network = trained_config(presets.get(self.preset), config.dropout)
        try:
            return choose_layout(config, network, ranks=processes, budget=gpu_budget(gpu * 1e9))
        except ValueError:
            return None


CASES = (
    Case("cifar10-ncsnpp", "cifar_ipfm.py", cifar_ipfm.RECIPE.base.distillation()),
    Case("cifar10-ddpmpp", "cifar_sid.py", cifar_sid.RECIPE.base.distillation()),
    Case("ffhq64-ddpmpp", "ffhq_ipfm.py", ffhq_ipfm.RECIPE.base.distillation()),
    Case("ffhq64-ncsnpp", "ffhq_ipfm.py", ffhq_ipfm.RECIPE.base.distillation()),
    Case("imagenet64-adm", "imagenet64_ipfm.py", imagenet64_ipfm.RECIPE.base.distillation()),
    Case("digits", "digits_ipfm.py", digits_ipfm.RECIPE.base.distillation()),
)


def _of_edm2(size: str) -> Case:
    """The recipe of ImageNet-512 with a size of EDM2's networks, and the dropout that is published for it."""
    preset, recipe = f"edm2-img512-{size}", imagenet512_edm2_ipfm.RECIPE
    config = of_recipe(recipe, {}, network=presets.get(preset)).config
    assert isinstance(config, Distillation)
    return Case(preset, recipe.file, config)


EDM2 = tuple(map(_of_edm2, ("xs", "s", "m", "l", "xl", "xxl")))
FORMS = {
    "joint": {"backward": "joint", "activation_checkpointing": "off"},
    "phased": {"backward": "phased", "activation_checkpointing": "off"},
    "joint, checkpointed": {"backward": "joint", "activation_checkpointing": "on"},
    "phased, checkpointed": {"backward": "phased", "activation_checkpointing": "on"},
}


def layouts(precision: Precision, cases: Sequence[Case] = CASES) -> list[str]:
    """A row for each case and number of processes: what a run chooses on each GPU."""
    rows = [_row(["preset", "batch", "GPUs", *(f"{gpu} GB" for gpu in GPUS)]), _row(["---"] * (3 + len(GPUS)))]
    for case in cases:
        for processes in PROCESSES:
            cells = [layout(case, precision, processes, gpu) for gpu in GPUS]
            rows.append(_row([f"`{case.preset}`", str(case.config.batch), str(processes), *cells]))
    return rows


def largest(precision: Precision = "bf16", gpu: int = 24, cases: Sequence[Case] = CASES) -> list[str]:
    """A row for each case: the largest micro-batch of each form of the step on one GPU."""
    rows = [_row(["preset", *FORMS]), _row(["---"] * (1 + len(FORMS)))]
    for case in cases:
        found = [case.choice(precision, 1, gpu, **form) for form in FORMS.values()]
        cells = ["–" if one is None else f"{one.plan.micro_batch}, {_gigabytes(one)} GB" for one in found]
        rows.append(_row([f"`{case.preset}`", *cells]))
    return rows


def edm2_on_one(gpus: Sequence[int] = GPUS) -> list[str]:
    """A row for each size: bytes of the state, and what a run chooses on one GPU."""
    rows = [_row(["size", "parameters", "state, GB", *(f"{gpu} GB" for gpu in gpus)])]
    rows.append(_row(["---"] * (3 + len(gpus))))
    for case in EDM2:
        parameters = parameter_count(presets.get(case.preset))
        state = state_in_bf16(case) / 1e9
        cells = [layout(case, "bf16", 1, gpu) for gpu in gpus]
        rows.append(
            _row([case.preset.rpartition("-")[2].upper(), f"{parameters / 1e6:,.0f} M", f"{state:.1f}", *cells])
        )
    return rows


def edm2_on_eight(gpus: Sequence[int] = GPUS) -> list[str]:
    """A row for each size and for stages 2 and 3: what a run chooses on eight GPUs."""
    rows = [_row(["size", "ZeRO", *(f"{gpu} GB" for gpu in gpus)]), _row(["---"] * (2 + len(gpus)))]
    for case in EDM2:
        for zero in ("2", "3"):
            cells = [layout(case, "bf16", 8, gpu, zero=int(zero)) for gpu in gpus]
            rows.append(_row([case.preset.rpartition("-")[2].upper(), zero, *cells]))
    return rows


def state_in_bf16(case: Case) -> int:
    """Bytes of the state of three networks on one GPU in bf16, gradients of one of them included."""
    network = trained_config(presets.get(case.preset), case.config.dropout)
    plan = plan_memory(network, micro_batch=1, precision="bf16", backward="joint", config=case.config)
    return plan.parts.permanent + plan.parts.training


def gpu_hours(recipes: Sequence[Recipe[Any]] = RENTED) -> list[str]:
    """GPU hours of the published length of each recipe, a row each."""
    names = [gpu.name for gpu in KINDS_OF_GPUS]
    rows = [_row(["recipe", "kimg", "operations of a step", *names]), _row(["---"] * (3 + len(names)))]
    for recipe in recipes:
        planned = of_recipe(recipe, {"precision": "bf16"})
        run = Run(planned.config, as_trained(planned.config, planned.network))
        flops, steps = run.step_flops(), run.config.total_steps
        hours = [three_digits(s / 3600) for s in gpu_seconds(flops * steps, "bf16").values()]
        kimg = f"{steps * run.config.batch / 1000:,.0f}"
        rows.append(_row([f"`{recipe.file}`", kimg, flops_in_words(flops), *hours]))
    return rows


def settings() -> list[str]:
    """The recipes that distil with a student, a row each."""
    names = ("recipe", "batch", "lr", "α", "β₁ of S, G", "ε", "dropout", "augment", "EMA half-life, kimg", "length")
    rows = [_row(names), _row(["---"] * len(names))]
    for module in (cifar_ipfm, ffhq_ipfm, afhqv2_ipfm, imagenet64_ipfm, cifar_sid, ffhq_sid, afhqv2_sid,
                   imagenet64_sid, imagenet512_edm2_ipfm, imagenet512_edm2_sid, imagenet64_edm2_ipfm,
                   imagenet64_edm2_sid, cifar_realuid, cifar_sida, ffhq_sida, afhqv2_sida, imagenet64_sida,
                   digits_ipfm, shapes_ipfm, fashion_ipfm):  # fmt: skip
        base = module.RECIPE.base
        betas = f"{base.student_beta1:g}, {base.generator_beta1:g}"
        numbers = (base.batch, base.lr, base.alpha, betas, base.eps, base.dropout, base.augment, base.ema_kimg)
        rows.append(_row([f"`{module.RECIPE.file}`", *map(_shown, numbers), _length(base)]))
    return rows


def sources() -> list[str]:
    """Where the settings of each recipe of a published data set come from, a row each."""
    rows = [_row(["recipe", "paper", "script", "SiD", "EDM2", "this project"]), _row(["---"] * 6)]
    for module in (cifar_ipfm, ffhq_ipfm, afhqv2_ipfm, imagenet64_ipfm, cifar_sid, ffhq_sid, afhqv2_sid,
                   imagenet64_sid, imagenet512_edm2_ipfm, imagenet512_edm2_sid, imagenet64_edm2_ipfm,
                   imagenet64_edm2_sid, cifar_realuid, cifar_sida, ffhq_sida, afhqv2_sida, imagenet64_sida,
                   cifar_pid, imagenet64_pid, cifar_cmt, cifar_ect):  # fmt: skip
        cells = []
        for source in [source for source in SOURCES if source != "EDM"]:
            found = {name: o.remark for name, o in module.RECIPE.origins.items() if o.source == source}
            cells.append(", ".join(f"`{name}`" + (f" ({remark})" if remark else "") for name, remark in found.items()))
        rows.append(_row([f"`{module.RECIPE.file}`", *(cell or "–" for cell in cells)]))
    return rows


def pid_settings() -> list[str]:
    """The recipes of physics informed distillation, a row each."""
    names = ("recipe", "batch", "lr", "levels", "difference", "distance", "side before VGG", "gradient norm",
             "EMA half-life, kimg", "length")  # fmt: skip
    rows = [_row(names), _row(["---"] * len(names))]
    for module in (cifar_pid, imagenet64_pid, digits_pid):
        base = module.RECIPE.base
        if isinstance(module.RECIPE, DistilRecipe):
            base = module.RECIPE.varied(vars(base), presets.get(module.RECIPE.preset))
        sides = tuple("–" if value is None else value for value in (base.lpips_side, base.clip_grad))
        values = (base.batch, base.lr, base.points, base.difference, base.distance, *sides, base.ema_kimg)
        rows.append(_row([f"`{module.RECIPE.file}`", *map(_shown, values), _length(base)]))
    return rows


def cmt_settings() -> list[str]:
    """The recipes of consistency mid-training, a row each."""
    names = (
        "recipe",
        "batch",
        "points",
        "order",
        "levels",
        "distance",
        "lr",
        "dropout",
        "EMA half-life, kimg",
        "length",
    )
    rows = [_row(names), _row(["---"] * len(names))]
    for module in (cifar_cmt,):
        base = module.RECIPE.base
        levels = ", ".join(f"{level:g}" for level in base.levels)
        shown = map(_shown, (base.batch, base.points, base.order))
        rest = map(_shown, (base.dropout, base.ema_kimg))
        rate = f"{_shown(base.lr)}, linear to {base.lr * base.lr_end:g}"
        rows.append(_row([f"`{module.RECIPE.file}`", *shown, levels, base.distance, rate, *rest, _length(base)]))
    return rows


def ect_settings() -> list[str]:
    """The recipe of consistency tuning: from the teacher, and as the second stage of a mid-training."""
    names = ("recipe", "batch", "q", "stage, kimg", "lr", "dropout", "EMA half-life, kimg", "length")
    rows = [_row(names), _row(["---"] * len(names))]
    recipe = cifar_ect.RECIPE
    first = recipe.base
    second = recipe.varied({"init": Path("RUN")}, presets.get(recipe.preset, D=recipe.D))
    for how, base in ((f"`{recipe.file}`", first), (f"`{recipe.file} --init RUN`", second)):
        rate = _shown(base.lr) + f", linear to {base.lr * base.lr_end:g}" * (base.lr_schedule == "linear")
        shown = map(_shown, (base.batch, base.q, base.q_kimg))
        rows.append(_row([how, *shown, rate, *map(_shown, (base.dropout, base.ema_kimg)), _length(base)]))
    return rows


def teacher_settings() -> list[str]:
    """The recipes that train a teacher, a row each."""
    names = ("recipe", "preset", "D", "batch", "lr", "lr ramp, kimg", "dropout", "augment", "length")
    rows = [_row(names), _row(["---"] * len(names))]
    for module in (cifar_teacher, ffhq_teacher):
        recipe, base = module.RECIPE, module.RECIPE.base
        values = (recipe.D, base.batch, base.lr, base.lr_rampup_kimg, base.dropout, base.augment)
        preset = f"`{recipe.presets[base.arch]}`"
        rows.append(_row([f"`{recipe.file}`", preset, *map(_shown, values), _length(base)]))
    return rows


def sizes_of_teachers() -> list[str]:
    """The rule of sizes for teachers, a row of it each."""
    names = ("side, pixels", "settings", "network", "batch", "lr", "dropout", "augment", "EMA half-life, kimg",
             "length")  # fmt: skip
    rows = [_row(names), _row(["---"] * len(names))]
    recipe = train_teacher.RECIPE
    for row in ROWS.values():
        side = row.side or {"small": 32, "to-28": 28}.get(row.name, 128)
        arch = "adm" if row.name == "imagenet" else default_arch(side)
        start = presets.get(recipe.presets[arch])
        network = by_size(start, Facts((3, side, side), None, 0, start.family, row.name != "small"))
        mults = "-".join(map(str, network.channel_mult))
        what = f"{network.family}, {network.model_channels} × {mults}, {network.num_blocks}"
        base = replace(recipe.base, **recipe.settings_of(row, side))
        values = (base.batch, base.lr, base.dropout, base.augment, base.ema_kimg)
        whose = "this project's" if row.side is None else f"EDM's, {row.whose.partition(chr(39))[0]}"
        cells = (row.when.replace(",000", " 000"), whose, f"{what} (at {side})", *map(_shown, values), _length(base))
        rows.append(_row(cells))
    return rows


def sizes_of_distillations() -> list[str]:
    """The rule of sizes for distillations: the recipe whose settings a row takes, or its own."""
    modules = (distill_ipfm, distill_sid, distill_pid, distill_cmt, distill_ect)
    names = ("side, pixels", *(f"`{module.RECIPE.file}`" for module in modules))
    rows = [_row(names), _row(["---"] * len(names))]
    for row in ROWS.values():
        cells = []
        for module in modules:
            recipe = module.RECIPE.rows.get(row.name)
            own = module.RECIPE.table.get(row.name, {})
            words = [f"{name} {_shown(own[name])}" for name in ("batch", "lr", "points") if name in own]
            edm2 = module.RECIPE.edm2.items() if row.name == "imagenet" else ()
            named = [f"`{recipe.file}`" if recipe else "", *(f"EDM2, {what}: `{other.file}`" for what, other in edm2)]
            cells.append("; ".join(named) if recipe else ", ".join([*words, f"{_shown(own['kimg'])} kimg"]))
        rows.append(_row([row.when.replace(",000", " 000"), *cells]))
    return rows


def published() -> list[str]:
    """The figures of the method's paper, as the recipes print them."""
    steps = (1, 2, 4)
    names = ("images", "D", "α", "teacher (NFE)", *(f"K = {K}" for K in steps))
    rows = [_row(names), _row(["---"] * len(names))]
    titles = {recipe.dataset: recipe.title for recipe in (cifar_ipfm.RECIPE, ffhq_ipfm.RECIPE)}
    for dataset, D, alpha in dict.fromkeys((s.dataset, s.D, s.alpha) for s in PAPER_RESULTS):
        found = [PAPER_RESULTS.get(PaperSetting(dataset, D, alpha, K)) for K in steps]
        first = next(one for one in found if one is not None)
        cells = [titles[dataset], _shown(D), _shown(alpha), f"{first.teacher_fid:.2f} ({first.teacher_nfe})"]
        rows.append(_row([*cells, *("–" if one is None else f"{one.fid:.2f}" for one in found)]))
    return rows


def edm2_sizes() -> list[str]:
    """The sizes of EDM2's teachers, a row each: dropout and length by recipe."""
    modules = (imagenet512_edm2_sid, imagenet64_edm2_sid)
    names = ("images", "`--size`", "preset", "channels", "the teacher's file", "dropout", "length of `*_sid`")
    rows = [_row(names), _row(["---"] * len(names))]
    for recipe in (module.RECIPE for module in modules):
        for name, size in recipe.sizes.items():
            network = presets.get(size.preset)
            base = recipe.varied({}, network)
            cells = (recipe.title, name, f"`{size.preset}`", network.model_channels, f"`{size.teacher}`", base.dropout)
            rows.append(_row([*map(_shown, cells), _length(base)]))
    return rows


def sid_published() -> list[str]:
    """Those of SiD, at D = inf and K = 1."""
    rows = [_row(["images", "α", "FID", "recipe"]), _row(["---"] * 4)]
    for module in (cifar_sid, ffhq_sid, afhqv2_sid, imagenet64_sid):
        recipe = module.RECIPE
        for dataset, words in ((recipe.dataset, ""), (f"{recipe.dataset}-cond", ", conditional")):
            found = paper_result(dataset, math.inf, recipe.base.alpha, 1)
            if found is not None:
                fid = f"{found.fid:.3f}"
                rows.append(_row([f"{recipe.title}{words}", _shown(recipe.base.alpha), fid, f"`{recipe.file}`"]))
    return rows


def pid_published() -> list[str]:
    """Those of physics informed distillation, at D = inf."""
    rows = [_row(["images", "difference", "distance", "FID"]), _row(["---"] * 4)]
    for module, ways in ((cifar_pid, (("first", "lpips"), ("central", "lpips"), ("first", "l2"))),
                         (imagenet64_pid, (("first", "lpips"),))):  # fmt: skip
        recipe = module.RECIPE
        network = presets.get(recipe.preset)
        dataset = f"{recipe.dataset}-cond" if network.label_dim else recipe.dataset
        for difference, distance in ways:
            config = replace(recipe.base.distillation(), difference=difference, distance=distance)
            (result,) = config.published(dataset).values()
            rows.append(_row([recipe.title, difference, distance, f"{result.fid:.2f}"]))
    return rows


def random_streams() -> list[str]:
    """The numbers in use, by whom, and those that are free."""
    tuple(OBJECTIVES)  # all of them are imported
    owners = [kind for kind in ObjectiveStream.__subclasses__() if kind.__module__.startswith("ipfm.")]
    rows = [_row(["numbers", "whose"]), _row(["---"] * 2)]
    for kind in (Stream, *sorted(owners, key=min)):
        rows.append(_row([_in_words([*map(int, kind)]), f"in use: `{kind.__module__}.{kind.__qualname__}`"]))
    free = 1 + max(int(one) for kind in (Stream, *owners) for one in kind)
    rows.append(_row([f"{free} to {OWN_STREAMS - 1}", "free, for this project"]))
    rows.append(_row([f"{OWN_STREAMS} to {STREAM_LIMIT - 1}", "**yours**; `ipfm new` takes ten of them by the name"]))
    return rows


def _in_words(numbers: list[int]) -> str:
    """Increasing numbers, such as "0 to 21, 26"."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in zip(starts, ends, strict=True))


def expectation(batches: Sequence[int] = (256, 32)) -> list[str]:
    """A row a batch: what a step of CIFAR-10's NCSN++ should take on an H100, by arithmetic."""
    network = replace(presets.get("cifar10-ncsnpp", D=2048.0), dropout=0.0)
    header = [
        "images on the GPU", "TFLOP", "GB", "ms of arithmetic", "ms of memory", "**ms on the GPU**", "of the peak",
        "operators", "ms on the host", "GiB planned",
    ]  # fmt: skip
    rows = [_row(header), _row(["---"] * len(header))]
    for batch in batches:
        e = step_expectation(network, batch)
        rows.append(
            _row(
                [str(batch), f"{e.tflop:.1f}", f"{e.gigabytes:.0f}", f"{e.matrix_ms:.0f}", f"{e.memory_ms:.0f}",
                 f"**{e.ms:.0f}**", f"{e.share_of_peak:.0%}", f"{e.operators}", f"{e.host_ms:.0f}",
                 f"{e.planned / 2**30:.1f}"]
            )
        )  # fmt: skip
    return rows


def expected_operations() -> list[str]:
    """A row an operation: the bytes that must move, and the time of that on an H100."""
    rows = [_row(["operation", "elements", "bytes an element", "MB", "µs"]), _row(["---"] * 5)]
    for name, elements, each in OPERATIONS:
        moved = elements * each
        rows.append(_row([name, f"{elements:,}", str(each), f"{moved / 1e6:.0f}", f"{1e-6 * moved / MEMORY_TB:.0f}"]))
    return rows


# Page -> the tables on it.
PAGES: Mapping[str, Mapping[str, Callable[[], list[str]]]] = {
    "recipes.md": {
        "settings": settings,
        "sizes of EDM2": edm2_sizes,
        "sources": sources,
        "settings of physics informed distillation": pid_settings,
        "settings of consistency mid-training": cmt_settings,
        "settings of consistency tuning": ect_settings,
        "settings of teachers": teacher_settings,
        "sizes of teachers": sizes_of_teachers,
        "sizes of distillations": sizes_of_distillations,
        "published": published,
        "published of SiD": sid_published,
        "published of physics informed distillation": pid_published,
    },
    "own-objective.md": {"random streams": random_streams},
    "gpu.md": {"a step on an H100": expectation, "operations on an H100": expected_operations},
    "memory-and-speed.md": {
        "layouts in bf16": lambda: layouts("bf16"),
        "layouts in fp32": lambda: layouts("fp32"),
        "largest micro-batch": largest,
        "EDM2 on one GPU": edm2_on_one,
        "EDM2 on 8 GPUs": edm2_on_eight,
        "GPU hours": gpu_hours,
    },
}


def table(page: str, name: str) -> list[str]:
    """The lines of a table as the text `page` has them. ValueError: it has no such table."""
    return _place(page, name)[0].split("\n")


def _place(page: str, name: str) -> tuple[str, int, int]:
    found = re.search(rf"<!-- table: {re.escape(name)} -->\n\n(.*?)\n\n<!-- end of table -->", page, re.DOTALL)
    if found is None:
        raise ValueError(f"the page has no table {name!r}")
    return found[1], found.start(1), found.end(1)


def layout(case: Case, precision: Precision, processes: int, gpu: float, **form: Any) -> str:
    """A cell of `layouts`: micro-batch x accumulation, form, stage, predicted peak. `form`: what is not left open."""
    choice = case.choice(precision, processes, gpu, **form)
    if choice is None:
        return "–"
    plan = choice.plan
    again = ", checkpointed" if plan.activation_checkpointing else ""
    return (
        f"{plan.micro_batch} × {choice.accumulation}, {plan.backward}{again}, ZeRO {plan.parts.stage}, "
        f"{_gigabytes(choice)} GB"
    )


def _gigabytes(choice: Layout) -> str:
    return f"{choice.plan.peak / 1e9:.3g}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |" if cells[0] != "---" else "|" + "|".join(cells) + "|"


def _length(config: RunConfig) -> str:
    return f"{config.kimg:,.9g} kimg".replace(",", " ") if config.max_steps is None else f"{config.max_steps} steps"


def _shown(value: object) -> str:
    if isinstance(value, float):
        if 0 < value < 0.01:
            return f"{value:.0e}".replace("e-0", "e-")
        return "∞" if math.isinf(value) else f"{value:.0f}" if value >= 1000 else f"{value:g}"
    return str(value)


def main() -> None:
    """Rewrite the tables asked for, or compare them."""
    names = [name for tables in PAGES.values() for name in tables]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="NAME", help=f"default: all of {', '.join(names)}")
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    given = parser.parse_args()
    if unknown := sorted({*given.tables} - {*names}):
        parser.error(f"there is no table {', '.join(unknown)}; possible: {', '.join(names)}")
    differences: list[str] = []
    for page, tables in PAGES.items():
        # First what takes minutes: the page may be edited meanwhile.
        made = {name: make() for name, make in tables.items() if name in given.tables or not given.tables}
        path = FOLDER / page
        before = text = path.read_text(encoding="utf-8")
        for name, rows in made.items():
            _, start, end = _place(text, name)
            text = text[:start] + "\n".join(rows) + text[end:]
        if given.check:
            differences += difflib.unified_diff(before.splitlines(), text.splitlines(), page, page, lineterm="", n=0)
        elif text != before:
            path.write_text(text, encoding="utf-8")
    if differences:
        sys.exit("\n".join(differences))


if __name__ == "__main__":
    main()
