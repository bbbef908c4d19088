"""Datasets: values, order, resumption, refusals."""

import importlib.util
import sys

import pytest
import scipy.stats
import torch

from ipfm.engine.data.dataset import ImageDataset, digits


def numbered(n: int, **kwargs) -> ImageDataset:
    """n images (1, 1, 2): left pixel number / 8192, exact and below 1; right pixel 1; class number modulo 3."""
    number = torch.arange(n)
    images = torch.stack([number / 8192, torch.ones(n)], dim=1).reshape(n, 1, 1, 2)
    return ImageDataset(images, number % 3, name="numbered", **kwargs)


def order(data: ImageDataset, steps: range, batch_size: int, seed: int = 5) -> list[int]:
    index = torch.arange(batch_size)
    parts = [data.batch(s, index, batch_size=batch_size, seed=seed).images[:, 0, 0, 0] for s in steps]
    return (torch.cat(parts) * 8192).round().int().tolist()


@pytest.mark.quick
@pytest.mark.parametrize("batch_size", [1, 7, 20, 50])
def test_each_image_comes_once_an_epoch_in_a_new_order(batch_size):
    stream = order(numbered(20), range(100 // batch_size + 1), batch_size)
    epochs = [stream[i : i + 20] for i in range(0, 100, 20)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5  # two of 20! orders agree with probability 4e-18
    # The stream of positions does not depend on the batch size it is cut into.
    assert stream[:100] == order(numbered(20), range(100), 1)
    assert order(numbered(20), range(20), 1, seed=6) != epochs[0]


def test_neighbouring_seeds_do_not_share_epochs():
    data = numbered(20)
    second_of_5 = order(data, range(1, 2), 20, seed=5)
    assert second_of_5 != order(data, range(1), 20, seed=6)
    assert order(data, range(1), 20, seed=-1) != order(data, range(1), 20, seed=1)


@pytest.mark.quick
def test_batch_does_not_depend_on_its_split_or_on_what_came_before():
    data = numbered(23, xflip=True)
    whole = [data.batch(step, torch.arange(12), batch_size=12, seed=1) for step in range(9)]
    resumed = numbered(23, xflip=True)
    for step in (7, 3, 8):  # another order, from a cold cache
        for rank in range(4):
            share = torch.arange(rank, 12, 4).flip(0)
            part = resumed.batch(step, share, batch_size=12, seed=1)
            assert torch.equal(part.images, whole[step].images[share])
            assert torch.equal(part.labels, whole[step].labels[share])


def test_labels_are_one_hot_and_belong_to_their_images():
    images, labels = numbered(20, classes=5).batch(4, torch.arange(16), batch_size=16, seed=2)
    assert images.dtype == labels.dtype == torch.float32
    assert labels.shape == (16, 5)
    assert torch.equal(labels.sum(1), torch.ones(16))
    assert torch.equal(labels.argmax(1), (images[:, 0, 0, 0] * 8192).round().long() % 3)
    assert ImageDataset(torch.zeros(3, 1, 2, 2)).batch(0, torch.arange(2), batch_size=2, seed=0).labels is None


def test_label_vectors_are_served_as_they_are():
    vectors = torch.arange(12, dtype=torch.float64).reshape(4, 3) / 7 - 1
    data = ImageDataset((torch.arange(4) / 4).reshape(4, 1, 1, 1), vectors)
    assert data.classes == 3 and data.labels.dtype == torch.float32
    images, labels = data.batch(2, torch.arange(4), batch_size=4, seed=1)
    assert torch.equal(labels, vectors.float()[(images.flatten() * 4).long()])


class Numbered:
    """A source of 50 images (1, 2, 2), whose pixels are their number; remembers what it was asked for."""

    shape = (50, 1, 2, 2)

    def __init__(self, device: str = "cpu"):
        self.device = torch.device(device)
        self.asked = []

    def to(self, device):
        return Numbered(device)

    def read(self, indices: torch.Tensor) -> torch.Tensor:
        assert indices.device.type == "cpu" and indices.dtype == torch.int64
        self.asked += indices.tolist()
        return indices.to(torch.uint8)[:, None, None, None].expand(-1, *self.shape[1:]).to(self.device)


def test_a_source_serves_what_memory_serves():
    source = Numbered()
    lazy = ImageDataset(source, torch.arange(50) % 7, xflip=True)
    held = ImageDataset(Numbered().read(torch.arange(50)), torch.arange(50) % 7, xflip=True)
    assert len(lazy) == 50 and lazy.shape == (1, 2, 2) and lazy.classes == 7
    for step in range(4):
        for one, other in zip(*(d.batch(step, torch.arange(3, 19), batch_size=20, seed=4) for d in (lazy, held)),
                              strict=True):  # fmt: skip
            assert torch.equal(one, other)
    assert len(source.asked) == 4 * 16  # nothing but the images of the batches
    assert torch.equal(lazy.take(40, 10), held.take(40, 10))
    moved = lazy.to("cpu")
    assert moved.images is not source and moved.device == lazy.device == torch.device("cpu")


@pytest.mark.gpu
def test_batches_are_the_same_on_a_gpu():
    for data in (numbered(50, xflip=True), ImageDataset(Numbered(), torch.arange(50) % 7, xflip=True)):
        there = data.to("cuda")
        expected = data.batch(3, torch.arange(20), batch_size=20, seed=4)
        for index in (torch.arange(20), torch.arange(20, device="cuda")):
            images, labels = there.batch(3, index, batch_size=20, seed=4)
            assert images.is_cuda and torch.equal(images.cpu(), expected.images)
            assert torch.equal(labels.cpu(), expected.labels)


def test_first_place_of_an_epoch_is_uniform():
    """χ² over 2000 epochs; false alarm 1e-6."""
    data = numbered(10)
    first = [order(data, range(10 * epoch, 10 * epoch + 1), 1)[0] for epoch in range(2000)]
    counts = torch.bincount(torch.tensor(first), minlength=10).double()
    assert ((counts - 200) ** 2 / 200).sum() < scipy.stats.chi2.isf(1e-6, 9)


def test_xflip_mirrors_half_of_the_images_anew_in_each_epoch():
    """Binomial(4000, ½), so too "alike in two epochs", by image and by position; false alarm 1e-6 together."""
    n = 4000
    flipped, by_position = [], []
    for epoch in (0, 1):
        images = numbered(n, xflip=True).batch(epoch, torch.arange(n), batch_size=n, seed=3).images[:, 0, 0]
        left_is_one = images[:, 0] == 1
        by_position.append(left_is_one)
        number = (torch.where(left_is_one, images[:, 1], images[:, 0]) * 8192).round().long()
        flipped.append(torch.zeros(n, dtype=torch.bool).index_put((number,), left_is_one))
    low, high = scipy.stats.binom.ppf([1e-7, 1 - 1e-7], n, 0.5)
    for count in (
        flipped[0].sum(),
        flipped[1].sum(),
        (flipped[0] == flipped[1]).sum(),
        (by_position[0] == by_position[1]).sum(),
    ):
        assert low <= count <= high
    plain = numbered(n).batch(0, torch.arange(n), batch_size=n, seed=3).images
    assert torch.equal(plain[:, 0, 0, 1], torch.ones(n))


def test_uint8_covers_the_range_exactly():
    data = ImageDataset(torch.arange(256, dtype=torch.uint8).reshape(256, 1, 1, 1))
    values = data.take(0, 256).flatten()
    assert values.dtype == torch.float32
    assert values[0] == -1 and values[255] == 1
    assert torch.allclose(values.double(), torch.arange(256).double() / 127.5 - 1, atol=1e-7)
    other = ImageDataset(torch.tensor([0, 4, 16], dtype=torch.uint8).reshape(3, 1, 1, 1), value_range=(0, 16))
    assert other.take(1, 2).flatten().tolist() == [-0.5, 1]
    shifted = ImageDataset(torch.tensor([4.0, 8.0, 20.0]).reshape(3, 1, 1, 1), value_range=(4, 20))
    assert shifted.take(0, 3).flatten().tolist() == [-1, -0.5, 1]


@pytest.mark.parametrize("found", [True, False])
def test_digits(monkeypatch, found: bool):
    """Whether scikit-learn's file is read or scikit-learn has to be asked, as where its files lie elsewhere."""
    from sklearn.datasets import load_digits

    source = load_digits()
    if found:
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    data = digits()
    assert data.images.shape == (1797, 1, 8, 8) and data.images.dtype == torch.float32
    assert len(data) == 1797 and data.shape == (1, 8, 8) and data.classes == 10 and data.name == "digits"
    assert torch.equal(data.take(0, 1797)[:, 0].double(), torch.from_numpy(source.images) / 8 - 1)
    assert data.labels.tolist() == source.target.tolist()
    assert data.images.min() == -1 and data.images.max() == 1


def test_digits_without_scikit_learn_say_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(RuntimeError, match="scikit-learn, which is missing") as caught:
        digits()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": torch.zeros(3, 8, 8)}, r"shape \(N, C, H, W\) with N > 0, got \(3, 8, 8\)"),
        ({"images": torch.zeros(0, 1, 8, 8)}, r"N > 0, got \(0, 1, 8, 8\)"),
        ({"images": torch.zeros(3, 1, 2, 2, dtype=torch.float64)}, "uint8 or float32, got torch.float64"),
        ({"images": torch.full((3, 1, 2, 2), 255.0)}, r"values must lie in \[-1, 1\], got 255 to 255"),
        ({"images": torch.full((3, 1, 2, 2), float("nan"))}, "got nan to nan"),
        ({"images": torch.zeros(3, 1, 2, 2), "value_range": (1, 0)}, "value_range must increase"),
        ({"images": torch.zeros(3, 1, 2, 2), "labels": torch.zeros(2, dtype=torch.long)}, r"integers of shape \(3,\)"),
        ({"images": torch.zeros(3, 1, 2, 2), "labels": torch.zeros(3)}, "got torch.float32"),
        ({"images": torch.zeros(3, 1, 2, 2), "labels": torch.tensor([0, -1, 2])}, "0…2, got values from -1 to 2"),
        ({"images": torch.zeros(3, 1, 2, 2), "labels": torch.tensor([0, 1, 2]), "classes": 2}, "0…1, got values"),
        ({"images": torch.zeros(3, 1, 2, 2), "classes": 2}, "2 classes were given without labels"),
        ({"images": torch.zeros(3, 1, 2, 2), "labels": torch.zeros(2, 4)}, r"floats of shape \(3, K\), got torch.fl"),
        ({"images": torch.zeros(3, 1, 2, 2), "labels": torch.zeros(3, 0)}, r"got torch.float32 \(3, 0\)"),
        ({"images": torch.zeros(3, 1, 2, 2), "labels": torch.zeros(3, 4, dtype=torch.long)}, r"int64 \(3, 4\)"),
        ({"images": torch.zeros(3, 1, 2, 2), "labels": torch.zeros(3, 4), "classes": 5}, "4 numbers wide, but 5"),
        ({"images": torch.zeros(3, 1, 2, 2), "labels": torch.full((3, 4), float("inf"))}, "must be finite"),
        ({"images": Numbered(), "value_range": (0, 16)}, "values 0 to 255, got value_range 0 to 16"),
    ],
)
def test_dataset_refusals_are_one_line_with_the_name(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        ImageDataset(**arguments, name="mine")
    assert str(caught.value).startswith("mine: ") and "\n" not in str(caught.value)


def test_batch_refusals():
    data = numbered(5)
    with pytest.raises(ValueError, match=r"0…3, got 0 to 4"):
        data.batch(0, torch.arange(5), batch_size=4, seed=0)
    with pytest.raises(ValueError, match="int64 of shape"):
        data.batch(0, torch.arange(4).float(), batch_size=4, seed=0)
    with pytest.raises(ValueError, match="got -1 and 4"):
        data.batch(-1, torch.arange(4), batch_size=4, seed=0)
    with pytest.raises(ValueError, match="has 5 images, got first=4, count=2"):
        data.take(4, 2)
