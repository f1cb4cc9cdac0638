"""What an objective must offer, so that the engine can train with it and sample without knowing it by name."""

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
        """ValueError unless a local batch may have so many rows; a multiple of such a number is one, too."""


class Metrics(dict[str, Tensor]):
    """Scalars of one loss by name, to log or print; `metrics[name]` finds whole tensors, too, which stand apart.

    Args:
        scalars: () each. Detached here.
        tensors: whole ones and those of rows, (B,). Detached here.
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
    """What a run logs of one local batch: means, as sums that add up over passes, ranks and steps."""

    sums: Tensor  # (n,) float32 on the device, the first of the loss
    weights: dict[str, float]
    """by the name of each, how much it is the sum of: 1 of what is a mean already, the number of rows else"""


class Objective(ABC):
    """Draws, loss and sampling. To be found by name, it is put into `mfengine.methods.OBJECTIVES`.

    The engine counts FLOPs, memory and communication of a step by calling these on meta tensors.

    Args:
        config: the settings, a `Config`.
    """

    Config: ClassVar[type[ObjectiveConfig]]
    scalars: ClassVar[tuple[str, ...]] = ()
    """metrics whose means a run logs beside the loss; the first is the one to watch"""

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def conditions(self) -> dict[str, float]:
        """What `sample` takes beside labels, by name, and the values that it takes when none are given."""
        return {}

    @abstractmethod
    def draw(
        self, shape: tuple[int, ...] | torch.Size, generator: torch.Generator, device: torch.device | str = "cpu"
    ) -> Any:
        """All that is random in one step on latents (B, C, H, W).

        Args:
            shape: (B, C, H, W).
            generator: a host generator.
            device: of the latents; of the meta device where the engine counts.
        """

    @abstractmethod
    def loss(self, model: Any, latents: Tensor, labels: Tensor, draws: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of one local batch, a scalar with a graph, and detached metrics by name, as `Metrics`, say.

        Calls of the network come in one sequence whatever was drawn, because ranks that share it gather together.

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
            draws: that they are of.
        """
        means = [loss.detach(), *(metrics[name].mean() for name in self.scalars)]
        return Health(torch.stack(means), dict.fromkeys(("loss", *self.scalars), 1.0))

    @abstractmethod
    def sample(self, model: Any, noise: Tensor, labels: Tensor, steps: int = 1) -> Tensor:
        """Latents (B, C, H, W) from noise of that shape and labels (B,), by so many calls of the network.

        Conditions are further parameters, floats with a default.

        Raises:
            ValueError: steps is less than 1.
        """

    def sampler(self, conditions: Mapping[str, float]) -> Sampler:
        """`sample` under these conditions, the others as in `self.conditions`.

        Raises:
            InputError: there is no condition of such a name, or, by objectives that look at values, one is out of
                range.
        """
        for name in conditions:
            choose("condition", name, self.conditions)
        sample: Sampler = partial(self.sample, **{**self.conditions, **conditions})  # type: ignore[arg-type]
        return sample
