"""WebDataset's shards: images and labels read where they lie, one order for all ranks, what is damaged named."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ipfm.engine.commands.dataset import Dataset
from ipfm.engine.data.dataset import LeavesOut
from ipfm.engine.data.open_dataset import open_dataset, open_image_files
from ipfm.engine.data.tar_files import TarFiles
from ipfm.engine.experiments.own_images import has_labels

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
LABELS = [3, 1, 4, 1, 5, 0, 2, 6, 5, 3, 5, 2]


def png(index: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(PIXELS[index]).save(out, "PNG")
    return out.getvalue()


def tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def shards(folder: Path, label: str = ".cls", prefix: str = "shard") -> Path:
    """Three shards of four samples, in the order that WebDataset's writer gives them."""
    for shard in range(3):
        members = {}
        for index in range(4 * shard, 4 * shard + 4):
            members[f"{index:06d}.png"] = png(index)
            if label == ".cls":
                members[f"{index:06d}.cls"] = str(LABELS[index]).encode()
            elif label:
                members[f"{index:06d}{label}"] = json.dumps({"label": LABELS[index], "caption": "x"}).encode()
        tar(folder / f"{prefix}-{shard:06d}.tar", members)
    return folder


@pytest.mark.parametrize("label", [".cls", ".json", ""])
def test_images_and_labels_come_in_the_order_of_their_names(tmp_path: Path, label: str) -> None:
    folder = shards(tmp_path / "set", label)
    data = open_dataset(folder)
    assert np.array_equal(data.images.numpy(), PIXELS.transpose(0, 3, 1, 2))
    assert (None if data.labels is None else data.labels.tolist()) == (LABELS if label else None)
    assert data.remarks == () and has_labels(folder) == bool(label)
    one = open_dataset(folder / "shard-000001.tar")
    assert torch.equal(one.images, data.images[4:8])


def test_a_set_too_large_for_memory_is_read_image_by_image_alike(tmp_path: Path) -> None:
    """The batches of two ranks, put together, are those of one, whether the pixels are held or read when used."""
    folder = shards(tmp_path / "set")
    held, read = (open_dataset(folder, memory_limit=limit, xflip=True) for limit in (10**9, 0))
    assert isinstance(held.images, torch.Tensor) and isinstance(read.images, LeavesOut)
    for step in range(4):
        whole = held.batch(step, torch.arange(8), batch_size=8, seed=5)
        halves = [read.batch(step, torch.arange(i, i + 4), batch_size=8, seed=5) for i in (0, 4)]
        assert torch.equal(whole.images, torch.cat([half.images for half in halves]))
        assert torch.equal(whole.labels, torch.cat([half.labels for half in halves]))


def test_the_training_shards_are_taken_and_the_others_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards(tmp_path, prefix="imagenet1k-train")
    tar(tmp_path / "imagenet1k-validation-00.tar", {"v.png": png(0), "v.cls": b"7"})
    data = open_dataset(tmp_path)
    assert len(data) == 12
    said = "left out tars of the part validation: 1 (imagenet1k-validation-00.tar)"
    assert data.remarks == (f"{tmp_path}: {said}",) and said in capsys.readouterr().err
    for split in ("val", "validation"):
        other = open_dataset(tmp_path, split=split)
        assert other.labels.tolist() == [7] and not [said for said in other.remarks if "left out" in said]
    with pytest.raises(ValueError, match="has no part test: it has train, validation"):
        open_dataset(tmp_path, split="test")
    with pytest.raises(ValueError, match=r"strict was given, and .* left out tars of the part validation"):
        open_dataset(tmp_path, strict=True)
    Dataset(source=tmp_path, out=tmp_path / "out.zip", split="train", strict=True, resolution=4).run()
    assert "12 images 4x4, RGB" in capsys.readouterr().out


def test_a_class_for_each_tar_or_for_each_folder_within_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ImageNet's own archive holds a tar for each class; others pack a folder for each class."""
    for index, name in enumerate(("n01", "n02")):
        tar(tmp_path / "nested" / f"{name}.tar", {f"{name}_{index}.png": png(index)})
    Dataset(source=tmp_path / "nested", out=tmp_path / "a.zip", labels="folders").run()
    assert "labels: the folders n01.tar, n02.tar" in capsys.readouterr().out
    Dataset(source=tmp_path / "nested", out=tmp_path / "b.zip").run()
    assert "labels: none" in capsys.readouterr().out
    one = tar(tmp_path / "all.tar", {f"train/{name}/{i}.png": png(i) for i, name in enumerate(("cat", "dog"))})
    Dataset(source=one, out=tmp_path / "c.zip").run()
    assert "labels: the folders cat, dog" in capsys.readouterr().out


def test_what_lies_beside_an_image_is_left_out_and_said(tmp_path: Path) -> None:
    members = {"a.png": png(0), "a.cls": b"0", "a.txt": b"a caption", "._a.png": b"x", "b.psd": b"x", "b.cls": b"1"}
    members |= {"a.mask.png": png(1), "c.left.png": png(2), "c.cls": b"1"}  # a field of a; and the one image of c
    tar(tmp_path / "s.tar", members)
    (tmp_path / "s.parquet").write_bytes(b"what a program says of the tar")
    data = open_dataset(tmp_path)
    assert data.labels.tolist() == [0, 1]
    said = "further fields of samples: 2 (s.tar/a.txt, s.tar/a.mask.png)"
    assert said in data.remarks[0] and ".psd" in data.remarks[0]


def test_labels_that_are_missing_doubled_or_no_numbers_are_named(tmp_path: Path) -> None:
    for name, members, said in (
        ("missing", {"a.png": png(0), "a.cls": b"1", "b.png": png(1)}, "b.png has no label, others have"),
        ("texts", {"a.png": png(0), "a.cls": b"cat"}, "whole number from 0 to 999999, got cat, a text"),
        ("two", {"a.png": png(0), "a.cls": b"1", "a.json": b'{"label": 2}'}, "has two labels, in .cls and in .json"),
        ("broken", {"a.png": png(0), "a.json": b"{"}, "a.json is no JSON"),
    ):
        path = tar(tmp_path / f"{name}.tar", members)
        with pytest.raises(ValueError, match=said) as told:
            open_dataset(path)
        assert str(told.value).startswith(str(path)) and str(told.value).endswith(
            "; ipfm dataset --labels none goes on without labels"
        )
        assert len(open_dataset(path, labels=False)) == len([name for name in members if name.endswith(".png")])


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    folder = shards(tmp_path / "set")
    whole = (folder / "shard-000002.tar").read_bytes()
    for content in (whole[: len(whole) // 2 + 300], whole[:700], b"<html>" * 200, b""):
        (folder / "shard-000002.tar").write_bytes(content)
        with pytest.raises(ValueError, match=r"shard-000002.tar is no tar that can be read, or damaged: ") as told:
            open_dataset(folder)
        assert "\n" not in str(told.value)
    tar(folder / "shard-000002.tar", {"a.png": png(0)})
    with tarfile.open(folder / "shard-000002.tar", "a") as archive:
        info = tarfile.TarInfo("a.png")
        info.size = 1
        archive.addfile(info, io.BytesIO(b"x"))
    with pytest.raises(ValueError, match=r"shard-000002.tar/a.png is there twice"):
        open_dataset(folder)
    packed = tar(tmp_path / "packed" / "shard-0.tar.gz", {"a.png": png(0)}, "w:gz")
    with pytest.raises(ValueError, match=r"it holds packed tars: unpack them \(gunzip\)"):
        open_dataset(packed.parent)


def test_an_image_that_cannot_be_decoded_is_skipped_where_that_is_asked_for(tmp_path: Path) -> None:
    path = tar(tmp_path / "s.tar", {"a.png": png(0), "a.cls": b"0", "b.png": b"no image", "b.cls": b"1",
                                    "c.png": png(2), "c.cls": b"2"})  # fmt: skip
    with pytest.raises(ValueError, match=r"s\.tar: b\.png is no image"):
        open_dataset(path)
    assert open_dataset(path, skip_unreadable=True).labels.tolist() == [0, 2, 2]
    lazy = open_dataset(path, skip_unreadable=True, memory_limit=0)
    assert torch.equal(lazy.take(1, 1), lazy.take(2, 1))


def test_a_tar_that_changes_under_a_run_is_told(tmp_path: Path) -> None:
    files = open_image_files(shards(tmp_path / "set"))
    assert isinstance(files, TarFiles)
    (tmp_path / "set" / "shard-000001.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="the tar is shorter than when its headers were read"):
        files.open(files.names[5])
    (tmp_path / "set" / "shard-000001.tar").unlink()
    with pytest.raises(ValueError, match="No such file"):
        files.open(files.names[5])
