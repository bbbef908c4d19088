"""The averaged network of a training: it exists while somebody looks at it, and takes no memory in between."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ipfm.engine.config import Precision
from ipfm.engine.distributed.precision import apply_precision
from ipfm.engine.distributed.zero import TrainedNetwork
from ipfm.models import NetworkConfig, Precond, build_network


class EmaNetwork:
    """Makes a network of an average (EMA) that `trained` keeps among its sharded optimiser state.

    Args:
        trained: the network in training, with an average or several.
        network: its architecture.
        buffers: by name, as they were before the training: its engine may have rounded them.
        precision: arithmetic of the averaged network; its weights are float32.
        device: where it lives.
        execute: sets how the network computes, such as its memory format; it is called for each one that is made.
    """

    def __init__(
        self,
        trained: TrainedNetwork,
        network: NetworkConfig,
        buffers: Mapping[str, Tensor],
        precision: Precision,
        device: torch.device,
        execute: Callable[[Precond], object] = lambda net: None,
    ) -> None:
        self.trained, self.network, self._buffers = trained, network, buffers
        self._precision, self._device, self._execute = precision, device, execute
        self._net: Precond | None = None
        self.shown = ""
        """Name of the average of the last `refresh`."""

    @property
    def net(self) -> Precond:
        """The network of the last `refresh`: frozen, in eval mode.

        Raises:
            RuntimeError: there is none, or it was released since.
        """
        if self._net is None:
            raise RuntimeError("the averaged network does not exist yet: call refresh() on every process first")
        return self._net

    def refresh(self, which: str | None = None) -> None:
        """Gather an average as it is now. Every process must call it.

        Args:
            which: its name; None takes the first one.
        """
        if self._net is None:
            with torch.device("meta"):
                net = build_network(self.network)
            net = apply_precision(net.to_empty(device=self._device), self._precision)
            for name, buffer in net.named_buffers():
                buffer.copy_(self._buffers[name])
            self._net = net.eval().requires_grad_(False)
            self._execute(self._net)
        self.trained.copy_ema_to(self._net, which)
        self.shown = self.trained.averages[0] if which is None else which

    def release(self) -> None:
        """Free it; whoever holds `net` keeps it."""
        self._net = None
