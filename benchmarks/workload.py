"""The training step as benchmarks run it: random latents, real draws, model, loss, backward, AdamW and EMA."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from mfengine import DiT, MeanFlow, MeanFlowConfig, ModelConfig
from mfengine.engine.config import PRESETS, OptimConfig
from mfengine.engine.optim import EMA, adamw

OBJECTIVES: dict[str, MeanFlowConfig] = {
    "flow matching": MeanFlowConfig(interval_share=0.0),
    "unguided": MeanFlowConfig(),
    "guided": PRESETS["xl2"][1].method,
}


def training_step(
    model_config: ModelConfig,
    objective: MeanFlowConfig,
    batch: int,
    device: torch.device,
    compute_dtype: torch.dtype,
    num_inputs: int = 4,
) -> Callable[[], None]:
    """A function that does one optimizer step, on `num_inputs` batches in turn."""
    torch.manual_seed(0)
    model = DiT(model_config, compute_dtype).to(device)
    with torch.no_grad():
        for p in model.parameters():  # adaLN-zero would make every output zero
            p.add_(0.02 * torch.randn_like(p))
    optimizer, ema = adamw(model, OptimConfig()), EMA(model, (0.9999,))
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
        loss, _ = method.loss(model, latents[i], labels[i], draws[i])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

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
