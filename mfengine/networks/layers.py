"""Layers shared by several networks. They take tensors, or duals that carry the tangents of the last rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from mfengine import ops
from mfengine.networks.base import NetworkConfig
from mfengine.ops.dual import A

TIME_FEATURES = 256  # sinusoidal features of a time, the input of its MLP


@dataclass(frozen=True)
class TransformerConfig(NetworkConfig):
    """Architecture of a transformer over patches of a latent."""

    input_size: int = 32
    """height and width of a latent"""
    patch_size: int = 2
    """height and width of a patch; it divides input_size"""
    in_channels: int = 4
    """channels of a latent"""
    hidden_size: int = 1152
    """width of the residual stream; num_heads divides it"""
    depth: int = 28
    """number of blocks"""
    num_heads: int = 16
    """attention heads"""
    num_classes: int = 1000
    """number of labels; the null class is index num_classes"""

    def __post_init__(self) -> None:
        for name in ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size {self.input_size} is not a multiple of patch_size {self.patch_size}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return (self.in_channels, self.input_size, self.input_size)

    def for_latents(self, shape: tuple[int, int, int], num_classes: int) -> Self:
        channels, height, width = shape
        if height != width:
            raise ValueError(f"latents must be square, not {height} x {width}")
        return replace(self, in_channels=channels, input_size=height, num_classes=num_classes)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def num_tokens(self) -> int:
        return (self.input_size // self.patch_size) ** 2


class Linear(nn.Linear):
    """A linear layer computed in the dtype of its input; its parameters keep their dtype."""

    def forward(self, x: A) -> A:
        return ops.linear(x, self.weight, self.bias)


class SiLU(nn.Module):
    def forward(self, x: A) -> A:
        return ops.silu(x)


class PatchEmbed(nn.Module):
    """Latents to tokens: a convolution with stride equal to kernel size, done as one matrix product."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        patch = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, kernel_size=patch, stride=patch)
        self.patch_size = patch

    def forward(self, z: A) -> A:
        patches = ops.linear_map(self._patchify, z)  # (B, N, C * p * p)
        return ops.linear(patches, self.proj.weight.flatten(1), self.proj.bias)  # (B, N, D)

    def _patchify(self, z: Tensor) -> Tensor:
        batch, channels, size, _ = z.shape
        p = self.patch_size
        grid = size // p
        z = z.view(batch, channels, grid, p, grid, p).permute(0, 2, 4, 1, 3, 5)  # (B, g, g, C, p, p)
        return z.reshape(batch, grid * grid, channels * p * p)


class TimestepEmbedder(nn.Module):
    """A time in [0, 1] to a vector, always in float32: bf16 cannot distinguish neighbouring times."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(Linear(TIME_FEATURES, hidden_size), SiLU(), Linear(hidden_size, hidden_size))

    def forward(self, t: A) -> A:
        return self.mlp(ops.sinusoid(t, TIME_FEATURES))


class LabelEmbedder(nn.Module):
    """A label, or the null class, to a vector."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


def unpatchify(patches: Tensor, config: TransformerConfig, dtype: torch.dtype) -> Tensor:
    """Patches (B * N, p * p * C) or (B, N, p * p * C) to latents (B, C, H, W)."""
    p, channels, size = config.patch_size, config.in_channels, config.input_size
    grid = size // p
    batch = patches.numel() // (channels * size * size)
    x = patches.reshape(batch, grid, grid, p, p, channels).permute(0, 5, 1, 3, 2, 4)  # (B, C, g, p, g, p)
    return x.reshape(batch, channels, size, size).to(dtype)
