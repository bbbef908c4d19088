"""What methods without a student share: one network, the generator, trained by Rectified Adam; consistency models.

Settings and objectives of a method are made from these; its steps are its own.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

from ipfm.engine.checks import share
from ipfm.engine.config import setting
from ipfm.engine.noise_levels import check_sigmas
from ipfm.engine.objectives.base import Distillation, Passes, Role, forwards_of
from ipfm.engine.objectives.initial_networks import generator_network, initial_weights
from ipfm.engine.sampling.batches import sample_generator
from ipfm.models import NetworkConfig, Precond


@dataclass(frozen=True, kw_only=True)
class GeneratorAloneConfig(Distillation):
    """Settings of a method that trains the generator alone."""

    beta1: float = 0.9
    """First decay of Rectified Adam."""

    def __post_init__(self) -> None:
        super().__post_init__()
        share("beta1", self.beta1)
        if self.augment > 0:
            raise ValueError(f"augment must be 0, as no denoiser is trained on images here, got {self.augment:g}")

    @property
    def capturable(self) -> bool:
        """See `RunConfig.capturable`."""
        return True


@dataclass(frozen=True, kw_only=True)
class ConsistencyConfig(GeneratorAloneConfig):
    """Settings of a method whose generator gives an image at any noise level, and is evaluated at some."""

    sigmas: tuple[float, ...] = setting((), memory=False)
    """Noise levels at which the result is evaluated, falling, such as 80 0.821. Default: the largest alone, one
    step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sigmas != ():
            levels = check_sigmas(self.sigmas)
            if levels[0] > self.noise.sigma_max or levels[-1] < self.noise.sigma_min:
                raise ValueError(
                    f"sigmas must lie between sigma-min and sigma-max, {self.noise.sigma_min:g} and "
                    f"{self.noise.sigma_max:g}, got {', '.join(f'{level:g}' for level in levels)}"
                )
            object.__setattr__(self, "sigmas", levels)

    @property
    def levels(self) -> tuple[float, ...]:
        """The generator's noise levels, resolved."""
        return self.sigmas or (self.noise.sigma_max,)

    @classmethod
    def nfe_of(cls, settings: Mapping[str, Any]) -> int | None:
        """See `Distillation.nfe_of`."""
        return len(settings.get("sigmas") or (0,))


S = TypeVar("S", bound=GeneratorAloneConfig)
C = TypeVar("C", bound=ConsistencyConfig)


class GeneratorAlone(Generic[S]):
    """See `Objective`. One network, trained by Rectified Adam.

    Args:
        config: settings, D among them.
        network: the teacher's architecture, as it is trained.
    """

    generator = "generator"

    def __init__(self, config: S, network: NetworkConfig) -> None:
        self.config, self.network = config, network
        self.D = network.D if config.D is None else config.D
        self.roles: tuple[Role, ...] = (
            Role(
                self.generator,
                generator_network(network, config.width),
                initial_weights(config.init, config.width),
                config.lr,
                config.beta1,
                rectified=True,
                averaged=True,
                lora=config.lora_of(self.generator),
            ),
        )

    @abstractmethod
    def passes(self, *, phased: bool) -> Mapping[str, Passes]:
        """See `Objective.forwards`."""

    def forwards(self, *, phased: bool, checkpointed: bool) -> int:
        """See `Objective.forwards`."""
        return forwards_of(self.passes(phased=phased), checkpointed=checkpointed)


class ConsistencyModel(GeneratorAlone[C]):
    """The same, of a generator that is evaluated at the settings' levels."""

    def __init__(self, config: C, network: NetworkConfig) -> None:
        super().__init__(config, network)
        self.nfe = len(config.levels)

    @property
    def facts(self) -> Mapping[str, Any]:
        """See `Objective.facts`."""
        return {"sigmas": list(self.config.levels)}

    def sample(self, net: Precond, first: int, count: int, *, seed: int) -> Tensor:
        """See `Objective.sample`."""
        return sample_generator(net, first, count, D=self.D, sigmas=self.config.levels, seed=seed)
