"""Hugging Face's tables: parquet and arrow files with an image and a label column."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ipfm.engine.commands.dataset import Dataset
from ipfm.engine.data.open_dataset import open_dataset

pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
LABELS = [3, 1, 4, 1, 5, 0, 2, 6, 5, 3, 5, 2]


def png(index: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(PIXELS[index]).save(out, "PNG")
    return out.getvalue()


def table(first: int, count: int, *, image: str = "image", label: str = "label", told: bool = True) -> Any:
    """Rows as `datasets` writes them, with what it says of the columns in the metadata."""
    rows = range(first, first + count)
    columns = {"id": list(rows), image: [{"bytes": png(i), "path": f"{i}.png"} for i in rows]}
    if label:
        columns[label] = [LABELS[i] for i in rows]
    features: dict[str, Any] = {image: {"_type": "Image"}, "id": {"dtype": "int64", "_type": "Value"}}
    features |= {label: {"names": [str(i) for i in range(7)], "_type": "ClassLabel"}} if label else {}
    found = pyarrow.table(columns)
    return found.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})} if told else {})


def write(path: Path, content: Any, **options: Any) -> Path:
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(content, path, **options)
    else:
        maker = pyarrow.ipc.new_file if options.get("file") else pyarrow.ipc.new_stream
        with pyarrow.OSFile(str(path), "wb") as out, maker(out, content.schema) as writer:
            writer.write_table(content, max_chunksize=3)
    return path


@pytest.mark.parametrize(("suffix", "options"), [
    (".parquet", {"row_group_size": 2}), (".parquet", {}), (".arrow", {}), (".arrow", {"file": True}),
])  # fmt: skip
def test_rows_come_in_the_order_of_the_files(tmp_path: Path, suffix: str, options: dict[str, Any]) -> None:
    for part in range(2):
        write(tmp_path / "data" / f"train-{part:05d}-of-00002{suffix}", table(6 * part, 6), **options)
    (tmp_path / "README.md").write_text("a card")
    data = open_dataset(tmp_path)
    assert np.array_equal(data.images[:, 0].numpy(), PIXELS) and data.labels.tolist() == LABELS
    lazy = open_dataset(tmp_path, memory_limit=0)
    chosen = torch.tensor([11, 0, 7, 7, 2])
    assert torch.equal(lazy.images.read(chosen), data.images[chosen])
    one = open_dataset(tmp_path / "data" / f"train-00001-of-00002{suffix}")
    assert torch.equal(one.images, data.images[6:])


def test_the_parts_of_a_set_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By their names, as the hub has them, or by their folders, as save_to_disk has them; a map's caches are none."""
    for place in ("train-0.parquet", "validation-0.parquet"):
        write(tmp_path / "hub" / "data" / place, table(0, 4 if "train" in place else 2))
    for place in ("train/data-0.arrow", "test/data-0.arrow", "train/cache-1.arrow"):
        write(tmp_path / "disk" / place, table(0, 4 if "train" in place else 2))
    assert len(open_dataset(tmp_path / "hub")) == 4
    assert "left out files of the part validation: 1 (data/validation-0.parquet)" in capsys.readouterr().err
    assert len(open_dataset(tmp_path / "hub", split="dev")) == 2
    assert len(open_dataset(tmp_path / "disk", split="train")) == 4
    assert "caches of datasets: 1 (train/cache-1.arrow)" in capsys.readouterr().err
    Dataset(source=tmp_path / "disk", out=tmp_path / "a.zip", split="test", resolution=4).run()
    assert "2 images 4x4, grey" in (said := capsys.readouterr().out) and "labels: the column label" in said
    (tmp_path / "hub" / "data" / "train-0.parquet").rename(tmp_path / "hub" / "data" / "test-0.parquet")
    with pytest.raises(ValueError, match="has the parts test, validation: ipfm dataset --split says which to take"):
        open_dataset(tmp_path / "hub")


def test_columns_are_found_without_metadata_and_by_other_names(tmp_path: Path) -> None:
    named = write(tmp_path / "a.parquet", table(0, 4, image="img", label="fine_label", told=False))
    assert open_dataset(named).labels.tolist() == LABELS[:4]
    bare = pyarrow.table({"jpg": [png(i) for i in range(4)], "cls": LABELS[:4], "mask": [b"x"] * 4})
    assert open_dataset(write(tmp_path / "b.parquet", bare)).labels.tolist() == LABELS[:4]
    # What datasets says of a column counts more than its name.
    other = table(0, 4, image="photo", label="kind")
    assert open_dataset(write(tmp_path / "c.arrow", other)).labels.tolist() == LABELS[:4]
    assert open_dataset(write(tmp_path / "d.arrow", table(0, 4, label=""))).labels is None


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, said: str) -> None:
        with pytest.raises(ValueError, match=said) as told:
            open_dataset(path)
        assert str(told.value).startswith(str(path)) and "\n" not in str(told.value)

    text = pyarrow.table({"text": ["a"], "score": [0.5]})
    refused(write(tmp_path / "a.parquet", text), "has the columns text, score, of which none is known to hold images")
    path = write(tmp_path / "b.parquet", table(0, 4))
    path.write_bytes(path.read_bytes()[:-30])
    refused(path, r"is damaged, or no \.parquet file: .*; fetch it again")
    cut = write(tmp_path / "c.arrow", table(0, 4))
    cut.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(cut, r"is damaged, or no \.arrow file: it is a pointer of Git LFS")
    paths = pyarrow.table({"image": [{"bytes": None, "path": "a.png"}, {"bytes": None, "path": "b.png"}]})
    schema = pyarrow.schema([("image", pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]))])
    refused(write(tmp_path / "d.parquet", paths.cast(schema)), "row 0 holds the path a.png in the place of an image")
    missing = table(0, 4).set_column(2, "label", pyarrow.array([1, None, 2, 3]))
    refused(write(tmp_path / "e.parquet", missing), "row 1 has no label, others have; ipfm dataset --labels none")
    unlabelled = table(0, 2).set_column(2, "label", pyarrow.array([-1, -1]))
    refused(write(tmp_path / "f.parquet", unlabelled), "must be a whole number from 0 to 999999, got -1")
    write(tmp_path / "g" / "1.parquet", table(0, 2))
    write(tmp_path / "g" / "2.parquet", table(0, 2, label="other"))
    with pytest.raises(ValueError, match=r"2.parquet has no column label, .*1.parquet has"):
        open_dataset(tmp_path / "g")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    refused(path, r"is read by pyarrow, which is not installed: pip install 'ipfm\[datasets\]'")
