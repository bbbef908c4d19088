"""The package as it is installed: a wheel with the ipfm.* names, the command, the recipes, and no stray module."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import launch
import pytest


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, so that nothing stale in build/ gets in."""
    root = tmp_path_factory.mktemp("wheel")
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=launch.ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    for name in files:
        if name and not name.startswith("tests/") and (launch.ROOT / name).is_file():
            (root / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (root / "source" / name).write_bytes((launch.ROOT / name).read_bytes())
    # What is kept beside the package.
    (root / "source" / "release" / "a-model").mkdir(parents=True)
    (root / "source" / "release" / "a-model" / "model.safetensors").write_bytes(b"weights")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(root),
         str(root / "source")],
        check=True, env=launch.environment(), capture_output=True,
    )  # fmt: skip
    return next(root.glob("*.whl"))


def test_wheel_holds_the_mapped_packages_and_nothing_beside(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry_points = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert {name.split("/")[0] for name in names} == {"ipfm", next(n for n in names if "dist-info" in n).split("/")[0]}
    for name in (
        "engine/training/distiller.py", "engine/commands/report/page.html.j2", "kernels/philox.py",
        "kernels/bench/micro.py", "models/song_unet.py", "recipes/digits_ipfm.py",
        "recipes/templates/objective.py", "recipes/templates/weighting.py", "__main__.py",
    ):  # fmt: skip
        assert f"ipfm/{name}" in names
    assert "ipfm/__init__.py" not in names, "ipfm is a namespace package"
    assert "ipfm = ipfm.engine.commands.main:main" in entry_points
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_no_archive_holds_the_released_models(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        assert [name for name in archive.namelist() if "release" in name or name.endswith(".safetensors")] == []
    # What an archive of the sources has.
    (listed,) = (wheel.parent / "source").glob("*.egg-info/SOURCES.txt")
    sources = listed.read_text(encoding="utf-8").splitlines()
    assert "recipes/fashion_ipfm.py" in sources
    assert [name for name in sources if name.startswith("release/") or name.endswith(".safetensors")] == []


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed, and nothing else of the project."""
    place = tmp_path_factory.mktemp("installed") / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(place), str(wheel)],
        check=True, env=launch.environment(), capture_output=True,
    )  # fmt: skip
    return place


def test_installed_wheel_is_importable_and_runs(site: Path, tmp_path: Path) -> None:
    code = "import ipfm.engine, ipfm.kernels, ipfm.models, ipfm.recipes as r; print(ipfm.engine.__file__, r.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=launch.environment(PYTHONPATH=str(site)), text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    assert all(place.startswith(str(site)) for place in done.stdout.split())
    again = subprocess.run(
        [sys.executable, "-m", "ipfm", "info"], cwd=tmp_path, env=launch.environment(PYTHONPATH=str(site)), text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert (again.returncode, again.stderr) == (2, "ipfm: error: ipfm info needs PATH\n")
    helped = subprocess.run(
        [str(site / "bin" / "ipfm"), "--help"], cwd=tmp_path, env=launch.environment(PYTHONPATH=str(site)),
        text=True, capture_output=True, check=True,
    )  # fmt: skip
    for command in ("sample", "info", "plan", "bench"):
        assert command in helped.stdout
    subprocess.run(
        [str(site / "bin" / "ipfm"), "new", "objective", "mine"], cwd=tmp_path,
        env=launch.environment(PYTHONPATH=str(site)), capture_output=True, check=True,
    )  # fmt: skip
    assert "class MineConfig(Distillation):" in (tmp_path / "mine.py").read_text(encoding="utf-8")


@pytest.mark.distributed
def test_an_installed_recipe_is_started_as_a_module(site: Path, tmp_path: Path) -> None:
    """Where there is no folder of recipes; the launcher hands on paths as they are typed."""
    out = tmp_path / 'it\'s "an" é $HOME run'
    done = subprocess.run(
        [str(launch.BIN / "deepspeed"), "--num_accelerators", "1", "--module", "ipfm.recipes.digits_ipfm",
         "--dry-run", "--batch", "8", "--out", str(out), "--zero", "0", "--backward", "joint",
         "--activation-checkpointing", "off"], cwd=tmp_path,
        env=launch.environment(PYTHONPATH=str(site)), text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(rf"^  out +{re.escape(str(out))}$", done.stdout, flags=re.MULTILINE)
    assert not list(tmp_path.iterdir())


# What pip does with a script of DeepSpeed: the path of Python becomes its first line, as it is.
PIP = """
import sys
from pathlib import Path
script = Path(sys.executable).with_name("deepspeed")
script.write_text(f"#!{sys.executable}\\nfrom deepspeed.launcher.runner import main\\nmain()\\n")
script.chmod(0o755)
"""
PROGRAM = f"""
import os, runpy, sys

print(os.environ["RANK"], sys.argv, flush=True)
runpy.run_path({str(launch.ROOT / "recipes" / "digits_ipfm.py")!r}, run_name="__main__")
"""


@pytest.mark.distributed
def test_the_launcher_starts_where_a_path_has_a_space_and_hands_on_the_exit_code(tmp_path: Path) -> None:
    """`make` sets it up; DeepSpeed's own first line would have ended at the space. A recipe there gets bad input."""
    place = tmp_path / "sü ß" / "ip fm"
    place.mkdir(parents=True)
    for name in ("Makefile", "setup.py", "pyproject.toml"):
        shutil.copy(launch.ROOT / name, place)
    venv.create(place / ".venv", symlinks=True)
    (site,) = (place / ".venv" / "lib").glob("*/site-packages")
    # What is installed here, with a pip of its own in front.
    installed = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "here.pth").write_text(f"import site; site.addsitedir({installed!r})\n")
    (site / "pip.py").write_text(PIP)
    subprocess.run(["make", ".venv/.ready"], cwd=place, check=True, capture_output=True, env=launch.environment())
    (place / "pro gram.py").write_text(PROGRAM)
    done = subprocess.run(
        [place / ".venv" / "bin" / "deepspeed", "pro gram.py", "--out", "rün s", "--D", "0"],
        cwd=place, env=launch.environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "0 ['pro gram.py', '--local_rank=0', '--out', 'rün s', '--D', '0']" in done.stdout
    assert "digits_ipfm.py: error: --D must lie in (0, inf], got 0.0" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (place / "rün s").exists()


def test_deepspeed_stands_in_two_files() -> None:
    """The processes, and the networks that they share."""
    users = [
        str(path.relative_to(launch.ROOT))
        for folder in ("engine", "kernels", "models", "recipes")
        for path in (launch.ROOT / folder).rglob("*.py")
        if "import deepspeed" in path.read_text() or "from deepspeed" in path.read_text()
    ]
    assert sorted(users) == ["engine/distributed/world.py", "engine/distributed/zero.py"]
