"""The interface of objectives. The engine trains and samples through it, without knowing any objective by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from mfengine.configs import choose

Sampler = Callable[[Any, Tensor, Tensor, int], Tensor]
"""(network, noise (B, C, H, W), labels (B,), steps) to latents (B, C, H, W)."""


class ObjectiveConfig:
    """Settings of an `Objective`, a frozen dataclass: options `--method.NAME`, written into every checkpoint."""

    def check_batch(self, rows: int) -> None:
        """ValueError unless a local batch may have this many rows; multiples of a valid number are valid too."""


class Metrics(dict[str, Tensor]):
    """Scalars of one loss by name, to log or print; `metrics[name]` also finds the tensors, which iteration omits.

    Args:
        scalars: () each. Detached here.
        tensors: all others, such as values per row (B,). Detached here.
    """

    tensors: dict[str, Tensor]

    def __init__(self, scalars: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        super().__init__(_detached(scalars))
        self.tensors = _detached(tensors)

    def __missing__(self, name: str) -> Tensor:
        return self.tensors[name]


def _detached(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach() if x.requires_grad else x for name, x in tensors.items()}


class Health(NamedTuple):
    """What a run logs of one local batch: sums and weights, added up over passes, ranks and steps to form means."""

    sums: Tensor  # (n,) float32 on the device, the first of the loss
    weights: dict[str, float]
    """by name, the weight of each sum: 1 if it is already a mean, otherwise the number of rows"""


class Objective(ABC):
    """Draws, loss and sampling. An entry in `mfengine.methods.OBJECTIVES` makes it available by name.

    The engine counts FLOPs, memory and communication of a step by calling these on meta tensors.

    Args:
        config: the settings, a `Config`.
    """

    Config: ClassVar[type[ObjectiveConfig]]
    scalars: ClassVar[tuple[str, ...]] = ()
    """metrics whose means a run logs in addition to the loss; the progress bar shows the first"""

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def conditions(self) -> dict[str, float]:
        """Conditions that `sample` takes in addition to labels: names and default values."""
        return {}

    @abstractmethod
    def draw(
        self, shape: tuple[int, ...] | torch.Size, generator: torch.Generator, device: torch.device | str = "cpu"
    ) -> Any:
        """Draw everything random in one step on latents (B, C, H, W).

        Args:
            shape: (B, C, H, W).
            generator: a host generator.
            device: of the latents; the meta device when the engine counts FLOPs or memory.
        """

    @abstractmethod
    def loss(self, model: Any, latents: Tensor, labels: Tensor, draws: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of one local batch, a scalar with a graph, and detached metrics by name, for example a `Metrics`.

        The sequence of network calls must not depend on the draws: ranks that share a network gather it together.

        Args:
            model: the network.
            latents: (B, C, H, W) float32, clean.
            labels: (B,) int64.
            draws: of `draw`.
        """

    def health(self, loss: Tensor, metrics: Mapping[str, Tensor], draws: Any) -> Health:
        """What a run logs of one local batch. The host does not wait for the device.

        Args:
            loss, metrics: of `loss`.
            draws: of the same batch.
        """
        means = [loss.detach(), *(metrics[name].mean() for name in self.scalars)]
        return Health(torch.stack(means), dict.fromkeys(("loss", *self.scalars), 1.0))

    @abstractmethod
    def sample(self, model: Any, noise: Tensor, labels: Tensor, steps: int = 1) -> Tensor:
        """Latents (B, C, H, W) from noise of the same shape and labels (B,), in `steps` calls of the network.

        Conditions are additional parameters: floats with a default.

        Raises:
            ValueError: steps is less than 1.
        """

    def sampler(self, conditions: Mapping[str, float]) -> Sampler:
        """`sample` with these conditions; the others have the values of `self.conditions`.

        Raises:
            InputError: a condition is unknown, or an objective that checks values finds one out of range.
        """
        for name in conditions:
            choose("condition", name, self.conditions)
        sample: Sampler = partial(self.sample, **{**self.conditions, **conditions})  # type: ignore[arg-type]
        return sample
