"""What is given in the place of a model is called by its name, with what to give instead."""

import gzip
import io
import json
import os
import pickle
import shutil
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import official_files as of
import pytest
import safetensors.torch
import torch

from ipfm.models import EDMPrecond, NetworkConfig, load_model, load_teacher, save_model
from ipfm.models.checkpoints.recognise import what_of_ours

SMALL = NetworkConfig(
    img_resolution=8,
    img_channels=1,
    model_channels=8,
    channel_mult=(1,),
    num_blocks=1,
    attn_resolutions=(),
    dropout=0.0,
)


def zipped(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def tarred(name: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
    return file.getvalue()


def saved(what: object) -> bytes:
    file = io.BytesIO()
    torch.save(what, file)
    return file.getvalue()


WEIGHTS = OrderedDict({"model.map_layer0.weight": torch.zeros(2)})
# A state dict of a module has the versions of its layers.
VERSIONED = torch.nn.Linear(2, 2).state_dict()
NPZ = io.BytesIO()
np.savez(NPZ, mu=np.zeros(2), sigma=np.eye(2))


NO_CHECKPOINTS = {
    "a web page": (b"<!DOCTYPE html><html><title>Google Drive - Quota exceeded", "a web page: the download led to"),
    "an error of a store": (b'<?xml version="1.0"?><Error><Code>AccessDenied', "XML text, as servers answer"),
    "an answer in JSON": (b'{"message": "Not Found"}', "a JSON text, as servers answer with"),
    "a pointer of LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:01", "fetch that with `git lfs"),
    "nothing": (b"", "is empty"),
    "a sparse file": (bytes(4096), "nothing but zeros, as a download does that has not ended"),
    "a text": (b"the model is over there\n", "it is a text: it begins with b'the model"),
    "gzip": (gzip.compress(b"x"), "packed with gzip: unpack it first"),
    "a tar in gzip": (gzip.compress(tarred("net.pkl")), r"unpack it first \('net.pkl' comes first"),
    "a cut gzip": (b"\x1f\x8b\x08\x00" + b"\xff" * 40, "packed with gzip: unpack it first, if its download"),
    "zstandard": (b"\x28\xb5\x2f\xfd....", "packed with zstandard"),
    "a tar": (tarred("net.pkl"), "a tar archive: unpack it, and give the file in it .'net.pkl'"),
    "a zip with a checkpoint": (zipped(**{"a/net.pkl": b"x"}), "a zip with 'a/net.pkl' in it: unpack it"),
    "a zip of images": (zipped(**{"a.png": b"x"}), "a zip of images, a data set"),
    "TorchScript": (zipped(**{"a/constants.pkl": b"", "a/code/b.py": b""}), "a TorchScript program"),
    "statistics": (NPZ.getvalue(), "an .npz with the arrays mu, sigma: the statistics of a reference"),
    "half a zip": (saved(WEIGHTS)[:600], "truncated zip: its end is missing, .* interrupted: fetch it again"),
    "a zip and zeros": (saved(WEIGHTS)[:600] + bytes(100_000), "its end is missing"),
    "safetensors": (safetensors.torch.save(dict(WEIGHTS)), "a safetensors file, tensors without their network"),
    "HDF5": (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    "ONNX": (b"\x08\x07\x12\x07pytorch" + b"x" * 9, "a graph of ONNX"),
    "a picture": (b"\x89PNG\r\n", r"an image \(PNG\)"),
    "a bare state dict": (saved(VERSIONED), r"holds weights alone \(a state dict: 'weight' …\) and not the"),
    "a state dict by a name": (saved({"model": VERSIONED, "epoch": 3}), "holds weights alone under 'model'"),
    "a whole module": (saved(torch.nn.Linear(2, 2)), "a whole network .*store networks with save_model"),
    "a module in a pickle": (pickle.dumps({"ema": EDMPrecond(SMALL)}), "a whole network .*store networks with"),
    "a payload": (b"cposix\nsystem\n(S'true'\ntR.", "neither a pickle"),
    "a payload of protocol 2": (b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.", "nothing of it was run"),
    "statistics of EDM2": (pickle.dumps({"fid": {"mu": np.zeros(2)}}), "arrays of NumPy, such as a reference's"),
}  # fmt: skip


@pytest.mark.quick
# By name: packed bytes hold the time at which they were packed.
@pytest.mark.parametrize(("content", "said"), NO_CHECKPOINTS.values(), ids=NO_CHECKPOINTS)
def test_what_a_file_is_that_is_no_checkpoint(tmp_path, content, said):
    path = tmp_path / "net.pkl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=said) as caught:
        load_teacher(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Discriminator", "a GAN's discriminator"),
        ("Generator", "a GAN's generator"),
        ("DistributedDataParallel", "a wrapper .* saved without"),
    ],
)
def test_a_network_of_another_project_is_named(tmp_path, name, said):
    state = {"training": False, "_parameters": {}, "_buffers": {}, "_modules": {}}
    path = of.write_pickle(tmp_path / "a.pkl", {"ema": of.Official(name, state)})
    with pytest.raises(
        ValueError, match=f"network 'ema': the class '{name}', .*{said}.* cannot be read; possible: EDM"
    ):
        load_teacher(path)


def test_what_is_missing_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for load in (load_model, load_teacher):
        with pytest.raises(ValueError, match=rf"^runs/net does not exist in {tmp_path}; what can be read"):
            load("runs/net")
    (tmp_path / "link").symlink_to("gone.pkl")
    with pytest.raises(ValueError, match=rf"{tmp_path}/link is a link to gone.pkl, which does not exist"):
        load_teacher(tmp_path / "link")


@pytest.fixture
def model(tmp_path):
    save_model(EDMPrecond(SMALL), tmp_path / "net", extra={"task": "teacher"})
    return tmp_path / "net"


def run_folder(folder: Path, kind: str, **models: Path) -> Path:
    """A run as it lies on the disk, with these models."""
    step = folder / "checkpoints" / "step-0000002"
    step.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"format": 1, "kind": kind, "config": {}}))
    for name in ("manifest.json", "progress.json"):
        (step / name).write_text("{}")
    for name, model in models.items():
        shutil.copytree(model, folder / name)
    return folder


def refusal(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        load_model(path)
    return str(caught.value)


def test_a_run_folder_without_a_network_says_so_and_its_neighbours_what_they_hold(tmp_path, model):
    run = run_folder(tmp_path / "run", "distill", generator=model)
    teacher = run_folder(run / "teacher", "teacher", model=model)
    where = f"its generator is {run}/generator, its teacher is {run}/teacher/model"
    with pytest.warns(UserWarning, match=f"of {run} the generator at its end is taken$"):
        assert load_model(run).config == SMALL
    young = tmp_path / "young"
    young.mkdir()
    (young / "config.json").write_text(json.dumps({"format": 1, "kind": "distill", "config": {}}))
    assert refusal(young).endswith("it is the folder of a distillation, which has not exported a model yet")
    (young / "checkpoints").mkdir()
    said = "it holds the checkpoints that a run continues from, which has not exported a model yet"
    assert refusal(young / "checkpoints").endswith(said)
    holds = tmp_path / "holds"
    shutil.copytree(model, holds / "net")
    assert refusal(holds).endswith("is no model: it holds the model folder 'net': give that")
    # In the place of data, say.
    assert what_of_ours(run) == f"it is the folder of a distillation; {where}"
    assert what_of_ours(teacher) == f"it is the folder of a teacher's training; its teacher is {teacher}/model"
    step = run / "checkpoints" / "step-0000002"
    assert what_of_ours(step) == f"it is a checkpoint that a run continues from; {where}"


def test_what_other_folders_hold(tmp_path, model):
    for name, said in {
        "a.png": "it holds images",
        "training-state-000100.pt": "it holds the checkpoint 'training-state-000100.pt': give that",
    }.items():
        folder = tmp_path / name[0]
        folder.mkdir()
        (folder / name).write_bytes(b"x")
        assert refusal(folder) == f"{folder} is no model: {said}"
    (tmp_path / "e").mkdir()
    assert refusal(tmp_path / "e").endswith("it is empty")
    (tmp_path / "a" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    assert refusal(tmp_path / "a").endswith("it is a model of another library ('UNet2DModel')")
    run_folder(tmp_path / "runs" / "first", "distill")
    # With the pictures that a run leaves, and beside a page's.
    (tmp_path / "runs" / "first" / "comparison.png").write_bytes(b"x")
    (tmp_path / "runs" / "curves.png").write_bytes(b"x")
    assert refusal(tmp_path / "runs").endswith("it holds the run 'first': give a model in that")


def test_a_part_of_a_model_folder_leads_to_the_folder(model):
    with pytest.raises(ValueError, match=f"it is a part of the model folder {model}: give the folder"):
        load_teacher(model / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "said"),
    {
        "a pointer": (
            lambda b: b"version https://git-lfs.github.com/spec/v1\n",
            "holds no weights: it is a pointer of",
        ),
        "a page": (lambda b: b"<html>", "holds no weights: it is a web page"),
        "empty": (lambda b: b"", "holds no weights: it is empty"),
        "half": (lambda b: b[: len(b) // 2], "is cut short, as after"),
        "a header alone": (lambda b: b[:100], "is cut short, as after"),
        "another byte": (lambda b: b[:-1] + bytes([b[-1] ^ 1]), "is damaged or belongs to another network"),
    }.values(),
)
def test_what_stands_in_the_place_of_the_weights(model, damage, said):
    path = model / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert f"{path} {said}" in refusal(model)


def test_a_pointer_in_the_place_of_config_json(model):
    (model / "config.json").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:01\n")
    assert "config.json cannot be read as JSON: it is a pointer of Git LFS" in refusal(model)


def test_parts_of_a_run_lead_to_its_models(tmp_path, model):
    run = run_folder(tmp_path / "run", "distill", generator=model)
    weights = run / "checkpoints" / "step-0000002" / "generator.safetensors"
    weights.write_bytes(b"x")
    said = "it is a part of a checkpoint that a run continues from: give the folder for its average; its generator is "
    with pytest.raises(ValueError, match=f"{weights}: neither a pickle .*: {said}"):
        load_teacher(weights)
    with pytest.raises(ValueError, match=f"it holds the settings of a run; its generator is {run}/generator"):
        load_teacher(run / "config.json")


def test_what_is_neither_file_nor_folder(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name, said in {"pipe": "is neither file nor folder", "loop": "is a link that leads back to itself"}.items():
        assert said in refusal(tmp_path / name)
        with pytest.raises(ValueError, match=said):
            load_teacher(tmp_path / name)
