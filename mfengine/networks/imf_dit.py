"""The network of improved MeanFlow (Geng et al., arXiv 2512.02012): it predicts two velocities and takes guidance.

A trunk of transformer blocks ends in two heads of blocks: one for the average velocity u, one for the velocity v.
Conditions are tokens before the patches, and h = t - r is the only time. Blocks have RMSNorm, rotary positions,
normalised queries and keys, SwiGLU, and a learned gate for each channel of their branches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from mfengine import ops
from mfengine.networks.base import Converted, Network, ShardUnit
from mfengine.networks.convert import from_imf, to_imf
from mfengine.networks.layers import (
    LabelEmbedder,
    Linear,
    PatchEmbed,
    TimestepEmbedder,
    TransformerConfig,
    unpatchify,
)
from mfengine.ops.dual import A, Dual, primal_of, push

MULTIPLE = 64  # matrix products pad the hidden width of a SwiGLU to a multiple of it: 2730 is not even one of 8
GAIN = 0.32  # for the initialisation of blocks

Heads = Literal["uv", "u", "v"]


@dataclass(frozen=True)
class IMFDiTConfig(TransformerConfig):
    """Architecture of an `IMFDiT`. Its head dim must be even."""

    hidden_size: int = 1024
    """width of the residual stream; num_heads divides it"""
    depth: int = 48
    """number of blocks on the way to a velocity: trunk plus one head"""
    head_depth: int = 8
    """number of blocks of each head, less than depth"""
    class_tokens: int = 8
    """tokens of the label, which come first"""
    omega_tokens: int = 4
    """tokens of the guidance weight"""
    interval_tokens: int = 2
    """tokens of each end of the guidance interval"""
    time_tokens: int = 4
    """tokens of h"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.head_depth < self.depth:
            raise ValueError(
                f"head_depth must be at least 1 and less than the depth {self.depth}, not {self.head_depth}"
            )
        for name in ("class_tokens", "omega_tokens", "interval_tokens", "time_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.head_dim % 2:
            raise ValueError(f"hidden_size / num_heads is {self.head_dim}; rotary positions need an even number")

    @property
    def num_prefix(self) -> int:
        """Number of condition tokens, which precede the patches: label, omega, t_min, t_max, h."""
        return self.class_tokens + self.omega_tokens + 2 * self.interval_tokens + self.time_tokens

    @property
    def num_tokens(self) -> int:
        return self.num_prefix + super().num_tokens

    @property
    def mlp_size(self) -> int:
        """Hidden width of a block's SwiGLU."""
        return int(self.hidden_size * 8 / 3)


# ----------------------------------------------------------------------------
# Blocks.


class RMSNorm(nn.Module):
    """The weight of a norm. The module that owns it computes the norm, fused with the gated residual or with RoPE."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class Attention(nn.Module):
    """Attention between all tokens of a sample, projected for all tokens, or in the last block for the patch tokens."""

    def __init__(self, config: IMFDiTConfig, last: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads, self.num_tokens = config.num_heads, config.num_tokens
        self.num_outputs = config.num_tokens - config.num_prefix if last else config.num_tokens
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(width, width, bias=False) for _ in range(4))
        self.q_norm, self.k_norm = RMSNorm(config.head_dim), RMSNorm(config.head_dim)

    def forward(self, x: A) -> A:
        qkv: Any = ops.packed_linear(x, (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight))
        o = ops.rotary_attention(qkv, self.q_norm.weight, self.k_norm.weight, self.num_heads, self.num_tokens)
        return self.out_proj(ops.last_tokens(o, self.num_tokens, self.num_outputs))


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: IMFDiTConfig) -> None:
        super().__init__()
        self.w1 = Linear(config.hidden_size, config.mlp_size, bias=False)
        self.w3 = Linear(config.hidden_size, config.mlp_size, bias=False)
        self.w2 = Linear(config.mlp_size, config.hidden_size, bias=False)

    def forward(self, x: A) -> A:
        hidden = ops.swiglu(ops.packed_linear(x, (self.w1.weight, self.w3.weight), MULTIPLE))
        return ops.packed_linear(hidden, (self.w2.weight,), in_multiple=MULTIPLE)


class Block(nn.Module):
    """Transformer block: x + g1 * attention(norm(x)), then x + g2 * SwiGLU(norm(x)).

    As in `mfengine.networks.dit.Block`, the last branch and its gate are returned, and the next norm adds them.

    Args:
        config: architecture of the network.
        compute_dtype: dtype of the matrix products.
        last: whether this is the last block of a head. A head needs only the patch tokens, so only their
            attention is projected, and only they go through the SwiGLU and are returned.
    """

    def __init__(self, config: IMFDiTConfig, compute_dtype: torch.dtype, last: bool = False) -> None:
        super().__init__()
        width = config.hidden_size
        self.compute_dtype = compute_dtype
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.attn, self.mlp = Attention(config, last), SwiGLU(config)
        self.attn_scale, self.mlp_scale = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    @ops.one_node
    def forward(self, x: A, branch: A | None, gate: Tensor | None) -> tuple[A, A, Tensor]:
        """Residual stream x (B * N, D), to which branch (B * N, D) times gate (D,) must still be added."""
        if branch is None or gate is None:  # the first block
            o = ops.rms_norm(x, self.norm1.weight, dtype=self.compute_dtype)
        else:
            x, o = ops.gated_residual_rms_norm(x, branch, gate, self.norm1.weight)
        branch = self.attn(o)
        x = ops.last_tokens(x, self.attn.num_tokens, self.attn.num_outputs)
        x, o = ops.gated_residual_rms_norm(x, branch, self.attn_scale, self.norm2.weight)
        return x, self.mlp(o), ops.clone(self.mlp_scale)  # cloned: FSDP2 frees a gathered parameter after the block


class FinalLayer(nn.Module):
    """Residual stream of the patches, to which a gated branch must still be added, to patches (B * N', p * p * C)."""

    def __init__(self, config: IMFDiTConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size)
        self.linear = Linear(config.hidden_size, config.patch_size**2 * config.in_channels)

    def forward(self, x: A, branch: A, gate: Tensor) -> A:
        _, o = ops.gated_residual_rms_norm(x, branch, gate, self.norm.weight)
        return self.linear(o)


# ----------------------------------------------------------------------------
# The network.


class IMFDiT(Network):
    """Average velocity u and velocity v of z at h = t - r, under guidance omega for times in [t_min, t_max].

    Args:
        config: the architecture.
        compute_dtype: dtype of the matrix products of blocks and patches. Parameters, residual stream, norms,
            softmax and embeddings of conditions are always float32.
    """

    Config = IMFDiTConfig
    takes_tangents = True
    config: IMFDiTConfig

    def __init__(self, config: IMFDiTConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config, compute_dtype)
        width = config.hidden_size
        self.x_embedder = PatchEmbed(config)
        self.h_embedder, self.omega_embedder = TimestepEmbedder(width), TimestepEmbedder(width)
        self.cfg_t_start_embedder, self.cfg_t_end_embedder = TimestepEmbedder(width), TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(config.num_classes, width)

        def tokens(count: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(count, width))

        self.class_tokens, self.omega_tokens = tokens(config.class_tokens), tokens(config.omega_tokens)
        self.t_min_tokens, self.t_max_tokens = tokens(config.interval_tokens), tokens(config.interval_tokens)
        self.time_tokens = tokens(config.time_tokens)

        def head() -> nn.ModuleList:
            last = config.head_depth - 1
            return nn.ModuleList(Block(config, compute_dtype, last=i == last) for i in range(config.head_depth))

        trunk = config.depth - config.head_depth
        self.shared_blocks = nn.ModuleList(Block(config, compute_dtype) for _ in range(trunk))
        self.u_heads, self.v_heads = head(), head()
        self.u_final_layer = FinalLayer(config)
        self.v_final_layer: FinalLayer | None = FinalLayer(config)
        self.initialize_weights()

    def shard_units(self) -> list[ShardUnit]:
        embedders = [
            *(self.h_embedder, self.omega_embedder, self.cfg_t_start_embedder, self.cfg_t_end_embedder),
            self.y_embedder,
        ]
        return [
            *(ShardUnit(embedder, torch.float32, block=False) for embedder in embedders),
            *(ShardUnit(block, self.compute_dtype) for block in (*self.shared_blocks, *self.u_heads, *self.v_heads)),
        ]

    def for_sampling(self) -> Self:
        """The network, in place, without the head of v."""
        self.v_heads = nn.ModuleList()
        self.v_final_layer = None
        return self

    @classmethod
    def convert(cls, checkpoint: Mapping[str, Any], reverse_time: bool) -> Converted:
        if reverse_time:
            raise ValueError("improved MeanFlow has data at t = 0: there is no time to reverse")
        state, unused = from_imf(checkpoint)
        fresh = []
        if not any(name.startswith("v_heads.") for name in state):  # published without the parts for training
            for name, value in [*state.items()]:
                if name.startswith("u_heads."):
                    fresh.append(name.replace("u_heads", "v_heads"))
                    initialize(fresh[-1], state.setdefault(fresh[-1], torch.empty_like(value)))
        return Converted(state, fresh, unused)

    @classmethod
    def to_original(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return to_imf(state_dict)

    def forward(
        self,
        z: Tensor,
        h: Tensor,
        y: Tensor,
        *,
        omega: Tensor,
        t_min: Tensor,
        t_max: Tensor,
        tangents: tuple[Tensor, Tensor] | None = None,
        heads: Heads = "uv",
    ) -> Any:
        """u and v of (z, h, y, omega, t_min, t_max), and with tangents the JVP of u.

        Args:
            z: (B, C, H, W) float, noisy latents.
            h: (B,) float, interval length t - r in [0, 1]; 0 for v of flow matching.
            y: (B,) int64 labels in [0, num_classes]; num_classes is the null class.
            omega: (B,) float, guidance weight, at least 1; it applies to times in [t_min, t_max], (B,) float each.
            tangents: (dz, dh) of the last K <= B rows: (K, C, H, W), (K,). They need both heads.
            heads: which velocities to compute.

        Returns:
            (u, v), each (B, C, H, W) float, or only the one requested; with tangents (u, v, du), where du (K, C, H, W)
            has no graph. v has no tangent.

        Raises:
            ValueError: v is requested after `for_sampling` dropped its head, or tangents for a single head.
        """
        if "v" in heads and self.v_final_layer is None:
            raise ValueError('this network is for sampling and has no head for v: call it with heads="u"')
        if tangents is not None and heads != "uv":
            raise ValueError(f"tangents need both heads, not {heads}")
        pair: tuple[Any, Any] = (z, h) if tangents is None else (Dual(z, tangents[0]), Dual(h, tangents[1]))
        trunk: Any = self._tokens(*pair, y, omega, t_min, t_max), None, None
        for block in self.shared_blocks:
            trunk = block(*trunk)
        if heads == "v":
            return self._head(trunk, self.v_heads, self.v_final_layer)
        u = self._head(trunk, self.u_heads, self.u_final_layer)
        if heads == "u":
            return u
        x, branch, gate = trunk
        v = self._head((primal_of(x), primal_of(branch), gate), self.v_heads, self.v_final_layer)
        return (u, v) if tangents is None else (u.primal, v, u.tangent)

    def _tokens(self, z: A, h: A, y: Tensor, omega: Tensor, t_min: Tensor, t_max: Tensor) -> A:
        """Initial residual stream (B * N, D), in the dtype of the conditions."""
        conditions = (
            (self.class_tokens, self.y_embedder(y)),
            (self.omega_tokens, self.omega_embedder(1 - 1 / omega)),
            (self.t_min_tokens, self.cfg_t_start_embedder(t_min)),
            (self.t_max_tokens, self.cfg_t_end_embedder(t_max)),
        )
        fixed = torch.cat([tokens + embedding[:, None] for tokens, embedding in conditions], 1)
        time = ops.linear_map(lambda h: h[:, None].expand(-1, len(self.time_tokens), -1), self.h_embedder(h))
        time = ops.add(time, self.time_tokens)
        x = self.x_embedder(ops.linear_map(lambda z: z.to(self.compute_dtype), z))
        x = ops.linear_map(lambda x: x.to(fixed.dtype), x)
        return ops.linear_map(lambda x: x.flatten(0, 1), push(_join, _join_tangents, fixed, time, x))

    def _head(self, trunk: tuple[Any, ...], blocks: nn.ModuleList, final: Any) -> Any:
        for block in blocks:
            trunk = block(*trunk)
        dtype = primal_of(trunk[0]).dtype
        return ops.linear_map(partial(unpatchify, config=self.config, dtype=dtype), final(*trunk))

    def initialize_weights(self) -> None:
        for name, p in self.named_parameters():
            initialize(name, p)


@torch.no_grad()
def initialize(name: str, p: Tensor) -> None:
    """Initialise a parameter by its name, as in the authors' code: zero gates, outputs and biases, normal weights."""
    module, _, kind = name.rpartition(".")
    if module.endswith(("norm", "norm1", "norm2")):
        nn.init.ones_(p)
    elif kind == "bias" or kind.endswith("_scale") or module.endswith("final_layer.linear"):
        nn.init.zeros_(p)
    elif module == "x_embedder.proj":
        nn.init.xavier_uniform_(p.view(len(p), -1))
    else:
        nn.init.normal_(p, std=(GAIN if "attn" in module or "mlp.w" in module else 1) / math.sqrt(p.shape[-1]))


def _join(*parts: Tensor) -> Tensor:
    return torch.cat(parts, 1)


def _join_tangents(*parts: Tensor) -> Tensor:
    return torch.cat(parts[len(parts) // 2 :], 1)
