"""What a network must offer, so that the engine can train, shard, sample and export it without knowing it by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn


class NetworkConfig(ABC):
    """Architecture of a `Network`, a frozen dataclass: options `--model.NAME`, written into every checkpoint."""

    num_classes: int  # the null class is index num_classes

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents that it takes."""

    def for_latents(self, shape: tuple[int, int, int], num_classes: int) -> Self:
        """The same architecture for latents (C, H, W) of so many classes; itself if it takes no others.

        Raises:
            ValueError: the architecture does not take such latents.
        """
        return self

    @property
    def head_dim(self) -> int | None:
        """Channels of an attention head, where `mfengine.ops` computes attention."""
        return None


class ShardUnit(NamedTuple):
    """A module whose parameters are gathered and freed together."""

    module: nn.Module
    dtype: torch.dtype  # that its parameters are gathered in
    block: bool = True  # compiled, and recomputed in the backward, if the run asks for it


class Converted(NamedTuple):
    """What became of another project's checkpoint."""

    state_dict: dict[str, Tensor]  # complete, for load_state_dict
    fresh: list[str]  # parameters the checkpoint did not have
    unused: list[str]  # entries of the checkpoint that the network has no place for


class Network(nn.Module):
    """A network of latents z (B, C, H, W), labels y (B,) and whatever else its objective gives it.

    Its state dict holds parameters alone, float32. It also runs on meta tensors, on which the engine counts what a run
    takes. To be found by name, it is put into `mfengine.networks.NETWORKS`.

    Args:
        config: the architecture, a `Config`.
        compute_dtype: dtype of most matrix products.
    """

    Config: ClassVar[type[NetworkConfig]]
    takes_tangents: ClassVar[bool] = False
    """whether forward takes `tangents` and returns their JVP; any other network goes through `torch.func.jvp`"""

    def __init__(self, config: Any, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype

    @property
    def num_classes(self) -> int:
        """Number of labels, and the index of the null class."""
        return self.config.num_classes

    def shard_units(self) -> list[ShardUnit]:
        """Units in the order of their use; parameters outside of all are one more, in the compute dtype."""
        return []

    def for_sampling(self) -> Self:
        """The network without what only training uses, in place: an export holds what is left."""
        return self

    @classmethod
    def convert(cls, checkpoint: Mapping[str, Any], reverse_time: bool) -> Converted:
        """Another project's checkpoint as a state dict, for `--init`.

        Args:
            checkpoint: as `torch.load` gives it.
            reverse_time: it has data at t = 1 and predicts data minus noise.

        Raises:
            ValueError: the network has no place for such weights.
        """
        raise ValueError(f"{cls.__name__} takes no weights of other projects")

    @classmethod
    def to_original(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict for sampling in the form of the project that publishes such networks: what a .pth holds.

        Raises:
            ValueError: there is no such form.
        """
        raise ValueError(f"{cls.__name__} has no other form than ours: export it as .safetensors")
