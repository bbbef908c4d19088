"""The microbenchmarks: their tables, the gate before every speed-up, the accounts of bytes, and the verdicts."""

import csv
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor

from ipfm.kernels.bench import cases, machine, main, measurement, micro, optimiser, plots, providers, report

CPU = torch.device("cpu")
IMAGES = (3, 3, 4, 4)
ONE = torch.ones(1)
EDM2 = {"mp_sum", "mp_silu", "mp_cat_silu", "pixel_norm_silu", "qkv_norm"}
OPS = {"perturb", "ipfm_loss", "denoising_loss", "group_norm_silu", "residual_sum", "row_normalise", "AdamEMA", *EDM2}
MACHINE = machine.Machine("Toaster 3000", "", "2.99", "3.99", 2)


def small_cases(device: torch.device = CPU) -> list[cases.Case]:
    """Every operation and mode, at sizes that the interpreter can do too."""
    return [
        *cases.perturb_cases(device, IMAGES, torch.float32, every_variant=True),
        *cases.loss_cases(device, IMAGES, torch.float32, raw=True),
        cases.group_norm_case(device, (2, 32, 2, 3), torch.float32, last=True, scaled=True),
        cases.group_norm_case(device, (1, 32, 2, 3), torch.bfloat16, last=False, scaled=False),
        cases.residual_case(device, (2, 8, 2, 3), torch.float32, last=True),
        *cases.edm2_cases(device, (1, 8, 2, 4), torch.float32),
        cases.row_normalise_case(device, (3, 5, 1, 2)),
        cases.adam_case(device, [(3, 5), (7,)], "2 tensors"),
    ]


def row(**changes: object) -> report.Row:
    """A right Triton result of 2^25 elements that meets every target of denoising_loss."""
    plain = report.Row(
        "denoising_loss",
        "",
        "2x3",
        "float32",
        1 << 25,
        "forward",
        "triton",
        8,
        100.0,
        1.0,
        1.0,
        1.0,
        90.0,
        0.9,
        correct=True,
        speedup=5.0,
        speedup_over_compile=1.0,
    )
    return replace(plain, **changes)


def without_compiling(monkeypatch: pytest.MonkeyPatch, *but: str) -> None:
    """Takes "compile" from the providers of all operations but these: some take ten seconds to compile."""
    for work in (providers.FunctionWorkload, optimiser.AdamWorkload):
        every = work.providers

        def some(self, every=every) -> list[str]:
            kernel = getattr(self, "kernel", None)
            kept = kernel is not None and kernel.__name__ in but
            return [p for p in every(self) if kept or p != providers.COMPILE]

        monkeypatch.setattr(work, "providers", some)


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    monkeypatch.setattr(micro, "cases", lambda device, quick: small_cases())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(measurement, "SECONDS", {True: 0.01})
    without_compiling(monkeypatch, "denoising_loss", "group_norm_silu")
    # Everything of a compilation but the C++ compiler's part.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    main(["--quick", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith(str(tmp_path / "micro.csv"))
    assert (tmp_path / "micro.md").read_text() in printed
    return tmp_path


def test_a_run_leaves_tables_and_plots(tables: Path) -> None:
    with (tables / "micro.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {r["op"] for r in rows} == OPS
    assert {r["torch"] for r in rows} == {torch.__version__}
    assert all(r["device"] and r["triton"] and r["threads"] for r in rows)
    assert {r["mode"] for r in rows if r["op"] == "group_norm_silu"} == {"forward", "backward", "both"}
    assert {r["mode"] for r in rows if r["variant"] == "D=128 c_in bf16"} == {"forward", "backward", "both"}
    assert {r["provider"] for r in rows if r["op"] == "AdamEMA"} == {"eager", "fused", "reference"}
    assert not any(r["provider"] == "triton" for r in rows), "the interpreter's times mean nothing"
    for r in rows:
        assert r["correct"] == "True", r
        assert 0 < float(r["us_20"]) <= float(r["us_50"]) <= float(r["us_80"])
        assert float(r["share_of_copy"]) > 0
        if r["provider"] == "eager":
            assert float(r["speedup"]) == 1.0
            assert float(r["moved_over_needed"]) >= 0.99
    variants = [(r["variant"], r["provider"]) for r in rows if r["op"] == "denoising_loss"]
    assert variants == [(v, p) for v in ("", "raw bf16", "raw bf16 real") for p in ("eager", "compile")]

    text = (tables / "micro.md").read_text()
    assert text.startswith(f"# Kernel microbenchmarks on {rows[0]['device']}\n")
    assert [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")][-1] == "Targets"
    assert "smoke test" in text
    assert sum(line.startswith("| ") for line in text.splitlines()) == len(rows) + len(OPS)
    for op in OPS:
        assert (tables / f"micro-{op}.png").stat().st_size > 5000


def test_kernels_pass_the_gate(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU in the interpreter, which the benchmark itself leaves out."""
    monkeypatch.setattr(providers, "kernels_run_on", lambda device: True)
    monkeypatch.setattr(optimiser, "kernels_run_on", lambda device: True)
    for case in small_cases(device):
        assert case.workload.providers()[-1] == "triton"
        runs = case.workload.prepare("triton")
        assert list(runs) == list(case.bytes)
        for mode, run in runs.items():
            assert measurement.error_over_allowed(run.result(), case.workload.truth(mode)) <= 1, (case.op, mode)


def test_no_speedup_of_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in small_cases() if c.op == "denoising_loss")
    prepare = providers.FunctionWorkload.prepare

    def prepared(self, provider):
        if provider == "broken":
            return {"forward": providers.Run(lambda: 1 / 0, lambda: 1 / 0)}
        right = prepare(self, "eager")["forward"].call

        def wrong():
            result = right()
            result.grad[0, 0, 0, 0] += 1
            return result

        call = wrong if provider == "wrong" else right
        return {"forward": providers.Run(call, call)}

    monkeypatch.setattr(providers.FunctionWorkload, "prepare", prepared)
    monkeypatch.setattr(providers.FunctionWorkload, "providers", lambda self: ["eager", "wrong", "broken", "other"])
    good, bad, broken, other = micro.measure(case, CPU, quick=True)
    assert (good.correct, good.speedup, other.correct) == (True, 1.0, True)
    assert other.speedup is not None
    assert (bad.correct, bad.speedup, bad.us_50 is None) == (False, None, False)
    assert "times what is allowed" in bad.note
    assert (broken.correct, broken.us_50) == (False, None)
    assert "ZeroDivisionError" in broken.note

    monkeypatch.setattr(providers.FunctionWorkload, "providers", lambda self: ["wrong", "other"])
    monkeypatch.setattr(micro, "EAGER", "wrong")
    assert [r.speedup for r in micro.measure(case, CPU, quick=True)] == [None, None], "the baseline must be right too"


def test_a_wrong_gradient_is_seen() -> None:
    case = cases.group_norm_case(CPU, (2, 32, 4, 4), torch.float32, last=True, scaled=True)
    work = case.workload
    assert isinstance(work, providers.FunctionWorkload)

    class Detached(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, shift):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient, torch.zeros_like(gradient[:, :, :1, :1])

    def forgets_the_shift(x, *rest, shift: Tensor, **options):
        return Detached.apply(cases.plain_group_norm_silu(x, *rest, shift=shift.detach(), **options), shift)

    wrong = replace(work, plain={**work.plain, "wrong": forgets_the_shift}).prepare("wrong")
    errors = {m: measurement.error_over_allowed(run.result(), work.truth(m)) for m, run in wrong.items()}
    assert errors["forward"] <= 1
    assert errors["backward"] > 1
    assert errors["both"] > 1


def test_a_memory_format_does_not_change_the_upstream_gradient() -> None:
    """Else a provider that answers in another format than the reference would be called wrong."""
    case = cases.group_norm_case(CPU, (2, 32, 4, 4), torch.float32, last=True, scaled=False)
    work = case.workload
    assert isinstance(work, providers.FunctionWorkload)

    def contiguous(*inputs, **options):
        return cases.plain_group_norm_silu(*inputs, **options).contiguous()

    runs = replace(work, plain={**work.plain, "contiguous": contiguous}).prepare("contiguous")
    assert all(measurement.error_over_allowed(run.result(), work.truth(mode)) <= 1 for mode, run in runs.items())


@pytest.mark.parametrize(("name", "averages"), [("LR", 1), ("BETA2", 1), ("EMA_DECAY", 1), ("EMA_DECAY", 3)])
def test_a_wrong_optimiser_is_seen(name: str, averages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    work = optimiser.AdamWorkload([(40,), (3, 5)], CPU, averages)
    truth = work.truth("step")
    right = [work.prepare(p)["step"].result() for p in ("eager", "fused", "reference")]
    assert all(measurement.error_over_allowed(result, truth) <= 1 for result in right)
    monkeypatch.setattr(optimiser, name, getattr(optimiser, name) * 0.99)
    wrong = [work.prepare(p)["step"].result() for p in ("eager", "fused", "reference")]
    assert all(measurement.error_over_allowed(result, truth) > 1 for result in wrong)


def test_a_missing_compiler_is_a_line_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in small_cases() if c.op == "denoising_loss")
    with inductor.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}):
        _, compiled = micro.measure(case, CPU, quick=True)
    assert (compiled.provider, compiled.us_50, compiled.speedup) == ("compile", None, None)
    assert "C++ compiler" in compiled.note


def test_error_is_relative_to_the_last_place_of_the_results_dtype() -> None:
    truth = torch.ones(4, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        eps = torch.finfo(dtype).eps
        got = torch.tensor([1, 1, 1 + 8 * eps, 1]).to(dtype)
        assert measurement.error_units(got, truth) == {dtype: pytest.approx(4)}  # of 1, plus a mean square of 1
        assert measurement.error_over_allowed(got, truth) == pytest.approx(4 / measurement.ALLOWED_UNITS[dtype])
    for worthless in (float("nan"), float("inf")):
        assert measurement.error_over_allowed(torch.full((4,), worthless), truth) == float("inf")
    yes, no = torch.tensor([True, False]), torch.tensor([True, True])
    assert measurement.error_over_allowed(yes, yes) == 0
    assert measurement.error_over_allowed(yes, no) == float("inf")
    with pytest.raises(ValueError):
        measurement.error_over_allowed([truth, truth], truth)


@pytest.mark.parametrize(
    ("run", "moved", "peak"),
    [
        pytest.param(lambda x, y: x + y, 3, 1, id="a sum reads two and writes one"),
        pytest.param(lambda x, y: (x + y) * y, 6, 2, id="a temporary is alive beside the result"),
        pytest.param(lambda x, y: x.add_(y), 3, 0, id="in place"),
        pytest.param(lambda x, y: x.copy_(y), 2, 0, id="a copy does not read its target"),
        pytest.param(lambda x, y: x.zero_(), 1, 0, id="nor does a fill"),
        pytest.param(lambda x, y: torch.add(x, 1, out=y), 2, 0, id="nor an out argument"),
        pytest.param(lambda x, y: torch._foreach_add_([x, y], [y, x]), 6, 0, id="a list in place"),
        pytest.param(lambda x, y: x.view(10, 10).t(), 0, 0, id="a view moves nothing"),
        pytest.param(lambda x, y: torch.empty_like(x), 0, 1, id="nor does an allocation"),
        pytest.param(lambda x, y: x + ONE.expand(100), 2.01, 1, id="an expanded tensor has few bytes"),
    ],
)
def test_bytes_of_operations(run, moved: float, peak: int) -> None:
    x, y = torch.ones(100), torch.ones(100)
    watch = measurement.watched(partial(run, x, y))
    assert (watch.moved, watch.peak) == (pytest.approx(400 * moved), 400 * peak)


def test_speedups_compare_like_with_like() -> None:
    rows = [
        row(provider=provider, mode=mode, us_50=time, speedup=None, speedup_over_compile=None)
        for mode, times in (("forward", (8.0, 4.0, 2.0)), ("backward", (90.0, 60.0, 30.0)))
        for provider, time in zip(("eager", "compile", "triton"), times, strict=True)
    ]
    found = [(r.mode, r.provider, r.speedup, r.speedup_over_compile) for r in micro._compared(rows)]
    assert found == [
        ("forward", "eager", 1, 0.5), ("forward", "compile", 2, 1), ("forward", "triton", 4, 2),
        ("backward", "eager", 1, 2 / 3), ("backward", "compile", 1.5, 1), ("backward", "triton", 3, 2),
    ]  # fmt: skip


def test_targets_are_judged_by_the_worst_case() -> None:
    def verdicts(*rows: report.Row) -> list[str]:
        return [t.verdict for t in report.targets(rows)]

    assert verdicts(row()) == ["met", "met", "met"]
    assert verdicts(row(), row(share_of_copy=0.84)) == ["**missed**", "met", "met"]
    assert verdicts(row(), row(share_of_copy=0.1, elements=1000)) == ["met", "met", "met"]
    assert verdicts(row(), row(speedup=3.9)) == ["met", "**missed**", "met"]
    assert verdicts(row(), row(speedup_over_compile=0.99)) == ["met", "met", "**missed**"]
    assert verdicts(row(), row(speedup_over_compile=None)) == ["met", "met", "met"]
    assert verdicts(row(), row(correct=False)) == ["**missed**"] * 3
    assert verdicts(row(elements=1000)) == ["not measured", "met", "met"]
    assert verdicts(row(provider="eager")) == ["not measured"] * 3
    worst = next(report.targets([row(shape="a"), row(shape="b", share_of_copy=0.5), row(shape="c")]))
    assert (worst.worst, worst.cases) == ("50% (b float32 forward)", "2 of 3")


def test_a_gpus_report_names_it_and_judges(tmp_path: Path) -> None:
    gpu = replace(MACHINE, driver="570.1")
    text = report.markdown([row(), row(provider="eager")], gpu, gpu=True, quick=False)
    assert text.startswith("# Kernel microbenchmarks on Toaster 3000\n\ntorch 2.99, triton 3.99, driver 570.1.\n")
    assert "| denoising_loss | ≥ 85% of copy at ≥ 2^25 elements | met | 90% (2x3 float32 forward) | 1 of 1 |" in text
    assert "smoke test" not in text
    assert [p.name for p in plots.write_plots(tmp_path, [row()], gpu, gpu=True)] == ["micro-denoising_loss.png"]


def test_a_gpu_gets_the_shapes_that_the_targets_speak_of(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, int]] = []

    def note(op: str, shapes: list[tuple[int, ...]]) -> list[None]:
        made.append((op, sum(map(math.prod, shapes))))
        return [None]

    monkeypatch.setattr(cases, "perturb_cases", lambda device, shape, dtype, **_: note("perturb", [shape]))
    monkeypatch.setattr(cases, "loss_cases", lambda device, shape, dtype, **_: note("losses", [shape]))
    monkeypatch.setattr(cases, "group_norm_case", lambda device, shape, dtype, **_: note("group norm", [shape]))
    monkeypatch.setattr(cases, "residual_case", lambda device, shape, dtype, **_: note("residual", [shape]))
    monkeypatch.setattr(cases, "edm2_cases", lambda device, shape, dtype: note("EDM2", [shape]))
    monkeypatch.setattr(cases, "row_normalise_case", lambda device, shape: note("rows", [shape])[0])
    monkeypatch.setattr(cases, "adam_case", lambda device, shapes, name, **_: note(f"adam {name}", list(shapes)))
    for device, quick, large in (("cuda", False, True), ("cpu", False, False), ("cpu", True, False)):
        made.clear()
        count = len(list(cases.cases(torch.device(device), quick)))
        assert count == len(made)
        assert {op for op, size in made if size >= report.LARGE} == (
            {
                "perturb",
                "EDM2",
                "losses",
                "group norm",
                "residual",
                "rows",
                "adam one flat tensor",
                "adam 500 tensors",
                "adam 500 tensors, 3 averages",
            }
            if large
            else set()
        )
        assert {op.split()[0] for op, _ in made} == {"perturb", "losses", "group", "adam"} | (
            set() if quick else {"residual", "EDM2", "rows"}
        )
        assert count == 4 or not quick


def test_unsteady_times_are_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    without_compiling(monkeypatch)
    case = next(c for c in small_cases() if c.op == "denoising_loss")
    monkeypatch.setattr(micro, "quantiles", lambda *_: (10.0, 12.0, 14.9))
    monkeypatch.setattr(micro, "copy_quantiles", lambda *_: (10.0, 20.0, 15.1))
    (eager,) = micro.measure(case, CPU, quick=True)
    assert (eager.note, eager.us_50) == ("unsteady copy", 12.0)
    assert eager.copy_gb_per_s == pytest.approx(eager.needed_bytes / 20e3)
    assert eager.share_of_copy == pytest.approx(20 / 12)
    monkeypatch.setattr(micro, "quantiles", lambda *_: (10.0, 12.0, 15.1))
    (eager,) = micro.measure(case, CPU, quick=True)
    assert eager.note == "unsteady time, unsteady copy"


def test_the_cpu_has_its_readable_name(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Some  CPU @ 2.00GHz\nprocessor\t: 1\nmodel name\t: Other\n")
    assert machine.cpu_name(info) == "Some CPU @ 2.00GHz"
    info.write_text("processor\t: 0\n")
    assert machine.cpu_name(info)
    assert machine.cpu_name(tmp_path / "missing")
