"""What a stored network says of itself: read by name, written as it was."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ipfm.models import EDMPrecond, presets, read_config, save_model
from ipfm.models.facts import GeneratorFacts, TeacherFacts, read_facts
from ipfm.models.store import CONFIG_FILE, load_stored
from ipfm.models.teacher import load_network

SOURCE = {"file": "a.pkl", "format": "network snapshot", "network": "G_ema", "sha256": "00", "D": "assumed"}
STORED: dict[str, dict[str, Any]] = {
    "a distillation's": {
        "task": "generator", "dataset": "", "objective": "ipfm", "D": "inf", "sigmas": [2.5, 1.25], "alpha": 1.2,
        "optimizer_steps": 7, "config": {"batch": 8},
    },
    "a trajectory's": {
        "task": "generator", "dataset": "cifar10", "D": 128.0, "parametrisation": "trajectory", "sigma_max": 80.0,
        "sigma_min": 0.002, "optimizer_steps": 7, "config": {"points": 250},
    },
    "a training's": {"task": "teacher", "dataset": "digits", "optimizer_steps": 3, "config": {"batch": 8}},
    "a converted teacher's": {"task": "teacher", "D": math.inf, "source": SOURCE},
    "a converted generator's": {"task": "generator", "sigmas": [2.5], "D": math.inf, "source": SOURCE},
    "another version's": {"note": [1, {"a": None}], "task": "generator", "sigmas": [1], "eta": 0.5, "config": {}},
    "another task's": {"dataset": "digits", "task": "classifier"},
    "nobody's": {},
    "damaged": {
        "task": 3, "dataset": 5, "D": None, "optimizer_steps": "many", "config": [1], "source": "a.pkl",
        "sigmas": [2.5],
    },
    "a damaged generator's": {
        "sigmas": 2.5, "task": "generator", "sigma_max": None, "alpha": True, "parametrisation": 7, "objective": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("whose", STORED)
def test_the_json_is_as_it_was(tmp_path: Path, whose: str) -> None:
    """Keys, their order and every value, known or not, damaged or not; on disk byte for byte."""
    stored = STORED[whose]
    facts = read_facts(stored)
    assert isinstance(facts, GeneratorFacts) == (stored.get("task") == "generator")
    assert json.dumps(facts.to_json()) == json.dumps(stored)
    net = EDMPrecond(presets.get("digits"))
    save_model(net, tmp_path / "a", extra=stored)
    save_model(net, tmp_path / "b", extra=read_config(tmp_path / "a").facts.to_json())
    assert (tmp_path / "a" / CONFIG_FILE).read_bytes() == (tmp_path / "b" / CONFIG_FILE).read_bytes()


def test_facts_are_read_by_name() -> None:
    facts = read_facts(STORED["a distillation's"])
    assert isinstance(facts, GeneratorFacts) and not facts.is_trajectory
    assert (facts.dataset, facts.objective, facts.D) == ("", "ipfm", "inf")
    assert (facts.sigmas, facts.alpha) == ([2.5, 1.25], 1.2)
    assert (facts.optimizer_steps, facts.settings, facts.source, facts.others) == (7, {"batch": 8}, {}, {})
    facts = read_facts(STORED["a trajectory's"])
    assert isinstance(facts, GeneratorFacts) and facts.is_trajectory
    assert (facts.sigma_max, facts.sigma_min, facts.sigmas, facts.alpha) == (80.0, 0.002, None, None)
    facts = read_facts(STORED["a converted teacher's"])
    assert (facts.D, facts.source["network"], facts.dataset, facts.settings) == (math.inf, "G_ema", None, {})
    assert read_facts(STORED["another version's"]).others == {"note": [1, {"a": None}], "eta": 0.5}
    facts = read_facts(STORED["damaged"])
    assert (facts.dataset, facts.D, facts.optimizer_steps, facts.settings, facts.source) == (None, None, None, {}, {})
    assert facts.others == STORED["damaged"]


def test_facts_that_are_made_here_say_what_is_known() -> None:
    """In the order in which every version has written them."""
    assert TeacherFacts(dataset="digits").to_json() == {"task": "teacher", "dataset": "digits"}
    made = GeneratorFacts(dataset="", D="inf", sigmas=(2.5, 1.25), others={"eta": 0.5})
    made = replace(made, optimizer_steps=7, settings={"batch": 8})
    assert json.dumps(made.to_json()) == json.dumps(
        {"task": "generator", "dataset": "", "D": "inf", "sigmas": [2.5, 1.25], "optimizer_steps": 7,
         "config": {"batch": 8}, "eta": 0.5}
    )  # fmt: skip
    # What an objective says stays before what the export adds.
    read = read_facts({"task": "generator", "dataset": "", "eta": 0.5})
    assert list(replace(read, optimizer_steps=7).to_json()) == ["task", "dataset", "eta", "optimizer_steps"]
    converted = GeneratorFacts(sigmas=(2.5,), D=math.inf, source=SOURCE, order=("task", "sigmas"))
    assert json.dumps(converted.to_json()) == json.dumps(STORED["a converted generator's"])


def test_a_generator_is_a_stored_network_too(tmp_path: Path) -> None:
    net = EDMPrecond(presets.get("digits", D=128.0))
    save_model(net, tmp_path / "g", extra=STORED["a distillation's"])
    loaded = load_network(tmp_path / "g", D=128.0)
    assert loaded.config == net.config and not any(p.requires_grad for p in loaded.parameters())
    assert load_stored(read_config(tmp_path / "g")).state_dict().keys() == net.state_dict().keys()
    with pytest.raises(ValueError, match=r"g was trained for D = 128, but D = 64 was asked for$"):
        load_network(tmp_path / "g", D=64.0)
