"""Inception score: how sure a classifier is of each image, and how varied the images are."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class InceptionScore(NamedTuple):
    """`mean` of the score over parts of the images, and its standard deviation `std` from part to part."""

    mean: float
    std: float


def inception_score(probabilities: Tensor, *, splits: int = 10) -> InceptionScore:
    """exp E KL(p(class | image) ‖ p(class)) [Salimans et al., arXiv 1606.03498, section 4], in float64.

    Args:
        probabilities: (N, classes), of each image, in the order of the images.
        splits: consecutive parts of as equal a size as possible; p(class) is the mean over a part.

    Raises:
        ValueError: another shape, fewer images than splits, or rows that are no probabilities.
    """
    if probabilities.ndim != 2 or probabilities.shape[1] == 0:
        raise ValueError(f"probabilities must have shape (N, classes), got {tuple(probabilities.shape)}")
    count = len(probabilities)
    if not 1 <= splits <= count:
        raise ValueError(f"needs at least one image for each of {splits} parts, got {count}")
    # float32 rows sum to 1 up to some 1e-6; what they lack is made up for here.
    rows = probabilities.to(torch.float64)
    total = rows.sum(dim=1, keepdim=True)
    if not ((rows >= 0).all() and ((total - 1).abs() < 1e-3).all()):
        raise ValueError("rows of probabilities must be non-negative and sum to 1")
    rows = rows / total
    edges = [part * count // splits for part in range(splits + 1)]
    scores = []
    for first, last in pairwise(edges):
        part = rows[first:last]
        marginal = part.mean(dim=0)
        divergence = torch.xlogy(part, part).sum(dim=1).mean() - torch.xlogy(marginal, marginal).sum()
        scores.append(divergence.exp())
    values = torch.stack(scores)
    return InceptionScore(values.mean().item(), values.std(correction=0).item())
