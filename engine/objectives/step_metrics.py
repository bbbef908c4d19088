"""What a training step measures of itself, on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ipfm.engine.distributed.world import World


@dataclass(frozen=True)
class StepMetrics:
    """What one optimiser step measured on this process, on the device: nothing here waits for it."""

    sums: Mapping[str, Tensor]
    """name -> 0-d: sum over the samples that count, e.g. of the loss."""
    counts: Mapping[str, Tensor]
    """name -> 0-d: number of samples behind the sum."""
    bad: Mapping[str, Tensor]
    """network -> 0-d: number of non-finite samples, plus one for a skipped step."""

    @classmethod
    def merged(cls, parts: Sequence[StepMetrics]) -> StepMetrics:
        """The parts together: the same name twice adds up."""

        def total(dicts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
            out: dict[str, Tensor] = {}
            for one in dicts:
                for name, value in one.items():
                    out[name] = out[name] + value if name in out else value
            return out

        return cls(total([p.sums for p in parts]), total([p.counts for p in parts]), total([p.bad for p in parts]))


class LossSum:
    """Adds up the micro-batches of one optimiser step of the network `name`.

    Gradients are accumulated as if every sample counted; `grad_scale` corrects the divisor to the samples that do.

    Args:
        name: the network, as it appears in the log.
        world: the run's processes.
        samples: those that are added in a step, where the sum is used for many steps; None counts them.
    """

    def __init__(self, name: str, world: World, samples: int | None = None) -> None:
        self.name, self.world = name, world
        self._loss = torch.zeros((), dtype=torch.float64, device=world.device)
        self._valid = torch.zeros((), dtype=torch.float64, device=world.device)
        self._samples, self._counts = samples or 0, samples is None

    def add(self, loss: Tensor, valid: Tensor) -> None:
        """A micro-batch: loss (B,), 0 where the sample does not count; valid (B,) bool."""
        self._loss += loss.sum(dtype=torch.float64)
        self._valid += valid.sum()
        if self._counts:
            self._samples += len(valid)

    def grad_scale(self, batch: int) -> Tensor:
        """0-d float32: `batch` over the number of samples that count, on all processes together; each must call it.

        Args:
            batch: global batch. Where no sample counts at all, the scale is `batch` and meets gradients that are 0.
        """
        return (batch / self.world.all_reduce_sum_(self._counted.clone()).clamp(min=1)).float()

    def measured(self, applied: Tensor) -> StepMetrics:
        """This process's share.

        Args:
            applied: 0-d bool: whether the optimiser took the step; a step it did not take is counted as one bad sample
                more, by the first process alone.
        """
        return measured_as(self.name, torch.stack([self._loss, self._counted, self._bad(applied)]))

    def taken(self, applied: Tensor) -> Tensor:
        """What `measured_as` makes metrics of, (3,) float64; the sum begins anew. Argument as of `measured`."""
        found = torch.stack([self._loss, self._counted, self._bad(applied)])
        self._clear()
        return found

    @property
    def _counted(self) -> Tensor:
        """0-d: what the loss is divided by."""
        return self._valid

    def _clear(self) -> None:
        self._loss.zero_()
        self._valid.zero_()

    def _bad(self, applied: Tensor) -> Tensor:
        skipped = (~applied).double() if self.world.is_main else torch.zeros_like(self._valid)
        return self._samples - self._valid + skipped


class HalvesSum(LossSum):
    """The same of a loss in two halves, each of as many samples; a sample of the second one counts by its share.

    Args:
        name: as of `LossSum`.
        world: likewise.
        samples: those of one half that are added in a step.
        share: of the first half in the loss; each half's losses have their own as a factor.
    """

    def __init__(self, name: str, world: World, samples: int, share: float) -> None:
        super().__init__(name, world, samples)
        self._share = share
        self._others = torch.zeros((), dtype=torch.float64, device=world.device)

    def add_other(self, loss: Tensor, valid: Tensor) -> None:
        """A micro-batch of the second half; see `add`."""
        self._loss += loss.sum(dtype=torch.float64)
        self._others += valid.sum()

    @property
    def _counted(self) -> Tensor:
        return self._share * self._valid + (1 - self._share) * self._others

    def _clear(self) -> None:
        super()._clear()
        self._others.zero_()

    def _bad(self, applied: Tensor) -> Tensor:
        return super()._bad(applied) + (self._samples - self._others)


class FurtherSum:
    """Adds up what is measured beside the loss of a network, such as another term, of the samples that count.

    Args:
        name: as it appears in the log, without "_loss".
        world: the run's processes.
    """

    def __init__(self, name: str, world: World) -> None:
        self.name = name
        self._sums = torch.zeros(2, dtype=torch.float64, device=world.device)

    def add(self, loss: Tensor, valid: Tensor, share: float = 1.0) -> None:
        """A micro-batch: loss (B,), and whether each counts; `share`: of the whole, where there are several parts."""
        counted = torch.where(valid, loss.detach(), 0.0)
        self._sums += share * torch.stack([counted.sum(dtype=torch.float64), valid.sum(dtype=torch.float64)])

    def taken(self) -> Tensor:
        """The sum and the samples behind it, (2,) float64; the sum begins anew."""
        found = self._sums.clone()
        self._sums.zero_()
        return found


def measured_as(name: str, found: Tensor, further: str = "") -> StepMetrics:
    """The metrics of the network `name`, from what `LossSum.taken` gave.

    Args:
        name: the network.
        found: (3,), or (5,) with what `FurtherSum.taken` gave after it.
        further: name of the further sum, where there is one.
    """
    loss, valid, bad, *more = found.unbind()
    sums, counts = {f"{name}_loss": loss}, {f"{name}_loss": valid}
    if further:
        sums[f"{further}_loss"], counts[f"{further}_loss"] = more
    return StepMetrics(sums, counts, {name: bad})
