"""The usual PyTorch port of MeanFlow (Geng et al., arXiv 2505.13447), written from the paper as a baseline.

It is what a competent port on one GPU looks like: a DiT of stock modules under autocast; guidance by network passes
without gradient, for the rows it applies to; u and du/dt of all rows from one `torch.func.jvp`, u with its graph.

In F, the FLOPs of one forward pass of one sample: primal and its backward 3, tangent 2, guidance about 1.5. The tangent
is not 1 because PyTorch's JVP of `nn.Linear` also multiplies the input by the zero tangent of the weight, both eager
and compiled (torch 2.13). Ports that run the network once more for u, as for DistributedDataParallel, pay 1 more.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mfengine import Draws, MeanFlowConfig, ModelConfig
from mfengine.device import to_device
from mfengine.methods.meanflow import column
from mfengine.networks.dit import sincos_positions
from mfengine.networks.layers import TIME_FEATURES

# ----------------------------------------------------------------------------
# Attention of queries, keys and values (B, H, N, d).

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v in three operations, all differentiable in forward mode in PyTorch."""
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's fused attention, which has no JVP."""
    return F.scaled_dot_product_attention(q, k, v)


def math_sdpa(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """PyTorch's attention with the scores in memory, which has a JVP; for grouped queries, too."""
    with sdpa_kernel(SDPBackend.MATH):
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=grouped)


def jvp_flash_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """Fused attention with a JVP, from the package `jvp_flash_attention` (0.14); needs a GPU and an even N >= 32.

    Its head dims are powers of two from 16 to 256; others are padded with zeros, which changes nothing. A mask is
    expanded to all heads, but not inspected, because the host would wait for that.

    Raises:
        ImportError: the package is not installed.
    """
    from jvp_flash_attention.jvp_attention import JVPAttn

    dim = q.shape[-1]
    padding = max(16, 1 << (dim - 1).bit_length()) - dim
    q, k, v = (F.pad(x, (0, padding)) for x in (q, k, v))
    mask = None if mask is None else mask.expand(*q.shape[:3], k.shape[2]).contiguous()
    o = JVPAttn.fwd_dual(q, k, v, mask, causal=is_causal, sm_scale=dim**-0.5, verify_attn_mask=False)
    return o[..., :dim]


# ----------------------------------------------------------------------------
# The network: DiT (Peebles and Xie, arXiv 2212.09748) with a second time embedder.


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, N, D), shift and scale (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class PatchEmbed(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        patch = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, kernel_size=patch, stride=patch)

    def forward(self, z: Tensor) -> Tensor:
        return self.proj(z).flatten(2).transpose(1, 2)  # (B, D, g, g) -> (B, N, D)


class TimestepEmbedder(nn.Module):
    frequencies: Tensor

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FEATURES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        half = TIME_FEATURES // 2
        self.register_buffer("frequencies", 10_000.0 ** -(torch.arange(half) / half), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angle = t[:, None] * self.frequencies
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))


class LabelEmbedder(nn.Module):
    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class Attention(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, d) each
        return self.proj(attend(q, k, v).transpose(1, 2).reshape(batch, tokens, width))


class MLP(nn.Module):
    def __init__(self, hidden_size: int, mlp_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_size)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(mlp_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, config.num_heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = MLP(width, int(width * config.mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor, attend: Attend) -> Tensor:
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_attn[:, None] * self.attn(modulate(self.norm1(x), shift_attn, scale_attn), attend)
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(config.hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(config.hidden_size, config.patch_size**2 * config.in_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden_size, 2 * config.hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class PortDiT(nn.Module):
    """u(z, t, h, y) with the parameter names of `mfengine.DiT`, so that both load the same state dict.

    Args:
        config: the architecture.
    """

    pos_embed: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = TimestepEmbedder(config.hidden_size)
        self.h_embedder = TimestepEmbedder(config.hidden_size)
        self.y_embedder = LabelEmbedder(config.num_classes, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        positions = sincos_positions(config.hidden_size, config.input_size // config.patch_size)
        self.register_buffer("pos_embed", positions, persistent=False)  # (N, D)

    def forward(self, z: Tensor, t: Tensor, h: Tensor, y: Tensor, attend: Attend) -> Tensor:
        """z (B, C, H, W), t and h (B,), y (B,) int64, the attention to use -> u (B, C, H, W)."""
        x = self.x_embedder(z) + self.pos_embed  # (B, N, D)
        c = self.t_embedder(t) + self.h_embedder(h) + self.y_embedder(y)  # (B, D)
        for block in self.blocks:
            x = block(x, c, attend)
        return self.unpatchify(self.final_layer(x, c))

    def unpatchify(self, patches: Tensor) -> Tensor:
        p, channels, size = self.config.patch_size, self.config.in_channels, self.config.input_size
        grid = size // p
        x = patches.reshape(-1, grid, grid, p, p, channels).permute(0, 5, 1, 3, 2, 4)  # (B, C, g, p, g, p)
        return x.reshape(-1, channels, size, size)


# ----------------------------------------------------------------------------
# The loss (arXiv 2505.13447, algorithm 1 and section 4.2).


class Port:
    """Loss of MeanFlow training by `torch.func.jvp`.

    Args:
        config: the objective's settings.
        compute_dtype: dtype of autocast; float32 means no autocast.
        jvp_attention: attention inside the JVP.
        attention: attention without a JVP, in guidance passes and in plain flow matching.
        compiled: use `torch.compile` for the function that calls `torch.func.jvp`, and for the passes without a JVP.
            The number of guided rows changes from step to step, so the second step compiles the latter once more.
    """

    def __init__(
        self,
        config: MeanFlowConfig,
        compute_dtype: torch.dtype = torch.float32,
        jvp_attention: Attend = plain_attention,
        attention: Attend = plain_attention,
        compiled: bool = False,
    ) -> None:
        self.config = config
        self.compute_dtype = compute_dtype
        self.jvp_attention = jvp_attention
        self.attention = attention
        compile_ = torch.compile if compiled else lambda f: f
        self.velocity = compile_(self._velocity)
        self.velocity_and_jvp = compile_(self._velocity_and_jvp)

    def loss(self, network: PortDiT, latents: Tensor, labels: Tensor, draws: Draws) -> Tensor:
        """latents (B, C, H, W), labels (B,), draws of `MeanFlow.draw` -> scalar with a graph."""
        cfg, device = self.config, latents.device
        t, r = to_device(draws.t, device), to_device(draws.r, device)
        z = (1 - column(t)) * latents + column(t) * draws.noise
        v = draws.noise - latents
        y = labels.clone()
        y[: draws.num_dropped] = network.config.num_classes
        v_g = self.guided_velocity(network, z, t, y, v, draws)
        if cfg.interval_share:
            u, du_dt = self.velocity_and_jvp(network, z, t, r, y, v_g)
            u_tgt = v_g - column(t - r) * du_dt
        else:
            u, u_tgt = self.velocity(network, z, t, y), v_g
        error = (u - u_tgt).square().flatten(1).sum(1)  # (B,)
        return (error / (error.detach() + cfg.norm_eps) ** cfg.norm_p).mean()

    @torch.no_grad()
    def guided_velocity(self, network: PortDiT, z: Tensor, t: Tensor, y: Tensor, v: Tensor, draws: Draws) -> Tensor:
        """v_g = omega v + (1 - omega - kappa) u(z, t, 0, null) + kappa u(z, t, 0, y) if guidance applies, else v.

        Terms with weight zero are omitted; the others are one pass over twice the rows.
        """
        cfg = self.config
        if not cfg.guided:
            return v
        applies = (draws.t >= cfg.t_start) & (draws.t <= cfg.t_end)
        applies[: draws.num_dropped] = False
        rows = to_device(applies.nonzero()[:, 0], z.device)  # computed on the host, so nothing waits for the device
        terms = [
            (weight, labels)
            for weight, labels in (
                (1 - cfg.omega - cfg.kappa, torch.full_like(rows, network.config.num_classes)),
                (cfg.kappa, y[rows]),
            )
            if weight
        ]
        repeated = rows.repeat(len(terms))
        u = self.velocity(network, z[repeated], t[repeated], torch.cat([labels for _, labels in terms]))
        guided = cfg.omega * v[rows]
        for (weight, _), term in zip(terms, u.chunk(len(terms)), strict=True):
            guided += weight * term
        return v.index_copy(0, rows, guided)

    def _velocity(self, network: PortDiT, z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Instantaneous velocity u(z, t, 0, y)."""
        with self.autocast(z):
            return network(z, t, torch.zeros_like(t), y, self.attention).float()

    def _velocity_and_jvp(
        self, network: PortDiT, z: Tensor, t: Tensor, r: Tensor, y: Tensor, v_g: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Average velocity u and du/dt, its JVP along (v_g, 1, 0) in (z, t, r)."""

        def u(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
            # An autocast region caches its casts of the weights. If guidance shared this region, casts made without
            # gradient would be reused.
            with self.autocast(z):
                return network(z, t, t - r, y, self.jvp_attention).float()

        # When compiled, a du/dt that left this function with its graph would be differentiated, which fails (torch
        # 2.13).
        tangents = (v_g, torch.ones_like(t), torch.zeros_like(r))
        primal, du_dt = torch.func.jvp(u, (z, t, r), tangents)  # type: ignore[misc]
        return primal, du_dt.detach()

    def autocast(self, z: Tensor) -> AbstractContextManager[None]:
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(z.device.type, self.compute_dtype)
