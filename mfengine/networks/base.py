"""The interface of a network. Through it the engine trains, shards, samples and exports any network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn


class NetworkConfig(ABC):
    """Architecture of a `Network`: a frozen dataclass that gives options `--model.NAME` and goes into checkpoints."""

    num_classes: int  # the null class is index num_classes

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents."""

    def for_latents(self, shape: tuple[int, int, int], num_classes: int) -> Self:
        """The same architecture for latents (C, H, W) and this many classes; itself if it takes only its own.

        Raises:
            ValueError: the architecture does not take such latents.
        """
        return self

    @property
    def head_dim(self) -> int | None:
        """Channels of an attention head, if `mfengine.ops` computes the attention."""
        return None


class ShardUnit(NamedTuple):
    """A module whose parameters are gathered and freed together."""

    module: nn.Module
    dtype: torch.dtype  # of the gathered parameters
    block: bool = True  # whether the run may compile it and recompute it in the backward


class Converted(NamedTuple):
    """The result of converting another project's checkpoint."""

    state_dict: dict[str, Tensor]  # complete, for load_state_dict
    fresh: list[str]  # parameters that the checkpoint lacks
    unused: list[str]  # entries of the checkpoint that the network lacks


class Network(nn.Module):
    """A network of latents z (B, C, H, W), labels y (B,) and other inputs from its objective.

    Its state dict holds only parameters, float32. It also runs on meta tensors, on which the engine counts the cost of
    a run. Put it into `mfengine.networks.NETWORKS` to select it by name.

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
        """Units in the order of their use. All parameters outside them form one more, in the compute dtype."""
        return []

    def for_sampling(self) -> Self:
        """The network, in place, without the parts that only training uses; an export holds the rest."""
        return self

    @classmethod
    def convert(cls, checkpoint: Mapping[str, Any], reverse_time: bool) -> Converted:
        """Another project's checkpoint as a state dict, for `--init`.

        Args:
            checkpoint: as returned by `torch.load`.
            reverse_time: the checkpoint has data at t = 1 and predicts data minus noise.

        Raises:
            ValueError: the network cannot take such weights.
        """
        raise ValueError(f"{cls.__name__} cannot take weights of other projects")

    @classmethod
    def to_original(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict for sampling in the original project's format, for a .pth file.

        Raises:
            ValueError: there is no such format.
        """
        raise ValueError(f"{cls.__name__} has no format but ours: export it as .safetensors")
