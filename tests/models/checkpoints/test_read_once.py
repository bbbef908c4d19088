"""A checkpoint file is opened and unpickled once, by every command that takes one and by the recipes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import official_files
import pytest

from ipfm.engine.commands.main import _main
from ipfm.engine.runtime.commandline import run_command
from ipfm.models import EDMPrecond, load_teacher, presets
from ipfm.models.checkpoints import containers, reader
from ipfm.models.checkpoints.training_state import read_training_state
from ipfm.models.teacher import load_network
from ipfm.recipes import digits_ipfm


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot of a teacher for the digits, a state of its training, and images."""
    root = tmp_path_factory.mktemp("files")
    small = replace(presets.get("digits", D=128.0), model_channels=8, channel_mult=(1,), num_blocks=1)
    net = official_files.randomize(EDMPrecond(small))
    official_files.write_pickle(root / "snapshot.pkl", official_files.edm_snapshot(net))
    state = official_files.pfgmpp_state(net, net, step=2048, pfgmpp=True, D=128)
    official_files.write_torch(root / "training-state-000002.pt", state)
    np.savez(root / "real.npz", arr_0=np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1), dtype=np.uint8))
    return root


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a file was opened, and how often something was unpickled."""
    found: Counter[str] = Counter()

    def count(module: Any, name: str) -> None:
        real: Callable[..., object] = getattr(module, name)

        def counting(*arguments: Any, **options: Any) -> object:
            found[name] += 1
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, counting)

    count(reader, "map_file")
    count(containers, "read_pickle")
    return found


COMMANDS: dict[str, list[str]] = {
    "sample": ["sample", "FILE", "--n", "1", "--heun-steps", "1", "--out", "OUT/a.png"],
    "info": ["info", "FILE"],
    "convert": ["convert", "FILE", "OUT/model"],
    "evaluate": [
        *("evaluate", "FILE", "--reference", "ROOT/real.npz", "--features", "pixels", "--images", "2"),
        *("--heun-steps", "1"),
    ],
    "plan": ["plan", "--model", "FILE", "--batch", "4"],
    "export": ["export", "FILE", "OUT/denoiser.pt2"],
    "export to a hub": ["export", "FILE", "OUT/hub", "--format", "huggingface", "--samples", "1"],
}


@pytest.mark.parametrize("name", ["snapshot.pkl", "training-state-000002.pt"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_reads_its_checkpoint_once(
    files: Path, tmp_path: Path, counted: Counter[str], command: str, name: str
) -> None:
    places = {"FILE": files / name, "ROOT": files, "OUT": tmp_path}
    arguments = COMMANDS[command]
    for word, place in places.items():
        arguments = [argument.replace(word, str(place)) for argument in arguments]
    run_command("ipfm", _main, arguments)
    assert counted == {"map_file": 1, "read_pickle": 1}


@pytest.mark.parametrize("load", [load_teacher, load_network])
def test_loading_reads_it_once(files: Path, counted: Counter[str], load: Callable[[Path], object]) -> None:
    load(files / "snapshot.pkl")
    assert counted == {"map_file": 1, "read_pickle": 1}


def test_so_do_a_training_that_continues_and_a_recipe(
    files: Path, tmp_path: Path, counted: Counter[str], capsys: pytest.CaptureFixture[str]
) -> None:
    read_training_state(files / "training-state-000002.pt")
    assert counted == {"map_file": 1, "read_pickle": 1}
    counted.clear()
    digits_ipfm.main(
        ["--teacher", str(files / "training-state-000002.pt"), "--batch", "8", "--out", f"{tmp_path}/run", "--dry-run"]
    )
    assert counted == {"map_file": 1, "read_pickle": 1}
    assert "training-state-000002.pt" in capsys.readouterr().out
