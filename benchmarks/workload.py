"""The training step in benchmarks: random latents, real draws, model, loss, backward, AdamW and EMA.

Ours and each peer run one step from the same weights, on the same batches and draws.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines.port import Port, PortDiT, jvp_flash_attention, sdpa
from mfengine import DiT, MeanFlowConfig, methods
from mfengine.engine.config import OptimConfig
from mfengine.engine.optim import adamw_ema
from mfengine.engine.presets import PRESETS
from mfengine.methods import ImprovedMeanFlowConfig, ObjectiveConfig
from mfengine.networks import NETWORKS, IMFDiTConfig, Network, NetworkConfig
from mfengine.networks.layers import TransformerConfig
from mfengine.ops import fixed_weights

OBJECTIVES: dict[str, MeanFlowConfig] = {
    "flow matching": MeanFlowConfig(interval_share=0.0),
    "unguided": MeanFlowConfig(),
    "guided": PRESETS["xl2"][1].method,
}
IMPROVED: dict[str, ImprovedMeanFlowConfig] = {"improved": PRESETS["imf-xl2"][1].method}  # for an IMFDiT


Call = Callable[[], Any]
Update = Callable[[Tensor, Tensor, Any], None]  # latents (B, C, H, W), labels (B,), draws: one optimizer step


def engine_update(model: Network, objective: ObjectiveConfig) -> Update:
    """mfengine's step on one device."""
    optimizer = adamw_ema(model, OptimConfig(), whole=True)
    weights = fixed_weights(optimizer.copies)
    method = methods.OBJECTIVES.build(objective)

    def update(latents: Tensor, labels: Tensor, draws: Any) -> None:
        with weights:
            loss, _ = method.loss(model, latents, labels, draws)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return update


def torch_pair(parameters: list[Tensor], clip_norm: float | None = None, copies: list[Tensor] | None = None) -> Call:
    """PyTorch's fused AdamW, then one EMA by foreach, PyTorch's fastest. Returns a function that does one step."""
    config = OptimConfig()
    optimizer = torch.optim.AdamW(
        parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )
    for p in parameters:  # made here, because AdamW does not make state on meta tensors
        moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
    averages = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def call() -> None:
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimizer.step()
        torch._foreach_lerp_(averages, parameters, 1 - config.ema_decays[0])
        if copies is not None:
            torch._foreach_copy_(copies, parameters)

    return call


def port_update(model: DiT, objective: MeanFlowConfig, **options: Any) -> Update:
    """A port's step, with `Port`'s options, and PyTorch's fastest optimizer and EMA."""
    port = Port(objective, model.compute_dtype, **options)
    device = model.pos_embed.device
    with device:
        network = PortDiT(model.config).to(device)
    network.load_state_dict(model.state_dict())
    optimizer_step = torch_pair(list(network.parameters()))

    def update(latents: Tensor, labels: Tensor, draws: Any) -> None:
        port.loss(network, latents, labels, draws).backward()
        optimizer_step()
        network.zero_grad()

    return update


IMPLEMENTATIONS: dict[str, Callable[[Any, Any], Update]] = {
    "mfengine": engine_update,
    "port": port_update,
    "port SDPA": partial(port_update, attention=sdpa),
    "port compiled": partial(port_update, compiled=True),
    "port SDPA compiled": partial(port_update, attention=sdpa, compiled=True),
    "port jvp_flash_attention": partial(port_update, attention=sdpa, jvp_attention=jvp_flash_attention),
}


def training_step(
    model_config: TransformerConfig,
    objective: ObjectiveConfig,
    batch: int,
    device: torch.device,
    compute_dtype: torch.dtype,
    num_inputs: int = 4,
    implementation: str = "mfengine",
) -> Callable[[], None]:
    """A function that does one optimizer step of one of IMPLEMENTATIONS, on `num_inputs` batches in turn.

    The peers support only MeanFlow with a `DiT`.
    """
    model = make_model(model_config, device, compute_dtype)
    update = IMPLEMENTATIONS[implementation](model, objective)
    method = methods.OBJECTIVES.build(objective)
    generator = torch.Generator().manual_seed(0)
    shape = (batch, *model_config.latent_shape)
    latents = [torch.randn(shape, generator=generator).to(device) for _ in range(num_inputs)]
    labels = [torch.randint(model_config.num_classes, (batch,), generator=generator).to(device) for _ in latents]
    draws = [method.draw(shape, generator) for _ in latents]
    draws = [d._replace(noise=d.noise.to(device)) for d in draws]
    turn = 0

    def step() -> None:
        nonlocal turn
        i, turn = turn % num_inputs, turn + 1
        update(latents[i], labels[i], draws[i])

    return step


def make_model(config: NetworkConfig, device: torch.device, compute_dtype: torch.dtype = torch.float32) -> Any:
    """A network with a nonzero output: freshly initialised gates and last layers are zero."""
    torch.manual_seed(0)
    with device:
        model = NETWORKS.build(config, compute_dtype).to(device)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model


def small(config: TransformerConfig) -> Any:
    """The same network, but narrow and shallow, for a machine without a GPU."""
    return of_blocks(dataclasses.replace(config, hidden_size=128, num_heads=4, input_size=16), 2)


def tiny(config: TransformerConfig) -> Any:
    """The same network, but as small as possible."""
    return of_blocks(dataclasses.replace(config, hidden_size=32, num_heads=2, input_size=4), 2)


def of_blocks(config: TransformerConfig, depth: int) -> Any:
    """The same network with this many blocks; if it has heads, one of the blocks is the head."""
    heads = {"head_depth": 1} if isinstance(config, IMFDiTConfig) else {}
    return dataclasses.replace(config, depth=depth, **heads)
