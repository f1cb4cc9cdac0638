"""The optimizer of a training run, and its moving averages."""

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
        model: the model to train.
        config: the optimizer's settings.
        whole: whether the model is on one device, without a mesh. If it computes in bfloat16, it then gets what FSDP2
            would
            give it: bfloat16 copies of the weights, and bfloat16 gradients for everything computed in bfloat16.
        accumulation: passes per step; gradients of several passes are summed in float32.

    Raises:
        InputError: the backend is unavailable here.
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
