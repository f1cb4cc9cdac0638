"""The training step as benchmarks run it: random latents, real draws, model, loss, backward, AdamW and EMA.

One step of ours and of each peer, from the same weights, on the same batches and draws.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines.port import Port, PortDiT, jvp_flash_attention, sdpa
from mfengine import DiT, Draws, MeanFlow, MeanFlowConfig, ModelConfig
from mfengine.engine.config import PRESETS, OptimConfig
from mfengine.engine.optim import EMA, adamw

OBJECTIVES: dict[str, MeanFlowConfig] = {
    "flow matching": MeanFlowConfig(interval_share=0.0),
    "unguided": MeanFlowConfig(),
    "guided": PRESETS["xl2"][1].method,
}


Update = Callable[[Tensor, Tensor, Draws], None]  # latents (B, C, H, W), labels (B,), draws: one optimizer step


def engine_update(model: DiT, objective: MeanFlowConfig) -> Update:
    """mfengine's step."""
    optimizer, ema = adamw(model, OptimConfig()), EMA(model, (0.9999,))
    method = MeanFlow(objective)

    def update(latents: Tensor, labels: Tensor, draws: Draws) -> None:
        loss, _ = method.loss(model, latents, labels, draws)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    return update


def port_update(model: DiT, objective: MeanFlowConfig, **options: Any) -> Update:
    """A port's step, with `Port`'s options: stock fused AdamW, and EMA over lists of parameters."""
    port = Port(objective, model.compute_dtype, **options)
    network = PortDiT(model.config).to(model.pos_embed.device)
    network.load_state_dict(model.state_dict())
    parameters: list[Tensor] = list(network.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def update(latents: Tensor, labels: Tensor, draws: Draws) -> None:
        port.loss(network, latents, labels, draws).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1e-4)

    return update


IMPLEMENTATIONS: dict[str, Callable[[DiT, MeanFlowConfig], Update]] = {
    "mfengine": engine_update,
    "port": port_update,
    "port SDPA": partial(port_update, attention=sdpa),
    "port compiled": partial(port_update, compiled=True),
    "port SDPA compiled": partial(port_update, attention=sdpa, compiled=True),
    "port jvp_flash_attention": partial(port_update, attention=sdpa, jvp_attention=jvp_flash_attention),
}


def training_step(
    model_config: ModelConfig,
    objective: MeanFlowConfig,
    batch: int,
    device: torch.device,
    compute_dtype: torch.dtype,
    num_inputs: int = 4,
    implementation: str = "mfengine",
) -> Callable[[], None]:
    """A function that does one optimizer step of one of IMPLEMENTATIONS, on `num_inputs` batches in turn."""
    torch.manual_seed(0)
    model = DiT(model_config, compute_dtype).to(device)
    with torch.no_grad():
        for p in model.parameters():  # adaLN-zero would make every output zero
            p.add_(0.02 * torch.randn_like(p))
    update = IMPLEMENTATIONS[implementation](model, objective)
    method = MeanFlow(objective)
    generator = torch.Generator().manual_seed(0)
    shape = (batch, model_config.in_channels, model_config.input_size, model_config.input_size)
    latents = [torch.randn(shape, generator=generator).to(device) for _ in range(num_inputs)]
    labels = [torch.randint(model_config.num_classes, (batch,), generator=generator).to(device) for _ in latents]
    draws = [method.draw(shape, generator, device) for _ in latents]
    turn = 0

    def step() -> None:
        nonlocal turn
        i, turn = turn % num_inputs, turn + 1
        update(latents[i], labels[i], draws[i])

    return step


def forward_flops(config: ModelConfig) -> float:
    """F: FLOPs of the matrix products of one forward pass of one sample."""
    d, n = config.hidden_size, config.num_tokens
    mlp = int(d * config.mlp_ratio)
    patch = config.patch_size**2 * config.in_channels
    per_token = config.depth * 2 * (4 * d * d + 2 * d * mlp) + 2 * 2 * patch * d
    attention = config.depth * 2 * 2 * n * n * d
    conditioning = config.depth * 2 * 6 * d * d + 2 * 2 * d * d + 2 * 2 * (256 * d + d * d)
    return n * per_token + attention + conditioning


def small(config: ModelConfig) -> ModelConfig:
    """The same network, narrow and shallow, for a machine without a GPU."""
    return dataclasses.replace(config, hidden_size=128, depth=2, num_heads=4, input_size=16)
