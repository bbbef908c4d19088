"""Run folder as a person and a machine see it: logs that survive a kill, pictures, tables, published figures."""

import io
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ipfm.engine.data.image_grid import PADDING_GREY, image_grid, save_grid
from ipfm.engine.evaluation.results import (
    EvaluationHistory,
    EvaluationRow,
    StepLog,
    atomic_write,
    plot_convergence,
    results_table,
    write_results,
)
from ipfm.engine.objectives.published import PAPER_RESULTS, SID_RESULTS, paper_result
from ipfm.engine.training.monitor import Monitor


def monitor(folder, **kwargs) -> Monitor:
    return Monitor(folder, **{"title": "run", "total_steps": 100, "batch_size": 8, "tensorboard": False, **kwargs})


def lines(path) -> list[dict]:
    def refuse(name):
        raise ValueError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def events(folder) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


# -- metrics.jsonl ---------------------------------------------------------------------------------------------------


def test_lines_start_with_the_step_and_reach_the_disk_with_flush(tmp_path):
    with monitor(tmp_path) as m:
        m.record(0, {"loss": 1.5, "gain": 2.0})
        assert not (tmp_path / "metrics.jsonl").exists()
        m.record(1, {"gain": 2, "loss": 1.25})
        m.flush()
        assert (tmp_path / "metrics.jsonl").read_text() == (
            '{"step": 0, "gain": 2.0, "loss": 1.5}\n{"step": 1, "gain": 2.0, "loss": 1.25}\n'
        )
        m.record(2, {"loss": 1.0})
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [0, 1, 2]  # close() flushes


def test_non_finite_values_are_valid_json_and_counted(tmp_path):
    with monitor(tmp_path) as m:
        m.record(0, {"a": math.nan, "b": -math.inf, "c": 1.0})
        m.record(1, {"a": 0.0})
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 0, "a": None, "b": None, "c": 1.0, "non_finite": 2},
        {"step": 1, "a": 0.0},
    ]


@pytest.mark.parametrize("tail", ["", '{"step": 6, "lo', '{"step": 6, "loss": 0.5}', '{"st\x00\x00', "12"])
def test_resume_drops_what_comes_again_and_a_cut_line(tmp_path, recwarn, tail):
    with monitor(tmp_path) as m:
        for step in range(6):
            m.record(step, {"loss": step / 2})
    path = tmp_path / "metrics.jsonl"
    before = path.read_text()
    path.write_text(before + tail)
    with monitor(tmp_path, first_step=4) as m:
        assert path.read_text() == "".join(before.splitlines(keepends=True)[:4])
        m.record(4, {"loss": -1.0})
    assert [(line["step"], line["loss"]) for line in lines(path)] == [(0, 0.0), (1, 0.5), (2, 1.0), (3, 1.5), (4, -1.0)]
    assert not list(recwarn) and [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    monitor(tmp_path, first_step=0).close()
    assert path.read_text() == ""


def test_kill_while_writing_loses_at_most_the_last_line(tmp_path):
    """A real SIGKILL, with half of a line already in the file."""
    script = (
        "import os, signal, sys\n"
        "from ipfm.engine.runtime.files import StepLog\n"
        "log = StepLog(sys.argv[1], 0)\n"
        "for step in range(5): log.append(step, {'x': 1.0})\n"
        "log.flush()\n"
        "log.append(5, {'x': 1.0})\n"
        "with open(sys.argv[1], 'a') as f: f.write('{\"step\": 5, '); f.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / "log.jsonl"
    assert subprocess.run([sys.executable, "-c", script, str(path)]).returncode == -9
    assert path.read_text().endswith('{"step": 5, ')
    log = StepLog(path, keep_below=5)
    log.append(5, {"x": 2.0})
    log.flush()
    assert lines(path) == [{"step": s, "x": 1.0} for s in range(5)] + [{"step": 5, "x": 2.0}]


def test_damage_in_the_middle_is_left_out_with_a_warning(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0}\n\x00\x00garbage\n{"nothing": 1}\n{"step": 1}\n')
    with pytest.warns(UserWarning, match="2 unreadable lines"):
        StepLog(path, keep_below=9)
    assert lines(path) == [{"step": 0}, {"step": 1}]


def test_a_log_opened_without_rewrite_does_not_glue_to_a_cut_line(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0}\n{"step"')
    log = StepLog(path, keep_below=None)
    log.append(1, {"x": 1})
    log.flush()
    assert path.read_text() == '{"step": 0}\n{"step"\n{"step": 1, "x": 1}\n'


def test_step_is_not_a_name_for_a_value(tmp_path):
    with monitor(tmp_path) as m, pytest.raises(ValueError, match="'step'"):
        m.record(0, {"step": 1.0})


def test_atomic_write_keeps_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "deep" / "file"
    with atomic_write(path) as file:
        file.write(b"old")
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write(b"new")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]
    with open(path, "rb") as reader:  # who has the old file open keeps it: nothing is written into it
        with atomic_write(path) as file:
            file.write(b"new")
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new"


# -- monitor ---------------------------------------------------------------------------------------------------------


def test_disabled_monitor_leaves_no_trace(tmp_path, capsys):
    with monitor(tmp_path / "run", enabled=False, tensorboard=True) as m:
        m.record(0, {"loss": 1.0})
        m.scalar(0, "x", 1.0)
        m.image(0, torch.zeros(1, 1, 2, 2))
        m.advance(99, {"loss": 1.0})
        m.message("hello")
        m.flush()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_tensorboard_continues_where_the_run_resumes(tmp_path):
    with monitor(tmp_path, tensorboard=True) as m:
        for step in range(6):
            m.record(step, {"loss": float(step)})
            m.scalar(step + 1, "frechet", step + 1.5)
        m.image(6, torch.zeros(4, 1, 8, 8))
    with monitor(tmp_path, tensorboard=True, first_step=3) as m:
        m.record(3, {"loss": -3.0})
        m.scalar(4, "frechet", 0.5)
    # The axis counts steps done: the line of step 2, and the distance after it, belong to the checkpoint of 3 steps.
    assert events(tmp_path) == {
        "loss": [(1, 0.0), (2, 1.0), (3, 2.0), (4, -3.0)],
        "frechet": [(1, 1.5), (2, 2.5), (3, 3.5), (4, 0.5)],
    }


def test_tensorboard_that_cannot_be_written_is_one_warning(tmp_path, capsys, monkeypatch):
    import torch.utils.tensorboard.writer

    def no_file(folder, *_):
        raise FileExistsError(17, "File exists", f"{folder}/tensorboard")

    monkeypatch.setattr(torch.utils.tensorboard.writer, "EventFileWriter", no_file)
    with monitor(tmp_path, tensorboard=True) as m:
        for step in range(3):
            m.record(step, {"loss": 1.0})
        m.image(3, torch.zeros(1, 1, 8, 8))
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert warnings == [f"warning: no TensorBoard in {tmp_path}: File exists"]
    assert len(lines(tmp_path / "metrics.jsonl")) == 3
    assert (tmp_path / "samples" / "step-0000003.png").exists()


def test_tensorboard_that_fails_in_its_own_way_is_one_warning(tmp_path, monkeypatch, capsys):
    """A package that does not go with another, or a thread of it that has died."""
    import torch.utils.tensorboard

    def broken(*_, **__):
        raise TypeError("Descriptors cannot be created directly")

    with monkeypatch.context() as patched:
        patched.setattr(torch.utils.tensorboard, "SummaryWriter", broken)
        monitor(tmp_path / "a", tensorboard=True).close()
    with monitor(tmp_path / "b", tensorboard=True) as m:
        monkeypatch.setattr(type(m._board), "add_scalar", broken)
        for step in range(3):
            m.record(step, {"loss": 1.0})
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert [("Descriptors" in line, "no TensorBoard in" in line) for line in warnings] == [(True, True)] * 2
    assert len(lines(tmp_path / "b" / "metrics.jsonl")) == 3


def test_a_picture_that_cannot_be_drawn_is_one_warning(tmp_path, capsys):
    with monitor(tmp_path) as m:
        m.image(1, torch.zeros(0, 1, 8, 8))
        m.image(2, torch.zeros(0, 1, 8, 8))
    assert capsys.readouterr().err.count(f"warning: {tmp_path / 'samples'} cannot be written: ") == 1


FULL_DISK = """
import resource, sys
import torch
from ipfm.engine.training.monitor import Monitor
monitor = Monitor(sys.argv[1], title="run", total_steps=100, batch_size=8)
monitor.record(0, {"loss": 1.0})
monitor.flush()
# SIGXFSZ is ignored by Python: a file that grows beyond this is an error, as on a full disk.
sys.dont_write_bytecode = True  # Python would not miss the rest of it.
resource.setrlimit(resource.RLIMIT_FSIZE, (150, resource.RLIM_INFINITY))
for step in range(1, 40):
    monitor.record(step, {"loss": 1.0})
    monitor.flush()
    if step % 10 == 0:
        monitor.image(step, torch.zeros(4, 1, 8, 8))
cut = open(f"{sys.argv[1]}/metrics.jsonl").read()
if sys.argv[2] == "again":
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
monitor.close()
print(cut, end="")
"""


@pytest.mark.parametrize("again", ["again", "never"])
def test_a_disk_that_fills_up_is_a_warning_for_each_file(tmp_path, again):
    """The training goes on; the lines wait, and are written whole once there is room."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path), again], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    cut = done.stdout.splitlines(keepends=True)
    assert 0 < len(cut) < 10 and all(line.endswith("}\n") for line in cut)
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning")]
    names = ["metrics.jsonl cannot be written: File too large", "samples cannot be written: File too large"]
    for name in names:
        assert sum(name in line for line in warnings) == 1, done.stderr
    written = (tmp_path / "metrics.jsonl").read_text()
    assert written.startswith(done.stdout)
    if again == "again":
        assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == list(range(40))
    else:
        assert written == done.stdout
        assert sum(f"{40 - len(cut)} lines of" in line and line.endswith("are lost") for line in warnings) == 1
    assert "Traceback" not in done.stderr, done.stderr


def test_progress_in_a_file_is_a_line_at_first_and_every_five_percent(tmp_path, capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("ipfm.engine.training.monitor.time.perf_counter", lambda: now[0])
    with monitor(tmp_path, total_steps=1000, first_step=500) as m:
        for step in range(500, 1000):
            now[0] += 0.125
            m.advance(step, {"loss": 0.25, "fake": math.nan})
    shown = capsys.readouterr().err
    assert "\r" not in shown
    shown = shown.splitlines()
    assert len(shown) == 11
    assert [re.search(r"(\d+)/1000", line)[1] for line in shown] == ["501", *map(str, range(550, 1001, 50))]
    assert "[00:06<00:56" in shown[1]  # 50 steps done, 450 to go
    for line in shown:
        assert line.startswith("run: ")
        for part in ("8.00 step/s", "64.00 img/s", "loss=0.25", "fake=nan", "ram "):
            assert part in line


def test_progress_on_a_terminal_is_a_bar(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with monitor(tmp_path, total_steps=10, first_step=5) as m:
        m.advance(7, {"loss": 0.25})
        m.message("a word in between")
        m.advance(9, {"loss": 0.125})
    shown = terminal.getvalue()
    assert "\r" in shown and "5/10" in shown and "10/10" in shown and "loss=0.125" in shown
    assert "a word in between\n" in shown


def test_images_per_second_leave_pauses_out(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("ipfm.engine.training.monitor.time.perf_counter", lambda: now[0])
    m = monitor(tmp_path, batch_size=8)
    now[0] += 2
    with m.paused():
        now[0] += 50
        m.image(0, torch.zeros(1, 1, 8, 8))  # pauses as well
        with m.paused():
            now[0] += 7
    m.advance(4, {})
    assert m.images_per_second == pytest.approx(5 * 8 / 2)
    now[0] += 4
    m.advance(5, {})
    assert m.images_per_second == pytest.approx(8 / 4)
    m.close()


@pytest.mark.parametrize("bad", [{"first_step": 101}, {"first_step": -1}, {"batch_size": 0}])
def test_monitor_refuses_impossible_runs(tmp_path, bad):
    with pytest.raises(ValueError, match="first_step"):
        monitor(tmp_path / "run", **bad)
    assert not (tmp_path / "run").exists()


# -- pictures --------------------------------------------------------------------------------------------------------


def test_grid_places_scales_and_rounds():
    images = torch.tensor([[-1.0, 1.0], [0.0, 0.5], [-2.0, 2.0]]).reshape(3, 1, 1, 2)
    grid = image_grid(images, columns=2, scale=2)
    assert grid.shape == (6, 10, 3) and grid.dtype == np.uint8
    assert (grid == grid[..., :1]).all()  # grey
    p = PADDING_GREY
    assert grid[0, :, 0].tolist() == [0, 0, 255, 255, p, p, 128, 128, 191, 191]
    assert (grid[2:4] == p).all() and (grid[:, 4:6] == p).all()
    assert grid[4, :, 0].tolist() == [0, 0, 255, 255, p, p, p, p, p, p]


def test_grid_keeps_colours_and_enlarges_small_images():
    colours = torch.tensor([[1.0, -1.0, 0.0], [math.nan, math.inf, -math.inf]]).reshape(2, 3, 1, 1).expand(2, 3, 8, 8)
    grid = image_grid(colours)
    assert grid.shape == (64, 136, 3)
    assert grid[10, 10].tolist() == [255, 0, 128] and grid[10, 100].tolist() == [0, 255, 0]
    assert image_grid(torch.zeros(1, 3, 128, 128)).shape == (128, 128, 3)
    # bfloat16 has 8 bits of mantissa: 0.5 is exact, 127.5 · 0.5 + 128 = 191.75 is not.
    assert image_grid(torch.full((1, 1, 4, 4), 0.5, dtype=torch.bfloat16))[0, 0, 0] == 191


def test_saved_grid_reads_back(tmp_path):
    images = torch.rand(6, 3, 8, 9, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with monitor(tmp_path) as m:
        m.image(42, images)
    with Image.open(tmp_path / "samples" / "step-0000042.png") as picture:
        assert picture.format == "PNG"
        assert (np.asarray(picture) == image_grid(images)).all()


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 0, 8, 8), (0, 1, 8, 8)])
def test_grid_refuses_what_is_no_picture(shape, tmp_path):
    with pytest.raises(ValueError, match=r"must have shape \(B, C, H, W\) with B > 0"):
        save_grid(torch.zeros(shape), tmp_path / "x.png")
    with pytest.raises(ValueError, match="columns and scale must be positive, got 0 and 8"):
        image_grid(torch.zeros(1, 1, 8, 8), columns=0)
    assert not list(tmp_path.iterdir())


# -- report ----------------------------------------------------------------------------------------------------------

ROWS = [
    EvaluationRow("generator", 1, 1, 3.31234, 50000, 12345.6, "FID 3.31"),
    EvaluationRow("generator", 2, 2, 0.0123456, 1797, 99.96),
    EvaluationRow("teacher", None, 35, math.nan, 50000, 0.5),
]


def test_table_is_aligned_and_shows_the_paper_only_where_there_is_one():
    assert results_table(ROWS) == (
        "network    steps  NFE  Fréchet distance  images  images/s  paper\n"
        "---------  -----  ---  ----------------  ------  --------  --------\n"
        "generator      1    1             3.312   50000     12346  FID 3.31\n"
        "generator      2    2           0.01235    1797     99.96  -\n"
        "teacher        -   35               nan   50000    0.5000  -\n"
    )
    assert "paper" not in results_table(ROWS[1:])


def test_written_results_read_back(tmp_path):
    write_results(tmp_path, ROWS)
    read = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert [EvaluationRow(**row) for row in read[:2]] == ROWS[:2]
    assert read[2]["frechet"] is None and read[2]["steps"] is None and read[2]["non_finite"] == 1
    assert (tmp_path / "results.txt").read_text() == results_table(ROWS)
    write_results(tmp_path, [])
    assert json.loads((tmp_path / "results.json").read_text()) == []


def test_history_keeps_the_evaluation_of_the_checkpoint_on_resume(tmp_path):
    history = EvaluationHistory(tmp_path, first_step=0)
    for step in (0, 100, 200, 300):
        history.add(step, step / 10, images=5)
    assert EvaluationHistory(tmp_path).points == [(0, 0.0), (100, 10.0), (200, 20.0), (300, 30.0)]
    resumed = EvaluationHistory(tmp_path, first_step=200)
    assert resumed.points == [(0, 0.0), (100, 10.0), (200, 20.0)]
    resumed.add(200, 19.0)
    resumed.add(300, math.nan)
    points = EvaluationHistory(tmp_path).points
    assert points[:3] == [(0, 0.0), (100, 10.0), (200, 19.0)]
    assert points[3][0] == 300 and math.isnan(points[3][1])
    assert lines(tmp_path / "evaluations.jsonl")[1] == {"step": 100, "frechet": 10.0, "images": 5}


@pytest.mark.parametrize(
    ("history", "teacher", "scale"),
    [
        ([(0, 50.0), (500, 6.0), (1000, 3.0)], 2.0, "log"),
        ([(0, 50.0), (500, 6.0)], None, "linear"),
        ([(0, 5.0), (500, math.inf), (1000, 3.0)], 0.2, "log"),
        ([(0, 5.0), (1000, 0.0)], 2.0, "linear"),
        ([(100, 3.0)], math.nan, "linear"),
    ],
)
def test_convergence_plot(tmp_path, monkeypatch, history, teacher, scale):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, _save=Figure.savefig, **k: (drawn.append(self), _save(self, *a, **k))
    )
    plot_convergence(history, teacher, tmp_path / "curve.png", "digits")
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.format == "PNG" and picture.size[0] >= 900
        assert len(np.unique(np.asarray(picture.convert("L")))) > 50
    (axes,) = drawn[0].axes
    assert axes.get_yscale() == scale
    assert axes.get_title() == "digits" and axes.get_ylabel() == "Fréchet distance" and axes.get_xlabel()
    finite = [point for point in history if math.isfinite(point[1])]
    assert list(zip(*axes.lines[0].get_data(), strict=True)) == finite
    with_teacher = teacher is not None and math.isfinite(teacher)
    assert len(axes.lines) == 1 + with_teacher
    if with_teacher:
        assert axes.lines[1].get_linestyle() == "--" and set(axes.lines[1].get_ydata()) == {teacher}


def test_nothing_to_plot_is_said(tmp_path):
    with pytest.raises(ValueError, match="no finite"):
        plot_convergence([(0, math.nan)], 1.0, tmp_path / "curve.png")
    assert not list(tmp_path.iterdir())


def test_published_figures():
    """Spot values, and the facts that hold for the whole table: more steps and α = 1 are better."""
    found = paper_result("CIFAR-10", 128, 1.0, 1)
    assert found is not None
    assert (found.fid, found.teacher_fid, found.teacher_nfe, found.source) == (3.31, 1.92, 35, "arXiv 2509.22454")
    assert str(found) == "FID 3.31 (arXiv 2509.22454)"
    assert paper_result("ffhq64", math.inf, 0.5, 2).fid == 2.04
    assert paper_result("cifar10", 2048.0, 0.5, 4).fid == 2.02
    assert len(PAPER_RESULTS) == 3 * 2 * 3 + 2 * 2 * 2
    for (dataset, D, alpha, steps), result in PAPER_RESULTS.items():
        fewer = PAPER_RESULTS.get((dataset, D, alpha, steps // 2))
        assert fewer is None or fewer.fid > result.fid
        assert alpha == 1.0 or PAPER_RESULTS[dataset, D, 1.0, steps].fid < result.fid
        assert result.teacher_nfe == (35 if dataset == "cifar10" else 79)
    for nothing in (
        ("cifar10", 128, 1.2, 1),
        ("cifar10", 64, 1.0, 1),
        ("ffhq64", 128, 1.0, 4),
        ("afhq64", 128, 1.0, 1),
    ):
        assert paper_result(*nothing) is None
    assert {s.dataset: r.fid for s, r in SID_RESULTS.items()} == {
        "cifar10": 1.923, "cifar10cond": 1.71, "ffhq64": 1.55, "afhqv264": 1.628, "imagenet64cond": 1.524
    }  # fmt: skip


def test_import_needs_no_plotting_libraries():
    blocked = ("matplotlib", "tensorboard", "PIL", "sklearn")
    script = f"import sys\nfor name in {blocked}: sys.modules[name] = None\n" + "".join(
        f"import ipfm.engine.{name}\n"
        for name in ("evaluation.metrics", "data.dataset", "training.monitor", "data.image_grid", "evaluation.results")
    )
    subprocess.run([sys.executable, "-c", script], check=True)
