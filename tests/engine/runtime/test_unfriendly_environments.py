"""Places that a program may find itself in: nothing to write to, odd names, full disks, links, folders of others."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import launch
import numpy as np
import prepared
import pytest
import soak
import torch
import torch.distributed as dist
import triton
from PIL import Image
from triton.runtime.cache import FileCacheManager

from ipfm.engine.commands.main import _main
from ipfm.engine.data.image_grid import save_pngs
from ipfm.engine.distributed.signals import catching_signals
from ipfm.engine.distributed.world import start_world
from ipfm.engine.evaluation.subject import SAMPLES_FILE
from ipfm.engine.objectives.ipfm import DistillConfig
from ipfm.engine.runtime.commandline import run_command
from ipfm.engine.runtime.launcher import stop_world
from ipfm.engine.training.monitor import Monitor
from ipfm.engine.training.run_folder import check_run_folder, open_run_folder
from ipfm.kernels import _cache
from ipfm.models import EDMPrecond, NetworkConfig, load_model, save_model
from ipfm.models.atomic_files import atomic_write

CHECKPOINT = Path(__file__).parents[2] / "fixtures" / "edm_ncsnpp_uncond.pkl"


@pytest.fixture
def network() -> EDMPrecond:
    torch.manual_seed(0)
    config = NetworkConfig(
        img_resolution=8, img_channels=1, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(),
        dropout=0.0, D=128.0,
    )  # fmt: skip
    return EDMPrecond(config)


def ipfm(*arguments: object) -> None:
    run_command("ipfm", _main, [str(argument) for argument in arguments])


def held_to_permissions() -> list[str]:
    """A prefix under which root, who may write everywhere, is held to permissions like everybody else."""
    if os.geteuid():
        return []
    prefix = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    if shutil.which("setpriv") is None or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("this root may write everywhere and cannot give that up")
    return prefix


def test_a_recipe_where_nothing_but_the_run_folder_can_be_written(tmp_path: Path) -> None:
    """Home and current folder are read-only; an ASCII stdout, odd names, a link as --out, no terminal.

    Stdin and stderr are closed; temporary files belong to another file system, where there is one.
    """
    place = tmp_path / "é 'quoted' \"twice\" $HOME\\n"
    teacher = soak.make_teacher(place / "teacher")
    home, real, out = tmp_path / "home", tmp_path / "elsewhere", place / "run ü"
    home.mkdir()
    real.mkdir()
    out.symlink_to(real)
    home.chmod(0o555)
    before = {path: path.read_bytes() for path in teacher.iterdir()}
    temporary = tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path)
    environment = {
        "PATH": "/usr/bin:/bin", "HOME": str(home), "OMP_NUM_THREADS": "1", "LC_ALL": "C",
        "PYTHONIOENCODING": "ascii", "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "1", "CUDA_VISIBLE_DEVICES": "",
        "TMPDIR": temporary.name,
    }  # fmt: skip
    try:
        with temporary, open(tmp_path / "log", "wb") as log:
            done = subprocess.run(
                [*held_to_permissions(), "sh", "-c", 'exec "$0" "$@" <&- 2>&-', sys.executable, soak.RECIPE,
                 *soak.settings(teacher, out, 2)], cwd=home, env=environment, stdout=log,
            )  # fmt: skip
    finally:
        home.chmod(0o755)
    shown = (tmp_path / "log").read_text("ascii")
    assert done.returncode == 0, shown
    assert "Fr\\xe9chet distance" in shown
    assert out.is_symlink() and load_model(real / "generator").D == 128.0
    assert {"results.txt", "convergence.png", "metrics.jsonl"} <= {path.name for path in real.iterdir()}
    assert not list(home.iterdir()) and before == {path: path.read_bytes() for path in teacher.iterdir()}


# -- full disks ------------------------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path: Path, network: EDMPrecond) -> Path:
    """What the commands below are to replace, from when there was room."""
    save_model(network, tmp_path / "model", extra={"task": "generator", "sigmas": [2.5]})
    (tmp_path / "pictures").mkdir()
    save_pngs(torch.rand(4, 1, 8, 8), [tmp_path / "pictures" / f"{i:06d}.png" for i in range(4)])
    for name in ("a.png", "a.npz", "a.zip", "statistics.npz"):
        (tmp_path / name).write_bytes(b"before")
    save_model(network, tmp_path / "converted")
    return tmp_path


@pytest.mark.parametrize(
    ("command", "file"),
    [
        ("sample model --n 2 --out a.png", "a.png"),
        ("sample model --n 40 --out a.npz", "a.npz"),
        ("sample model --n 2 --out pictures --add", "pictures/000000.png"),
        ("dataset pictures a.zip --overwrite", "a.zip"),
        ("evaluate pictures --reference pictures --features pixels --save-reference statistics.npz", "statistics.npz"),
        ("convert CHECKPOINT converted", ".converted.partial/model.safetensors"),
    ],
)
def test_a_full_disk_is_one_line_and_what_was_there_stays(written: Path, command: str, file: str) -> None:
    """No file of the program may grow beyond 100 bytes; it has its own process, so that the tests' own log may."""
    before = {path: path.read_bytes() for path in written.rglob("*") if path.is_file()}
    words = [CHECKPOINT if word == "CHECKPOINT" else word for word in command.split(" ")]
    reading, writing = map(os.fdopen, os.pipe(), ("r", "w"))
    with reading, open(os.devnull, "w") as nowhere:
        with writing:
            program = prepared.start(
                launch.BIN / "ipfm", *words, env=launch.environment(), stdout=nowhere, stderr=writing, cwd=written,
                file_size=100,
            )  # fmt: skip
        said = reading.read()
        assert program.wait(100) == 1
    place = (written if file.startswith(".") else Path()) / file
    *notes, line = said.splitlines()
    assert line == f"ipfm: failed: cannot write {place}: File too large"
    assert all(note.startswith("ipfm: note: ") for note in notes)
    # `sample` notes first that a folder will hold images of several models.
    after = {path: path.read_bytes() for path in written.rglob("*") if path.is_file() and path.name != SAMPLES_FILE}
    assert before == after


# -- links -----------------------------------------------------------------------------------------------------------


def test_links_stay_links(tmp_path: Path, network: EDMPrecond, monkeypatch: pytest.MonkeyPatch) -> None:
    """To files and to folders, relative, and to what is not there yet."""
    monkeypatch.chdir(tmp_path)
    disk = tmp_path / "disk"
    disk.mkdir()
    for name in ("notes", "new", "model"):
        Path(name).symlink_to(f"disk/{name}")
    (disk / "notes").write_bytes(b"old")
    for name in ("notes", "new"):
        with atomic_write(name) as file:
            file.write(b"written")
        assert Path(name).is_symlink() and (disk / name).read_bytes() == b"written"
    for D in (64.0, 128.0):
        save_model(EDMPrecond(NetworkConfig.from_json(network.config.to_json() | {"D": D})), "model")
        assert Path("model").is_symlink() and load_model(disk / "model").D == load_model("model").D == D
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "model", "new", "notes"]
    assert sorted(path.name for path in disk.iterdir()) == ["model", "new", "notes"]
    (disk / "pictures").mkdir()
    Path("pictures").symlink_to(disk / "pictures")
    save_model(network, "model", extra={"task": "generator", "sigmas": [2.5]})
    ipfm("sample", "model", "--n", 1, "--out", "pictures")
    with Image.open(disk / "pictures" / "000000.png") as picture:
        assert np.asarray(picture).shape == (8, 8)


# -- folders of others -----------------------------------------------------------------------------------------------


def test_checkpoints_of_another_version_are_refused_before_anything_is_done(tmp_path: Path) -> None:
    config = DistillConfig(D=128.0, batch=8, max_steps=10)
    record = check_run_folder(tmp_path, "distill", config, {})
    open_run_folder(tmp_path, record, write=True)
    checkpoint = tmp_path / "checkpoints" / "step-0000004"
    checkpoint.mkdir(parents=True)
    # Damage is another matter: the start skips it.
    for damaged in ("", "{", "[]", "{}", '{"format": "?"}'):
        (checkpoint / "progress.json").write_text(damaged)
        assert check_run_folder(tmp_path, "distill", config, {}) == record
    (checkpoint / "progress.json").write_text(json.dumps({"format": 2, "step": 4}))
    with pytest.raises(ValueError) as error:
        check_run_folder(tmp_path, "distill", config, {})
    assert str(error.value) == f"{checkpoint} has checkpoint format 2, this version reads 1: choose another --out"


# -- what is around the process --------------------------------------------------------------------------------------


class _Gone:
    """A terminal that was closed."""

    def isatty(self) -> bool:
        return True

    def write(self, _text: str) -> int:
        raise OSError(5, "Input/output error")

    flush = fileno = write  # type: ignore[assignment]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_run_outlives_its_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    gone = _Gone()
    monkeypatch.setattr(gone, "isatty", lambda: terminal)
    with Monitor(tmp_path, title="run", total_steps=3, batch_size=1, tensorboard=False) as monitor:
        monkeypatch.setattr(sys, "stderr", gone)
        for step in range(3):
            monitor.record(step, {"loss": 1.0})
            monitor.advance(step, {"loss": 1.0})
            monitor.message("step")
    monkeypatch.undo()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


class _NoLauncher:
    def gone(self) -> bool:
        return False


def test_under_nohup_a_hangup_is_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with catching_signals(_NoLauncher()) as noted:  # type: ignore[arg-type]
            signal.raise_signal(signal.SIGHUP)
            assert noted.signum == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_callers_process_group_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the second process of a group that was made without a launcher, and alone; neither sets a launcher's names."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in names:
        # Set first, so that what the call sets is undone at the end.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        world = start_world()
        assert (world.rank, world.size, world.launched, world.is_main) == (1, 2, False, False)
    finally:
        dist.destroy_process_group()
    monkeypatch.delenv("LOCAL_RANK")
    try:
        for _ in range(2):
            world = start_world()
            assert (world.rank, world.size, world.launched) == (0, 1, False)
            assert dist.get_world_size() == 1
        assert [name for name in names if name in os.environ] == ["LOCAL_RANK"]
    finally:
        stop_world()


def test_compiled_kernels_find_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's cache below a file in place of a home folder; one that can be written stays."""
    monkeypatch.setattr(_cache, "_looked", False)
    (tmp_path / "home").write_text("")
    closed = str(tmp_path / "home" / ".triton" / "cache")
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = closed
        with pytest.raises(OSError):
            FileCacheManager("key")
        with pytest.warns(UserWarning, match=r"compiled kernels in .*home/\.triton/cache \(Not a directory\)"):
            _cache.usable_cache()
        found = triton.knobs.cache.dir
        FileCacheManager("key").put(b"kernel", "a.cubin")
        assert Path(found, "key", "a.cubin").read_bytes() == b"kernel"
        _cache.usable_cache()
        assert triton.knobs.cache.dir == found
        shutil.rmtree(found)
    monkeypatch.setattr(_cache, "_looked", False)
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path / "cache")
        _cache.usable_cache()
        assert triton.knobs.cache.dir == str(tmp_path / "cache")


def test_entries_that_a_crash_has_left_empty_are_no_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    for key, length in (("ABC", 0), ("DEF", 6)):
        (tmp_path / key).mkdir()
        (tmp_path / key / "a.json").write_text("{}")
        (tmp_path / key / "a.cubin").write_bytes(b"kernel"[:length])
    (tmp_path / "a file").write_text("")
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        for _ in range(2):
            monkeypatch.setattr(_cache, "_looked", False)
            _cache.usable_cache()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["DEF", "a file"]
    assert [str(w.message) for w in recwarn] == [f"removed 1 broken entry of Triton's cache {tmp_path}"]


def test_a_file_that_cannot_be_written_is_named_as_it_was_asked_for(tmp_path: Path) -> None:
    """And not by the temporary name beside it."""
    with pytest.raises(OSError) as error, atomic_write("/proc/self/x.html") as file:
        file.write(b"")
    assert error.value.filename == "/proc/self/x.html"


@pytest.mark.parametrize(
    "arguments",
    [
        ["dataset", "PLACE/pictures", "PLACE/file/x.zip"],
        ["bench", "--offline", "--out", "PLACE/file"],
        ["evaluate", "PLACE/g", "--reference", "PLACE/pictures", "--features", "pixels", "--save-reference",
         "PLACE/file/x.npz"],
    ],
    ids=lambda arguments: arguments[0],
)  # fmt: skip
def test_a_place_that_takes_no_files_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        ipfm(*(argument.replace("PLACE", str(tmp_path)) for argument in arguments))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ipfm: error: ")
    assert line.endswith(f" cannot be written: {tmp_path}/file is no folder that takes files")
