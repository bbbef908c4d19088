"""Random streams: labels, dropout seeds, the numbers that a seed's meaning rests on."""

import pytest
import scipy.stats
import torch

from ipfm.engine.random_streams import Stream, draw_labels, seed_dropout

POSITION = {"seed": 5, "stream": Stream.STUDENT_LABEL, "step": 9}


def test_the_numbers_of_the_streams_are_fixed():
    """Renumbering would change what every seed means."""
    assert {stream.name: stream.value for stream in list(Stream)[:18]} == {
        "STUDENT_LATENT": 0, "STUDENT_SIGMA": 1, "STUDENT_NOISE": 2, "STUDENT_LABEL": 3, "STUDENT_DROPOUT": 4,
        "GENERATOR_LATENT": 5, "GENERATOR_SIGMA": 6, "GENERATOR_NOISE": 7, "GENERATOR_LABEL": 8, "GENERATOR_DROPOUT": 9,
        "TEACHER_SIGMA": 10, "TEACHER_NOISE": 11, "TEACHER_DROPOUT": 12,
        "SAMPLER_LATENT": 13, "SAMPLER_NOISE": 14, "SAMPLER_LABEL": 15,
        "TEACHER_AUGMENT": 16, "STUDENT_AUGMENT": 17,
    }  # fmt: skip


@pytest.mark.parametrize("label_dim", [1, 3, 10, 1000])
def test_labels_are_uniform_classes(label_dim):
    labels = draw_labels(label_dim, torch.arange(20_000), **POSITION)
    assert labels.shape == (20_000, label_dim) and labels.dtype == torch.float32
    assert torch.equal(labels.sum(1), torch.ones(20_000))
    assert set(labels.unique().tolist()) <= {0.0, 1.0}
    counts = labels.sum(0).numpy()
    # The seed is fixed; on fresh ones this level fails once in 10^7 runs.
    assert label_dim == 1 or scipy.stats.chisquare(counts).pvalue > 1e-7


def test_labels_do_not_depend_on_the_batch():
    index = torch.arange(100)
    whole = draw_labels(10, index, **POSITION)
    assert torch.equal(torch.cat([draw_labels(10, part, **POSITION) for part in index.split(7)]), whole)
    assert torch.equal(draw_labels(10, index.flip(0), **POSITION), whole.flip(0))
    for other in ({"seed": 6}, {"stream": Stream.GENERATOR_LABEL}, {"step": 10}):
        assert not torch.equal(draw_labels(10, index, **{**POSITION, **other}), whole)


def test_labels_of_an_unconditional_network():
    assert draw_labels(0, torch.arange(3), **POSITION) is None
    with pytest.raises(ValueError, match=r"^the number of classes must be >= 0, got -1$"):
        draw_labels(-1, torch.arange(3), **POSITION)


def mask(*position: int) -> tuple[bool, ...]:
    """64 elements of a dropout mask after `seed_dropout(*position)`."""
    seed_dropout(position[0], Stream(position[1]), *position[2:])
    return tuple((torch.nn.functional.dropout(torch.ones(64), 0.5) > 0).tolist())


def test_dropout_depends_on_the_position_alone():
    first = mask(1, 4, 7, 32)
    torch.rand(5)
    assert mask(1, 5, 7, 32) != first
    assert mask(1, 4, 7, 32) == first


def test_neighbouring_positions_drop_other_elements():
    """3 values of each coordinate, also where their sums agree: 81 masks of 64 bits, all different (chance 2e-16)."""
    positions = [(a, b, c, d) for a in range(3) for b in range(3) for c in range(3) for d in (0, 1, 128)]
    masks = [mask(*position) for position in positions]
    assert len(set(masks)) == 81
    agreement = torch.tensor([[sum(p == q for p, q in zip(m, n, strict=True)) for n in masks[:9]] for m in masks[:9]])
    off_diagonal = agreement[~torch.eye(9, dtype=torch.bool)]
    # Independent fair bits agree in 32 ± 4 of 64; beyond 6 standard deviations with probability 2e-9 a pair.
    assert off_diagonal.min() > 8 and off_diagonal.max() < 56


def test_any_seed_can_be_mixed():
    largest = 2**64 - 1
    assert mask(largest, 15, 2**32 - 1, 2**40) == mask(largest, 15, 2**32 - 1, 2**40)
    assert mask(largest, 15, 2**32 - 1, 2**40) != mask(largest - 1, 15, 2**32 - 1, 2**40)
