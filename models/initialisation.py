"""How weights and biases start: the four random modes shared by every layer."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

InitMode = Literal["xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal"]


@dataclass(frozen=True)
class Init:
    """A random mode and what its draws are multiplied by.

    Args:
        mode: one of the four of `InitMode`.
        weight: a weight starts as this times a draw of `mode`.
        bias: a bias starts as this times a draw of the same mode with the same fans; 0 starts biases at zero.
    """

    mode: InitMode = "kaiming_normal"
    weight: float = 1.0
    bias: float = 0.0

    def draw(self, shape: tuple[int, ...], fan_in: int, fan_out: int) -> Tensor:
        """A float32 tensor of `shape` from torch's global generator, before the multiplier.

        Raises:
            ValueError: the mode is unknown.
        """
        if self.mode == "xavier_uniform":
            return math.sqrt(6 / (fan_in + fan_out)) * torch.empty(shape).uniform_(-1, 1)
        if self.mode == "xavier_normal":
            return math.sqrt(2 / (fan_in + fan_out)) * torch.randn(shape)
        if self.mode == "kaiming_uniform":
            return math.sqrt(3 / fan_in) * torch.empty(shape).uniform_(-1, 1)
        if self.mode == "kaiming_normal":
            return math.sqrt(1 / fan_in) * torch.randn(shape)
        raise ValueError(
            f"initialisation mode {self.mode!r} is unknown; "
            "possible: xavier_uniform, xavier_normal, kaiming_uniform, kaiming_normal"
        )

    def draw_weight(self, shape: tuple[int, ...], fan_in: int, fan_out: int) -> Tensor:
        """The starting value of a weight of `shape`."""
        return self._scaled(self.weight, shape, fan_in, fan_out)

    def draw_bias(self, shape: tuple[int, ...], fan_in: int, fan_out: int) -> Tensor:
        """The starting value of a bias of `shape`."""
        return self._scaled(self.bias, shape, fan_in, fan_out)

    def _scaled(self, factor: float, shape: tuple[int, ...], fan_in: int, fan_out: int) -> Tensor:
        value = torch.empty(shape)
        # The meta device has no values, and arithmetic takes long there.
        return value if value.is_meta else factor * self.draw(shape, fan_in, fan_out)


DEFAULT_INIT = Init()
ZERO_INIT = Init(weight=0.0)
