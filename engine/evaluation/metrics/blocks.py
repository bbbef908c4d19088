"""Features of small images without a network, fewer than their pixels: the mean and the deviation of square blocks."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Blocks that lie side by side, at most, where their size follows from that of the images: 2 x 3 x 8 x 8 features.
MOST_BLOCKS = 8


def block_side(side: int) -> int:
    """The side of the blocks for images of this side, in pixels: the smallest that leaves MOST_BLOCKS side by side.

    Raises:
        ValueError: an image is a single pixel.
    """
    if side < 2:
        raise ValueError(f"features blocks is for images of at least 2x2 pixels, these are {side}x{side}")
    return next(block for block in range(2, side + 1) if side % block == 0 and side // block <= MOST_BLOCKS)


class BlockFeatures:
    """Mean and standard deviation of each channel in each block of `block` x `block` pixels.

    Where pixels are too many for the images there are (a covariance needs more images than features): 3x32x32 images
    have 3072 pixels and, in blocks of 4x4, 384 of these features. The means see what is where, the deviations whether
    it has edges or noise, which averages hide.

    Args:
        shape: (C, H, W) of the images.
        block: side of a block in pixels, at least 2, that divides H and W.

    Raises:
        ValueError: it does not.
    """

    def __init__(self, shape: tuple[int, int, int], block: int = 4) -> None:
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"shape must be (C, H, W), got {tuple(shape)}")
        if block < 2 or shape[1] % block or shape[2] % block:
            raise ValueError(f"block must be at least 2 and divide the sides {shape[1]} and {shape[2]}, got {block}")
        self.shape, self.block = tuple(shape), block
        self.name = f"blocks of {block}x{block} pixels"
        self.dim = 2 * shape[0] * (shape[1] // block) * (shape[2] // block)

    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, 2·C·H/block·W/block), same dtype: the means, then the deviations.

        Raises:
            ValueError: images of another shape.
        """
        if images.ndim != 4 or tuple(images.shape[1:]) != self.shape:
            raise ValueError(
                f"images must have shape (B, {', '.join(map(str, self.shape))}), got {tuple(images.shape)}"
            )
        mean = F.avg_pool2d(images, self.block)
        # About the block's own mean: the difference of the squares' mean and the mean's square would cancel.
        whole = mean.repeat_interleave(self.block, 2).repeat_interleave(self.block, 3)
        deviation = F.avg_pool2d((images - whole).square(), self.block).sqrt()
        return torch.cat((mean, deviation), dim=1).flatten(start_dim=1)
