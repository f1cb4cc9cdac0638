"""The optimizer of a training run, and its averaged weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mfengine.engine.config import OptimConfig
from mfengine.engine.distributed import parameter_groups
from mfengine.errors import InputError
from mfengine.networks import Network
from mfengine.optim import AdamWEMA


def adamw_ema(model: nn.Module, config: OptimConfig, *, whole: bool = False, accumulation: int = 1) -> AdamWEMA:
    """The optimizer that `config` describes.

    Args:
        model: what it trains.
        config: its settings.
        whole: the model is a network on one device, without a mesh. One that computes in bfloat16 gets what FSDP2 would
            give it: copies of the weights in bfloat16, and gradients in bfloat16 of all that computes in it.
        accumulation: passes of a step; gradients of several are added up in float32.

    Raises:
        InputError: the backend cannot be used here.
    """
    copies = None
    if whole and isinstance(model, Network) and model.compute_dtype == torch.bfloat16:
        copies = [torch.empty_like(p, dtype=torch.bfloat16, requires_grad=False) for p in model.parameters()]
        if accumulation == 1:
            for unit, parameters in parameter_groups(model):
                for p in parameters:
                    p.grad_dtype = unit.dtype
    try:
        return AdamWEMA(
            model.parameters(),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            ema_decays=config.decays(0, 1),
            clip_norm=config.clip_norm,
            copies=copies,
            backend=config.backend,
        )
    except ValueError as error:
        raise InputError(f"--optim.{error}") from None


def averages(model: nn.Module, optimizer: AdamWEMA, decay: float) -> dict[str, Tensor]:
    """One moving average of each parameter, by name."""
    return {name: optimizer.average(p, decay) for name, p in model.named_parameters()}
