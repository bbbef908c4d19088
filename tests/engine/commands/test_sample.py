"""Where samples go: nothing mixed or lost unasked, what is asked for fits, what is not finite is said."""

import errno
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import launch
import numpy as np
import official_files as of
import pytest
import torch
from PIL import Image

from ipfm.engine.commands.export.destination import choose_format
from ipfm.engine.commands.main import _main
from ipfm.engine.commands.sample.destination import Folder, Picture
from ipfm.engine.data.image_grid import pixels, read_grid
from ipfm.engine.data.open_dataset import open_dataset
from ipfm.engine.evaluation.subject import SAMPLES_FILE
from ipfm.engine.noise_levels import NoiseLevels
from ipfm.engine.runtime import host_memory, progress
from ipfm.engine.runtime.commandline import run_command
from ipfm.engine.runtime.errors import Failed
from ipfm.engine.sampling.batches import sample_teacher
from ipfm.engine.sampling.samplers import heun_sample
from ipfm.models import EDMPrecond, NetworkConfig, VEPrecond, load_model, save_model

SMALL = NetworkConfig(
    img_resolution=8, img_channels=1, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(), D=128.0
)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("one", "other")):
        net = of.randomize(EDMPrecond(SMALL), seed)
        save_model(net, root / name, extra={"task": "generator", "sigmas": [2.5]})
    # A generator that gives no finite image.
    with torch.no_grad():
        net.model.map_layer0.weight.fill_(math.inf)
    save_model(net, root / "broken", extra={"task": "generator", "sigmas": [2.5]})
    return root


def sample(*arguments: object) -> int:
    try:
        run_command("ipfm", _main, ["sample", *map(str, arguments)])
    except SystemExit as stop:
        return int(stop.code)
    return 0


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.quick
def test_images_of_another_model_are_not_mixed_with_those_there(models, tmp_path, capsys):
    out = tmp_path / "mix"
    assert sample(models / "one", "--n", 4, "--out", out) == 0
    before = files(out)
    for more, said in [
        ((models / "other", "--n", 2), "of another model, and would mix them with these"),
        ((models / "one", "--n", 2, "--seed", 1), "of this model with other seed, and would mix"),
        ((models / "one", "--seeds", "5"), "of this model with other seed, and would mix"),
    ]:
        capsys.readouterr()
        assert sample(*more, "--out", out) == 2 and files(out) == before
        line = capsys.readouterr().err
        assert said in line and line.endswith(": name another folder, or add to it with --add\n")
    assert sample(models / "other", "--n", 2, "--out", out, "--add") == 0
    assert "ipfm: note: " in (said := capsys.readouterr().err) and "holds 2 other images too" in said
    assert len(files(out)) == 5
    # It is a mixture from here on.
    assert sample(models / "other", "--n", 2, "--out", out) == 2


def test_images_whose_maker_is_not_known_are_not_mixed(models, tmp_path, capsys):
    (tmp_path / "a" / "b").mkdir(parents=True)
    Image.new("L", (8, 8)).save(tmp_path / "a" / "b" / "x.JPG", format="JPEG")
    assert sample(models / "one", "--n", 1, "--out", tmp_path / "a") == 2
    assert "holds images already (b/x.JPG …), of which it does not say what made them" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert sample(models / "one", "--n", 1, "--out", tmp_path / "a", "--add") == 0


def test_a_models_own_samples_are_continued(models, tmp_path, capsys):
    """More of a seed, further seeds, and after an interruption: the same images as at once."""
    for name, parts in {"seed": (("--n", 2), ("--n", 5)), "seeds": (("--seeds", "0-1"), ("--seeds", "2-4"))}.items():
        for part in parts:
            assert sample(models / "one", *part, "--out", tmp_path / name) == 0
        assert sorted(files(tmp_path / name)) == [SAMPLES_FILE, *(f"{i:06d}.png" for i in range(5))]
    assert sample(models / "one", "--n", 5, "--out", tmp_path / "once") == 0
    capsys.readouterr()
    assert files(tmp_path / "seed") == files(tmp_path / "once")
    # What is there beside these is said, in JSON too.
    assert sample(models / "one", "--n", 2, "--out", tmp_path / "once", "--json") == 0
    found = capsys.readouterr()
    assert json.loads(found.out)["remarks"] == [f"{tmp_path}/once holds 3 other images too"]
    assert found.err == f"ipfm: note: {tmp_path}/once holds 3 other images too\n"


def test_add_is_for_folders(models, tmp_path, capsys):
    assert sample(models / "one", "--out", tmp_path / "a.png", "--add") == 2
    assert "add is for folders, got the file" in capsys.readouterr().err


def test_images_that_are_not_finite_are_counted(models, tmp_path, capsys):
    assert sample(models / "broken", "--n", 3, "--out", tmp_path / "a.png", "--json") == 0
    found = capsys.readouterr()
    assert (said := json.loads(found.out))["non_finite"] == 3
    assert said["remarks"] == ["3 images of 3 are not finite, and black where that is so"]
    assert found.err == f"ipfm: note: {said['remarks'][0]}\n"
    assert sample(models / "one", "--n", 3, "--out", tmp_path / "a.png", "--json") == 0
    found = capsys.readouterr()
    assert (json.loads(found.out)["non_finite"], json.loads(found.out)["remarks"], found.err) == (0, [], "")


def test_a_picture_shows_each_image_apart_and_enlarged(models, tmp_path):
    """The pixels of the same seeds in an array, eight times as large, eight pixels between two."""
    for name in ("a.png", "a.npz"):
        assert sample(models / "one", "--n", 5, "--out", tmp_path / name) == 0
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (3 * 64 + 2 * 8, 2 * 64 + 8)
    images, shown = np.load(tmp_path / "a.npz")["images"], pixels(read_grid(tmp_path / "a.png"))
    assert np.array_equal(shown[:, :1].permute(0, 2, 3, 1), images)


def test_an_array_is_written_as_it_comes_and_equals_that_of_one_batch(models, tmp_path):
    for name, batch in (("a.npz", 64), ("b.NPZ", 2)):
        assert sample(models / "one", "--n", 5, "--batch", batch, "--out", tmp_path / name) == 0
    one, streamed = (np.load(tmp_path / name)["images"] for name in ("a.npz", "b.NPZ"))
    assert (streamed.shape, streamed.dtype) == ((5, 8, 8, 1), np.uint8)
    assert np.abs(one.astype(int) - streamed).max() <= 1


def test_a_suffix_in_capitals_is_the_same_kind(models, tmp_path):
    assert sample(models / "one", "--n", 4, "--out", tmp_path / "a.PNG") == 0
    with Image.open(tmp_path / "a.PNG") as picture:
        assert picture.format == "PNG"


def test_a_batch_that_the_host_has_no_memory_for_is_refused_before_the_work(
    models,
    tmp_path,
    capsys,
    monkeypatch,
):
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 1 << 30)
    assert sample(models / "one", "--n", 8_000_000, "--batch", 8_000_000, "--out", tmp_path / "x.npz") == 2
    line = capsys.readouterr().err
    assert line.startswith("ipfm: error: a batch of 8,000,000 images needs at least 34")
    assert line.endswith("of the host's memory, of which 1.00 GiB is free: give a smaller --batch\n")
    assert not list(tmp_path.iterdir())


def test_a_failed_allocation_is_one_line(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(host_memory, "available_bytes", lambda: None)
    assert sample(models / "one", "--n", 10**12, "--batch", 10**12, "--out", tmp_path / "x.npz") == 1
    line = capsys.readouterr().err
    assert line.startswith("ipfm: failed: there is not enough memory (") and line.endswith(": give a smaller --batch\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), ""),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes. Error code 12"), "can't"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "CUDA out of memory"),
    ],
)  # fmt: skip
def test_what_is_out_of_memory(error, reason):
    with (
        pytest.raises(Failed, match=f"not enough memory.*{reason}.*: give less"),
        host_memory.enough_memory("give less"),
    ):
        raise error
    with pytest.raises(RuntimeError, match=r"^another$"), host_memory.enough_memory("give less"):
        raise RuntimeError("another")


def test_what_the_host_has_free_is_known_here():
    free = host_memory.available_bytes()
    assert free is not None and free > 1 << 24
    host_memory.check_memory(free // 2, "it", "x")
    with pytest.raises(ValueError, match=r"it needs at least .* is free: x"):
        host_memory.check_memory(1 << 60, "it", "x")


def test_more_images_than_the_disk_has_room_for_are_refused_at_once(models, tmp_path, capsys):
    assert sample(models / "one", "--n", 10**12, "--out", tmp_path / "folder") == 2
    line = capsys.readouterr().err
    assert line.startswith("ipfm: error: 1,000,000,000,000 images ") and "disk of" in line and line.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_picture_has_a_largest_number_of_images(tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match=r"out must be a folder or end in .npz for 100,000,000 images 8x8: a picture takes"
    ):
        Picture(tmp_path / "a.png", 100_000_000, (1, 8, 8))
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 1 << 20)
    with pytest.raises(ValueError, match=r"a picture of 1,000,000 images needs at least .* give a folder as --out"):
        Picture(tmp_path / "a.png", 1_000_000, (1, 8, 8))


@pytest.mark.parametrize(("option", "value"), [("--n", 10**30), ("--batch", 10**30), ("--heun-steps", 10**9)])
def test_numbers_have_a_limit(models, capsys, option, value):
    assert sample(models / "one", option, value) == 2
    assert f"{option[2:]} must be at most " in capsys.readouterr().err


def test_no_list_of_files_is_made_before_the_first_is_written(tmp_path):
    """A hundred million names took minutes."""
    folder = Folder(tmp_path / "a", range(1_000_000), {"model": "x"}, add=False)
    assert folder.file(999_999) == tmp_path / "a" / "999999.png"
    folder.write(7, torch.zeros(1, 1, 8, 8))
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["000007.png"]


def test_a_picture_that_the_disk_refuses_leaves_whole_ones_and_is_one_line(models, tmp_path, capsys, monkeypatch):
    replace_ = os.replace

    def refuse(source, target) -> None:
        if str(target).endswith("000002.png"):
            raise OSError(errno.EIO, "Input/output error", str(target))
        replace_(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    assert sample(models / "one", "--n", 6, "--out", tmp_path / "a") == 1
    assert "000002.png" in (line := capsys.readouterr().err) and line.count("\n") == 1
    for path in (tmp_path / "a").glob("*.png"):
        Image.open(path).load()
    assert not list((tmp_path / "a").glob(".*.tmp")) and not (tmp_path / "a" / "000002.png").exists()
    monkeypatch.undo()
    assert sample(models / "one", "--n", 6, "--out", tmp_path / "a") == 0
    assert len(list((tmp_path / "a").glob("*.png"))) == 6


def test_long_work_says_how_far_it_is_every_ten_minutes(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
    bar = progress.ProgressBar("sample", 10**8)
    for clock[0] in (5.0, 11.0, 300.0, 612.0, 700.0):
        bar.advance(100)
    assert [line.split("/")[0].split()[-1] for line in capsys.readouterr().err.splitlines()] == ["200", "400"]


def test_a_folder_of_this_project_is_no_place_for_samples(models, tmp_path, capsys):
    """Images in it would keep the next export from replacing the model."""
    before = files(models / "other")
    for more in ((), ("--add",)):
        assert sample(models / "one", "--n", 1, "--out", models / "other", *more) == 2
        assert "is no place for samples: it is a model folder" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"format": 1, "kind": "distill", "config": {}}')
    assert sample(models / "one", "--n", 1, "--out", tmp_path) == 2
    assert "is no place for samples: it is the folder of a distillation" in capsys.readouterr().err
    assert files(models / "other") == before


def ipfm(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        run_command("ipfm", _main, [str(argument) for argument in arguments])
    return int(stop.value.code)


def test_swapped_arguments_and_folders_for_files_are_named(models, tmp_path, capsys):
    path = of.write_pickle(tmp_path / "a.pkl", of.edm_snapshot(EDMPrecond(SMALL)))
    for line, said in [
        (("export", tmp_path / "new.pt2", models / "one"), "; the model comes first: ipfm export MODEL OUT"),
        (("convert", tmp_path / "new", path), "does not exist; the checkpoint comes first: ipfm convert IN OUT"),
        (("convert", models / "one", tmp_path / "new"), "is a folder (it is a model folder); a checkpoint is a file"),
        (("plan", "--model", "runs/none", "--batch", 4), "runs/none does not exist in "),
    ]:  # fmt: skip
        assert ipfm(*line) == 2
        assert said in (err := capsys.readouterr().err) and err.count("\n") == 1
    assert not (tmp_path / "new").exists() and not (tmp_path / "new.pt2").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        (b"<!DOCTYPE html>", "a web page"),
        (b"\x80\x04N.", "a pickle; statistics are an .npz"),
    ],
)
def test_a_reference_and_an_inception_network_that_are_something_else(models, tmp_path, capsys, content, said):
    for name in ("a.npz", "a.pt"):
        (tmp_path / name).write_bytes(content)
    given = ("evaluate", models / "one", "--images", 2)
    assert ipfm(*given, "--features", "pixels", "--reference", tmp_path / "a.npz") == 2
    assert f"a.npz is no readable .npz: it is {said}" in capsys.readouterr().err
    assert ipfm(*given, "--inception", tmp_path / "a.pt", "--reference", tmp_path / "a.npz") == 2
    line = capsys.readouterr().err
    assert "pickled network" in line if content.startswith(b"\x80") else f"no TorchScript network: it is {said}" in line


def test_a_run_is_no_reference(models, tmp_path, capsys):
    """The pictures of a run are no images."""
    (tmp_path / "config.json").write_text('{"format": 1, "kind": "distill", "config": {}}')
    Image.new("L", (8, 8)).save(tmp_path / "convergence.png")
    given = ("--images", 2, "--features", "pixels", "--reference")
    assert ipfm("evaluate", models / "one", *given, tmp_path) == 2
    assert "holds neither images nor statistics: it is the folder of a distillation" in capsys.readouterr().err


def test_an_export_is_known_by_a_suffix_in_capitals():
    assert choose_format(Path("a.ONNX"), None) == "onnx" and choose_format(Path("a.PT2"), None) == "torch"


# -- as EDM's generate.py ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> Path:
    """A teacher that knows every level, and one that knows those from 0.02 to 100."""
    root = tmp_path_factory.mktemp("teachers")
    save_model(of.randomize(EDMPrecond(SMALL), 0), root / "edm", extra={"task": "teacher"})
    save_model(
        of.randomize(VEPrecond(replace(SMALL, precond="VEPrecond", sigma_min=0.02, sigma_max=100.0)), 0),
        root / "ve",
        extra={"task": "teacher"},
    )
    return root


def test_a_teachers_grid_is_what_is_asked_for(teachers, tmp_path, capsys):
    for name, given, ends in [
        ("edm", ("--rho", 3), {"rho": 3.0}),
        ("edm", ("--sigma-min", 0.05, "--sigma-max", 200), {"sigma_min": 0.05, "sigma_max": 200.0}),
        ("ve", ("--sigma-max", 90), {"sigma_min": 0.02, "sigma_max": 90.0}),
        # The usual ends are those that are left out.
        ("ve", ("--sigma-min", 0.002, "--sigma-max", 80, "--rho", 7), {"sigma_min": 0.02}),
    ]:
        capsys.readouterr()
        out = tmp_path / "a.npz"
        assert sample(teachers / name, "--n", 2, "--heun-steps", 3, *given, "--out", out, "--json") == 0
        expected = heun_sample(load_model(teachers / name), 2, steps=3, seed=0, **ends)
        assert np.array_equal(np.load(out)["images"], pixels(expected).permute(0, 2, 3, 1).numpy())
        grid = NoiseLevels(**ends).karras(3)[:-1].tolist()
        assert json.loads(capsys.readouterr().out)["sigmas"] == pytest.approx(grid)


def test_in_python_the_usual_ends_are_those_that_the_network_knows(teachers):
    net = load_model(teachers / "ve")
    usual = heun_sample(net, 2, steps=3, seed=0)
    assert torch.equal(usual, heun_sample(net, 2, steps=3, seed=0, sigma_min=0.02, sigma_max=80.0))
    assert torch.equal(usual, sample_teacher(net, 0, 2, D=128.0, steps=3, seed=0))
    # Ends of one's own are taken as they are.
    assert not torch.equal(usual, heun_sample(net, 2, steps=3, seed=0, sigma_max=70.0))


def test_another_grid_does_not_continue_a_folder(teachers, tmp_path, capsys):
    given = (teachers / "edm", "--n", 1, "--heun-steps", 3, "--out", tmp_path / "a")
    assert sample(*given, "--rho", 5, "--sigma-max", 40) == 0
    record = json.loads((tmp_path / "a" / SAMPLES_FILE).read_text())
    assert (record["rho"], record["sigma_max"], "sigma_min" in record) == (5.0, 40.0, False)
    capsys.readouterr()
    assert sample(*given, "--rho", 5, "--sigma-max", 40, "--sigma-min", 0.002) == 0
    assert sample(*given, "--rho", 6, "--sigma-max", 40) == 2
    assert "of this model with other sigmas, rho, and would mix" in capsys.readouterr().err
    assert sample(*given) == 2
    assert "of this model with other sigmas, sigma-max, rho, and would mix" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "given", "said"),
    [
        ("edm", ("--sigma-max", 0), "sigma_max must be a finite number > 0, got 0"),
        ("edm", ("--rho", "nan"), "rho must be a finite number > 0, got nan"),
        ("edm", ("--sigma-min", 5, "--sigma-max", 2), "sigma_min must be below sigma_max, got 5 and 2"),
        ("edm", ("--sigma-max", 0.001), "sigma_min must be below sigma_max, got 0.002 and 0.001"),
        ("edm", ("--sigmas", 5, 1, "--rho", 3), "sigmas and rho exclude each other"),
        ("ve", ("--sigma-min", 0.01), "sigma_min must lie in what the network knows, [0.02, 100], got 0.01"),
        ("ve", ("--sigma-max", 101), "sigma_max must lie in what the network knows, [0.02, 100], got 101"),
        ("one", ("--rho", 3, "--sigma-max", 9), "sigma-max, rho cannot be given: "),
    ],
)
def test_a_grid_that_cannot_be_is_refused(models, teachers, tmp_path, capsys, model, given, said):
    place = models if model == "one" else teachers
    assert sample(place / model, "--out", tmp_path / "a.png", *given) == 2
    assert said in (line := capsys.readouterr().err) and line.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_each_thousand_goes_into_a_folder_of_its_own(models, tmp_path, capsys):
    out = tmp_path / "images"
    given = (models / "one", "--seeds", "0-1,998-1001,123456", "--out", out)
    assert sample(*given, "--subdirs", "--json") == 0
    names = ["000000/000000.png", "000000/000001.png", "000000/000998.png", "000000/000999.png",
             "001000/001000.png", "001000/001001.png", "123000/123456.png"]  # fmt: skip
    assert json.loads(capsys.readouterr().out)["files"] == [str(out / name) for name in names]
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.png")) == names
    assert sample(models / "one", "--seeds", "0-1,998-1001,123456", "--out", tmp_path / "flat") == 0
    for name in names:
        assert (out / name).read_bytes() == (tmp_path / "flat" / Path(name).name).read_bytes()
    capsys.readouterr()
    # It continues as one set, not beside it, and is measured as one.
    assert sample(models / "one", "--seeds", "1,2", "--out", out, "--subdirs") == 0
    assert "holds 6 other images too" in capsys.readouterr().err
    assert sample(*given) == 2
    assert "of this model with other subdirs, and would mix" in capsys.readouterr().err
    assert sample(models / "one", "--out", tmp_path / "a.png", "--subdirs") == 2
    assert "subdirs is for folders, got the file" in capsys.readouterr().err
    both = ("--features", "pixels", "--reference", tmp_path / "flat", "--images", 7, "--json")
    assert sample_of("evaluate", out, *both) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 7
    assert len(open_dataset(out)) == 8


def sample_of(command: str, *arguments: object) -> int:
    try:
        run_command("ipfm", _main, [command, *map(str, arguments)])
    except SystemExit as stop:
        return int(stop.code)
    return 0


def test_a_long_list_of_seeds_with_a_slip_is_one_short_line(models, tmp_path, capsys):
    seeds = ",".join(map(str, range(50_000)))
    assert sample(models / "one", "--seeds", seeds + ",7x", "--out", tmp_path / "a") == 2
    assert capsys.readouterr().err == (
        "ipfm: error: seeds must be whole numbers and ranges like 0,3,7-12, got '7x' among them\n"
    )
    assert sample(models / "one", "--seeds", seeds + ",7", "--out", tmp_path / "a") == 2
    assert "seeds must differ where each names a file in a folder, got 7 twice" in capsys.readouterr().err


def test_two_processes_share_the_images_of_a_folder(models, tmp_path):
    """To the bit those of one process; a single file is one process's work, and the other leaves it alone."""
    given = ["sample", str(models / "one"), "--n", "11", "--batch", "2", "--subdirs"]
    jobs = [[*given, "--out", str(tmp_path / "shared")], [*given[:6], "--out", str(tmp_path / "a.npz")]]
    launch.run_workers("sample_shares.py", 2, {"jobs": jobs, "out": str(tmp_path)})
    assert sample(*given[1:], "--out", tmp_path / "alone") == 0
    for path in (tmp_path / "alone").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "shared" / path.relative_to(tmp_path / "alone")).read_bytes()
    shared = len(list((tmp_path / "shared").rglob("*.png")))
    assert shared == 11 and len(np.load(tmp_path / "a.npz")["images"]) == 11
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert "11 images, 1 network evaluation each" in first["said"][0] and second["said"] == ["", ""]
    assert second["err"] == ["", ""] and first["err"][0] == ""
    assert first["err"][1].startswith("ipfm: note: one of 2 processes draws all images of ")
