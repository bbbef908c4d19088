"""What a run is made with, as it is logged and put in words."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import torch

from ipfm.engine.distributed.world import World
from ipfm.engine.runtime.versions import installed
from ipfm.engine.training.environment import ENVIRONMENT_FILE, attention_taken, in_words, log_start, read_starts


def test_a_line_for_each_start(tmp_path: Path) -> None:
    log_start(tmp_path, 0, World(0, 2, torch.device("cpu")))
    log_start(tmp_path, 40, World(0, 1, torch.device("cpu")))
    first, second = read_starts(tmp_path)
    assert (first["step"], first["processes"], second["step"], second["processes"]) == (0, 2, 40, 1)
    assert first["torch"] == version("torch") and first["python"] == platform.python_version()
    assert first["cuda"] is None and first["device"].startswith("CPU")
    said = dict(in_words((first, second)))
    assert said["processes"] == "2; then 1"
    # What is the same is said once, and what is not there not at all.
    assert said["versions"].count("torch ") == 1 and "cuda" not in said["versions"]
    reason = "xformers cannot serve: it needs a GPU"
    assert (first["attention"], first["attention_reason"]) == ("sdpa", reason)
    assert said["attention"] == f"sdpa: {reason}"
    assert attention_taken("xformers", torch.device("cuda")) == ("xformers", "asked for")
    assert first["deterministic"] is False and "deterministic algorithms" not in said
    both = dict(in_words((first, second | {"deterministic": True})))
    assert both["deterministic algorithms"] == "no; then yes"
    assert first["cuda_graphs"] is False and "CUDA graphs" not in said
    both = dict(in_words((first, second | {"cuda_graphs": True})))
    assert both["CUDA graphs"] == "no; then yes"
    assert dict(in_words(({"step": 0, "torch": "1"}, {"step": 9}))) == {"versions": "torch 1"}


def test_none_of_an_older_run(tmp_path: Path) -> None:
    assert read_starts(tmp_path) == () and not list(in_words(()))
    (tmp_path / ENVIRONMENT_FILE).write_text('{"step": 0, "torch"')
    assert read_starts(tmp_path) == ()


def test_versions_need_no_import() -> None:
    assert installed("torch") == version("torch") and installed("no-such-package") == "not installed"
