"""The network u(z, t, h, y): a DiT with adaLN-zero blocks and two time embedders.

Architecture and initialisation follow DiT (Peebles and Xie, arXiv 2212.09748) as used in the MeanFlow paper
(arXiv 2505.13447): the conditioning is the sum of embeddings of t, of h = t - r and of the label. Every module
takes tensors, or duals that carry the tangents of the last rows (`mfengine.ops.Dual`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mfengine import ops
from mfengine.networks.base import Converted, Network, ShardUnit
from mfengine.networks.convert import from_sit
from mfengine.networks.layers import (
    LabelEmbedder,
    Linear,
    PatchEmbed,
    SiLU,
    TimestepEmbedder,
    TransformerConfig,
    unpatchify,
)
from mfengine.ops.dual import A, Dual


@dataclass(frozen=True)
class ModelConfig(TransformerConfig):
    """Architecture of a `DiT`. Its hidden_size must also be a multiple of 4."""

    mlp_ratio: float = 4.0
    """hidden width of a block's MLP, over hidden_size"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.mlp_ratio * self.hidden_size >= 1:
            raise ValueError(f"mlp_ratio must be positive, not {self.mlp_ratio}")
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of 4, as positions need")


# ----------------------------------------------------------------------------
# Blocks.


class Attention(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int, num_tokens: int) -> None:
        super().__init__()
        self.num_heads, self.num_tokens = num_heads, num_tokens
        self.qkv = Linear(hidden_size, 3 * hidden_size)
        self.proj = Linear(hidden_size, hidden_size)

    def forward(self, x: A) -> A:
        return self.proj(ops.attention_packed(self.qkv(x), self.num_heads, self.num_tokens))


class MLP(nn.Module):
    def __init__(self, hidden_size: int, mlp_size: int) -> None:
        super().__init__()
        self.fc1 = Linear(hidden_size, mlp_size)
        self.fc2 = Linear(mlp_size, hidden_size)

    def forward(self, x: A) -> A:
        return self.fc2(ops.gelu(ops.linear(x, self.fc1.weight), self.fc1.bias))


class Block(nn.Module):
    """adaLN-zero transformer block.

    The block does not add the gated output of its MLP to the residual stream. It returns the output, and the next adaLN
    adds it in its own pass over memory.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.attn = Attention(width, config.num_heads, config.num_tokens)
        self.mlp = MLP(width, int(width * config.mlp_ratio))
        self.adaLN_modulation = nn.Sequential(SiLU(), Linear(width, 6 * width))

    @ops.one_node
    def forward(self, x: A, branch: A | None, gate: A | None, c: A) -> tuple[A, A, A]:
        """Residual stream x (B * N, D), to which branch (B * N, D) times gate (B, D) must still be added; and SiLU(c)
        (B, D) of the conditioning c.
        """
        modulation = self.adaLN_modulation[1](c)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = ops.chunk(modulation, 6)
        x, o = _add_and_modulate(x, branch, gate, shift_attn, scale_attn)
        x, o = ops.gated_residual_adaln(x, self.attn(o), gate_attn, shift_mlp, scale_mlp)
        return x, self.mlp(o), gate_mlp


class FinalLayer(nn.Module):
    """Residual stream, to which a branch must still be added, to patches (B * N, p * p * C)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.linear = Linear(config.hidden_size, config.patch_size**2 * config.in_channels)
        self.adaLN_modulation = nn.Sequential(SiLU(), Linear(config.hidden_size, 2 * config.hidden_size))

    @ops.one_node
    def forward(self, x: A, branch: A | None, gate: A | None, c: A) -> A:
        shift, scale = ops.chunk(self.adaLN_modulation[1](c), 2)
        _, o = _add_and_modulate(x, branch, gate, shift, scale)
        return self.linear(o)


def _add_and_modulate(x: A, branch: A | None, gate: A | None, shift: A, scale: A) -> tuple[A, A]:
    if branch is None or gate is None:  # before the first block
        return x, ops.adaln_modulate(x, shift, scale)
    return ops.gated_residual_adaln(x, branch, gate, shift, scale)


# ----------------------------------------------------------------------------
# The network.


class DiT(Network):
    """Average velocity u(z, t, h, y), h = t - r.

    Args:
        config: the architecture.
        compute_dtype: dtype of the matrix products of blocks and patches. Parameters, residual stream, norms,
            softmax and time embedding are always float32.
    """

    Config = ModelConfig
    takes_tangents = True
    config: ModelConfig
    pos_embed: Tensor

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config, compute_dtype)
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = TimestepEmbedder(config.hidden_size)
        self.h_embedder = TimestepEmbedder(config.hidden_size)
        self.y_embedder = LabelEmbedder(config.num_classes, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        positions = sincos_positions(config.hidden_size, config.input_size // config.patch_size)
        self.register_buffer("pos_embed", positions, persistent=False)  # (N, D)
        self.initialize_weights()

    def shard_units(self) -> list[ShardUnit]:
        embedders = [self.t_embedder, self.h_embedder, self.y_embedder]
        return [
            *(ShardUnit(embedder, torch.float32, block=False) for embedder in embedders),
            *(ShardUnit(block, self.compute_dtype) for block in self.blocks),
        ]

    @classmethod
    def convert(cls, checkpoint: Mapping[str, Any], reverse_time: bool) -> Converted:
        return from_sit(checkpoint, reverse_time)

    def forward(
        self, z: Tensor, t: Tensor, h: Tensor, y: Tensor, tangents: tuple[Tensor, Tensor, Tensor] | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """u(z, t, h, y), and with tangents its JVP.

        Args:
            z: (B, C, H, W) float, noisy latents.
            t, h: (B,) float, time and interval length t - r, both in [0, 1].
            y: (B,) int64 labels in [0, num_classes]; num_classes is the null class.
            tangents: (dz, dt, dh) of the last K <= B rows: (K, C, H, W), (K,), (K,).

        Returns:
            u (B, C, H, W) float; with tangents (u, du), where du (K, C, H, W) has no graph.
        """
        if tangents is None:
            return self._velocity(z, t, h, y)
        dz, dt, dh = tangents
        u = self._velocity(Dual(z, dz), Dual(t, dt), Dual(h, dh), y)
        return u.primal, u.tangent

    def _velocity(self, z: A, t: A, h: A, y: Tensor) -> A:
        c = ops.add(ops.add(self.t_embedder(t), self.h_embedder(h)), self.y_embedder(y))  # (B, D)
        c = ops.silu(ops.linear_map(self._to_compute, c))
        x = self.x_embedder(ops.linear_map(self._to_compute, z))  # (B, N, D)
        x = ops.add(x, self.pos_embed)  # float32, and so is the residual stream
        x = ops.linear_map(lambda x: x.flatten(0, 1), x)  # (B * N, D): tokens are rows from here on
        branch = gate = None
        for block in self.blocks:
            x, branch, gate = block(x, branch, gate, c)
        latents = partial(unpatchify, config=self.config, dtype=self.pos_embed.dtype)  # (B, C, H, W)
        return ops.linear_map(latents, self.final_layer(x, branch, gate, c))

    def _to_compute(self, x: Tensor) -> Tensor:
        return x.to(self.compute_dtype)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Zero adaLN, output and biases, normal(0.02) embedders, Xavier-uniform products, as in the reference code."""
        for name, p in self.named_parameters():
            if name.endswith("bias") or "adaLN_modulation" in name or name.startswith("final_layer"):
                nn.init.zeros_(p)
            elif name.startswith(("t_embedder", "h_embedder", "y_embedder")):
                nn.init.normal_(p, std=0.02)
            else:
                nn.init.xavier_uniform_(p.view(p.shape[0], -1))


def sincos_positions(dim: int, grid: int) -> Tensor:
    """Fixed positions (grid * grid, dim), float32: half of the channels encode the column, half the row (as in MAE)."""
    omega = 10_000.0 ** -(np.arange(dim // 4, dtype=np.float64) / (dim / 4))  # (dim / 4,)

    def encode(position: np.ndarray) -> np.ndarray:  # (grid * grid,) -> (grid * grid, dim / 2)
        angle = np.outer(position, omega)
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)

    row, column = np.meshgrid(np.arange(grid, dtype=np.float64), np.arange(grid, dtype=np.float64), indexing="ij")
    return torch.from_numpy(np.concatenate([encode(column.ravel()), encode(row.ravel())], axis=1)).float()
